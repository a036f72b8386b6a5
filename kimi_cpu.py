"""Products with packed int4 and bf16 matrices, and attention, on a CPU: Python bindings for the C of csrc/.

A decoded token reads each weight once, so what counts is bytes per second. PyTorch's own bf16 product of one row with a
matrix reaches about a third of the memory's bandwidth, and it has no product that reads int4 words as the checkpoint stores
them: for many rows the experts must be unpacked first. The C does both at the speed of the memory and of the tile unit. It
is compiled once, by the C compiler of the machine, into the user's cache folder; where there is no compiler (or the
environment says KIMI_CPU_CODE=0) plain torch does the same work. csrc/common.h says how the C is organised, and
csrc/experts.c explains the int4 format.

C sees only pointers, so each function here checks its tensors first and raises a ValueError that describes them.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .kimi_cpu_source import SOURCE

# The functions of the library and their parameters: l a long, f a float, p a pointer.
FUNCTIONS = {
    "linear_bf16": "lll pp pp",
    "rms_norm": "llf ppp",
    "rotary": "llll ppppp",
    "unpack_int4": "ll ppp",
    "experts_int4_few_rows": "lllll ppp pppppp p",
    "expert_int4_tiles": "lllll ppp pppppp p",
    "absorb": "llllllll f pppp ll p ll p l p",
    "prefill_attention": "llllllll f pp pp pp pp p l pp",
    "use_tiles": "l",
}
BAD_ID = 2  # as in csrc/common.h: an expert id outside the stacks
MAX_LATENT = 4096  # as in csrc/absorb.c: how many values a latent may have
Packed = list[tuple[torch.Tensor, torch.Tensor]]  # (words, scales) of gate, up and down


class Unavailable(RuntimeError):
    """Why there is no compiled code on this machine."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled source. Raises `Unavailable` with the reason; both are remembered for the life of the process."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if platform.system() == "Windows" or compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang) was found")
    runtime = openmp_runtime()
    # Sums may be reordered. Not -ffast-math: a library linked with it makes the whole process flush subnormals to zero.
    reorder = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
    flags = ["-O3", "-march=native", *reorder, "-shared", "-fPIC"]
    key = "\0".join([SOURCE, compiler, *flags, str(runtime), torch.__version__, cpu_features()])
    target = cache_folder() / f"kimi_cpu_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        compile_source(compiler, flags, runtime, target)
    loaded = ctypes.CDLL(str(target))
    kinds = {"l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
    for name, arguments in FUNCTIONS.items():
        if hasattr(loaded, name):
            getattr(loaded, name).argtypes = [kinds[kind] for kind in arguments.replace(" ", "")]
    if hasattr(loaded, "use_tiles"):
        loaded.use_tiles(1)
    return loaded


def openmp_runtime() -> Path | None:
    """The OpenMP library that PyTorch has loaded. A second one would bring its own threads, which wait by spinning."""
    places = (Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs")
    return next((path for place in places for path in sorted(place.glob("libgomp*.so*"))), None)


def cpu_features() -> str:
    """What the code was compiled for: several kinds of machine may share one home, and so one cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())


def cache_folder() -> Path:
    """A folder that only this user can write to, since the library in it is executed."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi-k2.7-code"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(root, os.W_OK):
            return root
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    own = tempfile.mkdtemp(prefix="kimi_cpu_")  # 0700; compiled anew by each process
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)


def compile_source(compiler: str, flags: list[str], runtime: Path | None, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, built = Path(folder) / "kimi_cpu.c", Path(folder) / "kimi_cpu.so"
        source.write_text(SOURCE, encoding="utf-8")
        command = [compiler, *flags, "-o", str(built), str(source), "-lm"]
        attempts = [[*command, "-fopenmp"], command]
        if runtime is not None:
            # -fopenmp makes the compiler understand the pragmas; -nodefaultlibs keeps it from adding its own runtime.
            attempts.insert(0, [*command, "-fopenmp", "-nodefaultlibs", str(runtime), "-lc"])
        errors = []
        for attempt in attempts:
            done = subprocess.run(attempt, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode == 0:
                os.replace(built, target)  # in one step, so that no other process sees half of it
                return
            errors.append(done.stderr.strip().splitlines()[:1])
    raise Unavailable(f"{compiler} could not compile it: {errors}")


@functools.cache
def why_unavailable() -> str | None:
    """None if the compiled code can be used. KIMI_CPU_CODE=0 turns it off."""
    if os.environ.get("KIMI_CPU_CODE") == "0":
        return "the environment says KIMI_CPU_CODE=0"
    try:
        library()
    except (Unavailable, OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None


def refuse(function: str, needs: str, **tensors: torch.Tensor | None) -> ValueError:
    """The error for tensors that C would read as something else."""
    given = ", ".join(
        f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device} with strides {t.stride()}"
        for name, t in tensors.items()
        if t is not None
    )
    return ValueError(f"{function} takes {needs}; got {given}.")


# Subclasses (DTensor, FakeTensor, those of quantizers) may have no memory of their own; C would read address 0.
WITH_MEMORY = (torch.Tensor, torch.nn.Parameter)


def is_in_ram(*tensors: torch.Tensor) -> bool:
    return all(tensor.is_cpu and type(tensor) in WITH_MEMORY for tensor in tensors)


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether all are bf16 in RAM."""
    for tensor in tensors:  # half the time of all(...), and each product of each layer asks
        if tensor.dtype is not torch.bfloat16 or not tensor.is_cpu or type(tensor) not in WITH_MEMORY:
            return False
    return True


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """x (..., M) times the transpose of weight (N, M), contiguous, both bf16 on the CPU; (..., N), sums in fp32, which is
    given as it is for `dtype` float32, otherwise rounded to bf16."""
    given, shape = x.shape, weight.shape
    fits = is_plain(x, weight) and len(shape) == 2 and weight.is_contiguous()
    if not (fits and given and given[-1] == shape[1]):
        raise refuse("linear_bf16", "bf16 x (..., M) and contiguous weight (N, M)", x=x, weight=weight)
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        raise ValueError(f"linear_bf16 gives bfloat16 or float32, not {dtype}.")
    outputs, inputs = shape
    x = x.contiguous()
    y = x.new_empty((*given[:-1], outputs), dtype=dtype)
    pointers = (y.data_ptr(), None) if dtype is torch.bfloat16 else (None, y.data_ptr())
    rows = y.numel() // max(outputs, 1)
    library().linear_bf16(rows, outputs, inputs, x.data_ptr(), weight.data_ptr(), *pointers)
    return y


def rms_norm_bf16(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., M) over its root mean square, rounded to bf16, times weight (M); contiguous bf16, sums in fp32."""
    given, width = x.shape, weight.numel()
    fits = is_plain(x, weight) and x.is_contiguous() and weight.is_contiguous()
    if not (fits and given and given[-1] == width and weight.ndim == 1):
        raise refuse("rms_norm_bf16", "contiguous bf16 x (..., M) and weight (M)", x=x, weight=weight)
    y = torch.empty_like(x)
    rows = x.numel() // max(width, 1)
    library().rms_norm(rows, width, eps, x.data_ptr(), weight.data_ptr(), y.data_ptr())
    return y


def rotary_bf16(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, h, T, dr) bf16, its pairs turned by the angles of cos and sin (B or 1, T, dr/2); all first members, then all
    second ones, contiguous. The last dimension of x has stride 1."""
    given, angles, strides = x.shape, cos.shape, x.stride()
    fits = is_plain(x) and len(given) == 4 and len(angles) == 3 and strides[3] == 1 and not given[3] % 2
    fits = fits and angles == sin.shape and angles[1] == given[2] and angles[2] == given[3] // 2
    if not (fits and angles[0] in (1, given[0]) and is_in_ram(cos, sin)):
        needs = "bf16 x (B, h, T, dr), dr even and with stride 1, and cos and sin (B or 1, T, dr/2)"
        raise refuse("rotary_bf16", needs, x=x, cos=cos, sin=sin)
    cos, sin = (table.float().expand(given[0], -1, -1).contiguous() for table in (cos, sin))
    y = x.new_empty(given)
    three = (ctypes.c_long * 3)(*strides[:3])
    library().rotary(*given, x.data_ptr(), three, cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    return y


def unpack_int4_bf16(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes (N, M/8) words times (N, M/32) bf16 scales into `out`, (N, M) bf16."""
    if not (is_plain(out) and out.ndim == 2 and out.is_contiguous()):
        raise refuse("unpack_int4_bf16", "contiguous bf16 out (N, M)", out=out)
    check_packed("unpack_int4_bf16", "packed", packed, scale, tuple(out.shape))
    library().unpack_int4(*out.shape, packed.data_ptr(), scale.data_ptr(), out.data_ptr())
    return out


def check_packed(
    function: str, name: str, words: torch.Tensor, scale: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless they are packed matrices of this shape, (N, M) or (E, N, M)."""
    *rows, inputs = shape
    fits = words.shape == (*rows, inputs // 8) and scale.shape == (*rows, inputs // 32) and not inputs % 32
    fits = fits and words.dtype is torch.int32 and is_in_ram(words) and is_plain(scale)
    if not (fits and words.is_contiguous() and scale.is_contiguous()):
        needs = f"contiguous int32 words and bf16 scales of {shape} weights, inputs a multiple of 32"
        raise refuse(function, needs, **{f"{name} words": words, f"{name} scale": scale})


def check_experts(function: str, x: torch.Tensor, matrices: Packed) -> tuple[int, int, int]:
    """H, I and E of x (R, H) and the stacks of gate (E, I, H), up (E, I, H) and down (E, H, I)."""
    if not (is_plain(x) and x.ndim == 2 and x.is_contiguous()):
        raise refuse(function, "contiguous bf16 x (R, H)", x=x)
    (gate, _), up, down = matrices
    if gate.ndim != 3:
        raise refuse(function, "gate words (E, I, H/8)", **{"gate words": gate})
    width, (experts, inner, _) = x.shape[1], gate.shape
    check_packed(function, "gate", *matrices[0], (experts, inner, width))
    check_packed(function, "up", *up, (experts, inner, width))
    check_packed(function, "down", *down, (experts, width, inner))
    return width, inner, experts


def experts_int4_few_rows(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, matrices: Packed
) -> torch.Tensor:
    """All chosen experts for a few rows in one call: x (R, H) bf16, ids (R, K) int64, weights (R, K) fp32, and (words,
    scale) stacks of gate, up and down. Returns the weighted sums, (R, H) fp32, the same ones on every run."""
    width, inner, experts = check_experts("experts_int4_few_rows", x, matrices)
    fits = ids.ndim == 2 and ids.shape == weights.shape and len(ids) == len(x)
    fits = fits and ids.dtype is torch.int64 and weights.dtype is torch.float32
    fits = fits and is_in_ram(ids, weights)
    if not (fits and ids.is_contiguous() and weights.is_contiguous()):
        needs = "contiguous int64 ids (R, K) and fp32 weights (R, K) for the rows of x"
        raise refuse("experts_int4_few_rows", needs, x=x, ids=ids, weights=weights)
    output = torch.empty(len(x), width, dtype=torch.float32)
    tensors = [x, ids, weights, *(tensor for pair in matrices for tensor in pair), output]
    pointers = [tensor.data_ptr() for tensor in tensors]
    status = library().experts_int4_few_rows(len(x), ids.shape[1], width, inner, experts, *pointers)
    if status == BAD_ID:
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"experts_int4_few_rows takes ids from 0 to {experts - 1}; got ids from {found}.")
    if status:
        raise MemoryError(f"no memory for the intermediate results of {len(x)} rows")
    return output


def absorb(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    up: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Absorbed attention of one layer in one call, bf16.

    q_nope (B, h, T, dn), q_pe (B, h, T, dr), up (h, dn + dv, c) contiguous, latent (B, 1, S, c) and k_pe (B, 1, S, dr)
    with any batch and token strides, mask (B or 1, 1, T or 1, S) boolean or None; returns (B, T, h, dv).
    """
    if not absorb_fits(q_nope, q_pe, up, latent, k_pe, mask):
        needs = (
            "bf16 q_nope (B, h, T, dn), q_pe (B, h, T, dr), contiguous up (h, dn + dv, c), latent (B, 1, S, c), k_pe (B, 1,"
            f" S, dr) with S > 0 and c <= {MAX_LATENT}, and a boolean mask (B or 1, 1, T or 1, S) or None"
        )
        raise refuse("absorb", needs, q_nope=q_nope, q_pe=q_pe, up=up, latent=latent, k_pe=k_pe, mask=mask)
    batch, heads, num_new, nope = q_nope.shape
    num_total, width = latent.shape[2:]
    v_dim, rope = up.shape[1] - nope, k_pe.shape[3]
    output = q_nope.new_empty(batch, num_new, heads, v_dim)
    q_nope, q_pe = q_nope.contiguous(), q_pe.contiguous()
    mask, mask_batch = expand_mask(mask, num_new, num_total)
    sizes = (batch, heads, num_new, num_total, nope, v_dim, width, rope)
    failed = library().absorb(
        *sizes,
        scaling,
        *(tensor.data_ptr() for tensor in (q_nope, q_pe, up, latent)),
        latent.stride(0),
        latent.stride(2),
        k_pe.data_ptr(),
        k_pe.stride(0),
        k_pe.stride(2),
        None if mask is None else mask.data_ptr(),
        mask_batch,
        output.data_ptr(),
    )
    if failed:
        raise MemoryError(f"no memory for the scores of {num_new} new tokens against {num_total}")
    return output


def absorb_fits(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    up: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
) -> bool:
    """Whether these are what `absorb` says."""
    queries, matrix, cached = q_nope.shape, up.shape, latent.shape
    if not is_plain(q_nope, q_pe, up, latent, k_pe):
        return False
    if not (len(queries) == len(cached) == k_pe.ndim == 4 and len(matrix) == 3):
        return False
    batch, heads, num_new, nope = queries
    num_total, width, rope = cached[2], cached[3], k_pe.shape[3]
    return (
        q_pe.shape == (batch, heads, num_new, rope)
        and matrix == (heads, matrix[1], width)
        and matrix[1] >= nope
        and up.is_contiguous()
        and cached[0] == batch
        and cached[1] == 1
        and k_pe.shape == (batch, 1, num_total, rope)
        and latent.stride(3) == k_pe.stride(3) == 1
        and num_total > 0
        and width <= MAX_LATENT
        and mask_fits(mask, batch, num_new, num_total)
    )


def mask_fits(mask: torch.Tensor | None, batch: int, num_new: int, num_total: int) -> bool:
    return mask is None or (
        mask.dtype == torch.bool
        and is_in_ram(mask)
        and mask.ndim == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, num_new)
        and mask.shape[3] in (1, num_total)
    )


def expand_mask(mask: torch.Tensor | None, num_new: int, num_total: int) -> tuple[torch.Tensor | None, int]:
    """(B or 1, 1, T, S) contiguous, and the bytes from one sequence's mask to the next one's."""
    if mask is None:
        return None, 0
    mask = mask.expand(-1, 1, num_new, num_total).contiguous()
    return mask, num_new * num_total if mask.shape[0] > 1 else 0


@functools.cache
def has_prefill_attention() -> bool:
    """Whether `prefill_attention` is there: where there are bf16 dot products."""
    return why_unavailable() is None and hasattr(library(), "prefill_attention")


@functools.cache
def has_expert_tiles() -> bool:
    """Whether `expert_int4_tiles` is there: where there are AMX tiles, and the system lets this process use them."""
    there = why_unavailable() is None and hasattr(library(), "expert_int4_tiles")
    return there and bool(library().use_tiles(1))


def expert_int4_tiles(
    x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, matrices: Packed, output: torch.Tensor
) -> Callable[[int, int, int], None]:
    """A function (place, start, count) that runs the expert at `place` of the stacks for pairs start .. start + count.

    It adds weights (P numbers) fp32 times the expert's outputs for rows (P,) int64 of x (R, H) bf16 to the same rows of output
    (R, H) fp32; `matrices` are (words, scale) stacks of gate, up and down. All contiguous. Pointers are looked up once per
    layer, which has hundreds of experts.
    """
    width, inner, experts = check_experts("expert_int4_tiles", x, matrices)
    fits = rows.dtype == torch.int64 and weights.dtype == output.dtype == torch.float32
    fits = fits and rows.ndim == 1 and rows.numel() == weights.numel() and output.shape == x.shape
    if not (
        fits and is_in_ram(rows, weights, output) and all(t.is_contiguous() for t in (rows, weights, output))
    ):
        needs = "int64 rows (P,) of x, P fp32 weights and fp32 output (R, H), contiguous"
        raise refuse("expert_int4_tiles", needs, x=x, rows=rows, weights=weights, output=output)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(x):
        found = f"{int(rows.min())} to {int(rows.max())}"
        raise ValueError(f"expert_int4_tiles takes rows from 0 to {len(x) - 1}; got rows from {found}.")
    tensors = [x, rows, weights, *(tensor for pair in matrices for tensor in pair), output]
    arguments = (width, inner, *(tensor.data_ptr() for tensor in tensors))
    function, pairs = library().expert_int4_tiles, rows.numel()

    def run(place: int, start: int, count: int) -> None:
        if not (0 <= place < experts and 0 <= start <= start + count <= pairs):
            found = f"expert {place} and pairs {start} to {start + count}"
            raise ValueError(f"expert_int4_tiles has {experts} experts and {pairs} pairs; got {found}.")
        if function(place, start, count, *arguments):
            raise MemoryError(f"no memory for the intermediate results of {count} rows")

    return run


def prefill_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    offset: int | None,
    scaling: float,
    out: torch.Tensor,
) -> None:
    """Attention of many new tokens, bf16: scores, softmax and sums in fp32, neither stored whole nor padded.

    q_nope (B, h, T, dn), q_pe (B, h, T, dr), kv (B, h, S, dn + dv), k_pe (B, 1, S, dr), any strides but in the last
    dimension; dn and dr even, dv a multiple of 64. mask (B or 1, 1, T or 1, S) boolean or None. With an offset query t sees
    keys up to offset + t. Writes out, (B, h, T, dv), also with any strides. A query that sees nothing gets zeros.
    """
    if not prefill_fits(q_nope, q_pe, kv, k_pe, mask, out):
        needs = (
            "bf16 q_nope (B, h, T, dn), q_pe (B, h, T, dr), kv (B, h, S, dn + dv), k_pe (B, 1, S, dr) and out (B, h, T, dv),"
            " dn and dr even, dv a multiple of 64, and a boolean mask (B or 1, 1, T or 1, S) or None"
        )
        raise refuse(
            "prefill_attention", needs, q_nope=q_nope, q_pe=q_pe, kv=kv, k_pe=k_pe, mask=mask, out=out
        )
    if offset is not None and offset < 0:
        raise ValueError(f"prefill_attention takes an offset of at least 0 or None; got {offset}.")
    batch, heads, num_new, nope = q_nope.shape
    num_total, rope = k_pe.shape[2:]
    v_dim = out.shape[3]
    mask, mask_batch = expand_mask(mask, num_new, num_total)
    strides_of_four = ctypes.c_long * 4

    def with_strides(tensor: torch.Tensor) -> tuple[int, ctypes.Array]:
        return tensor.data_ptr(), strides_of_four(*tensor.stride())

    sizes = (batch, heads, num_new, num_total, nope, rope, v_dim, -1 if offset is None else offset)
    failed = library().prefill_attention(
        *sizes,
        scaling,
        *with_strides(q_nope),
        *with_strides(q_pe),
        *with_strides(kv),
        *with_strides(k_pe),
        None if mask is None else mask.data_ptr(),
        mask_batch,
        *with_strides(out),
    )
    if failed:
        raise MemoryError(f"no memory for the keys and values of {heads} heads and {num_total} tokens")


def prefill_fits(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: torch.Tensor,
    k_pe: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:
    """Whether these are what `prefill_attention` says."""
    tensors = q_nope, q_pe, kv, k_pe, out
    if not is_plain(*tensors) or any(tensor.ndim != 4 or tensor.stride(3) != 1 for tensor in tensors):
        return False
    batch, heads, num_new, nope = q_nope.shape
    num_total, rope = k_pe.shape[2:]
    v_dim = out.shape[3]
    return (
        q_pe.shape == (batch, heads, num_new, rope)
        and kv.shape == (batch, heads, num_total, nope + v_dim)
        and k_pe.shape == (batch, 1, num_total, rope)
        and out.shape == (batch, heads, num_new, v_dim)
        and not (nope % 2 or rope % 2 or v_dim % 64)
        and mask_fits(mask, batch, num_new, num_total)
    )
