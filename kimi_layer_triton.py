"""Triton kernels for the small operations of a layer, each one launch where plain torch takes several.

Decoding one token is many small operations, and each costs its launch, whatever it computes. In plain torch a layer
with experts takes some eighty; with these, and the kernels for attention and experts, 25.

    operation          plain code, in modeling_kimi                       launches there
    rms_norm           rms_norm                                           6
    rotate_and_append  rotate_pairs of q_pe and k_pe, and the cache's copies  18
    route              sigmoid, bias, top-k, weights                      8
    silu_and_mul       F.silu(gate) * up                                  2
    add_rounded        experts' fp32 sum .to(bf16), + shared expert       2

Letters: B sequences, h heads, T new tokens, dr = qk_rope_head_dim, c = kv_lora_rank, R rows, E experts, K per row.

They round where the plain code rounds, so results differ by the order of fp32 sums only. TRITON_INTERPRET=1 in the
environment before this file is imported runs them on the CPU, slowly.
"""

import contextlib
import os

import torch

try:  # inside `try`, the remote-code loader does not take triton for a hard requirement
    import triton
    import triton.language as tl
except ImportError:
    raise

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
HEADS_AT_ONCE = 16  # of a program of rotate_and_append


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which under a device_map need not be the one that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `modeling_kimi.rms_norm`: x (..., width), weight (width,), both of one dtype up to fp32."""
    rows = x.flatten(0, -2)  # a view, also of the latents, which are parts of wider rows
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[-1])
    with on_device_of(x):
        rms_norm_kernel[(len(rows),)](
            rows,
            weight,
            output,
            rows.stride(0),
            x.shape[-1],
            eps,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
        )
    return output


@triton.jit
def rms_norm_kernel(x, weight, output, stride, WIDTH, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    values = tl.load(x + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    # Rounded before the weight multiplies, like the published code.
    normed = (values * inverse_rms).to(output.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + i, scaled.to(output.dtype.element_ty), mask=inside)


def silu_and_mul_triton(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, both contiguous and of one shape and dtype."""
    output, count, block = torch.empty_like(gate), gate.numel(), 1024
    with on_device_of(gate):
        silu_and_mul_kernel[(triton.cdiv(count, block),)](gate, up, output, count, BLOCK=block)
    return output


@triton.jit
def silu_and_mul_kernel(gate, up, output, COUNT, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < COUNT, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < COUNT, other=0.0).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + i, (activated * u).to(output.dtype.element_ty), mask=i < COUNT)


def add_rounded_triton(wide: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`wide` rounded to `dtype`, which is that of `other`, plus `other`; both contiguous and of one shape."""
    output, count, block = torch.empty_like(other), other.numel(), 1024
    with on_device_of(other):
        add_rounded_kernel[(triton.cdiv(count, block),)](wide, other, output, count, BLOCK=block)
    return output


@triton.jit
def add_rounded_kernel(wide, other, output, COUNT, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rounded = tl.load(wide + i, mask=i < COUNT, other=0.0).to(output.dtype.element_ty).to(tl.float32)
    total = rounded + tl.load(other + i, mask=i < COUNT, other=0.0).to(tl.float32)
    tl.store(output + i, total.to(output.dtype.element_ty), mask=i < COUNT)


def route_triton(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, normalize: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, E) and bias (E,), both fp32, to ids (R, K) int64 and weights (R, K) fp32, for one group of experts.

    Ids are K different ones below E whatever the logits are, NaN included: kernels address memory by them.
    """
    (rows, experts), device = logits.shape, logits.device
    ids = torch.empty((rows, top_k), dtype=torch.int64, device=device)
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=device)
    with on_device_of(logits):
        route_kernel[(rows,)](
            logits,
            bias,
            ids,
            weights,
            experts,
            scaling,
            K=top_k,
            NORMALIZE=normalize,
            BLOCK_E=triton.next_power_of_2(experts),
            BLOCK_K=triton.next_power_of_2(top_k),
        )
    return ids, weights


@triton.jit
def route_kernel(
    logits,
    bias,
    ids,
    weights,
    E,
    scaling,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    inside = e < E
    score = tl.sigmoid(tl.load(logits + row * E + e, mask=inside, other=0.0))
    choice = score + tl.load(bias + e, mask=inside, other=0.0)
    # Whatever is no number, or -inf, comes after all numbers but before what is taken or outside.
    choice = tl.where(choice > -3.0e38, choice, -3.0e38)
    choice = tl.where(inside, choice, float("-inf"))
    chosen_ids = tl.zeros((BLOCK_K,), dtype=tl.int32)
    chosen_scores = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(choice, axis=0)
        chosen_ids = tl.where(k == i, best, chosen_ids)
        chosen_scores = tl.where(k == i, tl.sum(tl.where(e == best, score, 0.0), axis=0), chosen_scores)
        choice = tl.where(e == best, float("-inf"), choice)
    if NORMALIZE:
        chosen_scores = chosen_scores / (tl.sum(chosen_scores, axis=0) + 1e-20)
    tl.store(ids + row * K + k, chosen_ids.to(tl.int64), mask=k < K)
    tl.store(weights + row * K + k, chosen_scores * scaling, mask=k < K)


def rotate_and_append_triton(
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    latent_place: torch.Tensor,
    k_pe_place: torch.Tensor,
) -> torch.Tensor:
    """Rotates q_pe (B, h, T, dr) and k_pe (B, 1, T, dr) as `modeling_kimi.rotate_pairs` does, by cos and sin (B, T, dr/2)
    fp32, and writes latent (B, 1, T, c) and the rotated k_pe to their places in the cache, of the same shapes. Returns
    the rotated q_pe.

    Last dimensions are contiguous.
    """
    batch, heads, num_new, rope = q_pe.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    output = torch.empty(q_pe.shape, dtype=q_pe.dtype, device=q_pe.device)
    programs = triton.cdiv(heads, HEADS_AT_ONCE) + 1  # the last for the cache
    with on_device_of(q_pe):
        rotate_and_append_kernel[(batch * num_new, programs)](
            q_pe,
            latent,
            k_pe,
            cos,
            sin,
            output,
            latent_place,
            k_pe_place,
            *q_pe.stride()[:3],
            latent.stride(0),
            latent.stride(2),
            k_pe.stride(0),
            k_pe.stride(2),
            latent_place.stride(0),
            latent_place.stride(2),
            k_pe_place.stride(0),
            k_pe_place.stride(2),
            heads,
            num_new,
            latent.shape[3],
            rope // 2,
            BLOCK_H=HEADS_AT_ONCE,
            BLOCK_C=triton.next_power_of_2(latent.shape[3]),
            BLOCK_P=triton.next_power_of_2(rope // 2),
        )
    return output


# What varies while a sequence grows is not specialised on: each such value would compile the kernel anew.
@triton.jit(
    do_not_specialize=["latent_place_b", "k_pe_place_b", "T", "q_b", "latent_b", "k_pe_b", "q_h", "q_t"]
)
def rotate_and_append_kernel(
    q_pe,
    latent,
    k_pe,
    cos,  # (B, T, P)
    sin,
    output,  # (B, h, T, 2 P)
    latent_place,
    k_pe_place,
    q_b,
    q_h,
    q_t,
    latent_b,
    latent_t,
    k_pe_b,
    k_pe_t,
    latent_place_b,
    latent_place_t,
    k_pe_place_b,
    k_pe_place_t,
    HEADS,
    T,
    C,
    P,  # pairs
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    p = tl.arange(0, BLOCK_P)
    cosine = tl.load(cos + token * P + p, mask=p < P, other=0.0)
    sine = tl.load(sin + token * P + p, mask=p < P, other=0.0)
    if tl.program_id(1) * BLOCK_H < HEADS:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        inside = (head < HEADS) & (p[None, :] < P)
        place = q_pe + b * q_b + head * q_h + t * q_t + 2 * p[None, :]
        first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
        turned_first = first * cosine[None, :] - second * sine[None, :]
        turned_second = second * cosine[None, :] + first * sine[None, :]
        target = output + ((b * HEADS + head) * T + t) * 2 * P + p[None, :]
        tl.store(target, turned_first.to(output.dtype.element_ty), mask=inside)
        tl.store(target + P, turned_second.to(output.dtype.element_ty), mask=inside)
    else:  # names of its own: to Triton a name has one shape
        k_place = k_pe + b * k_pe_b + t * k_pe_t + 2 * p
        k_first = tl.load(k_place, mask=p < P, other=0.0).to(tl.float32)
        k_second = tl.load(k_place + 1, mask=p < P, other=0.0).to(tl.float32)
        k_target = k_pe_place + b * k_pe_place_b + t * k_pe_place_t + p
        dtype = k_pe_place.dtype.element_ty
        tl.store(k_target, (k_first * cosine - k_second * sine).to(dtype), mask=p < P)
        tl.store(k_target + P, (k_second * cosine + k_first * sine).to(dtype), mask=p < P)
        c = tl.arange(0, BLOCK_C)
        values = tl.load(latent + b * latent_b + t * latent_t + c, mask=c < C, other=0.0)
        tl.store(latent_place + b * latent_place_b + t * latent_place_t + c, values, mask=c < C)
