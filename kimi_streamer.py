"""Shows in a terminal what the model is generating: `model.generate(..., streamer=KimiTextStreamer(tokenizer))`.

In a terminal the reasoning is dim, the answer plain, and each tool call a box as wide as the terminal at most:

    ╭─ functions.get_weather:0 ────────────────────╮
    │ {"city": "Beijing"}                          │
    ╰──────────────────────────────────────────────╯

Everywhere else (a pipe, a file, TERM=dumb, or the variable NO_COLOR set) it is the same text without colours and lines:

    [tool call functions.get_weather:0] {"city": "Beijing"}

What a model writes may hold escape sequences, by accident or because somebody put them into what it read. A terminal
would execute them: move the cursor, change the title, hide lines. So control characters, and characters that change
the writing direction, are never printed; they are shown as `␛` and the like.
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any, TextIO

from transformers.generation.streamers import BaseStreamer

from .kimi_output import Event, KimiCompletionStream, as_ids

DIM, RESET = "\x1b[2m", "\x1b[0m"
MAX_BOX_WIDTH = 100  # columns; longer lines are hard to read
MIN_BOX_WIDTH = 20
MAX_RAW_WIDTH = 200  # of an invalid call; the message has all of it

# Everything below U+0020 but newline and tab is shown as its control picture from U+2400 on, as is DEL. The second range
# of controls (U+009B alone opens an escape sequence) and the characters for the writing direction have no such picture.
VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
VISIBLE[0x7F] = 0x2421
VISIBLE.update(dict.fromkeys([*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F], 0xFFFD))
VISIBLE.update(dict.fromkeys([*range(0x2028, 0x202F), *range(0x2066, 0x206A)], 0xFFFD))


def neutralize(text: str) -> str:
    """The text without control characters that a terminal would execute, except newline and tab."""
    return text.translate(VISIBLE)


def num_columns(character: str) -> int:
    """Cells that a character takes. Emoji made of several characters count as their parts."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class PlainDisplay:
    """Text for a pipe or a file. `write` gets neutralised text only; so do the displays derived from it."""

    def __init__(self, out: TextIO):
        self._out = out
        self._part = ""  # the kind of what was shown last
        self._line_open = False

    def show(self, event: Event) -> None:
        text = neutralize(event.text)
        if event.kind in ("reasoning", "content"):
            if event.kind != self._part:
                self.separate()
            self.text(event.kind, text)
        elif event.kind == "call_begin":
            self.separate()
            self.open_call(one_line(event.id))
        elif event.kind == "arguments":
            self.arguments(text)
        else:
            self.close_call()
        self._part = event.kind

    def note(self, text: str) -> None:
        self.separate()
        self.write(f"[{one_line(text)}]\n")

    def separate(self) -> None:
        """A new line, unless one begins here anyway."""
        if self._line_open:
            self.write("\n")

    def text(self, kind: str, text: str) -> None:
        self.write(text)

    def open_call(self, call_id: str) -> None:
        self.write(f"[tool call {call_id}] ")

    def arguments(self, text: str) -> None:
        self.write(text)

    def close_call(self) -> None:
        self.separate()

    def write(self, text: str) -> None:
        if not text:
            return
        self._line_open = not text.endswith("\n")
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        # A terminal whose encoding lacks Chinese shows question marks.
        self._out.write(text.encode(encoding, "replace").decode(encoding))
        self._out.flush()


class TerminalDisplay(PlainDisplay):
    """Dim reasoning, and a box around each call that grows line by line while its arguments come."""

    def __init__(self, out: TextIO):
        super().__init__(out)
        self._width = 0  # columns of the open box, borders included
        self._line = ""  # of the open box, not shown yet
        self._columns = 0  # that `_line` takes

    def text(self, kind: str, text: str) -> None:
        if kind == "reasoning":
            # Dim piece by piece, so that an interrupted run leaves no dim terminal behind.
            line_open = not text.endswith("\n")
            self.write(f"{DIM}{text}{RESET}")
            self._line_open = line_open
        else:
            self.write(text)

    def open_call(self, call_id: str) -> None:
        columns = shutil.get_terminal_size().columns
        self._width = max(min(columns - 1, MAX_BOX_WIDTH), MIN_BOX_WIDTH)
        title = cut(f"─ {call_id}", self._width - 4)
        self.write(f"╭{fill(title + ' ', '─', self._width - 2)}╮\n")

    def arguments(self, text: str) -> None:
        for character in text.expandtabs(4):
            columns = 0 if character == "\n" else num_columns(character)
            if character == "\n" or self._columns + columns > self._width - 4:
                self._end_box_line()
            if character != "\n":
                self._line += character
                self._columns += columns

    def close_call(self) -> None:
        if self._width:
            self._end_box_line()
            self.write(f"╰{'─' * (self._width - 2)}╯\n")
            self._width = 0

    def note(self, text: str) -> None:
        self.close_call()  # the call that was cut off
        super().note(text)

    def _end_box_line(self) -> None:
        self.write(f"│ {fill(self._line, ' ', self._width - 4)} │\n")
        self._line, self._columns = "", 0


def one_line(text: str) -> str:
    return neutralize(text).replace("\n", "␊").replace("\t", "␉")


def cut(text: str, width: int) -> str:
    """As much of `text` as fits into `width` columns."""
    columns = 0
    for index, character in enumerate(text):
        columns += num_columns(character)
        if columns > width:
            return text[:index]
    return text


def fill(text: str, character: str, width: int) -> str:
    return text + character * (width - sum(map(num_columns, text)))


def display_for(out: TextIO) -> PlainDisplay:
    is_terminal = hasattr(out, "isatty") and out.isatty()
    plain = not is_terminal or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return PlainDisplay(out) if plain else TerminalDisplay(out)


class KimiTextStreamer(BaseStreamer):
    """Prints one completion as it is generated. Can be used again for the next call of `generate`.

    skip_prompt: leaves out the prompt, which `generate` hands over first.
    out: where to print; standard output if not given, whatever that is when the first token comes.

    After a completion, `message` is what `parse_completion` returns for it.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, out: TextIO | None = None):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.out = out
        self.message: dict[str, Any] | None = None
        self._stream: KimiCompletionStream | None = None
        self._display: PlainDisplay | None = None

    def put(self, value: Any) -> None:
        """Takes the prompt the first time, then generated ids: a tensor of shape (T,) or (1, T)."""
        ids = ids_of_one_row(value)
        if self._stream is None or self._display is None:
            self._stream = KimiCompletionStream(self.tokenizer)
            self._display = display_for(self.out or sys.stdout)
            if not self.skip_prompt:
                self._display.write(neutralize(self.tokenizer.decode(ids)) + "\n")
            return
        for event in self._stream.feed_events(ids):
            self._display.show(event)

    def end(self) -> None:
        if self._stream is None or self._display is None:
            return
        for event in self._stream.finish_events():
            self._display.show(event)
        self.message = self._stream.result()
        for call in self.message.get("unparsed_tool_calls", ()):
            raw = cut(one_line(call["raw"]), MAX_RAW_WIDTH)
            self._display.note(f"tool call that cannot be used, {call['error']}: {raw}")
        self._display.separate()
        self._stream = self._display = None


def ids_of_one_row(value: Any) -> list[int]:
    rows = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(rows, Sequence) and rows and isinstance(rows[0], Sequence):
        if len(rows) > 1:
            raise ValueError(f"KimiTextStreamer shows one completion at a time, not a batch of {len(rows)}")
        rows = rows[0]
    return as_ids(rows)
