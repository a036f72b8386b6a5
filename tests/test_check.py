"""scripts.check: a good folder passes, and each thing that can be wrong with a download is named."""

import json
import shutil

import pytest

from scripts.check import check_folder, main
from scripts.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("check") / "good", max_shard_size="1MB")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def test_a_good_folder_passes(good, capsys):
    assert main([str(good)]) == 0
    assert "All 10 checks passed" in capsys.readouterr().out


def test_json_says_the_same(good, capsys):
    assert main([str(good), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and len(report["findings"]) == 10


def edit(path, change):
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def truncate(folder):
    shard = sorted(folder.glob("model*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)


def append(folder):
    with sorted(folder.glob("model*.safetensors"))[0].open("ab") as file:
        file.write(b"x")


def swap_shards(folder):
    def change(index):
        names = list(index["weight_map"])
        index["weight_map"][names[0]], index["weight_map"][names[-1]] = (
            index["weight_map"][names[-1]],
            index["weight_map"][names[0]],
        )

    edit(folder / "model.safetensors.index.json", change)


FAULTS = {
    "a truncated shard": (truncate, "shards", "truncated"),
    "bytes behind a shard": (append, "shards", "its header accounts for"),
    "a lost shard": (
        lambda f: sorted(f.glob("model*.safetensors"))[2].unlink(),
        "index",
        "which no shard has",
    ),
    "a wrong index": (swap_shards, "index", "it is in"),
    "a wrong total": (
        lambda f: edit(f / "model.safetensors.index.json", lambda i: i["metadata"].update(total_size=5)),
        "index",
        "states 5 bytes",
    ),
    "another size": (
        lambda f: edit(f / "config.json", lambda c: c["text_config"].update(n_routed_experts=12)),
        "tensors",
        "n_routed_experts 12",
    ),
    "a stop token that never comes": (
        lambda f: edit(f / "config.json", lambda c: c["text_config"].update(eos_token_id=1)),
        "special tokens",
        "which is not <|im_end|>",
    ),
    "a pointer instead of the vocabulary": (
        lambda f: (f / "tiktoken.model").write_text(
            "version https://git-lfs.github.com/spec/v1\n", encoding="utf-8"
        ),
        "tiktoken.model",
        "Git LFS",
    ),
    "a template with a newline too many": (
        lambda f: (f / "chat_template.jinja").write_text(
            (f / "chat_template.jinja").read_text(encoding="utf-8").replace("'<think>'", "'<think>\\n'"),
            encoding="utf-8",
        ),
        "chat template",
        "renders",
    ),
    "no settings for pictures": (
        lambda f: edit(f / "preprocessor_config.json", lambda c: c["media_proc_cfg"].pop("image_mean")),
        "preprocessor_config.json",
        "lacks image_mean",
    ),
    "generation without an end": (
        lambda f: edit(f / "generation_config.json", lambda c: c.update(eos_token_id=3)),
        "generation_config.json",
        "lacks <|im_end|>",
    ),
    "missing code": (lambda f: (f / "kimi_experts.py").unlink(), "code", "kimi_experts.py missing"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_what_is_wrong_is_named(folder, fault):
    plant, what, says = FAULTS[fault]
    plant(folder)
    bad = {finding.what: finding.says for finding in check_folder(folder) if not finding.ok}
    assert what in bad and says in bad[what], bad


def test_a_folder_that_is_not_there():
    assert main(["/nowhere/at/all"]) == 1
