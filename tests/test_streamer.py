"""What a terminal, a pipe and `generate` get to see of a completion."""

import io
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from kimi.kimi_output import ARGUMENT_BEGIN, CALL_BEGIN, CALL_END, STOP, THINK_END, parse_completion
from kimi.kimi_streamer import KimiTextStreamer, neutralize, num_columns
from kimi.tokenization_kimi import TikTokenTokenizer
from scripts.tiny_checkpoint import write_tokenizer

PROMPT = "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
CALL = f'{CALL_BEGIN}functions.get_weather:0{ARGUMENT_BEGIN}{{"city": "北京", "n": 1}}{CALL_END}'
SECTION = f"<|tool_calls_section_begin|>{CALL}<|tool_calls_section_end|>"
COMPLETION = f"Need it.\n{THINK_END}Let me look.{SECTION}{STOP}"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Latin(Terminal):
    encoding = "latin-1"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamer")
    write_tokenizer(folder)
    return TikTokenTokenizer.from_pretrained(folder)


@pytest.fixture(autouse=True)
def terminal_of_40_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def show(tokenizer, completion, out, **options):
    """What is printed when `completion` comes token by token, behind a prompt that is skipped."""
    streamer = KimiTextStreamer(tokenizer, skip_prompt=True, out=out, **options)
    streamer.put(torch.tensor([tokenizer.encode(PROMPT)]))
    for index in tokenizer.encode(completion):
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert streamer.message == parse_completion(tokenizer.encode(completion), tokenizer)
    return out.getvalue()


def without_dim(text):
    return text.replace("\x1b[2m", "").replace("\x1b[0m", "")


def show_in_terminal(tokenizer, completion):
    return re.sub(r"\x1b\[[02]m", "", show(tokenizer, completion, Terminal()))


def test_terminal(tokenizer):
    assert show_in_terminal(tokenizer, COMPLETION) == (
        "Need it.\n"
        "Let me look.\n"
        "╭─ functions.get_weather:0 ───────────╮\n"
        '│ {"city": "北京", "n": 1}            │\n'
        "╰─────────────────────────────────────╯\n"
    )


def test_reasoning_alone_is_dim_and_no_piece_leaves_the_terminal_dim(tokenizer):
    text = show(tokenizer, COMPLETION, Terminal())
    reasoning, answer = text.split("Let me look.")
    assert reasoning.replace("\x1b[0m\x1b[2m", "") == "\x1b[2mNeed it.\n\x1b[0m"
    assert "\x1b" not in answer


def test_each_part_begins_on_a_line_of_its_own(tokenizer):
    for out in (Terminal(), io.StringIO()):
        text = re.sub(r"\x1b\[[02]m", "", show(tokenizer, f"r{THINK_END}c{CALL}", out))
        assert re.match("r\nc\n[╭\\[]", text)
        assert text.endswith("\n")
        assert "\n\n" not in text


def test_a_line_break_in_an_id_breaks_no_line(tokenizer):
    call = f"{THINK_END}{CALL_BEGIN}a\nb\tc:0{ARGUMENT_BEGIN}{{}}{CALL_END}"
    assert show(tokenizer, call, io.StringIO()) == "[tool call a␊b␉c:0] {}\n"
    assert show(tokenizer, call, Terminal()).startswith("╭─ a␊b␉c:0 ─")


@pytest.mark.parametrize("variable", ["pipe", "NO_COLOR", "TERM"])
def test_plain_text_without_a_terminal_or_on_demand(tokenizer, variable, monkeypatch):
    monkeypatch.setenv(variable, "dumb")
    text = show(tokenizer, COMPLETION, io.StringIO() if variable == "pipe" else Terminal())
    assert text == 'Need it.\nLet me look.\n[tool call functions.get_weather:0] {"city": "北京", "n": 1}\n'


def test_box_wraps_at_the_width_of_the_terminal(tokenizer, monkeypatch):
    arguments = "北京" * 40 + "\n\tx"
    call = f"{THINK_END}{CALL_BEGIN}functions.{'n' * 90}:0{ARGUMENT_BEGIN}{arguments}{CALL_END}"
    for columns, width in ((40, 39), (33, 32), (5, 20), (500, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = show_in_terminal(tokenizer, call).splitlines()
        assert {sum(map(num_columns, line)) for line in lines} == {width}
        assert lines[0].startswith("╭─ functions.n")
        assert lines[0].endswith(" ─╮")
        inside = [line[2:-2].rstrip() for line in lines[1:-1]]
        assert "".join(inside[:-1]) == "北京" * 40
        assert inside[-1] == "    x"


def test_two_calls_and_one_that_breaks_off(tokenizer):
    broken = f"{CALL_BEGIN}bad{CALL_END}{CALL_BEGIN}functions.g:1{ARGUMENT_BEGIN}{{"
    lines = show_in_terminal(tokenizer, THINK_END + SECTION + broken).splitlines()
    assert [line[:3] for line in lines] == ["╭─ ", "│ {", "╰──", "╭─ ", "│ {", "╰──", "[to", "[to"]
    assert lines[-2] == f"[tool call that cannot be used, missing_arguments: {CALL_BEGIN}bad{CALL_END}]"
    assert lines[-1].startswith("[tool call that cannot be used, truncated: <|tool_call_begin|>functions.g:1")
    text = show(tokenizer, THINK_END + CALL + CALL_BEGIN + "x" * 5000, io.StringIO())
    assert len(text.splitlines()[-1]) < 300


# Control characters in a completion have no effect


ATTACK = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\u202e\u2066\u2028\x00"


@pytest.mark.parametrize("out", [Terminal, io.StringIO])
def test_control_characters_are_shown_not_sent(tokenizer, out):
    call = f"{CALL_BEGIN}functions.f{ATTACK}\n:0{ARGUMENT_BEGIN}{ATTACK}{CALL_END}"
    bad = f"{CALL_BEGIN}{ATTACK}{CALL_END}"
    text = show(tokenizer, f"{ATTACK}{THINK_END}{ATTACK}{call}{bad}", out())
    text = re.sub(r"\x1b\[[02]m", "", text)
    assert "␛[2J␛]0;title␇" in text
    assert not {character for character in text if not character.isprintable()} - {"\n"}


@given(st.text())
@settings(deadline=None)
def test_neutralize_leaves_no_control_character(text):
    shown = neutralize(text)
    assert len(shown) == len(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", shown)
    assert neutralize(shown) == shown


def test_ordinary_text_is_left_alone():
    text = "Zeile\n\tTab é 北京 🧑\u200d💻 ─│ <|im_end|>"
    assert neutralize(text) == text


def test_prompt_is_shown_unless_skipped_and_is_neutralized_too(tokenizer):
    out = io.StringIO()
    streamer = KimiTextStreamer(tokenizer, out=out)
    streamer.put(torch.tensor([tokenizer.encode("Hi\x1b[31m")]))
    streamer.put(torch.tensor(tokenizer.encode("r")))
    streamer.end()
    assert out.getvalue() == "Hi␛[31m\nr\n"


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(tokenizer):
    assert show(tokenizer, f"é北{THINK_END}", Latin()) == "\x1b[2mé\x1b[0m\x1b[2m?\x1b[0m\n"


def test_standard_output_is_the_default(tokenizer, capsys):
    streamer = KimiTextStreamer(tokenizer, skip_prompt=True)
    streamer.put(torch.tensor([[1]]))
    streamer.put(torch.tensor(tokenizer.encode("r")))
    streamer.end()
    assert capsys.readouterr().out == "r\n"


# Inside generate


class Forced(LogitsProcessor):
    """Makes a model say given ids."""

    def __init__(self, ids, start):
        self.ids, self.start = ids, start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -1e9)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0
        return forced


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    stop = tokenizer.special_tokens[STOP]
    config = LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=stop, pad_token_id=stop, **sizes
    )
    return LlamaForCausalLM(config).eval()


def generate(model, tokenizer, prompts, streamer):
    input_ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    ids = tokenizer.encode(COMPLETION)
    return model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        logits_processor=LogitsProcessorList([Forced(ids, input_ids.shape[1])]),
        max_new_tokens=len(ids),
        do_sample=False,
        streamer=streamer,
    )


def test_generate(model, tokenizer):
    out = io.StringIO()
    streamer = KimiTextStreamer(tokenizer, skip_prompt=True, out=out)
    for turn in (1, 2):  # one streamer, several completions
        generated = generate(model, tokenizer, [PROMPT], streamer)
        assert streamer.message == parse_completion(COMPLETION)
        assert tokenizer.decode(generated[0]) == PROMPT + COMPLETION
        assert out.getvalue().count("Need it.") == turn
        assert PROMPT not in out.getvalue()


def test_more_than_one_completion_is_refused(model, tokenizer):
    streamer = KimiTextStreamer(tokenizer, skip_prompt=True, out=io.StringIO())
    with pytest.raises(ValueError, match="one completion at a time, not a batch of 2"):
        generate(model, tokenizer, [PROMPT, PROMPT], streamer)
    streamer.end()
    assert streamer.message is None
