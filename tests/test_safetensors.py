"""Shards: headers that are wrong, what is written read by the safetensors library, and how shards are cut."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi.kimi_safetensors import (
    DTYPES,
    Source,
    read_header,
    read_sources,
    split_names,
    write_shard,
    write_shards,
)


def entries_of(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def stream_of(tensors):
    return lambda names: ((name, tensors[name]) for name in names)


# ---------------------------------------------------------------------------------------------------------- reading


def test_headers_that_contradict_the_file(tmp_path):
    def header(entry):
        text = json.dumps({"a": entry}).encode()
        path = tmp_path / "wrong.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        return str(path)

    with pytest.raises(OSError, match=r"a of shape \(4,\) occupies 8 bytes"):
        read_header(header({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}))
    with pytest.raises(OSError, match=r"damaged: a of shape \(2,\)"):
        read_header(header({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}))
    with pytest.raises(ValueError, match="dtype F8_E4M3, which this model does not use"):
        read_header(header({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}))
    (tmp_path / "wrong.safetensors").write_bytes(b"\x05" + bytes(7) + b"hello")
    with pytest.raises(OSError, match="header is not JSON"):
        read_header(str(tmp_path / "wrong.safetensors"))


def test_a_tensor_in_two_shards_and_pickled_weights_are_refused(tmp_path):
    for name in ("x", "y"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("x", "y")]
    with pytest.raises(ValueError, match=r"a is in two shards, \S+x.safetensors and \S+y.safetensors"):
        read_sources(files, None, None)
    with pytest.raises(ValueError, match=r"old.bin is not a safetensors file; pickled weights are not read"):
        read_sources(["old.bin"], None, None)


def test_tensors_that_the_caller_holds_are_sources_too_and_are_renamed():
    tensor = torch.ones(2, 3)
    sources = read_sources(None, {"text.a": tensor}, {r"^text\.": "language_model."})
    want = Source(torch.float32, (2, 3), "state_dict", tensor=tensor)
    assert list(sources) == ["language_model.a"] and sources["language_model.a"] == want


# ---------------------------------------------------------------------------------------------------------- writing


def test_a_shard_is_what_the_library_reads(tmp_path):
    """Every dtype, a scalar, an empty tensor and one that is not contiguous; each begins at a multiple of its size."""
    tensors = {
        code: torch.arange(6).to(dtype).view(2, 3) if code != "U8" else torch.arange(3, dtype=dtype)
        for code, dtype in DTYPES.items()
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 4), "strided": torch.ones(4, 6)[:, ::2]}
    path, seen = tmp_path / "x.safetensors", []
    write_shard(path, entries_of(tensors), stream_of(tensors), lambda piece: seen.append(bytes(piece)))
    read, sources = load_file(path), read_header(str(path))
    assert read.keys() == tensors.keys() == sources.keys()
    assert all(read[name].dtype == t.dtype and read[name].equal(t) for name, t in tensors.items())
    assert all(source.begin % source.dtype.itemsize == 0 for source in sources.values())
    data = path.read_bytes()
    assert b"".join(seen) == data
    assert all(data[s.begin : s.end] == read[n].numpy().tobytes() for n, s in sources.items() if n != "BF16")


def test_what_was_not_announced_is_an_error(tmp_path):
    announced = entries_of({"a": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"a is torch.float32 \(3,\), announced as \(torch.float32, \(2,\)\)"
    ):
        write_shard(tmp_path / "x", announced, stream_of({"a": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"a has dtype torch.complex64, which this model does not use"):
        write_shard(tmp_path / "x", {"a": (torch.complex64, (2,))}, stream_of({}))


def test_shards_are_cut_by_size_and_older_ones_removed(tmp_path):
    tensors = {name: torch.full((size,), float(size)) for name, size in (("a", 1), ("b", 1), ("c", 5))}
    for size, files in ((8, 2), (4, 3), ("1KB", 1)):
        write_shards(tmp_path, entries_of(tensors), stream_of(tensors), size)
        names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
        assert len(names) == files
        index = tmp_path / "model.safetensors.index.json"
        assert index.exists() == (files > 1)
        if files > 1:
            content = json.loads(index.read_bytes())
            assert sorted(set(content["weight_map"].values())) == names
            assert content["metadata"]["total_size"] == 28
        read = {name: tensor for file in names for name, tensor in load_file(tmp_path / file).items()}
        assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match='max_shard_size "big" is not a size'):
        write_shards(tmp_path, entries_of(tensors), stream_of(tensors), "big")
    assert split_names({"a": 4, "b": 4, "c": 20, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]
