"""The example of a shared history: each turn computes its new tokens only, and answers as if all had been computed."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from scripts.tiny_checkpoint import write_tiny_checkpoint

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def load_example():
    spec = importlib.util.spec_from_file_location("shared_history", ROOT / "examples" / "shared_history.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture(scope="module")
def tokenizer_and_model(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("shared") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    # fp32, so that cached and recomputed logits do not differ by enough to choose another token
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return tokenizer, model.eval()


@pytest.fixture
def history(tokenizer_and_model):
    tokenizer, model = tokenizer_and_model
    conversation = example.Conversation(model, tokenizer, example.shared_history())
    conversation.read()
    return conversation


def answered_without_a_cache(conversation, turn):
    """The tokens of the last answer, from a prompt that is read whole."""
    asked = example.Conversation(conversation.model, conversation.tokenizer, conversation.messages[:-1])
    ids = asked.prompt_ids(add_generation_prompt=True)
    assert ids.shape[1] == turn.num_prompt
    whole = conversation.model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    return whole[0]


def test_the_history_has_twenty_messages_of_both_sides():
    roles = [message["role"] for message in example.shared_history()]
    assert roles == ["system", *["user", "assistant"] * 10]


def test_a_turn_computes_its_new_tokens(history):
    length = len(history.cached_ids)
    turn = history.ask(example.QUESTIONS[0], **GREEDY)
    assert turn.num_prompt > length and turn.num_new == NEW
    assert turn.num_computed == turn.num_prompt - length + NEW - 1
    assert turn.num_total == turn.num_prompt + NEW - 1
    assert history.cached_ids.equal(answered_without_a_cache(history, turn)[:-1])
    cached = len(history.cached_ids)
    assert history.cache.get_seq_length() == cached == turn.num_total
    # A random answer may render to other tokens than were generated; the common prefix is not computed again.
    second = history.ask(example.FOLLOW_UP, **GREEDY)
    assert second.num_computed <= second.num_total - turn.num_prompt
    assert history.cached_ids.equal(answered_without_a_cache(history, second)[:-1])


def test_branches_do_not_see_each_other(history):
    before = [(layer.keys.clone(), layer.values.clone()) for layer in history.cache.layers]
    length = history.cache.get_seq_length()
    turns = []
    for question in example.QUESTIONS:
        branch = history.branch()
        turns.append(branch.ask(question, **GREEDY))
        assert branch.cached_ids.equal(answered_without_a_cache(branch, turns[-1])[:-1])
        assert turns[-1].num_computed == turns[-1].num_total - length
    assert history.cache.get_seq_length() == length
    for layer, (keys, values) in zip(history.cache.layers, before, strict=True):
        assert layer.keys.equal(keys) and layer.values.equal(values)


def test_going_back_keeps_what_is_common(history):
    branch = history.branch()
    branch.ask(example.QUESTIONS[0], **GREEDY)
    branch.go_back(19)
    turn = branch.ask("And if disks cost nothing?", **GREEDY)
    assert branch.cached_ids.equal(answered_without_a_cache(branch, turn)[:-1])
    kept = turn.num_total - turn.num_computed
    shorter = example.Conversation(branch.model, branch.tokenizer, example.shared_history()[:19])
    assert kept >= shorter.prompt_ids(add_generation_prompt=False).shape[1]
    assert len(branch.messages) == 21


def test_the_script_prints_computed_against_total(history, capsys):
    turns = example.run(history.model, history.tokenizer, **GREEDY)
    printed = capsys.readouterr().out
    assert len(turns) == len(example.QUESTIONS) + 2 and "21 messages" in printed
    computed = sum(turn.num_computed for turn in turns) + len(history.cached_ids)
    assert f"{computed} tokens computed; without the cache" in printed
    assert all(turn.num_computed < turn.num_total / 4 for turn in turns)


def test_the_command_needs_no_checkpoint_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shared_history.py", "--max-new-tokens", "1"])
    example.main()
    assert "tokens computed; without the cache it would have been" in capsys.readouterr().out
