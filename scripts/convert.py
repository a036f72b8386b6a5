"""Converts a checkpoint in the published layout into another one, shard by shard.

    python -m scripts.convert bf16   SRC DST               int4 experts to bfloat16 matrices, under the published names
    python -m scripts.convert int4   SRC DST               bfloat16 experts to int4 (absmax / 7, groups of 32)
    python -m scripts.convert subset SRC DST --layers 4 --experts 16    the first of each: a small model to debug with
    python -m scripts.convert mlx    SRC DST               the config that MLX wants; weights are linked, not copied
    python -m scripts.convert gguf   SRC IN.gguf OUT.gguf  the experts of a GGUF file as Q4_0, with the same values

A tensor is in memory while it is converted and no longer. Each shard is read back behind its writer and compared with what
was written; its SHA-256 goes into SHA256SUMS (`sha256sum -c SHA256SUMS` checks a copy). The same command resumes an
interrupted run. DST gets all other files of SRC.

int4 -> bf16 -> int4 gives the same bits: the scale of a group is found again from its values. Groups whose values no
int4 group has are rounded, and counted.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kimi.kimi_files import File, Range, Shard, bytes_of
from kimi.kimi_int4 import GROUP_SIZE, dequantize_int4, pack_int4, quantize_int4
from kimi.kimi_machine import parse_size
from kimi.kimi_safetensors import Entries, Source, read_sources, split_names, write_shard

ROOT = Path(__file__).resolve().parents[1]
EXPERT = re.compile(
    r"(?P<layer>.*\.layers\.(?P<index>\d+)\.mlp\.experts\.)(?P<expert>\d+)(?P<matrix>\.(?:gate|up|down)_proj\.)"
)
LAYER = re.compile(r"\.layers\.(\d+)\.")
ROUTER = re.compile(r"\.mlp\.gate\.(weight|e_score_correction_bias)$")
CHECK_BYTES = 16 * 2**20
READ_BACK_STEP = 256 * 2**20  # bytes that are written before they are read back
SHARD = re.compile(r"model(-\d{5}-of-\d{5,6})?\.safetensors(\.index\.json)?")
LARGEST_CODE = 7


@dataclass
class Output:
    """One tensor of the new checkpoint: what it is, which source tensors it needs, and how it is computed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    part: int = 0  # which of several tensors that `make` returns


@dataclass
class Report:
    """What a conversion did."""

    tensors: int = 0
    bytes_written: int = 0
    shards_kept: int = 0  # finished by an earlier run
    groups: int = 0  # of 32 values, quantized
    groups_rounded: int = 0  # whose values changed


# ------------------------------------------------------------------------------------------------------------ sources


def read_checkpoint(folder: Path) -> dict[str, Source]:
    """Every tensor of a folder, in the order of its shards. Raises OSError for a folder without weights."""
    files = sorted(path for path in folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no model*.safetensors file.")
    sources = read_sources([str(file) for file in files], None, None)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        promised = json.loads(index.read_bytes())["weight_map"]
        lost = [name for name in promised if name not in sources]
        if lost:
            raise FileNotFoundError(
                f"{folder} lacks {len(lost)} of {len(promised)} tensors of its index, first {lost[0]} in {promised[lost[0]]}."
            )
    return sources


class Reader:
    """Reads tensors of a checkpoint; the last file stays open, and must not change while open."""

    def __init__(self, sources: dict[str, Source]):
        self.sources, self.file = sources, ""
        self.shard: Shard | None = None

    def __call__(self, name: str) -> torch.Tensor:
        source, shard = self.sources[name], self.shard
        if shard is None or source.file != self.file:
            if shard is not None:
                shard.close()
            shard = Shard(source.file, source.stamp)
            self.file, self.shard = source.file, shard
        tensor = torch.empty(source.shape, dtype=source.dtype)
        shard.read([Range(source.begin, bytes_of(tensor), name)])
        return tensor


# -------------------------------------------------------------------------------------------------------- conversions


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def copied(name: str, source: Source) -> Output:
    return Output(source.dtype, source.shape, (name,), same)


def to_bf16(sources: dict[str, Source], report: Report) -> dict[str, Output]:
    """int4 experts as bf16 matrices; all else as it is."""
    outputs = {}
    for name, source in sources.items():
        if name.endswith(".weight_packed") and EXPERT.match(name):
            stem = name.removesuffix("_packed")
            shape = (source.shape[0], sources[f"{stem}_scale"].shape[1] * GROUP_SIZE)
            outputs[stem] = Output(torch.bfloat16, shape, (name, f"{stem}_scale"), unpack)
        elif not (EXPERT.match(name) and name.endswith(("_scale", "_shape"))):
            outputs[name] = copied(name, source)
    if len(outputs) == len(sources):
        raise ValueError("there is no int4 expert in this checkpoint; nothing to convert.")
    return outputs


def unpack(words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return dequantize_int4(words, scale, torch.bfloat16)


def to_int4(sources: dict[str, Source], report: Report) -> dict[str, Output]:
    """bf16 experts as int4; all else as it is."""
    outputs: dict[str, Output] = {}

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        words, scale, rounded = recover_int4(weight)
        report.groups += scale.numel()
        report.groups_rounded += rounded
        return words, scale, torch.tensor(weight.shape, dtype=torch.int32)

    for name, source in sources.items():
        if not (EXPERT.match(name) and name.endswith("_proj.weight")):
            outputs[name] = copied(name, source)
            continue
        rows, columns = source.shape
        if columns % GROUP_SIZE:
            raise ValueError(f"{name} has {columns} inputs, not a multiple of the group size {GROUP_SIZE}.")
        kinds = (
            ("packed", torch.int32, (rows, columns // 8)),
            ("scale", torch.bfloat16, (rows, columns // GROUP_SIZE)),
            ("shape", torch.int32, (2,)),
        )
        for part, (kind, dtype, shape) in enumerate(kinds):
            outputs[f"{name}_{kind}"] = Output(dtype, shape, (name,), pack, part)
    if len(outputs) == len(sources):
        raise ValueError("there is no bf16 expert in this checkpoint; nothing to convert.")
    return outputs


def recover_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(N, M) to words, scales, and how many groups changed by it.

    absmax / 7 is what the model was trained with; where its values do not come out exactly, the other scales that int4
    could have had are tried: the largest value may have had any code, and division rounds.
    """
    words, scale = quantize_int4(weight, LARGEST_CODE)
    groups = weight.unflatten(-1, (-1, GROUP_SIZE)).float()  # (N, M/32, 32)
    wrong = differs(groups, dequantize_int4(words, scale, torch.float32).view_as(groups))
    if wrong.any():
        found, codes = search_scales(groups[wrong])
        exact = found > 0
        places = wrong.nonzero()[exact]
        scale[places[:, 0], places[:, 1]] = found[exact]
        by_group = words.unflatten(-1, (-1, GROUP_SIZE // 8))
        by_group[places[:, 0], places[:, 1]] = pack_int4(codes[exact])
        wrong[places[:, 0], places[:, 1]] = False
    return words, scale, int(wrong.sum())


def differs(groups: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(..., 32) each: where a group is not `values` rounded to bf16."""
    return (groups != values.bfloat16().float()).any(-1)


def search_scales(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, 32) values to the bf16 scale (G,) whose multiples they are, 0 where there is none, and codes (G, 32) int8."""
    found = torch.zeros(len(groups), dtype=torch.bfloat16)
    codes = torch.zeros(groups.shape, dtype=torch.int8)
    largest = groups.abs().amax(-1)
    for divisor in (7, 8, 6, 5, 4, 3, 2, 1):
        middle = (largest / divisor).bfloat16()
        for step in (0, -1, 1):
            scale = (middle.view(torch.int16) + step).view(torch.bfloat16)
            values = (groups / scale.float().unsqueeze(-1)).round()
            fits = (scale > 0) & (found == 0) & (values.amin(-1) >= -8) & (values.amax(-1) <= 7)
            fits &= ~differs(groups, values * scale.float().unsqueeze(-1))
            found[fits], codes[fits] = scale[fits], values[fits].to(torch.int8)
    return found, codes


def subset_of(layers: int | None, experts: int | None) -> Callable:
    """The first `layers` layers, and the first `experts` experts of each with the router's rows for them."""

    def subset(sources: dict[str, Source], report: Report) -> dict[str, Output]:
        outputs = {}
        for name, source in sources.items():
            layer = None if "vision_tower" in name else LAYER.search(name)
            expert = EXPERT.match(name)
            if layers is not None and layer and int(layer[1]) >= layers:
                continue
            if experts is not None and expert and int(expert["expert"]) >= experts:
                continue
            outputs[name] = copied(name, source)
            if experts is not None and ROUTER.search(name):
                outputs[name].shape = (experts, *source.shape[1:])
                outputs[name].make = lambda tensor: tensor[:experts].clone()
        return outputs

    return subset


# ------------------------------------------------------------------------------------------------------------ configs


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def dense_config(config: dict[str, Any]) -> None:
    for part in (config, text_part(config)):
        part.pop("quantization_config", None)


def int4_config(config: dict[str, Any]) -> None:
    published = json.loads((ROOT / "config.json").read_bytes())
    text_part(config)["quantization_config"] = published["text_config"]["quantization_config"]


def subset_config(layers: int | None, experts: int | None) -> Callable:
    def change(config: dict[str, Any]) -> None:
        text = text_part(config)
        have = text["num_hidden_layers"], text["n_routed_experts"]
        for name, asked, limit in (("layers", layers, have[0]), ("experts", experts, have[1])):
            if asked is not None and not 1 <= asked <= limit:
                raise ValueError(f"--{name} {asked}: the checkpoint has {limit}.")
        least = text["num_experts_per_tok"]
        if experts is not None and experts < least:
            raise ValueError(f"--experts {experts}: a token takes num_experts_per_tok {least}.")
        text["num_hidden_layers"], text["n_routed_experts"] = layers or have[0], experts or have[1]

    return change


def mlx_config(config: dict[str, Any]) -> None:
    """MLX reads its own group quantization from the packed words and expects the sizes of the tower without prefix."""
    text, vision = text_part(config), config["vision_config"]
    vision.update({name.removeprefix("vt_"): vision[name] for name in list(vision) if name.startswith("vt_")})
    vision["num_heads"], vision["depth"] = vision["vt_num_attention_heads"], vision["vt_num_hidden_layers"]
    vision["embed_dim"] = vision["vt_hidden_size"]
    if "quantization_config" in text:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": 4, "mode": "affine"}


# ------------------------------------------------------------------------------------------------------------ writing


def convert(
    source: Path,
    target: Path,
    plan: Callable[[dict[str, Source], Report], dict[str, Output]],
    change_config: Callable[[dict[str, Any]], None],
    max_shard_size: int | str = "10GB",
) -> Report:
    """Writes `target`, resuming an interrupted run. Raises ValueError for a folder of another conversion."""
    report, config = Report(), json.loads((source / "config.json").read_bytes())
    change_config(config)
    sources = read_checkpoint(source)
    outputs = plan(sources, report)
    entries = {name: (output.dtype, output.shape) for name, output in outputs.items()}
    sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in entries.items()}
    shards = split_names(sizes, parse_size(max_shard_size, "max_shard_size"))
    check_space(target, sum(sizes.values()))
    finished = begin(target, source, config, entries)
    copy_other_files(source, target, config)
    names = [f"model-{i:05d}-of-{len(shards):06d}.safetensors" for i in range(1, len(shards) + 1)]
    reader = Reader(sources)
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for file, members in zip(names, shards, strict=True):
            size = sum(sizes[name] for name in members)
            if file in finished:
                report.shards_kept += 1
                bar.update(size)
                continue
            stream = make_tensors(outputs, reader, bar)
            finished[file] = write_checked(target / file, {name: entries[name] for name in members}, stream)
            lines = "".join(f"{digest}  {name}\n" for name, digest in finished.items())
            replace_text(target / "SHA256SUMS", lines)
            report.tensors, report.bytes_written = report.tensors + len(members), report.bytes_written + size
    weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    replace_text(target / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    (target / "conversion.json").unlink()
    return report


def make_tensors(outputs: dict[str, Output], reader: Reader, bar: Any) -> Callable:
    """A stream of (name, tensor); several parts of one conversion are made once."""

    def stream(names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        made: dict[tuple[str, ...], list] = {}
        users: dict[tuple[str, ...], int] = {}
        for name in names:
            users[outputs[name].sources] = users.get(outputs[name].sources, 0) + 1
        for name in names:
            output = outputs[name]
            if output.sources not in made:
                result = output.make(*(reader(source) for source in output.sources))
                made[output.sources] = list(result) if isinstance(result, tuple) else [result]
                del result
            tensor, made[output.sources][output.part] = made[output.sources][output.part], None
            yield name, tensor
            del tensor
            users[output.sources] -= 1
            if not users[output.sources]:
                del made[output.sources]
            bar.update(prod(output.shape) * output.dtype.itemsize)

    return stream


def write_checked(path: Path, entries: Entries, stream: Callable) -> str:
    """Writes a shard beside its place, reads it back, compares, and moves it there. Returns its SHA-256.

    Raises OSError if what is on the disk is not what was written.
    """
    partial = path.with_name(f"{path.name}.part")
    with Hash() as written, ReadBack(partial) as found:

        def followed(names: list[str]) -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in stream(names):
                yield name, tensor
                del tensor  # before the next one is made
                found.follow()

        write_shard(partial, entries, followed, written.add)
        expected, read = written.hexdigest(), found.hexdigest()
    if read != expected:
        raise OSError(f"{partial} is not what was written: the disk or its connection is faulty.")
    os.replace(partial, path)
    return expected


class Hash:
    """A SHA-256 computed in a thread, beside reading or writing."""

    def __init__(self) -> None:
        self.digest, self.thread = hashlib.sha256(), ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def __enter__(self) -> "Hash":
        return self

    def __exit__(self, *problem: Any) -> None:
        self.thread.shutdown()

    def add(self, data: Any) -> None:
        """Returns when the piece before is done."""
        if self.last is not None:
            self.last.result()
        self.last = self.thread.submit(self.digest.update, data)

    def hexdigest(self) -> str:
        if self.last is not None:
            self.last.result()
        return self.digest.hexdigest()


class ReadBack:
    """Reads a growing file back from the disk, in a thread behind its writer, into a SHA-256."""

    def __init__(self, path: Path):
        self.path, self.asked, self.done = path, 0, 0
        self.thread, self.hash = ThreadPoolExecutor(1), Hash()
        self.reads: list[Future] = []

    def __enter__(self) -> "ReadBack":
        return self

    def __exit__(self, *problem: Any) -> None:
        self.thread.shutdown(cancel_futures=True)
        self.hash.thread.shutdown()

    def follow(self, step: int = READ_BACK_STEP) -> None:
        """Reads what has been written since, if it is at least `step` bytes."""
        size = self.path.stat().st_size
        if size - self.asked >= step:
            self.asked = size
            self.reads.append(self.thread.submit(self.read_to, size))

    def read_to(self, end: int) -> None:
        file = File(self.path, direct=True)
        try:
            descriptor = file.handle.fileno()
            os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):  # from the disk, not from the cache of what was just written
                os.posix_fadvise(descriptor, self.done, end - self.done, os.POSIX_FADV_DONTNEED)
            while self.done < end:
                data = memoryview(bytearray(min(CHECK_BYTES, end - self.done)))
                file.read([Range(self.done, data, "what was written")])
                self.hash.add(data)
                self.done += len(data)
        finally:
            file.close()

    def hexdigest(self) -> str:
        """Of the whole file, when all of it is written."""
        self.follow(step=1)
        for read in self.reads:
            read.result()
        return self.hash.hexdigest()


def begin(target: Path, source: Path, config: dict[str, Any], entries: Entries) -> dict[str, str]:
    """Opens or resumes a target folder; returns the finished shards with their hashes."""
    listed = json.dumps([config, {n: [str(d), list(s)] for n, (d, s) in entries.items()}], sort_keys=True)
    plan = {"source": str(source.resolve()), "plan": hashlib.sha256(listed.encode()).hexdigest()}
    note, sums = target / "conversion.json", target / "SHA256SUMS"
    if not note.is_file():
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} is not empty and not an unfinished conversion; nothing was written.")
        target.mkdir(parents=True, exist_ok=True)
        replace_text(note, json.dumps(plan, indent=2) + "\n")
        return {}
    if json.loads(note.read_bytes()) != plan:
        raise ValueError(f"{target} holds an unfinished conversion of something else; nothing was written.")
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    finished = (line.split("  ", 1) for line in lines)
    return {name: digest for digest, name in finished if (target / name).is_file()}


def check_space(target: Path, needed: int) -> None:
    folder = target
    while not folder.exists():
        folder = folder.parent
    there = sum(path.stat().st_size for path in target.glob("model*.safetensors")) if target.exists() else 0
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise OSError(f"{target} needs {needed:,} bytes, its disk has {free:,} free; nothing was written.")


def copy_other_files(source: Path, target: Path, config: dict[str, Any]) -> None:
    """Code, tokenizer, template and settings; the weights follow, and `config.json` is the changed one."""
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and not SHARD.fullmatch(path.name)
            and path.name not in ("config.json", "SHA256SUMS")
        ):
            shutil.copy(path, target / path.name)
    replace_text(target / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def link_weights(source: Path, target: Path, change_config: Callable[[dict[str, Any]], None]) -> int:
    """A folder with another config whose weights are links to the source's. Returns the number of shards."""
    config = json.loads((source / "config.json").read_bytes())
    change_config(config)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; nothing was written.")
    target.mkdir(parents=True, exist_ok=True)
    copy_other_files(source, target, config)
    shards = [path for path in sorted(source.iterdir()) if SHARD.fullmatch(path.name)]
    for path in shards:
        (target / path.name).symlink_to(path.resolve())
    return len(shards)


# --------------------------------------------------------------------------------------------------------------- GGUF


def q4_0_blocks(words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(N, M/8) words and (N, M/32) scales to (N, M/32 * 18) bytes of Q4_0: an fp16 scale and 32 codes a block.

    A Q4_0 block computes (code - 8) * scale with the very codes of the published words; only their order differs: its
    byte i holds codes i (low) and i + 16 (high). fp16 holds every bf16 scale from 2^-14 to 65504 exactly; others raise.
    """
    half = scale.to(torch.float16)
    lost = half.float() != scale.float()
    if lost.any():
        raise ValueError(
            f"{int(lost.sum())} of {scale.numel()} scales are no fp16 numbers, the first {float(scale[lost][0])}; Q4_0 would"
            " change them."
        )
    octets = words.contiguous().view(torch.uint8).unflatten(-1, (-1, GROUP_SIZE // 2))  # (N, M/32, 16)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)  # (N, M/32, 32)
    paired = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat((half.unsqueeze(-1).view(torch.uint8), paired), dim=-1).flatten(-2)


GGUF_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def exact_gguf(source: Path, given: Path, target: Path) -> int:
    """Copies a GGUF file with the routed experts replaced by the words of `source`. Returns the tensors replaced.

    Needs the `gguf` package. `given` is what a converter made of the same checkpoint, in any type; a layer's experts are
    in memory while they are written.
    """
    import gguf
    import numpy as np

    if target.exists():
        raise ValueError(f"{target} exists already; nothing was written.")
    sources = read_checkpoint(source)
    config = text_part(json.loads((source / "config.json").read_bytes()))
    reader, experts = Reader(sources), config["n_routed_experts"]
    stems = {}
    for name in sources:
        match = EXPERT.match(name)
        if match and name.endswith("weight_packed"):
            projection = match["matrix"].strip(".")
            stems[f"blk.{match['index']}.{GGUF_NAMES[projection]}.weight"] = match["layer"], match["matrix"]
    read = gguf.GGUFReader(given)
    writer = gguf.GGUFWriter(target, arch=read.fields["general.architecture"].contents(), use_temp_file=False)
    for key, field in read.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for tensor in read.tensors:
        if tensor.name in stems:
            rows, columns = int(tensor.shape[1]), int(tensor.shape[0])
            shape = (experts, rows, columns // GROUP_SIZE * 18)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), prod(shape), q4_0)
        else:
            writer.add_tensor_info(
                tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    replaced = 0
    for tensor in tqdm(read.tensors, unit="tensor", disable=not sys.stderr.isatty()):
        if tensor.name not in stems:
            writer.write_tensor_data(tensor.data)
            continue
        layer, matrix = stems[tensor.name]
        blocks = [
            q4_0_blocks(*(reader(f"{layer}{e}{matrix}weight_{kind}") for kind in ("packed", "scale")))
            for e in range(experts)
        ]
        writer.write_tensor_data(torch.stack(blocks).numpy())
        replaced += 1
    writer.close()
    return replaced


# ------------------------------------------------------------------------------------------------------------ command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("bf16", "int4", "subset", "mlx", "gguf"))
    parser.add_argument("source", type=Path)
    parser.add_argument("paths", type=Path, nargs="+", metavar="DST")
    parser.add_argument("--layers", type=int, help="subset: how many")
    parser.add_argument("--experts", type=int, help="subset: how many of each layer")
    parser.add_argument("--max-shard-size", default="10GB")
    options = parser.parse_args(arguments)
    wanted = 2 if options.what == "gguf" else 1
    if len(options.paths) != wanted:
        parser.error(f"{options.what} takes {wanted + 1} paths, got {len(options.paths) + 1}")
    try:
        print(run(options))
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> str:
    source, target = options.source, options.paths[-1]
    if options.what == "gguf":
        return f"{exact_gguf(source, options.paths[0], target)} expert tensors of {target} have the same int4 values as {source}."
    if options.what == "mlx":
        return f"{target}: {link_weights(source, target, mlx_config)} files linked, config.json changed."
    plans: dict[str, tuple[Callable, Callable]] = {
        "bf16": (to_bf16, dense_config),
        "int4": (to_int4, int4_config),
        "subset": (
            subset_of(options.layers, options.experts),
            subset_config(options.layers, options.experts),
        ),
    }
    report = convert(source, target, *plans[options.what], options.max_shard_size)
    text = f"{target}: {report.tensors} tensors, {report.bytes_written:,} bytes written and read back."
    if report.shards_kept:
        text += f" {report.shards_kept} shards were there already."
    if report.groups:
        exact = report.groups - report.groups_rounded
        text += f" {exact:,} of {report.groups:,} groups kept their values exactly."
    return text


if __name__ == "__main__":
    sys.exit(main())
