"""Media inside the model: features in the places of `<|media_pad|>`, once, however `generate` takes the prompt apart.

The oracle is the plainest way there is: features put into the embeddings by hand, and `generate(inputs_embeds=...)`, which
sees no pixels at all. The model is small and random, with weights large enough that a wrong picture changes tokens.
"""

import copy
import functools
from itertools import chain

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

from builders import assert_close, small_config
from kimi.kimi_generation import PromptMedia, count_tokens
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi

PAD, MEDIA = 319, 85  # ids of padding and of <|media_pad|> in small_config
IMAGE, WIDE, CHUNK, LAST_CHUNK = [1, 4, 6], [1, 2, 8], [4, 4, 4], [2, 4, 4]  # grids of 6, 4, 4 and 4 tokens
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


def make_model(num_layers: int = 3, seed: int = 0) -> Kimi:
    config = small_config(packed=False, text={"num_hidden_layers": num_layers})
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = Kimi(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def pixels(*grids: list[int], seed: int = 3) -> dict[str, torch.Tensor]:
    num_patches = sum(t * h * w for t, h, w in grids)
    values = torch.randn(num_patches, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": values, "grid_thws": torch.tensor(grids)}


def row(*parts: int | list[int]) -> list[int]:
    """Ids: a number is a token of text, a grid the placeholders of an item."""
    return [
        i
        for part in parts
        for i in ([part] if isinstance(part, int) else [MEDIA] * count_tokens([part], [2, 2])[0])
    ]


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    """Rows padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [
    row(5, 6, 7, 8),
    row(9, IMAGE, 10),
    row(11, CHUNK, 12, LAST_CHUNK, 13, WIDE, IMAGE, 14),
    row(WIDE, 15, WIDE),
]
GRIDS = [[], [IMAGE], [CHUNK, LAST_CHUNK, WIDE, IMAGE], [WIDE, WIDE]]
MIXED = {**batch(*ROWS), **pixels(*chain(*GRIDS))}
ONE = {**batch(ROWS[2]), **pixels(*GRIDS[2])}


def split_items(values: torch.Tensor, grids: list[list[int]]) -> tuple[torch.Tensor, ...]:
    return values.split([t * h * w for t, h, w in grids])


@torch.no_grad()
def by_hand(model: Kimi, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs without pixels and ids: features written over the embeddings, one place after the other."""
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.get_image_features(inputs["pixel_values"], inputs["grid_thws"]))
    places = (inputs["input_ids"] == MEDIA).nonzero().tolist()
    for (r, column), feature in zip(places, features, strict=True):
        embeds[r, column] = feature
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


@pytest.fixture
def encoded(model, monkeypatch):
    """Grids that the tower was given, call by call."""
    return watch_tower(model, monkeypatch)


def watch_tower(model, monkeypatch):
    calls, forward = [], model.vision_tower.forward

    def watching(pixel_values, grid_thws):
        calls.append(grid_thws.tolist())
        return forward(pixel_values, grid_thws)

    monkeypatch.setattr(model.vision_tower, "forward", watching)
    return calls


def new_tokens(model, inputs, **settings):
    out = model.generate(**inputs, **{**GREEDY, **settings})
    return out[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else out


# --- one forward ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_come_per_item_as_of_each_item_alone(model):
    grids = GRIDS[2]
    inputs = pixels(*grids)
    items = model.get_image_features(**inputs)
    assert [tuple(item.shape) for item in items] == [(4, 64), (4, 64), (4, 64), (6, 64)]
    for item, values, grid in zip(items, split_items(inputs["pixel_values"], grids), grids, strict=True):
        (alone,) = model.get_image_features(values, torch.tensor([grid]))
        assert_close(item, alone, 1e-5, "an item in a pack against the item alone, fp32")


@torch.no_grad()
def test_features_take_the_places_and_nothing_else_changes(model, monkeypatch):
    seen = []
    hook = model.language_model.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model(**MIXED)
    hook.remove()
    places = MIXED["input_ids"] == MEDIA
    features = torch.cat(model.get_image_features(MIXED["pixel_values"], MIXED["grid_thws"]))
    assert seen[0][places].equal(features), "in the order of the document, row by row"
    assert seen[0][~places].equal(model.get_input_embeddings()(MIXED["input_ids"])[~places])


@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_each_row_alone(model):
    """Rows with no, one and many images, and images and chunks of a video together."""
    together = model(**MIXED).logits
    values = iter(split_items(MIXED["pixel_values"], [*chain(*GRIDS)]))
    for number, (ids, grids) in enumerate(zip(ROWS, GRIDS, strict=True)):
        inputs = batch(ids)
        if grids:
            own = torch.cat([next(values) for _ in grids])
            inputs |= {"pixel_values": own, "grid_thws": torch.tensor(grids)}
        assert_close(together[number, -len(ids) :], model(**inputs).logits[0], 5e-5, f"row {number}, fp32")


@torch.no_grad()
def test_another_picture_makes_other_logits_in_its_row_only(model):
    other = MIXED["pixel_values"].clone()
    other[:24] *= -1  # the image of row 1
    before, after = model(**MIXED).logits, model(**{**MIXED, "pixel_values": other}).logits
    changed = (before - after).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False, False]


def test_features_take_the_dtype_of_the_text(model):
    mixed = copy.deepcopy(model).bfloat16()
    mixed.vision_tower.float()
    mixed.mm_projector.float()
    with torch.no_grad():
        assert mixed(**ONE).logits.dtype == torch.bfloat16
    assert new_tokens(mixed, ONE).shape == (1, NEW)


def loss_and_gradients(model):
    labels = ONE["input_ids"].masked_fill(ONE["input_ids"] == MEDIA, -100)
    loss = model(**ONE, labels=labels).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_reaches_the_tower():
    """`gradient_checkpointing_enable()` of the whole model: blocks run again in the backward pass, the gradients stay."""
    model = make_model().train()
    loss, plain = loss_and_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    runs = []
    block = model.vision_tower.encoder.blocks[0]
    block.wqkv.register_forward_hook(lambda *_: runs.append(1))
    assert block.gradient_checkpointing
    again, checkpointed = loss_and_gradients(model)
    assert len(runs) == 2 and again == pytest.approx(loss, abs=1e-6)
    assert checkpointed.keys() == plain.keys()
    assert any(name.startswith("vision_tower.patch_embed.pos_emb") for name in plain)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=lambda text, name=name: f"{name}: {text}")


# --- generate: the same tokens on every path, and the tower once ----------------------------------------------------

PATHS = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams, all of them": {"num_beams": 3, "num_return_sequences": 3},
    "several answers": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("inputs", [ONE, MIXED], ids=["one row", "mixed rows"])
def test_every_path_gives_the_tokens_of_features_put_in_by_hand(model, encoded, name, inputs):
    torch.manual_seed(7)
    want = model.generate(**by_hand(model, inputs), **{**GREEDY, **PATHS[name]})
    encoded.clear()
    torch.manual_seed(7)
    assert new_tokens(model, inputs, **PATHS[name]).equal(want)
    assert encoded == [inputs["grid_thws"].tolist()], "each item once, not once for each beam or step"


def test_pixels_and_features_are_let_go_after_the_prefill(model, monkeypatch):
    held, prepare = [], model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def watching(*args, **kwargs):
        held.append(kwargs.get("prompt_media") is not None)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(model, "prepare_inputs_for_generation", watching)
    new_tokens(model, ONE)
    assert held == [True] + [False] * (NEW - 1)


@pytest.mark.parametrize("inputs", [ONE, MIXED], ids=["one row", "mixed rows"])
def test_without_cache_the_features_are_inserted_again_but_not_computed_again(model, encoded, inputs):
    assert new_tokens(model, inputs, use_cache=False).equal(new_tokens(model, inputs))
    assert encoded == [inputs["grid_thws"].tolist()] * 2


@pytest.mark.parametrize("size", [1, 3, 5, 8, 100])
@pytest.mark.parametrize("inputs", [ONE, MIXED], ids=["one row", "mixed rows"])
def test_prefill_in_chunks_may_cut_an_item(model, encoded, size, inputs):
    want = new_tokens(model, inputs)
    encoded.clear()
    assert new_tokens(model, inputs, prefill_chunk_size=size).equal(want)
    assert sorted(chain(*encoded)) == sorted(inputs["grid_thws"].tolist()), "each once, with its first token"


def test_beams_of_a_prefill_in_chunks(model, encoded):
    want = new_tokens(model, ONE, num_beams=3)
    encoded.clear()
    assert new_tokens(model, ONE, num_beams=3, prefill_chunk_size=5).equal(want)
    assert [*chain(*encoded)] == GRIDS[2]


def test_prompt_lookup(model, encoded):
    settings = {"prompt_lookup_num_tokens": 3, "eos_token_id": 1}  # 4.57 cannot do this without an end token
    want = new_tokens(model, ONE, eos_token_id=1)
    encoded.clear()
    assert new_tokens(model, ONE, **settings).equal(want)
    assert encoded == [GRIDS[2]]


def test_an_assistant_sees_the_picture_with_its_own_weights_and_once(model, encoded, monkeypatch):
    assistant = make_model(num_layers=1, seed=1)
    encoded_by_assistant = watch_tower(assistant, monkeypatch)
    want = new_tokens(model, ONE, eos_token_id=1)
    encoded.clear()
    assert new_tokens(model, ONE, assistant_model=assistant, eos_token_id=1).equal(want)
    assert encoded == [GRIDS[2]] and encoded_by_assistant == [GRIDS[2]]


def test_a_perfect_assistant_is_always_right(model, monkeypatch):
    """Were the picture missing or misplaced in the assistant, its proposals would be rejected."""
    steps = []
    twin = copy.deepcopy(model)
    twin.generation_config.num_assistant_tokens = NEW - 1
    twin.generation_config.assistant_confidence_threshold = 0.0
    want = new_tokens(model, ONE, eos_token_id=1)
    hook = model.language_model.model.norm.register_forward_hook(
        lambda module, args, out: steps.append(out.shape[1])
    )
    assert new_tokens(model, ONE, assistant_model=twin, eos_token_id=1).equal(want)
    hook.remove()
    assert len(steps) <= 2, (
        f"all proposals are accepted, so the model runs once or twice; it ran over {steps} tokens"
    )


class Always(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_placeholder_that_the_model_writes_itself_is_no_place(model, use_cache):
    processor = LogitsProcessorList([Always(MEDIA)])
    for inputs in (ONE, batch(ROWS[0])):
        tokens = new_tokens(model, inputs, use_cache=use_cache, logits_processor=processor)
        assert tokens.eq(MEDIA).all()


def test_an_assistant_may_go_on_behind_such_a_placeholder(model):
    processor = LogitsProcessorList([Always(MEDIA)])
    settings = {"eos_token_id": 1, "assistant_model": make_model(1), "logits_processor": processor}
    assert new_tokens(model, batch(ROWS[0]), **settings).eq(MEDIA).all()


# --- a history in the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["all", "new ones"])
def test_media_of_the_next_turn(model, encoded, given):
    """What the cache holds is not encoded again, whether its media are given once more or not."""
    first = model.generate(**ONE, return_dict_in_generate=True, **GREEDY)
    turn = row(20, WIDE, 21, IMAGE, 22)
    ids = torch.cat((first.sequences, torch.tensor([turn])), dim=1)
    new = pixels(WIDE, IMAGE, seed=9)
    everything = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat((ONE["pixel_values"], new["pixel_values"])),
        "grid_thws": torch.cat((ONE["grid_thws"], new["grid_thws"])),
    }
    want = new_tokens(model, everything)
    encoded.clear()
    inputs = everything if given == "all" else {**everything, **new}
    assert new_tokens(model, inputs, past_key_values=first.past_key_values).equal(want)
    assert encoded == [[WIDE, IMAGE]]


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="4.57 wants the whole history's ids")
def test_only_the_ids_of_the_next_turn(model, encoded):
    """A mask over everything tells how many cached tokens are not among the ids."""
    first = model.generate(**ONE, return_dict_in_generate=True, **GREEDY)
    ids = torch.cat((first.sequences, torch.tensor([row(20, WIDE, 21)])), dim=1)
    new = pixels(WIDE, seed=9)
    both = {key: torch.cat((ONE[key], new[key])) for key in new}
    want = new_tokens(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **both})
    encoded.clear()
    cache = first.past_key_values
    inputs = {"input_ids": ids[:, cache.get_seq_length() :], "attention_mask": torch.ones_like(ids), **new}
    assert new_tokens(model, inputs, past_key_values=cache).equal(want)
    assert encoded == [[WIDE]]


def test_a_turn_of_text_needs_no_pixels(model, encoded):
    first = model.generate(**ONE, return_dict_in_generate=True, **GREEDY)
    ids = torch.cat((first.sequences, torch.tensor([[20, 21]])), dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixel_inputs = {key: ONE[key] for key in ("pixel_values", "grid_thws")}
    want = new_tokens(model, {**inputs, **pixel_inputs})
    encoded.clear()
    cache = copy.deepcopy(first.past_key_values)
    assert new_tokens(model, inputs, past_key_values=first.past_key_values).equal(want)
    assert new_tokens(model, {**inputs, **pixel_inputs}, past_key_values=cache).equal(want)
    assert encoded == []


def test_a_cache_filled_by_hand(model):
    """The prompt's start through forward() with a cache, the rest through generate()."""
    want = new_tokens(model, ONE)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    cut = 6  # between CHUNK and LAST_CHUNK
    head, tail = (dict(ONE) for _ in range(2))
    head |= {"input_ids": ONE["input_ids"][:, :cut], "attention_mask": ONE["attention_mask"][:, :cut]}
    values = ONE["pixel_values"]
    head |= {"pixel_values": values[:64], "grid_thws": ONE["grid_thws"][:1]}
    with torch.no_grad():
        model(**head, past_key_values=cache)
    tail |= {"pixel_values": values[64:], "grid_thws": ONE["grid_thws"][1:]}
    assert new_tokens(model, tail, past_key_values=cache).equal(want)


# --- refusals -------------------------------------------------------------------------------------------------------


def fewer(inputs, num_items):
    kept = sum(t * h * w for t, h, w in inputs["grid_thws"][:num_items].tolist())
    return {
        **inputs,
        "pixel_values": inputs["pixel_values"][:kept],
        "grid_thws": inputs["grid_thws"][:num_items],
    }


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize(
    "inputs, sentence",
    [
        (fewer(MIXED, 4), r"found 32 <\|media_pad\|> tokens but the media make 18 vision tokens"),
        (
            {**MIXED, **batch(*ROWS[:3])},
            r"found 24 <\|media_pad\|> tokens but the media make 32 vision tokens",
        ),
        (
            {**batch([9, MEDIA, 10, MEDIA]), **pixels(IMAGE, WIDE)},
            r"found 2 <\|media_pad\|> tokens but the media make 10 vision tokens \(grids \[\[1, 4, 6\], \[1, 2, 8\]\]\);"
            r" let the processor expand each placeholder \(expand_media=True\)",
        ),
        (
            {**batch(row(IMAGE, MEDIA), row(1, WIDE, MEDIA)[:-2]), **pixels(IMAGE, WIDE)},
            r"row 0 has 7 <\|media_pad\|> tokens, which items of \[6, 4\] tokens",
        ),
        ({**batch(ROWS[0]), **pixels(IMAGE)}, r"found 0 <\|media_pad\|> tokens but the media make 6"),
        ({key: ONE[key] for key in ONE if key != "grid_thws"}, "pixel_values need grid_thws"),
        ({**ONE, "grid_thws": ONE["grid_thws"][1:]}, "make 72 patches but pixel_values has 136"),
        ({**by_hand(make_model(), ONE), **pixels(IMAGE)}, "pixel_values need input_ids"),
    ],
    ids=[
        "few media",
        "few placeholders",
        "compact",
        "across rows",
        "none",
        "no grids",
        "other grids",
        "no ids",
    ],
)
def test_media_that_do_not_fit_are_refused_with_both_numbers(model, encoded, method, inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(**inputs) if method == "forward" else model.generate(**inputs, **GREEDY)
    if method == "generate":
        assert encoded == [], "before any work"


def test_placeholders_without_pixels_are_refused_by_generate(model):
    sentence = r"found 18 <\|media_pad\|> tokens but no pixel_values"
    for empty in (
        {},
        {"pixel_values": torch.empty(0, 3, 14, 14), "grid_thws": torch.empty(0, 3, dtype=torch.int64)},
    ):
        with pytest.raises(ValueError, match=sentence):
            model.generate(**{**batch(ROWS[2]), **empty}, **GREEDY)


def test_text_goes_with_empty_pixels(model):
    empty = {"pixel_values": torch.empty(0, 3, 14, 14), "grid_thws": torch.empty(0, 3, dtype=torch.int64)}
    assert new_tokens(model, {**batch(ROWS[0]), **empty}).equal(new_tokens(model, batch(ROWS[0])))


def test_placeholders_of_the_next_turn_without_pixels_are_refused(model):
    first = model.generate(**ONE, return_dict_in_generate=True, **GREEDY)
    ids = torch.cat((first.sequences, torch.tensor([row(20, IMAGE)])), dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"found 6 <\|media_pad\|> tokens but no pixel_values"):
        model.generate(**inputs, past_key_values=first.past_key_values, **GREEDY)


# --- windows on a prompt, by numbers --------------------------------------------------------------------------------


def numbered_media(first_column: int = 0) -> PromptMedia:
    """Two rows with a place each in `.`: `..x.` takes item 0 (one token) and `xx.x` the two items behind it."""
    places = torch.tensor([[0, 0, 1, 0], [1, 1, 0, 1]]).bool()
    grids = [(1, 2, 2), (1, 2, 4), (1, 2, 2)]  # 1, 2 and 1 tokens
    return PromptMedia(places, torch.zeros(16, 3, 14, 14), grids, (2, 2), first_column)


def number_items(calls: list):
    """Features 1, 2 and 3, 4 of the three items, told by their grids' place in the call."""

    def encode(pixel_values, grid_thws):
        assert len(pixel_values) == int(grid_thws.prod(-1).sum())
        calls.append(grid_thws.tolist())
        start = 1 if len(calls) == 1 else 4  # the test below asks for items 0 and 1 first, then for item 2
        tokens = [torch.arange(n) for n in count_tokens(grid_thws.tolist(), (2, 2))]
        return [t + start + sum(map(len, tokens[:i])) for i, t in enumerate(tokens)]

    return lambda *args: [item[:, None].float() for item in encode(*args)]


def test_windows_take_the_features_that_are_due():
    media, calls = numbered_media(), []
    encode = number_items(calls)
    assert media.insert(torch.zeros(2, 3, 1), 0, encode)[..., 0].tolist() == [[0, 0, 1], [2, 3, 0]]
    assert not media.reach(2, 1) or media.reach(3, 5)
    assert media.insert(torch.zeros(4, 3, 1), 2, encode)[..., 0].tolist() == [
        [1, 0, 0],
        [1, 0, 0],
        [0, 4, 0],
        [0, 4, 0],
    ]
    assert calls == [[[1, 2, 2], [1, 2, 4]], [[1, 2, 2]]]
    assert [media.reach(start, 1) for start in range(6)] == [True, True, True, True, False, False]


def test_windows_count_cached_tokens_that_are_not_among_the_ids():
    media = numbered_media(first_column=10)
    assert media.insert(torch.zeros(2, 3, 1), 10, number_items([]))[..., 0].tolist() == [[0, 0, 1], [2, 3, 0]]
    assert [media.reach(start, 1) for start in range(10, 16)] == [True, True, True, True, False, False]


def test_a_copy_shares_pixels_and_has_no_features():
    media = numbered_media()
    media.insert(torch.zeros(2, 3, 1), 0, number_items([]))
    twin = copy.deepcopy(media)
    assert media.features and not twin.features
    assert twin.pixel_values is media.pixel_values and twin.places.equal(media.places)
