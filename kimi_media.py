"""Sources of images and videos to bytes, and bytes to images, with Pillow, numpy and the standard library.

A source of an image or a video is one of

    bytes, bytearray                    the encoded file
    "data:image/png;base64,..."         a data URI; whitespace in it is ignored
    "https://...", "http://..."         fetched under the rules below
    "file:///...", path, os.PathLike    a local file
    base64 text                         if no file has that name
    {"url": any of these}               the form of the OpenAI API
    an object with `.media`             which is the source

and for an image also a PIL image, a numpy array (H, W, 3 | 1 | 4) or (H, W), or a torch tensor (3 | 1 | 4, H, W), of
uint8.

Colour is `convert("RGB")` and nothing else, as the model was trained: alpha is dropped rather than blended, EXIF
orientation is not applied, of an animation the first frame is read. Pillow's limit on decompression bombs stays on.

The author of a message chooses the address, so fetching is restricted: only http and https, at most 20 s and
MAX_DOWNLOAD_BYTES in all, at most five redirects, and every hop must lead to a public address. A host is looked up
once, all its addresses are checked, and the connection goes to the address that was checked: a second lookup could
give another one (DNS rebinding). TLS still verifies the host's name. Hosts named in `allowed_hosts` may be private.
Proxies are not used, since a proxy would do its own lookup.

Errors are one sentence. OSError: a file or an address cannot be read. ValueError: the source, or what was read, is
invalid.
"""

import base64
import binascii
import contextlib
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, UnidentifiedImageError

FETCH_TIMEOUT_S = 20.0
MAX_DOWNLOAD_BYTES = 512 * 2**20
MAX_REDIRECTS = 5
READ_BYTES = 2**16
URL_CHARACTERS = "/?%:@!$&'()*+,;=~[]"  # of a path and a query; others are percent-encoded
# Shorter text is taken for a file name with a typo, not for a file in base64: the smallest GIF has 35 bytes.
MIN_BASE64_CHARACTERS = 40
BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address, RFC 6052


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefixes the message of a ValueError or OSError with `where`."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = next(kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind))
        raise kind(f"{where}: {error}") from error


def describe(source: Any) -> str:
    """A short name of a source for messages: path, address, or first bytes."""
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes that begin with {bytes(source[:16])!r}"
    if isinstance(source, (str, os.PathLike)):
        return repr(shortened(os.fsdecode(source)))
    return f"a {type(source).__name__}"


def shortened(text: str) -> str:
    """The beginning of a long path, address or data URI, and of the first two the end, where the name of the file is.
    Without the query of an address, which may contain a signature."""
    if len(text) <= 120:
        return text
    if text[:5].lower() == "data:":
        return f"{text[:60]}..."
    if text[:5].lower().startswith("http"):
        text = re.split(r"[?#]", text, maxsplit=1)[0] + "?"
    return f"{text[:60]}...{text[60:][-50:]}"


def drain(items: list[Any]) -> Iterator[Any]:
    """The items, each removed from the list before it is yielded, so that no decoded image is kept until the end."""
    items.reverse()
    while items:
        yield items.pop()


# Bytes


def unwrap(source: Any) -> Any:
    """The source without {"url": ...} and without an object that has it as `.media`."""
    if isinstance(source, Mapping):
        if source.get("url") is None:
            raise ValueError(f"expected a dict with 'url', found the keys {list(source)}")
        return unwrap(source["url"])
    return unwrap(source.media) if hasattr(source, "media") else source


def read_source(source: Any, kind: str, allowed_hosts: Collection[str] = ()) -> bytes | Path:
    """The encoded file as bytes, or the path of a local one. `kind` is "image" or "video"."""
    if isinstance(source, (bytes, bytearray)):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return existing_file(Path(source))
    if not isinstance(source, str):
        raise ValueError(f"a {type(source).__name__} is not a valid {kind} source")
    scheme = source[: source.find(":")].strip().lower() if ":" in source[:16] else ""
    if scheme == "data":
        return decode_data_uri(source, kind)
    if scheme in ("http", "https"):
        return fetch(source.strip(), allowed_hosts)
    if scheme == "file":
        return existing_file(Path(url2pathname(urlsplit(source).path)))
    if "://" in source[:16]:
        raise ValueError(f"the scheme of {describe(source)} is not one of http, https, file and data")
    compact = "".join(source.split())
    if len(compact) >= MIN_BASE64_CHARACTERS and BASE64.fullmatch(compact) and not os.path.isfile(source):
        return decode_base64(compact)
    return existing_file(Path(source))


def existing_file(path: Path) -> Path:
    if not os.path.isfile(path):  # unlike Path.is_file, takes names that the system finds too long
        raise FileNotFoundError(f"there is no file {describe(path)}")
    return path


def decode_data_uri(uri: str, kind: str) -> bytes:
    """The bytes in `data:TYPE;base64,...`. TYPE must be of this kind, application/octet-stream or absent."""
    header, comma, body = uri.partition(",")
    media_type, *parameters = header.strip()[len("data:") :].split(";")
    media_type = media_type.strip().lower()
    if not comma or "base64" not in (parameter.strip() for parameter in parameters):
        raise ValueError(f"the data URI {describe(uri)} is not of the form data:{kind}/...;base64,...")
    if media_type not in ("", "application/octet-stream") and not media_type.startswith(f"{kind}/"):
        raise ValueError(f"the data URI {describe(uri)} holds {media_type}, and {kind}/... is expected")
    return decode_base64(body)


def decode_base64(text: str) -> bytes:
    """Decodes standard or URL-safe base64; whitespace and missing padding are accepted, other errors are not."""
    compact = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"bad base64 in {describe(text)}: {error}") from None


# Addresses


class PinnedConnection(http.client.HTTPConnection):
    """HTTP or HTTPS to `host`, connected to an address that was looked up and checked before."""

    sock: Any

    def __init__(self, scheme: str, host: str, port: int, address: str, timeout_s: float):
        super().__init__(host, port, timeout=timeout_s)
        self.address = address
        self.tls = ssl.create_default_context() if scheme == "https" else None
        self.default_port = 443 if self.tls else 80  # left out of the Host header

    def connect(self) -> None:
        """Opens the socket; `handshake` follows, under the deadline."""
        self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.tls:
            self.sock = self.tls.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )

    def handshake(self) -> None:
        if self.tls:
            self.sock.do_handshake()


def fetch(url: str, allowed_hosts: Collection[str] = (), max_bytes: int = MAX_DOWNLOAD_BYTES) -> bytes:
    """The body of an http(s) URL, fetched under the rules in the module docstring.

    `allowed_hosts`: host names or addresses, as written in the URL, that may be loopback or private.
    """
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    address = url
    for _ in range(MAX_REDIRECTS + 1):
        try:
            body, location = request(address, allowed_hosts, max_bytes, deadline)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError) or time.monotonic() >= deadline:
                raise OSError(f"cannot fetch {describe(url)} within {FETCH_TIMEOUT_S:g} s") from None
            raise OSError(f"cannot fetch {describe(url)}: {error}") from error
        if location is None:
            return body
        address = urljoin(address, location)
    raise OSError(f"cannot fetch {describe(url)}: more than {MAX_REDIRECTS} redirects")


def request(
    url: str, allowed_hosts: Collection[str], max_bytes: int, deadline: float
) -> tuple[bytes, str | None]:
    """One hop: the body and None, or no bytes and the next address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{describe(url)} is refused: only http and https addresses are fetched")
    host = parts.hostname.encode("idna").decode("ascii")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = checked_address(host, port, allowed_hosts)
    connection = PinnedConnection(parts.scheme, host, port, address, seconds_left(deadline))
    with contextlib.closing(connection):
        connection.connect()
        with cut_off(connection.sock, deadline):
            connection.handshake()
            target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), URL_CHARACTERS)
            connection.request("GET", target, headers={"User-Agent": "kimi-k2.7-code", "Accept": "*/*"})
            response = connection.getresponse()
            location = response.getheader("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                return b"", location
            if response.status != 200:
                raise OSError(f"the server answers {response.status} {response.reason}")
            return read_body(response, max_bytes), None


def read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """The whole body. The length that the server announces is used only to reject a body before it is read."""
    announced = response.length or 0
    chunks, size = [], 0
    while announced <= max_bytes and size <= max_bytes and (chunk := response.read1(READ_BYTES)):
        chunks.append(chunk)
        size += len(chunk)
    if max(size, announced) > max_bytes:
        raise OSError(f"the body has {max(size, announced)} bytes or more, and the limit is {max_bytes}")
    if size < announced:
        raise OSError(f"the connection broke after {size} of {announced} bytes")
    return b"".join(chunks)


@contextlib.contextmanager
def cut_off(connected: socket.socket, deadline: float) -> Iterator[None]:
    """Shuts the socket down at the deadline. The socket's own timeout starts again with each byte, so a server that sends
    single bytes could hold the caller for hours."""

    def shut() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not the TLS object's, which is in use

    timer = threading.Timer(seconds_left(deadline), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
        seconds_left(deadline)  # raises: a body without a length looks complete when it was cut off
    finally:
        timer.cancel()


def seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def checked_address(host: str, port: int, allowed_hosts: Collection[str]) -> str:
    """An address of `host`, once all its addresses are found to be public or the host is allowed by name."""
    if isinstance(allowed_hosts, str):  # `in` would find substrings of it
        allowed_hosts = [allowed_hosts]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if host not in allowed_hosts and not is_public(address):
            raise ValueError(
                f"host {host!r} is refused: {address} is a loopback, private or reserved address; "
                f"allowed_hosts=[{host!r}] would allow it"
            )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address inside an IPv6 one, is public."""
    ip = ipaddress.ip_address(address.partition("%")[0])  # behind % a link-local address names its interface
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


# Images


def open_image(source: Any, allowed_hosts: Collection[str] = ()) -> Image.Image:
    """A PIL image whose size is known and whose pixels may still be encoded; `to_rgb` decodes them."""
    source = unwrap(source)
    if isinstance(source, Image.Image):
        image = source
    elif hasattr(source, "ndim"):
        image = image_of_array(source)
    else:
        image = open_encoded(read_source(source, "image", allowed_hosts), describe(source))
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    return image


def open_encoded(data: bytes | Path, name: str) -> Image.Image:
    try:
        # Not from the path, which would keep its file open until the pixels are read: a call may have more images than
        # the system allows open files.
        image = Image.open(io.BytesIO(data if isinstance(data, bytes) else data.read_bytes()))
        # An MPO file, as phones write it, is a still image with a second one after it.
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is refused: {error}") from None
    except (SyntaxError, EOFError, ValueError) as error:  # Pillow raises SyntaxError for a broken header
        raise ValueError(f"{name} is a broken image: {error}") from None
    limit = Image.MAX_IMAGE_PIXELS  # up to twice that many, Pillow itself only warns
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{name} is refused: {image.width} x {image.height} pixels exceed Pillow's limit of {limit} against "
            "decompression bombs (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    if num_frames > 1:
        warnings.warn(f"{name} is an animation of {num_frames} frames; the first one is used", stacklevel=2)
    return image


def image_of_array(array: Any) -> Image.Image:
    """uint8 numpy array (H, W) or (H, W, 1 | 3 | 4), or torch tensor (1 | 3 | 4, H, W)."""
    is_tensor = not isinstance(array, np.ndarray)
    if is_tensor:
        array = array.detach().cpu().numpy()
    shape = array.shape
    if is_tensor and array.ndim == 3:
        array = array.transpose(1, 2, 0)  # (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not fits:
        raise ValueError(
            "an image array is uint8, (H, W) or (H, W, 1 | 3 | 4), or as a tensor (1 | 3 | 4, H, W); "
            f"found {array.dtype} {shape}"
        )
    if 0 in array.shape:
        raise ValueError(f"the image has no pixels: an array of shape {shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def image_size(image: Any, allowed_hosts: Collection[str] = ()) -> tuple[int, int]:
    """(width, height) without reading pixels, not even those of a tensor on an accelerator."""
    image = unwrap(image)
    if not hasattr(image, "ndim"):
        return open_image(image, allowed_hosts).size
    if image.ndim not in (2, 3):
        raise ValueError(f"an image has 2 or 3 dimensions, found the shape {tuple(image.shape)}")
    channels_last = isinstance(image, np.ndarray) or image.ndim == 2
    height, width = image.shape[:2] if channels_last else image.shape[1:]
    if not height or not width:
        raise ValueError(f"the image has no pixels: {width} x {height}")
    return int(width), int(height)


def to_rgb(image: Image.Image) -> Image.Image:
    """The decoded image in mode RGB; the same object if it is in that mode already."""
    try:
        image.load()
        # Pillow converts premultiplied alpha to RGB only by way of the plain mode.
        plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        image = image.convert(plain) if plain else image
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image is truncated or broken: {error}") from error
