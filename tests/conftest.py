"""Places that the tests share. The repository itself is the package `kimi` (see kimi.py)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data"
