"""Kimi K2.7 Code: the whole forward pass, top to bottom. Plain torch is the truth; `kimi_backends.py` knows faster code.

    input_ids (B, T) -- embed_tokens --> (B, T, H)      <|media_pad|> rows replaced by vision features:
                                                        pixel_values -- vision_tower, mm_projector --> (M, H)
    61 x DecoderLayer    x += self_attn(input_layernorm(x))              MLA
                         x += mlp(post_attention_layernorm(x))           layer 0 MLP, the others MoE
    norm, lm_head        logits (B, T or the last few, V)

Multi-head latent attention (MLA)

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
that the memory they take is bounded. The cache holds c + dr = 576 values per token and layer, where expanded keys and
values would be h(dn + dr + dv) = 20,480 (see `kimi_cache.py`).

Mixture of experts (MoE)

    x (R, H)
      Router    s = sigmoid(x W^T) in fp32, (R, E)
                choose the K best of s + e_score_correction_bias, within the best groups
                weights = s at the chosen, divided by their sum, times routed_scaling_factor
      Experts   sum_k weights_k * down(silu(gate(x)) * up(x)) of expert k, summed in fp32     kimi_experts.py
      + shared_experts(x)

The correction bias only selects: it was trained to balance load without an auxiliary loss and never scales an output.

Letters: B sequences, T new tokens, S cached + new tokens, H hidden size, h heads, V vocabulary; per head dn =
qk_nope_head_dim (128), dr = qk_rope_head_dim (64), dv = v_head_dim (128); c = kv_lora_rank (512); R rows (all tokens of a
batch), E experts, K experts per token, I inner size; P patches, N media items, M vision tokens of all items.

Names of modules and parameters are the checkpoint's. Sources: DeepSeek-V2 (arXiv:2405.04434 section 2.1) and DeepSeek-V3
(arXiv:2412.19437 eq. 1-11 for MLA, section 2.1.2 for the router), YaRN (arXiv:2309.00071 section 3).
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_kimi import KimiK25Config, KimiK25TextConfig
from .kimi_backends import (
    MLP_ROWS,
    MOE_ROWS,
    by_rows,
    choose_path,
    expanded_head_slices,
    faster_absorb,
    faster_add_rounded,
    faster_expanded_attention,
    faster_latent_attention,
    faster_linear,
    faster_logits,
    faster_rms_norm,
    faster_rotary,
    faster_rotate_and_append,
    faster_route,
    faster_silu_and_mul,
    part_of_mask,
    query_slices,
)
from .kimi_cache import (
    CACHE,
    append,
    cached_length,
    causal_mask,
    filled_lengths,
    lower_right,
    new_cache,
    readable_mask,
    reserve,
    restore,
)
from .kimi_experts import Experts, apply_keeping_dtype, run_experts
from .kimi_generation import KimiGenerationMixin, check_finite, check_ids
from .kimi_pool import pool_experts
from .kimi_pretrained import KimiPretrainedMixin, OnEachDevice, only_moves_inputs
from .kimi_usage import KimiUsageMixin
from .kimi_vision import MoonViT, PatchMergerProjector, PositionEmbedding

if TYPE_CHECKING:  # transformers 4.57 copies only the files an entry point names itself
    from .kimi_attention_triton import latent_attention_triton  # noqa: F401
    from .kimi_checkpoint import load_checkpoint  # noqa: F401
    from .kimi_cpu import linear_bf16  # noqa: F401
    from .kimi_cpu_source import SOURCE  # noqa: F401
    from .kimi_files import Shard  # noqa: F401
    from .kimi_gpu import why_not  # noqa: F401
    from .kimi_int4 import int4_linear  # noqa: F401
    from .kimi_int4_triton import run_experts_triton  # noqa: F401
    from .kimi_layer_triton import route_triton  # noqa: F401
    from .kimi_machine import detect_ram  # noqa: F401
    from .kimi_safetensors import read_header  # noqa: F401
    from .kimi_sizes import weight_bytes  # noqa: F401
    from .kimi_slots import SlotCache  # noqa: F401

ROTATED_HEADS, ROTATED_TOKENS = 8, 128  # of a prompt longer than that, heads rotated at once in fp32


# ------------------------------------------------------------------------------------------------ linear, norm, rotation


class Linear(nn.Linear):
    """y = x W^T, without a bias. x (..., inputs), W (outputs, inputs). An nn.Linear for every tool that looks for one."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = faster_linear(x, self.weight) or F.linear
        return product(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, x (..., dim)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = faster_rms_norm(x, self.weight, rms_norm) or rms_norm
        return norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Statistics in fp32, rounded to x's dtype before the weight multiplies."""
    # A norm reads bf16 and sums in fp32, where squares would be written out: three times the input's size, in fp32.
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse_rms = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return weight * (x * inverse_rms).to(x.dtype)


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
    """Turns the pairs of x (B, h, T, dr) by the angles of cos and sin (B, T, dr/2); see `rotate_pairs`."""
    rotate = faster_rotary(x) or rotate_pairs
    if rotate is rotate_pairs and x.shape[1] > ROTATED_HEADS and x.shape[2] > ROTATED_TOKENS:
        return torch.cat([rotate(some, cos, sin) for some in x.split(ROTATED_HEADS, dim=1)], dim=1)
    return rotate(x, cos, sin)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns adjacent pairs (x[2j], x[2j+1]) by angle j; x (B, h, T, dr), cos and sin (B, T, dr/2).

    The result lists all first members, then all second ones: the layout of the published code, in which k_pe is cached.
    Scores do not depend on it as long as q and k share it. Rotates in fp32 and rounds once.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, dr/2)
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------- multi-head latent attention


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
        """(B, T, H) to (B, T, H), and the attention weights (B, h, T, S) if the implementation is "eager".

        Without a mask `past_length` may say how many keys precede the new tokens; `lengths` (B,), how many tokens of a
        larger cache are there.
        """
        q_nope, q_pe = self.queries(hidden_states)
        new = q_pe, *self.latents(hidden_states)
        q_pe, latent, k_pe = self.rotate_and_append(
            *new, position_embeddings, past_key_values, cache_position
        )
        path = choose_path(self.config.mla_path, q_nope.shape[2], latent.shape[2], latent.device.type)
        attend = self.absorb if path == "absorb" else self.expand
        output, weights = attend(q_nope, q_pe, latent, k_pe, attention_mask, **kwargs)  # (B, T, h, dv)
        return self.o_proj(output.flatten(-2)), weights

    def queries(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, H) to q_nope (B, h, T, dn) and q_pe (B, h, T, dr), not rotated yet."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, T, dn + dr)
        return q.split((self.nope_dim, self.rope_dim), dim=-1)

    def latents(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, H) to what is cached: latent (B, 1, T, c) and k_pe (B, 1, T, dr), not rotated yet."""
        compressed = self.kv_a_proj_with_mqa(x).unsqueeze(1)  # (B, 1, T, c + dr)
        latent, k_pe = compressed.split((self.latent_dim, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(latent), k_pe

    def rotate_and_append(
        self,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        k_pe: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None,
        cache_position: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q_pe; and with the T new ones all S latents (B, 1, S, c) and rotated k_pe (B, 1, S, dr) of the cache."""
        whole = faster_rotate_and_append(q_pe, latent, k_pe, rotate_pairs)
        if whole and (room := reserve(cache, self.layer_idx, latent, k_pe)):
            return whole(q_pe, latent, k_pe, *cos_sin, *room.places), *room.filled
        q_pe, k_pe = apply_rotary(q_pe, *cos_sin), apply_rotary(k_pe, *cos_sin)
        if cache is not None:
            latent, k_pe = append(cache, latent, k_pe, self.layer_idx, cache_position)
        return q_pe, latent, k_pe

    def up_projections(self, latent: torch.Tensor) -> torch.Tensor:
        """`kv_b_proj` as (h, dn + dv, c): UK above UV of each head. A view of the weight wherever that is the weight.

        Adapters and offloading hooks replace what the module computes, not its `weight`; then the module is asked for
        the images of the c unit vectors.
        """
        module = self.kv_b_proj
        if type(module) is Linear and only_moves_inputs(module):
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
        past_length: int | None = None,
        lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention on the cache as it is: latent (B, 1, S, c), k_pe (B, 1, S, dr). Returns (B, T, h, dv)."""
        up, path, wants_weights = self.up_projections(latent), self.config.mla_path, self.wants_weights()
        flash, sizes = "flash" in self.config._attn_implementation, (q_nope.shape[2], latent.shape[2])
        mask = readable_mask(attention_mask, *sizes, latent.device, flash, past_length)
        if whole := faster_absorb(path, q_nope, up, latent, k_pe, mask, wants_weights):
            return whole(q_nope, q_pe, up, latent, k_pe, mask, self.scaling), None

        up_k, up_v = up.split((self.nope_dim, self.v_dim), dim=1)
        q_latent = torch.einsum("bhtd,hdc->bhtc", q_nope, up_k)
        fast = faster_latent_attention(path, q_latent, latent, k_pe, wants_weights, latent_attention)
        attend = fast or latent_attention
        outputs, kept = [], []
        for rows in query_slices(q_latent, latent.shape[2], fast):
            queries = q_latent[:, :, rows], q_pe[:, :, rows]
            output, weights = attend(*queries, latent, k_pe, part_of_mask(mask, rows), self.scaling, lengths)
            outputs.append(output)  # (B, h, rows, c)
            if wants_weights:  # otherwise they are what the workspace bounds
                kept.append(weights)
            del weights
        output = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]  # (B, h, T, c)
        weights = torch.cat(kept, dim=2) if kept else None
        return torch.einsum("bhtc,hvc->bthv", output, up_v), weights

    def expand(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        latent: torch.Tensor,
        k_pe: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_length: int | None = None,
        lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention on keys and values made from the cache, as many heads at a time as the workspace holds.

        Arguments and result as those of `absorb`.
        """
        if attention_mask is None and past_length:
            attention_mask = lower_right(q_nope.shape[2], latent.shape[2], latent.device)
        how = self.config._attn_implementation, self.dropout()
        parts = expanded_head_slices(*how, q_nope, q_pe, latent, k_pe, self.v_dim, attention_mask)
        if len(parts) == 1:
            kv = self.kv_b_proj(latent.squeeze(1))  # (B, S, h (dn + dv))
            return self.attend(q_nope, q_pe, kv, k_pe, attention_mask, **kwargs)
        batch, _, num_new, _ = q_nope.shape
        # Filled in place: a list to be joined at the end would hold the output twice.
        output = q_nope.new_empty(batch, num_new, self.num_heads, self.v_dim)  # (B, T, h, dv)
        up, kept = self.up_projections(latent), []
        for part in parts:
            kv = F.linear(latent.squeeze(1), up[part].flatten(0, 1))  # (B, S, some h (dn + dv))
            queries = q_nope[:, part], q_pe[:, part]
            output[:, :, part], weights = self.attend(*queries, kv, k_pe, attention_mask, **kwargs)
            del kv
            if weights is not None:
                kept.append(weights)
        return output, torch.cat(kept, dim=1) if kept else None

    def attend(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        kv: torch.Tensor,
        k_pe: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of some heads by the chosen implementation, kv (B, S, h (dn + dv)); returns (B, T, h, dv)."""
        implementation, dropout = how = self.config._attn_implementation, self.dropout()
        kv = kv.unflatten(-1, (-1, self.nope_dim + self.v_dim)).transpose(1, 2)  # (B, h, S, dn + dv)
        if fast := faster_expanded_attention(*how, q_nope, q_pe, kv, k_pe, self.v_dim, attention_mask):
            return fast(q_nope, q_pe, kv, k_pe, attention_mask, self.scaling), None
        k_nope, value = kv.split((self.nope_dim, self.v_dim), dim=-1)
        key = torch.cat((k_nope, k_pe.expand(-1, kv.shape[1], -1, -1)), dim=-1)  # (B, h, S, dn + dr)
        query = torch.cat((q_nope, q_pe), dim=-1)  # (B, h, T, dn + dr)
        attention: Callable = eager_attention
        if not self.wants_weights():
            attention = ALL_ATTENTION_FUNCTIONS[implementation]
            # The fused kernels want one width for k and v; without it SDPA falls back to materialised scores.
            value = F.pad(value, (0, max(query.shape[-1] - self.v_dim, 0)))
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return output[..., : self.v_dim], weights

    def wants_weights(self) -> bool:
        return self.config._attn_implementation == "eager"

    def dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0


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
    """The plain code of `expand`: (B, h, T, d) times (B, h, S, d), softmax in fp32, under a mask (B, 1, T, S); without
    one all is seen.

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


def latent_attention(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain code of `absorb`: one key-value head, shared by all query heads.

    q_latent (B, h, T, c), q_pe (B, h, T, dr), latent (B, 1, S, c), k_pe (B, 1, S, dr), mask as `readable_mask` returns,
    which hides what is beyond `lengths`, too.
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


# ------------------------------------------------------------------------------------------------ feed-forward, experts


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases. The dense first layer and the shared expert."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size)
        self.up_proj = Linear(hidden_size, inner_size)
        self.down_proj = Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., H)."""
        return by_rows(self.swiglu, x, MLP_ROWS)

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        activate = faster_silu_and_mul(gate, up, silu_and_mul) or silu_and_mul
        return self.down_proj(activate(gate, up))


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def route(
    scores: torch.Tensor, bias: torch.Tensor, top_k: int, n_group: int, topk_group: int
) -> torch.Tensor:
    """Chooses `top_k` experts by scores + bias, both fp32, from the `topk_group` best groups: (R, E) to (R, K) ids.

    A group's score is the sum of its two best. Closed groups get -inf, not 0: with negative biases an open
    expert may be below 0.
    """
    choice = scores + bias
    if topk_group < n_group:
        grouped = choice.unflatten(-1, (n_group, -1))  # (R, G, E/G)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices  # (R, topk_group)
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter(1, best, False)
        choice = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice.topk(top_k, dim=-1, sorted=False).indices


def choose_experts(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, E) fp32 to topk_ids (R, K) int64 and topk_weights (R, K) fp32."""
    scores = logits.sigmoid()  # (R, E)
    with torch.no_grad():
        topk_ids = route(scores, bias, top_k, n_group, topk_group)
    topk_weights = scores.gather(-1, topk_ids)
    if normalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_ids, topk_weights * scaling


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), weight.float())


class Router(nn.Module):
    """Chooses experts and their weights for each row. Not an nn.Linear: quantizers would pack it by its class."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.top_k, self.n_group = config.num_experts_per_tok, config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(
            torch.zeros(config.n_routed_experts, dtype=torch.float32), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, H) to topk_ids (R, K) int64 and topk_weights (R, K) fp32."""
        with torch.autocast(x.device.type, enabled=False):
            # fp32: scores in bf16 tie, and ties swap experts.
            product = faster_logits(x, self.weight) or linear_fp32
            logits = product(x, self.weight)  # (R, E)
        bias, groups = self.e_score_correction_bias, (self.n_group, self.topk_group)
        choose = faster_route(logits, bias, self.n_group, choose_experts) or choose_experts
        return choose(logits, bias, self.top_k, *groups, self.norm_topk_prob, self.scaling)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return apply_keeping_dtype(self, fn, ("e_score_correction_bias",))


class MoE(nn.Module):
    """Router, routed experts and the shared expert, which every token passes with weight one."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H) to (B, T, H)."""
        return by_rows(self.mix, x, MOE_ROWS)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)  # (R, H)
        topk_ids, topk_weights = self.gate(flat)
        self.experts.prefetch(topk_ids)
        shared = self.shared_experts(x)
        routed = self.experts(flat, topk_ids, topk_weights).view_as(x)
        add = faster_add_rounded(routed, shared, x.dtype, add_rounded) or add_rounded
        return add(routed, shared, x.dtype)


def add_rounded(wide: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A sum in fp32, rounded, plus another. (Under autocast they differ in dtype.)"""
    return wide.to(dtype) + other


# --------------------------------------------------------------------------------------------------------------- layers


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: KimiK25TextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MLA(config, layer_idx)
        self.mlp = self.feed_forward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(self, config: KimiK25TextConfig) -> nn.Module:
        return MLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) to (B, T, H), and the attention weights where the implementation makes them."""
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class MoEDecoderLayer(DecoderLayer):
    """A layer with experts. A class of its own, since accelerate takes the first of a class for the size of them all."""

    def feed_forward(self, config: KimiK25TextConfig) -> nn.Module:
        return MoE(config)


class Decoder(nn.Module):
    """`language_model.model`: embeddings, layers, final norm."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            (MoEDecoderLayer if config.is_moe_layer(idx) else DecoderLayer)(config, idx)
            for idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        debug_nan: bool = False,
        counted: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """inputs_embeds (B, T, H) to the normed last hidden state (B, T, H). `counted`: position_ids just count up."""
        position_ids = position_ids.expand(inputs_embeds.shape[:2])
        given = None if counted else position_ids
        mask, past_length = causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, given, cache_position
        )
        shared = OnEachDevice(
            position_embeddings=self.rotary_emb(position_ids),
            attention_mask=mask,
            cache_position=cache_position,
            lengths=filled_lengths(past_key_values, cache_position, len(inputs_embeds)),
        )
        kwargs.update(past_key_values=past_key_values, past_length=past_length)
        all_states: list[Any] = [inputs_embeds]
        all_weights: list[Any] = []
        x = inputs_embeds
        for idx, layer in enumerate(self.layers):
            x, weights = layer(x, **shared.for_layer(layer), **kwargs)
            if debug_nan:
                check_finite(x, f"layer {idx}")
            if output_hidden_states:
                all_states.append(x)
            if output_attentions:
                all_weights.append(weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE: past_key_values},
            hidden_states=(*all_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )


class CausalLM(nn.Module):
    """`language_model`: the decoder and its head, as the checkpoint nests them."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)


# ---------------------------------------------------------------------------------------------------------- whole model

# What kernels of a GPU are compared with, by operation.
PLAIN_CODE = {
    "add_rounded": add_rounded,
    "experts": run_experts,
    "latent_attention": latent_attention,
    "rms_norm": rms_norm,
    "rotate_and_append": rotate_pairs,
    "route": choose_experts,
    "silu_and_mul": silu_and_mul,
}


class KimiK25PreTrainedModel(KimiPretrainedMixin, PreTrainedModel):
    """What transformers wants to know about the model: how it is placed, initialised, read and written."""

    config_class = KimiK25Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer", "MoEDecoderLayer", "MoonViTBlock")
    _skip_keys_device_placement = ("past_key_values", "cache")
    # The loader keeps these in fp32 itself; said again for tools that look here.
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)
    _supports_flash_attn = _supports_flash_attn_2 = _supports_sdpa = _supports_attention_backend = True
    plain_code = PLAIN_CODE

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with `initializer_range` for matrices, ones and zeros for norms and biases; packed experts stay zero."""
        std = self.config.text_config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, Router, PositionEmbedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts) and not module.packed:
            for weight in module.parameters():
                nn.init.normal_(weight, std=std)
        elif isinstance(module, (RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        if isinstance(module, Router):
            nn.init.zeros_(module.e_score_correction_bias)
        elif isinstance(bias := getattr(module, "bias", None), torch.Tensor):
            nn.init.zeros_(bias)


class KimiK25ForConditionalGeneration(KimiK25PreTrainedModel, KimiUsageMixin, KimiGenerationMixin):
    """The whole model: MoonViT, projector, language model."""

    def __init__(self, config: KimiK25Config):
        super().__init__(config)
        for part in (config.text_config, config.vision_config):
            # transformers decides for the top config only, and without a decision it would make no causal mask at all.
            if part._attn_implementation is None:
                part._attn_implementation = config._attn_implementation
        if config.text_config.first_k_dense_replace >= config.text_config.num_hidden_layers:
            self._keep_in_fp32_modules_strict = None  # 4.57 insists that the names listed there exist
        self.vision_tower = MoonViT(config.vision_config)
        self.mm_projector = PatchMergerProjector(config.vision_config)
        self.language_model = CausalLM(config.text_config)
        self.expert_pool = pool_experts(self, config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        grid_thws: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        debug_nan: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over T new tokens.

        Args:
            input_ids: (B, T). Or inputs_embeds: (B, T, H).
            pixel_values: (P, 3, 14, 14) patches of all items. grid_thws: (N, 3) frames, rows, columns of each item.
            attention_mask: (B, cached + T), 1 = attend; or a prepared 4-D mask.
            position_ids: (B, T); by default counted over the attention mask, so left padding takes no positions.
            labels: (B, T), `ignore_index` where there is no loss; shifted inside.
            logits_to_keep: 0 for all positions, n for the last n, or indices.
            cache: another name of past_key_values, which transformers uses from 5.24 on.
            debug_nan: a ValueError names the first layer that makes a NaN or an infinity; waits for the device after each.

        Returns logits (B, kept, V) in the model's dtype, the loss if labels are given, and the cache.
        """
        past_key_values = self._cache_to_use(cache if past_key_values is None else past_key_values, use_cache)
        inputs_embeds = self._embed(input_ids, inputs_embeds, pixel_values, grid_thws, debug_nan)  # (B, T, H)
        # cache_position: 4.57's generate() gives it, 5.x has no such thing.
        past_length, cache_position = cached_length(past_key_values), kwargs.pop("cache_position", None)
        counted = position_ids is None and attention_mask is None
        position_ids, cache_position = self._positions(
            inputs_embeds, attention_mask, position_ids, past_length, cache_position
        )
        try:
            outputs = self.language_model.model(
                inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                counted=counted,
                past_key_values=past_key_values,
                cache_position=cache_position,
                output_attentions=self._option("output_attentions", output_attentions),
                output_hidden_states=self._option("output_hidden_states", output_hidden_states),
                debug_nan=debug_nan,
                **kwargs,
            )
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.language_model.lm_head(outputs.last_hidden_state[:, keep])
            if debug_nan:
                check_finite(logits, "lm_head")
            loss = None if labels is None else self._loss(logits, labels, **kwargs)
        except BaseException:
            restore(past_key_values, past_length)
            raise
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: past_key_values},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_image_features(self, pixel_values: torch.Tensor, grid_thws: torch.Tensor) -> list[torch.Tensor]:
        """(P, 3, 14, 14) and (N, 3) to N tensors (tokens of the item, H); an item is an image or a chunk of a video."""
        return self.mm_projector(self.vision_tower(pixel_values, grid_thws))

    def _option(self, name: str, value: bool | None) -> bool:
        return getattr(self.config, name) if value is None else value

    def _cache_to_use(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The given cache, or a new one if one is to be used."""
        text = self.config.text_config
        if use_cache is None:
            use_cache = text.use_cache and not (self.training and self.is_gradient_checkpointing)
        return new_cache(text) if use_cache and given is None else given

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        grid_thws: torch.Tensor | None,
        debug_nan: bool,
    ) -> torch.Tensor:
        """(B, T) ids or (B, T, H) embeddings to (B, T, H), with the features of media in their places."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            check_ids(input_ids, self.config.text_config.vocab_size)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = cast(torch.Tensor, inputs_embeds)
        if debug_nan:
            check_finite(inputs_embeds, "embed_tokens")
        if pixel_values is None or not pixel_values.numel():
            return inputs_embeds
        return self._insert_media(input_ids, inputs_embeds, pixel_values, grid_thws)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.FloatTensor:
        return self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.text_config.vocab_size,
            ignore_index=self.config.ignore_index,
            **{key: kwargs[key] for key in ("num_items_in_batch",) if key in kwargs},
        )
