"""A whole model on a CPU against transformers' native port: load, memory, prefill, and decode at growing depth.

Writes a random checkpoint of 2.2 GB (hidden 2048, 8 layers, 64 experts, top 8) once, then runs each side in a process of
its own, in turns, on the same files and threads. The native side needs transformers 5.x and compressed-tensors:

    python -m venv .venv-native && .venv-native/bin/pip install -r requirements-next.txt compressed-tensors
    python benchmarks/bench_decode.py --native .venv-native/bin/python --plot docs/decode.png

Without `--native` only our side runs. Takes about 4 minutes with it. "Peak GB more" is the most resident memory of a prefill
above what was resident before it, its cache included; Linux only. A long prompt alone:

    python benchmarks/bench_decode.py --depths 64 --ours-also --prompts 32768
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

# fmt: off
TEXT = {
    "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 8, "vocab_size": 32768,
}
VISION = {
    "vt_hidden_size": 256, "vt_num_hidden_layers": 4, "vt_num_attention_heads": 4, "vt_intermediate_size": 1024,
}
# fmt: on
STEPS = 15


def resident_gb() -> float:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_gb() -> float:
    """Most resident memory since `reset_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def load(side: str, folder: str):
    if side == "ours":
        from kimi.modeling_kimi import KimiK25ForConditionalGeneration

        return KimiK25ForConditionalGeneration.from_pretrained(folder)
    from transformers import AutoModelForImageTextToText

    # The native config does not read the tower's published sizes; the tower plays no part here.
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, ignore_mismatched_sizes=True
    )


def random_cache(model, depth: int):
    from kimi.kimi_cache import new_cache

    text = model.config.text_config
    cache = new_cache(text)
    for layer in cache.layers:
        latent = torch.randn(1, 1, depth, text.kv_lora_rank).bfloat16()
        layer.update(latent, torch.randn(1, 1, depth, text.qk_rope_head_dim).bfloat16())
    return cache


@torch.no_grad()
def measure(side: str, folder: str, depths: list[int], prompts: list[int]) -> dict:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(0, 32000, (1, length), generator=generator)

    start = time.perf_counter()
    model = load(side, folder).eval()
    result: dict = {"load_s": time.perf_counter() - start, "decode_ms": {}, "prefill_tokens_per_s": {}}
    result["prefill_peak_gb"] = {}
    model(input_ids=ids(8), use_cache=True)
    result["resident_gb"] = resident_gb()
    for depth in depths:
        if depth > 4096 and side == "ours":
            cache = random_cache(model, depth)  # a real prefill would take minutes and decode no differently
        else:
            cache = model(input_ids=ids(depth), use_cache=True, logits_to_keep=1).past_key_values
        times = []
        for _ in range(STEPS):
            token, start = ids(1), time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
        result["decode_ms"][depth] = statistics.median(times[2:]) * 1e3
    for length in prompts:
        seconds, before = [], resident_gb()
        reset_peak()
        for _ in range(3 if length <= 512 else 1):
            prompt, start = ids(length), time.perf_counter()
            model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
        result["prefill_tokens_per_s"][length] = length / min(seconds)
        result["prefill_peak_gb"][length] = peak_gb() - before
    return result


def run_side(side: str, python: str, folder: str, depths: list[int], prompts: list[int]) -> dict:
    command = [
        python,
        __file__,
        "--side",
        side,
        folder,
        "--depths",
        *map(str, depths),
        "--prompts",
        *map(str, prompts),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(results: dict[str, dict]) -> None:
    ours, native = results["ours"], results.get("native")

    def row(name: str, mine: float, theirs: float | None, more_is_better: bool = False) -> None:
        if theirs is None:
            return print(f"{name:28s} {mine:12.2f} ")
        ratio = mine / theirs if more_is_better else theirs / max(mine, 1e-3)
        print(f"{name:28s} {mine:12.2f} {theirs:12.2f} {ratio:10.2f} x")

    print(
        f"\n{'':28s} {'ours':>12s} {'native':>12s} {'ratio':>11s}" if native else f"\n{'':28s} {'ours':>12s}"
    )
    for key, name in (("load_s", "load, s"), ("resident_gb", "resident, GB")):
        row(name, ours[key], native[key] if native else None)
    for depth, value in ours["decode_ms"].items():
        row(f"decode at {depth}, ms/token", value, native["decode_ms"].get(depth) if native else None)
    for length, value in ours["prefill_tokens_per_s"].items():
        other = native["prefill_tokens_per_s"].get(length) if native else None
        row(f"prefill {length}, tokens/s", value, other, more_is_better=True)
    for length, value in ours["prefill_peak_gb"].items():
        row(
            f"prefill {length}, peak GB more",
            value,
            native["prefill_peak_gb"].get(length) if native else None,
        )


def plot(results: dict[str, dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=130)
    names = {"ours": "this repository", "native": f"native port, transformers {results.get('versions', '')}"}
    for side, marker in (("native", "s"), ("ours", "o")):
        if side in results:
            points = {int(depth): ms for depth, ms in results[side]["decode_ms"].items()}
            axes.plot(points.keys(), points.values(), marker=marker, label=names[side])
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms per token")
    axes.set_xticks(ticks := [int(d) for d in results["ours"]["decode_ms"]], [f"{t:,}" for t in ticks])
    axes.set_title("Decoding one token, 2.2 GB model, 2 CPU cores")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--native", help="a Python with transformers 5.x and compressed-tensors")
    parser.add_argument("--folder", help="where the checkpoint is kept; default: made and removed")
    parser.add_argument("--depths", type=int, nargs="+", default=[64, 1024, 4096])
    parser.add_argument(
        "--ours-also", type=int, nargs="*", default=[16384, 65536], help="depths for our side only"
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--plot", help="a PNG file for ms/token against depth (needs matplotlib)")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        transformers.utils.logging.disable_progress_bar()
        side, folder = args.side
        print(json.dumps(measure(side, folder, args.depths, args.prompts)))
        return
    from scripts.tiny_checkpoint import write_tiny_checkpoint

    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}"
    )
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__} (ours); median of {STEPS} steps after 2"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or scratch + "/model"
        if not Path(folder).is_dir():
            write_tiny_checkpoint(folder, TEXT, VISION, max_shard_size="500MB")
        results: dict[str, dict] = {}
        if args.native:
            results["native"] = run_side("native", args.native, folder, args.depths, args.prompts)
        results["ours"] = run_side("ours", sys.executable, folder, args.depths + args.ours_also, args.prompts)
    report(results)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
