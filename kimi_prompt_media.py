"""The media of a prompt while `generate` works on it: encoded once, when their placeholders are reached.

Pixel values belong to a prompt as a whole, and `generate` takes prompts apart: it computes them in chunks, skips what a
cache of an earlier call holds, repeats each row for beams or for several answers, or, without a cache, computes all of
it again in every step. So `generate` keeps the pixels in one object that knows the places of the prompt:

    places    (B, T) True where input_ids is <|media_pad|>; row by row, the j-th place takes row j of the features
    window    columns [start, stop) of the prompt, as long as the tokens of one forward pass
    insert    encodes the items that a window touches, if they are not yet, and puts their rows into its embeddings

Whatever the model writes itself lies behind the last column, so a `<|media_pad|>` among it is never taken for a place.

B rows, T tokens of the prompt, n tokens of a window, N items, M vision tokens of all items, H hidden size.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .kimi_vision import Grid, read_grids

# pixel_values, grid_thws -> (tokens of the item, H) per item
Encode = Callable[[Tensor, Tensor], Sequence[Tensor]]


class PromptMedia:
    """Pixels, grids and places of one prompt. `first_column`: how many cached tokens precede the given ids."""

    def __init__(
        self, places: Tensor, pixel_values: Tensor, grids: list[Grid], merge: Sequence[int], first_column: int
    ):
        self.places = places.cpu()  # (B, T); the indices below are computed on the host, without a wait each
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
        """Whether a place lies among `num_tokens` tokens from position `start` on."""
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
) -> PromptMedia | None:
    """The media of a prompt, or None where it has none; refuses counts that do not fit before anything is computed.

    Args:
        places: (B, T) bool, of all ids that `generate` was given.
        num_cached: tokens that the given cache holds. Media whose places all lie there may be given again or left out.
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
