"""Makes a small random checkpoint in the published layout, loads it as a user would, and asks it about text and pictures.

    python demo.py [--prompt TEXT] [--max-new-tokens 64] [--text-only] [--folder CHECKPOINT]

Everything is the real path: chat template, tokenizer, image processor, int4 shards, `AutoModelForCausalLM` with remote
code, `generate`. The picture is drawn and the video encoded on the spot. Only the weights are random, so the answers are
noise. Give `--folder` to ask another checkpoint, also the published one.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoProcessor, set_seed

from kimi.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parent
QUESTION = "Which one is bigger, 9.11 or 9.9? Think carefully."
MEDIA_TOKENS = 12  # of an answer about a picture
FPS = 24
IS_TERMINAL = sys.stdout.isatty() and "NO_COLOR" not in os.environ


# --- the checkpoint -------------------------------------------------------------------------------------------------


def cached_checkpoint() -> Path:
    """The tiny checkpoint in the user's cache, written once for each state of the repository's files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi-k2.7-code"
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*.json"), *ROOT.glob("*.jinja")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = cache / f"tiny_{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        for old in cache.glob("tiny_*"):
            shutil.rmtree(old, ignore_errors=True)
        print(f"Writing a random checkpoint in the published layout to {folder}")
        write_tiny_checkpoint(folder)
    return folder


def bytes_on_disk(folder: Path) -> int:
    """Tensor bytes of the checkpoint, as its index states them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text())["metadata"]["total_size"]
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def bytes_resident(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type != "meta")


# --- something to look at -------------------------------------------------------------------------------------------


def draw_scene(width: int, height: int, progress: float = 0.3) -> Image.Image:
    """A sun that goes from left to right over a field, drawn where `progress` (0 to 1) says."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    sky = Image.new("RGB", (width, height), (70, 130, 210))
    image = Image.blend(sky, image, 0.35)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 0.7, width, height), fill=(60, 130, 60))
    radius, x = height * 0.12, width * (0.1 + 0.8 * progress)
    y = height * (0.6 - 0.4 * math.sin(math.pi * progress))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 210, 60))
    return image


def make_clip(num_frames: int = 60, size: tuple[int, int] = (320, 180)) -> tuple[Any, str]:
    """2.5 seconds of it: an MP4 in memory where PyAV can encode one, else its frames. And what it is."""
    frames = [draw_scene(*size, progress=i / (num_frames - 1)) for i in range(num_frames)]
    try:
        import av
    except ImportError:
        return frames, f"{num_frames} frames as a list (PyAV, which would encode them, is not installed)"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue(), f"{num_frames} frames at {FPS}/s, H.264, {len(file.getvalue()):,} bytes"


def thumbnail(image: Image.Image, columns: int = 48) -> str:
    """The image in a terminal of 24-bit colours: each character shows two pixels, one above the other."""
    rows = max(1, round(columns * image.height / image.width / 2))
    small = image.resize((columns, 2 * rows)).load()
    lines = []
    for y in range(0, 2 * rows, 2):
        pairs = [(small[x, y], small[x, y + 1]) for x in range(columns)]
        lines.append("".join(f"\x1b[38;2;{colour(top)}m\x1b[48;2;{colour(below)}m▀" for top, below in pairs))
    return "\n".join(f"  {line}\x1b[0m" for line in lines)


def colour(rgb: tuple[int, int, int]) -> str:
    return ";".join(map(str, rgb))


def describe_item(processor: Any, item: dict[str, Any], size: tuple[int, int]) -> str:
    """What becomes of an image or a chunk: pixels, patches, tokens."""
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


def ask(
    model: Any, processor: Any, content: Any, max_new_tokens: int, show_prompt: bool = True
) -> tuple[Any, int, float]:
    """Streams the answer. Returns what `generate` gave, the number of new tokens and the seconds."""
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, return_tensors="pt", return_dict=True).to(model.device)
    length = inputs["input_ids"].shape[1]
    print(
        f"Prompt, {length} tokens" + (f":\n{processor.decode(inputs['input_ids'][0])}" if show_prompt else "")
    )
    print("Answer:")
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        streamer=processor.tokenizer.text_streamer(skip_prompt=True),
    )
    return output, output.sequences.shape[1] - length, time.perf_counter() - start


def show_image(model: Any, processor: Any) -> None:
    image = draw_scene(2560, 1440)
    heading("An image")
    if IS_TERMINAL:
        print(thumbnail(image))
    print(describe_item(processor, {"type": "image", "image": image}, image.size))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What time of day is it?"}]
    ask(model, processor, content, MEDIA_TOKENS, show_prompt=False)


def show_video(model: Any, processor: Any) -> None:
    video, what = make_clip()
    heading(f"A video: {what}")
    if IS_TERMINAL:
        print(thumbnail(draw_scene(320, 180, progress=0.0)))
    print("\n".join(describe_chunks(processor, video)))
    content = [
        {"type": "video", "video": video, "fps": FPS},
        {"type": "text", "text": "Which way does it move?"},
    ]
    ask(model, processor, content, MEDIA_TOKENS, show_prompt=False)


def facts(model: Any, folder: Path, output: Any, num_new: int, seconds: float) -> str:
    cache = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    cached_tokens = output.past_key_values.get_seq_length()
    return (
        f"{model.num_parameters():,} parameters | {bytes_resident(model):,} bytes of weights resident,"
        f" {bytes_on_disk(folder):,} on disk | cache {sum(t.nbytes for t in cache) // cached_tokens:,} bytes per token"
        f" | {num_new / seconds:.1f} tokens/s ({num_new} tokens, {model.device}, {model.dtype})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--text-only", action="store_true", help="without the image and the video")
    parser.add_argument("--folder", type=Path, help="a checkpoint to ask instead of the random one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder or cached_checkpoint()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto")
    set_seed(args.seed)
    heading("A question")
    answer = ask(model, processor, args.prompt, args.max_new_tokens)
    if not args.text_only:
        show_image(model, processor)
        show_video(model, processor)
    if not args.folder:
        print(
            "\nThe weights are random, so the answers mean nothing; the way they were made is the real one."
        )
    print(facts(model, folder, *answer))


if __name__ == "__main__":
    main()
