"""Files of weights, read and written as fast as the disk is: in whole blocks, past the system's page cache.

Through the page cache every byte takes a page that the system must find, clear and remember, for nothing: a checkpoint
is read once, and seldom fits into memory beside itself. Measured on 2 cores (docs/history.md), 10 GB cost 24 s of CPU time to
read that way and 3 s past it, and are written 5 times as fast.

    Shard              reads; a file that is already in the page cache is read from there
    ShardWriter        writes
    empty_for_weights  memory that is read into, on huge pages where it is large
    empty_page_locked  the same, page-locked: copies between it and an accelerator run beside everything else

Access past the cache (`O_DIRECT`) needs addresses, offsets and lengths that are multiples of a block, so bytes pass a
buffer that stays in the processor's cache. Small files, and systems without such access, use ordinary reads and writes.
"""

import contextlib
import errno
import math
import mmap
import os
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLOCK = 4096  # bytes; no disk has larger ones
ACCESS_BYTES = 4 * 2**20  # of a file, read or written by one system call
DIRECT_FROM = 64 * 2**20  # bytes of a file
LARGEST_GAP = 16 * BLOCK  # bytes between two ranges that are read rather than passed over
PROBES = 16  # places of a file where the page cache is asked
HUGE_PAGE = 2 * 2**20  # bytes; smaller tensors do not ask for one


class Range(NamedTuple):
    """Bytes of a file from `begin` on, to be put into `view`, and what they are called."""

    begin: int
    view: memoryview
    name: str


def whole_blocks(size: int) -> int:
    """Bytes of the blocks that hold `size`."""
    return -(-size // BLOCK) * BLOCK


def file_stamp(status: os.stat_result) -> tuple[int, int]:
    """What shows that a file has changed: its bytes, and the time of its last change in ns."""
    return status.st_size, status.st_mtime_ns


def check_stamp(descriptor: int, stamp: tuple[int, int]) -> None:
    now = file_stamp(os.fstat(descriptor))
    if now != stamp:
        raise OSError(f"it changed after its header was read: {stamp[0]} bytes then, {now[0]} now")


def read_exactly(descriptor: int, begin: int, view: memoryview, least: int | None = None) -> None:
    """Fills `view`, or at least `least` bytes of it. Raises OSError if the file ends before."""
    done, least = 0, len(view) if least is None else least
    while done < least:  # one call gives 2 GiB at most
        got = os.preadv(descriptor, [view[done:]], begin + done)
        if not got:
            raise OSError(f"it ends after {done} of {least} bytes")
        done += got


def copy_bytes(to: memoryview, source: memoryview) -> None:
    """As to[:] = source, but other threads run meanwhile."""
    np.copyto(np.frombuffer(to, np.uint8), np.frombuffer(source, np.uint8))


def open_direct(path: str) -> BinaryIO | None:
    """The file for reading past the page cache, or None if the system cannot."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
    except OSError:
        return None


def is_in_page_cache(descriptor: int, size: int) -> bool:
    """Whether most of a file is in memory: asks for a byte at PROBES places without waiting. True if the system cannot say.

    Places are drawn anew each time: a byte that was asked for is in memory the next time.
    """
    byte, draw, found = bytearray(1), random.SystemRandom(), 0
    for _ in range(PROBES):
        try:
            found += os.preadv(descriptor, [byte], draw.randrange(size), os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except (OSError, AttributeError):
            return True
    return found > PROBES // 2


# ------------------------------------------------------------------------------------------------------------ reading

BUFFERS = threading.local()  # one of ACCESS_BYTES bytes for each thread that reads


class File:
    """A file open for reading by any number of threads; `direct` past the page cache, where the system can."""

    def __init__(self, path: str | os.PathLike, direct: bool | None = None):
        self.path = str(path)
        self.handle = open(path, "rb", buffering=0)  # noqa: SIM115
        self.direct: BinaryIO | None = None
        size = os.fstat(self.handle.fileno()).st_size
        if direct is None:
            direct = size >= DIRECT_FROM and not is_in_page_cache(self.handle.fileno(), size)
        if direct:
            # By the descriptor, not the name, which may be another file's by now.
            self.direct = open_direct(f"/proc/self/fd/{self.handle.fileno()}")

    def read(self, ranges: Sequence[Range]) -> None:
        """Fills the views; ranges ascend. Raises OSError with the name of the range that could not be read."""
        held = 0, 0
        for place, wanted in enumerate(ranges):
            try:
                if place == 0:
                    self.check()
                held = self._read_range(ranges, place, held)
            except OSError as error:
                raise OSError(f"{wanted.name} could not be read from {self.path}: {error}.") from error

    def check(self) -> None:
        """Called before each reading."""

    def _read_range(self, ranges: Sequence[Range], place: int, held: tuple[int, int]) -> tuple[int, int]:
        """Reads one range; `held` and the result are the bytes [first, last) of the file that are in this thread's buffer."""
        begin, view, _ = ranges[place]
        direct, done = self.direct, 0
        if direct is None:
            read_exactly(self.handle.fileno(), begin, view)
            return held
        if not hasattr(BUFFERS, "piece"):
            BUFFERS.piece = memoryview(mmap.mmap(-1, ACCESS_BYTES))
        first, last = held
        while done < len(view):
            position = begin + done
            if not first <= position < last:
                first = position - position % BLOCK
                last = min(first + ACCESS_BYTES, end_of_run(ranges[place:]))
                try:
                    # The file may end within the last block.
                    view_of_blocks = BUFFERS.piece[: whole_blocks(last - first)]
                    read_exactly(direct.fileno(), first, view_of_blocks, last - first)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.direct = None  # this file system opens files for direct reads and then refuses them
                    return self._read_range(ranges, place, (0, 0))
            size = min(last - position, len(view) - done)
            copy_bytes(view[done : done + size], BUFFERS.piece[position - first : position - first + size])
            done += size
        return first, last

    def close(self) -> None:
        for handle in (self.handle, self.direct):
            if handle is not None:
                handle.close()


def end_of_run(ranges: Sequence[Range]) -> int:
    """Where the first ACCESS_BYTES of ranges that are close together end."""
    start = ranges[0].begin
    end = start
    for begin, view, _ in ranges:
        if begin > end + LARGEST_GAP or end >= start + ACCESS_BYTES:
            break
        end = begin + len(view)
    return end


class Shard(File):
    """A file that must not change while open. (If another file takes its name, the old one stays readable here.)"""

    def __init__(self, path: str, stamp: tuple[int, int]):
        super().__init__(path)
        self.stamp = stamp

    def check(self) -> None:
        check_stamp(self.handle.fileno(), self.stamp)


# ------------------------------------------------------------------------------------------------------------ writing


class ShardWriter:
    """Writes a new file of `size` bytes from its begin to its end; a thread writes one buffer while the next is filled.

    `watch` sees each piece before it is written, and must be done with it when it gets the next one.
    """

    def __init__(self, path: str | os.PathLike, size: int, watch: Callable[[memoryview], None] | None = None):
        self.path, self.size, self.watch = str(path), size, watch
        self.flags = getattr(os, "O_DIRECT", 0) if size >= DIRECT_FROM else 0
        self.descriptor = self._open(os.O_CREAT | os.O_TRUNC)
        piece = min(ACCESS_BYTES, max(whole_blocks(size), BLOCK))
        self.buffers = [memoryview(mmap.mmap(-1, piece)) for _ in range(2)]
        self.filled = self.begin = 0  # bytes in the first buffer; where in the file they belong
        self.thread = ThreadPoolExecutor(1, "shard-writer")
        self.writing: Future | None = None  # of the second buffer

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, os.O_WRONLY | flags | self.flags, 0o666)
        except OSError:
            if not self.flags:
                raise
            self.flags = 0  # this file system has no direct access
            return self._open(flags)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, *problem: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.thread.shutdown()
            os.close(self.descriptor)

    def write(self, data: Any) -> None:
        """Bytes, or any buffer of them. Raises OSError that names the file, for this call or for an earlier one."""
        view = memoryview(data).cast("B")
        while len(view):
            room = self.buffers[0][self.filled :]
            size = min(len(view), len(room))
            copy_bytes(room[:size], view[:size])
            self.filled, view = self.filled + size, view[size:]
            if size == len(room):
                self._flush()

    def _flush(self) -> None:
        self._await()
        piece = self.buffers[0][: self.filled]
        if self.watch is not None:
            self.watch(piece)
        whole = whole_blocks(len(piece)) if self.flags else len(piece)  # cut off by `_finish`
        self.writing = self.thread.submit(self._write, self.buffers[0][:whole], self.begin)
        self.begin, self.filled = self.begin + len(piece), 0
        self.buffers.reverse()

    def _await(self) -> None:
        if self.writing is not None:
            self.writing.result()

    def _write(self, view: memoryview, begin: int) -> None:
        while len(view):
            try:
                written = os.pwrite(self.descriptor, view, begin)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.flags:
                    raise OSError(error.errno, error.strerror, self.path) from error
                self.flags = 0
                os.close(self.descriptor)
                self.descriptor = self._open(0)
                continue
            view, begin = view[written:], begin + written

    def _finish(self) -> None:
        if self.filled:
            self._flush()
        self._await()
        if self.begin != self.size:
            raise ValueError(f"{self.path} got {self.begin:,} bytes, announced were {self.size:,}.")
        os.truncate(self.descriptor, self.size)


# ------------------------------------------------------------------------------------------------------------- memory


def empty_for_weights(shape: Sequence[int], dtype: torch.dtype, device: Any = "cpu") -> torch.Tensor:
    """`torch.empty`; a large tensor in RAM is on huge pages where the system has them, which it fills 5 times as fast."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(huge_pages(size), dtype=dtype).view(tuple(shape))


def huge_pages(size: int) -> mmap.mmap:
    """`size` bytes of zeros, at least one, on pages of their own; large ones where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


def empty_page_locked(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor in RAM for copies to `device`, a GPU. Where the system refuses to lock its pages it is ordinary
    memory, and a warning is logged once.

    It takes as many bytes as were asked for, to the end of a page, while torch.empty(pin_memory=True) takes the next
    power of two: up to twice as many.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    memory = huge_pages(size)
    owner = memoryview(memory)  # the tensor keeps it, and dies before `memory`, which the finalizer keeps
    tensor = torch.frombuffer(owner, dtype=dtype).view(tuple(shape))
    refusal = lock_pages(tensor.data_ptr(), size, device)
    if refusal is None:
        finalizer = weakref.finalize(owner, unlock_pages, memory, tensor.data_ptr(), device)
        finalizer.atexit = False  # the driver may be gone by then; the pages go with the process
    else:
        logger.warning_once(  # type: ignore[attr-defined]
            f"RAM for copies to {device} could not be page-locked ({refusal}): a copy then passes a buffer of the driver,"
            " slowly. The limit of the process (ulimit -l) or of the container may be too small."
        )
    return tensor


def lock_pages(address: int, size: int, device: torch.device) -> str | None:
    """None, or why the system does not lock these bytes."""
    try:
        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE)
    except (RuntimeError, AssertionError, AttributeError) as problem:  # no runtime, or one without this call
        return str(problem)
    if int(error) == 0:
        return None
    forget_last_error(device)
    return f"cudaHostRegister gives error {int(error)}"  # one sentence for all sizes, said once


def unlock_pages(memory: mmap.mmap, address: int, device: torch.device) -> None:
    """Before `memory` goes: no tensor uses it any more, but a copy may be under way."""
    try:
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            error = torch.cuda.cudart().cudaHostUnregister(address)
    except (
        RuntimeError,
        AssertionError,
    ):  # the driver is in error, or this is a forked process that has none
        return
    if int(error):
        forget_last_error(device)


def forget_last_error(device: torch.device) -> None:
    """The runtime keeps a refusal and shows it to whoever looks next, which would be some kernel's launch: this one."""
    with contextlib.suppress(RuntimeError, AssertionError):
        torch.ones(1, device=device)


def zeros_for_weights(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`torch.zeros` on the default device, but RAM is not touched: memory that the system has just given is zero, and
    most of it is given back unused when weights are loaded."""
    size, device = math.prod(shape) * dtype.itemsize, torch.get_default_device()
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    return empty_for_weights(shape, dtype)


def landing(place: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Where a file's bytes go: `place` itself if it is in RAM and has their dtype, else new memory."""
    if place is not None and place.device.type == "cpu" and place.dtype == dtype:
        return place
    return torch.empty(shape, dtype=dtype)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor in RAM."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
