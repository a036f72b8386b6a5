"""Finds the first stage at which a port of the model computes something else.

    python -m scripts.verify FOLDER                    the code and weights in a folder, stage by stage
    python -m scripts.verify DUMP.safetensors          intermediates that a port wrote under the names of reference/stages.json
    python -m scripts.verify http://127.0.0.1:8000/v1  an OpenAI endpoint: prompt lengths and greedy answers
    python -m scripts.verify FOLDER --dump OUT.safetensors      writes every intermediate, whole
    python -m scripts.verify FOLDER --record           records the values again (float64, plain torch)

The values in reference/ were recorded from kimi-tiny with the reference path in float64 (what the model itself does in
float32 stays so: rotation, softmax, the router). Stages come in the order of the
computation: tokenizer, template, pixels, vision tower, projector, then for each layer norm, attention, router, experts,
and at the end logits and text. The first that differs is where to look; the later ones differ because of it.
"""

import argparse
import ipaddress
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "reference"
# Largest difference over largest value. float32 stays below half of its bound on the models it was tried on.
TOLERANCES = {"float64": 2e-6, "float32": 5e-6, "bfloat16": 0.15}
COARSE = 1e-3  # from this tolerance on: norms instead of the largest difference, and a few other choices of the router
OTHER_CHOICES = 0.1  # share of its choices that may then differ, since near ties are decided by rounding
EVERY = 4  # every fourth of the decoder's positions is recorded
LOGIT_ROWS = 8  # the last positions, of which logits are recorded
TIMEOUT = 120  # seconds for an answer of an endpoint
MAX_REPLY = 10_000_000  # bytes

TEXTS = [
    "Which one is bigger, 9.11 or 9.9?",
    "  def f(x):\n\treturn x**2  # 中文 🙂\r\n\r\n",
    "<|im_end|> 12345678 don't DON'T naïve",
]
QUESTIONS = [
    "Which one is bigger, 9.11 or 9.9? Think carefully.",
    "哪个更大，0.5 还是 0.35？",
    "Which number is smaller, 7.25 or 7.3?",
    "What can you do?",
]


# -------------------------------------------------------------------------------------------------------------- inputs


def picture(height: int, width: int, shift: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 from integers alone, the same everywhere."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * (7 + c) + y * (11 - c) + (x * y) // 5 + 40 * c + 29 * shift) % 256).astype(np.uint8)


def conversation() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools that use every part: a picture, a clip of two chunks, thoughts, a call and its result."""
    clip = [picture(28, 56, shift) for shift in range(5)]
    call = {
        "id": "functions.get_weather:0",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture(40, 52)},
                {"type": "text", "text": "What do you see? And in the clip?"},
                {"type": "video", "video": clip, "fps": 2.0},
            ],
        },
        {
            "role": "assistant",
            "reasoning_content": "I need the weather.",
            "content": "",
            "tool_calls": [call],
        },
        {"role": "tool", "name": "get_weather", "tool_call_id": call["id"], "content": "21 degrees, sunny"},
    ]
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Where"}},
        "required": ["city"],
    }
    function = {"name": "get_weather", "description": "The weather of a city", "parameters": schema}
    return messages, [{"type": "function", "function": function}]


# -------------------------------------------------------------------------------------------------------------- stages


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and processor of a folder, computing in `dtype` by the plain reference paths."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        dtype=torch.float32 if dtype == torch.float64 else dtype,
        attn_implementation="eager",
        mla_path="expand",
        int4_backend="reference",
    )
    return model.to(dtype).eval(), processor  # type: ignore[arg-type]  # transformers annotates the wrapped function


def watch(model: Any, seen: dict[str, torch.Tensor]) -> list[Any]:
    """Hooks that write the output of each stage to `seen`."""
    handles: list[Any] = []

    def on(module: Any, name: str, take: Callable = lambda output: output) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[name] = take(output).detach()

        handles.append(module.register_forward_hook(hook))

    def rows(output: torch.Tensor) -> torch.Tensor:
        return output[0] if output.ndim == 3 else output

    tower, decoder = model.vision_tower, model.language_model.model
    on(tower.patch_embed, "vision.patch_embed")
    for index, block in enumerate(tower.encoder.blocks):
        on(block, f"vision.block.{index}")
    on(tower.encoder.final_layernorm, "vision.final_layernorm")
    on(tower, "vision.merged", lambda items: torch.cat([item.flatten(1) for item in items]))
    on(model.mm_projector, "projector", torch.cat)
    on(decoder.embed_tokens, "decoder.embed_tokens", rows)
    for index, layer in enumerate(decoder.layers):
        name = f"decoder.{index}"
        on(layer.input_layernorm, f"{name}.input_layernorm", rows)
        on(layer.self_attn, f"{name}.self_attn", lambda output: rows(output[0]))
        on(layer.post_attention_layernorm, f"{name}.post_attention_layernorm", rows)
        if hasattr(layer.mlp, "experts"):
            on(layer.mlp.gate, f"{name}.router_ids", lambda output: output[0].sort(-1).values)
            on(layer.mlp.gate, f"{name}.router_weights", by_expert)
            on(layer.mlp.experts, f"{name}.experts", rows)
        on(layer.mlp, f"{name}.mlp", rows)
        on(layer, f"{name}", lambda output: rows(output[0]))
    on(decoder.norm, "decoder.norm", rows)
    return handles


def by_expert(output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The router's weights in the order of the experts' numbers."""
    ids, weights = output
    return weights.gather(-1, ids.argsort(-1))


def stages(model: Any, processor: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Everything that is compared: tensors by stage, and what is text, both in the order of the computation."""
    messages, tools = conversation()
    tokenizer = processor.tokenizer
    texts: dict[str, Any] = {
        "tokenizer": [tokenizer.encode(text) for text in TEXTS],
        "template": processor.apply_chat_template(messages, tools=tools, tokenize=False),
    }
    inputs = processor.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)
    texts["input_ids"] = inputs["input_ids"][0].tolist()
    tensors = {"pixels.grid_thws": inputs["grid_thws"], "pixels.pixel_values": inputs["pixel_values"]}
    dtype = model.language_model.lm_head.weight.dtype
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    handles = watch(model, tensors)
    try:
        with torch.no_grad():
            tensors["logits"] = model(**inputs, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return tensors, texts


def answers(model: Any, processor: Any, questions: list[str]) -> list[dict[str, Any]]:
    """Greedy answers: number of prompt tokens, reasoning and content."""
    replies = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        parsed = processor.tokenizer.parse_completion(output[0, length:])
        replies.append(
            {
                "question": question,
                "prompt_tokens": length,
                "reasoning": parsed.get("reasoning_content", ""),
                "content": parsed.get("content", ""),
            }
        )
    return replies


# ------------------------------------------------------------------------------------------------------------ recording


def recorded_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a stage that is kept in the repository."""
    if name == "logits":
        return tensor[-LOGIT_ROWS:]
    return tensor[::EVERY] if name.startswith("decoder.") else tensor


def record(folder: Path, target: Path = REFERENCE) -> None:
    """Writes reference/stages.safetensors and stages.json."""
    model, processor = load(folder, torch.float64)
    tensors, texts = stages(model, processor)
    texts["answers"] = answers(model, processor, QUESTIONS)
    texts["stages"] = {
        name: {"shape": list(tensor.shape), "recorded": list(recorded_rows(name, tensor).shape)}
        for name, tensor in tensors.items()
    }
    target.mkdir(parents=True, exist_ok=True)
    kept = {name: recorded_rows(name, tensor) for name, tensor in tensors.items()}
    save_file(
        {name: (t.float() if t.is_floating_point() else t).contiguous() for name, t in kept.items()},
        target / "stages.safetensors",
    )
    (target / "stages.json").write_text(
        json.dumps(texts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_reference(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    texts = json.loads((folder / "stages.json").read_bytes())
    return load_file(folder / "stages.safetensors"), texts


# ------------------------------------------------------------------------------------------------------------ comparing


class Verdict(NamedTuple):
    stage: str
    ok: bool
    error: float | None  # largest difference over largest value; None for text and integers
    says: str


def compare(stage: str, want: Any, got: Any, tolerance: float) -> Verdict:
    """One stage: numbers within the tolerance, all else exactly."""
    if not isinstance(want, torch.Tensor):
        return Verdict(stage, want == got, None, "equal" if want == got else first_difference(want, got))
    if got.shape != want.shape:
        return Verdict(stage, False, None, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not want.is_floating_point():
        wrong = int((want != got.to(want.dtype)).sum())
        ok = wrong <= (OTHER_CHOICES * want.numel() if tolerance > COARSE else 0)
        return Verdict(stage, ok, None, f"{wrong} of {want.numel()} differ" if wrong else "equal")
    difference, size = (got.double() - want.double()).abs(), want.double().abs()
    if tolerance > COARSE:
        error = float(difference.norm() / size.norm().clamp(min=1e-30))
    else:
        error = float(difference.max() / size.max().clamp(min=1e-30))
    ok = error <= tolerance  # false for NaN too
    place = np.unravel_index(int(difference.nan_to_num(nan=torch.inf).argmax()), want.shape)
    where = (
        ""
        if ok
        else f", most at {tuple(int(i) for i in place)}: {float(got[place]):.6g}, expected {float(want[place]):.6g}"
    )
    return Verdict(stage, ok, error, f"differs by {error:.1e}{where}")


def first_difference(want: Any, got: Any) -> str:
    """Where two texts or lists differ first."""
    if isinstance(want, list) and isinstance(got, list) and want and isinstance(want[0], list):
        index = next((i for i, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), 0)
        return f"item {index}: {first_difference(want[index], got[index])}"
    place = next((i for i, pair in enumerate(zip(want, got, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return f"length {len(got)}, expected {len(want)}"
    part = slice(max(0, place - 12), place + 12)
    return f"at {place}: {got[part]!r}, expected {want[part]!r}"


def compare_all(
    tensors: dict[str, torch.Tensor],
    texts: dict[str, Any],
    tolerance: float,
    reference: Path = REFERENCE,
) -> Iterator[Verdict]:
    """Verdicts in the order of the computation, on the stages that are given."""
    want_tensors, want_texts = read_reference(reference)
    for stage in ("tokenizer", "template", "input_ids"):
        if stage in texts:
            yield compare(stage, want_texts[stage], texts[stage], 0)
    for stage, sizes in want_texts["stages"].items():
        if stage in tensors:
            got = tensors[stage]
            if list(got.shape) == sizes["shape"]:
                got = recorded_rows(stage, got)
            yield compare(stage, want_tensors[stage], got, tolerance)
    if "answers" in texts:
        for want, got in zip(want_texts["answers"], texts["answers"], strict=True):
            for part in ("prompt_tokens", "reasoning", "content"):
                if part in got:
                    same = want[part] == got[part]
                    says = "equal" if same else f"{got[part]!r}, expected {want[part]!r}"
                    yield Verdict(f"answer {want['question'][:24]!r} {part}", same, None, says)


# ------------------------------------------------------------------------------------------------------------ endpoints


def ask_endpoint(url: str, model: str | None, key: str | None) -> list[dict[str, Any]]:
    """Greedy answers of an OpenAI endpoint. Raises OSError for one that cannot be used."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise OSError(f"{url} is neither http nor https.")
    base = url.rstrip("/")
    name = model or fetch(f"{base}/models", None, key)["data"][0]["id"]
    replies = []
    for question in QUESTIONS:
        body = {
            "model": name,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 160,
        }
        reply = fetch(f"{base}/chat/completions", body, key)
        message = reply["choices"][0]["message"]
        answer = {"question": question, "content": message.get("content") or ""}
        reasoning = message.get("reasoning_content", message.get("reasoning"))
        if reasoning is not None:
            answer["reasoning"] = reasoning
        if "usage" in reply:
            answer["prompt_tokens"] = reply["usage"]["prompt_tokens"]
        replies.append(answer)
    return replies


def is_this_machine(url: str) -> bool:
    """Whether the address is one of loopback, or 0.0.0.0, which engines print: a proxy cannot reach either."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified


def fetch(url: str, body: dict[str, Any] | None, key: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    direct = [urllib.request.ProxyHandler({})] if is_this_machine(url) else []
    opener = urllib.request.build_opener(*direct)
    try:
        with opener.open(urllib.request.Request(url, data, headers), timeout=TIMEOUT) as reply:
            return json.loads(reply.read(MAX_REPLY))
    except urllib.error.HTTPError as error:
        raise OSError(f"{url} answers {error.code}: {error.read(500).decode(errors='replace')}") from error
    except (urllib.error.URLError, ValueError, KeyError, TimeoutError) as error:
        raise OSError(f"{url} gives no usable answer: {error}") from error


# ------------------------------------------------------------------------------------------------------------- command


def verdicts(what: str, dtype: str, model: str | None = None, key: str | None = None) -> Iterator[Verdict]:
    """The comparison of a folder, a dump or an endpoint."""
    tolerance = TOLERANCES[dtype]
    if "://" in what:
        yield from compare_all({}, {"answers": ask_endpoint(what, model, key)}, tolerance)
    elif what.endswith(".safetensors"):
        yield from compare_all(load_file(what), {}, tolerance)
    else:
        loaded, processor = load(Path(what), getattr(torch, dtype))
        tensors, texts = stages(loaded, processor)
        if dtype != "bfloat16":  # whose greedy text may differ from the recorded one by a rounding
            texts["answers"] = answers(loaded, processor, QUESTIONS)
        yield from compare_all(tensors, texts, tolerance)


def report(results: list[Verdict]) -> str:
    """A line for each stage, and the first that differs."""
    if not results:
        return "Nothing to compare: no stage has a name of reference/stages.json."
    lines = [f"{'ok  ' if one.ok else 'DIFF'} {one.stage:34} {one.says}" for one in results]
    wrong = [one for one in results if not one.ok]
    if not wrong:
        return "\n".join([*lines, f"\nAll {len(results)} stages agree."])
    first = wrong[0]
    return "\n".join([*lines, f"\nThe first stage that differs is {first.stage}: {first.says}"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", help="a folder, a dump, or the address of an endpoint")
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="float32")
    parser.add_argument("--dump", type=Path, help="write every intermediate there")
    parser.add_argument("--record", action="store_true", help="record reference/ again from this folder")
    parser.add_argument("--model", help="an endpoint's model; its first by default")
    parser.add_argument("--api-key", help="of an endpoint")
    options = parser.parse_args(arguments)
    try:
        if options.record:
            record(Path(options.what))
            print(f"{REFERENCE} holds the values of {options.what}.")
        elif options.dump:
            tensors, _ = stages(*load(Path(options.what), getattr(torch, options.dtype)))
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, options.dump)
            print(f"{options.dump}: {len(tensors)} stages.")
        else:
            results = list(verdicts(options.what, options.dtype, options.model, options.api_key))
            print(report(results))
            return 0 if results and all(one.ok for one in results) else 1
    except (OSError, ValueError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
