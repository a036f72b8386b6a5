"""The CPU's compiled code against plain torch and fp64, the choice of backends, and what happens without a compiler.

These run where a C compiler is found; a machine without one skips them, and says so.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import assert_close, small_config
from conftest import ROOT
from kimi import kimi_backends, kimi_cpu
from kimi.kimi_backends import LINEAR_ROWS, run_experts_cpu
from kimi.kimi_experts import ExpertMatrices, run_experts
from kimi.kimi_int4 import dequantize_int4, pack_int4
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi
from kimi.modeling_kimi import Linear, RMSNorm, apply_rotary, latent_attention, rms_norm

compiled = pytest.mark.skipif(kimi_cpu.why_unavailable() is not None, reason=f"{kimi_cpu.why_unavailable()}")


def stack(experts, outputs, inputs, generator, scale=0.02):
    words = torch.randint(-(2**31), 2**31, (experts, outputs, inputs // 8), generator=generator).int()
    scales = (torch.rand(experts, outputs, inputs // 32, generator=generator) * scale).bfloat16()
    return ExpertMatrices(words, scales)


def layer(width=256, inner=96, experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [stack(experts, *shape, generator) for shape in ((inner, width), (inner, width), (width, inner))]


def routed(rows, experts, choices, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:choices] for _ in range(rows)])
    return ids, torch.rand(rows, choices, generator=generator)


def in_fp64(x, ids, weights, matrices):
    wide = [ExpertMatrices(dequantize_int4(m.weight, m.scale, torch.float64), None) for m in matrices]
    return run_experts(x.double(), ids, weights, *wide)


def assert_as_good_as_torch(got, x, ids, weights, matrices):
    """No further from fp64 than one and a half times plain torch in bf16 is."""
    want = in_fp64(x, ids, weights, matrices)
    size = want.abs().max().clamp(min=1e-30)
    plain = (run_experts(x, ids, weights, *matrices) - want).abs().max()
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= 1.5 * plain + 2**-8 * size, ((got - want).abs().max(), plain, size)


# ---------------------------------------------------------------------------------------------------------- experts


@pytest.fixture(params=["tiles", "no tiles"])
def tiles(request, monkeypatch):
    """Many rows of an expert with the tiles of AMX, where there are any, and without."""
    if request.param == "no tiles":
        monkeypatch.setattr(kimi_backends, "has_expert_tiles", lambda: False)
    elif not kimi_cpu.has_expert_tiles():
        pytest.skip("this machine has no AMX tiles")


@compiled
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 64, 200])
@pytest.mark.parametrize("shape", [(256, 96), (160, 32), (2048, 512)])
def test_experts_are_as_exact_as_plain_torch(rows, shape, tiles):
    matrices = layer(*shape)
    ids, weights = routed(rows, 8, 3)
    x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(1)).bfloat16()
    got = run_experts_cpu(x, ids, weights, *matrices)
    assert got.dtype == torch.float32 and got.equal(run_experts_cpu(x, ids, weights, *matrices)), "run to run"
    assert_as_good_as_torch(got, x, ids, weights, matrices)


@compiled
@pytest.mark.parametrize("rows", [1, 40])
def test_adversarial_words_and_scales(rows, tiles):
    matrices = layer()
    gate, up, down = matrices
    gate.weight[0] = 0  # all codes -8
    gate.weight[1] = -2004318072  # 0x88888888: all codes 0
    up.scale[2] = 1e-30
    up.scale[3] = 50.0
    down.weight[4] = -1  # all codes 7
    gate.scale[5] = 0
    ids, weights = routed(rows, 8, 6)
    x = torch.randn(rows, 256).bfloat16()
    assert_as_good_as_torch(run_experts_cpu(x, ids, weights, *matrices), x, ids, weights, matrices)


@compiled
@pytest.mark.parametrize("rows", [5, 33, 50, 150])
def test_one_expert_may_get_everything(rows, tiles):
    matrices = layer()
    ids, weights = torch.full((rows, 1), 6), torch.ones(rows, 1)
    x = torch.randn(rows, 256).bfloat16()
    assert_as_good_as_torch(run_experts_cpu(x, ids, weights, *matrices), x, ids, weights, matrices)


@pytest.mark.skipif(not kimi_cpu.has_expert_tiles(), reason="this machine has no AMX tiles")
def test_tiles_are_shared_with_pytorch():
    """Its own bf16 products use them too, between ours and in shapes of their own."""
    matrices, (ids, weights) = layer(), routed(50, 8, 6)
    x, square = torch.randn(50, 256).bfloat16(), torch.randn(256, 256).bfloat16()
    inputs = prefill_inputs(1, 2, 130, 130, (128, 64, 128), 0)

    def results():
        return (
            run_experts_cpu(x, ids, weights, *matrices),
            F.linear(x, square),
            compiled_prefill(inputs, None, 0, 128),
        )

    alone = (
        F.linear(x, square),
        compiled_prefill(inputs, None, 0, 128),
        run_experts_cpu(x, ids, weights, *matrices),
    )
    for _ in range(3):
        experts, product, attention = results()
        assert product.equal(alone[0]) and attention.equal(alone[1]) and experts.equal(alone[2])


@compiled
@pytest.mark.parametrize("rows", [3, 70])
def test_threads_do_not_change_the_result(rows):
    """To the bit where all products are our own. Without tiles PyTorch multiplies many rows, and its library
    may cut a sum by the number of threads (oneDNN does on AVX-512 without bf16): each is as good as torch."""
    matrices, (ids, weights) = layer(2048, 512), routed(rows, 8, 4)
    x = torch.randn(rows, 2048).bfloat16()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run_experts_cpu(x, ids, weights, *matrices))
    finally:
        torch.set_num_threads(before)
    if rows == 3 or kimi_cpu.has_expert_tiles():
        assert results[0].equal(results[1]) and results[0].equal(results[2])
    for result in results:
        assert_as_good_as_torch(result, x, ids, weights, matrices)


@compiled
@given(st.integers(1, 5), st.sampled_from([32, 64, 96, 160, 512, 544]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_unpacking_is_bit_exact(rows, inputs, seed):
    (matrix,) = [stack(1, rows, inputs, torch.Generator().manual_seed(seed), scale=3.0)]
    want = dequantize_int4(matrix.weight[0], matrix.scale[0])
    got = kimi_cpu.unpack_int4_bf16(matrix.weight[0], matrix.scale[0], torch.empty_like(want))
    assert got.equal(want)


@compiled
def test_every_code_in_every_place():
    codes = torch.arange(-8, 8).repeat(32)[:, None].roll(1) + torch.zeros(32, dtype=torch.long)
    values = (codes + torch.arange(32)) % 16 - 8
    packed, scale = pack_int4(values), torch.ones(len(values), 1).bfloat16()
    got = kimi_cpu.unpack_int4_bf16(packed, scale, torch.empty(len(values), 32, dtype=torch.bfloat16))
    assert got.equal(values.bfloat16())
    x = torch.eye(32).bfloat16()  # row m picks input m, through the product that never unpacks
    out = torch.zeros(32, 1)
    for row, weights in enumerate(values[:16]):
        stack_of_one = (pack_int4(weights[None, None].repeat(1, 32, 1)), torch.ones(1, 32, 1).bfloat16())
        down = (pack_int4(torch.eye(32).long()[None]), torch.ones(1, 32, 1).bfloat16())
        ids, one = torch.zeros(32, 1, dtype=torch.long), torch.ones(32, 1)
        out = kimi_cpu.experts_int4_few_rows(x, ids, one, [stack_of_one, stack_of_one, down])
        v = weights.float()
        want = (v * torch.sigmoid(v) * v).bfloat16().float()[:, None].expand(32, 32)
        assert_close(out, want, 0.26, f"row {row}: silu(v) v up to 49, rounded to bf16 once")


# ------------------------------------------------------------------------------------------------- dense and latent


@compiled
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_linear_of_any_shape(rows, outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    want = F.linear(x.double(), weight.double())
    size = want.abs().max().item()
    assert_close(kimi_cpu.linear_bf16(x, weight), want, 2**-8 * size + 1e-3, "one rounding to bf16")
    wide = kimi_cpu.linear_bf16(x, weight, torch.float32)
    assert wide.dtype == torch.float32
    assert_close(wide, want, 1e-5 * size + 1e-4, "sums of 300 products in fp32")


@compiled
@given(
    st.integers(1, 40),
    st.sampled_from([1, 31, 96, 2048]),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_norm(rows, width, size, seed):
    """Rounded twice, after the division and after the weight, so within twice 2^-8 of fp64, and what is recorded too."""
    generator = torch.Generator().manual_seed(seed)
    module = RMSNorm(width, 1e-5).bfloat16()
    module.weight.data.normal_(generator=generator)
    x = (torch.randn(1, rows, width, generator=generator) * size).bfloat16()
    with torch.no_grad():
        compiled_result = module(x)
    recorded = module(x.clone().requires_grad_())
    assert recorded.requires_grad and not compiled_result.requires_grad
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight.double()
    for got in (compiled_result, recorded):
        assert ((got.double() - want).abs() <= 1.01 * 2**-7 * want.abs()).all()


@compiled
@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 2),
    st.integers(1, 20),
    st.sampled_from([1, 5, 140]),
    st.sampled_from([2, 16, 64]),
    st.integers(0, 2**31),
)
def test_rotary(batch, heads, tokens, width, seed):
    """Against fp64, element by element, of a view into wider rows; and the plain way, which a gradient takes."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(batch, tokens, heads, 3 * width, generator=generator)
        .bfloat16()
        .transpose(1, 2)[..., width : 2 * width]
    )
    angles = torch.rand(batch, tokens, width // 2, generator=generator) * 100
    cos, sin = angles.cos(), angles.sin()
    compiled_result, recorded = apply_rotary(x, cos, sin), apply_rotary(x.clone().requires_grad_(), cos, sin)
    assert recorded.requires_grad and compiled_result.is_contiguous()
    shared = apply_rotary(x, cos[:1], sin[:1])
    assert shared.equal(apply_rotary(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin))), (
        "one row of angles for all"
    )
    first, second = x[..., 0::2].double(), x[..., 1::2].double()
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    want = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    size = torch.cat((first.abs() + second.abs(),) * 2, dim=-1)  # of the terms, which may nearly cancel
    for got in (compiled_result, recorded):
        assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2**-22 * size).all()


@compiled
def test_the_linear_layer_uses_compiled_code_only_where_it_may(monkeypatch):
    calls = []
    real = kimi_cpu.linear_bf16
    monkeypatch.setattr("kimi.kimi_backends.linear_bf16", lambda x, w: calls.append(x.shape) or real(x, w))
    module = Linear(64, 32).bfloat16()
    assert isinstance(module, torch.nn.Linear) and module.bias is None
    x = torch.randn(2, LINEAR_ROWS // 2, 64).bfloat16()
    with torch.no_grad():
        y = module(x)
        assert y.shape == (2, LINEAR_ROWS // 2, 32) and calls == [x.shape]
        assert_close(y, F.linear(x, module.weight), 2**-6, "two roundings of the same sum")
        module(torch.randn(LINEAR_ROWS + 1, 64).bfloat16())
        module(torch.empty(0, 64).bfloat16())
        module.float()(x.float())
    module.bfloat16()(x).sum().backward()
    assert calls == [x.shape] and module.weight.grad.abs().sum() > 0


@compiled
@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(0, 700),
    st.booleans(),
    st.sampled_from([(4, 72, 24), (4, 64, 32), (5, 192, 64)]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_absorbed_attention(batch, new, cached, padded, sizes, seed):
    """Random lengths over several blocks, left padding, strided caches; by tiles where the widths allow it."""
    (heads, c, dr), dn, dv, total = sizes, 16, 12, cached + new
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    q_nope, q_pe, up = normal(batch, heads, new, dn), normal(batch, heads, new, dr), normal(heads, dn + dv, c)
    latent, k_pe = normal(batch, 1, total + 5, c)[:, :, :total], normal(batch, 1, total, dr + 8)[..., :dr]
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)[None, None]
    if padded:
        hidden = torch.randint(0, cached + 1, (batch, 1), generator=generator)
        mask = mask & (torch.arange(total) >= hidden)[:, None, None]
    elif new == 1:
        mask = None

    def plain(*tensors):
        q_nope, q_pe, up, latent, k_pe = tensors
        q_latent = torch.einsum("bhtd,hdc->bhtc", q_nope, up[:, :dn])
        out, _ = latent_attention(q_latent, q_pe, latent, k_pe, mask, 0.05)
        return torch.einsum("bhtc,hvc->bthv", out, up[:, dn:])

    tensors = (q_nope, q_pe, up, latent, k_pe)
    want = plain(*(tensor.double() for tensor in tensors))
    got = kimi_cpu.absorb(*tensors, mask, 0.05)
    allowed = 1.5 * (plain(*tensors) - want).abs().max() + 2**-7 * want.abs().max()
    assert (got - want).abs().max() <= allowed


@compiled
def test_absorbed_attention_reads_nothing_behind_the_last_key():
    """The values there may be anything; 9,000 keys are several of the longest blocks."""
    generator = torch.Generator().manual_seed(0)
    for total in (1, 31, 33, 130, 9000):
        latent = torch.full((1, 1, total + 40, 128), float("nan")).bfloat16()
        k_pe = torch.full((1, 1, total + 40, 32), float("nan")).bfloat16()
        latent[:, :, :total].normal_(generator=generator)
        k_pe[:, :, :total].normal_(generator=generator)
        q_nope, q_pe, up = (
            torch.randn(*shape, generator=generator).bfloat16()
            for shape in ((1, 3, 1, 16), (1, 3, 1, 32), (3, 32, 128))
        )
        got = kimi_cpu.absorb(q_nope, q_pe, up, latent[:, :, :total], k_pe[:, :, :total], None, 0.1)
        copies = latent[:, :, :total].double(), k_pe[:, :, :total].double()
        q_latent = torch.einsum("bhtd,hdc->bhtc", q_nope.double(), up[:, :16].double())
        out, _ = latent_attention(q_latent, q_pe.double(), *copies, None, 0.1)
        want = torch.einsum("bhtc,hvc->bthv", out, up[:, 16:].double())
        assert (got - want).abs().max() <= 2**-5 * want.abs().max()


# ------------------------------------------------------------------------------------------------ attention of prompts


has_prefill = pytest.mark.skipif(
    kimi_cpu.why_unavailable() is not None or not hasattr(kimi_cpu.library(), "prefill_attention"),
    reason=f"needs bf16 dot products (AVX-512); compiled code: {kimi_cpu.why_unavailable() or 'there'}",
)


def prefill_inputs(batch, heads, new, total, dims, seed):
    """q_nope and q_pe, kv and k_pe with the strides they have in the model: the heads of a token are adjacent."""
    nope, rope, value = dims
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) * 1.5).bfloat16()

    q = normal(batch, new, heads, nope + rope).transpose(1, 2)
    kv = normal(batch, total, heads, nope + value).transpose(1, 2)
    k_pe = normal(batch, 1, total + 7, rope)[:, :, :total]  # the filled part of a larger buffer
    return q[..., :nope], q[..., nope:].contiguous(), kv, k_pe


def compiled_prefill(inputs, mask, offset, value_dim):
    q_nope = inputs[0]
    batch, heads, new, _ = q_nope.shape
    out = torch.full((batch, new, heads, value_dim), float("nan"), dtype=torch.bfloat16)
    kimi_cpu.prefill_attention(*inputs, mask, offset, 0.08, out.transpose(1, 2))
    assert torch.isfinite(out).all()
    return out


def attention_in_fp64(inputs, visible):
    """(B, T, h, dv); visible (B or 1, 1, T, S) booleans. Zeros for a query that sees nothing."""
    q_nope, q_pe, kv, k_pe = (tensor.double() for tensor in inputs)
    nope = q_nope.shape[-1]
    key = torch.cat((kv[..., :nope], k_pe.expand(-1, kv.shape[1], -1, -1)), -1)
    scores = torch.cat((q_nope, q_pe), -1) @ key.transpose(-1, -2) * 0.08
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()
    return (weights @ kv[..., nope:]).transpose(1, 2)


@has_prefill
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    new=st.sampled_from((1, 5, 96, 97, 200)),
    cached=st.sampled_from((0, 1, 63, 300)),
    kind=st.sampled_from(("offset", "everything", "mask", "causal mask")),
    dims=st.sampled_from(((128, 64, 128), (16, 8, 64), (2, 2, 192))),
    tiles=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_attention_of_many_tokens(batch, heads, new, cached, kind, dims, tiles, seed):
    """Sizes around the blocks of 96 queries and 64 and 256 keys, all kinds of masks, against fp64."""
    total = new + cached
    inputs = prefill_inputs(batch, heads, new, total, dims, seed)
    visible = torch.ones(batch, 1, new, total, dtype=torch.bool)
    if kind in ("offset", "causal mask"):
        visible = visible.tril(cached)
    if kind == "mask":
        visible = torch.rand(batch, 1, new, total, generator=torch.Generator().manual_seed(seed)) < 0.4
        visible[0, 0, -1] = False
    mask = visible if "mask" in kind else None
    set_tiles = getattr(kimi_cpu.library(), "use_tiles", lambda wanted: 0)  # there only with AMX
    try:
        set_tiles(int(tiles))
        got = compiled_prefill(inputs, mask, cached if kind == "offset" else None, dims[2])
    finally:
        set_tiles(1)
    want = attention_in_fp64(inputs, visible)
    assert_close(got, want, 0.02 * float(want.abs().max() + 1e-30), "bf16 weights and outputs, 2^-8 each")


@has_prefill
def test_attention_of_many_tokens_with_extreme_scores():
    """Softmax is that of fp32 on fp32 scores: scores of hundreds, and equal ones."""
    inputs = prefill_inputs(1, 2, 130, 130, (128, 64, 128), 0)
    visible = torch.ones(1, 1, 130, 130, dtype=torch.bool).tril()
    for factor in (0.0, 30.0):
        scaled = (inputs[0] * factor, inputs[1] * factor, *inputs[2:])
        want = attention_in_fp64(scaled, visible)
        got = compiled_prefill(scaled, None, 0, 128)
        assert_close(got, want, 0.02 * float(want.abs().max()), "bf16 weights and outputs")


@has_prefill
def test_threads_do_not_change_attention():
    inputs = prefill_inputs(2, 3, 300, 300, (128, 64, 128), 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(compiled_prefill(inputs, None, 0, 128))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@compiled
def test_a_whole_model_decodes_the_same_with_and_without():
    """Every token takes all experts: of a choice, another rounding may swap two that tie."""
    torch.manual_seed(0)
    config = small_config()
    config.text_config.num_experts_per_tok = config.text_config.n_routed_experts
    model = Kimi(config).bfloat16().eval()
    for name, weight in model.named_parameters():
        if name.endswith("packed"):
            weight.data = torch.randint(-(2**31), 2**31, weight.shape).int()
        elif name.endswith("scale"):
            weight.data = torch.rand(weight.shape).mul(0.01).bfloat16()
    ids, logits = torch.randint(3, 300, (2, 12)), []
    for backend, path in (("auto", "auto"), ("reference", "expand")):
        model.config.int4_backend, model.config.mla_path = backend, path
        with torch.no_grad():
            cache = model(ids[:, :9]).past_key_values
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9, 12)]
        logits.append(torch.cat(steps, 1).float())
    scale = logits[1].abs().max()
    assert_close(
        logits[0] / scale, logits[1] / scale, 0.017, "bf16, three layers: 0.0083 at most of 40 seeds"
    )


IN_A_FRESH_PROCESS = """
import sys, torch
from kimi import kimi_cpu
print(kimi_cpu.why_unavailable())
tiny = 2.0**-1060
assert tiny / 2 > 0, "loading the library made the process flush subnormals to zero"
if kimi_cpu.why_unavailable() is None:
    print(kimi_cpu.linear_bf16(torch.ones(1, 64).bfloat16(), torch.ones(2, 64).bfloat16()).tolist())
"""


def run_fresh(tmp_path, **variables):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform == "win32", reason="no compiled code on Windows")
def test_a_machine_without_a_compiler_says_so(tmp_path):
    assert run_fresh(tmp_path, PATH="/nonexistent", CC="") == ["no C compiler (cc, gcc or clang) was found"]
    assert run_fresh(tmp_path, KIMI_CPU_CODE="0") == ["the environment says KIMI_CPU_CODE=0"]


@compiled
def test_the_library_is_compiled_once_into_a_private_folder(tmp_path):
    assert run_fresh(tmp_path) == ["None", "[[64.0, 64.0]]"]
    (built,) = (tmp_path / "kimi-k2.7-code").iterdir()
    assert (tmp_path / "kimi-k2.7-code").stat().st_mode & 0o077 == 0
    changed = built.stat().st_mtime_ns
    assert run_fresh(tmp_path) == ["None", "[[64.0, 64.0]]"] and built.stat().st_mtime_ns == changed
    (tmp_path / "kimi-k2.7-code").chmod(0o777)
    (tmp_path / "temporary").mkdir()
    again = run_fresh(tmp_path, TMPDIR=str(tmp_path / "temporary"))
    assert again == ["None", "[[64.0, 64.0]]"], "a folder that others can write to is not used"
    assert built.stat().st_mtime_ns == changed and not any((tmp_path / "temporary").iterdir()), (
        "nothing is left"
    )


def test_a_user_without_a_home_has_a_folder_for_the_process(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(kimi_cpu.Path, "home", home)
    assert kimi_cpu.cache_folder().name.startswith("kimi_cpu_")


# ------------------------------------------------------------------------------------------------- what C never sees


def right_arguments(function):
    """Arguments that a binding takes: one sequence or two, 2 heads, 3 new tokens, 5 in all, 4 experts of 64 x 32."""
    experts = [tuple(stack(4, *shape, torch.Generator())) for shape in ((32, 64), (32, 64), (64, 32))]

    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    queries = {"q_nope": zeros(2, 2, 3, 16), "q_pe": zeros(2, 2, 3, 8)}
    mask = zeros(2, 1, 3, 5, dtype=torch.bool)
    table = {
        "linear_bf16": {"x": zeros(2, 3, 64), "weight": zeros(7, 64)},
        "rms_norm_bf16": {"x": zeros(2, 3, 64), "weight": zeros(64), "eps": 1e-5},
        "rotary_bf16": {"x": zeros(2, 2, 3, 8), "cos": zeros(2, 3, 4), "sin": zeros(2, 3, 4)},
        "unpack_int4_bf16": {
            "packed": zeros(7, 8, dtype=torch.int32),
            "scale": zeros(7, 2),
            "out": zeros(7, 64),
        },
        "experts_int4_few_rows": {
            "x": zeros(3, 64),
            "ids": zeros(3, 2, dtype=torch.int64),
            "weights": zeros(3, 2, dtype=torch.float32),
            "matrices": experts,
        },
        "expert_int4_tiles": {
            "x": zeros(3, 64),
            "rows": torch.tensor([0, 2, 1, 2]),
            "weights": zeros(4, dtype=torch.float32),
            "matrices": experts,
            "output": zeros(3, 64, dtype=torch.float32),
        },
        "absorb": {
            **queries,
            "up": zeros(2, 28, 24),
            "latent": zeros(2, 1, 5, 24),
            "k_pe": zeros(2, 1, 5, 8),
            "mask": mask,
            "scaling": 0.1,
        },
        "prefill_attention": {
            **queries,
            "kv": zeros(2, 2, 5, 80),
            "k_pe": zeros(2, 1, 5, 8),
            "mask": mask,
            "offset": 2,
            "scaling": 0.1,
            "out": zeros(2, 2, 3, 64),
        },
    }
    return table[function]


def last_twice(tensor):
    """Of the same shape, with stride 2 in the last dimension."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def half(tensor):
    return tensor.half()


def longer(dimension):
    """One element more in a dimension."""

    def change(tensor):
        return torch.cat((tensor, tensor.narrow(dimension, 0, 1)), dimension).contiguous()

    return change


def deeper(tensor):
    return tensor.unsqueeze(0)


def somewhere_else(tensor):
    return tensor.to("meta")


class WithoutMemory(torch.Tensor):
    """On the CPU by its own account, at address 0: as a DTensor, a FakeTensor, a tensor of a quantizer."""

    @staticmethod
    def __new__(cls, like):
        kind = {"strides": like.stride(), "dtype": like.dtype, "device": like.device}
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, **kind)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


CHANGES = {
    "linear_bf16": {
        "x": (half, longer(-1), somewhere_else),
        "weight": (half, longer(1), last_twice, deeper, somewhere_else),
    },
    "rms_norm_bf16": {"x": (half, longer(-1), last_twice), "weight": (half, longer(0), last_twice, deeper)},
    "rotary_bf16": {
        "x": (half, longer(-1), longer(2), last_twice, deeper, somewhere_else),
        "cos": (longer(0), longer(1), longer(2), deeper, somewhere_else),
        "sin": (longer(0), longer(1), longer(2), deeper, somewhere_else),
    },
    "unpack_int4_bf16": {
        "packed": (torch.Tensor.long, longer(0), longer(1), last_twice, deeper, somewhere_else),
        "scale": (half, longer(0), longer(1), last_twice, deeper, somewhere_else),
        "out": (half, longer(0), longer(1), last_twice, deeper, somewhere_else),
    },
    "experts_int4_few_rows": {
        "x": (half, longer(0), longer(1), last_twice, deeper, somewhere_else),
        "ids": (torch.Tensor.int, longer(0), longer(1), last_twice, deeper, somewhere_else),
        "weights": (half, longer(0), longer(1), last_twice, deeper, somewhere_else),
    },
    "expert_int4_tiles": {
        "x": (half, longer(0), longer(1), last_twice, deeper, somewhere_else),
        "rows": (torch.Tensor.int, longer(0), last_twice, deeper, somewhere_else),
        "weights": (half, longer(0), last_twice, somewhere_else),
        "output": (half, longer(0), longer(1), last_twice, deeper, somewhere_else),
    },
    "absorb": {
        "q_nope": (half, longer(0), longer(1), longer(2), deeper, somewhere_else),
        "q_pe": (half, longer(0), longer(1), longer(2), longer(3), deeper, somewhere_else),
        "up": (half, longer(0), longer(2), last_twice, deeper, lambda up: up[:, :15].contiguous()),
        "latent": (half, longer(0), longer(1), longer(2), longer(3), last_twice, deeper, somewhere_else),
        "k_pe": (half, longer(0), longer(1), longer(2), longer(3), last_twice, deeper, somewhere_else),
        "mask": (half, longer(0), longer(1), longer(2), longer(3), deeper, somewhere_else),
    },
    "prefill_attention": {
        "q_nope": (half, longer(0), longer(1), longer(2), longer(3), last_twice, deeper, somewhere_else),
        "q_pe": (half, longer(0), longer(1), longer(2), longer(3), last_twice, deeper, somewhere_else),
        "kv": (half, longer(0), longer(1), longer(2), longer(3), last_twice, deeper, somewhere_else),
        "k_pe": (half, longer(0), longer(1), longer(2), longer(3), last_twice, deeper, somewhere_else),
        "mask": (half, longer(0), longer(1), longer(2), longer(3), deeper, somewhere_else),
        "out": (half, longer(0), longer(1), longer(2), longer(3), last_twice, deeper, somewhere_else),
    },
}


@pytest.fixture
def c_calls(monkeypatch):
    """The names of the C functions that are called; none of them runs."""

    class Library:
        def __getattr__(self, name):
            return lambda *arguments: calls.append(name)

    calls = []
    monkeypatch.setattr(kimi_cpu, "library", Library)
    return calls


def described(name, tensor):
    return f"{name} {str(tensor.dtype)[6:]} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"


@pytest.mark.parametrize(
    "function, name", [(function, name) for function, changes in CHANGES.items() for name in changes]
)
def test_wrong_tensors_are_refused(function, name, c_calls):
    """Each binding names itself and shows the tensor that C would have read as something else."""
    right = right_arguments(function)
    result = getattr(kimi_cpu, function)(**right)
    if function == "expert_int4_tiles":
        assert c_calls == []
        result(3, 1, 3)
    assert len(c_calls) == 1
    for change in (*CHANGES[function][name], WithoutMemory):
        wrong = change(right[name])
        with pytest.raises(ValueError) as caught:
            getattr(kimi_cpu, function)(**{**right, name: wrong})
        message = str(caught.value)
        assert message.startswith(f"{function} takes ") and len(c_calls) == 1, (change, message)
        # Of a packed matrix whose counterpart is wrong, the counterpart may be what is shown.
        shown = described(name, wrong)
        if function == "unpack_int4_bf16":
            shown = shown.replace("packed ", "packed words ").replace("scale ", "packed scale ")
        about_matrices = " weights, inputs a multiple of 32; got " in message
        assert shown in message or (about_matrices and name in ("x", "out")), (change, message)


@pytest.mark.parametrize("function", ["experts_int4_few_rows", "expert_int4_tiles"])
@pytest.mark.parametrize("place, matrix", enumerate(("gate", "up", "down")))
@pytest.mark.parametrize("part", ["words", "scale"])
def test_wrong_stacks_are_refused(function, place, matrix, part, c_calls):
    right = right_arguments(function)
    index = ("words", "scale").index(part)
    kind = torch.Tensor.long if part == "words" else half
    for change in (kind, longer(0), longer(1), longer(2), last_twice, deeper, somewhere_else, WithoutMemory):
        pairs = [list(pair) for pair in right["matrices"]]
        pairs[place][index] = change(pairs[place][index])
        with pytest.raises(ValueError, match=rf"^{function} takes .*(gate|up|down) {part} "):
            getattr(kimi_cpu, function)(**{**right, "matrices": pairs})
    narrow = [tuple(stack(4, *shape, torch.Generator())) for shape in ((32, 48), (32, 48), (48, 32))]
    with pytest.raises(ValueError, match=rf"^{function} takes .*a multiple of 32; got gate words"):
        getattr(kimi_cpu, function)(**{**right, "x": right["x"][:, :48].contiguous(), "matrices": narrow})
    assert not c_calls


@pytest.mark.parametrize(
    "function, changes, reason",
    [
        ("linear_bf16", {"dtype": torch.float64}, "gives bfloat16 or float32, not torch.float64"),
        (
            "linear_bf16",
            {"x": torch.zeros(()).bfloat16(), "weight": torch.zeros(7).bfloat16()},
            "takes .*x \\(\\.\\.\\., M\\)",
        ),
        (
            "rms_norm_bf16",
            {"x": torch.zeros(()).bfloat16(), "weight": torch.zeros(()).bfloat16()},
            "takes .*weight \\(M\\)",
        ),
        ("rotary_bf16", {"x": torch.zeros(2, 2, 3, 8, 1).bfloat16()}, "takes .*x \\(B, h, T, dr\\)"),
        (
            "rotary_bf16",
            {"cos": torch.zeros(3, 3, 4), "sin": torch.zeros(3, 3, 4)},
            "takes .*\\(B or 1, T, dr/2\\)",
        ),
        (
            "unpack_int4_bf16",
            {
                "packed": torch.zeros(1, 7, 8).int(),
                "scale": torch.zeros(1, 7, 2).bfloat16(),
                "out": torch.zeros(1, 7, 64).bfloat16(),
            },
            "takes .*out \\(N, M\\)",
        ),
        ("experts_int4_few_rows", {"x": torch.zeros(3, 64, 1).bfloat16()}, "takes .*x \\(R, H\\)"),
        (
            "experts_int4_few_rows",
            {"ids": torch.zeros(3).long(), "weights": torch.zeros(3)},
            "takes .*ids \\(R, K\\)",
        ),
        ("absorb", {"mask": torch.ones(2, 1, 3, 5, 1).bool()}, "takes .*boolean mask"),
        ("rotary_bf16", {"x": torch.zeros(2, 2, 3, 9).bfloat16()}, "takes .*dr even"),
        (
            "absorb",
            {
                "latent": torch.zeros(2, 1, 0, 24).bfloat16(),
                "k_pe": torch.zeros(2, 1, 0, 8).bfloat16(),
                "mask": None,
            },
            "takes .*S > 0",
        ),
        (
            "absorb",
            {"latent": torch.zeros(2, 1, 5, 4097).bfloat16(), "up": torch.zeros(2, 28, 4097).bfloat16()},
            "takes .*c <= 4096",
        ),
        (
            "prefill_attention",
            {"q_nope": torch.zeros(2, 2, 3, 15).bfloat16(), "kv": torch.zeros(2, 2, 5, 79).bfloat16()},
            "takes .*dn and dr even",
        ),
        (
            "prefill_attention",
            {"q_pe": torch.zeros(2, 2, 3, 7).bfloat16(), "k_pe": torch.zeros(2, 1, 5, 7).bfloat16()},
            "takes .*dn and dr even",
        ),
        (
            "prefill_attention",
            {"kv": torch.zeros(2, 2, 5, 112).bfloat16(), "out": torch.zeros(2, 2, 3, 96).bfloat16()},
            "takes .*dv a multiple of 64",
        ),
        ("prefill_attention", {"offset": -1}, "takes an offset of at least 0 or None; got -1"),
        (
            "expert_int4_tiles",
            {"rows": torch.tensor([0, 2, 1, 3])},
            "takes rows from 0 to 2; got rows from 0 to 3",
        ),
        (
            "expert_int4_tiles",
            {"rows": torch.tensor([0, 2, -1, 2])},
            "takes rows from 0 to 2; got rows from -1 to 2",
        ),
    ],
)
def test_wrong_sizes_are_refused(function, changes, reason, c_calls):
    with pytest.raises(ValueError, match=f"^{function} {reason}"):
        getattr(kimi_cpu, function)(**{**right_arguments(function), **changes})
    assert not c_calls


@pytest.mark.parametrize("pairs", [(4, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2, 3), (0, 2, -1)])
def test_wrong_pairs_are_refused(pairs, c_calls):
    run_one = kimi_cpu.expert_int4_tiles(**right_arguments("expert_int4_tiles"))
    with pytest.raises(ValueError, match=r"^expert_int4_tiles has 4 experts and 4 pairs; got expert"):
        run_one(*pairs)
    assert not c_calls


@compiled
@pytest.mark.parametrize("wrong", [-1, 4, 2**62])
def test_wrong_expert_ids_are_refused(wrong):
    right = right_arguments("experts_int4_few_rows")
    right["ids"][1, 1] = wrong
    low, high = min(wrong, 0), max(wrong, 0)
    with pytest.raises(
        ValueError, match=f"^experts_int4_few_rows takes ids from 0 to 3; got ids from {low} to {high}"
    ):
        kimi_cpu.experts_int4_few_rows(**right)


@compiled
def test_a_product_over_no_inputs_is_zero():
    x, weight = torch.zeros(3, 0).bfloat16(), torch.zeros(5, 0).bfloat16()
    assert kimi_cpu.linear_bf16(x, weight).equal(F.linear(x, weight))


@compiled
def test_the_plain_loops_agree_too(tmp_path):
    """What machines without AVX-512 bf16 run: the same source without that instruction set."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from kimi import kimi_cpu
kimi_cpu.SOURCE = kimi_cpu.SOURCE.replace("__AVX512BF16__", "NOT_THIS_ONE")
assert not hasattr(kimi_cpu.library(), "prefill_attention"), "there only with AVX-512 bf16"
import test_cpu
for rows in (1, 7, 40):
    test_cpu.test_experts_are_as_exact_as_plain_torch(rows, (160, 32), None)
test_cpu.test_adversarial_words_and_scales(1, None)
test_cpu.test_unpacking_is_bit_exact()
test_cpu.test_every_code_in_every_place()
test_cpu.test_linear_of_any_shape()
test_cpu.test_norm()
test_cpu.test_rotary()
test_cpu.test_absorbed_attention()
print("agreed")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["agreed"], done.stderr[-3000:]


def test_tensors_without_memory_are_left_to_torch():
    """As of a model that was made under FakeTensorMode, or whose weights are DTensors."""
    x, weight = (WithoutMemory(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((1, 64), (7, 64)))
    rest = [WithoutMemory(torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)) for _ in range(2)]
    assert kimi_backends.faster_linear(x, weight) is None and kimi_backends.faster_rotary(rest[0]) is None
    assert kimi_backends.faster_rms_norm(x, x, rms_norm) is None
    assert kimi_backends.faster_expanded_attention("sdpa", 0.0, *rest, *rest, 64, None) is None
    up = WithoutMemory(torch.zeros(1, 128, 64, dtype=torch.bfloat16))
    assert kimi_backends.faster_absorb("auto", rest[0], up, *rest, None, False) is None
    packed = [ExpertMatrices(*map(WithoutMemory, pair)) for pair in layer()]
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    assert kimi_backends.faster_experts("auto", x, x[:, :2], packed, run_experts) is None
