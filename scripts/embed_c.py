"""Joins the files of csrc/ to the one string that kimi_cpu.py compiles: transformers' loader copies Python files only.

python -m scripts.embed_c            writes kimi_cpu_source.py
python -m scripts.embed_c --check    exit status 1 if it is not what csrc/ makes
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One translation unit, in this order.
FILES = ("common.h", "amx.h", "linear.c", "experts.c", "prefill.c", "absorb.c")
TARGET = ROOT / "kimi_cpu_source.py"
PREAMBLE = '''"""The C that `kimi_cpu.py` compiles. Generated from csrc/ by `python -m scripts.embed_c`: change it there.

csrc/common.h says what the files hold and how they are compiled.
"""

SOURCE = r"""
'''


def join() -> str:
    """The text of kimi_cpu_source.py. Raises ValueError for what a raw Python string cannot hold."""
    parts = []
    for name in FILES:
        text = (ROOT / "csrc" / name).read_text(encoding="utf-8")
        if '"""' in text or text.endswith("\\"):
            raise ValueError(
                f'csrc/{name} has """ or ends in a backslash, which a Python string cannot hold.'
            )
        included = re.findall(r'#include "(.*)"', text)
        if unknown := sorted(set(included) - set(FILES[: FILES.index(name)])):
            raise ValueError(f"csrc/{name} includes {unknown}, which do not come before it in {FILES}.")
        parts.append(re.sub(r'#include ".*"\n', "", text))
    return PREAMBLE + "\n".join(parts) + '"""\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if it would change"
    )
    if parser.parse_args(arguments).check:
        same = TARGET.read_text(encoding="utf-8") == join()
        print(f"{TARGET.name} {'is' if same else 'is not'} what csrc/ makes")
        return 0 if same else 1
    TARGET.write_text(join(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
