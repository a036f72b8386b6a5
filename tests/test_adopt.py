"""scripts.adopt: this repository's code put beside weights that came with other code, and back; nothing else changes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from test_remote_code import fresh_process

from scripts import adopt
from scripts.check import check_folder
from scripts.tiny_checkpoint import ROOT, files_beside_weights, write_json, write_tiny_checkpoint

FOREIGN_CODE = (
    "configuration_deepseek.py",
    "modeling_kimi_k25.py",
    "kimi_k25_processor.py",
    "tool_declaration_ts.py",
)
MEDIA_MAP = {
    "AutoProcessor": "kimi_k25_processor.KimiK25Processor",
    "AutoImageProcessor": "kimi_k25_vision_processing.KimiK25VisionProcessor",
}
LOAD = """
import json, sys
from transformers import AutoModelForCausalLM, AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto")
inputs = processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, return_dict=True)
out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
print(json.dumps([type(model).__name__, type(processor).__name__, out.shape[1] - inputs["input_ids"].shape[1]]))
"""


def edit(path, change):
    content = json.loads(path.read_bytes())
    change(content)
    write_json(path, content)


def make_foreign(folder):
    """The folder as if downloaded: code under other names, which fails when it is imported, and its configs."""
    for path in files_beside_weights():
        if path.suffix == ".py":
            (folder / path.name).unlink()
    for name in (*FOREIGN_CODE, "tokenization_kimi.py"):
        (folder / name).write_text("raise RuntimeError('code of another repository')\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (folder / "README.md").write_text("# A model card\n", encoding="utf-8")
    write_json(
        folder / "processor_config.json", {"processor_class": "KimiK25Processor", "auto_map": MEDIA_MAP}
    )

    def change_config(config):
        end = config["eos_token_id"]
        config["auto_map"] = {"AutoConfig": "configuration_kimi_k25.KimiK25Config"}
        config["text_config"]["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
        config["eos_token_id"] = config["text_config"]["eos_token_id"] = end - 1
        config["text_config"]["attention_dropout"] = 0.5
        del config["tie_word_embeddings"]

    edit(folder / "config.json", change_config)
    edit(folder / "preprocessor_config.json", lambda c: c.update(auto_map=MEDIA_MAP))
    edit(folder / "preprocessor_config.json", lambda c: c["media_proc_cfg"].update(sample_fps=1.0))
    edit(folder / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["a.B", None]}))
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="{{ 'old' }}"))
    eos = json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"]
    write_json(folder / "generation_config.json", {"max_length": 4096, "eos_token_id": eos[1]})


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("adopt") / "original")
    make_foreign(folder)
    return folder


@pytest.fixture
def folder(downloaded, tmp_path):
    return shutil.copytree(downloaded, tmp_path / "a model with spaces")


def contents(folder):
    """Everything below a folder: bytes of files, texts of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def run(*arguments):
    return adopt.main([str(argument) for argument in arguments])


def read(folder, name):
    return json.loads((folder / name).read_bytes())


def test_a_dry_run_tells_every_field_and_writes_nothing(folder, capsys):
    before = contents(folder)
    assert run(folder) == 0
    assert contents(folder) == before
    out = capsys.readouterr().out
    lines = " ".join(out.split())
    assert (
        'auto_map.AutoConfig: "configuration_kimi_k25.KimiK25Config" -> "configuration_kimi.KimiK25Config"'
        in lines
    )
    assert (
        'text_config.auto_map: {"AutoConfig": "configuration_deepseek.DeepseekV3Config"} -> (none)' in lines
    )
    assert "tie_word_embeddings: (none) -> false" in lines
    assert "text_config.attention_dropout: 0.5 kept (in this repository 0.0)" in lines
    assert "media_proc_cfg.sample_fps: 1.0 kept (in this repository 2.0)" in lines
    assert "temperature: (none) -> 1.0" in lines and "max_length: 4096 kept" in lines
    assert (
        "replace chat_template.jinja, tokenization_kimi.py" in lines
        and "leave configuration_deepseek.py" in lines
    )
    assert "A dry run" in out and "--write does it" in out
    assert len(out[out.index("from transformers import") :].strip().splitlines()) == 4


def test_written_it_passes_and_loads(folder, tmp_path, capsys):
    weights = {
        name: data for name, data in contents(folder).items() if name.startswith(("model", "tiktoken"))
    }
    assert run(folder, "--write") == 0
    assert all(finding.ok for finding in check_folder(folder))
    assert {name: contents(folder)[name] for name in weights} == weights
    text = read(folder, "config.json")["text_config"]
    assert text["attention_dropout"] == 0.5 and text["num_hidden_layers"] == 3
    assert read(folder, "preprocessor_config.json")["media_proc_cfg"]["sample_fps"] == 1.0
    assert "chat_template" not in read(folder, "tokenizer_config.json")
    for name in FOREIGN_CODE:
        assert (folder / name).is_file()
    cache = tmp_path / "modules"
    cache.mkdir()
    names = ["KimiK25ForConditionalGeneration", "KimiK25Processor", 2]
    assert fresh_process(LOAD, folder, cache=cache) == names


def test_the_four_lines_load_it(folder, tmp_path, capsys):
    assert run(folder, "--write") == 0
    out = capsys.readouterr().out
    cache = tmp_path / "modules"
    cache.mkdir()
    lines = out[out.index("from transformers import") :]
    assert fresh_process(f"{lines}\nprint('[]' if model and processor else '')", cache=cache) == []


@pytest.mark.parametrize("links", [False, True])
def test_undo_restores_every_byte(folder, links):
    before = contents(folder)
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(folder, "--write", *["--links"][: int(links)]) == 0
    assert contents(folder) != before and (folder / adopt.BACKUP / adopt.MANIFEST).is_file()
    assert run(folder, "--undo") == 0
    assert contents(folder) == before and not (folder / adopt.BACKUP).exists()
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_links_point_to_this_clone(folder):
    assert run(folder, "--write", "--links") == 0
    for source in files_beside_weights():
        linked = source.name != "preprocessor_config.json"
        assert (folder / source.name).is_symlink() == linked
        if linked:
            assert os.path.samefile(folder / source.name, source)
    assert all(finding.ok for finding in check_folder(folder))


@pytest.mark.parametrize("options", [[], ["--links"]])
def test_a_second_run_changes_nothing(folder, options, capsys):
    assert run(folder, "--write", *options) == 0
    once = contents(folder)
    capsys.readouterr()
    assert run(folder, "--write", *options) == 0
    assert contents(folder) == once
    assert "There is nothing to change." in capsys.readouterr().out


def test_links_and_copies_take_turns(folder):
    before = contents(folder)
    assert run(folder, "--write") == 0
    assert run(folder, "--write", "--links") == 0
    assert (folder / "modeling_kimi.py").is_symlink()
    assert run(folder, "--undo") == 0
    assert contents(folder) == before


def test_undo_refuses_what_was_changed_since(folder, capsys):
    assert run(folder, "--write") == 0
    with (folder / "kimi_tools.py").open("a", encoding="utf-8") as file:
        file.write("# mine\n")
    edited = contents(folder)
    assert run(folder, "--undo") == 2
    assert "kimi_tools.py changed since --write; nothing was restored" in capsys.readouterr().err
    assert contents(folder) == edited
    assert run(folder, "--write") == 2
    assert "kimi_tools.py changed since an earlier --write" in capsys.readouterr().err
    assert contents(folder) == edited


def test_undo_refuses_a_damaged_backup(folder, capsys):
    assert run(folder, "--write") == 0
    (folder / adopt.BACKUP / "config.json").unlink()
    written = contents(folder)
    assert run(folder, "--undo") == 2
    assert "config.json is not the file that was kept there" in capsys.readouterr().err
    assert contents(folder) == written


def test_undo_without_a_run_before(folder, capsys):
    assert run(folder, "--undo") == 2
    assert "there is nothing to undo" in capsys.readouterr().err


def kill_before_move(monkeypatch, moves):
    """The process is killed when it has moved `moves` files into place and would move the next."""
    left, move = [moves], os.replace

    def dying(source, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        move(source, target)

    monkeypatch.setattr(os, "replace", dying)


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 8, 20])
@pytest.mark.parametrize("then", ["--undo", "--write"])
def test_after_a_crash_it_can_be_undone_or_completed(folder, moves, then, monkeypatch):
    """Killed before the n-th file is moved into place: the first is the manifest, then come files and their backups."""
    before = contents(folder)
    kill_before_move(monkeypatch, moves)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "--write")
    monkeypatch.undo()
    if then == "--write":
        assert run(folder, "--write") == 0
        assert all(finding.ok for finding in check_folder(folder))
    if then == "--write" or moves:
        assert run(folder, "--undo") == 0
    else:
        assert run(folder, "--undo") == 2  # the manifest was not there yet, so nothing was changed
        shutil.rmtree(folder / adopt.BACKUP)
    assert contents(folder) == before


@pytest.mark.parametrize("moves", [1, 3])
def test_an_undo_that_was_killed_can_be_repeated(folder, moves, monkeypatch):
    before = contents(folder)
    assert run(folder, "--write") == 0
    kill_before_move(monkeypatch, moves)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "--undo")
    monkeypatch.undo()
    assert run(folder, "--undo") == 0
    assert contents(folder) == before


def test_a_newer_version_of_this_repository(folder, monkeypatch):
    """What an earlier version put there is replaced, or removed where there is no such file any more."""
    before = contents(folder)
    sources = files_beside_weights()
    other = folder.parent / "kimi_gone.py"
    other.write_text("# of an earlier version\n", encoding="utf-8")
    older = folder.parent / "kimi_tools.py"
    older.write_text("# of an earlier version\n", encoding="utf-8")
    earlier = [older if path.name == older.name else path for path in sources]
    with monkeypatch.context() as patch:
        patch.setattr(adopt, "files_beside_weights", lambda: [*earlier, other])
        assert run(folder, "--write") == 0
    assert (folder / "kimi_gone.py").is_file()
    assert run(folder, "--write") == 0
    assert not (folder / "kimi_gone.py").exists()
    assert (folder / "kimi_tools.py").read_bytes() == (ROOT / "kimi_tools.py").read_bytes()
    assert run(folder, "--undo") == 0
    assert contents(folder) == before


def test_settings_changed_by_the_user_stay(folder):
    assert run(folder, "--write") == 0
    edit(folder / "generation_config.json", lambda c: c.update(temperature=0.5))
    assert run(folder, "--write") == 0
    assert read(folder, "generation_config.json")["temperature"] == 0.5


@pytest.fixture
def snapshot(downloaded, tmp_path):
    """A folder of the Hub's cache: links by relative paths into blobs, which carry the name of their content."""
    blobs, revision = (
        tmp_path / "models--x--y" / "blobs",
        tmp_path / "models--x--y" / "snapshots" / ("a" * 40),
    )
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    for path in downloaded.iterdir():
        data = path.read_bytes()
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (revision / path.name).symlink_to(f"../../blobs/{blob.name}")
    return revision


@pytest.mark.parametrize("options", [[], ["--links"]])
def test_blobs_of_the_hub_cache_are_never_written(snapshot, tmp_path, options):
    blobs, before = contents(snapshot.parents[1] / "blobs"), contents(snapshot)
    assert run(snapshot, "--write", *options) == 0
    assert contents(snapshot.parents[1] / "blobs") == blobs
    assert not (snapshot / "config.json").is_symlink() and (snapshot / "tiktoken.model").is_symlink()
    cache = tmp_path / "modules"
    cache.mkdir()
    assert fresh_process(LOAD, snapshot, cache=cache)[0] == "KimiK25ForConditionalGeneration"
    assert run(snapshot, "--undo") == 0
    assert contents(snapshot) == before and contents(snapshot.parents[1] / "blobs") == blobs


REFUSED = {
    "sizes that its weights do not have": (
        lambda f: edit(f / "config.json", lambda c: c["text_config"].update(n_routed_experts=12)),
        1,
        "n_routed_experts 12",
    ),
    "a lost shard": (lambda f: sorted(f.glob("model*.safetensors"))[1].unlink(), 1, "which no shard has"),
    "no config": (lambda f: (f / "config.json").unlink(), 2, "config.json is missing"),
    "another model": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="llama")),
        2,
        "model_type 'llama'; this code is for 'kimi_k25'",
    ),
    "no sizes": (
        lambda f: edit(f / "config.json", lambda c: c.pop("text_config")),
        2,
        "text_config.vocab_size",
    ),
    "a folder where a file belongs": (lambda f: (f / "kimi_pool.py").mkdir(), 2, "is not a file"),
    "a folder of the backup's name": (
        lambda f: shutil.copytree(ROOT / "reference", f / adopt.BACKUP),
        2,
        "is not from this command",
    ),
}


@pytest.mark.parametrize("fault", list(REFUSED))
def test_what_cannot_be_adopted_is_refused_and_untouched(folder, fault, capsys):
    plant, status, says = REFUSED[fault]
    plant(folder)
    before = contents(folder)
    assert run(folder, "--write") == status
    out, error = capsys.readouterr()
    assert says in out + error, out + error
    assert contents(folder) == before


def test_this_repository_is_refused(capsys):
    assert run(ROOT, "--write") == 2
    assert "is this repository itself" in capsys.readouterr().err
    assert run("/nowhere/at/all") == 2


def test_kimi_tiny_needs_nothing(capsys):
    for options in ([], ["--links"]):
        assert run(ROOT / "kimi-tiny", *options) == 0
        assert "There is nothing to change." in capsys.readouterr().out


def test_a_read_only_folder_is_named(folder, monkeypatch, capsys):
    before = contents(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    assert run(folder) == 0
    assert run(folder, "--write") == 2
    assert "is read-only for this user; nothing was written" in capsys.readouterr().err
    assert contents(folder) == before


def test_missing_configs_are_added_for_the_vocabulary(folder):
    for name in ("generation_config.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    before = contents(folder)
    assert run(folder, "--write") == 0
    assert all(finding.ok for finding in check_folder(folder))
    assert run(folder, "--undo") == 0
    assert contents(folder) == before
