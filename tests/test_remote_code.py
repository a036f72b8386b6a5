"""The entry points by `Auto*.from_pretrained(..., trust_remote_code=True)`, in a fresh process with an empty cache."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from scripts.tiny_checkpoint import write_tiny_checkpoint

HARD = {"torch", "transformers", "safetensors", "tiktoken", "accelerate", "PIL", "numpy", "huggingface_hub"}
SOURCES = {path.stem: path for path in [*ROOT.glob("*_kimi.py"), *ROOT.glob("kimi_*.py")]}
ENTRY_POINTS = sorted(name for name in SOURCES if name.endswith("_kimi"))

USE_EVERY_ENTRY_POINT = """
import sys, json, torch, transformers
from transformers import AutoConfig, AutoTokenizer
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "kimi_k25" and config.text_config.vocab_size == config.vocab_size
assert getattr(config, "quantization_config", None) is None
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], return_tensors="pt", return_dict=True)
answers = {}
for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
    auto = getattr(transformers, name, None)
    if auto is None:
        assert transformers.__version__.startswith("4.") and name == "AutoModelForMultimodalLM", name
        continue
    model, info = auto.from_pretrained(folder, trust_remote_code=True, device_map="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "KimiK25ForConditionalGeneration"
    answers[name] = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist()
assert len(set(map(tuple, answers.values()))) == 1, answers
with torch.no_grad():
    logits = model(**prompt).logits
if len(sys.argv) > 2:
    model.save_pretrained(sys.argv[2])
    tokenizer.save_pretrained(sys.argv[2])
print(json.dumps({"answer": answers["AutoModel"], "sum": logits.double().sum().item()}))
"""


def fresh_process(code, *args, cache):
    """Runs code with no trace of this repository on its path, and no module that was copied earlier."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("remote") / "tiny")


def test_every_entry_point_from_a_folder_and_again_from_what_it_saved(folder, tmp_path):
    caches = [tmp_path / name for name in ("cache", "other_cache")]
    for cache in caches:
        cache.mkdir()
    first = fresh_process(USE_EVERY_ENTRY_POINT, folder, tmp_path / "saved", cache=caches[0])
    second = fresh_process(USE_EVERY_ENTRY_POINT, tmp_path / "saved", cache=caches[1])
    assert first == second
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    closure = {f"{name}.py" for entry in ENTRY_POINTS for name in reachable(entry)} & {
        p.name for p in folder.iterdir()
    }
    used = {"modeling_kimi", "tokenization_kimi", "configuration_kimi"}
    needed = {f"{name}.py" for entry in used for name in reachable(entry)}
    assert needed <= saved and needed <= closure
    assert {"tiktoken.model", "chat_template.jinja", "tokenizer_config.json", "config.json"} <= saved
    config = json.loads((tmp_path / "saved" / "config.json").read_bytes())
    assert config["auto_map"] == json.loads((folder / "config.json").read_bytes())["auto_map"]


# ------------------------------------------------------------------------------------- what the loader can cope with


def siblings_named_in(name):
    """What transformers finds by its regular expression over the text, docstrings included."""
    text = SOURCES[name].read_text(encoding="utf-8")
    return set(re.findall(r"^\s*(?:from|import)\s+\.(\w+)", text, re.MULTILINE))


def reachable(name, seen=None):
    seen = {name} if seen is None else seen
    for sibling in siblings_named_in(name) - seen:
        seen.add(sibling)
        reachable(sibling, seen)
    return seen


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_an_entry_point_names_its_whole_closure(entry):
    """4.57 copies from a local folder only what the entry file names itself."""
    assert siblings_named_in(entry) == reachable(entry) - {entry}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_are_of_a_kind_the_loader_understands(name):
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        for part in block.body
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and node.module in SOURCES, ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in guarded:
            modules = (
                [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            )
            for module in modules:
                top = module.split(".")[0]
                assert top in HARD or top in sys.stdlib_module_names, f"{name} imports {module} unguarded"


@pytest.mark.parametrize("name", SOURCES)
def test_no_docstring_line_looks_like_an_import(name):
    """The loader's scan would take it for one and look for the file."""
    real = {
        f".{node.module}"
        for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8")))
        if relative(node)
    }
    assert {f".{sibling}" for sibling in siblings_named_in(name)} == real


def relative(node):
    return isinstance(node, ast.ImportFrom) and node.level == 1


def test_config_json_is_complete_and_unchanged_by_the_config_class(folder):
    """Every key of the file survives a load and a save, with its value."""
    from kimi.configuration_kimi import KimiK25Config

    def missing(want, got, path=""):
        for key, value in want.items():
            at = f"{path}.{key}" if path else key
            if isinstance(value, dict):
                yield from missing(value, got.get(key, {}), at)
            elif got.get(key, "nothing") != value:
                yield at, value, got.get(key)

    raw = json.loads((ROOT / "config.json").read_bytes())
    again = json.loads(KimiK25Config.from_pretrained(ROOT).to_json_string(use_diff=True))
    # The published file asks for a package that most people lack; saving does not ask for it.
    assert [at for at, _, _ in missing(raw, again)] == ["vision_config._attn_implementation"]


def files_of_the_repository(*suffixes):
    """Without what else may be in a checkout: environments, caches."""
    for path in ROOT.rglob("*"):
        folders = path.relative_to(ROOT).parts[:-1]
        foreign = any(name.startswith((".", "__")) or "venv" in name for name in folders)
        if path.suffix in suffixes and path.is_file() and not foreign:
            yield path


def test_nothing_speaks_of_this_machine():
    paths = list(files_of_the_repository(".py", ".md", ".json", ".toml", ".jinja", ".txt"))
    assert len(paths) > 100
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert "/work/" not in text or path == Path(__file__), path


def test_text_is_utf_8_whatever_the_locale():
    """JSON may also be read as bytes, which json.loads takes for UTF-8."""
    for path in files_of_the_repository(".py"):
        for call in ast.walk(ast.parse(path.read_bytes())):
            name = getattr(getattr(call, "func", None), "attr", None)
            if isinstance(call, ast.Call) and name in ("read_text", "write_text"):
                named = any(keyword.arg == "encoding" for keyword in call.keywords)
                assert named, f"{path.name}:{call.lineno} {ast.unparse(call)}"
