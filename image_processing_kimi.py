"""Images and video chunks to patches: `pixel_values` (P, 3, 14, 14) float32 and `grid_thws` (N, 3) int64.

    item            an image, or a chunk of 1 to 4 frames of a video          N of them in a call
    resize          only ever down, until three limits hold; bicubic with antialiasing, as Pillow does it
    pad             black, to the right and below, to multiples of 28 pixels = 2 x 2 patches
    normalise       (v / 255 - mean) / std in float32; padding becomes -1 as well
    patches         14 x 14 pixels, frame by frame, row by row, not grouped in 2 x 2 blocks
    grid            (t, h, w): frames, rows and columns of patches
    tokens          h/2 * w/2 for an item, however many frames it has: the model averages over them

How large a picture may be, with A patches allowed (16384 for an image, 4096 for a frame) and w x h pixels:

    scale = min(1,  sqrt(A / ((w // 14) * (h // 14))),  512 * 14 / w,  512 * 14 / h)        new = int(side * scale)

The divisions round down and padding adds, so A is a soft limit: the largest image, 7081 x 489, makes 4464 tokens rather
than 4096. A 4K photo (3840 x 2160) becomes 2392 x 1345, padded 2408 x 1372: 98 x 172 patches, 4214 tokens.

A video is sampled and cut into chunks (kimi_video.py); each chunk is an item of its own, and its text says when it
begins. All frames of a chunk take the size of its first.

Every number comes from `media_proc_cfg` of preprocessor_config.json, each time anew, so that an entry may be changed on
a loaded processor. Sizes of all items are known before any is decoded; then one array is made and filled in place,
frame by frame, so that besides this array only one frame per thread is in memory. Serving engines call this class
directly.
"""

import math
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .kimi_media import drain, image_size, naming, open_image, to_rgb
from .kimi_video import TIMESTAMP_MODES, ChunkFrames, format_timestamp, open_video, sample_frames

# Rows of patches worked on at a time; at 4K 0.4 MB of uint8 and 1.6 MB of float32, which fit the cache.
BAND_ROWS = 4
MAX_THREADS = 4  # beyond that, decoding, which one thread does, is the bottleneck
MEDIA_TYPES = ("image", "video_chunk")


@dataclass(frozen=True)
class MediaSettings:
    """`media_proc_cfg`, checked. Lengths in pixels or patches as named; null is None."""

    patch_size: int  # pixels
    merge_kernel_size: int  # patches on a side of a token
    in_patch_limit: int
    patch_limit_on_one_side: int
    image_mean: tuple[float, ...]  # of values from 0 to 1
    image_std: tuple[float, ...]
    in_patch_limit_each_frame: int | None = None  # None: in_patch_limit
    in_patch_limit_video: int | None = None  # shared by the frames of a chunk
    sample_fps: float = 2.0
    max_num_frames_each_video: int | None = None
    temporal_merge_kernel_size: int = 4  # frames of a chunk
    timestamp_mode: str = "hh:mm:ss.fff"
    fixed_output_tokens: int | None = None

    @classmethod
    def read(cls, cfg: Mapping[str, Any]) -> "MediaSettings":
        """Reads its fields from `cfg`; raises ValueError for missing or invalid values."""
        known = {key: cfg[key] for key in cls.__dataclass_fields__ if key in cfg}
        required = ("patch_size", "merge_kernel_size", "in_patch_limit", "patch_limit_on_one_side")
        for key in (*required, "image_mean", "image_std"):
            if known.get(key) is None:
                raise ValueError(f"media_proc_cfg has no {key}")
        merge = known["merge_kernel_size"]  # a pair in config.json, a number here
        sides = set(merge) if isinstance(merge, Sequence) else {merge}
        if len(sides) != 1:
            raise ValueError(f"media_proc_cfg.merge_kernel_size must have equal sides, not {merge}")
        settings = cls(**{**known, "merge_kernel_size": sides.pop()})
        settings.check()
        return settings

    def check(self) -> None:
        if self.fixed_output_tokens is not None:
            raise ValueError(
                f"media_proc_cfg.fixed_output_tokens is {self.fixed_output_tokens}; only null is supported, since the "
                "number of tokens follows from the pixels"
            )
        if self.timestamp_mode not in TIMESTAMP_MODES:
            raise ValueError(
                f"media_proc_cfg.timestamp_mode is {self.timestamp_mode!r}, not one of {TIMESTAMP_MODES}"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or not all(self.image_std):
            raise ValueError(
                "media_proc_cfg.image_mean and image_std need three values, those of image_std not 0; found "
                f"{self.image_mean} and {self.image_std}"
            )
        for key in ("patch_size", "merge_kernel_size", "in_patch_limit", "patch_limit_on_one_side"):
            if getattr(self, key) < 1:
                raise ValueError(f"media_proc_cfg.{key} is {getattr(self, key)}, and must be at least 1")

    def frame_limit(self, num_frames: int) -> int:
        """Patches allowed in one frame of a chunk of `num_frames`."""
        limit = self.in_patch_limit_each_frame or self.in_patch_limit
        if self.in_patch_limit_video is None:
            return limit
        return min(round(self.in_patch_limit_video / num_frames), limit)


class Size(NamedTuple):
    """How an image is resized and padded; all in pixels except `grid`, which counts patches, and `num_tokens`."""

    new_width: int
    new_height: int
    pad_width: int  # on the right
    pad_height: int  # below
    grid: tuple[int, int]  # rows, columns
    num_tokens: int


class Item(NamedTuple):
    """An image or a chunk being processed: its frames, each to be decoded once, and the size that all of them get."""

    name: str
    frames: Iterator[Any]
    num_frames: int
    size: Size


def fit_size(width: int, height: int, patch_limit: int, settings: MediaSettings) -> Size:
    """The resize rule of the module, in double precision. Width and height at least 1."""
    patch, longest = settings.patch_size, settings.patch_limit_on_one_side * settings.patch_size
    num_patches = max(1, width // patch) * max(1, height // patch)
    scale = min(1.0, math.sqrt(patch_limit / num_patches), longest / width, longest / height)
    new_width, new_height = (
        min(max(1, int(width * scale)), longest),
        min(max(1, int(height * scale)), longest),
    )
    block = patch * settings.merge_kernel_size
    pad_width, pad_height = -new_width % block, -new_height % block
    rows, cols = (new_height + pad_height) // patch, (new_width + pad_width) // patch
    num_tokens = rows * cols // settings.merge_kernel_size**2
    return Size(new_width, new_height, pad_width, pad_height, (rows, cols), num_tokens)


def resize(image: Image.Image, size: Size) -> Image.Image:
    """An RGB image of new_width x new_height; the same object if it has that size."""
    target = (size.new_width, size.new_height)
    return image if image.size == target else image.resize(target, resample=Image.Resampling.BICUBIC)


def write_patches(image: Image.Image, out: np.ndarray, mean: np.ndarray, inverse_std: np.ndarray) -> None:
    """Pads, normalises and cuts an RGB image.

    out: (rows, cols, 3, patch, patch) float32, filled; its size says how far to pad. mean, inverse_std: (3, 1, 1)
    float32.

    The uint8 values are rearranged before they become float32, four times as large, and one band at a time fits the
    cache. The arithmetic is that of the published processor, so all 256 values are equal to its values bit for bit.
    """
    rows, cols, _, patch, _ = out.shape
    for row in range(0, rows, BAND_ROWS):
        target = out[row : row + BAND_ROWS]
        box = (0, row * patch, cols * patch, (row + len(target)) * patch)
        # (rows * patch, cols * patch, 3); beyond the image Pillow gives zeros.
        band = np.asarray(image.crop(box))
        band = band.reshape(len(target), patch, cols, patch, 3).transpose(0, 2, 4, 1, 3)
        band = np.ascontiguousarray(band)  # (rows, cols, 3, patch, patch) uint8
        np.divide(band, np.float32(255), out=target, dtype=np.float32)
        target -= mean
        target *= inverse_std


class KimiK25VisionProcessor(BaseImageProcessor):
    """The image processor. `media_proc_cfg` is the dict of preprocessor_config.json, kept as it is; other keywords
    become attributes and are saved again."""

    model_input_names = ["pixel_values", "grid_thws"]  # noqa: RUF012 (the name and type that transformers reads)

    def __init__(self, media_proc_cfg: dict[str, Any], **kwargs: Any):
        MediaSettings.read(media_proc_cfg)
        super().__init__(**kwargs)
        self.media_proc_cfg = media_proc_cfg

    @property
    def settings(self) -> MediaSettings:
        return MediaSettings.read(self.media_proc_cfg)

    @property
    def num_frames_per_chunk(self) -> int:
        return self.settings.temporal_merge_kernel_size

    def __call__(self, medias: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        """`preprocess`; `images=` is another name for the first argument."""
        return self.preprocess(kwargs.pop("images", None) if medias is None else medias, *args, **kwargs)

    def preprocess(
        self,
        medias: Any,
        return_tensors: str | None = None,
        allowed_hosts: Collection[str] = (),
        **kwargs: Any,
    ) -> BatchFeature:
        """Patches and grids of all items. One bad item fails the call.

        Args:
            medias: a list of items, or one. An item is {"type": "image", "image": ...},
                {"type": "video_chunk", "video_chunk": [1 to 4 frames]}, or just an image. kimi_media.py lists
                what an image may be. "name" is the item's name in errors, by default medias[i]; other keys are ignored.
            return_tensors: None or "pt" for torch tensors, "np" for numpy arrays.
            allowed_hosts: hosts of loopback or private addresses from which items may be fetched.

        Returns:
            pixel_values (P, 3, 14, 14) float32, and grid_thws (N, 3) int64; nothing at all for no items.

        Raises:
            ValueError: an item that is not an image, is broken or empty; unknown keywords.
            OSError: a file or an address that cannot be read.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be None, 'pt' or 'np', not {return_tensors!r}")
        if unknown := [key for key, value in kwargs.items() if value is not None]:
            raise ValueError(
                f"preprocess() does not know {unknown}; sizes and rates are set in media_proc_cfg"
            )
        settings = self.settings
        is_one = isinstance(medias, (str, bytes, bytearray, Mapping)) or not isinstance(medias, Iterable)
        medias = [medias] if is_one or hasattr(medias, "ndim") else medias
        items = deque(self._open(media, index, settings, allowed_hosts) for index, media in enumerate(medias))
        if not items:
            return BatchFeature({})
        grid_thws = np.array([(item.num_frames, *item.size.grid) for item in items], dtype=np.int64)
        pixel_values = fill_patches(items, int(grid_thws.prod(axis=1).sum()), settings)
        data = {"pixel_values": pixel_values, "grid_thws": grid_thws}
        if return_tensors != "np":
            data = {name: torch.from_numpy(array) for name, array in data.items()}
        return BatchFeature(data)

    def _open(self, media: Any, index: int, settings: MediaSettings, allowed_hosts: Collection[str]) -> Item:
        """Opens an item and reads its size."""
        media = media if isinstance(media, Mapping) and "type" in media else {"type": "image", "image": media}
        name = media.get("name") or f"medias[{index}]"
        with naming(name):
            if media["type"] != "image":
                frames = frames_of(media, settings)
                return Item(name, iter(frames), len(frames), media_size(media, settings))
            image = open_image(media.get("image"), allowed_hosts)
            size = fit_size(image.width, image.height, settings.in_patch_limit, settings)
            return Item(name, drain([image]), 1, size)

    def media_tokens_calculator(self, media: Mapping[str, Any]) -> int:
        """How many `<|media_pad|>` tokens an image or a chunk takes: rows/2 * columns/2. Reads no pixels."""
        return media_size(media, self.settings).num_tokens

    def get_resize_config(self, media: Mapping[str, Any]) -> dict[str, int]:
        """num_tokens, new_width, new_height, pad_width, pad_height, sampled_nframes of an image or a chunk."""
        size = media_size(media, self.settings)
        num_frames = 1 if media.get("type") == "image" else len(media["video_chunk"])
        return {
            "num_tokens": size.num_tokens,
            "new_width": size.new_width,
            "new_height": size.new_height,
            "pad_width": size.pad_width,
            "pad_height": size.pad_height,
            "sampled_nframes": num_frames,
        }

    @staticmethod
    def resize_image(
        image: Image.Image, new_width: int, new_height: int, pad_width: int = 0, pad_height: int = 0
    ) -> np.ndarray:
        """The image as the model sees it: (new_height + pad_height, new_width + pad_width, 3) uint8."""
        small = to_rgb(image).resize((new_width, new_height), resample=Image.Resampling.BICUBIC)
        return np.array(small.crop((0, 0, new_width + pad_width, new_height + pad_height)))

    @classmethod
    def make_chunk_prompt(cls, timestamp_text: str) -> str:
        """The text of a chunk, with its one placeholder."""
        return f"{timestamp_text}<|media_begin|>video<|media_content|><|media_pad|><|media_end|>"

    def split_video_chunks(
        self, video: Any, fps: float | None = None, allowed_hosts: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """The chunks of a whole video: {"type": "video_chunk", "video_chunk": [PIL images], "prompt": text}.

        video: an encoded video (bytes, path, address, data URI, base64), a list of frames, or an array (n, H, W, 3).
        fps: the frame rate of decoded frames. Keeps all sampled frames in memory at full size; `open_chunks` keeps
        none.
        """
        chunks = self.open_chunks(video, fps, allowed_hosts)
        return [{**chunk, "video_chunk": list(chunk["video_chunk"])} for chunk in chunks]

    def open_chunks(
        self, video: Any, fps: float | None = None, allowed_hosts: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """As `split_video_chunks`, but the frames of a chunk are decoded when they are read."""
        settings = self.settings
        opened = open_video(video, fps, settings.sample_fps, allowed_hosts)
        indices = sample_frames(
            opened.num_frames, opened.fps, settings.sample_fps, settings.max_num_frames_each_video
        )
        length = settings.temporal_merge_kernel_size
        chunks = []
        for start in range(0, len(indices), length):
            timestamp = format_timestamp(indices[start] / opened.fps, settings.timestamp_mode)
            frames = ChunkFrames(opened, indices[start : start + length])
            prompt = self.make_chunk_prompt(timestamp)
            chunks.append({"type": "video_chunk", "video_chunk": frames, "prompt": prompt})
        return chunks


def frames_of(media: Mapping[str, Any], settings: MediaSettings) -> Sequence[Any]:
    """The frames of a chunk, 1 to `temporal_merge_kernel_size` of them."""
    if media.get("type") == "video":
        raise ValueError("whole videos are split first, by split_video_chunks or by the processor")
    if media.get("type") != "video_chunk":
        raise ValueError(f"type must be one of {MEDIA_TYPES}, not {media.get('type')!r}")
    frames = media.get("video_chunk")
    frames = list(frames) if isinstance(frames, np.ndarray) else frames
    if not isinstance(frames, Sequence) or isinstance(frames, (str, bytes)):
        raise ValueError(f"video_chunk must be a list of frames, not a {type(frames).__name__}")
    if not 1 <= len(frames) <= settings.temporal_merge_kernel_size:
        raise ValueError(
            f"a chunk has 1 to {settings.temporal_merge_kernel_size} frames, this one has {len(frames)}"
        )
    return frames


def media_size(media: Mapping[str, Any], settings: MediaSettings) -> Size:
    """The size of an image, or of each frame of a chunk, which is that of its first."""
    if media.get("type") == "image":
        width, height = image_size(media.get("image"))
        return fit_size(width, height, settings.in_patch_limit, settings)
    frames = frames_of(media, settings)
    width, height = frames.size if isinstance(frames, ChunkFrames) else image_size(frames[0])
    return fit_size(width, height, settings.frame_limit(len(frames)), settings)


def fill_patches(items: deque[Item], num_patches: int, settings: MediaSettings) -> np.ndarray:
    """(P, 3, patch, patch) float32.

    Decodes frame by frame, as videos require, while threads resize and write earlier frames; at most `max_threads()`
    frames wait for them. Items are removed from the queue, so that decoded frames are freed once they are written.
    """
    patch = settings.patch_size
    mean = np.array(settings.image_mean, dtype=np.float32).reshape(3, 1, 1)
    inverse_std = np.float32(1) / np.array(settings.image_std, dtype=np.float32).reshape(3, 1, 1)
    pixel_values = np.empty((num_patches, 3, patch, patch), dtype=np.float32)
    start = 0
    jobs: deque[Future] = deque()
    with ThreadPoolExecutor(max_threads()) as pool:
        while items:
            item = items.popleft()
            rows, cols = item.size.grid
            with naming(item.name):
                for _ in range(item.num_frames):
                    if len(jobs) == max_threads():
                        jobs.popleft().result()
                    out = pixel_values[start : start + rows * cols].reshape(rows, cols, 3, patch, patch)
                    decoded = [to_rgb(open_image(next(item.frames)))]
                    jobs.append(pool.submit(write_frame, decoded, item.size, out, mean, inverse_std))
                    start += rows * cols
        for job in jobs:
            job.result()
    return pixel_values


def max_threads() -> int:
    return min(os.cpu_count() or 1, MAX_THREADS)


def write_frame(
    decoded: list[Image.Image], size: Size, out: np.ndarray, mean: np.ndarray, inverse_std: np.ndarray
) -> None:
    """Resizes a frame and writes its patches. `decoded` is emptied: the pool keeps the arguments of a job until it is
    done, and a frame in full size is no longer needed once it is resized."""
    write_patches(resize(decoded.pop(), size), out, mean, inverse_std)
