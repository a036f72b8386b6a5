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
    return json.loads(compile_ahead("--variants", "--arch", "90", "100", "120"))


@pytest.mark.parametrize(("arch", "prefill"), [("90", 4), ("100", 3), ("120", 3)])
def test_a_generation_compiles_a_fixed_small_number_of_variants(arch, prefill, variants):
    """Filling a cache with 262,144 tokens, by chunks and one by one; and 1 to 4096 rows of experts."""
    attention = {f"{kind}: merge_kernel": 1 for kind in ("no mask", "padding", "lengths")}
    # Chunks have a causal mask; padding takes the same code.
    attention |= {"padding: partial_kernel": 1, "no mask: partial_kernel": 2, "lengths: partial_kernel": 1}
    numbers = {"gate_up_decode": 1, "down_decode": 1, "combine": 1}
    numbers |= {"gate_up_prefill": prefill, "down_prefill": prefill}
    experts = {f"experts: {kernel}_kernel": number for kernel, number in numbers.items()}
    small = {"rms_norm": 3, "silu_and_mul": 1, "add_rounded": 1, "route": 1, "rotate_and_append": 1}
    layer = {f"layer: {kernel}_kernel": number for kernel, number in small.items()}
    assert variants[arch]["counts"] == attention | experts | layer


@pytest.mark.parametrize("arch", ["90", "100", "120"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_self_tests_compile_what_the_full_model_needs(arch, dtype, variants):
    """So that what they approve is what runs, and the first tokens wait for no compiler."""
    assert variants[arch][dtype] == {"full model only": [], "self-tests only": []}


# ------------------------------------------------------------------------------------------------------ machine code

# Instructions of the hot loop for each weight that a thread unpacks, in attention for each cached token: what triton
# 3.6.0 made on 2026-11-28, by kernel and blocks, then by architecture. The bound is 3 % above.
INSTRUCTIONS = {
    ("gate_up_decode", "2x32"): {80: 5.39, 90: 4.64, 100: 3.58, 120: 4.55},
    ("down_decode", "4x32"): {80: 6.07, 90: 5.27, 100: 4.45, 120: 5.42},
    ("gate_up_prefill", "16x64x16"): {80: 4.76, 90: 3.88, 100: 2.97, 120: 4.24},
    ("down_prefill", "16x64x16"): {80: 5.12, 90: 4.75, 120: 4.84},
    ("gate_up_prefill", "32x64x16"): {80: 6.2, 90: 3.94, 120: 5.73},
    ("down_prefill", "32x128x16"): {80: 6.23, 120: 5.75},
    ("gate_up_prefill", "64x64x16"): {80: 10.17, 90: 4.08, 100: 3.05, 120: 9.61},
    ("down_prefill", "64x128x16"): {80: 9.94, 90: 4.77, 100: 3.05, 120: 9.73},
    ("partial", "16x32"): {80: 22.88, 90: 18.19, 100: 17.62, 120: 22.62},
    ("down_prefill", "32x64x16"): {90: 4.89},
    ("gate_up_prefill", "128x64x16"): {90: 5.14, 100: 3.34},
    ("down_prefill", "128x128x16"): {90: 5.05, 100: 3.37},
    ("partial", "64x64"): {90: 17.19},
    ("down_prefill", "16x128x16"): {100: 2.89},
    ("partial", "64x32"): {100: 24.16},
}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


@pytest.fixture(scope="module")
def kernels():
    """One dictionary for each variant that the tables choose at the full model's shapes; two minutes."""
    return [json.loads(line) for line in compile_ahead("--json").splitlines()]


def name(kernel):
    return f"sm_{kernel['arch']} {kernel['kernel']} {kernel['what']} {kernel['blocks']}"


def test_every_kernel_fits_and_nothing_spills(kernels):
    assert {(kernel["arch"], kernel["kernel"]) for kernel in kernels} == {
        (arch, kernel)
        for arch in TENSOR_CORES
        for kernel in (
            "gate_up_decode",
            "down_decode",
            "gate_up_prefill",
            "down_prefill",
            "combine",
            "partial",
            "merge",
            "rms_norm",
            "silu_and_mul",
            "add_rounded",
            "route",
            "rotate_and_append",
        )
    }
    for kernel in kernels:
        assert kernel["shared"] <= kernel["shared_limit"], name(kernel)
        assert not kernel["spilled"] and not kernel["stack"], name(kernel)
        assert not kernel["warnings"], name(kernel)  # among them C7510 to C7515: wgmma serialised
        assert kernel["warps_per_processor"] > 0, name(kernel)


def test_products_are_on_tensor_cores_and_their_inputs_fetched_ahead(kernels):
    for kernel in kernels:
        if kernel["what"] == "fp32":  # tf32, all that tensor cores have for it, would round
            assert kernel["tensor_cores"] == [], name(kernel)
        elif "prefill" in kernel["kernel"] or kernel["kernel"] == "partial":
            small = kernel["kernel"] == "partial" and kernel["blocks"].startswith("16x")
            expected = "mma.sync" if small else TENSOR_CORES[kernel["arch"]]
            assert kernel["tensor_cores"] == [expected], name(kernel)
            assert kernel["copies_ahead"], name(kernel)


def test_attention_uses_the_largest_tensor_cores(kernels):
    """The first configuration of Hopper's and B200's tables."""
    used = {
        kernel["arch"]: kernel["tensor_cores"]
        for kernel in kernels
        if kernel["kernel"] == "partial" and kernel["what"] == "1 new, mask none"
    }
    assert used == {arch: [cores] for arch, cores in TENSOR_CORES.items()}


def test_decode_reads_16_bytes_at_a_time_and_waits_for_no_other_warp(kernels):
    for kernel in kernels:
        if "decode" in kernel["kernel"]:
            assert kernel["loads_of_16_bytes"] == 4 + 8, name(kernel)  # words of 4 rows, 8 planes of x
            assert kernel["barriers_in_loop"] == 0, name(kernel)


def test_hot_loops_stay_short(kernels):
    for kernel in kernels:
        if kernel["per_weight"] and kernel["what"] != "fp32":
            measured = INSTRUCTIONS[kernel["kernel"], kernel["blocks"]][kernel["arch"]]
            assert kernel["per_weight"] <= measured * 1.03, (name(kernel), kernel["per_weight"], measured)
