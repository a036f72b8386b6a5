"""scripts.convert: int4 and bf16 into each other, subsets, the blocks of GGUF; interrupted, repeated, misused."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kimi.kimi_int4 import dequantize_int4, pack_int4, quantize_int4
from kimi.modeling_kimi import KimiK25ForConditionalGeneration
from scripts import convert
from scripts.convert import Report, q4_0_blocks, read_checkpoint, recover_int4
from scripts.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small checkpoint whose experts are quantized as they were trained: absmax / 7."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("convert") / "int4", max_shard_size="1MB")
    model = KimiK25ForConditionalGeneration.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.language_model.model.layers[1:]:
            experts = layer.mlp.experts
            for projection, (outputs, inputs) in experts.shapes.items():
                weight = torch.randn(experts.num_experts, outputs, inputs) * inputs**-0.5
                words, scale = quantize_int4(weight)
                getattr(experts, f"{projection}_weight_packed").copy_(words)
                getattr(experts, f"{projection}_weight_scale").copy_(scale)
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder


def tensors_of(folder):
    found = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def run(*arguments):
    return convert.main([str(argument) for argument in arguments])


def test_int4_to_bf16_and_back_is_bit_for_bit(source, tmp_path):
    dense, back = tmp_path / "dense", tmp_path / "back"
    assert run("bf16", source, dense, "--max-shard-size", "2MB") == 0
    assert run("int4", dense, back, "--max-shard-size", "1MB") == 0
    want, got = tensors_of(source), tensors_of(back)
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].dtype == got[name].dtype and torch.equal(want[name], got[name]), name
    config = json.loads((back / "config.json").read_bytes())
    assert (
        config["text_config"]["quantization_config"]
        == json.loads((source / "config.json").read_bytes())["text_config"]["quantization_config"]
    )


def test_bf16_has_the_published_names_and_the_same_logits(source, tmp_path):
    dense = tmp_path / "dense"
    run("bf16", source, dense)
    names = tensors_of(dense)
    assert "language_model.model.layers.1.mlp.experts.0.gate_proj.weight" in names
    assert not any(name.endswith(("_packed", "_scale", "_shape")) for name in names)
    assert "quantization_config" not in json.loads((dense / "config.json").read_bytes())["text_config"]
    ids = torch.arange(12).unsqueeze(0)
    models = [
        KimiK25ForConditionalGeneration.from_pretrained(f, int4_backend="reference") for f in (source, dense)
    ]
    with torch.no_grad():
        want, got = (model(input_ids=ids).logits for model in models)
    assert torch.equal(want, got)


def test_int4_with_other_codes_is_found_again():
    """Random codes -8..7: groups whose largest value is not code 7, and scales where division rounds."""
    torch.manual_seed(1)
    codes = torch.randint(-8, 8, (64, 96), dtype=torch.int8)
    codes[:, :32].clamp_(-7, 7)
    codes[0, 32:64] = torch.randint(-3, 4, (32,), dtype=torch.int8)
    codes[1, 64:] = 0
    scale = (torch.rand(64, 3) * 0.01 + 0.001).bfloat16()
    weight = dequantize_int4(pack_int4(codes), scale, torch.bfloat16)
    words, found, rounded = recover_int4(weight)
    assert rounded == 0
    assert torch.equal(dequantize_int4(words, found, torch.bfloat16), weight)


def test_weights_that_never_were_int4_are_rounded_and_counted():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    words, scale, rounded = recover_int4(weight)
    want_words, want_scale = quantize_int4(weight)
    assert rounded == 64 and torch.equal(words, want_words) and torch.equal(scale, want_scale)


def test_a_subset_generates_like_the_layers_it_kept(source, tmp_path):
    small = tmp_path / "small"
    assert run("subset", source, small, "--layers", 2, "--experts", 8) == 0
    config = json.loads((small / "config.json").read_bytes())["text_config"]
    assert (config["num_hidden_layers"], config["n_routed_experts"]) == (2, 8)
    model = KimiK25ForConditionalGeneration.from_pretrained(small)
    whole = tensors_of(source)
    router = model.language_model.model.layers[1].mlp.gate
    assert torch.equal(router.weight, whole["language_model.model.layers.1.mlp.gate.weight"][:8])
    assert model(input_ids=torch.arange(5).unsqueeze(0)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", 9), "the checkpoint has 3"),
        (("--experts", 2), "num_experts_per_tok 4"),
        (("--experts", 99), "has 16"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(source, tmp_path, capsys, options, message):
    assert run("subset", source, tmp_path / "small", *options) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "small").exists()


def test_an_interrupted_conversion_goes_on(source, tmp_path, monkeypatch):
    target, written, write = tmp_path / "dense", [], convert.write_checked

    def fails(path, *arguments):
        if len(written) == 2:
            raise OSError("the plug was pulled")
        written.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(convert, "write_checked", fails)
    assert run("bf16", source, target, "--max-shard-size", "1MB") == 1
    stamps = {name: os.stat(target / name).st_mtime_ns for name in written}
    monkeypatch.setattr(convert, "write_checked", write)
    assert run("bf16", source, target, "--max-shard-size", "1MB") == 0
    assert all(os.stat(target / name).st_mtime_ns == stamp for name, stamp in stamps.items())
    assert not (target / "conversion.json").exists()
    run("bf16", source, tmp_path / "again", "--max-shard-size", "1MB")
    assert (target / "SHA256SUMS").read_text(encoding="utf-8") == (
        tmp_path / "again" / "SHA256SUMS"
    ).read_text(encoding="utf-8")


def test_checksums_are_those_of_the_files(source, tmp_path):
    run("bf16", source, tmp_path / "dense")
    for line in (tmp_path / "dense" / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "dense" / name).read_bytes()).hexdigest() == digest


def test_a_disk_that_returns_other_bytes_is_noticed(source, tmp_path, monkeypatch, capsys):
    real, flipped = convert.File.read, []

    def flips(file, ranges):
        real(file, ranges)
        if file.path.endswith(".part") and not flipped:
            ranges[-1].view[-1] ^= 1
            flipped.append(file.path)

    monkeypatch.setattr(convert.File, "read", flips)
    assert run("bf16", source, tmp_path / "dense") == 1
    assert "is not what was written" in capsys.readouterr().err
    assert not list((tmp_path / "dense").glob("model*.safetensors"))


def test_nothing_is_overwritten(source, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work", encoding="utf-8")
    for what in ("bf16", "mlx"):
        assert run(what, source, tmp_path / "mine") == 1
        assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_missing_shard_is_named_before_anything_is_written(source, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    shards = sorted(source.glob("model*.safetensors"))
    for path in (*shards[1:], source / "model.safetensors.index.json", source / "config.json"):
        (broken / path.name).symlink_to(path)
    assert run("bf16", broken, tmp_path / "dense") == 1
    assert shards[0].name in capsys.readouterr().err and not (tmp_path / "dense").exists()


def test_converting_what_is_converted_is_refused(source, tmp_path, capsys):
    assert run("int4", source, tmp_path / "again") == 1
    assert "nothing to convert" in capsys.readouterr().err


def test_mlx_links_the_weights_and_names_the_tower_without_prefix(source, tmp_path):
    assert run("mlx", source, tmp_path / "mlx") == 0
    vision = json.loads((tmp_path / "mlx" / "config.json").read_bytes())["vision_config"]
    assert (
        vision["hidden_size"] == vision["vt_hidden_size"]
        and vision["depth"] == vision["vt_num_hidden_layers"]
    )
    assert tensors_of(tmp_path / "mlx").keys() == tensors_of(source).keys()


def test_q4_0_blocks_hold_the_very_values():
    """Read by the rules of the format: an fp16 scale; byte i has element i low and element i + 16 high; minus 8."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31, (6, 12), generator=generator).int()
    scale = (torch.rand(6, 3, generator=generator) * 0.02 + 1e-4).bfloat16()
    blocks = q4_0_blocks(words, scale).numpy().reshape(6, 3, 18)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    low, high = (blocks[..., 2:] & 15).astype(np.float32), (blocks[..., 2:] >> 4).astype(np.float32)
    values = (np.concatenate((low, high), -1) - 8) * d
    assert np.array_equal(values.reshape(6, 96), dequantize_int4(words, scale, torch.float32).numpy())


def test_scales_that_fp16_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"1 of 1 scales are no fp16 numbers, the first 9\.9"):
        q4_0_blocks(torch.zeros(1, 4, dtype=torch.int32), torch.tensor([[1e-9]]).bfloat16())


def test_the_report_counts_what_was_converted(source, tmp_path):
    report = convert.convert(source, tmp_path / "dense", convert.to_bf16, convert.dense_config)
    assert isinstance(report, Report) and report.tensors == len(read_checkpoint(tmp_path / "dense"))
