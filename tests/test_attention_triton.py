"""The Triton attention on the latent against the plain reference: interpreted on a CPU, compiled on a GPU."""

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (make test-kernels installs it)")

from builders import assert_close, skip_unless_interpretable  # noqa: E402
from kimi import kimi_attention_triton  # noqa: E402
from kimi.kimi_attention_triton import (  # noqa: E402
    AttentionBlocks,
    latent_attention_triton,
    num_splits,
    pick_blocks,
    self_test_cases,
)
from kimi.kimi_cache import readable_mask  # noqa: E402
from kimi.modeling_kimi import latent_attention  # noqa: E402

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALING = 0.2
BLOCKS = AttentionBlocks(heads=16, keys=16, warps=4, stages=1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def interpreter_works():
    if DEVICE == "cpu":
        skip_unless_interpretable(kimi_attention_triton)


def tensors(batch=2, heads=3, new=1, total=50, width=32, rope=16, dtype=torch.float32, seed=0):
    """q_latent, q_pe, latent, k_pe; the last two are the filled part of larger buffers, the rest of which is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def filled(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    def in_buffer(states):
        buffer = torch.full((*states.shape[:2], total + 13, states.shape[3]), float("nan"), dtype=dtype)
        buffer = buffer.to(DEVICE)
        buffer[:, :, :total] = states
        return buffer[:, :, :total]

    queries = filled(batch, heads, new, width), filled(batch, heads, new, rope)
    return *queries, in_buffer(filled(batch, 1, total, width)), in_buffer(filled(batch, 1, total, rope))


def check(inputs, mask=None, tolerance=2e-6, why="fp32 sums in another order", **kwargs):
    exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
    want, _ = latent_attention(*(tensor.double() for tensor in inputs), exact, SCALING)
    got, weights = latent_attention_triton(*inputs, mask, SCALING, **kwargs)
    assert weights is None and got.dtype == inputs[0].dtype and got.shape == inputs[0].shape
    assert_close(got, want, tolerance, why)


@pytest.mark.parametrize("total", [1, 16, 17, 50])
@pytest.mark.parametrize("new", [1, 3])
def test_without_mask(new, total):
    check(tensors(new=new, total=total))


def test_more_heads_than_a_block_and_widths_that_are_no_powers_of_two():
    check(tensors(heads=21, new=3, width=48, rope=48, total=37), blocks=BLOCKS)


def test_published_widths():
    check(tensors(batch=1, heads=16, width=512, rope=64, total=40), tolerance=4e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    check(
        tensors(dtype=dtype), tolerance=tolerance, why="probabilities and output are rounded, output up to 3"
    )


@pytest.mark.parametrize("batch_of_mask", [1, 2])
@pytest.mark.parametrize("rows_of_mask", [1, 4])
@pytest.mark.parametrize("kind", ["bool", "float", "-inf", "bf16"])
def test_masks(kind, batch_of_mask, rows_of_mask):
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(batch_of_mask, 1, rows_of_mask, 60, generator=generator) > 0.5
    seen[..., 5] = True
    mask = seen.to(DEVICE)[..., :50]  # a slice, as of a mask for a static cache
    if kind != "bool":
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        hidden = float("-inf") if kind == "-inf" else torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype, device=DEVICE).masked_fill(~mask, hidden)
    check(tensors(new=4), mask)


def test_left_padding_and_causal():
    padding = torch.ones(2, 50, dtype=torch.long, device=DEVICE)
    padding[0, :20] = 0  # whole blocks and whole splits are hidden
    mask = readable_mask(padding, 4, 50, torch.device(DEVICE), flash=True)
    check(tensors(new=4), mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_nothing_stays_finite(kind):
    seen = torch.ones(2, 1, 2, 50, dtype=torch.bool, device=DEVICE)
    seen[0, 0, 1] = False
    lowest = torch.finfo(torch.float32).min
    mask = seen if kind == "bool" else torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, lowest)
    check(tensors(new=2), mask)  # the mean of the cache, like the reference


def test_lengths_end_each_cache_early():
    q_latent, q_pe, latent, k_pe = tensors(batch=3, total=50)
    lengths = torch.tensor([1, 33, 50], device=DEVICE)
    want = torch.cat(
        [
            latent_attention(
                q_latent[b, None].double(),
                q_pe[b, None].double(),
                latent[b, None, :, :n].double(),
                k_pe[b, None, :, :n].double(),
                None,
                SCALING,
            )[0]
            for b, n in enumerate((1, 33, 50))
        ]
    )
    for b, n in enumerate((1, 33)):  # never read
        latent[b, :, n:] = k_pe[b, :, n:] = float("nan")
    got, _ = latent_attention_triton(q_latent, q_pe, latent, k_pe, None, SCALING, lengths=lengths)
    assert_close(got, want, 2e-6, "fp32 sums in another order")


def test_large_scores_do_not_overflow():
    q_latent, *rest = tensors()
    check((q_latent * 1e4, *rest), tolerance=1e-4, why="scores near 1e4 in fp32 differ by 1e-3")


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_any_number_of_splits(splits, monkeypatch):
    """7 of 50 tokens in blocks of 16: some splits are empty."""
    monkeypatch.setattr(kimi_attention_triton, "num_splits", lambda *args: splits)
    check(tensors(), blocks=BLOCKS)


def test_splits_fill_the_device_but_stay_long(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cuda = torch.device("cuda")
    assert num_splits(1, 131072, cuda) == 132
    assert num_splits(1, 1024, cuda) == 4  # 256 keys each
    assert num_splits(16, 131072, cuda) == 8
    assert num_splits(200, 131072, cuda) == 1


def test_unusable_configurations_are_skipped(monkeypatch):
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    unusable = set()
    monkeypatch.setattr(kimi_attention_triton, "UNUSABLE", {device: unusable})
    two = (BLOCKS._replace(heads=64), BLOCKS)
    monkeypatch.setattr(kimi_attention_triton, "OTHER", two)
    monkeypatch.setattr(kimi_attention_triton, "BY_MAJOR", {})
    like, tried = torch.empty(0, dtype=torch.float16, device=device), []
    for case in self_test_cases(device, like.dtype):  # all fail
        assert case.key == (like.dtype, pick_blocks(64, like))
        tried.append(case.key)
        unusable.add(case.key)
    assert len(tried) == len(set(tried)) == 2
    with pytest.raises(RuntimeError, match=r"no configuration of the Triton kernel for torch.float16 passed"):
        pick_blocks(64, like)


def test_views_as_queries():
    q_latent, q_pe, latent, k_pe = tensors(new=2)
    q_latent = q_latent.transpose(1, 2).contiguous().transpose(1, 2)
    q_pe = torch.cat((q_pe, q_pe), dim=-1)[..., ::2]
    assert not q_latent.is_contiguous() and not q_pe.is_contiguous()
    check((q_latent, q_pe, latent, k_pe))


def test_repeats_bit_for_bit():
    inputs = tensors(total=77)
    first, second = (latent_attention_triton(*inputs, None, SCALING)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_refuses_what_a_kernel_would_misread():
    q_latent, q_pe, latent, k_pe = tensors()
    with pytest.raises(ValueError, match=r"latent \(2, 1, 50, 32\) and k_pe \(2, 1, 49, 16\)"):
        latent_attention_triton(q_latent, q_pe, latent, k_pe[:, :, 1:], None, SCALING)
    for wrong in (torch.ones(1).long().expand(2), torch.ones(3).long(), torch.ones(2)):
        with pytest.raises(ValueError, match=r"lengths torch\..* expected 2 integers side by side"):
            latent_attention_triton(*tensors(), None, SCALING, lengths=wrong.to(DEVICE))
    with pytest.raises(ValueError, match=r"mask \(2, 1, 1, 49\), expected \(2, 1, 1, 50\)"):
        mask = torch.ones(2, 1, 1, 49, dtype=torch.bool, device=DEVICE)
        latent_attention_triton(q_latent, q_pe, latent, k_pe, mask, SCALING)


def test_no_host_sync(monkeypatch):
    """No method that waits for the device is called on the way; kernels, which the interpreter feeds by copies, aside."""
    inputs = tensors()
    mask = torch.ones(2, 1, 1, 50, dtype=torch.bool, device=DEVICE)
    lengths = torch.tensor([50, 50], device=DEVICE)
    if DEVICE == "cpu":
        kernel = type(kimi_attention_triton.partial_kernel)
        monkeypatch.setattr(kernel, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)

    def refuse(*args, **kwargs):
        raise AssertionError("asks the device")

    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    ):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    latent_attention_triton(*inputs, mask, SCALING, lengths=lengths)


# ------------------------------------------------------------------------------------------------------------ GPU only


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("total", [100, 4096, 30000])
def test_real_sizes(batch, total):
    inputs = tensors(batch, 64, 1, total, 512, 64, torch.bfloat16)
    q_latent, q_pe, *cache = inputs
    want, _ = latent_attention(*(t.double() for t in inputs), None, 1 / math.sqrt(512))
    got, _ = latent_attention_triton(q_latent, q_pe, *cache, None, 1 / math.sqrt(512))
    assert_close(got, want, 1e-2, "bf16 probabilities and output")


@pytest.mark.gpu
@needs_gpu
def test_graph_replay_equals_a_call():
    inputs = tensors(1, 64, 1, 3000, 512, 64, torch.bfloat16)
    lengths = torch.tensor([1000], device=DEVICE)
    latent_attention_triton(*inputs, None, SCALING, lengths=lengths)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = latent_attention_triton(*inputs, None, SCALING, lengths=lengths)
    lengths.fill_(2999)  # a later step, same graph
    graph.replay()
    assert torch.equal(captured, latent_attention_triton(*inputs, None, SCALING, lengths=lengths)[0])


@pytest.mark.gpu
@needs_gpu
def test_no_device_to_host_copy():
    inputs = tensors(1, 64, 1, 3000, 512, 64, torch.bfloat16)
    latent_attention_triton(*inputs, None, SCALING)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        latent_attention_triton(*inputs, None, SCALING)
    names = [event.name for event in profile.events()]
    assert any("partial_kernel" in name for name in names), "the profiler saw no kernel"
    # The profiler itself ends with a cudaDeviceSynchronize.
    waits = [
        name for name in names if "DtoH" in name or "StreamSynchronize" in name or "EventSynchronize" in name
    ]
    assert not waits
