"""Converting, against copying the same bytes: `scripts.convert subset` and a plain copy in turns, on one disk.

    python benchmarks/bench_pool.py --make /scratch/real_width
    python benchmarks/bench_convert.py /scratch/real_width /scratch/new --experts 64     # 12.3 GB of 36

A plain copy reads 16 MiB, writes them, and so on, as `cp` does; then it syncs, and reads the copy back from the disk, as
scripts.convert does too. Source files are dropped from the page cache (posix_fadvise) before each. Both leave nothing in DST.
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_loading import BUFFER_BYTES, drop_from_page_cache, plain_read, shards

ROOT = Path(__file__).resolve().parents[1]


def timed_convert(source: str, target: str, experts: int) -> tuple[float, int, int]:
    """Seconds, bytes written, and the peak resident set in bytes."""
    start = time.perf_counter()
    paths = [str(Path(folder).resolve()) for folder in (source, target)]
    command = [sys.executable, "-m", "scripts.convert", "subset", *paths, "--experts", str(experts)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in shards(target))
    return seconds, size, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def timed_copy(source: str, target: str, size: int) -> tuple[float, float]:
    """Seconds of copying the first `size` bytes and syncing, and of reading them back."""
    Path(target).mkdir()
    buffer, start, left = memoryview(bytearray(BUFFER_BYTES)), time.perf_counter(), size
    with open(f"{target}/copy.safetensors", "wb", buffering=0) as copy:
        for path in shards(source):
            with path.open("rb", buffering=0) as file:
                while left and (got := file.readinto(buffer[: min(left, BUFFER_BYTES)])):
                    copy.write(buffer[:got])
                    left -= got
        os.fsync(copy.fileno())
    written = time.perf_counter() - start
    drop_from_page_cache(target)
    return written, plain_read(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if Path(args.target).exists():
        parser.error(f"{args.target} exists")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    names = ("copy", "copy and read back", "convert")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        drop_from_page_cache(args.source)
        converted, size, peak = timed_convert(args.source, args.target, args.experts)
        shutil.rmtree(args.target)
        drop_from_page_cache(args.source)
        copied, read = timed_copy(args.source, args.target, size)
        shutil.rmtree(args.target)
        for name, value in zip(names, (copied, copied + read, converted), strict=True):
            seconds[name].append(value)
    print(f"{size / 1e9:.2f} GB, peak RSS of scripts.convert {peak / 1e9:.2f} GB")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        rates = " ".join(f"{size / value / 1e9:.2f}" for value in values)
        print(f"{name:20s} median {median[name]:5.1f} s, GB/s {rates}")
    for name in names[:2]:
        print(f"convert / {name}: {median[name] / median['convert']:.2f} of its rate")


if __name__ == "__main__":
    main()
