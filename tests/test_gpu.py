"""How kernels of a GPU are tried before they are used: with stand-ins for them, and with themselves, interpreted."""

import importlib.util
import itertools

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch._subclasses.fake_tensor import FakeTensorMode

from builders import skip_unless_interpretable, small_config
from kimi import kimi_gpu
from kimi.kimi_gpu import FINDINGS, KERNEL_DTYPES, NOT_TRIED, SELF_TESTS, compare, operator, prepare, why_not
from kimi.kimi_pretrained import OnEachDevice, accelerator_type
from kimi.modeling_kimi import PLAIN_CODE, KimiK25ForConditionalGeneration

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A process with triton and a card, on which nothing was tried; SELF_TESTS record what is asked of them."""
    tried = []

    def test_of(operation):
        return lambda device, dtype, plain: tried.append((operation, str(device), dtype, plain))

    monkeypatch.setattr(kimi_gpu, "NO_TRITON", None)
    monkeypatch.setattr(kimi_gpu, "FINDINGS", {})
    monkeypatch.setattr(kimi_gpu, "SELF_TESTS", {name: test_of(name) for name in PLAIN_CODE})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tried


def test_every_operation_has_plain_code_and_a_test():
    assert PLAIN_CODE.keys() == SELF_TESTS.keys()


def test_prepare_tries_each_operation_once_on_each_device(card):
    for _ in range(2):
        prepare(CUDA, torch.bfloat16, PLAIN_CODE)
        prepare(torch.device("cuda", 1), torch.bfloat16, PLAIN_CODE)
        prepare(torch.device("cpu"), torch.bfloat16, PLAIN_CODE)
        prepare(CUDA, torch.int32, PLAIN_CODE)
    assert card == [
        (name, device, torch.float32 if name == "route" else torch.bfloat16, plain)
        for device, (name, plain) in itertools.product(("cuda:0", "cuda:1"), PLAIN_CODE.items())
    ]
    assert why_not("experts", CUDA, torch.bfloat16, PLAIN_CODE["experts"]) is None
    assert len(card) == 2 * len(PLAIN_CODE)


@pytest.mark.parametrize("while_", ["traced", "captured"])
def test_nothing_is_tried_while_a_trace_or_a_graph_is_made(card, while_, monkeypatch):
    if while_ == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert why_not("rms_norm", CUDA, torch.bfloat16, PLAIN_CODE["rms_norm"]) == NOT_TRIED and not card
    kimi_gpu.FINDINGS["rms_norm", "cuda:0", torch.bfloat16] = None
    assert why_not("rms_norm", CUDA, torch.bfloat16, PLAIN_CODE["rms_norm"]) is None and not card


def test_numbers_are_drawn_on_the_cpu_whatever_a_caller_has_set(card, monkeypatch):
    """torch.set_default_device("cuda") made the tests raise, outside of what catches it; and the caller's own random
    numbers stay the same."""
    drawn = []
    monkeypatch.setitem(
        kimi_gpu.SELF_TESTS, "experts", lambda *given: drawn.extend((torch.ones(1), kimi_gpu.random(2, 2)))
    )
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    before = torch.get_rng_state()
    try:
        assert why_not("experts", CUDA, torch.bfloat16, PLAIN_CODE["experts"]) is None
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert {tensor.device.type for tensor in drawn} == {"cpu"} and drawn[1].dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_whatever_a_test_raises_is_a_reason(card, monkeypatch, caplog):
    def out_of_resources(device, dtype, plain):
        raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 101376")

    monkeypatch.setitem(kimi_gpu.SELF_TESTS, "experts", out_of_resources)
    reason = why_not("experts", CUDA, torch.bfloat16, PLAIN_CODE["experts"])
    assert reason == (
        "its kernels fail on cuda:0 (RuntimeError: out of resource: shared memory, Required: 262144,"
        " Hardware limit: 101376)"
    )
    assert f"experts runs in plain torch, slowly: triton is there, but {reason}" in caplog.text


def test_a_full_card_says_nothing_about_kernels(card, monkeypatch):
    """Right behind loading it is fullest; another time they are tried again."""
    answers = [torch.cuda.OutOfMemoryError("CUDA out of memory"), None]

    def once_too_full(device, dtype, plain):
        if (answer := answers.pop(0)) is not None:
            raise answer

    def run(case):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(kimi_gpu.SELF_TESTS, "experts", once_too_full)
    given = "experts", CUDA, torch.bfloat16, PLAIN_CODE["experts"]
    assert why_not(*given) == "there is no memory on cuda:0 to try its kernels (CUDA out of memory)"
    assert why_not(*given) is None and not answers
    unusable = set()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        kimi_gpu.each_case([None], unusable, CUDA, run)
    assert not unusable


def test_fake_tensors_are_compared_with_nothing(card):
    with FakeTensorMode():
        assert why_not("experts", CUDA, torch.bfloat16, PLAIN_CODE["experts"]) == NOT_TRIED
    assert not card and not kimi_gpu.FINDINGS


def test_a_configuration_that_fails_is_left_out(caplog):
    """The others serve; not all of the operation falls back."""

    class Case:
        def __init__(self, name):
            self.name = self.key = name

    def run(case):
        if case.name == "large":
            raise ValueError("it spills")

    unusable = set()
    kimi_gpu.each_case(map(Case, ("small", "large")), unusable, CUDA, run)
    assert unusable == {"large"} and "large is not used on cuda:0 (ValueError: it spills)" in caplog.text


def test_a_model_is_prepared_when_it_moves(monkeypatch):
    """So that no forward pass has to try a kernel."""
    asked = []
    monkeypatch.setattr("kimi.kimi_pretrained.prepare", lambda *given: asked.append(given))
    model = KimiK25ForConditionalGeneration(small_config())
    for move in (lambda: model.to("meta"), lambda: model.to(torch.bfloat16), model.half):
        asked.clear()
        move()
        weight = model.language_model.lm_head.weight
        assert asked == [(weight.device, weight.dtype, PLAIN_CODE)], (
            "once, though the routers have fp32 biases"
        )


# ---------------------------------------------------------------------------------------------------------- device maps


def test_shared_tensors_are_copied_once_to_each_device():
    """Whatever form a device map gives a device; layers without a hook get the tensors as they are."""
    angles = torch.zeros(2), torch.ones(2)
    shared = OnEachDevice(position_embeddings=angles, attention_mask=None, lengths=torch.ones(1))
    plain, first, second = (torch.nn.Identity() for _ in range(3))
    add_hook_to_module(first, AlignDevicesHook(execution_device="meta"))
    add_hook_to_module(second, AlignDevicesHook(execution_device=torch.device("meta")))
    assert shared.for_layer(plain)["position_embeddings"] is angles
    there = shared.for_layer(first)
    assert there is shared.for_layer(second) and there["attention_mask"] is None
    assert {tensor.device.type for tensor in (*there["position_embeddings"], there["lengths"])} == {"meta"}


@pytest.mark.parametrize("found", [None, torch.device("xpu")])
def test_a_number_is_a_number_of_the_accelerator(found, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    assert accelerator_type() == ("cuda" if found is None else "xpu")
    monkeypatch.delattr(torch, "accelerator")
    assert accelerator_type() == "cuda"


# ------------------------------------------------------------------------------------------------------------ operators


def test_a_file_that_runs_twice_registers_its_operators_once():
    """What torch.compile made of the first copy keeps working; another copy, of another folder, has its own."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def thrice(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    first = operator("test_product", twice, torch.empty_like)
    compiled = torch.compile(lambda x: first(x) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [3, 3]
    assert operator("test_product", thrice, torch.empty_like) is first
    assert compiled(torch.ones(2)).tolist() == [3, 3] and first(torch.ones(1)).tolist() == [2]
    spec = importlib.util.spec_from_file_location("kimi.another_copy_of_kimi_gpu", kimi_gpu.__file__)
    other = importlib.util.module_from_spec(spec)
    for _ in range(2):
        spec.loader.exec_module(other)
    assert other.latent_attention_operator is not kimi_gpu.latent_attention_operator
    assert other.operator("test_product", thrice, torch.empty_like)(torch.ones(1)).tolist() == [3]
    assert first(torch.ones(1)).tolist() == [2]


# --------------------------------------------------------------------------------------------------- kernels themselves


@pytest.mark.kernels
@pytest.mark.gpu
@pytest.mark.parametrize("operation", sorted(SELF_TESTS))
def test_kernels_pass_their_own_test(operation, monkeypatch):
    """Also where the caller's default device is another: numbers are drawn on the CPU."""
    pytest.importorskip("triton", reason="triton is not installed (make test-kernels installs it)")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        from kimi import kimi_int4_triton, kimi_layer_triton

        skip_unless_interpretable(kimi_layer_triton)
        # Interpreted, the real sizes take minutes.
        few = kimi_int4_triton.DecodeBlocks(64, 2, 1, 128)
        monkeypatch.setattr(kimi_int4_triton, "DECODE", kimi_int4_triton.Decode(few, few))
        monkeypatch.setattr(kimi_gpu, "EXPERTS_SHAPE", (16, 64, 64, 8))
        monkeypatch.setattr(kimi_gpu, "ATTENTION_SHAPE", (1, 4, 64, 16))
    dtypes = KERNEL_DTYPES if device.type == "cuda" else (torch.float32,)
    torch.set_default_device("meta")
    try:
        for dtype in dtypes:
            assert compare(operation, device, dtype, PLAIN_CODE[operation]) is None
    finally:
        torch.set_default_device(None)
    assert not FINDINGS
