"""What a model uses: which experts its router chooses, and how many bytes it has on each device.

with model.collect_routing() as routing:
    model.generate(...)
routing.save("routing.safetensors")                       # layers (L,), counts (L, E)
model.warm_experts(Routing.load("routing.safetensors"))   # the busiest ones into the pool
print(model.memory_report())
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

if TYPE_CHECKING:  # what is mixed into
    Base = nn.Module
else:
    Base = object


class KimiUsageMixin(Base):
    """What a model says about its use."""

    expert_pool: Any

    def memory_report(self, past_key_values: Any = None) -> "MemoryReport":
        """Bytes by device: weights, experts in the pool, the given cache; the pool's hit rate and bytes read."""
        return memory_report(self, past_key_values)

    def collect_routing(self) -> AbstractContextManager["Routing"]:
        """`with model.collect_routing() as routing:` counts how often each expert of each layer is chosen."""
        return recorded_routing(self)

    def warm_experts(self, routing: "Routing") -> int:
        """Reads the experts that `routing` counted most into the pool, as many as fit; returns how many. 0 without a
        pool, where all are in memory."""
        return self.expert_pool.warm(routing.by_layer()) if self.expert_pool else 0


@dataclass
class Routing:
    """How many rows chose each expert: counts (L, E) int64 of the MoE layers `layers`, on the CPU."""

    layers: list[int]
    counts: torch.Tensor

    def by_layer(self) -> dict[int, list[int]]:
        return dict(zip(self.layers, self.counts.tolist(), strict=True))

    def __add__(self, other: "Routing") -> "Routing":
        if (self.layers, self.counts.shape) != (other.layers, other.counts.shape):
            raise ValueError(
                f"routing of layers {self.layers} with counts {tuple(self.counts.shape)} cannot be added to that of"
                f" {other.layers} with {tuple(other.counts.shape)}."
            )
        return Routing(self.layers, self.counts + other.counts)

    def save(self, path: str | os.PathLike) -> None:
        """As a safetensors file."""
        save_file({"layers": torch.tensor(self.layers, dtype=torch.int64), "counts": self.counts}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Routing":
        """Raises ValueError for a file that holds something else."""
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != {"layers", "counts"}:
                raise ValueError(f"{path} holds {sorted(names)}, not the layers and counts of a routing.")
            layers, counts = file.get_tensor("layers"), file.get_tensor("counts")
        if counts.ndim != 2 or layers.shape != counts.shape[:1]:
            raise ValueError(f"{path} has counts {tuple(counts.shape)} for {tuple(layers.shape)} layers.")
        return cls(layers.tolist(), counts)


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[Routing]:
    routers = {int(name.split(".layers.")[1].split(".")[0]): m for name, m in named_routers(model)}
    biases = [router.get_parameter("e_score_correction_bias") for router in routers.values()]
    width = max(map(len, biases), default=0)
    routing = Routing(list(routers), torch.zeros(len(routers), width, dtype=torch.int64))

    def counter(row: torch.Tensor) -> Any:
        def count(router: nn.Module, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            row.add_(output[0].flatten().bincount(minlength=width).cpu())

        return count

    hooks = [
        router.register_forward_hook(counter(row))
        for router, row in zip(routers.values(), routing.counts, strict=True)
    ]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()


def named_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # Not by hasattr, since a wrapper forwards what its module has.
    return (item for item in model.named_modules() if "e_score_correction_bias" in item[1]._parameters)


@dataclass
class DeviceMemory:
    """Bytes on one device ("offloaded": weights that accelerate keeps elsewhere)."""

    weights: int = 0
    cache: int = 0
    experts_cached: int = 0  # how many
    expert_slots: int = 0
    expert_bytes: int = 0  # of all slots, filled or not
    experts_asked: int = 0
    experts_missed: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts asked for that were there."""
        return max(0.0, 1 - self.experts_missed / self.experts_asked) if self.experts_asked else None


@dataclass
class MemoryReport:
    """`devices` by name; `bytes_read` of experts from files since loading, in `read_seconds` of all threads together."""

    devices: dict[str, DeviceMemory] = field(default_factory=dict)
    bytes_read: int = 0
    read_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        devices = {
            name: {**asdict(memory), "hit_rate": memory.hit_rate} for name, memory in self.devices.items()
        }
        return {**asdict(self), "devices": devices}

    def __str__(self) -> str:
        header = ["device", "weights", "cache", "experts cached", "of", "hit rate"]
        rows = [header]
        for name, memory in self.devices.items():
            slots = (
                [
                    f"{memory.experts_cached} of {memory.expert_slots}",
                    f"{memory.expert_bytes / 1e9:.2f} GB",
                    "-" if memory.hit_rate is None else f"{memory.hit_rate:.1%}",
                ]
                if memory.expert_slots
                else ["-", "-", "-"]
            )
            rows.append([name, f"{memory.weights / 1e9:.2f} GB", f"{memory.cache / 1e9:.2f} GB", *slots])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        if any(memory.expert_slots for memory in self.devices.values()):
            lines.append(f"experts read from files: {self.bytes_read / 1e9:.2f} GB")
        return "\n".join(lines)


def memory_report(model: Any, past_key_values: Any = None) -> MemoryReport:
    devices: dict[str, DeviceMemory] = defaultdict(DeviceMemory)
    seen: set[tuple[str, int]] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        device = "offloaded" if tensor.device.type == "meta" else str(tensor.device)
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if (device, storage.data_ptr()) in seen:
                continue
            seen.add((device, storage.data_ptr()))
        devices[device].weights += tensor.nbytes
    for layer in past_key_values.layers if past_key_values is not None else ():
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                devices[str(tensor.device)].cache += tensor.nbytes
    report = MemoryReport(devices)
    if model.expert_pool is not None:
        for cache in model.expert_pool.all_caches():
            memory = devices[str(cache.device)]
            memory.experts_cached += cache.num_cached()
            memory.expert_slots += cache.capacity
            memory.expert_bytes += cache.capacity * cache.entry_bytes
            memory.experts_asked += cache.asked
            memory.experts_missed += cache.misses
        files = model.expert_pool.files
        report.bytes_read, report.read_seconds = files.bytes_read, files.seconds
    report.devices = dict(sorted(devices.items()))
    return report
