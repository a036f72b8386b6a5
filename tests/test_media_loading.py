"""Loading images and videos: everything that may stand for one, the rules of fetching, and what bad input gets.

The only server is one that the module starts itself on the loopback interface, which fetching refuses unless it is allowed
by name. Videos are encoded on the spot with PyAV and read with each decoder that exists for the platform.
"""

import base64
import contextlib
import io
import json
import os
import socket
import ssl
import threading
import time
import warnings
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from clips import DECODERS, grey, index_of, turn_upright, write_clip
from conftest import DATA, HANG_S
from kimi import kimi_media, kimi_video
from kimi.kimi_media import (
    PinnedConnection,
    describe,
    fetch,
    image_size,
    is_public,
    naming,
    open_image,
    to_rgb,
)
from kimi.kimi_video import ChunkFrames, choose_decoder, open_video

GOLDEN = json.loads((DATA / "media_golden.json").read_bytes())
PICTURE = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)  # (H, W, 3)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded(Image.fromarray(PICTURE))
BASE64 = base64.b64encode(PNG).decode()


def pixels_of(source, **options):
    return np.asarray(to_rgb(open_image(source, **options)))


# --------------------------------------------------------------------------------------------- what stands for an image


def ways(folder):
    path = folder / "picture.png"
    path.write_bytes(PNG)
    return {
        "pil": Image.fromarray(PICTURE),
        "lazy pil": Image.open(path),
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "path": path,
        "path as text": str(path),
        "file URL": path.as_uri(),
        "data URI": f"data:image/png;base64,{BASE64}",
        "data URI with a blank": f"data:image/png;base64, {BASE64}\n",
        "data URI with a parameter": f"data:image/png;charset=utf-8;base64,{BASE64}",
        "data URI without type": f"data:;base64,{BASE64}",
        "base64": BASE64,
        "base64 in lines": "\n".join(BASE64[i : i + 60] for i in range(0, len(BASE64), 60)),
        "url-safe base64 without padding": BASE64.replace("+", "-").replace("/", "_").rstrip("="),
        "array": PICTURE,
        "tensor": torch.from_numpy(PICTURE).permute(2, 0, 1),
        "url in a dict": {"url": f"data:image/png;base64,{BASE64}"},
        "behind .media": SimpleNamespace(media=Image.fromarray(PICTURE), original_bytes=b""),
    }


def test_every_way_to_give_an_image(tmp_path):
    for name, source in ways(tmp_path).items():
        assert np.array_equal(pixels_of(source), PICTURE), name
        assert image_size(source) == (7, 5), name


def test_arrays_of_one_and_four_channels():
    grey_picture = PICTURE[:, :, 0]
    expected = np.repeat(grey_picture[:, :, None], 3, axis=2)
    assert np.array_equal(pixels_of(grey_picture), expected)
    assert np.array_equal(pixels_of(grey_picture[:, :, None]), expected)
    with_alpha = np.dstack([PICTURE, np.zeros((5, 7), np.uint8)])
    assert np.array_equal(pixels_of(with_alpha), PICTURE), "alpha is dropped, not blended"
    assert image_size(torch.zeros(3, 20, 30)) == (30, 20)


def test_colours_become_rgb_and_nothing_else():
    rgba = [entry for entry in GOLDEN["colour_conversion"] if entry["mode"] == "RGBA"]
    for entry in rgba:
        image = Image.new("RGBA", (1, 1), tuple(entry["pixel"]))
        assert to_rgb(image).getpixel((0, 0)) == tuple(entry["rgb"])
    assert to_rgb(Image.new("LA", (1, 1), (77, 0))).getpixel((0, 0)) == (77, 77, 77)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 8, 7])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (9, 8, 7)
    deep = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(deep))[0, :, 0].tolist() == [0, 255, 255, 255]
    premultiplied = Image.new("LA", (1, 1), (77, 255)).convert("La")
    assert to_rgb(premultiplied).getpixel((0, 0)) == (77, 77, 77)


def test_orientation_is_not_applied():
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert to_rgb(open_image(encoded(image, "JPEG", exif=exif))).size == (30, 20)


def test_a_phones_second_picture_is_no_animation():
    both = encoded(Image.new("RGB", (8, 8)), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(both).size == (8, 8)


def test_of_an_animation_the_first_frame_is_used_with_a_warning():
    frames = [Image.new("RGB", (8, 8), (50 * i, 0, 0)) for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="animation of 3 frames; the first one is used"):
        assert to_rgb(open_image(data)).getpixel((0, 0)) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------------ bad images


@pytest.mark.parametrize(
    ("source", "kind", "sentence"),
    [
        (b"hello", ValueError, r"5 bytes that begin with b'hello' is not an image"),
        (b"", ValueError, r"0 bytes .* is not an image"),
        ("/nowhere/cat.png", FileNotFoundError, r"there is no file '/nowhere/cat.png'"),
        ("x" * 5000 + ".png", FileNotFoundError, r"there is no file 'x{60}\.\.\.x{46}\.png'"),
        (Path("/nowhere/cat.png"), FileNotFoundError, r"there is no file"),
        ("file:///nowhere/cat.png", FileNotFoundError, r"there is no file"),
        ("data:image/png;base64,@@@@", ValueError, r"bad base64 in '@@@@'"),
        ("data:image/png;base64,QQQQQ", ValueError, r"bad base64"),
        ("data:image/png,abc", ValueError, r"not of the form data:image/\.\.\.;base64"),
        ("data:image/png;base64", ValueError, r"not of the form"),
        (f"data:video/mp4;base64,{BASE64}", ValueError, r"holds video/mp4, and image/\.\.\. is expected"),
        ("data:text/html;base64,PGI+", ValueError, r"holds text/html"),
        ("ftp://example.org/a.png", ValueError, r"scheme of 'ftp://example.org/a.png' is not one of http"),
        ({"detail": "low"}, ValueError, r"expected a dict with 'url', found the keys \['detail'\]"),
        (None, ValueError, r"a NoneType is not a valid image source"),
        (17, ValueError, r"a int is not a valid image source"),
        (PICTURE.astype(np.float32), ValueError, r"an image array is uint8.*found float32 \(5, 7, 3\)"),
        (PICTURE[None], ValueError, r"found uint8 \(1, 5, 7, 3\)"),
        (PICTURE[:, :, :2], ValueError, r"found uint8 \(5, 7, 2\)"),
        (PICTURE[:0], ValueError, r"has no pixels: an array of shape \(0, 7, 3\)"),
        (Image.new("RGB", (0, 5)), ValueError, r"has no pixels: 0 x 5"),
    ],
    ids=str,
)
def test_bad_images(source, kind, sentence):
    with pytest.raises(kind, match=sentence):
        open_image(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_truncated_files(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ValueError, match=r"truncated or broken|not an image|broken image"):
        to_rgb(open_image(data[: len(data) // 2]))


def test_decompression_bombs_are_refused_at_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"7 x 5 pixels exceed Pillow's limit of 34"),
    ):
        open_image(PNG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"is refused: .*exceeds limit of 34 pixels"):
            open_image(PNG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # more than twice: Pillow itself raises
    with pytest.raises(ValueError, match=r"is refused: .*exceeds limit of 20 pixels"):
        open_image(PNG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(PNG).size == (7, 5)


def test_naming_puts_the_place_first_and_keeps_the_kind():
    for kind in (ValueError, OSError, FileNotFoundError):
        with pytest.raises(kind, match=r"^medias\[3\]: gone$"), naming("medias[3]"):
            raise kind("gone")


# -------------------------------------------------------------------------------------------------------- addresses


class Handler(BaseHTTPRequestHandler):
    """Answers by path. Redirects go to the address behind `?to=`."""

    def do_GET(self):
        path, _, target = self.path.partition("?to=")
        getattr(self, f"answer_{path[1:]}")(target)

    def send(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_picture(self, target):
        self.send(200, {"Content-Length": len(PNG)}, PNG)

    def answer_unannounced(self, target):
        self.send(200, {}, PNG)

    def answer_redirect(self, target):
        self.send(302, {"Location": target})

    def answer_missing(self, target):
        self.send(404, {})

    def answer_short(self, target):
        self.send(200, {"Content-Length": len(PNG) + 10}, PNG)

    def answer_liar(self, target):
        self.send(200, {"Content-Length": 10**12}, PNG)

    def answer_endless(self, target):
        self.send(200, {})
        while True:
            self.wfile.write(bytes(10**5))

    def answer_slow(self, target):
        """A byte now and then, on and on: no single wait is long."""
        self.send(200, {"Content-Length": 20 * HANG_S})
        while True:
            time.sleep(0.05)
            self.wfile.write(b"x")

    def answer_silent(self, target):
        self.rfile.read(1)  # until the client hangs up

    def handle(self):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client was meant to hang up
            super().handle()

    def log_message(self, *args):
        pass


def test_a_long_name_keeps_both_ends(tmp_path):
    path = "/a/long/way/" * 20 + "clip.mp4"
    assert describe(path).startswith("'/a/long/way/") and describe(path).endswith("/clip.mp4'")
    assert len(describe(path)) < 120 and describe(path[-100:]) == repr(path[-100:])
    assert describe("DATA:image/png;base64," + "A" * 200).endswith("AAA...'")
    signed = "https://example.org/" + "long/" * 30 + "clip.mp4?signature=secret" + "0" * 100
    assert describe(signed).endswith("/clip.mp4?'") and "secret" not in describe(signed)
    (tmp_path / "a.png").touch()
    with os.scandir(os.fsencode(tmp_path)) as entries:
        assert describe(next(entries)).endswith("a.png'"), "a path of bytes"


@pytest.fixture(scope="module")
def port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


ALLOWED = ["127.0.0.1"]


@pytest.mark.parametrize("path", ["picture", "unannounced", "redirect?to=/picture"])
def test_an_allowed_host_is_fetched(port, path):
    url = f"http://127.0.0.1:{port}/{path}"
    assert fetch(url, ALLOWED) == PNG
    assert np.array_equal(pixels_of(url, allowed_hosts=ALLOWED), PICTURE)
    assert np.array_equal(pixels_of({"url": url}, allowed_hosts="127.0.0.1"), PICTURE)
    with pytest.raises(ValueError, match="is refused"):
        fetch(url, "127.0.0.11")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_loopback_is_refused_unless_named(port, host):
    with pytest.raises(
        ValueError, match=r"is refused: .* is a loopback, private or reserved address; allowed_hosts="
    ):
        fetch(f"http://{host}:{port}/picture", ["example.org"])


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("http://localhost:{port}/picture", r"host 'localhost' is refused"),
        ("http://10.0.0.1/", r"host '10.0.0.1' is refused: 10.0.0.1"),
        ("http://169.254.169.254/latest/meta-data", r"host '169.254.169.254' is refused"),
        ("file:///etc/hostname", r"'file:///etc/hostname' is refused: only http and https"),
        ("ftp://127.0.0.1/x", r"only http and https"),
        ("data:image/png;base64,AAAA", r"only http and https"),
    ],
)
def test_redirects_follow_the_same_rules(port, target, sentence):
    url = f"http://127.0.0.1:{port}/redirect?to={target.format(port=port)}"
    with pytest.raises(ValueError, match=sentence):
        fetch(url, ALLOWED)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("missing", r"cannot fetch '.*missing': the server answers 404"),
        ("short", r"the connection broke after|IncompleteRead"),
        ("liar", r"the body has 1000000000000 bytes or more, and the limit is"),
        ("redirect?to=/redirect?to=/picture", None),
    ],
)
def test_servers_that_do_not_deliver(port, path, sentence):
    url = f"http://127.0.0.1:{port}/{path}"
    if sentence is None:
        assert fetch(url, ALLOWED) == PNG
        return
    with pytest.raises(OSError, match=sentence):
        fetch(url, ALLOWED)


def test_endless_redirects_end(port, monkeypatch):
    monkeypatch.setattr(
        Handler, "answer_redirect", lambda self, target: self.send(302, {"Location": "/redirect"})
    )
    with pytest.raises(OSError, match=r"more than 5 redirects"):
        fetch(f"http://127.0.0.1:{port}/redirect", ALLOWED)


@pytest.mark.parametrize("path", ["picture", "unannounced"])
def test_size_limit(port, path):
    url = f"http://127.0.0.1:{port}/{path}"
    assert fetch(url, ALLOWED, max_bytes=len(PNG)) == PNG
    with pytest.raises(
        OSError, match=rf"the body has {len(PNG)} bytes or more, and the limit is {len(PNG) - 1}"
    ):
        fetch(url, ALLOWED, max_bytes=len(PNG) - 1)


def test_size_limit_stops_an_endless_body(port, monkeypatch):
    monkeypatch.setattr(kimi_media, "FETCH_TIMEOUT_S", HANG_S)
    with pytest.raises(OSError, match=r"the body has 1\d{6} bytes or more, and the limit is 1000000"):
        fetch(f"http://127.0.0.1:{port}/endless", ALLOWED, max_bytes=10**6)


@pytest.mark.parametrize("path", ["slow", "silent"])
def test_time_limit_counts_for_the_whole_fetch(port, path, monkeypatch):
    """Neither server would ever end."""
    monkeypatch.setattr(kimi_media, "FETCH_TIMEOUT_S", 0.3)
    with pytest.raises(OSError, match=r"cannot fetch '.*' within 0.3 s"):
        fetch(f"http://127.0.0.1:{port}/{path}", ALLOWED)


def test_nobody_listening():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/"
        with pytest.raises(OSError, match=rf"cannot fetch '{url}'"):
            fetch(url, ALLOWED)


def test_a_host_is_looked_up_once_and_the_checked_address_is_used(port, monkeypatch):
    """DNS rebinding: the second answer would be a private address."""
    answers = iter(["93.184.215.14", "127.0.0.1"])
    connected = []

    def getaddrinfo(host, port, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def create_connection(address, timeout):
        connected.append(address)
        raise ConnectionRefusedError("stop here")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(OSError, match="stop here"):
        fetch("http://rebind.example/x.png")
    assert connected == [("93.184.215.14", 80)]


def test_one_private_address_among_several_is_enough_to_refuse(monkeypatch):
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        for address in ("93.184.215.14", "10.1.2.3")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(ValueError, match=r"host 'mixed.example' is refused: 10.1.2.3"):
        fetch("http://mixed.example/")


def test_addresses_with_foreign_characters(port, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Handler, "answer_", lambda self, _: asked.append(self.path) or self.answer_picture(""), raising=False
    )
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.answer_(""))
    assert fetch(f"http://127.0.0.1:{port}/猫 a%20b.png?q=é&x=1", ALLOWED) == PNG
    assert asked == ["/%E7%8C%AB%20a%20b.png?q=%C3%A9&x=1"]


def test_tls_verifies_the_name_not_the_address(monkeypatch):
    wrapped = []
    context = SimpleNamespace(wrap_socket=lambda sock, server_hostname, **_: wrapped.append(server_hostname))
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: None)
    connection = PinnedConnection("https", "example.org", 443, "93.184.215.14", 1.0)
    assert connection.tls.check_hostname and connection.tls.verify_mode == ssl.CERT_REQUIRED
    connection.tls = context
    connection.connect()
    assert wrapped == ["example.org"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("172.16.5.5", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("2002:7f00:1::", False),  # 6to4 around 127.0.0.1
        ("64:ff9b::7f00:1", False),  # NAT64 around 127.0.0.1
        ("64:ff9b::5db8:d70e", True),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


# ------------------------------------------------------------------------------------------------------------ videos


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("way", ["path", "text", "bytes", "data URI", "base64", "url", "media"])
def test_every_way_to_give_a_video(clip, way, decoder, port, monkeypatch):
    data = clip.read_bytes()
    text = base64.b64encode(data).decode()
    monkeypatch.setattr(Handler, "answer_clip", lambda self, _: self.send(200, {}, data), raising=False)
    source = {
        "path": clip,
        "text": str(clip),
        "bytes": data,
        "data URI": f"data:video/mp4;base64, {text}",
        "base64": text,
        "url": {"url": f"http://127.0.0.1:{port}/clip"},
        "media": SimpleNamespace(media=clip),
    }[way]
    video = open_video(source, decoder=decoder, allowed_hosts=ALLOWED)
    assert (video.num_frames, video.fps, video.size) == (60, 30.0, (64, 48))
    assert [index_of(video.read(index)) for index in (0, 17, 33, 59)] == [0, 17, 33, 59]
    assert index_of(video.read(5)) == 5, "backwards as well"


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("name", "codec"), [("clip.mkv", "libx264"), ("clip.avi", "mpeg4"), ("clip.webm", "libvpx-vp9")]
)
def test_other_containers(tmp_path, name, codec, decoder):
    """Matroska and WebM do not say how many frames they have."""
    video = open_video(write_clip(tmp_path / name, num_frames=12, codec=codec), decoder=decoder)
    assert (video.num_frames, video.fps) == (12, 30.0)
    assert index_of(video.read(11)) == 11


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_turned_upright(tmp_path, decoder):
    path = write_clip(tmp_path / "phone.mp4", num_frames=21)
    turn_upright(path)
    video = open_video(path, decoder=decoder)
    pixels = np.asarray(video.read(20))
    assert video.size == (48, 64) and pixels.shape == (64, 48, 3)
    # A quarter turn clockwise brings the dark left half to the top.
    assert abs(pixels[:32].mean() - (grey(20) - 40)) < 4 and abs(pixels[32:].mean() - grey(20)) < 4


@pytest.mark.parametrize("width", [18, 48, 62])
@pytest.mark.skipif("decord" not in DECODERS, reason="decord has no wheel for this platform")
def test_narrow_frames_are_the_same_from_both_decoders(tmp_path, width):
    """decord gives frames under 64 pixels of width a wrong number of channels."""
    path = write_clip(tmp_path / "narrow.avi", num_frames=6, size=(width, 30), codec="ffv1")
    by_decord, by_pyav = (np.asarray(open_video(path, decoder=name).read(5)) for name in ("decord", "pyav"))
    assert by_decord.shape == by_pyav.shape == (30, width, 3)
    # Each has its own FFmpeg, and they may round colours differently.
    assert np.abs(by_decord.astype(int) - by_pyav).max() <= 2


def test_frames_that_are_decoded_already(clip):
    array = np.stack([np.full((10, 20, 3), grey(i), np.uint8) for i in range(6)])
    for source in (array, list(array), [Image.fromarray(frame) for frame in array]):
        video = open_video(source, fps=3.0)
        assert (video.num_frames, video.fps, video.size) == (6, 3.0, (20, 10))
        assert index_of(video.read(5)) == 5
    assert open_video(array, sample_fps=2.0).fps == 2.0, "no rate: counted as sampled"


@pytest.mark.parametrize("decoder", DECODERS)
def test_chunk_frames_decode_when_read_and_only_then(clip, decoder, monkeypatch):
    video = open_video(clip, decoder=decoder)
    decoded = []
    original = type(video).decode
    monkeypatch.setattr(
        type(video), "decode", lambda self, index: decoded.append(index) or original(self, index)
    )
    frames = ChunkFrames(video, [0, 20, 39, 59])
    assert len(frames) == 4 and frames.size == (64, 48) and decoded == []
    assert [index_of(frame) for frame in frames] == [0, 20, 39, 59]
    assert decoded == [20, 39, 59], "the first frame was decoded on opening, and is not decoded again"
    assert index_of(frames[-1]) == 59 and len(frames[1:3]) == 2


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("closed.mp4", {"gop": 60, "bf": "3"}),
        ("odd.mp4", {"gop": 7, "bf": "2"}),
        ("uneven.mp4", {"gop": 20, "bf": "2", "durations": (10, 20, 37, 5, 60)}),
        ("uneven.mkv", {"gop": 25, "bf": "3", "durations": (20, 40)}),
    ],
)
def test_every_frame_is_the_right_one_in_chunks_of_any_kind(tmp_path, name, options, decoder):
    """B-frames, groups of pictures of odd length, variable frame rates."""
    path = write_clip(tmp_path / name, preset="medium", **options)
    video = open_video(path, decoder=decoder)
    for step in (1, 2, 5, 9):
        indices = list(range(0, 60, step))
        chunks = [ChunkFrames(video, indices[start : start + 4]) for start in range(0, len(indices), 4)]
        assert [index_of(frame) for chunk in chunks for frame in chunk] == indices
    assert [index_of(video.read(index)) for index in (31, 30, 58, 2)] == [31, 30, 58, 2]


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_shown_before_the_key_frame_they_need(tmp_path, decoder):
    """Open groups of pictures: such frames come after their key frame in the file, and decord counts as if they did not
    exist when it begins to read there. PyAV is exact."""
    open_gop = {"bf": "3", "x264-params": "open-gop=1:keyint=13:min-keyint=13"}
    path = write_clip(tmp_path / "open.mp4", preset="medium", **open_gop)
    frames = [index_of(frame) for frame in ChunkFrames(open_video(path, decoder=decoder), range(60))]
    too_late = [frame - index for index, frame in enumerate(frames)]
    assert set(too_late) == {0} if decoder == "pyav" else 0 <= min(too_late) <= max(too_late) <= 3


class Watched:
    """decord's reader, and what was asked of it: frames by number, "rest" for going back to the start."""

    def __init__(self, reader):
        self.reader, self.asked = reader, []

    def __getitem__(self, index):
        self.asked.append(index)
        return self.reader[index]

    def seek(self, index):
        assert index == 0
        self.asked.append("rest")
        self.reader.seek(index)


@pytest.mark.skipif("decord" not in DECODERS, reason="decord has no wheel for this platform")
def test_a_slow_reader_of_decord_does_not_fill_the_memory(clip):
    """decord decodes ahead while nothing is read, until its thread is stopped."""
    video = open_video(clip, decoder="decord")
    video.reader = watched = Watched(video.reader)
    frames = ChunkFrames(video, [1, 20, 39, 59])
    assert [index_of(frame) for frame in frames] == [1, 20, 39, 59]
    assert index_of(frames[2]) == index_of(video.read(39)) == 39
    assert watched.asked == [1, 20, 39, 59, "rest", 39, "rest", 39, "rest"]


def test_a_slow_reader_of_pyav_does_not_fill_the_memory(clip):
    """Frames are taken from the decoder one by one, and none beyond the one that is wanted."""
    video = open_video(clip, decoder="pyav")
    taken, frames = [], video.frames
    video.frames = (taken.append(frame.pts) or frame for frame in frames)
    assert [index_of(frame) for frame in ChunkFrames(video, [5, 20])] == [5, 20]
    assert 20 <= len(taken) <= 21


@pytest.mark.skipif("decord" not in DECODERS, reason="decord has no wheel for this platform")
def test_pyav_reads_what_decord_would_decode_again_and_again(tmp_path, monkeypatch):
    often = write_clip(tmp_path / "often.mp4", gop=60)
    seldom = write_clip(tmp_path / "seldom.mp4", num_frames=90, gop=90)
    assert isinstance(open_video(often), kimi_video.DecordVideo)
    assert isinstance(open_video(seldom), kimi_video.PyAVVideo)
    assert isinstance(open_video(seldom, decoder="decord"), kimi_video.DecordVideo)

    def absent():
        raise ImportError("PyAV: No module named 'av'")

    monkeypatch.setattr(kimi_video, "import_pyav", absent)
    assert isinstance(open_video(seldom), kimi_video.DecordVideo)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("source", "kind", "sentence"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", ValueError, r"is text, not a video"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", ValueError, r"is text, not a video"),
        (b"", ValueError, r"is empty, not a video"),
        (b"\x00\x01\x02" * 100, ValueError, r"is not a video that can be decoded"),
        (PNG[:40], ValueError, r"is not a video that can be decoded|frame 0 of 1 .* cannot be decoded"),
        ("/nowhere/clip.mp4", FileNotFoundError, r"there is no file '/nowhere/clip.mp4'"),
        (f"data:image/png;base64,{BASE64}", ValueError, r"holds image/png, and video/\.\.\. is expected"),
        ([], ValueError, r"a list has no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, r"has no frames"),
        (
            np.zeros((2, 4, 4, 3), np.float32),
            ValueError,
            r"uint8 \(n, H, W, 3\); found float32 \(2, 4, 4, 3\)",
        ),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"found uint8 \(4, 4, 3\)"),
        (12, ValueError, r"a int is not a valid video source"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_videos(source, kind, sentence, decoder):
    with pytest.raises(kind, match=sentence):
        open_video(source, decoder=decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_sound_without_picture(tmp_path, decoder):
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match=r"sound.wav' (has no frames|is not a video)"):
        open_video(path, decoder=decoder)


def test_a_truncated_video_is_refused(tmp_path):
    for name, faststart in (("front.mp4", True), ("back.mp4", False)):
        path = write_clip(tmp_path / name, faststart=faststart)
        data = path.read_bytes()
        open_video(data)
        with pytest.raises(
            ValueError, match=rf"is truncated: its m\w\w\w ends at byte \d+ of {len(data) - 600}"
        ):
            open_video(data[:-600])
        path.write_bytes(data[:-600])
        with pytest.raises(ValueError, match=rf"'.*{name}' is truncated"):
            open_video(path)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_broken_frame_is_named(tmp_path, decoder):
    path = write_clip(tmp_path / "broken.avi", codec="mjpeg", num_frames=12)
    data = bytearray(path.read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 3] == b"\xff\xd8\xff"]  # of the pictures
    data[starts[6] : starts[7] - 8] = bytes(starts[7] - 8 - starts[6])  # 8 bytes of header come before each
    path.write_bytes(data)
    frame = "6" if decoder == "pyav" else "[0-6]"  # decord reads ahead
    with pytest.raises(ValueError, match=rf"^frame {frame} of 12 of '.*broken.avi' cannot be decoded.*: .+"):
        video = open_video(path, decoder=decoder)
        for index in range(7):
            assert index_of(video.read(index)) == index
    frames = open_video([Image.new("RGB", (4, 4)), b"rubbish"])
    with pytest.raises(ValueError, match=r"frame 1 of 2: 7 bytes that begin with b'rubbish' is not an image"):
        frames.read(1)


def test_choice_of_the_decoder(monkeypatch):
    assert choose_decoder().__name__ == {"decord": "DecordVideo", "pyav": "PyAVVideo"}[DECODERS[0]]
    assert choose_decoder("pyav") is kimi_video.PyAVVideo
    with pytest.raises(ValueError, match=r"decoder must be one of \('decord', 'pyav'\), not 'opencv'"):
        choose_decoder("opencv")

    def absent(name):
        def load():
            raise ImportError(f"{name}: No module named {name!r}")

        return load

    monkeypatch.setattr(kimi_video, "import_decord", absent("decord"))
    assert choose_decoder() is kimi_video.PyAVVideo
    monkeypatch.setattr(kimi_video, "import_pyav", absent("av"))
    with pytest.raises(
        ImportError, match=r"pip install decord.*pip install av.*Tried: decord: .*; av: No module"
    ):
        choose_decoder()
    assert open_video([Image.new("RGB", (4, 4))]).num_frames == 1, "frames need no decoder"
