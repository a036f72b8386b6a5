"""A folder with all that the tokenizer needs, around a small vocabulary trained on the spot."""

from pathlib import Path

from kimi.tiny_checkpoint import PUBLISHED_BASE, write_tokenizer

__all__ = ["PUBLISHED_BASE", "write_tokenizer_folder"]


def write_tokenizer_folder(folder: Path) -> int:
    """tiktoken.model, tokenizer_config.json with matching ids, the template and the code; returns the first reserved id."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_tokenizer(folder)
