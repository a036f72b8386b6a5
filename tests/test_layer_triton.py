"""The small Triton kernels against the plain code: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="triton is not installed (make test-kernels installs it)")

from builders import assert_close, skip_unless_interpretable  # noqa: E402
from kimi import kimi_layer_triton  # noqa: E402
from kimi.kimi_layer_triton import (  # noqa: E402
    add_rounded_triton,
    rms_norm_triton,
    rotate_and_append_triton,
    route_triton,
    silu_and_mul_triton,
)
from kimi.modeling_kimi import add_rounded, choose_experts, rms_norm, rotate_pairs  # noqa: E402

pytestmark = [pytest.mark.kernels, pytest.mark.gpu]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter cuts bf16 where a GPU rounds.
ULP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3 if DEVICE == "cuda" else 2e-2}


@pytest.fixture(autouse=True)
def interpreter_works():
    if DEVICE == "cpu":
        skip_unless_interpretable(kimi_layer_triton)


def close(got, want, dtype, why="fp32 sums in another order may round the other way"):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert_close(got, want, ULP[dtype] * max(1.0, float(want.abs().max())), why)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 7168), (2, 3, 40), (1, 1, 5, 512)])
def test_rms_norm(shape, dtype):
    x = (torch.randn(shape) * 3).to(DEVICE, dtype)
    weight = torch.rand(shape[-1]).to(DEVICE, dtype)
    close(rms_norm_triton(x, weight, 1e-5), rms_norm(x, weight, 1e-5), dtype)


def test_rms_norm_of_a_part_of_wider_rows():
    wide = torch.randn(2, 1, 3, 48, device=DEVICE)
    x, weight = wide[..., :32], torch.rand(32, device=DEVICE)
    close(rms_norm_triton(x, weight, 1e-6), rms_norm(x, weight, 1e-6), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype):
    gate, up = (torch.randn(3, 700).to(DEVICE, dtype) for _ in range(2))
    close(silu_and_mul_triton(gate, up), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rounded(dtype):
    wide, other = torch.randn(3, 700, device=DEVICE), torch.randn(3, 700).to(DEVICE, dtype)
    close(add_rounded_triton(wide, other, dtype), add_rounded(wide, other, dtype), dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(384, 8), (8, 3), (5, 5)])
def test_route(experts, top_k, normalize):
    logits, bias = torch.randn(7, experts, device=DEVICE), torch.randn(experts, device=DEVICE)
    ids, weights = route_triton(logits, bias, top_k, normalize, 2.827)
    want_ids, want = choose_experts(logits, bias, top_k, 1, 1, normalize, 2.827)
    assert ids.dtype == torch.int64 and torch.equal(ids.sort(-1).values, want_ids.sort(-1).values)
    assert_close(weights.sort(-1).values, want.sort(-1).values, 1e-6, "fp32 sums in another order")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_route_chooses_different_experts_whatever_the_logits_are(value):
    """An id beyond the last expert would read memory that is not theirs."""
    for logits, bias in ((value, 0.0), (0.0, value)):
        ids, _ = route_triton(
            torch.full((2, 5), logits, device=DEVICE), torch.full((5,), bias, device=DEVICE), 3, True, 1.0
        )
        assert all(len(set(row)) == 3 and max(row) < 5 and min(row) >= 0 for row in ids.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "new"), [(1, 64, 1), (2, 5, 3), (1, 1, 130)])
def test_rotate_and_append(batch, heads, new, dtype):
    rope, width, room = 16, 24, 7
    q = torch.randn(batch, new, heads, 8 + rope).to(DEVICE, dtype).transpose(1, 2)
    compressed = torch.randn(batch, 1, new, width + rope).to(DEVICE, dtype)
    angles = torch.randn(new, batch, rope // 2, device=DEVICE).transpose(0, 1)  # as of positions that are
    cos, sin = angles.cos(), angles.sin()
    buffers = [torch.zeros(batch, 1, room + new + 2, w, dtype=dtype, device=DEVICE) for w in (width, rope)]
    places = [buffer[:, :, room : room + new] for buffer in buffers]
    latent, k_pe = compressed.split((width, rope), dim=-1)
    got = rotate_and_append_triton(q[..., 8:], latent, k_pe, cos, sin, *places)
    close(got, rotate_pairs(q[..., 8:], cos, sin), dtype)
    close(places[1], rotate_pairs(k_pe, cos, sin), dtype)
    assert torch.equal(places[0], latent)
    for buffer in buffers:  # and nothing else
        assert not buffer[:, :, :room].any() and not buffer[:, :, room + new :].any()
