"""What the steps of the GPU check ask of a device: one seam, on a card or, in a dry run, on the CPU.

    Device.graph       a call captured in a CUDA graph        dry: called again, into the same output
    Device.streams     side streams                           dry: nothing
    Device.kernels     what ran on the device, by name        dry: the operators that ran
    Device.clock       bench_experts.Clock, by CUDA events    dry: a host clock
    experts_kernels, attention_kernels                        dry: interpreted, or plain code where triton is missing

Everything else of a step is the same code in both.
"""

import contextlib
import gc
import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_experts import Clock
from gpu_report import Poisoned, require

from kimi.kimi_experts import ExpertMatrices


@dataclass(frozen=True)
class Sizes:
    """Of a layer: the published ones, or small ones for a dry run."""

    experts: int = 384
    width: int = 7168
    inner: int = 2048
    choices: int = 8
    heads: int = 64
    latent: int = 512
    rope: int = 64
    layers: int = 4  # of experts, beside a dense one

    @property
    def real(self) -> bool:
        return self.width == 7168


SMALL = Sizes(experts=6, width=64, inner=32, choices=2, heads=4, latent=32, rope=16, layers=2)


class Captured:
    """A captured call: `replay` runs it again on its inputs' present values and writes `output`."""

    def __init__(self, output: Any, replay: Callable[[], None]):
        self.output, self.replay = output, replay


class Device:
    def __init__(self, dry: bool):
        self.dry = self.small = dry  # without a card; small sizes and few repeats
        if not dry:
            require(torch.cuda.is_available(), "torch sees no CUDA device; --dry runs without one")
            torch.cuda.init()
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.sizes = SMALL if dry else Sizes()
        self.generator = torch.Generator(self.device).manual_seed(0)

    # ------------------------------------------------------------------------------------------------------- tensors

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator).to(dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self.device, generator=self.generator)

    def layer(self, experts: int) -> list[ExpertMatrices]:
        """As bench_experts.random_layer. A generator of its own: after a capture that failed, torch's refuses."""

        def matrices(outputs: int, inputs: int) -> ExpertMatrices:
            words = torch.empty(experts, outputs, inputs // 8, dtype=torch.int32, device=self.device)
            words.view(torch.uint8).random_(0, 256, generator=self.generator)
            scales = self.uniform(experts, outputs, inputs // 32)
            return ExpertMatrices(words, scales.mul_(0.2 / inputs**0.5).bfloat16())

        width, inner = self.sizes.width, self.sizes.inner
        return [matrices(inner, width), matrices(inner, width), matrices(width, inner)]

    def batch(self, rows: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (R, H), ids and weights (R, K), as bench_experts.random_batch."""
        choices = self.sizes.choices
        ids = self.uniform(rows, experts).topk(choices, dim=-1).indices
        weights = self.uniform(rows, choices)
        return self.normal(rows, self.sizes.width), ids, weights * (2.827 / weights.sum(-1, keepdim=True))

    def pinned(self, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=not self.dry)

    def memory(self) -> dict[str, float]:
        if self.dry:
            return {"peak_gb": 0.0, "dry": True}
        free, total = torch.cuda.mem_get_info()
        return {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "free_gb": free / 1e9,
            "total_gb": total / 1e9,
        }

    @contextlib.contextmanager
    def poisoned(self) -> Iterator[None]:
        """What torch.empty gives is NaN inside: outputs that a kernel leaves unwritten show. The first line makes sure."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                empty = torch.empty(1000, device=self.device, dtype=torch.bfloat16)
                require(bool(empty.isnan().all()), "this torch does not poison new tensors")
                yield
        finally:
            torch.use_deterministic_algorithms(False)

    # -------------------------------------------------------------------------------------------------------- running

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def recover(self) -> None:
        """After an error: frees what it held. Raises if the device answers no more."""
        gc.collect()
        if self.dry:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise Poisoned(f"the device is lost after this error: {str(error).splitlines()[0]}") from error

    def graph(self, call: Callable[[], Any]) -> Captured:
        if self.dry:
            output = call()

            def replay() -> None:
                for old, new in zip(tensors_of(output), tensors_of(call()), strict=True):
                    old.copy_(new)

            return Captured(output, replay)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()  # compiles, loads, and makes cuBLAS's workspace, none of which may happen in a capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
        return Captured(output, graph.replay)

    def streams(self, number: int) -> list[Any]:
        """Side streams that begin after what was launched so far."""
        if self.dry:
            return [contextlib.nullcontext() for _ in range(number)]
        streams = [torch.cuda.Stream() for _ in range(number)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        return streams

    def on(self, stream: Any) -> Any:
        return stream if self.dry else torch.cuda.stream(stream)

    @contextlib.contextmanager
    def refuse_waits(self) -> Iterator[None]:
        """torch raises inside where it would wait for the device: .item(), nonzero, a copy to the host."""
        if self.dry:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def kernels(self, call: Callable[[], Any]) -> Counter[str]:
        """How often each kernel or copy ran; on a CPU, each operator. Runtime calls (cudaLaunchKernel) are left out."""
        activity = torch.profiler.ProfilerActivity
        wanted = [activity.CPU] if self.dry else [activity.CPU, activity.CUDA]
        self.synchronize()
        with torch.profiler.profile(activities=wanted) as profile:
            call()
            self.synchronize()
        kind = torch.autograd.DeviceType.CPU if self.dry else torch.autograd.DeviceType.CUDA
        return Counter(event.name for event in profile.events() or () if event.device_type == kind)

    # --------------------------------------------------------------------------------------------------------- timing

    def clock(self, budget_s: float) -> Clock:
        if not self.dry:
            return Clock(self.device, budget_s)
        clock = Clock.__new__(Clock)  # its buffer overwrites the caches of a real run: 256 MB
        clock.device, clock.budget_s, clock.flush = self.device, 0.0, torch.zeros(16, dtype=torch.uint8)
        return clock

    def time(self, clock: Clock, call: Callable[[], Any], in_graph: bool = True) -> dict[str, Any]:
        """The median of one call, caches cold; by a graph unless it asks the device, which spoils the process for more."""
        call()  # compiles
        in_graph = in_graph and not self.dry
        seconds, runs = clock.median(self.graph(call).replay if in_graph else call)
        return {"us": seconds * 1e6, "runs": runs, "graph": in_graph}


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of a tensor or of a tuple that also holds other things."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [item for item in output if isinstance(item, torch.Tensor)]


# ------------------------------------------------------------------------------------------------------------- kernels


def interpreter_works(module: Any) -> bool:
    """Triton 3.6's interpreter needs numpy before 2.4, see tests/builders.py."""
    numpy, triton = importlib.import_module("numpy"), importlib.import_module("triton")
    old_numpy = tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)
    new_triton = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    return getattr(module, "INTERPRETED", False) and (old_numpy or new_triton)


def kernels_of(device: Device, name: str, stand_in: str) -> Any:
    """A module of kernels; in a dry run that cannot interpret them, plain code with the same entry points."""
    try:
        module = importlib.import_module(f"kimi.{name}")
    except ImportError:
        if not device.dry:
            raise
        module = None
    if device.dry and (module is None or not interpreter_works(module)):
        return getattr(importlib.import_module("gpu_stand_in"), stand_in)
    return module


def experts_kernels(device: Device) -> Any:
    kernels = kernels_of(device, "kimi_int4_triton", "EXPERTS")
    if device.dry:  # fewer programs: the interpreter takes 0.1 s for each
        kernels.DECODE = type(kernels.DECODE)(*(blocks._replace(outputs=64) for blocks in kernels.DECODE))
    return kernels


def attention_kernels(device: Device) -> Any:
    return kernels_of(device, "kimi_attention_triton", "ATTENTION")


# ------------------------------------------------------------------------------------------------------------ comparing


def row_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest |difference| / |value| of a row (..., width); inf if anything is not finite."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    if not bool(got.isfinite().all()) or not bool(want.isfinite().all()):
        return float("inf")
    size = want.norm(dim=-1)
    # A row near zero is measured against the typical row.
    floor = size.mean() * 1e-3 + 1e-300
    return float(((got - want).norm(dim=-1) / size.clamp(min=float(floor))).max())


def check_error(found: dict[str, Any], got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    found["error_of_row"], found["limit"] = error, _ = row_error(got, want), limit
    require(error <= limit, f"a row is off by {error:.3g} of its size, more than {limit:g}")  # NaN is not <=


def check_equal(got: Any, want: Any, what: str) -> None:
    """Bit for bit."""
    for one, other in zip(tensors_of(got), tensors_of(want), strict=True):
        require(
            torch.equal(one, other), f"{what}: {int((one != other).sum())} of {one.numel()} values differ"
        )
