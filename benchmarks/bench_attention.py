"""One layer's attention at real size: does decode read the cache, and prefill compute, as fast as the machine can?

    python benchmarks/bench_attention.py                      64 heads, latent 512, rotated 64; depths 1K to 128K, batch 1 to 16
    python benchmarks/bench_attention.py --small              16 heads, depths to 16K: for a CPU (the default there)
    python benchmarks/bench_attention.py --backend triton     one of those below; again for more
    python benchmarks/bench_attention.py --tune               tries block sizes of the Triton kernel, prints the best
    python benchmarks/bench_attention.py --crossover          new tokens from which expanding is faster than absorbing

Decode is attention on the latent cache for one new token: q_latent, q_pe, latent, k_pe in, (B, h, 1, c) out. GB/s counts
the cache, (c + dr) values a token, once. `cpu` also multiplies by kv_b_proj on both sides, in the same call. Prefill is
`MLA.expand` of a whole prompt: kv_b_proj, keys, values, causal attention; TFLOP/s counts the causal half only.

Both upper bounds, a large copy and a large bf16 product, are measured in the same run. Medians; caches are overwritten
before each run. On a GPU a measurement is one replay of a CUDA graph where the call can be captured.
"""

import argparse
import functools
import importlib
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_experts import Clock, Unavailable, captured, ceilings, from_module, hardware

from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_backends import choose_path, latent_attention_sdpa
from kimi.modeling_kimi import MLA, latent_attention, softmax_scale

LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
SCALING = softmax_scale(KimiK25Config().text_config)
EAGER_BYTES = 4 * 2**30  # of scores, at most


def eager(q_latent, q_pe, latent, k_pe):
    scores = q_latent.shape[0] * q_latent.shape[1] * latent.shape[2] * 12
    if scores + 4 * k_pe.numel() > EAGER_BYTES:
        raise Unavailable(f"would make {scores / 1e9:.0f} GB of scores")
    return latent_attention(q_latent, q_pe, latent, k_pe, None, SCALING)[0]


def sdpa(q_latent, q_pe, latent, k_pe):
    return latent_attention_sdpa(q_latent, q_pe, latent, k_pe, None, SCALING)[0]


def triton_backend() -> Callable:
    run = from_module("kimi_attention_triton", "latent_attention_triton")
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    return lambda *tensors: run(*tensors, None, SCALING)[0]


def cpu_backend() -> Callable:
    if torch.cuda.is_available():
        raise Unavailable("this run is on the GPU; hide it with CUDA_VISIBLE_DEVICES=")
    absorb = from_module("kimi_cpu", "absorb")
    reason = from_module("kimi_cpu", "why_unavailable")()
    if reason:
        raise Unavailable(reason)
    up: dict[int, torch.Tensor] = {}

    def run(q_latent, q_pe, latent, k_pe):
        heads = q_latent.shape[1]
        if heads not in up:
            up[heads] = torch.randn(heads, NOPE + VALUE, LATENT).bfloat16() * LATENT**-0.5
        # Another result: the two products more, in the same call.
        return absorb(q_latent[..., :NOPE].contiguous(), q_pe, up[heads], latent, k_pe, None, SCALING)

    return run


BACKENDS: dict[str, Callable[[], Callable]] = {
    "triton": triton_backend,
    "cpu": cpu_backend,
    "sdpa": lambda: sdpa,
    "eager": lambda: eager,
}


def decode_inputs(batch: int, heads: int, depth: int, device: torch.device) -> list[torch.Tensor]:
    """The cache is the filled part of a larger buffer, as the cache layer keeps it."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    room = depth + max(256, depth // 8)
    return [
        normal(batch, heads, 1, LATENT) * LATENT**-0.5,
        normal(batch, heads, 1, ROPE),
        normal(batch, 1, room, LATENT)[:, :, :depth],
        normal(batch, 1, room, ROPE)[:, :, :depth],
    ]


def decode(arguments: argparse.Namespace, clock: Clock, copy_rate: float) -> None:
    print(f"\ndecode, {arguments.heads} heads, one new token")
    print(
        f"{'batch':>5} {'depth':>7} {'backend':>8} {'median us':>11} {'runs':>5} {'call':>6} {'GB/s':>7} {'of copy':>8} {'error':>8}"
    )
    for batch, depth in itertools.product(arguments.batch, arguments.depth):
        inputs = decode_inputs(batch, arguments.heads, depth, clock.device)
        want = exact(inputs)
        for name in arguments.backend:
            try:
                run = BACKENDS[name]()
                got = run(*inputs)  # also compiles
            except Unavailable as reason:
                print(f"{batch:5} {depth:7} {name:>8} unavailable: {reason}", flush=True)
                continue
            error = ""
            if got.shape == want.shape:
                error = f"{float((got.float() - want).norm() / want.norm()):8.1e}"
            call = lambda run=run, inputs=inputs: run(*inputs)  # noqa: E731
            graph = captured(call) if clock.device.type == "cuda" else None
            seconds, repeats = clock.median(graph or call)
            rate = batch * depth * (LATENT + ROPE) * 2 / seconds
            print(
                f"{batch:5} {depth:7} {name:>8} {seconds * 1e6:11.1f} {repeats:5} {'graph' if graph else 'eager':>6}"
                f" {rate / 1e9:7.1f} {rate / copy_rate:8.1%} {error:>8}",
                flush=True,
            )
    print("error: |difference| / |value| against fp32")


def exact(inputs: list[torch.Tensor]) -> torch.Tensor:
    """fp32, a sequence at a time."""
    sequences = zip(*(tensor.split(1) for tensor in inputs), strict=True)
    outputs = []
    for sequence in sequences:
        q_latent, q_pe, latent, k_pe = (tensor.float() for tensor in sequence)
        outputs.append(latent_attention(q_latent, q_pe, latent, k_pe, None, SCALING)[0])
    return torch.cat(outputs)


def prefill(arguments: argparse.Namespace, clock: Clock, product_rate: float) -> None:
    config = KimiK25Config().text_config
    config.num_attention_heads = arguments.heads
    config._attn_implementation = "sdpa"
    module = MLA(config, 0).to(clock.device, torch.bfloat16).eval()
    heads, new = arguments.heads, arguments.prefill

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=clock.device, dtype=torch.bfloat16)

    inputs = (
        normal(1, heads, new, NOPE),
        normal(1, heads, new, ROPE),
        normal(1, 1, new, LATENT),
        normal(1, 1, new, ROPE),
    )
    seconds, repeats = clock.median(lambda: module.expand(*inputs, None))
    work = 2 * new * LATENT * heads * (NOPE + VALUE) + heads * new * new * (NOPE + ROPE + VALUE)
    print(
        f"\nprefill of {new} tokens, {heads} heads, MLA.expand through SDPA: {seconds * 1e3:.2f} ms (median of {repeats}),"
        f" {work / seconds / 1e12:.2f} TFLOP/s, {work / seconds / product_rate:.1%} of the measured bf16 rate",
        flush=True,
    )


def crossover(arguments: argparse.Namespace, clock: Clock) -> None:
    """Both readings of the same call, `MLA.absorb` and `MLA.expand`, with the mask that a cache brings."""
    config = KimiK25Config().text_config
    config.num_attention_heads, config._attn_implementation = arguments.heads, "sdpa"
    module = MLA(config, 0).to(clock.device, torch.bfloat16).eval()
    print(f"\nabsorb or expand, {arguments.heads} heads, batch 1; * is what choose_path takes")
    print(f"{'cached':>7} {'new':>5} {'absorb ms':>11} {'expand ms':>11} {'absorb/expand':>14}")
    for cached, new in itertools.product(arguments.depth, (1, 2, 4, 8, 16, 32, 64, 128, 256)):
        total = cached + new

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=clock.device, dtype=torch.bfloat16)

        inputs = [normal(1, arguments.heads, new, dim) for dim in (NOPE, ROPE)]
        inputs += [normal(1, 1, total, dim) for dim in (LATENT, ROPE)]
        mask = torch.ones(1, 1, new, total, dtype=torch.bool, device=clock.device).tril(cached)
        seconds = {}
        for path in ("absorb", "expand"):
            call = functools.partial(getattr(module, path), *inputs, mask)
            call()
            seconds[path], _ = clock.median(call)
        chosen = choose_path("auto", new, total, clock.device.type)
        shown = [f"{seconds[path] * 1e3:10.2f}{'*' if path == chosen else ' '}" for path in seconds]
        print(
            f"{cached:7} {new:5} {' '.join(shown)} {seconds['absorb'] / seconds['expand']:14.2f}", flush=True
        )


def tune(arguments: argparse.Namespace, clock: Clock) -> None:
    triton_backend()
    k = importlib.import_module("kimi.kimi_attention_triton")
    grid = [
        k.AttentionBlocks(*values)
        for values in itertools.product((16, 32, 64), (16, 32, 64), (4, 8), (1, 2, 3))
    ]
    for batch, depth in itertools.product(arguments.batch, arguments.depth):
        inputs = decode_inputs(batch, arguments.heads, depth, clock.device)
        results, failed = [], 0
        for blocks in grid:
            call = lambda b=blocks, t=inputs: k.latent_attention_triton(*t, None, SCALING, blocks=b)  # noqa: E731
            try:
                call()
                results.append((clock.median(captured(call) or call)[0], blocks))
            except Exception as error:  # too many registers, too little shared memory: the next one
                failed += 1
                if arguments.verbose:
                    print(f"    {blocks}: {error}")
        for seconds, blocks in sorted(results, key=lambda result: result[0])[:3]:
            print(f"batch {batch:2} depth {depth:6} {seconds * 1e6:10.1f} us  {blocks}", flush=True)
        if failed:
            print(f"{failed} of {len(grid)} did not run (--verbose says why)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="repeatable; default: all")
    parser.add_argument("--depth", type=int, nargs="+")
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--prefill", type=int, help="tokens of the prompt; 0 for none")
    parser.add_argument("--small", action="store_true", help="16 heads, depths to 16K, batch 1 and 4")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of repeats per measurement")
    parser.add_argument("--crossover", action="store_true", help="absorb against expand, by new tokens")
    parser.add_argument("--tune", action="store_true", help="search block sizes of the Triton kernel")
    parser.add_argument("--verbose", action="store_true", help="with --tune: why a candidate did not run")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = arguments.small or device.type == "cpu"
    defaults = {
        "backend": list(BACKENDS),
        "depth": [1024, 4096, 16384] if small else [2**n for n in range(10, 18)],
        "batch": [1, 4] if small else [1, 2, 4, 8, 16],
        "heads": 16 if small else 64,
        "prefill": 1024 if small else 4096,
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            if name == "depth" and arguments.crossover:
                value = [512, 2048, 8192]
            setattr(arguments, name, value)
    torch.manual_seed(0)
    print("command: python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]))
    print(hardware(device))
    clock = Clock(device, arguments.budget)
    with torch.no_grad():
        copy_rate, product_rate = ceilings(clock)
        print(
            f"measured ceilings: copy {copy_rate / 1e9:.0f} GB/s, bf16 product {product_rate / 1e12:.2f} TFLOP/s; 2 runs"
            f" unmeasured, then 3 to 50 within {arguments.budget:g} s"
        )
        if arguments.tune or arguments.crossover:
            (tune if arguments.tune else crossover)(arguments, clock)
            return
        decode(arguments, clock, copy_rate)
        if arguments.prefill:
            prefill(arguments, clock, product_rate)


if __name__ == "__main__":
    main()
