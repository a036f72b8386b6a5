"""Sizes, pixels, frames and chunks against golden values, and the calls that serving engines make.

Sizes, frame indices, timestamps and pixels that need no resampling are exact. Resampled ones are exact with the Pillow
that made the golden file (the same version, on x86-64), and one grey level apart at most on others. Labels
E-n in docstrings number what engines rely on, see test_engine_contracts.py.
"""

import copy
import hashlib
import json
import math
import platform

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from clips import index_of, write_clip
from conftest import DATA, ROOT
from kimi import image_processing_kimi
from kimi.image_processing_kimi import KimiK25VisionProcessor, MediaSettings, fit_size, write_patches
from kimi.kimi_video import format_timestamp, sample_frames

GOLDEN = json.loads((DATA / "media_golden.json").read_bytes())
PUBLISHED = json.loads((ROOT / "preprocessor_config.json").read_bytes())
IMAGE_LIMIT, FRAME_LIMIT = 16384, 4096
MAX_TOKENS = {IMAGE_LIMIT: 4464, FRAME_LIMIT: 1338}


def make_processor(**changes):
    return KimiK25VisionProcessor(media_proc_cfg={**PUBLISHED["media_proc_cfg"], **changes})


@pytest.fixture
def processor():
    return make_processor()


def picture(width, height):
    """The golden file's `preprocess_image_rule`."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    return np.stack([7 * x + 3 * y, 5 * x + 11 * y, x * y + 13], axis=-1).astype(np.uint8)


def image(width, height=None, **fields):
    return {"type": "image", "image": Image.fromarray(picture(width, height or width)), **fields}


def chunk(num_frames, width=40, height=30, **fields):
    frames = [Image.fromarray(np.roll(picture(width, height), k, axis=1)) for k in range(num_frames)]
    return {"type": "video_chunk", "video_chunk": frames, **fields}


# ------------------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("key", "limit"), [("image_limit_16384", IMAGE_LIMIT), ("video_frame_limit_4096", FRAME_LIMIT)]
)
def test_golden_sizes(key, limit):
    settings = MediaSettings.read(PUBLISHED["media_proc_cfg"])
    for case in GOLDEN[key]:
        size = fit_size(case["w"], case["h"], limit, settings)
        assert size == (
            case["new_w"],
            case["new_h"],
            case["pad_right"],
            case["pad_bottom"],
            tuple(case["grid_thw"][1:]),
            case["num_tokens"],
        ), case


@pytest.mark.parametrize("limit", MAX_TOKENS)
def test_every_size_keeps_the_hard_limits(limit):
    """The patch budget is soft: the largest image overshoots it, and nothing overshoots that one."""
    settings = MediaSettings.read(PUBLISHED["media_proc_cfg"])
    rng = np.random.default_rng(0)
    sides = [
        *np.exp(rng.uniform(0, math.log(20000), (4000, 2))).astype(int).tolist(),
        [7081, 489],
        [6731, 153],
    ]
    for width, height in sides:
        size = fit_size(width, height, limit, settings)
        rows, cols = size.grid
        assert size.new_width <= max(width, 1) and size.new_height <= max(height, 1)
        assert rows % 2 == 0 and cols % 2 == 0 and rows <= 512 and cols <= 512
        assert (size.new_width + size.pad_width, size.new_height + size.pad_height) == (14 * cols, 14 * rows)
        assert 0 <= size.pad_width < 28 and 0 <= size.pad_height < 28
        assert 1 <= size.num_tokens == rows * cols // 4 <= MAX_TOKENS[limit]


def test_resize_config_names_what_the_published_processor_names(processor):
    assert processor.get_resize_config({"type": "image", "image": Image.new("RGB", (640, 480))}) == {
        "num_tokens": 414,
        "new_width": 640,
        "new_height": 480,
        "pad_width": 4,
        "pad_height": 24,
        "sampled_nframes": 1,
    }
    config = processor.get_resize_config(chunk(3, 1280, 720))
    assert (config["num_tokens"], config["new_width"], config["new_height"]) == (1075, 1202, 676)
    assert config["sampled_nframes"] == 3


def test_budget_of_a_frame():
    assert MediaSettings.read(PUBLISHED["media_proc_cfg"]).frame_limit(4) == FRAME_LIMIT
    no_limit = MediaSettings.read({**PUBLISHED["media_proc_cfg"], "in_patch_limit_each_frame": None})
    assert no_limit.frame_limit(4) == IMAGE_LIMIT
    shared = MediaSettings.read({**PUBLISHED["media_proc_cfg"], "in_patch_limit_video": 1001})
    assert [shared.frame_limit(n) for n in (1, 2, 4)] == [1001, 500, 250], "round halves to even"
    assert make_processor(in_patch_limit_video=64).media_tokens_calculator(chunk(4, 560, 560)) == 4
    assert make_processor().media_tokens_calculator(chunk(4, 560, 560)) == 400


# ------------------------------------------------------------------------------------------------------------ pixels


def test_all_256_values():
    ramp = np.zeros((14, 28, 3), np.uint8)
    ramp.reshape(-1)[:256] = np.arange(256)
    out = np.empty((1, 2, 3, 14, 14), np.float32)
    half = np.full((3, 1, 1), 0.5, np.float32)
    write_patches(Image.fromarray(ramp), out, mean=half, inverse_std=1 / half)
    values = out.transpose(0, 3, 1, 4, 2).reshape(-1)[:256]  # back to rows, columns, channels
    assert (
        hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
        == GOLDEN["normalise_lut_sha256_le_float32"]
    )
    for level, value in GOLDEN["normalise_uint8_to_float32"].items():
        assert values[int(level)] == np.float32(value)


def test_mean_and_std_are_per_channel():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]
    out = make_processor(image_mean=mean, image_std=std).preprocess([image(28)], "np")["pixel_values"]
    plain = picture(28, 28).astype(np.float64) / 255
    expected = ((plain - mean) / std).reshape(2, 14, 2, 14, 3).transpose(0, 2, 4, 1, 3).reshape(4, 3, 14, 14)
    assert np.abs(out - expected).max() < 1e-6, "float32 against float64"


def resamples_as_golden():
    """Whether Pillow is the one that made the golden file: for other processors a compiler may join a product
    and a sum into one rounding, which moves a resampled value by one grey level."""
    return Image.__version__ == GOLDEN["pillow_version"] and platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("case", GOLDEN["preprocess_cases"], ids=lambda c: f"{c['w']}x{c['h']}x{c['frames']}")
def test_golden_pixels(processor, case):
    pixels = picture(case["w"], case["h"])
    frames = [Image.fromarray(np.roll(pixels, k, axis=1)) for k in range(case["frames"])]
    media = {"type": "image", "image": pixels}
    if case["limit"] == FRAME_LIMIT:
        media = {"type": "video_chunk", "video_chunk": frames}
    config = processor.get_resize_config(media)
    small = [processor.resize_image(frame, config["new_width"], config["new_height"]) for frame in frames]
    out = processor.preprocess([media], return_tensors="np")
    assert out["grid_thws"].tolist() == [case["grid_thw"]]
    assert list(out["pixel_values"].shape) == case["pixel_values_shape"]
    tolerance = 2 / 255 + 1e-6 if case["needs_resampling"] else 0  # one grey level
    for *place, value in case["spots"]:
        assert abs(out["pixel_values"][tuple(place)] - np.float32(value)) <= tolerance
    if not case["needs_resampling"] or resamples_as_golden():
        digest = hashlib.sha256(out["pixel_values"].astype("<f4").tobytes()).hexdigest()
        assert digest == case["pixel_values_sha256_le_float32"]
        assert hashlib.sha256(np.stack(small).tobytes()).hexdigest() == case["resized_uint8_sha256"]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_bands_do_not_show(processor, rows, monkeypatch):
    expected = processor.preprocess([image(300, 200)], "np")["pixel_values"]
    monkeypatch.setattr(image_processing_kimi, "BAND_ROWS", rows)
    assert np.array_equal(processor.preprocess([image(300, 200)], "np")["pixel_values"], expected)


def test_resize_image_is_what_the_patches_show(processor):
    """Rows of patches put together again are the padded picture."""
    shown = processor.resize_image(image(70, 45)["image"], 70, 45, 14, 11)
    assert shown.shape == (56, 84, 3) and shown.dtype == np.uint8
    assert not shown[45:].any() and not shown[:, 70:].any(), "black below and on the right"
    patches = processor.preprocess([image(70, 45)], "np")["pixel_values"]
    joined = patches.reshape(4, 6, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(56, 84, 3)
    assert np.array_equal(np.rint((joined + 1) * 127.5), shown)


def test_items_of_one_call_equal_each_alone(processor):
    medias = [image(100, 60), chunk(4), chunk(1), image(29, 28), chunk(3, 64, 90)]
    together = processor.preprocess(medias)
    alone = [processor.preprocess([media]) for media in medias]
    assert torch.equal(together["pixel_values"], torch.cat([out["pixel_values"] for out in alone]))
    assert torch.equal(together["grid_thws"], torch.cat([out["grid_thws"] for out in alone]))
    assert together["grid_thws"][:, 0].tolist() == [1, 4, 1, 1, 3]


def test_frames_of_a_chunk_take_the_size_of_the_first(processor):
    """A frame of another size is resized to that of the first one, which decides the grid."""
    small, large = Image.fromarray(picture(40, 30)), Image.fromarray(picture(80, 60))
    out = processor.preprocess([{"type": "video_chunk", "video_chunk": [small, large]}], "np")
    assert out["grid_thws"].tolist() == [[2, 4, 4]]
    fitted = {"type": "image", "image": large.resize((40, 30), Image.Resampling.BICUBIC)}
    assert np.array_equal(out["pixel_values"][16:], processor.preprocess([fitted], "np")["pixel_values"])


# ------------------------------------------------------------------------------------------- frames and timestamps


@pytest.mark.parametrize("case", GOLDEN["frame_sampling"], ids=lambda c: f"{c['num_frames']}@{c['fps']}")
def test_golden_frames(case):
    """Indices, chunks and the text of each chunk."""
    indices = sample_frames(case["num_frames"], case["fps"], case["sample_fps_cfg"])
    assert indices == case["frame_indices"] and len(indices) == case["sampled_nframes"]
    starts = range(0, len(indices), 4)
    assert [len(indices[start : start + 4]) for start in starts] == case["chunk_sizes"]
    times = [format_timestamp(indices[start] / case["fps"], "hh:mm:ss.fff") for start in starts]
    assert times == case["chunk_timestamps"]


@pytest.mark.parametrize("case", GOLDEN["long_video_counts"], ids=lambda c: str(c["num_frames"]))
def test_golden_long_videos(case):
    indices = sample_frames(case["num_frames"], case["fps"], 2.0)
    starts = range(0, len(indices), 4)
    assert (len(indices), len(starts), indices[-1]) == (
        case["sampled_nframes"],
        case["chunks"],
        case["last_index"],
    )
    last = format_timestamp(indices[starts[-1]] / case["fps"], "hh:mm:ss.fff")
    assert last == case["last_chunk_timestamp"]


@pytest.mark.parametrize("mode", ["hh:mm:ss.fff", "mm:ss.fff", "mm:ss"])
def test_golden_timestamps(mode):
    for case in GOLDEN["timestamps"]:
        assert format_timestamp(case["seconds"], mode) == case[mode], case
    corner = GOLDEN["timestamp_disagreement_example"]
    assert format_timestamp(corner["seconds"], "hh:mm:ss.fff") == corner["floor"]


def test_cap_on_the_frames_of_a_video():
    assert len(sample_frames(216000, 30.0, 2.0, max_frames=100)) == 100
    assert sample_frames(300, 30.0, 2.0, max_frames=3) == [0, 150, 299]
    assert sample_frames(3, 30.0, 2.0, max_frames=100) == [0]


@pytest.mark.parametrize(
    ("num_frames", "fps"), [(0, 30.0), (10, 0.0), (10, -1.0), (10, math.inf), (10, math.nan)]
)
def test_videos_that_cannot_be_sampled(num_frames, fps):
    with pytest.raises(ValueError, match=r"no frames|the rate must be positive"):
        sample_frames(num_frames, fps, 2.0)


def test_chunk_prompt_is_a_classmethod():
    case = GOLDEN["chunk_prompt_example"]
    assert KimiK25VisionProcessor.make_chunk_prompt(case["timestamp"]) == case["prompt"]


def test_chunks_of_an_encoded_video(processor, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", num_frames=60, fps=24)
    chunks = processor.split_video_chunks(path)
    assert [[index_of(frame) for frame in c["video_chunk"]] for c in chunks] == [[0, 15, 30, 44], [59]]
    assert [c["prompt"][:12] for c in chunks] == ["00:00:00.000", "00:00:02.458"]
    lazy = processor.open_chunks(path)
    assert torch.equal(
        processor.preprocess(lazy)["pixel_values"], processor.preprocess(chunks)["pixel_values"]
    )
    capped = make_processor(max_num_frames_each_video=2, timestamp_mode="mm:ss").split_video_chunks(path)
    assert [[index_of(frame) for frame in c["video_chunk"]] for c in capped] == [[0, 59]]
    assert capped[0]["prompt"].startswith("00:00<|media_begin|>")


def test_only_the_sampled_frames_are_decoded_each_once_and_few_at_a_time(processor, tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", num_frames=60, fps=6)
    chunks = processor.open_chunks(path)
    video = chunks[0]["video_chunk"].video
    decoded, written, waiting = [], [], []
    original, write = type(video).decode, image_processing_kimi.write_frame

    def decode(self, index):
        decoded.append(index)
        waiting.append(len(decoded) - len(written))
        return original(self, index)

    def write_frame(*args):
        write(*args)
        written.append(1)  # which no other thread can undo, unlike an addition

    monkeypatch.setattr(type(video), "decode", decode)
    monkeypatch.setattr(image_processing_kimi, "write_frame", write_frame)
    processor.preprocess(chunks)
    sampled = sample_frames(60, 6.0, 2.0)
    assert decoded == sampled[1:], "the first was decoded on opening"
    assert len(sampled) == 20 and max(waiting) <= image_processing_kimi.max_threads() + 1


# ------------------------------------------------------------------------------------------------- settings, saving


def test_the_published_settings():
    assert PUBLISHED["media_proc_cfg"] == GOLDEN["media_proc_cfg"]
    assert list(PUBLISHED["media_proc_cfg"]) == list(GOLDEN["media_proc_cfg"])
    assert PUBLISHED["auto_map"] == {
        "AutoImageProcessor": "image_processing_kimi.KimiK25VisionProcessor",
        "AutoProcessor": "processing_kimi.KimiK25Processor",
    }


def test_settings_round_trip_unchanged(tmp_path):
    """Nested as they are, nulls and unknown keys included."""
    cfg = {**PUBLISHED["media_proc_cfg"], "of_the_future": {"a": [1, None]}}
    processor = KimiK25VisionProcessor(media_proc_cfg=copy.deepcopy(cfg), beside="kept")
    as_dict = processor.to_dict()
    assert as_dict["media_proc_cfg"] == cfg and as_dict["beside"] == "kept"
    assert json.loads(processor.to_json_string())["media_proc_cfg"] == cfg
    assert KimiK25VisionProcessor.from_dict(as_dict).media_proc_cfg == cfg
    processor.save_pretrained(tmp_path)
    again = KimiK25VisionProcessor.from_pretrained(tmp_path)
    assert again.media_proc_cfg == cfg and again.beside == "kept"
    assert again.to_dict() == KimiK25VisionProcessor.from_pretrained(tmp_path).to_dict()


def test_settings_may_be_changed_on_a_loaded_processor(processor):
    assert processor.media_tokens_calculator(image(560)) == 400
    processor.media_proc_cfg["in_patch_limit"] = 100
    assert processor.media_tokens_calculator(image(560)) == 25
    assert processor.preprocess([image(560)])["grid_thws"].tolist() == [[1, 10, 10]]


def test_merge_size_as_number_or_pair():
    assert make_processor(merge_kernel_size=[2, 2]).media_tokens_calculator(image(560)) == 400


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fixed_output_tokens": 64}, r"fixed_output_tokens is 64; only null is supported"),
        ({"merge_kernel_size": [2, 4]}, r"merge_kernel_size must have equal sides, not \[2, 4\]"),
        ({"timestamp_mode": "ss"}, r"timestamp_mode is 'ss'"),
        ({"image_std": [0.5, 0.5]}, r"need three values"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"those of image_std not 0"),
        ({"patch_size": 0}, r"patch_size is 0, and must be at least 1"),
        ({"in_patch_limit": None}, r"media_proc_cfg has no in_patch_limit"),
    ],
)
def test_settings_that_make_no_sense(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_processor(**changes)


# --------------------------------------------------------------------------------------- what serving engines call


def test_vllm_counts_before_and_after_on_the_same_item(processor):
    """E-2: no return_tensors, torch tensors back; extra keys; the count is the grid's, and equal before and after."""
    items = [
        image(300, 200, uuid=None),
        chunk(
            4,
            uuid="v",
            video_idx=0,
            prompt="00:00:00.000<|media_begin|>video<|media_content|><|media_pad|><|media_end|>",
        ),
        {"type": "image", "image": Image.new("RGB", (3000, 3000))},
        chunk(processor.num_frames_per_chunk, 64, 64),
    ]
    before = [processor.media_tokens_calculator(item) for item in items]
    output = processor.preprocess(items)
    after = [processor.media_tokens_calculator(item) for item in items]
    assert type(before[0]) is int and before == after and before[2] == 4225
    grid_thws, pixel_values = output["grid_thws"], output["pixel_values"]
    assert isinstance(pixel_values, torch.Tensor) and pixel_values.dtype == torch.float32
    assert grid_thws.dtype == torch.int64 and grid_thws.shape == (4, 3)
    sizes = grid_thws.prod(-1)
    assert pixel_values.shape == (int(sizes.sum()), 3, 14, 14)
    assert (grid_thws[:, 1:].prod(-1) // 4).tolist() == before
    assert [len(part) for part in pixel_values.split(sizes.tolist())] == sizes.tolist()


def test_vllm_splits_what_its_video_loader_made(processor):
    """E-3: an array of decoded frames, rate unknown; and the prompts that it joins (E-4)."""
    frames = np.stack([picture(40, 30)] * 10)
    chunks = processor.split_video_chunks(frames)
    assert [len(c["video_chunk"]) for c in chunks] == [4, 4, 2]
    assert all(set(c) == {"type", "video_chunk", "prompt"} and c["type"] == "video_chunk" for c in chunks)
    assert all(
        type(c["video_chunk"]) is list and isinstance(c["video_chunk"][0], Image.Image) for c in chunks
    )
    assert [c["prompt"].count("<|media_pad|>") for c in chunks] == [1, 1, 1]
    assert [c["prompt"][:12] for c in chunks] == ["00:00:00.000", "00:00:02.000", "00:00:04.000"]
    assert len(processor.split_video_chunks(list(frames), fps=1.0)) == 3
    with pytest.raises(ValueError, match=r"uint8 \(n, H, W, 3\)"):
        processor.split_video_chunks(frames.astype(np.float32))


def test_sglang_reads_the_settings_and_counts_tensors(processor):
    """E-10, E-11: a subclass of BaseImageProcessor; plain keys; an image may be a uint8 tensor (C, H, W)."""
    assert isinstance(processor, BaseImageProcessor)
    cfg = processor.media_proc_cfg
    assert isinstance(cfg, dict) and cfg["merge_kernel_size"] == 2 and cfg.get("fixed_output_tokens") is None
    for key in ("patch_size", "in_patch_limit", "patch_limit_on_one_side", "image_mean", "image_std"):
        assert cfg[key] is not None
    tensor = torch.zeros(3, 480, 640, dtype=torch.uint8)
    assert processor.media_tokens_calculator({"type": "image", "image": tensor}) == 414
    meta = torch.zeros(3, 480, 640, dtype=torch.uint8, device="meta")  # has no pixels that could be read
    assert processor.media_tokens_calculator({"type": "image", "image": meta}) == 414


def test_tensorrt_llm_preprocesses_split_videos(processor):
    """Section 6: image and chunk items with return_tensors="pt"; three settings are read by name."""
    out = processor.preprocess([image(56), chunk(2)], return_tensors="pt")
    assert isinstance(out["pixel_values"], torch.Tensor)
    cfg = processor.media_proc_cfg
    assert [cfg[key] for key in ("temporal_merge_kernel_size", "sample_fps", "timestamp_mode")] == [
        4,
        2.0,
        "hh:mm:ss.fff",
    ]


def test_forms_of_a_call(processor):
    expected = processor.preprocess([image(60)])["pixel_values"]
    pil = image(60)["image"]
    for out in (
        processor.preprocess(image(60)),
        processor.preprocess(pil),
        processor.preprocess(iter([pil])),
        processor([pil]),
        processor(images=[pil], return_tensors="pt"),
        processor.preprocess([picture(60, 60)]),
    ):
        assert torch.equal(out["pixel_values"], expected)
    as_numpy = processor.preprocess([pil], return_tensors="np")
    assert isinstance(as_numpy["pixel_values"], np.ndarray) and isinstance(as_numpy["grid_thws"], np.ndarray)
    assert dict(processor.preprocess([])) == {}
    assert processor.model_input_names == ["pixel_values", "grid_thws"]


def test_the_callers_items_stay_as_they_are(processor, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(30, 20)).save(path)
    item = {"type": "image", "image": str(path), "uuid": 1}
    given = [item, chunk(2)]
    before = [dict(media) for media in given]
    processor.preprocess(given)
    processor.media_tokens_calculator(item)
    assert given == before and item["image"] == str(path)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("media", "kind", "sentence"),
    [
        (
            {"type": "image", "image": b"hello"},
            ValueError,
            r"^medias\[1\]: 5 bytes that begin with b'hello' is not an image",
        ),
        (
            {"type": "image", "image": "/nowhere.png"},
            FileNotFoundError,
            r"^medias\[1\]: there is no file '/nowhere.png'",
        ),
        ({"type": "image"}, ValueError, r"^medias\[1\]: a NoneType is not a valid image source"),
        ({"type": "image", "image": b"x", "name": "messages[2]"}, ValueError, r"^messages\[2\]: 1 bytes"),
        (
            {"type": "image", "image": "http://127.0.0.1/a.png"},
            ValueError,
            r"^medias\[1\]: host '127.0.0.1' is refused",
        ),
        ({"type": "audio", "audio": b""}, ValueError, r"^medias\[1\]: type must be one of .* not 'audio'"),
        ({"type": "video", "video": "a.mp4"}, ValueError, r"^medias\[1\]: whole videos are split first"),
        (
            {"type": "video_chunk"},
            ValueError,
            r"^medias\[1\]: video_chunk must be a list of frames, not a NoneType",
        ),
        ({"type": "video_chunk", "video_chunk": "abc"}, ValueError, r"a list of frames, not a str"),
        (
            {"type": "video_chunk", "video_chunk": []},
            ValueError,
            r"a chunk has 1 to 4 frames, this one has 0",
        ),
        (chunk(5), ValueError, r"^medias\[1\]: a chunk has 1 to 4 frames, this one has 5"),
        (
            {"type": "video_chunk", "video_chunk": [picture(30, 20), b"x"]},
            ValueError,
            r"^medias\[1\]: 1 bytes",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_item_fails_the_call_and_is_named(processor, media, kind, sentence):
    with pytest.raises(kind, match=sentence):
        processor.preprocess([image(30), media, image(20)])


def test_a_truncated_file_fails_the_call_when_it_is_decoded(processor, tmp_path):
    path = tmp_path / "half.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(ValueError, match=r"^medias\[1\]: the image is truncated or broken"):
        processor.preprocess([image(30), path])


def test_unknown_keywords_are_refused(processor):
    with pytest.raises(ValueError, match=r"preprocess\(\) does not know \['do_resize'\]"):
        processor.preprocess([image(30)], do_resize=False)
    with pytest.raises(ValueError, match=r"return_tensors must be None, 'pt' or 'np', not 'tf'"):
        processor.preprocess([image(30)], return_tensors="tf")
