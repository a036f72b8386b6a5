"""Experts that do not fit memory: they stay in the published safetensors files, and a pool holds those used most.

    from_pretrained(..., expert_cache="auto" | bytes)

An expert is 3 matrices, 24.8 MB at full size, and a token takes 8 of 384 in each layer. So memory is managed by the
expert, not by the layer: `kimi_slots.py` has the slots, this file the module that computes with them, `kimi_sizes.py`
the sums that say how many there can be. Attention, shared experts, routers and embeddings are ordinary parameters.

Results are those of resident experts, bit for bit, on the CPU backends and the reference: the same function multiplies
the same words, and sums run in the order of expert ids, whichever slot an expert is in.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .configuration_kimi import KimiK25Config, KimiK25TextConfig
from .kimi_backends import EXPERT_ROWS, faster_experts, is_recorded, runs_by_expert
from .kimi_experts import ExpertMatrices, Experts, run_experts
from .kimi_files import file_stamp
from .kimi_machine import detect_gpus, detect_ram, parse_size
from .kimi_sizes import all_fit, expert_bytes, free_bytes, resident_bytes
from .kimi_slots import READERS, ExpertFiles, Part, ReadsExperts, SlotCache, Visit, Worth

HALF_LIFE = 256.0  # tokens; see docs/history.md


class PooledMatrices(ExpertMatrices):
    """One projection of all experts of a layer, of which only some are in the slots: (S, N, M/8) and (S, N, M/32)."""

    visit: Visit

    @property
    def num_experts(self) -> int:
        return self.visit.num_experts

    def place(self, expert: int) -> int:
        return self.visit.slot(expert)

    def batches(self, experts: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        for part, group in self.visit.row_groups(experts.unsqueeze(-1)):
            yield part, self.visit.hold(group)[experts[part]]


# ----------------------------------------------------------------------------------------------------------- experts


class PooledExperts(Experts):
    """The routed experts of one layer without parameters of their own: `pool` has those that are in memory."""

    def __init__(self, config: KimiK25TextConfig, layer: int, pool: "ExpertPool"):
        with torch.device("meta"):
            super().__init__(config)
        self.layer, self.pool = layer, pool
        self.templates = {
            name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)
        }
        self._parameters.clear()

    def stack(self, parameter: str) -> torch.Tensor:
        return self.templates[parameter]

    @torch.compiler.disable
    @torch.no_grad()
    def prefetch(self, topk_ids: torch.Tensor) -> None:
        choices = self.pool.read_choices(topk_ids)
        if self.pool.lock.acquire(blocking=False):  # or else another thread is using the slots
            try:
                self.pool.visit(self, choices).read_ahead()
            finally:
                self.pool.lock.release()

    @torch.compiler.disable
    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """As Experts.forward. Gradients are refused when they are asked for: what they need is no longer there."""
        cache, recorded = self.pool.cache_of(self.layer), is_recorded(x, topk_weights)
        choices = self.pool.take_choices(topk_ids)
        with self.pool.lock:
            visit = self.pool.visit(self, choices, counts=True)
            inputs = [tensor.to(cache.device) for tensor in (x, topk_ids, topk_weights)]
            matrices = self.matrices_in(visit)
            backend = faster_experts(self.config.int4_backend, inputs[0], inputs[2], matrices, run_experts)
            try:
                with torch.no_grad():
                    output = run_pooled(backend, visit, self, choices.ids, *inputs).to(x.device)
            finally:
                cache.note_use()
        return NoGradient.apply(output, x, topk_weights) if recorded else output

    def matrices_in(self, visit: Visit, lazy: bool = False) -> Sequence[ExpertMatrices]:
        """The slots, by projection, to be indexed by slot; or, lazily, by expert, which waits until it is there."""
        weight, stacks = "weight_packed" if self.packed else "weight", visit.cache.stacks
        pairs = [(stacks[f"{name}_{weight}"], stacks.get(f"{name}_weight_scale")) for name in self.shapes]
        if not lazy:
            return [ExpertMatrices(*pair) for pair in pairs]
        matrices = [PooledMatrices(*pair) for pair in pairs]
        for matrix in matrices:
            matrix.visit = visit
        return matrices

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in the pool"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The published files' own bytes, memory-mapped: they take memory as they are looked at."""
        if not self.stacked_names:
            for _, names in self.published_names(prefix):
                destination.update((name, self.pool.mapped(name)) for name in names)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            raise ValueError(
                f"{prefix}* cannot be replaced: with expert_cache the routed experts are read from the files of the"
                " checkpoint; load the model without it."
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        return nn.Module._apply(self, fn, recurse)  # slots stay on the pool's device; rows are moved to them


class NoGradient(torch.autograd.Function):
    """The output of pooled experts in a graph."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("experts of a pool compute no gradients; load the model without expert_cache.")


def run_pooled(
    backend: Callable | None,
    visit: Visit,
    experts: PooledExperts,
    ids_in_ram: torch.Tensor,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    """What `Experts.forward` does, with the same backend (None: the plain code). Few rows run in groups whose experts fit
    the slots together; many rows by expert, in ascending order as with resident ones, each when it is in its slot.

    `ids_in_ram` (R, K) are `topk_ids`, which may be on a GPU: looking at those would wait for it.
    """
    run = backend or run_experts
    if runs_by_expert(backend, len(x)):
        return run(x, topk_ids, topk_weights, *experts.matrices_in(visit, lazy=True))
    plain = experts.matrices_in(visit)
    if len(visit.experts) <= visit.cache.capacity:
        return run(x, visit.hold(visit.experts)[topk_ids], topk_weights, *plain)
    if len(x) <= EXPERT_ROWS:
        outputs = [
            run(x[rows], visit.hold(group)[topk_ids[rows]], topk_weights[rows], *plain)
            for rows, group in visit.row_groups(ids_in_ram)
        ]
        return torch.cat(outputs)
    # A kernel that takes all experts at once, and more experts than slots: pairs by expert, a group at a time.
    order = topk_ids.flatten().argsort(stable=True)
    ids, rows = topk_ids.flatten()[order], order // topk_ids.shape[-1]
    weights = topk_weights.flatten()[order].unsqueeze(-1)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for part, group in visit.row_groups(ids_in_ram.flatten().sort().values.unsqueeze(-1)):
        slots = visit.hold(group)[ids[part]]
        output.index_add_(0, rows[part], run(x[rows[part]], slots.unsqueeze(-1), weights[part], *plain))
    return output


# -------------------------------------------------------------------------------------------------------------- pool


def parse_expert_cache(value: Any) -> int | str:
    """Bytes of `expert_cache`, given as a number, "6GB" or "20GiB"; or "auto"."""
    if value == "auto":
        return "auto"
    if isinstance(value, str):
        return parse_size(value, "expert_cache")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'expert_cache is {value!r}; it takes "auto", a number of bytes, or None.')
    return value


@dataclass(frozen=True)
class CacheRequest:
    """What `from_pretrained` was asked for."""

    size: int | str
    device_map: Any = None

    def uses_gpus(self) -> bool:
        return torch.cuda.is_available() and self.device_map not in (None, "cpu", {"": "cpu"})

    def may_offload(self) -> bool:
        """Whether weights other than experts may stay on disk."""
        if isinstance(self.device_map, dict):
            return "disk" in self.device_map.values()
        return self.device_map in ("auto", "balanced", "balanced_low_0", "sequential")

    def memory(self) -> int:
        """Bytes that are free now on the devices that may be used; 0 if the system hides it."""
        gpus = sum(gpu.total_bytes for gpu in detect_gpus()) if self.uses_gpus() else 0
        return gpus + detect_ram()


class Choices(NamedTuple):
    """What the router chose for R rows, read to RAM: the one time that a layer waits for its device."""

    topk_ids: torch.Tensor  # (R, K), as they were given
    version: int | None  # of these when they were read; None if torch counts none
    ids: torch.Tensor  # (R, K) the same in RAM
    experts: list[int]  # ascending, each once

    @classmethod
    def read(cls, topk_ids: torch.Tensor) -> "Choices":
        ids = topk_ids.to("cpu")
        return cls(topk_ids, version_of(topk_ids), ids, ids.unique().tolist())


def version_of(tensor: torch.Tensor) -> int | None:
    """Grows when the tensor is written in place."""
    return None if tensor.is_inference() else tensor._version


class LastChoices(threading.local):
    """Those that a thread has read ahead for the experts it computes next."""

    choices: Choices | None = None


class ExpertPool:
    """The caches of a model's pooled layers, one for each device that holds some, and the files they are read from.

    Made with the model, before any weight is read; `open` gives it files and memory. Raises ValueError for a size that
    is negative, too small for one layer's choices, or more than there is.
    """

    def __init__(self, config: KimiK25Config, request: CacheRequest):
        self.config, self.request = config, request
        self.caches: dict[torch.device, SlotCache] = {}
        self.device_of: dict[int, torch.device] = {}
        self.files: ExpertFiles | None = None
        self.names: dict[str, Part] = {}
        self.maps: dict[str, torch.UntypedStorage] = {}
        self.lock = threading.RLock()  # held while slots are in use
        self.last = LastChoices()
        if isinstance(request.size, int):
            self._check_size(request.size)

    def _check_size(self, size: int) -> None:
        text = self.config.text_config
        one, choices = expert_bytes(text, torch.get_default_dtype().itemsize), text.num_experts_per_tok
        if size < 0:
            raise ValueError(
                f"expert_cache is {size:,} bytes; it must be at least {one * choices:,}, the experts of one token."
            )
        if size < one * choices:
            raise ValueError(
                f"expert_cache of {size:,} bytes holds {size // one} experts of {one:,} bytes; one token takes {choices}"
                f" in each layer: give at least {one * choices:,} bytes."
            )
        memory = self.request.memory()
        resident = 0 if self.request.may_offload() else resident_bytes(self.config)
        if memory and size + resident > memory:
            raise ValueError(
                f"expert_cache of {size:,} bytes and {resident:,} bytes of other weights exceed the {memory:,} bytes of"
                " memory that are free."
            )

    def open(
        self,
        layers: Sequence[PooledExperts],
        files: ExpertFiles,
        devices: Sequence[torch.device],
        dtypes: dict[str, torch.dtype],
    ) -> None:
        """Makes the slots: `layers` are on `devices`; `dtypes` are the parameters' in memory."""
        self.files = files
        self.names = {p.name: p for ps in files.parts.values() for parts in ps.values() for p in parts}
        first = layers[0]
        layout = {
            name: (tuple(template.shape[1:]), dtypes[name])
            for name, template in first.templates.items()
            if not name.endswith("weight_shape")
        }
        one = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        self.device_of = {module.layer: device for module, device in zip(layers, devices, strict=True)}
        for device in dict.fromkeys(devices):
            mine = [layer for layer, other in self.device_of.items() if other == device]
            size = self._bytes_on(device, len(mine) / len(layers))
            least, most = first.config.num_experts_per_tok, len(mine) * first.num_experts
            if size // one < least:
                raise ValueError(
                    f"{size:,} bytes for experts on {device} hold {max(size, 0) // one} of {one:,} bytes; one token takes"
                    f" {least} in each layer: {least * one:,} bytes are needed there."
                )
            capacity, worth = min(size // one, most), Worth(HALF_LIFE, len(mine))
            source: ReadsExperts = files
            if device.type != "cpu":
                source = self._ram_tier(device, files, layout, one, len(mine), most) or files
            self.caches[device] = SlotCache(source, capacity, layout, worth, device)

    def _bytes_on(self, device: torch.device, share: float) -> int:
        if isinstance(self.request.size, int):
            return int(self.request.size * share)
        return free_bytes(device, self.config)

    def _ram_tier(
        self, device: torch.device, files: ExpertFiles, layout: dict, one: int, num_layers: int, most: int
    ) -> SlotCache | None:
        """A second tier of slots in RAM for those of an accelerator, in an even share of what is free."""
        devices = len(set(self.device_of.values()))
        capacity = min(max(free_bytes(torch.device("cpu"), self.config), 0) // devices // one, most)
        if capacity <= READERS:
            return None
        copied_to = device if device.type == "cuda" else None
        return SlotCache(files, capacity, layout, Worth(HALF_LIFE, num_layers), copied_to=copied_to)

    def cache_of(self, layer: int) -> SlotCache:
        if layer not in self.device_of:
            raise RuntimeError(
                "this model has no experts: expert_cache reads them from a checkpoint; use from_pretrained."
            )
        return self.caches[self.device_of[layer]]

    def all_caches(self) -> Iterator[SlotCache]:
        """Those that layers compute with, and their second tiers."""
        for cache in self.caches.values():
            yield cache
            if isinstance(cache.source, SlotCache):
                yield cache.source

    def read_choices(self, topk_ids: torch.Tensor) -> Choices:
        """Reads what a router chose, (R, K), and keeps it for `take_choices` by the same thread."""
        self.last.choices = Choices.read(topk_ids)
        return self.last.choices

    def take_choices(self, topk_ids: torch.Tensor) -> Choices:
        """What `read_choices` has read if it was given this tensor, unchanged since; else it is read now. (Changes of inference
        tensors are not seen, which torch does not count.)"""
        choices, self.last.choices = self.last.choices, None
        if choices is not None and choices.topk_ids is topk_ids and choices.version == version_of(topk_ids):
            return choices
        return Choices.read(topk_ids)

    def visit(self, experts: PooledExperts, choices: Choices, counts: bool = False) -> Visit:
        cache, layer = self.cache_of(experts.layer), experts.layer
        if counts:
            cache.asked += len(choices.experts)
            cache.worth.use((layer, expert) for expert in choices.experts)
        return Visit(cache, layer, choices.experts, experts.num_experts)

    def mapped(self, name: str) -> torch.Tensor:
        """One published tensor as a view of its file. Raises OSError if another file has that name now, or other bytes."""
        source = self.names[name].source
        if source.file not in self.maps:
            now = file_stamp(os.stat(source.file))
            if now != source.stamp:
                raise OSError(
                    f"{name} cannot be taken from {source.file}: it is not the file that the model was loaded from"
                    f" ({source.stamp[0]} bytes then, {now[0]} now)."
                )
            size = os.path.getsize(source.file)
            self.maps[source.file] = cast(
                torch.UntypedStorage, torch.UntypedStorage.from_file(source.file, False, size)
            )
        data = torch.empty(0, dtype=torch.uint8).set_(
            self.maps[source.file], source.begin, (source.end - source.begin,), (1,)
        )
        if source.begin % source.dtype.itemsize:
            data = data.clone()
        return data.view(source.dtype).view(source.shape)

    def warm(self, counts: Mapping[int, Sequence[int]]) -> int:
        """Reads the experts that were used most, as many as there are slots; returns how many. Layer -> uses by expert."""
        with self.lock:  # experts that a pass of another thread has asked for would go otherwise
            return sum(self._warm(device, cache, counts) for device, cache in self.caches.items())

    def _warm(self, device: torch.device, cache: SlotCache, counts: Mapping[int, Sequence[int]]) -> int:
        uses = {
            (layer, expert): number / max(sum(counts[layer]) / self.config.text_config.num_experts_per_tok, 1)
            for layer, other in self.device_of.items()
            if other == device and layer in counts
            for expert, number in enumerate(counts[layer])
            if number
        }
        best = sorted(uses, key=lambda key: -uses[key])[: cache.capacity]
        for key, share in uses.items():
            cache.worth.expect(key, share)
        entries = [(key, cache.claim(key, best)) for key in best]
        for key, entry in entries:
            cache.await_entry(key, entry)
        return len(entries)

    def __deepcopy__(self, memo: dict) -> "ExpertPool":
        return self


# A keyword of from_pretrained that is handed on would end up in generation_config.json.
REQUEST: ContextVar[CacheRequest | None] = ContextVar("expert_cache", default=None)


@contextmanager
def requested(expert_cache: Any, device_map: Any) -> Iterator[None]:
    """Models made inside get a pool as `expert_cache` says. Raises ValueError if it says nothing that makes sense."""
    request = None if expert_cache is None else CacheRequest(parse_expert_cache(expert_cache), device_map)
    token = REQUEST.set(request)
    try:
        yield
    finally:
        REQUEST.reset(token)


def pool_experts(model: nn.Module, config: KimiK25Config) -> ExpertPool | None:
    """Puts pooled experts in the place of resident ones if they are requested, before any weight is read; None if not
    or if all fit anyway."""
    request = REQUEST.get()
    if request is None or (request.size == "auto" and all_fit(config, request.uses_gpus())):
        return None
    pool = ExpertPool(config, request)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), Experts):
            layer = int(name.split(".layers.")[1].split(".")[0])
            module.experts = PooledExperts(config.text_config, layer, pool)
    return pool
