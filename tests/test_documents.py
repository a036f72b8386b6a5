"""The documents say what is there: links, pictures, file names, modules, and the README's code.

docs/history.md names the files of its days and is read for its links alone.
"""

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from clips import write_clip
from conftest import ROOT

README = ROOT / "README.md"
DOCUMENTS = sorted([README, *(ROOT / "docs").glob("*.md")])
CURRENT = [path for path in DOCUMENTS if path.name != "history.md"]
MAX_WORDS = 1200  # of the README, as `wc -w` counts them
FOLDERS = (
    "docs",
    "serve",
    "scripts",
    "csrc",
    "tests",
    "benchmarks",
    "examples",
    "kimi-tiny",
    "reference",
    ".ci",
)
OF_OTHERS = {"convert_hf_to_gguf.py"}  # llama.cpp's

LINK = re.compile(r"\]\(([^)\s]+)\)")
# A file `name.py` or `folder/name`, folders included; not the middle of a longer path or name.
PYTHON_FILE = re.compile(r"(?<![\w./*-])[\w/-]+\.py\b")
IN_A_FOLDER = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/(?:[\w.-]+/?)*")
NAMED_IN_CODE = re.compile(r"(?<![\w./{}*-])(?:docs/)?\w+\.md\b|\b(?:kimi_\w+|\w+_kimi)\.py\b")
MODULE = re.compile(r"python -m ((?:scripts|serve|examples|benchmarks|tests)[\w.]*)|`(scripts\.\w+)")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tracked(*patterns: str) -> list[Path]:
    """Files under version control, so that what else is in a checkout (environments, caches) does not count."""
    try:
        command = ["git", "ls-files", "-z", "--", *patterns]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this is no git checkout ({error})")
    return [path for name in names.split("\0") if name and (path := ROOT / name).exists()]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the Hub make it."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_picture_exists(path):
    for target in LINK.findall(read(path)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", read(there), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path):
    text = read(path)
    names = {*PYTHON_FILE.findall(text), *IN_A_FOLDER.findall(text)} - OF_OTHERS
    assert sorted(name for name in names if not (ROOT / name.rstrip(".")).exists()) == []


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_every_module_that_is_run_exists(path):
    names = {first or second for first, second in MODULE.findall(read(path))}
    assert [name for name in sorted(names) if not is_module(name)] == []


def is_module(name: str) -> bool:
    """Whether `python -m name` would find it."""
    place = ROOT.joinpath(*name.rstrip(".").split("."))
    return place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()


def test_the_table_of_files_lists_the_whole_root():
    text = read(ROOT / "docs" / "files.md")
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    names = {f"{name}/" if (ROOT / name).is_dir() else name for name in names}
    assert len(names) > 20
    assert sorted(name for name in names if not re.search(rf"`{re.escape(name)}", text)) == []


def test_readme_is_short():
    assert len(read(README).split()) <= MAX_WORDS
    before_code = read(README).partition("---\n\n")[2].partition("```")[0]
    assert before_code.count("\n") <= 40


def test_code_names_no_file_that_is_gone():
    """In comments, docstrings and messages: documents, and files that transformers loads. Tests invent names."""
    gone = []
    for path in tracked("*.py", "*.jinja", "*.toml", "*.txt", "Makefile", ".ci/*"):
        if not path.is_symlink() and ROOT / "tests" not in path.parents:
            places = (ROOT, path.parent, ROOT / "docs")
            names = set(NAMED_IN_CODE.findall(read(path)))
            gone += [f"{path.name}: {name}" for name in names if not any((p / name).exists() for p in places)]
    assert sorted(gone) == []


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    """All of it in order, as one program, with kimi-tiny as the folder."""
    blocks = re.findall(r"^```python\n(.*?)^```$", read(README), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks)
    assert len(blocks) >= 4 and code.count('"path/to/Kimi-K2.7-Code"') == 1
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (84, 84), "red").save("photo.jpg")
    write_clip(tmp_path / "clip.mp4", num_frames=30, size=(84, 84))
    names: dict = {}
    code = code.replace('"path/to/Kimi-K2.7-Code"', repr(str(ROOT / "kimi-tiny")))
    exec(compile(code, "README.md", "exec"), names)
    assert {"reasoning_content", "content", "status"} <= names["message"].keys()
    assert names["inputs"]["grid_thws"].tolist() == [[1, 6, 6], [2, 6, 6]]
    assert (tmp_path / "routing.safetensors").is_file()
