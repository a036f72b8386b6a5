"""scripts.verify: a sound folder agrees with its own record; each planted fault is named by the stage it was planted in."""

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import verify
from scripts.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of two layers, and what was recorded of it."""
    folder = tmp_path_factory.mktemp("verify") / "sound"
    write_tiny_checkpoint(folder, text={"num_hidden_layers": 2}, max_shard_size="10MB")
    reference = tmp_path_factory.mktemp("verify") / "reference"
    verify.record(folder, reference)
    return folder, reference


def results(folder, reference, dtype="float32"):
    tensors, texts = verify.stages(*verify.load(folder, getattr(torch, dtype)))
    return list(verify.compare_all(tensors, texts, verify.TOLERANCES[dtype], reference))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_sound_folder_agrees(sound, dtype):
    verdicts = results(*sound, dtype)
    assert len(verdicts) > 25 and not [one for one in verdicts if not one.ok]


def test_float32_is_far_below_its_bound(sound):
    assert max(one.error or 0 for one in results(*sound)) < verify.TOLERANCES["float32"] / 2


def in_file(name, old, new):
    def plant(folder):
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) >= 1, f"{name} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return plant


def in_config(part, **values):
    def plant(folder):
        config = json.loads((folder / "config.json").read_bytes())
        config[part].update(values)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return plant


def in_weights(name, change):
    def plant(folder):
        for path in folder.glob("model*.safetensors"):
            tensors = load_file(path)
            if name in tensors:
                tensors[name] = change(tensors[name])
                save_file(tensors, path, metadata={"format": "pt"})
                return
        raise AssertionError(name)

    return plant


def swap_two_ranks(folder):
    lines = (folder / "tiktoken.model").read_text(encoding="utf-8").splitlines()
    (one, rank), (other, other_rank) = lines[50].split(), lines[60].split()
    lines[50], lines[60] = f"{one} {other_rank}", f"{other} {rank}"
    lines[50], lines[60] = lines[60], lines[50]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n", encoding="utf-8")


LAYER = "language_model.model.layers.1"
FAULTS = {
    "two tokens swapped": (swap_two_ranks, "tokenizer"),
    "a newline in the template": (in_file("chat_template.jinja", "'<think>'", "'<think>\\n'"), "template"),
    "other pixel statistics": (
        in_file("preprocessor_config.json", '"image_mean": [\n      0.5', '"image_mean": [\n      0.48'),
        "pixels.pixel_values",
    ),
    "exact GELU in the tower": (
        in_file("kimi_vision.py", 'approximate="tanh"', 'approximate="none"'),
        "vision.block.0",
    ),
    "no mean over time": (in_file("kimi_vision.py", ".mean(dim=0)", "[0]"), "vision.merged"),
    "tanh GELU in the projector": (
        in_file("kimi_vision.py", "nn.GELU()", 'nn.GELU(approximate="tanh")'),
        "projector",
    ),
    "another eps": (in_config("text_config", rms_norm_eps=1e-4), "decoder.0.input_layernorm"),
    "rotated pairs swapped": (
        in_file(
            "modeling_kimi.py",
            "first, second = x[..., 0::2].float(), x[..., 1::2].float()",
            "second, first = x[..., 0::2].float(), x[..., 1::2].float()",
        ),
        "decoder.0.self_attn",
    ),
    "the router's bias in its weights": (
        in_file(
            "modeling_kimi.py",
            "topk_weights = scores.gather",
            "topk_weights = (scores + bias).gather",
        ),
        "decoder.1.router_weights",
    ),
    "no bias in the choice": (
        in_file("modeling_kimi.py", "choice = scores + bias", "choice = scores - bias"),
        "decoder.1.router_ids",
    ),
    "nibbles off by one": (
        in_file("kimi_int4.py", "(octets & 15, octets >> 4)", "(octets >> 4, octets & 15)"),
        "decoder.1.experts",
    ),
    "scales transposed": (
        in_weights(
            f"{LAYER}.mlp.experts.3.gate_proj.weight_scale",
            lambda scale: scale.T.reshape(scale.shape).contiguous(),
        ),
        "decoder.1.experts",
    ),
    "a transposed head": (
        in_weights("language_model.lm_head.weight", lambda weight: weight.flip(0).contiguous()),
        "logits",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_named_first(sound, tmp_path, fault):
    plant, stage = FAULTS[fault]
    folder = shutil.copytree(sound[0], tmp_path / fault.replace(" ", "_").replace("'", ""))
    plant(folder)
    verdicts = results(folder, sound[1])
    first = next((one for one in verdicts if not one.ok), None)
    assert first is not None and first.stage == stage, verify.report(verdicts)


# ------------------------------------------------------------------------------------------------------ dumps, endpoints


def test_a_dump_of_a_port_is_compared_as_far_as_it_goes(sound, tmp_path, monkeypatch, capsys):
    folder, reference = sound
    monkeypatch.setattr(verify, "REFERENCE", reference)
    monkeypatch.setattr(verify.compare_all, "__defaults__", (reference,))
    dump = tmp_path / "dump.safetensors"
    assert verify.main([str(folder), "--dump", str(dump)]) == 0
    assert verify.main([str(dump)]) == 0
    tensors = load_file(dump)
    tensors["decoder.1.self_attn"][8] += 1
    for name in ("decoder.0.mlp", "logits"):
        del tensors[name]
    save_file(tensors, dump)
    capsys.readouterr()
    assert verify.main([str(dump)]) == 1
    assert "first stage that differs is decoder.1.self_attn" in capsys.readouterr().out


def test_a_wrong_shape_and_nan_are_differences():
    want = torch.ones(3, 4)
    assert "shape (4, 3), expected (3, 4)" in verify.compare("x", want, torch.ones(4, 3), 1).says
    assert not verify.compare("x", want, torch.full((3, 4), torch.nan), 1).ok


class Endpoint(BaseHTTPRequestHandler):
    """Answers as was recorded; `change` plants a fault."""

    replies: ClassVar[list] = []

    def do_GET(self):
        self.reply({"data": [{"id": "kimi"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        answer = next(one for one in self.replies if one["question"] == question)
        message = {"content": answer["content"], "reasoning_content": answer["reasoning"]}
        self.reply({"choices": [{"message": message}], "usage": {"prompt_tokens": answer["prompt_tokens"]}})

    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("fault", [None, "content", "prompt_tokens"])
def test_an_endpoint_is_asked(sound, monkeypatch, fault):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where no proxy listens
    answers = json.loads((sound[1] / "stages.json").read_bytes())["answers"]
    Endpoint.replies = [dict(answer) for answer in answers]
    if fault:
        Endpoint.replies[2][fault] = 7 if fault == "prompt_tokens" else "7"
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(verify.compare_all, "__defaults__", (sound[1],))
    try:
        verdicts = list(verify.verdicts(f"http://127.0.0.1:{server.server_port}/v1", "float32"))
    finally:
        server.shutdown()
        server.server_close()
    wrong = [one.stage for one in verdicts if not one.ok]
    assert wrong == ([] if fault is None else [f"answer {answers[2]['question'][:24]!r} {fault}"])


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *((host, True) for host in ("localhost", "127.0.0.1", "127.9.9.9", "[::1]", "0.0.0.0")),
        *((host, False) for host in ("10.0.0.1", "localhost.example", "127.0.0.1.example")),
    ],
)
def test_which_addresses_are_asked_past_a_proxy(host, here):
    assert verify.is_this_machine(f"http://{host}:8000/v1") == here


def test_what_cannot_be_asked_is_said(capsys):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        assert verify.main([f"http://127.0.0.1:{silent.getsockname()[1]}/v1"]) == 2
    assert "gives no usable answer" in capsys.readouterr().err
    assert verify.main(["ftp://somewhere/v1"]) == 2
    assert "neither http nor https" in capsys.readouterr().err


def test_the_record_in_the_repository_is_of_kimi_tiny():
    """The shipped values belong to the shipped weights."""
    verdicts = list(verify.verdicts(str(verify.ROOT / "kimi-tiny"), "float32"))
    assert not [one for one in verdicts if not one.ok]
