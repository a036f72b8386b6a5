"""A sun that moves over a field: test pictures for the notebook, drawn and encoded when they are needed."""

import math
from typing import Any

from PIL import Image, ImageDraw

from .pictures import encode_mp4

FPS = 24


def draw_scene(width: int, height: int, progress: float = 0.3) -> Image.Image:
    """A sun that moves from left to right over a field, drawn where `progress` (0 to 1) says."""
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
        data = encode_mp4(frames, FPS)
    except ImportError:
        return frames, f"{num_frames} frames as a list (PyAV, which would encode them, is not installed)"
    return data, f"{num_frames} frames at {FPS}/s, H.264, {len(data):,} bytes"
