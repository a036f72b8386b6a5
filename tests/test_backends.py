"""Which code runs: thresholds, and names that force an implementation: used, or refused with the reason."""

import re
from types import SimpleNamespace

import pytest
import torch

from builders import small_config
from kimi import kimi_backends, kimi_cpu
from kimi.kimi_backends import (
    ABSORB_QUERIES_ON_CPU,
    choose_path,
    faster_absorb,
    faster_expanded_attention,
    faster_experts,
    faster_latent_attention,
    faster_linear,
    run_experts_cpu,
    run_experts_gathered,
    runs_by_expert,
)
from kimi.kimi_cache import new_cache
from kimi.kimi_experts import ExpertMatrices, run_experts
from kimi.kimi_int4 import quantize_int4
from kimi.modeling_kimi import MLA, KimiK25ForConditionalGeneration, RotaryEmbedding, latent_attention

compiled = pytest.mark.skipif(
    kimi_cpu.why_unavailable() is not None, reason=f"no compiled code: {kimi_cpu.why_unavailable()}"
)
NO_COMPILER = "no C compiler (cc, gcc or clang) was found"


def gate_of(scales=torch.bfloat16):
    words, scale = quantize_int4(torch.randn(2, 64, 256))
    return ExpertMatrices(words, scale.to(scales))


def chosen(requested, x, gate):
    return faster_experts(requested, x, torch.ones(len(x), 1), [gate] * 3, run_experts)


def test_experts_take_the_code_that_is_there():
    gate, x = gate_of(), torch.zeros(1, 256, dtype=torch.bfloat16)
    assert chosen("reference", x, gate) is None
    assert chosen("auto", x.float(), gate) is None
    assert chosen("auto", x, ExpertMatrices(torch.zeros(2, 64, 256), None)) is None, "dense experts"
    assert chosen("auto", x.requires_grad_(), gate) is None, "gradients"


@compiled
def test_experts_take_compiled_code():
    gate, x = gate_of(), torch.zeros(1, 256, dtype=torch.bfloat16)
    assert chosen("auto", x, gate) is chosen("cpu", x, gate) is run_experts_cpu
    assert not runs_by_expert(run_experts_cpu, 16) and runs_by_expert(run_experts_cpu, 17)
    assert runs_by_expert(None, 1) and not runs_by_expert(run_experts_gathered, 1000)


def test_experts_forced_by_name_say_why_not(monkeypatch):
    gate, x = gate_of(), torch.zeros(1, 256, dtype=torch.bfloat16)
    dense = ExpertMatrices(torch.zeros(2, 64, 256), None)
    cases = [
        ("cpu", x.float(), gate, "it takes bfloat16, not torch.float32 with torch.bfloat16 scales"),
        ("cpu", x, gate_of(torch.float32), "it takes bfloat16, not torch.bfloat16 with torch.float32 scales"),
        ("cpu", x, dense, "the experts are not packed but torch.float32"),
        ("triton", x, dense, "the experts are not packed but torch.float32"),
        ("cpu", x.to("meta"), gate, "the weights are on meta"),
        ("cpu", x.clone().requires_grad_(), gate, "it computes no gradients"),
        ("triton", x.clone().requires_grad_(), gate, "it computes no gradients"),
        ("triton", x, gate, r"(triton cannot be imported .*|the weights are on cpu)"),
    ]
    for requested, rows, matrices, reason in cases:
        sentence = rf"int4_backend '{requested}' is unavailable: {reason}\."
        with pytest.raises(ValueError, match=sentence):
            chosen(requested, rows, matrices)
    monkeypatch.setattr(kimi_backends, "why_unavailable", lambda: NO_COMPILER)
    assert chosen("auto", x, gate) is None
    with pytest.raises(ValueError, match=re.escape(f"'cpu' is unavailable: {NO_COMPILER}.")):
        chosen("cpu", x, gate)
    with pytest.raises(
        ValueError, match=r'int4_backend .* is "fast"; it is one of auto, reference, cpu, triton'
    ):
        small_config().int4_backend = "fast"


@pytest.mark.parametrize("only", ["x", "topk_weights", "gate_proj", "up_proj", "down_proj"])
def test_whatever_of_packed_experts_learns_alone_gets_its_gradient(only):
    """The routing weights alone where only routers are trained; the scales of one projection."""
    sizes = {"gate_proj": (64, 256), "up_proj": (64, 256), "down_proj": (256, 64)}
    tensors = {"x": torch.randn(3, 256).bfloat16(), "topk_weights": torch.rand(3, 2)}
    words = {}
    for name, size in sizes.items():
        words[name], scale = quantize_int4(torch.randn(2, *size))
        tensors[name] = scale.bfloat16()
    tensors[only].requires_grad_()
    matrices = [ExpertMatrices(words[name], tensors[name]) for name in sizes]
    x, topk_weights = tensors["x"], tensors["topk_weights"]
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"'{backend}' is unavailable: it computes no gradients"):
            faster_experts(backend, x, topk_weights, matrices, run_experts)
    run = faster_experts("auto", x, topk_weights, matrices, run_experts) or run_experts
    run(x, torch.tensor([[0, 1]] * 3), topk_weights, *matrices).square().sum().backward()
    assert tensors[only].grad is not None and tensors[only].grad.count_nonzero()


# ----------------------------------------------------------------------------------------------------------- attention


def test_paths_can_be_forced_and_cross_in_one_place():
    assert choose_path("expand", 1, 9999) == "expand" and choose_path("absorb-sdpa", 5000, 5000) == "absorb"
    assert {choose_path("auto", *tokens) for tokens in ((1, 1), (1, 10**6), (16, 4096))} == {"absorb"}
    assert choose_path("auto", 4096, 4096) == choose_path("auto", 4096, 10**6) == "expand"
    assert choose_path("auto", 100, 4096, "cuda") == "absorb" and choose_path("auto", 100, 4096) == "expand"
    with pytest.raises(ValueError, match=r'mla_path .* is "fast"; it is one of auto, expand, absorb'):
        small_config().mla_path = "fast"


def attention(path, attn="sdpa", dtype=torch.bfloat16):
    config = small_config().text_config
    config._attn_implementation, config.mla_path = attn, path
    return MLA(config, 0).to(dtype).eval()


def attend(module, num_new, dtype=torch.bfloat16, mask=None, grad=False):
    """(1, num_new, H) behind one cached token."""
    x = torch.randn(1, num_new + 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = RotaryEmbedding(module.config)(torch.arange(num_new + 1)[None])
    cache = new_cache(module.config)
    with torch.set_grad_enabled(grad):
        first, rest = (tuple(t[:, part] for t in angles) for part in (slice(1), slice(1, None)))
        module(x[:, :1], first, None, cache, cache_position=torch.arange(1))
        seen = torch.ones(num_new, num_new + 1, dtype=torch.bool).tril(1)[None, None]
        return module(x[:, 1:], rest, seen if mask is None else mask(seen), cache)[0]


@compiled
@pytest.mark.parametrize("num_new", [1, ABSORB_QUERIES_ON_CPU, ABSORB_QUERIES_ON_CPU + 1, 50])
def test_absorb_on_a_cpu_is_used_when_forced(num_new, monkeypatch):
    """Also for more tokens than it would be chosen for, in parts that the workspace bounds."""
    calls, real = [], kimi_backends.absorb
    monkeypatch.setattr(kimi_backends, "absorb", lambda *a: calls.append(a[0].shape[2]) or real(*a))
    module, forced = attention("absorb-eager"), attention("absorb-cpu")
    for mine, other in zip(forced.parameters(), module.parameters(), strict=True):
        mine.data = other.data = torch.randn(mine.shape).mul(0.2).bfloat16()
    want, got = attend(module, num_new).float(), attend(forced, num_new).float()
    assert calls[-1] == num_new and (got - want).abs().max() <= 0.03 * want.abs().max()
    monkeypatch.setattr(kimi_backends, "WORKSPACE_BYTES", 1)
    calls.clear()
    parted = attend(forced, num_new).float()
    assert (parted - want).abs().max() <= 0.03 * want.abs().max()
    if num_new > ABSORB_QUERIES_ON_CPU:
        assert calls[1:] == [1] * num_new


@compiled
def test_absorb_on_a_cpu_is_refused_with_the_reason(monkeypatch):
    def additive(seen):
        return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e9)

    cases = [
        (dict(attn="eager"), {}, "it makes no attention weights, which attn_implementation='eager' returns"),
        (
            dict(dtype=torch.float32),
            dict(dtype=torch.float32),
            "it takes bfloat16, not a cache of torch.float32",
        ),
        ({}, dict(mask=additive), "it takes a boolean mask, not torch.bfloat16"),
        ({}, dict(grad=True), "it computes no gradients"),
    ]
    for how, call, reason in cases:
        with pytest.raises(ValueError, match=f"mla_path 'absorb-cpu' is unavailable: {reason}"):
            attend(attention("absorb-cpu", **how), 2, **call)
    monkeypatch.setattr(kimi_backends, "why_unavailable", lambda: NO_COMPILER)
    with pytest.raises(ValueError, match=re.escape(f"mla_path 'absorb-cpu' is unavailable: {NO_COMPILER}.")):
        attend(attention("absorb-cpu"), 2)
    attend(attention("absorb"), 2)  # which names no implementation


def test_other_paths_forced_by_name_are_used_or_refused():
    weights = "it makes no attention weights, which attn_implementation='eager' returns"
    for path in ("absorb-sdpa", "absorb-triton"):
        with pytest.raises(ValueError, match=f"mla_path '{path}' is unavailable: {weights}"):
            attend(attention(path, "eager"), 2)
    with pytest.raises(
        ValueError, match=r"'absorb-triton' is unavailable: (triton cannot|the cache is on cpu)"
    ):
        attend(attention("absorb-triton"), 2)
    with pytest.raises(ValueError, match="'absorb-triton' is unavailable: it computes no gradients"):
        attend(attention("absorb-triton"), 2, grad=True)
    q, cache = torch.zeros(1, 4, 2, 32), (torch.zeros(1, 1, 9, 32), torch.zeros(1, 1, 9, 8))
    assert faster_latent_attention("absorb-eager", q, *cache, False, latent_attention) is None
    assert (
        faster_latent_attention("absorb-sdpa", q, *cache, False, latent_attention)
        is kimi_backends.latent_attention_sdpa
    )
    assert faster_latent_attention("auto", q, *cache, False, latent_attention) is None


@pytest.mark.parametrize("num_new", [1, 8, 9, 100, 128, 5000])
def test_the_kernel_of_a_gpu_takes_any_number_of_tokens(num_new, monkeypatch):
    """A limit that was measured on a CPU decides nothing for a GPU."""
    kernel = object()
    monkeypatch.setattr(kimi_backends, "latent_attention_triton", kernel, raising=False)
    monkeypatch.setattr(kimi_backends, "why_not_triton_attention", lambda *args: None)
    q, latent, k_pe = (
        SimpleNamespace(
            is_cuda=True,
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
            shape=shape,
            requires_grad=False,
        )
        for shape in ((1, 64, num_new, 512), (1, 1, 9000, 512), (1, 1, 9000, 64))
    )

    def answer(path="auto", wants_weights=False):
        return faster_latent_attention(path, q, latent, k_pe, wants_weights, latent_attention)

    assert answer() is answer("absorb") is kernel
    assert answer(wants_weights=True) is None
    # Also a trainable prefix in the cache, or keys that are trained and queries that are not.
    for tensor in (q, latent, k_pe):
        tensor.requires_grad = True
        assert answer() is None, "gradients"
        tensor.requires_grad = False
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert answer() is answer("absorb-triton") is kimi_backends.latent_attention_whole


def test_a_model_that_returns_weights_names_them_as_the_reason():
    """Not the additive mask, which transformers makes for it."""
    model = KimiK25ForConditionalGeneration(small_config()).bfloat16().eval()
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation = "eager"
    model.config.mla_path = "absorb-cpu"
    with pytest.raises(ValueError, match="'absorb-cpu' is unavailable: it makes no attention weights"):
        model(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.skipif(not kimi_cpu.has_prefill_attention(), reason="needs bf16 dot products (AVX-512)")
def test_attention_of_a_prompt_takes_the_keys_of_any_cache():
    """What the compiled code refuses is left to SDPA."""
    q_nope, q_pe, kv = (torch.zeros(1, 2, 9, width).bfloat16() for width in (32, 16, 96))
    k_pe = torch.zeros(1, 1, 9, 16).bfloat16()

    def answer(k_pe):
        return faster_expanded_attention("sdpa", 0.0, q_nope, q_pe, kv, k_pe, 64, None)

    assert answer(k_pe) is kimi_backends.expanded_attention_cpu
    assert answer(k_pe.mT.contiguous().mT) is None and answer(k_pe.float()) is None
    assert answer(k_pe.clone().requires_grad_()) is None


@compiled
def test_long_prompts_absorb_in_plain_torch_on_a_cpu_unless_forced():
    q, up = torch.zeros(1, 4, 9, 16).bfloat16(), torch.zeros(4, 28, 32).bfloat16()
    cache = torch.zeros(1, 1, 20, 32).bfloat16(), torch.zeros(1, 1, 20, 8).bfloat16()
    assert faster_absorb("auto", q, up, *cache, None, False) is None
    assert faster_absorb("auto", q[:, :, :8], up, *cache, None, False) is kimi_backends.absorb
    assert faster_absorb("absorb-sdpa", q[:, :, :8], up, *cache, None, False) is None
    assert faster_absorb("absorb-cpu", q, up, *cache, None, False) is kimi_backends.absorb_in_parts


@compiled
def test_compiled_products_are_for_plain_bf16_rows():
    x, weight = torch.zeros(4, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    assert faster_linear(x, weight) is kimi_cpu.linear_bf16
    with torch.autocast("cpu", torch.bfloat16):
        assert faster_linear(x, weight) is None
    for rows, matrix in (
        (x.repeat(2, 1), weight),
        (x.float(), weight),
        (x, weight.T.contiguous().T),
        (x[:0], weight),
        (x, weight.clone().requires_grad_()),
    ):
        assert faster_linear(rows, matrix) is None
