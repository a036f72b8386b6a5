"""The Triton kernels as compiled code, without a GPU: `benchmarks/bench_compile_ahead.py` compiles what the launchers ask
for when torch pretends to have one. In processes of their own, because here kernels are interpreted."""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT

pytest.importorskip("triton.backends.nvidia", reason="this triton has no CUDA compiler")
pytestmark = pytest.mark.kernels


def compile_ahead(*arguments: str) -> str:
    """The standard output of the benchmark, where Triton's interpreter is off."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/bench_compile_ahead.py"), *arguments],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def variants():
    return json.loads(compile_ahead("--variants", "--arch", "90", "120"))


@pytest.mark.parametrize(("arch", "prefill"), [("90", 4), ("120", 2)])
def test_a_generation_compiles_a_fixed_small_number_of_variants(arch, prefill, variants):
    """Filling a cache with 262,144 tokens, by chunks and one by one; and 1 to 4096 rows of experts."""
    attention = {f"{kind}: merge_kernel": 1 for kind in ("no mask", "padding", "lengths")}
    # Chunks have a causal mask; padding takes the same code.
    attention |= {"padding: partial_kernel": 1, "no mask: partial_kernel": 2, "lengths: partial_kernel": 2}
    numbers = {"gate_up_decode": 1, "down_decode": 1, "combine": 1}
    numbers |= {"gate_up_prefill": prefill, "down_prefill": prefill}
    experts = {f"experts: {kernel}_kernel": number for kernel, number in numbers.items()}
    assert variants[arch]["counts"] == attention | experts


@pytest.mark.parametrize("arch", ["90", "120"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_self_tests_compile_what_the_full_model_needs(arch, dtype, variants):
    """So that what they approve is what runs, and the first tokens wait for no compiler."""
    assert variants[arch][dtype] == {"full model only": [], "self-tests only": []}
