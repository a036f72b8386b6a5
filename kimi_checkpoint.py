"""The weights of a model, filled from a checkpoint and written to one: published names, stacked experts in memory.

All headers are compared with the model before one weight is read, so a wrong checkpoint is refused whole, with names,
shapes and files. A tensor's bytes go from the file straight into its place in the stack, in several threads: no copy, no
memory beyond the model's own (and, on the way to another device or dtype, at most two batches of BATCH_BYTES for each
thread). And transformers' two major versions, which would treat 207,360 expert tensors one by one in two different ways,
share one path.

A `PublishedTensor` says where in the model one tensor of the checkpoint belongs: a parameter, or one expert's slice of a
stacked one. Experts of a pool (`kimi_pool.py`) are checked like the others and read later, when they are needed.
"""

import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .kimi_files import Range, Shard, bytes_of, empty_for_weights, landing
from .kimi_safetensors import Source, read_sources, write_shards
from .kimi_slots import READERS, ExpertFiles, Part, check_matrix_shape

IN_FLIGHT = 2 * READERS  # batches being read or waiting for a thread
BATCH_BYTES = 32 * 2**20  # of a file, read by one thread at a time
SHOWN = 3  # names listed in an error before "and N more"


@dataclass
class PublishedTensor:
    """Where a tensor of the checkpoint belongs: `parameter` of `module`, or slice `expert` of it if that is stacked."""

    name: str
    module: Any  # an nn.Module; one with `published_names` stacks experts
    parameter: str
    path: str  # the parameter's own name in the model
    expert: int | None

    @property
    def target(self) -> torch.Tensor:
        """The whole parameter or buffer."""
        if self.expert is not None:
            return self.module.stack(self.parameter)
        own = {**self.module._buffers, **self.module._parameters}
        return own[self.parameter]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.target.shape)
        return shape if self.expert is None else shape[1:]

    def place_in(self, parameter: torch.Tensor) -> torch.Tensor:
        """This tensor as a view of the whole parameter."""
        return parameter if self.expert is None else parameter[self.expert]

    @property
    def projection(self) -> str:
        """Of an expert."""
        return self.module.published[self.parameter][0]

    @property
    def pool(self) -> Any:
        """The pool of an expert that is not resident, else None."""
        return None if self.expert is None else vars(self.module).get("pool")


def published_tensors(model: nn.Module) -> dict[str, PublishedTensor]:
    """Every persistent tensor of the model by its published name."""
    tensors: dict[str, PublishedTensor] = {}
    for prefix, module in model.named_modules():
        dot = prefix and f"{prefix}."
        if hasattr(type(module), "published_names"):  # the class: a wrapper forwards what its module has
            for parameter, names in module.published_names(dot):
                for expert, name in enumerate(names):
                    tensors[name] = PublishedTensor(name, module, parameter, dot + parameter, expert)
            continue
        buffers = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        for parameter in (*module._parameters, *buffers):
            if getattr(module, parameter) is not None:
                name = dot + parameter
                tensors[name] = PublishedTensor(name, module, parameter, name, None)
    return tensors


def check_sources(tensors: dict[str, PublishedTensor], sources: dict[str, Source]) -> None:
    """Compares names, shapes and kinds of dtype, all of them, before anything is read. Raises ValueError.

    `weight_shape` may be absent or int64: it says what the shapes of the other two say.
    """
    optional = {name for name in tensors if name.endswith(".weight_shape")}
    # Old exporters saved rotary tables; they are computed here.
    unknown = [name for name in sources if name not in tensors and ".rotary_emb." not in name]
    missing = [name for name in tensors if name not in sources and name not in optional]
    problems = _expert_count_problem(tensors, sources)
    if unknown and not problems:
        problems.append(f"the checkpoint has {_names(unknown, sources)}, which the model does not know")
    if missing and not problems:
        problems.append(f"the checkpoint lacks {_names(missing)}")
    for name in sources.keys() & tensors.keys():
        published, source = tensors[name], sources[name]
        if source.shape != published.shape:
            problems.append(
                f"{name} in {source.file} has shape {source.shape}, the config makes it {published.shape}"
            )
        elif source.dtype.is_floating_point != published.target.dtype.is_floating_point or (
            published.parameter.endswith("weight_packed") and source.dtype != torch.int32
        ):
            problems.append(
                f"{name} in {source.file} has dtype {source.dtype}, expected {published.target.dtype}"
            )
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise ValueError(
            "; ".join(problems[:SHOWN])
            + more
            + ". Weights and config.json do not belong together, nothing was loaded."
        )


def _expert_count_problem(tensors: dict[str, PublishedTensor], sources: dict[str, Source]) -> list[str]:
    """Says in one sentence when the checkpoint has more or fewer experts than the config, instead of in thousands."""

    def count(names: Any) -> int:
        found = (re.search(r"\.experts\.(\d+)\.", name) for name in names)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    have, want = count(sources), count(tensors)
    if have == want or not have:
        return []
    return [f"the checkpoint has {have} routed experts in a layer, the config says n_routed_experts {want}"]


def _names(names: list[str], sources: dict[str, Source] | None = None) -> str:
    shown = [f"{name} (in {sources[name].file})" if sources else name for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more


# ---------------------------------------------------------------------------------------------------------- filling


def load_checkpoint(
    model: nn.Module,
    files: list[str] | None,
    state_dict: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    device_map: dict[str, Any] | None = None,
    offload_folder: str | os.PathLike | None = None,
    key_mapping: dict[str, str] | None = None,
) -> dict[str, Any] | None:
    """Fills a model built on meta. Floating tensors are cast to `dtype` (None: as stored), except the router's bias,
    which stays fp32, and everything packed, which stays as stored.

    Returns accelerate's offload index if `device_map` sends modules to "disk", else None.
    """
    device_map = device_map or {"": "cpu"}
    sources = read_sources(files, state_dict, key_mapping)
    tensors = published_tensors(model)
    check_sources(tensors, sources)
    if offload_folder is None and "disk" in device_map.values():
        raise ValueError('device_map sends modules to "disk"; say where by offload_folder=.')
    device_of = _device_lookup(device_map)
    pooled = [wanted for wanted in tensors.values() if wanted.pool is not None]
    if pooled and state_dict is not None:
        raise ValueError(
            "expert_cache reads experts from safetensors files; it cannot take them from state_dict=."
        )
    resident = [wanted for wanted in tensors.values() if wanted.pool is None]
    index: dict[str, Any] = {}
    stored = [wanted for wanted in resident if wanted.name in sources]
    for wanted, parameter, device in Filling(stored, sources, dtype, device_of).run():
        _install(wanted, parameter, device, offload_folder, index)
    _default_shapes(resident, sources, device_of)
    if pooled:
        _open_pool([wanted for wanted in pooled if wanted.name in sources], sources, dtype, device_map)
    # transformers 5 initialises afresh whatever does not carry this mark.
    marked: Any
    for marked in (*model.modules(), *model.parameters()):
        marked._is_hf_initialized = True
    return index or None


class Piece(NamedTuple):
    """Elements [first, last) of one tensor."""

    wanted: PublishedTensor
    source: Source
    first: int
    last: int


class Filling:
    """Fills the parameters of `tensors` from their `sources`, and yields each one when it is whole."""

    def __init__(
        self,
        tensors: list[PublishedTensor],
        sources: dict[str, Source],
        dtype: torch.dtype | None,
        device_of: Callable,
    ):
        self.tensors, self.sources, self.dtype, self.device_of = tensors, sources, dtype, device_of
        self.parameters: dict[str, torch.Tensor] = {}  # those that are not whole
        self.shards: deque[Shard] = deque()  # open files, oldest first
        self.pending: dict[str, int] = defaultdict(int)  # their elements still to come
        for wanted in tensors:
            self.pending[wanted.path] += prod(wanted.shape)

    def run(self) -> Iterator[tuple[PublishedTensor, torch.Tensor, Any]]:
        """(wanted, parameter, device) for one tensor of each parameter. Raises OSError that names file and tensor."""
        total = sum(prod(wanted.shape) * self.sources[wanted.name].dtype.itemsize for wanted in self.tensors)
        bar = logging.tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=None)
        threads = ThreadPoolExecutor(READERS, "weight-reader")
        running: deque[tuple[Future, list[Piece]]] = deque()
        try:
            with bar:
                for batch, shard in self._batches():
                    running.append((threads.submit(self._read, batch, shard), batch))
                    if len(running) > IN_FLIGHT:
                        yield from self._finish(*running.popleft(), bar)
                while running:
                    yield from self._finish(*running.popleft(), bar)
        finally:
            threads.shutdown(cancel_futures=True)
            for shard in self.shards:
                shard.close()

    def _batches(self) -> Iterator[tuple[list[Piece], Shard | None]]:
        """The work in the order of the files, in batches of about BATCH_BYTES, with the open file."""
        by_file: dict[str, list[PublishedTensor]] = defaultdict(list)
        for wanted in self.tensors:
            by_file[self.sources[wanted.name].file].append(wanted)
        for file, tensors in by_file.items():
            if self.sources[tensors[0].name].tensor is None:
                self.shards.append(_open_shard(file, self.sources[tensors[0].name].stamp))
            for batch in self._cut(sorted(tensors, key=lambda wanted: self.sources[wanted.name].begin)):
                for piece in batch:
                    self._allocate(piece.wanted)
                yield batch, self.shards[-1] if self.shards else None
            while len(self.shards) > IN_FLIGHT + 1:  # no batch of older files is being read any more
                self.shards.popleft().close()

    def _cut(self, tensors: list[PublishedTensor]) -> Iterator[list[Piece]]:
        batch: list[Piece] = []
        size = 0
        for wanted in tensors:
            source, elements, first = self.sources[wanted.name], prod(wanted.shape), 0
            step = BATCH_BYTES // source.dtype.itemsize
            while first < elements or not elements:
                last = min(first + step, elements)
                batch.append(Piece(wanted, source, first, last))
                size += (last - first) * source.dtype.itemsize
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
                first = last
                if not elements:
                    break
        if batch:
            yield batch

    def _allocate(self, wanted: PublishedTensor) -> None:
        if wanted.path not in self.parameters:
            source, device = self.sources[wanted.name], self.device_of(wanted.path)
            self.parameters[wanted.path] = _allocate(wanted, source, self.dtype, device)

    def _read(self, batch: list[Piece], shard: Shard | None) -> None:
        """Directly into the parameters; through a buffer only for another dtype or device."""
        ranges, buffers = [], []
        for wanted, source, first, last in batch:
            place = wanted.place_in(self.parameters[wanted.path]).reshape(-1)[first:last]
            if source.tensor is not None:
                place.copy_(source.tensor.reshape(-1)[first:last])
                continue
            buffer = landing(place, place.shape, source.dtype)
            ranges.append(Range(source.begin + first * source.dtype.itemsize, bytes_of(buffer), wanted.name))
            if buffer is not place:
                buffers.append((place, buffer))
        if shard is not None:
            shard.read(ranges)
        for place, buffer in buffers:
            place.copy_(buffer)

    def _finish(
        self, future: Future, batch: list[Piece], bar: Any
    ) -> Iterator[tuple[PublishedTensor, torch.Tensor, Any]]:
        future.result()
        for wanted, source, first, last in batch:
            bar.update((last - first) * source.dtype.itemsize)
            self.pending[wanted.path] -= last - first
            if not self.pending[wanted.path] and wanted.path in self.parameters:
                yield wanted, self.parameters.pop(wanted.path), self.device_of(wanted.path)


def _open_shard(file: str, stamp: tuple[int, int]) -> Shard:
    try:
        shard = Shard(file, stamp)
        shard.check()
        return shard
    except OSError as error:
        raise OSError(f"shard {file} cannot be read: {error}.") from error


def _open_pool(
    tensors: list[PublishedTensor],
    sources: dict[str, Source],
    dtype: torch.dtype | None,
    device_map: dict[str, Any],
) -> None:
    """Tells the pool of the experts where their bytes are and on which devices their layers are."""
    parts: dict[Any, dict[str, list[Part]]] = defaultdict(lambda: defaultdict(list))
    layers: dict[int, tuple[Any, torch.device]] = {}
    dtypes: dict[str, torch.dtype] = {}
    device_of = _device_lookup(device_map)
    accelerators = [device for device in device_map.values() if device not in ("cpu", "disk")]
    for wanted in tensors:
        module, source = wanted.module, sources[wanted.name]
        if module.layer not in layers:
            device = device_of(wanted.path)
            # A layer that is kept in RAM or on disk beside accelerators runs on the first of them.
            if device in ("cpu", "disk"):
                device = accelerators[0] if accelerators else "cpu"
            layers[module.layer] = module, torch.device(device)
        part = Part(wanted.parameter, source, wanted.name)
        parts[module.layer, wanted.expert][wanted.projection].append(part)
        kept = source.dtype if module.packed or dtype is None else dtype
        if dtypes.setdefault(wanted.parameter, kept) != kept:
            raise ValueError(
                f"{wanted.name} in {source.file} has dtype {kept}, others {dtypes[wanted.parameter]}."
            )
    modules, devices = zip(*layers.values(), strict=True)
    modules[0].pool.open(modules, ExpertFiles(dict(parts), modules[0].shapes), devices, dtypes)


def _device_lookup(device_map: dict[str, Any]) -> Callable[[str], Any]:
    """The device of a parameter: that of the longest module name in the map that contains it."""
    names = sorted(device_map, key=len, reverse=True)

    def lookup(path: str) -> Any:
        for name in names:
            if not name or path == name or path.startswith(f"{name}."):
                return device_map[name]
        raise ValueError(f"device_map has no device for {path}.")

    return lookup


def _allocate(
    wanted: PublishedTensor, source: Source, dtype: torch.dtype | None, device: Any
) -> torch.Tensor:
    """An empty tensor for the whole parameter, in the dtype it will keep."""
    stays = wanted.expert is not None and wanted.module.packed
    if wanted.parameter == "e_score_correction_bias":
        dtype = torch.float32
    elif stays or dtype is None or not source.dtype.is_floating_point:
        dtype = source.dtype
    return empty_for_weights(wanted.target.shape, dtype, "cpu" if device == "disk" else device)


def _install(
    wanted: PublishedTensor, parameter: torch.Tensor, device: Any, folder: Any, index: dict[str, Any]
) -> None:
    """Puts a filled tensor into the model, or into the offload folder for a module on "disk"."""
    module, name, old = wanted.module, wanted.parameter, wanted.target
    if name.endswith("weight_shape"):
        stem, projection = wanted.path.removesuffix(name), wanted.projection
        for expert, found in enumerate(parameter.tolist()):
            check_matrix_shape(f"{stem}{expert}.{projection}.weight_shape", found, module.shapes[projection])
    if device == "disk":
        from accelerate.utils import offload_weight

        os.makedirs(folder, exist_ok=True)
        offload_weight(parameter, wanted.path, folder, index)
        parameter = parameter.to("meta")
    if isinstance(old, nn.Parameter):
        module._parameters[name] = nn.Parameter(parameter, requires_grad=old.requires_grad)
    else:
        module._buffers[name] = parameter


def _default_shapes(
    tensors: Iterable[PublishedTensor], sources: dict[str, Source], device_of: Callable[[str], Any]
) -> None:
    """Fills `weight_shape` where the checkpoint has none."""
    for wanted in tensors:
        if wanted.name in sources or wanted.expert:
            continue
        experts, device = wanted.module, device_of(wanted.path)
        shape = torch.tensor([experts.shapes[wanted.projection]], dtype=torch.int32)
        rows = shape.repeat(experts.num_experts, 1).to("cpu" if device == "disk" else device)
        experts._parameters[wanted.parameter] = nn.Parameter(rows, requires_grad=False)


# ---------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    model: nn.Module,
    folder: str | os.PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "10GB",
    variant: str | None = None,
) -> None:
    """Writes a model, or a state dict instead, under the published names and in the model's order."""
    if state_dict is None:
        tensors = published_tensors(model)
        entries = {name: (published.target.dtype, published.shape) for name, published in tensors.items()}
        stream: Callable = lambda names: _stream(tensors[name] for name in names)  # noqa: E731
    else:
        given = state_dict
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
        stream = lambda names: ((name, given[name]) for name in names)  # noqa: E731
    write_shards(folder, entries, stream, max_shard_size, variant)


def _stream(tensors: Iterable[PublishedTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors; a module whose weights accelerate keeps elsewhere has them for a moment."""
    from accelerate.utils import align_module_device

    for _, run in groupby(tensors, key=lambda published: id(published.module)):
        group = list(run)
        module = group[0].module
        with align_module_device(module, "cpu"):
            for published in group:
                if published.pool is not None:
                    tensor = published.pool.mapped(published.name)
                else:
                    tensor = published.place_in(published.target.detach())
                if tensor.device.type == "meta":
                    raise ValueError(f"{published.name} has no data (meta device), so it cannot be saved.")
                yield published.name, tensor
