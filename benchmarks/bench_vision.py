"""Is the vision tower as fast as transformers' own, and what is the best way to keep the items of a pack apart?

Two questions, on random weights of the real width (1152; 27 blocks, or fewer with --layers).

forward     This tower against `Kimi_K25VisionModel` of transformers 5.x with the same weights, on one 1024 x 1024 image
            (74 x 74 patches) unless --grid says otherwise. The native tower keeps q, k and v apart and rotates halves of a
            head where the checkpoint's layout rotates neighbours, so rows of q and k are reordered when the weights are
            copied; the largest difference of the outputs is printed. Both use SDPA and are measured
            alternately, so that a slow minute of the machine affects both. Needs transformers 5.x.
segments    SDPA once per run of items of equal length, as the tower does it, against once per item and against one call
            with a block mask, for one image, eight small ones and the ten chunks of a video. Attention alone.

    python benchmarks/bench_vision.py forward [--layers 27] [--dtype bf16 fp32] [--repeats 3] [--grid 1 74 74]
    python benchmarks/bench_vision.py segments [--dtype bf16 fp32] [--repeats 5]
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from kimi.configuration_kimi import KimiK25VisionConfig
from kimi.kimi_vision import MoonViT, MoonViTBlock, Segments, segment_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PACKS = {
    "one image of 74 x 74 patches": [(1, 74, 74)],
    "8 images of 18 x 24": [(1, 18, 24)] * 8,
    "8 images of 8 sizes, 4 x 4 to 32 x 32": [(1, 4 * i, 4 * i) for i in range(1, 9)],
    "10 chunks of 4 frames of 18 x 24": [(4, 18, 24)] * 10,
}


# --- forward --------------------------------------------------------------------------------------------------


def our_tower(layers: int) -> MoonViT:
    """Random weights that keep activations near one, so that differences mean something."""
    torch.manual_seed(0)
    config = KimiK25VisionConfig(vt_num_hidden_layers=layers)
    config._attn_implementation = "sdpa"
    tower = MoonViT(config).eval().requires_grad_(False)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.02)
        elif "norm" not in name and "pos_emb" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return tower


def native_tower(ours: MoonViT) -> torch.nn.Module:
    """transformers' tower with the weights of ours."""
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

    config = Kimi_K25VisionConfig(num_hidden_layers=len(ours.encoder.blocks))
    config._attn_implementation = "sdpa"
    tower = Kimi_K25VisionModel(config).eval().requires_grad_(False)
    tower.load_state_dict(native_weights(ours.state_dict(), config.num_attention_heads))
    return tower


def native_weights(weights: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """The checkpoint's names and layout to those of transformers 5.x."""
    renames = {
        "encoder.": "",
        "blocks.": "layers.",
        "wo.": "attn.proj.",
        "pos_emb.weight": "pos_emb.position_embeddings",
    }
    # The later before the earlier: fc0 becomes fc1 only once fc1 has become fc2.
    renames |= {"norm1.": "norm2.", "norm0.": "norm1.", "fc1.": "fc2.", "fc0.": "fc1."}
    native = {}
    for name, weight in weights.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        if "wqkv." not in name:
            native[name] = weight
            continue
        for part, rows in zip("qkv", weight.chunk(3), strict=True):
            rows = rows if part == "v" else halves_first(rows, num_heads)
            native[name.replace("wqkv.", f"attn.{part}_proj.")] = rows
    return native


def halves_first(rows: Tensor, num_heads: int) -> Tensor:
    """In each head: rows 0, 2, 4, ... and then 1, 3, 5, ..., so that neighbours are half a head apart."""
    pairs = rows.unflatten(0, (num_heads, -1, 2))  # (H, hd/2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)


def compare_towers(layers: int, dtype: torch.dtype, grid: list[int], repeats: int) -> None:
    ours = our_tower(layers)
    native = native_tower(ours).to(dtype)
    ours = ours.to(dtype)
    t, h, w = grid
    pixel_values = torch.rand(t * h * w, 3, 14, 14, generator=torch.Generator().manual_seed(1)) * 2 - 1
    grid_thws = torch.tensor([grid])
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: torch.cat(ours(pixel_values, grid_thws)),
        "native": lambda: native(pixel_values.to(dtype), grid_thws).pooler_output,
    }
    outputs, seconds = take_turns(ways, repeats)
    difference = (outputs["ours"].float() - outputs["native"].float()).abs()
    print(
        f"{layers} blocks, grid {grid}, {dtype}: outputs differ by at most {difference.max():.2g} (mean"
        f" {difference.mean():.2g}; values up to {outputs['native'].abs().max():.2g})"
    )
    report(seconds, baseline="native")


# --- segments -------------------------------------------------------------------------------------------------


def item_attention(block: object, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    outputs = []
    for item in zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True):
        q_item, k_item, v_item = (x.transpose(0, 1)[None] for x in item)  # (1, H, length, hd)
        outputs.append(F.scaled_dot_product_attention(q_item, k_item, v_item)[0].transpose(0, 1))
    return torch.cat(outputs)


def block_mask_attention(block: object, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    item_ids = torch.arange(len(segments.lengths)).repeat_interleave(torch.tensor(segments.lengths))
    mask = item_ids[:, None] == item_ids  # (P, P)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, P, hd)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def compare_segments(name: str, dtype: torch.dtype, repeats: int) -> None:
    segments = Segments.of(PACKS[name], torch.device("cpu"))
    num_patches = sum(segments.lengths)
    q, k, v = torch.randn(3, num_patches, 16, 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    block = MoonViTBlock(KimiK25VisionConfig())  # none of them reads it
    ways: dict[str, Callable[[], Tensor]] = {
        "runs": partial(segment_attention, block, q, k, v, segments),
        "items": partial(item_attention, block, q, k, v, segments),
        "one block mask": partial(block_mask_attention, block, q, k, v, segments),
    }
    outputs, seconds = take_turns(ways, repeats)
    worst = max((out - outputs["runs"]).abs().max().item() for out in outputs.values())
    print(f"{name}, {dtype}: {num_patches:,} patches, outputs differ by at most {worst:.1g}")
    report(seconds, baseline="runs")


# --- both -----------------------------------------------------------------------------------------------------


def take_turns(
    ways: dict[str, Callable[[], Tensor]], repeats: int
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """What each way gives, and its seconds in each round after one that warms up."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        outputs = {way: run() for way, run in ways.items()}
        for _ in range(repeats):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start)
    return outputs, seconds


def report(seconds: dict[str, list[float]], baseline: str) -> None:
    base = statistics.median(seconds[baseline])
    for way, measured in seconds.items():
        median = statistics.median(measured)
        print(
            f"  {way:14} {median * 1e3:10.1f} ms (from {min(measured) * 1e3:.1f} to {max(measured) * 1e3:.1f}),"
            f" {median / base:.2f} x the time of {baseline}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", choices=("forward", "segments"))
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grid", nargs=3, type=int, default=[1, 74, 74], metavar=("T", "H", "W"))
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()},"
        f" {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}; medians of {args.repeats}; {' '.join(sys.argv)}"
    )
    for name in args.dtype:
        if args.question == "forward":
            compare_towers(args.layers, DTYPES[name], args.grid, args.repeats)
        else:
            for pack in PACKS:
                compare_segments(pack, DTYPES[name], args.repeats)


if __name__ == "__main__":
    main()
