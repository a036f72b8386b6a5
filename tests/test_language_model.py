"""The decoder against the golden file, transformers' DeepSeek-V3, and itself (cache, padding, chunks, gradients)."""

import pytest
import torch

from builders import LM_GOLDEN, assert_close, golden_model
from kimi.configuration_kimi import KimiK25Config
from kimi.modeling_kimi import RotaryEmbedding, apply_rotary, rope_amplitude, softmax_scale, yarn_inv_freq

CASES = LM_GOLDEN["cases"]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"groups{c['n_group']}-eps{c['latent_norm_eps']}-pos{c['position_ids'][0]}"
)
def test_golden_stages(case, attn):
    model = golden_model(
        attn, n_group=case["n_group"], topk_group=case["topk_group"], latent_norm_eps=case["latent_norm_eps"]
    )
    seen = {}
    layers = model.language_model.model.layers
    layers[0].self_attn.register_forward_hook(lambda m, a, out: seen.update(attn=out[0]))
    layers[1].mlp.gate.register_forward_hook(lambda m, a, out: seen.update(x=a[0], route=out))
    ids = torch.tensor([LM_GOLDEN["input_ids"]])
    with torch.no_grad():
        out = model(ids, position_ids=torch.tensor([case["position_ids"]]), output_hidden_states=True)
    far = case["position_ids"][0] > 0
    atol, why = (3e-5, "fp32 angles round far out") if far else (1e-5, "fp32, another order of sums")
    assert_close(seen["attn"][0], torch.tensor(case["layer0_attn_out"]), atol, why)
    assert_close(out.hidden_states[1][0], torch.tensor(case["hidden_after_layer0"]), atol, why)
    logits = torch.nn.functional.linear(seen["x"], layers[1].mlp.gate.weight)
    assert_close(logits, torch.tensor(case["layer1_router_logits"]), atol, why)
    for row, chosen in enumerate(case["layer1_topk_sorted_by_expert"]):
        got = dict(zip(seen["route"][0][row].tolist(), seen["route"][1][row].tolist(), strict=True))
        assert got.keys() == {expert for expert, _ in chosen}
        for expert, weight in chosen:
            assert got[expert] == pytest.approx(weight, abs=atol)
    assert_close(out.logits[0], torch.tensor(case["final_logits"]), atol, why)
    assert out.logits[0].argmax(-1).tolist() == case["argmax"]


def test_real_frequencies_scale_and_rotation():
    rope = KimiK25Config().text_config.rope_parameters
    assert_close(yarn_inv_freq(64, rope), torch.tensor(LM_GOLDEN["real_inv_freq_dim64"]), 1e-7, "fp32 powers")
    tiny = torch.tensor(LM_GOLDEN["inv_freq_dim8"])
    assert_close(yarn_inv_freq(8, rope), tiny, 1e-7, "fp32 powers")
    assert softmax_scale(KimiK25Config().text_config) == pytest.approx(
        LM_GOLDEN["real_softmax_scale"], rel=1e-12
    )
    assert rope_amplitude(rope) == 1.0
    golden = LM_GOLDEN["rope_vector"]
    cos, sin = RotaryEmbedding(KimiK25Config().text_config)(torch.tensor([[golden["position"]]]))
    rotated = apply_rotary(torch.tensor(golden["x"]).view(1, 1, 1, 64), cos, sin)
    assert_close(rotated.flatten(), torch.tensor(golden["out_half_layout"]), 1e-6, "fp32 rotation")


def test_frequencies_survive_half_and_meta():
    config = KimiK25Config().text_config
    with torch.device("meta"):
        rotary = RotaryEmbedding(config)
    rotary = rotary.half()
    freq = rotary.inv_freq(torch.device("cpu"))
    assert freq.dtype == torch.float32 and freq.tolist() == pytest.approx(
        LM_GOLDEN["real_inv_freq_dim64"], rel=1e-6
    )


def logits_of(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.fixture(params=["eager", "sdpa"])
def model(request):
    return golden_model(request.param)


IDS = torch.tensor([LM_GOLDEN["input_ids"] * 3])


@pytest.mark.parametrize("cut", [1, 6, 20])
def test_cached_is_uncached_at_any_cut(model, cut):
    whole = logits_of(model, IDS)
    with torch.no_grad():
        first = model(IDS[:, :cut], use_cache=True)
        logits = [first.logits]
        for t in range(cut, IDS.shape[1]):
            step = model(IDS[:, t : t + 1], past_key_values=first.past_key_values)
            logits.append(step.logits)
    assert_close(torch.cat(logits, 1), whole, 1e-5, "one token at a time sums in another order")


def test_prefill_in_chunks_is_one_prefill(model):
    whole, cache = logits_of(model, IDS), None
    pieces = []
    for chunk in IDS.split(5, dim=1):
        with torch.no_grad():
            out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole, 1e-5, "fp32, another order of sums")


def test_the_cache_is_the_latent(model):
    config = model.config.text_config
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    stored = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
    want = torch.Size((1, 1, 21, config.kv_lora_rank)), torch.Size((1, 1, 21, config.qk_rope_head_dim))
    assert stored == [want] * config.num_hidden_layers
    full = KimiK25Config().text_config
    assert full.num_hidden_layers * (full.kv_lora_rank + full.qk_rope_head_dim) * 2 == 70_272


def test_left_padded_batch_equals_each_row_alone(model):
    short = IDS[:, :4]
    padded = torch.cat((torch.full((1, 17), 2), short), dim=1)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :17] = 0
    both = logits_of(model, torch.cat((padded, IDS)), attention_mask=mask)
    assert torch.isfinite(both).all(), "rows of padding must not become NaN"
    assert_close(both[0, 17:], logits_of(model, short)[0], 1e-5, "fp32, another order of sums")
    assert_close(both[1], logits_of(model, IDS)[0], 1e-5, "fp32, another order of sums")


def test_left_padded_generation_equals_each_row_alone(model):
    short = IDS[:, :4]
    batch = torch.cat((torch.cat((torch.full((1, 17), 2), short), dim=1), IDS))
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :17] = 0
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
    both = model.generate(batch, attention_mask=mask, **settings)[:, 21:]

    def alone(ids, **kwargs):  # the prompt holds the pad id, which generate() would otherwise mask
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **kwargs)[
            0, ids.shape[1] :
        ]

    assert both[0].tolist() == alone(short).tolist()
    assert both[1].tolist() == alone(IDS).tolist()
    uncached = alone(IDS, use_cache=False)
    assert both[1].tolist() == uncached.tolist()


def test_logits_to_keep_labels_and_outputs(model):
    whole = logits_of(model, IDS)
    assert logits_of(model, IDS, logits_to_keep=2).equal(
        logits_of(model, IDS, logits_to_keep=torch.tensor([19, 20]))
    )
    assert_close(logits_of(model, IDS, logits_to_keep=2), whole[:, -2:], 1e-6, "a smaller product")
    labels = IDS.clone()
    labels[:, :3] = -100
    with torch.no_grad():
        out = model(IDS, labels=labels, output_hidden_states=True)
        as_tuple = model(IDS, labels=labels, return_dict=False)
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
    want = torch.nn.functional.cross_entropy(whole[0, 2:-1], IDS[0, 3:])
    assert out.loss.item() == pytest.approx(want.item(), abs=1e-5) and as_tuple[0].item() == out.loss.item()
    assert len(out.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert embedded.equal(whole)


def test_attention_weights_come_from_eager():
    model = golden_model("eager")
    with torch.no_grad():
        weights = model(IDS, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (1, 2, 21, 21)
    assert_close(weights[0].sum(-1), torch.ones(1, 2, 21), 1e-6, "a softmax")
    assert weights[0].triu(1).abs().max() == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_trained_weight(checkpointing):
    model = golden_model("sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    text = {n: p for n, p in model.named_parameters() if n.startswith("language_model.")}
    without = {n for n, p in text.items() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())}
    assert not without
    assert {n for n, p in text.items() if not p.requires_grad} == {
        "language_model.model.layers.1.mlp.gate.e_score_correction_bias"
    }
    if checkpointing:
        plain = golden_model("sdpa").train()
        plain(IDS, labels=IDS).loss.backward()
        for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            if a.grad is not None:
                assert_close(a.grad, b.grad, 1e-6, name)


def test_agrees_with_deepseek_v3_of_transformers():
    """Random weights through transformers' own port; n_group is 1, for 4.57 fills closed groups with 0, not -inf."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ours = golden_model("eager", num_hidden_layers=3, rms_norm_eps=1e-6)
    fields = {
        **LM_GOLDEN["config"],
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6,
        "n_group": 1,
        "topk_group": 1,
    }
    theirs = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **fields, attn_implementation="eager", num_key_value_heads=2, max_position_embeddings=4096
        )
    ).eval()
    weights = {
        k.removeprefix("language_model."): v for k, v in ours.state_dict().items() if "language_model" in k
    }
    # 5.x stacks them.
    if not any(name.endswith("experts.0.gate_proj.weight") for name in theirs.state_dict()):
        weights = stacked_as_in_5(weights)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    ids = torch.randint(0, 48, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, 1e-4, "fp32 port, other order of sums")


def stacked_as_in_5(weights: dict) -> dict:
    out = {k: v for k, v in weights.items() if ".experts." not in k}
    for layer in (1, 2):
        at = f"model.layers.{layer}.mlp.experts."

        def stack(projection: str, at: str = at) -> torch.Tensor:
            return torch.stack([weights[f"{at}{e}.{projection}.weight"] for e in range(8)])

        out[at + "gate_up_proj"] = torch.cat((stack("gate_proj"), stack("up_proj")), dim=1)
        out[at + "down_proj"] = stack("down_proj")
    return out


def test_bad_ids_lengths_and_arguments_are_named(model):
    with pytest.raises(ValueError, match="token id 48 lies outside the vocabulary of 48 tokens"):
        model(torch.tensor([[1, 48]]))
    with pytest.raises(ValueError, match="token id -1 lies outside the vocabulary of 48 tokens"):
        model.generate(torch.tensor([[-1, 3]]), max_new_tokens=1)
    model.config.text_config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="there are 0 tokens to compute; give at least one"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="21 tokens exceed max_position_embeddings 20"):
        model.generate(IDS, max_new_tokens=1)
    with pytest.raises(ValueError, match="21 tokens exceed max_position_embeddings 20"):
        model(IDS)
    with torch.no_grad():
        cache = model(IDS[:, :18]).past_key_values
    with pytest.raises(
        ValueError, match=r"21 tokens \(18 of them cached\) exceed max_position_embeddings 20"
    ):
        model(IDS[:, 18:], past_key_values=cache)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
