"""Experts from disk: the speed at a given cache size, and which policy should fill the cache.

    python benchmarks/bench_pool.py --make /scratch/real_width           # 36 GB: published sizes, 4 layers, 384 experts
    python benchmarks/bench_pool.py /scratch/real_width --sizes 600MB 2GB 4GB 6GB --plot docs/pool.png
    python benchmarks/bench_pool.py --make /scratch/subset --experts 16  # 8.7 GB
    python benchmarks/bench_pool.py /scratch/subset --equal 600MB        # the same logits as all experts in memory?
    python benchmarks/bench_pool.py --policies                           # simulated on a recorded trace
    python benchmarks/bench_pool.py /scratch/real_width --readers        # threads: GB/s of cold expert reads

Each size runs in a process of its own, on files that were dropped from the page cache (posix_fadvise) beforehand, so that
they are read past it where the system can. Weights are random, so routing is more even than a trained model's: hit rates
are about the share of experts that fit.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from bench_loading import drop_from_page_cache

PROMPT_TOKENS = 64
TRACE_TEXT = {
    "num_hidden_layers": 7,
    "n_routed_experts": 96,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 64,
}


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def prompt(vocab_size: int, length: int = PROMPT_TOKENS) -> torch.Tensor:
    return torch.randint(0, vocab_size - 300, (1, length), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------------------- sizes


@torch.no_grad()
def run(folder: str, size: str, new_tokens: int) -> dict:
    """Loads, reads a prompt, samples tokens one by one."""
    from kimi.modeling_kimi import KimiK25ForConditionalGeneration

    start = time.perf_counter()
    model = KimiK25ForConditionalGeneration.from_pretrained(folder, expert_cache=size)
    result = {"load_s": time.perf_counter() - start}
    ids = prompt(model.config.text_config.vocab_size)
    output = model(ids, use_cache=True, logits_to_keep=1)
    result["first_token_s"] = time.perf_counter() - start
    generator = torch.Generator().manual_seed(1)
    before, seconds = model.memory_report(), []
    for _ in range(new_tokens):
        begin = time.perf_counter()
        token = torch.multinomial(output.logits[0, -1].float().softmax(-1), 1, generator=generator)
        output = model(token[None], past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - begin)
    after = model.memory_report(output.past_key_values)
    then, now = before.devices["cpu"], after.devices["cpu"]
    asked, missed = now.experts_asked - then.experts_asked, now.experts_missed - then.experts_missed
    read = after.bytes_read - before.bytes_read
    return {
        **result,
        "slots": now.expert_slots,
        "slots_gb": now.expert_bytes / 1e9,
        "hit_rate": 1 - missed / asked,
        "tokens_per_s": new_tokens / sum(seconds),
        "read_gb": read / 1e9,
        "read_gb_per_s": read / sum(seconds) / 1e9,
        "peak_rss_gb": peak_rss(),
        "report": str(after),
    }


def run_alone(folder: str, size: str, new_tokens: int) -> dict:
    drop_from_page_cache(folder)
    command = [sys.executable, __file__, folder, "--one", size, "--new-tokens", str(new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{size} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_sizes(folder: str, sizes: list[str], new_tokens: int, plot_file: str | None) -> None:
    print(
        f"{new_tokens} tokens after a prompt of {PROMPT_TOKENS}; files dropped from the page cache before each run"
    )
    columns = ("slots", "hit_rate", "tokens_per_s", "read_gb_per_s", "load_s", "first_token_s", "peak_rss_gb")
    print(" ".join(name.rjust(14) for name in ("cache", *columns)))
    results = {}
    for size in sizes:
        results[size] = result = run_alone(folder, size, new_tokens)
        cells = [f"{result[name]:.3f}" if name != "slots" else str(result[name]) for name in columns]
        print(" ".join(cell.rjust(14) for cell in (size, *cells)), flush=True)
    print(result["report"])
    if plot_file:
        plot(list(results.values()), plot_file)


def plot(results: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4), dpi=130)
    sizes = [result["slots_gb"] for result in results]
    left.plot(sizes, [result["tokens_per_s"] for result in results], "o-", color="tab:blue", label="tokens/s")
    left.set(xlabel="expert cache, GB", ylabel="tokens/s (blue), GB/s read (green)", ylim=0)
    left.plot(
        sizes, [result["read_gb_per_s"] for result in results], "s--", color="tab:green", label="GB/s read"
    )
    right = left.twinx()
    right.plot(sizes, [result["hit_rate"] for result in results], "^:", color="tab:orange", label="hit rate")
    right.set(ylabel="hit rate (orange)", ylim=(0, 1))
    left.set_title("Published width, 4 layers, experts read from disk, CPU")
    left.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


# -------------------------------------------------------------------------------------------------------------- equal


@torch.no_grad()
def logits_and_tokens(folder: str, size: str, new_tokens: int, target: str) -> None:
    """Of a prompt, and of tokens chosen greedily after it; with the experts resident for the size "none"."""
    from kimi.modeling_kimi import KimiK25ForConditionalGeneration

    model = KimiK25ForConditionalGeneration.from_pretrained(
        folder, expert_cache=None if size == "none" else size
    )
    output = model(prompt(model.config.text_config.vocab_size), use_cache=True)
    logits = [output.logits[0]]
    for _ in range(new_tokens):
        token = logits[-1][-1:].argmax(-1, keepdim=True)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    torch.save(torch.cat(logits), target)
    print(json.dumps({"peak_rss_gb": peak_rss()}))


def compare(folder: str, size: str, new_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        results = {}
        for kind in ("none", size):
            target = f"{scratch}/{kind}.pt"
            command = [sys.executable, __file__, folder, "--one", kind, "--save", target]
            done = subprocess.run([*command, "--new-tokens", str(new_tokens)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
            results[kind] = torch.load(target, weights_only=True)
            print(f"cache {kind}: peak RSS {json.loads(done.stdout.splitlines()[-1])['peak_rss_gb']:.2f} GB")
    resident, pooled = results.values()
    same = resident.equal(pooled)
    print(
        f"logits {tuple(resident.shape)} of {PROMPT_TOKENS} prompt and {new_tokens} new tokens are equal: {same}"
    )
    if not same:
        raise SystemExit(f"largest difference {(resident.float() - pooled.float()).abs().max():.3g}")


# ----------------------------------------------------------------------------------------------------------- policies


@torch.no_grad()
def record_trace(new_tokens: int) -> tuple[list[tuple[int, list[int]]], int]:
    """What the routers of a small random model chose, (layer, experts) in order of time, and the number of experts."""
    from kimi.kimi_usage import named_routers
    from kimi.modeling_kimi import KimiK25ForConditionalGeneration
    from scripts.tiny_checkpoint import write_tiny_checkpoint

    trace: list[tuple[int, list[int]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny_checkpoint(f"{scratch}/model", TRACE_TEXT)
        model = KimiK25ForConditionalGeneration.from_pretrained(folder)
    routers = list(named_routers(model))
    for layer, (_, router) in enumerate(routers):
        router.register_forward_hook(
            lambda module, given, out, layer=layer: trace.append((layer, out[0].unique().tolist()))
        )
    ids = prompt(model.config.text_config.vocab_size)
    settings = {"do_sample": True, "temperature": 1.0, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **settings)
    return trace, len(routers) * model.config.text_config.n_routed_experts


def simulate(trace: list[tuple[int, list[int]]], capacity: int, half_life: float, num_layers: int) -> float:
    """Hit rate of the policy of kimi_slots.py."""
    from kimi.kimi_slots import SlotCache, Worth

    class Nothing:
        def tasks(self, key, out, put):
            return []

    cache = SlotCache(Nothing(), capacity, {"x": ((1,), torch.uint8)}, Worth(half_life, num_layers))
    for layer, experts in trace:
        keys = {(layer, expert) for expert in experts}
        cache.asked += len(keys)
        cache.worth.use(keys)
        for key in sorted(keys):
            cache.claim(key, keys, sorted(keys, reverse=True))
    return 1 - cache.misses / cache.asked


def simulate_optimal(trace: list[tuple[int, list[int]]], capacity: int) -> float:
    """Belady's: evicts what is needed last. No policy that cannot see the future does better."""
    times = defaultdict(list)
    for time_, (layer, experts) in enumerate(trace):
        for expert in experts:
            times[layer, expert].append(time_)
    for uses in times.values():
        uses.reverse()
    here: dict[tuple[int, int], int] = {}  # expert -> next use
    misses = asked = 0
    for layer, experts in trace:
        for expert in experts:
            key = layer, expert
            times[key].pop()
            asked += 1
            if key not in here:
                misses += 1
                if len(here) >= capacity:
                    del here[max(here, key=here.__getitem__)]
            here[key] = times[key][-1] if times[key] else len(trace)
    return 1 - misses / asked


def compare_policies(new_tokens: int) -> None:
    trace, total = record_trace(new_tokens)
    num_layers = len({layer for layer, _ in trace})
    print(f"{len(trace)} passes of {num_layers} layers, {total} experts, {new_tokens} tokens; hit rates")
    half_lives = (0.01, 4, 16, 64, 256, 1024, 1e9)
    names = [f"{h:g} tokens" for h in half_lives]
    names[0], names[-1] = "LRU", "LFU"
    print(" ".join(name.rjust(12) for name in ("cache", *names, "optimal")))
    for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8):
        capacity = int(share * total)
        rates = [simulate(trace, capacity, half_life, num_layers) for half_life in half_lives]
        rates.append(simulate_optimal(trace, capacity))
        print(
            " ".join(cell.rjust(12) for cell in (f"{share:.0%}", *(f"{rate:.3f}" for rate in rates))),
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------------ readers


def measure_readers(folder: str, number: int) -> None:
    """GB/s of `number` random experts, cold."""
    from kimi import kimi_pool
    from kimi.kimi_slots import SlotCache, Worth
    from kimi.modeling_kimi import KimiK25ForConditionalGeneration

    model = KimiK25ForConditionalGeneration.from_pretrained(folder, expert_cache="600MB")
    assert model.expert_pool is not None and model.expert_pool.files is not None  # expert_cache= makes both
    files, cache = model.expert_pool.files, next(iter(model.expert_pool.caches.values()))
    layout = {name: (tuple(stack.shape[1:]), stack.dtype) for name, stack in cache.stacks.items()}
    keys = random.Random(0).sample(sorted(files.parts), number)
    for readers in (1, 2, 4, 8):
        for _ in range(2):
            drop_from_page_cache(folder)
            fresh = SlotCache(files, number, layout, Worth(kimi_pool.HALF_LIFE, 1), readers=readers)
            for stack in fresh.stacks.values():
                stack.zero_()  # page faults happen here, outside the measurement
            before, start = files.bytes_read, time.perf_counter()
            for key, entry in [(key, fresh.claim(key)) for key in keys]:
                assert entry is not None  # there is a slot for each
                fresh.await_entry(key, entry)
            rate = (files.bytes_read - before) / (time.perf_counter() - start) / 1e9
            print(f"{readers} threads: {rate:.2f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--make", metavar="FOLDER", help="write a checkpoint of the published sizes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--sizes", nargs="+")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--plot", help="a PNG file (needs matplotlib)")
    parser.add_argument("--equal", metavar="SIZE")
    parser.add_argument("--policies", action="store_true")
    parser.add_argument("--readers", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        transformers.utils.logging.disable_progress_bar()
        if args.save:
            logits_and_tokens(args.folder, args.one, args.new_tokens, args.save)
        else:
            print(json.dumps(run(args.folder, args.one, args.new_tokens)))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__},"
    )
    print(f"transformers {transformers.__version__}")
    if args.make:
        from scripts.tiny_checkpoint import real_width, write_tiny_checkpoint

        start = time.perf_counter()
        sizes = real_width(args.layers, args.experts)
        write_tiny_checkpoint(args.make, sizes["text"], sizes["vision"], max_shard_size="5GB")
        size = sum(path.stat().st_size for path in Path(args.make).glob("*.safetensors"))
        print(f"{size / 1e9:.1f} GB written, {size / (time.perf_counter() - start) / 1e6:.0f} MB/s")
    if args.sizes:
        run_sizes(args.folder, args.sizes, args.new_tokens, args.plot)
    if args.equal:
        compare(args.folder, args.equal, args.new_tokens)
    if args.policies:
        compare_policies(args.new_tokens if args.new_tokens > 32 else 2000)
    if args.readers:
        measure_readers(args.folder, 120)


if __name__ == "__main__":
    main()
