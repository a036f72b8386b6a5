"""Experts in the slots of a GPU that is not there (fake_gpu.py): who waits for whom, and how much memory is locked."""

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_gpu import DEVICE, FakeGpu, RaceError, Stream
from kimi import kimi_files, kimi_pool, kimi_slots
from kimi.kimi_experts import run_experts
from kimi.kimi_files import empty_page_locked
from kimi.kimi_pool import PooledExperts
from kimi.kimi_sizes import expert_bytes
from kimi.kimi_slots import SlotCache, Visit, Worth
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi
from scripts.tiny_checkpoint import write_tiny_checkpoint

TOP_K, EXPERTS, WIDTH = 4, 16, 256  # of the tiny checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def resident(folder):
    """The experts of the two layers that have some."""
    model = Kimi.from_pretrained(folder)
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


@pytest.fixture
def gpu(monkeypatch):
    real = kimi_files.File.read

    def read(self, ranges):
        for wanted in ranges:
            fake.write_by_host(np.frombuffer(wanted.view, np.uint8).ctypes.data)
        real(self, ranges)

    with FakeGpu(monkeypatch) as fake:
        monkeypatch.setattr(kimi_files.File, "read", read)
        yield fake
    gc.collect()  # pools, while what they locked can still be unlocked


@pytest.fixture
def with_kernel(gpu, monkeypatch):
    """Experts run by a kernel that takes slots, as Triton's do: it reads those that it is given."""

    def kernel(x, ids, weights, *matrices):
        slots = gpu.values(ids).unique().tolist()
        assert all(0 <= slot < len(gpu.values(matrices[0].weight)) for slot in slots)
        stacks = [gpu.values(stack) for matrix in matrices for stack in matrix]
        gpu.run("kernel", reads=[stack[slot].data_ptr() for stack in stacks for slot in slots])
        pairs = [type(matrix)(*map(gpu.values, matrix)) for matrix in matrices]
        return gpu.tensor(run_experts(*map(gpu.values, (x, ids, weights)), *pairs))

    monkeypatch.setattr(kimi_pool, "faster_experts", lambda *args: kernel)


def pooled(folder, gpu, slots, ram=0, readers=kimi_slots.READERS):
    """The experts of two layers over one cache of a GPU, before `ram` slots in RAM."""
    model = Kimi.from_pretrained(folder, expert_cache=10**6)
    pool = model.expert_pool
    (old,) = pool.caches.values()
    layout = {name: (tuple(stack.shape[1:]), stack.dtype) for name, stack in old.stacks.items()}
    source = SlotCache(pool.files, ram, layout, Worth(64.0, 2), copied_to=DEVICE) if ram else pool.files
    cache = SlotCache(source, slots, layout, Worth(64.0, 2), DEVICE, readers)
    gpu.watch(cache)
    pool.caches, pool.device_of = {DEVICE: cache}, dict.fromkeys(pool.device_of, DEVICE)
    return [module for module in model.modules() if isinstance(module, PooledExperts)]


def inputs(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator).bfloat16()
    ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K).indices
    return x, ids, torch.rand(rows, TOP_K, generator=generator)


@torch.no_grad()
def run(gpu, experts, given, ahead=True):
    x, ids, weights = map(gpu.tensor, given)
    if ahead:
        experts.prefetch(ids)
    return gpu.values(experts(x, ids, weights))


def check(gpu, pooled_layers, resident_layers, sizes, **how):
    """Passes of these numbers of rows through both layers in turn, with the sums of resident experts."""
    for seed, rows in enumerate(sizes):
        for mine, truth in zip(pooled_layers, resident_layers, strict=True):
            given = inputs(rows, seed)
            with torch.no_grad():
                want = run_experts(*given, *(truth.matrices(name) for name in truth.shapes))
            assert (run(gpu, mine, given, **how) - want).abs().max() < 1e-4, (rows, seed)
    assert not gpu.errors


SIZES = [1, 1, 3, 40, 2, 16, 1, 60, 1]


# --------------------------------------------------------------------------------------------- order of copies and use


@pytest.mark.parametrize("ram", [0, 9, 32])
@pytest.mark.parametrize("slots", [TOP_K, 7, 32])
def test_slots_are_overwritten_after_their_last_use_and_used_after_the_copy(
    folder, resident, gpu, with_kernel, slots, ram
):
    """Also slots in RAM and the memory between files and GPU: overwritten after the copies out of them."""
    check(gpu, pooled(folder, gpu, slots, ram), resident, SIZES)


@pytest.mark.parametrize("ram", [0, 9])
def test_the_same_where_experts_run_one_after_the_other(folder, resident, gpu, monkeypatch, ram):
    monkeypatch.setattr(kimi_pool, "faster_experts", lambda *args: None)
    check(gpu, pooled(folder, gpu, TOP_K, ram), resident, SIZES)


def test_threads_with_streams_of_their_own_share_the_slots(folder, resident, gpu, with_kernel):
    layers, failed = pooled(folder, gpu, 6, 12), []

    def work():
        with gpu.mode, gpu.use_stream(Stream()):
            try:
                check(gpu, layers, resident, [1, 3, 40, 1, 2] * 3)
            except BaseException as problem:  # a thread's own would be printed, and the test would pass
                failed.append(problem)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed and not gpu.errors


@pytest.mark.parametrize("ram", [0, 12])
def test_after_a_failed_read_the_order_still_holds(folder, resident, gpu, with_kernel, monkeypatch, ram):
    layers, real, calls = pooled(folder, gpu, 5, ram), kimi_files.read_exactly, []

    def failing(*args):
        calls.append(args)
        if len(calls) % 5 == 2:
            raise OSError("Input/output error")
        real(*args)

    monkeypatch.setattr(kimi_files, "read_exactly", failing)
    for seed in range(4):
        with pytest.raises(OSError, match="Input/output error"):
            run(gpu, layers[seed % 2], inputs(40, seed))
    monkeypatch.setattr(kimi_files, "read_exactly", real)
    check(gpu, layers, resident, SIZES)
    caches = [layers[0].pool.caches[DEVICE]]
    caches += [caches[0].source] if ram else []
    for cache in caches:
        assert not any(entry.pins for entry in cache.entries.values())
        assert len(cache.free) + len(cache.entries) == cache.capacity


@pytest.mark.parametrize("ram", [0, 12])
def test_after_a_copy_that_failed_half_way_the_order_still_holds(
    folder, resident, gpu, with_kernel, monkeypatch, ram
):
    """Half of an expert is under way then, and nobody has an event for it."""
    layers, real, calls = pooled(folder, gpu, 5, ram), gpu.copy, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) % 7 == 2:
            raise RuntimeError("CUDA error")
        return real(*args, **kwargs)

    monkeypatch.setattr(gpu, "copy", failing)
    for seed in range(4):
        with pytest.raises(RuntimeError, match="CUDA error"):
            run(gpu, layers[seed % 2], inputs(40, seed))
    monkeypatch.setattr(gpu, "copy", real)
    check(gpu, layers, resident, SIZES)


def test_the_fake_gpu_notices_what_is_not_ordered(gpu):
    """A copy beside a kernel that still reads, and one that is used at once."""
    slot, copies = torch.zeros(4), Stream()
    gpu.places.add(slot.data_ptr())
    gpu.run("kernel", reads=[slot.data_ptr()])
    with gpu.use_stream(copies), pytest.raises(RaceError, match="copy writes what kernel uses"):
        gpu.run("copy", writes=[slot.data_ptr()])
    copies.wait_event(gpu.stream.record_event())
    with gpu.use_stream(copies):
        gpu.run("copy", writes=[slot.data_ptr()])
    with pytest.raises(RaceError, match="kernel reads what copy writes"):
        gpu.run("kernel", reads=[slot.data_ptr()])
    gpu.stream.wait_event(copies.record_event())
    gpu.run("kernel", reads=[slot.data_ptr()])


def test_memory_of_slots_is_kept_until_the_copies_are_done(folder, gpu):
    """What PyTorch's allocator must be told, since it gives memory that one stream has freed to the same stream."""
    experts = pooled(folder, gpu, 5)[0]
    cache = experts.pool.caches[DEVICE]
    assert [stream for _, stream in gpu.recorded] == [cache.copies.stream] * len(cache.stacks)


def test_reader_threads_are_on_the_device_with_its_index(folder, gpu, with_kernel):
    """torch.cuda.set_device refuses "cuda", and a thread of another device makes a context of 0.5 GB there."""
    experts = pooled(folder, gpu, 5)[0]
    old = experts.pool.caches[DEVICE]
    layout = {name: (tuple(stack.shape[1:]), stack.dtype) for name, stack in old.stacks.items()}
    cache = SlotCache(old.source, 5, layout, Worth(64.0, 2), torch.device("cuda"))
    cache.await_entry((1, 3), cache.claim((1, 3)))
    assert cache.device == DEVICE and gpu.devices and set(gpu.devices) == {DEVICE}


# ----------------------------------------------------------------------------------------------------- waits of the host


@pytest.mark.parametrize("ram", [0, 32])
@pytest.mark.parametrize(
    ("slots", "rows"), [(32, 1), (TOP_K, 1), (32, 16), (5, 16), (32, 40), (5, 40)], ids=str
)
def test_a_layer_waits_for_the_gpu_once(folder, resident, gpu, with_kernel, slots, rows, ram):
    """For what its router chose. Copies into slots and the numbers of slots cross without a wait."""
    layers = pooled(folder, gpu, slots, ram)
    for seed in range(3):
        for experts in layers:
            gpu.waits.clear()
            run(gpu, experts, inputs(rows, seed))
            assert gpu.waits == ["to"], seed


def test_choices_are_read_again_if_nobody_has_read_ahead(folder, gpu, with_kernel):
    experts = pooled(folder, gpu, 32)[0]
    run(gpu, experts, inputs(2), ahead=False)
    assert gpu.waits == ["to"]


def test_choices_that_were_read_ahead_are_used_for_that_tensor_alone(folder, resident, gpu, with_kernel):
    """Not for another tensor, nor for one that was written since, nor by another thread."""
    experts, truth = pooled(folder, gpu, 32)[0], resident[0]
    x, ids, weights = inputs(3)
    other = inputs(3, seed=1)[1]
    given = [gpu.tensor(value) for value in (x, ids, weights)]

    def want(chosen):
        return run_experts(x, chosen, weights, *(truth.matrices(name) for name in truth.shapes))

    with torch.no_grad():
        experts.prefetch(given[1])
        output = experts(given[0], gpu.tensor(other), given[2])
        assert (gpu.values(output) - want(other)).abs().max() < 1e-4
        experts.prefetch(given[1])
        given[1].copy_(gpu.tensor(other))
        assert (gpu.values(experts(*given)) - want(other)).abs().max() < 1e-4
        experts.prefetch(given[1])
        kept = experts.pool.last.choices
        seen = []
        thread = threading.Thread(target=lambda: seen.append(experts.pool.last.choices))
        thread.start()
        thread.join()
        assert seen == [None] and kept.topk_ids is given[1] and experts.pool.take_choices(given[1]) is kept
        assert experts.pool.last.choices is None, "they are used once"


def test_reading_ahead_while_another_thread_uses_the_slots_keeps_the_choices(folder, gpu, with_kernel):
    experts = pooled(folder, gpu, 32)[0]
    x, ids, weights = map(gpu.tensor, inputs(2))
    locked, release = threading.Event(), threading.Event()

    def other():
        with experts.pool.lock:
            locked.set()
            release.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    locked.wait(60)
    experts.prefetch(ids)
    assert not experts.pool.caches[DEVICE].entries, "nothing is read into slots of another"
    release.set()
    thread.join()
    with torch.no_grad():
        experts(x, ids, weights)
    assert gpu.waits == ["to"]


# ----------------------------------------------------------------------------------------------------- page-locked memory


@pytest.mark.parametrize("shape", [(5,), (3, 4096), (7, 1000, 333)])
def test_as_many_bytes_are_locked_as_were_asked_for_and_unlocked_before_they_go(gpu, shape, monkeypatch):
    mapped_at_unlock, real = [], gpu.cudaHostUnregister

    def unregister(address):
        maps = Path("/proc/self/maps")
        lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        mapped_at_unlock.append(any(low <= address < high for low, high in ranges) or not lines)
        return real(address)

    monkeypatch.setattr(gpu, "cudaHostUnregister", unregister)
    tensor = empty_page_locked(shape, torch.int16, DEVICE)
    assert tensor.shape == shape and tensor.data_ptr() % 4096 == 0
    assert gpu.locked == {tensor.data_ptr(): 2 * torch.Size(shape).numel()}
    view = tensor[1:].fill_(7)
    del tensor
    gc.collect()
    assert gpu.locked and not gpu.waits, "a view still uses it"
    del view
    gc.collect()
    assert not gpu.locked and mapped_at_unlock == [True]
    assert gpu.waits == ["synchronize"], "a copy out of it may have been under way"


def test_nothing_is_locked_for_no_bytes(gpu):
    assert empty_page_locked((0, 8), torch.int32, DEVICE).shape == (0, 8) and not gpu.locked


def test_memory_that_cannot_be_locked_is_ordinary_and_said_once(gpu, monkeypatch):
    gpu.refuses, said, forgotten = 2, [], []
    monkeypatch.setattr(kimi_files.logger, "warning_once", said.append, raising=False)
    monkeypatch.setattr(kimi_files, "forget_last_error", forgotten.append)
    tensor = empty_page_locked((100, 1000), torch.int32, DEVICE)
    tensor.fill_(1)
    del tensor
    gc.collect()
    assert forgotten == [DEVICE] and not gpu.waits
    (sentence,) = said
    assert "could not be page-locked (cudaHostRegister gives error 2)" in sentence and "ulimit -l" in sentence


def test_a_refusal_does_not_come_back_as_the_error_of_a_kernel(gpu):
    """CUDA keeps it for the next launch that looks."""
    kimi_files.forget_last_error(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "ones", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("CUDA error"))
        )
        kimi_files.forget_last_error(DEVICE)


@pytest.mark.parametrize("ram", [0, 9])
def test_experts_are_the_same_where_no_memory_can_be_locked(folder, resident, gpu, with_kernel, ram):
    gpu.refuses = 2
    check(gpu, pooled(folder, gpu, 5, ram), resident, SIZES)


def test_the_tier_in_ram_locks_its_slots_and_no_more(folder, gpu, monkeypatch):
    """torch.empty(pin_memory=True) takes the next power of two: 21 experts would take 1.6 times their bytes."""
    model = Kimi.from_pretrained(folder, expert_cache=10**6)
    pool, one = model.expert_pool, expert_bytes(model.config.text_config) - 3 * 2 * 4
    monkeypatch.setattr(kimi_pool, "free_bytes", lambda device, config: 21 * one)
    (old,) = pool.caches.values()
    dtypes = {name: stack.dtype for name, stack in old.stacks.items()}
    layers = [module for module in model.modules() if isinstance(module, PooledExperts)]
    pool.caches = {}
    pool.open(layers, pool.files, [DEVICE] * len(layers), dtypes)
    near = pool.caches[DEVICE]
    assert near.source.capacity == 21 and near.source.entry_bytes == one
    assert sorted(gpu.locked.values()) == sorted(stack.nbytes for stack in near.source.stacks.values())
    assert sum(gpu.locked.values()) == 21 * one


def test_a_file_reaches_the_gpu_through_as_little_memory_as_threads_need(folder, gpu, with_kernel):
    """One projection of one expert for each reader thread."""
    layers = pooled(folder, gpu, 5, readers=2)
    for seed in range(3):
        run(gpu, layers[0], inputs(40, seed))
    assert 1 <= len(gpu.locked) <= 2
    assert max(gpu.locked.values()) < layers[0].pool.caches[DEVICE].entry_bytes / 2


def test_a_pass_over_slots_names_them_on_the_device(folder, gpu):
    cache = pooled(folder, gpu, 5)[0].pool.caches[DEVICE]
    slots = Visit(cache, 1, [3, 4], EXPERTS).hold([3, 4])
    assert slots.device == DEVICE and not gpu.waits
    assert sorted(gpu.values(slots)[[3, 4]].tolist()) == [0, 1]
