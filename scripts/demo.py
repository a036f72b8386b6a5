"""Asks kimi-tiny, the small trained Kimi in this repository, the model card's questions: text, picture, clip, kept thoughts.

    python -m scripts.demo [--folder CHECKPOINT] [--prompt TEXT] [--max-new-tokens 200]

Everything is the real path: chat template, tokenizer, image processor, int4 shards, `AutoModelForCausalLM` with remote
code, `generate`. The picture is drawn and the video encoded on the spot. Give `--folder` to ask another checkpoint, also
the published one.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed

from examples.pictures import encode_mp4
from examples.train_tiny.shapes import Shape, draw_clip, draw_scene

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Which one is bigger, 9.11 or 9.9? Think carefully."
SCENE = [
    Shape("red", "circle", "at the top left"),
    Shape("blue", "square", "on the right"),
    Shape("green", "triangle", "at the bottom"),
]
FPS, SECONDS, MOVES_AT = 8, 4, 18  # of the clip; the frame at which its shape starts to move
NUMBERS = [473, 921, 235, 215, 222]
IS_TERMINAL = sys.stdout.isatty() and "NO_COLOR" not in os.environ


# --- the checkpoint -------------------------------------------------------------------------------------------------


def bytes_on_disk(folder: Path) -> int:
    """Tensor bytes of the checkpoint, as its index states them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_bytes())["metadata"]["total_size"]
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def bytes_resident(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type != "meta")


# --- media --------------------------------------------------------------------------------------------------------


def make_clip() -> tuple[Any, list[Image.Image], str]:
    """A purple circle that rests and then crosses the frame: an MP4 in memory where PyAV can encode one, else its
    frames; the frames; and what it is."""
    frames = draw_clip(
        Shape("purple", "circle"), "from left to right", MOVES_AT, 13, FPS * SECONDS, random.Random(4)
    )
    try:
        data = encode_mp4(frames, FPS)
    except ImportError:
        what = f"{len(frames)} frames as a list (PyAV, which would encode them, is not installed)"
        return frames, frames, what
    return data, frames, f"{len(frames)} frames at {FPS}/s, H.264, {len(data):,} bytes"


def thumbnail(image: Image.Image, columns: int = 48) -> str:
    """The image in a terminal of 24-bit colours: each character shows two pixels, one above the other."""
    rows = max(1, round(columns * image.height / image.width / 2))
    pixels = np.asarray(image.resize((columns, 2 * rows))).tolist()  # [y][x] -> [red, green, blue]
    lines = []
    for y in range(0, 2 * rows, 2):
        pairs = zip(pixels[y], pixels[y + 1], strict=True)
        lines.append("".join(f"\x1b[38;2;{colour(top)}m\x1b[48;2;{colour(below)}m▀" for top, below in pairs))
    return "\n".join(f"  {line}\x1b[0m" for line in lines)


def colour(rgb: list[int]) -> str:
    return ";".join(map(str, rgb))


def describe_item(processor: Any, item: dict[str, Any], size: tuple[int, int]) -> str:
    """Sizes of an image or a chunk: pixels, patches, tokens."""
    settings = processor.image_processor.media_proc_cfg
    found = processor.image_processor.get_resize_config(item)
    width, height = found["new_width"], found["new_height"]
    padded = width + found["pad_width"], height + found["pad_height"]
    columns, rows = (side // settings["patch_size"] for side in padded)
    return (
        f"{size[0]} x {size[1]} pixels, resized {width} x {height}, padded {padded[0]} x {padded[1]},"
        f" {found['sampled_nframes']} x {rows} x {columns} patches, {found['num_tokens']} tokens"
    )


def describe_chunks(processor: Any, video: Any) -> Iterator[str]:
    for chunk in processor.image_processor.open_chunks(video, FPS):
        timestamp = chunk["prompt"].partition("<|media_begin|>")[0]
        frames = chunk["video_chunk"]
        yield f"chunk at {timestamp}, frames {frames.indices}: {describe_item(processor, chunk, frames.size)}"


# --- questions ------------------------------------------------------------------------------------------------------


def heading(text: str) -> None:
    print(f"\n\x1b[1m{text}\x1b[0m" if IS_TERMINAL else f"\n{text}")


def ask(model: Any, processor: Any, messages: list[dict[str, Any]], limit: int) -> tuple[Any, int, float]:
    """Streams thoughts and answer. Returns what `generate` gave, the number of new tokens and the seconds."""
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True).to(model.device)
    length = inputs["input_ids"].shape[1]
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=limit,
        return_dict_in_generate=True,
        streamer=processor.tokenizer.text_streamer(skip_prompt=True),
    )
    return output, output.sequences.shape[1] - length, time.perf_counter() - start


def ask_user(model: Any, processor: Any, content: Any, limit: int) -> tuple[Any, int, float]:
    return ask(model, processor, [{"role": "user", "content": content}], limit)


def show_image(model: Any, processor: Any, limit: int) -> None:
    image = draw_scene(SCENE, random.Random(3))
    heading("A picture. Describe this image in detail.")
    if IS_TERMINAL:
        print(thumbnail(image))
    print(describe_item(processor, {"type": "image", "image": image}, image.size))
    text = {"type": "text", "text": "Describe this image in detail."}
    ask_user(model, processor, [{"type": "image", "image": image}, text], limit)


def show_video(model: Any, processor: Any, limit: int) -> None:
    video, frames, what = make_clip()
    heading("A clip. Describe the video in detail.")
    print(what)
    if IS_TERMINAL:
        strip = Image.new("RGB", (4 * 116, 112), "white")
        for index, number in enumerate((0, MOVES_AT + 3, MOVES_AT + 7, len(frames) - 1)):
            strip.paste(frames[number], (116 * index, 0))
        print(thumbnail(strip, 96))
    print("\n".join(describe_chunks(processor, video)))
    text = {"type": "text", "text": "Describe the video in detail."}
    ask_user(model, processor, [{"type": "video", "video": video, "fps": FPS}, text], limit)


def show_memory(model: Any, processor: Any, limit: int) -> None:
    listed = ", ".join(map(str, NUMBERS))
    thought = f"I'll start by listing five numbers: {listed}, and I'll tell you the first three."
    said, question = ", ".join(map(str, NUMBERS[:3])), "What are the other two numbers you have in mind?"
    heading(f"Kept thoughts. It thought of {listed} and said {said}. {question}")
    messages = [
        {"role": "user", "content": "Tell me three random numbers."},
        {"role": "assistant", "reasoning_content": thought, "content": said},
        {"role": "user", "content": question},
    ]
    ask(model, processor, messages, limit)


def facts(model: Any, folder: Path, output: Any, num_new: int, seconds: float) -> str:
    cache = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    cached_tokens = output.past_key_values.get_seq_length()
    return (
        f"\n{model.num_parameters():,} parameters | {bytes_resident(model):,} bytes of weights resident,"
        f" {bytes_on_disk(folder):,} on disk | cache {sum(t.nbytes for t in cache) // cached_tokens:,} bytes per token"
        f" | {num_new / seconds:.1f} tokens/s ({num_new} tokens, {model.device}, {model.dtype})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "kimi-tiny")
    parser.add_argument("--prompt", help="ask only this")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True, device_map="auto")
    set_seed(args.seed)
    heading(args.prompt or QUESTION)
    answer = ask_user(model, processor, args.prompt or QUESTION, args.max_new_tokens)
    if not args.prompt:
        show_image(model, processor, args.max_new_tokens)
        show_video(model, processor, args.max_new_tokens)
        show_memory(model, processor, args.max_new_tokens)
    print(facts(model, args.folder, *answer))


if __name__ == "__main__":
    main()
