"""What other engines take from this repository: files, names and calls, each rule as its engine goes about it.

kimi-tiny stands for the published folder: the same layout, written by the same code. E-1 to E-26 number
these rules in the names and docstrings of the tests, here and elsewhere; docs/deployment.md says in words what each
engine reads. E-2 to E-5 and E-10 to E-12b are calls on the processors and are tested with these; engines that run on a
CPU are really run in `tests/engines/`.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor

from conftest import ROOT
from kimi.kimi_int4 import dequantize_int4
from kimi.modeling_kimi import KimiK25ForConditionalGeneration

TINY = ROOT / "kimi-tiny"
IMAGE_BLOCK = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
EXPERT = re.compile(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight_(packed|scale|shape)$")


def read(name: str, folder: Path = ROOT) -> dict:
    return json.loads((folder / name).read_bytes())


@pytest.fixture(scope="module", params=["published", "kimi-tiny"])
def config_file(request):
    """config.json of both, as engines read it."""
    return read("config.json", ROOT if request.param == "published" else TINY)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, trust_remote_code=True, use_fast=True)


@pytest.fixture(scope="module")
def names():
    return list(read("model.safetensors.index.json", TINY)["weight_map"])


@pytest.fixture(scope="module")
def tensors():
    """Every tensor of kimi-tiny by name."""
    found = {}
    for file in sorted(TINY.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return found


# ---------------------------------------------------------------------------------------------------- files, for everybody


def test_names_that_registries_look_up(config_file):
    assert config_file["architectures"][0] == "KimiK25ForConditionalGeneration"
    assert config_file["model_type"] == "kimi_k25"
    assert config_file["text_config"]["model_type"] in ("kimi_k2", "deepseek_v3")
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= config_file["auto_map"].keys()


@pytest.mark.parametrize("folder", [ROOT, TINY], ids=["published", "kimi-tiny"])
def test_entry_points_of_processors_and_tokenizer(folder):
    preprocessor = read("preprocessor_config.json", folder)
    assert {"AutoProcessor", "AutoImageProcessor"} <= preprocessor["auto_map"].keys()
    slow, fast = read("tokenizer_config.json", folder)["auto_map"]["AutoTokenizer"]
    assert slow == "tokenization_kimi.TikTokenTokenizer" and fast is None
    assert not (folder / "processor_config.json").exists()  # it would override the other (E-18)
    mandatory = {"patch_size", "merge_kernel_size", "in_patch_limit", "patch_limit_on_one_side"}
    mandatory |= {"image_mean", "image_std", "fixed_output_tokens"}  # E-10, E-18, E-19
    media = preprocessor["media_proc_cfg"]
    assert mandatory <= media.keys() and media["merge_kernel_size"] == 2
    assert {"temporal_merge_kernel_size", "sample_fps", "timestamp_mode"} <= media.keys()


@pytest.mark.parametrize("text", [IMAGE_BLOCK, "<|kimi_k25_video_placeholder|>"])
def test_placeholders_as_text(tokenizer, config_file, text):
    """E-6: what stands for an image in a prompt of plain text; special strings become their ids."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    if text is IMAGE_BLOCK:
        reserved = ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>")
        begin, content, pad, end = map(tokenizer.convert_tokens_to_ids, reserved)
        assert ids[0] == begin and ids[-3:] == [content, pad, end]
    else:
        assert config_file["video_placeholder"] == text


# ---------------------------------------------------------------------------------------------------------------- vLLM


def test_vllm_builds_its_own_configs(config_file):
    """E-1: keywords of its class, a DeepseekV3Config of the text part, the quantization copied to the top."""
    from transformers import DeepseekV3Config

    top = {key: value for key, value in config_file.items() if not key.endswith("_config")}
    wanted = {"ignore_index", "media_placeholder_token_id", "pad_token_id", "use_unified_vision_chunk"}
    assert wanted | {"video_placeholder"} <= top.keys() and top["use_unified_vision_chunk"] is True
    text = DeepseekV3Config(**config_file["text_config"])
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "n_routed_experts", "kv_lora_rank"):
        assert getattr(text, name) == config_file["text_config"][name]
    assert text.quantization_config["quant_method"] == "compressed-tensors"
    assert text.num_nextn_predict_layers == 0  # E-7
    assert config_file.get("logit_scale", 1.0) == 1.0


def test_sizes_at_the_top():
    """E-1: `config.vocab_size` is read for lm_head, `config.hidden_size` for embeddings; E-13: the image token."""
    config = AutoConfig.from_pretrained(TINY, trust_remote_code=True)
    assert config.vocab_size == config.text_config.vocab_size
    assert config.hidden_size == config.text_config.hidden_size
    assert config.media_placeholder_token_id == read("config.json", TINY)["media_placeholder_token_id"]


def vision_sizes(vision: dict) -> tuple[int, ...]:
    """As classes see them that know the un-prefixed names only, with the real model's sizes as defaults (E-20)."""
    defaults = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    }
    return tuple(vision.get(name, default) for name, default in defaults.items())


def test_vision_sizes_without_prefix(config_file):
    vision = config_file["vision_config"]
    prefixed = ("vt_hidden_size", "vt_num_hidden_layers", "vt_num_attention_heads", "vt_intermediate_size")
    assert vision_sizes(vision) == tuple(vision[name] for name in prefixed)


VLLM_RENAMES = (
    ("language_model.lm_head", "lm_head"),
    ("language_model.model", "language_model"),
    ("mm_projector.proj.0", "mm_projector.linear_1"),
    ("mm_projector.proj.2", "mm_projector.linear_2"),
)
FUSED = {"q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
VLLM_MODULES = [
    r"lm_head\.weight",
    r"language_model\.(embed_tokens|norm)\.weight",
    r"language_model\.layers\.\d+\.(input|post_attention)_layernorm\.weight",
    r"language_model\.layers\.\d+\.self_attn\.(fused_qkv_a_proj|q_b_proj|kv_b_proj|o_proj)\.weight",
    r"language_model\.layers\.\d+\.self_attn\.(q_a|kv_a)_layernorm\.weight",
    r"language_model\.layers\.\d+\.mlp\.(shared_experts\.)?(gate_up_proj|down_proj)\.weight",
    r"language_model\.layers\.\d+\.mlp\.gate\.(weight|e_score_correction_bias)",
    r"mm_projector\.(pre_norm|linear_1|linear_2)\.(weight|bias)",
    r"vision_tower\.patch_embed\.(proj\.(weight|bias)|pos_emb\.weight)",
    r"vision_tower\.encoder\.blocks\.\d+\.(norm0|norm1|wqkv|wo|mlp\.fc0|mlp\.fc1)\.(weight|bias)",
    r"vision_tower\.encoder\.final_layernorm\.(weight|bias)",
]


def test_vllm_finds_a_module_for_every_weight(names):
    """E-7: substring renames, fused projections, experts by their numbers; "vision" one to one."""
    for name in names:
        for old, new in VLLM_RENAMES:
            name = name.replace(old, new)
        if EXPERT.search(name):
            assert name.startswith("language_model.layers.")
            continue
        if "vision" not in name and "mm_projector" not in name:
            *path, module, kind = name.split(".")
            name = ".".join([*path, FUSED.get(module, module), kind])
        assert any(re.fullmatch(pattern, name) for pattern in VLLM_MODULES), name


def test_latent_norms_with_an_engines_eps():
    """E-8: some engines take rms_norm_eps for the latent norms; the field reproduces them."""
    config = AutoConfig.from_pretrained(TINY, trust_remote_code=True)
    config.text_config.latent_norm_eps = config.text_config.rms_norm_eps
    with torch.device("meta"):
        model = KimiK25ForConditionalGeneration(config)
    attention = model.language_model.model.layers[1].self_attn
    assert attention.q_a_layernorm.eps == attention.kv_a_layernorm.eps == config.text_config.rms_norm_eps


def test_the_documented_commands_have_the_flags():
    """E-9: options that cannot be seen from the files."""
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    for flag in (
        "--tool-call-parser kimi_k2",
        "--reasoning-parser kimi_k2",
        "--mm-encoder-tp-mode data",
        "--trust-remote-code",
        "--disable-shared-experts-fusion",
        "RAWINT4",
    ):
        assert flag in text


# -------------------------------------------------------------------------------------------------------------- SGLang


def test_sglang_finds_runs_of_image_tokens(processor):
    """E-10, E-13: types and attributes of the processor; one run of pads for each image in decoded text."""
    assert isinstance(processor.image_processor, BaseImageProcessor)
    assert isinstance(processor.media_processor.media_proc_cfg, dict)
    content = [
        {"type": "image", "image": Image.new("RGB", (84, 84))},
        "a",
        {"type": "image", "image": Image.new("RGB", (84, 28))},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True
    )
    runs = re.findall(r"(?:<\|media_pad\|>)+", processor.tokenizer.decode(inputs["input_ids"][0]))
    assert [run.count("<|media_pad|>") for run in runs] == [9, 3]


def test_sglang_finds_a_module_for_every_weight(names):
    """E-14: an unknown name of the tower raises there; all else goes to DeepseekV3ForCausalLM."""
    vision = re.compile(
        r"vision_tower\.(patch_embed\.(proj\.(weight|bias)|pos_emb\.weight)|encoder\.final_layernorm\.(weight|bias)"
        r"|encoder\.blocks\.\d+\.(norm0|norm1|attn\.qkv_proj|attn\.proj|mlp\.fc0|mlp\.fc1)\.(weight|bias))"
    )
    for name in names:
        if name.startswith("vision_tower."):
            name = name.replace("wqkv.", "attn.qkv_proj.").replace("wo.", "attn.proj.")
            assert vision.fullmatch(name), name
        elif name.startswith("mm_projector."):
            name = name.replace("proj.0", "linear_1").replace("proj.2", "linear_2")
            assert re.fullmatch(r"mm_projector\.(pre_norm|linear_1|linear_2)\.(weight|bias)", name), name
        else:
            assert name.removeprefix("language_model.").startswith(("model.", "lm_head.")), name


# ----------------------------------------------------------------------------------------------------------- llama.cpp


# fmt: off
LLAMA_CPP_FIELDS = {
    "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "first_k_dense_replace", "routed_scaling_factor",
    "norm_topk_prob", "scoring_func", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "vocab_size", "rms_norm_eps", "tie_word_embeddings", "quantization_config", "num_key_value_heads",
}
# fmt: on


def test_llama_cpp_reads_its_hyperparameters(config_file):
    """E-15: the sizes of the text part under their published names, and YaRN's numbers."""
    text = config_file["text_config"]
    assert text.keys() >= LLAMA_CPP_FIELDS
    rope = text["rope_scaling"]
    assert rope["type"] == "yarn" and {"factor", "original_max_position_embeddings"} <= rope.keys()
    assert 0.1 * rope["mscale_all_dim"] > 0


def test_llama_cpp_reads_the_vocabulary(tokenizer, config_file):
    """E-16: ranks and special tokens as attributes; ids without a token become [PADi]."""
    ranks, special = tokenizer.model._mergeable_ranks, tokenizer.special_tokens
    assert all(isinstance(token, bytes) for token in ranks) and sorted(ranks.values()) == list(
        range(len(ranks))
    )
    assert not set(ranks.values()) & set(special.values())
    size = read("config.json", TINY)["text_config"]["vocab_size"]
    assert max(special.values()) < size
    by_id = {rank: token for token, rank in ranks.items()} | {i: name for name, i in special.items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    assert len(set(tokens)) == size
    assert not (TINY / "tokenizer.json").exists()  # its hash would have to match as well


def test_llama_cpp_unpacks_the_experts(names, tensors, config_file):
    """E-17: one config group, int32 words, shapes of two entries; every expert of a layer; kv_b splits into k_b and v_b."""
    quantization = config_file["text_config"]["quantization_config"]
    (group,) = quantization["config_groups"].values()
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "pack-quantized"
    assert group["weights"]["strategy"] == "group" and group["weights"]["type"] == "int"
    text = read("config.json", TINY)["text_config"]
    found: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := EXPERT.search(name):
            layer, expert, projection, part = match.groups()
            tensor = tensors[name]
            if part == "packed":
                assert tensor.dtype == torch.int32
                rows, columns = tensors[name.replace("packed", "shape")].tolist()
                assert tensor.shape == (rows, columns // 8)
                found.setdefault((layer, projection), set()).add(int(expert))
            if part == "scale":
                assert tensor.dtype == torch.bfloat16
    moe_layers = text["num_hidden_layers"] - text["first_k_dense_replace"]
    assert len(found) == 3 * moe_layers
    assert all(experts == set(range(text["n_routed_experts"])) for experts in found.values())
    kv_b = tensors["language_model.model.layers.1.self_attn.kv_b_proj.weight"]
    k_b, v_b = kv_b.view(text["num_attention_heads"], -1, text["kv_lora_rank"]).split(
        [text["qk_nope_head_dim"], text["v_head_dim"]], dim=1
    )
    assert k_b.mT.shape[1:] == (text["kv_lora_rank"], text["qk_nope_head_dim"]) and len(v_b) == len(k_b)


def test_llama_cpp_reads_the_vision_sizes(config_file):
    """E-18: un-prefixed names win; the permutation of Q and K takes num_attention_heads, 16 if absent."""
    vision = config_file["vision_config"]
    assert vision.get("num_attention_heads", 16) == vision["vt_num_attention_heads"]
    assert vision["projector_hidden_act"] == "gelu" and vision["projector_ln_eps"] == 1e-5
    assert vision["merge_kernel_size"] == [2, 2] and vision["init_pos_emb_time"] == 4


# ----------------------------------------------------------------------------------------------------------------- MLX


def test_mlx_reads_the_tokenizer(tokenizer):
    """E-19: a padding id, the id of the image token, and a prompt that survives encoding."""
    assert tokenizer.pad_token_id is not None
    pad = tokenizer.convert_tokens_to_ids("<|media_pad|>")
    assert pad == read("config.json", TINY)["media_placeholder_token_id"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_values_whose_defaults_are_another_models_are_written(config_file):
    """E-20, E-22: rope_theta, eps, the image token, untied embeddings."""
    assert config_file["tie_word_embeddings"] is False
    assert "media_placeholder_token_id" in config_file
    assert {"rope_theta", "rms_norm_eps", "rope_scaling", "max_position_embeddings"} <= config_file[
        "text_config"
    ].keys()


def test_mlx_reads_the_packed_words(tensors):
    """E-21: the words as uint32, eight values of 4 bits each from the lowest, scale * value + bias of -8 * scale."""
    name = "language_model.model.layers.2.mlp.experts.3.down_proj.weight_"
    packed, scale = tensors[name + "packed"], tensors[name + "scale"]
    words = packed.numpy().view(np.uint32)
    values = (words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    groups = torch.from_numpy(values.reshape(*scale.shape, 32).astype(np.float32))
    scales = scale.float().unsqueeze(-1)
    theirs = (scales * groups + -8 * scales).flatten(-2)
    assert torch.equal(theirs, dequantize_int4(packed, scale, torch.float32))
    assert tensors[name + "shape"].tolist() == list(theirs.shape)


# -------------------------------------------------------------------------------------------------- transformers' own class


NATIVE_RENAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^mm_projector\.proj\.0", "model.mm_projector.in_proj"),
    (r"^mm_projector\.proj\.2", "model.mm_projector.out_proj"),
    (r"^mm_projector\.pre_norm", "model.mm_projector.pre_norm"),
    (r"^vision_tower\.encoder\.", "model.vision_tower."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"\.blocks\.", ".layers."),
    (r"\.norm1\.", ".norm2."),
    (r"\.norm0\.", ".norm1."),
    (r"\.wo\.", ".attn.proj."),
    (r"\.fc1\.", ".fc2."),
    (r"\.fc0\.", ".fc1."),
)


def test_native_names_are_reached_and_kept_from_the_quantizer(names):
    """E-23, E-24: renamed, every name is new and unique; of these the list of exceptions leaves exactly the experts."""
    ignore = read("config.json")["text_config"]["quantization_config"]["ignore"]
    renamed = []
    for name in names:
        for pattern, new in NATIVE_RENAMES:
            name = re.sub(pattern, new, name)
        assert name.startswith(
            ("model.language_model.", "model.vision_tower.", "model.mm_projector.", "lm_head.")
        )
        assert not re.search(r"\.(blocks|wo|fc0|norm0|encoder)\.", name)
        renamed.append(name)
    assert len(set(renamed)) == len(names)
    linears = {
        name.rpartition(".")[0] for name in renamed if "norm" not in name and "embed_tokens" not in name
    }
    quantized = {name for name in linears if not any(re.match(rule[3:], name) for rule in ignore)}
    assert quantized == {name.rpartition(".")[0] for name in renamed if EXPERT.search(name)}


def test_names_of_inputs_and_class_attributes(processor):
    """E-25, E-26: `grid_thws`; what accelerate and quantizers ask of the class."""
    assert {"pixel_values", "grid_thws"} <= set(processor.model_input_names)
    assert "past_key_values" in KimiK25ForConditionalGeneration._skip_keys_device_placement
    assert (
        KimiK25ForConditionalGeneration._no_split_modules and KimiK25ForConditionalGeneration._supports_sdpa
    )
    assert "e_score_correction_bias" in KimiK25ForConditionalGeneration._keep_in_fp32_modules_strict


# ----------------------------------------------------------------------------------------------------------------- others


def test_tensorrt_llm_reads_the_text_config(config_file, processor, tokenizer):
    """Its stop token is the text part's; its own decoder gives chunks that are split already."""
    assert config_file["text_config"]["eos_token_id"] == config_file["eos_token_id"]
    assert tuple(config_file["vision_config"]["merge_kernel_size"]) == (2, 2)
    media = processor.image_processor.media_proc_cfg
    assert media["temporal_merge_kernel_size"] == 4 and media["sample_fps"] == 2.0
    frames = [Image.new("RGB", (84, 84))] * 4
    medias = [{"type": "image", "image": frames[0]}, {"type": "video_chunk", "video_chunk": frames}]
    out = processor.image_processor.preprocess(medias, return_tensors="pt")
    assert out["grid_thws"].tolist() == [[1, 6, 6], [4, 6, 6]]
    ids = tokenizer(IMAGE_BLOCK, return_tensors="pt")["input_ids"]
    assert ids.shape[0] == 1 and tokenizer.decode(ids[0]) == IMAGE_BLOCK


def test_vllm_loads_the_image_processor_alone():
    """The first entry point of E-2, without a tokenizer."""
    image_processor = AutoImageProcessor.from_pretrained(TINY, trust_remote_code=True)
    assert image_processor.num_frames_per_chunk == 4
    big = {"type": "image", "image": Image.new("RGB", (3000, 3000)), "uuid": "1", "prompt": ""}
    assert image_processor.media_tokens_calculator(big) == int(
        image_processor.preprocess([big])["grid_thws"].prod(-1) // 4
    )


def test_megatron_bridge_reads_attributes():
    """Training fields that inference does not need; the tower's sizes are given to our own classes."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    assert config.text_config.aux_loss_alpha == 0.001
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "media_placeholder_token_id"):
        assert isinstance(getattr(config, name), int)
    assert config.vision_config.vt_hidden_size == config.vision_config.mm_hidden_size == 1152


def test_raw_readers_find_prefix_and_dtypes(names, tensors):
    """KTransformers and Tenstorrent read the folder directly: index, prefix, int32 words and shapes, bf16 scales."""
    experts = [name for name in names if EXPERT.search(name)]
    assert experts and all(name.startswith("language_model.model.") for name in experts)
    kinds = {"packed": torch.int32, "scale": torch.bfloat16, "shape": torch.int32}
    for name in experts:
        assert tensors[name].dtype == kinds[name.rpartition("_")[2]], name
    assert set(tensors) == set(names)
