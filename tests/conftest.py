"""Places that the tests share, and what makes a run of them the same on every machine.

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

# Of the caller's environment: proxies, which loopback servers are not behind, and what changes the code under test.
FOREIGN = re.compile(
    r".*_proxy|(KIMI|HF|HUGGINGFACE|TRANSFORMERS|ACCELERATE|OPENAI|SSL_CERT)_.*"
    r"|PYTHON(PATH|SAFEPATH|INTMAXSTRDIGITS)|TRITON_INTERPRET|NO_COLOR|FORCE_COLOR|COLUMNS|LINES",
    re.IGNORECASE,
)
for name in filter(FOREIGN.fullmatch, list(os.environ)):
    del os.environ[name]
# Before transformers is imported. Code that it copies from a folder, and what our code compiles, is this run's own.
CACHES = Path(tempfile.mkdtemp(prefix="kimi_tests_"))
atexit.register(shutil.rmtree, CACHES, ignore_errors=True)
# Few threads, which do not spin while they wait: beside a busy process, spinning took 20 times as long as working.
os.environ.setdefault("OMP_NUM_THREADS", str(max(2, min(4, os.cpu_count() or 2))))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ |= {
    "HF_HOME": str(CACHES / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "XDG_CACHE_HOME": str(CACHES),
    "TERM": "xterm",
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # make test-engines does without it
    settings = None

if settings is not None:
    # Each example may take its time, on any machine; and each run draws the same ones, so that a failure is a change's.
    # `make test ARGS=--hypothesis-profile=search` draws others, to look for faults.
    slow_machines = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("suite", derandomize=True, database=None, print_blob=True, **slow_machines)
    settings.register_profile("search", print_blob=True, **slow_machines)
    settings.load_profile("suite")


def pytest_configure(config):
    """Tests of the CPU stay on it where there is a GPU, whose tests are run by `pytest -m gpu`. Kernels are interpreted or
    compiled from their decorator on, and many tests import them: `pytest -m kernels` without a GPU interprets."""
    chosen = set(re.findall(r"(?<!not )\b(gpu|kernels)\b", config.option.markexpr))
    if "gpu" not in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if chosen and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before any fixture of the test: its random numbers do not depend on the tests that ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
