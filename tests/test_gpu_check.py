"""The GPU check without a GPU: its dry run, steps that hang, abort or raise, the deadline, signals, and what it keeps."""

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from conftest import HANG_S, ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A file of benchmarks/, which import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def lines_of(folder):
    """Every line of the results must be JSON."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def ends_of(folder):
    return {line["step"]: line for line in lines_of(folder) if "rc" in line}


def environment(out, **values):
    return {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **values}


def run_dry(out, *steps):
    command = ["bash", str(BENCHMARKS / "gpu_check.sh"), "--dry", *steps]
    return subprocess.run(
        command, env=environment(out), cwd=out.parent, capture_output=True, text=True, timeout=HANG_S
    )


def check_dry_run(done, out, steps):
    log = (out / "log.txt").read_text(encoding="utf-8", errors="replace")
    ends = ends_of(out)
    assert list(ends) and set(ends) == set(steps), done.stdout + done.stderr
    wrong = [line for line in lines_of(out) if not line.get("ok", True)]
    assert not wrong, wrong
    for name, end in ends.items():
        assert end["rc"] == 0 and end["results"] >= 1, (name, end, log[-3000:])
    assert f"all {len(ends)} steps are right" in done.stdout and done.returncode == 0
    assert (out / "summary.txt").read_text(encoding="utf-8").strip() in done.stdout
    assert {path.name for path in out.iterdir()} <= {
        "results.jsonl",
        "log.txt",
        "summary.txt",
        "compiled.jsonl",
    }


def test_every_step_runs_dry(module, tmp_path):
    out = tmp_path / "out"
    done = run_dry(out)
    check_dry_run(done, out, [step.name for step in module("gpu_check").STEPS])
    assert "it measures nothing" in done.stdout


@pytest.mark.kernels
def test_kernels_run_dry_under_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "out"
    steps = ("experts", "attention", "graphs", "search")
    done = run_dry(out, *steps)
    check_dry_run(done, out, steps)


PRECOMPILE = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/benchmarks"]
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Hopper:
    get_current_device = get_current_stream = lambda self, *device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)


driver.set_active(Hopper())
import gpu_device, gpu_search
from kimi import kimi_attention_triton, kimi_int4_triton

gpu_search.experts_kernels = lambda device: kimi_int4_triton
gpu_search.attention_kernels = lambda device: kimi_attention_triton
device = gpu_device.Device(dry=True)
device.sizes = gpu_device.Sizes()
calls = gpu_search.Calls(device, real=False)
make = {
    "gate_up_decode": kimi_int4_triton.DECODE.gate_up,
    "attention": kimi_attention_triton.AttentionBlocks(16, 32, 4, 2),
    "prefill": kimi_int4_triton.PREFILL_HOPPER[0][1:],
}
with gpu_search.only_compiling(device):
    for kind, blocks in make.items():
        calls.of(gpu_search.Candidate(gpu_search.Problem(kind, 32), blocks))()
"""


@pytest.mark.kernels
def test_candidates_are_compiled_ahead_for_a_card_that_is_not_there(tmp_path):
    """The real compiler, for the published sizes, in a process where nothing is launched."""
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no CUDA compiler")
    values = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    values["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", PRECOMPILE, str(ROOT)]
    done = subprocess.run(command, env=values, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert {
        "gate_up_decode_kernel",
        "gate_up_prefill_kernel",
        "down_prefill_kernel",
        "partial_kernel",
    } <= made


# ------------------------------------------------------------------------------------------------- steps that go wrong

PLANTED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import gpu_check
from pathlib import Path
from gpu_check import Step, Watch, drive

out, seconds, names = Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
gpu_check.RESERVE_S, gpu_check.LEAST_S, gpu_check.GRACE_S = 1.0, 1.0, 20.0
START = f"import sys; sys.path.insert(0, {sys.argv[1]!r}); from pathlib import Path; import gpu_report, os, time; "
START += f"results = gpu_report.Results(Path({str(out / 'results.jsonl')!r}), os.environ['STEP'], 60); "
BODIES = {
    "right": "results.add('one', figure=1.5)",
    "hangs": "results.add('before it hangs'); time.sleep(10000)",
    "deaf": "import signal; signal.signal(signal.SIGABRT, signal.SIG_IGN); results.add('one'); time.sleep(10000)",
    "aborts": "results.add('before it aborts'); os.abort()",
    "raises": "raise RuntimeError('planted')",
    "silent": "pass",
    "writes": "[(results.add(f'line {i}', text='x' * 30000), time.sleep(0.002)) for i in range(10**9)]",
    "also right": "results.add('two')",
}
limits = {"hangs": 6.0, "deaf": 6.0, "writes": 4.0}


def step(name):
    body = f"import os; os.environ['STEP'] = {name!r}; " + START + BODIES[name]
    return Step(name, limits.get(name, 50.0), command=[sys.executable, "-X", "faulthandler", "-c", body])


if "deaf" in names:
    gpu_check.GRACE_S = 1.0
raise SystemExit(drive([step(name) for name in names], Watch(out, seconds)))
"""


def planted(out, seconds, *names):
    return [sys.executable, "-c", PLANTED, str(BENCHMARKS), str(out), str(seconds), *names]


def test_a_step_that_goes_wrong_costs_itself_only(tmp_path):
    names = ("right", "hangs", "aborts", "raises", "silent", "deaf", "also right")
    done = subprocess.run(planted(tmp_path, 500, *names), capture_output=True, text=True, timeout=HANG_S)
    ends = ends_of(tmp_path)
    assert {name: end["ended"] for name, end in ends.items()} == {
        "right": "ok",
        "hangs": "time limit",
        "aborts": "SIGABRT",
        "raises": "failed",
        "silent": "found nothing",
        "deaf": "time limit",
        "also right": "ok",
    }
    assert [line["step"] for line in lines_of(tmp_path) if "check" in line] == [
        "right",
        "hangs",
        "aborts",
        "deaf",
        "also right",
    ]
    last = done.stdout.strip().splitlines()[-1]
    assert all(name in last for name in ("hangs (time limit)", "aborts", "raises", "silent", "deaf"))
    assert "right" not in last.replace("not right", "") and done.returncode == 5
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "planted" in log and "most recent call first" in log  # where the step hung


def test_the_deadline_cuts_steps_and_the_summary_still_comes(tmp_path):
    done = subprocess.run(
        planted(tmp_path, 5, "hangs", "right"), capture_output=True, text=True, timeout=HANG_S
    )
    ends = ends_of(tmp_path)
    assert ends["hangs"]["ended"] == "time limit" and ends["hangs"]["limit"] < 6
    assert ends["right"]["ended"] == "no time left" and ends["right"]["rc"] is None
    assert "not right: hangs (time limit), right (no time left)" in done.stdout


def test_lines_are_whole_when_a_process_is_killed_while_it_writes(tmp_path):
    subprocess.run(planted(tmp_path, 500, "writes"), capture_output=True, text=True, timeout=HANG_S)
    lines = lines_of(tmp_path)
    assert len(lines) > 2 and ends_of(tmp_path)["writes"]["ended"] == "time limit"


def test_a_signal_ends_the_steps_and_the_summary_still_comes(tmp_path):
    process = subprocess.Popen(planted(tmp_path, 500, "right", "hangs", "also right"), stdout=subprocess.PIPE)
    file, waiting = tmp_path / "results.jsonl", threading.Event()
    for _ in range(HANG_S * 10):
        if file.exists() and "before it hangs" in file.read_text(encoding="utf-8"):
            break
        waiting.wait(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=HANG_S)[0].decode()
    ends = ends_of(tmp_path)
    assert [ends[name]["ended"] for name in ("right", "hangs", "also right")] == ["ok", "stopped", "stopped"]
    assert "stopped by SIGTERM" in text and "not right: hangs (stopped), also right (stopped)" in text


def test_an_unknown_step_is_refused(tmp_path):
    done = run_dry(tmp_path / "out", "expert")
    assert done.returncode and "no step expert; there are ceilings, experts" in done.stderr


# ------------------------------------------------------------------------------------------- what only a card would run


class Fake:
    """Of torch.cuda: streams, events and graphs that do nothing."""

    def __init__(self, **options):
        assert options.keys() <= {"enable_timing"}

    def record(self):
        pass

    def elapsed_time(self, end):
        return 1.0

    def wait_stream(self, stream):
        assert isinstance(stream, Fake)

    def replay(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def card(module, monkeypatch):
    """A device that is not dry, of small sizes, whose tensors are in RAM; functions of torch.cuda keep their signatures."""
    for name in ("Stream", "Event", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    for name, value in {
        "graph": Fake(),
        "stream": Fake(),
        "current_stream": Fake(),
        "synchronize": None,
        "empty_cache": None,
        "init": None,
        "is_available": True,
        "set_sync_debug_mode": None,
        "mem_get_info": (5 * 10**9, 10**10),
        "max_memory_allocated": 10**9,
        "get_device_capability": (9, 0),
        "get_device_properties": SimpleNamespace(
            name="Fake", multi_processor_count=132, total_memory=10**10, L2_cache_size=10**6
        ),
        "host_memory_stats": {"allocated_bytes.current": 2**20, "num_host_alloc": 3},
        "cudart": SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: 0, cudaHostUnregister=lambda address: 0
        ),
    }.items():
        original = getattr(torch.cuda, name)
        fake = mock.create_autospec(original, return_value=value)
        if isinstance(original, type):  # graph, which is a class
            fake = mock.Mock(side_effect=lambda *given, **named: Fake())
            inspect.signature(original).bind(Fake())
        monkeypatch.setattr(torch.cuda, name, fake)
    gpu_device, profile = module("gpu_device"), torch.profiler.profile
    # Of a build without CUDA it takes 20 seconds to find that out.
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile(activities=activities[:1]))
    monkeypatch.setattr(
        module("bench_experts").Clock, "median", lambda self, call, cold=True: (call(), (1e-3, 3))[1]
    )
    monkeypatch.setattr(
        gpu_device.Device, "pinned", lambda self, *shape: torch.empty(shape, dtype=torch.uint8)
    )
    device = gpu_device.Device(dry=True)
    for name in ("gpu_kernels", "gpu_speed", "gpu_search"):
        for kind in ("experts", "attention"):
            if hasattr(module(name), f"{kind}_kernels"):
                plain = getattr(module("gpu_stand_in"), kind.upper())
                monkeypatch.setattr(module(name), f"{kind}_kernels", lambda device, plain=plain: plain)
    device.dry = False
    return device


@pytest.mark.parametrize(
    "step",
    [
        "gpu_kernels:ceilings",
        "gpu_kernels:graphs",
        "gpu_speed:layers",
        "gpu_speed:bench_experts_step",
        "gpu_speed:bench_mla_step",
        "gpu_speed:transfer",
    ],
)
def test_the_lines_for_a_card_run_on_a_fake_one(card, module, tmp_path, step):
    """It tells nothing of CUDA; but a step does not end on a card for a name that is misspelt."""
    name, _, function = step.partition(":")
    results = module("gpu_report").Results(tmp_path / "results.jsonl", "some", 600, card.recover)
    getattr(module(name), function)(card, results)
    results.add("memory", **card.memory())
    lines = lines_of(tmp_path)
    # A graph that records nothing replays nothing, and the profiler sees no kernel.
    wrong = [
        line for line in lines if not line["ok"] and not line["check"].startswith(("graph of", "no wait in"))
    ]
    assert not wrong and len(lines) > 3, wrong


def test_waits_are_refused_only_inside(card):
    with pytest.raises(RuntimeError, match="planted"), card.refuse_waits():
        raise RuntimeError("planted")
    modes = [call.args[0] for call in torch.cuda.set_sync_debug_mode.call_args_list]
    assert modes == ["error", "default"]


def test_a_device_that_answers_no_more_is_lost(card, module):
    torch.cuda.synchronize.side_effect = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(module("gpu_report").Poisoned, match="lost after this error: CUDA error: an illegal"):
        card.recover()


# -------------------------------------------------------------------------------------------------------------- results


def test_an_error_in_a_check_is_a_result_and_the_next_one_runs(module, tmp_path):
    report = module("gpu_report")
    results = report.Results(tmp_path / "results.jsonl", "some", 60)
    with results.check("raises") as found:
        found["figure"] = float("nan")
        raise ValueError("planted")
    with results.check("wrong"):
        report.require(False, "3 is not 4")
    with results.check("skipped"):
        raise report.Skipped("not here")
    with results.check("right") as found:
        found["figure"] = 1 / 3
    raised, wrong, skipped, right = lines_of(tmp_path)
    assert not raised["ok"] and raised["error"].endswith("ValueError: planted") and raised["figure"] == "nan"
    assert not wrong["ok"] and wrong["error"] == "3 is not 4"
    assert skipped["ok"] and skipped["skipped"] == "not here"
    assert right["ok"] and right["figure"] == 0.333333 and results.failed == 2


def test_cases_stop_in_time(module, tmp_path):
    results = module("gpu_report").Results(tmp_path / "results.jsonl", "some", 0.5)
    assert list(results.within([1, 2, 3], reserve_s=0)) == [1, 2, 3]
    assert list(results.within([1, 2, 3], reserve_s=1)) == []
    (cut,) = lines_of(tmp_path)
    assert cut["left_out"] == 3 and cut["first"] == "1"


def test_a_lost_device_ends_the_step(module, tmp_path):
    report = module("gpu_report")

    def lost():
        raise report.Poisoned("lost")

    results = report.Results(tmp_path / "results.jsonl", "some", 60, lost)
    with pytest.raises(report.Poisoned), results.check("one"):
        raise RuntimeError("CUDA error")
    assert [line["ok"] for line in lines_of(tmp_path)] == [False]


def test_results_are_kept_by_date_and_card(module, tmp_path):
    report = module("gpu_report")
    out, kept = tmp_path / "out", tmp_path / "kept"
    out.mkdir()
    kept.mkdir()
    results = report.Results(out / "results.jsonl", "ceilings", 60)
    with pytest.raises(SystemExit, match="names no card"):
        report.keep(out, kept)
    results.add("card", name="Some Card 80GB", date="2001-02-03", dry=False)
    results.add("copy rate", measured=True, gb_per_s=1.25)
    results.add("other", ok=False, error="one\ntwo | three")
    assert report.keep(out, kept).name == "2001-02-03-some-card-80gb.jsonl"
    assert report.keep(out, kept).name == "2001-02-03-some-card-80gb-2.jsonl"
    table = (kept / "README.md").read_text(encoding="utf-8")
    assert "| ceilings | copy rate | gb_per_s 1.25 |" in table
    assert "| ceilings | other | failed: two / three |" in table


def test_a_dry_run_is_not_kept(module, tmp_path):
    report = module("gpu_report")
    report.Results(tmp_path / "results.jsonl", "ceilings", 60).add("card", name="no card", dry=True)
    with pytest.raises(SystemExit, match="dry run, which measures nothing"):
        report.keep(tmp_path, tmp_path)


def test_the_table_in_the_repository_is_that_of_its_results(module):
    report = module("gpu_report")
    kept = BENCHMARKS / "gpu_results"
    table = report.table(sorted(kept.glob("*.jsonl")))
    assert (kept / "README.md").read_text(encoding="utf-8") == table


# ---------------------------------------------------------------------------------------------------------- comparisons


def test_nan_and_a_single_wrong_row_never_pass(module):
    device = module("gpu_device")
    want = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    for spoil in (float("nan"), float("inf"), 0.0):
        got = want.clone()
        got[57] = spoil
        with pytest.raises(module("gpu_report").Wrong):
            device.check_error({}, got, want, 0.5)
    device.check_error({}, want * 1.001, want, 0.01)


def test_unwritten_outputs_are_poisoned(module):
    device = module("gpu_device").Device(dry=True)
    with device.poisoned():
        assert torch.empty(5, 7).isnan().all() and torch.randn(3).new_empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_layers_are_those_of_the_published_width(module):
    """43 GB fit a card of 80."""
    speed, sizes = module("gpu_speed"), module("gpu_device").Sizes()
    with torch.device("meta"):
        model = speed.Kimi(speed.config_of_layers(sizes)).bfloat16()
    experts = model.language_model.model.layers[-1].mlp.experts
    assert experts.gate_proj_weight_packed.shape == (384, 2048, 896)
    assert 42e9 < sum(parameter.nbytes for parameter in model.parameters()) < 46e9


def test_candidates_begin_with_defaults_and_hold_each_once(module):
    search, device = module("gpu_search"), module("gpu_device").Device(dry=True)
    found = search.candidates(device)
    problems = search.problems(device)
    assert [one.blocks for one in found[: len(problems)]] == [None] * len(problems)
    assert len(set(found)) == len(found) > len(problems)
