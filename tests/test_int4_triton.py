"""The Triton experts against the plain reference, in fp64: under Triton's interpreter on a CPU, compiled on a GPU.

What the interpreter cannot see, how kernels compile, is in `test_compile_ahead.py`.
"""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (make test-kernels installs it)")

from builders import assert_close, skip_unless_interpretable  # noqa: E402
from kimi import kimi_int4_triton  # noqa: E402
from kimi.kimi_experts import ExpertMatrices, run_experts  # noqa: E402
from kimi.kimi_int4 import pack_int4  # noqa: E402
from kimi.kimi_int4_triton import (  # noqa: E402
    SELF_TEST_SHAPE,
    Decode,
    DecodeBlocks,
    Prefill,
    PrefillBlocks,
    prefill_blocks,
    run_experts_decode,
    run_experts_prefill,
    run_experts_triton,
    self_test_cases,
    sort_by_expert,
    to_paired,
    to_planes,
    usable_prefill,
)

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Prefill(float("inf"), PrefillBlocks(16, 64, 8, 4, 2), PrefillBlocks(16, 64, 8, 4, 2))
PATHS = [run_experts_decode, run_experts_prefill]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def interpreter_works():
    if DEVICE == "cpu":
        skip_unless_interpretable(kimi_int4_triton)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks smaller than the sizes below and no divisors of them: loops run more than once, every edge is ragged."""
    few = DecodeBlocks(64, 2, 1, 128)
    monkeypatch.setattr(kimi_int4_triton, "DECODE", Decode(few, few))
    for table in ("PREFILL_FP32", "PREFILL_OTHER"):
        monkeypatch.setattr(kimi_int4_triton, table, (SMALL,))
    monkeypatch.setattr(kimi_int4_triton, "PREFILL_BY_MAJOR", {})


def random_matrices(experts, outputs, inputs, generator, scale_dtype=torch.bfloat16):
    words = torch.randint(-(2**31), 2**31, (experts, outputs, inputs // 8), generator=generator).int()
    scales = (torch.rand(experts, outputs, inputs // 32, generator=generator) * 0.04).to(scale_dtype)
    return ExpertMatrices(words.to(DEVICE), scales.to(DEVICE))


def layer(experts=5, width=96, inner=160, seed=0, **kwargs):
    """gate, up, down. 3 and 5 groups, 12 and 20 words: no multiples of the blocks above."""
    generator = torch.Generator().manual_seed(seed)
    return [
        random_matrices(experts, outputs, inputs, generator, **kwargs)
        for outputs, inputs in ((inner, width), (inner, width), (width, inner))
    ]


def batch(rows, choices=2, experts=5, width=96, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    ids = torch.rand(rows, experts, generator=generator).argsort(-1)[:, :choices]
    weights = torch.rand(rows, choices, generator=generator)
    return x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)


def truth(x, ids, weights, *matrices):
    return run_experts(x.double(), ids, weights, *(ExpertMatrices(w, s.double()) for w, s in matrices))


def check(path, inputs, matrices, relative=2e-6, why="fp32 sums in another order"):
    want = truth(*inputs, *matrices)
    got = path(*inputs, *matrices)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert_close(got, want, relative * max(float(want.abs().max()), 1e-30), why)


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rows", "choices"), [(1, 1), (1, 3), (2, 2)])
def test_few_rows(path, rows, choices):
    check(path, batch(rows, choices), layer())


def test_many_rows_make_ragged_tiles():
    inputs = batch(45, 2)
    counts = inputs[1].flatten().bincount()
    assert (counts % 16 != 0).any() and (counts > 16).any()
    check(run_experts_prefill, inputs, layer())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "relative"),
    # bf16 decode keeps everything in fp32. Prefill rounds weights and hidden activations to x's dtype, on a GPU.
    [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_half_precision(path, dtype, relative):
    check(path, batch(2, dtype=dtype), layer(), relative, "rounding of weights and activations")


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("path", PATHS)
def test_scales_of_other_dtypes(path, scale_dtype):
    check(path, batch(2), layer(scale_dtype=scale_dtype))


@pytest.mark.parametrize("path", PATHS)
def test_every_nibble_meets_its_input(path):
    """One code is not zero, one input is one: each of 64 positions must give code * scale, and no other."""
    inner = width = 64
    for position in (0, 9, 18, 27, 36, 45, 54, 63):  # every nibble once
        values = torch.zeros(1, inner, width, dtype=torch.int8)
        values[0, :, position] = torch.arange(inner) % 16 - 8
        gate = ExpertMatrices(pack_int4(values).to(DEVICE), torch.ones(1, inner, width // 32, device=DEVICE))
        identity = ExpertMatrices(
            pack_int4(torch.eye(width, dtype=torch.int8)[None]).to(DEVICE),
            torch.ones(1, width, inner // 32, device=DEVICE),
        )
        x = torch.zeros(1, width, device=DEVICE)
        x[0, position] = 1
        ids, weights = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.ones(1, 1, device=DEVICE)
        codes = values[0, :, position].float().to(DEVICE)
        want = torch.nn.functional.silu(codes) * codes
        assert_close(path(x, ids, weights, gate, gate, identity)[0], want, 1e-5, "silu(code) * code")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", ["zero groups", "all -8", "huge scales", "tiny scales"])
def test_adversarial_weights(path, case):
    matrices = layer()
    for words, scales in matrices:
        if case == "zero groups":
            words[:, ::2, :4] = -2004318072  # 0x88888888, eight codes of 8: zeros
            scales[:, ::2, 0] = 1.1920929e-07
        elif case == "all -8":
            words.zero_()
        elif case == "huge scales":
            scales.mul_(2.0**20)
        else:
            scales.mul_(2.0**-20)
    inputs = batch(2)
    if case == "huge scales":
        inputs[0].mul_(2.0**-20)  # silu of 1e6 would hide errors of the gate
    check(path, inputs, matrices, 4e-6)


@pytest.mark.parametrize("rows", [3, 37])
def test_one_expert_gets_all_and_others_none(rows):
    x, ids, weights = batch(rows, 1)
    check(run_experts_prefill if rows > 3 else run_experts_decode, (x, ids * 0 + 4, weights), layer())


@pytest.mark.parametrize("path", PATHS)
def test_views_as_inputs(path):
    x, ids, weights = batch(3)
    x = torch.stack((x, x * 7), dim=1)[:, 0]
    ids, weights = ids.repeat(1, 2)[:, :2], weights.t().contiguous().t()
    assert not (x.is_contiguous() or ids.is_contiguous() or weights.is_contiguous())
    check(path, (x, ids, weights), layer())


def test_rows_choose_the_path_and_long_inputs_go_in_pieces(monkeypatch):
    used = []
    for path in PATHS:
        monkeypatch.setattr(
            kimi_int4_triton,
            path.__name__,
            lambda x, *rest, path=path: used.append((path.__name__, len(x))) or path(x, *rest),
        )
    monkeypatch.setattr(kimi_int4_triton, "DECODE_UP_TO", 2)
    monkeypatch.setattr(kimi_int4_triton, "ROWS_AT_ONCE", 5)
    check(run_experts_triton, batch(2), layer())
    check(run_experts_triton, batch(7), layer())
    assert used == [("run_experts_decode", 2), ("run_experts_prefill", 5), ("run_experts_prefill", 2)]


def test_no_rows():
    x, ids, weights = batch(1)
    assert run_experts_triton(x[:0], ids[:0], weights[:0], *layer()).shape == (0, 96)


@pytest.mark.parametrize("path", PATHS)
def test_repeats_bit_for_bit(path):
    inputs, matrices = batch(2), layer()
    assert torch.equal(path(*inputs, *matrices), path(*inputs, *matrices))


# ---------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("table", ["PREFILL_OTHER", "PREFILL_HOPPER", "PREFILL_BLACKWELL"])
def test_self_tests_choose_every_configuration(table, monkeypatch):
    monkeypatch.undo()  # the blocks of the file
    monkeypatch.setattr(kimi_int4_triton, "PREFILL_OTHER", getattr(kimi_int4_triton, table))
    monkeypatch.setattr(kimi_int4_triton, "PREFILL_BY_MAJOR", {})
    experts, _, _, choices = SELF_TEST_SHAPE
    x = torch.empty(0, dtype=torch.float16, device=DEVICE)
    decode, *prefill = self_test_cases(x.device, x.dtype)
    assert decode.rows <= kimi_int4_triton.DECODE_UP_TO and decode.key == (x.dtype, kimi_int4_triton.DECODE)
    assert [case.key[1] for case in prefill] == usable_prefill(x.device, x.dtype)
    for case in prefill:
        assert case.rows > kimi_int4_triton.DECODE_UP_TO
        assert prefill_blocks(case.rows * choices / experts, x) == case.key[1][1:]


def test_unusable_configurations_are_skipped(monkeypatch):
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    unusable = set()
    monkeypatch.setattr(kimi_int4_triton, "UNUSABLE", {device: unusable})
    monkeypatch.setattr(
        kimi_int4_triton, "run_experts_decode", lambda *args: pytest.fail("decode is not usable")
    )
    inputs, matrices = batch(2), layer()
    decode, *_ = self_test_cases(device, torch.float32)
    unusable.add(decode.key)
    check(run_experts_triton, inputs, matrices)
    first, second = Prefill(2, *SMALL[1:]), Prefill(9, *SMALL[1:])
    monkeypatch.setattr(kimi_int4_triton, "PREFILL_FP32", (first, second))
    assert usable_prefill(device, torch.float32) == [first, second]
    unusable.add((torch.float32, second))
    assert usable_prefill(device, torch.float32) == [first]
    assert prefill_blocks(100, inputs[0]) == first[1:]  # the last below is better than none
    unusable.add((torch.float32, first))
    with pytest.raises(
        RuntimeError, match=r"no configuration of the Triton kernels for torch.float32 passed"
    ):
        run_experts_triton(*inputs, *matrices)


# ---------------------------------------------------------------------------------------------------------- layouts


def test_layouts_are_what_their_names_say():
    x = torch.arange(16.0, device=DEVICE)[None]
    assert to_planes(x, x.dtype)[0].tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert to_paired(x, x.dtype)[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_tiles_hold_one_expert_and_every_pair_once():
    ids = torch.tensor([[2, 0], [2, 4], [2, 0], [2, 4], [2, 1]], device=DEVICE)
    tiles = sort_by_expert(ids, num_experts=5, tile_rows=2)
    assert tiles.order.tolist() == [1, 5, 9, 0, 2, 4, 6, 8, 3, 7]  # stable
    assert tiles.expert.tolist() == [0, 1, 2, 2, 2, 4, 5, 5, 5, 5]  # 5 is none
    assert tiles.first.tolist()[:6] == [0, 2, 3, 5, 7, 8]
    assert tiles.expert_ends.tolist() == [2, 3, 8, 8, 10]


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda m: [ExpertMatrices(m[0].weight.float(), None), *m[1:]],
            "packed int4 words, got torch.float32",
        ),
        (
            lambda m: [m[0], m[1], ExpertMatrices(m[2].weight[:, :-1], m[2].scale)],
            r"down: words \(5, 95, 20\)",
        ),
        (
            lambda m: [
                m[0],
                ExpertMatrices(m[1].weight.transpose(0, 1).contiguous().transpose(0, 1), m[1].scale),
                m[2],
            ],
            "up: words and scales must be contiguous",
        ),
    ],
)
def test_refuses_what_a_kernel_would_misread(spoil, message):
    with pytest.raises(ValueError, match=message):
        run_experts_triton(*batch(2), *spoil(layer()))


# ------------------------------------------------------------------------------------------------- the host asks nothing


@pytest.mark.parametrize("rows", [2, 20])
def test_no_host_sync(rows, monkeypatch):
    """No method that waits for the device is called on the way. (On a GPU, `test_no_device_to_host_copy` is stricter.)"""
    # The interpreter itself copies arguments with .cpu(); what it does is not ours, so kernels are left out.
    inputs, matrices = batch(rows), layer()
    if DEVICE == "cpu":
        for name in ("gate_up_decode", "down_decode", "gate_up_prefill", "down_prefill", "combine"):
            kernel = getattr(kimi_int4_triton, f"{name}_kernel")
            monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: lambda *args, **kwargs: None)

    def refuse(*args, **kwargs):
        raise AssertionError("asks the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "bincount", "unique", "masked_select"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for name in ("nonzero", "bincount", "unique", "masked_select"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    run_experts_triton(*inputs, *matrices)


# ------------------------------------------------------------------------------------------------------------ GPU only


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 40])
def test_graph_replay_equals_a_call(rows):
    inputs, matrices = batch(rows, dtype=torch.bfloat16), layer()
    run_experts_triton(*inputs, *matrices)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_experts_triton(*inputs, *matrices)
    for tensor, new in zip(inputs, batch(rows, seed=5, dtype=torch.bfloat16), strict=True):
        tensor.copy_(new)  # other routing, same graph
    graph.replay()
    assert torch.equal(captured, run_experts_triton(*inputs, *matrices))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 40])
def test_no_device_to_host_copy(rows):
    inputs, matrices = batch(rows, dtype=torch.bfloat16), layer()
    run_experts_triton(*inputs, *matrices)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        run_experts_triton(*inputs, *matrices)
    names = [event.name for event in profile.events()]
    assert any("decode_kernel" in name or "prefill_kernel" in name for name in names), (
        "the profiler saw no kernel"
    )
    # The profiler itself ends with a cudaDeviceSynchronize.
    waits = [
        name for name in names if "DtoH" in name or "StreamSynchronize" in name or "EventSynchronize" in name
    ]
    assert not waits


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 1024])
def test_real_sizes(rows, monkeypatch):
    monkeypatch.undo()  # the blocks of the file
    matrices = layer(experts=16, width=7168, inner=2048)
    inputs = batch(rows, 8, experts=16, width=7168, dtype=torch.bfloat16)
    check(run_experts_triton, inputs, matrices, 1e-2, "bf16 weights and hidden activations")
