"""Makes this flat repository importable as a package: `from kimi.modeling_kimi import Router`.

The files here import each other relatively and are in one folder, as transformers' remote-code loader requires. A
module with a `__path__` is a package to Python, so scripts and tests import the same files under one name.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
