"""Videos: which frames are read, when they are shown, and who decodes them. Not how they are resized.

    n frames at f frames a second            sample_fps 2, 4 frames in a chunk
      k = round(n * min(2, f) / f)           at least 1, so about two frames for a second of video
      indices = linspace(0, n - 1, k)        rounded; the first and the last frame are always among them
      chunks of 4 indices                    the last may be shorter
      timestamp = first index of a chunk / f as text, "00:00:02.100"; the container's own times are not used

A video is opened once and tells its number of frames, its rate and the size of a frame before anything but the first
frame is decoded. `ChunkFrames` then stands for the frames of a chunk and decodes them when they are read, so that even
of a video of two hours at most one decoded chunk is in memory.

Decoders, behind one function (`open_video`): decord where it is installed, else PyAV, which also exists for ARM and
newer Macs. Both turn frames upright as the container asks. decord decodes ahead in a thread of its own for as long as
nothing is read, without a limit; so a chunk is read at once and the thread is stopped until the next one, which begins
at the key frame before it. Where key frames are further apart than chunks, that is slower, and PyAV is used if it is
installed. One fault of decord: in a video with open groups of pictures (x265's default) the frames it gives may be up
to three later than those asked for, the number of frames that are shown before the key frame they need. Frames that are
decoded already come as a list or as an array (n, H, W, 3), with a rate or else counted as sampled.

Decoders only ever get a local file or bytes, never an address, and nothing that is plain text: a playlist would make
them open what it lists.
"""

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .kimi_media import describe, image_size, open_image, read_source, to_rgb, unwrap

DECODERS = ("decord", "pyav")
TIMESTAMP_MODES = ("hh:mm:ss.fff", "mm:ss.fff", "mm:ss")
TEXT_BYTES = bytes(range(0x20, 0x7F)) + b"\t\n\r\xef\xbb\xbf"  # ASCII, and the byte order mark of UTF-8
SNIFFED_BYTES = 256
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"udta", b"uuid", b"sidx")


def sample_frames(num_frames: int, fps: float, sample_fps: float, max_frames: int | None = None) -> list[int]:
    """Indices of the frames to read, increasing. Both rounds take halves to the even neighbour.

    Raises ValueError for no frames, or a rate that is not positive.
    """
    if num_frames < 1:
        raise ValueError("the video has no frames")
    if not 0 < fps < float("inf"):
        raise ValueError(
            f"the video has {num_frames} frames at {fps} frames a second; the rate must be positive"
        )
    count = max(round(num_frames * min(sample_fps, fps) / fps), 1)  # the product first: it is often exact
    if max_frames is not None:
        count = min(count, max_frames)
    return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()


def format_timestamp(seconds: float, mode: str) -> str:
    """Text of a time, with milliseconds cut off, not rounded. Hours wrap at 24, minutes without hours at 60."""
    whole, milliseconds = int(seconds), int(seconds % 1 * 1000)
    minutes_seconds = f"{whole // 60 % 60:02d}:{whole % 60:02d}"
    if mode == "mm:ss":
        return minutes_seconds
    hours = f"{whole // 3600 % 24:02d}:" if mode.startswith("hh") else ""
    return f"{hours}{minutes_seconds}.{milliseconds:03d}"


class Video:
    """Frames by index, each decoded when it is read. `size` is (width, height) of the first one, in pixels."""

    num_frames: int
    fps: float
    size: tuple[int, int]

    def read(self, index: int) -> Image.Image:
        raise NotImplementedError

    def read_chunk(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Frames in order. All of them may be in memory, decoded, while the first ones are used."""
        return map(self.read, indices)


class FrameList(Video):
    """Frames that are decoded already: PIL images, arrays, or whatever else stands for an image."""

    def __init__(self, frames: Sequence[Any], fps: float):
        self.frames, self.num_frames, self.fps = frames, len(frames), fps
        if self.num_frames:
            self.size = image_size(frames[0])

    def read(self, index: int) -> Image.Image:
        try:
            return to_rgb(open_image(self.frames[index]))
        except (ValueError, OSError) as error:
            raise ValueError(f"frame {index} of {self.num_frames}: {error}") from error


class EncodedVideo(Video):
    """What the two decoders share: the first frame, which tells the size, and errors that name the frame."""

    caveat = ""

    def __init__(self, source: bytes | Path, name: str):
        self.source, self.name = source, name
        self.first: Image.Image | None = None
        try:
            self.num_frames, self.fps = self.open()
        except Exception as error:  # decord raises its own kinds and RuntimeError, PyAV a dozen
            raise ValueError(f"{name} is not a video that can be decoded: {one_line(error)}") from error
        if self.num_frames:
            self.first = self.read(0)
            self.size = self.first.size

    def open(self) -> tuple[int, float]:
        """Number of frames and frames per second; 0 frames if there is no picture in the file."""
        raise NotImplementedError

    def decode(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        if index == 0 and self.first is not None:
            frame, self.first = self.first, None
            return frame
        try:
            return Image.fromarray(self.decode(index))
        except Exception as error:
            raise ValueError(
                f"frame {index} of {self.num_frames} of {self.name} cannot be decoded{self.caveat}: {one_line(error)}"
            ) from error

    def stream(self) -> Any:
        """A fresh file object or a path, for a decoder."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)


def one_line(error: Exception) -> str:
    """decord's messages continue with a C++ stack trace."""
    return f"{error}".strip().partition("\n")[0][:200] or type(error).__name__


class DecordVideo(EncodedVideo):
    caveat = ", or one shortly behind it, since decord reads ahead"

    def open(self) -> tuple[int, float]:
        # Read one by one: four at a time (get_batch) held 170 MB at 1080p instead of 70. More threads were no faster.
        self.reader = import_decord().VideoReader(self.stream(), num_threads=1)
        return len(self.reader), float(self.reader.get_avg_fps())

    def read(self, index: int) -> Image.Image:
        frame = super().read(index)
        self.rest()
        return frame

    def read_chunk(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        frames = [EncodedVideo.read(self, index) for index in indices]
        self.rest()
        frames.reverse()
        while frames:  # none is held longer than needed
            yield frames.pop()

    def rest(self) -> None:
        """Stops the decoding thread and drops what it has decoded ahead, which may be the whole video."""
        self.reader.seek(0)  # exact for the first frame; `seek_accurate` would restart the thread

    def key_frame_distance(self) -> float:
        """Frames from one key frame to the next, on average. Reading begins at a key frame after each rest."""
        return self.num_frames / max(len(self.reader.get_key_indices()), 1)

    def decode(self, index: int) -> np.ndarray:
        try:
            frame = self.reader[index]
        except Exception:  # of its decoding thread, perhaps about a later frame that was not requested
            self.open()
            frame = self.reader[index]
        frame = frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)  # if a bridge is set
        # decord computes the number of channels as the bytes of a row, padded to 64, divided by the width: narrow frames
        # come with four or more, and only the first 3 * width bytes of a row are pixels.
        height, width = frame.shape[:2]
        return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


class PyAVVideo(EncodedVideo):
    def open(self) -> tuple[int, float]:
        self.container = import_pyav().open(self.stream())
        streams = self.container.streams.video
        if not streams:
            return 0, 0.0
        rate: Fraction | None = streams[0].average_rate or streams[0].guessed_rate
        num_frames = streams[0].frames
        if not num_frames:  # Matroska does not say; a packet is a frame
            num_frames = sum(packet.size > 0 for packet in self.container.demux(streams[0]))
        self.rewind()
        return num_frames, float(rate or 0)

    def rewind(self) -> None:
        self.container.close()
        self.container = import_pyav().open(self.stream())
        self.container.streams.video[0].thread_type = "AUTO"
        self.frames: Iterator[Any] = self.container.decode(video=0)
        self.position = 0  # index of the frame that comes next

    def decode(self, index: int) -> np.ndarray:
        if index < self.position:
            self.rewind()
        for frame in self.frames:
            self.position += 1
            if self.position > index:
                if frame.is_corrupt:
                    raise ValueError("its data is corrupt")
                upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                return np.ascontiguousarray(upright)
        raise ValueError(f"the stream ends after {self.position} frames")


def import_decord() -> Any:
    try:
        import decord
    except (ImportError, OSError) as error:  # OSError: a library that it needs
        raise ImportError(f"decord: {one_line(error)}") from error
    return decord


def import_pyav() -> Any:
    try:
        import av
    except (ImportError, OSError) as error:
        raise ImportError(f"PyAV: {one_line(error)}") from error
    return av


def choose_decoder(name: str | None = None) -> Callable[[bytes | Path, str], Video]:
    """The decoder called `name`, or the first of DECODERS that is installed. Raises ImportError with the reasons."""
    known = {"decord": (import_decord, DecordVideo), "pyav": (import_pyav, PyAVVideo)}
    if name is not None and name not in known:
        raise ValueError(f"decoder must be one of {DECODERS}, not {name!r}")
    reasons = []
    for candidate in DECODERS if name is None else (name,):
        check, decoder = known[candidate]
        try:
            check()
        except ImportError as error:
            reasons.append(str(error))
        else:
            return decoder
    raise ImportError(
        f"reading videos needs a decoder: `pip install decord`, or `pip install av` where decord has no wheel (ARM, "
        f"newer Macs); frames that are decoded already need none. Tried: {'; '.join(reasons)}"
    )


def open_video(
    source: Any,
    fps: float | None = None,
    sample_fps: float = 2.0,
    allowed_hosts: Collection[str] = (),
    decoder: str | None = None,
) -> Video:
    """A video from anything `kimi_media` reads, or from frames: a list, or an array (n, H, W, 3) of uint8.

    fps: the frame rate of decoded frames; without it they count as sampled, at `sample_fps`. An encoded video knows
        its own. decoder: "decord" or "pyav", by default the first that is installed.
    """
    source = unwrap(source)
    is_array = isinstance(source, np.ndarray)
    if is_array and (source.ndim != 4 or source.shape[3] != 3 or source.dtype != np.uint8):
        raise ValueError(f"frames as an array are uint8 (n, H, W, 3); found {source.dtype} {source.shape}")
    if is_array or isinstance(source, (list, tuple)):
        video: Video = FrameList(source, sample_fps if fps is None else float(fps))
    else:
        data = read_source(source, "video", allowed_hosts)
        check_container(data, describe(source))
        video = choose_decoder(decoder)(data, describe(source))
        if decoder is None and isinstance(video, DecordVideo):
            video = prefer_pyav(video, sample_fps)
    if not video.num_frames:
        raise ValueError(f"{describe(source)} has no frames")
    return video


def prefer_pyav(video: DecordVideo, sample_fps: float) -> Video:
    """The same video by PyAV, if that is installed and key frames are further apart than chunks of four frames."""
    if video.key_frame_distance() <= 4 * video.fps / sample_fps:
        return video
    try:
        import_pyav()
    except ImportError:
        return video
    return PyAVVideo(video.source, video.name)


def check_container(data: bytes | Path, name: str) -> None:
    """Refuses text, and an MP4 or MOV that ends early: decord takes one for a shorter video."""
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        head = file.read(SNIFFED_BYTES)
        if not head.strip(TEXT_BYTES):
            raise ValueError(f"{name} is {'text' if head else 'empty'}, not a video")
        num_bytes = file.seek(0, io.SEEK_END)
        start = 0
        # Boxes: 4 bytes size, 4 bytes type, content; size 1 is followed by 8 bytes of size.
        while start + 8 <= num_bytes:
            file.seek(start)
            size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            size = int.from_bytes(file.read(8), "big") if size == 1 else size
            if kind not in MP4_BOXES or size < 8:  # size 0: to the end
                return
            start += size
            if start > num_bytes:
                raise ValueError(
                    f"{name} is truncated: its {kind.decode()} ends at byte {start} of {num_bytes}"
                )


class ChunkFrames(Sequence):
    """The frames of one chunk as PIL images, decoded each time they are read: together by iterating, which is the faster
    way, or one by one. `size` (width, height) costs nothing."""

    def __init__(self, video: Video, indices: Sequence[int]):
        self.video, self.indices, self.size = video, indices, video.size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return ChunkFrames(self.video, self.indices[position])
        return self.video.read(self.indices[position])

    def __iter__(self) -> Iterator[Image.Image]:
        return self.video.read_chunk(self.indices)
