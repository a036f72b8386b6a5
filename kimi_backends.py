"""Which code runs: for one operation and one call, the faster code or None. Every threshold and every reason is here.

The formulas are plain torch, in `modeling_kimi.py` and `kimi_experts.py`. There each operation asks once:

    product = faster_linear(x, weight) or F.linear
    y = product(x, weight)

    operation                   asks                        code for a CPU (kimi_cpu)   code for a GPU (Triton, kimi_gpu)
    x W^T of a few rows         faster_linear               linear_bf16
    the router's logits         faster_logits               linear_bf16, fp32 out       torch.mm, fp32 out
    ... its choice              faster_route                                            route_triton
    RMSNorm                     faster_rms_norm             rms_norm_bf16               rms_norm_triton
    silu(gate) * up             faster_silu_and_mul                                     silu_and_mul_triton
    experts + shared expert     faster_add_rounded                                      add_rounded_triton
    rotation                    faster_rotary               rotary_bf16
    ... and the cache's growth  faster_rotate_and_append                                rotate_and_append_triton
    absorbed attention, whole   faster_absorb               absorb
    ... its inner part          faster_latent_attention                                 latent_attention_triton
    attention of a prompt       faster_expanded_attention   prefill_attention           (torch's SDPA)
    routed experts, packed      faster_experts              run_experts_cpu             run_experts_triton

While torch.compile traces, experts and the inner part of attention are operators that it takes whole; small operations
are plain torch, which it fuses itself. Other answers are plain torch again: `latent_attention_sdpa` if it is forced,
`run_experts_gathered` where torch.compile traces experts that no operator can take. An answer has the signature of the plain code, or, where that is several lines, the one that its function here
names; its result is the same within rounding. `choose_path` decides between the two readings of attention, and the last
section cuts long inputs into parts.

`config.mla_path` and `config.int4_backend` can force an implementation by name. Forced means used or refused: where it
cannot run, a ValueError says why.

This file takes tensors and strings. It imports no model code; where it needs the plain code, it is handed over.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .kimi_cpu import (
    MAX_LATENT,
    WITH_MEMORY,
    absorb,
    expert_int4_tiles,
    experts_int4_few_rows,
    has_expert_tiles,
    has_prefill_attention,
    is_in_ram,
    is_plain,
    linear_bf16,
    prefill_attention,
    rms_norm_bf16,
    rotary_bf16,
    unpack_int4_bf16,
    why_unavailable,
)
from .kimi_gpu import (
    KERNEL_DTYPES,
    NO_TRITON,
    is_captured,
    latent_attention_operator,
    operator,
    why_not,
)
from .kimi_int4 import CODES_PER_WORD, ExpertMatrices
from .kimi_sizes import LARGEST_WORKSPACE_BYTES, WORKSPACE_BYTES

if NO_TRITON is None:
    from .kimi_gpu import (
        add_rounded_triton,
        latent_attention_triton,
        rms_norm_triton,
        rotate_and_append_triton,
        route_triton,
        run_experts_triton,
        silu_and_mul_triton,
    )

# torch.mm of bf16 with a result in fp32: torch 2.8 and later, on CUDA.
HAS_WIDE_MM = hasattr(torch.ops.aten.mm, "dtype") and torch.version.hip is None
WIDEST_NORM = 16384  # values of a row that one program of rms_norm_triton holds
# Measured on CPUs; see docs/history.md.
LINEAR_ROWS = 4  # up to which our product wins; from 8 rows on PyTorch's does
ABSORB_QUERIES_ON_CPU = 8  # new tokens up to which the compiled code does absorbed attention
# Rows of one expert up to which reading its words for each row is faster than unpacking them once; and the same where
# they are unpacked directly into the tiles of AMX.
EXPERT_ROWS, EXPERT_ROWS_BESIDE_TILES = 16, 3

# New tokens up to which attention runs on the latent. On paper c(dn + dv) / (2c - dn - dv) = 171 against a long cache,
# 0 without one; see `choose_path`. Measured on a CPU between 40 and 60; accelerators were not measured.
ABSORB_UP_TO, ABSORB_UP_TO_ON_CPU = 128, 48

NO_WEIGHTS = "it makes no attention weights, which attn_implementation='eager' returns"
NO_ROWS = "there is nothing to compute"
NO_MEMORY = "it takes PyTorch's own tensors, not a subclass, which may have no memory of its own"

MLP_ROWS = 4096  # of a long prompt at once: inner values are wider than the stream
MOE_ROWS = 8192  # more, since each part unpacks its experts anew


def is_recorded(*tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done with one of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def use_cpu_kernel(*tensors: torch.Tensor) -> bool:
    """Whether the compiled code may take these tensors: bf16 on a CPU, none empty, nothing recorded, traced or cast."""
    if torch.compiler.is_compiling() or not is_plain(*tensors) or not all(map(torch.Tensor.numel, tensors)):
        return False
    if torch.is_autocast_enabled("cpu") or why_unavailable() is not None:
        return False
    return not is_recorded(*tensors)


# ------------------------------------------------------------------------------------------- products, norms, rotation


def faster_linear(x: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """For F.linear(x, weight) without a bias: x (..., inputs) of a few rows, weight (outputs, inputs)."""
    few = x.numel() <= LINEAR_ROWS * x.shape[-1] and weight.is_contiguous()
    return linear_bf16 if few and use_cpu_kernel(x, weight) else None


def faster_logits(x: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """For x (R, inputs) times weight (outputs, inputs) with the sums as they are, in fp32."""
    if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and HAS_WIDE_MM:
        return None if is_recorded(x, weight) else mm_bf16_to_fp32
    return None if faster_linear(x, weight) is None else linear_bf16_to_fp32


def linear_bf16_to_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_bf16(x, weight, torch.float32)


def mm_bf16_to_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Products of bf16 are exact in fp32, so neither operand is cast."""
    return torch.mm(x, weight.T, out_dtype=torch.float32)


def use_gpu_kernel(operation: str, plain: Callable, *tensors: torch.Tensor) -> bool:
    """Whether the Triton kernel of a small operation may take these tensors: on one GPU, of one dtype, none empty, nothing
    recorded, traced, transformed or cast."""
    first = tensors[0]
    if not first.is_cuda or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    if first.dtype not in KERNEL_DTYPES or is_transformed() or not has_memory(*tensors):
        return False
    alike = all(t.dtype == first.dtype and t.device == first.device and t.numel() for t in tensors)
    if not alike or is_recorded(*tensors):
        return False
    return why_not(operation, first.device, first.dtype, plain) is None


def is_transformed() -> bool:
    """Whether torch.func (vmap, jvp) or forward-mode differentiation is at work, which must see each operation."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def has_memory(*tensors: torch.Tensor) -> bool:
    """Whether a kernel finds values at the tensors' addresses: not those of subclasses (DTensor, fake tensors). Without a
    GPU fake ones may pass, since nothing can run: so a walk with them sees what a GPU would be given."""
    kinds = {type(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)} - set(WITH_MEMORY)
    return not kinds or (kinds == {FakeTensor} and not torch.cuda.is_available())


def faster_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, plain: Callable
) -> Callable[..., torch.Tensor] | None:
    """For `plain(x, weight, eps)`, x (..., width)."""
    if x.is_cuda:
        fits = x.stride(-1) == 1 and weight.is_contiguous() and x.shape[-1] <= WIDEST_NORM
        return rms_norm_triton if fits and use_gpu_kernel("rms_norm", plain, x, weight) else None
    contiguous = x.is_contiguous() and weight.is_contiguous()
    return rms_norm_bf16 if contiguous and use_cpu_kernel(x, weight) else None


def faster_silu_and_mul(
    gate: torch.Tensor, up: torch.Tensor, plain: Callable
) -> Callable[..., torch.Tensor] | None:
    """For `plain(gate, up)`, of one shape."""
    fits = gate.is_cuda and gate.is_contiguous() and up.is_contiguous()
    return silu_and_mul_triton if fits and use_gpu_kernel("silu_and_mul", plain, gate, up) else None


def faster_add_rounded(
    wide: torch.Tensor, other: torch.Tensor, dtype: torch.dtype, plain: Callable
) -> Callable[..., torch.Tensor] | None:
    """For `plain(wide, other, dtype)`, of one shape, `wide` in fp32 and `other` in `dtype`."""
    fits = (
        other.is_cuda
        and other.dtype == dtype
        and wide.device == other.device
        and wide.is_contiguous()
        and other.is_contiguous()
    )
    fits = fits and wide.dtype == torch.float32 and not is_recorded(wide)
    return add_rounded_triton if fits and use_gpu_kernel("add_rounded", plain, other) else None


def faster_route(
    logits: torch.Tensor, bias: torch.Tensor, n_group: int, plain: Callable
) -> Callable[..., Any] | None:
    """For `plain(logits, bias, top_k, n_group, topk_group, normalize, scaling)`, logits (R, E), bias (E,), one group."""
    fits = n_group == 1 and logits.is_cuda and logits.is_contiguous() and bias.is_contiguous()
    return route_one_group if fits and use_gpu_kernel("route", plain, logits, bias) else None


def route_one_group(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return route_triton(logits, bias, top_k, normalize, scaling)


def faster_rotate_and_append(
    q_pe: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor, plain: Callable
) -> Callable[..., torch.Tensor] | None:
    """For the rotation of q_pe (B, h, T, dr) and k_pe (B, 1, T, dr) by `plain`, and their way into a cache that gives
    places for them: `rotate_and_append_triton(q_pe, latent, k_pe, cos, sin, latent_place, k_pe_place)`."""
    fits = q_pe.is_cuda and all(t.stride(-1) == 1 for t in (q_pe, latent, k_pe))
    usable = fits and use_gpu_kernel("rotate_and_append", plain, q_pe, latent, k_pe)
    return rotate_and_append_triton if usable else None


def faster_rotary(x: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """For `rotate_pairs(x, cos, sin)`, x (B, h, T, dr)."""
    return rotary_bf16 if x.stride(-1) == 1 and use_cpu_kernel(x) else None


# ----------------------------------------------------------------------------------------------------------- attention


def choose_path(path: str, num_new: int, num_total: int, device: str = "cpu") -> str:
    """ "absorb" or "expand" for T new tokens against S cached and new ones; `path` forces one unless it is "auto"."""
    if path != "auto":
        return path.partition("-")[0]
    # Expanding is done once for all queries, so it pays from some number of them on; sooner when there is little to expand.
    most = ABSORB_UP_TO_ON_CPU if device == "cpu" else ABSORB_UP_TO
    return "absorb" if num_new == 1 or (num_new <= most and num_total >= 4 * num_new) else "expand"


def faster_absorb(
    path: str,
    q_nope: torch.Tensor,
    up: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    wants_weights: bool,
) -> Callable[..., torch.Tensor] | None:
    """All of absorbed attention in one call, `absorb(q_nope, q_pe, up, latent, k_pe, mask, scaling)`.

    q_nope (B, h, T, dn), up (h, dn + dv, c), latent (B, 1, S, c), k_pe (B, 1, S, dr), mask boolean or None. Raises
    ValueError if "absorb-cpu" cannot be used.
    """
    forced = path == "absorb-cpu"
    if not forced and (path not in ("auto", "absorb") or q_nope.shape[2] > ABSORB_QUERIES_ON_CPU):
        return None
    reason = why_not_absorb_on_cpu(q_nope, up, latent, k_pe, mask, wants_weights)
    if reason is None:
        return absorb if q_nope.shape[2] <= ABSORB_QUERIES_ON_CPU else absorb_in_parts
    if forced:
        raise ValueError(f"mla_path '{path}' is unavailable: {reason}.")
    return None


def why_not_absorb_on_cpu(
    q_nope: torch.Tensor,
    up: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    wants_weights: bool,
) -> str | None:
    if latent.device.type != "cpu":
        return f"the cache is on {latent.device}"
    if not latent.dtype == k_pe.dtype == up.dtype == q_nope.dtype == torch.bfloat16:
        return f"it takes bfloat16, not a cache of {latent.dtype} with {up.dtype} weights"
    if wants_weights:
        return NO_WEIGHTS
    if mask is not None and mask.dtype != torch.bool:
        return f"it takes a boolean mask, not {mask.dtype}"
    if is_recorded(q_nope, up, latent, k_pe):
        return "it computes no gradients"
    if not up.is_contiguous() or latent.stride(-1) != 1 or k_pe.stride(-1) != 1:
        return "kv_b_proj and the cache must be contiguous in their last dimension"
    if latent.shape[-1] > MAX_LATENT:
        return f"kv_lora_rank {latent.shape[-1]} exceeds {MAX_LATENT}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace it"
    if not is_in_ram(q_nope, up, latent, k_pe):
        return NO_MEMORY
    return why_unavailable()


def absorb_in_parts(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    up: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """`absorb` of many new tokens, whose scores would not fit the workspace at once; returns (B, T, h, dv)."""
    parts = [
        absorb(q_nope[:, :, rows], q_pe[:, :, rows], up, latent, k_pe, part_of_mask(mask, rows), scaling)
        for rows in query_slices(q_nope, latent.shape[2])
    ]
    return torch.cat(parts, dim=1)


def faster_latent_attention(
    path: str,
    q_latent: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    wants_weights: bool,
    plain: Callable,
) -> Callable[..., Any] | None:
    """For `plain(q_latent, q_pe, latent, k_pe, mask, scaling, lengths)`, the attention on the latent between the two
    absorbed products. Raises ValueError if "absorb-sdpa" or "absorb-triton" cannot be used."""
    forced = path.partition("-")[2]
    if forced not in ("sdpa", "triton") and (forced or not q_latent.is_cuda):
        return None
    reason: str | None
    if wants_weights:
        reason = NO_WEIGHTS
    elif forced == "sdpa":
        return latent_attention_sdpa
    elif 0 in q_latent.shape:
        reason = NO_ROWS
    elif not torch.compiler.is_compiling() and not has_memory(q_latent, latent, k_pe):
        reason = NO_MEMORY
    elif is_recorded(q_latent, latent, k_pe):
        reason = "it computes no gradients"
    else:
        reason = why_not_triton_attention(q_latent.device, q_latent.dtype, plain)
    if reason is None:
        return latent_attention_whole if torch.compiler.is_compiling() else latent_attention_triton
    if forced:
        raise ValueError(f"mla_path '{path}' is unavailable: {reason}.")
    return None


def latent_attention_sdpa(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Through PyTorch's fused attention: scores are never stored, but latent and k_pe are joined by a copy."""
    heads = q_latent.shape[1]
    query, key = torch.cat((q_latent, q_pe), dim=-1), torch.cat((latent, k_pe), dim=-1)
    key, value = key.expand(-1, heads, -1, -1), latent.expand(-1, heads, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling), None


def latent_attention_whole(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """`latent_attention_triton` as one operator, for torch.compile."""
    return latent_attention_operator(q_latent, q_pe, latent, k_pe, mask, scaling, lengths), None


def why_not_triton_attention(device: torch.device, dtype: torch.dtype, plain: Callable) -> str | None:
    if NO_TRITON is None and device.type != "cuda":
        return f"the cache is on {device}"
    return why_not("latent_attention", device, dtype, plain)


def faster_expanded_attention(
    implementation: str,
    dropout: float,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: torch.Tensor,
    k_pe: torch.Tensor,
    v_dim: int,
    mask: torch.Tensor | None,
) -> Callable[..., torch.Tensor] | None:
    """Attention of q_nope (B, h, T, dn), q_pe (B, h, T, dr) to expanded keys and values, kv (B, h, S, dn + dv) and k_pe
    (B, 1, S, dr), in the place of torch's SDPA: `expanded_attention_cpu(q_nope, q_pe, kv, k_pe, mask, scaling)`. Before
    they are expanded the latents may stand for kv."""
    if implementation != "sdpa" or dropout or torch.compiler.is_compiling() or not is_plain(q_nope, kv, k_pe):
        return None
    fits = k_pe.stride(-1) == 1 and (mask is None or mask.dtype == torch.bool)
    fits = fits and not (q_nope.shape[-1] % 2 or q_pe.shape[-1] % 2 or v_dim % 64)
    if not fits or is_recorded(q_nope, kv, k_pe) or not has_prefill_attention():
        return None
    return expanded_attention_cpu


def expanded_attention_cpu(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Returns (B, T, h, dv). Neither joins keys nor pads values."""
    batch, heads, num_new, nope_dim = q_nope.shape
    output = q_nope.new_empty(batch, num_new, heads, kv.shape[-1] - nope_dim)
    mask = None if mask is None else mask[..., : kv.shape[2]]
    # Without a mask the first T of S keys belong to the new tokens, see `readable_mask`; a single token sees all.
    offset = 0 if mask is None and num_new > 1 else None
    prefill_attention(q_nope, q_pe, kv, k_pe, mask, offset, scaling, output.transpose(1, 2))
    return output


# ------------------------------------------------------------------------------------------------------ routed experts


Matrices = Sequence[ExpertMatrices]  # gate, up, down
Packed = tuple[torch.Tensor, torch.Tensor]  # words and scales


def faster_experts(
    requested: str, x: torch.Tensor, topk_weights: torch.Tensor, matrices: Matrices, plain: Callable
) -> Callable[..., torch.Tensor] | None:
    """For `plain(x, topk_ids, topk_weights, *matrices)`, x (R, H). `requested` is config.int4_backend.

    Raises ValueError if a backend was asked for by name and cannot be used, with the reason. While torch.compile traces,
    a backend is one operator, and the plain code is `run_experts_gathered`, which does not look at the routing.
    """
    device, reason, traced = x.device.type, None, torch.compiler.is_compiling()
    if requested == "cpu" or (requested == "auto" and device == "cpu"):
        reason = why_not_experts_on_cpu(x, topk_weights, matrices)
        if reason is None:
            return run_experts_whole if traced else run_experts_cpu
    if requested == "triton" or (requested == "auto" and device == "cuda"):
        reason = why_not_experts_by_triton(x, topk_weights, matrices, plain)
        if reason is None:
            return run_experts_whole if traced else run_experts_triton
    if requested in ("cpu", "triton"):
        raise ValueError(f"int4_backend '{requested}' is unavailable: {reason}.")
    return run_experts_gathered if traced else None


def runs_by_expert(backend: Callable | None, num_rows: int) -> bool:
    """Whether a backend (None: the plain code) runs one expert after the other, so that each may arrive just in time."""
    return backend is None or (backend is run_experts_cpu and num_rows > EXPERT_ROWS)


def why_not_experts_on_cpu(x: torch.Tensor, topk_weights: torch.Tensor, matrices: Matrices) -> str | None:
    scales = [matrix.scale for matrix in matrices if matrix.scale is not None]
    if not scales:
        return f"the experts are not packed but {matrices[0].weight.dtype}"
    if x.device.type != "cpu":
        return f"the weights are on {x.device}"
    if x.dtype != torch.bfloat16 or scales[0].dtype != torch.bfloat16:
        return f"it takes bfloat16, not {x.dtype} with {scales[0].dtype} scales"
    if is_recorded(x, topk_weights, *scales):
        return "it computes no gradients"
    if torch.compiler.is_compiling():  # the tensors of a trace have no memory; those that come later do
        return why_no_compiled_code()
    if not is_in_ram(x, topk_weights, *scales, *(matrix.weight for matrix in matrices)):
        return NO_MEMORY
    return why_unavailable()


@torch.compiler.assume_constant_result
def why_no_compiled_code() -> str | None:
    return why_unavailable()


def why_not_experts_by_triton(
    x: torch.Tensor, topk_weights: torch.Tensor, matrices: Matrices, plain: Callable
) -> str | None:
    scales = [matrix.scale for matrix in matrices if matrix.scale is not None]
    if not scales:
        return f"the experts are not packed but {matrices[0].weight.dtype}"
    if is_recorded(x, topk_weights, *scales):
        return "it computes no gradients"
    if 0 in x.shape:
        return NO_ROWS
    if not torch.compiler.is_compiling() and not has_memory(
        x, *scales, *(matrix.weight for matrix in matrices)
    ):
        return NO_MEMORY
    return why_not_triton_experts(x.device, x.dtype, plain)


def why_not_triton_experts(device: torch.device, dtype: torch.dtype, plain: Callable) -> str | None:
    if NO_TRITON is None and device.type != "cuda":
        return f"the weights are on {device}"
    return why_not("experts", device, dtype, plain)


@torch.no_grad()
def run_experts_cpu(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
) -> torch.Tensor:
    """Packed experts for bf16 on a CPU, with compiled code. Experts with few rows multiply the words as they are; one with
    many rows is unpacked into tiles of AMX, or into a buffer that all of them share, for the dense product."""
    packed = [cast(Packed, (matrix.weight, matrix.scale)) for matrix in (gate, up, down)]
    x, choices = x.contiguous(), topk_ids.shape[-1]
    if len(x) <= EXPERT_ROWS:
        return experts_int4_few_rows(x, topk_ids.contiguous(), topk_weights.contiguous(), packed)
    order = topk_ids.flatten().argsort(stable=True)  # pairs, by expert
    experts, rows = topk_ids.flatten()[order], order // choices
    weights = topk_weights.flatten()[order].unsqueeze(-1)
    counts = experts.bincount(minlength=gate.num_experts)
    output = torch.zeros(x.shape, dtype=torch.float32)
    with_tiles = has_expert_tiles()
    limit = EXPERT_ROWS_BESIDE_TILES if with_tiles else EXPERT_ROWS
    few = (counts <= limit)[experts]
    if few.any():
        few_rows, few_weights = rows[few], weights[few]
        for part, places in gate.batches(experts[few]):
            y = experts_int4_few_rows(x[few_rows[part]], places.unsqueeze(-1), few_weights[part], packed)
            output.index_add_(0, few_rows[part], y)
    if with_tiles:
        run_one = expert_int4_tiles(x, rows, weights, packed, output)
    else:
        run_one = unpacked_expert(x, rows, weights, (gate, up, down), output)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count > limit:
            run_one(gate.place(expert) if with_tiles else expert, start, count)
        start += count
    return output


def unpacked_expert(
    x: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    matrices: Matrices,
    output: torch.Tensor,
) -> Callable[[int, int, int], None]:
    """A function (expert, start, count) that adds the outputs of one expert for pairs start .. start + count to `output`."""
    sizes = [(matrix.weight.shape[1], matrix.weight.shape[2] * CODES_PER_WORD) for matrix in matrices]
    buffers = [x.new_empty(size) for size in sizes]

    def run(expert: int, start: int, count: int) -> None:
        chosen = slice(start, start + count)
        w_gate, w_up, w_down = (
            unpack_int4_bf16(*cast(Packed, matrix.one(expert)), buffer)
            for matrix, buffer in zip(matrices, buffers, strict=True)
        )
        x_e = x[rows[chosen]]
        y_e = F.linear(F.silu(F.linear(x_e, w_gate)).mul_(F.linear(x_e, w_up)), w_down)
        output.index_add_(0, rows[chosen], y_e.float().mul_(weights[chosen]))

    return run


def _routed_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: torch.Tensor,
    gate_scale: torch.Tensor,
    up: torch.Tensor,
    up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
) -> torch.Tensor:
    run = run_experts_triton if x.is_cuda else run_experts_cpu
    gate_up_down: Any = [
        ExpertMatrices(*pair) for pair in ((gate, gate_scale), (up, up_scale), (down, down_scale))
    ]
    return run(x, topk_ids, topk_weights, *gate_up_down)


experts_operator = operator(
    "routed_experts", _routed_experts, lambda x, *others: x.new_empty(x.shape, dtype=torch.float32)
)


def run_experts_whole(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, *matrices: ExpertMatrices
) -> torch.Tensor:
    """Packed experts on a CPU or a GPU as one operator, for torch.compile."""
    tensors = [tensor for matrix in matrices for tensor in (matrix.weight, matrix.scale)]
    return experts_operator(x, topk_ids, topk_weights, *tensors)


def run_experts_gathered(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate: ExpertMatrices,
    up: ExpertMatrices,
    down: ExpertMatrices,
) -> torch.Tensor:
    """Experts without looking at the routing, so that it can be compiled or captured whole: a copy of every chosen
    expert for every row, which a handful of rows can afford.
    """
    rows, choices = topk_ids.shape
    x = x.repeat_interleave(choices, dim=0).unsqueeze(-1)  # (R K, H, 1)
    ids = topk_ids.flatten()
    hidden = F.silu(gate.gathered(ids, x.dtype) @ x) * (up.gathered(ids, x.dtype) @ x)  # (R K, I, 1)
    output = (down.gathered(ids, x.dtype) @ hidden).float().view(rows, choices, -1)  # (R, K, H)
    return (output * topk_weights.unsqueeze(-1)).sum(dim=1)


# ------------------------------------------------------------------------------------------------ long inputs in parts


def by_rows(function: Callable, x: torch.Tensor, rows: int) -> torch.Tensor:
    """function(x), of `rows` rows of x (..., H) at a time where nothing is recorded; it must map rows one by one."""
    if x.numel() <= rows * x.shape[-1] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    output = x.new_empty(x.shape)
    for part, to in zip(x.flatten(0, -2).split(rows), output.flatten(0, -2).split(rows), strict=True):
        to.copy_(function(part))
    return output


def expanded_head_slices(
    implementation: str,
    dropout: float,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    v_dim: int,
    mask: torch.Tensor | None,
) -> list[slice]:
    """All h heads of q_nope (B, h, T, dn), as many at a time as have keys and values that fit the workspace when they
    are expanded from latent (B, 1, S, c); at least one."""
    nope_dim, key_dim = q_nope.shape[-1], q_nope.shape[-1] + q_pe.shape[-1]
    fast = faster_expanded_attention(implementation, dropout, q_nope, q_pe, latent, k_pe, v_dim, mask)
    # Keys and padded values; PyTorch's own kernel for a CPU may pack both once more.
    copies = 2 if latent.is_cuda or fast else 4
    step = heads_at_once(latent, q_nope.shape[1], nope_dim + v_dim + copies * key_dim)
    return [slice(start, start + step) for start in range(0, q_nope.shape[1], step)]


def workspace_bytes(device: torch.device) -> int:
    """For one layer's keys and values, or scores. On a GPU a quarter of what is free now, since a few heads at a time
    leave it idle: at 131,072 cached tokens the smallest workspace holds a single one of 64."""
    if device.type != "cuda" or torch.compiler.is_compiling() or is_captured():
        return WORKSPACE_BYTES
    try:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        share = (torch.cuda.mem_get_info(device)[0] + unused) // 4
    except Exception:  # whatever torch raises for fake tensors where there is no such device
        return WORKSPACE_BYTES
    # A power of two: products of other sizes may round otherwise, and free memory is never the same twice.
    return min(max(WORKSPACE_BYTES, 1 << max(share.bit_length() - 1, 0)), LARGEST_WORKSPACE_BYTES)


def heads_at_once(latent: torch.Tensor, num_heads: int, values_per_token: int) -> int:
    """How many of h heads fit the workspace with `values_per_token` for each of S tokens; at least one."""
    batch, _, length, _ = latent.shape
    per_head = batch * length * values_per_token * latent.element_size()
    return max(1, min(num_heads, workspace_bytes(latent.device) // max(per_head, 1)))


def query_slices(q: torch.Tensor, num_total: int, attend: Callable | None = None) -> list[slice]:
    """All T new tokens of q (B, h, T, d), as many at a time as have scores against S tokens that fit the workspace; or
    outputs, for a kernel that stores no scores."""
    num_new = q.shape[2]
    if num_new == 1:
        return [slice(0, 1)]
    if attend is latent_attention_whole or (NO_TRITON is None and attend is latent_attention_triton):
        per_query = q[:, :, 0].numel() * 8  # a part and the output; one part, where queries are many
        step = max(1, workspace_bytes(q.device) // per_query)
    else:
        step = queries_at_once(q, num_total)
    return [slice(start, start + step) for start in range(0, num_new, step)]


def queries_at_once(q: torch.Tensor, num_total: int) -> int:
    """How many new tokens of q (B, h, T, d) have scores (fp32 twice and once in q's dtype) that fit the workspace; at
    least one."""
    batch, heads, num_new, _ = q.shape
    per_query = batch * heads * num_total * (8 + q.element_size())
    return max(1, min(num_new, workspace_bytes(q.device) // max(per_query, 1)))


def part_of_mask(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The rows of a mask (B or 1, 1, T or 1, S)."""
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
