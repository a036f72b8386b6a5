"""The trained model in the repository: its folder is a checkpoint like the published one, and it knows what README says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.train_tiny.evaluate import held_out_samples, judge
from kimi.kimi_experts import Experts
from scripts.check import check_folder
from scripts.tiny_checkpoint import files_beside_weights

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "kimi-tiny"
MAX_BYTES = 25_000_000
# Of 20 held-out prompts each; README has the shares of many more.
LEAST = {
    "decimals": 18,
    "decimals in Chinese": 18,
    "images": 19,
    "clips": 18,
    "memory": 19,
    "memory in Chinese": 19,
    "tools": 16,  # 18 are right here; a narrow one may turn out wrong on a CPU that rounds otherwise
}


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoProcessor

    processor = AutoProcessor.from_pretrained(TINY, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(TINY, trust_remote_code=True).eval(), processor


def test_the_folder_is_a_whole_checkpoint():
    assert not [finding for finding in check_folder(TINY) if not finding.ok]


def test_the_folder_is_small_and_links_to_the_code():
    files = [path for path in TINY.iterdir() if not path.is_symlink()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    for path in files_beside_weights():
        link = TINY / path.name
        assert link.is_symlink() and link.resolve() == path, path.name
        assert not os.path.isabs(os.readlink(link))


def test_the_architecture_is_the_published_one_in_small(loaded):
    model, _ = loaded
    experts = [module for module in model.modules() if type(module).__name__ == Experts.__name__]
    assert len(experts) >= 3 and all(one.packed and one.num_experts >= 16 for one in experts)
    text = json.loads((TINY / "config.json").read_bytes())["text_config"]
    assert text["q_lora_rank"] and text["kv_lora_rank"] and text["n_shared_experts"] == 1


def test_it_loads_from_any_folder_without_copied_code(tmp_path):
    script = (
        "from transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(TINY)!r}, trust_remote_code=True)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "KimiK25ForConditionalGeneration", done.stderr


@pytest.mark.parametrize("row", list(LEAST))
def test_it_knows(loaded, row):
    model, processor = loaded
    with torch.inference_mode():
        right, answers = judge(model, processor, held_out_samples(row, 20, seed=1))
    assert sum(right) >= LEAST[row], answers
    assert all(answer.get("reasoning_content") for answer in answers)
