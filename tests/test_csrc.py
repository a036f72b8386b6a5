"""The C of csrc/ without Python: the copy in kimi_cpu_source.py, warnings, sanitizers, guard pages, and its numbers.

tests/csrc_driver.c runs each function on odd shapes and says how. Its sources are compiled here once for each level: plain
loops, and AVX-512 with bf16 where this CPU has it. There the code for tiles (AMX) runs too, with the unit in plain C
(tests/amx_emulation.h), and on the unit itself where there is one.
"""

import functools
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import HANG_S, ROOT
from kimi import kimi_cpu
from scripts import embed_c

CSRC = ROOT / "csrc"
TESTS = ROOT / "tests"
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
]


def run(*command, **variables):
    env = {**os.environ, **variables}
    arguments = list(map(str, command))
    return subprocess.run(
        arguments, env=env, capture_output=True, text=True, errors="replace", timeout=HANG_S, check=False
    )


@functools.cache
def can_compile(compiler, *flags):
    """None, or what the compiler has against these flags."""
    done = run(compiler, *flags, "-Werror", "-x", "c", "-c", os.devnull, "-o", os.devnull)
    return None if done.returncode == 0 else f"{compiler}: {done.stderr.strip().splitlines()[0]}"


# ------------------------------------------------------------------------------------------------ the copy and the names


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of csrc/ and of kimi_cpu_source.py that embed_c works on."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    shutil.copy(embed_c.TARGET, tmp_path)
    monkeypatch.setattr(embed_c, "ROOT", tmp_path)
    monkeypatch.setattr(embed_c, "TARGET", tmp_path / embed_c.TARGET.name)
    return tmp_path


def test_the_embedded_source_is_what_csrc_makes():
    assert embed_c.main(["--check"]) == 0, "run: python -m scripts.embed_c"


def test_a_change_in_csrc_is_seen(copy):
    assert embed_c.main(["--check"]) == 0
    with open(copy / "csrc" / "linear.c", "a", encoding="utf-8") as file:
        file.write("/* a change */\n")
    assert embed_c.main(["--check"]) == 1
    assert embed_c.main([]) == 0 and embed_c.main(["--check"]) == 0
    assert "/* a change */" in embed_c.TARGET.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('char *text = """;\n', "Python string"),
        ('#include "absorb.c"\n', "do not come before"),
        ("\\", "backslash"),
    ],
)
def test_what_cannot_be_embedded_is_refused(copy, line, reason):
    with open(copy / "csrc" / "linear.c", "a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"csrc/linear\.c .*{reason}"):
        embed_c.join()


def test_python_declares_the_functions_of_c():
    """ctypes passes whatever `FUNCTIONS` says, so it is compared with the definitions."""
    source = re.sub(r"/\*.*?\*/", "", kimi_cpu.SOURCE, flags=re.DOTALL)
    definitions = re.findall(r"^(?:int|void) (\w+)\(([^)]*)\) \{", source, re.MULTILINE)
    kinds = {"long": "l", "float": "f"}
    declared = {
        name: "".join("p" if "*" in one else kinds[one.split()[0]] for one in arguments.split(","))
        for name, arguments in definitions
    }
    assert declared == {name: kinds.replace(" ", "") for name, kinds in kimi_cpu.FUNCTIONS.items()}
    for name in ("BAD_ID", "MAX_LATENT"):
        assert re.findall(rf"\b{name} = (\d+)", source) == [str(getattr(kimi_cpu, name))]


# ---------------------------------------------------------------------------------------------------------------- warnings

WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-O1"]  # -O1: some warnings need the flow of values


@pytest.mark.parametrize("openmp", ["-fopenmp", "-fno-openmp"])
@pytest.mark.parametrize("machine", ["native", "x86-64-v3", "sapphirerapids"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_each_file_compiles_without_warnings(tmp_path, monkeypatch, compiler, machine, openmp):
    """For this machine, for one with AVX2, and for one with AMX."""
    flags = [f"-march={machine}", openmp]
    if reason := can_compile(compiler, *flags):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    files = sorted(CSRC.glob("*.c"))
    done = run(compiler, *flags, *WARNINGS, f"-I{CSRC}", "-c", *files)
    assert done.returncode == 0 and not done.stderr, done.stderr[:5000]
    assert len(list(tmp_path.glob("*.o"))) == len(files) == 4


# -------------------------------------------------------------------------------------------- sanitizers and guard pages

FOR_ALL = ["linear_bf16", "rms_norm", "rotary", "unpack_int4", "experts_int4_few_rows", "absorb"]
BY_TILES = ["absorb", "prefill_attention", "expert_int4_tiles"]
RUNS = [
    *(("plain loops", name) for name in FOR_ALL),
    *(("AVX-512", name) for name in [*FOR_ALL, "prefill_attention"]),
    *(("emulated tiles", name) for name in BY_TILES),
    *(("tiles", name) for name in BY_TILES),
]


@functools.cache
def sanitizing_compiler(folder):
    """(compiler, flags, options of the run), or the reason why there is none. Leaks are looked for where that works."""
    if sys.platform == "win32" or not COMPILERS:
        return "no C compiler (gcc or clang) was found"
    (folder / "empty.c").write_text("int main(void) { return 0; }\n", encoding="utf-8")
    for compiler in COMPILERS:
        for more in (["-march=native", "-fopenmp"], ["-march=native"], []):
            flags = [*SANITIZERS, *more]
            if run(compiler, *flags, folder / "empty.c", "-o", folder / "empty").returncode:
                continue
            for options in ("detect_leaks=1", "detect_leaks=0"):
                if run(folder / "empty", ASAN_OPTIONS=options).returncode == 0:
                    return compiler, flags, options
    return f"{' and '.join(COMPILERS)} cannot build and run a program with {SANITIZERS[0]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("csrc")


@functools.cache
def driver(folder, level):
    """The program for a level, compiled once. Skips where this machine or its compiler lacks what it needs."""
    tools = sanitizing_compiler(folder)
    if isinstance(tools, str):
        pytest.skip(tools)
    compiler, flags, _ = tools
    macros = run(compiler, *flags, "-dM", "-E", "-x", "c", os.devnull).stdout
    if level != "plain loops" and "__AVX512BF16__" not in macros:
        pytest.skip("this machine has no AVX-512 with bf16")
    if level == "tiles" and not kimi_cpu.has_expert_tiles():
        pytest.skip("this machine has no AMX tiles")
    if level in ("AVX-512", "emulated tiles"):
        level = "AVX-512 and emulated tiles"  # one program, which uses tiles if told so
    chosen = {
        "plain loops": ["-U__AVX512BF16__"],
        "AVX-512 and emulated tiles": ["-U__AMX_BF16__", f'-DAMX_EMULATION="{TESTS / "amx_emulation.h"}"'],
        "tiles": [],
    }
    return build(folder, level, compiler, (*flags, *chosen[level]))


@functools.cache
def build(folder, level, compiler, flags):
    source, program = folder / "kimi_cpu.c", folder / level.replace(" ", "_")
    source.write_text(kimi_cpu.SOURCE, encoding="utf-8")
    done = run(compiler, *flags, f'-DSOURCE="{source}"', TESTS / "csrc_driver.c", "-o", program, "-lm")
    assert done.returncode == 0, done.stderr[:5000]
    return program


@pytest.mark.parametrize("level, function", RUNS)
def test_numbers_and_memory(folder, level, function):
    """No access outside a buffer, nothing undefined, no leak, and results as good as the roundings allow."""
    program = driver(folder, level)
    asan = f"{sanitizing_compiler(folder)[2]}:abort_on_error=0"
    tiles = ["tiles"] if "tiles" in level else []
    done = run(program, function, *tiles, ASAN_OPTIONS=asan, UBSAN_OPTIONS="print_stacktrace=1")
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0, f"{last}\n{done.stderr[:4000]}"
    cases = re.fullmatch(rf"{function}: (\d+) cases, (\d+) numbers, .*", last[0])
    assert cases and int(cases[1]) >= 20 and int(cases[2]) >= 9000, last
