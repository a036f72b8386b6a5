"""Steps of the GPU check that measure: whole layers, one layer's experts and attention against rivals, copies to slots.

A line with `measured` carries a figure. Medians, caches overwritten before each run, one replay of a CUDA graph where the
call can be captured; the functions are those of bench_experts.py and bench_attention.py. `of_copy` and `of_product` are
shares of the rates that step ceilings found in the same run.
"""

import functools
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import bench_attention
import bench_experts
import torch
from bench_experts import packed_bytes
from gpu_device import Device, Sizes, attention_kernels, check_equal, experts_kernels
from gpu_report import Results, Skipped, require
from transformers import StaticCache

from kimi.configuration_kimi import PUBLISHED_QUANTIZATION, KimiK25Config
from kimi.kimi_backends import choose_path
from kimi.modeling_kimi import MLA
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi
from scripts.tiny_checkpoint import TINY_TEXT, TINY_VISION, real_width

# -------------------------------------------------------------------------------------------------------------- layers


def config_of_layers(sizes: Sizes) -> KimiK25Config:
    """A dense layer and some of experts, at the published width if `sizes` are the published ones; a small tower."""
    ids: dict[str, Any] = {}
    if sizes.real:
        text = real_width(1 + sizes.layers, sizes.experts)["text"]
    else:
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "media_placeholder_token_id")
        ids = dict(zip(names, range(500, 504), strict=True))
        text = {**TINY_TEXT, "vocab_size": 512, "num_hidden_layers": 1 + sizes.layers}
        text |= {name: ids[name] for name in names[:3]}
    text = {**text, "quantization_config": PUBLISHED_QUANTIZATION}
    vision = {**TINY_VISION, "mm_hidden_size": TINY_VISION["vt_hidden_size"]}
    vision["text_hidden_size"] = text["hidden_size"]
    return KimiK25Config(text_config=text, vision_config=vision, **ids)


def random_model(device: Device) -> Kimi:
    """Filled with random weights on the device."""
    config = config_of_layers(device.sizes)
    with torch.device("meta"):
        model: Any = Kimi(config).bfloat16()
    model.to_empty(device=device.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(name, parameter)
    return model.to(device.device).eval().requires_grad_(False)  # which tries the kernels on it


def fill(name: str, tensor: torch.Tensor) -> None:
    """Words at random; scales and matrices so that activations stay near one."""
    if tensor.dtype == torch.int32:
        tensor.view(torch.uint8).random_(0, 256)
    elif name.endswith("weight_scale"):
        tensor.uniform_(0.1, 0.3).div_((32 * tensor.shape[-1]) ** 0.5)
    elif name.endswith("bias"):
        tensor.zero_()
    elif tensor.ndim == 1:
        tensor.fill_(1)
    else:
        tensor.normal_(std=1.0 if "embed" in name else tensor.shape[-1] ** -0.5)


@torch.no_grad()
def layers(device: Device, results: Results) -> None:
    """Times of the whole model with all its layers and with half of those of experts: their difference is a slope."""
    with results.check("made on the card") as found:
        model = random_model(device)
        found["gb"] = sum(p.nbytes for p in model.parameters()) / 1e9
    decoder, clock = model.language_model.model, device.clock(1.0)
    every = decoder.layers
    some = 1 + device.sizes.layers // 2
    step = len(every) - some  # layers of experts between the two

    def both(measure: Callable[[], float]) -> tuple[float, float]:
        whole = measure()
        decoder.layers = every[:some]
        try:
            return whole, measure()
        finally:
            decoder.layers = every

    depth = 40 if device.small else 4096
    vocabulary = model.config.text_config.vocab_size - 300
    cases: list[tuple[str, Callable[[], float]]] = [
        ("decode, eager", lambda: eager_decode(device, model, clock, depth, vocabulary)),
        ("decode, one graph", lambda: graph_decode(device, model, depth, vocabulary)[0]),
    ]
    for length in (17,) if device.small else (512, 4096):
        cases.append((f"prefill of {length}", prefill_of(device, model, clock, length, vocabulary)))
    for name, measure in cases:
        with results.check(name) as found:
            whole, half = both(measure)
            found.update(measured=True, ms=whole * 1e3, layers=len(every), depth=depth)
            found["ms_a_layer_of_experts"] = (whole - half) / step * 1e3
    with results.check("the graph gives what a call gives"):
        _, captured, call = graph_decode(device, model, depth, vocabulary)
        captured()
        check_equal(call.output, call.again(), "logits")
    with results.check("kernels of a decode step") as found:
        tokens = random_ids(device, vocabulary, 1)
        names: list[Any] = []
        whole, half = both(lambda: count_kernels(device, model, tokens, depth, vocabulary, names))
        found.update(measured=True, kernels=whole, a_layer_of_experts=(whole - half) / step)
        found["most"] = [f"{number} x {name[:60]}" for name, number in names[0].most_common(12)]
        found["copies"] = {
            name: number for name, number in names[0].items() if re.search("Memcpy|Memset", name)
        }


def random_ids(device: Device, vocabulary: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, length), device=device.device, generator=device.generator)


def filled_cache(device: Device, model: Kimi, depth: int, room: int, vocabulary: int) -> StaticCache:
    """A static cache of `depth` tokens, which the model read itself."""
    cache = StaticCache(config=model.config.text_config, max_cache_len=depth + room)
    model(random_ids(device, vocabulary, depth), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def eager_decode(device: Device, model: Kimi, clock: Any, depth: int, vocabulary: int) -> float:
    """Seconds of a step; the dynamic cache grows by one each time."""
    output = model(random_ids(device, vocabulary, depth), use_cache=True, logits_to_keep=1)
    cache, token = cache_of(output), random_ids(device, vocabulary, 1)
    return clock.median(lambda: model(token, past_key_values=cache, use_cache=True), cold=False)[0]


def cache_of(output: Any) -> Any:
    return output["cache"] if "cache" in output else output["past_key_values"]


class Repeated:
    """A captured step that always writes the same place of the cache, and the same step as a call."""

    def __init__(self, model: Kimi, cache: StaticCache, token: torch.Tensor, depth: int):
        self.model, self.cache, self.token, self.depth = model, cache, token, depth
        self.position = torch.tensor([depth], device=token.device)
        self.output: torch.Tensor

    def again(self) -> torch.Tensor:
        for layer in self.cache.layers:
            length = getattr(layer, "cumulative_length", None)  # 5.x counts; 4.57 is told the position
            if isinstance(length, torch.Tensor):
                length.fill_(self.depth)
            elif isinstance(length, int):
                layer.cumulative_length = self.depth
        place = {"cache_position": self.position, "position_ids": self.position[None]}
        return self.model(self.token, past_key_values=self.cache, use_cache=True, **place).logits


def graph_decode(
    device: Device, model: Kimi, depth: int, vocabulary: int
) -> tuple[float, Callable[[], None], Repeated]:
    """Seconds of a step as one CUDA graph with a static cache, the replay, and the step."""
    cache = filled_cache(device, model, depth, 64, vocabulary)
    step = Repeated(model, cache, random_ids(device, vocabulary, 1), depth)
    captured = device.graph(step.again)
    step.output = captured.output
    return device.clock(1.0).median(captured.replay, cold=False)[0], captured.replay, step


def prefill_of(device: Device, model: Kimi, clock: Any, length: int, vocabulary: int) -> Callable[[], float]:
    ids = random_ids(device, vocabulary, length)
    return lambda: clock.median(lambda: model(ids, use_cache=True, logits_to_keep=1), cold=False)[0]


def count_kernels(
    device: Device, model: Kimi, token: torch.Tensor, depth: int, vocabulary: int, names: list[Any]
) -> float:
    output = model(random_ids(device, vocabulary, depth), use_cache=True, logits_to_keep=1)
    cache = cache_of(output)
    model(token, past_key_values=cache, use_cache=True)
    names.append(device.kernels(lambda: model(token, past_key_values=cache, use_cache=True)))
    return float(sum(names[-1].values()))


# ------------------------------------------------------------------------------------------------------- bench-experts


def shares(results: Results, gb_per_s: float, tflop_per_s: float) -> dict[str, float]:
    copy, product = (
        results.figure("ceilings", "copy rate", "gb_per_s"),
        results.figure("ceilings", "bf16 product rate", "tflop_per_s"),
    )
    found = {"gb_per_s": gb_per_s, "tflop_per_s": tflop_per_s}
    found |= {"of_copy": gb_per_s / copy} if copy else {}
    return found | ({"of_product": tflop_per_s / product} if product else {})


@torch.no_grad()
def bench_experts_step(device: Device, results: Results) -> None:
    """Both paths of the kernels over the rows, then the rivals where they have a chance."""
    sizes, k = device.sizes, experts_kernels(device)
    layer = device.layer(sizes.experts)
    clock = device.clock(0.5)
    paths: dict[str, Callable[[], Any]] = {
        "decode": lambda: getattr(k, "run_experts_decode", k.run_experts_triton),
        "prefill": lambda: k.run_experts_prefill,
        **bench_experts.BACKENDS,
        "triton": lambda: k.run_experts_triton,
    }
    rows = (1, 17) if device.small else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    cases = [(number, "triton") for number in rows]
    cases += [(number, "prefill") for number in rows if number <= 16]
    cases += [(1, "decode")] if device.small else [(number, "decode") for number in (32, 64)]
    rivals = ((1, "reference"), (1, "bmm")) if device.small else RIVALS
    for number, name in results.within([*cases, *rivals], reserve_s=4.0):
        with results.check(f"{name}, {number} rows") as found:
            batch = device.batch(number, sizes.experts)
            inputs = (*batch, *layer)
            try:
                run = paths[name]()
                call = functools.partial(run, *inputs)
                found.update(measured=True, **device.time(clock, call, name not in ASKING))
            except bench_experts.Unavailable as reason:
                raise Skipped(str(reason)) from reason
            seconds, chosen = found["us"] / 1e6, batch[1].unique().numel()
            work = 6 * number * sizes.choices * sizes.width * sizes.inner
            found.update(shares(results, chosen * packed_bytes(layer) / seconds / 1e9, work / seconds / 1e12))


ASKING = ("reference", "grouped", "dense")  # rivals that wait for the device, or fill it
RIVALS = (
    (1, "bmm"),
    (16, "bmm"),
    (1, "reference"),
    (64, "reference"),
    (4096, "reference"),
    (4096, "grouped"),
)


# ----------------------------------------------------------------------------------------------------------- bench-mla


@torch.no_grad()
def bench_mla_step(device: Device, results: Results) -> None:
    clock, heads = device.clock(0.3), device.sizes.heads
    depths = (64,) if device.small else (1024, 4096, 16384, 65536, 131072)
    batches = (1, 2) if device.small else (1, 4, 16)
    cases = [("triton", depth, batch) for depth in depths for batch in batches]
    rivals = (("sdpa", 64, 1), ("eager", 64, 1)) if device.small else MLA_RIVALS
    kernel = attention_kernels(device).latent_attention_triton
    scaling = bench_attention.SCALING
    for name, depth, batch in results.within([*cases, *rivals]):
        with results.check(f"{name}, {depth} cached x {batch}") as found:
            inputs = bench_attention.decode_inputs(batch, heads, depth, device.device)
            run: Callable[..., Any] = (
                bench_attention.BACKENDS[name]() if name != "triton" else kernel_run(kernel, scaling)
            )
            try:
                found.update(measured=True, **device.time(clock, functools.partial(run, *inputs)))
            except bench_experts.Unavailable as reason:
                raise Skipped(str(reason)) from reason
            seconds, values = found["us"] / 1e6, bench_attention.LATENT + bench_attention.ROPE
            work = 2 * batch * heads * depth * (2 * bench_attention.LATENT + bench_attention.ROPE)
            found.update(shares(results, batch * depth * values * 2 / seconds / 1e9, work / seconds / 1e12))
    config = KimiK25Config().text_config
    config.num_attention_heads, config._attn_implementation = heads, "sdpa"
    module = MLA(config, 0).to(device.device, torch.bfloat16).eval()
    crossings = [(64, 2)] if device.small else [(s, t) for s in (512, 8192) for t in (1, 8, 32, 64, 128, 256)]
    for cached, new in results.within(crossings):
        with results.check(f"absorb or expand, {new} new of {cached + new}") as found:
            absorb_or_expand(device, clock, module, cached, new, found)


MLA_RIVALS = (("sdpa", 4096, 1), ("sdpa", 16384, 1), ("eager", 4096, 1), ("eager", 16384, 1))


def kernel_run(kernel: Callable[..., Any], scaling: float) -> Callable[..., torch.Tensor]:
    return lambda *tensors: kernel(*tensors, None, scaling)[0]


def absorb_or_expand(
    device: Device, clock: Any, module: MLA, cached: int, new: int, found: dict[str, Any]
) -> None:
    """Both readings of one call under the mask that a cache brings, and the one that is chosen."""
    b, total, heads = bench_attention, cached + new, module.num_heads
    inputs = [device.normal(1, heads, new, dim) for dim in (b.NOPE, b.ROPE)]
    inputs += [device.normal(1, 1, total, dim) for dim in (b.LATENT, b.ROPE)]
    mask = torch.ones(1, 1, new, total, dtype=torch.bool, device=device.device).tril(cached)
    paths: dict[str, Callable[..., Any]] = {"absorb": module.absorb, "expand": module.expand}
    for path, attend in paths.items():
        timed = device.time(clock, functools.partial(attend, *inputs, mask))
        found[f"{path}_us"] = timed["us"]
    found.update(measured=True, chosen=choose_path("auto", new, total, device.device.type))


# ------------------------------------------------------------------------------------------------------------ transfer


def transfer(device: Device, results: Results) -> None:
    """Experts from RAM to the card: pinned by torch, registered, and pageable; beside products; what pinning costs."""
    one, number = (2**12, 3) if device.small else (24_772_608, 24)  # bytes of a published expert
    slots = torch.empty(number, one, dtype=torch.uint8, device=device.device)
    clock = device.clock(1.0)
    with results.check("memory that pinning takes") as found:
        before = pinned_bytes(device)
        source = device.pinned(number, one)
        source.view(torch.int64).random_()
        after = pinned_bytes(device)
        found.update(measured=True, asked=source.nbytes)
        found |= {name: after[name] - before.get(name, 0) for name in after}
    ordinary = torch.empty(number, one, dtype=torch.uint8)
    ordinary.view(torch.int64).random_()
    with results.check("pinned") as found:
        found.update(copy_rate(device, clock, source, slots))
    with results.check("pageable") as found:
        found.update(copy_rate(device, clock, ordinary, slots))
    with results.check("registered in place") as found:
        if device.dry:
            found.update(copy_rate(device, clock, ordinary, slots))
        else:
            runtime = torch.cuda.cudart()
            address, size = ordinary.data_ptr(), ordinary.nbytes
            code = int(runtime.cudaHostRegister(address, size, 0))
            require(code == 0, f"cudaHostRegister gave {code}")
            try:
                found.update(copy_rate(device, clock, ordinary, slots))
            finally:
                torch.cuda.synchronize()
                runtime.cudaHostUnregister(address)
    with results.check("beside products") as found:
        found.update(measured=True, **beside_products(device, clock, source, slots))


def pinned_bytes(device: Device) -> dict[str, int]:
    """What the process holds: by the kernel's count, and by torch's host allocator."""
    found: dict[str, int] = {}
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.exists() else ""
    for name in ("VmLck", "VmPin", "VmRSS"):
        if match := re.search(rf"{name}:\s+(\d+) kB", text):
            found[name] = int(match[1]) * 1024
    stats = getattr(torch.cuda, "host_memory_stats", None)
    if stats is not None and not device.dry:
        with suppress(RuntimeError):
            found |= {name: int(value) for name, value in stats().items() if name.endswith("bytes.current")}
    return found


def copy_rate(device: Device, clock: Any, source: torch.Tensor, slots: torch.Tensor) -> dict[str, Any]:
    """An expert at a time, as slots are filled."""

    def copies() -> None:
        for slot, expert in zip(slots, source, strict=True):
            slot.copy_(expert, non_blocking=True)

    seconds, runs = clock.median(copies, cold=False)
    device.synchronize()
    check_equal(slots[-1].cpu(), source[-1], "the last expert")
    return {"measured": True, "gb_per_s": source.nbytes / seconds / 1e9, "runs": runs}


def beside_products(device: Device, clock: Any, source: torch.Tensor, slots: torch.Tensor) -> dict[str, Any]:
    """Seconds of products alone, of copies alone, and of both on two streams."""
    n = 64 if device.small else 4096
    a, b = device.normal(n, n), device.normal(n, n)
    (side,) = device.streams(1)

    def products() -> None:
        for _ in range(2 if device.small else 150):
            a @ b

    def copies() -> None:
        for slot, expert in zip(slots, source, strict=True):
            slot.copy_(expert, non_blocking=True)

    def both() -> None:
        if not device.dry:
            side.wait_stream(torch.cuda.current_stream())
        with device.on(side):
            copies()
        products()
        if not device.dry:
            torch.cuda.current_stream().wait_stream(side)

    names = {"products_ms": products, "copies_ms": copies, "both_ms": both}
    found = {name: clock.median(call, cold=False)[0] * 1e3 for name, call in names.items()}
    longest, total = max(found["products_ms"], found["copies_ms"]), found["products_ms"] + found["copies_ms"]
    shorter = max(total - longest, 1e-9)
    return {**found, "hidden": (total - found["both_ms"]) / shorter}  # 1: the shorter one costs nothing
