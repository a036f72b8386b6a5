"""Makes this flat repository importable as a package: `from kimi.modeling_kimi import Router`.

The files here import each other relatively and lie flat, because transformers' remote-code loader wants it so. A module
with a `__path__` is a package to Python, so scripts and tests reach the very same files without a second spelling.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent)]
