"""Triton kernels for attention on the latent cache: few queries against many cached tokens.

Letters: B sequences, h heads, T new tokens, S cached and new tokens, c = kv_lora_rank (512), dr = qk_rope_head_dim (64).

    q_latent (B, h, T, c)   q_pe (B, h, T, dr)   latent (B, 1, S, c)   k_pe (B, 1, S, dr)
    score  = scaling * (q_latent . latent + q_pe . k_pe)
    output = softmax(score) latent                                     (B, h, T, c)

All h T queries of a sequence share one cache, and the latent is both key and value. So a step at depth S has to read
2 (c + dr) bytes a token at least, and the kernels are built to read them only once:

    partial  A program takes up to 64 heads of one new token as the rows of its products, walks over its part of the
             cache in blocks of keys, uses each block for the scores and again for the output, and keeps a running
             maximum and sum (online softmax). One sequence has too few queries to fill a GPU, so the cache is split
             between programs (flash-decoding). It leaves an unnormalised output, its maximum and its sum. Heads share
             a mask, so a program needs one row of it; a tile of several, loaded in another layout than the scores',
             made ptxas serialise the products.
    merge    Rescales the parts of a query to their common maximum and adds them, in the order of the splits.

The number of splits follows from shapes and the device, never from data, so a call can be captured in a CUDA graph. With
`lengths`, tokens beyond a sequence's length are not read, and the splits share the rest: a static cache costs only
its filled part. Cache tensors may be slices of larger buffers; their strides are used as they are.

Masks are what `kimi_cache.readable_mask` returns: booleans, True = seen, or additive floats. A hidden key scores the
smallest float rather than -inf, so a query that sees nothing gets the mean of the cache like the reference, and no NaN.

Scores and sums are fp32; only the probabilities are rounded to the cache's dtype, for the second product.

The block sizes were NOT tuned on a GPU; `benchmarks/bench_attention.py --tune` searches a grid of them. TRITON_INTERPRET=1
in the environment before this file is imported runs it on the CPU, slowly. Flash-decoding: Dao et al., "Flash-Decoding
for long-context inference", 2023; online softmax: Milakov and Gimelshein, arXiv:1805.02867.
"""

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .kimi_layer_triton import on_device_of

try:  # inside `try`, the remote-code loader does not take triton for a hard requirement
    import triton
    import triton.language as tl
except ImportError:
    raise

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
MIN_KEYS = 256  # of a split, at least; a part costs h T (c + 2) floats written and read again
LOG2_E = math.log2(math.e)  # exp(x) = 2^(LOG2_E x), and 2^x is what the hardware has
LOWEST = torch.finfo(torch.float32).min


class AttentionBlocks(NamedTuple):
    """A program holds `heads` rows and walks over `keys` cached tokens at a time."""

    heads: int
    keys: int
    warps: int
    stages: int


# Untuned, best first; the rest are for a device or a compiler on which the first fails its test. 64 rows of 512 take half
# the registers of a Hopper multiprocessor for their output alone; on Blackwell's (major 10), where that is in tensor
# memory but 64 keys take 344 KiB of shared memory, 32 keys fit.
SMALL = AttentionBlocks(16, 32, 4, 2)
OTHER: tuple[AttentionBlocks, ...] = (SMALL,)
BY_MAJOR: dict[int, tuple[AttentionBlocks, ...]] = {  # by compute capability
    9: (AttentionBlocks(64, 64, 8, 2), SMALL),
    10: (AttentionBlocks(64, 32, 8, 2), SMALL),
}
FP32: tuple[AttentionBlocks, ...] = (AttentionBlocks(16, 16, 4, 1),)

# Per device what failed its test there: keys of `SelfTest`, added by whoever runs `self_test_cases`.
UNUSABLE: dict[torch.device, set[tuple[torch.dtype, AttentionBlocks]]] = {}


def latent_attention_triton(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    lengths: torch.Tensor | None = None,
    blocks: AttentionBlocks | None = None,
) -> tuple[torch.Tensor, None]:
    """The same as `modeling_kimi.latent_attention`, without the weights: (B, h, T, c) in q_latent's dtype, and None.

    `mask` is (B or 1, 1, T or 1, S). `lengths`, (B,) integers on the device and at least 1, ends each sequence's cache
    early: later tokens need not be written, and a mask need not hide them.
    """
    batch, heads, num_new, width = q_latent.shape
    num_total, rope_width = latent.shape[2], k_pe.shape[3]
    check(q_latent, q_pe, latent, k_pe, mask, lengths)
    blocks = blocks or pick_blocks(heads, q_latent)
    row_blocks = num_new * triton.cdiv(heads, blocks.heads)
    splits = num_splits(batch * row_blocks, num_total, q_latent.device)
    dtype = torch.float32 if INTERPRETED and q_latent.dtype == torch.bfloat16 else q_latent.dtype

    def scratch(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q_latent.device)

    parts = scratch(batch, splits, heads * num_new, width)
    maxima, sums = scratch(batch, splits, heads * num_new), scratch(batch, splits, heads * num_new)
    # The interpreter adds bf16 as if they were integers; it gets fp32 here and in DTYPE.
    output = torch.empty(q_latent.shape, dtype=dtype, device=q_latent.device)
    # Without a mask the kernel reads none; it only needs some pointer.
    mask_pointer, mask_strides = (q_latent, (0, 0, 0)) if mask is None else mask_arguments(mask)
    with on_device_of(q_latent):
        partial_kernel[(row_blocks, splits, batch)](
            q_latent,
            q_pe,
            latent,
            k_pe,
            mask_pointer,
            lengths,
            parts,
            maxima,
            sums,
            *q_latent.stride(),
            *q_pe.stride(),
            latent.stride(0),
            latent.stride(2),
            k_pe.stride(0),
            k_pe.stride(2),
            *mask_strides,
            heads,
            num_new,
            num_total,
            splits,
            scaling * LOG2_E,
            C=width,
            R=rope_width,
            MASK="none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
            DTYPE={torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype],
            PRECISION="ieee" if dtype == torch.float32 else "tf32",  # only fp32 products use it
            LOWEST=LOWEST,
            LOG2_E=LOG2_E,
            BLOCK_M=blocks.heads,
            BLOCK_S=blocks.keys,
            BLOCK_C=triton.next_power_of_2(width),
            BLOCK_R=triton.next_power_of_2(rope_width),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        merge(parts, maxima, sums, output)
    return output.to(q_latent.dtype), None


def mask_arguments(mask: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A mask (B or 1, 1, T or 1, S) as the kernel reads it, and its strides over B, T and S: 0 where it repeats."""
    strides = tuple(0 if mask.shape[dim] == 1 and dim != 3 else mask.stride(dim) for dim in (0, 2, 3))
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, strides


def merge(parts: torch.Tensor, maxima: torch.Tensor, sums: torch.Tensor, output: torch.Tensor) -> None:
    """Writes the splits' parts (B, splits, h T, c), weighted by their softmax maxima and sums, to output (B, h, T, c)."""
    batch, splits, rows, width = parts.shape
    block = min(triton.next_power_of_2(width), 128)
    merge_kernel[(rows, triton.cdiv(width, block), batch)](
        parts,
        maxima,
        sums,
        output,
        rows,
        splits,
        C=width,
        BLOCK_SPLITS=32,
        BLOCK=block,
        num_warps=1,
    )


def check(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None = None,
) -> None:
    """Raises for inputs that a kernel, which sees only pointers, would misread."""
    batch, _, num_new, width = q_latent.shape
    num_total = latent.shape[2]
    if latent.shape != (batch, 1, num_total, width) or k_pe.shape != (batch, 1, num_total, q_pe.shape[3]):
        raise ValueError(
            f"latent {tuple(latent.shape)} and k_pe {tuple(k_pe.shape)} do not fit queries {tuple(q_latent.shape)} and"
            f" {tuple(q_pe.shape)}; expected {(batch, 1, num_total, width)} and {(batch, 1, num_total, q_pe.shape[3])}."
        )
    if q_pe.shape[:3] != q_latent.shape[:3]:
        raise ValueError(
            f"q_latent {tuple(q_latent.shape)} and q_pe {tuple(q_pe.shape)} differ before their last dimension."
        )
    if latent.stride(3) != 1 or k_pe.stride(3) != 1:
        raise ValueError(
            f"the cache's last dimension must be contiguous, strides {latent.stride()}, {k_pe.stride()}."
        )
    if mask is not None and not all(
        have in (want, 1) for have, want in zip(mask.shape, (batch, 1, num_new, num_total), strict=True)
    ):
        raise ValueError(f"mask {tuple(mask.shape)}, expected {(batch, 1, num_new, num_total)}.")
    if any(t is not None and t.device != q_latent.device for t in (q_pe, latent, k_pe, mask, lengths)):
        raise ValueError(f"queries are on {q_latent.device}; cache, mask and lengths must be there, too.")
    if lengths is not None and not (
        lengths.shape == (batch,) and lengths.is_contiguous() and not lengths.is_floating_point()
    ):
        raise ValueError(
            f"lengths {lengths.dtype} {tuple(lengths.shape)} with strides {lengths.stride()}, expected {batch} integers"
            " side by side."
        )


def pick_blocks(heads: int, like: torch.Tensor) -> AttentionBlocks:
    """The first usable configuration in the dtype and on the device of `like`, no larger than `heads` need."""
    usable = usable_blocks(like.device, like.dtype)
    if not usable:
        raise RuntimeError(
            f"attention on the latent: no configuration of the Triton kernel for {like.dtype} passed its test on {like.device}."
        )
    return usable[0]._replace(heads=min(usable[0].heads, max(16, triton.next_power_of_2(heads))))


def usable_blocks(device: torch.device, dtype: torch.dtype) -> list[AttentionBlocks]:
    """The configurations for a device, best first, without those that UNUSABLE lists."""
    table = OTHER
    if dtype == torch.float32:
        table = FP32
    elif device.type != "cpu":
        table = BY_MAJOR.get(torch.cuda.get_device_capability(device)[0], OTHER)
    unusable = UNUSABLE.get(device, set())
    return [blocks for blocks in table if (dtype, blocks) not in unusable]


class SelfTest(NamedTuple):
    """A call, small, that takes the compiled code which the full model's calls take with one configuration.

    If it fails, `UNUSABLE.setdefault(device, set()).add(key)` and the next configuration serves.
    """

    name: str
    num_new: int  # T
    num_total: int  # S
    mask: str  # "none"; "bool": a boolean (1, 1, T, S)
    lengths: bool  # whether to give lengths, (1,) int64
    key: tuple[torch.dtype, AttentionBlocks]


SELF_TEST_SIZES = (1, 64, 512, 64)  # B, h, c, dr: the full model's


def self_test_cases(device: torch.device, dtype: torch.dtype) -> Iterator[SelfTest]:
    """The configuration in use, with each kind of call that makes other code of it. After a failure, marked in UNUSABLE,
    the generator goes on with the configuration that then is in use."""
    tested: set[AttentionBlocks] = set()
    while (usable := usable_blocks(device, dtype)) and usable[0] not in tested:
        tested.add(usable[0])
        for name, num_new, mask, lengths in (
            ("one token", 1, "none", False),
            ("several tokens and a mask", 8, "bool", False),  # as one token and a mask
            ("one token and lengths", 1, "none", True),
            ("one token of a static cache", 1, "bool", True),
        ):
            key = dtype, usable[0]
            yield SelfTest(f"{name}, {usable[0]}", num_new, 300, mask, lengths, key)
            if key in UNUSABLE.get(device, set()):
                break


def num_splits(programs: int, num_total: int, device: torch.device) -> int:
    """Into how many parts the cache is cut, so that `programs` times as many fill the device once."""
    if device.type == "cpu":
        return min(4, triton.cdiv(num_total, 16))  # the interpreter's, small so that a test has some
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(processors // programs, triton.cdiv(num_total, MIN_KEYS)))


# What changes from one call to the next must not be part of the compiled code, or generating compiles again and again:
# Triton compiles anew for integers that are 1 and those that 16 divides. Strides keep that, for 16-byte loads.
@triton.jit(do_not_specialize=["mask_b", "mask_t", "T", "S", "SPLITS"])
def partial_kernel(
    q_latent,
    q_pe,
    latent,
    k_pe,
    mask,
    lengths,
    parts,  # (B, SPLITS, HEADS T, C) fp32
    maxima,  # (B, SPLITS, HEADS T) fp32, of scores in base 2
    sums,
    q_latent_b,
    q_latent_h,
    q_latent_t,
    q_latent_c,
    q_pe_b,
    q_pe_h,
    q_pe_t,
    q_pe_r,
    latent_b,
    latent_s,
    k_pe_b,
    k_pe_s,
    mask_b,
    mask_t,
    mask_s,
    HEADS,
    T,
    S,
    SPLITS,
    scaling,  # in base 2
    C: tl.constexpr,
    R: tl.constexpr,
    MASK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    LOWEST: tl.constexpr,
    LOG2_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)  # 64 bits: a batch of long caches passes 2^31 elements
    head_blocks = tl.cdiv(HEADS, BLOCK_M)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    head = tl.program_id(0) % head_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c, r, s0 = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    inside = head[:, None] < HEADS
    place = q_latent + batch * q_latent_b + t * q_latent_t + head[:, None] * q_latent_h
    q = tl.load(place + c[None, :] * q_latent_c, mask=inside & (c[None, :] < C), other=0.0).to(DTYPE)
    place = q_pe + batch * q_pe_b + t * q_pe_t + head[:, None] * q_pe_h
    q_r = tl.load(place + r[None, :] * q_pe_r, mask=inside & (r[None, :] < R), other=0.0).to(DTYPE)

    length = S
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch).to(tl.int32), S)
    share = tl.cdiv(tl.cdiv(length, BLOCK_S), SPLITS) * BLOCK_S
    begin = split * share
    end = tl.minimum(begin + share, length)
    latent += batch * latent_b
    k_pe += batch * k_pe_b
    mask += batch * mask_b + t * mask_t

    output = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_S):
        s = start + s0
        there = s < end
        s_row = s.to(tl.int64)[:, None]
        k = tl.load(
            latent + s_row * latent_s + c[None, :], mask=there[:, None] & (c[None, :] < C), other=0.0
        ).to(DTYPE)
        k_r = tl.load(
            k_pe + s_row * k_pe_s + r[None, :], mask=there[:, None] & (r[None, :] < R), other=0.0
        ).to(DTYPE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.dot(q_r, tl.trans(k_r), scores, input_precision=PRECISION) * scaling
        if MASK != "none":
            seen = tl.load(mask + s[None, :] * mask_s, mask=there[None, :], other=0)
            if MASK == "bool":
                scores = tl.where(seen != 0, scores, LOWEST)
            else:
                # Halved, so that in base 2 it stays finite; so does -inf.
                scores += tl.maximum(seen.to(tl.float32), LOWEST * 0.5) * LOG2_E
        scores = tl.where(there[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        rescale = tl.exp2(highest - new_highest)  # 0 the first time
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        output = tl.dot(weights.to(DTYPE), k, output * rescale[:, None], input_precision=PRECISION)
        highest = new_highest

    at = ((batch * SPLITS + split) * HEADS + head) * T + t
    tl.store(parts + at[:, None] * C + c[None, :], output, mask=inside & (c[None, :] < C))
    tl.store(maxima + at, highest, mask=head < HEADS)
    tl.store(sums + at, total, mask=head < HEADS)


@triton.jit(do_not_specialize=["ROWS", "SPLITS"])
def merge_kernel(
    parts,
    maxima,
    sums,
    output,  # (B, ROWS, C)
    ROWS,
    SPLITS,
    C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    highests = tl.full((BLOCK_SPLITS,), float("-inf"), dtype=tl.float32)
    for start in range(0, SPLITS, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS)
        at = (batch * SPLITS + split) * ROWS + row
        highests = tl.maximum(highests, tl.load(maxima + at, mask=split < SPLITS, other=float("-inf")))
    highest = tl.max(highests, axis=0)
    merged = tl.zeros((BLOCK,), dtype=tl.float32)
    total = 0.0
    for i in range(SPLITS):
        at_i = (batch * SPLITS + i) * ROWS + row
        scale = tl.exp2(tl.load(maxima + at_i) - highest)  # 0 for a split without keys
        total += tl.load(sums + at_i) * scale
        merged += tl.load(parts + at_i * C + c, mask=c < C, other=0.0) * scale
    result = merged / total
    tl.store(output + (batch * ROWS + row) * C + c, result.to(output.dtype.element_ty), mask=c < C)
