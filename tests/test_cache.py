"""The latent in transformers' cache classes: static = dynamic, growing in place, crop, reorder, repeat, select."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.bias import CausalBias, CausalVariant
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

from builders import assert_close, golden_model
from kimi.kimi_cache import (
    LatentLayer,
    causal_mask,
    filled_lengths,
    lower_right,
    new_cache,
    readable_mask,
    reserve,
    with_latent_layers,
)

IDS = torch.randint(3, 48, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return golden_model(request.param)


@torch.no_grad()
def feed(model, cache, ids, cuts):
    """Logits of all of ids, fed in pieces."""
    pieces = ids.tensor_split(cuts, dim=1)
    return torch.cat(
        [model(piece, past_key_values=cache).logits for piece in pieces if piece.shape[1]], dim=1
    )


def crop_by(cache, removed):
    """Takes away tokens at the end; 4.57 also accepts a new length, 5.x only this."""
    cache.crop(-removed)


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 9, 30], list(range(1, 40))])
def test_any_cut_and_any_cache_gives_the_same_logits(model, cuts):
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
    text = model.config.text_config
    static = StaticCache(config=text, max_cache_len=48)
    for cache in (new_cache(text), DynamicCache(config=text), DynamicCache(), static):
        assert_close(feed(model, cache, IDS, cuts), want, 1e-5, f"{type(cache).__name__}, fp32")


CACHES = {
    "latent": new_cache,
    "dynamic": lambda text: DynamicCache(),
    "static": lambda text: StaticCache(config=text, max_cache_len=48),
}


def fail(*args, **kwargs):
    raise MemoryError


def lengths(cache):
    return {int(layer.get_seq_length()) for layer in cache.layers}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("where", ["mlp", "lm_head"])
def test_a_forward_that_fails_leaves_the_cache_as_it_was(model, kind, past, where, monkeypatch):
    """As where memory runs out or a forced implementation is refused, in the middle of the layers or behind them."""
    text, language = model.config.text_config, model.language_model
    cache = CACHES[kind](text)
    want = feed(model, new_cache(text), IDS, [past])[:, past:]
    if past:
        feed(model, cache, IDS[:, :past], [])
    with monkeypatch.context() as patch:
        patch.setattr(
            language.lm_head if where == "lm_head" else language.model.layers[-1].mlp, "forward", fail
        )
        for num_new in (5, 1):
            with pytest.raises(MemoryError), torch.no_grad():
                model(IDS[:, past : past + num_new], past_key_values=cache)
            assert lengths(cache) <= {past}
    assert_close(feed(model, cache, IDS[:, past:], [1]), want, 1e-5, f"{kind}, fp32")


@pytest.mark.parametrize("kind", ["latent", "dynamic"])
def test_a_prompt_that_did_not_fit_may_be_tried_with_fewer_rows(model, kind, monkeypatch):
    cache = CACHES[kind](model.config.text_config)
    with monkeypatch.context() as patch:
        patch.setattr(model.language_model.model.layers[-1].mlp, "forward", fail)
        with pytest.raises(MemoryError), torch.no_grad():
            model(IDS, past_key_values=cache)
    assert_close(feed(model, cache, IDS[:1], [9]), feed(model, None, IDS[:1], []), 1e-5, "one row, fp32")


@pytest.mark.parametrize("kind", CACHES)
def test_what_the_caller_says_about_positions_does_not_shorten_a_cache(model, kind, monkeypatch):
    cache = CACHES[kind](model.config.text_config)
    feed(model, cache, IDS[:, :7], [])
    monkeypatch.setattr(model.language_model.model.layers[0].mlp, "forward", fail)
    with pytest.raises(MemoryError), torch.no_grad():
        positions = torch.arange(7, 9)
        model(
            IDS[:, 7:9], past_key_values=cache, position_ids=positions[None], cache_position=torch.arange(2)
        )
    assert lengths(cache) == {7}


def test_an_update_that_failed_half_way_is_taken_back(model, monkeypatch):
    """Keys were joined, values were not."""
    cache = DynamicCache(config=model.config.text_config)
    cache.layers = [DynamicLayer() for _ in cache.layers]
    feed(model, cache, IDS[:, :7], [])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def half(layer, keys, values, *args, **kwargs):
        layer.keys = torch.cat((layer.keys, keys), dim=-2)
        raise MemoryError

    monkeypatch.setattr(DynamicLayer, "update", half)
    with pytest.raises(MemoryError), torch.no_grad():
        model(IDS[:, 7:9], past_key_values=cache)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert layer.keys.equal(keys) and layer.values.equal(values)


def test_the_error_that_comes_out_is_the_first_one(model, monkeypatch):
    cache = new_cache(model.config.text_config)
    feed(model, cache, IDS[:, :7], [])
    monkeypatch.setattr("kimi.kimi_cache._shorten", lambda *args: [][0])
    monkeypatch.setattr(model.language_model.model.layers[-1].mlp, "forward", fail)
    with pytest.raises(MemoryError), torch.no_grad():
        model(IDS[:, 7:9], past_key_values=cache)


@pytest.mark.parametrize("kind", ["latent", "dynamic"])
def test_a_failure_in_a_compiled_model_is_taken_back_too(model, kind, monkeypatch):
    """Where the graph breaks, as before experts of a pool, or where a forced implementation is refused while tracing."""
    cache = CACHES[kind](model.config.text_config)
    feed(model, cache, IDS[:, :7], [])

    @torch.compiler.disable
    def broken(x):
        raise MemoryError

    monkeypatch.setattr(model.language_model.model.layers[-1].mlp, "forward", broken)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(MemoryError), torch.no_grad():
        compiled(IDS[:, 7:9], past_key_values=cache)
    assert lengths(cache) == {7}


def test_a_static_cache_holds_576_values_too(model):
    text = model.config.text_config
    cache = StaticCache(config=text, max_cache_len=48)
    feed(model, cache, IDS, [5])
    assert cache.layers[0].keys.shape == (2, 1, 48, text.kv_lora_rank)
    assert cache.layers[0].values.shape == (2, 1, 48, text.qk_rope_head_dim)


def test_a_step_writes_one_token_in_place(model):
    cache = new_cache(model.config.text_config)
    feed(model, cache, IDS[:, :8], [])
    where = [layer.keys.data_ptr() for layer in cache.layers]
    feed(model, cache, IDS[:, 8:], list(range(1, 32)))
    assert [layer.keys.data_ptr() for layer in cache.layers] == where
    assert all(type(layer) is LatentLayer for layer in cache.layers) and isinstance(cache, DynamicCache)


def test_growth_copies_a_token_few_times_and_wastes_an_eighth():
    layer, copied, before = LatentLayer(), 0, None
    for length in range(1, 20_001):
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 2))
        if layer.keys.data_ptr() != before:
            copied, before = copied + length, layer.keys.data_ptr()
    assert copied <= 10 * 20_000
    assert layer.keys.untyped_storage().nbytes() <= 20_000 * 4 * 4 * 9 / 8 + 256 * 4 * 4
    assert layer.get_seq_length() == 20_000


def test_crop_then_another_ending(model):
    cache = new_cache(model.config.text_config)
    feed(model, cache, IDS, [20])
    crop_by(cache, 15)
    assert cache.get_seq_length() == 25
    other = torch.cat((IDS[:, :25], IDS[:, 10:20]), dim=1)
    with torch.no_grad():
        want = model(other, use_cache=False).logits[:, 25:]
    assert_close(feed(model, cache, other[:, 25:], [4]), want, 1e-5, "fp32")


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
        lambda cache: (cache.batch_select_indices(torch.tensor([1])), cache.batch_repeat_interleave(2)),
    ],
)
def test_rows_move_and_go_on(model, change):
    cache = new_cache(model.config.text_config)
    feed(model, cache, IDS[:, :20], [])
    change(cache)
    rows = IDS[[1, 1]]
    with torch.no_grad():
        want = model(rows, use_cache=False).logits[:, 20:]
    assert_close(feed(model, cache, rows[:, 20:], [1, 2]), want, 1e-5, "fp32")


def test_a_copy_is_independent(model):
    cache = new_cache(model.config.text_config)
    feed(model, cache, IDS[:, :20], [])
    branch = copy.deepcopy(cache)
    first = feed(model, cache, IDS[:, 20:], [])
    feed(model, branch, IDS[:, :20], [3])
    with torch.no_grad():
        assert_close(first, model(IDS).logits[:, 20:], 1e-5, "fp32")
        again = model(IDS[:, :1], past_key_values=cache).logits
        assert_close(again, model(torch.cat((IDS, IDS[:, :1]), 1)).logits[:, -1:], 1e-5, "fp32")


def test_with_gradients_and_between_inference_modes(model):
    cache = new_cache(model.config.text_config)
    with torch.inference_mode():
        model(IDS[:, :10], past_key_values=cache)
    with torch.no_grad():
        model(IDS[:, 10:20], past_key_values=cache)
    out = model(IDS[:, 20:], past_key_values=cache, labels=IDS[:, 20:])
    out.loss.backward()
    with torch.no_grad():
        assert_close(out.logits.detach(), model(IDS).logits[:, 20:], 1e-5, "fp32")


def test_only_an_untouched_default_cache_is_replaced(model):
    text = model.config.text_config
    assert type(with_latent_layers(DynamicCache(config=text), text).layers[0]) is LatentLayer
    used = DynamicCache(config=text)
    feed(model, used, IDS[:, :4], [])
    static = StaticCache(config=text, max_cache_len=8)
    for kept in (used, static, DynamicCache(config=text, offloading=True)):
        assert with_latent_layers(kept, text) is kept
    assert type(used.layers[0]) is DynamicLayer


class EightBitLayer(QuantizedLayer):
    """A backend in plain torch for transformers' quantised cache: 8 bits, a scale and a zero point for each token."""

    def _quantize(self, tensor, axis):
        low, high = tensor.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / 255).clamp(min=1e-8)
        return ((tensor - low) / scale).round().to(torch.uint8), scale, low

    def _dequantize(self, quantized):
        codes, scale, low = quantized
        return codes * scale + low


def relative_error(got, want):
    """The median over the tokens. One that changes an expert by it gets other logits altogether, and how many
    do so is a matter of the prompt."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).median())


def quantized_cache(config, layer_class=EightBitLayer, **settings):
    return Cache(layers=[layer_class(**settings) for _ in range(config.num_hidden_layers)])


@pytest.mark.parametrize("cuts", [[], [9, 10, 11, 30], list(range(1, 40))])
@pytest.mark.parametrize("residual_length", [4, 128])
def test_a_quantized_cache_keeps_logits_close(model, cuts, residual_length):
    """Latent and rotated key differ in width, and each is quantised as it is; a few recent tokens stay exact."""
    text = model.config.text_config
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
    cache = quantized_cache(text, residual_length=residual_length)
    got = feed(model, cache, IDS, cuts)
    assert cache.get_seq_length() == 40
    codes = cache.layers[0]._quantized_keys[0], cache.layers[0]._quantized_values[0]
    assert [tensor.shape[-1] for tensor in codes] == [text.kv_lora_rank, text.qk_rope_head_dim]
    # 8 bits for a value. Over 40 prompts it is 0.0055 at most, and with 4 bits 0.015 at least.
    assert relative_error(got, want) < 0.012
    if cuts:
        assert not got.equal(want), "it was quantised"


def test_generate_with_a_quantized_cache(model):
    cache = quantized_cache(model.config.text_config, residual_length=4)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    out = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    with torch.no_grad():
        want = model(out.sequences[:, :-1], use_cache=False).logits[:, 39:]
    assert relative_error(torch.stack(out.logits, 1), want) < 0.012  # at most 0.0048 of 40 prompts
    assert cache.get_seq_length() == 51


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers 4.57 has no fp8 cache"
)
def test_transformers_own_fp8_cache(model):
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
    cache = cache_utils.QuantizedCache("fp8", model.config.text_config)
    got = feed(model, cache, IDS, [20, 21])
    # Of the tokens that read what was quantised. Three bits of mantissa: over 40 prompts it is 0.046 at most.
    assert relative_error(got[:, 20:], want[:, 20:]) < 0.1
    assert cache.layers[0].get_seq_length() == 40


class NoStream(contextlib.nullcontext):
    """Stands for a CUDA stream where there is none."""

    def wait_stream(self, stream):
        pass


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_an_offloaded_cache_without_its_gpu(model, cache_class, monkeypatch):
    """What can be seen on a CPU: each layer goes to another memory after its update and comes back before the next."""
    text, moves = model.config.text_config, []

    def move(self, name):
        if self.is_initialized:
            self.keys, self.values = self.keys.clone(), self.values.clone()
            moves.append((name, self))

    for name in ("offload", "prefetch"):
        monkeypatch.setattr(cache_utils.CacheLayerMixin, name, lambda self, name=name: move(self, name))
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    settings = {} if cache_class is DynamicCache else {"max_cache_len": 48}
    cache = cache_class(config=text, offloading=True, **settings)
    with torch.no_grad():
        want = model(IDS, use_cache=False).logits
    assert_close(feed(model, cache, IDS, [20, 21]), want, 1e-5, "fp32")
    for layer in cache.layers:
        assert ("offload", layer) in moves and ("prefetch", layer) in moves


# ------------------------------------------------------------------------------------------------------ masks on a GPU


def as_on_a_gpu(num_new, batch=1):
    """Embeddings of which causal_mask asks the shape and where they are; masks are then made on the CPU."""
    return SimpleNamespace(
        is_cuda=True, device=torch.device("cpu"), shape=(batch, num_new, 64), dtype=torch.float32
    )


def cache_of(config, length, batch=1):
    cache = new_cache(config)
    if length:
        cache.update(torch.zeros(batch, 1, length, 32), torch.zeros(batch, 1, length, 8), 0)
    return cache


@pytest.mark.parametrize(("num_new", "cached"), [(1, 0), (1, 9), (7, 0), (7, 9)])
def test_a_gpu_needs_no_mask_without_padding(num_new, cached):
    """SDPA has fast kernels for "causal, the last of all tokens", and none for a mask that says so."""
    text = golden_model("sdpa").config.text_config
    places = torch.arange(cached, cached + num_new)
    given = text, as_on_a_gpu(num_new), None, cache_of(text, cached), places[None], places
    assert causal_mask(*given) == (None, cached)
    bias = lower_right(num_new, num_new + cached, torch.device("cpu"))
    assert type(bias) is CausalBias and bias.variant == CausalVariant.LOWER_RIGHT
    want = readable_mask(None, num_new, num_new + cached, torch.device("cpu"), past_length=cached)
    assert num_new == 1 or bias._materialize().equal(want[0, 0])


@pytest.mark.parametrize(("num_new", "cached"), [(1, 0), (1, 9), (7, 0), (7, 9)])
@pytest.mark.parametrize("columns", [0, 2, -1], ids=["exact", "too many", "too few"])
def test_a_gpu_gets_the_mask_that_transformers_makes(num_new, cached, columns):
    """Without the look at its values, for which transformers waits."""
    text = golden_model("sdpa").config.text_config
    padding = torch.ones(2, num_new + cached + columns, dtype=torch.long)
    padding[0, : (num_new + cached) // 2] = 0
    places = torch.arange(cached, cached + num_new)
    cache = cache_of(text, cached, 2)
    got, past_length = causal_mask(text, as_on_a_gpu(num_new, 2), padding, cache, places[None], places)
    want, _ = causal_mask(text, torch.zeros(2, num_new, 64), padding, cache, places[None], places)
    assert past_length is None and got.shape == (2, 1, num_new, num_new + cached)
    if want is None:
        assert got.all()
    else:
        seen = want.any(-1, keepdim=True)  # transformers lets a row that sees nothing see something
        assert torch.where(seen, got, False).equal(torch.where(got.any(-1, keepdim=True), want, False))


def test_lengths_are_those_of_a_static_cache():
    text = golden_model("sdpa").config.text_config
    places = torch.arange(5, 8)
    static = StaticCache(config=text, max_cache_len=48)
    lengths = filled_lengths(static, places, 3)
    assert lengths.tolist() == [8, 8, 8] and lengths.is_contiguous()
    assert filled_lengths(new_cache(text), places, 3) is None and filled_lengths(None, places, 3) is None


def test_room_is_what_update_would_fill():
    """The caller writes there itself, and the layer has grown."""
    states = [torch.randn(2, 1, 3, width) for width in (32, 8)]
    mine, other = LatentLayer(), LatentLayer()
    for _ in range(200):
        places, filled = mine.reserve(*states)
        for place, new in zip(places, states, strict=True):
            place.copy_(new)
        for got, want in zip(filled, other.update(*states), strict=True):
            assert got.equal(want)
    assert mine.get_seq_length() == 600
    text = golden_model("sdpa").config.text_config
    assert reserve(None, 0, *states) is None and reserve(DynamicCache(), 0, *states) is None
    assert reserve(new_cache(text), 0, *[new.requires_grad_() for new in states]) is None
