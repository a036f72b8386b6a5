"""Router and experts: by hand, against an fp64 oracle, and as modules that are moved, cast, saved and loaded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import assert_close, small_config
from kimi import modeling_kimi
from kimi.kimi_backends import run_experts_gathered
from kimi.kimi_experts import ExpertMatrices, Experts, run_experts
from kimi.kimi_int4 import dequantize_int4, quantize_int4
from kimi.modeling_kimi import MoE, Router, route

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def moe_config(packed=True, **text):
    return small_config(packed, text).text_config


def filled(module, seed=0):
    """Random weights everywhere; packed experts get random codes and scales near 0.02."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.named_parameters():
        if name.endswith("weight_packed"):
            tensor.data = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator).int()
        elif name.endswith("weight_scale"):
            tensor.data = (torch.rand(tensor.shape, generator=generator) * 0.04).to(tensor.dtype)
        elif tensor.is_floating_point():
            tensor.data = (torch.randn(tensor.shape, generator=generator) * 0.2).to(tensor.dtype)
    return module


# ---------------------------------------------------------------------------------------------------------- routing


def test_the_bias_selects_but_never_weighs():
    router = Router(moe_config(n_routed_experts=4, num_experts_per_tok=2, routed_scaling_factor=2.0))
    router.weight.data.zero_()  # every score is sigmoid(0) = 0.5
    router.e_score_correction_bias.data = torch.tensor([0.0, 0.3, 0.2, -0.1])
    ids, weights = router(torch.ones(3, router.weight.shape[1]))
    assert [sorted(row) for row in ids.tolist()] == [[1, 2]] * 3
    assert_close(weights, torch.ones(3, 2), 1e-6, "0.5 / (0.5 + 0.5) * 2")
    router.norm_topk_prob = False
    assert_close(router(torch.ones(1, 64))[1], torch.ones(1, 2), 1e-6, "0.5 * 2")


def test_closed_groups_lose_even_against_negative_choices():
    """Filling closed groups with 0 instead of -inf would pick experts 2 and 3, whose group is closed."""
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    bias = torch.tensor([-0.9, -0.9, -1.2, -1.2])
    assert sorted(route(scores, bias, 2, n_group=2, topk_group=1)[0].tolist()) == [0, 1]


@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3)]),
    st.integers(1, 4),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_route_is_the_definition(rows, groups, top_k, seed):
    (n_group, topk_group), generator = groups, torch.Generator().manual_seed(seed)
    scores, bias = torch.rand(rows, 16, generator=generator), torch.randn(16, generator=generator)
    for row, got in zip(
        (scores + bias).tolist(), route(scores, bias, top_k, n_group, topk_group), strict=True
    ):
        size = 16 // n_group
        best = sorted(range(n_group), key=lambda g: -sum(sorted(row[g * size : (g + 1) * size])[-2:]))
        eligible = [e for g in best[:topk_group] for e in range(g * size, (g + 1) * size)]
        assert set(got.tolist()) == set(sorted(eligible, key=lambda e: -row[e])[:top_k])


def test_scores_are_fp32_in_a_bf16_model():
    """In bf16 these two logits are equal, and the wrong expert wins the tie."""
    router = Router(moe_config(n_routed_experts=2, num_experts_per_tok=1)).bfloat16()
    router.weight.data.zero_()
    router.weight.data[0, :2] = torch.tensor([1.0, 2**-9])
    router.weight.data[1, 0] = 1.0
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, :2] = 1.0
    ids, weights = router(x)
    assert ids.tolist() == [[0]] and weights.dtype == torch.float32
    router.weight.data = router.weight.data.flip(0)
    assert router(x)[0].tolist() == [[1]]


def test_casts_leave_the_bias_and_everything_packed_alone():
    moe = filled(MoE(moe_config()))
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.float(),
    ):
        cast(moe)
        for name, tensor in moe.state_dict().items():
            kept = ("experts." in name and "shared" not in name) or name.endswith("e_score_correction_bias")
            if kept:
                assert tensor.dtype == before[name].dtype and tensor.equal(before[name]), name
    assert moe.shared_experts.up_proj.weight.dtype == torch.float32
    assert moe.half().gate.weight.dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------- experts


def by_hand(moe, x):
    """fp64, one token and one expert at a time."""
    ids, weights = moe.gate(x)
    state = {k: v.double() for k, v in moe.state_dict().items() if not k.endswith(("packed", "shape"))}

    def matrix(expert, projection):
        if not moe.experts.packed:
            return state[f"experts.{expert}.{projection}.weight"]
        stack = moe.experts.matrices(projection)
        return dequantize_int4(stack.weight[expert], stack.scale[expert], torch.float64)

    def swiglu(row, gate, up, down):
        return down @ (torch.nn.functional.silu(gate @ row) * (up @ row))

    rows = []
    for row, chosen, factors in zip(x.double(), ids, weights.double(), strict=True):
        total = swiglu(row, *(state[f"shared_experts.{p}.weight"] for p in PROJECTIONS))
        for expert, factor in zip(chosen.tolist(), factors, strict=True):
            total = total + factor * swiglu(row, *(matrix(expert, p) for p in PROJECTIONS))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_agrees_with_the_sum_written_out(packed, rows):
    moe = filled(MoE(moe_config(packed)))
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(moe(x)[0], by_hand(moe, x[0]), 2e-5, "fp32 against fp64")
        assert_close(moe.bfloat16()(x.bfloat16())[0], by_hand(moe, x[0]), 0.15, "bf16 on outputs near 5")


def test_all_tokens_to_one_expert_and_none_to_the_others():
    experts = filled(Experts(moe_config()))
    x = torch.randn(9, 64)
    only = torch.full((9, 1), 5)
    out = experts(x, only, torch.ones(9, 1))
    alone = run_experts(
        x,
        torch.zeros(9, 1, dtype=torch.long),
        torch.ones(9, 1),
        *(
            ExpertMatrices(m.weight[5:6], m.scale[5:6])
            for m in map(experts.matrices, ("gate_proj", "up_proj", "down_proj"))
        ),
    )
    assert out.dtype == torch.float32 and out.equal(alone)


@pytest.mark.parametrize("packed", [True, False])
def test_gathered_is_the_same_without_a_look_at_the_routing(packed):
    experts = filled(Experts(moe_config(packed)))
    x, ids = torch.randn(6, 64), torch.stack([torch.randperm(8)[:3] for _ in range(6)])
    weights = torch.rand(6, 3)
    matrices = [experts.matrices(projection) for projection in PROJECTIONS]
    want = run_experts(x, ids, weights, *matrices)
    assert_close(run_experts_gathered(x, ids, weights, *matrices), want, 1e-4, "fp32, outputs near 10")


def test_identity_experts_give_a_sum_anyone_can_check():
    """All matrices are 1: silu(1) * 1 through three experts whose weights are 1, 2 and 3 is 6 silu(1)."""
    eye = torch.eye(32).repeat(4, 1, 1)
    packed, scale = quantize_int4(eye)  # absmax 1 gives code 7 times 1/7
    matrices = [ExpertMatrices(packed, scale.float())] * 3
    out = run_experts(
        torch.ones(1, 32), torch.tensor([[2, 0, 3]]), torch.tensor([[1.0, 2.0, 3.0]]), *matrices
    )
    one = 7 * scale[0, 0, 0].float()
    want = 6 * torch.nn.functional.silu(one) * one * one
    assert_close(out, want.expand(1, 32), 1e-6, "fp32")


def test_order_of_experts_and_of_choices_does_not_matter():
    experts = filled(Experts(moe_config()))
    x, ids = torch.randn(6, 64), torch.stack([torch.randperm(8)[:3] for _ in range(6)])
    weights = torch.rand(6, 3)
    out, flipped = experts(x, ids, weights), experts(x, ids.flip(1), weights.flip(1))
    assert_close(out, flipped, 1e-6, "the same terms, summed by expert")
    assert experts(x, ids, weights).equal(out), "run to run"


def test_long_prompts_go_by_rows_and_give_the_same(monkeypatch):
    moe, x = filled(MoE(moe_config())), torch.randn(2, 33, 64)
    with torch.no_grad():
        want = moe(x)
        monkeypatch.setattr(modeling_kimi, "MOE_ROWS", 10)
        monkeypatch.setattr(modeling_kimi, "MLP_ROWS", 5)
        seen = []
        moe.gate.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
        assert_close(moe(x), want, 5e-5, "smaller products")
        assert max(seen) == 10 and sum(seen) == 66
    seen.clear()
    moe(x.requires_grad_())
    assert seen == [66], "with gradients in one go"


def test_gradients_flow_through_frozen_packed_experts():
    moe = filled(MoE(moe_config()))
    x = torch.randn(2, 3, 64, requires_grad=True)
    moe(x).sum().backward()
    assert x.grad.abs().sum() > 0 and moe.gate.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in moe.experts.parameters())


# ------------------------------------------------------------------------------------------------------- state dict


def test_state_dict_has_the_published_names_and_loads_back():
    first, second = filled(MoE(moe_config()), 0), filled(MoE(moe_config()), 1)
    state = first.state_dict()
    assert {"experts.7.down_proj.weight_packed", "experts.0.gate_proj.weight_scale"} <= state.keys()
    assert state["experts.3.up_proj.weight_shape"].tolist() == [32, 64]
    assert not second.load_state_dict(state).missing_keys
    assert all(tensor.equal(state[name]) for name, tensor in second.state_dict().items())


def test_loading_names_what_is_wrong():
    moe = filled(MoE(moe_config()))
    state = moe.state_dict()
    del state["experts.2.up_proj.weight_scale"]
    state["experts.8.up_proj.weight_scale"] = torch.ones(1)
    state["experts.1.gate_proj.weight_packed"] = torch.zeros(3, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError) as caught:
        moe.load_state_dict(state)
    message = str(caught.value)
    assert "experts.2.up_proj.weight_scale" in message and "experts.8.up_proj.weight_scale" in message
    assert "experts.1.gate_proj.weight_packed has shape (3, 3), expected (32, 8)" in message
