"""Both readings of multi-head latent attention: equal to an fp64 oracle and to each other, in bounded memory."""

import math

import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import assert_close, small_config
from kimi import kimi_backends, modeling_kimi
from kimi.kimi_backends import (
    has_prefill_attention,
    heads_at_once,
    latent_attention_sdpa,
    queries_at_once,
    workspace_bytes,
)
from kimi.kimi_cache import new_cache, readable_mask
from kimi.kimi_sizes import LARGEST_WORKSPACE_BYTES, WORKSPACE_BYTES
from kimi.modeling_kimi import MLA, RotaryEmbedding, latent_attention, yarn_inv_freq


def mla(path="auto", attn="eager", dtype=torch.float32, seed=0, **text):
    config = small_config(text=text).text_config
    config._attn_implementation, config.mla_path = attn, path
    torch.manual_seed(seed)
    module = MLA(config, 0).to(dtype).eval()
    for weight in module.parameters():
        weight.data = torch.randn_like(weight) * (0.2 if weight.ndim == 2 else 1)
    return module


def run(module, x, mask=None, cache=None, start=0):
    """x (B, T, H) at positions start.., with an additive or boolean 4-D mask."""
    positions = torch.arange(start, start + x.shape[1]).expand(x.shape[:2])
    angles = RotaryEmbedding(module.config)(positions)
    with torch.no_grad():
        return module(x, angles, mask, cache, cache_position=positions[0])[0]


def causal(total, new, visible=None):
    """(B or 1, 1, T, S) booleans; `visible` (B, S) hides padding."""
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)[None, None]
    return mask if visible is None else mask & visible[:, None, None]


def by_hand(module, x):
    """fp64, a head, a query and a key at a time, causal, straight from the definition."""
    m = {name: weight.double() for name, weight in module.state_dict().items()}
    c, dn, dr, dv = module.latent_dim, module.nope_dim, module.rope_dim, module.v_dim
    freq = yarn_inv_freq(dr, module.config.rope_parameters).double()

    def norm(v, name):
        return v * (v.pow(2).mean() + module.config.latent_norm_eps).rsqrt() * m[f"{name}.weight"]

    def turn(v, position):  # adjacent pairs; the layout of the result does not matter to scores
        pairs = torch.view_as_complex(v.view(-1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(freq), freq * position)).flatten()

    out = []
    latents, shared, queries = [], [], []
    for position, row in enumerate(x[0].double()):
        kv = m["kv_a_proj_with_mqa.weight"] @ row
        latents.append(norm(kv[:c], "kv_a_layernorm"))
        shared.append(turn(kv[c:], position))
        queries.append(m["q_b_proj.weight"] @ norm(m["q_a_proj.weight"] @ row, "q_a_layernorm"))
    for position in range(len(latents)):
        heads = []
        for head in range(module.num_heads):
            q = queries[position].view(module.num_heads, -1)[head]
            up = m["kv_b_proj.weight"].view(module.num_heads, dn + dv, c)[head]
            scores = [
                (q[:dn] @ (up[:dn] @ latents[s]) + turn(q[dn:], position) @ shared[s]) * module.scaling
                for s in range(position + 1)
            ]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(w * (up[dn:] @ latents[s]) for s, w in enumerate(weights)))
        out.append(m["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(out)[None]


@pytest.mark.parametrize(
    ("path", "attn"),
    [
        ("expand", "eager"),
        ("expand", "sdpa"),
        ("absorb-eager", "eager"),
        ("absorb-eager", "sdpa"),
        ("absorb-sdpa", "sdpa"),
    ],
)
def test_agrees_with_the_definition(path, attn):
    module, x = mla(path, attn), torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1))
    assert_close(run(module, x, causal(9, 9)), by_hand(module, x), 2e-5, "fp32 against fp64, outputs near 10")
    assert_close(run(module, x), by_hand(module, x), 2e-5, "no mask means causal") if attn == "sdpa" else None


@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 40), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_absorb_is_expand(batch, new, cached, padded, seed):
    """Random shapes, caches and left padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, cached + new, 64, generator=generator)
    hidden = torch.randint(0, cached + 1, (batch, 1), generator=generator) if padded and cached else 0
    visible = torch.arange(cached + new).expand(batch, -1) >= hidden
    outputs = []
    for path in ("expand", "absorb-eager", "absorb-sdpa"):
        module = mla(path, "sdpa")
        cache = new_cache(module.config)
        if cached:
            run(module, x[:, :cached], causal(cached, cached, visible[:, :cached]), cache)
        outputs.append(run(module, x[:, cached:], causal(cached + new, new, visible), cache, cached))
    assert_close(outputs[1], outputs[0], 1e-5, "fp32, sums in another order, outputs near 1")
    assert_close(outputs[2], outputs[0], 1e-5, "fp32, sums in another order, outputs near 1")


def record_parts(monkeypatch):
    """The (heads, queries) of every part of the attention from now on, on either path."""
    parts, attend, pick = [], MLA.attend, modeling_kimi.faster_latent_attention

    def recorded(function, query):
        def call(*args, **kwargs):
            parts.append(tuple(args[query].shape[1:3]))
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(MLA, "attend", recorded(attend, 1))
    monkeypatch.setattr(
        modeling_kimi,
        "faster_latent_attention",
        lambda *args: recorded(pick(*args) or latent_attention, 0),
    )
    return parts


@pytest.mark.parametrize(
    ("path", "limit", "expected"),
    [
        ("expand", 1, [(1, 24)] * 4),
        ("expand", 50_000, [(2, 24)] * 2),
        ("absorb", 1, [(4, 1)] * 24),
        ("absorb", 50_000, [(4, 21), (4, 3)]),
    ],
)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_small_workspace_changes_nothing(path, attn, limit, expected, monkeypatch):
    x = torch.randn(2, 24, 64)
    module = mla(path, attn)
    parts = record_parts(monkeypatch)
    want = run(module, x, causal(24, 24))
    assert parts == [(4, 24)]
    parts.clear()
    monkeypatch.setattr(kimi_backends, "WORKSPACE_BYTES", limit)
    got = run(module, x, causal(24, 24))
    assert parts == expected
    # Other shapes of a product may be summed in another order.
    assert_close(got, want, 2e-5, "the same sums in parts, fp32, outputs near 10")


def test_a_gpu_gives_its_free_memory_to_the_workspace(monkeypatch):
    """A quarter of what is free or cached by torch, within limits; at 131,072 tokens a chunk is three calls, not 64."""
    gpu, free = torch.device("cuda", 0), {}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["driver"], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free["torch"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    for driver, by_torch, expected in (
        (0, 0, WORKSPACE_BYTES),
        (2 * 2**30, 2 * 2**30, 2**30),
        (60 * 2**30, 0, LARGEST_WORKSPACE_BYTES),
    ):
        free.update(driver=driver, torch=by_torch)
        assert workspace_bytes(gpu) == expected and workspace_bytes(torch.device("cpu")) == WORKSPACE_BYTES
    latent = torch.empty(1, 1, 131072, 512, dtype=torch.bfloat16, device="meta")
    assert heads_at_once(latent, 64, 640) == 1
    monkeypatch.setattr(kimi_backends, "workspace_bytes", lambda device: LARGEST_WORKSPACE_BYTES)
    assert -(-64 // heads_at_once(latent, 64, 640)) == 3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert workspace_bytes(gpu) == WORKSPACE_BYTES


@pytest.mark.parametrize("path", ["expand", "absorb-eager", "absorb-sdpa"])
@pytest.mark.parametrize("limit", [1, 2**30])
def test_how_many_keys_come_before_is_as_good_as_a_mask(path, limit, monkeypatch):
    """A chunk of a prompt behind cached tokens, whole or in parts."""
    monkeypatch.setattr(kimi_backends, "WORKSPACE_BYTES", limit)
    module, x = mla(path, "sdpa"), torch.randn(2, 12, 64)
    angles = RotaryEmbedding(module.config)(torch.arange(12).expand(2, -1))
    outputs = []
    for how in ({"attention_mask": causal(12, 5)}, {"past_length": 7}):
        cache = new_cache(module.config)
        with torch.no_grad():
            module(x[:, :7], tuple(t[:, :7] for t in angles), causal(7, 7), cache)
            outputs.append(module(x[:, 7:], tuple(t[:, 7:] for t in angles), past_key_values=cache, **how)[0])
    assert_close(outputs[1], outputs[0], 1e-6, "the same sums")


def test_up_projections_are_the_weight_unless_something_replaces_the_product():
    """A hook of a device map only moves inputs; one that offloads brings the weight only while the module runs."""
    module, latent = mla("absorb", "sdpa"), torch.zeros(1, 1, 3, 32)
    calls = []
    module.kv_b_proj.register_forward_hook(lambda *given: calls.append(given))

    def is_weight():
        calls.clear()
        is_view = module.up_projections(latent).data_ptr() == module.kv_b_proj.weight.data_ptr()
        assert is_view != bool(calls)
        return is_view

    assert is_weight()
    add_hook_to_module(module.kv_b_proj, AlignDevicesHook(execution_device="cpu"))
    assert is_weight()
    add_hook_to_module(module.kv_b_proj, AlignDevicesHook(execution_device="cpu"), append=True)
    assert type(module.kv_b_proj._hf_hook) is SequentialHook and is_weight()
    add_hook_to_module(module.kv_b_proj, ModelHook(), append=True)
    assert not is_weight(), "what this hook does is not known"
    remove_hook_from_module(module.kv_b_proj)
    weight = module.kv_b_proj.weight.clone()
    offloading = AlignDevicesHook(execution_device="cpu", offload=True, weights_map={"weight": weight})
    add_hook_to_module(module.kv_b_proj, offloading)
    assert module.kv_b_proj.weight.is_meta and not is_weight()
    want = weight.unflatten(0, (module.num_heads, -1))
    assert_close(module.up_projections(latent), want, 0, "one factor of each sum is 1, the others 0")


def test_workspace_at_full_size():
    """What one call expands, or its scores: at most 512 MB at every context up to 262,144."""
    for length in (4096, 32768, 262144):
        latent = torch.empty(1, 1, length, 512, dtype=torch.bfloat16, device="meta")
        heads = heads_at_once(latent, 64, 640)
        assert heads >= 1 and heads * length * (256 + 2 * 192) * 2 <= 512 * 2**20
        queries = queries_at_once(torch.empty(1, 64, 128, 512, dtype=torch.bfloat16, device="meta"), length)
        assert queries >= 1 and queries * 64 * length * 10 <= 512 * 2**20
    assert heads_at_once(torch.empty(1, 1, 1024, 512, dtype=torch.bfloat16, device="meta"), 64, 640) == 64


def test_the_environment_and_keywords_choose_a_path(monkeypatch):
    monkeypatch.setenv("KIMI_MLA_PATH", "expand")
    config = small_config()
    assert config.mla_path == config.text_config.mla_path == "expand"
    again = type(config)(**config.to_dict(), mla_path="absorb")
    assert again.mla_path == "absorb"
    parts = {**config.to_dict(), "text_config": again.text_config, "vision_config": again.vision_config}
    assert type(config)(**parts).mla_path == "absorb"
    assert not any("mla_path" in key for key in (*again.to_dict(), *again.text_config.to_dict()))
    monkeypatch.setenv("KIMI_MLA_PATH", "faster")
    with pytest.raises(ValueError, match="KIMI_MLA_PATH"):
        small_config()


def test_masks_of_every_kind_are_read():
    assert readable_mask(None, 1, 9, torch.device("cpu")) is None
    tokens = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    got = readable_mask(tokens, 3, 5, torch.device("cpu"), flash=True)
    assert got.equal(causal(5, 3, tokens.bool()))
    assert readable_mask(None, 3, 5, torch.device("cpu"), flash=True).equal(causal(5, 3))
    first = readable_mask(None, 3, 5, torch.device("cpu"))  # a prompt of 3 in a static cache for 5
    assert first.equal(torch.ones(3, 5, dtype=torch.bool).tril()[None, None])
    assert readable_mask(tokens, 1, 5, torch.device("cpu")).equal(tokens.bool()[:, None, None])
    longer = torch.zeros(1, 1, 2, 8)
    assert readable_mask(longer, 2, 5, torch.device("cpu")).shape == (1, 1, 2, 5)


def test_a_row_that_sees_nothing_is_finite():
    x, mask = torch.randn(1, 4, 64), causal(4, 4, torch.tensor([[False, False, True, True]]))
    for path in ("expand", "absorb"):
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        assert torch.isfinite(run(mla(path), x, additive)).all()


def test_bf16_paths_differ_by_rounding_only():
    x = torch.randn(1, 64, 64)
    want = by_hand(mla(dtype=torch.bfloat16), x.bfloat16())
    scale = want.abs().max()
    for path in ("expand", "absorb-eager", "absorb-sdpa"):
        got = run(mla(path, "sdpa", torch.bfloat16), x.bfloat16(), causal(64, 64))
        assert_close(got / scale, want / scale, 0.03, f"bf16 {path}, a few roundings of 2^-8")


@pytest.mark.skipif(not has_prefill_attention(), reason="needs bf16 dot products (AVX-512)")
@pytest.mark.parametrize("limit", [1, 2**28])
@pytest.mark.parametrize("cached", [0, 37])
def test_compiled_prefill_is_sdpa(limit, cached, monkeypatch):
    """In all groups of heads, with a mask and without, a whole prompt and one after a cache."""
    monkeypatch.setattr(kimi_backends, "WORKSPACE_BYTES", limit)
    x = torch.randn(2, cached + 150, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    visible = torch.arange(cached + 150).expand(2, -1) >= torch.tensor([[0], [20]])
    calls, original = [], kimi_backends.prefill_attention
    monkeypatch.setattr(kimi_backends, "prefill_attention", lambda *a: calls.append(1) or original(*a))
    outputs = []
    for compiled in (True, False):
        monkeypatch.setattr(kimi_backends, "has_prefill_attention", lambda compiled=compiled: compiled)
        module = mla("expand", "sdpa", torch.bfloat16, v_head_dim=64)
        cache = new_cache(module.config)
        if cached:
            run(module, x[:, :cached], None, cache)
        mask = causal(cached + 150, 150, visible) if cached else None
        outputs.append(run(module, x[:, cached:], mask, cache, cached))
    groups = 4 if limit == 1 else 1
    assert len(calls) == groups * (2 if cached else 1)
    seen = outputs[1].float()
    # What the hidden tokens themselves give does not matter, and SDPA's rows that see nothing differ.
    if cached:
        assert torch.isfinite(outputs[0]).all()
    assert_close(
        outputs[0].float() / seen.abs().max(), seen / seen.abs().max(), 0.03, "bf16, other roundings"
    )


@pytest.mark.skipif(not has_prefill_attention(), reason="needs bf16 dot products (AVX-512)")
def test_compiled_prefill_only_where_it_may(monkeypatch):
    calls, original = [], kimi_backends.prefill_attention
    monkeypatch.setattr(kimi_backends, "prefill_attention", lambda *a: calls.append(1) or original(*a))
    x = torch.randn(1, 20, 64)
    run(mla("expand", "sdpa", v_head_dim=64), x)  # fp32
    run(mla("expand", "eager", torch.bfloat16, v_head_dim=64), x.bfloat16(), causal(20, 20))
    run(mla("expand", "sdpa", torch.bfloat16, v_head_dim=12), x.bfloat16())
    module = mla("expand", "sdpa", torch.bfloat16, v_head_dim=64)
    run(module, x.bfloat16(), torch.zeros(1, 1, 20, 20).masked_fill(~causal(20, 20), -1e9).bfloat16())
    angles = RotaryEmbedding(module.config)(torch.arange(20)[None])
    module(x.bfloat16(), angles)[0].float().sum().backward()
    assert module.kv_b_proj.weight.grad.abs().sum() > 0 and not calls
    run(module, x.bfloat16())
    assert calls == [1]


def test_up_projections_are_a_view_and_follow_the_weight():
    module = mla()
    latent = torch.zeros(1, 1, 1, module.latent_dim)
    up = module.up_projections(latent)
    assert up.untyped_storage().data_ptr() == module.kv_b_proj.weight.untyped_storage().data_ptr()
    module.kv_b_proj.weight.data.mul_(2)
    assert up.equal(module.up_projections(latent))


class Adapted(torch.nn.Module):
    """What LoRA does to a linear layer: the base weight stays, the output changes."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.a, self.b = torch.randn(4, base.in_features), torch.randn(base.out_features, 4) * 0.1

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def test_absorbing_follows_an_adapter():
    x = torch.randn(1, 6, 64)
    outputs = []
    for path in ("expand", "absorb"):
        module = mla(path)
        plain = run(module, x, causal(6, 6))
        torch.manual_seed(7)
        module.kv_b_proj = Adapted(module.kv_b_proj)
        outputs.append(run(module, x, causal(6, 6)))
        assert (outputs[-1] - plain).abs().max() > 0.1
    assert_close(outputs[1], outputs[0], 2e-5, "fp32, sums in another order")


@pytest.mark.parametrize("path", ["expand", "absorb"])
def test_gradients_reach_the_weights_on_both_paths(path):
    module, x = mla(path, "sdpa"), torch.randn(2, 5, 64, requires_grad=True)
    angles = RotaryEmbedding(module.config)(torch.arange(5).expand(2, 5))
    module(x, angles, causal(5, 5))[0].pow(2).sum().backward()
    grads = {name: weight.grad for name, weight in module.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    other = mla("expand", "eager")
    other(x, angles, torch.zeros(1, 1, 5, 5).masked_fill(~causal(5, 5), -math.inf))[0].pow(2).sum().backward()
    for name, weight in other.named_parameters():
        assert_close(grads[name] / weight.grad.abs().max(), weight.grad / weight.grad.abs().max(), 1e-5, name)


def test_latent_attentions_share_a_signature_and_a_result():
    generator = torch.Generator().manual_seed(3)
    q_latent, q_pe = (
        torch.randn(2, 4, 3, 32, generator=generator),
        torch.randn(2, 4, 3, 8, generator=generator),
    )
    latent, k_pe = (
        torch.randn(2, 1, 17, 32, generator=generator),
        torch.randn(2, 1, 17, 8, generator=generator),
    )
    for mask in (None, causal(17, 3), torch.zeros(1, 1, 3, 17).masked_fill(~causal(17, 3), -1e9)):
        want, weights = latent_attention(q_latent, q_pe, latent, k_pe, mask, 0.2)
        got, _ = latent_attention_sdpa(q_latent, q_pe, latent, k_pe, mask, 0.2)
        assert_close(got, want, 1e-5, "fp32")
        assert weights.shape == (2, 4, 3, 17)
