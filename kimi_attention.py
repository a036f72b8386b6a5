"""RMSNorm, YaRN rotary embedding and multi-head latent attention (MLA).

Letters: B sequences, T new tokens, S cached + new tokens, H hidden size, h heads, c = kv_lora_rank (512), and per head
dn = qk_nope_head_dim (128), dr = qk_rope_head_dim (64), dv = v_head_dim (128).

    x (B, T, H)
      q_a_proj, q_a_layernorm, q_b_proj  -> q      (B, h, T, dn + dr)   [q_nope | q_pe], q_pe rotated
      kv_a_proj_with_mqa                 -> latent (B, T, c)            normed by kv_a_layernorm; this is cached,
                                            k_pe   (B, 1, T, dr)        one head, rotated, not normed; cached too
      kv_b_proj(latent)                  -> k_nope (B, h, S, dn), v (B, h, S, dv)
      softmax(scale * (q_nope . k_nope + q_pe . k_pe)) v  -> o_proj     (B, T, H)

The cache holds c + dr = 576 values per token and layer, where expanded keys and values would be h(dn + dr + dv) =
20,480. It lies in the cache classes of transformers as a single head: keys (B, 1, S, c), values (B, 1, S, dr).

Sources: DeepSeek-V2 (arXiv:2405.04434 section 2.1) and DeepSeek-V3 (arXiv:2412.19437 eq. 1-11) for MLA, YaRN
(arXiv:2309.00071 section 3) for the frequencies.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_kimi import KimiK25TextConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in fp32, rounded to x's dtype before the weight multiplies."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)

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
    """The reference: (B, h, T, d) times (B, h, S, d), additive mask (B, 1, T, S), softmax in fp32.

    Returns the output (B, T, h, dv) and the weights (B, h, T, S).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


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

        self.q_a_proj = nn.Linear(width, rank, bias=False)
        self.q_a_layernorm = RMSNorm(rank, config.latent_norm_eps)
        self.q_b_proj = nn.Linear(rank, heads * (self.nope_dim + self.rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.latent_dim + self.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, config.latent_norm_eps)
        self.kv_b_proj = nn.Linear(self.latent_dim, heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_dim, width, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) to (B, T, H), and the attention weights (B, h, T, S) if the implementation makes them."""
        query = self.queries(hidden_states, position_embeddings)
        latent, k_pe = self.latents(hidden_states, position_embeddings)
        if past_key_values is not None:
            latent, k_pe = past_key_values.update(latent, k_pe, self.layer_idx)
        key, value = self.expand(latent, k_pe)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(-2)), weights

    def queries(self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(B, T, H) to (B, h, T, dn + dr), the last dr rotated."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, T, dn + dr)
        q_nope, q_pe = q.split((self.nope_dim, self.rope_dim), dim=-1)
        return torch.cat((q_nope, apply_rotary(q_pe, *cos_sin)), dim=-1)

    def latents(
        self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, H) to what is cached: latent (B, 1, T, c) and rotated k_pe (B, 1, T, dr)."""
        compressed = self.kv_a_proj_with_mqa(x).unsqueeze(1)  # (B, 1, T, c + dr)
        latent, k_pe = compressed.split((self.latent_dim, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(latent), apply_rotary(k_pe, *cos_sin)

    def expand(self, latent: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cached (B, 1, S, c) and (B, 1, S, dr) to keys (B, h, S, dn + dr) and values (B, h, S, dv)."""
        kv = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = kv.split((self.nope_dim, self.v_dim), dim=-1)
        return torch.cat((k_nope, k_pe.expand(-1, self.num_heads, -1, -1)), dim=-1), value

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention by the chosen implementation, (B, T, h, dv)."""
        name, attention = self.config._attn_implementation, eager_attention
        if name not in (None, "eager"):
            attention: Callable = ALL_ATTENTION_FUNCTIONS[name]
            # The fused kernels want one width for k and v; without it SDPA falls back to materialised scores.
            value = F.pad(value, (0, query.shape[-1] - self.v_dim))
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return output[..., : self.v_dim], weights
