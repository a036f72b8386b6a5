"""Triton kernels for the routed experts: products with packed int4 weights, read exactly as the checkpoint holds them.

Letters: R rows (tokens), K experts per row, E experts, H hidden size, I inner size; of one matrix N outputs, M inputs,
and W = M/8 words a row. Per layer, all contiguous:

    gate, up   words (E, I, H/8) int32   scales (E, I, H/32)
    down       words (E, H, I/8) int32   scales (E, H, I/32)

One word holds inputs 8w .. 8w+7 of one output, lowest nibble first (see `kimi_int4.py`), and four words, 16 bytes, are
exactly one group that shares a scale. A product needs nibble j of word w next to input 8w + j. The order of a sum is
free, so no weight ever moves, neither in memory nor between threads; the *activations*, thousands of times smaller, are
rearranged to match the order in which nibbles are taken out of the words:

    planes  for decode   input 8w + j at j * W + w: plane j lines up with nibble j of consecutive words
    paired  for prefill  every eight inputs as 0 4 1 5 2 6 3 7: one shift takes nibbles j and j + 4 of a word to the two
                         16-bit halves of a register, as a pair of bf16

`to_planes` and `to_paired` do it for x; hidden activations are written in that order directly.

Magic numbers. Converting integers is slow on a GPU (an eighth of the FMA rate on Hopper), so codes become floats by
and-or: the bits of 2^23 with a code in the mantissa are the float 2^23 + code. A field 4p bits higher is 16^p times as
much, which one fused multiply-add undoes together with the offset 8, exactly. bf16 and fp16 have such numbers too.

    decode (few rows)     one (row, expert) pair after the other, on the FMA units: words stream through once, 16 bytes a
                          thread. A group's 32 products are summed before its scale is applied, all in fp32.
        gate_up_decode    x planes (R, H) -> hidden planes (R K, I): silu(gate) * up
        down_decode       -> (R, H): a program owns outputs of one row and adds its K experts in order
    prefill (many rows)   pairs sorted by expert and cut into tiles of BLOCK_M, on the tensor cores. Weights become bf16
                          (or x's dtype) in registers, rounded as `dequantize_int4` rounds, and are the left operand:
                          out^T = W x^T, so that few rows make a narrow tile rather than a mostly empty one.
        gate_up_prefill   x paired (R, H) -> hidden paired (R K, I), in sorted order
        down_prefill      -> (R K, H), back in pair order
        combine           -> (R, H): sums the K weighted outputs of a row in order, in fp32

Nothing here waits for the device: every shape and grid is a function of the inputs' shapes, so a call can be
captured in a CUDA graph. The tiles of prefill have a bound, floor(R K / BLOCK_M) + min(E, R K); programs beyond the last
tile return at once. Nothing is added by atomics, so results repeat bit for bit.

The block sizes below were NOT tuned on a GPU: they were chosen on paper and by reading compiled code.
`benchmarks/bench_experts.py --tune` searches a grid of them. They are constants, not autotuned at run time, because a
search at the first call breaks graph capture and makes start-up slow.

TRITON_INTERPRET=1 in the environment before this file is imported runs all of it on the CPU, slowly.
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

# Words (E, N, M/8) and scales (E, N, M/32): an ExpertMatrices is one.
Packed = tuple[torch.Tensor, torch.Tensor]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DECODE_UP_TO = 16  # rows
ROWS_AT_ONCE = 8192  # prefill takes longer inputs in pieces: K * (I + H) values of workspace a row


class DecodeBlocks(NamedTuple):
    """A program computes `outputs` of one pair, `groups` groups of 32 inputs at a time."""

    outputs: int
    groups: int
    warps: int
    registers: int  # a thread's, at most


class PrefillBlocks(NamedTuple):
    """A program computes `outputs` (of gate and of up) of `rows` pairs that share an expert, 8 * `words` inputs at a time."""

    rows: int
    outputs: int
    words: int
    warps: int
    stages: int


class Decode(NamedTuple):
    gate_up: DecodeBlocks
    down: DecodeBlocks


class Prefill(NamedTuple):
    """Serves up to `pairs` pairs per expert on average."""

    pairs: float
    gate_up: PrefillBlocks
    down: PrefillBlocks


# Untuned. One warp, a group a lane: it reads 512 contiguous bytes of a row, synchronises with no other warp, and hides
# latency by having many neighbours. With more outputs the compiler wants more registers and fewer warps fit.
DECODE = Decode(
    DecodeBlocks(outputs=2, groups=32, warps=1, registers=128),
    DecodeBlocks(outputs=4, groups=32, warps=1, registers=128),
)

# Untuned. Few pairs leave a layer bound by its weights; many by arithmetic, and then an expert's weights should be
# unpacked for as many of its pairs as possible. Chosen by compiled code: no spill, no serialised wgmma, few instructions
# a weight (`benchmarks/bench_compile_ahead.py`).
PREFILL_HOPPER: tuple[Prefill, ...] = (
    Prefill(12, PrefillBlocks(16, 64, 16, 4, 3), PrefillBlocks(16, 64, 16, 4, 3)),
    Prefill(24, PrefillBlocks(32, 64, 16, 4, 3), PrefillBlocks(32, 64, 16, 4, 3)),
    Prefill(48, PrefillBlocks(64, 64, 16, 4, 3), PrefillBlocks(64, 128, 16, 8, 3)),
    Prefill(math.inf, PrefillBlocks(128, 64, 16, 8, 3), PrefillBlocks(128, 128, 16, 8, 3)),
)
PREFILL_BLACKWELL: tuple[Prefill, ...] = (
    Prefill(12, PrefillBlocks(16, 64, 16, 4, 3), PrefillBlocks(16, 128, 16, 4, 3)),
    Prefill(48, PrefillBlocks(64, 64, 16, 4, 2), PrefillBlocks(64, 128, 16, 4, 2)),
    Prefill(math.inf, PrefillBlocks(128, 64, 16, 4, 2), PrefillBlocks(128, 128, 16, 4, 2)),
)
PREFILL_BY_MAJOR = {9: PREFILL_HOPPER, 10: PREFILL_BLACKWELL}  # by compute capability
# Other devices have less shared memory (some 99 KiB), and mma.sync keeps its operands in registers.
PREFILL_OTHER: tuple[Prefill, ...] = (
    Prefill(12, PrefillBlocks(16, 64, 16, 4, 2), PrefillBlocks(16, 64, 16, 4, 2)),
    Prefill(24, PrefillBlocks(32, 64, 16, 4, 2), PrefillBlocks(32, 128, 16, 4, 2)),
    Prefill(math.inf, PrefillBlocks(64, 64, 16, 8, 2), PrefillBlocks(64, 128, 16, 8, 2)),
)
# Too small for tcgen05: Triton 3.6 takes it for fp32 even where "ieee" is asked for, and then rounds to tf32.
PREFILL_FP32: tuple[Prefill, ...] = (
    Prefill(math.inf, PrefillBlocks(16, 16, 8, 4, 1), PrefillBlocks(16, 32, 8, 4, 1)),
)

# Per device the configurations, with x's dtype, that failed their test there; whoever runs `self_test_cases` fills it.
UNUSABLE: dict[torch.device, set[tuple[torch.dtype, Decode | Prefill]]] = {}


def run_experts_triton(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: Packed,
    up: Packed,
    down: Packed,
) -> torch.Tensor:
    """x (R, H) bf16, fp16 or fp32, ids (R, K), weights (R, K) to the weighted sum of the experts, (R, H) fp32.

    The same as `kimi_experts.run_experts`, for packed experts on one CUDA device.
    """
    check(x, topk_ids, topk_weights, gate, up, down)
    with on_device_of(x):
        if len(x) <= DECODE_UP_TO and is_usable(x.device, x.dtype, DECODE):
            return run_experts_decode(x, topk_ids, topk_weights, gate, up, down)
        pieces = zip(
            x.split(ROWS_AT_ONCE), topk_ids.split(ROWS_AT_ONCE), topk_weights.split(ROWS_AT_ONCE), strict=True
        )
        outputs = [run_experts_prefill(*piece, gate, up, down) for piece in pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def check(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: Packed,
    up: Packed,
    down: Packed,
) -> None:
    """Raises for inputs that a kernel, which sees only pointers, would misread."""
    width, inner = x.shape[-1], gate[0].shape[1]
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"ids {tuple(topk_ids.shape)} and weights {tuple(topk_weights.shape)} for {len(x)} rows; all must agree."
        )
    for name, (words, scales), outputs, inputs in (
        ("gate", gate, inner, width),
        ("up", up, inner, width),
        ("down", down, width, inner),
    ):
        if scales is None or words.dtype != torch.int32:
            raise ValueError(
                f"{name}: the Triton experts are for packed int4 words, got {words.dtype} weights."
            )
        if inputs % 32:
            raise ValueError(f"{name}: {inputs} inputs are not a multiple of the group size 32.")
        shapes = (len(gate[0]), outputs, inputs // 8), (len(gate[0]), outputs, inputs // 32)
        if (words.shape, scales.shape) != shapes:
            raise ValueError(
                f"{name}: words {tuple(words.shape)} and scales {tuple(scales.shape)}, expected {shapes[0]} and {shapes[1]}."
            )
        if not (words.is_contiguous() and scales.is_contiguous()):
            raise ValueError(f"{name}: words and scales must be contiguous; a copy would double the weights.")
        if words.device != x.device or scales.device != x.device:
            raise ValueError(f"{name} is on {words.device}, x on {x.device}.")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """x's dtype; only Triton's interpreter, which adds bf16 as if they were integers, computes those in fp32."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def to_planes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(R, M) to (R, M) with input 8w + j at j * (M/8) + w; one small kernel, which also casts."""
    planes = torch.empty((len(x), 8, x.shape[1] // 8), dtype=dtype, device=x.device)
    return planes.copy_(x.unflatten(1, (-1, 8)).transpose(1, 2)).flatten(1)


def to_paired(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(R, M) to (R, M) with every eight inputs in the order 0 4 1 5 2 6 3 7, likewise."""
    paired = torch.empty((*x.shape[:1], x.shape[1] // 8, 4, 2), dtype=dtype, device=x.device)
    return paired.copy_(x.unflatten(1, (-1, 2, 4)).transpose(2, 3)).flatten(1)


# ------------------------------------------------------------------------------------------------------------- codes
# The magic number is an argument at run time: written out, it and the mask would be two constants in one instruction,
# which ptxas splits in two.

MAGIC = {torch.float32: 0x4B000000, torch.bfloat16: 0x43004300, torch.float16: 0x64006400}  # 2^23, 128, 1024


@triton.jit
def nibble_fp32(words, NIBBLE: tl.constexpr, magic):
    """code - 8 of one nibble of each word as fp32, exact: an and-or and a multiply-add.

    Nibbles 0..4 fit the 23 mantissa bits where they stand; three more do after one shift, which the compiler shares.
    """
    PLACE: tl.constexpr = NIBBLE if NIBBLE < 5 else NIBBLE - 5
    if NIBBLE >= 5:
        words = words.to(tl.uint32, bitcast=True) >> 20
    # The float 2^23 + 16^PLACE * code.
    bits = (words & (15 << (4 * PLACE))).to(tl.int32, bitcast=True) | magic
    return bits.to(tl.float32, bitcast=True) * (1.0 / 16**PLACE) - (8388608.0 / 16**PLACE + 8.0)


@triton.jit
def unpack_pairs(words, magic, QUARTER: tl.constexpr, DTYPE: tl.constexpr):
    """code - 8 of nibbles QUARTER and QUARTER + 4 of each word, joined in a new last dimension of 2, exact.

    16 bits hold a bf16 or an fp16, so one shift and one and-or make both.
    """
    if tl.float32 == DTYPE:
        pair = tl.join(nibble_fp32(words, QUARTER, magic), nibble_fp32(words, QUARTER + 4, magic))
    else:
        bits = ((words >> (4 * QUARTER)) & 0x000F000F) | magic
        low, high = bits.to(tl.int16), (bits >> 16).to(tl.int16)
        pair = tl.join(low, high).to(DTYPE, bitcast=True)
        pair -= 136.0 if tl.bfloat16 == DTYPE else 1032.0
    return pair


@triton.jit
def dequantize_tile(words, scales, magic, DTYPE: tl.constexpr):
    """Words (N, W) and scales (N, W/4) to weights (N, 8 W) in DTYPE; inputs in paired order."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    even = tl.join(unpack_pairs(words, magic, 0, DTYPE), unpack_pairs(words, magic, 2, DTYPE))
    odd = tl.join(unpack_pairs(words, magic, 1, DTYPE), unpack_pairs(words, magic, 3, DTYPE))
    # (N, W, low or high, quarter's high bit, quarter's low bit), to have low or high last
    values = tl.join(even, odd).permute(0, 1, 3, 4, 2)
    values = values.reshape(N, W // 4, 32) * scales.to(DTYPE)[:, :, None]
    return values.reshape(N, W * 8)


# ------------------------------------------------------------------------------------------------------------ decode
# Tiles are (outputs, groups, 4 words). `scale_step` is always 1 but must not be known to be: if Triton knew that scales
# are contiguous it would spread them differently over the threads than the words they multiply, and exchange them
# through shared memory at every step.


@triton.jit
def load_group_words(words, n, g, w, N, GROUPS):
    """(outputs, groups, 4) words; beyond the edges zeros, which add nothing because their scales are 0 too."""
    return tl.load(words + n * (GROUPS * 4) + g * 4 + w, mask=(n < N) & (g < GROUPS), other=0)


@triton.jit
def load_group_scales(scales, n, g, N, GROUPS, scale_step):
    """(outputs, groups, 1) scales."""
    return tl.load(scales + n * GROUPS + g * scale_step, mask=(n < N) & (g < GROUPS), other=0.0)


@triton.jit(do_not_specialize=["scale_step", "magic"])
def gate_up_decode_kernel(
    x,  # (R, H) fp32 planes
    topk_ids,  # (R, K)
    gate,
    gate_scale,
    up,
    up_scale,
    hidden,  # (R K, I) fp32 planes
    K,
    I,  # noqa: E741
    GROUPS,  # H / 32
    scale_step,
    magic,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    pair = tl.program_id(1)
    expert = tl.load(topk_ids + pair).to(tl.int64)  # 64 bits: the words of 384 experts pass 2 GiB
    g0 = tl.arange(0, BLOCK_G)[:, None, None]
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # a place in the planes of `hidden`
    n = tl.where(out < I, out % (I // 8) * 8 + out // (I // 8), I)  # the output that belongs there
    n = n[None, :, None]
    w = tl.arange(0, 4)[None, None, :]
    x += (pair // K) * (GROUPS * 32)
    gate += expert * I * (GROUPS * 4)
    up += expert * I * (GROUPS * 4)
    gate_scale += expert * I * GROUPS
    up_scale += expert * I * GROUPS

    gate_sum = tl.zeros((BLOCK_G, BLOCK_N, 4), dtype=tl.float32)
    up_sum = tl.zeros((BLOCK_G, BLOCK_N, 4), dtype=tl.float32)
    gate_words = load_group_words(gate, n, g0, w, I, GROUPS)
    up_words = load_group_words(up, n, g0, w, I, GROUPS)
    for start in range(0, GROUPS, BLOCK_G):
        g = start + g0
        # The next words are loaded while these are multiplied.
        next_gate = load_group_words(gate, n, g + BLOCK_G, w, I, GROUPS)
        next_up = load_group_words(up, n, g + BLOCK_G, w, I, GROUPS)
        gate_s = load_group_scales(gate_scale, n, g, I, GROUPS, scale_step).to(tl.float32)
        up_s = load_group_scales(up_scale, n, g, I, GROUPS, scale_step).to(tl.float32)
        gate_part = tl.zeros((BLOCK_G, BLOCK_N, 4), dtype=tl.float32)
        up_part = tl.zeros((BLOCK_G, BLOCK_N, 4), dtype=tl.float32)
        for j in tl.static_range(8):
            plane = tl.load(x + j * (GROUPS * 4) + g * 4 + w, mask=g < GROUPS, other=0.0)
            gate_part += nibble_fp32(gate_words, j, magic) * plane
            up_part += nibble_fp32(up_words, j, magic) * plane
        gate_sum += gate_part * gate_s
        up_sum += up_part * up_s
        gate_words, up_words = next_gate, next_up

    gate_y = tl.sum(tl.sum(gate_sum, axis=2), axis=0)  # (BLOCK_N,)
    up_y = tl.sum(tl.sum(up_sum, axis=2), axis=0)
    tl.store(hidden + pair * I + out, gate_y * tl.sigmoid(gate_y) * up_y, mask=out < I)


@triton.jit(do_not_specialize=["scale_step", "magic"])
def down_decode_kernel(
    hidden,  # (R K, I) fp32 planes
    topk_ids,
    topk_weights,  # (R, K) fp32
    down,
    down_scale,
    output,  # (R, H) fp32
    K,
    H,
    GROUPS,  # I / 32
    scale_step,
    magic,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(1)
    g0 = tl.arange(0, BLOCK_G)[:, None, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    w = tl.arange(0, 4)[None, None, :]
    total = tl.zeros((BLOCK_G, BLOCK_N, 4), dtype=tl.float32)
    steps = tl.cdiv(GROUPS, BLOCK_G)
    expert = tl.load(topk_ids + row * K).to(tl.int64)
    words = load_group_words(down + expert * H * (GROUPS * 4), n, g0, w, H, GROUPS)
    # One loop over choices and groups, so that words of the next expert are fetched ahead.
    for step in range(K * steps):
        pair = row * K + step // steps
        g = (step % steps) * BLOCK_G + g0
        expert = tl.load(topk_ids + pair).to(tl.int64)
        weight = tl.load(topk_weights + pair)
        scale = load_group_scales(down_scale + expert * H * GROUPS, n, g, H, GROUPS, scale_step)
        last = step + 1 == K * steps
        next_step = tl.where(last, step, step + 1)
        next_expert = tl.load(topk_ids + row * K + next_step // steps).to(tl.int64)
        next_g = (next_step % steps) * BLOCK_G + g0
        next_words = load_group_words(down + next_expert * H * (GROUPS * 4), n, next_g, w, H, GROUPS)
        part = tl.zeros((BLOCK_G, BLOCK_N, 4), dtype=tl.float32)
        for j in tl.static_range(8):
            place = hidden + pair * (GROUPS * 32) + j * (GROUPS * 4) + g * 4 + w
            part += nibble_fp32(words, j, magic) * tl.load(place, mask=g < GROUPS, other=0.0)
        total += part * (scale.to(tl.float32) * weight)
        words = next_words
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(output + row * H + out, tl.sum(tl.sum(total, axis=2), axis=0), mask=out < H)


def run_experts_decode(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: Packed,
    up: Packed,
    down: Packed,
) -> torch.Tensor:
    """The path for few rows. A row reads its K experts' weights whether or not another row reads them too."""
    ids, weights = topk_ids.contiguous(), topk_weights.float().contiguous()
    hidden = gate_up_decode(to_planes(x, torch.float32), ids, gate, up)
    return down_decode(hidden, ids, weights, down)


def gate_up_decode(
    planes: torch.Tensor,
    topk_ids: torch.Tensor,
    gate: Packed,
    up: Packed,
    blocks: DecodeBlocks | None = None,
) -> torch.Tensor:
    """x as fp32 planes (R, H) and ids (R, K) to silu(gate) * up of every pair, (R K, I) fp32 planes."""
    blocks = blocks or DECODE.gate_up
    (rows, choices), inner, groups = topk_ids.shape, gate[0].shape[1], planes.shape[1] // 32
    hidden = torch.empty((rows * choices, inner), dtype=torch.float32, device=planes.device)
    grid = (triton.cdiv(inner, blocks.outputs), rows * choices)
    gate_up_decode_kernel[grid](
        planes,
        topk_ids,
        *gate,
        *up,
        hidden,
        choices,
        inner,
        groups,
        1,
        MAGIC[torch.float32],
        BLOCK_N=blocks.outputs,
        BLOCK_G=min(blocks.groups, triton.next_power_of_2(groups)),
        **decode_options(blocks),
    )
    return hidden


def down_decode(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    down: Packed,
    blocks: DecodeBlocks | None = None,
) -> torch.Tensor:
    """Hidden planes (R K, I) fp32, ids and fp32 weights (R, K) to the weighted sum of experts, (R, H) fp32."""
    blocks = blocks or DECODE.down
    (rows, choices), width, groups = topk_ids.shape, down[0].shape[1], hidden.shape[1] // 32
    output = torch.empty((rows, width), dtype=torch.float32, device=hidden.device)
    grid = (triton.cdiv(width, blocks.outputs), rows)
    down_decode_kernel[grid](
        hidden,
        topk_ids,
        topk_weights,
        *down,
        output,
        choices,
        width,
        groups,
        1,
        MAGIC[torch.float32],
        BLOCK_N=blocks.outputs,
        BLOCK_G=min(blocks.groups, triton.next_power_of_2(groups)),
        **decode_options(blocks),
    )
    return output


def decode_options(blocks: DecodeBlocks) -> dict[str, int]:
    """Only Triton's CUDA compiler knows `maxnreg`."""
    options = {"num_warps": blocks.warps}
    return {**options, "maxnreg": blocks.registers} if torch.version.cuda else options


# ----------------------------------------------------------------------------------------------------------- prefill


class Tiles(NamedTuple):
    """The (row, choice) pairs sorted by expert, cut so that no tile holds two experts. All int32, on the device."""

    order: torch.Tensor  # (R K,) the pair at each sorted place
    expert: torch.Tensor  # (tiles,) E for tiles beyond the last
    first: torch.Tensor  # (tiles,) sorted place of a tile's first pair
    expert_ends: torch.Tensor  # (E,) sorted place after an expert's last pair


def sort_by_expert(topk_ids: torch.Tensor, num_experts: int, tile_rows: int) -> Tiles:
    """Ids (R, K) to tiles of up to `tile_rows` pairs. The sort is stable, and no step depends on its data's values.

    (torch.bincount would: on CUDA it waits for the largest id.)
    """
    ids = topk_ids.flatten()
    sorted_ids, order = ids.sort(stable=True)
    experts = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    starts = torch.searchsorted(sorted_ids, experts, out_int32=True)  # (E,)
    ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    tiles_up_to = ((ends - starts + tile_rows - 1) // tile_rows).cumsum(0, dtype=torch.int32)  # (E,)
    most = ids.numel() // tile_rows + min(num_experts, ids.numel())
    tile = torch.arange(most, device=ids.device, dtype=torch.int32)
    expert = torch.searchsorted(tiles_up_to, tile, right=True, out_int32=True)  # (tiles,)
    known = expert.clamp(max=num_experts - 1)
    # Counted back from the expert's last tile, so that a table of the tiles before it is not needed.
    tiles_left = tiles_up_to[known] - tile
    tiles_of = (ends - starts + tile_rows - 1) // tile_rows
    first = starts[known] + (tiles_of[known] - tiles_left) * tile_rows
    return Tiles(order.int(), expert, first, ends)


@triton.jit
def load_weight_tile(words, scales, n, start, N, W, BLOCK_W: tl.constexpr, EVEN: tl.constexpr):
    """Rows n of a matrix from word `start` on: words (BLOCK_N, BLOCK_W) and scales (BLOCK_N, BLOCK_W / 4)."""
    w = start + tl.arange(0, BLOCK_W)[None, :]
    g = start // 4 + tl.arange(0, BLOCK_W // 4)[None, :]
    n = n[:, None]
    if EVEN:
        tile, tile_scales = tl.load(words + n * W + w), tl.load(scales + n * (W // 4) + g)
    else:
        tile = tl.load(words + n * W + w, mask=(n < N) & (w < W), other=0)
        tile_scales = tl.load(scales + n * (W // 4) + g, mask=(n < N) & (g < W // 4), other=0.0)
    return tile, tile_scales


@triton.jit(do_not_specialize=["magic"])
def gate_up_prefill_kernel(
    x,  # (R, H) paired
    order,
    tile_expert,
    tile_first,
    expert_ends,
    gate,
    gate_scale,
    up,
    up_scale,
    hidden,  # (R K, I) paired, sorted order
    K,
    E,
    I,  # noqa: E741
    W,  # H / 8
    magic,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    expert = tl.load(tile_expert + tl.program_id(1)).to(tl.int64)
    if expert >= E:
        return
    place = tl.load(tile_first + tl.program_id(1)) + tl.arange(0, BLOCK_M)
    inside = place < tl.load(expert_ends + expert)
    row = tl.load(order + place, mask=inside, other=0) // K
    # One product for both: eight rows of gate, the same eight of up, and so on. In a tensor core's accumulator rows i and
    # i + 8 are in one thread, so they meet again without an exchange.
    i = tl.arange(0, 2 * BLOCK_N)
    out = tl.program_id(0) * BLOCK_N + i // 16 * 8 + i % 8
    n = out // 8 * 8 + out % 2 * 4 + out % 8 // 2  # the output that belongs at place `out` of a paired row
    k = tl.arange(0, BLOCK_W * 8)
    x_tile = x + row.to(tl.int64)[None, :] * (W * 8) + k[:, None]
    is_gate = (i % 16 < 8)[:, None]
    words = tl.where(is_gate, gate + expert * I * W, up + expert * I * W)
    scales = tl.where(is_gate, gate_scale + expert * I * (W // 4), up_scale + expert * I * (W // 4))
    both = tl.zeros((2 * BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, W, BLOCK_W):
        mask = inside[None, :] if EVEN else inside[None, :] & (start * 8 + k[:, None] < W * 8)
        inputs = tl.load(x_tile + start * 8, mask=mask, other=0.0)  # (8 BLOCK_W, BLOCK_M)
        tile_words, tile_scales = load_weight_tile(words, scales, n, start, I, W, BLOCK_W, EVEN)
        weights = dequantize_tile(tile_words, tile_scales, magic, DTYPE)
        both = tl.dot(weights, inputs, both, input_precision=PRECISION)
    gate_y, up_y = tl.split(both.reshape(BLOCK_N // 8, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
    y = (gate_y * tl.sigmoid(gate_y) * up_y).to(DTYPE).reshape(BLOCK_N, BLOCK_M)
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = hidden + place.to(tl.int64)[None, :] * I + out[:, None]
    tl.store(target, y, mask=inside[None, :] & (out[:, None] < I))


@triton.jit(do_not_specialize=["magic"])
def down_prefill_kernel(
    hidden,  # (R K, I) paired, sorted order
    order,
    tile_expert,
    tile_first,
    expert_ends,
    down,
    down_scale,
    output,  # (R K, H), pair order
    E,
    H,
    W,  # I / 8
    magic,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    expert = tl.load(tile_expert + tl.program_id(1)).to(tl.int64)
    if expert >= E:
        return
    place = tl.load(tile_first + tl.program_id(1)) + tl.arange(0, BLOCK_M)
    inside = place < tl.load(expert_ends + expert)
    pair = tl.load(order + place, mask=inside, other=0)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_W * 8)
    hidden_tile = hidden + place.to(tl.int64)[None, :] * (W * 8) + k[:, None]
    down += expert * H * W
    down_scale += expert * H * (W // 4)
    y = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, W, BLOCK_W):
        mask = inside[None, :] if EVEN else inside[None, :] & (start * 8 + k[:, None] < W * 8)
        inputs = tl.load(hidden_tile + start * 8, mask=mask, other=0.0)
        words, scales = load_weight_tile(down, down_scale, n, start, H, W, BLOCK_W, EVEN)
        weights = dequantize_tile(words, scales, magic, DTYPE)
        y = tl.dot(weights, inputs, y, input_precision=PRECISION)
    target = output + pair.to(tl.int64)[None, :] * H + n[:, None]
    tl.store(target, y.to(DTYPE), mask=inside[None, :] & (n[:, None] < H))


@triton.jit
def combine_kernel(
    outputs,  # (R K, H)
    topk_weights,  # (R, K) fp32
    output,  # (R, H) fp32
    K,
    H,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(K):
        y = tl.load(outputs + (row * K + k) * H + h, mask=h < H, other=0.0)
        total += y.to(tl.float32) * tl.load(topk_weights + row * K + k)
    tl.store(output + row * H + h, total, mask=h < H)


def run_experts_prefill(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: Packed,
    up: Packed,
    down: Packed,
    blocks: tuple[PrefillBlocks, PrefillBlocks] | None = None,
) -> torch.Tensor:
    """The path for many rows. An expert's weights are read once for every `rows` of its pairs."""
    if not len(x):
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    num_experts = len(gate[0])
    for_gate_up, for_down = blocks or prefill_blocks(topk_ids.numel() / num_experts, x)
    tiles = sort_by_expert(topk_ids, num_experts, for_gate_up.rows)
    hidden = gate_up_prefill(
        to_paired(x, compute_dtype(x.dtype)), tiles, topk_ids.shape[1], gate, up, for_gate_up
    )
    outputs = down_prefill(hidden, tiles, down, for_down._replace(rows=for_gate_up.rows))
    return combine(outputs, topk_weights.float().contiguous())


def prefill_blocks(pairs_per_expert: float, x: torch.Tensor) -> tuple[PrefillBlocks, PrefillBlocks]:
    """The first usable row of the table for the average number of pairs per expert, or the last below it."""
    usable = usable_prefill(x.device, x.dtype)
    if not usable:
        raise RuntimeError(
            f"int4 experts: no configuration of the Triton kernels for {x.dtype} passed its test on {x.device}."
        )
    return next((row for row in usable if pairs_per_expert <= row.pairs), usable[-1])[1:]


def usable_prefill(device: torch.device, dtype: torch.dtype) -> list[Prefill]:
    """The device's table for x's dtype, by rising number of pairs, without what UNUSABLE lists."""
    table = PREFILL_OTHER
    if compute_dtype(dtype) == torch.float32:
        table = PREFILL_FP32
    elif device.type != "cpu":
        table = PREFILL_BY_MAJOR.get(torch.cuda.get_device_capability(device)[0], PREFILL_OTHER)
    return [row for row in table if is_usable(device, dtype, row)]


def is_usable(device: torch.device, dtype: torch.dtype, row: Decode | Prefill) -> bool:
    return (dtype, row) not in UNUSABLE.get(device, set())


class SelfTest(NamedTuple):
    """`rows` of x for a layer of SELF_TEST_SHAPE take the compiled code that one configuration gives the full model.

    If they come out wrong, `UNUSABLE.setdefault(device, set()).add(key)` and another configuration serves.
    """

    name: str
    rows: int
    key: tuple[torch.dtype, Decode | Prefill]


# E, H, I, K. Small, but each as divisible by 16 as in the full model, with 32 groups for decode's blocks.
SELF_TEST_SHAPE = (16, 1024, 1024, 8)


def self_test_cases(device: torch.device, dtype: torch.dtype) -> Iterator[SelfTest]:
    """One case for each usable configuration; x in `dtype`."""
    experts, _, _, choices = SELF_TEST_SHAPE
    if is_usable(device, dtype, DECODE):
        yield SelfTest(f"decode {DECODE}", 1, (dtype, DECODE))
    rows = DECODE_UP_TO
    for row in usable_prefill(device, dtype):
        most = rows + 1 if row.pairs == math.inf else int(row.pairs * experts / choices)
        rows = max(most, rows + 1)
        yield SelfTest(f"prefill {row}", rows, (dtype, row))


def gate_up_prefill(
    x: torch.Tensor, tiles: Tiles, choices: int, gate: Packed, up: Packed, blocks: PrefillBlocks
) -> torch.Tensor:
    """x paired (R, H) to silu(gate) * up of every pair, (R K, I) paired in sorted order, in the dtype of x."""
    num_experts, inner, words = gate[0].shape
    hidden = torch.empty((len(tiles.order), inner), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(inner, blocks.outputs), len(tiles.expert))
    gate_up_prefill_kernel[grid](
        x,
        *tiles,
        *gate,
        *up,
        hidden,
        choices,
        num_experts,
        inner,
        words,
        MAGIC[x.dtype],
        **prefill_constants(x, inner, words, blocks),
    )
    return hidden


def down_prefill(hidden: torch.Tensor, tiles: Tiles, down: Packed, blocks: PrefillBlocks) -> torch.Tensor:
    """Hidden paired (R K, I) in sorted order to the experts' unweighted outputs (R K, H) in pair order."""
    num_experts, width, words = down[0].shape
    outputs = torch.empty((len(hidden), width), dtype=hidden.dtype, device=hidden.device)
    grid = (triton.cdiv(width, blocks.outputs), len(tiles.expert))
    down_prefill_kernel[grid](
        hidden,
        *tiles,
        *down,
        outputs,
        num_experts,
        width,
        words,
        MAGIC[hidden.dtype],
        **prefill_constants(hidden, width, words, blocks),
    )
    return outputs


def prefill_constants(x: torch.Tensor, outputs: int, words: int, blocks: PrefillBlocks) -> dict[str, object]:
    return {
        "DTYPE": {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype],
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",  # only fp32 products use it
        "EVEN": outputs % blocks.outputs == 0 and words % blocks.words == 0,  # no edge needs a mask
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.outputs,
        "BLOCK_W": blocks.words,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def combine(outputs: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """(R K, H) in pair order and fp32 weights (R, K) to the weighted sums, (R, H) fp32."""
    (rows, choices), width = topk_weights.shape, outputs.shape[1]
    output = torch.empty((rows, width), dtype=torch.float32, device=outputs.device)
    block = 1024
    combine_kernel[(triton.cdiv(width, block), rows)](
        outputs, topk_weights, output, choices, width, BLOCK=block
    )
    return output
