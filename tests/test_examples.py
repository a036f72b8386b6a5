"""The notebooks of examples/ run from a clone: their code cells in order, and what they stored is what they show."""

import importlib
import json
import sys

import openai
import pytest
from parrot import SIZES, Prompter, load_parrot, raw_completion
from PIL import Image
from test_serve import NAME, running, url

from conftest import HANG_S, ROOT
from scripts.tiny_checkpoint import write_tiny_checkpoint

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_bytes())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell):
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order_and_print_what_is_stored(path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", sys.path[:])
    shown = []
    names = {"__name__": "__main__", "display": lambda *images: shown.extend(images)}
    for number, cell in enumerate(code_cells(path)):
        shown.clear()
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
        # Sizes of encoded files differ between versions of the encoder, answers with the weights at hand.
        assert without_bytes(capsys.readouterr().out) == without_bytes(printed(cell)), f"code cell {number}"
        stored = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(shown) == len(stored), f"code cell {number}"
        assert all(isinstance(image, Image.Image) for image in shown)


def without_bytes(text):
    """Lines that are the same everywhere: no sizes in bytes, and nothing that a model answers."""
    lines = text.partition("===== Below")[0].splitlines()
    return [line for line in lines if not line.rstrip().endswith(" bytes")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_and_is_small(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert path.stat().st_size < 600_000


# ---------------------------------------------------------------------------------------------- the model card's four


@pytest.fixture(scope="module")
def examples():
    """The modules of examples/, which import each other by their plain names."""
    folder = str(ROOT / "examples")
    sys.path.insert(0, folder)
    yield {name: importlib.import_module(name) for name in ("run_all", "with_transformers", "pictures")}
    sys.path.remove(folder)


ANSWERS = {
    "names_the_bigger": (
        ["9.9 is bigger.", "**9.9** is bigger than 9.11.", "The bigger number is 9.9.", "9.90 is larger"],
        ["9.11 is bigger.", "The bigger number is 9.11, not 9.9.", "9.11 and 9.9 are equal.", ""],
    ),
    "names_the_shapes": (
        ["There is a red circle on the left and a blue square on the right.", "A blue square right, a red circle left"],
        ["There is a red circle on the right and a blue square on the left.", "a red circle on the left", "a red square"],
    ),
    "names_the_motion": (
        ["A red circle moves from left to right, starting at 00:00:00.000.", "a red circle moves to the right at 00:00:00"],
        ["A red circle moves to the left, starting at 00:00:00.000.", "A red circle moves to the right at 00:00:02.250."],
    ),
    "names_the_rest": (["The other two numbers are 215, 222.", "215 and 222"], ["215", "473, 215, 222", "222 and 215"]),
}  # fmt: skip


@pytest.mark.parametrize("check", ANSWERS)
def test_the_checks_of_run_all_tell_right_from_wrong(examples, check):
    right, wrong = ANSWERS[check]
    says = getattr(examples["run_all"], check)
    assert [text for text in right if not says(text)] == [] and [text for text in wrong if says(text)] == []


def test_the_four_examples_over_the_endpoint_and_in_transformers(examples, tmp_path):
    """The scripted model says what is right, so all eight pass; the exit status is what the checks say."""
    run_all = examples["run_all"]
    said = ["9.9 is bigger.", "A red circle on the left and a blue square on the right.",
            "A red circle moves to the right, starting at 00:00:00.000.", "The other two are 215 and 222."]  # fmt: skip
    model, processor = load_parrot(tmp_path)
    prompts = ("9.11 or 9.9", "this image", "this video", "in mind")
    generate = model.generate

    def answer(**kwargs):
        prompt = processor.tokenizer.decode(kwargs["input_ids"][0])
        number = next(i for i, words in enumerate(prompts) if words in prompt)
        ids = processor.tokenizer.encode(raw_completion({"reasoning": "I think.", "content": said[number]}))
        kwargs["logits_processor"] = [Prompter(ids, kwargs["input_ids"].shape[1], {})]
        return generate(**kwargs)

    model.generate = answer
    with running((model, processor)) as (port, _):
        client = openai.OpenAI(base_url=url(port), api_key="none")
        over = [example(client, NAME) for example in run_all.OVER_ENDPOINT]
    plain = [example(model, processor) for example in examples["with_transformers"].EXAMPLES]
    assert over == plain == said
    assert all(check(text) for check, text in zip(run_all.CHECKS, over, strict=True))


def test_serve_starts_from_the_command_line_and_ends(examples, tmp_path, monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "3")  # as some hosts set it
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(examples["run_all"], "START_S", HANG_S)
    folder = write_tiny_checkpoint(tmp_path / "tiny", text=SIZES, num_merges=50)
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as file, examples["run_all"].serving(folder, file) as client:
        (model,) = client.models.list().data
        assert model.id == "tiny"
        messages = [{"role": "user", "content": "Hi"}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
        assert 1 <= answer.usage.completion_tokens <= 3
    text = log.read_text(encoding="utf-8")
    assert "one machine and few users" in text and "vllm serve" in text and "sglang" in text
