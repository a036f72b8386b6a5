"""How fast is a completion parsed, whole and streamed, and does the time stay proportional to its length?

Texts of three kinds: prose with one tool call, as models write it; arguments full of half markers, the
worst that text can be for a parser that holds back what may become a marker; nothing but short calls. Each is parsed
whole, in pieces of 16 characters, character by character, and as token ids one by one. Prints the fastest of the
repeats, and how much longer a byte of the last size takes than one of the first (1.0 is linear).

    python benchmarks/bench_output.py [--megabytes 1 10] [--repeats 3] [--ids]

`--ids` trains a small vocabulary first and adds parsing from ids, for the smallest size.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kimi.kimi_output import (
    ARGUMENT_BEGIN,
    CALL_BEGIN,
    CALL_END,
    STOP,
    THINK_END,
    KimiCompletionStream,
    parse_completion,
)
from kimi.tokenization_kimi import TikTokenTokenizer
from scripts.tiny_vocabulary import SAMPLE, write_tiny_tiktoken

CALL = f'{CALL_BEGIN}functions.get_weather:0{ARGUMENT_BEGIN}{{"city": "Beijing"}}{CALL_END}'
# Kind of text -> what precedes it, what is repeated, what follows.
KINDS = {
    "prose": ("", SAMPLE, THINK_END + CALL + STOP),
    "half markers": (f"{THINK_END}{CALL_BEGIN}f:0{ARGUMENT_BEGIN}", "<|tool_call_en", CALL_END + STOP),
    "short calls": (THINK_END, CALL, STOP),
}
PIECES = {"whole": None, "16 characters": 16, "1 character": 1}  # characters in one piece


def completion(kind: str, size_bytes: int) -> str:
    before, unit, after = KINDS[kind]
    return before + unit * (size_bytes // len(unit.encode())) + after


def parse(text: str, piece: int | None) -> None:
    if piece is None:
        parse_completion(text)
        return
    stream = KimiCompletionStream()
    for start in range(0, len(text), piece):
        stream.feed(text[start : start + piece])
    stream.result()


def parse_ids(ids: list[int], tokenizer: TikTokenTokenizer) -> None:
    stream = KimiCompletionStream(tokenizer)
    for index in ids:
        stream.feed(index)
    stream.result()


def fastest(way: Callable[[], None], repeats: int) -> float:
    """Seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
    return min(times)


def bench_text(kind: str, megabytes: list[float], repeats: int) -> None:
    print(f"\n{kind}")
    texts = [completion(kind, int(size * 1e6)) for size in megabytes]
    for name, piece in PIECES.items():
        seconds = [fastest(partial(parse, text, piece), repeats) for text in texts]
        per_mb = [s / len(text.encode()) * 1e6 for s, text in zip(seconds, texts, strict=True)]
        shown = "".join(
            f"{size:6g} MB in {s:6.2f} s, {1 / rate:7.1f} MB/s"
            for size, s, rate in zip(megabytes, seconds, per_mb, strict=True)
        )
        print(f"  {name:14s}{shown}   last : first {per_mb[-1] / per_mb[0]:.2f}")


def bench_ids(megabytes: float, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vocab = str(Path(folder) / "tiktoken.model")
        write_tiny_tiktoken(vocab)
        tokenizer = TikTokenTokenizer(vocab)
    text = completion("prose", int(megabytes * 1e6))
    ids = tokenizer.encode(text)
    seconds = fastest(lambda: parse_ids(ids, tokenizer), repeats)
    rates = f"{len(text.encode()) / seconds / 1e6:.1f} MB/s, {len(ids) / seconds / 1e6:.2f} million tokens/s"
    print(f"\nids, one by one: {megabytes:g} MB in {len(ids)} tokens: {rates}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 10])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ids", action="store_true", help="also from token ids, with a small vocabulary")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, one thread")
    print(f"fastest of {args.repeats}; python {' '.join(sys.argv)}")
    for kind in KINDS:
        bench_text(kind, args.megabytes, args.repeats)
    if args.ids:
        bench_ids(min(args.megabytes), args.repeats)


if __name__ == "__main__":
    main()
