"""kimi-tiny: its sizes, its vocabulary, int4 experts while they are trained, and the folder it is published in."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoProcessor

from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_experts import Experts
from kimi.kimi_int4 import dequantize_int4, quantize_int4, round_int4
from kimi.kimi_tools import render_tool_declaration
from kimi.modeling_kimi import KimiK25ForConditionalGeneration
from scripts.tiny_checkpoint import ROOT, link_code, write_model_configs, write_tokenizer

from .tasks import TASKS, draw_sample

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
}
VISION = {
    "vt_hidden_size": 128,
    "vt_num_hidden_layers": 3,
    "vt_num_attention_heads": 4,
    "vt_intermediate_size": 256,
    "init_pos_emb_height": 8,
    "init_pos_emb_width": 8,
}


def sample_text(num_samples: int = 12_000, seed: int = 0) -> str:
    """What the samples say, without their digits: a digit stays one token, so that numbers are compared by place."""
    rng = random.Random(seed)
    texts: list[str] = []
    for index in range(num_samples):
        sample = draw_sample(list(TASKS)[index % len(TASKS)], rng)
        texts.append(render_tool_declaration(sample.tools) if sample.tools else "")
        for message in sample.messages:
            content = message["content"]
            parts = [part.get("text", "") for part in content] if isinstance(content, list) else [content]
            texts += [message["role"], message.get("reasoning_content", ""), *parts]
            texts.append(json.dumps(message.get("tool_calls", "")))
    texts += ["tool_declare ## Return of", (ROOT / "README.md").read_text(encoding="utf-8")]
    return re.sub(r"\d", "", "\n".join(texts))


def write_untrained(folder: Path) -> Path:
    """Everything but the weights: configs, vocabulary, template, and links to the code."""
    base = write_tokenizer(folder, num_merges=2000, text=sample_text(), copy_code=False)
    write_model_configs(folder, base, TEXT, VISION)
    link_code(folder)
    return folder


def load_processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


# ------------------------------------------------------------------------------------------------------------ training


class FakeInt4(nn.Module):
    """Weights as int4 will have them, gradients as if they had not been rounded (straight-through).

    By the rule of the export: absmax / 7 in each group of 32 inputs, the scale rounded to bfloat16.
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            values, scale = round_int4(weight)
            rounded = (values * scale.float().unsqueeze(-1)).flatten(-2)
        return weight + (rounded - weight).detach()


def build_for_training(folder: Path) -> KimiK25ForConditionalGeneration:
    """The model with float32 weights, whose experts compute with int4 values."""
    settings = json.loads((folder / "config.json").read_bytes())
    settings["text_config"].pop("quantization_config")
    config = KimiK25Config(**settings, attn_implementation="sdpa")
    model = KimiK25ForConditionalGeneration(config).float()
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        for name in list(experts._parameters):
            parametrize.register_parametrization(experts, name, FakeInt4())
    return model


def other_weights(published: nn.Module, trained: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Every weight but the routed experts', published and in a model built by `build_for_training`."""
    weights = dict(trained.named_parameters())
    for name, parameter in published.named_parameters():
        if not name.endswith(("weight_packed", "weight_scale", "weight_shape")):
            yield parameter, weights[name]


def expert_weights(
    published: nn.Module, trained: nn.Module
) -> Iterator[tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
    """Stacked words and scales of the routed experts as published, and what is trained in their place."""
    weights = dict(trained.named_parameters())
    for name, experts in published.named_modules():
        if isinstance(experts, Experts):
            for projection in experts.shapes:
                words, scale = (
                    getattr(experts, f"{projection}_weight_{part}") for part in ("packed", "scale")
                )
                yield words, scale, weights[f"{name}.parametrizations.{projection}_weight.original"]


@torch.no_grad()
def load_published(model: KimiK25ForConditionalGeneration, folder: Path) -> None:
    """Gives a model built by `build_for_training` the weights in `folder`; its experts begin at their int4 values."""
    published = KimiK25ForConditionalGeneration.from_pretrained(folder)
    for parameter, weight in other_weights(published, model):
        weight.copy_(parameter)
    for words, scale, weight in expert_weights(published, model):
        weight.copy_(dequantize_int4(words, scale, torch.float32))


# ----------------------------------------------------------------------------------------------------------- exporting


def export(model: KimiK25ForConditionalGeneration, folder: Path) -> None:
    """Writes the weights of a model built by `build_for_training` in the published layout: bf16, and int4 experts."""
    settings = json.loads((folder / "config.json").read_bytes())
    published = KimiK25ForConditionalGeneration(KimiK25Config(**settings)).bfloat16()
    with torch.no_grad():
        for parameter, weight in other_weights(published, model):
            parameter.copy_(weight)
        for words, scale, weight in expert_weights(published, model):
            for parameter, values in zip((words, scale), quantize_int4(weight), strict=True):
                parameter.copy_(values)
    partial = folder / "weights.part"
    published.save_pretrained(partial, max_shard_size="4MB")
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for path in partial.glob("model*.safetensors*"):
        path.rename(folder / path.name)
    shutil.rmtree(partial)
