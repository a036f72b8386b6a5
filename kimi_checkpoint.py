"""Reading and writing weights: published names on disk, stacked experts in memory.

A checkpoint is a set of safetensors shards (and an index). A shard is

    8 bytes      little-endian length L of the header
    L bytes      JSON {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ...}
    the rest     the tensors' bytes; offsets count from here

which is simple enough to read directly, and that buys three things. All headers are compared with the model before one
weight is read, so a wrong checkpoint is refused whole, with names, shapes and files. A tensor's bytes go from the file
straight into its place in the stack, in several threads: no copy, no memory beyond the model's own (and, on the way to
another device or dtype, at most two pieces of PIECE_BYTES for each thread). And transformers' two majors, which would
treat 207,360 expert tensors one by one in two different ways, share one path.

A `Slot` is the place of one published tensor: a parameter, or one expert's slice of a stacked one. Experts of a pool
(`kimi_pool.py`) have slots too, which are checked like the others and then read when they are needed.
"""

import json
import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .kimi_experts import Experts
from .kimi_files import Range, Shard, ShardWriter, file_stamp
from .kimi_pool import PooledExperts
from .kimi_slots import READERS, ExpertFiles, Part, bytes_of, empty_for_weights, landing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
IN_FLIGHT = 2 * READERS  # parts being read or waiting for a thread
PIECE_BYTES = 32 * 2**20  # of a file, read by one thread at a time
SHOWN = 3  # names listed in an error before "and N more"


@dataclass
class Slot:
    """Where one published tensor lives: `parameter` of `module`, or slice `expert` of it if that is stacked."""

    name: str
    module: nn.Module
    parameter: str
    path: str  # the parameter's own name in the model
    expert: int | None

    @property
    def target(self) -> torch.Tensor:
        if isinstance(self.module, Experts):
            return self.module.stack(self.parameter)
        tensors = (
            self.module._parameters if self.parameter in self.module._parameters else self.module._buffers
        )
        return tensors[self.parameter]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.target.shape)
        return shape if self.expert is None else shape[1:]


@dataclass
class Source:
    """One tensor of a checkpoint: bytes [begin, end) of a file, or a tensor that the caller holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""
    begin: int = 0
    end: int = 0
    tensor: torch.Tensor | None = None
    stamp: tuple[int, int] = (0, 0)  # of the file when its header was read


def model_slots(model: nn.Module) -> dict[str, Slot]:
    """Every persistent tensor of the model by its published name."""
    slots: dict[str, Slot] = {}
    for prefix, module in model.named_modules():
        dot = prefix and f"{prefix}."
        if isinstance(module, Experts):
            for parameter, names in module.published_names(dot):
                for expert, name in enumerate(names):
                    slots[name] = Slot(name, module, parameter, dot + parameter, expert)
            continue
        buffers = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
        for parameter in (*module._parameters, *buffers):
            if getattr(module, parameter) is not None:
                slots[dot + parameter] = Slot(dot + parameter, module, parameter, dot + parameter, None)
    return slots


# ---------------------------------------------------------------------------------------------------------- reading


def read_header(file: str) -> dict[str, Source]:
    """The tensors of one shard. Raises OSError if it is missing, not safetensors, or shorter than it says."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"shard {file} is missing; the index names it, download it again.")
    with path.open("rb") as handle:
        stamp = file_stamp(os.fstat(handle.fileno()))
        size = stamp[0]
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise OSError(
                f"shard {file} is damaged: its header claims {length} bytes, the file has {size}; download it again."
            )
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise OSError(
                f"shard {file} is damaged: its header is not JSON ({error}); download it again."
            ) from None
    header.pop("__metadata__", None)
    start, sources = 8 + length, {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None:
            raise ValueError(f"{name} in {file} has dtype {entry['dtype']}, which this model does not use.")
        if end - begin != prod(shape) * dtype.itemsize or begin < start:
            raise OSError(f"shard {file} is damaged: {name} of shape {shape} occupies {end - begin} bytes.")
        sources[name] = Source(dtype, shape, file, begin, end, stamp=stamp)
    promised = max((source.end for source in sources.values()), default=start)
    if promised > size:
        raise OSError(
            f"shard {file} is truncated: its header promises {promised} bytes, the file has {size}; download it again."
        )
    return sources


def read_sources(
    files: list[str] | None, state_dict: dict[str, torch.Tensor] | None, key_mapping: dict[str, str] | None
) -> dict[str, Source]:
    """All tensors of a checkpoint by name, renamed by the caller's `key_mapping` (regex to replacement) if any."""
    sources: dict[str, Source] = {}
    if state_dict is not None:
        sources = {k: Source(v.dtype, tuple(v.shape), "state_dict", tensor=v) for k, v in state_dict.items()}
    for file in (files or []) if state_dict is None else []:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file; pickled weights are not read.")
        for name, source in read_header(str(file)).items():
            if name in sources:
                raise ValueError(f"{name} is in two shards, {sources[name].file} and {file}.")
            sources[name] = source
    for pattern, replacement in (key_mapping or {}).items():
        sources = {re.sub(pattern, replacement, name): source for name, source in sources.items()}
    return sources


def check_sources(slots: dict[str, Slot], sources: dict[str, Source]) -> None:
    """Compares names, shapes and kinds of dtype, all of them, before anything is read. Raises ValueError.

    `weight_shape` may be absent or int64: it says what the shapes of the other two say.
    """
    optional = {name for name in slots if name.endswith(".weight_shape")}
    # Old exporters saved rotary tables; they are computed here.
    unknown = [name for name in sources if name not in slots and ".rotary_emb." not in name]
    missing = [name for name in slots if name not in sources and name not in optional]
    problems = _expert_count_problem(slots, sources)
    if unknown and not problems:
        problems.append(f"the checkpoint has {_names(unknown, sources)}, which the model does not know")
    if missing and not problems:
        problems.append(f"the checkpoint lacks {_names(missing)}")
    for name in sources.keys() & slots.keys():
        slot, source = slots[name], sources[name]
        if source.shape != slot.shape:
            problems.append(
                f"{name} in {source.file} has shape {source.shape}, the config makes it {slot.shape}"
            )
        elif source.dtype.is_floating_point != slot.target.dtype.is_floating_point or (
            slot.parameter.endswith("weight_packed") and source.dtype != torch.int32
        ):
            problems.append(f"{name} in {source.file} has dtype {source.dtype}, expected {slot.target.dtype}")
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise ValueError(
            "; ".join(problems[:SHOWN])
            + more
            + ". Weights and config.json do not belong together, nothing was loaded."
        )


def _expert_count_problem(slots: dict[str, Slot], sources: dict[str, Source]) -> list[str]:
    """Says in one sentence when the checkpoint has more or fewer experts than the config, instead of in thousands."""

    def count(names: Any) -> int:
        found = (re.search(r"\.experts\.(\d+)\.", name) for name in names)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    have, want = count(sources), count(slots)
    if have == want or not have:
        return []
    return [f"the checkpoint has {have} routed experts in a layer, the config says n_routed_experts {want}"]


def _names(names: list[str], sources: dict[str, Source] | None = None) -> str:
    shown = [f"{name} (in {sources[name].file})" if sources else name for name in names[:SHOWN]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown) + more


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
    sources = read_sources(files, state_dict, key_mapping)
    slots = model_slots(model)
    check_sources(slots, sources)
    if offload_folder is None and "disk" in (device_map or {}).values():
        raise ValueError('device_map sends modules to "disk"; say where by offload_folder=.')
    device_of = _device_lookup(device_map)
    pooled = [slot for slot in slots.values() if isinstance(slot.module, PooledExperts)]
    if pooled and state_dict is not None:
        raise ValueError(
            "expert_cache reads experts from safetensors files; it cannot take them from state_dict=."
        )
    resident = [slot for slot in slots.values() if not isinstance(slot.module, PooledExperts)]
    index: dict[str, Any] = {}
    filling = Filling([slot for slot in resident if slot.name in sources], sources, dtype, device_of)
    for slot, tensor, device in filling.run():
        _install(slot, tensor, device, offload_folder, index)
    _default_shapes(resident, sources, device_of)
    if pooled:
        _open_pool(pooled, sources, dtype, device_map)
    # transformers 5 initialises afresh whatever does not carry this mark.
    for module in model.modules():
        module._is_hf_initialized = True
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    return index or None


class Piece(NamedTuple):
    """Elements [first, last) of one tensor."""

    slot: Slot
    source: Source
    first: int
    last: int


class Filling:
    """Fills the parameters of `slots` from their `sources`, and yields each one when it is whole."""

    def __init__(
        self, slots: list[Slot], sources: dict[str, Source], dtype: torch.dtype | None, device_of: Callable
    ):
        self.slots, self.sources, self.dtype, self.device_of = slots, sources, dtype, device_of
        self.parameters: dict[str, torch.Tensor] = {}  # those that are not whole
        self.shards: deque[Shard] = deque()  # open files, oldest first
        self.pending: dict[str, int] = defaultdict(int)  # their elements still to come
        for slot in slots:
            self.pending[slot.path] += prod(slot.shape)

    def run(self) -> Iterator[tuple[Slot, torch.Tensor, Any]]:
        """(slot, parameter, device) for one slot of each parameter. Raises OSError that names file and tensor."""
        total = sum(prod(slot.shape) * self.sources[slot.name].dtype.itemsize for slot in self.slots)
        bar = logging.tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=None)
        threads, running = ThreadPoolExecutor(READERS, "weight-reader"), deque()
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
        """The work in the order of the files, in parts of about PIECE_BYTES, with the open file."""
        by_file: dict[str, list[Slot]] = defaultdict(list)
        for slot in self.slots:
            by_file[self.sources[slot.name].file].append(slot)
        for file, slots in by_file.items():
            if self.sources[slots[0].name].tensor is None:
                self.shards.append(_open_shard(file, self.sources[slots[0].name].stamp))
            for batch in self._cut(sorted(slots, key=lambda slot: self.sources[slot.name].begin)):
                for piece in batch:
                    self._allocate(piece.slot)
                yield batch, self.shards[-1] if self.shards else None
            while len(self.shards) > IN_FLIGHT + 1:  # no batch of older files is being read any more
                self.shards.popleft().close()

    def _cut(self, slots: list[Slot]) -> Iterator[list[Piece]]:
        batch: list[Piece] = []
        size = 0
        for slot in slots:
            source, elements, first = self.sources[slot.name], prod(slot.shape), 0
            step = PIECE_BYTES // source.dtype.itemsize
            while first < elements or not elements:
                last = min(first + step, elements)
                batch.append(Piece(slot, source, first, last))
                size += (last - first) * source.dtype.itemsize
                if size >= PIECE_BYTES:
                    yield batch
                    batch, size = [], 0
                first = last
                if not elements:
                    break
        if batch:
            yield batch

    def _allocate(self, slot: Slot) -> None:
        if slot.path not in self.parameters:
            source, device = self.sources[slot.name], self.device_of(slot.path)
            self.parameters[slot.path] = _allocate(slot, source, self.dtype, device)

    def _read(self, batch: list[Piece], shard: Shard | None) -> None:
        """Straight into the parameters; by way of memory of its own only for another dtype or device."""
        ranges, buffers = [], []
        for slot, source, first, last in batch:
            parameter = self.parameters[slot.path]
            place = parameter if slot.expert is None else parameter[slot.expert]
            place = place.reshape(-1)[first:last]
            if source.tensor is not None:
                place.copy_(source.tensor.reshape(-1)[first:last])
                continue
            buffer = landing(place, place.shape, source.dtype)
            ranges.append(Range(source.begin + first * source.dtype.itemsize, bytes_of(buffer), slot.name))
            if buffer is not place:
                buffers.append((place, buffer))
        if shard is not None:
            shard.read(ranges)
        for place, buffer in buffers:
            place.copy_(buffer)

    def _finish(self, future: Any, batch: list[Piece], bar: Any) -> Iterator[tuple[Slot, torch.Tensor, Any]]:
        future.result()
        for slot, source, first, last in batch:
            bar.update((last - first) * source.dtype.itemsize)
            self.pending[slot.path] -= last - first
            if not self.pending[slot.path] and slot.path in self.parameters:
                yield slot, self.parameters.pop(slot.path), self.device_of(slot.path)


def _open_shard(file: str, stamp: tuple[int, int]) -> Shard:
    try:
        shard = Shard(file, stamp)
        shard.check()
        return shard
    except OSError as error:
        raise OSError(f"shard {file} cannot be read: {error}.") from error


def _open_pool(
    slots: list[Slot],
    sources: dict[str, Source],
    dtype: torch.dtype | None,
    device_map: dict[str, Any] | None,
) -> None:
    """Tells the pool of the experts where their bytes are and where their layers lie."""
    parts: dict[tuple[int, int], dict[str, list[Part]]] = defaultdict(lambda: defaultdict(list))
    layers, dtypes = {}, {}
    device_of = _device_lookup(device_map)
    accelerators = [device for device in (device_map or {}).values() if device not in ("cpu", "disk")]
    for slot in slots:
        if slot.name not in sources:
            continue
        module, source = slot.module, sources[slot.name]
        if module.layer not in layers:
            device = device_of(slot.path)
            # A layer that is kept in RAM or on disk beside accelerators runs on the first of them.
            if device in ("cpu", "disk"):
                device = accelerators[0] if accelerators else "cpu"
            layers[module.layer] = module, torch.device(device)
        projection, _ = module.published[slot.parameter]
        parts[module.layer, slot.expert][projection].append(Part(slot.parameter, source, slot.name))
        kept = source.dtype if module.packed or dtype is None else dtype
        if dtypes.setdefault(slot.parameter, kept) != kept:
            raise ValueError(
                f"{slot.name} in {source.file} has dtype {kept}, others {dtypes[slot.parameter]}."
            )
    modules, devices = zip(*layers.values(), strict=True)
    modules[0].pool.open(modules, ExpertFiles(dict(parts), modules[0].shapes), devices, dtypes)


def _device_lookup(device_map: dict[str, Any] | None) -> Callable[[str], Any]:
    """The device of a parameter: that of the longest module name in the map that contains it."""
    names = sorted(device_map or {"": "cpu"}, key=len, reverse=True)

    def lookup(path: str) -> Any:
        for name in names:
            if not name or path == name or path.startswith(f"{name}."):
                return (device_map or {"": "cpu"})[name]
        raise ValueError(f"device_map has no device for {path}.")

    return lookup


def _allocate(slot: Slot, source: Source, dtype: torch.dtype | None, device: Any) -> torch.Tensor:
    """An empty tensor for the whole parameter, in the dtype it will keep."""
    stays = isinstance(slot.module, Experts) and slot.module.packed
    if slot.parameter == "e_score_correction_bias":
        dtype = torch.float32
    elif stays or dtype is None or not source.dtype.is_floating_point:
        dtype = source.dtype
    return empty_for_weights(slot.target.shape, dtype, "cpu" if device == "disk" else device)


def _install(slot: Slot, tensor: torch.Tensor, device: Any, folder: Any, index: dict[str, Any]) -> None:
    """Puts a filled tensor into the model, or into the offload folder for a module on "disk"."""
    old = slot.target
    if slot.parameter.endswith("weight_shape"):
        _check_matrix_shapes(slot, tensor)
    if device == "disk":
        from accelerate.utils import offload_weight

        os.makedirs(folder, exist_ok=True)
        offload_weight(tensor, slot.path, folder, index)
        tensor = tensor.to("meta")
    if isinstance(old, nn.Parameter):
        slot.module._parameters[slot.parameter] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        slot.module._buffers[slot.parameter] = tensor


def _check_matrix_shapes(slot: Slot, stack: torch.Tensor) -> None:
    """`weight_shape` of every expert must say what the packed words' own shape says."""
    projection, tensor = slot.module.published[slot.parameter]
    expected = list(slot.module.shapes[projection])
    for expert, found in enumerate(stack.tolist()):
        if found != expected:
            name = slot.path.removesuffix(slot.parameter) + f"{expert}.{projection}.{tensor}"
            raise ValueError(
                f"{name} of the checkpoint says {found}, but the config makes the matrix {expected}."
            )


def _default_shapes(
    slots: Iterable[Slot], sources: dict[str, Source], device_of: Callable[[str], Any]
) -> None:
    """Fills `weight_shape` where the checkpoint has none."""
    for slot in slots:
        if slot.name in sources or slot.expert:
            continue
        experts, device = slot.module, device_of(slot.path)
        projection, _ = experts.published[slot.parameter]
        rows = torch.tensor([experts.shapes[projection]], dtype=torch.int32).repeat(experts.num_experts, 1)
        rows = rows.to("cpu" if device == "disk" else device)
        experts._parameters[slot.parameter] = nn.Parameter(rows, requires_grad=False)


def loading_result(
    model: nn.Module, hook: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """Translates `PreTrainedModel._load_pretrained_model` of either major.

    Returns the arguments for `load_checkpoint`, and a function that dresses its result as the caller expects.
    """
    given = signature(hook).bind(model, *args, **kwargs).arguments
    if "load_config" in given:  # 5.x
        from transformers.utils.loading_report import LoadStateDictInfo

        config = given["load_config"]
        renamings = dict(_user_renamings(config.weight_mapping))
        request = (config.dtype, config.device_map, config.disk_offload_folder, renamings)
        unsupported = config.device_mesh
        names = tuple(signature(LoadStateDictInfo).parameters)

        def finish(index: Any) -> Any:
            empty = {name: {} if name == "conversion_errors" else set() for name in names}
            return LoadStateDictInfo(**{**empty, "error_msgs": []}), index
    else:  # 4.57
        get = given.get
        request = (get("dtype"), get("device_map"), get("disk_offload_folder"), get("key_mapping"))
        unsupported = get("device_mesh")

        def finish(index: Any) -> Any:
            return model, [], [], [], index, []

    if unsupported is not None:
        raise ValueError("tensor parallel loading (tp_plan) is not supported; use device_map.")
    fields = ("dtype", "device_map", "offload_folder", "key_mapping")
    wanted = {"files": given.get("checkpoint_files"), "state_dict": given.get("state_dict")}
    return {**wanted, **dict(zip(fields, request, strict=True))}, finish


def _user_renamings(weight_mapping: list[Any] | None) -> Iterator[tuple[str, str]]:
    """The renamings that a caller of 5.x gave as key_mapping; the library's own legacy ones concern other models."""
    for transform in weight_mapping or []:
        sources, targets = transform.source_patterns, transform.target_patterns
        if len(sources) == len(targets) == 1 and type(transform).__name__ == "WeightRenaming":
            yield sources[0], targets[0]


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
        slots = model_slots(model)
        entries = {name: (slot.target.dtype, tuple(slot.shape)) for name, slot in slots.items()}
        write_shards(folder, entries, lambda names: _stream(slots[n] for n in names), max_shard_size, variant)
    else:
        given = state_dict
        entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
        write_shards(folder, entries, lambda names: ((n, given[n]) for n in names), max_shard_size, variant)


Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name


def write_shards(
    folder: str | os.PathLike,
    entries: Entries,
    stream: Callable[[list[str]], Iterable[tuple[str, torch.Tensor]]],
    max_shard_size: int | str,
    variant: str | None = None,
) -> None:
    """Writes the tensors that `entries` announces, asking `stream` for them one after the other, and the index.

    Each file is written beside its final place and then moved there, so an interrupted save harms no older one. Shards
    of an earlier save that this one does not replace are removed at the end.
    """
    folder, stem = Path(folder), f"model.{variant}" if variant else "model"
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in entries.items()}
    shards, weight_map = split_names(sizes, parse_size(max_shard_size)), {}
    files = [f"{stem}-{i:05d}-of-{len(shards):06d}.safetensors" for i in range(1, len(shards) + 1)]
    files = [f"{stem}.safetensors"] if len(shards) == 1 else files
    for file, names in zip(logging.tqdm(files, desc="Writing shards", disable=None), shards, strict=True):
        temporary = folder / f"{file}.part"
        write_shard(temporary, {name: entries[name] for name in names}, stream)
        os.replace(temporary, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = folder / f"model.safetensors.index{f'.{variant}' if variant else ''}.json"
    if len(shards) > 1:
        text = json.dumps(
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2
        )
        index.write_text(text + "\n", encoding="utf-8")
    else:
        index.unlink(missing_ok=True)
    old = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5,6}})?\.safetensors")
    for path in folder.iterdir():
        if old.fullmatch(path.name) and path.name not in files:
            path.unlink()


def write_shard(
    path: Path,
    entries: Entries,
    stream: Callable[[list[str]], Iterable[tuple[str, torch.Tensor]]],
    watch: Callable[[memoryview], None] | None = None,
) -> None:
    """One safetensors file, a tensor at a time. Wide dtypes come first, so that all lie at multiples of their size.

    `watch` sees its bytes, piece by piece, as they are written.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = sorted(entries, key=lambda name: -entries[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = entries[name]
        if dtype not in codes:
            raise ValueError(f"{name} has dtype {dtype}, which this model does not use; it cannot be saved.")
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with ShardWriter(path, 8 + len(text) + end, watch) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in stream(names):
            if (tensor.dtype, tuple(tensor.shape)) != entries[name]:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {entries[name]}."
                )
            file.write(bytes_of(tensor.detach().cpu().contiguous()))
            del tensor  # before the next one is made


def split_names(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Fills shards in order up to `limit` bytes each; a tensor beyond the limit gets one of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", size, re.IGNORECASE)
    if not match:
        raise ValueError(f'max_shard_size {size!r} is not a size such as 5000000, "500MB" or "5GB".')
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _stream(slots: Iterable[Slot]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors; a module whose weights accelerate keeps elsewhere has them for a moment."""
    from accelerate.utils import align_module_device

    for _, run in groupby(slots, key=lambda slot: id(slot.module)):
        group = list(run)
        module = group[0].module
        with align_module_device(module, "cpu"):
            for slot in group:
                tensor = (
                    module.pool.mapped(slot.name)
                    if isinstance(module, PooledExperts)
                    else slot.target.detach()
                )
                if slot.expert is not None and not isinstance(module, PooledExperts):
                    tensor = tensor[slot.expert]
                if tensor.device.type == "meta":
                    raise ValueError(f"{slot.name} has no data (meta device), so it cannot be saved.")
                yield slot.name, tensor
