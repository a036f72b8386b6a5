"""Samples to token ids, labels and pixels, and these to batches.

Loss is on what the assistant thinks and says: from after `<think>`, which the prompt opens, to `<|im_end|>` included.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from .tasks import WEIGHTS, Sample, draw_sample

IGNORED = -100
POOL = 384  # samples that are sorted by length before they are cut into batches


@dataclass
class Encoded:
    task: str
    input_ids: list[int]
    labels: list[int]
    pixel_values: torch.Tensor | None  # (P, 3, 14, 14)
    grid_thws: torch.Tensor | None  # (N, 3)


def encode(sample: Sample, processor: Any) -> Encoded:
    """Through the template and the processor that users have."""
    inputs = processor.apply_chat_template(
        sample.messages,
        tools=sample.tools,
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
    )
    ids = inputs["input_ids"][0].tolist()
    labels = label(ids, processor.tokenizer)
    return Encoded(sample.task, ids, labels, inputs.get("pixel_values"), inputs.get("grid_thws"))


def label(ids: list[int], tokenizer: Any) -> list[int]:
    """The ids where the assistant speaks, elsewhere `IGNORED`."""
    names = ("<|im_assistant|>", "<think>", "<|im_end|>")
    opens, think, ends = (tokenizer.convert_tokens_to_ids(name) for name in names)
    labels, its_turn, speaks = [], False, False
    for token in ids:
        labels.append(token if speaks else IGNORED)
        its_turn = (its_turn or token == opens) and token != ends
        speaks = its_turn and (speaks or token == think)
    return labels


def collate(samples: list[Encoded], pad_id: int) -> dict[str, Any]:
    """Rows padded on the right: input_ids, attention_mask, labels (B, T), and all pixels."""
    width = max(len(sample.input_ids) for sample in samples)

    def stack(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    batch = {
        "input_ids": stack([sample.input_ids for sample in samples], pad_id),
        "attention_mask": stack([[1] * len(sample.input_ids) for sample in samples], 0),
        "labels": stack([sample.labels for sample in samples], IGNORED),
    }
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    grids = [sample.grid_thws for sample in samples if sample.grid_thws is not None]
    if pixels:
        batch["pixel_values"], batch["grid_thws"] = torch.cat(pixels), torch.cat(grids)
    return batch


class Batches(IterableDataset):
    """Endless batches of about `tokens` tokens, rows of similar length together; the same ones for the same seed."""

    def __init__(self, processor: Any, tokens: int, seed: int, weights: dict[str, float] | None = None):
        self.processor, self.tokens, self.seed = processor, tokens, seed
        self.weights = weights or WEIGHTS

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        pad_id = self.processor.tokenizer.pad_token_id
        while True:
            tasks = rng.choices(list(self.weights), list(self.weights.values()), k=POOL)
            pool = [encode(draw_sample(task, rng), self.processor) for task in tasks]
            pool.sort(key=lambda sample: (len(sample.input_ids), rng.random()))
            batches: list[list[Encoded]] = [[]]
            for sample in pool:
                if batches[-1] and (len(batches[-1]) + 1) * len(sample.input_ids) > self.tokens:
                    batches.append([])
                batches[-1].append(sample)
            rng.shuffle(batches)
            yield from (collate(batch, pad_id) for batch in batches)
