"""Fields, both rope spellings, round trips, and a sentence for every contradiction."""

import copy
import json

import pytest
from transformers import AutoConfig

from conftest import ROOT
from kimi.configuration_kimi import (
    PUBLISHED_QUANTIZATION,
    KimiK25Config,
    KimiK25TextConfig,
    KimiK25VisionConfig,
)

FILE = json.loads((ROOT / "config.json").read_bytes())
YARN = {"factor": 64.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
YARN.update(mscale=1.0, mscale_all_dim=1.0)


def differences(a: dict, b: dict, path: str = "") -> set[str]:
    out = set()
    for key in a.keys() | b.keys():
        left, right = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(left, dict) and isinstance(right, dict):
            out |= differences(left, right, f"{path}{key}.")
        elif left != right:
            out.add(path + key)
    return out


def test_the_file_is_what_the_defaults_say():
    read, default = KimiK25Config(**copy.deepcopy(FILE)), KimiK25Config()
    told_only_by_the_file = {"architectures", "auto_map", "dtype", "transformers_version"}
    told_only_by_the_file |= {
        f"text_config.{n}" for n in ("architectures", "dtype", "aux_loss_alpha", "seq_aux")
    }
    told_only_by_the_file |= {"text_config.ep_size", "text_config.pretraining_tp"}
    assert differences(read.to_diff_dict(), default.to_diff_dict()) <= told_only_by_the_file


def test_save_writes_every_field_back_where_it_was(tmp_path):
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_bytes())
    new = {"transformers_version", "text_config.latent_norm_eps", "vision_config.model_type"}
    new.add("vision_config._attn_implementation")  # a wish for flash-attn that is not passed on
    assert differences(FILE, saved) == new
    assert list(saved["text_config"]).count("quantization_config") == 1 and "quantization_config" not in saved
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert differences(config.to_dict(), again.to_dict()) <= {"_name_or_path"}


def test_quantizers_of_transformers_see_nothing():
    config = KimiK25Config(**copy.deepcopy(FILE))
    assert not hasattr(config, "quantization_config")
    assert not hasattr(config.text_config, "quantization_config")
    assert config.text_config.expert_quantization == PUBLISHED_QUANTIZATION


def test_quantization_given_on_top_is_written_on_top():
    file = copy.deepcopy(FILE)
    file["quantization_config"] = file["text_config"].pop("quantization_config")
    config = KimiK25Config(**file)
    assert config.text_config.expert_quantization == PUBLISHED_QUANTIZATION
    for written in (config.to_dict(), config.to_diff_dict()):
        assert written["quantization_config"] == PUBLISHED_QUANTIZATION
        assert "quantization_config" not in written["text_config"]


def test_safe_ignore_list_matches_remote_and_native_names_but_no_expert():
    import re

    def ignored(name: str) -> bool:
        return any(re.match(entry.removeprefix("re:"), name) for entry in PUBLISHED_QUANTIZATION["ignore"])

    for name in (
        "language_model.lm_head",
        "lm_head",
        "vision_tower.encoder.blocks.0.wqkv",
        "model.vision_tower.layers.0.attn.q_proj",
        "model.mm_projector.in_proj",
        "mm_projector.proj.0",
        "language_model.model.layers.0.mlp.gate_proj",
        "language_model.model.layers.3.mlp.gate",
        "language_model.model.layers.3.mlp.shared_experts.up_proj",
        "model.language_model.layers.3.self_attn.kv_b_proj",
    ):
        assert ignored(name), name
    assert not ignored("language_model.model.layers.3.mlp.experts.17.gate_proj")
    assert not ignored("model.language_model.layers.3.mlp.experts.17.down_proj")


def test_both_rope_spellings_are_one():
    old = KimiK25TextConfig(rope_theta=50000.0, rope_scaling={"type": "yarn", **YARN})
    new = KimiK25TextConfig(
        rope_parameters={"rope_theta": 50000.0, "rope_type": "yarn", "type": "yarn", **YARN}
    )
    both = KimiK25TextConfig(
        rope_theta=50000.0, rope_scaling={"rope_type": "yarn", **YARN}, rope_parameters=None
    )
    assert (
        old.rope_parameters
        == new.rope_parameters
        == both.rope_parameters
        == KimiK25TextConfig().rope_parameters
    )
    assert new.rope_theta == 50000.0 and new.rope_scaling == {"type": "yarn", **YARN}
    plain = KimiK25TextConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    assert plain.rope_scaling is None and plain.rope_theta == 1e4


def test_generation_defaults_of_an_old_release_do_not_reach_generate():
    config = KimiK25Config(text_config={"max_length": 20, "top_k": 50, "num_beams": 3})
    assert getattr(config.text_config, "max_length", 20) == 20  # 4.57's own class default, not a setting
    assert "num_beams" not in config.text_config.to_diff_dict()
    assert getattr(config.text_config, "num_beams", 1) == 1


def test_moe_layers():
    config = KimiK25TextConfig(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert [config.is_moe_layer(i) for i in range(6)] == [False, False, True, False, True, False]


def weights(**changes) -> dict:
    quantization = copy.deepcopy(PUBLISHED_QUANTIZATION)
    quantization["config_groups"]["group_0"]["weights"].update(changes)
    return {"quantization_config": quantization}


CONTRADICTIONS = [
    (dict(n_group=5), "n_routed_experts 384 cannot be split into n_group 5"),
    (dict(n_group=8, topk_group=9), "topk_group 9 must lie between 1 and n_group 8"),
    (dict(n_routed_experts=8, n_group=8, topk_group=4), "leaves 1 in each"),
    (dict(n_routed_experts=16, n_group=8, topk_group=2), "num_experts_per_tok 8 exceeds the 4 experts"),
    (dict(scoring_func="softmax"), 'scoring_func "softmax" is unknown'),
    (dict(num_key_value_heads=8), "num_key_value_heads is 8 but num_attention_heads is 64"),
    (dict(head_dim=100), "head_dim 100 is neither qk_rope_head_dim 64"),
    (dict(qk_rope_head_dim=63), "qk_rope_head_dim must be even, got 63"),
    (dict(hidden_act="gelu"), 'hidden_act "gelu" is unknown'),
    (dict(attention_bias=True), "attention_bias is true"),
    (dict(num_nextn_predict_layers=1), "num_nextn_predict_layers is 1"),
    (dict(vocab_size=0), "vocab_size must be positive, got 0"),
    (weights(group_size=128), "weights.group_size 128, but only 32 can be run"),
    (weights(num_bits=8), "weights.num_bits 8, but only 4 can be run"),
    (weights(symmetric=False), "weights.symmetric False, but only True"),
    (weights(actorder="group"), "actorder 'group'"),
    (dict(quantization_config={"quant_method": "gptq"}), 'quant_method "gptq"'),
    (
        {"moe_intermediate_size": 72, **weights()},
        "moe_intermediate_size 72 is not a multiple of .* group_size 32",
    ),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), 'rope type "linear" is unknown'),
    (dict(rope_scaling={"type": "yarn", "rope_type": "linear", **YARN}), "name different scalings"),
    (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "lacks original_max_position_embeddings"),
    (
        dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e4, "rope_type": "default"}),
        "rope_theta 10000.0 contradicts",
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_contradictions_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        KimiK25TextConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(mm_projector_type="mlp"), "vision_config.mm_projector_type 'mlp' is unknown"),
        (dict(merge_type="sd3"), "vision_config.merge_type 'sd3' is unknown"),
        (dict(merge_kernel_size=[4, 4]), r"merge_kernel_size \[4, 4\] is unknown"),
        (
            dict(vt_hidden_size=100, vt_num_attention_heads=3),
            "vt_hidden_size 100 over vt_num_attention_heads 3",
        ),
        (
            dict(hidden_size=1024),
            "vision_config.hidden_size 1024 contradicts vision_config.vt_hidden_size 1152",
        ),
        (dict(mm_hidden_size=7168), "mm_hidden_size 7168 differs from vt_hidden_size 1152"),
    ],
)
def test_vision_contradictions_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        KimiK25VisionConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            dict(vision_config={"text_hidden_size": 4096}),
            "text_hidden_size 4096 differs from text_config.hidden_size 7168",
        ),
        (
            dict(media_placeholder_token_id=163840),
            "media_placeholder_token_id 163840 lies outside vocab_size 163840",
        ),
        (dict(tie_word_embeddings=True), "contradicts text_config.tie_word_embeddings"),
    ],
)
def test_top_level_contradictions_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        KimiK25Config(**fields)


def test_generation_config_is_the_model_cards():
    generation = json.loads((ROOT / "generation_config.json").read_bytes())
    assert generation["eos_token_id"] == [163586, 163585] and generation["pad_token_id"] == 163839
    assert generation["do_sample"] and generation["temperature"] == 1.0 and generation["top_p"] == 0.95
