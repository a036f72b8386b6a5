"""Writes a small random checkpoint in the published layout: every kind of tensor and file that the 595 GB one has.

    config.json, generation_config.json          the published ones with small sizes and matching token ids
    model-0000N-of-00000M.safetensors, index     int4 experts, dense rest, vision tower, projector
    tiktoken.model, tokenizer_config.json,       a vocabulary of its own, 256 reserved ids after it
    chat_template.jinja, preprocessor_config.json
    *_kimi.py, kimi_*.py                         the code, as it lies beside the published weights

Each tensor is seeded by its name and made when it is written, so a checkpoint of any size needs the memory of one
tensor. Weights are random: such a model is exact to test with and says nothing sensible.

`real_width` gives the published sizes for a few layers: `python benchmarks/bench_pool.py --make FOLDER` writes 36 GB so.
Large tensors are drawn from tables of 65,536 values, about as fast as a disk writes.
"""

import json
import os
import shutil
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_checkpoint import PublishedTensor, published_tensors
from kimi.kimi_experts import Experts
from kimi.kimi_safetensors import write_shards
from kimi.modeling_kimi import KimiK25ForConditionalGeneration

from .tiny_vocabulary import SAMPLE, write_tiny_tiktoken

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_BASE = 163584  # BPE ranks of the published vocabulary; the 256 reserved ids follow
TINY_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}
TINY_VISION = {
    "vt_hidden_size": 64,
    "vt_num_hidden_layers": 2,
    "vt_num_attention_heads": 4,
    "vt_intermediate_size": 128,
    "init_pos_emb_height": 16,
    "init_pos_emb_width": 16,
}
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "media_placeholder_token_id"}
LARGE = 400_000  # elements of a tensor that is drawn fast


def real_width(num_layers: int, num_experts: int) -> dict[str, dict[str, Any]]:
    """`text` and `vision` for write_tiny_checkpoint: the published sizes, the first `num_layers` layers."""
    config = json.loads((ROOT / "config.json").read_bytes())
    text = {name: config["text_config"][name] for name in (*TINY_TEXT, "vocab_size")}
    text |= {"num_hidden_layers": num_layers, "n_routed_experts": num_experts}
    return {"text": text, "vision": {name: config["vision_config"][name] for name in TINY_VISION}}


def write_tiny_checkpoint(
    folder: str | Path,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    num_merges: int = 600,
    seed: int = 0,
    max_shard_size: int | str = "1MB",
) -> Path:
    """Writes the whole folder, complete or not at all. `text` and `vision` override sizes. Returns the folder."""
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    base = write_tokenizer(partial, num_merges)
    write_model_configs(partial, base, text or {}, vision or {})
    write_random_weights(partial, seed, max_shard_size)
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)


def write_tokenizer(folder: Path, num_merges: int = 600, text: str = SAMPLE, copy_code: bool = True) -> int:
    """A vocabulary trained on `text` with its `tokenizer_config.json`, the template and all code; returns the first
    reserved id."""
    folder.mkdir(parents=True, exist_ok=True)
    base = write_tiny_tiktoken(folder / "tiktoken.model", num_merges=num_merges, text=text)
    write_json(folder / "tokenizer_config.json", config_for_vocabulary("tokenizer_config.json", base))
    for path in files_beside_weights() if copy_code else ():
        shutil.copy(path, folder)
    return base


def files_beside_weights() -> list[Path]:
    """What every checkpoint has as it lies here: the code, the template and the settings of the image processor."""
    patterns = ("*_kimi.py", "kimi_*.py", "chat_template.jinja", "preprocessor_config.json")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def link_code(folder: Path) -> None:
    """Relative links instead of copies, for a checkpoint that is kept inside this repository."""
    for path in files_beside_weights():
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(path, folder))


def json_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json_text(content), encoding="utf-8")


def config_for_vocabulary(name: str, base: int) -> dict[str, Any]:
    """A config file of this repository, with every token id moved from the published base to `base`."""
    config, shift = json.loads((ROOT / name).read_bytes()), base - PUBLISHED_BASE
    for settings in (config, config.get("text_config", {})):
        for field in settings.keys() & TOKEN_IDS:
            ids = settings[field]
            settings[field] = [i + shift for i in ids] if isinstance(ids, list) else ids + shift
    if "added_tokens_decoder" in config:
        tokens = config["added_tokens_decoder"].items()
        config["added_tokens_decoder"] = {str(int(i) + shift): token for i, token in tokens}
    return config


def write_model_configs(folder: Path, base: int, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """config.json and generation_config.json with small sizes, for a vocabulary whose reserved ids begin at `base`."""
    config = config_for_vocabulary("config.json", base)
    config["text_config"].update({"vocab_size": base + 256, **TINY_TEXT, **text})
    sizes = {**TINY_VISION, **vision}
    # Engines that read the sizes without the prefix must find the same ones.
    plain = {name.removeprefix("vt_"): value for name, value in sizes.items() if name.startswith("vt_")}
    config["vision_config"].update(sizes, **plain)
    config["vision_config"].update(
        mm_hidden_size=sizes["vt_hidden_size"], text_hidden_size=config["text_config"]["hidden_size"]
    )
    # transformers' own class has other names yet, and the full model's sizes and ids where they are missing.
    config["vision_config"].update(
        pos_emb_height=sizes["init_pos_emb_height"], pos_emb_width=sizes["init_pos_emb_width"]
    )
    config["projection_hidden_size"] = sizes["vt_hidden_size"]
    offsets = {"vision_start_token_id": 18, "vision_end_token_id": 20, "image_token_id": 21}
    config.update({name: base + offset for name, offset in offsets.items()})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", config_for_vocabulary("generation_config.json", base))


def write_random_weights(folder: Path, seed: int, max_shard_size: int | str) -> None:
    """Shards for the config.json that lies in `folder`."""
    config = KimiK25Config(**json.loads((folder / "config.json").read_bytes()))
    with torch.device("meta"):
        model = KimiK25ForConditionalGeneration(config).bfloat16()
    tensors = published_tensors(model)
    entries = {name: (published.target.dtype, published.shape) for name, published in tensors.items()}
    write_shards(
        folder,
        entries,
        lambda names: ((name, random_tensor(tensors[name], seed)) for name in names),
        max_shard_size,
    )


def random_tensor(published: PublishedTensor, seed: int) -> torch.Tensor:
    """A tensor that keeps activations near one: matrices N(0, 1/inputs), norms near 1, biases near 0."""
    key = zlib.crc32(f"{seed}/{published.name}".encode())
    generator = torch.Generator().manual_seed(key)
    shape, dtype, large = published.shape, published.target.dtype, prod(published.shape) >= LARGE

    def uniform(low: float, high: float) -> torch.Tensor:
        if large:
            return from_table(torch.linspace(low, high, 2**16).to(dtype), shape, key)
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)

    def normal(deviation: float) -> torch.Tensor:
        if large:
            quantiles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
            return from_table((torch.special.ndtri(quantiles) * deviation).to(dtype), shape, key)
        return (torch.randn(shape, generator=generator) * deviation).to(dtype)

    if isinstance(published.module, Experts):
        projection, tensor = published.module.published[published.parameter]
        if tensor == "weight_shape":
            return torch.tensor(published.module.shapes[projection], dtype=dtype)
        if tensor == "weight_packed" and large:
            return torch.from_numpy(random_bits(prod(shape) * 2, key)).view(dtype).view(shape)
        if tensor == "weight_packed":
            return torch.randint(-(2**31), 2**31, shape, generator=generator).to(dtype)
        if tensor == "weight_scale":
            spread = 4.6  # standard deviation of codes drawn evenly from -8..7
            middle = published.module.shapes[projection][1] ** -0.5 / spread
            return uniform(0.5 * middle, 1.5 * middle)
    if "norm" in published.name and published.parameter == "weight":
        return uniform(0.9, 1.1)
    if published.parameter in ("bias", "e_score_correction_bias"):
        return uniform(-0.1, 0.1)
    inputs = prod(shape[1:]) if "embed" not in published.name and "pos_emb" not in published.name else 1
    return normal(inputs**-0.5)


def random_bits(count: int, seed: int | list[int]) -> np.ndarray:
    """(count,) uint16."""
    return np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(2 * count), np.uint16).copy()


def from_table(table: torch.Tensor, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values drawn from a table of 2^16, in its dtype. Looked up as bits by numpy, which takes uint16 as an index."""
    code = {2: np.uint16, 4: np.uint32}[table.dtype.itemsize]
    bits = table.view({2: torch.int16, 4: torch.int32}[table.dtype.itemsize]).numpy().view(code)
    drawn = torch.empty(shape, dtype=table.dtype)
    flat = drawn.view(-1).view({2: torch.int16, 4: torch.int32}[table.dtype.itemsize]).numpy().view(code)
    step = 2**22  # values at once, to keep indices small
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        np.take(bits, random_bits(len(part), [seed, start]), out=part)
    return drawn
