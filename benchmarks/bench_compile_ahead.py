"""What the Triton kernels are like as machine code, for GPUs that are not there: nothing is run.

    python benchmarks/bench_compile_ahead.py                    a table for sm_80, 90, 100 and 120
    python benchmarks/bench_compile_ahead.py --arch 90 --json   one JSON object a kernel, for tests
    python benchmarks/bench_compile_ahead.py --variants         how many a generation of 262,144 tokens compiles, and
                                                                whether the self-tests compile those of the full model

The repository's own launchers are called with tensors on the meta device while torch pretends to have the GPU. Instead
of launching, each kernel hands its arguments to Triton's binder, so a variant here is exactly what Triton's JIT would
compile for that call. ptxas, cuobjdump and nvdisasm are those of triton's wheel. Needs triton, and no TRITON_INTERPRET.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

attention = importlib.import_module("kimi.kimi_attention_triton")
experts = importlib.import_module("kimi.kimi_int4_triton")
layer = importlib.import_module("kimi.kimi_layer_triton")
gpu = importlib.import_module("kimi.kimi_gpu")

EXPERTS, WIDTH, INNER, CHOICES = 384, 7168, 2048, 8  # config.json's
HEADS, LATENT, ROPE, NOPE, QUERY_RANK = 64, 512, 64, 128, 1536
LONGEST = 262144
TOKENS = (1, 4, 16, 64, 1024, 2048, 4096)
KERNELS = {
    experts: ("gate_up_decode", "down_decode", "gate_up_prefill", "down_prefill", "combine"),
    attention: ("partial", "merge"),
    layer: ("rms_norm", "silu_and_mul", "add_rounded", "route", "rotate_and_append"),
}


class Chip(NamedTuple):
    """Of one multiprocessor, for occupancy: CUDA C++ Programming Guide, "Compute Capabilities"."""

    processors: int
    shared: int  # KiB
    shared_of_block: int  # KiB, at most
    warps: int
    blocks: int


CHIPS = {  # A100, H100, B200, RTX 5090-class
    80: Chip(108, 164, 163, 64, 32),
    90: Chip(132, 228, 227, 64, 32),
    100: Chip(148, 228, 227, 64, 32),
    120: Chip(188, 100, 99, 48, 24),
}


# ---------------------------------------------------------------------------------------------------------- launches


class Launch(NamedTuple):
    """One variant of a kernel: what Triton's JIT needs to compile it, and the call that first asked for it."""

    kernel: Any
    arch: int
    constants: dict[str, Any]  # constexprs by name
    options: Any
    signature: dict[str, str]
    constexprs: dict
    attrs: dict
    what: str


class Recorder:
    """Stands in for a kernel; collects a Launch for each key under which the JIT would compile."""

    def __init__(self, kernel: Any, arch: int, what: list[str], found: dict[str, Launch]) -> None:
        self.kernel, self.arch, self.what, self.found = kernel, arch, what, found
        self.backend = make_backend(GPUTarget("cuda", arch, 32))
        self.binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        self.keys: dict = {}

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}  # as JITFunction.run adds them
        bound, specialization, options = self.binder(*args, **kwargs)
        key = self.kernel.fn.__name__ + compute_cache_key(self.keys, specialization, options)
        if key not in self.found:
            options, signature, constexprs, attrs = self.kernel._pack_args(
                self.backend, kwargs, bound, specialization, options
            )
            constants = {self.kernel.arg_names[place[0]]: value for place, value in constexprs.items()}
            self.found[key] = Launch(
                self.kernel, self.arch, constants, options, signature, constexprs, attrs, self.what[-1]
            )


@contextlib.contextmanager
def recording(arch: int) -> Iterator[tuple[dict[str, Launch], list[str]]]:
    """(variants by key, a list whose last entry names the call) while torch pretends that "meta" is a GPU."""
    found: dict[str, Launch] = {}
    what = [""]
    properties = SimpleNamespace(multi_processor_count=CHIPS[arch].processors)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.version, "cuda", "13.0"),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        for module, names in KERNELS.items():
            for name in names:
                recorder = Recorder(getattr(module, f"{name}_kernel"), arch, what, found)
                stack.enter_context(mock.patch.object(module, f"{name}_kernel", recorder))
        yield found, what


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_experts(
    rows: int,
    shape: tuple[int, int, int, int] = (EXPERTS, WIDTH, INNER, CHOICES),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    num_experts, width, inner, choices = shape
    gate, up, down = (
        (empty(num_experts, n, m // 8, dtype=torch.int32), empty(num_experts, n, m // 32))
        for n, m in ((inner, width), (inner, width), (width, inner))
    )
    ids, weights = empty(rows, choices, dtype=torch.int64), empty(rows, choices, dtype=torch.float32)
    experts.run_experts_triton(empty(rows, width, dtype=dtype), ids, weights, gate, up, down)


def call_attention(
    new: int,
    total: int,
    mask: str = "none",
    lengths: bool = False,
    capacity: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int, int, int] = (1, HEADS, LATENT, ROPE),
) -> None:
    """`mask`: "none", "padding" (B, 1, 1, S) or "rows" (B, 1, T, S); lengths: a static cache's, (B,) int64."""
    batch, heads, latent, rope = shape
    queries = empty(batch, heads, new, latent, dtype=dtype), empty(batch, heads, new, rope, dtype=dtype)
    # A dynamic cache returns the filled part of a buffer.
    cache = (empty(batch, 1, capacity or total, width, dtype=dtype)[:, :, :total] for width in (latent, rope))
    seen = {"none": None, "padding": (batch, 1, 1, total), "rows": (batch, 1, new, total)}[mask]
    attention.latent_attention_triton(
        *queries,
        *cache,
        None if seen is None else empty(*seen, dtype=torch.bool),
        0.1,
        lengths=empty(batch, dtype=torch.int64) if lengths else None,
    )


def call_layer(new: int, capacity: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """The small operations of a layer with experts, for `new` tokens that go into a cache with `capacity`."""
    latent, k_pe = empty(1, 1, new, LATENT + ROPE, dtype=dtype).split((LATENT, ROPE), dim=-1)
    for x in (empty(1, new, WIDTH, dtype=dtype), empty(1, new, QUERY_RANK, dtype=dtype), latent):
        layer.rms_norm_triton(x, empty(x.shape[-1], dtype=dtype), 1e-5)
    q_pe = empty(1, new, HEADS, NOPE + ROPE, dtype=dtype).transpose(1, 2)[..., NOPE:]
    angles = empty(1, new, ROPE // 2, dtype=torch.float32)
    buffers = (empty(1, 1, capacity, width, dtype=dtype) for width in (LATENT, ROPE))
    places = (buffer[:, :, capacity - new :] for buffer in buffers)
    layer.rotate_and_append_triton(q_pe, latent, k_pe, angles, angles, *places)
    logits, bias = empty(new, EXPERTS, dtype=torch.float32), empty(EXPERTS, dtype=torch.float32)
    layer.route_triton(logits, bias, CHOICES, True, 2.827)
    layer.silu_and_mul_triton(empty(1, new, INNER, dtype=dtype), empty(1, new, INNER, dtype=dtype))
    wide, other = empty(1, new, WIDTH, dtype=torch.float32), empty(1, new, WIDTH, dtype=dtype)
    layer.add_rounded_triton(wide, other, dtype)


def generation() -> Iterator[tuple[int, int, int]]:
    """(T, S, capacity of the cache) of the calls that fill a dynamic cache to LONGEST: a prompt in chunks of which the
    last is short, then tokens. Every length up to 3,000 and, for speed, each 61st after it: all remainders of 16."""
    capacity, chunks = 0, [(4096, 4096), (4096, 8192), (1001, 9193), (7, 9200)]
    tokens = [(1, total) for total in (*range(1, 3000), *range(3001, LONGEST, 61), LONGEST)]
    for new, total in chunks + tokens:
        if total > capacity:
            capacity = total + max(256, total // 8)
        yield new, total, capacity


def count_variants(arch: int) -> dict[str, int]:
    """How many variants of each kernel a generation needs, by kind of generation."""
    counts: dict[str, int] = {}
    kinds: dict[str, Callable[[], None]] = {
        "no mask": lambda: fill_cache("none"),
        "padding": lambda: fill_cache("padding"),
        "lengths": fill_static_cache,
        "experts": few_and_many_rows,
        "layer": grow,
    }
    for kind, run in kinds.items():
        with recording(arch) as (found, _):
            run()
        for name, number in collections.Counter(
            launch.kernel.fn.__name__ for launch in found.values()
        ).items():
            counts[f"{kind}: {name}"] = number
    return counts


def fill_cache(mask: str) -> None:
    for new, total, capacity in generation():
        call_attention(new, total, "rows" if new > 1 else mask, capacity=capacity)


def fill_static_cache() -> None:
    for capacity in (LONGEST, 100_001):
        for new in (4096, 7, 1):
            call_attention(new, capacity, "rows" if new > 1 else "padding", lengths=True)


def grow() -> None:
    for new, _, capacity in generation():
        call_layer(new, capacity)


def few_and_many_rows(dtype: torch.dtype = torch.bfloat16) -> None:
    for rows in (*range(1, 200), *range(200, 4097, 37), 4096):
        call_experts(rows, dtype=dtype)


def compare_self_tests(arch: int, dtype: torch.dtype) -> dict[str, list[str]]:
    """What only the full model compiles and what only the self-tests do; empty lists if they are the same."""
    device = torch.device("meta")
    with recording(arch) as (full, _):
        few_and_many_rows(dtype)
        for new, mask, lengths in (
            (1, "none", False),
            (1, "padding", False),
            (1, "none", True),
            (1, "padding", True),
            (300, "rows", False),
        ):
            call_attention(new, 8201, mask, lengths, capacity=9001, dtype=dtype)
            call_layer(new, 9001, dtype)
    with recording(arch) as (small, _):
        for case in experts.self_test_cases(device, dtype):
            call_experts(case.rows, experts.SELF_TEST_SHAPE, dtype)
        for case in attention.self_test_cases(device, dtype):
            mask = "none" if case.mask == "none" else "rows" if case.num_new > 1 else "padding"
            call_attention(
                case.num_new,
                case.num_total,
                mask,
                case.lengths,
                dtype=dtype,
                shape=attention.SELF_TEST_SIZES,
            )
        for name in KERNELS[layer]:
            # Tensors on "meta" have no values, so after the launches nothing can be compared.
            with mock.patch.object(gpu, "check_agreement"), contextlib.suppress(ValueError):
                gpu.SELF_TESTS[name](device, dtype, lambda first, *others: first)
    return {
        "full model only": sorted(full.keys() - small.keys()),
        "self-tests only": sorted(small.keys() - full.keys()),
    }


# ----------------------------------------------------------------------------------------------------------- compiling


def launches(arch: int) -> list[Launch]:
    """Each variant that the full model's calls need, once."""
    with recording(arch) as (found, what):
        for rows in TOKENS:
            what.append("1 token" if rows == 1 else f"{rows} tokens")
            call_experts(rows)
        for new, mask in ((1, "none"), (1, "padding"), (8, "none"), (8, "rows")):
            what.append(f"{new} new, mask {mask}")
            call_attention(new, 8200, mask, capacity=9000)
        what.append("1 new, lengths")
        call_attention(1, 8200, "padding", lengths=True)
        device = torch.device("meta")
        with mock.patch.dict(attention.UNUSABLE):
            for case in attention.self_test_cases(device, torch.bfloat16):
                what.append("fallback")
                call_attention(case.num_new, 8200)
                attention.UNUSABLE.setdefault(device, set()).add(case.key)
        what.append("a layer")
        call_layer(1, 9000)
        what.append("fp32")
        call_layer(1, 9000, torch.float32)
        call_experts(1, dtype=torch.float32)
        call_experts(64, dtype=torch.float32)
        call_attention(1, 8200, dtype=torch.float32)
    return list(found.values())


def compiled(launch: Launch) -> tuple[Any, str]:
    """As JITFunction compiles it, and what ptxas said."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    log, knobs = io.StringIO(), triton.knobs
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.nvidia.scope(),
        knobs.cache.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = folder  # from a cache it would come without a log
        knobs.nvidia.dump_ptxas_log = True
        code = triton.compile(
            source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options.__dict__
        )
    return code, log.getvalue()


def machine_code(cubin: bytes) -> tuple[str, str]:
    """cuobjdump's resource usage and nvdisasm's listing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            [triton.knobs.nvidia.nvdisasm.path, "-c", file.name],
        )
        usage, listing = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands
        )
    return usage, listing


def hot_loop(listing: str) -> tuple[list[str], list[str]]:
    """Opcodes of the whole listing, and of its longest innermost loop: from a label to a branch back to it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes) + 1))
            opcodes.append(found[1])
    inner = [
        a
        for a in loops
        if not any(b != a and a[0] <= b[0] and b[1] <= a[1] and b[0] < b[1] - 1 for b in loops)
    ]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return opcodes, opcodes[begin:end]


def work_of_a_thread(launch: Launch) -> float | None:
    """What the hot loop's instructions are divided by: weights that a thread unpacks in one turn, in attention the
    cached tokens of a turn."""
    name, constants = launch.kernel.fn.__name__, launch.constants
    matrices = 2 if "gate_up" in name else 1
    threads = 32 * launch.options.num_warps
    if "decode" in name:
        return matrices * constants["BLOCK_N"] * constants["BLOCK_G"] * 32 / threads
    if "prefill" in name:
        return matrices * constants["BLOCK_N"] * constants["BLOCK_W"] * 8 / threads
    return constants["BLOCK_S"] if name == "partial_kernel" else None


def describe(launch: Launch) -> dict[str, Any]:
    code, log = compiled(launch)
    usage, listing = machine_code(code.asm["cubin"])
    opcodes, loop = hot_loop(listing)
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1])  # type: ignore[index]
        for what in ("REG", "STACK", "LOCAL")
    )
    chip, warps, shared = CHIPS[launch.arch], launch.options.num_warps, code.metadata.shared
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256) // warps
    by_shared = chip.shared * 1024 // (shared + 1024)
    work, ptx = work_of_a_thread(launch), code.asm["ptx"]
    blocks = tuple(
        launch.constants[name]
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_S", "BLOCK_W", "BLOCK_G")
        if name in launch.constants
    )
    return {
        "arch": launch.arch,
        "kernel": launch.kernel.fn.__name__.removesuffix("_kernel"),
        "what": launch.what,
        "blocks": "x".join(map(str, blocks)),
        "warps": warps,
        "stages": launch.options.num_stages,
        "registers": registers,
        "spilled": [op for op in opcodes if op.startswith(("LDL", "STL"))],
        "stack": stack + local,
        "shared": shared,
        "shared_limit": chip.shared_of_block * 1024,
        "warps_per_processor": warps * min(by_registers, by_shared, chip.warps // warps, chip.blocks),
        "tensor_cores": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))),
        "loads_of_16_bytes": sum(op.startswith("LDG") and "128" in op for op in loop),
        "copies_ahead": "cp.async" in ptx,
        "barriers_in_loop": sum(op.startswith("BAR") for op in loop),
        "loop": len(loop),
        "per_weight": round(len(loop) / work, 2) if work else None,
        "warnings": re.findall(r"\(C\d+\)[^\n]*", log),
    }


# -------------------------------------------------------------------------------------------------------------- table


def print_table(rows: list[dict[str, Any]]) -> None:
    archs = sorted({row["arch"] for row in rows})
    print(f"triton {triton.__version__}, torch {torch.__version__}\n")
    print("| kernel, calls | " + " | ".join(f"sm_{arch}" for arch in archs) + " |")
    print("|---|" + "---|" * len(archs))
    table: dict[tuple[str, str], dict[int, str]] = collections.defaultdict(dict)
    for row in rows:
        cell = f"{row['registers']} / {row['shared'] / 1024:.0f} / {row['warps_per_processor']}"
        cell = f"{row['blocks']}: {cell}, {row['per_weight']}" if row["per_weight"] else cell
        cell += f", spills {len(row['spilled'])}" if row["spilled"] else ""
        table[row["kernel"], row["what"]][row["arch"]] = cell
    for (kernel, what), cells in table.items():
        print(f"| {kernel}, {what} | " + " | ".join(cells.get(arch, "") for arch in archs) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--variants", action="store_true")
    arguments = parser.parse_args()
    if arguments.variants:
        found = {
            arch: {
                "counts": count_variants(arch),
                "bf16": compare_self_tests(arch, torch.bfloat16),
                "fp16": compare_self_tests(arch, torch.float16),
            }
            for arch in arguments.arch
        }
        print(json.dumps(found, indent=1))
        return
    rows = []
    for launch in (launch for arch in arguments.arch for launch in launches(arch)):
        if not arguments.kernel or arguments.kernel in launch.kernel.fn.__name__:
            rows.append(describe(launch))
            if arguments.json:
                print(json.dumps(rows[-1]), flush=True)
    if not arguments.json:
        print_table(rows)


if __name__ == "__main__":
    main()
