"""Kimi K2.7 Code: the table of contents. Attention, experts, vision and weights have files of their own.

    input_ids (B, T) -- embed_tokens --> (B, T, H)      <|media_pad|> rows replaced by vision features:
                                                        pixel_values -- vision_tower, mm_projector --> (M, H)
    61 x DecoderLayer    x += self_attn(input_layernorm(x))              MLA, latent cache   kimi_attention.py
                         x += mlp(post_attention_layernorm(x))           dense, then MoE     kimi_moe.py
    norm, lm_head        logits (B, T or the last few, V)

Names of modules and parameters are the checkpoint's. B sequences, T tokens, H hidden size, V vocabulary, M vision
tokens of all items together, P patches, N media items.
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .configuration_kimi import KimiK25Config, KimiK25TextConfig
from .kimi_attention import MLA, RMSNorm, RotaryEmbedding
from .kimi_cache import new_cache, with_latent_layers
from .kimi_checkpoint import load_checkpoint, loading_result, save_checkpoint
from .kimi_linear import Linear
from .kimi_moe import MLP, Experts, MoE, Router
from .kimi_pool import pool_experts, requested
from .kimi_prompt_media import PromptMedia, check_counts, read_prompt_media
from .kimi_usage import MemoryReport, Routing, memory_report, recorded_routing
from .kimi_vision import MoonViT, PatchMergerProjector, PositionEmbedding

if TYPE_CHECKING:  # transformers 4.57 copies only the files an entry point names itself
    from .kimi_attention_triton import latent_attention_triton  # noqa: F401
    from .kimi_cpu import experts_int4  # noqa: F401
    from .kimi_cpu_code import SOURCE  # noqa: F401
    from .kimi_files import Shard  # noqa: F401
    from .kimi_int4 import int4_linear  # noqa: F401
    from .kimi_int4_triton import run_experts_triton  # noqa: F401
    from .kimi_machine import detect_ram  # noqa: F401
    from .kimi_safetensors import read_header  # noqa: F401
    from .kimi_sizes import weight_bytes  # noqa: F401
    from .kimi_slots import SlotCache  # noqa: F401

logger = logging.get_logger(__name__)
MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
# From 5.24 on transformers calls the cache `cache`: in what models return, and in what generate() hands around.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: KimiK25TextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MLA(config, layer_idx)
        self.mlp = self.feed_forward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(self, config: KimiK25TextConfig) -> nn.Module:
        return MLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, H) to (B, T, H), and the attention weights where the implementation makes them."""
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class MoEDecoderLayer(DecoderLayer):
    """A layer with experts. A class of its own, since accelerate takes the first of a class for the size of them all."""

    def feed_forward(self, config: KimiK25TextConfig) -> nn.Module:
        return MoE(config)


class Decoder(nn.Module):
    """`language_model.model`: embeddings, layers, final norm."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            (MoEDecoderLayer if config.is_moe_layer(idx) else DecoderLayer)(config, idx)
            for idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        debug_nan: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """inputs_embeds (B, T, H) to the normed last hidden state (B, T, H)."""
        position_ids = position_ids.expand(inputs_embeds.shape[:2])
        shared = {
            "position_embeddings": self.rotary_emb(position_ids),
            "attention_mask": _causal_mask(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, cache_position
            ),
            "past_key_values": past_key_values,
            "cache_position": cache_position,
        }
        all_states: list[Any] = [inputs_embeds]
        all_weights: list[Any] = []
        x = inputs_embeds
        for idx, layer in enumerate(self.layers):
            x, weights = layer(x, **shared, **kwargs)
            if debug_nan:
                _check_finite(x, f"layer {idx}")
            if output_hidden_states:
                all_states.append(x)
            if output_attentions:
                all_weights.append(weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE: past_key_values},
            hidden_states=(*all_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )


class CausalLM(nn.Module):
    """`language_model`: the decoder and its head, as the checkpoint nests them."""

    def __init__(self, config: KimiK25TextConfig):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)


class KimiK25PreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the model: how it is placed, initialised, read and written."""

    config_class = KimiK25Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer", "MoEDecoderLayer", "MoonViTBlock")
    _skip_keys_device_placement = ("past_key_values", "cache")
    # The loader keeps these in fp32 itself; said again for tools that look here.
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)
    _supports_flash_attn = _supports_flash_attn_2 = _supports_sdpa = _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with `initializer_range` for matrices, ones and zeros for norms and biases; packed experts stay zero."""
        std = self.config.text_config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, Router, PositionEmbedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts) and not module.packed:
            for weight in module.parameters():
                nn.init.normal_(weight, std=std)
        elif isinstance(module, (RMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        if isinstance(module, Router):
            nn.init.zeros_(module.e_score_correction_bias)
        elif isinstance(bias := getattr(module, "bias", None), torch.Tensor):
            nn.init.zeros_(bias)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Logical weights: an int4 expert counts its codes, not its words, scales and shapes."""
        total = 0
        for module in self.modules():
            if isinstance(module, Experts):
                trainable = not module.packed and any(p.requires_grad for p in module.parameters())
                total += module.num_weights() if trainable or not only_trainable else 0
            elif not (exclude_embeddings and isinstance(module, nn.Embedding)):
                parameters = module.parameters(recurse=False)
                total += sum(p.numel() for p in parameters if p.requires_grad or not only_trainable)
        return total

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        expert_cache: int | str | None = None,
        **kwargs: Any,
    ) -> "KimiK25PreTrainedModel":
        """PreTrainedModel.from_pretrained, which loads in the checkpoint's dtype (bf16) unless told otherwise.

        `expert_cache`: bytes (or "20GB") of memory for routed experts, which otherwise stay in the checkpoint's files and
        are read when a token needs them; "auto" takes what is free, and all of them if they fit. None: all are loaded.

        Raises ValueError for weights that contradict the config or the model (missing, unknown, wrong shape or dtype),
        OSError for missing or damaged files. Never returns a model with a tensor that was not read.
        """
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config cannot be given: the experts are int4 in the checkpoint and stay so; leave it out."
            )
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or "auto"
        if dtype in (torch.float16, "float16"):
            logger.warning(
                "dtype=torch.float16: the scales of the int4 experts are bfloat16 and the model was trained in bfloat16;"
                " float16 overflows above 65504. Prefer dtype=torch.bfloat16."
            )
        try:
            with requested(expert_cache, kwargs.get("device_map")):
                loaded = super().from_pretrained(pretrained_model_name_or_path, *args, dtype=dtype, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"a weight file of {pretrained_model_name_or_path} is damaged or truncated ({error}); download it again."
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _set_stacked_names(model, False)
        return loaded

    @classmethod
    def _load_pretrained_model(cls, model: "KimiK25PreTrainedModel", *args: Any, **kwargs: Any) -> Any:
        """Where both majors read weights, replaced by `load_checkpoint`; arguments and result differ between them."""
        _set_stacked_names(model, True)
        request, finish = loading_result(model, PreTrainedModel._load_pretrained_model, args, kwargs)
        return finish(load_checkpoint(model, **request))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "10GB",
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """PreTrainedModel.save_pretrained with the checkpoint's own names and bytes, one shard in memory at a time.

        A `state_dict` is saved instead of the model's own tensors. Adapters (PEFT) are saved as transformers does.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(
                save_directory,
                is_main_process,
                state_dict,
                push_to_hub=push_to_hub,
                variant=variant,
                **kwargs,
            )
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False would write pickle; only safetensors are written.")
        with _no_progress_bar():  # of zero shards: the weights follow
            super().save_pretrained(save_directory, is_main_process, state_dict={}, **kwargs)
        if is_main_process:
            save_checkpoint(self, save_directory, state_dict, max_shard_size, variant)
        if push_to_hub:
            _upload(save_directory, **kwargs)


class KimiK25ForConditionalGeneration(KimiK25PreTrainedModel, GenerationMixin):
    """The whole model: MoonViT, projector, language model."""

    def __init__(self, config: KimiK25Config):
        super().__init__(config)
        for part in (config.text_config, config.vision_config):
            # transformers decides for the top config only, and without a decision it would make no causal mask at all.
            if part._attn_implementation is None:
                part._attn_implementation = config._attn_implementation
        if config.text_config.first_k_dense_replace >= config.text_config.num_hidden_layers:
            self._keep_in_fp32_modules_strict = None  # 4.57 insists that the names listed there exist
        self.vision_tower = MoonViT(config.vision_config)
        self.mm_projector = PatchMergerProjector(config.vision_config)
        self.language_model = CausalLM(config.text_config)
        self.expert_pool = pool_experts(self, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        grid_thws: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        debug_nan: bool = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over T new tokens.

        Args:
            input_ids: (B, T). Or inputs_embeds: (B, T, H).
            pixel_values: (P, 3, 14, 14) patches of all items. grid_thws: (N, 3) frames, rows, columns of each item.
            attention_mask: (B, cached + T), 1 = attend; or a prepared 4-D mask.
            position_ids: (B, T); by default counted over the attention mask, so left padding takes no positions.
            labels: (B, T), `ignore_index` where there is no loss; shifted inside.
            logits_to_keep: 0 for all positions, n for the last n, or indices.
            cache: another name of past_key_values, which transformers uses from 5.24 on.
            debug_nan: raise a ValueError that names the first layer whose output has a NaN or an infinity. Waits for the
                device after each layer.

        Returns logits (B, kept, V) in the model's dtype, the loss if labels are given, and the cache, which holds the
        latents: 576 values per token and layer at full size.
        """
        text = self.config.text_config
        past_key_values = cache if past_key_values is None else past_key_values
        if use_cache is None:
            use_cache = text.use_cache and not (self.training and self.is_gradient_checkpointing)
        if use_cache and past_key_values is None:
            past_key_values = new_cache(text)
        inputs_embeds = self._embed(input_ids, inputs_embeds)  # (B, T, H)
        if debug_nan:
            _check_finite(inputs_embeds, "embed_tokens")
        if pixel_values is not None and pixel_values.numel():
            inputs_embeds = self._insert_media(input_ids, inputs_embeds, pixel_values, grid_thws)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        _check_length(past_length, inputs_embeds.shape[1], text.max_position_embeddings)
        cache_position = kwargs.pop(
            "cache_position", None
        )  # 4.57's generate() gives it, 5.x has no such thing
        if cache_position is None:
            cache_position = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
        if position_ids is None:
            position_ids = _position_ids(attention_mask, cache_position)

        outputs = self.language_model.model(
            inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache_position=cache_position,
            output_attentions=self.config.output_attentions
            if output_attentions is None
            else output_attentions,
            output_hidden_states=(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            debug_nan=debug_nan,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(outputs.last_hidden_state[:, keep])
        if debug_nan:
            _check_finite(logits, "lm_head")
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=text.vocab_size,
                ignore_index=self.config.ignore_index,
                **{key: kwargs[key] for key in ("num_items_in_batch",) if key in kwargs},
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: past_key_values},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def memory_report(self, past_key_values: Cache | None = None) -> MemoryReport:
        """Bytes by device: weights, experts in the pool, the given cache; the pool's hit rate and bytes read."""
        return memory_report(self, past_key_values)

    def collect_routing(self) -> AbstractContextManager[Routing]:
        """`with model.collect_routing() as routing:` counts how often each expert of each layer is chosen."""
        return recorded_routing(self)

    def warm_experts(self, routing: Routing) -> int:
        """Reads the experts that `routing` counted most into the pool, as many as fit; returns how many. 0 without a
        pool, where all are in memory."""
        return self.expert_pool.warm(routing.by_layer()) if self.expert_pool else 0

    def get_image_features(self, pixel_values: torch.Tensor, grid_thws: torch.Tensor) -> list[torch.Tensor]:
        """(P, 3, 14, 14) and (N, 3) to N tensors (tokens of the item, H); an item is an image or a chunk of a video."""
        return self.mm_projector(self.vision_tower(pixel_values, grid_thws))

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if input_ids is None:
            return cast(torch.Tensor, inputs_embeds)
        _check_ids(input_ids, self.config.text_config.vocab_size)
        return self.get_input_embeddings()(input_ids)

    def _insert_media(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        pixel_values: torch.Tensor,
        grid_thws: torch.Tensor | None,
    ) -> torch.Tensor:
        """Puts the vision features in the places of `<|media_pad|>`, in order; the length never changes."""
        if input_ids is None:
            raise ValueError(
                "pixel_values need input_ids, whose <|media_pad|> tokens say where the features go."
            )
        if grid_thws is None:
            raise ValueError("pixel_values need grid_thws, (N, 3) frames, rows and columns of each item.")
        items = self.get_image_features(pixel_values, grid_thws)
        places = input_ids == self.config.media_placeholder_token_id  # (B, T)
        check_counts(places, [len(item) for item in items], grid_thws.tolist())
        features = torch.cat(items).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(places.unsqueeze(-1), features)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """GenerationMixin.generate; refuses unknown token ids, prompts beyond the context and media that do not fit
        the placeholders before any work."""
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None:
            _check_ids(prompt, self.config.text_config.vocab_size, even_on_gpu=True)
            _check_length(0, prompt.shape[-1], self.config.text_config.max_position_embeddings)
        settings: Any = (args[0] if args else kwargs.get("generation_config")) or self.generation_config
        if kwargs.get("do_sample", settings.do_sample) is False and (kwargs.get("num_beams") or 1) == 1:
            logger.warning_once(  # type: ignore[attr-defined]
                "Greedy decoding: a model that thinks may go round in circles with it. The advice is to sample with"
                " temperature 1.0 and top_p 0.95, as generation_config.json does."
            )
        if not getattr(settings, "is_assistant", False):  # which is given the prompt_media of its main model
            media = self._take_media(prompt, kwargs)
            kwargs.update({"prompt_media": media} if media else {})
        return super().generate(inputs, *args, **kwargs)

    def _take_media(self, prompt: torch.Tensor | None, kwargs: dict[str, Any]) -> PromptMedia | None:
        """Takes pixel_values and grid_thws out of the keywords of generate()."""
        pixel_values, grid_thws = kwargs.pop("pixel_values", None), kwargs.pop("grid_thws", None)
        if prompt is None or kwargs.get("inputs_embeds") is not None:
            if pixel_values is None:
                return None
            raise ValueError(
                "pixel_values need input_ids, whose <|media_pad|> tokens say where the features go, and no inputs_embeds."
            )
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values") or kwargs.get("cache")
        return read_prompt_media(
            prompt == self.config.media_placeholder_token_id,
            pixel_values,
            grid_thws,
            num_cached=int(cache.get_seq_length()) if cache is not None else 0,
            # A mask that is longer than the ids covers cached tokens that are not given again.
            first_column=max(mask.shape[1] - prompt.shape[1], 0)
            if mask is not None and mask.ndim == 2
            else 0,
            max_frames=self.config.vision_config.init_pos_emb_time,
            merge=self.config.vision_config.merge_kernel_size,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        *args: Any,
        inputs_embeds: Any = None,
        prompt_media: PromptMedia | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """GenerationMixin's, with embeddings instead of ids where features take the places of `<|media_pad|>`."""
        positions, columns = kwargs.get("position_ids"), kwargs.get("cache_position")
        # 4.57's prefill in chunks hands out columns of the cache as positions, padding included; its decoding does not.
        if positions is not None and columns is not None and positions.data_ptr() == columns.data_ptr():
            del kwargs["position_ids"]
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        ids, cache = inputs.get("input_ids"), inputs.get(CACHE)
        if prompt_media is not None and ids is not None:
            start = int(cache.get_seq_length()) if cache is not None else 0
            if prompt_media.reach(start, ids.shape[1]):
                embeds = self.get_input_embeddings()(ids)
                inputs["inputs_embeds"] = prompt_media.insert(embeds, start, self.get_image_features)
                inputs["input_ids"] = None
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """The cache `generate` would make, with layers that grow in place if it is the default one."""
        given = model_kwargs.get(CACHE)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = with_latent_layers(model_kwargs[CACHE], self.config.text_config)
        return result

    def _prepare_generated_length(self, **kwargs: Any) -> Any:
        """Keeps 5.x from warning at each call that max_new_tokens beats the max_length of generation_config.json."""
        settings, own = kwargs["generation_config"], self.generation_config
        if settings.max_new_tokens is not None and own and settings.max_length == own.max_length:
            kwargs["has_default_max_length"] = True
        return super()._prepare_generated_length(**kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> dict:
        """Media are inserted once, in the prefill; with a cache their features live on in it."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("prompt_media", None)
        return model_kwargs


def _position_ids(attention_mask: torch.Tensor | None, cache_position: torch.Tensor) -> torch.Tensor:
    """(B or 1, T) positions of the new tokens; left padding takes none, so a padded row equals the row alone."""
    num_tokens = len(cache_position)
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= num_tokens:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
    return cache_position.unsqueeze(0)


def _causal_mask(
    config: KimiK25TextConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor,
    cache_position: torch.Tensor | None,
) -> Any:
    """The mask in the form that the chosen attention implementation wants; the versions differ in names."""
    arguments = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    if "cache" in MASK_ARGUMENTS:
        arguments["cache"] = arguments.pop("past_key_values")
    if "input_embeds" in MASK_ARGUMENTS:  # 4.57
        arguments["input_embeds"] = arguments.pop("inputs_embeds")
        arguments["cache_position"] = cache_position
    return create_causal_mask(**arguments)


def _check_ids(input_ids: torch.Tensor, vocab_size: int, even_on_gpu: bool = False) -> None:
    """Refuses ids outside the vocabulary. Looking costs a sync on an accelerator, so generate() does it once there."""
    if torch.compiler.is_compiling() or not input_ids.numel() or input_ids.device.type == "meta":
        return
    if input_ids.device.type == "cpu" or even_on_gpu:
        low, high = (int(value) for value in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} lies outside the vocabulary of {vocab_size} tokens.")


def _check_finite(x: torch.Tensor, where: str) -> None:
    wrong = int((~torch.isfinite(x)).sum())
    if wrong:
        raise ValueError(f"{where} made the first NaN or infinity: {wrong} of {x.numel()} values.")


def _check_length(past_length: int | torch.Tensor, num_tokens: int, max_positions: int) -> None:
    if isinstance(past_length, int) and past_length + num_tokens > max_positions:
        cached = f" ({past_length} of them cached)" if past_length else ""
        raise ValueError(
            f"{past_length + num_tokens} tokens{cached} exceed max_position_embeddings {max_positions}; shorten the"
            " prompt."
        )


def _set_stacked_names(model: nn.Module, stacked: bool) -> None:
    for module in model.modules():
        if isinstance(module, Experts):
            module.stacked_names = stacked


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _upload(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    **unused: Any,
) -> None:
    """Uploads a saved folder to the hub, as PreTrainedModel.save_pretrained(push_to_hub=True) would."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = repo_id or os.path.basename(os.path.normpath(folder))
    repo = api.create_repo(name, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload KimiK25ForConditionalGeneration"
    api.upload_folder(
        repo_id=repo,
        folder_path=os.fspath(folder),
        commit_message=message,
        create_pr=create_pr,
        revision=revision,
    )
