"""Other engines on kimi-tiny, really run: transformers' native class, MLX, llama.cpp. `make test-engines` sets them up.

Ours computes in float32 with the plain reference paths. Greedy answers of 64 tokens to ten prompts. Labels E-n number
what engines rely on, see tests/test_engine_contracts.py.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.train_tiny.tasks import draw_sample
from kimi.modeling_kimi import KimiK25ForConditionalGeneration
from kimi.tokenization_kimi import TikTokenTokenizer
from scripts import convert

pytestmark = pytest.mark.engines

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "kimi-tiny"
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", ROOT / ".venv-engines" / "llama.cpp"))
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def ours():
    return KimiK25ForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, mla_path="expand", int4_backend="reference"
    ).eval()


@pytest.fixture(scope="module")
def prompts():
    """Ten prompts as ids."""
    tokenizer, rng = TikTokenTokenizer.from_pretrained(TINY), random.Random(5)
    samples = [draw_sample(task, rng, held_out=True) for task in ["decimals", "memory"] * 5]
    return [
        tokenizer.apply_chat_template(sample.messages[:-1], tokenize=True, return_dict=True)["input_ids"]
        for sample in samples
    ]


@pytest.fixture(scope="module")
def answers(ours, prompts):
    """Our greedy ids, up to and with the end of the turn."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = ours.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def greedy(step, prompt, ends):
    """Ids chosen one by one from `step(all ids so far) -> logits of the last`."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS:
        ids.append(int(np.argmax(step(ids))))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def ends_of(model):
    ids = model.generation_config.eos_token_id
    return set(ids if isinstance(ids, list) else [ids])


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("layout", ["bf16", "int4"])
def test_transformers_native_class(ours, prompts, tmp_path, layout):
    """Without remote code: E-22 to E-24. int4 goes through compressed-tensors, which expands it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = TINY
    if layout == "bf16":
        folder = tmp_path / "dense"
        assert convert.main(["bf16", str(TINY), str(folder)]) == 0
        # The same rounded experts: from int4 ours would keep their products in float32.
        ours = KimiK25ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, mla_path="expand"
        ).eval()
    native, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(native).__name__ == "Kimi_K25ForConditionalGeneration"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tolerance = 2e-4 if layout == "bf16" else 5e-2
    with torch.no_grad():
        for prompt in prompts[:4]:
            want, got = (model(input_ids=torch.tensor([prompt])).logits for model in (ours, native))
            assert float((want - got).abs().max() / want.abs().max()) < tolerance
    processor = AutoProcessor.from_pretrained(TINY, trust_remote_code=True)
    sample = draw_sample("images", random.Random(6))
    inputs = processor.apply_chat_template(sample.messages[:-1], tokenize=True, return_dict=True)
    with torch.no_grad():
        want = ours(**inputs).logits
        got = native(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["grid_thws"],
        ).logits
    assert float((want - got).abs().max() / want.abs().max()) < tolerance


# ----------------------------------------------------------------------------------------------------------------- MLX


def test_mlx_vlm(ours, prompts, answers, tmp_path):
    """The packed words as they are (E-21); greedy text."""
    mx = pytest.importorskip("mlx.core")
    from mlx_vlm.utils import load_model

    folder = tmp_path / "kimi_mlx"
    assert convert.main(["mlx", str(TINY), str(folder)]) == 0
    model = load_model(folder)

    def step(ids):
        return np.array(model.language_model(mx.array([ids])).logits[0, -1].astype(mx.float32))

    same = [
        greedy(step, prompt, ends_of(ours)) == answer for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert sum(same) >= 9, same  # bf16 and another eps in the latent norms: a near tie may fall otherwise


# ----------------------------------------------------------------------------------------------------------- llama.cpp


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """kimi-tiny through llama.cpp's own converter."""
    if not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"llama.cpp's sources are not in {LLAMA_CPP}; `make test-engines` puts them there")
    return convert_with_llama_cpp(tmp_path_factory.mktemp("gguf") / "kimi-tiny.gguf")


def convert_with_llama_cpp(target, *options):
    script = Path(__file__).with_name("llama_cpp_converter.py")
    command = [sys.executable, script, LLAMA_CPP, TINY, "--outtype", "f32", "--outfile", target, *options]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, capture_output=True, text=True)
    return target


def test_llama_cpp_answers_alike(ours, prompts, answers, gguf_file):
    assert llama_answers(gguf_file, prompts, ends_of(ours)) == answers


def test_llama_cpp_with_the_published_int4(ours, prompts, answers, gguf_file, tmp_path):
    """`scripts.convert gguf`: experts as Q4_0, the very values; llama.cpp rounds activations to 8 bits for their products."""
    gguf = pytest.importorskip("gguf")
    exact = tmp_path / "exact.gguf"
    assert convert.main(["gguf", str(TINY), str(gguf_file), str(exact)]) == 0
    before, after = ({t.name: t for t in gguf.GGUFReader(file).tensors} for file in (gguf_file, exact))
    packed = [name for name, tensor in after.items() if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0]
    assert len(packed) == 9
    for name, tensor in after.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(before[name].data.shape)
        assert np.array_equal(values, before[name].data), name
    same = [a == b for a, b in zip(llama_answers(exact, prompts, ends_of(ours)), answers, strict=True)]
    assert sum(same) >= 8, same


def llama_answers(file, prompts, ends):
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(file), n_ctx=1024, logits_all=False, verbose=False, n_threads=2)
    outputs = []
    for prompt in prompts:
        llm.reset()
        llm.eval(prompt)
        ids = []
        while len(ids) < NEW_TOKENS:
            logits = np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)
            )
            ids.append(int(logits.argmax()))
            if ids[-1] in ends:
                break
            llm.eval([ids[-1]])
        outputs.append(ids)
    return outputs


def test_llama_cpp_tokenizes_alike(gguf_file):
    """Prompts with all markers, prose, code, scripts and digits. It leaves CamelCase whole where the published pattern
    splits it, so paragraphs with such words are left out: tokens differ there where a vocabulary has one that spans them."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(str(gguf_file), vocab_only=True, verbose=False)
    tokenizer, rng = TikTokenTokenizer.from_pretrained(TINY), random.Random(7)
    texts = [
        paragraph
        for name in (
            "README.md",
            "docs/history.md",
            "docs/questions.md",
            "kimi_tools.py",
            "chat_template.jinja",
        )
        for paragraph in re.split(r"(?<=\n\n)", (ROOT / name).read_text(encoding="utf-8"))
        if not re.search("[a-z][A-Z]", paragraph)
    ]
    texts += [
        "1234567 x1 １２",
        "don't we've I'LL",
        "混合 mixed 中文ABC",
        " \n\n a\t\tb  ",
        "é ß Ω жук ไทย हिन्दी",
        "x²½ 🙂👍🏽",
    ]
    for task in ("decimals", "memory", "tools", "smalltalk"):
        samples = [draw_sample(task, rng) for _ in range(20)]
        texts += [tokenizer.apply_chat_template(s.messages, tools=s.tools, tokenize=False) for s in samples]
    assert len(texts) > 200
    for text in texts:
        assert llm.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text), text


def test_llama_cpp_converts_the_vision_tower(gguf_file, tmp_path):
    gguf = pytest.importorskip("gguf")
    file = convert_with_llama_cpp(tmp_path / "mmproj.gguf", "--mmproj")
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    blocks = 3
    assert len(names) == 12 * blocks + 11
