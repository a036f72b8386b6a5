"""Runs a notebook's code cells in this process and stores what they print and show.

    python examples/run_notebook.py examples/card_examples.ipynb

For notebooks that use plain Python and `display(image, ...)`; it needs no Jupyter.
"""

import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def image_output(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<PIL.Image.Image>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def run_cells(cells: list[dict[str, Any]]) -> None:
    """Fills `outputs` and `execution_count` of the code cells, in order, in one namespace."""
    shown: list[dict[str, Any]] = []
    names = {"__name__": "__main__", "display": lambda *images: shown.extend(map(image_output, images))}
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        shown.clear()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"code cell {number}", "exec"), names)
        text = printed.getvalue()
        stream = {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
        cell["outputs"] = ([stream] if text else []) + list(shown)
        cell["execution_count"] = number + 1


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    notebook = json.loads(path.read_bytes())
    os.chdir(path.parent)
    run_cells(notebook["cells"])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
