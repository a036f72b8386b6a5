"""Small models that the tests share: the golden toy, and a seeded int4 one with every kind of tensor."""

import json
import zlib
from types import ModuleType

import numpy as np
import pytest
import torch
from packaging.version import Version

from conftest import DATA
from kimi.configuration_kimi import PUBLISHED_QUANTIZATION, KimiK25Config
from kimi.modeling_kimi import KimiK25ForConditionalGeneration

LM_GOLDEN = json.loads((DATA / "lm_golden.json").read_bytes())

SMALL_VISION = {
    "vt_hidden_size": 32,
    "vt_num_hidden_layers": 2,
    "vt_num_attention_heads": 2,
    "vt_intermediate_size": 48,
    "init_pos_emb_height": 8,
    "init_pos_emb_width": 8,
}
SMALL_TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 4096,
    "bos_token_id": 64,
    "eos_token_id": 66,
    "pad_token_id": 319,
}


def small_config(packed: bool = True, text: dict | None = None, vision: dict | None = None) -> KimiK25Config:
    text = {**SMALL_TEXT, **(text or {})}
    if packed:
        text["quantization_config"] = PUBLISHED_QUANTIZATION
    vision = {**SMALL_VISION, "text_hidden_size": text["hidden_size"], **(vision or {})}
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return KimiK25Config(
        text_config=text,
        vision_config=vision,
        media_placeholder_token_id=85,
        architectures=["KimiK25ForConditionalGeneration"],
        **ids,
    )


def lcg_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """The golden file's weights: a linear congruential generator seeded by the name, see its key `weights`."""
    state, values = zlib.crc32(name.encode()), []
    for _ in range(shape.numel()):
        state = (1664525 * state + 1013904223) % 2**32
        values.append((state >> 8) / 2**24 - 0.5)
    u = torch.tensor(values, dtype=torch.float64).view(shape)
    if "norm" in name:
        u = 1 + 0.2 * u
    elif name.endswith("e_score_correction_bias"):
        u = 0.6 * u
    else:
        u = u * 2.4 / shape[-1] ** 0.5
    return u.float()


def golden_model(attn_implementation: str = "eager", **text: object) -> KimiK25ForConditionalGeneration:
    """The toy of lm_golden.json in fp32, dense experts."""
    text = {**LM_GOLDEN["config"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **text}
    vision = {**SMALL_VISION, "text_hidden_size": text["hidden_size"]}
    config = KimiK25Config(text_config=text, vision_config=vision, media_placeholder_token_id=47)
    config._attn_implementation = attn_implementation
    # No id: all 48 of the toy are text, in prompts and in what it generates.
    config.media_placeholder_token_id = -1
    model = KimiK25ForConditionalGeneration(config).float().eval()
    weights = {
        name: lcg_tensor(name.removeprefix("language_model."), tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith("language_model.")
    }
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def assert_close(got: torch.Tensor, want: torch.Tensor, atol: float, why: str) -> None:
    """Close within `atol`; on failure prints the largest and the mean difference and the tolerance's reason."""
    difference = (got.double() - want.double()).abs()
    assert difference.max() <= atol, (
        f"max {difference.max():.3g} mean {difference.mean():.3g} > {atol:g} in {got.dtype}: {why}"
    )


def skip_unless_interpretable(kernels: ModuleType) -> None:
    """Triton 3.6's interpreter asks numpy for int(array of one element), which numpy 2.4 refuses."""
    triton = pytest.importorskip("triton")
    if not kernels.INTERPRETED:
        pytest.skip("kernels are interpreted when they are chosen: pytest -m kernels")
    if Version(np.__version__) >= Version("2.4") and Version(triton.__version__) < Version("3.7"):
        pytest.skip(f"triton {triton.__version__} cannot interpret with numpy {np.__version__}: needs < 2.4")
