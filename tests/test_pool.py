"""Experts in a pool: the same logits from any amount of memory, and every way in which disk and memory can fail."""

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import small_config
from conftest import ROOT
from kimi import kimi_files, kimi_pool, kimi_sizes
from kimi.kimi_pool import PooledExperts, requested
from kimi.kimi_safetensors import read_header
from kimi.kimi_sizes import expert_bytes
from kimi.kimi_slots import ExpertFiles, Part, SlotCache, Visit, Worth
from kimi.kimi_usage import Routing
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi
from scripts.tiny_checkpoint import write_tiny_checkpoint

TOP_K, EXPERTS, LAYERS = 4, 16, 2  # of the tiny checkpoint: layers 1 and 2 have experts
GENERATOR = torch.Generator().manual_seed(0)
# 10 rows: the kernel that takes the words as they are.
FEW = torch.randint(0, 500, (2, 5), generator=GENERATOR)
SOME = torch.randint(0, 500, (1, 40), generator=GENERATOR)  # experts with few rows and with many
MANY = torch.randint(0, 500, (3, 200), generator=GENERATOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def resident(folder):
    return Kimi.from_pretrained(folder)


@pytest.fixture(scope="module")
def one(resident):
    """Bytes of one expert."""
    return expert_bytes(resident.config.text_config)


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "own")


@torch.no_grad()
def logits(model, ids=FEW):
    return model(ids, use_cache=False).logits


def cache_of(model):
    (cache,) = model.expert_pool.caches.values()
    return cache


def tokens(model, new=12):
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(SOME, attention_mask=torch.ones_like(SOME), max_new_tokens=new, **settings)


# ------------------------------------------------------------------------------------------------------- equal logits


@pytest.mark.parametrize("slots", [TOP_K, 7, 20, 100])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_logits_are_those_of_resident_experts_bit_for_bit(folder, resident, one, slots, backend, monkeypatch):
    """With fewer slots than one layer has experts, a few, and more than there are experts."""
    model = Kimi.from_pretrained(folder, expert_cache=slots * one)
    assert cache_of(model).capacity == min(slots, LAYERS * EXPERTS)
    for other in (model, resident):
        monkeypatch.setattr(other.config.text_config, "int4_backend", backend)
    for ids in (FEW, SOME, MANY, FEW):
        assert logits(model, ids).equal(logits(resident, ids)), ids.shape


def test_generated_tokens_are_the_same(folder, resident, one):
    assert tokens(Kimi.from_pretrained(folder, expert_cache=6 * one)).equal(tokens(resident))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(folder, one, dtype):
    """The reference computes them; words and scales stay as stored."""
    model = Kimi.from_pretrained(folder, expert_cache=5 * one, dtype=dtype)
    assert cache_of(model).stacks["up_proj_weight_scale"].dtype == torch.bfloat16
    assert logits(model, SOME).equal(logits(Kimi.from_pretrained(folder, dtype=dtype), SOME))


def test_dense_experts_can_be_pooled_too(folder, resident, tmp_path):
    config = copy.deepcopy(resident.config)
    config.text_config.expert_quantization = None
    torch.manual_seed(0)
    Kimi(config).bfloat16().save_pretrained(tmp_path)
    size = 12 * expert_bytes(config.text_config)
    for dtype, slots in ((torch.bfloat16, 12), (torch.float32, 6)):
        model = Kimi.from_pretrained(tmp_path, expert_cache=size, dtype=dtype)
        assert cache_of(model).capacity == slots
        assert logits(model, SOME).equal(logits(Kimi.from_pretrained(tmp_path, dtype=dtype), SOME))


def test_two_threads_share_a_pool(folder, resident, one):
    model, wrong = Kimi.from_pretrained(folder, expert_cache=6 * one), []

    def work(ids):
        want = logits(resident, ids)
        wrong.extend(ids.shape for _ in range(5) if not logits(model, ids).equal(want))

    workers = [threading.Thread(target=work, args=(ids,)) for ids in (FEW, SOME)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_compiled_model_runs_pooled_experts_outside_the_graph(folder, resident, one):
    """Which experts are read must be known, so the graph ends before them."""
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    compiled = torch.compile(model, backend="eager")
    assert logits(compiled).equal(logits(model))


@pytest.mark.parametrize("trained", ["", "mlp.gate."])
def test_gradients_are_refused_and_not_wrong(folder, one, trained):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    output = model(FEW).logits
    assert output.requires_grad
    with pytest.raises(RuntimeError, match="compute no gradients; load the model without expert_cache"):
        output.sum().backward()


def test_a_copy_of_the_model_shares_the_slots(folder, resident, one):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    other = copy.deepcopy(model)
    assert cache_of(other) is cache_of(model) and logits(other).equal(logits(resident))


# -------------------------------------------------------------------------------------------- device maps, entry points


def test_no_parameter_exists_for_a_pooled_expert(folder, resident, one):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    assert model.num_parameters() == resident.num_parameters()
    assert sum(isinstance(module, PooledExperts) for module in model.modules()) == LAYERS
    assert "expert_cache" not in model.generation_config.to_dict() | model.config.to_dict()


def test_the_full_model_is_made_in_a_pool_without_its_experts(monkeypatch):
    """61 layers x 9.6 GB of experts never exist, not even on meta, so that device_map="auto" does not count them."""
    from kimi.configuration_kimi import KimiK25Config

    config = KimiK25Config.from_pretrained(ROOT)
    monkeypatch.setattr(kimi_pool, "detect_ram", lambda: 2**45)
    with torch.device("meta"), requested(10**9, "cuda"):
        model = Kimi._from_config(config, dtype=torch.bfloat16)
    sizes = sum(parameter.nbytes for parameter in model.parameters())
    assert sizes == 595_148_192_736 - 60 * 384 * expert_bytes(config.text_config)


@pytest.mark.parametrize("kind", ["auto", "cpu", "disk"])
def test_device_maps(folder, resident, one, tmp_path, kind):
    arguments = {"device_map": kind}
    if kind == "disk":
        names = ["vision_tower", "mm_projector", "language_model.lm_head"]
        inner = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1")
        device_map = dict.fromkeys([*names, *(f"language_model.model.{name}" for name in inner)], "cpu")
        device_map["language_model.model.layers.2"] = "disk"
        arguments = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    model = Kimi.from_pretrained(folder, expert_cache=6 * one, **arguments)
    for ids in (FEW, SOME):
        assert logits(model, ids).equal(logits(resident, ids))
    saved = model.memory_report().devices
    assert ("offloaded" in saved) == (kind == "disk")


REMOTE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(70, 90)[None]
results = []
for size in (None, int(sys.argv[2])):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, expert_cache=size)
    with torch.no_grad():
        results.append(model(ids).logits)
print(json.dumps([model.memory_report().to_dict()["devices"]["cpu"]["expert_slots"], results[0].equal(results[1])]))
"""


def test_through_the_auto_class_and_remote_code(folder, one, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, str(folder), str(6 * one)]
    output = subprocess.check_output(command, env=env, cwd=tmp_path, text=True)
    assert json.loads(output.splitlines()[-1]) == [6, True]


# --------------------------------------------------------------------------------------------------- sizes and memory


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (-5, r"expert_cache is -5 bytes; it must be at least 221,280"),
        (0, r"expert_cache of 0 bytes holds 0 experts of 55,320 bytes; one token takes 4.*221,280"),
        (200_000, r"expert_cache of 200,000 bytes holds 3 experts of 55,320 bytes; one token takes 4"),
        (
            10**15,
            r"expert_cache of 1,000,000,000,000,000 bytes and [\d,]+ bytes of other weights exceed the [\d,]+ bytes",
        ),
        ("1000TB", r"expert_cache of 1,000,000,000,000,000 bytes"),
        ("-1GB", r"expert_cache is -1GB; memory cannot be negative"),
        ("much", r'expert_cache "much" is not a size'),
        (True, r'expert_cache is True; it takes "auto", a number of bytes, or None'),
        (1.5, r"expert_cache is 1.5; it takes"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_a_weight_is_read(folder, size, sentence, monkeypatch):
    monkeypatch.setattr(kimi_files, "read_exactly", lambda *args: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=sentence):
        Kimi.from_pretrained(folder, expert_cache=size)


def test_a_size_in_words(folder):
    assert cache_of(Kimi.from_pretrained(folder, expert_cache="1MB")).capacity == 10**6 // 55_296


def test_auto_is_resident_where_all_fit_and_takes_what_is_free_where_not(folder, resident, one, monkeypatch):
    free = [2**40]
    monkeypatch.setattr(kimi_sizes, "detect_ram", lambda: free.pop(0) if len(free) > 1 else free[0])
    model = Kimi.from_pretrained(folder, expert_cache="auto")
    assert (
        model.expert_pool is None and model.warm_experts(Routing([1, 2], torch.ones(2, EXPERTS).long())) == 0
    )
    assert model.state_dict().keys() == resident.state_dict().keys()
    config = resident.config
    kept_back = 2**40 - kimi_sizes.free_bytes(torch.device("cpu"), config)
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained does
    try:
        needed = kimi_sizes.resident_bytes(config) + LAYERS * EXPERTS * one
        for free[0], fits in ((kept_back + needed, True), (kept_back + needed - 1, False)):
            assert kimi_sizes.all_fit(config, with_gpus=False) == fits
    finally:
        torch.set_default_dtype(torch.float32)
    free[:] = kept_back + needed - 1, kept_back + 9 * one  # before and after the other weights are loaded
    model = Kimi.from_pretrained(folder, expert_cache="auto")
    assert cache_of(model).capacity == 9 and logits(model).equal(logits(resident))
    free[:] = kept_back + needed - 1, kept_back + 2 * one
    with pytest.raises(
        ValueError, match=r"bytes for experts on cpu hold 2 of 55,296 bytes; one token takes 4"
    ):
        Kimi.from_pretrained(folder, expert_cache="auto")


def test_auto_needs_to_know_what_is_free(folder, monkeypatch):
    monkeypatch.setattr(kimi_sizes, "detect_ram", lambda: 0)
    with pytest.raises(ValueError, match=r"does not tell its free memory.*give bytes"):
        Kimi.from_pretrained(folder, expert_cache="auto")


def test_a_state_dict_and_a_bare_model_have_no_files(folder, resident, one):
    with pytest.raises(ValueError, match=r"it cannot take them from state_dict="):
        state = {name: tensor.clone() for name, tensor in resident.state_dict().items()}
        Kimi.from_pretrained(None, config=resident.config, state_dict=state, expert_cache=6 * one)
    with requested(6 * one, None):
        model = Kimi(resident.config)
    with pytest.raises(RuntimeError, match="no experts: expert_cache reads them from a checkpoint"):
        logits(model)


MEASURE = """
import gc, json, sys, torch
from pathlib import Path
from kimi.modeling_kimi import KimiK25ForConditionalGeneration as Kimi

# The peak of this program: ru_maxrss would also count the process that started it.
def peak_rss(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

size = None if sys.argv[2] == "None" else int(sys.argv[2])
model = Kimi.from_pretrained(sys.argv[1], expert_cache=size)
with torch.no_grad():
    output = model(torch.arange(256)[None], use_cache=False, logits_to_keep=4).logits
peak = peak_rss()
tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
           for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
print(json.dumps({"tensors": sum(tensors.values()), "peak": peak, "logits": output.double().sum().item()}))
"""


def tells_its_peak():
    status = Path("/proc/self/status")
    return status.exists() and "VmHWM:" in status.read_text(encoding="utf-8")


@pytest.mark.skipif(not tells_its_peak(), reason="reads the peak of the resident set from /proc (Linux)")
def test_the_resident_set_holds_the_slots_and_not_the_experts(tmp_path):
    """The real width in small: 400 MB of experts through 45 MB of slots, prompt included, with the same logits."""
    sizes = {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "n_routed_experts": 114,
        "num_hidden_layers": 5,
    }
    folder = write_tiny_checkpoint(tmp_path / "wide", sizes, max_shard_size="50MB")
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert on_disk > 400e6
    measured = {}
    for size in (None, 45_000_000):
        command = [sys.executable, "-c", MEASURE, str(folder), str(size)]
        measured[size] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])
    shutil.rmtree(folder)
    all_of_it, pooled = measured.values()
    assert all_of_it["logits"] == pooled["logits"]
    experts = on_disk - 20e6
    assert all_of_it["tensors"] - pooled["tensors"] > experts - 55e6, measured  # slots of 45 MB
    # What the system counts besides is its own affair, but most of 400 MB of experts was never there.
    assert all_of_it["peak"] - pooled["peak"] > experts / 2, measured


# ------------------------------------------------------------------------------------------------ files that go wrong


def file_of_expert(model, key=(1, 3)):
    return next(iter(model.expert_pool.files.parts[key].values()))[0].source.file


def test_a_disk_error_names_file_and_expert_and_the_model_stays_usable(folder, resident, one, monkeypatch):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    logits(model)
    real, calls = kimi_files.read_exactly, []

    def failing(descriptor, begin, view):
        calls.append(begin)
        if len(calls) % 7 == 3:
            view[:] = b"\xff" * len(view)
            raise OSError(5, "Input/output error")
        real(descriptor, begin, view)

    monkeypatch.setattr(kimi_files, "read_exactly", failing)
    message = r"expert \d+ of layer \d: language_model\S+experts\.\d+\.\S+ could not be read from \S+safetensors.*Input/output"
    for _ in range(4):
        with pytest.raises(OSError, match=message):
            tokens(model)
    monkeypatch.setattr(kimi_files, "read_exactly", real)
    for ids in (FEW, SOME, MANY):
        assert logits(model, ids).equal(logits(resident, ids)), "no slot counts as filled that is not"


@pytest.mark.parametrize("change", ["shorter", "rewritten"])
def test_a_file_that_changes_is_noticed_before_its_bytes_are_used(own_folder, one, resident, change):
    model = Kimi.from_pretrained(own_folder, expert_cache=4 * one)
    file = file_of_expert(model)
    status, data = os.stat(file), Path(file).read_bytes()
    if change == "shorter":
        os.truncate(file, 1000)
    else:
        with open(file, "r+b") as handle:
            handle.seek(2000)
            handle.write(b"\xff" * 64)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**10))  # some count in 2 s
    with pytest.raises(
        OSError, match=rf"expert \d+ of layer.*{os.path.basename(file)}: it changed after its header"
    ):
        logits(model, MANY)
    with open(file, "r+b") as handle:
        handle.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert logits(model, MANY).equal(logits(resident, MANY))


def test_a_file_that_is_replaced_or_removed_stays_readable(own_folder, one, resident):
    model = Kimi.from_pretrained(own_folder, expert_cache=4 * one)
    for file in own_folder.glob("*.safetensors"):
        file.unlink()
    assert logits(model, MANY).equal(logits(resident, MANY))


def test_a_shape_that_contradicts_is_refused_when_the_expert_is_read(own_folder, one):
    name = "language_model.model.layers.2.mlp.experts.3.up_proj.weight_shape"
    weight_map = json.loads((own_folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    file = own_folder / weight_map[name]
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].flip(0)}, file, metadata={"format": "pt"})
    model = Kimi.from_pretrained(own_folder, expert_cache=6 * one)
    with pytest.raises(ValueError, match=rf"{name} of the checkpoint says \[256, 128\].*\[128, 256\]"):
        logits(model, MANY)


def test_wrong_checkpoints_are_refused_as_for_resident_experts(own_folder, one):
    config = json.loads((own_folder / "config.json").read_bytes())
    config["text_config"]["n_routed_experts"] = 24
    (own_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ValueError, match="has 16 routed experts in a layer, the config says n_routed_experts 24"
    ):
        Kimi.from_pretrained(own_folder, expert_cache=6 * one)


# ------------------------------------------------------------------------------------------------- state dict, saving


def test_state_dict_and_saving_give_the_published_bytes(folder, resident, one, tmp_path):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    want, state = resident.state_dict(), model.state_dict()
    assert list(state) == list(want)
    assert all(
        tensor.dtype == want[name].dtype and tensor.equal(want[name]) for name, tensor in state.items()
    )
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    saved = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    assert saved.keys() == want.keys() and all(tensor.equal(want[name]) for name, tensor in saved.items())
    assert logits(Kimi.from_pretrained(tmp_path)).equal(logits(resident))


def test_a_state_dict_is_not_made_of_another_file(own_folder, one):
    """One that has taken the name since: the pool still reads the first, and bytes of two models would mix."""
    model = Kimi.from_pretrained(own_folder, expert_cache=6 * one)
    file = Path(file_of_expert(model))
    data = bytearray(file.read_bytes())
    data[-64:] = b"\xff" * 64
    file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(0, 10**18))
    with pytest.raises(
        OSError, match=rf"experts\.0\.\S+ cannot be taken from \S+{file.name}: it is not the file"
    ):
        model.state_dict()


def test_experts_of_a_pool_cannot_be_replaced(folder, resident, one):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    with pytest.raises(
        ValueError, match="experts are read from the files of the checkpoint; load the model without"
    ):
        model.load_state_dict(resident.state_dict())


# ------------------------------------------------------------------------------------------------------ reports, routing


def test_memory_report_counts(folder, resident, one):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    with torch.no_grad():
        cache = model(FEW, use_cache=True).past_key_values
    report = model.memory_report(cache)
    cpu, entry = report.devices["cpu"], cache_of(model).entry_bytes
    assert cpu.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert cpu.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert (cpu.expert_slots, cpu.expert_bytes, cpu.experts_cached) == (6, 6 * entry, 6)
    shapes = 3 * 2 * 4  # weight_shape of three matrices is read and not kept
    assert report.bytes_read == cpu.experts_missed * (entry + shapes) > 0
    assert cpu.hit_rate == max(0, 1 - cpu.experts_missed / cpu.experts_asked)
    before = report.bytes_read
    with torch.no_grad():
        model(FEW[:1, :1], use_cache=False)
        model(FEW[:1, :1], use_cache=False)
    assert model.memory_report().bytes_read > before
    assert json.loads(json.dumps(report.to_dict()))["devices"]["cpu"]["expert_slots"] == 6
    assert "6 of 6" in str(report) and "experts read from files" in str(report)
    plain = resident.memory_report()
    assert plain.devices["cpu"].weights > sum(t.nbytes for t in resident.parameters()) - 1
    assert plain.devices["cpu"].hit_rate is None and "read from files" not in str(plain)


def test_what_fits_is_read_once(folder, one):
    model = Kimi.from_pretrained(folder, expert_cache=100 * one)
    logits(model, MANY)
    read = model.memory_report().bytes_read
    logits(model, MANY)
    assert model.memory_report().bytes_read == read > 0


def test_warming_waits_for_a_pass_that_uses_the_slots(folder, resident, one):
    """Else it evicts experts between their reading and their use, and the pass multiplies with others."""
    model, started = Kimi.from_pretrained(folder, expert_cache=TOP_K * one), threading.Event()
    counts = Routing([1, 2], torch.ones(LAYERS, EXPERTS).long())

    def warm():
        started.set()
        model.warm_experts(counts)

    thread = threading.Thread(target=warm)
    with model.expert_pool.lock:
        thread.start()
        started.wait(60)
        thread.join(0.2)
        assert thread.is_alive() and not cache_of(model).entries
    thread.join()
    assert len(cache_of(model).entries) == TOP_K and logits(model).equal(logits(resident))


def test_routing_is_counted_saved_added_and_used_to_warm(folder, resident, one, tmp_path):
    with resident.collect_routing() as routing:
        logits(resident, SOME)
    logits(resident, SOME)  # is not counted any more
    assert routing.layers == [1, 2] and routing.counts.shape == (LAYERS, EXPERTS)
    assert routing.counts.sum(1).tolist() == [SOME.numel() * TOP_K] * LAYERS
    routing.save(tmp_path / "routing.safetensors")
    again = Routing.load(tmp_path / "routing.safetensors")
    assert again.layers == routing.layers and again.counts.equal(routing.counts)
    assert (again + routing).counts.equal(2 * routing.counts)
    model = Kimi.from_pretrained(folder, expert_cache=10 * one)
    assert model.warm_experts(again) == 10
    flat = {(layer, e): n for layer, row in routing.by_layer().items() for e, n in enumerate(row)}
    least = min(flat[key] for key in cache_of(model).entries)
    assert sum(number > least for number in flat.values()) <= 10
    with model.collect_routing() as pooled:
        assert logits(model, SOME).equal(logits(resident, SOME))
    assert pooled.counts.equal(routing.counts)
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds \['other'\], not the layers and counts"):
        Routing.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="cannot be added"):
        routing + Routing([1], routing.counts[:1])


# ------------------------------------------------------------------------------------------------------------- policy


class Counted:
    """A source of one number per expert, which counts reads."""

    def __init__(self):
        self.reads = []

    def tasks(self, key, out, put):
        def fill():
            self.reads.append(key)
            out["x"].fill_(key[0] * 1000 + key[1])

        return [fill]


def counted_cache(capacity, half_life=64.0, source=None, **arguments):
    source = source or Counted()
    return SlotCache(source, capacity, {"x": ((2,), torch.int64)}, Worth(half_life, 1), **arguments)


def use(cache, *experts):
    """One pass; the values read, which must be the experts'."""
    cache.worth.use((0, expert) for expert in experts)
    visit = Visit(cache, 0, sorted(experts), 100)
    values = [int(cache.stacks["x"][visit.slot(expert)][1]) for expert in sorted(experts)]
    assert values == sorted(experts)


def held(cache):
    return sorted(expert for _, expert in cache.entries)


def test_a_short_half_life_is_recency_and_a_long_one_frequency():
    for half_life, kept in ((0.01, [2, 3]), (1e6, [1, 3])):
        cache = counted_cache(2, half_life)
        for expert in (1, 1, 1, 2):
            use(cache, expert)
        use(cache, 3)
        assert held(cache) == kept, half_life


def test_experts_used_long_ago_lose_their_worth():
    cache = counted_cache(2, half_life=2.0)
    for expert in (1,) * 10 + (2, 3) * 10:
        use(cache, expert)
    assert held(cache) == [2, 3]


def test_worth_neither_overflows_nor_forgets_order_after_a_million_tokens():
    worth = Worth(4.0, 1)
    worth.now = 1e6
    worth.use([(0, 1)])
    worth.use([(0, 1), (0, 2)])
    assert worth.log2[0, 1] > worth.log2[0, 2] > 1e6 - 1


def test_a_pass_over_more_experts_than_slots_reads_each_once_and_uses_what_is_there():
    cache = counted_cache(4)
    use(cache, 96, 97, 98, 99)
    use(cache, *range(80, 100))
    reads = cache.source.reads
    # The first of the pass needs a slot, which the last one gives up; the three others are used before they go.
    assert sorted(reads) == sorted([*((0, expert) for expert in range(80, 100)), (0, 99)])


def test_hold_waits_for_all_and_maps_ids_to_slots():
    cache = counted_cache(3)
    use(cache, 7, 8, 9)
    slots = Visit(cache, 0, [1, 2, 7], 10).hold([1, 2, 7])
    assert [int(cache.stacks["x"][slots[expert]][0]) for expert in (1, 2, 7)] == [1, 2, 7]
    assert slots[[0, 3, 8, 9]].tolist() == [-1] * 4 and len(set(slots[[1, 2, 7]].tolist())) == 3


def test_rows_are_cut_so_that_their_experts_fit():
    visit = Visit(counted_cache(3), 0, [0, 1, 2, 3, 4], 5)
    groups = list(visit.row_groups(torch.tensor([[0, 1], [1, 2], [0, 2], [3, 4], [0, 3]])))
    assert [(rows.start, rows.stop, group) for rows, group in groups] == [
        (0, 3, {0, 1, 2}),
        (3, 5, {0, 3, 4}),
    ]


def test_a_failed_read_frees_its_slot_once_and_is_tried_again():
    class Failing(Counted):
        broken = True

        def tasks(self, key, out, put):
            def fail():
                raise OSError(f"expert {key[1]}")

            return [fail, *super().tasks(key, out, put)] if self.broken else super().tasks(key, out, put)

    cache = counted_cache(2, source=Failing())
    for _ in range(5):
        with pytest.raises(OSError, match="expert"):
            use(cache, 1, 2)
    cache.source.broken = False
    use(cache, 1, 2)
    use(cache, 3, 4)
    assert sorted(entry.slot for entry in cache.entries.values()) == [0, 1] and not cache.free


# ------------------------------------------------------------------------------------------------------- two tiers


def test_a_small_tier_reads_from_a_large_one_and_that_from_disk():
    """An accelerator's slots in front of RAM's; both are on the CPU here."""
    disk = Counted()
    ram = counted_cache(8, source=disk)
    near = counted_cache(3, source=ram)
    for experts in ((1, 2, 3), (4, 5), (1, 2), (3, 4, 5), (1, 2, 3)):
        use(near, *experts)
    assert sorted(disk.reads) == [(0, expert) for expert in (1, 2, 3, 4, 5)], "disk is read once"
    assert near.misses > 5 and ram.misses == 5 and not any(entry.pins for entry in ram.entries.values())
    use(near, *range(10, 30))
    assert len(near.entries) == 3 and len(ram.entries) == 8


def test_a_tier_whose_slots_are_all_pinned_says_so():
    ram = counted_cache(1)
    ram.claim((0, 1), pin=True)
    with pytest.raises(RuntimeError, match=r"all 1 slots of cpu are in use at once"):
        use(counted_cache(1, source=ram), 2)


def test_two_tiers_give_the_logits_of_resident_experts(folder, resident, one, monkeypatch):
    model = Kimi.from_pretrained(folder, expert_cache=6 * one)
    near = cache_of(model)
    layout = {name: (tuple(stack.shape[1:]), stack.dtype) for name, stack in near.stacks.items()}
    near.source = SlotCache(model.expert_pool.files, 20, layout, Worth(64.0, LAYERS))
    # 8 to 16 experts of the two layers: more than are near, and no more than the second tier has.
    two_rows = FEW[:1, :2]
    assert logits(model, two_rows).equal(logits(resident, two_rows))
    missed, read = near.misses, near.source.misses
    for ids in (two_rows, FEW, SOME, MANY, FEW):
        assert logits(model, ids).equal(logits(resident, ids))
        if ids is two_rows:
            assert near.misses > missed and near.source.misses == read, "all are found in the second tier"
    assert model.memory_report().devices["cpu"].expert_slots == 26
    monkeypatch.setattr(kimi_files, "read_exactly", lambda *args: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match=r"expert \d+ of layer \d.*gone"):
        logits(model, MANY)
    monkeypatch.undo()
    assert logits(model, MANY).equal(logits(resident, MANY))


def test_a_kernel_for_many_rows_gets_groups_of_experts(folder, resident, one, monkeypatch):
    """The way of the Triton kernels, which take slots of all experts at once. Their sums run in another order."""
    model = Kimi.from_pretrained(folder, expert_cache=5 * one, dtype=torch.float32)
    want = logits(Kimi.from_pretrained(folder, dtype=torch.float32), SOME)
    seen = []

    def kernel(x, ids, weights, *matrices):
        seen.append(len(ids.unique()))
        assert ids.min() >= 0 and ids.max() < 5
        return kimi_pool.run_experts(x, ids, weights, *matrices)

    monkeypatch.setattr(kimi_pool, "faster_experts", lambda *args: kernel)
    assert (logits(model, SOME) - want).abs().max() < 1e-4
    assert max(seen) == 5 and len(seen) >= 2 * LAYERS


def test_byte_ranges_are_exact(tmp_path):
    """Two experts in one file, one of them in another dtype than the slots."""
    tensors = {"a": torch.arange(6.0), "b": torch.arange(6.0, 12.0).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    sources = read_header(str(tmp_path / "x.safetensors"))
    parts = {(0, i): {"p": [Part("x", sources[name], f"e.p.{name}")]} for i, name in enumerate("ab")}
    files = ExpertFiles(parts, {"p": (1, 6)})
    cache = SlotCache(files, 2, {"x": ((6,), torch.float32)}, Worth(1.0, 1))
    slots = Visit(cache, 0, [0, 1], 2).hold([0, 1])
    assert [cache.stacks["x"][slot].tolist() for slot in slots] == [list(range(6)), list(range(6, 12))]
    assert files.bytes_read == 6 * 4 + 6 * 2


def test_pooled_experts_are_made_on_meta_and_say_so():
    pool = kimi_pool.ExpertPool(small_config(), kimi_pool.CacheRequest("auto"))
    experts = PooledExperts(small_config().text_config, 1, pool)
    assert not list(experts.parameters()) and "in the pool" in repr(experts)
    assert {tensor.device.type for tensor in experts.templates.values()} == {"meta"}


def test_a_slot_whose_reading_cannot_begin_is_free_again():
    """Or else an expert that was never read would pass for one that is there."""

    class Source:
        def tasks(self, key, out, put):
            raise OSError("no more threads")

    cache = SlotCache(Source(), 2, {"w": ((4,), torch.float32)}, Worth(8.0, 1))
    for _ in range(3):
        with pytest.raises(OSError, match="no more threads"):
            cache.claim((0, 1))
    assert not cache.entries and len(cache.free) == 2 and not cache.num_cached()
