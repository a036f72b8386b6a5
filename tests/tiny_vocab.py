"""A folder with all that the tokenizer needs, around a small vocabulary trained on the spot."""

import json
import shutil
from pathlib import Path

from conftest import ROOT
from kimi.tiny_vocabulary import write_tiny_tiktoken

PUBLISHED_BASE = 163584


def write_tokenizer_folder(folder: Path) -> int:
    """tiktoken.model, tokenizer_config.json with matching ids, the template and the code; returns the first reserved id."""
    folder.mkdir(parents=True, exist_ok=True)
    base = write_tiny_tiktoken(folder / "tiktoken.model")
    config = json.loads((ROOT / "tokenizer_config.json").read_text())
    tokens = config["added_tokens_decoder"].items()
    config["added_tokens_decoder"] = {str(int(i) - PUBLISHED_BASE + base): token for i, token in tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("chat_template.jinja", "tokenization_kimi.py"):
        shutil.copy(ROOT / name, folder)
    return base
