"""What the examples show the model: a picture and a clip. Needs Pillow, and PyAV to encode the clip."""

import io

from PIL import Image, ImageDraw

SIZE = 84  # pixels; 9 tokens
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 70), "blue": (40, 80, 220), "yellow": (240, 200, 40)}
RADIUS = 11  # pixels, of a circle; half the side of a square
CLIP_FPS, CLIP_SECONDS = 8, 4


def draw_picture() -> Image.Image:
    """A red circle on the left and a blue square on the right, on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse(box_around(SIZE / 6), fill=COLOURS["red"])
    draw.rectangle(box_around(SIZE * 5 / 6), fill=COLOURS["blue"])
    return image


def draw_frames() -> list[Image.Image]:
    """A red circle that moves from the left to the right from the first frame to the last."""
    num_frames = CLIP_FPS * CLIP_SECONDS
    frames = []
    for index in range(num_frames):
        frame = Image.new("RGB", (SIZE, SIZE), "white")
        way = (SIZE - 2.5 * RADIUS) * index / (num_frames - 1)
        ImageDraw.Draw(frame).ellipse(box_around(1.25 * RADIUS + way), fill=COLOURS["red"])
        frames.append(frame)
    return frames


def box_around(x: float) -> tuple[float, float, float, float]:
    return x - RADIUS, SIZE / 2 - RADIUS, x + RADIUS, SIZE / 2 + RADIUS


def picture_png() -> bytes:
    file = io.BytesIO()
    draw_picture().save(file, "PNG")
    return file.getvalue()


def clip_mp4() -> bytes:
    """The frames as H.264 in MP4."""
    try:
        return encode_mp4(draw_frames(), CLIP_FPS, {"crf": "10"})
    except ImportError as error:
        raise SystemExit(f"encoding the clip needs `pip install av` ({error})") from None


def encode_mp4(frames: list[Image.Image], fps: int, options: dict[str, str] | None = None) -> bytes:
    """Frames of one even size as H.264 in MP4; `options` are the encoder's. Raises ImportError without PyAV."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return file.getvalue()
