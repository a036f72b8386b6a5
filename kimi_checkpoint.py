"""Reading and writing weights: published names on disk, stacked experts in memory.

A checkpoint is a set of safetensors shards (and an index). A shard is

    8 bytes      little-endian length L of the header
    L bytes      JSON {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ...}
    the rest     the tensors' bytes; offsets count from here

which is simple enough to read directly, and that buys three things. All headers are compared with the model before one
weight is read, so a wrong checkpoint is refused whole, with names, shapes and files. A tensor's bytes go from the file
straight into its place in the stack: no copy, no memory beyond the model's own. And transformers' two majors, which
would treat 207,360 expert tensors one by one in two different ways, share one path.

A `Slot` is the place of one published tensor: a parameter, or one expert's slice of a stacked one.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from .kimi_moe import Experts

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
    size = path.stat().st_size
    with path.open("rb") as handle:
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
        sources[name] = Source(dtype, shape, file, begin, end)
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
    by_file: dict[str, list[Slot]] = defaultdict(list)
    pending: dict[str, int] = defaultdict(int)  # slices of a parameter still to come
    for slot in slots.values():
        if slot.name in sources:
            by_file[sources[slot.name].file].append(slot)
            pending[slot.path] += 1

    index: dict[str, Any] = {}
    parameters: dict[str, torch.Tensor] = {}
    total = sum(prod(source.shape) * source.dtype.itemsize for source in sources.values())
    with logging.tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=None
    ) as bar:
        for file, wanted in by_file.items():
            with open(file, "rb", buffering=0) if state_dict is None else nullcontext() as handle:
                for slot in sorted(wanted, key=lambda slot: sources[slot.name].begin):
                    source, device = sources[slot.name], device_of(slot.path)
                    if slot.path not in parameters:
                        parameters[slot.path] = _allocate(slot, source, dtype, device)
                    _read_into(parameters[slot.path], slot, source, handle)
                    bar.update(prod(source.shape) * source.dtype.itemsize)
                    pending[slot.path] -= 1
                    if not pending[slot.path]:
                        _install(slot, parameters.pop(slot.path), device, offload_folder, index)
    _default_shapes(slots, sources, device_of)
    # transformers 5 initialises afresh whatever does not carry this mark.
    for module in model.modules():
        module._is_hf_initialized = True
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    return index or None


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
    return torch.empty(slot.target.shape, dtype=dtype, device="cpu" if device == "disk" else device)


def _read_into(parameter: torch.Tensor, slot: Slot, source: Source, handle: Any) -> None:
    """Copies one tensor to its place, by way of memory of its own only for another dtype or device."""
    place = parameter if slot.expert is None else parameter[slot.expert]
    if source.tensor is not None:
        place.copy_(source.tensor)
        return
    direct = place.device.type == "cpu" and place.dtype == source.dtype
    buffer = place if direct else torch.empty(source.shape, dtype=source.dtype)
    view = memoryview(buffer.view(-1).view(torch.uint8).numpy())
    handle.seek(source.begin)
    done = 0
    while done < len(view):  # one read call gives 2 GiB at most
        count = handle.readinto(view[done:])
        if not count:
            raise OSError(f"{slot.name} in {source.file} ends after {done} of {len(view)} bytes.")
        done += count
    if not direct:
        place.copy_(buffer)


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
    slots: dict[str, Slot], sources: dict[str, Source], device_of: Callable[[str], Any]
) -> None:
    """Fills `weight_shape` where the checkpoint has none."""
    for slot in slots.values():
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
        sizes = {name: prod(slot.shape) * slot.target.dtype.itemsize for name, slot in slots.items()}
        write_shards(
            folder, sizes, lambda names: _collect([slots[name] for name in names]), max_shard_size, variant
        )
    else:
        sizes = {name: tensor.numel() * tensor.dtype.itemsize for name, tensor in state_dict.items()}
        write_shards(
            folder,
            sizes,
            lambda names: {n: state_dict[n].contiguous() for n in names},
            max_shard_size,
            variant,
        )


def write_shards(
    folder: str | os.PathLike,
    sizes: dict[str, int],
    tensors_of: Callable[[list[str]], dict[str, torch.Tensor]],
    max_shard_size: int | str,
    variant: str | None = None,
) -> None:
    """Writes the tensors named in `sizes` (bytes each), asking for those of one shard at a time, and the index.

    Each file is written beside its final place and then moved there, so an interrupted save harms no older one. Shards
    of an earlier save that this one does not replace are removed at the end.
    """
    folder, stem = Path(folder), f"model.{variant}" if variant else "model"
    shards, weight_map = split_names(sizes, parse_size(max_shard_size)), {}
    files = [f"{stem}-{i:05d}-of-{len(shards):06d}.safetensors" for i in range(1, len(shards) + 1)]
    files = [f"{stem}.safetensors"] if len(shards) == 1 else files
    for file, names in zip(logging.tqdm(files, desc="Writing shards", disable=None), shards, strict=True):
        temporary = folder / f"{file}.part"
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # what the umask allows; safetensors makes files private to their owner
        save_file(tensors_of(names), temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        os.replace(temporary, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = folder / f"model.safetensors.index{f'.{variant}' if variant else ''}.json"
    if len(shards) > 1:
        text = json.dumps(
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2
        )
        index.write_text(text + "\n")
    else:
        index.unlink(missing_ok=True)
    old = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5,6}})?\.safetensors")
    for path in folder.iterdir():
        if old.fullmatch(path.name) and path.name not in files:
            path.unlink()


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


def _collect(slots: list[Slot]) -> dict[str, torch.Tensor]:
    """The tensors of one shard; a module whose weights accelerate keeps elsewhere has them for a moment."""
    from accelerate.utils import align_module_device

    by_module: dict[nn.Module, list[Slot]] = defaultdict(list)
    for slot in slots:
        by_module[slot.module].append(slot)
    tensors = {}
    for module, group in by_module.items():
        with align_module_device(module, "cpu"):
            for slot in group:
                tensor = slot.target.detach() if slot.expert is None else slot.target.detach()[slot.expert]
                if tensor.device.type == "meta":
                    raise ValueError(f"{slot.name} has no data (meta device), so it cannot be saved.")
                tensors[slot.name] = tensor.contiguous()
    return tensors
