"""Videos encoded on the spot, for tests. Frame k is one grey tone, so that a decoded frame tells its index."""

import platform
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

FRAME_STEP = 4  # grey levels from one frame to the next; decoding is off by one or two
# decord has wheels for these only (requirements.txt); elsewhere PyAV decodes.
HAS_DECORD = sys.platform in ("linux", "win32") and platform.machine() in ("x86_64", "AMD64")
DECODERS = ["decord", "pyav"] if HAS_DECORD else ["pyav"]


def grey(index: int) -> int:
    return FRAME_STEP * index % 256


def write_clip(
    path: Path,
    num_frames: int = 60,
    fps: int = 30,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    faststart: bool = False,
    gop: int = 10,
    durations: Sequence[int] = (),
    **options: str,
) -> Path:
    """`size` is (width, height). A key frame every `gop`; the left half of each frame is darker by 40 levels.

    durations: of frames, in turns, in 600ths of a second, for a variable rate. options: the encoder's.
    """
    import av

    width, height = size
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.gop_size, stream.options = width, height, gop, options
        shown = 0
        if durations:
            stream.codec_context.time_base = Fraction(1, 600)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(num_frames):
            pixels = np.full((height, width, 3), grey(index), np.uint8)
            pixels[:, : width // 2] = np.maximum(pixels[:, : width // 2].astype(int) - 40, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if durations:
                frame.pts, frame.time_base, shown = (
                    shown,
                    Fraction(1, 600),
                    shown + durations[index % len(durations)],
                )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def index_of(frame: object) -> int:
    """The index of a decoded frame of a clip of up to 60 frames, told by its right half."""
    pixels = np.asarray(frame)
    return round(float(pixels[:, pixels.shape[1] * 3 // 4 :].mean()) / FRAME_STEP)


def turn_upright(path: Path) -> None:
    """Sets the display matrix of an MP4 to a quarter turn clockwise, as phones do for upright videos."""
    data = bytearray(path.read_bytes())
    # Version 0: 4 version and flags, 20 times and ids, 16 layer and volume, then the matrix.
    header = data.find(b"tkhd")
    start = header + 4 + 4 + 20 + 16
    matrix = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
