"""Commands of this repository, run from its root: `python -m scripts.check FOLDER`."""
