"""Runs the steps of the GPU check, each in a process of its own, and says how they ended.

    bash benchmarks/gpu_check.sh                    all of it, on a machine with a card
    python benchmarks/gpu_check.py step experts     one step in this process, for a debugger
    python benchmarks/gpu_check.py summary OUT      the summary of a results file again
    python benchmarks/gpu_check.py keep OUT         keeps the results under benchmarks/gpu_results

A step that hangs gets SIGABRT at its limit, on which Python prints where every thread is, and SIGKILL if it stays. One
that aborts, crashes or loses its CUDA context ends only itself. While the steps run, other processes of low priority
compile kernels: first those that the next steps need, then the candidates of the search.
"""

import argparse
import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu_report
from gpu_report import Poisoned, Results, append

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_S, DRY_S, DRY_TIMES = 560.0, 1800.0, 6
RESERVE_S = 7.0  # before the deadline, for ending the last step and for the summary
LEAST_S = 8.0  # a step that would get less is not started
GRACE_S = 3.0  # from SIGABRT to SIGKILL
COMPILERS = 5  # processes, at most
LIMIT = "GPU_CHECK_LIMIT_S"  # environment of a step: the seconds it has


@dataclass(frozen=True)
class Step:
    """`function` is module:name, called as name(device, results); `command` runs instead, for tests of this file."""

    name: str
    limit_s: float
    function: str = ""
    command: Sequence[str] = ()


# Most important first: what is right, then what is fast; the search takes what is left.
STEPS = (
    Step("ceilings", 25, "gpu_kernels:ceilings"),
    Step("experts", 70, "gpu_kernels:experts"),
    Step("attention", 50, "gpu_kernels:attention"),
    Step("graphs", 30, "gpu_kernels:graphs"),
    Step("tiny", 60, "gpu_models:tiny"),
    Step("pool", 40, "gpu_models:pool"),
    Step("vision", 25, "gpu_models:vision"),
    Step("pytest", 70, "gpu_models:gpu_tests"),
    Step("layers", 70, "gpu_speed:layers"),
    Step("bench-experts", 60, "gpu_speed:bench_experts_step"),
    Step("bench-mla", 40, "gpu_speed:bench_mla_step"),
    Step("transfer", 20, "gpu_speed:transfer"),
    Step("static", 60, "gpu_models:static"),
    Step("search", 10_000, "gpu_search:search"),
)


class Stopped(Exception):
    """By a signal."""


@dataclass
class Watch:
    """The run: where results go, until when, and the processes that are alive."""

    out: Path
    seconds: float
    dry: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)
    stopping: threading.Event = field(default_factory=threading.Event)
    alive: set[subprocess.Popen] = field(default_factory=set)

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    def left(self) -> float:
        return self.start + self.seconds - RESERVE_S - time.monotonic()

    def run_step(self, step: Step) -> None:
        """Never raises: how the step ended is a line of the results."""
        limit = min(step.limit_s, self.left())
        if limit < LEAST_S or self.stopping.is_set():
            self.end(step, None, "stopped" if self.stopping.is_set() else "no time left", 0.0, limit)
            return
        start, log = time.monotonic(), self.out / f".{step.name}.log"
        environment = {**os.environ, **self.environment, LIMIT: str(limit)}
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    step.command or command_of(step, self.dry),
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # its own children can be ended with it
                )
            self.alive.add(process)
            ended = self.wait(process, limit)
            self.alive.discard(process)
            rc = process.returncode
        except OSError as error:
            ended, rc = f"not started: {error}", None
        self.end(step, rc, ended, time.monotonic() - start, limit)
        self.to_log(step, ended, log)

    def wait(self, process: subprocess.Popen, limit: float) -> str:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = "time limit"
        else:
            ended = "ok" if code == 0 else signal.Signals(-code).name if code < 0 else "failed"
        if self.stopping.is_set():
            ended = "stopped"
        end_group(process)
        return ended

    def end(self, step: Step, rc: int | None, ended: str, seconds: float, limit: float) -> None:
        found = sum(
            "check" in entry and entry.get("step") == step.name for entry in gpu_report.read(self.results)
        )
        if rc == 0 and not found:
            ended, rc = "found nothing", 1
        line = {
            "rc": rc,
            "ended": ended,
            "seconds": round(seconds, 1),
            "limit": int(max(limit, 0)),
            "results": found,
        }
        append(self.results, {"step": step.name, **line})
        print(f"{step.name:14} {ended:14} rc {rc}  {seconds:5.1f} s  {found} results", flush=True)

    def to_log(self, step: Step, ended: str, log: Path, most: int = 200_000) -> None:
        """The end of a step's output to the one log; a step in a loop may have printed gigabytes."""
        with contextlib.suppress(OSError):
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - most))
                text = file.read()
            with (self.out / "log.txt").open("ab") as file:
                file.write(f"=== {step.name}: {ended}\n".encode() + text + b"\n")
            log.unlink()

    def stop(self) -> None:
        self.stopping.set()
        for process in tuple(self.alive):
            end_group(process)


def command_of(step: Step, dry: bool) -> list[str]:
    script = str(Path(__file__).resolve())
    return [sys.executable, "-X", "faulthandler", script, "step", step.name, *(["--dry"] if dry else [])]


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and its children. A process that waits inside a driver may outlive even SIGKILL: not waited for."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGABRT)  # faulthandler prints every thread
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)


def drive(steps: Sequence[Step], watch: Watch, jobs: int = 1) -> int:
    """Runs the steps and prints the summary, also when a signal comes; returns how many are not right."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    watch.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt", "summary.txt"):
        (watch.out / name).unlink(missing_ok=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        with ThreadPoolExecutor(jobs) as threads:
            try:
                for done in [threads.submit(watch.run_step, step) for step in steps]:
                    done.result()
            except Stopped as stopped:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)  # the summary comes first
                print(f"stopped by {stopped}", flush=True)
                watch.stop()
    finally:
        watch.stop()
        entries = gpu_report.read(watch.results)
        text = gpu_report.summary(entries)
        (watch.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)
    return sum(entry["rc"] != 0 for entry in entries if "rc" in entry)


# -------------------------------------------------------------------------------------------------------- command line


def start_compilers(watch: Watch) -> None:
    """Their output goes nowhere: what they compiled is in a file, and what fails there fails in a step too."""
    number = 1 if watch.dry else max(1, min(COMPILERS, (os.cpu_count() or 2) // 3))
    for place in range(number):
        command = [sys.executable, str(Path(__file__).resolve()), "precompile", str(place), str(number)]
        process = subprocess.Popen(
            [*command, *(["--dry"] if watch.dry else [])],
            cwd=ROOT,
            env={**os.environ, **watch.environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: os.nice(19) and None,
        )
        watch.alive.add(process)


def run(arguments: argparse.Namespace) -> int:
    words = list(arguments.words)
    seconds = float(words.pop(0)) if words and words[0].replace(".", "", 1).isdigit() else None
    unknown = sorted(set(words) - {step.name for step in STEPS})
    if unknown:
        raise SystemExit(f"no step {', '.join(unknown)}; there are {', '.join(step.name for step in STEPS)}")
    steps = [step for step in STEPS if not words or step.name in words]
    if arguments.dry:  # the limits are those of a card
        steps = [replace(step, limit_s=DRY_TIMES * step.limit_s) for step in steps]
    out = Path(os.environ.get("OUT") or ROOT / "gpu-check").resolve()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        environment = {"OUT": str(out), "GPU_CHECK_SCRATCH": scratch, "HF_HOME": f"{scratch}/huggingface"}
        environment["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or f"{scratch}/triton"
        if arguments.dry:
            environment |= {"CUDA_VISIBLE_DEVICES": "-1", "TRITON_INTERPRET": "1"}
            # Two steps at once; threads that spin while they wait made a step take ten times as long on a busy machine.
            environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        (out / "compiled.jsonl").unlink(missing_ok=True)
        watch = Watch(out, seconds or (DRY_S if arguments.dry else DEFAULT_S), arguments.dry, environment)
        if {"experts", "attention", "search"} & {step.name for step in steps}:
            start_compilers(watch)
        # Two at once in a dry run, which waits for imports mostly; on a card each has it alone.
        return 1 if drive(steps, watch, jobs=2 if arguments.dry else 1) else 0


def run_here(arguments: argparse.Namespace) -> int:
    """One step in this process. Ends without Python's own clean-up, in which a lost CUDA context can hang."""
    faulthandler.enable()
    sys.path.insert(0, str(ROOT))
    device_module = importlib.import_module("gpu_device")
    step = next(step for step in STEPS if step.name == arguments.name)
    out = Path(os.environ.get("OUT") or ROOT / "gpu-check")
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "results.jsonl", step.name, float(os.environ.get(LIMIT, step.limit_s)))
    with contextlib.suppress(Poisoned), results.check("step"):  # what goes wrong outside of its checks
        device = device_module.Device(arguments.dry)
        results.recover = device.recover
        module, _, name = step.function.partition(":")
        getattr(importlib.import_module(module), name)(device, results)
        results.add("memory", **device.memory())
        return 1 if results.failed else 0
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, *positional in (
        ("run", "words"),
        ("step", "name"),
        ("precompile", "place", "number"),
        ("summary", "folder"),
        ("keep", "folder"),
    ):
        command = commands.add_parser(name)
        command.add_argument("--dry", action="store_true")
        for word in positional:
            command.add_argument(word, nargs="*" if word == "words" else None)
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments)
    if arguments.command == "step":
        return run_here(arguments)
    if arguments.command == "precompile":
        sys.path.insert(0, str(ROOT))
        search = importlib.import_module("gpu_search")
        search.precompile(int(arguments.place), int(arguments.number), arguments.dry)
        return 0
    folder = Path(arguments.folder)
    if arguments.command == "summary":
        print(gpu_report.summary(gpu_report.read(folder / "results.jsonl")))
        return 0
    print(gpu_report.keep(folder))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
