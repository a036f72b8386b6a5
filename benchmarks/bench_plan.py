"""How long does planning take, and how many placements does it search?

Plans the published model for machines on which it fits and on which it does not (then the planner also looks for the
least that is missing and for what would do instead), and prints the median processor time and the number of searches.

    python benchmarks/bench_plan.py [--gpus 16x24GB 8xH200] [--ram 64GB] [--repeats 5]
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_machine import GIB, parse_size
from scripts.placement import _gains, _place
from scripts.plan import ROOT, plan

MACHINES = ["8xH200", "7xH100", "1x24GB", "16x24GB", "4xH100,4xA100-40", "64x24GB"]


def measure(config: KimiK25Config, gpus: str, ram_bytes: int) -> tuple[float, int, bool]:
    """Seconds of processor time with empty caches, searches, and whether it fits."""
    _place.cache_clear()
    _gains.cache_clear()
    start = time.process_time()
    result = plan(config, gpus, ram_bytes, batch=2)
    return time.process_time() - start, _place.cache_info().misses, result.fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", nargs="+", default=MACHINES)
    parser.add_argument("--ram", default="64GB")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config, ram = KimiK25Config.from_pretrained(ROOT), parse_size(options.ram, "--ram", gb=GIB)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {options.ram} of RAM"
    )
    print(f"{'gpus':20} {'fits':5} {'searches':>8} {'ms':>8}")
    for gpus in options.gpus:
        rows = [measure(config, gpus, ram) for _ in range(options.repeats)]
        _, searches, fits = rows[0]
        print(f"{gpus:20} {fits!s:5} {searches:8} {1000 * statistics.median(row[0] for row in rows):8.1f}")


if __name__ == "__main__":
    main()
