"""The planner: what fits where, how fast it can be at best, and what to change if it does not fit. Reads no weights.

    python -m scripts.plan --gpus 8xH200
    python -m scripts.plan --gpus 1x24GB --ram 768GB --context 16384 --json

Everything follows from config.json. The model is a chain of layers between three modules that may be placed anywhere:

    embed_tokens                                                 2.35 GB
    vision_tower, mm_projector                                   0.94 GB
    layers.0 .. layers.60   each a *spine* of attention,         0.29 GB (layer 0, which is dense: 1.00 GB)
                            norms, router, shared expert
                            its part of the latent cache         1,152 bytes for each token of context
                            and, from layer 1 on, its experts    9.51 GB: 384 of 24.8 MB, the only part that may be
                                                                 in RAM or in the files on disk
    norm, lm_head                                                2.35 GB

Devices take consecutive layers, whole, and any of the three modules. placement.py searches all such ways; experts
that no accelerator can hold go to RAM, and then stay on disk. Sizes come from kimi_sizes.py, cards from kimi_machine.py.

The ceiling is bytes read per token over bandwidth, layers one after the other. The device of a layer computes all of it.
Without GPUs that is the CPU, with experts in RAM. A GPU gets experts that are in RAM or on disk over its PCIe bus, each
time that a token chooses them; reading them and crossing the bus overlap, so the slower of the two counts. Routing is
taken as even, so that a cache finds its share of the experts and no more. No launch, no synchronisation and no arithmetic
is counted: with even routing nothing can be faster, and good code comes near it.

Units: bytes; GB is 10^9 bytes in everything printed. In what you type, a size means what vendors mean by it: `80GB`
of GPU or RAM is 80 GiB of chips, of which CUDA shows about 98 %; `2TB` of disk is 2 * 10^12 bytes. GiB and TiB are
taken exactly.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_machine import (
    CUDA_CONTEXT_BYTES,
    DISK_BANDWIDTH,
    FRAGMENTATION_SHARE,
    GIB,
    HOST_RESERVE_BYTES,
    MIB,
    RAM_BANDWIDTH,
    Gpu,
    Machine,
    detect_disk,
    detect_ram,
    parse_gpus,
    parse_size,
)
from kimi.kimi_sizes import DTYPE_BYTES, WEIGHT_KINDS, expert_bytes, vision_workspace_bytes

from .placement import OUTSIDES, PATHS, Job, Placement, Run, attempt, find_placement, ram_budget

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the table is then plain text
    Console = Table = None

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class DevicePlan:
    """Bytes on one device by kind: those of WEIGHT_KINDS, and cache, cache_room, workspace, reserve."""

    device: int | str  # as in a device_map: CUDA index or "cpu"; and "disk"
    name: str
    total_bytes: int
    bandwidth: float  # bytes/s
    bytes: dict[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()

    @property
    def used_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def weight_bytes(self) -> int:
        return sum(size for kind, size in self.bytes.items() if kind in WEIGHT_KINDS)


@dataclass(frozen=True)
class Ceiling:
    """No decoding is faster than this. Bytes are read for one step, which makes `batch` tokens."""

    bytes_per_step: dict[str, int]  # by tier: gpu, ram, disk; with an empty cache
    cache_bytes_per_step: int  # more of it when the context is full
    tokens_per_s: float  # all sequences together, empty cache
    tokens_per_s_at_full_context: float
    bus_bytes_per_step: int = 0  # of those from RAM and disk, what goes to GPUs


@dataclass(frozen=True)
class Alternative:
    """A change that makes it fit: in words, and as arguments of `plan` that differ."""

    change: str
    arguments: dict[str, Any]
    tokens_per_s: float


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`. `device_map`, `expert_tiers` and `ceiling` are None if it does not fit.

    The map names layers whole. On a mixed machine the tiers refine it: the experts of a layer whose tier is "ram" or
    "disk" are not on the layer's device, but in a pool of `expert_pool_bytes`, or in the files.
    """

    fits: bool
    summary: str
    context: int
    batch: int
    dtype: str
    weight_bytes: int
    devices: tuple[DevicePlan, ...]
    device_map: dict[str, int | str] | None = None
    expert_tiers: dict[int, str] | None = None  # MoE layer -> "gpu", "ram" or "disk"
    expert_pool_bytes: int = 0  # RAM for experts that are not on a GPU
    prefill_chunk: int | None = None  # most new tokens of a sequence in one forward
    ceiling: Ceiling | None = None
    missing_bytes: dict[str, int] = field(default_factory=dict)  # of "gpu" (all together) or "ram"
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan(
    config: KimiK25Config,
    gpus: str | Sequence[Gpu] = (),
    ram_bytes: int = 0,
    disk_bytes: int = 0,
    context: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    *,
    ram_bandwidth: float = RAM_BANDWIDTH,
    disk_bandwidth: float = DISK_BANDWIDTH,
    bus_bandwidth: float | None = None,
) -> Plan:
    """Places the model on a machine, or says what is missing and what would do.

    Args:
        gpus: as on the command line, "8xH200", or a sequence of `Gpu`.
        ram_bytes: for experts that fit no GPU, or for everything without GPUs. 0: RAM holds no weights.
        disk_bytes: for the published files, from which experts are read that fit nowhere else. 0: none are.
        context: tokens of a sequence, prompt and answer; by default `max_position_embeddings`.
        batch: sequences at a time.
        dtype: of all that is not packed, and of the cache.
        ram_bandwidth, disk_bandwidth: bytes/s.
        bus_bandwidth: bytes/s from RAM to each GPU; by default the cards' own, for 16 lanes.
    """
    gpus = parse_gpus(gpus) if isinstance(gpus, str) else tuple(gpus)
    if bus_bandwidth is not None:
        gpus = tuple(replace(gpu, bus_bandwidth=bus_bandwidth) for gpu in gpus)
    limit = config.text_config.max_position_embeddings
    job = Job(config, limit if context is None else context, batch, str(dtype).removeprefix("torch."))
    machine = Machine(gpus, ram_bytes, disk_bytes, ram_bandwidth, disk_bandwidth)
    _validate(machine, job)
    placement = find_placement(machine, job)
    return _refuse(machine, job) if placement is None else _describe(machine, job, placement)


def _validate(machine: Machine, job: Job) -> None:
    limit = job.config.text_config.max_position_embeddings
    if not 1 <= job.context <= limit:
        raise ValueError(
            f"context {job.context} must be between 1 and max_position_embeddings {limit} tokens."
        )
    if job.batch < 1:
        raise ValueError(f"batch is {job.batch}; at least one sequence must be planned.")
    if job.dtype not in DTYPE_BYTES:
        raise ValueError(f'dtype "{job.dtype}" is not one of {", ".join(DTYPE_BYTES)}.')
    if any(gpu.total_bytes <= 0 or gpu.bandwidth <= 0 for gpu in machine.gpus):
        raise ValueError(f"a GPU needs memory and bandwidth above 0, got {machine.gpus}.")
    for name, size in (("ram_bytes", machine.ram_bytes), ("disk_bytes", machine.disk_bytes)):
        if size < 0:
            raise ValueError(f"{name} is {size}; memory cannot be negative.")
    rates = [("ram_bandwidth", machine.ram_bandwidth), ("disk_bandwidth", machine.disk_bandwidth)]
    for name, rate in (*rates, *(("bus_bandwidth", gpu.bus_bandwidth) for gpu in machine.gpus)):
        if rate <= 0:
            raise ValueError(f"{name} is {rate} bytes/s; it must be positive.")
    if not machine.gpus and not machine.ram_bytes:
        raise ValueError("there is nothing to plan on: no GPU and no RAM was given.")


def _describe(machine: Machine, job: Job, placement: Placement) -> Plan:
    tiers = _expert_tiers(machine, job, placement)
    devices = _device_plans(machine, job, placement, tiers)
    fullest = max((d for d in devices if d.device != "disk"), key=lambda d: d.used_bytes / d.total_bytes)
    weights, cache = (_gb(_total(devices, kinds)) for kinds in (WEIGHT_KINDS, ("cache", "cache_room")))
    summary = (
        f"Fits: {weights} of weights and {cache} of cache for {job.batch} x {job.context:,} tokens; the fullest device"
        f" is {_label(fullest)}, {100 * fullest.used_bytes / fullest.total_bytes:.0f} % of {_gb(fullest.total_bytes)}."
    )
    return Plan(
        True,
        summary,
        job.context,
        job.batch,
        job.dtype,
        job.weights,
        devices,
        device_map=_device_map(machine, job, placement),
        expert_tiers=tiers,
        expert_pool_bytes=placement.pool_bytes,
        prefill_chunk=placement.chunk,
        ceiling=_ceiling(machine, job, devices, tiers),
        notes=_notes(machine, job, placement, tiers),
    )


def _run_devices(machine: Machine, placement: Placement) -> list[tuple[int | str, Run]]:
    keys = range(len(machine.gpus)) if machine.gpus else ["cpu"]
    return list(zip(keys, placement.runs, strict=True))


def _device_map(machine: Machine, job: Job, placement: Placement) -> dict[str, int | str]:
    """Module path -> device, for `from_pretrained`. Layers are whole, but for experts that the tiers put elsewhere."""
    found: dict[str, int | str] = {path: "cpu" for name in placement.outside for path in PATHS[name]}
    for device, run in _run_devices(machine, placement):
        for name in run.specials:
            if name not in placement.outside:
                found.update(dict.fromkeys(PATHS[name], device))
        found.update({f"language_model.model.layers.{idx}": device for idx in range(run.begin, run.end)})
    return {path: found[path] for path in sorted(found, key=_order)}


def _order(path: str) -> tuple[int, int]:
    """The order of the computation: media, embeddings, layers, head."""
    layer = path.rpartition(".layers.")[2]
    front = (*PATHS["vision"], *PATHS["embed"])
    return (1, int(layer)) if layer.isdigit() else (0, front.index(path)) if path in front else (2, len(path))


def _expert_tiers(machine: Machine, job: Job, placement: Placement) -> dict[int, str]:
    """The tier of each MoE layer's experts: a device keeps the first of its run, then RAM is filled, then the disk."""
    moe, tiers, rest = job.chain.moe, {}, []
    for run in placement.runs:
        layers = [idx for idx in range(run.begin, run.end) if moe[idx]]
        tiers.update(dict.fromkeys(layers[: run.with_experts], "gpu" if machine.gpus else "ram"))
        rest += layers[run.with_experts :]
    tiers.update(dict.fromkeys(rest[: placement.ram_layers], "ram"))
    tiers.update(dict.fromkeys(rest[placement.ram_layers :], "disk"))
    return dict(sorted(tiers.items()))


def _device_plans(
    machine: Machine, job: Job, placement: Placement, tiers: dict[int, str]
) -> tuple[DevicePlan, ...]:
    plans = []
    for device, run in _run_devices(machine, placement):
        gpu = machine.gpus[device] if isinstance(device, int) else None
        home = "gpu" if gpu else "ram"
        held_here = {idx for idx, tier in tiers.items() if tier == home}
        kinds = _run_bytes(job, run, placement, held_here.__contains__)
        if kinds:
            kinds["workspace"] = job.workspace(placement.chunk)
            if "vision" in run.specials and "vision" not in placement.outside:
                kinds["workspace"] = max(kinds["workspace"], vision_workspace_bytes(job.config))
            kinds["reserve"] = CUDA_CONTEXT_BYTES + int(gpu.total_bytes * FRAGMENTATION_SHARE) if gpu else 0
        layers = tuple(range(run.begin, run.end))
        if gpu:
            plans.append(DevicePlan(device, gpu.name, gpu.total_bytes, gpu.bandwidth, kinds, layers))
        else:
            if placement.disk_layers:
                kinds["expert_cache"] = placement.pool_bytes - kinds.get("routed_experts", 0)
            kinds["reserve"] = machine.ram_bytes - ram_budget(machine)
            plans.append(DevicePlan("cpu", "RAM", machine.ram_bytes, machine.ram_bandwidth, kinds, layers))
    if machine.gpus and ("ram" in tiers.values() or placement.outside or placement.pool_bytes):
        plans.append(_host_plan(machine, job, placement))
    if placement.disk_layers:
        kinds = {"routed_experts": placement.disk_layers * job.experts}
        plans.append(DevicePlan("disk", "disk", machine.disk_bytes, machine.disk_bandwidth, kinds))
    return tuple(plans)


def _run_bytes(
    job: Job, run: Run, placement: Placement, has_experts: Callable[[int], bool]
) -> dict[str, int]:
    """Weights and cache of one device by kind."""
    kinds: dict[str, int] = {}

    def add(kind: str, size: int) -> None:
        kinds[kind] = kinds.get(kind, 0) + size

    for idx in range(run.begin, run.end):
        for kind, size in job.layers[idx].items():
            if kind != "routed_experts" or has_experts(idx):
                add(kind, size)
        for kind, size in zip(("cache", "cache_room"), job.layer_cache, strict=True):
            add(kind, size)
    for path in (path for name in run.specials if name not in placement.outside for path in PATHS[name]):
        for kind, size in job.modules.get(path, {}).items():
            add(kind, size)
    return kinds


def _host_plan(machine: Machine, job: Job, placement: Placement) -> DevicePlan:
    """RAM beside GPUs: experts, modules that did not fit, and a pool over the files on disk in what is left."""
    kinds = {"routed_experts": placement.ram_layers * job.experts}
    for path in (path for name in placement.outside for path in PATHS[name]):
        kinds.update(job.modules.get(path, {}))
    pool_of_disk = placement.pool_bytes - placement.ram_layers * job.experts if placement.disk_layers else 0
    kinds["expert_cache"] = pool_of_disk
    kinds["reserve"] = machine.ram_bytes - ram_budget(machine)
    return DevicePlan("cpu", "RAM", machine.ram_bytes, machine.ram_bandwidth, kinds)


def _ceiling(machine: Machine, job: Job, devices: Sequence[DevicePlan], tiers: dict[int, str]) -> Ceiling:
    """Seconds of a step are the sum over devices and layers of bytes over bandwidth, since each waits for the one before.

    A batch reads the experts that any of its tokens chose: with even routing E (1 - (1 - K/E)^B) of E. From RAM or disk to
    a GPU they take the longer of two times, at the rate of where they are and at that of the GPU's bus.
    """
    text = job.config.text_config
    total, top_k = text.n_routed_experts, text.num_experts_per_tok
    distinct = total * (1 - (1 - top_k / total) ** job.batch)
    read_once = set(WEIGHT_KINDS) - {"routed_experts", "embeddings", "vision", "projector"}
    chosen = distinct * expert_bytes(text, job.size)  # bytes of a layer's experts in one step
    tier_bytes, cache, seconds, cache_seconds, bus = {"gpu": 0, "ram": 0, "disk": 0}, 0, 0.0, 0.0, 0.0
    for device in devices:
        tier = {"cpu": "ram", "disk": "disk"}.get(str(device.device), "gpu")
        held = device.bytes.get("routed_experts", 0) / job.experts if job.experts else 0
        spine = sum(size for kind, size in device.bytes.items() if kind in read_once)
        tier_bytes[tier] += int(spine + held * chosen)
        cache += device.bytes.get("cache", 0)
        cache_seconds += device.bytes.get("cache", 0) / device.bandwidth
        seconds += spine / device.bandwidth
        if tier == "gpu" or not machine.gpus:
            seconds += held * chosen / device.bandwidth
            continue
        for gpu in _gpus_of(tier, tiers, machine, devices):
            seconds += chosen / min(device.bandwidth, gpu.bus_bandwidth)
            bus += chosen
    return Ceiling(tier_bytes, cache, job.batch / seconds, job.batch / (seconds + cache_seconds), int(bus))


def _gpus_of(
    tier: str, tiers: dict[int, str], machine: Machine, devices: Sequence[DevicePlan]
) -> Iterator[Gpu]:
    """The GPU of each layer whose experts are in a tier."""
    for device in devices:
        if isinstance(device.device, int):
            yield from [machine.gpus[device.device] for idx in device.layers if tiers.get(idx) == tier]


def _notes(machine: Machine, job: Job, placement: Placement, tiers: dict[int, str]) -> tuple[str, ...]:
    notes = []
    if placement.chunk < job.context:
        notes.append(
            f"Longer prompts must be read in pieces: generate(..., prefill_chunk_size={placement.chunk})."
        )
    if placement.outside:
        where = {"embed": "embed_tokens", "vision": "the vision tower and projector"}
        moved = " and ".join(where[name] for name in placement.outside)
        notes.append(f"The GPU is too small for {moved}, which run on the CPU from RAM.")
    if machine.gpus and set(tiers.values()) != {"gpu"}:
        notes.append(
            'Load it with from_pretrained(..., device_map="auto", expert_cache="auto"): the experts used most, of any layer,'
            " stay on the layer's GPU; the others cross its PCIe bus from RAM each time that they are chosen."
        )
        notes += _note_on_ram_alone(machine, job, placement)
    elif "disk" in tiers.values():
        notes.append(
            'Load it with from_pretrained(..., expert_cache="auto"): RAM then holds the experts used most, of any layer.'
        )
    if "disk" in tiers.values() or (machine.gpus and "ram" in tiers.values()):
        notes.append(
            "The ceiling counts even routing; real routing is uneven, and a cache of experts gains by it."
        )
    for gpu in dict.fromkeys(gpu for gpu in machine.gpus if gpu.assumed):
        notes.append(
            f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s, and {gpu.bus_bandwidth / 1e9:.1f} GB/s from RAM, are"
            f" {gpu.assumed}'s; name the card for its own."
        )
    if 0 < machine.disk_bytes < job.checkpoint_bytes:
        notes.append(
            f"The disk's {_gb(machine.disk_bytes)} cannot hold the {_gb(job.checkpoint_bytes)} checkpoint."
        )
    return tuple(notes)


def _note_on_ram_alone(machine: Machine, job: Job, placement: Placement) -> Iterator[str]:
    """RAM is faster than the bus: a machine with room for everything there may do better without its GPUs."""
    alone = replace(machine, gpus=())
    other = find_placement(alone, job) if machine.ram_bytes else None
    if other is not None:
        rate = _ceiling_of(alone, job, other).tokens_per_s
        if rate > _ceiling_of(machine, job, placement).tokens_per_s:
            yield f"From RAM alone, computed by the CPU, the ceiling is {_rate(rate)} tokens/s: see --gpus none."


# --------------------------------------------------------------------------------------------------- if it does not fit


def _refuse(machine: Machine, job: Job) -> Plan:
    missing = _missing(machine, job)
    kind, size = next(iter(missing.items()))
    count = len(machine.gpus)
    each = f" ({_gb(size // count)} on each of {count})" if kind == "gpu" and count > 1 else ""
    where = "GPU memory" if kind == "gpu" else "RAM"
    summary = (
        f"Does not fit: {job.batch} x {job.context:,} tokens lack {_gb(size)} of {where}{each};"
        f" the weights alone are {_gb(job.weights)}."
    )
    devices = [
        DevicePlan(index, gpu.name, gpu.total_bytes, gpu.bandwidth) for index, gpu in enumerate(machine.gpus)
    ]
    if machine.ram_bytes:
        devices.append(DevicePlan("cpu", "RAM", machine.ram_bytes, machine.ram_bandwidth))
    return Plan(
        False,
        summary,
        job.context,
        job.batch,
        job.dtype,
        job.weights,
        tuple(devices),
        missing_bytes=missing,
        alternatives=tuple(_alternatives(machine, job)),
    )


def _fits(machine: Machine, job: Job) -> bool:
    """Whether any placement fits; the smallest prefill step decides."""
    outsides = OUTSIDES if machine.gpus else OUTSIDES[:1]
    return any(attempt(machine, job, job.chunks()[-1], outside) is not None for outside in outsides)


def _first(low: int, high: int, test: Callable[[int], bool]) -> int | None:
    """The smallest number in [low, high] that passes a test which larger ones pass too; None if there is none."""
    if low > high or not test(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle + 1, high)
    return low


def _last(low: int, high: int, test: Callable[[int], bool]) -> int | None:
    """The largest number in [low, high] that passes a test which smaller ones pass too; None if there is none."""
    less = _first(0, high - low, lambda n: test(high - n))
    return None if less is None else high - less


def _enough(job: Job) -> int:
    """Bytes with which any one device, or the RAM, could do everything."""
    cache = len(job.layers) * sum(job.layer_cache)
    rest = job.workspace(job.chunks()[-1]) + vision_workspace_bytes(job.config) + HOST_RESERVE_BYTES
    return int(1.1 * (job.weights + cache + rest))


def _missing(machine: Machine, job: Job) -> dict[str, int]:
    """The least growth that makes it fit, to 1 MiB: of the RAM if RAM is in play and suffices, else of every GPU."""
    most = _enough(job) // MIB + 1
    if machine.ram_bytes:
        grow = _first(1, most, lambda n: _fits(replace(machine, ram_bytes=machine.ram_bytes + n * MIB), job))
        if grow is not None:
            return {"ram": grow * MIB}
    grow = _first(1, most, lambda n: _fits(replace(machine, gpus=_grown(machine.gpus, n * MIB)), job))
    return {"gpu": (grow or most) * MIB * len(machine.gpus)}


def _grown(gpus: Sequence[Gpu], more: int) -> tuple[Gpu, ...]:
    return tuple(replace(gpu, total_bytes=gpu.total_bytes + more) for gpu in gpus)


def _alternatives(machine: Machine, job: Job) -> Iterator[Alternative]:
    """Plans that do fit, the smallest change first."""
    yield from _less_to_run(machine, job)
    yield from _more_host(machine, job)
    yield from _more_gpus(machine, job)
    alone = replace(machine, gpus=())
    if machine.gpus and machine.ram_bytes and _fits(alone, job):
        yield _alternative("no GPU: everything in RAM", {"gpus": "none"}, alone, job)


def _less_to_run(machine: Machine, job: Job) -> Iterator[Alternative]:
    """A shorter context, in steps of 1024 tokens, and a smaller batch."""
    context = _last(1, (job.context - 1) // 1024, lambda n: _fits(machine, replace(job, context=n * 1024)))
    if context is not None:
        smaller = replace(job, context=context * 1024)
        change = f"a context of {smaller.context:,} tokens"
        yield _alternative(change, {"context": smaller.context}, machine, smaller)
    batch = _last(1, job.batch - 1, lambda n: _fits(machine, replace(job, batch=n)))
    if batch is not None:
        yield _alternative(f"a batch of {batch}", {"batch": batch}, machine, replace(job, batch=batch))


def _more_host(machine: Machine, job: Job) -> Iterator[Alternative]:
    """Enough RAM for the experts that have no place yet, in steps of 1 GiB; or the disk under the RAM there is."""
    have, most = machine.ram_bytes // GIB, _enough(job) // GIB + 1
    ram = _first(have + 1, have + most, lambda n: _fits(replace(machine, ram_bytes=n * GIB), job))
    if ram is not None:
        larger = replace(machine, ram_bytes=ram * GIB)
        role = "experts in RAM" if machine.gpus else "RAM"
        yield _alternative(f"{role}: {ram} GiB of it", {"ram_bytes": ram * GIB}, larger, job)
    files = replace(machine, disk_bytes=max(machine.disk_bytes, job.checkpoint_bytes))
    if machine.ram_bytes and files != machine and _fits(files, job):
        change = f"experts read from disk: {_gb(job.checkpoint_bytes)} of fast storage"
        yield _alternative(change, {"disk_bytes": job.checkpoint_bytes}, files, job)


def _more_gpus(machine: Machine, job: Job) -> Iterator[Alternative]:
    """More of the last kind of GPU, at most four times as many or 16 more."""
    if not machine.gpus:
        return
    count, kind = len(machine.gpus), machine.gpus[-1]
    most = max(3 * count, 16)
    more = _first(1, most, lambda n: _fits(replace(machine, gpus=machine.gpus + (kind,) * n), job))
    if more is not None:
        larger = replace(machine, gpus=machine.gpus + (kind,) * more)
        yield _alternative(
            f"{count + more} GPUs: {more} more {kind.name}", {"gpus": larger.gpus}, larger, job
        )


def _alternative(change: str, arguments: dict[str, Any], machine: Machine, job: Job) -> Alternative:
    placement = find_placement(machine, job)
    assert placement is not None, change
    return Alternative(change, arguments, _ceiling_of(machine, job, placement).tokens_per_s)


def _ceiling_of(machine: Machine, job: Job, placement: Placement) -> Ceiling:
    tiers = _expert_tiers(machine, job, placement)
    return _ceiling(machine, job, _device_plans(machine, job, placement, tiers), tiers)


# --------------------------------------------------------------------------------------------------------- command line


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _label(device: DevicePlan) -> str:
    return f"cuda:{device.device}" if isinstance(device.device, int) else device.name


def _total(devices: Sequence[DevicePlan], kinds: Sequence[str]) -> int:
    return sum(size for device in devices for kind, size in device.bytes.items() if kind in kinds)


COLUMNS = {
    "attention": ("attention", "norms"),
    "dense, shared": ("dense_mlp", "shared_experts"),
    "router": ("router",),
    "experts": ("routed_experts", "expert_cache"),
    "embed, head": ("embeddings", "lm_head"),
    "vision": ("vision", "projector"),
    "cache": ("cache", "cache_room"),
    "workspace": ("workspace",),
    "reserve": ("reserve",),
}


def table_rows(result: Plan) -> tuple[list[str], list[list[str]]]:
    """Header and cells, GB: a row for each device."""
    header = ["device", "", "layers", *COLUMNS, "used", "of"]
    rows = []
    for device in result.devices:
        layers = f"{device.layers[0]}-{device.layers[-1]}" if device.layers else ""
        cells = [sum(device.bytes.get(kind, 0) for kind in kinds) for kinds in COLUMNS.values()]
        sizes = [f"{size / 1e9:.2f}" if size else "" for size in (*cells, device.used_bytes)]
        name = device.name if isinstance(device.device, int) else ""
        rows.append([_label(device), name, layers, *sizes, f"{device.total_bytes / 1e9:.2f}"])
    return header, rows


def plain_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def closing_lines(result: Plan) -> list[str]:
    """The lines below the table: tiers, ceiling, notes, or what would fit."""
    lines = []
    ceiling = result.ceiling
    if ceiling is not None and result.expert_tiers is not None:  # it fits
        tiers = list(result.expert_tiers.values())
        held = [f"{tiers.count(tier)} layers {place}" for tier, place in TIER_WORDS.items() if tier in tiers]
        reads = [f"{_gb(size)} {tier}" for tier, size in ceiling.bytes_per_step.items() if size]
        bus = ceiling.bus_bytes_per_step
        crossing = f", {_gb(bus)} of it over PCIe" if bus else ""
        lines.append(f"Experts: {', '.join(held)}.")
        lines.append(
            f"Ceiling: {_rate(ceiling.tokens_per_s)} tokens/s ({', '.join(reads)} read per step of {result.batch}{crossing}),"
            f" {_rate(ceiling.tokens_per_s_at_full_context)} with a full context."
        )
        lines += result.notes
    elif result.alternatives:
        lines.append("What would fit (ceiling in tokens/s):")
        lines += [f"  {other.change} ({_rate(other.tokens_per_s)})" for other in result.alternatives]
    else:
        lines.append("No smaller context, more RAM or more of the same GPUs would make it fit.")
    return lines


TIER_WORDS = {"gpu": "on GPUs", "ram": "in RAM", "disk": "on disk"}


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.0f}" if tokens_per_s >= 20 else f"{tokens_per_s:.2g}"


def show(result: Plan) -> None:
    """Prints a plan: with rich in a terminal, else as plain text."""
    header, rows = table_rows(result)
    if Table is None or not sys.stdout.isatty():
        print(result.summary, "", plain_table(header, rows), "", *closing_lines(result), sep="\n")
        return
    table = Table(caption="GB = 10^9 bytes")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column < 3 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    color = "green" if result.fits else "red"
    console.print(result.summary, style=f"bold {color}", highlight=False)
    console.print(table)
    console.print("\n".join(closing_lines(result)), highlight=False)


def read_config(folder: str) -> KimiK25Config:
    path = Path(folder)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--config {folder} has no config.json.")
    try:
        return KimiK25Config.from_dict(json.loads(path.read_bytes()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from None


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan",
        description="Says what fits where. Reads no weights.",
        epilog="Exit status: 0 fits, 1 does not fit, 2 the arguments are wrong.",
    )
    add = parser.add_argument
    add("--gpus", default="detected", help="8xH200, 8x80GB, 4xH100,4xA100, detected (default) or none")
    add(
        "--ram",
        help="for experts beside GPUs, or for everything: 768GB (default: free RAM if detected, else 0)",
    )
    add("--disk", help="for the published files, to read experts from: 2TB (default: as for --ram)")
    add("--context", type=int, help="tokens of a sequence, prompt and answer (default: all the model can)")
    add("--batch", type=int, default=1, help="sequences at a time (default 1)")
    add("--dtype", default="bfloat16", help="of all that is not packed: bfloat16 (default), float16, float32")
    add("--ram-bandwidth", type=float, default=RAM_BANDWIDTH / 1e9, help="GB/s (default %(default)s)")
    add("--disk-bandwidth", type=float, default=DISK_BANDWIDTH / 1e9, help="GB/s (default %(default)s)")
    add(
        "--bus-bandwidth", type=float, help="GB/s from RAM to each GPU (default: 16 lanes of the card's PCIe)"
    )
    add("--config", default=str(ROOT), help="folder of config.json (default: this repository's)")
    add("--json", action="store_true", help="the plan as JSON, bytes everywhere")
    words: list[str] = []
    for word in sys.argv[1:] if arguments is None else arguments:
        if re.match(r"-\d", word) and words:  # "--ram -5GB": a value, which deserves its own sentence
            words[-1] += f"={word}"
        else:
            words.append(word)
    return parser.parse_args(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = read_arguments(arguments)
    here = given.gpus.strip().lower() == "detected"
    try:
        config = read_config(given.config)
        folder = Path(given.config) if Path(given.config).is_dir() else Path(given.config).parent
        ram = parse_size(given.ram, "--ram", gb=GIB) if given.ram else detect_ram() if here else 0
        disk = parse_size(given.disk, "--disk") if given.disk else detect_disk(folder) if here else 0
        result = plan(
            config,
            given.gpus,
            ram,
            disk,
            given.context,
            given.batch,
            given.dtype,
            ram_bandwidth=given.ram_bandwidth * 1e9,
            disk_bandwidth=given.disk_bandwidth * 1e9,
            bus_bandwidth=None if given.bus_bandwidth is None else given.bus_bandwidth * 1e9,
        )
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        show(result)
    return 0 if result.fits else 1


if __name__ == "__main__":
    sys.exit(main())
