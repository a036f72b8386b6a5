"""One layer's routed experts: how close does each backend come to the memory and the arithmetic of the machine?

    python benchmarks/bench_experts.py                        real size: 384 experts, 7168 x 2048, top 8; 9.8 GB of weights
    python benchmarks/bench_experts.py --small                64 experts, 2048 x 1024, top 8: for a CPU
    python benchmarks/bench_experts.py --backend triton       one of those below; again for more
    python benchmarks/bench_experts.py --tune                 tries block sizes of the Triton kernels, prints the best

Random words, scales and routing. Reports the median of many runs, and two upper bounds measured in the same run on
the same device: a large copy (bytes read plus written) and a large bf16 matrix product. GB/s counts the packed weights of
the experts that the rows chose, once each; TFLOP/s counts 6 R K H I operations. Between runs of few rows a buffer larger
than any cache is overwritten. On a GPU each measurement is one replay of a CUDA graph where the backend can be captured,
else one call; the column says which.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from kimi.kimi_backends import run_experts_gathered
from kimi.kimi_experts import ExpertMatrices, run_experts

Run = Callable[..., torch.Tensor]
GATHER_BYTES = 8 * 2**30  # no other backend may copy more than this


# ---------------------------------------------------------------------------------------------------------- backends


def dense_experts(x, ids, weights, *matrices):
    """bf16 weights that were never packed: `matrices` come dequantised."""
    return run_experts(x, ids, weights, *matrices)


def unpack_then_bmm(x, ids, weights, gate, up, down):
    """Dequantise the chosen experts once each, gather by row, torch.bmm. Needs room for K dense experts a row."""
    need = ids.numel() * 3 * gate.weight.shape[1] * gate.weight.shape[2] * 8 * x.element_size()
    if need > GATHER_BYTES:
        raise Unavailable(f"would copy {need / 1e9:.0f} GB of dense experts")
    return run_experts_gathered(x, ids, weights, gate, up, down)


def unpack_then_grouped(x, ids, weights, gate, up, down):
    """Dequantise every expert, then torch's grouped matrix product over rows sorted by expert."""
    if not x.is_cuda:
        raise Unavailable("is measured on a GPU only")
    if not hasattr(torch, "_grouped_mm"):
        raise Unavailable("this torch has no grouped_mm")
    experts, inner, words = gate.weight.shape
    need = 3 * experts * inner * words * 8 * x.element_size()
    if need > torch.cuda.mem_get_info()[0] * 0.8:
        raise Unavailable(f"{need / 1e9:.0f} GB of dense experts do not fit")
    if x.dtype != torch.bfloat16:
        raise Unavailable("grouped_mm is for bf16")
    sorted_ids, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(experts, device=x.device), right=True, out_int32=True)
    rows = x[order // ids.shape[1]]

    def product(a, matrices):
        every = torch.arange(experts, device=x.device)
        return torch._grouped_mm(a, matrices.gathered(every, x.dtype).transpose(1, 2), offs=ends)

    y = product(F.silu(product(rows, gate)) * product(rows, up), down)
    scaled = y.float() * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(
        0, order // ids.shape[1], scaled
    )


# Read the routing on the host: a capture that fails leaves torch's generator for the device unusable.
WAITING = ("reference", "dense")


class Unavailable(Exception):
    """Why a backend cannot run here."""


def from_module(module: str, name: str) -> Run:
    try:
        return getattr(importlib.import_module(f"kimi.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(str(error)) from error


def triton_backend() -> Run:
    run = from_module("kimi_int4_triton", "run_experts_triton")
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    return run


def cpu_backend() -> Run:
    if torch.cuda.is_available():
        raise Unavailable("this run is on the GPU; hide it with CUDA_VISIBLE_DEVICES=")
    return from_module("kimi_backends", "run_experts_cpu")


BACKENDS: dict[str, Callable[[], Run]] = {
    "triton": triton_backend,
    "cpu": cpu_backend,
    "reference": lambda: run_experts,
    "bmm": lambda: unpack_then_bmm,
    "grouped": lambda: unpack_then_grouped,
    "dense": lambda: dense_experts,
}


# ------------------------------------------------------------------------------------------------------------ timing


class Clock:
    """Times one call at a time, on the device, with caches cold if asked."""

    def __init__(self, device: torch.device, budget_s: float):
        self.device, self.budget_s = device, budget_s
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        else:
            size = 256 * 2**20
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], object], cold: bool) -> float:
        if cold:
            self.flush.add_(1)
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s

    def median(self, call: Callable[[], object], cold: bool = True) -> tuple[float, int]:
        """Seconds, and how many runs they are the median of: as many as the budget holds, 3 to 50, after 2 unmeasured."""
        first = [self.once(call, cold) for _ in range(2)]
        repeats = max(3, min(50, int(self.budget_s / max(first[1], 1e-6))))
        return statistics.median(self.once(call, cold) for _ in range(repeats)), repeats


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a CUDA graph, or None if it asks the device in between."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def ceilings(clock: Clock) -> tuple[float, float]:
    """Bytes per second of a copy, and operations per second of a bf16 product, both measured here."""
    gpu = clock.device.type == "cuda"
    source = torch.empty((2**30 if gpu else 2**28,), dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    copy_s, _ = clock.median(lambda: target.copy_(source), cold=False)
    n = 8192 if gpu else 2048
    a, b = (torch.randn(n, n, device=clock.device).bfloat16() for _ in range(2))
    product_s, _ = clock.median(lambda: a @ b, cold=False)
    return 2 * source.numel() / copy_s, 2 * n**3 / product_s


def hardware(device: torch.device) -> str:
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    with contextlib.suppress(ImportError):
        versions += f", triton {importlib.import_module('triton').__version__}"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {card.multi_processor_count} SMs, {card.total_memory / 1e9:.0f} GB | {versions}, CUDA {torch.version.cuda}"
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads | {versions}"


# -------------------------------------------------------------------------------------------------------------- main


def random_layer(experts: int, width: int, inner: int, device: torch.device) -> list[ExpertMatrices]:
    def matrices(outputs: int, inputs: int) -> ExpertMatrices:
        words = torch.empty(experts, outputs, inputs // 8, dtype=torch.int32, device=device)
        words.view(torch.uint8).random_(0, 256)
        scales = torch.rand(experts, outputs, inputs // 32, device=device) * (0.2 / inputs**0.5)
        return ExpertMatrices(words, scales.bfloat16())

    return [matrices(inner, width), matrices(inner, width), matrices(width, inner)]


def random_batch(rows: int, experts: int, choices: int, width: int, device: torch.device):
    x = torch.randn(rows, width, device=device).bfloat16()
    ids = torch.rand(rows, experts, device=device).topk(choices, dim=-1).indices
    weights = torch.rand(rows, choices, device=device)
    return x, ids, weights * (2.827 / weights.sum(-1, keepdim=True))


def packed_bytes(layer: list[ExpertMatrices]) -> int:
    """Of one expert."""
    return sum(tensor[0].nbytes for matrix in layer for tensor in matrix if tensor is not None)


def compare(arguments: argparse.Namespace, device: torch.device) -> None:
    experts, width, inner, choices = arguments.shape
    clock = Clock(device, arguments.budget)
    copy_rate, product_rate = ceilings(clock)
    print(
        f"measured ceilings: copy {copy_rate / 1e9:.0f} GB/s, bf16 product {product_rate / 1e12:.2f} TFLOP/s",
        flush=True,
    )
    layer = random_layer(experts, width, inner, device)
    dense: list[ExpertMatrices] = []
    print(
        f"{'rows':>5} {'backend':>10} {'median us':>11} {'runs':>5} {'call':>6} {'GB/s':>7} {'of copy':>8}"
        f" {'TFLOP/s':>8} {'of bf16':>8} {'error':>8}"
    )
    for rows in arguments.tokens:
        batch = random_batch(rows, experts, choices, width, device)
        num_chosen = batch[1].unique().numel()
        work = 6 * rows * choices * width * inner
        want: torch.Tensor | None = None
        for name in arguments.backend:
            try:
                run = BACKENDS[name]()
                matrices = layer
                if name == "dense":
                    if device.type == "cuda":
                        raise Unavailable("is measured on a CPU only")
                    dense = dense or [
                        ExpertMatrices(m.gathered(torch.arange(experts), torch.bfloat16), None) for m in layer
                    ]
                    matrices = dense
                got = run(*batch, *matrices).float()  # also compiles
            except Unavailable as reason:
                print(f"{rows:5} {name:>10} unavailable: {reason}", flush=True)
                continue
            if want is None:
                want = run_experts(*batch, *layer).float()
            error = float((got - want).norm() / want.norm())
            call = lambda run=run, inputs=(*batch, *matrices): run(*inputs)  # noqa: E731
            graph = captured(call) if device.type == "cuda" and name not in WAITING else None
            seconds, repeats = clock.median(graph or call, cold=True)
            num_bytes = num_chosen * (6 * width * inner if name == "dense" else packed_bytes(layer))
            print(
                f"{rows:5} {name:>10} {seconds * 1e6:11.1f} {repeats:5} {'graph' if graph else 'eager':>6}"
                f" {num_bytes / seconds / 1e9:7.1f} {num_bytes / seconds / copy_rate:8.1%}"
                f" {work / seconds / 1e12:8.3f} {work / seconds / product_rate:8.1%} {error:8.1e}",
                flush=True,
            )
    print("error: |difference| / |value| against the plain reference in bf16, which rounds more often")


def tune(arguments: argparse.Namespace, device: torch.device) -> None:
    """Times the Triton kernels one by one over a grid of block sizes."""
    triton_backend()
    k = importlib.import_module("kimi.kimi_int4_triton")
    experts, width, inner, choices = arguments.shape
    clock, layer = Clock(device, arguments.budget / 4), random_layer(experts, width, inner, device)
    gate, up, down = layer

    def best(what: str, candidates: list, run: Callable[[Any], object]) -> None:
        results, failed = [], 0
        for blocks in candidates:
            try:
                run(blocks)
                call = captured(functools.partial(run, blocks)) or functools.partial(run, blocks)
                results.append((clock.median(call)[0], blocks))
            except Exception as error:  # too many registers, too little shared memory: the next one
                failed += 1
                if arguments.verbose:
                    print(f"    {blocks}: {error}")
        for seconds, blocks in sorted(results, key=lambda result: result[0])[:3]:
            print(f"{what:34} {seconds * 1e6:10.1f} us  {blocks}", flush=True)
        if failed:
            print(f"{what:34} {failed} of {len(candidates)} did not run (--verbose says why)")

    for rows in arguments.tokens:
        x, ids, weights = random_batch(rows, experts, choices, width, device)
        if rows <= max(k.DECODE_UP_TO, 64):
            planes, few = k.to_planes(x, torch.float32), weights.float()
            grid = [
                k.DecodeBlocks(*values)
                for values in itertools.product(
                    (1, 2, 4, 8), (32, 64, 128), (1, 2, 4), (64, 96, 128, 168, 255)
                )
                if values[1] == 32 * values[2]  # a group a lane
            ]
            best(f"{rows} rows, gate_up_decode", grid, lambda b: k.gate_up_decode(planes, ids, gate, up, b))  # noqa: B023
            hidden = k.gate_up_decode(planes, ids, gate, up)
            best(f"{rows} rows, down_decode", grid, lambda b: k.down_decode(hidden, ids, few, down, b))  # noqa: B023
        if rows > 1:
            grid = [
                k.PrefillBlocks(*values)
                for values in itertools.product((16, 32, 64, 128), (64, 128), (8, 16, 32), (4, 8), (2, 3, 4))
            ]
            paired = k.to_paired(x, x.dtype)
            tables = {most: k.sort_by_expert(ids, experts, most) for most in (16, 32, 64, 128)}
            hidden = torch.randn(rows * choices, inner, device=device).bfloat16()
            best(
                f"{rows} rows, gate_up_prefill",
                grid,
                lambda b: k.gate_up_prefill(paired, tables[b.rows], choices, gate, up, b),  # noqa: B023
            )
            best(
                f"{rows} rows, down_prefill",
                grid,
                lambda b: k.down_prefill(hidden, tables[b.rows], down, b),  # noqa: B023
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable; default: all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 512, 4096])
    parser.add_argument("--small", action="store_true", help="64 experts, 2048 x 1024")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repeats per measurement")
    parser.add_argument("--tune", action="store_true", help="search block sizes of the Triton kernels")
    parser.add_argument("--verbose", action="store_true", help="with --tune: why a candidate did not run")
    arguments = parser.parse_args()
    arguments.backend = arguments.backend or list(BACKENDS)
    arguments.shape = (64, 2048, 1024, 8) if arguments.small else (384, 7168, 2048, 8)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    experts, width, inner, choices = arguments.shape
    print("command: python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(hardware(device))
    print(
        f"{experts} experts of {width} x {inner}, top {choices}, int4 group 32, x bf16; 2 runs unmeasured,"
        f" then 3 to 50 within {arguments.budget:g} s; caches overwritten before each",
        flush=True,
    )
    with torch.no_grad():
        (tune if arguments.tune else compare)(arguments, device)


if __name__ == "__main__":
    main()
