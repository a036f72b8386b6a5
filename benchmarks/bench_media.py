"""How fast do a 4K photo and a minute of 1080p video become patches, and how much memory does that take?

Compared with this repository's image processor, in the same run and each in a process of its own, is transformers'
image processor of Qwen2-VL in its Pillow and numpy form (on 4.57 `Qwen2VLImageProcessor`, on 5.x
`Qwen2VLImageProcessorPil`), told to keep about as many pixels. Both read the same files. The video is sampled at the
same 120 frames, and both read them through the same decoder; Qwen's gets them as a list of frames, as its callers
hand them over. It writes every image twice, since its patches span two frames, so patches are compared by the pixels
of the resized picture they show.

Memory is the peak resident size of the process less what it had before the call: the decoded input, the output and
everything between. The limit printed is 1.5 times the output and one decoded frame for each thread that works on
them.

    python benchmarks/bench_media.py [--repeats 3] [--seconds 60] [--decoder decord]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import transformers
from PIL import Image

from kimi.image_processing_kimi import KimiK25VisionProcessor, max_threads
from kimi.kimi_video import open_video, sample_frames

ROOT = Path(__file__).resolve().parents[1]
PHOTO, CLIP = (3840, 2160), (1920, 1080)
FRAMES_PER_SECOND = 30
CASES = {"photo": "4K photo, JPEG", "clip": "1080p video, H.264"}


def write_photo(path: Path) -> None:
    """Smooth areas, edges and some noise, so that decoding costs about what it does for a photo."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (27, 48, 3), dtype=np.uint8)).resize(
        PHOTO, Image.Resampling.BICUBIC
    )
    noise = rng.integers(-12, 13, (*PHOTO[::-1], 3))
    pixels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


def write_clip(path: Path, num_seconds: int) -> None:
    """A texture that moves, one key frame every two seconds."""
    import av

    rng = np.random.default_rng(0)
    width, height = CLIP
    texture = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size, stream.options = 2 * FRAMES_PER_SECOND, {"preset": "ultrafast"}
        for index in range(num_seconds * FRAMES_PER_SECOND):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, 4 * index, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def kimi_way(case: str, path: str, decoder: str) -> Callable[[], tuple[int, int]]:
    processor = KimiK25VisionProcessor(**json.loads((ROOT / "preprocessor_config.json").read_bytes()))

    def run() -> tuple[int, int]:
        medias = [{"type": "image", "image": path}] if case == "photo" else processor.open_chunks(path)
        output = processor.preprocess(medias, return_tensors="np")
        return len(output["pixel_values"]) * 14 * 14, output["pixel_values"].nbytes

    return run


def qwen_way(case: str, path: str, decoder: str) -> Callable[[], tuple[int, int]]:
    kept = 2408 * 1372 if case == "photo" else 1204 * 672
    slow = qwen_class()(min_pixels=28 * 28, max_pixels=kept)

    def run() -> tuple[int, int]:
        if case == "photo":
            with Image.open(path) as image:
                output = slow.preprocess(images=[image], return_tensors="np")
        else:
            video = open_video(path, decoder=decoder)
            frames = list(video.read_chunk(sample_frames(video.num_frames, video.fps, 2.0)))
            # Frame by frame as images on 5.x, whose slow class takes no videos any more.
            is_old = int(transformers.__version__.split(".")[0]) < 5
            inputs: dict[str, Any] = {"images": None, "videos": [frames]} if is_old else {"images": frames}
            output = slow.preprocess(**inputs, return_tensors="np")
        values = output["pixel_values_videos"] if "pixel_values_videos" in output else output["pixel_values"]
        frames_of_patch = 2 if "pixel_values_videos" in output else 1
        return len(values) * frames_of_patch * 14 * 14, values.nbytes

    return run


def qwen_class() -> Any:
    if int(transformers.__version__.split(".")[0]) < 5:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        return Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


def status_mb(field: str) -> float:
    """VmRSS or VmHWM of this process, in MB. Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1000


def work(way: str, case: str, path: str, decoder: str) -> None:
    """In a process of its own: one call to measure memory, then one to measure time."""
    run = (kimi_way if way == "kimi" else qwen_way)(case, path, decoder)
    before = status_mb("VmRSS")
    num_pixels, output_bytes = run()
    peak_mb = status_mb("VmHWM") - before
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(
        json.dumps({"s": seconds, "peak_mb": peak_mb, "pixels": num_pixels, "output_mb": output_bytes / 1e6})
    )


def measure(case: str, path: Path, decoder: str, repeats: int) -> dict[str, dict[str, float]]:
    """Medians for both, measured alternately, so that a slow minute of the machine affects both."""
    rounds: dict[str, list[dict[str, float]]] = {"kimi": [], "qwen": []}
    for _ in range(repeats):
        for way, results in rounds.items():
            command = [sys.executable, __file__, "--work", way, case, str(path), "--decoder", decoder]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        way: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for way, results in rounds.items()
    }


def report(case: str, results: dict[str, dict[str, float]], num_items: int) -> None:
    unit = "images" if case == "photo" else "frames"
    width, height = PHOTO if case == "photo" else CLIP
    print(f"\n{CASES[case]}, {width} x {height}, {num_items} {unit}")
    for way, r in results.items():
        print(
            f"  {way:6s} {num_items / r['s']:7.2f} {unit}/s  {r['pixels'] / r['s'] / 1e6:7.1f} Mpixel/s out  "
            f"peak {r['peak_mb']:7.0f} MB  output {r['output_mb']:7.0f} MB"
        )
    kimi, qwen = results["kimi"], results["qwen"]
    num_threads = 1 if case == "photo" else max_threads()
    limit = 1.5 * kimi["output_mb"] + num_threads * width * height * 3 / 1e6
    print(f"  kimi is {qwen['s'] / kimi['s']:.2f} x as fast; its memory limit is {limit:.0f} MB")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=60, help="length of the video")
    parser.add_argument("--decoder", default="decord", help="decord or pyav")
    parser.add_argument("--work", nargs=3, metavar=("WAY", "CASE", "PATH"), help="used by the script itself")
    args = parser.parse_args()
    if args.work:
        way, case, path = args.work
        return work(way, case, path, decoder=args.decoder)
    packages = " ".join(
        f"{name} {version(name)}" for name in ("transformers", "pillow", "numpy", "decord", "av")
    )
    print(f"{packages}, Python {platform.python_version()}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; medians of {args.repeats} rounds, one warm-up in each; "
        f"{' '.join(sys.argv)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {"photo": Path(folder) / "photo.jpg", "clip": Path(folder) / "clip.mp4"}
        write_photo(files["photo"])
        write_clip(files["clip"], args.seconds)
        for case, path in files.items():
            results = measure(case, path, args.decoder, args.repeats)
            report(case, results, 1 if case == "photo" else 2 * args.seconds)


if __name__ == "__main__":
    main()
