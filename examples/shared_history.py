"""Several conversations continue from one long history, and each turn computes only the tokens that are new in it.

    python examples/shared_history.py [--max-new-tokens 24] [--folder CHECKPOINT]

A history of 20 messages is read once. Its cache is the prefix of whatever follows, because earlier turns render to the
same tokens again, thinking included. So each turn finds the longest common prefix of the tokens in the cache and of
the new prompt, cuts the cache there (`crop`), and hands both to `generate`, which forwards the rest.

Each question here is asked on a copy of the history's cache: a branch. Copies are cheap where the cache is the latent
(576 values per token and layer), and branches do not see each other. One branch is then told that an earlier question
was meant differently; its cache is cut back to the message before that and goes on from there.

kimi-tiny, the default, was not trained on such conversations: with it only the numbers mean something.
"""

import argparse
import copy
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

KIMI_TINY = Path(__file__).resolve().parents[1] / "kimi-tiny"
SYSTEM = "You help to keep a small web shop running. Answer in a few sentences."
HISTORY = (
    ("The nightly job failed again.", "Which step does its log end with?"),
    ("It says: disk quota exceeded.", "Then the dump before it filled the volume. How large is it by now?"),
    ("39 GB, and the volume has 40.", "Old dumps are never removed. Keep seven and delete the rest."),
    ("Done. 22 GB are free now.", "Good. Please run the job once by hand."),
    ("It ran through in 14 minutes.", "That is twice what it took in March. Which table grew?"),
    ("The table of sessions has 80 million rows.", "Sessions that have ended need not be dumped at all."),
    ("Can I just delete those?", "In batches of 10,000, so that the shop does not wait for a lock."),
    (
        "I deleted all older than a month.",
        "Now rebuild the index, since it keeps the pages that were emptied.",
    ),
    ("The dump is down to 9 GB.", "Then seven of them take 63 GB, and your volume is still too small."),
)
LAST_WORDS = ("So what do you suggest?", "Keep three of them here, and one a week on other storage.")
QUESTIONS = (
    "Write that as a cron line.",
    "How do I find out in time when it happens again?",
    "Summarise it for my colleague.",
)
FOLLOW_UP = "Thank you. And for Windows?"


class Turn(NamedTuple):
    """What a turn cost. Token counts; `seconds` is the time to the end of the answer."""

    message: dict[str, Any]
    num_prompt: int  # tokens of the whole prompt
    num_new: int  # tokens of the answer
    num_computed: int  # tokens that went through the model
    seconds: float

    @property
    def num_total(self) -> int:
        """What would have gone through the model without a cache of earlier turns."""
        return self.num_prompt + self.num_new - 1  # the last token is not computed


class Conversation:
    """Messages, the cache of what the model has read of them, and the tokens in it."""

    def __init__(self, model: Any, tokenizer: Any, messages: list[dict[str, Any]]):
        self.model, self.tokenizer, self.messages = model, tokenizer, list(messages)
        self.cache: Any = None
        self.cached_ids = torch.empty(0, dtype=torch.long)

    def prompt_ids(self, add_generation_prompt: bool) -> torch.Tensor:
        """(1, T) int64."""
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=add_generation_prompt, return_tensors="pt", return_dict=True
        )["input_ids"]

    def read(self) -> int:
        """Reads the messages into the cache without an answer. Returns the number of tokens."""
        ids = self.prompt_ids(add_generation_prompt=False).to(self.model.device)
        with torch.inference_mode():
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache, self.cached_ids = output.past_key_values, ids[0]
        return ids.shape[1]

    def branch(self) -> "Conversation":
        """A conversation that goes on from here with a cache of its own."""
        other = Conversation(self.model, self.tokenizer, self.messages)
        other.cache, other.cached_ids = copy.deepcopy(self.cache), self.cached_ids
        return other

    def go_back(self, num_messages: int) -> None:
        """Forgets all messages but the first ones. The cache is cut by the next question, at the first token that differs."""
        del self.messages[num_messages:]

    def ask(self, question: str, **settings: Any) -> Turn:
        """Appends the question and the answer. `settings` go to `generate`."""
        self.messages.append({"role": "user", "content": question})
        ids = self.prompt_ids(add_generation_prompt=True).to(self.model.device)
        self.cut(ids[0])
        start = time.perf_counter()
        with counted_tokens(self.model) as computed:
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,
                return_dict_in_generate=True,
                **settings,
            )
        seconds = time.perf_counter() - start
        self.cache = output.past_key_values
        self.cached_ids = output.sequences[0, : self.cache.get_seq_length()]
        answer = output.sequences[0, ids.shape[1] :]
        message = self.tokenizer.parse_completion(answer)
        self.messages.append(message)
        return Turn(message, ids.shape[1], len(answer), sum(computed), seconds)

    def cut(self, ids: torch.Tensor) -> None:
        """Crops the cache to what it has in common with a prompt (T,), whose last token is always computed."""
        if self.cache is None:
            return
        length = min(len(self.cached_ids), len(ids) - 1)
        differ = (self.cached_ids[:length] != ids[:length]).nonzero()
        keep = int(differ[0]) if len(differ) else length
        if keep < len(self.cached_ids):
            # A negative number removes that many, on 4.57 and 5.x.
            self.cache.crop(keep - len(self.cached_ids))
            self.cached_ids = self.cached_ids[:keep]


@contextmanager
def counted_tokens(model: Any):
    """A list to which each forward pass adds the number of tokens that it computes."""
    counts: list[int] = []
    embed_tokens = model.get_input_embeddings()
    hook = embed_tokens.register_forward_hook(lambda module, inputs, output: counts.append(output.shape[1]))
    try:
        yield counts
    finally:
        hook.remove()


def shared_history() -> list[dict[str, Any]]:
    """20 messages after the system's."""
    messages = [{"role": "system", "content": SYSTEM}]
    for question, answer in (*HISTORY, LAST_WORDS):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def report(name: str, turn: Turn) -> None:
    share = turn.num_computed / turn.num_total
    print(
        f"{name:44.44} {turn.num_prompt:7} {turn.num_new:7} {turn.num_computed:9} {turn.num_total:8} {share:6.0%}"
        f" {turn.seconds:7.2f} s"
    )


def run(model: Any, tokenizer: Any, **settings: Any) -> list[Turn]:
    """Reads the history, asks each question on a branch of its own, goes on in the last one, and goes back in it."""
    history = Conversation(model, tokenizer, shared_history())
    start = time.perf_counter()
    num_tokens = history.read()
    print(
        f"{len(history.messages)} messages, {num_tokens} tokens, read in {time.perf_counter() - start:.2f} s\n"
    )
    print(f"{'turn':44} {'prompt':>7} {'answer':>7} {'computed':>9} {'of':>8}")
    turns = []
    for question in QUESTIONS:
        branch = history.branch()
        turns.append(branch.ask(question, **settings))
        report(f"branch: {question}", turns[-1])
    turns.append(branch.ask(FOLLOW_UP, **settings))
    report(f"  goes on: {FOLLOW_UP}", turns[-1])
    branch.go_back(len(history.messages) - 2)
    turns.append(branch.ask("And if disks cost nothing?", **settings))
    report("  goes back two messages, another question", turns[-1])
    computed, total = (
        num_tokens + sum(getattr(turn, key) for turn in turns) for key in ("num_computed", "num_total")
    )
    print(f"\n{computed} tokens computed; without the cache it would have been {total}")
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", "--model", default=KIMI_TINY, help="a checkpoint; kimi-tiny by default")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.folder, trust_remote_code=True, device_map="auto"
    ).eval()
    set_seed(args.seed)
    run(model, tokenizer, max_new_tokens=args.max_new_tokens)


if __name__ == "__main__":
    main()
