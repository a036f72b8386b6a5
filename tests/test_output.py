"""Completions to messages: golden cases whole and cut anywhere, an oracle written the other way round, ids, schemas."""

import json
import random
import re
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from kimi.kimi_output import (
    ARGUMENT_BEGIN,
    ARGUMENTS,
    BETWEEN,
    CALL_BEGIN,
    CALL_END,
    CONTENT,
    HEADER,
    MARKERS,
    REASONING,
    SECTION_BEGIN,
    SECTION_END,
    STOP,
    THINK,
    THINK_END,
    CompletionParser,
    KimiCompletionStream,
    finish_reason,
    name_of_call,
    parse_completion,
)
from kimi.tokenization_kimi import TikTokenTokenizer
from scripts.tiny_checkpoint import write_tokenizer

GOLDEN = json.loads((DATA / "output_golden.json").read_bytes())
OPEN_PROMPT = "<|im_assistant|>assistant<|im_middle|><think>"

# Markers, halves of markers, ids of every shape, blanks that are trimmed, text of several bytes.
PARTS = [
    *MARKERS,
    "<",
    "<|",
    "<|tool_call",
    "</thi",
    "nk>",
    "_begin|>",
    "|>",
    "functions.f:0",
    "f.g:12",
    "functions.:1",
]
PARTS += ["bad", ":", "{}", '{"a": "', " ", "\n", "\u3000", "的", "🧑‍💻", "\ud83e", "[EOS]", "x" * 30]
COMPLETIONS = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=3)), max_size=14).map("".join)
golden = pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    write_tokenizer(folder)
    return TikTokenTokenizer.from_pretrained(folder)


def call(arguments, name="f", number=0):
    return f"{CALL_BEGIN}functions.{name}:{number}{ARGUMENT_BEGIN}{arguments}{CALL_END}"


def collect(chunks, tokenizer=None):
    """The result of a stream, and the message that its deltas add up to."""
    stream = KimiCompletionStream(tokenizer)
    deltas = [delta for chunk in chunks for delta in stream.feed(chunk)] + stream.finish()
    message = {"reasoning_content": "", "content": "", "tool_calls": []}
    for delta in deltas:
        assert len(delta) == 1
        for field in delta.keys() - {"tool_calls"}:
            assert delta[field]
            message[field] += delta[field]
        for piece in delta.get("tool_calls", []):
            if "id" in piece:
                assert piece["index"] == len(message["tool_calls"])
                begun = {key: piece[key] for key in ("id", "type")}
                message["tool_calls"].append({**begun, "function": {**piece["function"]}})
            else:
                assert piece["index"] == len(message["tool_calls"]) - 1
                assert piece["function"]["arguments"]
                message["tool_calls"][-1]["function"]["arguments"] += piece["function"]["arguments"]
    return stream.result(), message


def check_stream(chunks, expected, tokenizer=None):
    result, message = collect(chunks, tokenizer)
    assert result == expected
    assert message["reasoning_content"] == expected["reasoning_content"]
    assert message["content"] == expected["content"]
    calls = expected.get("tool_calls", [])
    assert message["tool_calls"][: len(calls)] == calls
    assert len(message["tool_calls"]) - len(calls) in (0, 1)  # one that broke off was announced


# The rules once more, over whole text with `find` and `split`, for comparison


def first(text, *markers):
    """(text before, marker, text behind) at the earliest of the markers."""
    match = re.search("|".join(map(re.escape, markers)), text)
    return (text[: match.start()], match.group(), text[match.end() :]) if match else (text, "", "")


def oracle(text):
    text, stop, _ = text.partition(STOP)
    while text.startswith(THINK):
        text = text[len(THINK) :]
    reasoning, end, rest = first(text, THINK_END, SECTION_BEGIN, CALL_BEGIN)
    message = {"role": "assistant", "reasoning_content": reasoning, "content": ""}
    opener = end
    if end == THINK_END:
        content, opener, rest = first(rest, SECTION_BEGIN, CALL_BEGIN)
        message["content"] = content.replace(THINK_END, "")
    elif end:
        message["implicit_reasoning_end"] = True
    calls, unparsed, is_open = oracle_of_calls(opener + rest)
    message.update({"tool_calls": calls} if calls else {})
    message.update({"unparsed_tool_calls": unparsed} if unparsed else {})
    if stop:
        message["status"] = "complete" if end else "stopped_in_reasoning"
    elif not opener:
        message["status"] = "truncated_in_content" if end else "truncated_in_reasoning"
    else:
        message["status"] = "truncated_in_tool_calls" if is_open else "truncated_after_tool_calls"
    return message


def oracle_of_calls(rest):
    calls, unparsed, in_section = [], [], False
    while rest:
        _, marker, rest = first(rest, SECTION_BEGIN, SECTION_END, CALL_BEGIN)
        in_section = {SECTION_BEGIN: True, SECTION_END: False}.get(marker, in_section)
        if marker != CALL_BEGIN:
            continue
        header, marker, behind = first(rest, ARGUMENT_BEGIN, CALL_END, SECTION_END, SECTION_BEGIN, CALL_BEGIN)
        raw, error, arguments = CALL_BEGIN + header, "missing_arguments", ""
        if marker == ARGUMENT_BEGIN:
            arguments, marker, behind = first(behind, CALL_END, SECTION_END)
            raw, error = raw + ARGUMENT_BEGIN + arguments, ""
        if not marker:
            return calls, [*unparsed, {"raw": raw, "error": "truncated"}], True
        match = re.fullmatch(r"(?:functions\.)?((?s:.+)):[0-9]+", header.strip())
        if error or not match:
            raw += marker if marker == CALL_END else ""
            unparsed.append({"raw": raw, "error": error or "bad_id"})
        else:
            function = {"name": match[1], "arguments": arguments.strip() or "{}"}
            calls.append({"id": header.strip(), "type": "function", "function": function})
        rest = behind if marker == CALL_END else marker + behind
    return calls, unparsed, in_section


# Golden cases


@golden
def test_golden_whole(case):
    assert parse_completion(case["raw"]) == oracle(case["raw"]) == case["parsed"]


@golden
def test_golden_at_every_single_cut(case):
    raw = case["raw"]
    for cut in range(len(raw) + 1):
        check_stream([raw[:cut], raw[cut:]], case["parsed"])
    check_stream(raw, case["parsed"])


@golden
def test_golden_bytes(case):
    raw = case["raw"].encode()
    assert parse_completion(raw) == parse_completion(bytearray(raw)) == parse_completion(memoryview(raw))
    check_stream([raw[i : i + 1] for i in range(len(raw))], case["parsed"])
    for cut in range(len(raw)):
        check_stream([raw[:cut], raw[cut:]], case["parsed"])


@golden
def test_golden_ids(case, tokenizer):
    ids = tokenizer.encode(case["raw"])
    for spelling in (ids, tuple(ids), np.array(ids), torch.tensor(ids), list(torch.tensor(ids))):
        assert parse_completion(spelling, tokenizer) == case["parsed"]
    assert parse_completion(case["raw"], tokenizer) == case["parsed"]
    check_stream(ids, case["parsed"], tokenizer)
    check_stream([np.array(ids[:5]), ids[5:]], case["parsed"], tokenizer)


@golden
def test_no_marker_is_in_a_delta_of_a_golden_case(case):
    stream = KimiCompletionStream()
    deltas = [delta for character in case["raw"] for delta in stream.feed(character)] + stream.finish()
    assert not any(marker in json.dumps(deltas) for marker in MARKERS)


NATIVE = ["plain_answer", "whitespace_is_preserved", "single_tool_call", "parallel_tool_calls"]
NATIVE += ["dotted_and_dashed_names", "invalid_json_arguments_are_kept_raw"]


@pytest.mark.parametrize("case", [c for c in GOLDEN if c["name"] in NATIVE], ids=lambda case: case["name"])
def test_rendered_again_it_is_the_same_text(case, tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith(OPEN_PROMPT)
    message = parse_completion(case["raw"])
    rendered = tokenizer.apply_chat_template(
        [*messages, message], tokenize=False, add_generation_prompt=False
    )
    assert rendered == prompt + case["raw"]


# Rules by hand


@pytest.mark.parametrize(
    ("call_id", "name"),
    [
        ("functions.f:0", "f"),
        ("functions.functions.f:0", "functions.f"),
        ("f:007", "f"),
        ("a:b:1", "a:b"),
        ("functions:2", "functions"),
        ("函数 名\n:3", "函数 名\n"),
        ("functions.f", ""),
        ("functions.f:", ""),
        ("functions.:0", ""),
        (":0", ""),
        ("0", ""),
        ("f:-1", ""),
        ("f: 1", ""),
        ("f:²", ""),
        ("f:٣", ""),
        ("", ""),
    ],
)
def test_name_of_call(call_id, name):
    assert name_of_call(call_id) == name


@pytest.mark.parametrize(
    ("raw", "status", "reason"),
    [
        ("", "truncated_in_reasoning", "length"),
        (THINK + THINK + "<thin", "truncated_in_reasoning", "length"),
        (STOP, "stopped_in_reasoning", "stop"),
        ("r" + THINK_END, "truncated_in_content", "length"),
        (THINK_END + SECTION_BEGIN, "truncated_in_tool_calls", "length"),
        (THINK_END + SECTION_BEGIN + call("{}"), "truncated_in_tool_calls", "tool_calls"),
        (THINK_END + SECTION_BEGIN + call("{}") + SECTION_END, "truncated_after_tool_calls", "tool_calls"),
        (THINK_END + call("{}"), "truncated_after_tool_calls", "tool_calls"),
        (THINK_END + SECTION_BEGIN + CALL_BEGIN + STOP, "complete", "stop"),
        (SECTION_BEGIN + SECTION_END + STOP, "complete", "stop"),
    ],
)
def test_status_and_finish_reason(raw, status, reason):
    message = parse_completion(raw)
    assert (message["status"], finish_reason(message)) == (status, reason)
    stream = KimiCompletionStream()
    stream.feed(raw)
    assert stream.finish_reason is None
    stream.finish()
    assert stream.finish_reason == reason


def test_leading_think_counts_only_at_the_very_start():
    assert parse_completion(THINK * 3 + "r" + THINK)["reasoning_content"] == "r" + THINK
    assert parse_completion(" " + THINK + "r")["reasoning_content"] == " " + THINK + "r"
    assert parse_completion(THINK_END + THINK + "c")["content"] == THINK + "c"


def test_stray_think_end_leaves_the_content_and_makes_no_new_marker():
    message = parse_completion(f"r{THINK_END}a{THINK_END}b</thi{THINK_END}nk>c")
    assert message["content"] == "ab</think>c"


@pytest.mark.parametrize(
    "ending", [CALL_END, SECTION_END, SECTION_BEGIN, CALL_BEGIN + "functions.g:1" + ARGUMENT_BEGIN]
)
def test_header_without_arguments(ending):
    raw = f"{THINK_END}{SECTION_BEGIN}{CALL_BEGIN}functions.f:0{ending}"
    message = parse_completion(raw + (f"{{}}{CALL_END}" if ending.endswith(ARGUMENT_BEGIN) else "") + STOP)
    kept = CALL_BEGIN + "functions.f:0" + (CALL_END if ending == CALL_END else "")
    assert message["unparsed_tool_calls"] == [{"raw": kept, "error": "missing_arguments"}]
    assert ("tool_calls" in message) is ending.endswith(ARGUMENT_BEGIN)


def test_section_end_closes_a_call_and_stop_cuts_it():
    raw = f"{THINK_END}{SECTION_BEGIN}{CALL_BEGIN}f:0{ARGUMENT_BEGIN} 1 "
    message = parse_completion(raw + SECTION_END)
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "1"}
    assert message["status"] == "truncated_after_tool_calls"
    message = parse_completion(raw + STOP + CALL_END)
    assert message["unparsed_tool_calls"] == [
        {"raw": f"{CALL_BEGIN}f:0{ARGUMENT_BEGIN} 1 ", "error": "truncated"}
    ]


def test_a_marker_that_has_no_meaning_where_it_stands_is_text():
    arguments = f'"{CALL_BEGIN}{ARGUMENT_BEGIN}{SECTION_BEGIN}{THINK_END}"'
    message = parse_completion(f"{CALL_END}r{THINK_END}{CALL_END}{SECTION_END}{call(arguments)}")
    assert message["reasoning_content"] == CALL_END + "r"
    assert message["content"] == CALL_END + SECTION_END
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_call_is_announced_when_its_header_is_complete():
    stream = KimiCompletionStream()
    assert stream.feed(f"{THINK_END}{CALL_BEGIN} functions.f:0") == []
    announced = {
        "index": 0,
        "id": "functions.f:0",
        "type": "function",
        "function": {"name": "f", "arguments": ""},
    }
    assert stream.feed(ARGUMENT_BEGIN) == [{"tool_calls": [announced]}]
    assert stream.feed(" \n") == []
    assert stream.feed("{ ") == [{"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}]
    assert stream.feed(" } ") == [{"tool_calls": [{"index": 0, "function": {"arguments": "  }"}}]}]
    assert stream.feed(CALL_END + STOP) == stream.feed("more") == stream.finish() == stream.finish() == []


def test_what_may_become_a_marker_is_held_back_and_nothing_else():
    parser = CompletionParser()
    assert [event.text for event in parser.feed("a<b<|tool_call")] == ["a<b"]
    assert [event.text for event in parser.feed("er")] == ["<|tool_caller"]
    assert parser.feed("</think") == []
    assert [(event.kind, event.text) for event in parser.finish()] == [("reasoning", "</think")]


def test_no_marker_holds_the_first_character_of_another():
    assert all(marker.rfind("<") == 0 for marker in MARKERS)  # `held_from` relies on it
    assert not any(state.find("<") for state in (REASONING, CONTENT, BETWEEN, HEADER, ARGUMENTS))


def test_a_finished_parser_takes_no_more():
    parser = CompletionParser()
    message = parser.result()
    with pytest.raises(ValueError, match="a new one needs a new parser"):
        parser.feed("x")
    assert parser.result() == message
    message["content"] = "changed"
    assert parser.result()["content"] == ""


# Anything at all


def cut_anywhere(text, rng):
    cuts = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randrange(8))))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=300, deadline=None)
@given(COMPLETIONS, st.randoms(use_true_random=False))
def test_any_text_cut_anywhere_is_what_the_oracle_says(text, rng):
    expected = oracle(text)
    assert parse_completion(text) == expected
    check_stream(cut_anywhere(text, rng), expected)
    check_stream(text, expected)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([p.encode(errors="replace") for p in PARTS]), st.binary(max_size=4)),
        max_size=10,
    )
)
def test_any_bytes(parts):
    data = b"".join(parts)
    expected = oracle(data.decode("utf-8", "replace"))
    check_stream(parts, expected)
    check_stream([data[i : i + 1] for i in range(len(data))], expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PARTS), st.booleans()), max_size=12))
def test_literal_text_never_is_a_marker(parts):
    # It must not matter whether a literal text begins its markers with `<` or with a sign that begins none.
    parser, other = CompletionParser(), CompletionParser()
    for text, literal in parts:
        parser.feed(text, literal)
        other.feed(text.replace("<", "‹") if literal else text)
    assert repr(parser.result()).replace("<", "‹") == repr(other.result()).replace("<", "‹")


# Token ids


def test_text_of_ordinary_tokens_is_text_whatever_it_spells(tokenizer):
    think_end, call_begin, argument_begin, call_end, stop = (
        tokenizer.special_tokens[name] for name in (THINK_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END, STOP)
    )

    def plain(text):
        return tokenizer.encode(text, split_special_tokens=True)

    spelled = f"{THINK}{THINK_END}{SECTION_BEGIN}{CALL_END}{STOP}"
    ids = [
        *plain(spelled),
        think_end,
        *plain(spelled + "的"),
        call_begin,
        *plain("functions.f:0"),
        argument_begin,
    ]
    ids += [*plain(json.dumps(spelled)), call_end, stop, *plain("ignored")]
    message = parse_completion(ids, tokenizer)
    assert message["reasoning_content"] == spelled
    assert message["content"] == spelled + "的"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == spelled
    assert message["status"] == "complete"
    check_stream(ids, message, tokenizer)
    # The same text without its ids is another message.
    assert parse_completion(tokenizer.decode(ids))["reasoning_content"] == ""


@pytest.mark.parametrize("name", [STOP, "[EOS]", "[EOT]"])
def test_every_stop_token_stops(name, tokenizer):
    ids = tokenizer.encode(f"r{THINK_END}c{name}more")
    assert parse_completion(ids, tokenizer) == parse_completion(f"r{THINK_END}c{STOP}")
    as_text = parse_completion(f"r{THINK_END}c{name}")
    assert as_text["status"] == ("complete" if name == STOP else "truncated_in_content")


def test_a_character_of_several_tokens_waits_for_its_last_one(tokenizer):
    ids = tokenizer.encode("🧑‍💻")
    assert len(ids) > 4
    stream = KimiCompletionStream(tokenizer)
    texts = [delta["reasoning_content"] for index in ids for delta in stream.feed(index)]
    assert "".join(texts) == "🧑‍💻"
    assert len(texts) == 3
    assert "\ufffd" not in "".join(texts)
    # Half a character in front of a marker, and at the end.
    half = ids[:2]
    ids = [*half, tokenizer.special_tokens[THINK_END], *half]
    message = parse_completion(ids, tokenizer)
    assert (message["reasoning_content"], message["content"]) == ("\ufffd", "\ufffd")
    check_stream(ids, message, tokenizer)


def test_tokens_that_a_user_added_are_text(tmp_path):
    write_tokenizer(tmp_path / "t")
    tokenizer = TikTokenTokenizer.from_pretrained(tmp_path / "t")
    tokenizer.add_tokens(["<added>"])
    ids = tokenizer.encode(f"a <added>b{THINK_END}<added>")
    assert max(ids) >= tokenizer.vocab_size
    message = parse_completion(ids, tokenizer)
    assert (message["reasoning_content"], message["content"]) == ("a <added>b", "<added>")
    with pytest.raises(ValueError, match="is not a token id"):
        parse_completion([10**6], tokenizer)
    with pytest.raises(ValueError, match="is not a token id"):
        parse_completion([-100], tokenizer)


@pytest.mark.parametrize(
    ("completion", "sentence"),
    [
        ([1, 2], "^token ids need the tokenizer"),
        (7, "^token ids need the tokenizer"),
        (torch.zeros(2, 3, dtype=torch.long), "^token ids must be one row of integers, not lists in a row"),
        (np.zeros(3), "^token ids must be one row of integers, not floats in a row"),
        (["text"], "^token ids must be one row of integers, not strs in a row"),
        (None, "^a completion is text, bytes or token ids, not NoneType"),
        ({"input_ids": [1]}, "^a completion is text, bytes or token ids, not dict"),
    ],
)
def test_what_is_no_completion(completion, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_completion(completion)


# Size


def test_300_calls_and_a_megabyte_of_arguments():
    big = json.dumps({"text": "<|tool_call_end " * 70_000})
    assert len(big) > 1_000_000
    calls = "".join(call(json.dumps({"n": n}), "f", n) for n in range(300))
    raw = f"{THINK_END}{SECTION_BEGIN}{calls}{call(big, 'g', 300)}{SECTION_END}{STOP}"
    message = parse_completion(raw)
    assert [c["id"] for c in message["tool_calls"]] == [f"functions.f:{n}" for n in range(300)] + [
        "functions.g:300"
    ]
    assert message["tool_calls"][-1]["function"]["arguments"] == big
    check_stream([raw[i : i + 997] for i in range(0, len(raw), 997)], message)


class Work:
    """Counts what reading a completion takes, in units that are the same on every machine: calls, of Python and C functions;
    characters that a search for markers passes over; and bytes of memory taken from one call to the next, which a copy
    of the text so far would show. A loop over all pieces so far that calls and copies nothing would not be seen."""

    def __init__(self, monkeypatch):
        self.calls = self.searched = self.taken = self.before = 0
        for state in (REASONING, CONTENT, BETWEEN, HEADER, ARGUMENTS):
            monkeypatch.setattr(state, "find", partial(self.find, state.find))

    def find(self, find, text, position):
        match = find(text, position)
        self.searched += (match.end() if match else len(text)) - position
        return match

    def at_call_or_return(self, frame, event, argument):
        now, peak = tracemalloc.get_traced_memory()
        self.calls += event in ("call", "c_call")
        self.taken += peak - self.before
        self.before = now
        tracemalloc.reset_peak()

    def read(self, text, chunk):
        """(calls, characters, bytes) of one completion in pieces of `chunk` characters."""
        self.calls = self.searched = self.taken = self.before = 0
        stream = KimiCompletionStream()
        pieces = [text[position : position + chunk] for position in range(0, len(text), chunk)]
        tracemalloc.start()
        sys.setprofile(self.at_call_or_return)
        try:
            for piece in pieces:
                stream.feed(piece)
            stream.result()
        finally:
            sys.setprofile(None)
            tracemalloc.stop()
        return self.calls, self.searched, self.taken


OPEN_CALL = f"{THINK_END}{CALL_BEGIN}f:0{ARGUMENT_BEGIN}"
HARD = {
    "plain": ("", "word "),
    "angle brackets": ("", "<"),
    "half markers": ("", "<|tool_call"),
    "half markers in arguments": (OPEN_CALL, "<|tool_calls_section_en"),
    "blanks in front of arguments": (OPEN_CALL, " "),
    "blanks in arguments": (OPEN_CALL + "{", " "),
    "headers": ("", CALL_BEGIN + "x"),
    "calls": (THINK_END, call("{}")),
    "stray ends": (THINK_END, THINK_END),
    "leading": ("", THINK),
}


@pytest.mark.parametrize("chunk", [10_000_000, 7], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", HARD)
def test_work_is_linear(name, chunk, monkeypatch):
    prefix, unit = HARD[name]
    work = Work(monkeypatch)
    small, large = (work.read(prefix + unit * (n // len(unit)), chunk) for n in (4_000, 32_000))
    assert max(large) > 5_000
    for few, many in zip(small, large, strict=True):
        assert many < 10 * few + 1_000, (small, large)  # 8 times as many if linear, 64 if quadratic


def test_random_pieces_of_a_long_completion():
    rng = random.Random(0)
    raw = f"reason {THINK_END} content {SECTION_BEGIN}{call('{}')}{SECTION_END}{STOP}"
    for _ in range(200):
        check_stream(cut_anywhere(raw, rng), parse_completion(raw))
