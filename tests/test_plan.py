"""The planner: its sums against the model itself, golden machines with the sums by hand, and invariants."""

import inspect
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import _get_device_map

import kimi.kimi_backends
import kimi.kimi_sizes
import scripts.plan
from builders import small_config
from conftest import ROOT
from kimi.configuration_kimi import KimiK25Config
from kimi.kimi_cache import new_cache
from kimi.kimi_checkpoint import published_tensors
from kimi.kimi_machine import GIB, MIB, Gpu, Machine, gpu_of, parse_gpus, parse_size
from kimi.kimi_sizes import WEIGHT_KINDS, text_workspace_bytes, vision_workspace_bytes, weight_bytes
from kimi.modeling_kimi import KimiK25ForConditionalGeneration
from scripts.placement import OUTSIDES, Chain, Job, Run, _place
from scripts.plan import Plan, main, plan
from scripts.tiny_checkpoint import write_tiny_checkpoint

FULL = KimiK25Config.from_pretrained(ROOT)
TB = 10**12


def on_meta(config: KimiK25Config, dtype: torch.dtype = torch.bfloat16) -> KimiK25ForConditionalGeneration:
    with torch.device("meta"):
        return KimiK25ForConditionalGeneration._from_config(config, dtype=dtype)


@pytest.fixture(scope="module")
def full_model() -> KimiK25ForConditionalGeneration:
    return on_meta(FULL)


# -------------------------------------------------------------------------------------------- sums against the model

# The first pattern found in a tensor's name says its kind.
KIND_OF = {
    "vision_tower": "vision",
    "mm_projector": "projector",
    "embed_tokens": "embeddings",
    "lm_head": "lm_head",
    ".experts.": "routed_experts",
    "shared_experts": "shared_experts",
    "mlp.gate.": "router",
    "self_attn": "attention",
    "norm": "norms",
    ".mlp.": "dense_mlp",
}


def counted(model: KimiK25ForConditionalGeneration) -> dict[str, dict[str, int]]:
    """`weight_bytes`, from the tensors of a model."""
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, published in published_tensors(model).items():
        depth = 4 if ".layers." in name else 3 if ".model." in name else 2 if "lm_head" in name else 1
        kind = next(kind for pattern, kind in KIND_OF.items() if pattern in name)
        size = torch.Size(published.shape).numel() * published.target.dtype.itemsize
        sizes[".".join(name.split(".")[:depth])][kind] += size
    return {path: dict(kinds) for path, kinds in sizes.items()}


def test_weights_are_those_of_the_published_model(full_model):
    modules = weight_bytes(FULL)
    assert modules == counted(full_model)
    assert sum(sum(kinds.values()) for kinds in modules.values()) == 595_148_192_736
    assert plan(FULL, "8xH200").weight_bytes == 595_148_192_736


@pytest.mark.parametrize(
    ("packed", "text", "dtype"),
    [
        (False, {}, torch.bfloat16),
        (True, {"moe_layer_freq": 2, "num_hidden_layers": 5}, torch.bfloat16),
        (True, {"first_k_dense_replace": 3, "n_shared_experts": 2}, torch.float32),
        (False, {"num_hidden_layers": 2}, torch.float32),
    ],
)
def test_weights_are_those_of_any_config(packed, text, dtype):
    config = small_config(packed, text)
    model = on_meta(config, torch.bfloat16).to(dtype)  # packed scales stay bf16, the bias stays fp32
    assert weight_bytes(config, str(dtype).removeprefix("torch.")) == counted(model)


def peak_bytes(run) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at once during `run`, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
        torch.inference_mode(),
    ):
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.fixture
def two_threads():
    """PyTorch's attention on a CPU takes memory for each thread, which a plan for a whole model does not."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


BUSY = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_attention_heads": 16,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("batch", "context", "chunk"),
    [
        (1, 4096, 256),
        (2, 2048, 256),
        (1, 4096, 1),
        (4, 2048, 1),
        (1, 4096, 100),
        (4, 2048, 100),
    ],
)
def test_a_forward_pass_stays_within_the_workspace(batch, context, chunk, monkeypatch):
    """Allocations of a real pass over a cache that is full after it; 8 MiB of attention workspace."""
    for module in (kimi.kimi_backends, kimi.kimi_sizes):
        monkeypatch.setattr(module, "WORKSPACE_BYTES", 8 * MIB)
    config = small_config(True, BUSY)
    torch.manual_seed(0)
    model = KimiK25ForConditionalGeneration(config).to(torch.bfloat16).eval()
    cache, past = new_cache(config.text_config), context - chunk

    def read(tokens: int) -> None:
        model(torch.randint(0, 60, (batch, tokens)), past_key_values=cache, logits_to_keep=1)

    # The first read leaves room for an eighth more, so the last one moves no cache.
    with torch.inference_mode():
        read(past - past % 256)
        read(past % 256) if past % 256 else None
    peak, planned = peak_bytes(lambda: read(chunk)), text_workspace_bytes(config, context, batch, chunk, 2)
    assert peak <= planned, f"{peak} bytes at once, planned {planned}"


@pytest.mark.usefixtures("two_threads")
def test_an_image_stays_within_the_workspace():
    sizes = {"vt_hidden_size": 128, "vt_num_attention_heads": 4, "vt_intermediate_size": 480}
    config = small_config(True, vision=sizes)
    model = KimiK25ForConditionalGeneration(config).to(torch.bfloat16).eval()
    pixels = torch.randn(64 * 64, 3, 14, 14, dtype=torch.bfloat16)
    peak = peak_bytes(lambda: model.get_image_features(pixels, torch.tensor([[1, 64, 64]])))
    planned = vision_workspace_bytes(config, 64 * 64)
    assert peak <= planned, f"{peak} bytes at once, planned {planned}"


# ------------------------------------------------------------------------------------------------------------ golden
#
# By hand, bytes (sizes from the published shapes; 262,144 tokens unless said otherwise):
#   MoE layer 9,808,554,496 = experts 384 * 24,772,632 = 9,512,690,688 + spine 295,863,808
#   layer 0     995,000,320      embed, head 2,348,810,240 each      final norm 14,336
#   vision tower + projector     833,732,064 + 108,555,776 = 942,287,840
#   cache of a layer 262,144 * 1,152 = 301,989,888, spare room an eighth 37,748,736, together 339,738,624
#   workspace(chunk) = 335,544,320 attention, one head expanded (262,144 * (256 + 2 * 192) * 2; the 256 MiB it may
#                      take hold none) + chunk * (262,144 * 5 mask + 585,728 rows) + 132,120,576 one expert in bf16
#                      + 3,604,480 logits
#     256: 956,760,064   512: 1,442,250,752   1024: 2,413,232,128   8192: 16,006,971,392
#   reserve = 671,088,640 + 0.5 % of the device

MOE, EXPERTS, SPINE, CACHE = 9_808_554_496, 9_512_690_688, 295_863_808, 339_738_624
LAYER_0, TABLE, NORM, VISION = 995_000_320, 2_348_810_240, 14_336, 942_287_840
CONTEXT_BYTES = 671_088_640


def workspace(chunk: int) -> int:
    return 335_544_320 + chunk * (262_144 * 5 + 585_728) + 132_120_576 + 3_604_480


def moe_layers(result: Plan) -> list[int]:
    """MoE layers on each GPU."""
    return [len(set(d.layers) - {0}) for d in result.devices if isinstance(d.device, int)]


@pytest.mark.parametrize(
    ("gpus", "layers", "chunk", "ceiling", "at_full_context", "total"),
    [
        # 33.0 GB a token: 4.8e12 / 32,986,516,736 = 145.5; with 18,421,383,168 of cache 4.8e12 / 51,407,899,904 = 93.4
        ("8xH200", [7, 7, 7, 8, 8, 8, 8, 7], 8192, 145.5, 93.4, 150_109_106_995),
        # 8 * (9,808,554,496 + 339,738,624) = 81,186,344,960, + 2,413,232,128 workspace, + 671,088,640 + 424,664,891
        # reserve = 84,695,330,619 of 84,932,978,278 (79.1 GiB). With steps of 2048 it would be 86.6 GB.
        ("8xH100-80", None, 1024, 101.6, 65.2, 84_932_978_278),
        ("8xA100-80", None, 1024, 61.8, 39.7, 84_932_978_278),
        # 15 * 10,148,293,120 = 152.2 GB, + 16.0 workspace + 1.6 reserve: 169.8 of 191.4 GB, and 4 GB of tables
        ("4xB200", [15, 15, 15, 15], 8192, 242.5, 155.6, 191_448_167_219),
    ],
)
def test_golden_nodes_of_gpus(gpus, layers, chunk, ceiling, at_full_context, total):
    result = plan(FULL, gpus)
    assert result.fits and result.context == 262_144 and result.prefill_chunk == chunk
    assert set(result.expert_tiers.values()) == {"gpu"} and list(result.expert_tiers) == list(range(1, 61))
    assert result.ceiling.tokens_per_s == pytest.approx(ceiling, abs=0.1)
    assert result.ceiling.tokens_per_s_at_full_context == pytest.approx(at_full_context, abs=0.1)
    assert sorted(moe_layers(result)) == sorted(layers or [7, 7, 7, 7, 8, 8, 8, 8])
    last = len(result.devices) - 1
    for device, count in zip(result.devices, moe_layers(result), strict=True):
        first = device.device == 0  # layer 0, embeddings and vision at one end, the head at the other
        tables = (LAYER_0 + TABLE + VISION) * first + (TABLE + NORM) * (device.device == last)
        assert device.total_bytes == total
        assert device.weight_bytes == count * MOE + tables
        assert device.bytes["cache"] + device.bytes["cache_room"] == (count + first) * CACHE
        assert device.bytes["workspace"] == workspace(chunk)
        assert device.bytes["reserve"] == CONTEXT_BYTES + int(total * 0.005)


def test_golden_24_gb_and_768_gb_of_ram():
    """At 16,384 tokens; the cache of a layer is 16,384 * 1,152 * 9/8 = 21,233,664.

    On the GPU: 60 * 295,863,808 + 995,000,320 + 2,348,824,576 (head, norm) = 21,095,653,376, cache 61 * 21,233,664 =
    1,295,253,504, workspace 1.77 GB with steps of 2048, reserve 797 MB: 24.96 of 25.25 GB (0.98 * 24 GiB). The table
    (2.35 GB) and the tower (0.94 GB) would not fit any more.
    """
    result = plan(FULL, "1x24GB", 768 * GIB, context=16_384)
    gpu, ram = result.devices
    assert result.fits and gpu.total_bytes == int(0.98 * 24 * GIB)
    assert gpu.weight_bytes == 60 * SPINE + LAYER_0 + TABLE + NORM == 21_095_653_376
    assert gpu.bytes["cache"] + gpu.bytes["cache_room"] == 61 * 21_233_664
    assert ram.weight_bytes == 60 * EXPERTS + TABLE + VISION == 574_052_539_360
    assert ram.bytes["reserve"] == 4 * GIB + int(0.02 * 768 * GIB)
    assert set(result.expert_tiers.values()) == {"ram"} and result.expert_pool_bytes == 60 * EXPERTS
    on_cpu = {path for path, device in result.device_map.items() if device == "cpu"}
    assert {"vision_tower", "mm_projector", "language_model.model.embed_tokens"} <= on_cpu
    # Experts 60 * 8 * 24,772,632 = 11,890,863,360 from RAM over an RTX 3090's PCIe 4.0 at 31.5 GB/s: 377.5 ms. The other
    # 21,095,653,376 from the GPU at its 936 GB/s: 22.5 ms.
    assert result.ceiling.bytes_per_step == {"gpu": 21_095_653_376, "ram": 11_890_863_360, "disk": 0}
    assert result.ceiling.bus_bytes_per_step == 11_890_863_360
    assert result.ceiling.tokens_per_s == pytest.approx(1 / (0.0225381 + 0.3774877), rel=1e-4)


def test_the_slower_of_ram_and_bus_bounds_experts_that_a_gpu_fetches():
    """11,890,863,360 bytes at 63 GB/s (PCIe 5.0), and at 40 GB/s of slow RAM; the RTX 5090's own bytes at 1,792 GB/s."""
    machine = {"gpus": "1x5090", "ram_bytes": 768 * GIB, "context": 16_384}
    result = plan(FULL, **machine)
    own = result.ceiling.bytes_per_step["gpu"]
    experts = result.ceiling.bytes_per_step["ram"]
    assert experts == result.ceiling.bus_bytes_per_step > 0 and gpu_of("5090").bus_bandwidth == 63e9
    for arguments, rate in (
        ({}, 63e9),
        ({"bus_bandwidth": 20e9}, 20e9),
        ({"ram_bandwidth": 40e9}, 40e9),
        ({"ram_bandwidth": 40e9, "bus_bandwidth": 500e9}, 40e9),
    ):
        ceiling = plan(FULL, **machine, **arguments).ceiling
        assert ceiling.tokens_per_s == pytest.approx(1 / (own / 1.792e12 + experts / rate)), arguments


def test_experts_cross_the_bus_of_their_layers_gpu():
    """Two GPUs of a kind, one of them on a slower bus: each layer is fetched at its own."""
    slow, fast = (replace(gpu_of("5090"), bus_bandwidth=rate) for rate in (10e9, 50e9))
    result = plan(FULL, [slow, fast], 768 * GIB, context=16_384)
    seconds = result.ceiling.bytes_per_step["gpu"] / 1.792e12
    for device, gpu in zip(result.devices[:2], (slow, fast), strict=True):
        fetched = [idx for idx in device.layers if result.expert_tiers.get(idx) == "ram"]
        assert fetched
        seconds += len(fetched) * 8 * 24_772_632 / gpu.bus_bandwidth
    assert result.ceiling.tokens_per_s == pytest.approx(1 / seconds)


def test_without_gpus_nothing_crosses_a_bus():
    result = plan(FULL, "none", 768 * GIB, bus_bandwidth=1.0)
    assert result.ceiling.bus_bytes_per_step == 0 and result.ceiling.tokens_per_s > 10


def test_a_machine_whose_ram_is_faster_alone_is_told():
    """14.0 tokens/s by the CPU, 2.5 over PCIe 4.0; with a bus as fast as the RAM the GPU helps."""
    said = "From RAM alone, computed by the CPU, the ceiling is 14 tokens/s: see --gpus none."
    assert said in plan(FULL, "1x24GB", 768 * GIB, context=16_384).notes
    assert said not in plan(FULL, "1x24GB", 768 * GIB, context=16_384, bus_bandwidth=500e9).notes
    assert said not in plan(FULL, "8xH200", 768 * GIB, context=16_384).notes


def test_golden_24_gb_and_768_gb_of_ram_at_full_context():
    """The cache alone is 61 * 339,738,624 = 20.7 GB: with 21.1 GB of weights, 1.0 of workspace and 0.8 of reserve that
    is 43.6 GB, of which 25.25 are there.
    """
    result = plan(FULL, "1x24GB", 768 * GIB)
    assert not result.fits and result.device_map is None
    need = 60 * SPINE + LAYER_0 + TABLE + NORM + 61 * CACHE + workspace(256) + CONTEXT_BYTES
    lacking = need / 0.995 - 0.98 * 24 * GIB
    assert lacking <= result.missing_bytes["gpu"] <= lacking + 2 * MIB
    assert result.summary.startswith("Does not fit: 1 x 262,144 tokens lack 18.4 GB of GPU memory")
    assert [other.change for other in result.alternatives] == [
        "a context of 34,816 tokens",
        "2 GPUs: 1 more 24GB",
        "no GPU: everything in RAM",
    ]


def test_golden_24_gb_and_128_gb_of_ram_and_nvme():
    """RAM: 137,438,953,472 - 4 GiB - 2 % - 3,291,098,080 of table and tower = 127,104,109,027: 13 layers of experts
    (123,664,978,944) and 3.4 GB of cache over the other 47, which stay on disk.
    """
    result = plan(FULL, "1x24GB", 128 * GIB, 2 * TB, context=16_384)
    gpu, ram, disk = result.devices
    assert result.fits and gpu.weight_bytes == 21_095_653_376
    assert ram.bytes["routed_experts"] == 13 * EXPERTS and disk.bytes == {"routed_experts": 47 * EXPERTS}
    assert result.expert_pool_bytes == 13 * EXPERTS + ram.bytes["expert_cache"] == 127_104_109_027
    assert list(result.expert_tiers.values()) == ["ram"] * 13 + ["disk"] * 47
    # 47 * 8 * 24,772,632 = 9,314,509,632 at 7 GB/s: 1.331 s; 13 layers from RAM over the bus 81.8 ms; the GPU 22.5 ms
    assert result.ceiling.bytes_per_step["disk"] == 9_314_509_632
    assert result.ceiling.tokens_per_s == pytest.approx(1 / (1.330644 + 0.081789 + 0.022538), rel=1e-4)


@pytest.mark.parametrize(
    ("gpus", "ram", "words"),
    [
        ("1x24GB", 768, 'device_map="auto", expert_cache="auto"'),
        ("none", 128, 'expert_cache="auto"'),
        ("8xH200", 0, None),
    ],
)
def test_the_notes_say_how_to_load_experts_that_are_elsewhere(gpus, ram, words):
    notes = " ".join(plan(FULL, gpus, ram * GIB, 2 * TB, context=16_384).notes)
    assert words in notes if words else "expert_cache" not in notes


def test_golden_cpu_only():
    """Weights 595,148,192,736, cache 61 * 339,738,624 = 20,724,056,064, workspace at most 16.0 GB, reserve 20.8 GB:
    652.7 of 824.6 GB. 32,986,516,736 bytes a token at 460.8 GB/s: 14.0 tokens/s.
    """
    result = plan(FULL, "none", 768 * GIB)
    (ram,) = result.devices
    assert result.fits and ram.weight_bytes == 595_148_192_736 and ram.bytes["workspace"] == workspace(8192)
    assert ram.bytes["cache"] == 70_272 * 262_144 and ram.used_bytes < ram.total_bytes == 768 * GIB
    assert set(result.device_map.values()) == {"cpu"} and set(result.expert_tiers.values()) == {"ram"}
    assert result.ceiling.tokens_per_s == pytest.approx(460.8e9 / 32_986_516_736)


def test_eight_gpus_fit_if_and_only_if_eight_layers_do():
    """60 MoE layers on 8 devices are 8 on some; what they need, to the byte, is the smallest device that works."""
    need = 8 * (MOE + CACHE) + workspace(256) + CONTEXT_BYTES
    least = next(n for n in range(int(need / 0.995) - 9, int(need / 0.995) + 9) if n - int(n * 0.005) >= need)
    assert plan(FULL, [Gpu("a", least, 1e12)] * 8).fits
    refused = plan(FULL, [Gpu("a", least - 1, 1e12)] * 8)
    assert not refused.fits and refused.missing_bytes == {"gpu": 8 * MIB}


def test_embeddings_and_head_go_where_they_fit():
    """Not necessarily to the two ends: neither the first GPU nor the last has 2.35 GB for them."""
    reserve = workspace(256) + CONTEXT_BYTES
    small = Gpu("small", int((2_000_000_000 + reserve) / 0.995), 1e12)
    large = Gpu("large", int((10 * (MOE + CACHE) + 2 * TABLE + VISION + reserve) / 0.995), 1e12)
    result = plan(FULL, [small, *[large] * 6, small])
    assert result.fits
    assert result.device_map["language_model.model.embed_tokens"] in range(1, 7)
    assert result.device_map["language_model.lm_head"] in range(1, 7)


def test_a_batch_reads_the_experts_of_all_its_tokens():
    """16 tokens choose 384 * (1 - (1 - 8/384)^16) = 109.8 of a layer's experts, if routing is even."""
    one, many = (plan(FULL, "8xH200", batch=n, context=8192).ceiling for n in (1, 16))
    distinct = 384 * (1 - (1 - 8 / 384) ** 16)
    more = 60 * (distinct - 8) * 24_772_632
    assert many.bytes_per_step["gpu"] - one.bytes_per_step["gpu"] == pytest.approx(more, abs=16)
    assert many.cache_bytes_per_step == 16 * 8192 * 70_272
    assert many.tokens_per_s == pytest.approx(16 * 4.8e12 / many.bytes_per_step["gpu"])


def count_searches(gpus: str, ram_bytes: int) -> int:
    """Searches over the ways to cut the chain of layers, each of which takes a few operations on arrays per device."""
    _place.cache_clear()
    plan(FULL, gpus, ram_bytes, batch=2)
    return _place.cache_info().misses


@pytest.mark.parametrize(
    "gpus", ["8xH200", "7xH100", "1x24GB", "16x24GB", "4xH100,4xA100-40", "16x12GB", "64x12GB"]
)
def test_planning_takes_few_searches(gpus):
    """However many devices there are: about twenty find the least of a size to 1 MiB."""
    assert 1 <= count_searches(gpus, 64 * GIB) <= 50


def test_experts_without_bytes_take_no_memory():
    layers = Chain(spine=(10, 10, 10), moe=(False, True, True), experts=0)
    assert _place(layers, (30,), (0, 0, 0)) == (Run(0, 3, 2, ("embed", "vision", "head")),)


def test_more_ram_beside_the_same_gpus_takes_no_new_search():
    """How the layers are placed on GPUs does not depend on the RAM."""
    _place.cache_clear()
    machine = Machine(parse_gpus("16x24GB"), 64 * GIB, 0)
    missing = scripts.plan._missing(machine, Job(FULL, 262_144, 2, "bfloat16"))
    assert missing["ram"] > 0 and _place.cache_info().misses <= len(OUTSIDES)


# -------------------------------------------------------------------------------------------------------- invariants

SMALL = small_config(
    True, {"num_hidden_layers": 6, "hidden_size": 1024, "vocab_size": 8192, "moe_intermediate_size": 512}
)
sizes = st.integers(0, 200).map(lambda n: n * 5 * MIB)


@st.composite
def machines(draw) -> dict[str, Any]:
    """Machines around the size of a small model of 100 MB, its reserves included."""
    base = CONTEXT_BYTES + 900 * MIB
    gpus = [Gpu("card", base + draw(sizes), 1e12) for _ in range(draw(st.integers(0, 4)))]
    ram = draw(st.one_of(st.just(0), sizes.map(lambda n: n + 4 * GIB)))
    return {
        "gpus": gpus,
        "ram_bytes": ram if gpus else ram or 6 * GIB,
        "disk_bytes": draw(st.sampled_from([0, 2 * GIB])),
        "context": draw(st.sampled_from([1, 100, 4096])),
        "batch": draw(st.integers(1, 3)),
    }


def check_plan(result: Plan, config: KimiK25Config) -> None:
    """No device over its size; every byte of every module in one place; map, tiers and bytes tell one story."""
    modules = weight_bytes(config, result.dtype)
    for device in result.devices:
        assert device.used_bytes <= device.total_bytes, device
        assert all(size >= 0 for size in device.bytes.values())
    for kind in WEIGHT_KINDS:
        placed = sum(device.bytes.get(kind, 0) for device in result.devices)
        assert placed == sum(kinds.get(kind, 0) for kinds in modules.values()), kind
    assert set(result.device_map) == {*modules, "language_model.model.rotary_emb"}
    layers = [idx for device in result.devices for idx in device.layers]
    assert layers == list(range(config.text_config.num_hidden_layers))
    for device in result.devices:
        for idx in device.layers:
            assert result.device_map[f"language_model.model.layers.{idx}"] == device.device
    moe = [idx for idx in layers if config.text_config.is_moe_layer(idx)]
    assert list(result.expert_tiers) == moe
    per_layer = max(kinds.get("routed_experts", 0) for kinds in modules.values())
    for tier in ("gpu", "ram", "disk"):
        held = list(result.expert_tiers.values()).count(tier)
        places = [d for d in result.devices if {"cpu": "ram", "disk": "disk"}.get(d.device, "gpu") == tier]
        assert sum(d.bytes.get("routed_experts", 0) for d in places) == held * per_layer


@settings(max_examples=150, deadline=None)
@given(machines())
def test_every_plan_holds_what_it_says_and_every_refusal_helps(machine):
    result = plan(SMALL, **machine)
    if result.fits:
        check_plan(result, SMALL)
        return
    (kind, size), *_ = result.missing_bytes.items()
    grown = dict(machine)
    if kind == "ram":
        grown["ram_bytes"] += size
    else:
        share = size // len(machine["gpus"])
        grown["gpus"] = [replace(gpu, total_bytes=gpu.total_bytes + share) for gpu in machine["gpus"]]
    assert plan(SMALL, **grown).fits
    for other in result.alternatives:
        better = plan(SMALL, **{**machine, **other.arguments})
        assert better.fits and better.ceiling.tokens_per_s == other.tokens_per_s, other


@settings(max_examples=100, deadline=None)
@given(machines(), st.integers(0, 3), sizes, sizes, st.booleans())
def test_more_memory_never_makes_a_plan_fail(machine, which, more_gpu, more_ram, one_more):
    if not plan(SMALL, **machine).fits:
        return
    larger = dict(machine, ram_bytes=machine["ram_bytes"] + more_ram)
    if machine["gpus"]:
        gpus = list(machine["gpus"])
        gpus[which % len(gpus)] = replace(gpus[0], total_bytes=gpus[which % len(gpus)].total_bytes + more_gpu)
        larger["gpus"] = gpus + [gpus[0]] * one_more
    assert plan(SMALL, **larger).fits


@pytest.mark.parametrize("gpus", ["8xH100", "3xH200,4xH100", "5xB200", "1xB200", "20x24GB"])
def test_plans_of_the_full_model_hold_what_they_say(gpus):
    check_plan(plan(FULL, gpus, 700 * GIB, 2 * TB, context=32_768), FULL)


def test_gpus_of_one_kind_differ_by_no_more_than_a_layer():
    used = [device.used_bytes for device in plan(FULL, "8xH200").devices]
    assert max(used) - min(used) <= MOE + CACHE


# ------------------------------------------------------------------------------------------------------- device maps


def test_the_device_map_covers_the_model_once(full_model):
    device_map = plan(FULL, "8xH200").device_map
    for name, _ in full_model.named_parameters():
        owners = [path for path in device_map if name == path or name.startswith(f"{path}.")]
        assert len(owners) == 1, (name, owners)


def test_from_pretrained_takes_the_map(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    config = KimiK25Config.from_pretrained(folder)
    device_map = plan(config, "none", 8 * GIB, context=1024).device_map
    model = KimiK25ForConditionalGeneration.from_pretrained(folder, device_map=device_map)
    assert model.generate(torch.tensor([[70, 71, 72]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


def auto_map(model: KimiK25ForConditionalGeneration, max_memory: dict[int, int]) -> dict[str, Any]:
    """What `from_pretrained(device_map="auto", max_memory=...)` makes of a model on meta."""
    arguments = [model, "auto", dict(max_memory), None]
    if "dtype" in inspect.signature(_get_device_map).parameters:  # 4.57
        arguments += [torch.bfloat16, None]
    return _get_device_map(*arguments)


def test_auto_splits_between_layers_and_stays_within_memory(full_model):
    modules = {path: sum(kinds.values()) for path, kinds in weight_bytes(FULL).items()}
    device_map, filled = auto_map(full_model, dict.fromkeys(range(8), 80 * GIB)), defaultdict(int)
    for path, size in modules.items():
        if ".layers." in path:
            assert path in device_map, f"{path} is split"
        owners = {
            device
            for key, device in device_map.items()
            if f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.")
        }
        assert len(owners) == 1 or path == "vision_tower", (path, owners)
        filled[owners.pop()] += size
    assert all(size <= 80 * GIB for device, size in filled.items() if device != "disk"), filled


def test_auto_counts_packed_words_in_four_bytes(full_model):
    """All but the router's bias, which accelerate is told of separately (4.57) or reads itself (5.x)."""
    from accelerate.utils import compute_module_sizes

    bias = 60 * 384
    assert compute_module_sizes(full_model, dtype=torch.bfloat16)[""] == 595_148_192_736 - 2 * bias
    assert compute_module_sizes(full_model)[""] == 595_148_192_736


def test_auto_uses_eight_times_80_gib(full_model):
    """Dense and MoE layers are two classes: 4.57's accelerate takes the first of a class for the size of all."""
    assert "disk" not in auto_map(full_model, dict.fromkeys(range(8), 80 * GIB)).values()


# --------------------------------------------------------------------------------------------------- input and output


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * GIB), ("79.5GiB", int(79.5 * GIB)), ("2TB", 2048 * GIB), ("512MB", 512 * MIB), ("0", 0)],
)
def test_memory_is_counted_as_it_is_sold(text, size):
    assert parse_size(text, "--ram", gb=GIB) == size


def test_numbers_small_units_and_decimals_are_exact():
    sizes = [5, "5B", "2KB", "1.5MB", "1KiB", "1GiB", "4.1GB", "8.7TB"]
    want = [5, 5, 2000, 1_500_000, 1024, 2**30, 4_100_000_000, 8_700_000_000_000]
    assert [parse_size(size, "size") for size in sizes] == want


def test_disks_are_decimal_and_gib_is_exact():
    with pytest.raises(ValueError, match=r'max_shard_size "5\.5" is not a size'):
        parse_size(5.5, "max_shard_size")
    assert parse_size("2TB", "--disk") == 2 * TB and parse_size("2TiB", "--disk") == 2 * 1024 * GIB
    assert gpu_of("80GiB").total_bytes == 80 * GIB and gpu_of("80GB").total_bytes == int(78.4 * GIB)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("H100", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("A100-80", "A100 80GB"),
        ("A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx3090", "RTX 3090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_cards_by_any_of_their_names(name, card):
    assert gpu_of(name).name == card


def test_several_kinds_of_gpu():
    assert [gpu.name for gpu in parse_gpus("2xH100, 1x24GB")] == ["H100 SXM", "H100 SXM", "24GB"]
    assert parse_gpus("none") == ()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpus", "8xH1000"], 'GPU "H1000" is unknown; the known ones are H100 SXM,'),
        (
            ["--gpus", "eight"],
            '--gpus "eight" is not understood at "eight"; write 8xH100, 8x80GB, detected or none.',
        ),
        (["--gpus", "0xH100"], '--gpus "0xH100" asks for 0 of H100; it takes at least one, or none.'),
        (["--gpus", "1x-24GB"], "GPU memory is -24GB; memory cannot be negative."),
        (["--gpus", "1x0GB"], "GPU memory is 0GB; leave such a GPU out."),
        (["--gpus", "none", "--ram", "-5GB"], "--ram is -5GB; memory cannot be negative."),
        (["--gpus", "none", "--ram", "lots"], '--ram "lots" is not a size such as 80GB, 79.6GiB or 2TB.'),
        (["--gpus", "none"], "there is nothing to plan on: no GPU and no RAM was given."),
        (
            ["--gpus", "8xH200", "--context", "300000"],
            "context 300000 must be between 1 and max_position_embeddings 262144 tokens.",
        ),
        (["--gpus", "8xH200", "--batch", "0"], "batch is 0; at least one sequence must be planned."),
        (["--gpus", "8xH200", "--dtype", "int8"], 'dtype "int8" is not one of bfloat16, float16, float32.'),
        (["--gpus", "8xH200", "--ram-bandwidth", "0"], "ram_bandwidth is 0.0 bytes/s; it must be positive."),
        (["--gpus", "8xH200", "--bus-bandwidth", "0"], "bus_bandwidth is 0.0 bytes/s; it must be positive."),
        (["--gpus", "8xH200", "--config", "/nowhere"], "--config /nowhere has no config.json."),
    ],
)
def test_bad_input_gets_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith(f"plan: {sentence}") and error.count("\n") == 1


def test_a_broken_config_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert main(["--gpus", "8xH200", "--config", str(tmp_path)]) == 2
    assert f"{tmp_path / 'config.json'} is not JSON" in capsys.readouterr().err


def test_exit_status_and_json(capsys):
    assert main(["--gpus", "8xH200", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] and answer["device_map"]["language_model.model.layers.60"] == 7
    assert main(["--gpus", "7xH100", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["fits"] and answer["missing_bytes"]["gpu"] > 0 and answer["alternatives"]


def test_plain_text(capsys):
    """Aligned without rich: a row per device, sums in GB, and one line for each thing to know."""
    assert main(["--gpus", "1x24GB", "--ram", "128GB", "--disk", "2TB", "--context", "16384"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Fits: 595.1 GB of weights and 1.3 GB of cache for 1 x 16,384 tokens")
    rows = [line.split() for line in lines[3:6]]
    assert [row[0] for row in rows] == ["cuda:0", "RAM", "disk"] and rows[2][1:] == [
        "447.10",
        "447.10",
        "2000.00",
    ]
    assert len({len(line) for line in lines[2:6]}) == 1
    assert "Experts: 13 layers in RAM, 47 layers on disk." in lines
    assert any(
        line.startswith(
            "Ceiling: 0.7 tokens/s (21.1 GB gpu, 2.6 GB ram, 9.3 GB disk read per step of 1, 11.9 GB of it over PCIe)"
        )
        for line in lines
    )
    assert main(["--gpus", "4xH200"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("Does not fit: 1 x 262,144 tokens lack 27.5 GB of GPU memory (6.9 GB on each of 4)")
    assert "What would fit" in out and "5 GPUs: 1 more H200 (146)" in out


def test_rich_in_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["--gpus", "8xH200"]) == 0
    out = capsys.readouterr().out
    assert "cuda:7" in out and "┃" in out and "146 tokens/s" in out


def test_this_machine(capsys):
    """Whatever it is: a plan or a refusal, never an error about the arguments."""
    assert main([]) in (0, 1)
    assert main(["--gpus", "none", "--ram", "8GB"]) == 1


def test_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plan", "--gpus", "8xA100-80"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("Fits: "), done.stderr
