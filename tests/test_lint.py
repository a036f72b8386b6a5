"""make lint sees a wrong call of a function that is in another file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

# Without the files that import torch this takes seconds; mypy reads torch and transformers for half a minute.
NEEDED = ("kimi_output.py", "kimi.py", "Makefile", "pyproject.toml")
WRONG = """from {package}kimi_output import name_of_call


def planted() -> None:
    name_of_call(7)
"""
# File -> how it imports the flat files.
PLANTED = {
    "kimi_planted.py": ".",
    "planted_kimi.py": ".",
    "serve/planted.py": "kimi.",
    "scripts/planted.py": "kimi.",
    "benchmarks/planted.py": "kimi.",
    "examples/train_tiny/planted.py": "kimi.",
}


@pytest.fixture
def copy(tmp_path):
    """The parts of this repository that lint needs, and an environment that make takes for ready."""
    for path in [*(ROOT / name for name in NEEDED), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.executable).parent)
    for name in ("ready", "ready-dev"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def plant(folder, source):
    for name, package in PLANTED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source.format(package=package), encoding="utf-8")


def make_lint(folder):
    environment = {**os.environ, "MYPY_CACHE_DIR": str(folder / "cache")}
    return subprocess.run(
        ["make", "lint"], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_wrong_call_of_another_files_function_fails(copy):
    plant(copy, WRONG)
    wrong = make_lint(copy)
    assert wrong.returncode, wrong.stdout + wrong.stderr
    for name in PLANTED:
        place = name if "/" in name else f".types/kimi/{name}"
        assert f'{place}:5: error: Argument 1 to "name_of_call" has incompatible type' in wrong.stdout
    plant(copy, WRONG.replace("7", '"functions.read:7"'))
    right = make_lint(copy)
    assert not right.returncode, right.stdout + right.stderr
