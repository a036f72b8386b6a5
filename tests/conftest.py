"""What the tests share, and settings that make a run the same on every machine.

The repository itself is the package `kimi` (see kimi.py).
"""

import atexit
import os
import random
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data"
HANG_S = 600  # a wait that lasts longer has hung: over ten times what the longest takes on two busy cores

# Of the caller's environment: proxies, through which no server on loopback can be reached, and what changes the code
# under test or the processes that tests start.
FOREIGN = re.compile(
    r".*_proxy|(KIMI|HF|HUGGINGFACE|TRANSFORMERS|ACCELERATE|OPENAI|SSL_CERT|TORCH|TORCHDYNAMO|TORCHINDUCTOR)_.*"
    r"|PYTHON(SAFEPATH|OPTIMIZE|INTMAXSTRDIGITS)|TRITON_INTERPRET|WEB_CONCURRENCY",
    re.IGNORECASE,
)
TERMINAL = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
for name in filter(FOREIGN.fullmatch, list(os.environ)):
    del os.environ[name]
# Few threads, which do not spin while they wait: spinning made a test take 19 times as long with one other busy process.
os.environ.setdefault("OMP_NUM_THREADS", str(max(2, min(4, os.cpu_count() or 2))))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Code that transformers copies from a folder, and what our code compiles, is this run's own.
CACHES = Path(tempfile.mkdtemp(prefix="kimi_tests_"))
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
os.environ |= {
    "HF_HOME": str(CACHES / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "XDG_CACHE_HOME": str(CACHES),
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # make test-engines does without it
    settings = None

if settings is not None:
    # Each example may take its time, on any machine; and each run draws the same ones, so that a new failure comes from
    # a change. `make test ARGS=--hypothesis-profile=search` draws others, to look for faults.
    slow_machines = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
    settings.register_profile("suite", derandomize=True, database=None, **slow_machines)
    settings.register_profile("search", derandomize=False, **slow_machines)
    settings.load_profile("suite")


def pytest_configure(config):
    """Without a GPU, unless its tests or the kernels are chosen by -m. Whether a kernel is interpreted is fixed when it is
    decorated, and many tests import them, so only a run of kernels that has no GPU interprets them."""
    chosen = re.search(r"(?<!not )\b(gpu|kernels)\b", config.option.markexpr)
    if not chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_sessionstart(session):
    """After pytest has looked at its own terminal, the tests' one is the same everywhere."""
    for name in TERMINAL:
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm"


def calls_of(monkeypatch, owner, name):
    """A list that gets the arguments of each call of `owner.name`, which still does its work."""
    calls, real = [], getattr(owner, name)

    def recorded(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)
    return calls


def seed_everything():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seed_everything()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """What is made once for several tests draws numbers of its own, so those of a test do not depend on its being the
    first."""
    if fixturedef.scope == "function":
        return (yield)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything()
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
