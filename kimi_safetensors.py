"""Shards of a checkpoint: safetensors files, read and written by tensor. Knows tensors and files, no module.

A checkpoint is a set of shards, and an index if there are several. A shard is

    8 bytes      little-endian length L of the header
    L bytes      JSON {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ...}
    the rest     the tensors' bytes; offsets count from here

which is simple enough to read directly. So a header costs no mapped file, and a caller may read the bytes of a `Source`
when it wants, in parts, in several threads, and straight into memory that is already there (`kimi_files.py`).
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .kimi_files import ShardWriter, bytes_of, file_stamp
from .kimi_machine import parse_size

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


# ---------------------------------------------------------------------------------------------------------- writing

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
    shards, weight_map = split_names(sizes, parse_size(max_shard_size, "max_shard_size")), {}
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
    """One safetensors file, a tensor at a time. Wide dtypes come first, so that each begins at a multiple of its size.

    `watch` sees the file's bytes, a buffer at a time, before they are written.
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
