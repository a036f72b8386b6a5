"""Asks kimi-tiny questions that no training sample has, with the weights as they are shipped, and counts right answers.

    python -m examples.train_tiny.evaluate [kimi-tiny] [--samples 400] [--show 2] [--json FILE]

Greedy decoding through `from_pretrained` and `generate`. Of a conversation with tools every turn must be right; the
model goes on from its own words, the tools answer as they would.
"""

import argparse
import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor

from .tasks import Sample, draw_sample, is_right

BATCH = 40
GOALS = {
    "decimals": 0.98,
    "decimals in Chinese": 0.98,
    "images": 0.95,
    "clips": 0.90,
    "memory": 0.98,
    "memory in Chinese": 0.98,
    "tools": 0.95,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "decimals": {"language": "en"},
    "decimals in Chinese": {"language": "zh"},
    "memory": {"language": "en", "keep_thoughts": True},
    "memory in Chinese": {"language": "zh", "keep_thoughts": True},
    "memory without its thoughts": {"keep_thoughts": False},
}


def held_out_samples(row: str, count: int, seed: int) -> list[Sample]:
    """`count` samples of a row of the table, all held out of training."""
    rng = random.Random(f"evaluate {row} {seed}")
    return [draw_sample(row.split()[0], rng, held_out=True, **OPTIONS.get(row, {})) for _ in range(count)]


def answer(model: Any, processor: Any, histories: list[list[dict]], tools: list[Any]) -> list[dict[str, Any]]:
    """The next message of each conversation; they must all declare tools, or none."""
    parsed = []
    for start in range(0, len(histories), BATCH):
        chats, declared = histories[start : start + BATCH], tools[start : start + BATCH]
        groups: dict[str, list[int]] = {}
        for index, declaration in enumerate(declared):  # a batch shares its declaration
            groups.setdefault(json.dumps(declaration), []).append(index)
        replies: dict[int, dict[str, Any]] = {}
        for indices in groups.values():
            inputs = processor.apply_chat_template(
                [chats[index] for index in indices],
                tools=declared[indices[0]],
                tokenize=True,
                return_dict=True,
                padding=True,
            )
            output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
            for index, row in zip(indices, output[:, inputs["input_ids"].shape[1] :], strict=True):
                replies[index] = processor.tokenizer.parse_completion(row)
        parsed += [replies[index] for index in range(len(chats))]
    return parsed


def judge(model: Any, processor: Any, samples: list[Sample]) -> tuple[list[bool], list[dict[str, Any]]]:
    """Whether each sample is answered right, and its last answer."""
    right = [True] * len(samples)
    last: list[dict[str, Any]] = [{}] * len(samples)
    histories: list[list[dict]] = [[] for _ in samples]
    turns = [turns_to_ask(sample) for sample in samples]
    for number in range(max(map(len, turns))):
        asked = [i for i in range(len(samples)) if right[i] and number < len(turns[i])]
        if not asked:
            break
        for i in asked:
            done = turns[i][number - 1] + 1 if number else 0
            histories[i] += copy.copy(samples[i].messages[done : turns[i][number]])
        replies = answer(model, processor, [histories[i] for i in asked], [samples[i].tools for i in asked])
        for i, reply in zip(asked, replies, strict=True):
            last[i], reference = reply, samples[i].messages[turns[i][number]]
            right[i] = is_right(samples[i], reply, reference)
            histories[i].append({"role": "assistant", **reply})
    return right, last


def turns_to_ask(sample: Sample) -> list[int]:
    """Indices of the assistant's messages that the model has to find: all of a conversation with tools, else the last."""
    spoken = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"]
    return spoken if sample.tools else spoken[-1:]


def evaluate(model: Any, processor: Any, count: int, seed: int = 0, show: int = 0) -> dict[str, float]:
    """Share of right answers for each row of the table."""
    rows = [*GOALS, "memory without its thoughts"]
    shares = {}
    for row in tqdm(rows, disable=not sys.stderr.isatty()):
        samples = held_out_samples(row, count, seed)
        right, last = judge(model, processor, samples)
        if row == "memory without its thoughts":  # right would be to know the numbers all the same
            right = [
                str(sample.facts["rest"][0]) in (reply.get("content") or "")
                for sample, reply in zip(samples, last, strict=True)
            ]
        shares[row] = sum(right) / len(right)
        wrong = [i for i, ok in enumerate(right) if not ok][:show]
        for i in wrong:
            print(f"--- {row}: {samples[i].key}\n    {last[i]}")
    return shares


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("kimi-tiny"))
    parser.add_argument("--samples", type=int, default=400, help="of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each row")
    parser.add_argument("--json", type=Path, help="write the shares there")
    options = parser.parse_args(arguments)
    processor = AutoProcessor.from_pretrained(options.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        shares = evaluate(model, processor, options.samples, options.seed, options.show)
    print(f"{'task':30} right    goal    of {options.samples} held-out prompts")
    for row, share in shares.items():
        print(f"{row:30} {share:6.1%}   {f'{GOALS[row]:.0%}' if row in GOALS else 'chance'}")
    if options.json:
        options.json.write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
