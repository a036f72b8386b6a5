"""Which device holds what: an exact search over all ways to cut the chain of layers.

A device takes consecutive layers, whole, and any of three modules outside the chain (embeddings, vision, head). The
search keeps the experts of as many layers as possible on accelerators; among those ways it fills the devices most
evenly. The other experts go to RAM, and what does not fit there stays on disk; their layers' devices fetch them from
there. Being exact, it refuses a machine only if nothing fits, and more memory never makes a plan fail.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_cache import MIN_ROOM, ROOM_SHARE
from kimi.kimi_machine import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION_SHARE,
    HOST_RESERVE_BYTES,
    HOST_RESERVE_SHARE,
    Gpu,
    Machine,
)
from kimi.kimi_sizes import (
    DTYPE_BYTES,
    cache_bytes_per_token,
    expert_bytes,
    text_workspace_bytes,
    vision_workspace_bytes,
    weight_bytes,
)

# A prompt is read in pieces, since the mask and the activations of 262,144 tokens at once would need tens of GB.
PREFILL_CHUNKS = (8192, 4096, 2048, 1024, 512, 256)  # new tokens in one forward pass; the largest that fits
# A pool over files on disk must hold the experts of a token in this many layers: those in use, and those read ahead.
POOL_STEPS = 2


class Chain(NamedTuple):
    """The layers in order: bytes of each without experts but with its cache, which of them are MoE, and bytes of the
    experts of one that is."""

    spine: tuple[int, ...]
    moe: tuple[bool, ...]
    experts: int


@dataclass(frozen=True)
class Job:
    """What is to run: the model, and cache for `batch` sequences of `context` tokens, prompt and answer together."""

    config: KimiK25Config
    context: int
    batch: int
    dtype: str

    @cached_property
    def size(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def modules(self) -> dict[str, dict[str, int]]:
        return weight_bytes(self.config, self.dtype)

    @cached_property
    def weights(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.modules.values())

    @cached_property
    def layers(self) -> list[dict[str, int]]:
        return [kinds for path, kinds in self.modules.items() if ".layers." in path]

    @cached_property
    def checkpoint_bytes(self) -> int:
        return sum(sum(kinds.values()) for kinds in weight_bytes(self.config).values())

    @cached_property
    def layer_cache(self) -> tuple[int, int]:
        """Bytes of one layer's cache when it is full, and of the spare room behind it (see kimi_cache.py)."""
        token = self.batch * cache_bytes_per_token(self.config.text_config, self.size)
        return token * self.context, token * max(MIN_ROOM, self.context // ROOM_SHARE)

    @cached_property
    def experts(self) -> int:
        """Bytes of one layer's routed experts."""
        return self.config.text_config.n_routed_experts * expert_bytes(self.config.text_config, self.size)

    @cached_property
    def chain(self) -> Chain:
        """What the search needs to know of the layers."""
        spine = tuple(
            sum(size for kind, size in layer.items() if kind != "routed_experts") + sum(self.layer_cache)
            for layer in self.layers
        )
        return Chain(spine, tuple("routed_experts" in layer for layer in self.layers), self.experts)

    @cached_property
    def min_pool(self) -> int:
        """Bytes of RAM without which experts cannot be read from disk."""
        text = self.config.text_config
        return POOL_STEPS * text.num_experts_per_tok * expert_bytes(text, self.size)

    def workspace(self, chunk: int) -> int:
        return text_workspace_bytes(self.config, self.context, self.batch, chunk, self.size)

    def chunks(self) -> list[int]:
        """Sizes of a prefill step worth trying, descending; a short context needs none larger than itself."""
        return sorted({min(chunk, self.context) for chunk in PREFILL_CHUNKS}, reverse=True)


SPECIALS = ("embed", "vision", "head")  # modules outside the chain of layers, bits 0, 1, 2 of a mask
# Modules that go to RAM if the accelerators are too small for the spine, the smallest set first.
OUTSIDES: tuple[tuple[str, ...], ...] = ((), ("vision",), ("embed", "vision"))
PATHS = {
    "embed": ("language_model.model.embed_tokens", "language_model.model.rotary_emb"),
    "vision": ("vision_tower", "mm_projector"),
    "head": ("language_model.model.norm", "language_model.lm_head"),
}


@dataclass(frozen=True)
class Run:
    """What one device gets: layers [begin, end), the experts of the first `with_experts` MoE ones, some specials."""

    begin: int
    end: int
    with_experts: int
    specials: tuple[str, ...]


def _special_bytes(job: Job, chunk: int, outside: Sequence[str]) -> tuple[int, ...]:
    """Bytes of each special; 0 for those kept `outside` of the accelerators."""
    sizes = []
    for name in SPECIALS:
        size = sum(sum(job.modules.get(path, {}).values()) for path in PATHS[name])
        if name == "vision":
            size += max(0, vision_workspace_bytes(job.config) - job.workspace(chunk))
        sizes.append(0 if name in outside else size)
    return tuple(sizes)


# The 27 ways in which a device can take specials: masks of those it takes and of those placed after and before it;
# sorted by AFTER, and where each value of that begins.
AFTER, TAKEN = np.array([(after, taken) for after in range(8) for taken in range(8) if taken & ~after == 0]).T
BEFORE, FIRST = AFTER & ~TAKEN, np.searchsorted(AFTER, range(8))


# Cached, since a search for the least RAM, or for a disk, asks about the same accelerators again and again.
@lru_cache(maxsize=256)
def _place(layers: Chain, budgets: tuple[int, ...], specials: tuple[int, ...]) -> tuple[Run, ...] | None:
    """Runs of layers for devices with these bytes for weights and cache, or None if not even the spine fits.

    Dynamic programming over devices in order. State: layers placed so far, and which specials. Value: layers whose
    experts are on a device, first; then evenness, as minus the sum of squared fills; then specials at their ends.
    """
    best = np.full((8, len(layers.spine) + 1), -np.inf)
    best[0, 0] = 0.0
    history = [best]  # before each device
    for device, budget in enumerate(budgets):
        detours = _detours(device, len(budgets))[TAKEN, None]
        gains = _gains(layers, budget, specials)
        values = (best[BEFORE][:, :, None] + gains[TAKEN]).max(axis=1) - detours  # (ways, layers placed)
        best = np.maximum.reduceat(values, FIRST)
        history.append(best)
    if best[7, -1] == -np.inf:
        return None
    return _trace(layers, budgets, specials, history)


WORTH_OF_EXPERTS = 1e4  # more than any sum of squared fills and detours


@lru_cache(maxsize=64)  # the GPUs of a node are alike
def _gains(layers: Chain, budget: int, specials: tuple[int, ...]) -> np.ndarray:
    """(8, count + 1, count + 1): the value of a device taking a mask of specials and layers [from, to)."""
    spine, moe, experts = layers
    spines, moes = np.concatenate(([0.0], np.cumsum(spine))), np.concatenate(([0], np.cumsum(moe)))
    gains = np.full((8, len(spines), len(spines)), -np.inf)
    for taken in range(8):
        base = sum(size for bit, size in enumerate(specials) if taken >> bit & 1)
        load = spines[None, :] - spines[:, None] + base  # (from, to)
        has, free = moes[None, :] - moes[:, None], budget - load
        held = np.minimum(has, np.floor(np.maximum(free, 0) / experts)) if experts else has
        fill = (load + held * experts) / max(budget, 1.0)
        fits = (has >= 0) & (load >= 0) & (free >= 0) & (spines[None, :] >= spines[:, None])
        gains[taken] = np.where(fits, WORTH_OF_EXPERTS * held - fill**2, -np.inf)
    np.fill_diagonal(gains[0], 0.0)  # a device may stay empty, whatever its size
    return gains


def _detours(device: int, count: int) -> np.ndarray:
    """(8,): the cost of a mask of specials away from their end of the chain: embeddings and vision first, the head last.
    One device of distance costs more than evenness can gain, so they move only where they do not fit.
    """
    distances = (device, device, count - 1 - device)
    return np.array(
        [0.1 * sum(far for bit, far in enumerate(distances) if taken >> bit & 1) for taken in range(8)]
    )


def _trace(
    layers: Chain, budgets: tuple[int, ...], specials: tuple[int, ...], history: Sequence[np.ndarray]
) -> tuple[Run, ...]:
    """The choices that led to the best value, from the last device to the first."""
    spine, moe, experts = layers
    mask, end, runs = 7, len(spine), []
    for device in reversed(range(len(budgets))):
        taken = TAKEN[mask == AFTER]
        gains = _gains(layers, budgets[device], specials)[taken, :, end]
        values = history[device][mask & ~taken] + gains - _detours(device, len(budgets))[taken, None]
        way, begin = (int(index) for index in np.unravel_index(values.argmax(), values.shape))
        bits = int(taken[way])
        load = sum(spine[begin:end]) + sum(size for bit, size in enumerate(specials) if bits >> bit & 1)
        has, free = sum(moe[begin:end]), max(0, budgets[device] - load)
        held = min(has, int(free // experts)) if experts else has
        names = tuple(name for bit, name in enumerate(SPECIALS) if bits >> bit & 1)
        runs.append(Run(begin, end, held, names))
        mask, end = mask & ~bits, begin
    return tuple(runs[::-1])


@dataclass(frozen=True)
class Placement:
    """A way to hold the model: a run per GPU (or one for the CPU), specials in RAM, and layers' experts in RAM."""

    runs: tuple[Run, ...]
    outside: tuple[str, ...]
    chunk: int
    pool_bytes: int  # RAM for experts of layers that have none on a device
    ram_layers: int  # of those layers, how many the pool holds whole; the others' experts stay on disk
    disk_layers: int


def gpu_budget(gpu: Gpu, job: Job, chunk: int) -> int:
    """Bytes left for weights and cache."""
    reserve = CUDA_CONTEXT_BYTES + int(gpu.total_bytes * FRAGMENTATION_SHARE)
    return gpu.total_bytes - reserve - job.workspace(chunk)


def ram_budget(machine: Machine) -> int:
    return max(0, machine.ram_bytes - HOST_RESERVE_BYTES - int(machine.ram_bytes * HOST_RESERVE_SHARE))


def find_placement(machine: Machine, job: Job) -> Placement | None:
    """The best placement, or None. The prefill step grows as long as that moves no experts off the accelerators.

    Embeddings and vision tower go to RAM only if the spine does not fit the accelerators otherwise: a token reads one
    row of the table, and an image passes the tower once.
    """
    chunks = job.chunks()
    for outside in OUTSIDES if machine.gpus else OUTSIDES[:1]:
        least = attempt(machine, job, chunks[-1], outside)
        if least is None:
            continue
        for chunk in chunks[:-1]:
            larger = attempt(machine, job, chunk, outside)
            if larger and (larger.ram_layers, larger.disk_layers) == (least.ram_layers, least.disk_layers):
                return larger
        return least
    return None


def attempt(machine: Machine, job: Job, chunk: int, outside: tuple[str, ...]) -> Placement | None:
    """The best placement with this prefill step and these modules in RAM, or None."""
    ram = ram_budget(machine)
    if machine.gpus:
        budgets = [gpu_budget(gpu, job, chunk) for gpu in machine.gpus]
        ram -= sum(sum(job.modules.get(p, {}).values()) for name in outside for p in PATHS[name])
    else:
        budgets = [ram - job.workspace(chunk)]
    has_files = machine.disk_bytes >= job.checkpoint_bytes
    unplaced = 0 if has_files else sum(job.chain.moe) * job.experts - (ram if machine.gpus else 0)
    if ram < 0 or sum(budget for budget in budgets if budget > 0) < _least(job, outside) + max(0, unplaced):
        return None  # the common case of a refusal, found without a search
    runs = _place(job.chain, tuple(budgets), _special_bytes(job, chunk, outside))
    if runs is None:
        return None
    left = sum(job.chain.moe) - sum(run.with_experts for run in runs)
    if not machine.gpus:  # the pool is what the spine leaves of the RAM
        pool = int(budgets[0]) - sum(job.chain.spine) - sum(_special_bytes(job, chunk, ()))
        in_ram = 0
    else:
        pool, in_ram = min(ram, left * job.experts), min(left, ram // job.experts)
    on_disk = left - in_ram
    if on_disk and (not has_files or pool < job.min_pool):
        return None
    return Placement(runs, outside, chunk, pool if left else 0, in_ram, on_disk)


def _least(job: Job, outside: Sequence[str]) -> int:
    """Bytes that must be on accelerators in any case."""
    return sum(job.chain.spine) + sum(
        sum(job.modules.get(path, {}).values())
        for name in SPECIALS
        if name not in outside
        for path in PATHS[name]
    )
