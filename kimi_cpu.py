"""Products with packed int4 and bf16 matrices, and attention, on a CPU: the doors to the C of `kimi_cpu_code.py`.

A decoded token reads each weight once, so what counts is bytes per second. PyTorch's own bf16 product of one row with a
matrix reaches about a third of the memory's rate, and nothing in it reads int4 words as the checkpoint has them; for
many rows it wants the experts unpacked first. The C does both at the speed of memory and of the matrix unit. It is
compiled once, by the C compiler of the machine, into the user's cache folder; where there is no compiler (or the
environment says KIMI_CPU_CODE=0) plain torch does the same work.
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

from .kimi_cpu_code import SOURCE

# What they take: l a long, f a float, p a pointer.
FUNCTIONS = {
    "linear_bf16": "lll pp pp",
    "rms_norm": "llf ppp",
    "rotary": "llll ppppp",
    "unpack_int4": "ll ppp",
    "experts_int4": "llll ppp pppppp p",
    "expert_int4": "lllll ppp pppppp p",
    "absorb": "llllllll f pppp ll p ll p l p",
    "prefill_attention": "llllllll f pp pp pp pp p l pp",
    "use_tiles": "l",
}


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
    """What the code was compiled for: the cache may lie in a home that several kinds of machine share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())


def cache_folder() -> Path:
    """A folder that only this user can write to, since what lies in it is executed."""
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
                os.replace(built, target)  # at once, so that no other process sees half of it
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


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """x (..., M) times the transpose of weight (N, M), contiguous, both bf16 on the CPU; (..., N), sums in fp32, which is
    given as it is for `dtype` float32, otherwise rounded to bf16."""
    outputs, inputs = weight.shape
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
    places = (None, y.data_ptr()) if dtype == torch.float32 else (y.data_ptr(), None)
    library().linear_bf16(x.numel() // inputs, outputs, inputs, x.data_ptr(), weight.data_ptr(), *places)
    return y


def rms_norm_bf16(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., M) over its root mean square, rounded to bf16, times weight (M); contiguous bf16, sums in fp32."""
    y = torch.empty_like(x)
    width = x.shape[-1]
    library().rms_norm(x.numel() // width, width, eps, x.data_ptr(), weight.data_ptr(), y.data_ptr())
    return y


def rotary_bf16(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, h, T, dr) bf16, its pairs turned by the angles of cos and sin (B or 1, T, dr/2); all first members, then all
    second ones, contiguous. The last dimension of x has stride 1."""
    cos, sin = (table.float().expand(len(x), -1, -1).contiguous() for table in (cos, sin))
    y = x.new_empty(x.shape)
    strides = (ctypes.c_long * 3)(*x.stride()[:3])
    library().rotary(*x.shape, x.data_ptr(), strides, cos.data_ptr(), sin.data_ptr(), y.data_ptr())
    return y


def unpack_int4_bf16(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes (N, M/8) words times (N, M/32) bf16 scales into `out`, (N, M) bf16."""
    rows, inputs = out.shape
    library().unpack_int4(rows, inputs, packed.data_ptr(), scale.data_ptr(), out.data_ptr())
    return out


def experts_int4(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    matrices: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """All chosen experts for a few rows in one call: x (R, H) bf16, ids (R, K) int64, weights (R, K) fp32, and (packed,
    scale) stacks of gate, up and down. Returns the weighted sums, (R, H) fp32, the same ones on every run."""
    rows, width = x.shape
    output = torch.empty(rows, width, dtype=torch.float32)
    sizes = (rows, ids.shape[1], width, matrices[0][0].shape[1])
    tensors = [x, ids, weights, *(tensor for pair in matrices for tensor in pair), output]
    if library().experts_int4(*sizes, *(tensor.data_ptr() for tensor in tensors)):
        raise MemoryError(f"no memory for the intermediate results of {rows} rows")
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
    with any batch and token strides, mask (B or 1, 1, T, S) boolean or None; returns (B, T, h, dv).
    """
    batch, heads, num_new, nope = q_nope.shape
    num_total, width = latent.shape[2:]
    v_dim = up.shape[1] - nope
    output = q_nope.new_empty(batch, num_new, heads, v_dim)
    q_nope, q_pe = q_nope.contiguous(), q_pe.contiguous()
    mask_batch = 0
    if mask is not None:
        mask = mask.expand(-1, 1, num_new, num_total).contiguous()
        mask_batch = num_new * num_total if mask.shape[0] > 1 else 0
    sizes = (batch, heads, num_new, num_total, nope, v_dim, width, k_pe.shape[-1])
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


@functools.cache
def has_prefill_attention() -> bool:
    """Whether `prefill_attention` is there: where there are bf16 dot products."""
    return why_unavailable() is None and hasattr(library(), "prefill_attention")


@functools.cache
def has_expert_product() -> bool:
    """Whether `expert_int4` is there: where there are AMX tiles, and the system lets this process use them."""
    return why_unavailable() is None and hasattr(library(), "expert_int4") and bool(library().use_tiles(1))


def expert_int4(
    x: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    matrices: list[tuple[torch.Tensor, torch.Tensor]],
    output: torch.Tensor,
) -> Callable[[int, int, int], None]:
    """A function (place, start, count) that runs the expert at `place` of the stacks for pairs start .. start + count.

    It adds weights (P,) fp32 times the expert's outputs for rows (P,) int64 of x (R, H) bf16 to the same rows of output
    (R, H) fp32; `matrices` are (packed, scale) stacks of gate, up and down. All contiguous; what they are is made out
    once, since a layer has hundreds of experts.
    """
    tensors = [x, rows, weights, *(tensor for pair in matrices for tensor in pair), output]
    arguments = (x.shape[1], matrices[0][0].shape[1], *(tensor.data_ptr() for tensor in tensors))
    function = library().expert_int4

    def run(place: int, start: int, count: int) -> None:
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
    dimension; dn and dr even, dv a multiple of 64. mask (B or 1, 1, T, S) boolean or None. With an offset query t sees
    keys up to offset + t. Writes out, (B, h, T, dv), also with any strides. A query that sees nothing gets zeros.
    """
    batch, heads, num_new, nope = q_nope.shape
    num_total, rope = k_pe.shape[2:]
    mask_batch = 0
    if mask is not None:
        mask = mask.expand(-1, 1, num_new, num_total).contiguous()
        mask_batch = num_new * num_total if mask.shape[0] > 1 else 0
    four = ctypes.c_long * 4

    def given(tensor: torch.Tensor) -> tuple[int, ctypes.Array]:
        return tensor.data_ptr(), four(*tensor.stride())

    sizes = (batch, heads, num_new, num_total, nope, rope, out.shape[-1], -1 if offset is None else offset)
    failed = library().prefill_attention(
        *sizes,
        scaling,
        *given(q_nope),
        *given(q_pe),
        *given(kv),
        *given(k_pe),
        None if mask is None else mask.data_ptr(),
        mask_batch,
        *given(out),
    )
    if failed:
        raise MemoryError(f"no memory for the keys and values of {heads} heads and {num_total} tokens")
