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
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .kimi_backends import is_recorded

Pair = tuple[torch.Tensor, torch.Tensor]


class Room(NamedTuple):
    """Latents and k_pe of a layer: views of where T new tokens belong, and of all S with them."""

    places: Pair
    filled: Pair


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
        places, filled = self.reserve(key_states, value_states)
        for place, states in zip(places, (key_states, value_states), strict=True):
            place.copy_(states)
        return filled

    def reserve(self, key_states: torch.Tensor, value_states: torch.Tensor) -> "Room":
        """Room for T tokens like these, which the caller fills in."""
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
        self.keys, self.values = (buffer[:, :, :end] for buffer in buffers)
        return Room((buffers[0][:, :, start:end], buffers[1][:, :, start:end]), (self.keys, self.values))

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


def reserve(cache: Cache | None, layer_idx: int, latent: torch.Tensor, k_pe: torch.Tensor) -> Room | None:
    """Room for T tokens, (B, 1, T, c) and (B, 1, T, dr), that the caller writes there itself; None where the cache has to
    be given them."""
    layer = cache.layers[layer_idx] if cache is not None and layer_idx < len(cache.layers) else None
    if type(cache) is not DynamicCache or cache.offloading or type(layer) is not LatentLayer:
        return None
    if layer.is_initialized:  # what does not fit is for `append` to refuse, before anything is written
        for held, new in zip(cast(Pair, (layer.keys, layer.values)), (latent, k_pe), strict=True):
            fits = held.shape[:2] == new.shape[:2] and held.shape[3] == new.shape[3]
            if not (fits and held.dtype == new.dtype and held.device == new.device):
                return None
    return None if is_recorded(latent, k_pe) else layer.reserve(latent, k_pe)


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
    position_ids: torch.Tensor | None,
    cache_position: torch.Tensor | None,
) -> tuple[Any, int | None]:
    """The mask in the form that the chosen attention implementation wants, and None; or None and how many keys precede
    the new tokens, if that is all there is to say.

    transformers makes the mask, but on a GPU it would wait for a look at a 2-D one, in each forward, and a mask made for
    a chunk of a prompt keeps SDPA from its fast kernels.
    """
    on_gpu = inputs_embeds.is_cuda and config._attn_implementation == "sdpa"
    # Of a static one 4.57 counts the tokens by reading it.
    past_length = cached_length(past_key_values) if on_gpu and not is_static(past_key_values) else None
    if isinstance(past_length, int):
        unpacked = past_key_values is not None or position_ids is None  # packed sequences begin to count anew
        if attention_mask is None and unpacked and not torch.compiler.is_compiling():
            return None, past_length
        if attention_mask is not None and attention_mask.ndim == 2:
            return padding_mask(attention_mask, inputs_embeds, past_length), None
    return made_by_transformers(
        config, inputs_embeds, attention_mask, past_key_values, position_ids, cache_position
    ), None


def padding_mask(padding: torch.Tensor, inputs_embeds: torch.Tensor, past_length: int) -> torch.Tensor:
    """(B, S), 1 = a token, to (B, 1, T, S), True = seen; columns that are missing are hidden."""
    num_new = inputs_embeds.shape[1]
    num_total = past_length + num_new
    seen = padding.to(inputs_embeds.device).bool()[:, :num_total]
    seen = F.pad(seen, (0, num_total - seen.shape[1]))[:, None, None]
    if num_new == 1:
        return seen
    return seen & all_before(num_new, num_total, past_length, inputs_embeds.device)


def all_before(num_new: int, num_total: int, past_length: int, device: torch.device) -> torch.Tensor:
    """(T, S) True where a key is not after its query; `past_length` keys precede the first query."""
    return torch.ones(num_new, num_total, dtype=torch.bool, device=device).tril(past_length)


def lower_right(num_new: int, num_total: int, device: torch.device) -> torch.Tensor:
    """The causal mask (T, S) of the last T of S tokens, as torch's SDPA knows it without being given its values."""
    try:
        return causal_lower_right(num_new, num_total)
    except RuntimeError:  # under a mode that replaces tensors (fake ones), which it does not support
        return all_before(num_new, num_total, num_total - num_new, device)


def filled_lengths(
    cache: Cache | None, cache_position: torch.Tensor | None, batch: int
) -> torch.Tensor | None:
    """(B,) tokens of each sequence with the new ones, on their device, for a static cache, whose tensors are as long as
    its capacity."""
    if cache_position is None or not is_static(cache):
        return None
    return (cache_position[-1:] + 1).repeat(batch)  # kernels read it as B numbers side by side


def is_static(cache: Cache | None) -> bool:
    return cache is not None and isinstance(next(iter(cache.layers), None), StaticLayer)


def made_by_transformers(
    config: PretrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    cache_position: torch.Tensor | None,
) -> Any:
    """The versions differ in names."""
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
    mask: torch.Tensor | None,
    num_new: int,
    num_total: int,
    device: torch.device,
    flash: bool = False,
    past_length: int | None = None,
) -> torch.Tensor | None:
    """Any mask transformers makes, as (B or 1, 1, T, S): additive floats, or booleans where True may be seen.

    None means causal, and for a single new token nothing is hidden. `past_length` keys precede the new tokens; if it is
    not known: for flash attention the new tokens are then the last of S, and padding is (B, S), 1 = a token. For SDPA they are the first: it gets None for whole prompts only, also into
    a static cache, whose S is its capacity.
    """
    if mask is not None and mask.ndim == 4:
        return mask[..., :num_total]
    causal = None
    if num_new > 1:
        before = past_length or (num_total - num_new if flash else 0)
        causal = all_before(num_new, num_total, before, device)[None, None]
    if mask is None:
        return causal
    padding = mask[:, None, None, :num_total].bool()
    return padding if causal is None else padding & causal
