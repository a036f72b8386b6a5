"""RMSNorm, YaRN rotary embedding and multi-head latent attention (MLA).

Letters: B sequences, T new tokens, S cached + new tokens, H hidden size, h heads, c = kv_lora_rank (512), and per head
dn = qk_nope_head_dim (128), dr = qk_rope_head_dim (64), dv = v_head_dim (128).

    x (B, T, H)
      q_a_proj, q_a_layernorm, q_b_proj  -> q_nope (B, h, T, dn), q_pe (B, h, T, dr), the latter rotated
      kv_a_proj_with_mqa                 -> latent (B, 1, T, c)         normed by kv_a_layernorm; this is cached,
                                            k_pe   (B, 1, T, dr)        one head, rotated, not normed; cached too
    expand    kv_b_proj(latent)          -> k_nope (B, h, S, dn), v (B, h, S, dv)
              softmax(scale * (q_nope . k_nope + q_pe . k_pe)) v
    absorb    kv_b_proj's rows are UK (h, dn, c) and UV (h, dv, c), and since q . (UK c) = (UK^T q) . c
              UV softmax(scale * ((UK^T q_nope) . latent + q_pe . k_pe)) latent
      o_proj                             -> (B, T, H)

The two are equal but for rounding. Expanding costs 2c(dn + dv) flops per cached token and head, once per call;
absorbing makes each pair of query and key 2(2c + dr) flops instead of 2(dn + dr + dv). So few new tokens absorb, and
read nothing but the cache: a step's time hardly grows with depth. Many new tokens expand, a few heads at a time, so
that the memory they take is bounded.

The cache holds c + dr = 576 values per token and layer, where expanded keys and values would be h(dn + dr + dv) =
20,480. It lies in the cache classes of transformers as a single head: keys (B, 1, S, c), values (B, 1, S, dr).

Sources: DeepSeek-V2 (arXiv:2405.04434 section 2.1) and DeepSeek-V3 (arXiv:2412.19437 eq. 1-11) for MLA, YaRN
(arXiv:2309.00071 section 3) for the frequencies.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .configuration_kimi import KimiK25TextConfig
from .kimi_cache import append
from .kimi_cpu import absorb as kimi_cpu_absorb
from .kimi_cpu import has_prefill_attention, prefill_attention, rms_norm_bf16, rotary_bf16, why_unavailable
from .kimi_linear import Linear, suits_compiled_code
from .kimi_sizes import WORKSPACE_BYTES

NO_TRITON: str | None = None
try:
    from .kimi_attention_triton import latent_attention_triton
except ImportError as error:
    NO_TRITON = f"triton cannot be imported ({error})"

logger = logging.get_logger(__name__)

# New tokens up to which attention runs on the latent. On paper c(dn + dv) / (2c - dn - dv) = 171 against a long cache,
# 0 without one; see `choose_path`. Measured on a CPU between 40 and 60 (LOG.md); accelerators were not measured.
ABSORB_UP_TO, ABSORB_UP_TO_ON_CPU = 128, 48
ROTATED_HEADS = 8  # of a long prompt at once, in fp32
FEW_QUERIES = 8  # new tokens up to which the compiled code of a CPU does absorbed attention


class RMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in fp32, rounded to x's dtype before the weight multiplies."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_contiguous() and self.weight.is_contiguous() and suits_compiled_code(x, self.weight):
            return rms_norm_bf16(x, self.weight, self.eps)
        # A norm reads bf16 and sums in fp32, where squares would be written out: three times the input's size, in fp32.
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse_rms = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
        return self.weight * (x * inverse_rms).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def yarn_inv_freq(dim: int, rope: dict[str, Any]) -> torch.Tensor:
    """Radians per position of the dim/2 rotated pairs, (dim/2,) fp32 on the CPU.

    Pair j turns by base^(-2j/dim) per token. YaRN leaves the fast pairs alone, slows those that would not complete a
    turn within the original context by `factor`, and blends the pairs between `low` and `high` linearly.
    """
    theta = rope["rope_theta"]
    plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    if rope["rope_type"] != "yarn":
        return plain

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes this many full turns within the original context."""
        original = rope["original_max_position_embeddings"]
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(rope["beta_fast"])), 0)
    high = min(math.ceil(pair_that_turns(rope["beta_slow"])), dim - 1)
    width = high - low or 0.001  # both at the same pair: a step
    slowed = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return plain / rope["factor"] * slowed + plain * (1 - slowed)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1: how much YaRN sharpens attention for a context stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: KimiK25TextConfig) -> float:
    """(dn + dr)^-0.5, times YaRN's m squared; applied at every length, also to the unrotated part."""
    scale, rope = config.qk_head_dim**-0.5, config.rope_parameters
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        scale *= yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2
    return scale


def rope_amplitude(rope: dict[str, Any]) -> float:
    """Factor on cos and sin: m(mscale) / m(mscale_all_dim), 1.0 for every published checkpoint."""
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_mscale(rope["factor"], rope["mscale"]) / yarn_mscale(
            rope["factor"], rope["mscale_all_dim"]
        )
    return yarn_mscale(rope["factor"], 1.0)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotated pairs; one for all layers.

    The frequencies are neither parameter nor buffer: meta initialisation would leave a buffer empty, and `.half()`
    would round it. They are made once for each device.
    """

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.dim, self.rope = config.qk_rope_head_dim, config.rope_parameters
        self.amplitude = rope_amplitude(self.rope)
        self._inv_freq: dict[torch.device, torch.Tensor] = {}

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        if device not in self._inv_freq:
            self._inv_freq[device] = yarn_inv_freq(self.dim, self.rope).to(device)
        return self._inv_freq[device]

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) positions to cos and sin, each (B, T, dr/2) fp32.

        fp32 on purpose: bf16 angles lose whole turns, and fp64 ones would differ from every engine far out.
        """
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq(position_ids.device)
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns adjacent pairs (x[2j], x[2j+1]) by angle j; x (B, h, T, dr), cos and sin (B, T, dr/2).

    The result lists all first members, then all second ones: the layout of the published code, in which k_pe is cached.
    Scores do not depend on it as long as q and k share it. Rotates in fp32 and rounds once.
    """
    if x.stride(-1) == 1 and suits_compiled_code(x):
        return rotary_bf16(x, cos, sin)
    if x.shape[1] > ROTATED_HEADS and x.shape[2] > ABSORB_UP_TO:
        return torch.cat([apply_rotary(some, cos, sin) for some in x.split(ROTATED_HEADS, dim=1)], dim=1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, dr/2)
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: (B, h, T, d) times (B, h, S, d), softmax in fp32; a mask (B, 1, T, S), for without one all is seen.

    Returns the output (B, T, h, dv) and the weights (B, h, T, S).
    """
    scores = hide(query @ key.transpose(-1, -2) * scaling, attention_mask)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def hide(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores under a mask: additive, or boolean with True = seen. A row that sees nothing stays finite."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:  # adding it, as some ports do, would show everything
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


class MLA(nn.Module):
    """Multi-head latent attention of one layer; see the top of this file."""

    is_causal = True  # read by transformers' attention functions when they get no mask

    def __init__(self, config: KimiK25TextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_groups = config.num_attention_heads, 1
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_dim, self.latent_dim = config.v_head_dim, config.kv_lora_rank
        self.scaling = softmax_scale(config)
        width, rank, heads = config.hidden_size, config.q_lora_rank, self.num_heads

        self.q_a_proj = Linear(width, rank)
        self.q_a_layernorm = RMSNorm(rank, config.latent_norm_eps)
        self.q_b_proj = Linear(rank, heads * (self.nope_dim + self.rope_dim))
        self.kv_a_proj_with_mqa = Linear(width, self.latent_dim + self.rope_dim)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, config.latent_norm_eps)
        self.kv_b_proj = Linear(self.latent_dim, heads * (self.nope_dim + self.v_dim))
        self.o_proj = Linear(heads * self.v_dim, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) to (B, T, H), and the attention weights (B, h, T, S) if the implementation is "eager"."""
        q_nope, q_pe = self.queries(hidden_states, position_embeddings)
        latent, k_pe = self.latents(hidden_states, position_embeddings)
        if past_key_values is not None:
            latent, k_pe = append(past_key_values, latent, k_pe, self.layer_idx, cache_position)
        path = choose_path(self.config.mla_path, q_nope.shape[2], latent.shape[2], latent.device.type)
        attend = self.absorb if path == "absorb" else self.expand
        output, weights = attend(q_nope, q_pe, latent, k_pe, attention_mask, **kwargs)  # (B, T, h, dv)
        return self.o_proj(output.flatten(-2)), weights

    def queries(
        self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, H) to q_nope (B, h, T, dn) and rotated q_pe (B, h, T, dr)."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, T, dn + dr)
        q_nope, q_pe = q.split((self.nope_dim, self.rope_dim), dim=-1)
        return q_nope, apply_rotary(q_pe, *cos_sin)

    def latents(
        self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, H) to what is cached: latent (B, 1, T, c) and rotated k_pe (B, 1, T, dr)."""
        compressed = self.kv_a_proj_with_mqa(x).unsqueeze(1)  # (B, 1, T, c + dr)
        latent, k_pe = compressed.split((self.latent_dim, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(latent), apply_rotary(k_pe, *cos_sin)

    def up_projections(self, latent: torch.Tensor) -> torch.Tensor:
        """`kv_b_proj` as (h, dn + dv, c): UK above UV of each head. A view of the weight wherever that is the weight.

        Adapters and offloading hooks replace what the module computes, not its `weight`; then the module is asked for
        the images of the c unit vectors.
        """
        module = self.kv_b_proj
        if type(module) is Linear and not hasattr(module, "_hf_hook"):
            weight = module.weight
        else:
            units = torch.eye(self.latent_dim, dtype=latent.dtype, device=latent.device)
            weight = module(units).T
        return weight.unflatten(0, (self.num_heads, -1))

    def absorb(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        k_pe: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention on the cache as it is: latent (B, 1, S, c), k_pe (B, 1, S, dr). Returns (B, T, h, dv)."""
        up = self.up_projections(latent)
        flash = "flash" in self.config._attn_implementation
        mask = readable_mask(attention_mask, q_nope.shape[2], latent.shape[2], latent.device, flash)
        if self.suits_compiled_code(q_nope, up, latent, mask):
            return kimi_cpu_absorb(q_nope, q_pe, up, latent, k_pe, mask, self.scaling), None
        up_k, up_v = up.split((self.nope_dim, self.v_dim), dim=1)
        q_latent = torch.einsum("bhtd,hdc->bhtc", q_nope, up_k)
        attend = pick_latent_attention(self.config.mla_path, q_latent, self.wants_weights())
        outputs, kept = [], []
        step = queries_at_once(q_latent, latent.shape[2])
        for start in range(0, q_latent.shape[2], step):
            rows = slice(start, start + step)
            mask_rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
            output, weights = attend(
                q_latent[:, :, rows], q_pe[:, :, rows], latent, k_pe, mask_rows, self.scaling
            )
            outputs.append(output)  # (B, h, step, c)
            if self.wants_weights():  # otherwise they are what the workspace bounds
                kept.append(weights)
            del weights
        output = torch.cat(outputs, dim=2)  # (B, h, T, c)
        weights = torch.cat(kept, dim=2) if kept else None
        return torch.einsum("bhtc,hvc->bthv", output, up_v), weights

    def expand(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        k_pe: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention on keys and values made from the cache, as many heads at a time as the workspace holds."""
        up, joined, weights = None, None, []
        # Keys and padded values; PyTorch's own kernel for a CPU may pack both once more.
        copies = 2 if latent.is_cuda or self.suits_compiled_prefill(q_nope, latent, attention_mask) else 4
        per_token = self.nope_dim + self.v_dim + copies * (self.nope_dim + self.rope_dim)
        heads = heads_at_once(latent, self.num_heads, per_token)
        for start in range(0, self.num_heads, heads):
            part = slice(start, start + heads)
            if heads >= self.num_heads:
                kv = self.kv_b_proj(latent.squeeze(1))  # (B, S, h (dn + dv))
            else:
                up = self.up_projections(latent) if up is None else up
                kv = F.linear(latent.squeeze(1), up[part].flatten(0, 1))
            kv = kv.unflatten(-1, (-1, self.nope_dim + self.v_dim)).transpose(1, 2)
            compiled = self.suits_compiled_prefill(q_nope, kv, attention_mask)
            attend = self.attend_compiled if compiled else self.attend
            output, scores = attend(q_nope[:, part], q_pe[:, part], kv, k_pe, attention_mask, **kwargs)
            del kv
            weights.append(scores)
            if heads >= self.num_heads:
                joined = output
                break
            if joined is None:
                joined = output.new_empty(*output.shape[:2], self.num_heads, self.v_dim)
            joined[:, :, part] = output  # (B, T, h, dv); a list to be joined at the end would be there twice
        return joined, None if weights[0] is None else torch.cat(weights, dim=1)

    def attend(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        kv: torch.Tensor,
        k_pe: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of some heads by the chosen implementation, kv (B, h, S, dn + dv); returns (B, T, h, dv)."""
        k_nope, value = kv.split((self.nope_dim, self.v_dim), dim=-1)
        key = torch.cat((k_nope, k_pe.expand(-1, kv.shape[1], -1, -1)), dim=-1)
        query = torch.cat((q_nope, q_pe), dim=-1)
        attention: Callable = eager_attention
        if not self.wants_weights():
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            # The fused kernels want one width for k and v; without it SDPA falls back to materialised scores.
            value = F.pad(value, (0, max(query.shape[-1] - self.v_dim, 0)))
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return output[..., : self.v_dim], weights

    def attend_compiled(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        kv: torch.Tensor,
        k_pe: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The same by the CPU's compiled code, which neither joins keys nor pads values."""
        batch, heads, num_new, _ = q_nope.shape
        output = q_nope.new_empty(batch, num_new, heads, self.v_dim)
        mask = None if attention_mask is None else attention_mask[..., : kv.shape[2]]
        # Without a mask the first T of S keys belong to the new tokens, see `readable_mask`; a single token sees all.
        offset = 0 if mask is None and num_new > 1 else None
        prefill_attention(q_nope, q_pe, kv, k_pe, mask, offset, self.scaling, output.transpose(1, 2))
        return output, None

    def suits_compiled_code(
        self, q_nope: torch.Tensor, up: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None
    ) -> bool:
        """Whether one call into the CPU's compiled code can do it all: a few bf16 rows, nothing recorded."""
        if self.config.mla_path not in ("auto", "absorb", "absorb-cpu") or latent.device.type != "cpu":
            return False
        plain = latent.dtype == up.dtype == q_nope.dtype == torch.bfloat16 and up.is_contiguous()
        plain = plain and latent.stride(-1) == 1 and latent.shape[-1] <= 4096
        plain = plain and (mask is None or mask.dtype == torch.bool) and not self.wants_weights()
        recorded = torch.is_grad_enabled() and (q_nope.requires_grad or up.requires_grad)
        few = q_nope.shape[2] <= FEW_QUERIES
        return (
            plain and few and not recorded and not torch.compiler.is_compiling() and why_unavailable() is None
        )

    def suits_compiled_prefill(
        self, q_nope: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None
    ) -> bool:
        """Whether the CPU's compiled code can take the place of SDPA: bf16, nothing recorded or dropped."""
        if self.config._attn_implementation != "sdpa" or kv.device.type != "cpu":
            return False
        plain = kv.dtype == q_nope.dtype == torch.bfloat16 and (mask is None or mask.dtype == torch.bool)
        plain = plain and not (self.nope_dim % 2 or self.rope_dim % 2 or self.v_dim % 64)
        plain = plain and not (self.training and self.config.attention_dropout)
        recorded = torch.is_grad_enabled() and (q_nope.requires_grad or kv.requires_grad)
        return plain and not recorded and not torch.compiler.is_compiling() and has_prefill_attention()

    def wants_weights(self) -> bool:
        return self.config._attn_implementation == "eager"


# ----------------------------------------------------------------------------------------------------- expand helpers


def choose_path(path: str, num_new: int, num_total: int, device: str = "cpu") -> str:
    """ "absorb" or "expand" for T new tokens against S cached and new ones; `path` forces one unless it is "auto"."""
    if path != "auto":
        return path.partition("-")[0]
    # Expanding is done once for all queries, so it pays from some number of them on; sooner when there is little to expand.
    most = ABSORB_UP_TO_ON_CPU if device == "cpu" else ABSORB_UP_TO
    return "absorb" if num_new == 1 or (num_new <= most and num_total >= 4 * num_new) else "expand"


def heads_at_once(latent: torch.Tensor, num_heads: int, per_token: int) -> int:
    """Heads of which so many values for each of S tokens fit WORKSPACE_BYTES; at least one."""
    batch, _, length, _ = latent.shape
    per_head = batch * length * per_token * latent.element_size()
    return max(1, min(num_heads, WORKSPACE_BYTES // max(per_head, 1)))


# ----------------------------------------------------------------------------------------------------- absorb helpers


def readable_mask(
    mask: torch.Tensor | None, num_new: int, num_total: int, device: torch.device, flash: bool = False
) -> torch.Tensor | None:
    """Any mask transformers makes, as (B or 1, 1, T, S): additive floats, or booleans where True may be seen.

    None means causal, and for a single new token nothing is hidden. For flash attention the new tokens are then the last
    of S, and padding is (B, S), 1 = a token. For SDPA they are the first: it gets None for whole prompts only, also into
    a static cache, whose S is its capacity.
    """
    if mask is not None and mask.ndim == 4:
        return mask[..., :num_total]
    causal = None
    if num_new > 1:
        ones = torch.ones(num_new, num_total, dtype=torch.bool, device=device)
        causal = ones.tril(num_total - num_new if flash else 0)[None, None]
    if mask is None:
        return causal
    padding = mask[:, None, None, :num_total].bool()
    return padding if causal is None else padding & causal


def queries_at_once(q_latent: torch.Tensor, num_total: int) -> int:
    """New tokens whose scores (fp32 twice and once in the model's dtype) fit WORKSPACE_BYTES; at least one."""
    batch, heads, num_new, _ = q_latent.shape
    per_query = batch * heads * num_total * (8 + q_latent.element_size())
    return max(1, min(num_new, WORKSPACE_BYTES // per_query))


def pick_latent_attention(path: str, q_latent: torch.Tensor, wants_weights: bool) -> Callable:
    """The one place that chooses how absorbed attention runs. `path` may force it: "absorb-eager", "-sdpa" or "-triton".

    Raises ValueError if the kernel was asked for by name and cannot be used, with the reason.
    """
    forced, few = path.partition("-")[2], q_latent.shape[2] <= FEW_QUERIES
    recorded = torch.is_grad_enabled() and q_latent.requires_grad
    if forced == "triton" or (not forced and q_latent.is_cuda and few and not wants_weights and not recorded):
        reason = why_not_triton(q_latent.device, q_latent.dtype)
        if reason is None:
            return latent_attention_triton
        if forced:
            raise ValueError(f"mla_path '{path}' is unavailable: {reason}.")
    return latent_attention_sdpa if forced == "sdpa" and not wants_weights else latent_attention


@functools.cache
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernel runs on this device and agrees with the reference, which is tried once on a short cache."""
    if NO_TRITON is not None or device.type != "cuda":
        return NO_TRITON or f"the cache is on {device}"
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 1, 512), (1, 4, 1, 64), (1, 1, 300, 512), (1, 1, 300, 64))
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    try:
        want, _ = latent_attention(*tensors, None, 0.05)
        got, _ = latent_attention_triton(*tensors, None, 0.05)
        wrong = float((got - want).abs().max() / want.abs().max())
        if not wrong < 0.05:
            raise ArithmeticError(f"it differs by {wrong:.3g} of the largest output")
    except Exception as problem:  # whatever a compiler or driver may raise: the reference still works
        reason = f"its kernel fails on {device} ({type(problem).__name__}: {problem})"
        logger.warning(f"attention on the latent runs in plain torch: triton is there, but {reason}")
        return reason
    return None


def latent_attention(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: one key-value head, shared by all query heads.

    q_latent (B, h, T, c), q_pe (B, h, T, dr), latent (B, 1, S, c), k_pe (B, 1, S, dr), mask as `readable_mask` returns.
    Returns (B, h, T, c) and the weights (B, h, T, S). Scores and softmax are fp32: the small rotated part is multiplied
    in fp32, so a score is rounded once, like an expanded one.
    """
    scores = many_times_one(q_latent, latent.transpose(-1, -2)).float()
    scores = (scores + many_times_one(q_pe.float(), k_pe.float().transpose(-1, -2))) * scaling
    weights = hide(scores, mask).softmax(dim=-1).to(q_latent.dtype)
    return many_times_one(weights, latent), weights


def many_times_one(many: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """(B, h, T, k) times (B, 1, k, n), all heads as the rows of one product: the shared operand is read once."""
    return (many.flatten(1, 2) @ one.squeeze(1)).unflatten(1, many.shape[1:3])


def latent_attention_sdpa(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, None]:
    """The same through PyTorch's fused attention: scores are never stored, but latent and k_pe are joined by a copy."""
    heads = q_latent.shape[1]
    query, key = torch.cat((q_latent, q_pe), dim=-1), torch.cat((latent, k_pe), dim=-1)
    key, value = key.expand(-1, heads, -1, -1), latent.expand(-1, heads, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling), None
