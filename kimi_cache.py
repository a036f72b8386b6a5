"""The latent cache: transformers' own cache classes, and a layer for them that grows without copying; and what goes with
a cache: positions of new tokens and masks, which transformers' versions name differently.

Multi-head latent attention caches two tensors per layer (see `modeling_kimi.py`): the latent as the layer's keys,
(B, 1, S, 512), and the rotated shared key as its values, (B, 1, S, 64). 576 values per token and layer, 70,272 bytes
per token for the whole model in bf16.

transformers' `DynamicLayer` concatenates at every step, which reads and writes the whole cache for each new token: at
256K tokens 2 x 18 GB. `LatentLayer` is the same layer with spare capacity behind its tensors, so a step writes one
token. Everything else (crop, reorder, repeat, select, deepcopy) is inherited and works on the visible part.
"""

import contextlib
from inspect import signature
from typing import Any, cast

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .kimi_backends import is_recorded

Pair = tuple[torch.Tensor, torch.Tensor]
MIN_ROOM = 256  # tokens
# One eighth of the length: a token is copied eight times in a growing cache's life, on average.
ROOM_SHARE = 8
MASK_ARGUMENTS = frozenset(signature(create_causal_mask).parameters)
# From 5.24 on transformers calls the cache `cache`: in what models return, and in what generate() passes around.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class LatentLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are the filled part of larger buffers.

    The buffers belong to this layer: a view of `keys` stays valid while the layer grows, but not once it was cropped
    and grew again. With gradients it concatenates like its parent, since a buffer cannot be written in place then.
    """

    _buffers: Pair | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends T tokens, (B, 1, T, c) and (B, 1, T, dr); returns all S of them."""
        if is_recorded(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.is_initialized = True
        new, past = (key_states, value_states), cast(Pair, (self.keys, self.values))
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        buffers = self._buffers
        if buffers is None or not self._has_room(buffers, past, end):
            buffers = self._buffers = (
                _copy_with_capacity(past[0], new[0], end),
                _copy_with_capacity(past[1], new[1], end),
            )
        for buffer, states in zip(buffers, new, strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in buffers)
        return self.keys, self.values

    @staticmethod
    def _has_room(buffers: Pair, past: Pair, end: int) -> bool:
        """Whether `past` still is the filled part of the buffers (a reorder makes new tensors), and `end` fits."""
        return all(
            tensor.data_ptr() == buffer.data_ptr()
            and tensor.shape[0] == buffer.shape[0]
            and end <= buffer.shape[2]
            and (torch.is_inference_mode_enabled() or not buffer.is_inference())
            for tensor, buffer in zip(past, buffers, strict=True)
        )

    def reset(self) -> None:
        self._buffers = None
        super().reset()


def _copy_with_capacity(past: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    """A buffer for `length` tokens and some spare ones that begins with `past`; shaped like `new`."""
    capacity = length + max(MIN_ROOM, length // ROOM_SHARE)
    buffer = new.new_empty((*new.shape[:2], capacity, new.shape[3]))
    if past.numel():
        buffer[:, :, : past.shape[2]] = past
    return buffer


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty `DynamicCache` for the text config's layers."""
    cache = DynamicCache(config=config)
    cache.layers = [LatentLayer() for _ in range(config.num_hidden_layers)]
    return cache


def with_latent_layers(cache: Any, config: PretrainedConfig) -> Any:
    """An untouched plain `DynamicCache` becomes one that grows in place; any other cache is returned as it is."""
    fresh = type(cache) is DynamicCache and not cache.offloading
    fresh = fresh and all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers)
    return new_cache(config) if fresh else cache


def append(
    cache: Cache,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    layer_idx: int,
    cache_position: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds T tokens to a layer of any cache class and returns all of it, (B, 1, S, c) and (B, 1, S, dr)."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, StaticLayer) and not layer.is_initialized:
        _initialize_static(layer, latent, k_pe)
    return cache.update(latent, k_pe, layer_idx, {"cache_position": cache_position})


def cached_length(cache: Cache | None) -> int | torch.Tensor:
    """Tokens in a cache; a tensor for a static one, and then a copy: the cache counts on in its own."""
    length = cache.get_seq_length() if cache is not None else 0
    return length.clone() if isinstance(length, torch.Tensor) else length


def restore(cache: Cache | None, length: int | torch.Tensor) -> None:
    """After a forward that raised (out of memory, an interrupt, a forced implementation that is refused): layers that
    have its tokens already are cut back to `length`, so that the call can be repeated with the same cache.

    Dynamic and static layers; others, quantized ones for instance, stay as they are. A static layer keeps its batch size.
    """
    for layer in () if cache is None else cache.layers:
        with contextlib.suppress(Exception):  # what is raised is the error that led here
            _shorten(layer, int(length))


def _shorten(layer: Any, length: int) -> None:
    if type(layer) in (DynamicLayer, LatentLayer) and layer.is_initialized:
        # Each for itself: the update may have ended between the two.
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        if not length:  # as new, for any batch size
            layer.keys = layer.values = layer._buffers = None
            layer.is_initialized = False
    elif isinstance(layer, StaticLayer) and (extra := int(layer.get_seq_length()) - length) > 0:
        if hasattr(layer, "crop"):
            layer.crop(-extra)
            return
        for tensor in cast(Pair, (layer.keys, layer.values)):  # 4.57 counts the tokens that are not zero
            tensor[:, :, length:] = 0


def _initialize_static(layer: StaticLayer, latent: torch.Tensor, k_pe: torch.Tensor) -> None:
    """4.57 makes a static layer's values as wide as its keys; ours differ."""
    if "value_states" in signature(layer.lazy_initialization).parameters:
        layer.lazy_initialization(latent, k_pe)  # type: ignore[call-arg]  # 5.x
        return
    layer.lazy_initialization(latent)
    values = cast(torch.Tensor, layer.values)
    layer.values = values.new_zeros((*values.shape[:3], k_pe.shape[-1]))
    torch._dynamo.mark_static_address(layer.values)


# -------------------------------------------------------------------------------------------------- positions and masks


def count_positions(attention_mask: torch.Tensor | None, cache_position: torch.Tensor) -> torch.Tensor:
    """(B or 1, T) positions of the new tokens; left padding is not counted, so a padded row equals the row alone."""
    num_tokens = len(cache_position)
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= num_tokens:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
    return cache_position.unsqueeze(0)


def causal_mask(
    config: PretrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor,
    cache_position: torch.Tensor | None,
) -> Any:
    """The mask in the form that the chosen attention implementation wants; the versions differ in names."""
    arguments: dict[str, Any] = {
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


def readable_mask(
    mask: torch.Tensor | None, num_new: int, num_total: int, device: torch.device, flash: bool = False
) -> torch.Tensor | None:
    """Any mask transformers makes, as (B or 1, 1, T, S): additive floats, or booleans where True may be seen.

    None means causal, and for a single new token nothing is hidden. For flash attention the new tokens are then the last
    of S, and padding is (B, S), 1 = a token. For SDPA they are the first: it gets None for whole prompts only, also into
    a static cache, whose S is its capacity.
    """
    if mask is not None and mask.ndim == 4:
        return mask[..., :num_total]
    causal = None
    if num_new > 1:
        ones = torch.ones(num_new, num_total, dtype=torch.bool, device=device)
        causal = ones.tril(num_total - num_new if flash else 0)[None, None]
    if mask is None:
        return causal
    padding = mask[:, None, None, :num_total].bool()
    return padding if causal is None else padding & causal
