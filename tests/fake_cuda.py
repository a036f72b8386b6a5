"""Full-width layers on GPUs that are not there: fake tensors on cuda:0 and cuda:1, kernels that only count.

    python tests/fake_cuda.py GUARD        GUARD: fake_cuda_guard.cpp as a shared library

Prints one JSON object: for each case the operations that would run on a device, the Triton launches, the waits of the host
and the copies between devices, or the error. A process of its own, since it pretends that CUDA is there.
"""

import collections
import contextlib
import ctypes
import inspect
import itertools
import json
import re
import sys
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LAUNCHES: collections.Counter = collections.Counter()  # by kernel


class Kernel:
    """What @triton.jit makes of a function here: a launch checks that its tensors are on one device, and is counted."""

    def __init__(self, function):
        self.name, self.parameters = function.__name__, list(inspect.signature(function).parameters)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **constants):
        devices = {str(value.device) for value in args if hasattr(value, "device")}
        assert len(devices) == 1, f"{self.name} got tensors on {sorted(devices)}"
        given = dict(zip(self.parameters, args, strict=False))
        LAUNCHES[self.name] += 1
        LAUNCHES[f"{self.name} with lengths"] += given.get("lengths") is not None


@contextlib.contextmanager
def pretended_triton():
    """For the import of our kernels: their launches are counted, also where triton is not installed."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.__version__ = "0.0.0"
    triton.jit = lambda function=None, **options: Kernel(function) if function else Kernel
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()
    triton.language = language
    language.__getattr__ = lambda name: name
    real = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "triton"}
    for name in real:
        del sys.modules[name]
    sys.modules.update({"triton": triton, "triton.language": language})
    yield
    del sys.modules["triton"], sys.modules["triton.language"]
    sys.modules.update(real)


def pretend_cuda(guard):
    ctypes.CDLL(guard)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.mem_get_info = lambda device=None: (70 * 2**30, 80 * 2**30)
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda device=None: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = lambda device: contextlib.nullcontext()


import torch  # noqa: E402
import torch._dynamo  # noqa: E402
import transformers  # noqa: E402
from accelerate.hooks import attach_align_device_hook_on_blocks  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

with pretended_triton():
    from kimi import kimi_gpu

from kimi import kimi_backends, kimi_vision, modeling_kimi  # noqa: E402
from kimi.configuration_kimi import KimiK25Config  # noqa: E402
from kimi.kimi_cache import append, new_cache  # noqa: E402
from kimi.kimi_pretrained import set_stacked_names  # noqa: E402
from kimi.modeling_kimi import KimiK25ForConditionalGeneration  # noqa: E402

# Views, memory, and questions about a tensor: nothing runs.
NO_WORK = re.compile(
    "(_unsafe_)?view(_as_real|_as_complex)?|transpose|permute|slice|select|expand|(un)?squeeze|split(_with_sizes)?|t"
    "|detach|alias|unbind|as_strided|_?reshape(_alias)?|unflatten|lift_fresh|(new_)?empty(_like|_strided)?|unfold"
    "|narrow|is_same_size|resize_|sym_size|device"
)
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "bincount", "masked_select", "is_nonzero", "equal"}


class Count(TorchDispatchMode):
    """Counts what touches a CUDA tensor."""

    def __init__(self):
        super().__init__()
        self.operations, self.waits, self.copies = (collections.Counter() for _ in range(3))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        result = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        tensors = given + [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        devices = {str(t.device) for t in tensors}
        on_cuda = any(device.startswith("cuda") for device in devices)
        if on_cuda and not NO_WORK.fullmatch(name):
            self.operations[name] += 1
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self.copies[" and ".join(sorted(devices))] += 1
        from_cuda_to_cpu = name == "_to_copy" and on_cuda and tensors[-1].device.type == "cpu"
        if from_cuda_to_cpu or (name in WAITS and any(t.is_cuda for t in given)):
            frames = [f for f in traceback.extract_stack() if "torch/" not in f.filename][:-1]
            self.waits[f"{name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"] += 1
        return result


def make_model(devices, vision="cuda:0", hooks=True, implementation="sdpa"):
    """The full model's sizes with a layer on each of `devices`, dispatched as a device map does it."""
    config = KimiK25Config()
    config.text_config.num_hidden_layers = len(devices)
    config.vision_config.vt_num_hidden_layers = 1
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = implementation
    with torch.device("meta"):
        model = KimiK25ForConditionalGeneration(config).eval()
    text = "language_model.model."
    device_map = {"vision_tower": vision, "mm_projector": vision, f"{text}embed_tokens": devices[0]}
    device_map |= {f"{text}rotary_emb": devices[0], f"{text}norm": devices[-1]}
    device_map |= {"language_model.lm_head": devices[-1]}
    device_map |= {f"{text}layers.{i}": device for i, device in enumerate(devices)}
    for name, module in model.named_modules():
        device = next((d for path, d in device_map.items() if f"{name}.".startswith(f"{path}.")), None)
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            keeps = not parameter.is_floating_point() or key == "e_score_correction_bias"
            dtype = parameter.dtype if keeps else torch.bfloat16
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            module._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
    if hooks and len({vision, *devices}) > 1:
        set_stacked_names(model, True)
        attach_align_device_hook_on_blocks(
            model,
            execution_device={"": devices[0], **device_map},
            offload=dict.fromkeys(device_map, False),
            skip_keys=model._skip_keys_device_placement,
        )
        set_stacked_names(model, False)
    return model


def filled_cache(model, devices, length, batch=1, static=False):
    text = model.config.text_config
    if static:
        cache = transformers.StaticCache(config=text, max_cache_len=length + 64)
    else:
        cache = new_cache(text)
    widths = text.kv_lora_rank, text.qk_rope_head_dim
    for layer, device in enumerate(devices if length or static else ()):
        states = [torch.empty(batch, 1, length, w, dtype=torch.bfloat16, device=device) for w in widths]
        append(cache, *states, layer, torch.arange(length, device=device))
    return cache


def walk(model, devices, new, cached, mask=None, batch=1, static=False, **kwargs):
    """One forward of `new` tokens behind `cached` ones; what it would do."""
    LAUNCHES.clear()
    cache = filled_cache(model, devices, cached, batch, static) if kwargs.get("use_cache", True) else None
    ids = torch.zeros(batch, new, dtype=torch.long, device=devices[0])
    if mask is not None:
        kwargs["attention_mask"] = torch.ones(batch, cached + new, dtype=torch.long, device=devices[0])
    with torch.no_grad(), Count() as count:
        output = model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **kwargs)
    assert output.logits.shape == (batch, 1, model.config.text_config.vocab_size)
    return {
        "operations": dict(count.operations),
        "launches": dict(LAUNCHES),
        "total": sum(count.operations.values()) + sum(n for name, n in LAUNCHES.items() if " " not in name),
        "waits": dict(count.waits),
        "copies": dict(count.copies),
    }


def ask_for_kernels():
    """Question -> whether a kernel is the answer: first what it takes, then what is left to plain torch."""

    def on_gpu(*shape, dtype=torch.bfloat16, device="cuda:0", learns=False):
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=learns)

    def norm(x, weight):
        return kimi_backends.faster_rms_norm(x, weight, modeling_kimi.rms_norm)

    def route(groups=1, device="cuda:0"):
        logits, bias = on_gpu(2, 384, dtype=torch.float32), on_gpu(384, dtype=torch.float32, device=device)
        return kimi_backends.faster_route(logits, bias, groups, modeling_kimi.choose_experts)

    def rotate(q_pe, latent=None):
        states = on_gpu(1, 1, 2, 512) if latent is None else latent, on_gpu(1, 1, 2, 64)
        return kimi_backends.faster_rotate_and_append(q_pe, *states, modeling_kimi.rotate_pairs)

    def add(dtype, **how):
        wide, other = on_gpu(2, 64, dtype=torch.float32), on_gpu(2, 64, **how)
        return kimi_backends.faster_add_rounded(wide, other, dtype, modeling_kimi.add_rounded)

    x, weight, queries = on_gpu(2, 64), on_gpu(64), on_gpu(1, 64, 2, 64)
    answers = {
        "a norm": norm(x, weight),
        "a router": route(),
        "a rotation": rotate(queries),
        "a sum": add(torch.bfloat16),
        "a product": kimi_backends.faster_silu_and_mul(x, x, modeling_kimi.silu_and_mul),
        "a norm that learns": norm(x, on_gpu(64, learns=True)),
        "a norm of what learns": norm(on_gpu(2, 64, learns=True), weight),
        "a norm in another dtype": norm(x, on_gpu(64, dtype=torch.float32)),
        "a norm in fp64": norm(x.double(), weight.double()),
        "a norm on two devices": norm(x, on_gpu(64, device="cuda:1")),
        "a norm of nothing": norm(x[:0], weight),
        "a norm of columns": norm(x.t(), on_gpu(2)),
        "a norm wider than a program": norm(on_gpu(1, 20000), on_gpu(20000)),
        "a router of groups": route(groups=8),
        "a router on two devices": route(device="cuda:1"),
        "a rotation of columns": rotate(queries.transpose(2, 3)),
        "a rotation in another dtype": rotate(queries, on_gpu(1, 1, 2, 512, dtype=torch.float32)),
        "a sum under autocast": add(torch.float32),
        "a sum that learns": add(torch.bfloat16, learns=True),
    }
    torch.set_autocast_enabled("cuda", True)  # torch.autocast asks for a card
    answers["a norm under autocast"] = norm(x, weight)
    torch.set_autocast_enabled("cuda", False)
    with torch.autograd.forward_ad.dual_level():
        answers["a norm with a tangent"] = norm(x, weight)
    real, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    answers["fake tensors beside a real card"] = norm(x, weight)
    torch.cuda.is_available = real
    return {question: answer is not None for question, answer in answers.items()}


def walk_empty_batch():
    LAUNCHES.clear()
    layer = make_model(ONE * 2).language_model.model.layers[1]
    matrices = [layer.mlp.experts.matrices(name) for name in layer.mlp.experts.shapes]
    states, weights = (torch.empty(0, 7168, dtype=torch.bfloat16, device="cuda:0") for _ in range(2))
    plain = modeling_kimi.run_experts
    assert kimi_backends.faster_experts("auto", states, weights, matrices, plain) is None
    cache = (torch.empty(0, 1, 1, width, dtype=torch.bfloat16, device="cuda:0") for width in (512, 64))
    queries = torch.empty(0, 64, 1, 512, dtype=torch.bfloat16, device="cuda:0")
    plain = modeling_kimi.latent_attention
    assert kimi_backends.faster_latent_attention("auto", queries, *cache, False, plain) is None
    assert layer.input_layernorm(states).shape == states.shape
    return {"launches": dict(LAUNCHES)}


def walk_packed():
    """Two sequences in one row, which positions alone tell apart: transformers makes the mask."""
    model, devices = make_model(ONE * 2), ONE * 2
    positions = torch.arange(8, device="cuda:0").remainder(4)[None]
    masks = []
    model.language_model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    walk(model, devices, 8, 0, use_cache=False, position_ids=positions)
    return {"masked": masks[0] is not None}


def refuse_wrong_batches(device):
    """A cache of another batch: what is written must be refused before a kernel writes beyond it."""
    model = make_model([device] * 2)
    said = {}
    for cached, new in ((1, 2), (2, 1)):
        cache = filled_cache(model, [device] * 2, 8, batch=cached)
        LAUNCHES.clear()
        try:
            model(input_ids=torch.zeros(new, 1, dtype=torch.long, device=device), past_key_values=cache)
        except Exception as error:
            said[f"{cached}, {new}"] = (
                f"{type(error).__name__} after {LAUNCHES['rotate_and_append_kernel']} writes"
            )
    return said


def walk_tower(vision, devices):
    """A picture of 4 x 4 patches and some text. The tower brings the grids to the host, once; fake ones say nothing."""
    kimi_vision.read_grids = lambda *given: [(1, 4, 4)]
    model = make_model(devices, vision)
    config = model.config
    ids = torch.full((1, 4), config.media_placeholder_token_id, device=devices[0])
    LAUNCHES.clear()
    with torch.no_grad(), Count() as count:
        pixels = torch.empty(16, 3, 14, 14, dtype=torch.bfloat16, device=vision)
        features = model.get_image_features(pixels, torch.tensor([[1, 4, 4]]))
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds + torch.cat(features).to(embeds.device)
        output = model(inputs_embeds=embeds, logits_to_keep=1)
    return {"waits": dict(count.waits), "copies": dict(count.copies), "device": str(output.logits.device)}


def trace_static_step():
    """torch.compile of a decode step with a static cache: the operations of its graph, without any break."""
    devices, graphs = ONE * 2, []
    model = make_model(devices)
    cache = filled_cache(model, devices, 4096, static=True)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ids = torch.zeros(1, 1, dtype=torch.long, device="cuda:0")
    with torch.no_grad():
        step = torch.compile(model.forward, fullgraph=True, backend=keep)
        step(ids, past_key_values=cache, cache_position=torch.tensor([4096], device="cuda:0"))
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op.startswith("call_")]
    operators = collections.Counter(
        str(node.target).partition(".")[2] for node in nodes if "kimi" in str(node.target)
    )
    made = [node.meta.get("example_value") for node in nodes]
    largest = max(tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor))
    return {"operators": dict(operators), "graphs": len(graphs), "largest": largest}


ONE, TWO = ["cuda:0"], ["cuda:0", "cuda:1"]
CASES = {
    "decode": (1, 4096, {}),
    "decode, batch": (1, 4096, {"batch": 4}),
    "decode, mask": (1, 4096, {"mask": True}),
    "decode, static": (1, 4096, {"static": True}),
    "decode, static, mask": (1, 4096, {"static": True, "mask": True}),
    "prefill": (4096, 0, {}),
    "prefill, mask": (4096, 0, {"mask": True, "batch": 2}),
    "prompt, no cache": (4096, 0, {"use_cache": False}),
    "chunk": (4096, 8192, {}),
    "chunk, mask": (4096, 8192, {"mask": True}),
    "100 new": (100, 8192, {}),
    "100 new, mask": (100, 8192, {"mask": True, "batch": 2}),
    "static, chunk": (256, 512, {"static": True}),
}


def main(guard):
    pretend_cuda(guard)
    names = [str(device) for device in TWO]
    kimi_gpu.FINDINGS |= dict.fromkeys(itertools.product(kimi_gpu.SELF_TESTS, names, kimi_gpu.KERNEL_DTYPES))
    results = {}

    def record(name, run, *args, **kwargs):
        try:
            results[name] = run(*args, **kwargs)
        except Exception as error:
            where = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
            places = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "/torch/" not in f.filename]
            results[name] = {"error": f"{type(error).__name__}: {error}", "at": places}

    with FakeTensorMode(allow_non_fake_inputs=True):
        for layers in (2, 3):
            devices = ONE * layers
            record(f"{layers} layers", walk, make_model(devices), devices, 1, 4096)
        model, devices = make_model(ONE * 3), ONE * 3
        for name, (new, cached, kwargs) in CASES.items():
            record(f"1 GPU, {name}", walk, model, devices, new, cached, **kwargs)
        devices = [TWO[0], TWO[0], TWO[1], TWO[1], TWO[1]]
        model = make_model(devices)
        for name, (new, cached, kwargs) in CASES.items():
            record(f"2 GPUs, {name}", walk, model, devices, new, cached, **kwargs)
        for vision in TWO:
            record(f"tower on {vision}", walk_tower, vision, devices)
        record("compiled step, static", trace_static_step)
        record("asked", ask_for_kernels)
        with torch.no_grad():
            record("wrong batches", refuse_wrong_batches, "cuda:0")
        record("packed, no cache", walk_packed)
        record("empty batch", walk_empty_batch)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
