"""Triton kernels as `kimi_backends.py` uses them: which of them run on a device, and whole under torch.compile.

    why_not      None if the kernels of an operation run on a device and agree with the plain code, else the reason
    prepare      asks that of every operation for the devices of a model: by from_pretrained, .to() and .cuda(), so that no
                 forward pass has to
    *_operator   entry points as operators of torch.library, which torch.compile does not look into

A kernel that nobody has tried on this card may not compile there, want more shared memory than it has, or be wrong. So
each is compared with the plain code on small tensors, in every configuration that the tables of block sizes can choose,
before it is used; one that fails is not. The small tensors lead Triton to the code of the published sizes, which is
thereby compiled and in its cache.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .kimi_int4 import CODES_PER_WORD, GROUP_SIZE, ExpertMatrices

NO_TRITON: str | None = None
try:
    from .kimi_attention_triton import SELF_TEST_SIZES as ATTENTION_SHAPE
    from .kimi_attention_triton import UNUSABLE as UNUSABLE_ATTENTION
    from .kimi_attention_triton import latent_attention_triton, usable_blocks
    from .kimi_attention_triton import self_test_cases as attention_cases
    from .kimi_int4_triton import SELF_TEST_SHAPE as EXPERTS_SHAPE
    from .kimi_int4_triton import UNUSABLE as UNUSABLE_EXPERTS
    from .kimi_int4_triton import run_experts_triton, usable_prefill
    from .kimi_int4_triton import self_test_cases as experts_cases
    from .kimi_layer_triton import (
        add_rounded_triton,
        rms_norm_triton,
        rotate_and_append_triton,
        route_triton,
        silu_and_mul_triton,
    )
except ImportError as error:
    NO_TRITON = f"triton cannot be imported ({error})"

logger = logging.get_logger(__name__)

Reference = Callable[..., Any]  # the plain code of an operation
LARGEST_ERROR = 0.05  # of a kernel's output against the plain code's, as a share of the largest value
NOT_TRIED = "its kernels were not tried on this device before; load the model there with from_pretrained, or move it with .to()"

# ---------------------------------------------------------------------------------------------------------- self-tests

# Operation, device, dtype -> why its kernels are not used there; None if they are.
FINDINGS: dict[tuple[str, str, torch.dtype], str | None] = {}


def why_not(operation: str, device: torch.device, dtype: torch.dtype, plain: Reference) -> str | None:
    """None if the kernels run on this device and agree with `plain`, which is tried once."""
    if NO_TRITON is not None or device.type != "cuda":
        return NO_TRITON or f"its tensors are on {device}"
    if torch.compiler.is_compiling():
        return finding(operation, str(device), dtype)
    key = operation, str(device), dtype
    if key not in FINDINGS:
        # Fake tensors have no values to compare.
        if type(torch.empty(0, device="cpu")) is not torch.Tensor or is_captured():
            return NOT_TRIED
        try:
            FINDINGS[key] = compare(operation, device, dtype, plain)
        except torch.cuda.OutOfMemoryError as problem:  # says nothing about the kernels: another time, then
            return f"there is no memory on {device} to try its kernels ({problem})"
    return FINDINGS[key]


def is_captured() -> bool:
    """Whether a CUDA graph is being made, in which nothing may ask the device."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # fake tensors on cuda, and a torch without it
        return False


@torch.compiler.assume_constant_result
def finding(operation: str, device: str, dtype: torch.dtype) -> str | None:
    """What is known while torch.compile traces, which must not trace a comparison."""
    return FINDINGS.get((operation, device, dtype), NOT_TRIED)


def prepare(device: torch.device, dtype: torch.dtype, plain_code: Mapping[str, Reference]) -> None:
    """Tries the kernels of all operations on a device, where that was not done before. `plain_code` by operation."""
    if device.type == "cuda" and dtype in KERNEL_DTYPES:
        for operation, plain in plain_code.items():
            # Logits are fp32, whatever the model is.
            why_not(operation, device, torch.float32 if operation == "route" else dtype, plain)


def compare(operation: str, device: torch.device, dtype: torch.dtype, plain: Reference) -> str | None:
    try:
        with torch.no_grad(), torch.device("cpu"):  # whatever default device or dtype a caller has set
            return SELF_TESTS[operation](device, dtype, plain)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a compiler or driver may raise: the plain code still works
        reason = f"its kernels fail on {device} ({type(problem).__name__}: {problem})"
        logger.warning(f"{operation} runs in plain torch, slowly: triton is there, but {reason}")
        return reason


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """fp32 on the CPU, the same in every process."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def check_agreement(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    wrong = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    if not wrong < LARGEST_ERROR:
        raise ArithmeticError(f"{what} differs by {wrong:.3g} of the largest value")


def each_case(cases: Iterable[Any], unusable: set, device: torch.device, run: Callable[[Any], None]) -> None:
    """Runs the cases of a kernel file's tables; a configuration that fails is not used any more, and others serve."""
    for case in cases:
        try:
            run(case)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as problem:
            unusable.add(case.key)
            logger.warning(f"{case.name} is not used on {device} ({type(problem).__name__}: {problem})")


def try_experts(device: torch.device, dtype: torch.dtype, plain: Reference) -> None:
    experts, width, inner, choices = EXPERTS_SHAPE
    generator = torch.Generator("cpu").manual_seed(0)
    matrices: list[Any] = []
    for outputs, inputs in ((inner, width), (inner, width), (width, inner)):
        size = experts, outputs, inputs // CODES_PER_WORD
        words = torch.randint(-(2**31), 2**31, size, generator=generator, dtype=torch.int64).int()
        scales = torch.rand(experts, outputs, inputs // GROUP_SIZE, generator=generator, dtype=torch.float32)
        matrices.append(ExpertMatrices(words.to(device), (scales * 0.01).bfloat16().to(device)))

    def run(case: Any) -> None:
        x, order = random(case.rows, width).to(device, dtype), random(case.rows, experts, seed=1)
        ids = order.argsort(dim=-1)[:, :choices].to(device)
        weights = random(case.rows, choices, seed=2).abs().to(device)
        want = plain(x, ids, weights, *matrices)
        check_agreement(run_experts_triton(x, ids, weights, *matrices), want, f"{case.rows} rows")

    each_case(experts_cases(device, dtype), UNUSABLE_EXPERTS.setdefault(device, set()), device, run)
    if not usable_prefill(device, dtype):
        raise ArithmeticError("no configuration for many rows works")


def try_latent_attention(device: torch.device, dtype: torch.dtype, plain: Reference) -> None:
    batch, heads, width, rope = ATTENTION_SHAPE

    def run(case: Any) -> None:
        new, total = case.num_new, case.num_total
        shapes = (
            (batch, heads, new, width),
            (batch, heads, new, rope),
            (batch, 1, total, width),
            (batch, 1, total, rope),
        )
        tensors = [random(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes)]
        filled = total - 50 if case.lengths else total
        seen = torch.ones(new, total, dtype=torch.bool).tril(filled - new)[None, None].to(device)
        q_latent, q_pe, latent, k_pe = tensors
        want, _ = plain(q_latent, q_pe, latent, k_pe, seen, 0.05)
        lengths = torch.tensor([filled]).to(device) if case.lengths else None
        mask = seen if case.mask == "bool" else None
        got, _ = latent_attention_triton(q_latent, q_pe, latent, k_pe, mask, 0.05, lengths)
        if case.mask == "bool" or new == 1:  # or else the last tokens see what they should not
            check_agreement(got, want, case.name)

    each_case(attention_cases(device, dtype), UNUSABLE_ATTENTION.setdefault(device, set()), device, run)
    if not usable_blocks(device, dtype):
        raise ArithmeticError("no configuration works")


def try_rms_norm(device: torch.device, dtype: torch.dtype, plain: Reference) -> None:
    for width in (512, 1536, 7168):  # latents, compressed queries, states
        x, weight = random(3, width).to(device, dtype), random(width, seed=1).to(device, dtype)
        check_agreement(rms_norm_triton(x, weight, 1e-5), plain(x, weight, 1e-5), "the norm")


def try_silu_and_mul(device: torch.device, dtype: torch.dtype, plain: Reference) -> None:
    gate, up = (random(3, 2048, seed=seed).to(device, dtype) for seed in range(2))
    check_agreement(silu_and_mul_triton(gate, up), plain(gate, up), "the product")


def try_add_rounded(device: torch.device, dtype: torch.dtype, plain: Reference) -> None:
    wide, other = random(3, 2048).to(device), random(3, 2048, seed=1).to(device, dtype)
    check_agreement(add_rounded_triton(wide, other, dtype), plain(wide, other, dtype), "the sum")


def try_route(device: torch.device, dtype: torch.dtype, plain: Reference) -> None:
    logits, bias = random(3, 384).to(device), random(384, seed=1).to(device)
    ids, weights = route_triton(logits, bias, 8, True, 2.827)
    want_ids, want_weights = plain(logits, bias, 8, 1, 1, True, 2.827)
    if not torch.equal(ids.sort(dim=-1).values, want_ids.sort(dim=-1).values):
        raise ArithmeticError("other experts are chosen")
    check_agreement(weights.sort(dim=-1).values, want_weights.sort(dim=-1).values, "the weights")


def try_rotate_and_append(device: torch.device, dtype: torch.dtype, plain: Reference) -> None:
    q = random(1, 2, 64, 192).to(device, dtype).transpose(1, 2)[..., 128:]
    latent, k_pe = random(1, 1, 2, 576, seed=1).to(device, dtype).split((512, 64), dim=-1)
    angles = random(1, 2, 32, seed=2).to(device)
    cos, sin = angles.cos(), angles.sin()
    places = [torch.zeros(1, 1, 9, width, dtype=dtype, device=device)[:, :, 5:7] for width in (512, 64)]
    check_agreement(rotate_and_append_triton(q, latent, k_pe, cos, sin, *places), plain(q, cos, sin), "q_pe")
    check_agreement(places[0], latent, "the cached latent")
    check_agreement(places[1], plain(k_pe, cos, sin), "the cached k_pe")


SELF_TESTS: dict[str, Callable[[torch.device, torch.dtype, Reference], str | None]] = {
    "experts": try_experts,
    "latent_attention": try_latent_attention,
    "add_rounded": try_add_rounded,
    "rms_norm": try_rms_norm,
    "silu_and_mul": try_silu_and_mul,
    "route": try_route,
    "rotate_and_append": try_rotate_and_append,
}
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# ------------------------------------------------------------------------------------------------------------ operators


def operator(name: str, function: Callable, fake: Callable) -> Any:
    """`function` as an operator of torch.library: torch.compile takes it whole, with `fake` for the shapes of its result.

    A module can run twice in a process, and registering a name again would leave the code compiled by then without it.
    So the name holds what distinguishes one copy of the files from another, and is registered once.
    """
    files = {__file__, function.__code__.co_filename}
    texts = b"".join(Path(file).read_bytes() for file in sorted(files))
    copy = hashlib.sha256(__name__.encode() + texts).hexdigest()[:12]
    namespace = getattr(torch.ops, f"kimi_{copy}")
    if not hasattr(namespace, name):
        torch.library.custom_op(f"kimi_{copy}::{name}", function, mutates_args=()).register_fake(fake)
    return getattr(namespace, name)


def _latent_attention(
    q_latent: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    return latent_attention_triton(q_latent, q_pe, latent, k_pe, mask, scaling, lengths)[0]


latent_attention_operator = operator(
    "latent_attention", _latent_attention, lambda q_latent, *others: q_latent.new_empty(q_latent.shape)
)
