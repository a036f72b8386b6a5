"""The int4 format of the routed experts: pack, unpack, scales, and products with packed weights.

A matrix W of N outputs and M inputs is stored as

    weight_packed  (N, M/8)   int32   eight 4-bit codes per word
    weight_scale   (N, M/32)  bf16    one scale per output and group of 32 inputs
    weight_shape   (2,)       int32   (N, M)

    W[n, m] = (code(n, m) - 8) * weight_scale[n, m // 32]        code in 0..15, so W is -8..7 times the scale

The code of input m is nibble m % 8 of word m // 8, lowest bits first. Decoding one word by hand: 0x76543210 holds, from
the lowest nibble up, 0 1 2 3 4 5 6 7, hence the values -8 -7 -6 -5 -4 -3 -2 -1. Words are signed, so after a right
shift the nibble is masked; and on a little-endian machine byte b of a row holds inputs 2b (low) and 2b+1 (high).
There is no zero point, no reordering and no interleaving: this is compressed-tensors' "pack-quantized".

The released weights seem to use only -7..7 with scale = absmax / 7 (quantisation-aware training); compressed-tensors
itself divides by 7.5 and uses -8. Reading handles both. Re-quantising by another rule changes values, therefore saving
never decodes: it writes the words it read.

This file takes tensors and sizes and knows no config and no module. The plain torch here is the reference that every
faster backend is tested against. Letters: N outputs, M inputs, R rows (tokens), E experts, K choices per token.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

GROUP_SIZE = 32  # inputs that share a scale
CODES_PER_WORD = 8


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Integers in -8..7, (..., M), to words, (..., ceil(M/8)) int32. Unused high nibbles of a last word are 0."""
    if values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
        raise ValueError(f"int4 holds -8..7, got values from {int(values.min())} to {int(values.max())}.")
    codes = F.pad(values.to(torch.int32) + 8, (0, -values.shape[-1] % CODES_PER_WORD))
    codes = codes.unflatten(-1, (-1, CODES_PER_WORD))  # (..., M/8, 8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    return (codes << shifts).sum(-1, dtype=torch.int32)  # nibbles are disjoint, so the sum is an or


def unpack_int4(packed: torch.Tensor, num_inputs: int | None = None) -> torch.Tensor:
    """Words, (..., W) int32, to integers in -8..7, (..., num_inputs) int8; all 8W of them by default.

    Goes by bytes, which touches a quarter of the memory that shifting whole words would.
    """
    octets = packed.contiguous().view(torch.uint8)  # (..., 4W), two codes each
    pairs = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)  # (..., 8W)
    return (pairs.view(torch.int8) - 8)[..., :num_inputs]


def quantize_int4(
    weight: torch.Tensor, largest_code: int = 7, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds (..., N, M) to (packed, scale) with scale = absmax / 7 in each group, codes -7..7.

    The scale is rounded to its stored dtype before it divides, and ties go to even. A group of zeros gets the smallest
    fp32 step as scale. M must be a multiple of 32.
    """
    values, scale = round_int4(weight, largest_code, scale_dtype)
    return pack_int4(values.flatten(-2).to(torch.int8)), scale


def round_int4(
    weight: torch.Tensor, largest_code: int = 7, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_int4` packs: whole numbers (..., N, M/32, 32) fp32 and the scales (..., N, M/32)."""
    if weight.shape[-1] % GROUP_SIZE:
        raise ValueError(f"{weight.shape[-1]} inputs are not a multiple of the group size {GROUP_SIZE}.")
    groups = weight.float().unflatten(-1, (-1, GROUP_SIZE))  # (..., N, M/32, 32)
    eps = torch.finfo(torch.float32).eps
    scale = (groups.abs().amax(-1).clamp(min=eps * largest_code) / largest_code).to(scale_dtype)
    return (groups / scale.float().unsqueeze(-1)).round().clamp(-largest_code, largest_code), scale


def dequantize_int4(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """(..., N, M/8) words and (..., N, M/32) scales to (..., N, M) weights in `dtype` (default: the scales').

    The product of a 4-bit integer and an 8-bit bf16 mantissa fits fp32, so bf16 times bf16 rounds once and equals the
    fp32 product rounded to bf16, bit for bit.
    """
    dtype = scale.dtype if dtype is None else dtype
    values = unpack_int4(packed).unflatten(-1, (-1, GROUP_SIZE))  # (..., N, M/32, 32)
    return (values.to(dtype) * scale.to(dtype).unsqueeze(-1)).flatten(-2)


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x (R, M) times the transpose of a packed (N, M) matrix: (R, N) in x's dtype."""
    return F.linear(x, dequantize_int4(packed, scale, x.dtype))


class ExpertMatrices(NamedTuple):
    """One projection (N outputs, M inputs) of all E experts of a layer: int4, or dense if `scale` is None."""

    weight: torch.Tensor  # (E, N, M/8) int32 words, or (E, N, M)
    scale: torch.Tensor | None  # (E, N, M/32)

    @property
    def num_experts(self) -> int:
        return len(self.weight)

    def place(self, expert: int) -> int:
        """Where in the stack one expert is."""
        return expert

    def one(self, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One expert's matrix and scales."""
        place = self.place(expert)
        return self.weight[place], None if self.scale is None else self.scale[place]

    def batches(self, experts: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Cuts a list of experts, (P,) ids, into parts that are in memory together, with their places in the stack."""
        yield slice(None), experts

    def linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """x (R, M) through one expert's matrix, (R, N)."""
        weight, scale = self.one(expert)
        return F.linear(x, weight) if scale is None else int4_linear(x, weight, scale)

    def gathered(self, experts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrices of `experts`, (P,) ids on the device, as (P, N, M) in `dtype`."""
        if self.scale is None:
            return self.weight[experts].to(dtype)
        return dequantize_int4(self.weight[experts], self.scale[experts], dtype)
