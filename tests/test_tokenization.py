"""The tokenizer against tiktoken itself, on a vocabulary trained on the spot; nothing here needs the published file."""

import base64
import copy
import itertools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from conftest import ROOT
from kimi import tokenization_kimi
from kimi.tokenization_kimi import (
    NAMED_TOKENS,
    PATTERN,
    MissingVocabularyError,
    TikTokenTokenizer,
    alternation,
    read_ranks,
    split_long_text,
)
from scripts.tiny_checkpoint import PUBLISHED_BASE, write_tokenizer
from scripts.tiny_vocabulary import SAMPLE

NAMES = list(NAMED_TOKENS.values())
KEPT = {"<think>", "</think>", *(name for name in NAMES if "tool_call" in name)}
# Text with markers, halves of markers, blanks, code, Chinese, emoji and half an emoji (a lone surrogate).
CHUNKS = [
    *NAMES,
    "<|im_",
    "end|>",
    "<|reserved_token_",
    "[",
    "<",
    "的",
    "é",
    "🧑‍💻",
    "\ud83e",
    "def f(x):\n    return",
    " ",
]
TEXTS = st.lists(st.one_of(st.sampled_from(CHUNKS), st.text(max_size=6)), max_size=12).map("".join)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder):
    return TikTokenTokenizer.from_pretrained(folder)


@pytest.fixture
def fresh(folder):
    """One that a test may add tokens to."""
    return TikTokenTokenizer.from_pretrained(folder)


def tiktoken_ids(tokenizer, text):
    return tokenizer.model.encode(text, allowed_special="all")


def read_as_utf8(text):
    """What a text is after the way through bytes: lone surrogates become U+FFFD, pairs become one character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def mixed_text(size_bytes, seed=0):
    """Shuffled paragraphs of code, Chinese and English with markers between them."""
    paragraphs = [p for p in SAMPLE.split("\n") if p] + [
        "    " * 7,
        "\n\n\t",
        "<p class='a'>x</p> [1] <|",
        "1234567",
    ]
    rng = random.Random(seed)
    parts, size = [], 0
    while size < size_bytes:
        parts.append(rng.choice(paragraphs) + rng.choice(["\n", " ", "", rng.choice(NAMES)]))
        size += len(parts[-1].encode())
    return "".join(parts)


# The vocabulary


def test_the_reserved_ids_follow_the_ranks(tokenizer, folder):
    base = len((folder / "tiktoken.model").read_bytes().splitlines())
    assert len(tokenizer.special_tokens) == 256
    assert sorted(tokenizer.special_tokens.values()) == list(range(base, base + 256))
    for offset in range(256):
        name = NAMED_TOKENS.get(offset, f"<|reserved_token_{base + offset}|>")
        assert tokenizer.special_tokens[name] == base + offset
        assert tokenizer.encode(name) == tokenizer(name).input_ids == [base + offset]
        assert tokenizer.decode([base + offset]) == name
        assert tokenizer.convert_ids_to_tokens(base + offset) == name
        assert tokenizer.convert_tokens_to_ids(name) == base + offset
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == base + 256


def test_published_size(tmp_path):
    """With 163,584 ranks the ids are the published ones, and tokenizer_config.json fits as it is."""
    tokens = itertools.chain(
        (bytes([i]) for i in range(256)), (bytes(t) for t in itertools.product(range(1, 56), repeat=3))
    )
    lines = (
        b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(itertools.islice(tokens, PUBLISHED_BASE))
    )
    (tmp_path / "tiktoken.model").write_bytes(b"".join(lines))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / name, tmp_path)
    tokenizer = TikTokenTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 163840
    ids = {
        "[BOS]": 163584,
        "[EOS]": 163585,
        "<|im_end|>": 163586,
        "<|media_pad|>": 163605,
        "</think>": 163607,
    }
    assert all(tokenizer.encode(name) == [i] == [tokenizer.get_vocab()[name]] for name, i in ids.items())
    assert tokenizer.encode("<|reserved_token_163589|>") == [163589]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (163584, 163585)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (163838, 163839)


def test_tokenizer_config_names_the_published_tokens():
    config = json.loads((ROOT / "tokenizer_config.json").read_bytes())
    tokens = {int(i) - PUBLISHED_BASE: token for i, token in config["added_tokens_decoder"].items()}
    assert {offset: token["content"] for offset, token in tokens.items()} == NAMED_TOKENS
    assert {token["content"] for token in tokens.values() if not token["special"]} == KEPT
    assert not any(
        t[flag] for t in tokens.values() for flag in ("lstrip", "rstrip", "single_word", "normalized")
    )
    assert config["additional_special_tokens"] == [
        "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|start_header_id|>", "<|end_header_id|>", "[EOT]",
        "<|im_system|>", "<|im_middle|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>",
    ]  # fmt: skip
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    assert config["tokenizer_class"] == "TikTokenTokenizer"


def test_attributes_that_other_engines_read(tokenizer):
    assert isinstance(tokenizer.model, tiktoken.Encoding)
    assert len(tokenizer.model._mergeable_ranks) == tokenizer.bos_id == tokenizer.bos_token_id
    assert not hasattr(tokenizer, "vocab"), "llama.cpp would take it for a GPT-2 vocabulary"
    assert tokenizer.is_fast is False
    assert "tiktoken" in tokenizer.vocab_files_names["vocab_file"]
    assert (tokenizer.unk_id, tokenizer.pad_id) == (tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert tokenizer.n_words == tokenizer.vocab_size and tokenizer.num_reserved_special_tokens == 256
    assert tokenizer.encoder["<think>"] == tokenizer.special_tokens["<think>"]
    assert all(tokenizer.decoder[i] == token for token, i in tokenizer.encoder.items())
    assert all(tokenizer.byte_decoder[c] == b for b, c in tokenizer.byte_encoder.items())
    assert tokenizer.byte_encoder[ord(" ")] == "Ġ" and tokenizer.byte_encoder[ord("a")] == "a"
    assert tokenizer.pat_str == tokenizer.model._pat_str
    assert set(tokenizer.all_special_tokens) == set(NAMES) - KEPT
    assert set(tokenizer.get_added_vocab()) == set(NAMES)


def test_get_vocab_hands_out_a_copy(tokenizer):
    tokenizer.get_vocab().clear()
    assert len(tokenizer.get_vocab()) == len(tokenizer)


# Text to ids


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_every_way_to_encode_gives_the_ids_of_tiktoken(tokenizer, text):
    ids = tiktoken_ids(tokenizer, text)
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text, padding=False, truncation=False, return_tensors=None) == ids
    assert tokenizer(text).input_ids == ids
    assert tokenizer([text, "x"]).input_ids == [ids, tokenizer.encode("x")]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
    assert tokenizer.decode(ids) == read_as_utf8(text)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_plain_encoding_never_makes_a_reserved_id(tokenizer, text):
    ids = tokenizer.model.encode_ordinary(text)
    assert max(ids, default=0) < tokenizer.bos_id
    assert tokenizer.encode(text, split_special_tokens=True) == ids
    assert tokenizer.encode(text, allow_special_tokens=False) == ids
    assert tokenizer.encode(text, allow_special_tokens=False, truncation=True, max_length=10**6) == ids
    assert tokenizer(text, split_special_tokens=True).input_ids == ids
    assert tokenizer([text], allow_special_tokens=False).input_ids == [ids]
    words = {"is_split_into_words": True, "split_special_tokens": True}
    assert tokenizer([[text, "x"]], **words).input_ids == [[*ids, *tokenizer.encode("x")]]
    assert tokenizer([text, "x"], **words).input_ids == [*ids, *tokenizer.encode("x")]
    for options in ({"split_special_tokens": True}, {"allow_special_tokens": False}):
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, **options)) == ids
    assert tokenizer.convert_tokens_to_ids(tokenizer._tokenize(text)) == ids
    assert tokenizer.decode(ids) == read_as_utf8(text)


@pytest.mark.parametrize(
    "pieces",
    [
        ["你好", "hello", "世界"],
        ["don't", " HE'LL", " x", "'y"],
        ["Camel", "Case", " naïve", "ABC"],
        ["123", "45", " ", "678", "9"],
        ["a", "  ", " b", "   "],
        ["x", "!!\n\n", "y", " \n", " z", " \r\n", "\tw"],
        [" (", "x", ")", " ==", ' "', "q", '"\n'],
        ["中", "éß한국", "中"],
        ["(word", " (", "第", "3", "章"],
        ["。\n", "的", "'s", " it's"],
    ],
)
def test_the_pattern_cuts_text_into_these_pieces(pieces):
    """Every substring is a token here, so each piece of the pattern comes out as one token."""
    text = "".join(pieces).encode()
    singles = [bytes([i]) for i in range(256)]
    substrings = [text[i:j] for i in range(len(text)) for j in range(i + 2, len(text) + 1)]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(singles + substrings))}
    encoding = tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokens = map(encoding.decode_single_token_bytes, encoding.encode(text.decode()))
    assert [token.decode() for token in tokens] == pieces


def test_split_special_tokens_as_attribute(folder):
    tokenizer = TikTokenTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert max(tokenizer.encode("<think>[EOS]")) < tokenizer.bos_id
    assert tokenizer.encode("<think>[EOS]") == tokenizer("<think>[EOS]").input_ids
    assert tokenizer.encode("<think>", split_special_tokens=False) == [tokenizer.special_tokens["<think>"]]


def test_ten_megabytes_of_code_chinese_and_markers(tokenizer):
    text = mixed_text(10_000_000)
    assert len(text.encode()) >= 10_000_000
    ids = tiktoken_ids(tokenizer, text)
    assert tokenizer.encode(text) == ids
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text


def test_calls_do_not_go_through_token_strings(tokenizer, monkeypatch):
    monkeypatch.setattr(TikTokenTokenizer, "convert_ids_to_tokens", None)
    assert tokenizer(["a b", "c"], ["d", "e"]).input_ids == [tokenizer.encode("a bd"), tokenizer.encode("ce")]


def test_pairs_batches_padding_and_tensors(tokenizer):
    a, b = tokenizer.encode("Hello there"), tokenizer.encode("x")
    assert tokenizer("Hello there", "x").input_ids == tokenizer.encode("Hello there", "x") == a + b
    assert tokenizer([("Hello there", "x")]).input_ids == [a + b]
    batch = tokenizer(["Hello there", "x", ""], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    pad = tokenizer.pad_token_id
    assert batch.input_ids.tolist() == [a, [pad] * (len(a) - 1) + b, [pad] * len(a)], (
        "padding goes on the left"
    )
    assert batch.attention_mask.sum(-1).tolist() == [len(a), 1, 0]
    assert tokenizer("Hello there", truncation=True, max_length=2).input_ids == a[:2]
    assert tokenizer.encode("Hello there", return_tensors="pt").tolist() == [a]
    assert tokenizer("").input_ids == tokenizer.encode("") == tokenizer.encode("", truncation=True) == []
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.num_special_tokens_to_add() == tokenizer.num_special_tokens_to_add(pair=True) == 0
    assert tokenizer.build_inputs_with_special_tokens([1], [2]) == [1, 2]


# Long texts


def walk(text, max_block, max_run):
    """The splitting rule as it is defined: one character after the other."""
    slices = []
    for start in range(0, len(text), max_block):
        block = text[start : start + max_block]
        begin = count = 0
        for i, character in enumerate(block):
            same = i > 0 and character.isspace() == block[i - 1].isspace()
            count = count + 1 if same else 1
            if count > max_run:
                slices.append(block[begin:i])
                begin, count = i, 1
        slices.append(block[begin:])
    return slices


@settings(max_examples=300, deadline=None)
@given(runs=st.lists(st.tuples(st.sampled_from("a \n中"), st.integers(1, 40)), max_size=8))
def test_long_text_is_cut_where_the_character_walk_cuts(runs):
    text = "".join(character * length for character, length in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization_kimi, "MAX_BLOCK", 50)
        patch.setattr(tokenization_kimi, "MAX_RUN", 8)
        assert list(split_long_text(text)) == walk(text, 50, 8)


@pytest.mark.parametrize("length", [24_999, 25_000, 25_001, 50_001])
@pytest.mark.parametrize("character", ["a", " ", "\n", "中"])
def test_cuts_at_the_published_limits(length, character):
    text = "x y" + character * length + " end" + character * 12_600
    assert list(split_long_text(text)) == walk(text, 400_000, 25_000)


def test_blocks_of_400000_characters(tokenizer):
    text = mixed_text(1_300_000).replace("<", "(").replace("[", "(")
    slices = [text[i : i + 400_000] for i in range(0, len(text), 400_000)]
    assert list(split_long_text(text)) == slices and len(slices) > 2
    assert tokenizer.encode(text) == [i for s in slices for i in tokenizer.model.encode_ordinary(s)]


def test_blanks_are_what_isspace_says():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        assert (tokenization_kimi.RUN.match(character + "  ").end() > 1) == character.isspace()


@pytest.mark.parametrize("start", [24_995, 24_998, 24_999, 25_000, 399_995, 399_999, 400_000])
def test_a_marker_at_a_cut_stays_a_marker(tokenizer, start):
    text = "a" * min(start, 25_000) + " b" * ((start - 25_000) // 2) + "c" * (max(0, start - 25_000) % 2)
    text += "<think>tail"
    assert text.index("<") == start
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.special_tokens["<think>"]) == 1
    assert tokenizer.decode(ids) == text
    if start < 25_000:
        assert ids == tiktoken_ids(tokenizer, text)


@pytest.mark.parametrize("character", [" ", "a", "\n", "!", "中"])
def test_a_million_of_one_character(tokenizer, character):
    ids = tokenizer.encode(character * 1_000_000)
    assert tokenizer.decode(ids) == character * 1_000_000
    assert ids == tokenizer(character * 1_000_000).input_ids


# Ids to text


def test_decode_is_the_same_with_any_keyword(tokenizer):
    text = "hi <think> x </think> <|im_end|>中文 's , . [1]"
    ids = tokenizer.encode(text)
    for options in (
        {},
        {"skip_special_tokens": False},
        {"clean_up_tokenization_spaces": True},
        {"spaces_between_special_tokens": True},
        {"use_source_tokenizer": False},
    ):
        assert tokenizer.decode(ids, **options) == text
        assert tokenizer.batch_decode([ids, ids], **options) == [text, text]


def test_decode_takes_numbers_arrays_and_tensors(tokenizer):
    ids = tokenizer.encode("Hello there")
    for form in (
        tuple(ids),
        np.array(ids),
        torch.tensor(ids),
        [torch.tensor(i) for i in ids],
        list(np.array(ids)),
    ):
        assert tokenizer.decode(form) == "Hello there"
    for one in (ids[0], np.int64(ids[0]), np.array(ids[0]), torch.tensor(ids[0])):
        assert tokenizer.decode(one) == tokenizer.decode([ids[0]])
    for batch in ([ids, ids[:1]], torch.tensor([ids, ids]), np.array([ids])):
        assert tokenizer.decode(batch) == [tokenizer.decode(row) for row in batch]
    assert tokenizer.decode([]) == ""
    assert tokenizer.convert_ids_to_tokens(torch.tensor(ids)) == tokenizer.tokenize("Hello there")


def test_half_a_character_is_a_replacement_character(tokenizer):
    ids = [tokenizer.encoder[tokenizer.byte_encoder[byte]] for byte in "é".encode()]
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == "é"
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[:1])) == "\ufffd"
    assert b"".join(map(tokenizer.model.decode_single_token_bytes, ids)) == "é".encode()


def test_skip_special_tokens_drops_the_flagged_16_and_keeps_what_parsers_read(tokenizer):
    flagged = [name for name in NAMES if name not in KEPT]
    assert len(flagged) == 16
    assert tokenizer.decode(tokenizer.encode("".join(flagged)), skip_special_tokens=True) == ""
    kept = "".join(sorted(KEPT)) + f"<|reserved_token_{tokenizer.bos_id + 5}|>"
    assert tokenizer.decode(tokenizer.encode(kept), skip_special_tokens=True) == kept
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("[BOS]<think>"), skip_special_tokens=True)
    assert tokens == ["<think>"]


def test_ids_outside_the_vocabulary(tokenizer):
    size = len(tokenizer)
    for wrong in (-1, size, 10**9):
        for decode in (
            lambda i: tokenizer.decode([i]),
            lambda i: tokenizer.decode(i, skip_special_tokens=True),
            tokenizer.convert_ids_to_tokens,
        ):
            with pytest.raises(
                ValueError, match=f"{wrong} is not a token id: the vocabulary has {size} tokens"
            ):
                decode(wrong)


def test_unknown_token_strings(tokenizer):
    assert tokenizer.convert_tokens_to_ids("no such token") == tokenizer.unk_token_id
    assert tokenizer.convert_tokens_to_string(["中", "Ġa"]) == "中 a"


# Tokens that a user adds


def test_added_tokens_get_ids_of_their_own(fresh):
    size = fresh.vocab_size
    assert fresh.add_tokens(["a1"]) == 1
    assert fresh.add_tokens(["b1", "中文词", "a1"]) == 2
    ids = [size, size + 1, size + 2]
    assert [fresh.get_vocab()[name] for name in ("a1", "b1", "中文词")] == ids
    assert (
        fresh.encode("a1b1中文词")
        == fresh("a1b1中文词").input_ids
        == fresh(["a1b1中文词"]).input_ids[0]
        == ids
    )
    assert (
        fresh.decode(ids) == "a1b1中文词" == fresh.convert_tokens_to_string(fresh.convert_ids_to_tokens(ids))
    )
    assert len(fresh) == size + 3 and fresh.vocab_size == size
    assert max(fresh.encode("a1", split_special_tokens=True)) < fresh.bos_id
    fresh.add_tokens(["a1x", "a"])
    assert fresh.tokenize("a1x a1 a") == ["a1x", "Ġ", "a1", "Ġ", "a"], "the longest name wins"


def test_added_special_tokens_are_skipped_at_once(fresh):
    fresh.add_special_tokens({"additional_special_tokens": ["<x>"]})
    ids = fresh.encode("a<x><|im_end|>b")
    assert fresh.decode(ids) == "a<x><|im_end|>b"
    assert fresh.decode(ids, skip_special_tokens=True) == "ab"


def test_added_tokens_may_eat_blanks(fresh):
    fresh.add_tokens([AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True)])
    fresh.add_tokens([AddedToken("wordy", single_word=True)])
    assert fresh.tokenize("a  <l> b") == ["a", "<l>", "Ġb"]
    assert fresh.tokenize("a <r>  b") == ["a", "Ġ", "<r>", "b"]
    assert "wordy" in fresh.tokenize("a wordy b") and "wordy" not in fresh.tokenize(
        "swordy"
    ) + fresh.tokenize("wordys")


def test_the_string_of_a_token_is_not_its_text(fresh):
    """Registering "Ġthe" names the token " the"; the text "Ġthe" stays text, and the token keeps its bytes."""
    the = fresh.encoder["Ġthe"]
    fresh.add_tokens(["Ġthe"])
    assert fresh.decode([the]) == " the"
    assert fresh.decode(fresh.encode("Ġthe")) == "Ġthe"


def test_alternation_prefers_the_longest_name():
    names = ["a", "ab", "abc", "b", "[x]", "ac"]
    pattern = re.compile(alternation(names))
    assert pattern.findall("abcabaacb[x]c") == ["abc", "ab", "a", "ac", "b", "[x]"]


# Saving and loading


def same(first, second):
    text = "a1 <think>def f():\n  return '中文'<|im_end|><x>"
    assert first.encode(text) == second.encode(text)
    assert len(first) == len(second)
    assert first.get_vocab() == second.get_vocab()
    assert first.added_tokens_decoder == second.added_tokens_decoder
    assert set(first.all_special_tokens) == set(second.all_special_tokens)
    assert first.special_tokens_map == second.special_tokens_map
    assert first.chat_template == second.chat_template
    assert (first.padding_side, first.model_max_length) == (second.padding_side, second.model_max_length)


def test_save_and_reload(fresh, folder, tmp_path):
    for added in ([], ["a1"]):
        fresh.add_tokens(added)
        fresh.add_special_tokens({"additional_special_tokens": ["<x>"]} if added else {})
        fresh.save_pretrained(tmp_path)
        same(fresh, TikTokenTokenizer.from_pretrained(tmp_path))
    assert (tmp_path / "tiktoken.model").read_bytes() == (folder / "tiktoken.model").read_bytes()
    assert (tmp_path / "tokenization_kimi.py").read_bytes() == (ROOT / "tokenization_kimi.py").read_bytes()
    assert (tmp_path / "chat_template.jinja").read_bytes() == (ROOT / "chat_template.jinja").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    assert config["auto_map"]["AutoTokenizer"][0] == "tokenization_kimi.TikTokenTokenizer"
    fresh.save_vocabulary(str(tmp_path))
    assert TikTokenTokenizer.from_pretrained(tmp_path).save_vocabulary(str(tmp_path)), "saving onto itself"


@pytest.mark.parametrize(
    "form",
    [
        {"additional_special_tokens": None, "extra_special_tokens": {}},
        {"additional_special_tokens": ["<|im_end|>", "<|im_user|>"], "extra_special_tokens": {}},
        {"extra_special_tokens": ["<|im_end|>", "<|im_user|>"], "backend": "custom", "is_local": True},
    ],
)
def test_configs_saved_by_either_major_version(folder, tmp_path, form):
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    del config["additional_special_tokens"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **form}), encoding="utf-8")
    tokenizer = TikTokenTokenizer.from_pretrained(tmp_path)
    listed = form.get("additional_special_tokens") or form["extra_special_tokens"] or set(NAMES) - KEPT
    assert set(tokenizer.all_special_tokens) == {"[BOS]", "[EOS]", "[UNK]", "[PAD]", *listed}


def test_without_any_config(folder, tokenizer):
    bare = TikTokenTokenizer(str(folder / "tiktoken.model"), chat_template=tokenizer.chat_template)
    same(tokenizer, bare)
    same(tokenizer, pickle.loads(pickle.dumps(tokenizer)))
    same(tokenizer, copy.deepcopy(tokenizer))


def test_the_file_and_the_config_must_agree(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(ROOT / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"gives '\[BOS\]' the id 163584, but tiktoken.model has \d+ ranks"):
        TikTokenTokenizer.from_pretrained(tmp_path)
    base = len(read_ranks(str(folder / "tiktoken.model")))
    for wrong in (
        {base: {"content": "[EOS]"}},
        {base + 5: {"content": "mine"}},
        {base + 999: {"content": "[PAD]"}},
    ):
        with pytest.raises(ValueError, match="belong to different checkpoints"):
            TikTokenTokenizer(str(folder / "tiktoken.model"), added_tokens_decoder=wrong)


BYTES = [base64.b64encode(bytes([i])).decode() + f" {i}" for i in range(256)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["version https://git-lfs.github.com/spec/v1", "oid sha256:b6c4"], "Git LFS pointer"),
        ([*BYTES[:3], "!!! 3", *BYTES[4:]], "line 4: expected `base64 rank`"),
        ([*BYTES, "YWI="], "line 257: expected `base64 rank`"),
        ([*BYTES, "YWI= x"], "line 257: expected `base64 rank`"),
        ([*BYTES, "", "YWI= 257"], "rank 256 should come next"),
        ([*BYTES, "YWI= 255"], "rank 256 should come next"),
        ([*BYTES, "YWI= 256", "YWI= 257"], "line 258: token b'ab' has rank 256 and rank 257"),
        (BYTES[:255], "1 of the 256 single bytes have no rank, e.g. byte 255"),
        ([], "256 of the 256 single bytes"),
    ],
)
def test_broken_files_are_refused(tmp_path, lines, message):
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        TikTokenTokenizer.from_pretrained(tmp_path)


def test_blank_lines_and_order_do_not_matter(tmp_path):
    (tmp_path / "m").write_text("\n" + "\n\n".join(reversed(BYTES)), encoding="utf-8")
    assert list(read_ranks(str(tmp_path / "m")).items()) == [(bytes([i]), i) for i in range(256)]


def test_missing_file(tmp_path):
    for load in (TikTokenTokenizer.from_pretrained, lambda f: TikTokenTokenizer(str(f / "tiktoken.model"))):
        with pytest.raises(
            MissingVocabularyError, match=r"hf download moonshotai/Kimi-K2\.7-Code tiktoken\.model"
        ):
            load(tmp_path)


THROUGH_THE_DOOR = """
import json, os, sys
from pathlib import Path
from transformers import AutoTokenizer

folder, saved, text = Path(sys.argv[1]), Path(sys.argv[2]), "<think>é[EOS] x"
load = lambda path: AutoTokenizer.from_pretrained(path, trust_remote_code=True)
tokenizer = load(folder)
tokenizer.save_pretrained(saved)
again = load(saved)
(folder / "tiktoken.model").unlink()
try:
    load(folder)
except OSError as error:
    message = str(error)
print(json.dumps({
    "class": type(tokenizer).__name__, "ids": tokenizer.encode(text), "again": again.encode(text),
    "files": sorted(os.listdir(saved)), "message": message, "size": len(again),
}))
"""


def test_through_auto_tokenizer_in_a_fresh_process(folder, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "repo")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", THROUGH_THE_DOOR, str(tmp_path / "repo"), str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["class"] == "TikTokenTokenizer" and got["size"] == len(tokenizer)
    assert got["ids"] == got["again"] == tokenizer.encode("<think>é[EOS] x")
    assert {"tiktoken.model", "chat_template.jinja", "tokenization_kimi.py", "tokenizer_config.json"} <= set(
        got["files"]
    )
    assert "tiktoken.model is missing" in got["message"] and str(tmp_path / "repo") in got["message"]
    assert (
        f"hf download moonshotai/Kimi-K2.7-Code tiktoken.model --local-dir {tmp_path / 'repo'}"
        in got["message"]
    )
