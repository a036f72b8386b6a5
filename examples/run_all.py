"""Runs the model card's four examples twice, over the endpoint and in plain transformers, and checks the answers.

    python examples/run_all.py [--model FOLDER]

Starts `python -m serve` on a free port of this machine and ends it. The exit status is 0 if all eight answers are right.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import with_transformers
from chat_with_image import chat_with_image
from chat_with_preserve_thinking import chat_with_preserve_thinking
from chat_with_video import chat_with_video
from simple_chat import simple_chat
from transformers import set_seed

ROOT = Path(__file__).resolve().parents[1]
OVER_ENDPOINT = (simple_chat, chat_with_image, chat_with_video, chat_with_preserve_thinking)
START_S = 3600  # the 595 GB checkpoint from a slow disk
STOP_S = 120


def names_the_bigger(text: str) -> bool:
    """Says of 9.9, and not of 9.11, that it is bigger."""
    word = r"(?:bigger|larger|greater)"
    said = re.findall(rf"(9\.\d+)\W*\s+is\s+(?:the\s+)?{word}|{word}\D*?(9\.\d+)", text)
    first = next((a or b for a, b in said), "")
    return first in ("9.9", "9.90")


def names_the_shapes(text: str) -> bool:
    """A red circle on the left and a blue square on the right."""
    text = text.lower()
    circle = re.search(r"red circle[^,.;]*?\b(left|right)", text)
    square = re.search(r"blue square[^,.;]*?\b(left|right)", text)
    return bool(circle and square) and (circle[1], square[1]) == ("left", "right")


def names_the_motion(text: str) -> bool:
    """A red circle that moves to the right from the beginning."""
    text = text.lower()
    to_the_right = re.search(r"(?:left to|to the|towards the) (?:the )?right", text)
    return "red circle" in text and bool(to_the_right) and "00:00:00" in text


def names_the_rest(text: str) -> bool:
    """215 and 222, and none of the three that were told."""
    return re.findall(r"\d+", text) == ["215", "222"]


CHECKS = (names_the_bigger, names_the_shapes, names_the_motion, names_the_rest)


@contextmanager
def serving(folder: Path, log: Any = subprocess.DEVNULL) -> Iterator[openai.OpenAI]:
    """`python -m serve` with a checkpoint, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "serve", "--model", str(folder.resolve()), "--port", str(port)]
    environment = {**os.environ, "KIMI_API_KEY": ""}
    process = subprocess.Popen(line, stdout=log, stderr=log, env=environment, cwd=ROOT)
    try:
        # A proxy of the environment cannot reach this machine's loopback.
        direct = openai.DefaultHttpxClient(trust_env=False)
        address = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, http_client=direct) as client:
            wait_for(client, process)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_for(client: openai.OpenAI, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"python -m serve did not start (exit status {process.poll()})") from None
            time.sleep(0.2)


def run(name: str, example: Callable[[], str], check: Callable[[str], bool]) -> tuple[str, bool, float, str]:
    print(f"\n--- {name}", flush=True)
    start = time.perf_counter()
    answer = example() or ""
    return name, check(answer), time.perf_counter() - start, answer


def run_all(folder: Path) -> list[tuple[str, bool, float, str]]:
    """Name, whether the answer is right, seconds and the answer, of all eight."""
    results = []
    with serving(folder) as client:
        model_name = client.models.list().data[0].id
        for example, check in zip(OVER_ENDPOINT, CHECKS, strict=True):
            results.append(
                run(f"endpoint {example.__name__}", lambda e=example: e(client, model_name), check)
            )
    parts = with_transformers.load(folder)
    set_seed(0)
    for example, check in zip(with_transformers.EXAMPLES, CHECKS, strict=True):
        results.append(run(f"transformers {example.__name__}", lambda e=example: e(*parts), check))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "kimi-tiny", help="folder of the checkpoint")
    results = run_all(parser.parse_args().model)
    print(f"\n{'example':44}{'right':7}{'seconds':>8}  answer")
    for name, right, seconds, answer in results:
        print(f"{name:44}{'yes' if right else 'NO':7}{seconds:8.1f}  {' '.join(answer.split())[:100]}")
    return 0 if all(right for _, right, _, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
