"""The published model, built on meta: its names, shapes, dtypes and counts, without its 595 GB."""

import math

import pytest
import torch

from kimi import kimi_checkpoint
from kimi.configuration_kimi import KimiK25Config
from kimi.modeling_kimi import KimiK25ForConditionalGeneration

H, V, D, I, E = 7168, 163840, 18432, 2048, 384  # noqa: E741
VISION, INNER = 1152, 4304


def published_tensors() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Every tensor of the published checkpoint, written out from its inventory and not from this code."""
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def add(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        out[name] = shape, dtype

    add("language_model.model.embed_tokens.weight", V, H)
    add("language_model.lm_head.weight", V, H)
    add("language_model.model.norm.weight", H)
    for layer in range(61):
        at = f"language_model.model.layers.{layer}."
        add(at + "input_layernorm.weight", H)
        add(at + "post_attention_layernorm.weight", H)
        add(at + "self_attn.q_a_proj.weight", 1536, H)
        add(at + "self_attn.q_a_layernorm.weight", 1536)
        add(at + "self_attn.q_b_proj.weight", 12288, 1536)
        add(at + "self_attn.kv_a_proj_with_mqa.weight", 576, H)
        add(at + "self_attn.kv_a_layernorm.weight", 512)
        add(at + "self_attn.kv_b_proj.weight", 16384, 512)
        add(at + "self_attn.o_proj.weight", H, 8192)
        mlps = [("mlp.", D)] if layer == 0 else [("mlp.shared_experts.", I)]
        for mlp, inner in mlps:
            add(at + mlp + "gate_proj.weight", inner, H)
            add(at + mlp + "up_proj.weight", inner, H)
            add(at + mlp + "down_proj.weight", H, inner)
        if layer == 0:
            continue
        add(at + "mlp.gate.weight", E, H)
        add(at + "mlp.gate.e_score_correction_bias", E, dtype=torch.float32)
        for expert in range(E):
            for projection, rows, columns in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
                matrix = f"{at}mlp.experts.{expert}.{projection}."
                add(matrix + "weight_packed", rows, columns // 8, dtype=torch.int32)
                add(matrix + "weight_scale", rows, columns // 32)
                add(matrix + "weight_shape", 2, dtype=torch.int32)
    add("vision_tower.patch_embed.proj.weight", VISION, 3, 14, 14)
    add("vision_tower.patch_embed.proj.bias", VISION)
    add("vision_tower.patch_embed.pos_emb.weight", 64, 64, VISION)
    for block in range(27):
        at = f"vision_tower.encoder.blocks.{block}."
        for name, *shape in (
            ("wqkv", 3 * VISION, VISION),
            ("wo", VISION, VISION),
            ("mlp.fc0", INNER, VISION),
            ("mlp.fc1", VISION, INNER),
        ):
            add(f"{at}{name}.weight", *shape)
            add(f"{at}{name}.bias", shape[0])
        for norm in ("norm0", "norm1"):
            add(f"{at}{norm}.weight", VISION)
            add(f"{at}{norm}.bias", VISION)
    for norm in ("vision_tower.encoder.final_layernorm", "mm_projector.pre_norm"):
        add(f"{norm}.weight", VISION)
        add(f"{norm}.bias", VISION)
    add("mm_projector.proj.0.weight", 4608, 4608)
    add("mm_projector.proj.0.bias", 4608)
    add("mm_projector.proj.2.weight", H, 4608)
    add("mm_projector.proj.2.bias", H)
    return out


@pytest.fixture(scope="module")
def built() -> KimiK25ForConditionalGeneration:
    with torch.device("meta"):
        return KimiK25ForConditionalGeneration._from_config(KimiK25Config(), dtype=torch.bfloat16)


def test_inventory_adds_up_to_the_published_totals():
    tensors = published_tensors()
    assert len(tensors) == 208_550
    assert sum(math.prod(shape) for shape, _ in tensors.values()) == 170_738_182_128
    assert sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values()) == 595_148_192_736


def test_experts_are_no_modules_of_their_own(built):
    """23,040 experts as modules, and their 207,360 tensors as parameters, take minutes to build and to walk through."""
    assert len(list(built.modules())) < 61 * 30 and len(list(built.parameters())) < 61 * 40
    assert {p.device.type for p in built.parameters()} == {"meta"}


def test_state_dict_is_exactly_the_published_one(built):
    state = built.state_dict()
    got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    want = published_tensors()
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())[:5]
    wrong = [(name, got[name], want[name]) for name in want if got[name] != want[name]]
    assert not wrong, wrong[:5]
    tensors = kimi_checkpoint.published_tensors(built)
    assert list(tensors) == list(state)
    assert all(tensor.shape == want[name][0] for name, tensor in tensors.items())


def test_parameters_are_counted_as_logical_weights(built):
    model = built
    assert model.num_parameters() == 1_026_879_376_368
    assert sum(p.numel() for p in model.vision_tower.parameters()) == 416_866_032
    assert sum(p.numel() for p in model.mm_projector.parameters()) == 54_277_888
    assert model.num_parameters(exclude_embeddings=True) == 1_026_879_376_368 - V * H
    assert model.get_memory_footprint() == 595_148_192_736
