"""What the model generates, to reasoning, content and tool calls: whole or piece by piece.

The prompt ends with an open `<think>`, so a completion begins inside the reasoning:

    completion := reasoning "</think>" content [section] "<|im_end|>"
    section    := "<|tool_calls_section_begin|>" call+ "<|tool_calls_section_end|>"
    call       := "<|tool_call_begin|>" id "<|tool_call_argument_begin|>" arguments "<|tool_call_end|>"
    id         := "functions." name ":" digits          (counts the calls of the whole conversation)

There is one parser, `CompletionParser`, a state machine with five states. Whole text is a stream of one piece.

    state       ends at                                             what its text is
    REASONING   </think> -> CONTENT; section or call -> tools       reasoning
    CONTENT     section or call -> tools                            content, without any further </think>
    BETWEEN     call -> HEADER                                      dropped
    HEADER      argument marker -> ARGUMENTS; any other tool        id, trimmed
                marker -> BETWEEN, error `missing_arguments`
    ARGUMENTS   end of the call or of the section -> BETWEEN        arguments, trimmed, never read as JSON

`<|im_end|>` stops it in every state. A marker that is not listed for a state is plain text in it. Reasoning and
content keep their whitespace: rendered again behind the same prompt, a complete completion gives the same bytes.

All markers begin with `<` and contain no second one. So what may be the first half of a marker, and is held back until
more comes, can only begin at the last `<`; each character is looked at a fixed number of times.

Text cannot tell the marker `</think>` from a text that spells it; token ids can. Give ids where there are ids: then
only marker tokens are markers, and ordinary tokens are text whatever they spell.
"""

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

THINK, THINK_END = "<think>", "</think>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
STOP = "<|im_end|>"
MARKERS = (THINK, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_END, ARGUMENT_BEGIN, STOP)
STOP_TOKENS = (STOP, "[EOS]", "[EOT]")  # the last two end a sequence as tokens only, never as text


class State:
    """A state of the parser, with the markers that it recognises; all others are text."""

    def __init__(self, *markers: str):
        self.find = re.compile("|".join(map(re.escape, markers))).search
        self._prefixes = {marker[:length] for marker in markers for length in range(1, len(marker))}
        self._longest = max(map(len, self._prefixes))

    def held_from(self, text: str, start: int) -> int:
        """Where the part of `text` begins that may turn out to be a marker: at its end if there is none."""
        last = text.rfind("<", max(start, len(text) - self._longest))
        return last if last >= 0 and text[last:] in self._prefixes else len(text)


REASONING = State(THINK_END, SECTION_BEGIN, CALL_BEGIN, STOP)
CONTENT = State(THINK_END, SECTION_BEGIN, CALL_BEGIN, STOP)
BETWEEN = State(SECTION_BEGIN, SECTION_END, CALL_BEGIN, STOP)
HEADER = State(ARGUMENT_BEGIN, CALL_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, STOP)
ARGUMENTS = State(CALL_END, SECTION_END, STOP)


class Event(NamedTuple):
    """kind: reasoning, content, call_begin, arguments or call_end. The last three belong to call number `index`."""

    kind: str
    text: str = ""
    index: int = -1  # type: ignore[assignment]  # hides tuple.index(), which is never called
    id: str = ""
    name: str = ""


class CompletionParser:
    """Reads a completion in pieces of any size; no text makes it raise.

    `feed` and `finish` return what is certain so far. A call is announced once its id is complete and well
    formed, so one that is cut off later was announced but is not among the `tool_calls` of the result.
    """

    def __init__(self) -> None:
        self._state = REASONING
        self._at_start = True  # nothing but <think> so far
        self._implicit_reasoning_end = False
        self._in_section = False
        self._stopped = False
        self._finished = False
        self._held = ""  # may be the first half of a marker
        self._events: list[Event] = []  # of this feed
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._unparsed: list[dict[str, str]] = []
        self._begin_call()

    @property
    def finished(self) -> bool:
        return self._finished

    def feed(self, text: str, literal: bool = False) -> list[Event]:
        """Reads on. With `literal`, nothing in `text` is a marker, nor is it the second half of one."""
        if self._finished:
            raise ValueError("the completion is finished: a new one needs a new parser")
        if self._stopped or not text:
            return []
        text, self._held = self._held + text, ""
        if literal:
            self._at_start = False
            self._read_text(text)
        else:
            self._read_markers(text)
        return self._take_events()

    def finish(self) -> list[Event]:
        """Ends the input. What was held back is text after all, and an open call is cut off."""
        if not self._finished:
            self._finished = True
            if not self._stopped:
                self._read_text(self._held)
            if self._state in (HEADER, ARGUMENTS):
                self._reject_call("truncated")
        return self._take_events()

    def result(self) -> dict[str, Any]:
        """The message; finishes the parser first if that was not done. Keys: role, reasoning_content, content, status,
        and, where they apply, implicit_reasoning_end, tool_calls, unparsed_tool_calls."""
        self.finish()
        message: dict[str, Any] = {
            "role": "assistant",
            "reasoning_content": "".join(self._reasoning),
            "content": "".join(self._content),
        }
        if self._implicit_reasoning_end:
            message["implicit_reasoning_end"] = True
        if self._calls:
            message["tool_calls"] = [{**call, "function": {**call["function"]}} for call in self._calls]
        if self._unparsed:
            message["unparsed_tool_calls"] = [dict(entry) for entry in self._unparsed]
        message["status"] = self._status()
        return message

    def _status(self) -> str:
        if self._stopped:
            return "stopped_in_reasoning" if self._state is REASONING else "complete"
        if self._state is REASONING:
            return "truncated_in_reasoning"
        if self._state is CONTENT:
            return "truncated_in_content"
        if self._in_section or self._state is not BETWEEN:
            return "truncated_in_tool_calls"
        return "truncated_after_tool_calls"

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # One step each

    def _read_markers(self, text: str) -> None:
        position = 0
        if self._at_start:
            while text.startswith(THINK, position):
                position += len(THINK)
            rest = text[position : position + len(THINK)]
            if THINK.startswith(rest):  # may be one more, also when there is no rest at all
                self._held = rest
                return
            self._at_start = False
        while match := self._state.find(text, position):
            self._read_text(text[position : match.start()])
            self._read_marker(match.group())
            position = match.end()
            if self._stopped:
                return
        end = self._state.held_from(text, position)
        self._read_text(text[position:end])
        self._held = text[end:]

    def _read_text(self, text: str) -> None:
        if not text:
            return
        if self._state is REASONING:
            self._reasoning.append(text)
            self._events.append(Event("reasoning", text))
        elif self._state is CONTENT:
            self._content.append(text)
            self._events.append(Event("content", text))
        elif self._state is HEADER:
            self._header.append(text)
        elif self._state is ARGUMENTS:
            self._arguments.append(text)
            if self._name:
                self._emit_trimmed(text)

    def _read_marker(self, marker: str) -> None:
        if marker == STOP:
            self._stopped = True
        elif marker == THINK_END:  # a second one leaves the content as it is
            self._state = CONTENT
        elif self._state is HEADER and marker == ARGUMENT_BEGIN:
            self._begin_arguments()
        else:
            if self._state is REASONING:
                self._implicit_reasoning_end = True
            elif self._state is HEADER:
                self._reject_call("missing_arguments", marker)
            elif self._state is ARGUMENTS:
                self._end_call(marker)
            self._state = BETWEEN
            self._read_marker_between_calls(marker)

    def _read_marker_between_calls(self, marker: str) -> None:
        if marker == CALL_BEGIN:
            self._state = HEADER
            self._begin_call()
        elif marker != CALL_END:
            self._in_section = marker == SECTION_BEGIN

    # One call

    def _begin_call(self) -> None:
        self._header: list[str] = []
        self._arguments: list[str] = []
        self._id = self._name = ""  # without a name the id has another shape
        # Trailing whitespace so far; None before the first other character.
        self._blanks: list[str] | None = None

    def _begin_arguments(self) -> None:
        self._state = ARGUMENTS
        self._id = "".join(self._header).strip()
        self._name = name_of_call(self._id)
        if self._name:
            self._events.append(Event("call_begin", index=len(self._calls), id=self._id, name=self._name))

    def _emit_trimmed(self, text: str) -> None:
        """Arguments as far as they are certain: blanks wait for what follows them."""
        if self._blanks is None:
            text = text.lstrip()
        body = text.rstrip()
        if body:
            piece = "".join(self._blanks or ()) + body
            self._events.append(Event("arguments", piece, index=len(self._calls)))
            self._blanks = [text[len(body) :]]
        elif self._blanks is not None:
            self._blanks.append(text)

    def _end_call(self, marker: str) -> None:
        if not self._name:
            self._reject_call("bad_id", marker)
            return
        index = len(self._calls)
        if self._blanks is None:
            self._events.append(Event("arguments", "{}", index=index))
        self._events.append(Event("call_end", index=index))
        function = {"name": self._name, "arguments": "".join(self._arguments).strip() or "{}"}
        self._calls.append({"id": self._id, "type": "function", "function": function})

    def _reject_call(self, error: str, marker: str = "") -> None:
        """Keeps the text of a call that cannot be used. `marker` ended it, which counts as its own end marker only."""
        raw = [CALL_BEGIN, *self._header]
        if self._state is ARGUMENTS:
            raw += [ARGUMENT_BEGIN, *self._arguments]
        raw += [marker] if marker == CALL_END else []
        self._unparsed.append({"raw": "".join(raw), "error": error})


def name_of_call(call_id: str) -> str:
    """`functions.mcp.fs:0` -> `mcp.fs`; an empty string if the id has another shape. The prefix may be missing."""
    name, colon, digits = call_id.rpartition(":")
    well_formed = colon and digits.isascii() and digits.isdigit()
    return name.removeprefix("functions.") if well_formed else ""


# Streams of text, bytes or token ids


class TokenReader:
    """Token ids to (text, literal) pieces for `CompletionParser.feed`. Bytes of a cut character wait for the rest."""

    def __init__(self, tokenizer: Any):
        ids = tokenizer.special_tokens
        self._tokenizer = tokenizer
        self._markers = {ids[name]: name for name in MARKERS if name in ids}
        self._markers.update((ids[name], STOP) for name in STOP_TOKENS if name in ids)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self, ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
        run: list[int] = []
        for index in ids:
            if marker := self._markers.get(index):
                yield self._decode(self._bytes_of(run), True), True
                yield marker, False
                run = []
            else:
                run.append(index)
        yield self._decode(self._bytes_of(run)), True

    def rest(self) -> str:
        return self._decode(b"", True)

    def _bytes_of(self, ids: list[int]) -> bytes:
        try:
            return self._tokenizer.model.decode_bytes(ids)
        except (KeyError, OverflowError):  # an id that a user added, or none at all
            return b"".join(map(self._bytes_of_one, ids))

    def _bytes_of_one(self, index: int) -> bytes:
        """Those of a token that a user added come from the tokenizer, which raises if there is no such token."""
        try:
            return self._tokenizer.model.decode_single_token_bytes(index)
        except (KeyError, OverflowError):
            return self._tokenizer.decode([index]).encode("utf-8", "replace")


class KimiCompletionStream:
    """A completion while it is generated, as deltas in the shape of OpenAI's chat completions.

        stream = KimiCompletionStream(tokenizer)
        for chunk in chunks:  # all str, or all bytes, or all token ids: one, or a row (list, array, tensor)
            for delta in stream.feed(chunk): ...
        for delta in stream.finish(): ...
        stream.result(), stream.finish_reason

    A delta is {"reasoning_content": text}, {"content": text} or {"tool_calls": [{"index", ...}]}; the first one of a
    call has id, type and name, the following ones have pieces of its arguments. No marker is ever part of a delta.
    The tokenizer is needed for ids only.
    """

    def __init__(self, tokenizer: Any = None):
        self._parser = CompletionParser()
        self._tokens = TokenReader(tokenizer) if tokenizer is not None else None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, chunk: Any) -> list[dict[str, Any]]:
        return [delta_of(event) for event in self.feed_events(chunk) if event.kind != "call_end"]

    def finish(self) -> list[dict[str, Any]]:
        return [delta_of(event) for event in self.finish_events() if event.kind != "call_end"]

    def feed_events(self, chunk: Any) -> list[Event]:
        """What `feed` returns as deltas, and the end of each call."""
        if isinstance(chunk, str):
            return self._parser.feed(chunk)
        if isinstance(chunk, (bytes, bytearray, memoryview)):
            return self._parser.feed(self._decode(chunk))
        ids = as_ids(chunk)
        if self._tokens is None:
            raise ValueError("token ids need the tokenizer: give it to the stream, or to parse_completion")
        return [
            event for text, literal in self._tokens.read(ids) for event in self._parser.feed(text, literal)
        ]

    def finish_events(self) -> list[Event]:
        if self._parser.finished:
            return []
        events = self._parser.feed(self._decode(b"", True))
        if self._tokens is not None:
            events += self._parser.feed(self._tokens.rest(), literal=True)
        return events + self._parser.finish()

    def result(self) -> dict[str, Any]:
        """The message, as `parse_completion` returns it. Finishes the stream if that was not done."""
        self.finish_events()
        return self._parser.result()

    @property
    def finish_reason(self) -> str | None:
        """None until the stream is finished."""
        return finish_reason(self._parser.result()) if self._parser.finished else None


def delta_of(event: Event) -> dict[str, Any]:
    if event.kind == "reasoning":
        return {"reasoning_content": event.text}
    if event.kind == "content":
        return {"content": event.text}
    call: dict[str, Any] = {"index": event.index}
    if event.kind == "call_begin":
        call.update(id=event.id, type="function", function={"name": event.name, "arguments": ""})
    else:
        call["function"] = {"arguments": event.text}
    return {"tool_calls": [call]}


def as_ids(chunk: Any) -> list[int]:
    """One id, or one row of them: a list, a tuple, an array or a tensor."""
    ids = chunk.tolist() if hasattr(chunk, "tolist") else chunk
    ids = [ids] if isinstance(ids, int) else ids
    if not isinstance(ids, (list, tuple)):
        raise ValueError(f"a completion is text, bytes or token ids, not {type(chunk).__name__}")
    ids = [index.item() if hasattr(index, "item") else index for index in ids]
    for index in ids:
        if not isinstance(index, int):
            raise ValueError(f"token ids must be one row of integers, not {type(index).__name__}s in a row")
    return ids


def parse_completion(text_or_ids: Any, tokenizer: Any = None) -> dict[str, Any]:
    """A completion as a message: what was generated after the prompt, as text, bytes or token ids.

    Keys: role; reasoning_content and content, which may be empty; status; if there are any, tool_calls in the shape of
    OpenAI's chat completions, with arguments as the text that was generated, and unparsed_tool_calls as {"raw",
    "error"}, where error is bad_id, missing_arguments or truncated; implicit_reasoning_end, if tool calls began inside
    the reasoning. The status is `complete` only if a stop token ended an answer; `stopped_in_reasoning`, or
    `truncated_` with in_reasoning, in_content, in_tool_calls or after_tool_calls says where it was cut off.

    Ids need the tokenizer. Raises ValueError for other types, never for the content.
    """
    stream = KimiCompletionStream(tokenizer)
    stream.feed_events(text_or_ids)
    return stream.result()


def finish_reason(message: Mapping[str, Any]) -> str:
    """tool_calls, stop or length, as OpenAI's field of that name says it of a parsed message."""
    if message.get("tool_calls"):
        return "tool_calls"
    return "stop" if message["status"] in ("complete", "stopped_in_reasoning") else "length"
