"""Makes a small random checkpoint in the published layout, loads it as a user would, and asks it a question.

    python demo.py [--prompt TEXT] [--max-new-tokens 64] [--folder CHECKPOINT]

Everything is the real path: chat template, tokenizer, int4 shards, `AutoModelForCausalLM` with remote code, `generate`.
Only the weights are random, so the answer is noise. Give `--folder` to ask another checkpoint, also the published one.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from kimi.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parent
QUESTION = "Which one is bigger, 9.11 or 9.9? Think carefully."


def cached_checkpoint() -> Path:
    """The tiny checkpoint in the user's cache, written once for each state of the repository's files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi-k2.7-code"
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*.json"), *ROOT.glob("*.jinja")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = cache / f"tiny_{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        for old in cache.glob("tiny_*"):
            shutil.rmtree(old, ignore_errors=True)
        print(f"Writing a random checkpoint in the published layout to {folder}")
        write_tiny_checkpoint(folder)
    return folder


def bytes_on_disk(folder: Path) -> int:
    """Tensor bytes of the checkpoint, as its index states them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text())["metadata"]["total_size"]
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def bytes_resident(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type != "meta")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="a checkpoint to ask instead of the random one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder or cached_checkpoint()

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto")
    messages = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True).to(model.device)
    length = inputs["input_ids"].shape[1]
    print(f"\nPrompt, {length} tokens:\n{tokenizer.decode(inputs['input_ids'][0])}\n\nAnswer:")

    set_seed(args.seed)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        return_dict_in_generate=True,
        streamer=tokenizer.text_streamer(skip_prompt=True),
    )
    seconds = time.perf_counter() - start
    num_new = output.sequences.shape[1] - length
    cache = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    cached_tokens = output.past_key_values.get_seq_length()
    if not args.folder:
        print("\nThe weights are random, so this answer means nothing; the way it was made is the real one.")
    print(
        f"{model.num_parameters():,} parameters | {bytes_resident(model):,} bytes of weights resident,"
        f" {bytes_on_disk(folder):,} on disk | cache {sum(t.nbytes for t in cache) // cached_tokens:,} bytes per token"
        f" | {num_new / seconds:.1f} tokens/s ({num_new} tokens, {model.device}, {model.dtype})"
    )


if __name__ == "__main__":
    main()
