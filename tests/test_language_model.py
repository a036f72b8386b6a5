"""The decoder against the golden file, an fp64 oracle, transformers' DeepSeek-V3, and itself (cache, padding, chunks)."""

import pytest
import torch
from builders import LM_GOLDEN, assert_close, golden_model
from kimi.kimi_attention import apply_rotary, softmax_scale, yarn_inv_freq

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
