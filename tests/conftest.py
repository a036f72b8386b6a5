"""Makes the flat repository importable as the package `kimi`.

The remote-code loader wants flat files that import each other as `from .kimi_moe import Router`. A package whose
`__path__` is the repository root lets the tests import the very same files, unchanged: `from kimi.kimi_moe import ...`.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data"

if "kimi" not in sys.modules:
    spec = importlib.machinery.ModuleSpec("kimi", loader=None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules["kimi"] = importlib.util.module_from_spec(spec)
