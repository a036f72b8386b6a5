"""The full width on GPUs that are not there (fake_cuda.py): devices, waits, copies and launches, counted."""

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT

HERE = ROOT / "tests"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (c++, g++ or clang++) was found")
MOST_LAUNCHES = 25  # of a decoding step, for each layer with experts


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """What fake_cuda.py prints, by case."""
    guard, torch_folder = tmp_path_factory.mktemp("guard") / "guard.so", Path(torch.__file__).parent
    command = [COMPILER, "-std=c++17", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    command += [str(HERE / "fake_cuda_guard.cpp"), "-o", str(guard), f"-L{torch_folder / 'lib'}", "-lc10"]
    built = subprocess.run(
        [*command, f"-Wl,-rpath,{torch_folder / 'lib'}"], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda.py"), str(guard)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def of_one_layer(walks, key):
    with_three, with_two = (collections.Counter(walks[f"{n} layers"][key]) for n in (3, 2))
    with_three.subtract(with_two)
    return {name: number for name, number in with_three.items() if number}


def test_every_case_runs_on_the_devices_of_its_layers(walks):
    assert not {name: walk for name, walk in walks.items() if "error" in walk}
    assert len(walks) > 25


def test_the_host_waits_for_no_device(walks):
    assert not {name: walk["waits"] for name, walk in walks.items() if walk.get("waits")}


def test_a_layer_of_a_decoding_step_is_few_launches(walks):
    launches, operations = of_one_layer(walks, "launches"), of_one_layer(walks, "operations")
    assert walks["3 layers"]["total"] - walks["2 layers"]["total"] <= MOST_LAUNCHES, (launches, operations)
    assert launches["partial_kernel"] == launches["gate_up_decode_kernel"] == launches["route_kernel"] == 1
    assert operations["mm"] == 8, "a product for each matrix of the layer, none of them twice"
    # Attention and experts are kernels of ours in every case that decodes.
    for name, walk in walks.items():
        if "decode" in name:
            layers = 3 if name.startswith("1 GPU,") else 5
            assert walk["launches"]["partial_kernel"] == layers
            assert walk["launches"]["gate_up_decode_kernel"] == layers - 1


def test_the_router_and_the_up_projections_use_weights_as_they_are(walks):
    """No copy of a weight in fp32; no product with unit vectors because a device map put hooks on the module."""
    for name, walk in walks.items():
        if "operations" in walk:
            assert "eye" not in walk["operations"], name
    assert "_to_copy" not in of_one_layer(walks, "operations")


def test_what_layers_share_crosses_to_a_device_once(walks):
    """Five layers, three of them on the second device. The states cross, angles (2) and positions; the logits go back."""
    between = "cuda:0 and cuda:1"
    copies = {name: walk["copies"][between] for name, walk in walks.items() if name.startswith("2 GPUs,")}
    expected = {name: 5 + ("mask" in name) for name in copies}
    expected |= {name: 7 for name in copies if "static" in name}  # a mask, and lengths
    assert copies == expected


def test_a_static_cache_is_read_as_far_as_it_is_filled(walks):
    for name, walk in walks.items():
        if "decode" in name:
            launches = walk["launches"]
            expected = launches["partial_kernel"] if "static" in name else 0
            assert launches["partial_kernel with lengths"] == expected, name


def test_many_new_tokens_are_one_call_of_a_kernel(walks):
    """Which stores no scores, so no workspace divides them."""
    for name in ("100 new", "100 new, mask"):
        assert walks[f"1 GPU, {name}"]["launches"]["partial_kernel"] == 3


def test_a_chunk_is_expanded_many_heads_at_a_time(walks):
    """At 12,288 tokens 64 heads are 1 GB; a GPU has it free. Two products of kv_b_proj a head would be 384 more."""
    for name in ("chunk", "chunk, mask"):
        assert walks[f"1 GPU, {name}"]["operations"]["mm"] <= 3 * 10


def test_kernels_take_what_they_can_read_and_leave_the_rest(walks):
    """Gradients, tangents, casts, strides, devices: a kernel sees addresses, and records nothing."""
    asked = walks["asked"]
    taken = {"a norm", "a router", "a rotation", "a sum", "a product"}
    assert {question for question, is_kernel in asked.items() if is_kernel} == taken and len(asked) > 20


def test_a_cache_of_another_batch_is_refused_before_a_kernel_writes(walks):
    said = walks["wrong batches"]
    assert set(said) == {"1, 2", "2, 1"} and all(text.endswith("after 0 writes") for text in said.values())


def test_an_empty_batch_is_left_to_plain_torch(walks):
    """A grid of no programs cannot be launched."""
    assert not any(walks["empty batch"]["launches"].values())


def test_packed_sequences_keep_their_mask(walks):
    assert walks["packed, no cache"] == {"masked": True}


def test_a_compiled_step_takes_experts_and_attention_whole(walks):
    """In one graph, in which nothing is as large as a matrix of an expert: none is unpacked or copied."""
    step = walks["compiled step, static"]
    assert step["operators"] == {"latent_attention": 2, "routed_experts": 1}
    assert step["graphs"] == 1 and step["largest"] < 7168 * 2048
