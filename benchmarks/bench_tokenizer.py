"""How much of tiktoken's speed is left when a text goes through the tokenizer, with and without keywords?

Encodes the same text, with the same vocabulary, by plain `tiktoken.Encoding.encode(allowed_special="all")` and by the
tokenizer's methods, alternately within one run, and prints medians and the ratio to plain tiktoken. Texts: mixed code,
Chinese and markers; a page of HTML, where `<` starts many things that are no markers; many short texts in one batch.

    python benchmarks/bench_tokenizer.py [--vocab tiktoken.model] [--megabytes 4] [--repeats 7]

Without `--vocab` a small vocabulary is trained first.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiktoken
import transformers

from kimi.tokenization_kimi import NAMED_TOKENS, TikTokenTokenizer
from scripts.tiny_vocabulary import SAMPLE, write_tiny_tiktoken


def mixed_text(size_bytes: int) -> str:
    """Shuffled lines of English, Chinese and code, about one in four followed by a marker."""
    rng = random.Random(0)
    lines = [line for line in SAMPLE.split("\n") if line]
    names = list(NAMED_TOKENS.values())
    parts, size = [], 0
    while size < size_bytes:
        parts.append(rng.choice(lines) + (rng.choice(names) if rng.random() < 0.25 else "\n"))
        size += len(parts[-1].encode())
    return "".join(parts)


def html_text(size_bytes: int) -> str:
    line = "<div class='a'><p>for (i = 0; i<|n|; i++) { x[i] = 1 }</p><br/>的 value</div>\n"
    return line * (size_bytes // len(line.encode()))


def medians(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds per call. Measured alternately, so that a slow minute of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(title: str, size_bytes: int, seconds: dict[str, float]) -> None:
    print(f"\n{title}, {size_bytes / 1e6:.1f} MB")
    plain = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"  {name:52s} {size_bytes / value / 1e6:6.2f} MB/s   {plain / value:5.2f} x plain")


def bench_text(tokenizer: TikTokenTokenizer, title: str, text: str, repeats: int) -> None:
    ways: dict[str, Callable[[], object]] = {
        "tiktoken encode(allowed_special='all')": lambda: tokenizer.model.encode(text, allowed_special="all"),
        "encode(text)": lambda: tokenizer.encode(text),
        "encode(text, add_special_tokens=False)": lambda: tokenizer.encode(text, add_special_tokens=False),
        "encode(text, truncation=False, padding=False)": lambda: tokenizer.encode(
            text, truncation=False, padding=False
        ),
        "tokenizer(text)": lambda: tokenizer(text),
    }
    report(title, len(text.encode()), medians(ways, repeats))
    ids = tokenizer.encode(text)
    ways = {
        "tiktoken decode(ids)": lambda: tokenizer.model.decode(ids),
        "decode(ids)": lambda: tokenizer.decode(ids),
        "decode(ids, skip_special_tokens=True)": lambda: tokenizer.decode(ids, skip_special_tokens=True),
    }
    report(f"{title}, back to text", len(text.encode()), medians(ways, repeats))


def bench_batch(tokenizer: TikTokenTokenizer, texts: list[str], repeats: int) -> None:
    encode = tokenizer.model.encode
    ways: dict[str, Callable[[], object]] = {
        "tiktoken encode(allowed_special='all') in a loop": lambda: [
            encode(text, allowed_special="all") for text in texts
        ],
        "encode(text) in a loop": lambda: [tokenizer.encode(text) for text in texts],
        "tokenizer(texts)": lambda: tokenizer(texts),
    }
    size_bytes = sum(len(text.encode()) for text in texts)
    report(f"{len(texts)} texts of {size_bytes // len(texts)} bytes", size_bytes, medians(ways, repeats))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", help="a tiktoken.model; default: a small one trained on the spot")
    parser.add_argument("--megabytes", type=float, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    size_bytes = int(args.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as folder:
        vocab = args.vocab or str(Path(folder) / "tiktoken.model")
        if not args.vocab:
            write_tiny_tiktoken(vocab)
        start = time.perf_counter()
        tokenizer = TikTokenTokenizer(vocab)
        seconds = time.perf_counter() - start
    print(
        f"transformers {transformers.__version__}, tiktoken {tiktoken.__version__}, Python {platform.python_version()}"
    )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one thread; medians of {args.repeats} after one warm-up"
    )
    print(f"{tokenizer.vocab_size} tokens, constructed in {seconds:.2f} s")
    bench_text(tokenizer, "mixed text", mixed_text(size_bytes), args.repeats)
    bench_text(tokenizer, "HTML", html_text(size_bytes), args.repeats)
    text = mixed_text(size_bytes // 4)
    bench_batch(tokenizer, [text[i : i + 500] for i in range(0, len(text), 500)], args.repeats)


if __name__ == "__main__":
    main()
