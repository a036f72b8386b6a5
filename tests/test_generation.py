"""Every way in which people call generate(): the same tokens wherever they must be equal."""

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from builders import assert_close, golden_model, small_config
from kimi.kimi_cpu import why_unavailable
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi

MAJOR = int(transformers.__version__.split(".")[0])
IDS = torch.randint(3, 48, (2, 9), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(IDS)
NEW = 7
GREEDY = {
    "attention_mask": MASK,
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 2,
    "eos_token_id": None,
}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return golden_model(request.param)


@pytest.fixture(scope="module")
def greedy(model):
    """The tokens, one forward over everything per step."""
    ids = IDS
    for _ in range(NEW):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def test_greedy(model, greedy):
    assert model.generate(IDS, **GREEDY).equal(greedy)
    assert model.generate(IDS, use_cache=False, **GREEDY).equal(greedy)


@pytest.mark.parametrize("cache", ["static", "dynamic", "offloaded"])
def test_cache_implementations(model, greedy, cache):
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads caches from CUDA only")
    assert model.generate(IDS, cache_implementation=cache, **GREEDY).equal(greedy)


def test_prefill_in_chunks(model, greedy):
    assert model.generate(IDS, prefill_chunk_size=4, **GREEDY).equal(greedy)


def test_prompt_lookup_and_assistant(model, greedy):
    unused = next(i for i in range(48) if i not in greedy)  # 4.57 cannot do this without an end token
    one = {**GREEDY, "attention_mask": MASK[:1], "eos_token_id": unused}
    assert model.generate(IDS[:1], prompt_lookup_num_tokens=3, **one).equal(greedy[:1])
    assistant = golden_model(model.config._attn_implementation, num_hidden_layers=1)
    assert model.generate(IDS[:1], assistant_model=assistant, **one).equal(greedy[:1])
    assert model.generate(IDS[:1], assistant_model=model, **one).equal(greedy[:1])


def test_beams_find_at_least_the_greedy_score(model, greedy):
    def score(ids):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits.log_softmax(-1)
        return logits[:, 8:-1].gather(-1, ids[:, 9:, None]).sum((1, 2))

    found = model.generate(IDS, num_beams=4, length_penalty=0.0, **GREEDY)
    assert (score(found) >= score(greedy) - 1e-4).all()
    several = model.generate(IDS, num_beams=4, num_return_sequences=3, length_penalty=0.0, **GREEDY)
    assert several.shape[0] == 6 and several[::3].equal(found)


def test_sampling_is_seeded_and_returns_several(model):
    settings = {**GREEDY, "do_sample": True, "top_p": 0.95, "num_return_sequences": 3}
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(model.generate(IDS, **settings))
    assert runs[0].shape == (6, 16) and runs[0].equal(runs[1]) and not runs[0][0].equal(runs[0][1])


def test_scores_and_outputs(model, greedy):
    out = model.generate(IDS, output_scores=True, output_logits=True, return_dict_in_generate=True, **GREEDY)
    with torch.no_grad():
        want = model(greedy[:, :-1], use_cache=False).logits[:, 8:]
    assert out.sequences.equal(greedy)
    assert_close(torch.stack(out.logits, 1), want, 1e-5, "cached against whole, fp32")
    assert out.past_key_values.get_seq_length() == 15
    attentive = golden_model("eager").generate(
        IDS, output_attentions=True, output_hidden_states=True, return_dict_in_generate=True, **GREEDY
    )
    assert attentive.attentions[0][0].shape == (2, 2, 9, 9) and attentive.attentions[1][0].shape == (
        2,
        2,
        1,
        10,
    )
    assert len(attentive.hidden_states) == NEW


def test_inputs_embeds(model, greedy):
    embeds = model.get_input_embeddings()(IDS).detach()
    assert model.generate(inputs_embeds=embeds, **GREEDY).equal(greedy[:, 9:])


def test_streamers_criteria_and_processors(model, greedy):
    class Seen(BaseStreamer):
        ids: list = []  # noqa: RUF012

        def put(self, value):
            self.ids = self.ids + value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Seen()
    model.generate(IDS[:1], streamer=streamer, **{**GREEDY, "attention_mask": MASK[:1]})
    assert streamer.ids == greedy[0].tolist() and streamer.ended

    class AfterThree(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= 12)

    assert model.generate(IDS, stopping_criteria=StoppingCriteriaList([AfterThree()]), **GREEDY).equal(
        greedy[:, :12]
    )

    class OnlyEven(LogitsProcessor):
        def __call__(self, ids, scores):
            odd = torch.arange(scores.shape[-1]) % 2 == 1
            return scores.masked_fill(odd, -torch.inf)

    constrained = model.generate(IDS, logits_processor=LogitsProcessorList([OnlyEven()]), **GREEDY)
    assert not (constrained[:, 9:] % 2).any()


def test_max_length_of_the_generation_config(model):
    config = model.generation_config
    before = config.max_length
    try:
        config.max_length = 13
        assert model.generate(IDS, **{**GREEDY, "max_new_tokens": None}).shape[1] == 13
        assert model.generate(IDS, **GREEDY).shape[1] == 9 + NEW
    finally:
        config.max_length = before


def test_a_shared_history_is_computed_once(model, greedy):
    """The cache of one call goes into the next; only new tokens are computed."""
    seen = []
    hook = model.language_model.model.norm.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    try:
        first = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
        turn = torch.randint(3, 48, (2, 5), generator=torch.Generator().manual_seed(8))
        ids = torch.cat((first.sequences, turn), dim=1)
        settings = {**GREEDY, "attention_mask": torch.ones_like(ids)}
        seen.clear()
        second = model.generate(ids, past_key_values=first.past_key_values, **settings)
        assert seen == [6, *[1] * (NEW - 1)], "the last token of the first answer and the five new ones"
    finally:
        hook.remove()
    assert second.equal(model.generate(ids, **settings))


def test_a_left_padded_batch_with_an_image_equals_each_row_alone():
    config = small_config(packed=False)
    torch.manual_seed(0)
    model = Kimi(config).eval()
    pad, media = config.pad_token_id, config.media_placeholder_token_id
    with_image = torch.tensor([[5, 6, *[media] * 6, 7, 8, 9]])
    text = torch.tensor([[11, 12, 13, 14]])
    pixels, grid = torch.randn(24, 3, 14, 14), torch.tensor([[1, 4, 6]])
    batch = torch.cat((torch.cat((torch.full((1, 7), pad), text), 1), with_image))
    mask = (batch != pad).long()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": pad}
    both = model.generate(batch, attention_mask=mask, pixel_values=pixels, grid_thws=grid, **settings)[:, 11:]
    alone = model.generate(text, attention_mask=torch.ones_like(text), **settings)[0, 4:]
    image = model.generate(
        with_image,
        attention_mask=torch.ones_like(with_image),
        pixel_values=pixels,
        grid_thws=grid,
        **settings,
    )[0, 11:]
    assert both[0].equal(alone) and both[1].equal(image)
    other = model.generate(
        with_image,
        attention_mask=torch.ones_like(with_image),
        pixel_values=-pixels,
        grid_thws=grid,
        **settings,
    )[0, 11:]
    assert not other.equal(image), "the picture matters"


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_and_several_answers_see_the_pictures_of_their_row(mode):
    """transformers alone would repeat rows of patches, and mix the pictures up silently."""
    config = small_config(packed=False)
    torch.manual_seed(0)
    model = Kimi(config).eval()
    media = config.media_placeholder_token_id
    rows = torch.tensor([[5, *[media] * 6, 7, 8, 9], [4, *[media] * 2, 3, *[media] * 4, 6, 2]])
    grids = torch.tensor([[1, 4, 6], [1, 2, 4], [2, 4, 4]])
    pixels = torch.randn(24 + 8 + 32, 3, 14, 14) * 3
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **mode}
    both = model.generate(
        rows, attention_mask=torch.ones_like(rows), pixel_values=pixels, grid_thws=grids, **settings
    )
    one = torch.ones(1, 10, dtype=torch.long)
    first = model.generate(
        rows[:1], attention_mask=one, pixel_values=pixels[:24], grid_thws=grids[:1], **settings
    )
    second = model.generate(
        rows[1:], attention_mask=one, pixel_values=pixels[24:], grid_thws=grids[1:], **settings
    )
    assert both.equal(torch.cat((first, second)))
    with pytest.raises(ValueError, match=r"found 12 <\|media_pad\|> tokens but the media make 8"):
        mask = torch.ones_like(rows)
        model.generate(rows, attention_mask=mask, pixel_values=pixels[:32], grid_thws=grids[:2], **settings)


def test_a_nan_is_traced_to_the_layer_that_made_it():
    model = golden_model("sdpa")
    with torch.no_grad():
        assert torch.isfinite(model(IDS, debug_nan=True).logits).all()
        model.language_model.model.layers[1].mlp.gate.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layer 1 made the first NaN or infinity: \d+ of 576 values"):
            model(IDS, debug_nan=True)
        with pytest.raises(ValueError, match="layer 1 made the first NaN"):
            model.generate(IDS, debug_nan=True, **GREEDY)
        model.get_input_embeddings().weight[5] = float("inf")
        with pytest.raises(ValueError, match="embed_tokens made the first NaN or infinity: 32 of"):
            model(torch.tensor([[5, 6]]), debug_nan=True)


def test_greedy_decoding_of_a_thinking_model_warns_once(model, caplog):
    transformers.utils.logging.warning_once.cache_clear()  # an earlier test may have had it
    for sample in (True, False, False):
        model.generate(IDS, **{**GREEDY, "do_sample": sample})
    assert caplog.text.count("may go round in circles") == 1


def test_steps_without_padding_carry_no_mask(model, greedy):
    """On a GPU a look at a mask is a wait, and a mask keeps SDPA from its fast kernels; generate() looks once."""
    masks = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    try:
        assert model.generate(IDS, **GREEDY).equal(greedy)
        assert model.generate(IDS, **{**GREEDY, "attention_mask": None}).equal(greedy)
        assert len(masks) == 2 * NEW and all(mask is None for mask in masks)
        padded = MASK.clone()
        padded[0, :3] = 0
        for pad, mask in (
            (2, padded),
            (int(IDS[0, 0]), None),
        ):  # given, or made by transformers from a pad token
            masks.clear()
            model.generate(
                IDS, **{**GREEDY, "attention_mask": mask, "pad_token_id": pad, "max_new_tokens": 2}
            )
            assert len(masks) == 2 and all(mask is not None and not mask.all() for mask in masks)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("packed", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
def test_the_decode_step_compiles_whole(packed, dtype):
    """torch.compile(fullgraph=True) with a static cache: no graph break, the same tokens. Packed experts in bf16 are one
    operator, where there is a C compiler."""
    config = small_config(packed)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = Kimi(config).eval().to(dtype)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ids = torch.randint(3, 300, (1, 6))
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
    }
    want = model.generate(ids, pad_token_id=0, **settings)
    torch._dynamo.reset()  # what other tests compiled of this function counts towards its limit
    step = torch.compile(model.forward, fullgraph=True, backend=keep)
    cache = transformers.StaticCache(config=config.text_config, max_cache_len=16)
    with torch.no_grad():
        logits, got = model(ids, past_key_values=cache).logits, [ids]
        for position in range(6, 11):
            got.append(logits[:, -1:].argmax(-1))
            if position == 10:
                break
            places = {"cache_position": torch.tensor([position])} if MAJOR < 5 else {}
            logits = step(got[-1], past_key_values=cache, **places).logits
    assert torch.cat(got, 1).equal(want)
    operators = [n for graph in graphs for n in graph.graph.nodes if "routed_experts" in str(n.target)]
    whole = packed and dtype == torch.bfloat16 and why_unavailable() is None
    assert bool(operators) == whole
