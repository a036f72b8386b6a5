"""A chat in the terminal: thoughts dim, answers plain, tool calls in boxes.

    python -m scripts.chat [--model FOLDER] [--max-tokens N] [--temperature T] [--seed S]

    /image PATH    adds a picture to the next message        /new     forgets the conversation
    /video PATH    adds a clip to the next message           /quit    ends, as does the end of the input

Ctrl-C ends an answer. Reads lines from a pipe, too; what it writes there has no colours. Each turn computes only what is
new: the cache of the turns before is kept (see serve/engine.py).
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any, TextIO

from kimi.kimi_media import existing_file, open_image
from kimi.kimi_streamer import DIM, RESET, TerminalDisplay, display_for, one_line
from kimi.kimi_video import open_video
from serve.engine import Completion, Engine, Sampling, load

HELP = "/image PATH, /video PATH, /new, /quit"
DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "kimi-tiny"


class Chat:
    """A conversation with an engine. `messages` grows by two with each turn that came to an end."""

    def __init__(self, engine: Engine, sampling: Sampling, out: TextIO):
        self.engine, self.sampling, self.out = engine, sampling, out
        self.messages: list[dict[str, Any]] = []
        self.media: list[dict[str, Any]] = []  # of the next message

    def run(self, lines: TextIO) -> None:
        """Until /quit or the end of the input."""
        prompt = "> " if lines.isatty() else ""
        self.note(f"{HELP}\n")
        while True:
            self.out.write(prompt)
            self.out.flush()
            try:
                line = lines.readline()
            except KeyboardInterrupt:
                break
            if not line or line.strip() == "/quit":
                break
            if line.strip():
                self.take(line.strip())

    def take(self, line: str) -> None:
        """One line of the user: a command or a message."""
        command, _, rest = line.partition(" ")
        if command == "/new":
            self.messages, self.media = [], []
            self.note("a new conversation\n")
        elif command in ("/image", "/video"):
            self.attach(command[1:], rest.strip())
        elif command.startswith("/") and "/" not in command[1:]:
            self.note(f"{one_line(command)} is no command; there are {HELP}\n")
        else:
            self.answer(line)

    def attach(self, kind: str, path: str) -> None:
        """Reads the file now: a wrong one is refused when it is named, and a later turn needs it again."""
        try:
            data = existing_file(Path(path).expanduser()).read_bytes()
            size = open_image(data).size if kind == "image" else open_video(data).size
        except (ValueError, OSError) as error:
            self.note(f"{one_line(str(error))}\n")
            return
        self.media.append({"type": kind, kind: data})
        self.note(f"{kind} of {size[0]} x {size[1]} pixels, for the next message\n")

    def answer(self, text: str) -> None:
        content = [*self.media, {"type": "text", "text": text}] if self.media else text
        messages = [*self.messages, {"role": "user", "content": content}]
        display = display_for(self.out)
        done = None
        try:
            prompt = self.engine.prepare(messages)
            with contextlib.closing(self.engine.stream(prompt, self.sampling)) as events:
                for event in events:
                    if isinstance(event, Completion):
                        done = event
                    else:
                        display.show(event)
        except KeyboardInterrupt:
            display.note("interrupted; this turn is forgotten")
        except (ValueError, OSError, RuntimeError) as error:
            display.note(str(error))
        if done is None:
            return
        display.separate()
        self.messages, self.media = [*messages, done.message], []
        if isinstance(display, TerminalDisplay):
            display.close_call()
        self.note(summary(done))

    def note(self, text: str) -> None:
        dim = isinstance(display_for(self.out), TerminalDisplay)
        self.out.write(f"{DIM}{text}{RESET}" if dim else text)
        self.out.flush()


def summary(done: Completion) -> str:
    """Tokens and rates. The first token comes out of the prefill, so the rate counts the others."""
    rate = (done.completion_tokens - 1) / max(done.seconds - done.first_s, 1e-9)
    speed = f", {rate:.1f} tokens/s" if done.completion_tokens > 1 else ""
    cut = "; cut off at the limit" if done.finish_reason == "length" else ""
    return (
        f"[{done.prompt_tokens} tokens read, {done.cached_tokens} of them from the cache, first after"
        f" {done.first_s:.2f} s; {done.completion_tokens} written{speed}{cut}]\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="folder of the checkpoint")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of one answer, thoughts included")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token each time")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    if not args.model.is_dir():
        sys.exit(f"--model: there is no folder {args.model}")
    engine = Engine(*load(args.model), max_caches=1)
    try:
        Chat(engine, Sampling(args.max_tokens, args.temperature, args.top_p, args.seed), sys.stdout).run(
            sys.stdin
        )
    finally:
        engine.close()


if __name__ == "__main__":
    main()
