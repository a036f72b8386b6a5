"""What an agent loop does: render, complete, parse, render again; with hostile text in every place a text can stand."""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from kimi.tokenization_kimi import NAMED_TOKENS, TikTokenTokenizer
from scripts.tiny_checkpoint import write_tokenizer

MAJOR = int(transformers.__version__.split(".")[0])
OUTPUTS = json.loads((DATA / "output_golden.json").read_bytes())
SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agent")
    write_tokenizer(folder)
    return TikTokenTokenizer.from_pretrained(folder)


def get_weather(city: str, days: int = 1):
    """
    The weather forecast of a city.

    Args:
        city: Name of the city
        days: How many days
    """


def calculate(expression: str):
    """
    Evaluates an arithmetic expression.

    Args:
        expression: The expression
    """


TOOLS = [get_weather, calculate]


def raw_call(name, number, **arguments):
    return CALL.format(f"functions.{name}:{number}", json.dumps(arguments, ensure_ascii=False))


# ------------------------------------------------------------------------------------------------------- round trips


# Complete completions that hold something a message cannot: text that is dropped, blanks that are trimmed, a marker more.
LOSSY = {
    "two_sections_and_trailing_text",
    "text_after_stop_is_ignored",
    "empty_arguments_become_empty_object",
    "leading_think_token_is_consumed",
    "whitespace_around_markers",
}


def is_complete(entry):
    parsed = entry["parsed"]
    lossless = "unparsed_tool_calls" not in parsed and "implicit_reasoning_end" not in parsed
    return parsed["status"] == "complete" and lossless


def test_golden_completions_are_rendered_back_byte_for_byte(tokenizer):
    history = [{"role": "user", "content": "q"}]
    prompt = tokenizer.apply_chat_template(history)
    differ = set()
    for entry in filter(is_complete, OUTPUTS):
        parsed = tokenizer.parse_completion(entry["raw"])
        again = tokenizer.apply_chat_template([*history, parsed], add_generation_prompt=False)
        if again != prompt + entry["raw"]:
            differ.add(entry["name"])
            assert tokenizer.parse_completion(again.removeprefix(prompt)) == parsed, entry["name"]
    assert differ == LOSSY


TEXT = st.text(max_size=40).filter(
    lambda text: "<" not in text and text == text.encode("utf-8", "replace").decode()
)
JSON_TEXT = st.dictionaries(st.text("abc", min_size=1), TEXT, max_size=3).map(
    lambda d: json.dumps(d, ensure_ascii=False)
)


@given(TEXT, TEXT, st.lists(st.tuples(st.sampled_from(["f", "mcp.fs-read", "取得"]), JSON_TEXT), max_size=4))
@settings(max_examples=80, deadline=None)
def test_any_complete_completion_comes_back(tokenizer, reasoning, content, calls):
    history = [{"role": "user", "content": "q"}]
    body = "".join(
        CALL.format(f"functions.{name}:{n}", arguments) for n, (name, arguments) in enumerate(calls)
    )
    raw = f"{reasoning}</think>{content}{SECTION.format(body) if calls else ''}<|im_end|>"
    prompt = tokenizer.apply_chat_template(history)
    parsed = tokenizer.parse_completion(raw)
    assert parsed["status"] == "complete"
    assert tokenizer.apply_chat_template([*history, parsed], add_generation_prompt=False) == prompt + raw
    ids = tokenizer.apply_chat_template(history, tokenize=True) + tokenizer.encode(raw)
    assert tokenizer.parse_completion(ids[-len(tokenizer.encode(raw)) :]) == parsed
    again = tokenizer.apply_chat_template([*history, parsed], tokenize=True, add_generation_prompt=False)
    assert again == ids, "the cache of one turn is the prefix of the next"


def test_four_turns_with_interleaved_thinking(tokenizer):
    """Two tools, four completions: ids count over the conversation, and each prompt extends the one before."""
    completions = [
        "Two cities. I ask for both."
        "</think>"
        + SECTION.format(
            raw_call("get_weather", 0, city="北京") + raw_call("get_weather", 1, city="Paris", days=2)
        ),
        "Now the difference of 21 and 18.5.</think>Let me compute."
        + SECTION.format(raw_call("calculate", 2, expression="21 - 18.5")),
        "2.5 degrees.</think>Beijing is 2.5 °C warmer.",
        "They thank me.</think>You are welcome.",
    ]
    results = {0: ["21 °C", "18.5 °C"], 1: ["2.5"]}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Beijing or Paris?"}]
    sent = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=True)
    seen_ids = []
    for turn, raw in enumerate(completions):
        raw += "<|im_end|>"
        parsed = tokenizer.parse_completion(tokenizer.encode(raw))
        assert parsed["status"] == "complete"
        checks = [tokenizer.validate_tool_call(call, TOOLS) for call in parsed.get("tool_calls", [])]
        assert all(check.ok and not check.unchecked for check in checks)
        messages.append(parsed)
        done = sent + tokenizer.encode(raw)
        assert (
            tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=True, add_generation_prompt=False)
            == done
        )
        for call, result in zip(parsed.get("tool_calls", []), results.get(turn, []), strict=True):
            seen_ids.append(call["id"])
            messages.append(
                {
                    "role": "tool",
                    "name": call["function"]["name"],
                    "tool_call_id": call["id"],
                    "content": result,
                }
            )
        if turn == 2:
            messages.append({"role": "user", "content": "Thanks!"})
        sent = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=True)
        assert sent[: len(done)] == done, "the next prompt begins with all that is cached"
    assert seen_ids == ["functions.get_weather:0", "functions.get_weather:1", "functions.calculate:2"]


def test_wrong_calls_are_told(tokenizer):
    parsed = tokenizer.parse_completion(
        "</think>" + SECTION.format(raw_call("get_weather", 0, days="two")) + "<|im_end|>"
    )
    check = tokenizer.validate_tool_call(parsed["tool_calls"][0], TOOLS)
    assert not check.ok and any("city is missing" in error for error in check.errors)
    assert any('must be of type integer, not "two"' in error for error in check.errors)


# ------------------------------------------------------------------------------------------------------ hostile text

MARKERS = list(NAMED_TOKENS.values())
PIECES = st.sampled_from([
    *MARKERS, "<|im_", "end|>", "<|im_<|im_end|>end|>", "<think", ">", "[EO", "S]", "<|reserved_token_500|>", "\ufdd0", "\ufdd1",
    "\ufdd2", "\u2060", "\ud83e", "\u202e\u05d0\u05d1", "x", "\n", " ", "的", "{\"a\": \"", "\"}", "<|kimi_k25_video_placeholder|>",
])  # fmt: skip
HOSTILE = st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=8).map("".join)
NAMES = HOSTILE.filter(bool)


@st.composite
def conversations(draw):
    """Messages with hostile text wherever a text may stand, and the same ones with harmless text."""

    def twice(strategy=HOSTILE):
        return draw(strategy), "x"

    pairs = []
    for number in range(draw(st.integers(1, 3))):
        role = draw(st.sampled_from(["user", "system", "assistant", "critic"]))
        message = [{"role": role}, {"role": role}]
        contents = [twice() for _ in range(draw(st.integers(1, 3)))]
        name = draw(st.one_of(st.none(), NAMES))
        reasoning, arguments = (
            twice(),
            draw(st.one_of(HOSTILE, st.dictionaries(HOSTILE, HOSTILE, max_size=2))),
        )
        for side, given_message in enumerate(message):
            parts = [c[side] for c in contents]
            given_message["content"] = parts if len(parts) > 1 else parts[0]
            given_message["name"] = name if side == 0 or name is None else "x"
            if role == "assistant":
                given_message["reasoning_content"] = reasoning[side]
                call_id = draw(NAMES) if side == 0 else "x"
                function = {"name": "f", "arguments": arguments if side == 0 else "{}"}
                given_message["tool_calls"] = [{"id": f"{call_id}{number}", "function": function}]
        pairs.append(message)
        if role == "assistant":
            results = [{"role": "tool", "content": text} for text in twice()]
            pairs.append(results)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


@st.composite
def tools(draw):
    name, text, field = draw(NAMES), draw(HOSTILE), draw(HOSTILE)
    kind = draw(st.sampled_from([{"type": "string"}, {"oneOf": []}]))  # the latter goes out as JSON
    parameters = {"type": "object", "properties": {field: {**kind, "description": text, "enum": [text]}}}
    return [{"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}]


HARMLESS = [{"type": "function", "function": {"name": "x", "description": "x"}}]


@given(conversations(), st.one_of(st.none(), tools()))
@settings(max_examples=150, deadline=None)
def test_no_text_makes_a_control_token(tokenizer, pair, declared):
    hostile, harmless = pair
    ids = tokenizer.apply_chat_template(hostile, tools=declared, tokenize=True)
    honest = tokenizer.apply_chat_template(harmless, tools=declared and HARMLESS, tokenize=True)
    control = [[i for i in some if i >= tokenizer.bos_id] for some in (ids, honest)]
    assert control[0] == control[1], "only the template's own markers, in its own order"
    text = tokenizer.apply_chat_template(hostile, tools=declared)
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text)), "the text is unchanged"
    safe = tokenizer.apply_chat_template(
        tokenizer.sanitize_messages(hostile), tools=tokenizer.sanitize_text(declared)
    )
    assert [i for i in tokenizer.encode(safe) if i >= tokenizer.bos_id] == control[1]


def test_a_megabyte_of_markers_is_a_megabyte_of_text(tokenizer):
    text = "".join(MARKERS) * 3500
    assert len(text) > 10**6
    message = {"role": "user", "content": text}
    ids = tokenizer.apply_chat_template([message], tokenize=True)
    assert [i for i in ids if i >= tokenizer.bos_id] == [
        tokenizer.special_tokens[name]
        for name in (
            "<|im_user|>",
            "<|im_middle|>",
            "<|im_end|>",
            "<|im_assistant|>",
            "<|im_middle|>",
            "<think>",
        )
    ]
    assert text in tokenizer.decode(ids)


# ------------------------------------------------------------------------------------- the response template of 5.x


@pytest.mark.skipif(MAJOR < 5, reason="transformers 4.57 has no parse_response")
def test_the_response_template_agrees_where_it_can(tokenizer):
    """Arguments are objects there, empty fields are left out, and malformed calls leak: those are our parser's business."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "q"}])
    compared = 0
    for entry in OUTPUTS:
        ours = entry["parsed"]
        arguments = [call["function"]["arguments"] for call in ours.get("tool_calls", [])]
        well_formed = all(is_json_object(text) for text in arguments) and "unparsed_tool_calls" not in ours
        raw = entry["raw"].split("<|im_end|>")[0]
        plain = well_formed and not raw.startswith("<think>") and raw.count("</think>") <= 1
        # Of the last: "" there, {} here.
        gaps = ("|>\n<|", "|> <|", "<|tool_call_argument_begin|><|tool_call_end|>")
        blanks = any(gap in raw for gap in gaps)
        if not plain or blanks or "<think>" in raw or ours.get("implicit_reasoning_end"):
            continue
        theirs = tokenizer.parse_response(raw, prefix=prompt)
        want = {key: ours[key] for key in ("role", "reasoning_content", "content") if ours[key]}
        if arguments:
            want["tool_calls"] = [
                {
                    **call,
                    "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])},
                }
                for call in ours["tool_calls"]
            ]
        got = {key: value for key, value in theirs.items() if value and key != "trailing_text"}
        assert got == want, entry["name"]
        compared += 1
        parser = tokenizer.get_response_parser(prefix=prompt)
        for character in raw:
            parser.feed(character)
        streamed = {
            key: value for key, value in parser.finalize()[0].items() if value and key != "trailing_text"
        }
        assert streamed == want, entry["name"]
    assert compared >= 8


def is_json_object(text):
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
