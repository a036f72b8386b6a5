"""Steps of the GPU check for the kernels alone: what the card can do, experts, attention, graphs and streams.

Each output is compared with an fp64 product made on the card from the same words, for rows drawn at random where all
would take too long. `experts_calls` and `attention_calls` are also what is compiled ahead.
"""

import contextlib
import functools
import importlib
import platform
import random
import subprocess
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_device import Device, attention_kernels, check_equal, check_error, experts_kernels, tensors_of
from gpu_report import Results, require

from kimi.kimi_experts import ExpertMatrices
from kimi.kimi_int4 import dequantize_int4

SCALING = 0.1
# Of a row, |difference| / |value|: sums in another order; or rounded weights, inner values and outputs.
FP32_LIMIT, FP16_LIMIT, BF16_LIMIT = 3e-5, 4e-3, 1.5e-2
LIMITS = {torch.float32: FP32_LIMIT, torch.float16: FP16_LIMIT, torch.bfloat16: BF16_LIMIT}


# ------------------------------------------------------------------------------------------------------------ ceilings


def ceilings(device: Device, results: Results) -> None:
    with results.check("card") as found:
        found.update(card(device))
    clock = device.clock(1.0)
    with results.check("copy rate") as found:
        source = torch.empty(
            2**16 if device.small else 2**31, dtype=torch.uint8, device=device.device
        ).random_()
        target = torch.empty_like(source)
        seconds, runs = clock.median(lambda: target.copy_(source), cold=False)
        check_equal(target, source, "the copy")
        found.update(measured=True, gb_per_s=2 * source.numel() / seconds / 1e9, runs=runs)
    with results.check("bf16 product rate") as found:
        n = 64 if device.small else 8192
        a, b = device.normal(n, n), device.normal(n, n)
        seconds, runs = clock.median(lambda: a @ b, cold=False)
        found.update(measured=True, tflop_per_s=2 * n**3 / seconds / 1e12, runs=runs)
    with results.check("launch cost") as found:
        small, many = torch.zeros(1024, device=device.device), 20 if device.small else 1000

        def launches() -> None:
            for _ in range(many):
                small.add_(1)

        eager, _ = clock.median(launches, cold=False)
        replay, _ = clock.median(device.graph(launches_into(launches, small)).replay, cold=False)
        found.update(measured=True, us_eager=eager / many * 1e6, us_in_graph=replay / many * 1e6)


def launches_into(call: Callable[[], None], output: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        call()
        return output

    return run


def card(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "dry": device.dry,
        "python": platform.python_version(),
    }
    for name in ("torch", "triton", "transformers", "numpy"):
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(name).__version__
    if device.dry:
        return {"name": "no card", **found}
    properties = torch.cuda.get_device_properties(device.device)
    found |= {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(device.device)),
        "processors": properties.multi_processor_count,
        "gb": properties.total_memory / 1e9,
        "l2_mb": properties.L2_cache_size / 1e6,
        "cuda": torch.version.cuda,
    }
    fields = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=8)
        found["smi"] = done.stdout.strip()
    return found


# ------------------------------------------------------------------------------------------------------------- experts


class ExpertsCall(NamedTuple):
    name: str
    rows: int
    dtype: torch.dtype
    limit: float
    run: Callable[..., torch.Tensor]  # (x, ids, weights, gate, up, down)


def experts_calls(device: Device) -> list[ExpertsCall]:
    """Every number of rows of decode, and every row of every table of prefill: forced, and as it is chosen."""
    k, sizes, calls = experts_kernels(device), device.sizes, []
    bf16 = torch.bfloat16
    most = 2 if device.small else k.DECODE_UP_TO
    for rows in range(1, most + 1):
        calls.append(ExpertsCall(f"decode {rows} rows", rows, bf16, FP32_LIMIT, k.run_experts_triton))
    chosen = (17,) if device.small else (17, 64, 576, 577, 1152, 1153, 2304, 2305, 4096, 8193)
    for rows in chosen:
        calls.append(ExpertsCall(f"prefill {rows} rows", rows, bf16, BF16_LIMIT, k.run_experts_triton))
    for name in sorted(name for name in dir(k) if name.startswith("PREFILL_")):
        dtype, below, table = torch.float32 if "FP32" in name else bf16, 0.0, getattr(k, name)
        for pairs, gate_up, down in table if isinstance(table, tuple) else ():
            per_expert = min(pairs, max(2 * below, 8.0))
            rows = min(max(round(per_expert * sizes.experts / sizes.choices), k.DECODE_UP_TO + 1), 4608)
            run = forced(k.run_experts_prefill, (gate_up, down))
            what = f"{name} up to {pairs} pairs, {rows} rows"
            calls.append(ExpertsCall(what, rows, dtype, LIMITS[dtype], run))
            below = pairs
    for dtype in (torch.float16, torch.float32):
        few, many = (2, 17) if device.small else (4, 64)
        calls.append(ExpertsCall(f"decode {few} rows {dtype}", few, dtype, FP32_LIMIT, k.run_experts_triton))
        what = f"prefill {many} rows {dtype}"
        calls.append(ExpertsCall(what, many, dtype, LIMITS[dtype], k.run_experts_triton))
    return calls


def forced(run: Callable[..., torch.Tensor], blocks: Any) -> Callable[..., torch.Tensor]:
    return lambda *inputs: run(*inputs, blocks=blocks)


def experts(device: Device, results: Results) -> None:
    sizes, draw = device.sizes, random.Random(0)
    layer = device.layer(sizes.experts)
    for call in results.within(experts_calls(device)):
        with results.check(call.name) as found:
            x, ids, weights = device.batch(call.rows, sizes.experts)
            x = x.to(call.dtype)
            with device.poisoned():
                got = call.run(x, ids, weights, *layer)
            require(
                got.dtype == torch.float32 and got.shape == x.shape, f"gave {got.dtype} {tuple(got.shape)}"
            )
            require(bool(got.isfinite().all()), f"{int((~got.isfinite()).sum())} values are not finite")
            rows = sorted({0, call.rows - 1, *(draw.randrange(call.rows) for _ in range(3))})
            want = torch.stack([exact_row(x[row], ids[row], weights[row], layer) for row in rows])
            check_error(found, got[rows], want, call.limit)
            for _ in range(1 if device.small else 2):
                check_equal(call.run(x, ids, weights, *layer), got, "a repeated run")
    with results.check("a few experts get all rows") as found:
        number = 20 if device.small else 600
        x, ids, weights = device.batch(number, sizes.experts)
        ids.copy_(ids[:1].expand_as(ids).clone())
        with device.poisoned():
            got = experts_kernels(device).run_experts_triton(x, ids, weights, *layer)
        want = torch.stack([exact_row(x[row], ids[row], weights[row], layer) for row in (0, number - 1)])
        check_error(found, got[[0, number - 1]], want, BF16_LIMIT)


def exact_row(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: list[ExpertMatrices]
) -> torch.Tensor:
    """x (H,), ids and weights (K,) to (H,), in fp64, an expert at a time."""
    total = torch.zeros_like(x, dtype=torch.float64)
    for expert, weight in zip(ids.tolist(), weights.double(), strict=True):
        gate, up = (double(matrix, expert) @ x.double() for matrix in layer[:2])
        total += weight * (double(layer[2], expert) @ (F.silu(gate) * up))
    return total


def double(matrix: ExpertMatrices, expert: int) -> torch.Tensor:
    words, scales = matrix.one(expert)
    assert scales is not None
    return dequantize_int4(words, scales, torch.float64)


# ----------------------------------------------------------------------------------------------------------- attention


class AttentionCall(NamedTuple):
    new: int
    total: int
    batch: int = 1
    mask: str = "none"
    dtype: torch.dtype = torch.bfloat16
    lengths: bool = False

    @property
    def name(self) -> str:
        ends = " lengths" if self.lengths else ""
        return f"{self.new} new of {self.total} x {self.batch} mask {self.mask} {self.dtype}{ends}"


def attention_calls(device: Device) -> list[AttentionCall]:
    """Not all combinations: each compiles a kernel of its own."""
    if device.small:
        plain = [AttentionCall(new, total) for new in (1, 2) for total in (1, 17)]
        masked = [AttentionCall(2, 33, 2, mask) for mask in ("bool", "float", "row", "row float")]
        other = [AttentionCall(1, 33, 1, "none", dtype) for dtype in (torch.float32, torch.float16)]
        return [*plain, *masked, *other, AttentionCall(1, 40, 3, lengths=True)]
    call = AttentionCall
    return [
        *(call(1, total) for total in (1, 16, 17, 300, 4096, 33001)),
        *(call(new, total) for new in (2, 8) for total in (9, 4096, 33001)),
        call(1, 33001, 4),
        call(8, 4096, 4),
        *(call(1, 4096, 4, mask) for mask in ("row", "row float")),
        *(call(8, 4097, 4, mask) for mask in ("bool", "float", "row")),
        call(2, 33001, 1, "bool"),
        call(1, 33001, 4, lengths=True),
        call(1, 4096, 4, "row", lengths=True),
        *(call(new, 4097, 1, "none", dtype) for new in (1, 8) for dtype in (torch.float32, torch.float16)),
        call(2, 300, 4, "bool", torch.float32),
    ]


def attention_inputs(
    device: Device, call: AttentionCall, like: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """q_latent, q_pe, latent, k_pe of `like`'s values; the cache is the filled part of buffers that go on with NaN."""
    sizes = device.sizes

    def in_buffer(width: int) -> torch.Tensor:
        buffer = like(call.batch, 1, call.total + 13, width, dtype=call.dtype)
        buffer[:, :, call.total :] = float("nan")
        return buffer[:, :, : call.total]

    queries = [
        like(call.batch, sizes.heads, call.new, width, dtype=call.dtype)
        for width in (sizes.latent, sizes.rope)
    ]
    return [*queries, in_buffer(sizes.latent), in_buffer(sizes.rope)]


def make_mask(device: Device, call: AttentionCall) -> torch.Tensor | None:
    if call.mask == "none":
        return None
    rows = 1 if "row" in call.mask else call.new
    shape = (call.batch, 1, rows, call.total)
    seen = torch.rand(shape, device=device.device, generator=device.generator) > 0.4
    seen[..., 0] = True
    seen[0, ..., : call.total // 2] = False  # as left padding: whole splits are hidden
    seen[..., -1] = True
    if "float" not in call.mask:
        return seen
    return torch.zeros(shape, device=device.device).masked_fill(~seen, torch.finfo(torch.float32).min)


def make_lengths(device: Device, call: AttentionCall) -> torch.Tensor | None:
    if not call.lengths:
        return None
    lengths = [1, call.total // 3, call.total - 1, call.total][: call.batch]
    return torch.tensor(lengths, device=device.device)


def attention(device: Device, results: Results) -> None:
    run = attention_kernels(device).latent_attention_triton
    for call in results.within(attention_calls(device)):
        with results.check(call.name) as found:
            inputs, mask = attention_inputs(device, call, device.normal), make_mask(device, call)
            lengths = make_lengths(device, call)
            if lengths is not None:  # what lies beyond must not be read
                for tensor in inputs[2:]:
                    for sequence, length in zip(tensor, lengths.tolist(), strict=True):
                        sequence[:, length:] = float("nan")
            with device.poisoned():
                got, weights = run(*inputs, mask, SCALING, lengths=lengths)
            require(weights is None and got.dtype == call.dtype, f"gave {got.dtype} and {type(weights)}")
            want = exact_attention(inputs, mask, lengths)
            check_error(found, got, want, LIMITS[call.dtype])
            check_equal(run(*inputs, mask, SCALING, lengths=lengths)[0], got, "a repeated run")


def exact_attention(
    inputs: list[torch.Tensor], mask: torch.Tensor | None, lengths: torch.Tensor | None
) -> torch.Tensor:
    """(B, h, T, c) in fp64, a sequence at a time."""
    outputs = []
    for b in range(len(inputs[0])):
        length = inputs[2].shape[2] if lengths is None else int(lengths[b])
        q_latent, q_pe = (tensor[b].double() for tensor in inputs[:2])
        latent, k_pe = (tensor[b, 0, :length].double() for tensor in inputs[2:])
        scores = (q_latent @ latent.T + q_pe @ k_pe.T) * SCALING  # (h, T, S)
        if mask is not None:
            own = mask[b if len(mask) > 1 else 0, :, :, :length]
            scores = scores.masked_fill(~own, -1e38) if own.dtype == torch.bool else scores + own.double()
        outputs.append(scores.softmax(-1) @ latent)
    return torch.stack(outputs)


# ---------------------------------------------------------------------------------------------------- graphs, streams


def graph_cases(device: Device) -> Iterator[tuple[str, Callable[[], Any], Callable[[], None]]]:
    """Name, a call, and what changes the values of its inputs."""
    sizes, k = device.sizes, experts_kernels(device)
    few = min(sizes.experts, 64)
    layer = device.layer(few)
    for rows in (1, 17) if device.small else (1, 16, 64, 600):
        batch = device.batch(rows, few)

        def other_routing(batch: Any = batch, rows: int = rows) -> None:
            fresh = device.batch(rows, few)
            for old, new in zip(batch, fresh, strict=True):
                old.copy_(new)

        yield f"experts {rows} rows", functools.partial(k.run_experts_triton, *batch, *layer), other_routing
    call = AttentionCall(1, 33 if device.small else 3001, 2)
    inputs = attention_inputs(device, call, device.normal)
    lengths = torch.tensor([call.total // 3, call.total // 2], device=device.device)
    run = attention_kernels(device).latent_attention_triton

    def longer() -> None:
        inputs[0].copy_(device.normal(*inputs[0].shape))
        lengths.add_(7)

    yield "attention", lambda: run(*inputs, None, SCALING, lengths=lengths)[0], longer


def graphs(device: Device, results: Results) -> None:
    for name, call, change in graph_cases(device):
        with results.check(f"graph of {name}"):
            captured = device.graph(call)
            for _ in range(1 if device.small else 3):
                change()
                captured.replay()
                check_equal(captured.output, call(), "the replay against a call")
            captured.replay()
            check_equal(captured.output, call(), "a second replay")
        with results.check(f"no wait in {name}") as found:
            call()
            with device.refuse_waits():
                call()
            names = device.kernels(call)
            found["kernels"] = sum(names.values())
            require(found["kernels"] > 0, "the profiler saw nothing on the device")
            copies = [kernel for kernel in names if "DtoH" in kernel or "Device -> " in kernel]
            require(not copies, f"copies to the host: {copies}")
        with results.check(f"two streams of {name}"):
            two_streams(device, call, change)


def two_streams(device: Device, call: Callable[[], Any], change: Callable[[], None]) -> None:
    """The same call on two streams at once, many times: scratch memory that they share would show."""
    change()
    want = [tensor.clone() for tensor in tensors_of(call())]
    device.synchronize()
    streams, outputs = device.streams(2), []
    for _ in range(1 if device.small else 20):
        for stream in streams:
            with device.on(stream):
                outputs.append(call())
    device.synchronize()
    for output in outputs:
        check_equal(tensors_of(output), want, "a call on a side stream")
