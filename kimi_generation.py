"""What `generate` needs beyond transformers' own, on both major versions: a mixin, and the media of a prompt.

Pixel values belong to a prompt as a whole, and `generate` takes prompts apart: it computes them in chunks, skips what a
cache of an earlier call holds, repeats each row for beams or for several answers, or, without a cache, computes all of
it again in every step. So `generate` keeps the pixels in one `PromptMedia`, which knows the places of the prompt:

    places    (B, T) True where input_ids is <|media_pad|>; row by row, the j-th place takes row j of the features
    window    columns [start, stop) of the prompt, as long as the tokens of one forward pass
    insert    encodes the items that a window touches, if they are not yet, and puts their rows into its embeddings

What the model writes itself comes after the last column, so a `<|media_pad|>` among it is never taken for a place.

B rows, T tokens of the prompt, n tokens of a window, N items, M vision tokens of all items, H hidden size.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .kimi_cache import CACHE, count_positions, with_latent_layers
from .kimi_vision import Grid, read_grids

logger = logging.get_logger(__name__)

# Whether the prompt that generate() is at work on has no padding: then no step needs a mask. (A keyword would reach
# assistant models, which may be of other classes.)
UNPADDED: ContextVar[bool] = ContextVar("unpadded", default=False)
# pixel_values, grid_thws -> (tokens of the item, H) per item
Encode = Callable[[Tensor, Tensor], Sequence[Tensor]]


class KimiGenerationMixin(GenerationMixin):
    """GenerationMixin for a model with a latent cache, `get_image_features` and `config.media_placeholder_token_id`."""

    if TYPE_CHECKING:  # what the model has
        config: Any
        get_input_embeddings: Callable[[], torch.nn.Module]
        get_image_features: Encode

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """GenerationMixin.generate; refuses unknown token ids, prompts beyond the context and media that do not fit
        the placeholders before any work."""
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None:
            check_ids(prompt, self.config.text_config.vocab_size, even_on_gpu=True)
            check_length(0, prompt.shape[-1], self.config.text_config.max_position_embeddings)
        settings: Any = (args[0] if args else kwargs.get("generation_config")) or self.generation_config
        if kwargs.get("do_sample", settings.do_sample) is False and (kwargs.get("num_beams") or 1) == 1:
            logger.warning_once(  # type: ignore[attr-defined]
                "Greedy decoding: a model that thinks may go round in circles with it. The advice is to sample with"
                " temperature 1.0 and top_p 0.95, as generation_config.json does."
            )
        if not getattr(settings, "is_assistant", False):  # which is given the prompt_media of its main model
            media = self._take_media(prompt, kwargs)
            kwargs.update({"prompt_media": media} if media else {})
        token = UNPADDED.set(self._is_unpadded(prompt, settings, kwargs))
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            UNPADDED.reset(token)

    def _is_unpadded(self, prompt: Tensor | None, settings: Any, kwargs: dict[str, Any]) -> bool:
        """Whether all tokens of the prompt are to be seen; looked at here, once, since on a GPU a look is a wait."""
        mask = kwargs.get("attention_mask")
        if mask is not None:
            return mask.ndim == 2 and bool(mask.all())
        pads = {kwargs.get("pad_token_id"), settings.pad_token_id, self.generation_config.pad_token_id}
        return prompt is not None and not any(bool((prompt == pad).any()) for pad in pads - {None})

    def _take_media(self, prompt: Tensor | None, kwargs: dict[str, Any]) -> "PromptMedia | None":
        """Takes pixel_values and grid_thws out of the keywords of generate()."""
        pixel_values, grid_thws = kwargs.pop("pixel_values", None), kwargs.pop("grid_thws", None)
        if prompt is None or kwargs.get("inputs_embeds") is not None:
            if pixel_values is None:
                return None
            raise ValueError(
                "pixel_values need input_ids, whose <|media_pad|> tokens say where the features go, and no inputs_embeds."
            )
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values") or kwargs.get("cache")
        # A mask that is longer than the ids covers cached tokens that are not given again.
        columns = mask.shape[1] if mask is not None and mask.ndim == 2 else 0
        return read_prompt_media(
            prompt == self.config.media_placeholder_token_id,
            pixel_values,
            grid_thws,
            num_cached=int(cache.get_seq_length()) if cache is not None else 0,
            first_column=max(columns - prompt.shape[1], 0),
            max_frames=self.config.vision_config.init_pos_emb_time,
            merge=self.config.vision_config.merge_kernel_size,
        )

    def _positions(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_length: int | torch.Tensor,
        cache_position: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (B or 1, T) of the new tokens, and where (T,) they go in the cache. Refuses too many of them."""
        num_tokens = inputs_embeds.shape[1]
        if not num_tokens:
            raise ValueError("there are 0 tokens to compute; give at least one.")
        check_length(past_length, num_tokens, self.config.text_config.max_position_embeddings)
        if cache_position is None:
            cache_position = torch.arange(num_tokens, device=inputs_embeds.device) + past_length
        if position_ids is None:
            position_ids = count_positions(attention_mask, cache_position)
        return position_ids, cache_position

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
        features = torch.cat(list(items)).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(places.unsqueeze(-1), features)

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        *args: Any,
        inputs_embeds: Any = None,
        prompt_media: "PromptMedia | None" = None,
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
        if UNPADDED.get() and getattr(inputs.get("attention_mask"), "ndim", 0) == 2:
            inputs["attention_mask"] = None
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
        """Media are inserted once, in the prefill; with a cache their features stay in it."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("prompt_media", None)
        return model_kwargs


class PromptMedia:
    """Pixels, grids and places of one prompt. `first_column`: how many cached tokens precede the given ids."""

    def __init__(
        self, places: Tensor, pixel_values: Tensor, grids: list[Grid], merge: Sequence[int], first_column: int
    ):
        # (B, T); the indices below are computed on the host, without a device wait for each.
        self.places = places.cpu()
        self.pixel_values, self.grids, self.merge = pixel_values, grids, merge
        self.first_column = first_column
        self.tokens = torch.tensor(count_tokens(grids, merge))  # (N,)
        # (B, T): the row of the features that a place takes; and (M,): the item which that row belongs to.
        self.feature_ids = self.places.flatten().cumsum(0).view_as(self.places) - 1
        self.item_ids = torch.arange(len(grids)).repeat_interleave(self.tokens)
        self.features: dict[int, Tensor] = {}  # (tokens of the item, H) each

    def __deepcopy__(self, memo: Any) -> "PromptMedia":
        """For an assistant model, which encodes the same pixels with weights of its own."""
        return PromptMedia(self.places, self.pixel_values, self.grids, self.merge, self.first_column)

    def window(self, table: Tensor, start: int, num_tokens: int, num_rows: int) -> Tensor:
        """(B, T) to (num_rows, num_tokens): the columns from `start` on, each row as often as beams repeat it."""
        start -= self.first_column
        columns = table[:, start : start + num_tokens]
        columns = torch.nn.functional.pad(columns, (0, num_tokens - columns.shape[1]))
        return columns.repeat_interleave(num_rows // len(table), dim=0)

    def reach(self, start: int, num_tokens: int) -> bool:
        """Whether a place is among `num_tokens` tokens from position `start` on."""
        return bool(self.window(self.places, start, num_tokens, len(self.places)).any())

    def insert(self, inputs_embeds: Tensor, start: int, encode: Encode) -> Tensor:
        """(rows, n, H), whose first column has position `start`, with the features in their places."""
        num_rows, num_tokens, _ = inputs_embeds.shape
        here = self.window(self.places, start, num_tokens, num_rows)  # (rows, n)
        wanted = self.window(self.feature_ids, start, num_tokens, num_rows)[here]  # (places in the window,)
        needed = self.item_ids[wanted].unique()
        self.encode_items([i for i in needed.tolist() if i not in self.features], encode, inputs_embeds)
        features = torch.cat([self.features[i] for i in needed.tolist()])
        # From rows of all items' features to rows of those at hand.
        shift = torch.zeros_like(self.tokens)
        shift[needed] = starts(self.tokens[needed]) - starts(self.tokens)[needed]
        rows = (wanted + shift[self.item_ids[wanted]]).to(features.device)
        return inputs_embeds.masked_scatter(here.unsqueeze(-1).to(features.device), features[rows])

    def encode_items(self, items: list[int], encode: Encode, like: Tensor) -> None:
        """Fills `features` for these items, in one call, with the dtype and device of `like`."""
        if not items:
            return
        patches = self.pixel_values.split([t * h * w for t, h, w in self.grids])
        pixel_values = torch.cat([patches[i] for i in items]).to(like.device)
        encoded = encode(pixel_values, torch.tensor([self.grids[i] for i in items]))
        self.features.update(zip(items, (item.to(like.device, like.dtype) for item in encoded), strict=True))


def starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def count_tokens(grids: Sequence[Grid], merge: Sequence[int]) -> list[int]:
    """Vision tokens of each item; its frames share them."""
    rows, cols = merge
    return [(h // rows) * (w // cols) for _, h, w in grids]


def read_prompt_media(
    places: Tensor,
    pixel_values: Tensor | None,
    grid_thws: Tensor | None,
    num_cached: int,
    first_column: int,
    **sizes: Any,
) -> "PromptMedia | None":
    """The media of a prompt, or None where it has none; refuses counts that do not fit before anything is computed.

    Args:
        places: (B, T) bool, of all ids that `generate` was given.
        num_cached: tokens that the given cache holds. Media whose places are all there may be given again or left out.
        first_column: how many cached tokens are not among the ids.
        sizes: `max_frames` and `merge`, as `read_grids` takes them.
    """
    due = places[:, max(num_cached - first_column, 0) :]  # the part that is still to be computed
    if pixel_values is None or not pixel_values.numel():
        if num_places := int(due.sum()):
            raise ValueError(
                f"found {num_places} <|media_pad|> tokens but no pixel_values; give the pixel_values and grid_thws that"
                " the processor makes with the ids."
            )
        return None
    if grid_thws is None:
        raise ValueError("pixel_values need grid_thws, (N, 3) frames, rows and columns of each item.")
    grids = read_grids(grid_thws, len(pixel_values), **sizes)
    tokens = count_tokens(grids, sizes["merge"])
    if int(places.sum()) != sum(tokens) == int(due.sum()):  # those of the cached part were left out
        places = torch.cat((torch.zeros_like(places[:, : -due.shape[1]]), due), dim=1)
    check_counts(places, tokens, grids)
    return PromptMedia(places, pixel_values, grids, sizes["merge"], first_column)


def check_counts(places: Tensor, tokens: Sequence[int], grids: Sequence[Sequence[int]]) -> None:
    """Refuses placeholders, (B, T) bool, that are not as many as the vision tokens of the items, or that would leave
    a part of an item to the next row."""
    rows = places.sum(-1).tolist()
    made = f"(grids {[list(grid) for grid in grids]})"
    if sum(rows) != sum(tokens):
        hint = "; let the processor expand each placeholder (expand_media=True)" * (sum(rows) == len(grids))
        raise ValueError(
            f"found {sum(rows)} <|media_pad|> tokens but the media make {sum(tokens)} vision tokens {made}{hint}."
        )
    ends = {0, *accumulate(tokens)}
    for row, end in enumerate(accumulate(rows)):
        if end not in ends:
            raise ValueError(
                f"row {row} has {rows[row]} <|media_pad|> tokens, which items of {list(tokens)} tokens {made} do not fill."
            )


def check_ids(input_ids: Tensor, vocab_size: int, even_on_gpu: bool = False) -> None:
    """Refuses ids outside the vocabulary. Looking costs a sync on an accelerator, so generate() does it once there."""
    if torch.compiler.is_compiling() or not input_ids.numel() or input_ids.device.type == "meta":
        return
    if input_ids.device.type == "cpu" or even_on_gpu:
        low, high = (int(value) for value in input_ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} lies outside the vocabulary of {vocab_size} tokens.")


def check_length(past_length: int | Tensor, num_tokens: int, max_positions: int) -> None:
    if isinstance(past_length, int) and past_length + num_tokens > max_positions:
        cached = f" ({past_length} of them cached)" if past_length else ""
        raise ValueError(
            f"{past_length + num_tokens} tokens{cached} exceed max_position_embeddings {max_positions}; shorten the"
            " prompt."
        )


def check_finite(x: Tensor, where: str) -> None:
    wrong = int((~torch.isfinite(x)).sum())
    if wrong:
        raise ValueError(f"{where} made the first NaN or infinity: {wrong} of {x.numel()} values.")
