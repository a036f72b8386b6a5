"""A small random model that says what it is told, so that every answer of a server can be checked.

A user message may hold a script, `§{"reasoning": ..., "content": ..., "calls": [[name, arguments], ...]}§`. Everything
is computed as always (embeddings, pictures, experts, cache, sampling); only the choice of each token is forced, by a
logits processor in front of the sampler. Without a script the model is as random as it was made.
"""

import json
import re
import threading
import time
from types import MethodType

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from conftest import HANG_S, ROOT
from kimi.image_processing_kimi import KimiK25VisionProcessor
from kimi.modeling_kimi import KimiK25ForConditionalGeneration
from kimi.processing_kimi import KimiK25Processor
from kimi.tokenization_kimi import TikTokenTokenizer
from scripts.tiny_checkpoint import write_tiny_checkpoint

SCRIPT = re.compile(r"§(\{.*?\})§", re.DOTALL)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def script(reasoning="", content="", calls=(), **options):
    """A user's text. options: `wait`, seconds per token; `gated`, to say nothing before `Prompter.gate` is set; `raw`, the
    whole completion as text, which goes on for ever if it has no end; `then`, the script to follow once a tool has
    answered."""
    return f"§{json.dumps(dict(reasoning=reasoning, content=content, calls=list(calls), **options))}§"


def raw_completion(told):
    """What the model generates for a script."""
    if "raw" in told:
        return told["raw"]
    calls = "".join(
        f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{json.dumps(arguments)}<|tool_call_end|>"
        for call_id, arguments in told.get("calls", ())
    )
    section = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>" if calls else ""
    return f"{told['reasoning']}</think>{told['content']}{section}<|im_end|>"


class Prompter(LogitsProcessor):
    """Allows one token per step: those of `ids`, and then the last of them on and on."""

    num_steps = 0  # of all prompters
    gate = threading.Event()

    def __init__(self, ids, prompt_length, told):
        self.ids, self.prompt_length = ids, prompt_length
        self.wait_s, self.gated = told.get("wait", 0), told.get("gated", False)

    def __call__(self, input_ids, scores):
        Prompter.num_steps += 1
        time.sleep(self.wait_s)
        assert not self.gated or self.gate.wait(HANG_S), "the gate was never opened"
        forced = self.ids[min(input_ids.shape[1] - self.prompt_length, len(self.ids) - 1)]
        scores = torch.full_like(scores, -torch.inf)
        scores[:, forced] = 0.0
        return scores


def load_parrot(folder):
    """A model in fp32 that follows scripts, and its processor. Writes the checkpoint into `folder` / "parrot"."""
    folder = write_tiny_checkpoint(folder / "parrot", text=SIZES, num_merges=300)
    tokenizer = TikTokenTokenizer.from_pretrained(folder)
    settings = json.loads((ROOT / "preprocessor_config.json").read_bytes())
    model = KimiK25ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    original = type(model).generate

    def generate(self, **kwargs):
        ids = kwargs["input_ids"]
        prompt = tokenizer.decode(ids[0])
        found = list(SCRIPT.finditer(prompt))
        if found:
            told = json.loads(found[-1].group(1))
            if "then" in told and "## Return of" in prompt[found[-1].end() :]:
                told = told["then"]
            forced = tokenizer.encode(raw_completion(told))
            prompter = Prompter(forced, ids.shape[1], told)
            kwargs["logits_processor"] = LogitsProcessorList([prompter])
        return original(self, **kwargs)

    model.generate = MethodType(generate, model)
    return model, KimiK25Processor(KimiK25VisionProcessor(**settings), tokenizer)
