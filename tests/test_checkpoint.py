"""Weights from disk to the model and back: every byte, every name, and every fault that a folder can have."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from kimi import kimi_checkpoint, kimi_files
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi
from scripts.tiny_checkpoint import write_tiny_checkpoint

BIAS = "language_model.model.layers.1.mlp.gate.e_score_correction_bias"
PACKED = "language_model.model.layers.2.mlp.experts.3.up_proj.weight_packed"
IDS = torch.tensor([[5, 17, 80, 33, 9, 200]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def broken(folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "broken")


def tensors_of(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def file_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"][name]


def edit_tensor(folder, name, new):
    """Replaces a tensor in its shard; None removes it."""
    file = file_of(folder, name)
    tensors = load_file(file)
    tensors.pop(name)
    save_file(tensors if new is None else {**tensors, name: new}, file, metadata={"format": "pt"})


def edit_config(folder, **text):
    config = json.loads((folder / "config.json").read_bytes())
    config["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# ---------------------------------------------------------------------------------------------------------- loading


def test_what_is_loaded_is_what_is_written(folder):
    model = Kimi.from_pretrained(folder)
    stored, state = tensors_of(folder), model.state_dict()
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert list(state) == list(
        json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    )
    assert all(state[name].dtype == t.dtype and state[name].equal(t) for name, t in stored.items())
    assert not model.training and model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [497, 496] and model.generation_config.do_sample


def test_a_model_loaded_without_options_is_causal(folder):
    """Every way to choose the attention reaches all parts: transformers itself decides for the top config only."""
    # In fp32: how many rows an expert gets depends on the last token, and the order of its sums on the rows.
    # In bf16 another rounding may swap two experts that tie.
    model = Kimi.from_pretrained(folder).float()
    want = logits(model)
    for choose in (None, "eager", "sdpa"):
        if choose:
            model.set_attn_implementation(choose)
        parts = (model.config, model.config.text_config, model.config.vision_config)
        assert {part._attn_implementation for part in parts} == {choose or "sdpa"}
        with torch.no_grad():
            other = model(torch.cat((IDS[:, :-1], IDS[:, :1]), dim=1)).logits
        difference = (other - want).abs()
        assert difference[:, :-1].max() < 1e-3 and difference[:, -1].max() > 1
    eager = Kimi.from_pretrained(folder, attn_implementation="eager")
    assert eager.config.text_config._attn_implementation == "eager"
    assert (logits(eager.float()) - want).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "auto", None])
def test_a_dtype_concerns_neither_packed_weights_nor_the_bias(folder, dtype, caplog):
    model = Kimi.from_pretrained(folder, dtype=dtype)
    state, stored = model.state_dict(), tensors_of(folder)
    for name in (BIAS, PACKED, PACKED.replace("packed", "scale"), PACKED.replace("packed", "shape")):
        assert state[name].dtype == stored[name].dtype and state[name].equal(stored[name]), name
    assert model.dtype == (torch.bfloat16 if dtype in ("auto", None) else dtype)
    assert torch.isfinite(logits(model)).all()
    assert ("scales of the int4 experts are bfloat16" in caplog.text) == (dtype == torch.float16)


def test_a_device_map_with_disk_gives_the_same_logits_and_saves_the_same_bytes(folder, tmp_path):
    model = Kimi.from_pretrained(folder)
    names = [n for n, _ in model.named_children() if n != "language_model"]
    inner = [
        f"language_model.model.{n}" for n in ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")
    ]
    device_map = dict.fromkeys([*names, "language_model.lm_head", *inner], "cpu")
    device_map["language_model.model.layers.2"] = "disk"
    with pytest.raises(ValueError, match=r"offload_folder"):
        Kimi.from_pretrained(folder, device_map=device_map)
    offloaded = Kimi.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert offloaded.language_model.model.layers[2].mlp.experts.up_proj_weight_packed.device.type == "meta"
    assert logits(offloaded).equal(logits(model))
    offloaded.save_pretrained(tmp_path / "saved")
    stored = tensors_of(folder)
    assert all(t.equal(stored[name]) for name, t in tensors_of(tmp_path / "saved").items())


def test_weight_shape_may_be_int64_or_absent(broken):
    other = PACKED.replace("packed", "shape").replace("experts.3", "experts.4")
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        as_int64 = {
            n: t.long() if n.endswith("weight_shape") and "down_proj" in n else t for n, t in tensors.items()
        }
        kept = {n: t for n, t in as_int64.items() if not (n.endswith("weight_shape") and "up_proj" in n)}
        save_file(kept, file, metadata={"format": "pt"})
    state = Kimi.from_pretrained(broken).state_dict()
    assert state[other].tolist() == [128, 256]
    assert state[other.replace("up_proj", "down_proj")].dtype == torch.int64


def test_a_state_dict_and_a_key_mapping(folder):
    model = Kimi.from_pretrained(folder)
    copy = Kimi.from_pretrained(None, config=model.config, state_dict=tensors_of(folder))
    assert logits(copy).equal(logits(model))
    renamed = {name.replace("language_model.", "text."): t for name, t in tensors_of(folder).items()}
    mapping = {"key_mapping": {r"^text\.": "language_model."}}
    copy = Kimi.from_pretrained(None, config=model.config, state_dict=renamed, **mapping)
    assert logits(copy).equal(logits(model))


@pytest.mark.parametrize("packed", [True, False])
def test_a_new_model_from_a_config_can_be_saved_and_read(folder, tmp_path, packed):
    config = Kimi.from_pretrained(folder).config
    if not packed:
        config.text_config.expert_quantization = None
    torch.manual_seed(0)
    model = Kimi(config).eval()
    if packed:
        model = model.bfloat16()
    model.save_pretrained(tmp_path)
    again = Kimi.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert logits(again).equal(logits(model))


# ----------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("size", ["1MB", "300KB", "5GB"])
def test_saved_is_loaded_byte_for_byte(folder, tmp_path, size):
    model = Kimi.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size=size)
    stored, saved = tensors_of(folder), tensors_of(tmp_path)
    assert saved.keys() == stored.keys()
    assert all(t.dtype == saved[name].dtype and t.equal(saved[name]) for name, t in stored.items())
    before, after = (json.loads((f / "config.json").read_bytes()) for f in (folder, tmp_path))
    assert after["architectures"] == before["architectures"] == ["KimiK25ForConditionalGeneration"]
    assert after["text_config"]["quantization_config"] == before["text_config"]["quantization_config"]
    assert "quantization_config" not in after and "expert_quantization" not in after["text_config"]
    assert after["text_config"]["rope_scaling"] == before["text_config"]["rope_scaling"]
    assert logits(Kimi.from_pretrained(tmp_path)).equal(logits(model))
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (size != "5GB") and not list(tmp_path.glob("*.part"))


class Wrapper(torch.nn.Module):
    """Forwards what its module has, as wrappers of torch.compile and of adapters do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "module" else getattr(self.module, name)

    def forward(self, *args):
        return self.module(*args)


def test_a_wrapper_around_a_module_is_not_counted_nor_saved_beside_it(folder, tmp_path):
    model = Kimi.from_pretrained(folder)
    want, tensors = model.num_parameters(), len(kimi_checkpoint.published_tensors(model))
    layer = model.language_model.model.layers[1]
    layer.mlp.experts, layer.mlp.gate = Wrapper(layer.mlp.experts), Wrapper(layer.mlp.gate)
    assert model.num_parameters() == want
    assert len(kimi_checkpoint.published_tensors(model)) == tensors
    with model.collect_routing() as routing, torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long))
    assert routing.counts.sum(-1).tolist() == [5 * model.config.text_config.num_experts_per_tok] * 2


def test_saving_replaces_older_shards_and_respects_the_umask(folder, tmp_path):
    model = Kimi.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    many = len(list(tmp_path.glob("*.safetensors")))
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) < many and all(f"-of-{len(files):06d}" in name for name in files)
    assert {p.stat().st_mode for p in tmp_path.glob("*.safetensors")} == {
        (tmp_path / "config.json").stat().st_mode
    }
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_variants_and_state_dicts_are_saved_as_asked(folder, tmp_path):
    model = Kimi.from_pretrained(folder)
    model.save_pretrained(tmp_path, variant="draft", max_shard_size="2MB")
    assert (tmp_path / "model.safetensors.index.draft.json").exists()
    assert logits(Kimi.from_pretrained(tmp_path, variant="draft")).equal(logits(model))
    changed = {**model.state_dict(), BIAS: torch.zeros(16)}
    model.save_pretrained(tmp_path / "other", state_dict=changed)
    assert not tensors_of(tmp_path / "other")[BIAS].any()


def test_only_safetensors_are_written(folder, tmp_path):
    with pytest.raises(ValueError, match="would write pickle"):
        Kimi.from_pretrained(folder).save_pretrained(tmp_path, safe_serialization=False)


# -------------------------------------------------------------------------------------------------- damaged folders


def test_missing_and_truncated_shards(broken):
    file = file_of(broken, PACKED)
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(OSError, match=rf"{file.name}.*(truncated|damaged)"):
        Kimi.from_pretrained(broken)
    file.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(OSError, match=r"damaged"):
        Kimi.from_pretrained(broken)
    file.unlink()
    with pytest.raises(OSError, match=file.name):
        Kimi.from_pretrained(broken)


def test_a_read_that_fails_names_shard_and_tensor(folder, monkeypatch, capfd):
    """Whichever of the reading threads it happens in; and nothing is printed where stderr is no terminal."""
    real, calls = kimi_files.read_exactly, itertools.count(1)

    def failing(descriptor, begin, view):
        if next(calls) == 100:  # of one thread alone: each gets a number of its own
            raise OSError(5, "Input/output error")
        real(descriptor, begin, view)

    monkeypatch.setattr(kimi_files, "read_exactly", failing)
    with pytest.raises(OSError, match=r"\S+ could not be read from .+\.safetensors: .*Input/output error"):
        Kimi.from_pretrained(folder)
    monkeypatch.undo()
    Kimi.from_pretrained(folder)
    assert "Loading weights" not in capfd.readouterr().err


def test_a_shard_that_changes_between_header_and_data_is_named(broken, monkeypatch):
    real = kimi_checkpoint.check_sources

    def replaced_meanwhile(tensors, sources):
        real(tensors, sources)
        os.truncate(sources[PACKED].file, 5000)

    monkeypatch.setattr(kimi_checkpoint, "check_sources", replaced_meanwhile)
    name = file_of(broken, PACKED).name
    with pytest.raises(
        OSError, match=rf"{name} cannot be read: it changed after its header was read: \d+ bytes then, 5000"
    ):
        Kimi.from_pretrained(broken)


def test_large_tensors_are_read_in_pieces_and_by_several_threads(folder, monkeypatch):
    monkeypatch.setattr(kimi_checkpoint, "BATCH_BYTES", 1000)
    stored = tensors_of(folder)
    for dtype in (None, torch.float32):
        state = Kimi.from_pretrained(folder, dtype=dtype).state_dict()
        assert all(state[name].equal(tensor.to(state[name].dtype)) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            PACKED,
            lambda t: t[:, :8].contiguous(),
            r"{name} in .* has shape \(128, 8\), the config makes it \(128, 32\)",
        ),
        (PACKED, lambda t: t.short(), r"{name} in .* has dtype torch.int16, expected torch.int32"),
        (PACKED, lambda t: t.float(), r"{name} in .* has dtype torch.float32, expected torch.int32"),
        (
            PACKED.replace("packed", "scale"),
            lambda t: t.int(),
            r"{name} in .* has dtype torch.int32, expected",
        ),
        (PACKED.replace("packed", "scale"), lambda t: None, r"lacks {name}"),
        (BIAS, lambda t: None, r"lacks {name}"),
        (
            PACKED.replace("packed", "shape"),
            lambda t: t.flip(0),
            r"{name} of .* says \[256, 128\], but the config makes the matrix \[128, 256\]",
        ),
    ],
)
def test_one_wrong_tensor_is_named(broken, name, change, sentence):
    edit_tensor(broken, name, change(load_file(file_of(broken, name))[name]))
    with pytest.raises(ValueError, match=sentence.format(name=name)):
        Kimi.from_pretrained(broken)


def test_an_unknown_tensor_is_named_and_rotary_tables_are_passed_over(broken):
    file = file_of(broken, BIAS)
    rotary = {"language_model.model.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**load_file(file), **rotary}, file, metadata={"format": "pt"})
    Kimi.from_pretrained(broken)
    save_file({**load_file(file), "language_model.extra": torch.ones(8)}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"language_model.extra \(in .*{file.name}\), which the model does not know"
    ):
        Kimi.from_pretrained(broken)


def test_a_contradicting_config_is_one_sentence(broken):
    edit_config(broken, n_routed_experts=24)
    with pytest.raises(
        ValueError, match="has 16 routed experts in a layer, the config says n_routed_experts 24"
    ):
        Kimi.from_pretrained(broken)
    edit_config(broken, n_routed_experts=16, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"lacks language_model\.model\.layers\.3.*nothing was loaded"):
        Kimi.from_pretrained(broken)


def test_pickle_and_requantizing_are_refused(broken):
    with pytest.raises(ValueError, match="quantization_config cannot be given"):
        Kimi.from_pretrained(broken, quantization_config={"load_in_4bit": True})
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match=r"pickle|safetensors"):
        Kimi.from_pretrained(broken)


# ----------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import gc, json, mmap, sys, threading, tracemalloc
import numpy as np
import torch
from kimi import kimi_checkpoint, kimi_files
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi

BATCH, lock, sizes = 2**20, threading.Lock(), []
real, kimi_checkpoint.BATCH_BYTES = kimi_checkpoint.Shard.read, BATCH

def memory():
    "Bytes of all tensors and mappings in RAM, each place once."
    held = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
            held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif type(one) is mmap.mmap:
            held.setdefault(np.frombuffer(one, np.uint8).ctypes.data, len(one))
    return sum(held.values())

def read(self, ranges):
    "While the threads that read have all that they need for it."
    real(self, ranges)
    with lock:
        sizes.append(memory())

kimi_checkpoint.Shard.read = read
gc.freeze()  # of what is there before, nothing counts
tracemalloc.start()  # bytes and NumPy's arrays
model = Kimi.from_pretrained(sys.argv[1], dtype=sys.argv[2])
python = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
with torch.no_grad():
    model(torch.arange(64).view(1, 64), use_cache=False)
gc.collect()
print(json.dumps({
    "reads": len(sizes), "peak": max(sizes) + python, "resident": memory(),
    "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    # A part of the work ends with the piece that makes it full; reading past the page cache takes a buffer.
    "pieces": kimi_checkpoint.READERS * (2 * BATCH + kimi_files.ACCESS_BYTES),
}))
"""


@pytest.fixture(scope="module")
def quarter_gigabyte(tmp_path_factory):
    """More than 200 MB of int4: 3 MoE layers of 32 experts."""
    sizes = {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "n_routed_experts": 64,
        "num_hidden_layers": 5,
    }
    folder = tmp_path_factory.mktemp("memory") / "quarter"
    yield write_tiny_checkpoint(folder, sizes, max_shard_size="50MB")
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_weights_stay_packed_and_loading_needs_no_second_copy(quarter_gigabyte, dtype):
    index = json.loads((quarter_gigabyte / "model.safetensors.index.json").read_bytes())
    on_disk = index["metadata"]["total_size"]
    assert on_disk >= 200e6 and len(set(index["weight_map"].values())) >= 4
    command = [sys.executable, "-c", MEASURE, str(quarter_gigabyte), dtype]
    measured = json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])
    if dtype == "auto":
        assert measured["resident"] <= 1.02 * on_disk, (measured, on_disk)
    assert measured["reads"] > 100, measured
    # Names, headers and modules that are imported on the way take some MB.
    assert measured["peak"] <= measured["weights"] + measured["pieces"] + 10e6, (measured, on_disk)
