"""Kimi CLI against the endpoint: connects, streams, declares its tools, calls one, and ends its turn.

    python -m venv CLI && CLI/bin/pip install kimi-cli==1.51.0       Python 3.12 or later, an environment of its own
    python tests/clients/kimi_cli.py --kimi CLI/bin/kimi [--model FOLDER]

1.51.0 is the last release that works: 1.52.0 prints that it is no longer maintained and ends. Without --model the model
is the tests' parrot, told to read a file with the CLI's own tool and then to answer; both are checked. With --model it is
that checkpoint, asked which of two numbers is bigger: what it answers is printed, and that the turn ended is checked.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import uvicorn  # noqa: E402
from parrot import load_parrot, script  # noqa: E402

from serve.__main__ import make_app  # noqa: E402
from serve.engine import Engine, load  # noqa: E402

QUESTION = "Which one is bigger, 9.11 or 9.9? Think carefully."
TIMEOUT_S = 500
CONFIG = """
default_model = "local"
telemetry = false
[models.local]
provider = "endpoint"
model = "local"
max_context_size = 131072
capabilities = ["thinking"]
[providers.endpoint]
type = "openai_legacy"
base_url = "http://127.0.0.1:{port}/v1"
api_key = "none"
"""


class Recorder:
    """Remembers what an engine was asked and what it answered, in front of the real `submit`."""

    def __init__(self, engine: Engine):
        self.jobs: list = []
        submit = engine.submit

        def recorded(job):
            self.jobs.append((job, emit := job.emit, answers := []))
            job.emit = lambda item: (answers.append(item), emit(item))
            return submit(job)

        engine.submit = recorded


def start(engine: Engine) -> tuple[uvicorn.Server, int]:
    server = uvicorn.Server(uvicorn.Config(make_app(engine, "local"), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return server, server.servers[0].sockets[0].getsockname()[1]


def run_cli(kimi: str, port: int, folder: Path, prompt: str) -> subprocess.CompletedProcess:
    config = folder / "config.toml"
    config.write_text(CONFIG.format(port=port), encoding="utf-8")
    work = folder / "work"
    work.mkdir()
    (work / "numbers.txt").write_text("473, 921, 235, 215, 222\n", encoding="utf-8")
    env = {**os.environ, "HOME": str(folder), "KIMI_SHARE_DIR": str(folder / "share")}
    line = [
        kimi,
        "--print",
        "--config-file",
        str(config),
        "--work-dir",
        str(work),
        "--max-steps-per-turn",
        "4",
    ]
    return subprocess.run(
        [*line, "--command", prompt],
        env=env,
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kimi", required=True, help="the executable of Kimi CLI")
    parser.add_argument(
        "--model", type=Path, help="a checkpoint to talk to; without, the tests' scripted model"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = Engine(*(load(args.model) if args.model else load_parrot(folder)), default_max_tokens=512)
        recorder = Recorder(engine)
        server, port = start(engine)
        told = script(
            "I read the file.",
            "",
            [["functions.ReadFile:0", {"path": "numbers.txt"}]],
            then={"reasoning": "There they are.", "content": "The other two are 215 and 222."},
        )
        done = run_cli(args.kimi, port, folder, QUESTION if args.model else told)
        server.should_exit = True
        print(done.stdout, done.stderr, sep="\n")
        for job, _, answers in recorder.jobs:
            last = answers[-1]
            print(
                f"step: {len(job.prompt)} tokens read ({last.cached_tokens} cached), {len(answers) - 1} events,"
                f" {last.finish_reason}"
            )
        tokenizer = engine.tokenizer
        prompts = [tokenizer.decode(job.prompt.inputs["input_ids"][0]) for job, _, _ in recorder.jobs]
        checks = {
            "exit status 0": done.returncode == 0,
            "asked at least once": bool(prompts),
            "tools declared": bool(prompts) and "type ReadFile = " in prompts[0],
        }
        if not args.model:
            checks["second step holds the file"] = len(prompts) == 2 and "473, 921, 235" in prompts[1]
            checks["second step holds the thought"] = (
                len(prompts) == 2 and "I read the file.</think>" in prompts[1]
            )
            checks["answer shown"] = "The other two are 215 and 222." in done.stdout
        for what, right in checks.items():
            print(f"{what}: {'yes' if right else 'NO'}")
        return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
