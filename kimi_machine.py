"""The machine that a plan is made for: known cards, sizes as people write them, and what is found here.

Sizes are read as vendors state them. `80GB` of GPU or RAM is 80 GiB of chips, of which CUDA shows about 98 %; `2TB` of
disk is 2 * 10^12 bytes. GiB and TiB are taken exactly. Bandwidths are the data sheets', in bytes/s.
"""

import re
import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

MIB, GIB = 2**20, 2**30
RAM_BANDWIDTH = 460.8e9  # bytes/s: one socket, 12 channels of DDR5-4800 (12 * 8 bytes * 4.8e9), as EPYC 9004
# bytes/s in one direction over 16 lanes of 16e9 or 32e9 bits/s, of which 128 in 130 are data (PCIe Base Specification).
PCIE_4, PCIE_5 = 31.5e9, 63.0e9
DISK_BANDWIDTH = 7.0e9  # bytes/s: sequential reads of a PCIe 4.0 x4 NVMe drive (Samsung 990 PRO: 7.45e9)

# Held back on every device. The first two are allowances, not measurements of this model: a CUDA process that has used
# cuBLAS and a few kernels shows 0.4 to 0.6 GiB in nvidia-smi before its first tensor, and PyTorch's allocator rounds
# large blocks up to 2 MiB and leaves gaps where a growing cache was before it was copied.
CUDA_CONTEXT_BYTES = 640 * MIB
FRAGMENTATION_SHARE = 0.005  # of a device
HOST_RESERVE_BYTES = 4 * GIB  # operating system, Python, torch, buffers of the loader
HOST_RESERVE_SHARE = 0.02  # page tables and caches that the kernel does not give back


@dataclass(frozen=True)
class Card:
    """A known accelerator. `parts` are what its name must contain; size as printed, GiB as CUDA reports it."""

    name: str
    parts: tuple[str, ...]
    printed_gb: int
    visible_gib: float  # "total capacity of" in PyTorch's out-of-memory messages
    bandwidth: float  # bytes/s, NVIDIA's data sheets
    bus_bandwidth: float  # bytes/s to and from RAM, the same sheets' "PCIe x16"


CARDS = (
    Card("H100 SXM", ("H100",), 80, 79.1, 3.35e12, PCIE_5),
    Card("H100 PCIe", ("H100", "PCIE"), 80, 79.1, 2.0e12, PCIE_5),
    Card("H100 NVL", ("H100", "NVL"), 94, 93.1, 3.9e12, PCIE_5),
    Card("H200", ("H200",), 141, 139.8, 4.8e12, PCIE_5),
    Card("B200", ("B200",), 180, 178.3, 8.0e12, PCIE_5),  # 192 GB of chips, 180 of them usable
    Card("A100 80GB", ("A100",), 80, 79.1, 2.039e12, PCIE_4),
    Card("A100 40GB", ("A100", "40"), 40, 39.3, 1.555e12, PCIE_4),
    Card("RTX PRO 6000", ("PRO6000",), 96, 94.9, 1.792e12, PCIE_5),
    Card("RTX 6000 Ada", ("6000", "ADA"), 48, 47.4, 0.96e12, PCIE_4),
    Card("RTX A6000", ("A6000",), 48, 47.4, 0.768e12, PCIE_4),
    Card("L40S", ("L40S",), 48, 44.3, 0.864e12, PCIE_4),
    Card("RTX 5090", ("5090",), 32, 31.3, 1.792e12, PCIE_5),
    Card("RTX 4090", ("4090",), 24, 23.5, 1.008e12, PCIE_4),
    Card("RTX 3090", ("3090",), 24, 23.6, 0.936e12, PCIE_4),
)
VISIBLE_SHARE = 0.98  # of a printed size: the cards above show 97.9 to 99.3 %, L40S with ECC aside


@dataclass(frozen=True)
class Gpu:
    """One accelerator: bytes CUDA can give out (its own context included), bytes/s of its memory and to it from RAM."""

    name: str
    total_bytes: int
    bandwidth: float
    assumed: str = ""  # the card whose bandwidths were taken because only a size was given
    bus_bandwidth: float = PCIE_4


@dataclass(frozen=True)
class Machine:
    gpus: tuple[Gpu, ...]
    ram_bytes: int
    disk_bytes: int
    ram_bandwidth: float = RAM_BANDWIDTH
    disk_bandwidth: float = DISK_BANDWIDTH


def parse_size(size: int | str, what: str, gb: int = 10**9) -> int:
    """Bytes of "80GB", "1.5TB", "79.6GiB", "300KB", "0" or a number. `gb` is what GB means here, 10^9 or GIB; the other
    units without an i follow it. Raises ValueError that names `what`."""
    if isinstance(size, int):
        return size
    text = size.strip() if isinstance(size, str) else ""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text, re.IGNORECASE)
    if not match and text != "0":
        raise ValueError(f'{what} "{size}" is not a size such as 80GB, 79.6GiB or 2TB.')
    number, unit, binary = match.groups() if match else ("0", "", "")
    if Fraction(number) < 0:
        raise ValueError(f"{what} is {size}; memory cannot be negative.")
    step = 1024 if binary or gb == GIB else 1000
    return int(Fraction(number) * step ** " KMGT".index(unit.upper() or " "))  # in floats, 8.7TB lacks a byte


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """ "8xH200", "8x80GB", "4xH100,2xA100-80", "none", or "detected"."""
    words = text.strip().lower()
    if words in ("none", "detected"):
        return detect_gpus() if words == "detected" else ()
    gpus: list[Gpu] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*x\s*(\S.*?)\s*", part, re.IGNORECASE)
        if not match:
            raise ValueError(
                f'--gpus "{text}" is not understood at "{part.strip()}"; write 8xH100, 8x80GB, detected or none.'
            )
        if int(match[1]) < 1:
            raise ValueError(
                f'--gpus "{text}" asks for {match[1]} of {match[2]}; it takes at least one, or none.'
            )
        gpus += [gpu_of(match[2])] * int(match[1])
    return tuple(gpus)


def gpu_of(text: str) -> Gpu:
    """A card by its name, "H100-80", or by its printed size, "80GB", with the bandwidth of the slowest known card
    of that size.
    """
    if re.match(r"-?\d+(\.\d+)?\s*[MGT]i?B$", text, re.IGNORECASE):
        size = parse_size(text, "GPU memory", gb=GIB)
        if not size:
            raise ValueError(f"GPU memory is {text}; leave such a GPU out.")
        exact = "ib" in text.lower()
        total = size if exact else int(size * VISIBLE_SHARE)
        like = _slowest_card(total)
        return Gpu(text, total, like.bandwidth, like.name, like.bus_bandwidth)
    card = _find_card(text)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise ValueError(
            f'GPU "{text}" is unknown; the known ones are {known}. Or give its memory, as in 8x80GB.'
        )
    return Gpu(card.name, int(card.visible_gib * GIB), card.bandwidth, bus_bandwidth=card.bus_bandwidth)


def _find_card(text: str) -> Card | None:
    """The card whose full name is `text`: "H100 80GB HBM3" is known, "H1000" is not."""
    flat = re.sub(r"[^A-Z0-9]", "", text.upper())
    found = [card for card in CARDS if all(part in flat for part in card.parts)]
    for card in sorted(found, key=lambda card: -sum(map(len, card.parts))):
        rest = flat
        for part in card.parts:
            rest = rest.replace(part, "|", 1)
        extra = rf"NVIDIA|GEFORCE|TESLA|RTX|SXM\d?|PCIE|HBM\dE?|GENERATION|{card.printed_gb}(GB)?|GB"
        if re.fullmatch(r"\|*", re.sub(extra, "", rest)):
            return card
    return None


def _slowest_card(total_bytes: int) -> Card:
    """The slowest of the cards whose size is nearest."""
    nearest = min(abs(card.visible_gib * GIB - total_bytes) for card in CARDS)
    like = [card for card in CARDS if abs(card.visible_gib * GIB - total_bytes) <= nearest + 2 * GIB]
    return min(like, key=lambda card: card.bandwidth)


def detect_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices of this process, with what is free on them now; none without CUDA."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)  # makes this process's own context, which is not "used"
        usable = min(total, free + CUDA_CONTEXT_BYTES)
        card = _find_card(name)
        like = card or _slowest_card(total)
        gpus.append(Gpu(name, usable, like.bandwidth, "" if card else like.name, like.bus_bandwidth))
    return tuple(gpus)


def detect_ram() -> int:
    """Bytes of RAM that are available now, within the container's limit if there is one; 0 if the system hides it."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.is_file():
        return 0
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8"))
    available = int(match[1]) * 1024 if match else 0
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return min(available, int(text)) if text.isdigit() else available


def detect_disk(folder: Path) -> int:
    """Bytes for the checkpoint on `folder`'s disk: free ones, and those the weights there already take."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return shutil.disk_usage(folder).free + weights
