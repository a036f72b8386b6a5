"""Files in whole blocks past the page cache, and by ordinary access: the same bytes, and errors with names."""

import copy
import errno
import os
import random
import re
from pathlib import Path

import pytest
import torch

from kimi import kimi_files
from kimi.kimi_files import (
    ACCESS_BYTES,
    BLOCK,
    File,
    Range,
    Shard,
    ShardWriter,
    empty_for_weights,
    file_stamp,
    open_direct,
    zeros_for_weights,
)

SIZE = 3 * ACCESS_BYTES + 1234


@pytest.fixture(scope="module")
def data():
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def path(tmp_path, data):
    file = tmp_path / "bytes"
    file.write_bytes(data)
    return file


def read(file, places):
    """The bytes of (begin, end) each."""
    views = [memoryview(bytearray(end - begin)) for begin, end in places]
    file.read([Range(begin, view, f"range {begin}") for (begin, _), view in zip(places, views, strict=True)])
    return [bytes(view) for view in views]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "places",
    [
        [(0, SIZE)],
        [(1, 2)],
        [(SIZE - 1, SIZE)],
        [(7, 7), (7, 9), (9, BLOCK + 3), (BLOCK + 3, 2 * ACCESS_BYTES + 11)],
        [(5, 6), (2 * ACCESS_BYTES - 1, 2 * ACCESS_BYTES + 1), (SIZE - 5000, SIZE)],
        [(begin, begin + 100) for begin in range(0, ACCESS_BYTES, 1000)],
        [(ACCESS_BYTES - 1, ACCESS_BYTES), (ACCESS_BYTES, ACCESS_BYTES + 1), (3 * ACCESS_BYTES, SIZE)],
    ],
)
def test_ranges_get_their_bytes(path, data, places, direct):
    file = File(path, direct)
    assert (file.direct is not None) == (direct and open_direct(str(path)) is not None)
    assert read(file, places) == [data[begin:end] for begin, end in places]
    file.close()


def test_random_ranges(path, data):
    draw, file = random.Random(1), File(path, direct=True)
    for _ in range(30):
        cuts = sorted(draw.randrange(SIZE + 1) for _ in range(2 * draw.randrange(1, 20)))
        places = list(zip(cuts[::2], cuts[1::2], strict=True))
        assert read(file, places) == [data[begin:end] for begin, end in places]


def test_bytes_far_between_two_ranges_are_not_read(path, data, monkeypatch):
    file, real, sizes = File(path, direct=True), kimi_files.read_exactly, []
    monkeypatch.setattr(
        kimi_files,
        "read_exactly",
        lambda d, begin, view, *least: sizes.append(len(view)) or real(d, begin, view, *least),
    )
    places = [(5, 10), (ACCESS_BYTES // 2, ACCESS_BYTES // 2 + 10)]
    assert read(file, places) == [data[begin:end] for begin, end in places]
    assert sum(sizes) <= 2 * BLOCK


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_ends_or_changed_is_named_with_the_range(path, direct):
    file = File(path, direct)
    with pytest.raises(
        OSError,
        match=rf"range {SIZE - 10} could not be read from {re.escape(str(path))}: it ends after \d+ of",
    ):
        read(file, [(0, 10), (SIZE - 10, SIZE + 10)])
    shard = Shard(str(path), file_stamp(path.stat()))
    os.truncate(path, 5000)
    with pytest.raises(OSError, match=rf"range 0 .* it changed .* {SIZE} bytes then, 5000 now"):
        read(shard, [(0, 10)])


def test_a_file_that_another_one_replaced_stays_readable(path, data, monkeypatch):
    monkeypatch.setattr(kimi_files, "DIRECT_FROM", 0)
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))

    def replaced_meanwhile(*args):  # between the two times that it is opened
        os.replace(other, path)
        return False

    monkeypatch.setattr(kimi_files, "is_in_page_cache", replaced_meanwhile)
    stamp = file_stamp(path.stat())
    shard = Shard(str(path), stamp)
    assert not other.exists()
    assert read(shard, [(0, SIZE)]) == [data]


def test_what_is_in_the_page_cache_is_read_from_there(path, monkeypatch):
    monkeypatch.setattr(kimi_files, "DIRECT_FROM", 0)
    answers = []

    def answer(descriptor, buffers, offset, flags):
        assert flags == os.RWF_NOWAIT
        if answers[-1] == "absent":
            raise BlockingIOError
        if answers[-1] == "unknown":
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return 1

    monkeypatch.setattr(os, "preadv", answer)
    for given, direct in (
        ("there", False),
        ("unknown", False),
        ("absent", open_direct(str(path)) is not None),
    ):
        answers.append(given)
        assert (File(path).direct is not None) == direct


def test_a_file_system_that_refuses_direct_reads_later(path, data, monkeypatch):
    file, real = File(path, direct=True), kimi_files.read_exactly
    if file.direct is None:
        file.direct = open(path, "rb", buffering=0)  # noqa: SIM115
    unwilling = file.direct.fileno()

    def refuse(descriptor, *args):
        if descriptor == unwilling:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor, *args)

    monkeypatch.setattr(kimi_files, "read_exactly", refuse)
    assert read(file, [(5, ACCESS_BYTES + 5), (2 * ACCESS_BYTES, SIZE)]) == [
        data[5 : ACCESS_BYTES + 5],
        data[2 * ACCESS_BYTES :],
    ]


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("direct_from", [0, SIZE + 1])
@pytest.mark.parametrize(
    "size", [0, 1, BLOCK - 1, BLOCK, ACCESS_BYTES - 1, ACCESS_BYTES, ACCESS_BYTES + 1, SIZE]
)
def test_written_bytes_are_those_that_were_given(tmp_path, data, size, direct_from, monkeypatch):
    monkeypatch.setattr(kimi_files, "DIRECT_FROM", direct_from)
    target, seen, draw, done = tmp_path / "new", [], random.Random(size), 0
    with ShardWriter(target, size, lambda piece: seen.append(bytes(piece))) as file:
        while done < size:
            step = draw.choice((1, 8, 5000, ACCESS_BYTES, 2 * ACCESS_BYTES + 3))
            file.write(data[done : min(done + step, size)])
            done += step
    assert target.read_bytes() == data[:size] == b"".join(seen)


def test_a_longer_file_of_the_same_name_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(kimi_files, "DIRECT_FROM", 0)
    target = tmp_path / "new"
    target.write_bytes(bytes(SIZE))
    with ShardWriter(target, 5) as file:
        file.write(b"12345")
    assert target.read_bytes() == b"12345"


def test_another_size_than_announced_is_an_error(tmp_path):
    with (
        pytest.raises(ValueError, match=r"new got 3 bytes, announced were 4"),
        ShardWriter(tmp_path / "new", 4) as file,
    ):
        file.write(b"123")


def test_a_full_disk_is_named(tmp_path, data, monkeypatch):
    def full(descriptor, view, begin):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: .*new"),
        ShardWriter(tmp_path / "new", SIZE) as file,
    ):
        file.write(data)


def test_a_file_system_that_refuses_direct_writes_later(tmp_path, data, monkeypatch):
    monkeypatch.setattr(kimi_files, "DIRECT_FROM", 0)
    real, refused = os.pwrite, []

    def refuse(descriptor, view, begin):
        if begin >= ACCESS_BYTES and not refused:
            refused.append(begin)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, view, begin)

    monkeypatch.setattr(os, "pwrite", refuse)
    with ShardWriter(tmp_path / "new", SIZE) as file:
        file.flags = file.flags or os.O_SYNC  # where no file can be opened with O_DIRECT
        file.write(data)
    assert refused and (tmp_path / "new").read_bytes() == data


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (5, 2**20)], ids=["small", "empty", "on huge pages"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_memory_for_weights_is_a_tensor_like_others(shape, dtype):
    tensor = empty_for_weights(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    tensor.fill_(3)
    other = tensor.clone().share_memory_()
    assert torch.equal(tensor, other) and torch.equal(copy.deepcopy(tensor), tensor)


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="reads the resident set from /proc (Linux)"
)
def test_zeros_take_no_memory_until_they_are_written():
    def resident():
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )

    before = resident()
    words = zeros_for_weights((64, 2**20), torch.int32)
    assert resident() - before < words.nbytes / 4
    assert not words[::9, ::4099].any() and words.shape == (64, 2**20) and words.dtype == torch.int32
    with torch.device("meta"):
        assert zeros_for_weights((64, 2**20), torch.int32).is_meta
    assert not zeros_for_weights((3, 5), torch.bfloat16).any()
