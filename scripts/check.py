"""Checks a downloaded folder without loading it: is everything there, and is it Kimi K2.7 Code?

    python -m scripts.check FOLDER [--json]

Reads config files, the headers of the shards and the vocabulary, no weight: seconds for 595 GB. One line for each thing
that is checked, one verdict; the exit code is 0 if all is well.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_checkpoint import check_sources, published_tensors
from kimi.kimi_safetensors import read_sources
from kimi.modeling_kimi import KimiK25ForConditionalGeneration
from kimi.tokenization_kimi import NAMED_TOKENS, NUM_RESERVED, TikTokenTokenizer

ROOT = Path(__file__).resolve().parents[1]
# SHA-256 of the vocabulary that the whole K2 family has.
PUBLISHED_TIKTOKEN = "b6c497a7469b33ced9c38afb1ad6e47f03f5e5dc05f15930799210ec050c5103"
PUBLISHED_BASE = 163_584
PUBLISHED_BYTES = 595_148_192_736
MEDIA_KEYS = (
    "patch_size",
    "merge_kernel_size",
    "in_patch_limit",
    "patch_limit_on_one_side",
    "image_mean",
    "image_std",
)


class Finding(NamedTuple):
    what: str
    ok: bool
    says: str


def check_folder(folder: Path) -> Iterator[Finding]:
    """One finding for each check, in order; a check that cannot be made because of an earlier one says so."""
    if not folder.is_dir():
        yield Finding("folder", False, f"{folder} is not a folder")
        return
    state: dict[str, Any] = {}
    checks: list[tuple[str, Callable[[Path, dict[str, Any]], str]]] = [
        ("config.json", check_config),
        ("shards", check_shards),
        ("index", check_index),
        ("tensors", check_tensors),
        ("tiktoken.model", check_vocabulary),
        ("special tokens", check_special_tokens),
        ("chat template", check_template),
        ("generation_config.json", check_generation),
        ("preprocessor_config.json", check_media),
        ("code", check_code),
    ]
    for what, check in checks:
        try:
            yield Finding(what, True, check(folder, state))
        except KeyError as error:
            yield Finding(what, False, f"not checked, since {error.args[0]} could not be read")
        except (OSError, ValueError) as error:
            yield Finding(what, False, str(error))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds a {type(content).__name__}, not an object")
    return content


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


# ------------------------------------------------------------------------------------------------------------ weights


def check_config(folder: Path, state: dict[str, Any]) -> str:
    raw = read_json(folder, "config.json")
    for name, wanted in (("model_type", "kimi_k25"), ("architectures", ["KimiK25ForConditionalGeneration"])):
        require(raw.get(name) == wanted, f"{name} is {raw.get(name)!r}, expected {wanted!r}")
    require("tie_word_embeddings" in raw, "tie_word_embeddings is not stated; transformers 5 would take true")
    state["config.json"] = config = KimiK25Config(**raw)
    text, published = raw["text_config"], read_json(ROOT, "config.json")["text_config"]
    other = [name for name in published if name in text and text[name] != published[name]]
    size = f"{config.text_config.num_hidden_layers} layers, {config.text_config.n_routed_experts} experts"
    return f"{size}; " + (
        f"not the published values: {', '.join(other)}" if other else "the published values"
    )


def check_shards(folder: Path, state: dict[str, Any]) -> str:
    files = sorted(folder.glob("model*.safetensors"))
    require(bool(files), "no model*.safetensors file")
    sources = read_sources([str(file) for file in files], None, None)
    ends: dict[str, int] = {}
    for source in sources.values():
        ends[source.file] = max(source.end, ends.get(source.file, 0))
    for file in files:
        size = file.stat().st_size
        end = ends.get(str(file), size)
        require(end == size, f"{file.name} has {size} bytes, its header accounts for {end}")
    state["shards"] = sources
    total = sum(source.end - source.begin for source in sources.values())
    return f"{len(files)} files, {total:,} bytes of tensors"


def check_index(folder: Path, state: dict[str, Any]) -> str:
    sources = state["shards"]
    if not (folder / "model.safetensors.index.json").is_file():
        require(
            len({source.file for source in sources.values()}) == 1, "model.safetensors.index.json is missing"
        )
        return "none needed for one shard"
    index = read_json(folder, "model.safetensors.index.json")
    places = {name: Path(source.file).name for name, source in sources.items()}
    for name, file in index["weight_map"].items():
        require(name in places, f"the index names {name} in {file}, which no shard has")
        require(places[name] == file, f"the index says {name} is in {file}, it is in {places[name]}")
    extra = [name for name in places if name not in index["weight_map"]]
    require(not extra, f"the index lacks {len(extra)} tensors, the first {extra[:1]}")
    total = sum(source.end - source.begin for source in sources.values())
    stated = index.get("metadata", {}).get("total_size")
    require(stated in (None, total), f"the index states {stated:,} bytes, the shards have {total:,}")
    return f"{len(places):,} tensors, all where the index says"


def check_tensors(folder: Path, state: dict[str, Any]) -> str:
    sources, config = state["shards"], state["config.json"]
    with torch.device("meta"):
        model = KimiK25ForConditionalGeneration(config).bfloat16()
    tensors = published_tensors(model)
    check_sources(tensors, sources)
    for name, published in tensors.items():
        if name in sources and sources[name].dtype != published.target.dtype:
            free = name.endswith(("weight_shape", "weight_scale"))  # other exporters write int64 and fp16
            require(free, f"{name} is {sources[name].dtype}, published as {published.target.dtype}")
    total = sum(source.end - source.begin for source in sources.values())
    whole = "; the published number of bytes" if total == PUBLISHED_BYTES else ""
    return f"names, shapes and dtypes of {len(sources):,} tensors{whole}"


# ---------------------------------------------------------------------------------------------------------- tokenizer


def check_vocabulary(folder: Path, state: dict[str, Any]) -> str:
    state["tiktoken.model"] = tokenizer = TikTokenTokenizer.from_pretrained(folder)
    config = state["config.json"]
    size = tokenizer.vocab_size
    require(
        size == config.text_config.vocab_size,
        f"the vocabulary has {size} tokens, config.json says vocab_size {config.text_config.vocab_size}",
    )
    digest = hashlib.sha256((folder / "tiktoken.model").read_bytes()).hexdigest()
    if size != PUBLISHED_BASE + NUM_RESERVED:
        return f"{size} tokens, a vocabulary of its own (sha256 {digest[:12]}...)"
    require(digest == PUBLISHED_TIKTOKEN, f"sha256 is {digest}, published is {PUBLISHED_TIKTOKEN}")
    return f"{size} tokens, sha256 as published"


def check_special_tokens(folder: Path, state: dict[str, Any]) -> str:
    tokenizer, config = state["tiktoken.model"], state["config.json"]
    base = tokenizer.vocab_size - NUM_RESERVED
    for offset, name in NAMED_TOKENS.items():
        found = tokenizer.convert_tokens_to_ids(name)
        require(found == base + offset, f"{name} has id {found}, expected {base + offset}")
    pad = tokenizer.convert_tokens_to_ids("<|media_pad|>")
    stated = config.media_placeholder_token_id
    require(stated == pad, f"config.json says media_placeholder_token_id {stated}, <|media_pad|> is {pad}")
    for where, part in (("config.json", config), ("text_config", config.text_config)):
        ids = part.eos_token_id if isinstance(part.eos_token_id, list) else [part.eos_token_id]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        require(end in ids, f"{where} ends at {ids}, which is not <|im_end|> ({end})")
    return f"{len(NAMED_TOKENS)} names at {base} and after"


SAMPLE_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "Look."}]},
    {
        "role": "assistant",
        "reasoning_content": "I call.",
        "content": "",
        "tool_calls": [
            {
                "id": "functions.f:0",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": 1}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "functions.f:0", "content": "done"},
]


def check_template(folder: Path, state: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    require(path.is_file(), "chat_template.jinja is missing")
    theirs, ours = (
        path.read_text(encoding="utf-8"),
        (ROOT / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    tokenizer = state["tiktoken.model"]
    texts = [
        tokenizer.apply_chat_template(SAMPLE_CHAT, tokenize=False, chat_template=t) for t in (theirs, ours)
    ]
    require(texts[0] == texts[1], f"renders {texts[0]!r}, expected {texts[1]!r}")
    return "this repository's" if theirs == ours else "another text that renders the same"


# ------------------------------------------------------------------------------------------------------------- the rest


def check_generation(folder: Path, state: dict[str, Any]) -> str:
    settings = read_json(folder, "generation_config.json")
    ids = settings.get("eos_token_id")
    end = state["tiktoken.model"].convert_tokens_to_ids("<|im_end|>")
    require(end in (ids if isinstance(ids, list) else [ids]), f"eos_token_id {ids} lacks <|im_end|> ({end})")
    return f"stops at {ids}"


def check_media(folder: Path, state: dict[str, Any]) -> str:
    settings = read_json(folder, "preprocessor_config.json")
    lacking = [key for key in MEDIA_KEYS if key not in settings.get("media_proc_cfg", {})]
    require(not lacking, f"media_proc_cfg lacks {', '.join(lacking)}")
    auto = settings.get("auto_map", {})
    missing = {"AutoProcessor", "AutoImageProcessor"} - auto.keys()
    require(not missing, f"auto_map lacks {', '.join(sorted(missing))}")
    return f"media_proc_cfg with {len(settings['media_proc_cfg'])} settings"


def check_code(folder: Path, state: dict[str, Any]) -> str:
    """Every file that auto_map needs is there; whether it is this repository's is reported, not required."""
    ours = sorted([*ROOT.glob("*_kimi.py"), *ROOT.glob("kimi_*.py")])
    lacking = [path.name for path in ours if not (folder / path.name).is_file()]
    require(not lacking, f"{', '.join(lacking)} missing: python -m scripts.adopt puts them there")
    other = [path.name for path in ours if (folder / path.name).read_bytes() != path.read_bytes()]
    return f"{len(ours)} files" + (f", of another version: {', '.join(other)}" if other else ", all as here")


# ------------------------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    findings = []
    for finding in check_folder(options.folder):
        findings.append(finding)
        if not options.json:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.what:26} {finding.says}")
    bad = [finding for finding in findings if not finding.ok]
    if options.json:
        print(json.dumps({"ok": not bad, "findings": [finding._asdict() for finding in findings]}, indent=2))
    elif bad:
        print(f"\n{len(bad)} of {len(findings)} checks failed: this folder is not ready, see above.")
    else:
        print(f"\nAll {len(findings)} checks passed: {options.folder} can be loaded.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
