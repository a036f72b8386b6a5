"""Steps of the GPU check with kimi-tiny, the trained model in this repository, against the same process's CPU.

Greedy tokens may differ where the two best logits of the reference are closer than rounding moves them; then the place
and the gap are in the result. Caches, padding and sampling are compared on the card itself.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_device import Device, check_equal, check_error, row_error
from gpu_report import Results, Skipped, require
from PIL import Image
from transformers import AutoProcessor, StaticCache

from kimi import kimi_gpu
from kimi.kimi_cache import CACHE
from kimi.kimi_pool import ExpertPool
from kimi.kimi_sizes import expert_bytes
from kimi.modeling_kimi import PLAIN_CODE
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "kimi-tiny"
QUESTIONS = (
    "Which one is bigger, 9.11 or 9.9?",
    "Which one is bigger, 3.8 or 3.12? Think carefully.",
    "Which is the larger number, 71.4 or 71.35?",
)
# Of a row of bf16 logits |difference| / |value|, between two runs that add up in another order.
BF16_ROW, BF16_GAP = 0.15, 0.6


class Tolerance(NamedTuple):
    """What rounding to a dtype costs on the CPU, where fp32 is the truth, gives what it may cost on the card."""

    row: float  # |difference| / |value| of a row of logits
    gap: float  # between the two best logits, under which either may be chosen

    @classmethod
    def of(cls, logits: torch.Tensor, truth: torch.Tensor) -> "Tolerance":
        return cls(3 * row_error(logits, truth) + 1e-3, 4 * float((logits - truth).abs().max()) + 0.02)


def load(device: Device, on: str, dtype: torch.dtype, **options: Any) -> Kimi:
    """On the "cpu" or the "card"; both are the CPU in a dry run."""
    model = Kimi.from_pretrained(TINY, dtype=dtype, **options).eval()
    return model if on == "cpu" else model.to(device.device)


def processor_of() -> Any:
    return AutoProcessor.from_pretrained(TINY, trust_remote_code=True)


def prompts(processor: Any, *questions: str) -> dict[str, torch.Tensor]:
    """Ids and mask of a batch, padded on the left."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    return dict(processor.apply_chat_template(chats, tokenize=True, return_dict=True, padding=True))


def moved(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def greedy(
    model: Kimi, inputs: dict[str, torch.Tensor], new: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, new) tokens and the (B, new, V) logits they were chosen from, on the CPU."""
    output = model.generate(
        **moved(inputs, model.device),
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    return tokens.cpu(), torch.stack(output.logits, dim=1).float().cpu()


def check_tokens(
    found: dict[str, Any], got: torch.Tensor, want: torch.Tensor, logits: torch.Tensor, gap: float
) -> None:
    """`logits` are those of `want`. Up to the first difference of each sequence; from there on they are other texts."""
    length = min(got.shape[1], want.shape[1])
    got, want = got[:, :length], want[:, :length]
    found["tokens"] = found.get("tokens", 0) + want.numel()
    found.setdefault("different", [])
    for row, same in enumerate(got == want):
        if bool(same.all()):
            continue
        place = int((~same).nonzero()[0])
        best, chosen = logits[row, place].max(), logits[row, place, got[row, place]]
        found["different"].append({"row": row, "at": place, "gap": float(best - chosen)})
    gaps = [different["gap"] for different in found["different"]]
    require(
        all(one <= gap for one in gaps), f"other tokens, the best logit is ahead by {gaps}, more than {gap}"
    )


# ---------------------------------------------------------------------------------------------------------------- tiny


@torch.no_grad()
def tiny(device: Device, results: Results) -> None:
    processor = processor_of()
    new = 6 if device.small else 40
    with results.check("kernels in use") as found:
        kernels_in_use(device, found)
    batch, alone = prompts(processor, *QUESTIONS), [prompts(processor, question) for question in QUESTIONS]
    real = batch["attention_mask"].bool()  # what padding gives does not matter
    truth = load(device, "cpu", torch.float32)(**batch).logits[real]
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        cpu, card = load(device, "cpu", dtype), load(device, "card", dtype)
        limits = Tolerance.of(cpu(**batch).logits[real].float(), truth)
        with results.check(f"{name}: logits of a prompt") as found:
            got = card(**moved(batch, card.device)).logits.cpu()[real]
            check_error(found, got.float(), truth, limits.row)
        want, logits = greedy(cpu, alone[0], new)
        with results.check(f"{name}: greedy tokens as on the CPU") as found:
            check_tokens(found, greedy(card, alone[0], new)[0], want, logits, limits.gap)
        own, logits = greedy(card, alone[0], new)
        for kind in ("static", "static, given", "offloaded", "offloaded_static", "quantized"):
            with results.check(f"{name}: {kind} cache") as found:
                options = cache_options(card, kind, alone[0]["input_ids"].shape[1] + new, device.dry)
                tokens, _ = greedy(card, alone[0], new, disable_compile=True, **options)
                check_tokens(found, tokens, own, logits, limits.gap * (4 if kind == "quantized" else 1))
        with results.check(f"{name}: a padded batch as each prompt alone") as found:
            tokens, _ = greedy(card, batch, new)
            for row, inputs in enumerate(alone):
                check_tokens(found, tokens[row : row + 1], *greedy(card, inputs, new), limits.gap)
        with results.check(f"{name}: a prompt in pieces") as found:
            ids = alone[0]["input_ids"]
            whole = load(device, "cpu", torch.float32)(ids).logits[0]
            check_error(found, in_pieces(card, ids).cpu().float(), whole, limits.row)
    with results.check("sampling repeats with its seed"):
        samples = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            samples.append(card.generate(**moved(batch, card.device), max_new_tokens=new, do_sample=True))
        check_equal(samples[1], samples[0], "the same seed")


def kernels_in_use(device: Device, found: dict[str, Any]) -> None:
    """The self-tests that a model on a card begins with: which operations and configurations they refuse."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kimi_gpu.prepare(device.device, dtype, dict[str, Any](PLAIN_CODE))
    found["tried"] = len(kimi_gpu.FINDINGS)
    found["refused"] = {str(key): reason for key, reason in kimi_gpu.FINDINGS.items() if reason}
    names = ("UNUSABLE_ATTENTION", "UNUSABLE_EXPERTS")  # not there without triton
    found["unusable"] = [
        str(key) for name in names for keys in getattr(kimi_gpu, name, {}).values() for key in keys
    ]
    require(device.dry or found["tried"] > 0, "no self-test ran")
    require(
        not found["refused"] and not found["unusable"], f"refused: {found['refused'] or found['unusable']}"
    )


def compile_tiny(device: Device) -> None:
    """For the processes that compile ahead: what kimi-tiny launches. Outputs are garbage, so no self-test may judge them."""
    ids = torch.randint(0, 2000, (3, 40))
    for dtype in (torch.bfloat16, torch.float32):
        kimi_gpu.FINDINGS.update({(name, str(device.device), dtype): None for name in PLAIN_CODE})
        model = load(device, "card", dtype)
        for some in (ids, ids[:1]):
            inputs = moved({"input_ids": some, "attention_mask": torch.ones_like(some)}, model.device)
            cache = getattr(model(**inputs, use_cache=True), CACHE)
            for new in (3, 1, 1):
                mask = torch.ones(
                    len(some), cache.get_seq_length() + new, dtype=torch.long, device=model.device
                )
                model(
                    inputs["input_ids"][:, :new], past_key_values=cache, use_cache=True, attention_mask=mask
                )


def in_pieces(model: Kimi, ids: torch.Tensor) -> torch.Tensor:
    """(S, V) logits of a prefill, then of a few tokens at a time and of single ones: expand and absorb meet here."""
    cache, logits, start, ids = None, [], 0, ids.to(model.device)
    for size in (ids.shape[1] - 6, 3, 1, 1, 1):
        piece = ids[:, start : start + size]
        output = model(piece, use_cache=True, past_key_values=cache)
        cache, start = getattr(output, CACHE), start + size
        logits.append(output.logits[0])
    return torch.cat(logits)


def cache_options(model: Kimi, kind: str, length: int, dry: bool) -> dict[str, Any]:
    if kind == "static, given":
        return {"past_key_values": StaticCache(config=model.config.text_config, max_cache_len=length)}
    if kind == "quantized":
        for package, backend in (("optimum.quanto", "quanto"), ("hqq", "hqq")):
            with contextlib.suppress(ModuleNotFoundError):
                if importlib.util.find_spec(package):
                    config = {"backend": backend, "nbits": 8 if backend == "hqq" else 4}
                    return {"cache_implementation": "quantized", "cache_config": config}
        raise Skipped("neither optimum-quanto nor hqq is installed")
    if dry and "offloaded" in kind:  # copies between devices, of which there is one here
        kind = "static" if "static" in kind else "dynamic"
    return {} if kind == "dynamic" else {"cache_implementation": kind}


# ---------------------------------------------------------------------------------------------------------------- pool


@torch.no_grad()
def pool(device: Device, results: Results) -> None:
    """A pool that holds 6 of 48 experts, filled from RAM or from the files, against all experts on the card."""
    processor = processor_of()
    inputs, new = prompts(processor, QUESTIONS[0]), 4 if device.small else 24
    resident = load(device, "card", torch.bfloat16)
    ids = inputs["input_ids"].to(device.device)
    long = ids.repeat(1, 2 if device.small else 8)
    own, logits = greedy(resident, inputs, new)
    size = 6 * expert_bytes(resident.config.text_config)
    where: dict[str, Any] = {} if device.dry else {"device_map": {"": "cuda:0"}}
    for tier in ("with RAM", "files alone"):
        model: Kimi | None = None
        with results.check(f"{tier}: loads") as found, without_ram_tier(tier == "files alone"):
            model = Kimi.from_pretrained(TINY, dtype=torch.bfloat16, expert_cache=size, **where).eval()
            assert model.expert_pool is not None
            found["caches"] = [
                f"{cache.capacity} on {cache.device}" for cache in model.expert_pool.all_caches()
            ]
        if model is None:
            continue
        with results.check(f"{tier}: one token, bit for bit"):
            check_equal(model(ids[:, :1]).logits, resident(ids[:, :1]).logits, "logits")
        with results.check(f"{tier}: a prompt") as found:
            got, want = model(long).logits, resident(long).logits
            found["bit_equal"] = torch.equal(got, want)  # more experts than slots add up in another order
            check_error(found, got[0].float(), want[0].float(), BF16_ROW)
        with results.check(f"{tier}: greedy tokens") as found:
            check_tokens(found, greedy(model, inputs, new)[0], own, logits, BF16_GAP)
        with results.check(f"{tier}: on a side stream") as found:
            want, want_long = resident(ids[:, :1]).logits, model(long).logits
            for _ in range(1 if device.small else 5):
                (stream,) = device.streams(1)
                with device.on(stream):  # slots change owners while products of the pass are still waiting
                    got_long = model(long).logits
                    got = model(ids[:, :1]).logits
                device.synchronize()
                check_equal(got, want, "logits of one token")
                check_error(found, got_long[0].float(), want_long[0].float(), BF16_ROW)
        with results.check(f"{tier}: counts") as found:
            found["report"] = str(model.memory_report()).splitlines()


@contextlib.contextmanager
def without_ram_tier(really: bool) -> Iterator[None]:
    """There is no setting for this: a machine with little RAM has none."""
    name = "_ram_tier"
    require(
        hasattr(ExpertPool, name), f"ExpertPool has no {name} any more: this check must be told its new name"
    )
    kept = getattr(ExpertPool, name)
    if really:
        setattr(ExpertPool, name, lambda *arguments, **options: None)
    try:
        yield
    finally:
        setattr(ExpertPool, name, kept)


# -------------------------------------------------------------------------------------------------------------- vision


def pictures() -> list[Image.Image]:
    """Of several shapes, each with a pattern that no resizing makes flat."""
    made = []
    for width, height in ((84, 56), (140, 140), (28, 112)):
        rows, columns = torch.arange(height).unsqueeze(1), torch.arange(width).unsqueeze(0)
        red = (rows * 5 + columns * 3) % 256
        pixels = torch.stack(
            (red, (rows * columns) % 256, (columns * 7 + 40).expand(height, width) % 256), dim=-1
        )
        made.append(Image.fromarray(pixels.to(torch.uint8).numpy()))
    return made


@torch.no_grad()
def vision(device: Device, results: Results) -> None:
    processor = processor_of()
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures()]
    content.append({"type": "text", "text": "What is in these pictures?"})
    chat = [{"role": "user", "content": content}]
    inputs = dict(processor.apply_chat_template(chat, tokenize=True, return_dict=True))
    pixels, grids = inputs["pixel_values"].float(), inputs["grid_thws"]
    want = torch.cat(load(device, "cpu", torch.float32).get_image_features(pixels, grids))
    names = ["sdpa", "eager"]
    if importlib.util.find_spec("flash_attn"):
        names.append("flash_attention_2")
    for name in names:
        for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            if name.startswith("flash") and dtype == torch.float32:
                continue
            with results.check(f"features by {name} in {dtype}") as found:
                model = load(device, "card", dtype, attn_implementation=name)
                patches = pixels.to(device.device, dtype)
                got = torch.cat(model.get_image_features(patches, grids.to(device.device)))
                check_error(found, got.cpu().float(), want, limit)
    with results.check("logits of a prompt with pictures") as found:
        cpu, card = load(device, "cpu", torch.float32), load(device, "card", torch.float32)
        inputs["pixel_values"] = pixels
        want, got = (model(**moved(inputs, model.device)).logits[0] for model in (cpu, card))
        check_error(found, got.cpu(), want, 1e-3)


# -------------------------------------------------------------------------------------------------------------- pytest


def gpu_tests(device: Device, results: Results) -> None:
    """`pytest -m gpu`; in a dry run those that no interpreter could run are collected, and skip themselves."""
    with results.check("pytest -m gpu") as found:
        if importlib.util.find_spec("pytest") is None:
            raise Skipped("pytest is not installed here")
        marked = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if is_marked(path)]
        command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider"]
        command += ["-m", "gpu and not kernels" if device.dry else "gpu", *marked]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        code, lines = run_in(command, environment, results.left() - 5)
        ends = [line.partition(" ") for line in lines if "::" in line and line.startswith("tests")]
        for word in ("PASSED", "SKIPPED", "FAILED", "ERROR"):
            found[word.lower()] = sum(end.startswith(word) for _, _, end in ends)
        found["not_passed"] = [name for name, _, end in ends if end.startswith(("FAILED", "ERROR"))]
        found["last"] = lines[-1] if lines else ""
        # 5: nothing was collected, as where triton is missing.
        require(
            code in ((0, 5) if device.dry else (0,)), f"pytest ended with {code}; None: its time was over"
        )


def run_in(command: list[str], environment: dict[str, str], limit_s: float) -> tuple[int | None, list[str]]:
    """The return code, None if it took too long, and what was printed until then, which also goes to the log."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(max(limit_s, 1))
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.poll()
        output.seek(0)
        text = output.read().decode(errors="replace")
    print(text)
    return code, text.splitlines()


def is_marked(path: Path) -> bool:
    return "pytest.mark.gpu" in path.read_text(encoding="utf-8") and path.name != "test_gpu_check.py"


# -------------------------------------------------------------------------------------------------------------- static


@torch.no_grad()
def static(device: Device, results: Results) -> None:
    """generate(cache_implementation="static"), for which transformers compiles the model by itself on a card."""
    inputs, new = prompts(processor_of(), QUESTIONS[0]), 4 if device.small else 32
    model = load(device, "card", torch.bfloat16)
    want, logits = greedy(model, inputs, new)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("dynamic", {}),
        ("static, not compiled", {"cache_implementation": "static", "disable_compile": True}),
        ("static, as by default", {"cache_implementation": "static"}),
    ]
    for name, options in cases:
        with results.check(name) as found:
            found["measured"] = True
            for call in ("first", "second", "third"):
                device.synchronize()
                start = time.monotonic()
                tokens, _ = greedy(model, inputs, new, **options)
                found[f"{call}_call_s"] = time.monotonic() - start
                check_tokens(found, tokens, want, logits, BF16_GAP)
            found["ms_a_token"] = found["third_call_s"] / want.shape[1] * 1e3
            found["graphs_traced"] = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
