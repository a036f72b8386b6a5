"""The notebooks of examples/ run from a clone: their code cells in order, and what they stored is what they show."""

import json
import sys

import pytest
from PIL import Image

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order_and_print_what_is_stored(path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", sys.path[:])
    shown = []
    names = {"__name__": "__main__", "display": lambda *images: shown.extend(images)}
    for number, cell in enumerate(code_cells(path)):
        shown.clear()
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
        # Sizes of encoded files differ between versions of the encoder.
        assert without_bytes(capsys.readouterr().out) == without_bytes(printed(cell)), f"code cell {number}"
        stored = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(shown) == len(stored), f"code cell {number}"
        assert all(isinstance(image, Image.Image) for image in shown)


def without_bytes(text):
    return [line for line in text.splitlines() if not line.rstrip().endswith(" bytes")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_and_is_small(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert path.stat().st_size < 600_000
