"""Step search of the GPU check: block sizes of the kernels, most promising first, until the time is over.

A compiler takes seconds for a kernel, the card microseconds to run it. So processes of low priority compile from the first
second of the check: first what the steps experts and attention launch, then the candidates in the order of the search.
They call the same functions, but a kernel that is launched there is only compiled (triton's `warmup`), into the cache on
disk that all processes share. What a process has compiled it appends to compiled.jsonl; the search takes from there.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_device import Device, attention_kernels, experts_kernels, row_error
from gpu_kernels import (
    SCALING,
    AttentionCall,
    attention_calls,
    attention_inputs,
    experts_calls,
    make_lengths,
    make_mask,
)
from gpu_models import compile_tiny
from gpu_report import Results, Skipped, append, read, require

from kimi.kimi_experts import ExpertMatrices


class Problem(NamedTuple):
    """One kernel, or one path, at one size."""

    kind: str
    size: int  # rows, or tokens in the cache
    batch: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size}" + (f" x {self.batch}" if self.batch > 1 else "")


class Candidate(NamedTuple):
    problem: Problem
    blocks: Any  # None: what the code takes by itself

    @property
    def name(self) -> str:
        return f"{self.problem.name}: {'default' if self.blocks is None else short(self.blocks)}"


def short(blocks: Any) -> str:
    if hasattr(blocks, "_asdict"):
        return " ".join(f"{name} {value}" for name, value in blocks._asdict().items())
    return " | ".join(short(one) for one in blocks)


# ---------------------------------------------------------------------------------------------------------- candidates


def problems(device: Device) -> list[Problem]:
    if device.small:
        kinds = ("gate_up_decode", "down_decode", "prefill")
        return [*(Problem(kind, 2 if "decode" in kind else 17) for kind in kinds), Problem("attention", 33)]
    return [
        Problem("gate_up_decode", 1),
        Problem("down_decode", 1),
        Problem("attention", 16384),
        Problem("prefill", 64),
        Problem("prefill", 4096),
        Problem("prefill", 1024),
        Problem("attention", 16384, 8),
        Problem("gate_up_decode", 16),
        Problem("down_decode", 16),
        Problem("prefill", 16),
    ]


def candidates(device: Device) -> list[Candidate]:
    """The defaults of all problems, then the first candidate of each, the second of each, and so on."""
    todo = problems(device)
    each = [[Candidate(problem, blocks) for blocks in blocks_of(device, problem)] for problem in todo]
    mixed = [one for level in itertools.zip_longest(*each) for one in level if one is not None]
    found = [*(Candidate(problem, None) for problem in todo), *dict.fromkeys(mixed)]
    return found[: len(todo) + 5] if device.small else found


def blocks_of(device: Device, problem: Problem) -> list[Any]:
    """By what the compiled code of each was like: few registers and many warps first, odd shapes last."""
    if problem.kind.endswith("_decode"):
        make = experts_kernels(device).DecodeBlocks
        if device.small:
            return [make(outputs, 32, 1, 128) for outputs in (32, 16)]
        return [
            make(outputs=outputs, groups=32 * warps, warps=warps, registers=registers)
            for warps, registers, outputs in itertools.product(
                (1, 2, 4), (96, 128, 168, 64, 255), (2, 4, 1, 8)
            )
        ]
    if problem.kind == "attention":
        make = attention_kernels(device).AttentionBlocks
        return [
            make(heads=heads, keys=keys, warps=warps, stages=stages)
            for stages, warps, heads, keys in itertools.product(
                (2, 1, 3), (8, 4), (64, 32, 16), (64, 32, 128, 16)
            )
        ]
    make, pairs = (
        experts_kernels(device).PrefillBlocks,
        problem.size * device.sizes.choices / device.sizes.experts,
    )
    rows = [16, 32] if pairs < 16 else [32, 64, 16] if pairs < 40 else [128, 64, 256]
    default = experts_kernels(device).prefill_blocks(pairs, device.normal(1, 32))
    shapes = itertools.product((3, 4, 2), (16, 8, 32), (64, 128), (4, 8), rows)
    both = [make(r, outputs, words, warps, stages) for stages, words, outputs, warps, r in shapes]
    # One of the two kernels at a time beside the default of the other; both must agree in their rows.
    one = [(gate_up, default[1]._replace(rows=gate_up.rows)) for gate_up in both]
    other = [(default[0]._replace(rows=down.rows), down) for down in both]
    return [pair for pairs_of in zip(one, other, strict=True) for pair in pairs_of]


# ------------------------------------------------------------------------------------------------------------- calling


class Calls:
    """Makes calls of candidates; inputs are made once for each problem. `real` ones have values, others only shapes."""

    def __init__(self, device: Device, real: bool):
        self.device, self.real = device, real
        self.inputs: dict[Problem, Any] = {}
        self._layer: list[ExpertMatrices] | None = None

    def layer(self) -> list[ExpertMatrices]:
        if self._layer is None:
            sizes = self.device.sizes
            make = self.device.layer if self.real else self.shapes_of_a_layer
            self._layer = make(sizes.experts)
        return self._layer

    def shapes_of_a_layer(self, experts: int) -> list[ExpertMatrices]:
        """Ten gigabytes that take none: every expert is the same memory. Good for compiling, which looks at shapes."""

        def matrices(outputs: int, inputs: int) -> ExpertMatrices:
            words = torch.empty(1, outputs, inputs // 8, dtype=torch.int32, device=self.device.device)
            scales = torch.empty(1, outputs, inputs // 32, dtype=torch.bfloat16, device=self.device.device)
            return ExpertMatrices(words.expand(experts, -1, -1), scales.expand(experts, -1, -1))

        width, inner = self.device.sizes.width, self.device.sizes.inner
        return [matrices(inner, width), matrices(inner, width), matrices(width, inner)]

    def prepared(self, problem: Problem) -> Any:
        if problem not in self.inputs:
            self.inputs[problem] = self.prepare(problem)
        return self.inputs[problem]

    def prepare(self, problem: Problem) -> Any:
        device, k = self.device, experts_kernels(self.device)
        if problem.kind == "attention":
            return attention_inputs(device, AttentionCall(1, problem.size, problem.batch), device.normal)
        x, ids, weights = device.batch(problem.size, device.sizes.experts)
        if problem.kind == "prefill":
            return x, ids, weights
        require(
            hasattr(k, "to_planes"), "to_planes is gone: this search must be told how decode takes its inputs"
        )
        if problem.kind == "gate_up_decode":
            return k.to_planes(x, torch.float32), ids
        return (
            device.normal(ids.numel(), device.sizes.inner, dtype=torch.float32),
            ids,
            weights.float().contiguous(),
        )

    def of(self, candidate: Candidate) -> Callable[[], torch.Tensor]:
        problem, blocks = candidate
        inputs, k = self.prepared(problem), experts_kernels(self.device)
        if problem.kind == "attention":
            run = attention_kernels(self.device).latent_attention_triton
            return lambda: run(*inputs, None, SCALING, blocks=blocks)[0]
        if problem.kind == "prefill":
            return lambda: k.run_experts_prefill(*inputs, *self.layer(), blocks=blocks)
        gate, up, down = self.layer()
        if problem.kind == "gate_up_decode":
            return lambda: k.gate_up_decode(*inputs, gate, up, blocks)
        return lambda: k.down_decode(*inputs, down, blocks)


# ------------------------------------------------------------------------------------------------------- ahead of time


def precompile(place: int, number: int, dry: bool) -> None:
    """Every `number`-th call from `place` on: compiles its kernels, and says so."""
    device = Device(dry)
    target = Path(os.environ.get("OUT") or "gpu-check") / "compiled.jsonl"
    calls = Calls(device, real=False)
    todo: list[tuple[str, Callable[[], Any]]] = [*needed(device, calls)]
    todo += [(one.name, lambda one=one: calls.of(one)()) for one in candidates(device)]  # type: ignore[misc]
    with only_compiling(device), torch.no_grad():
        for name, call in todo[place::number]:
            start, error = time.monotonic(), ""
            try:
                call()
            except Exception as problem:  # a candidate that does not fit the card; the search leaves it out
                error = f"{type(problem).__name__}: {problem}"[:300]
            append(target, {"name": name, "error": error, "seconds": time.monotonic() - start})
            device.recover()  # the card's memory is for the steps


def needed(device: Device, calls: Calls) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The calls of the steps experts and attention, and those of kimi-tiny."""
    seen: set[Any] = set()
    for experts in experts_calls(device):
        key: Any = experts.name
        if experts.dtype == torch.bfloat16 and experts.name.startswith("decode"):
            key = "decode"
        elif experts.dtype == torch.bfloat16 and experts.name.startswith("prefill"):
            pairs = experts.rows * device.sizes.choices / device.sizes.experts
            key = experts_kernels(device).prefill_blocks(pairs, device.normal(1, 32))
        if key in seen:
            continue  # the same kernels
        seen.add(key)

        def call_experts(call: Any = experts) -> None:
            x, ids, weights = device.batch(call.rows, device.sizes.experts)
            with shapes_pass():
                call.run(x.to(call.dtype), ids, weights, *calls.layer())

        yield f"experts: {experts.name}", call_experts
    for attention in attention_calls(device):

        def call_attention(call: AttentionCall = attention) -> None:
            inputs = attention_inputs(device, call, device.normal)
            run = attention_kernels(device).latent_attention_triton
            run(*inputs, make_mask(device, call), SCALING, lengths=make_lengths(device, call))

        yield f"attention: {attention.name}", call_attention
    yield "kimi-tiny", lambda: compile_tiny(device)


@contextlib.contextmanager
def shapes_pass() -> Iterator[None]:
    """A layer of shapes is not contiguous, which the check before a launch refuses."""
    kept = torch.Tensor.is_contiguous
    torch.Tensor.is_contiguous = lambda self, *arguments, **options: True  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.is_contiguous = kept  # type: ignore[method-assign]


@contextlib.contextmanager
def only_compiling(device: Device) -> Iterator[None]:
    """A kernel that is launched inside is compiled for its arguments and not run. Interpreted ones do nothing."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return

    def warmup(self: Any, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **options: self.warmup(*arguments, grid=grid, **options)

    def nothing(self: Any, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **options: None

    kept = {kind: kind.__dict__.get("__getitem__") for kind in (JITFunction, InterpretedFunction)}
    JITFunction.__getitem__, InterpretedFunction.__getitem__ = warmup, nothing
    try:
        yield
    finally:
        for kind, method in kept.items():
            if method is None:
                del kind.__getitem__
            else:
                kind.__getitem__ = method


# --------------------------------------------------------------------------------------------------------------- search


@torch.no_grad()
def search(device: Device, results: Results) -> None:
    """Each candidate must give what the default gives; the best of each problem comes last, as a figure."""
    calls, clock = Calls(device, real=True), device.clock(0.1)
    wants: dict[Problem, torch.Tensor] = {}
    best: dict[Problem, tuple[float, str]] = {}
    defaults: dict[Problem, float] = {}
    left = candidates(device)
    counted: dict[str, Any] = {"measured_candidates": 0, "did_not_compile": 0, "not_compiled_in_time": 0}
    while left and results.left() > 4:
        before = len(left)
        one = next_compiled(left, results)
        counted["did_not_compile"] += before - len(left)
        if one is None:
            break
        left.remove(one)
        name = one.name
        with results.check(name) as found:
            call = calls.of(one)
            got = first_output(device, one, call)
            if one.blocks is None:
                wants[one.problem] = got
            error = row_error(got, wants[one.problem])
            found.update(error_of_row=error, **device.time(clock, call))
            require(error < 0.05, f"differs from the default by {error:.3g} of a row")
            counted["measured_candidates"] += 1
            defaults.setdefault(one.problem, found["us"])
            best[one.problem] = min(best.get(one.problem, (found["us"], "default")), (found["us"], name))
    counted["not_compiled_in_time"] = len(left)
    for problem, (us, name) in best.items():
        ratio = defaults[problem] / us
        results.add(
            f"best of {problem.name}",
            measured=True,
            us=us,
            default_us=defaults[problem],
            times=ratio,
            blocks=name,
        )
    results.add("candidates", True, **counted)


def first_output(device: Device, one: Candidate, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        got = call().clone()
        device.synchronize()
    except Exception as error:
        device.recover()  # ends the step if the device is lost
        if one.blocks is None:
            raise
        # More shared memory or registers than there are: as good as slow.
        raise Skipped(f"does not run: {type(error).__name__}: {str(error)[:200]}") from error
    return got


def next_compiled(left: list[Candidate], results: Results) -> Candidate | None:
    """The first candidate that is compiled; waits for one. None when the time is over or nothing more is coming.

    A default compiles here if it must. Those that cannot be compiled are taken out.
    """
    file, silent = results.path.with_name("compiled.jsonl"), 0.0
    known = -1
    while results.left() > 4:
        if left[0].blocks is None:
            return left[0]
        states = {entry["name"]: entry["error"] for entry in read(file) if "name" in entry}
        left[:] = [one for one in left if not states.get(one.name)]
        ready = next((one for one in left if one.name in states), None)
        if ready is not None or not left:
            return ready
        silent = 0.0 if len(states) != known else silent + 0.25
        known = len(states)
        if silent > 45:  # the compilers are gone, or one kernel takes them all
            return None
        time.sleep(0.25)
    return None
