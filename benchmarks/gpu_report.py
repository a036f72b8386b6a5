"""What the GPU check found: one JSON object a line, written at once; read back as a summary or a table.

    Results   what a step appends to: `check` turns an error into a result, `within` stops in time
    summary   a screen of text: how each step ended, what failed, the figures
    keep      a results file under its date and card, and a table of all that are kept

A line with `rc` says how a step ended and comes from the process that ran it; every other line is one check of a step.
No torch here: the process that watches over the steps must not load it.
"""

import contextlib
import json
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

KEPT = Path(__file__).resolve().parent / "gpu_results"
HIDDEN = ("step", "check", "ok", "measured", "seconds", "error", "skipped")  # of a line, beside the figures
ERROR_LINES = 12  # of a traceback
T = TypeVar("T")


class Wrong(Exception):
    """A check that ran and did not find what it should."""


class Skipped(Exception):
    """Why a check does not apply here."""


class Poisoned(Exception):
    """The device answers no more: nothing else of this process can succeed."""


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise Wrong(sentence)


def plain(value: Any) -> Any:
    """For JSON, which has no NaN: numbers to six digits, everything unknown as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def append(path: Path, entry: dict[str, Any]) -> None:
    """One line by one write: a process that is killed leaves whole lines, and those of two processes never mix."""
    line = (json.dumps(plain(entry)) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """Whole lines only; a disk that was full may have left others."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


class Results:
    """The results of one step. `recover` is called after an unexpected error; it raises if the device is lost."""

    def __init__(self, path: Path, step: str, limit_s: float, recover: Callable[[], None] = lambda: None):
        self.path, self.step, self.recover = path, step, recover
        self.end = time.monotonic() + limit_s
        self.failed = 0

    def left(self) -> float:
        """Seconds until this step is stopped."""
        return self.end - time.monotonic()

    def add(self, check: str, ok: bool = True, **values: Any) -> None:
        self.failed += not ok
        append(self.path, {"step": self.step, "check": check, "ok": ok, **values})
        shown = " ".join(f"{key} {plain(value)}" for key, value in values.items() if key != "error")
        print(f"{'ok  ' if ok else 'FAIL'} {self.step}: {check} {shown}", flush=True)
        if "error" in values:
            print(values["error"], flush=True)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """What the body puts into the dict is written when it ends; an error in it is a result too."""
        found: dict[str, Any] = {}
        start = time.monotonic()

        def seconds() -> float:
            return round(time.monotonic() - start, 3)

        try:
            yield found
        except Wrong as wrong:
            self.add(name, False, **found, seconds=seconds(), error=str(wrong))
        except Skipped as reason:
            self.add(name, True, **found, skipped=str(reason))
        except Exception as error:
            lines = traceback.format_exc().splitlines()[-ERROR_LINES:]
            self.add(name, False, **found, seconds=seconds(), error="\n".join(lines))
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            self.recover()
        else:
            self.add(name, True, **found, seconds=seconds())

    def within(self, cases: Sequence[T], reserve_s: float = 3.0) -> Iterator[T]:
        """The cases in order while there is time; then says how many were left out."""
        for place, case in enumerate(cases):
            if self.left() < reserve_s:
                self.add("cut at the limit", left_out=len(cases) - place, first=str(case))
                return
            yield case

    def figure(self, step: str, check: str, name: str) -> float | None:
        """What an earlier step of this run found, if it did."""
        for entry in read(self.path):
            if entry.get("step") == step and entry.get("check") == check:
                value = entry.get(name)
                return value if isinstance(value, (int, float)) else None
        return None


# ------------------------------------------------------------------------------------------------------------- summary


def figures(entry: dict[str, Any]) -> str:
    values = {key: value for key, value in entry.items() if key not in HIDDEN}
    return ", ".join(f"{key} {value}" for key, value in values.items())


def last_line(entry: dict[str, Any]) -> str:
    return (str(entry.get("error", "")).strip().splitlines() or [""])[-1]


def summary(entries: list[dict[str, Any]]) -> str:
    """How the steps ended, then the failed checks, then what was measured."""
    ends = [entry for entry in entries if "rc" in entry]
    checks = [entry for entry in entries if "check" in entry]
    lines = ["", f"{'step':14} {'ended':18} {'rc':>4} {'s':>6} {'limit':>6} {'checks':>7} {'failed':>7}"]
    for end in ends:
        own = [entry for entry in checks if entry.get("step") == end.get("step")]
        lines.append(
            f"{end.get('step', '?'):14} {end.get('ended', '?'):18} {end['rc'] if end['rc'] is not None else '-':>4}"
            f" {end.get('seconds', 0):6} {end.get('limit', 0):6} {len(own):7}"
            f" {sum(not entry.get('ok') for entry in own):7}"
        )
    wrong = [entry for entry in checks if not entry.get("ok")]
    bad = [end for end in ends if end["rc"] != 0]
    lines += ["", f"{len(wrong)} of {len(checks)} checks failed" + (":" if wrong else "")]
    lines += [f"  {entry['step']}: {entry['check']}: {last_line(entry)[:160]}" for entry in wrong[:40]]
    dry = any(entry.get("dry") for entry in checks)
    measured = [entry for entry in checks if entry.get("measured") and not dry]
    measured.sort(key=lambda entry: not entry["check"].startswith("best of"))  # the last step's come first
    lines += ["  a dry run: it measures nothing"] if dry else []
    lines += [f"  {entry['step']}: {entry['check']}: {figures(entry)[:150]}" for entry in measured[:60]]
    named = ", ".join(f"{end['step']} ({end.get('ended')})" for end in bad)
    lines += ["", f"not right: {named}" if named else f"all {len(ends)} steps are right"]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- keep


def keep(folder: Path, kept: Path = KEPT) -> Path:
    """Copies folder/results.jsonl to DATE-CARD.jsonl and renders the table of all that are kept."""
    source = folder / "results.jsonl"
    entries = read(source)
    card = next((entry for entry in entries if entry.get("check") == "card"), None)
    if card is None:
        raise SystemExit(f"{source} names no card: step ceilings did not get that far.")
    if card.get("dry"):
        raise SystemExit(f"{source} comes from a dry run, which measures nothing.")
    name = re.sub(r"[^a-z0-9]+", "-", str(card["name"]).lower()).strip("-")
    day = str(card.get("date") or date.today().isoformat())
    target = kept / f"{day}-{name}.jsonl"
    number = 1
    while target.exists():  # another run of the same day
        number += 1
        target = kept / f"{day}-{name}-{number}.jsonl"
    target.write_bytes(source.read_bytes())
    (kept / "README.md").write_text(table(sorted(kept.glob("*.jsonl"))), encoding="utf-8")
    return target


def table(files: Sequence[Path]) -> str:
    """Markdown for the README of the kept results."""
    lines = [
        "# Results on GPUs",
        "",
        "What `bash benchmarks/gpu_check.sh` found, a file for each run: `DATE-CARD.jsonl`, one result a line. The tables",
        "are rendered from them by `python benchmarks/gpu_check.py keep OUT`.",
    ]
    if not files:
        lines += [
            "",
            "No run has been made yet: this folder holds no result, and no figure for a GPU is known.",
        ]
    for file in files:
        lines += ["", f"## {file.stem}", ""]
        entries = read(file)
        ends = {entry["step"]: entry for entry in entries if "rc" in entry}
        lines += ["| step | ended | checks | failed |", "|---|---|---|---|"]
        for name, end in ends.items():
            own = [entry for entry in entries if entry.get("step") == name and "check" in entry]
            failed = sum(not entry.get("ok") for entry in own)
            lines.append(f"| {name} | {end.get('ended')} | {len(own)} | {failed} |")
        shown = [
            entry for entry in entries if entry.get("measured") or ("check" in entry and not entry["ok"])
        ]
        lines += ["", "| step | what | found |", "|---|---|---|"] if shown else []
        for entry in shown:
            found = figures(entry) if entry["ok"] else f"failed: {last_line(entry)}"
            lines.append(f"| {entry['step']} | {entry['check']} | {found.replace('|', '/')[:300]} |")
    return "\n".join(lines) + "\n"
