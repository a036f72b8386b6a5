"""Configuration of Kimi K2.7 Code: every field of `config.json`, with its unit and where it acts. No torch here.

Three classes, nested as in the file:

    KimiK25Config                 model_type "kimi_k25": special token ids, placeholders
      .text_config                KimiK25TextConfig    "kimi_k2": DeepSeek-V3 style decoder (MLA + MoE)
      .vision_config              KimiK25VisionConfig  MoonViT and the projector

Field names are the published ones; each is read once and has one spelling in Python. Three fields need care:

* Rope. transformers 4.57 writes `rope_theta` beside `rope_scaling` (key `type`); 5.x writes one `rope_parameters`
  (keys `rope_theta` and `rope_type`). Both are read into `rope_parameters`; the 4.57 style is written, because the
  other engines read that.
* `quantization_config`. The experts' int4 is read by our own code (`kimi_int4.py`). transformers, seeing an attribute of
  this name, would start its compressed-tensors quantizer, which expands every expert to bf16: 2 TB. The dict
  is therefore kept in `text_config.expert_quantization` and is written back to the place it was read from.
* `dtype`. Without `dtype=` transformers 4.57 loads float32; `modeling_kimi.py` asks for "auto" instead, which
  is the dtype in the file, bfloat16.

Two settings choose how the model computes, not what: `mla_path` and `int4_backend`. They are given as keywords (also of
`from_pretrained`) or environment variables (`KIMI_MLA_PATH`, `KIMI_INT4_BACKEND`) and never written to `config.json`.

A config that contradicts itself is rejected here with an error that names the fields and their values.
"""

import copy
import inspect
import os
from typing import Any

from transformers import PretrainedConfig

# The one published way of packing: compressed-tensors "pack-quantized", symmetric int4 in groups of 32 inputs.
# `ignore` is our own list: published ones lack `language_model.lm_head`, the router `mlp.gate`, or the vision
# tower under the names of the native port, whose weights a loader then believes to be packed.
PUBLISHED_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "actorder": None,
                "block_structure": None,
                "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
    "ignore": [
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        "re:.*lm_head.*",
        "re:.*vision_tower.*",
        "re:.*mm_projector.*",
        r"re:.*mlp\.gate$",
    ],
}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


class Choice:
    """A run-time setting of a config: one of `options`, "auto" unless it is set or the environment variable is."""

    def __init__(self, variable: str, *options: str):
        self.variable, self.options = variable, ("auto", *options)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.field = name, f"_{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else instance.__dict__[self.field]

    def __set__(self, instance: Any, value: str | None) -> None:
        value = value or os.environ.get(self.variable) or "auto"
        _require(
            value in self.options,
            f'{self.name} (or {self.variable}) is "{value}"; it is one of {", ".join(self.options)}.',
        )
        instance.__dict__[self.field] = value


class _ExplicitConfig(PretrainedConfig):
    """Writes every field of its own signature, also those that equal a default.

    transformers leaves out what equals its defaults, but other engines have other defaults (for one,
    `tie_word_embeddings` is true in native 5.x), so every field is written.
    """

    def to_diff_dict(self) -> dict[str, Any]:
        diff, full = super().to_diff_dict(), self.to_dict()
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and name in full:
                diff[name] = full[name]
        diff.update({name: getattr(self, name).to_diff_dict() for name in self.sub_configs})
        for name in self.sub_configs:
            diff[name].pop("transformers_version", None)
        return diff


class KimiK25TextConfig(_ExplicitConfig):
    """The decoder. Sizes are counts of features unless said otherwise; defaults are the published model's.

    Args:
        vocab_size: rows of `embed_tokens` and `lm_head`; 163,584 BPE ranks and 256 reserved ids.
        hidden_size: width of the residual stream.
        num_hidden_layers: layer l is dense if `l < first_k_dense_replace` or `l % moe_layer_freq != 0`, else MoE.
        intermediate_size, moe_intermediate_size: inner width of the dense MLP, and of one routed expert. The shared
            expert is one MLP of `n_shared_experts * moe_intermediate_size`.
        n_routed_experts, num_experts_per_tok: experts of a layer, and how many of them each token is routed to.
        n_group, topk_group: experts are split into `n_group` groups of which the `topk_group` best stay eligible.
        routed_scaling_factor: factor on the routing weights, after `norm_topk_prob` has made them sum to one.
        q_lora_rank, kv_lora_rank: ranks of the query and of the key-value latent; the latter is what is cached.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: per head: unrotated and rotated part of q and k, and v.
        rms_norm_eps: eps of the layer norms.
        latent_norm_eps: eps of `q_a_layernorm` and `kv_a_layernorm`. The published remote code leaves it at the class
            default of 1e-6; vLLM, TensorRT-LLM and llama.cpp use `rms_norm_eps` (1e-5). We follow the published code.
        rope_theta, rope_scaling: rotary base and YaRN block, 4.57 style. `rope_parameters`: the same, 5.x style.
        max_position_embeddings: longest context in tokens.
        expert_quantization / quantization_config: the compressed-tensors block; None means dense experts.
        mla_path: how attention runs, "auto", "expand", or "absorb" ("absorb-eager", "absorb-sdpa", "absorb-cpu", "absorb-triton").
        int4_backend: what multiplies packed experts, "auto", "reference", "cpu" or "triton".
    """

    model_type = "kimi_k2"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ("past_key_values",)
    mla_path = Choice(
        "KIMI_MLA_PATH", "expand", "absorb", "absorb-eager", "absorb-sdpa", "absorb-cpu", "absorb-triton"
    )
    int4_backend = Choice("KIMI_INT4_BACKEND", "reference", "cpu", "triton")
    choices = ("mla_path", "int4_backend")

    def __init__(
        self,
        *,
        vocab_size: int = 163840,
        hidden_size: int = 7168,
        intermediate_size: int = 18432,
        moe_intermediate_size: int = 2048,
        num_hidden_layers: int = 61,
        first_k_dense_replace: int = 1,
        moe_layer_freq: int = 1,
        num_attention_heads: int = 64,
        num_key_value_heads: int | None = None,
        q_lora_rank: int = 1536,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        n_routed_experts: int = 384,
        num_experts_per_tok: int = 8,
        n_shared_experts: int = 1,
        n_group: int = 1,
        topk_group: int = 1,
        topk_method: str = "noaux_tc",
        scoring_func: str = "sigmoid",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 2.827,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        latent_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 262144,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        num_nextn_predict_layers: int = 0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int = 163584,
        eos_token_id: int | list[int] = 163586,
        pad_token_id: int = 163839,
        quantization_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        # The published text_config carries generation defaults of an old release (max_length 20, top_k 50, ...).
        # They have no effect here, and 4.57 would hand them to generate(); 5.x drops them by itself.
        for name in getattr(PretrainedConfig, "_get_global_generation_defaults", dict)():
            kwargs.pop(name, None)
        for name in self.choices:
            setattr(self, name, kwargs.pop(name, None))
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.first_k_dense_replace = first_k_dense_replace
        self.moe_layer_freq = moe_layer_freq
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_shared_experts = n_shared_experts
        self.n_group = n_group
        self.topk_group = topk_group
        self.topk_method = topk_method
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.latent_norm_eps = latent_norm_eps
        self.rope_parameters = _merge_rope(rope_parameters, rope_scaling, rope_theta)
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.num_nextn_predict_layers = num_nextn_predict_layers
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.expert_quantization = copy.deepcopy(quantization_config)
        self._validate()

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return self.rope_parameters["rope_theta"]

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The YaRN block as 4.57 writes it: key `type`, no `rope_theta`; None without scaling."""
        block = {k: v for k, v in self.rope_parameters.items() if k not in ("rope_theta", "rope_type")}
        return {"type": "yarn", **block} if self.rope_parameters["rope_type"] == "yarn" else None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe_layer(self, layer_idx: int) -> bool:
        return layer_idx >= self.first_k_dense_replace and layer_idx % self.moe_layer_freq == 0

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for name in ("rope_parameters", *(f"_{choice}" for choice in self.choices)):
            output.pop(name, None)
        output["rope_theta"], output["rope_scaling"] = self.rope_theta, self.rope_scaling
        quantization = output.pop("expert_quantization", None)
        if quantization is not None:
            output["quantization_config"] = quantization
        return output

    def _validate(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}.")
        _require(
            self.num_key_value_heads == self.num_attention_heads,
            f"num_key_value_heads is {self.num_key_value_heads} but num_attention_heads is {self.num_attention_heads};"
            " latent attention has one key-value head for each query head.",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}."
        )
        given_head_dim = self.__dict__.get("head_dim")
        _require(
            given_head_dim in (None, self.qk_rope_head_dim, self.qk_head_dim),
            f"head_dim {given_head_dim} is neither qk_rope_head_dim {self.qk_rope_head_dim} nor qk_nope_head_dim +"
            f" qk_rope_head_dim = {self.qk_head_dim}; leave it out.",
        )
        _require(
            self.hidden_act == "silu",
            f'hidden_act "{self.hidden_act}" is unknown to this model; it is "silu".',
        )
        _require(
            not self.attention_bias, "attention_bias is true, but no published Kimi K2 layer has a bias."
        )
        _require(
            not self.num_nextn_predict_layers,
            f"num_nextn_predict_layers is {self.num_nextn_predict_layers}; Kimi K2 has no multi-token prediction"
            " layers, set it to 0.",
        )
        self._validate_routing()
        _validate_quantization(self.expert_quantization, self.hidden_size, self.moe_intermediate_size)

    def _validate_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_group
        _require(
            self.topk_method == "noaux_tc" and self.scoring_func == "sigmoid",
            f'topk_method "{self.topk_method}" with scoring_func "{self.scoring_func}" is unknown; Kimi K2 routes by'
            ' "noaux_tc" on "sigmoid" scores.',
        )
        _require(
            groups >= 1 and experts % groups == 0,
            f"n_routed_experts {experts} cannot be split into n_group {groups} equal groups.",
        )
        _require(
            1 <= self.topk_group <= groups,
            f"topk_group {self.topk_group} must lie between 1 and n_group {groups}.",
        )
        _require(
            experts // groups >= 2,
            f"a group's score is the sum of its two best experts, but n_routed_experts {experts} / n_group {groups}"
            f" leaves {experts // groups} in each.",
        )
        eligible = experts // groups * self.topk_group
        _require(
            1 <= self.num_experts_per_tok <= eligible,
            f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {eligible} experts that topk_group"
            f" {self.topk_group} of n_group {groups} leaves eligible (n_routed_experts {experts}).",
        )


class KimiK25VisionConfig(_ExplicitConfig):
    """MoonViT and the projector. `vt_*` are the tower's sizes.

    Some engines read these sizes without the prefix (`hidden_size`, `num_attention_heads`, ...); a file may carry both
    spellings, which must then agree.

    Args:
        patch_size: side of a square patch in pixels.
        init_pos_emb_height, init_pos_emb_width: learned position grid, in patches.
        init_pos_emb_time: maximum number of frames of an item.
        merge_kernel_size: rows and columns of patches that make one token.
        mm_hidden_size: width entering the projector (the tower's, not the text's).
        text_hidden_size: width leaving it.
    """

    model_type = "kimi_k25_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        *,
        patch_size: int = 14,
        init_pos_emb_height: int = 64,
        init_pos_emb_width: int = 64,
        init_pos_emb_time: int = 4,
        pos_emb_type: str = "divided_fixed",
        vt_hidden_size: int = 1152,
        vt_num_hidden_layers: int = 27,
        vt_num_attention_heads: int = 16,
        vt_intermediate_size: int = 4304,
        merge_kernel_size: list[int] | tuple[int, int] | int = (2, 2),
        merge_type: str = "sd2_tpool",
        video_attn_type: str = "spatial_temporal",
        mm_projector_type: str = "patchmerger",
        mm_hidden_size: int | None = None,
        text_hidden_size: int = 7168,
        projector_ln_eps: float = 1e-5,
        projector_hidden_act: str = "gelu",
        **kwargs: Any,
    ):
        # The published file asks for flash_attention_2, which would make flash-attn a requirement.
        kwargs.pop("_attn_implementation", None)
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.init_pos_emb_height = init_pos_emb_height
        self.init_pos_emb_width = init_pos_emb_width
        self.init_pos_emb_time = init_pos_emb_time
        self.pos_emb_type = pos_emb_type
        self.vt_hidden_size = vt_hidden_size
        self.vt_num_hidden_layers = vt_num_hidden_layers
        self.vt_num_attention_heads = vt_num_attention_heads
        self.vt_intermediate_size = vt_intermediate_size
        if isinstance(merge_kernel_size, int):
            merge_kernel_size = (merge_kernel_size, merge_kernel_size)
        self.merge_kernel_size = list(merge_kernel_size)
        self.merge_type = merge_type
        self.video_attn_type = video_attn_type
        self.mm_projector_type = mm_projector_type
        self.mm_hidden_size = vt_hidden_size if mm_hidden_size is None else mm_hidden_size
        self.text_hidden_size = text_hidden_size
        self.projector_ln_eps = projector_ln_eps
        self.projector_hidden_act = projector_hidden_act
        self._validate()

    def _validate(self) -> None:
        known = {
            "pos_emb_type": "divided_fixed",
            "merge_type": "sd2_tpool",
            "video_attn_type": "spatial_temporal",
            "mm_projector_type": "patchmerger",
            "projector_hidden_act": "gelu",
            "merge_kernel_size": [2, 2],
        }
        for name, value in known.items():
            _require(
                getattr(self, name) == value,
                f"vision_config.{name} {getattr(self, name)!r} is unknown; every Kimi K2.x checkpoint has {value!r}.",
            )
        for plain in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            own, other = getattr(self, f"vt_{plain}"), self.__dict__.get(plain)
            _require(
                other in (None, own),
                f"vision_config.{plain} {other} contradicts vision_config.vt_{plain} {own}.",
            )
        width, heads = self.vt_hidden_size, self.vt_num_attention_heads
        _require(
            width % heads == 0 and (width // heads) % 4 == 0,
            f"vision_config.vt_hidden_size {width} over vt_num_attention_heads {heads} must give a head size that is"
            " a multiple of 4, for the rotation by row and column.",
        )
        _require(
            self.mm_hidden_size == width,
            f"vision_config.mm_hidden_size {self.mm_hidden_size} differs from vt_hidden_size {width}, which enters the"
            " projector.",
        )


class KimiK25Config(_ExplicitConfig):
    """The whole model: text, vision and the token ids that tie them together.

    Args:
        text_config, vision_config: dicts or config objects; None gives the published model's.
        media_placeholder_token_id: id of `<|media_pad|>`, one for each vision token.
        video_placeholder: text in a rendered prompt that the processor replaces by the prompts of a video's chunks.
        use_unified_vision_chunk: read by vLLM: images and videos are one modality.
        ignore_index: label value without a loss.
    """

    model_type = "kimi_k25"
    sub_configs = {"text_config": KimiK25TextConfig, "vision_config": KimiK25VisionConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        *,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        media_placeholder_token_id: int = 163605,
        video_placeholder: str = "<|kimi_k25_video_placeholder|>",
        use_unified_vision_chunk: bool = True,
        ignore_index: int = -100,
        bos_token_id: int = 163584,
        eos_token_id: int | list[int] = 163586,
        pad_token_id: int = 163839,
        tie_word_embeddings: bool = False,
        quantization_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        # A text_config without a quantization block means dense experts; the published model's are int4.
        text = (
            _as_dict(text_config)
            if text_config is not None
            else {"quantization_config": PUBLISHED_QUANTIZATION}
        )
        # The dict is written back where it was read; vLLM and SGLang put an equal copy at the top level.
        self._quantization_on_top = (
            quantization_config is not None and text.get("quantization_config") is None
        )
        if self._quantization_on_top:
            text["quantization_config"] = quantization_config
        self.text_config = KimiK25TextConfig(**text)
        self.vision_config = KimiK25VisionConfig(**_as_dict(vision_config))
        for name in self.text_config.choices:
            if kwargs.get(name) is not None:
                setattr(self, name, kwargs[name])
            kwargs.pop(name, None)
        # Before super().__init__: it hands attn_implementation down to the sub-configs.
        super().__init__(**kwargs)
        self.media_placeholder_token_id = media_placeholder_token_id
        self.video_placeholder = video_placeholder
        self.use_unified_vision_chunk = use_unified_vision_chunk
        self.ignore_index = ignore_index
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._validate()

    @property
    def mla_path(self) -> str:
        return self.text_config.mla_path

    @mla_path.setter
    def mla_path(self, value: str) -> None:
        self.text_config.mla_path = value

    @property
    def int4_backend(self) -> str:
        return self.text_config.int4_backend

    @int4_backend.setter
    def int4_backend(self, value: str) -> None:
        self.text_config.int4_backend = value

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        on_top = output.pop("_quantization_on_top", False)
        if on_top and "quantization_config" in output.get("text_config", {}):
            output["quantization_config"] = output["text_config"].pop("quantization_config")
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        diff = super().to_diff_dict()
        if self._quantization_on_top:
            diff["text_config"].pop("quantization_config", None)
        return diff

    def _validate(self) -> None:
        text, vision = self.text_config, self.vision_config
        _require(
            vision.text_hidden_size == text.hidden_size,
            f"vision_config.text_hidden_size {vision.text_hidden_size} differs from text_config.hidden_size"
            f" {text.hidden_size}; the projector's output takes the place of embeddings.",
        )
        _require(
            self.tie_word_embeddings == text.tie_word_embeddings,
            f"tie_word_embeddings {self.tie_word_embeddings} contradicts text_config.tie_word_embeddings"
            f" {text.tie_word_embeddings}.",
        )
        _require(
            not self.tie_word_embeddings, "tie_word_embeddings is true, but Kimi K2 has its own lm_head."
        )
        _require(
            0 <= self.media_placeholder_token_id < text.vocab_size,
            f"media_placeholder_token_id {self.media_placeholder_token_id} lies outside vocab_size {text.vocab_size}.",
        )


def _as_dict(config: dict[str, Any] | PretrainedConfig | None) -> dict[str, Any]:
    """A fresh dict of a sub-config, whatever form it was given in; None gives the defaults."""
    if config is None:
        return {}
    if isinstance(config, dict):
        return copy.deepcopy(config)
    output = config.to_dict()
    output["attn_implementation"] = config._attn_implementation
    output.update({name: getattr(config, name) for name in getattr(config, "choices", ())})
    return output


def _merge_rope(
    parameters: dict[str, Any] | None, scaling: dict[str, Any] | None, theta: float | None
) -> dict[str, Any]:
    """One 5.x-style rope dict from either spelling, keys `rope_theta`, `rope_type` and the YaRN numbers."""
    published = {
        "rope_type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    if parameters is None and scaling is None:
        parameters = published
    merged = {**(scaling or {}), **(parameters or {})}
    kinds = {merged[key] for key in ("rope_type", "type") if key in merged}
    _require(len(kinds) <= 1, f"rope_type and type name different scalings: {sorted(kinds)}.")
    merged["rope_type"] = kinds.pop() if kinds else "default"
    merged.pop("type", None)
    _require(
        merged["rope_type"] in ("yarn", "default"),
        f'rope type "{merged["rope_type"]}" is unknown to this model; it is "yarn" (or "default" for none).',
    )
    inner = merged.get("rope_theta")
    _require(
        inner is None or theta is None or inner == theta,
        f"rope_theta {theta} contradicts rope_parameters.rope_theta {inner}.",
    )
    if scaling and parameters:
        for key in scaling.keys() & parameters.keys():
            _require(
                scaling[key] == parameters[key],
                f"rope_scaling.{key} {scaling[key]} contradicts rope_parameters.{key} {parameters[key]}.",
            )
    merged["rope_theta"] = next(value for value in (inner, theta, 50000.0) if value is not None)
    if merged["rope_type"] == "yarn":
        missing = {"factor", "original_max_position_embeddings"} - merged.keys()
        _require(not missing, f"the yarn block of rope_scaling lacks {', '.join(sorted(missing))}.")
        merged = {"beta_fast": 32.0, "beta_slow": 1.0, **merged}
    return merged


def _validate_quantization(quantization: dict[str, Any] | None, hidden_size: int, expert_size: int) -> None:
    """Refuses every packing but symmetric int4 in groups of 32, the one that `kimi_int4.py` reads."""
    if quantization is None:
        return
    method, layout = quantization.get("quant_method"), quantization.get("format")
    _require(
        method == "compressed-tensors" and layout == "pack-quantized",
        f'quantization_config has quant_method "{method}" and format "{layout}"; the experts are read from'
        ' "compressed-tensors" in "pack-quantized".',
    )
    groups = quantization.get("config_groups") or {}
    _require(
        len(groups) == 1, f"quantization_config.config_groups has {len(groups)} groups, expected exactly 1."
    )
    (group,) = groups.values()
    weights = group.get("weights") or {}
    expected = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    for name, value in expected.items():
        _require(
            weights.get(name) == value,
            f"quantization_config asks for weights.{name} {weights.get(name)!r}, but only {value!r} can be run.",
        )
    _require(
        not weights.get("actorder"),
        f"quantization_config has actorder {weights.get('actorder')!r}, not none.",
    )
    for name, size in (("hidden_size", hidden_size), ("moe_intermediate_size", expert_size)):
        _require(
            size % 32 == 0,
            f"{name} {size} is not a multiple of quantization_config's group_size 32.",
        )
