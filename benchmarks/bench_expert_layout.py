"""Stacked experts or one module per expert matrix: which layout should hold 69,120 int4 matrices?

Measures, for both, what a user waits for: building 61 layers on meta, transformers' device map, loading a checkpoint of
20,736 expert tensors, and saving it. The other layout has a module for each matrix, named as in the checkpoint, and
goes through transformers' own loader and saver.

    python benchmarks/bench_expert_layout.py            (in either environment; about 3 minutes)
"""

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from accelerate import infer_auto_device_map
from torch import nn

from kimi import modeling_kimi
from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_pretrained import KimiPretrainedMixin
from scripts.tiny_checkpoint import TINY_TEXT, TINY_VISION, write_random_weights


class OneMatrix(nn.Module):
    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        for name, shape, dtype in (
            ("weight_packed", (outputs, inputs // 8), torch.int32),
            ("weight_scale", (outputs, inputs // 32), torch.bfloat16),
            ("weight_shape", (2,), torch.int32),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))


class OneExpert(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = OneMatrix(inner, width), OneMatrix(inner, width)
        self.down_proj = OneMatrix(width, inner)


class ExpertModules(nn.ModuleList):
    """The other layout: names and state dict come for free."""

    def __init__(self, config):
        super().__init__(
            OneExpert(config.hidden_size, config.moe_intermediate_size)
            for _ in range(config.n_routed_experts)
        )


class ModulesModel(modeling_kimi.KimiK25ForConditionalGeneration):
    """The model with the other layout's experts, loaded and saved by transformers itself."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super(KimiPretrainedMixin, cls).from_pretrained(*args, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, *args: Any, **kwargs: Any) -> Any:
        return super(KimiPretrainedMixin, cls)._load_pretrained_model(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super(KimiPretrainedMixin, self).save_pretrained(*args, **kwargs)


@contextmanager
def layout(name: str):
    if name != "modules":
        yield modeling_kimi.KimiK25ForConditionalGeneration
        return
    with mock.patch.object(modeling_kimi, "Experts", ExpertModules):
        yield ModulesModel


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_one(name: str, folder: str) -> None:
    """One layout in a process of its own, so that peaks do not mix."""
    with layout(name) as model_class:
        with torch.device("meta"):
            build_s, model = timed(model_class, KimiK25Config())
        modules = sum(1 for _ in model.modules())
        names_s, names = timed(lambda: len(model.state_dict()))
        budget = dict.fromkeys(range(8), 80 * 2**30)
        map_s, _ = timed(
            infer_auto_device_map, model, budget, ["DecoderLayer", "MoEDecoderLayer"], torch.bfloat16
        )
        print(
            f"{name:8} 61 layers on meta {build_s:7.2f} s, {modules:7,} modules | state_dict() of {names:,} names"
            f" {names_s:5.2f} s | infer_auto_device_map 8 x 80 GiB {map_s:6.2f} s"
        )
        del model
        before = peak_gb()
        loads = []
        for _ in range(3):
            load_s, model = timed(model_class.from_pretrained, folder, dtype=torch.bfloat16)
            loads.append(load_s)
        with tempfile.TemporaryDirectory() as target:
            save_s, _ = timed(model.save_pretrained, target, max_shard_size="40MB")
        tensors = len(model.state_dict())
        print(
            f"{name:8} load {tensors:,} tensors {sorted(loads)[1]:6.2f} s ({sorted(loads)[1] / tensors * 1e6:4.0f} us"
            f" each, median of 3) | save {save_s:6.2f} s | peak RSS {peak_gb():.2f} GB (before {before:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("LAYOUT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.one:
        run_one(*arguments.one)
        return
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},"
        f" {os.cpu_count()} cores, {platform.machine()}",
        flush=True,
    )
    text = {**KimiK25Config().text_config.to_dict(), **TINY_TEXT}
    text.update(num_hidden_layers=7, n_routed_experts=384, num_experts_per_tok=8, vocab_size=1024)
    text.update(hidden_size=128, moe_intermediate_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config = KimiK25Config(
        text_config=text,
        vision_config={**TINY_VISION, "text_hidden_size": 128},
        media_placeholder_token_id=3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        write_random_weights(Path(folder), 0, "40MB")
        for name in ("modules", "stacked"):
            os.spawnv(os.P_WAIT, sys.executable, [sys.executable, __file__, "--one", name, folder])


if __name__ == "__main__":
    main()
