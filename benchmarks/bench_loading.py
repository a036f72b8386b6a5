"""Loading: against the disk, per tensor, and against transformers' native port.

    python benchmarks/bench_loading.py FOLDER                  # GB/s of loading and of a plain read, in turns, cold
    python benchmarks/bench_loading.py --many                  # us per tensor, of a checkpoint of 52,000 tensors
    python benchmarks/bench_loading.py --native .venv-native/bin/python   # the 2.2 GB of bench_decode.py, warm, in turns

A plain read takes the same files from first to last byte, 16 MiB at a time, into one buffer. "Cold" means dropped from
this system's page cache (posix_fadvise); a virtual machine's host may have a cache of its own, so reads alternate and the
first round, which may find nothing there, is shown like the others. Each load runs in a process of its own and is timed
from the call of from_pretrained to its return.
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
from bench_decode import TEXT, VISION, load

MANY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 16,
    "n_routed_experts": 384,
    "num_experts_per_tok": 8,
}
BUFFER_BYTES = 16 * 2**20


def shards(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def drop_from_page_cache(folder: str) -> None:
    for path in shards(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(folder: str) -> float:
    """Seconds."""
    buffer, start = bytearray(BUFFER_BYTES), time.perf_counter()
    for path in shards(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def timed_load(folder: str, side: str = "ours", python: str = sys.executable) -> float:
    """Seconds of from_pretrained in a fresh process."""
    done = subprocess.run([python, __file__, folder, "--side", side], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def against_the_disk(folder: str, rounds: int) -> None:
    size = sum(path.stat().st_size for path in shards(folder))
    print(f"{size / 1e9:.2f} GB, cold; GB/s in {rounds} rounds")
    rates: dict[str, list[float]] = {"plain read": [], "load": []}
    for _ in range(rounds):
        for name, measure in (("plain read", plain_read), ("load", timed_load)):
            drop_from_page_cache(folder)
            rates[name].append(size / measure(folder) / 1e9)
    for name, values in rates.items():
        print(
            f"{name:12s} median {statistics.median(values):.2f}   {' '.join(f'{value:.2f}' for value in values)}"
        )
    print(f"ratio of medians {statistics.median(rates['load']) / statistics.median(rates['plain read']):.2f}")


def per_tensor(rounds: int) -> None:
    from kimi.kimi_safetensors import read_header
    from scripts.tiny_checkpoint import write_tiny_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        folder = str(write_tiny_checkpoint(f"{scratch}/many", MANY, max_shard_size="20MB"))
        tensors = sum(len(read_header(str(path))) for path in shards(folder))
        plain_read(folder)
        seconds = [timed_load(folder) for _ in range(rounds)]
        read = plain_read(folder)
    best = min(seconds)
    print(
        f"{tensors} tensors, warm: {best:.2f} s, {best / tensors * 1e6:.1f} us each (a plain read takes {read:.2f} s)"
    )


def against_native(python: str, rounds: int) -> None:
    from scripts.tiny_checkpoint import write_tiny_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        folder = str(write_tiny_checkpoint(f"{scratch}/model", TEXT, VISION, max_shard_size="500MB"))
        plain_read(folder)
        sides = {"ours": sys.executable, "native": python}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, interpreter in sides.items():
                seconds[side].append(timed_load(folder, side, interpreter))
    for side, values in seconds.items():
        print(
            f"{side:8s} median {statistics.median(values):.2f} s   {' '.join(f'{value:.2f}' for value in values)}"
        )
    print(f"ratio of medians {statistics.median(seconds['native']) / statistics.median(seconds['ours']):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--native", help="a Python with transformers 5.x and compressed-tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        transformers.utils.logging.disable_progress_bar()
        if args.side == "ours":
            import kimi.modeling_kimi  # noqa: F401
        else:
            from transformers.models.kimi_k25 import modeling_kimi_k25  # noqa: F401
        start = time.perf_counter()
        load(args.side, args.folder)
        print(json.dumps(time.perf_counter() - start))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    if args.folder:
        against_the_disk(args.folder, args.rounds)
    if args.many:
        per_tensor(args.rounds)
    if args.native:
        against_native(args.native, args.rounds)


if __name__ == "__main__":
    main()
