"""The one door for images and videos: check the header, decode within limits, raise only MediaError.

Knows where pictures come from (paths, bytes, data URLs, PIL images, arrays, frames) and which formats are let in.
Never fetches: other strings that look like URLs are refused. Must not know of complexity, budgets or models.

Formats are told apart by their first bytes, never by file name: PNG, JPEG, WebP, GIF, BMP, TIFF; MP4/MOV,
WebM/MKV, AVI. An animated GIF, WebP or APNG is a clip (`Video`) with its own frame times; a clip of one frame
is an image; of a multi-page TIFF or multi-picture JPEG the first picture counts; a PIL image stands for its
current frame. `Limits` caps what a header may claim, before decoding. Messages carry a file's name, never its
path.
"""

import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

# Registers exactly the allowed decoders, so that Pillow never goes looking for all the others.
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.boxes import FIRST_BOXES, is_movie
from adaptive_fusion.media.clips import Video, from_animation, from_frames
from adaptive_fusion.media.inline import data_url_bytes, is_data_url
from adaptive_fusion.media.pixels import DEFAULT, Array, Limits, check_size, decoding, from_array, to_rgb
from adaptive_fusion.media.scans import black_is_zero, mark_white_is_zero
from adaptive_fusion.media.video import decode_video, video_size

Media = Image.Image | Video
MediaSource = str | os.PathLike[str] | bytes | Image.Image | Array | Sequence[Image.Image | Array] | Video
_HEAD_BYTES = 32
_FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF, MP4/MOV, WebM/MKV, AVI"
_DEMUXERS = {"MP4": "mov", "MKV": "matroska", "AVI": "avi"}
_ANIMATED = ("GIF", "WEBP", "PNG")
_URL = re.compile(r"\s*([a-z][a-z0-9+.\-]+:[/\\]{2})", re.IGNORECASE)
_PLUGINS = (
    BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
)  # fmt: skip


class _File(NamedTuple):
    """Encoded media: a path or bytes, and what its first bytes say."""

    name: str
    data: Path | bytes
    head: bytes

    def open(self) -> BufferedReader | BytesIO:
        return BytesIO(self.data) if isinstance(self.data, bytes) else self.data.open("rb")


def load_media(source: MediaSource, *, limits: Limits = DEFAULT) -> Media:
    """Decode any accepted source to a plain upright RGB image or a sampled `Video`.

    Args:
        source: path, encoded bytes, ``data:`` URL in base64, PIL image, array (H, W), (H, W, 3), (H, W, 4) of
            bool, uint8, uint16 or float in [0, 1]; for a clip also an array (T, H, W, 3), a list of frames, or a
            `Video`, which is returned as it is.
        limits: sizes refused before decoding, and how clips are sampled.

    Returns:
        `PIL.Image.Image` of mode "RGB" (see `pixels.to_rgb` for how other modes get there), or `Video`.

    Raises:
        MediaError: missing, empty, broken, cut short, too large, too narrow, or of a refused format or type.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, Image.Image):
        with decoding("PIL image"):
            check_size("PIL image", *source.size, limits)
            return to_rgb(source)
    if isinstance(source, np.ndarray) and source.ndim != 4:
        return from_array("array", source, limits)
    if isinstance(source, np.ndarray | list | tuple):
        with decoding("clip"):
            return from_frames("clip", source, limits)
    file = _open_source(source)
    form = _checked_format(file, limits)
    with decoding(file.name), file.open() as stream:
        if form in _DEMUXERS:
            return decode_video(file.name, stream, _DEMUXERS[form], limits)
        with _open_pillow(file.name, stream, form, limits) as image:
            if form in _ANIMATED and getattr(image, "is_animated", False):
                return from_animation(file.name, image, limits)
            return to_rgb(image)


class Header(NamedTuple):
    """What encoded media say of themselves; sides in pixels, of a clip those of a frame."""

    kind: Literal["image", "video"]
    width: int
    height: int


def read_header(data: bytes, *, limits: Limits = DEFAULT) -> Header:
    """Kind and size of encoded media, within limits, without decoding their pixels.

    Raises:
        MediaError: Empty, of an unknown format, with a broken header, or larger or narrower than the limits.
    """
    file = _open_source(bytes(data))
    form = _checked_format(file, limits)
    with decoding(file.name), file.open() as stream:
        if form in _DEMUXERS:
            return Header("video", *video_size(file.name, stream, _DEMUXERS[form], limits))
        with _open_pillow(file.name, stream, form, limits) as image:
            moves = form in _ANIMATED and getattr(image, "is_animated", False)
            return Header("video" if moves else "image", *image.size)


@contextmanager
def opened_still(data: bytes, *, limits: Limits = DEFAULT) -> Iterator[Image.Image | None]:
    """Within this context, an encoded picture whose header is within limits and whose pixels are not decoded yet; None
    for what moves.

    Raises:
        MediaError: As `read_header`, and for whatever goes wrong when its pixels are decoded in the context.
    """
    file = _open_source(bytes(data))
    form = _checked_format(file, limits)
    if form in _DEMUXERS:
        yield None
        return
    with decoding(file.name), file.open() as stream, _open_pillow(file.name, stream, form, limits) as image:
        yield None if form in _ANIMATED and getattr(image, "is_animated", False) else image


def kind(media: Media) -> Literal["image", "video"]:
    """Which of the two a loaded medium is."""
    return "video" if isinstance(media, Video) else "image"


def _open_source(source: object) -> _File:
    """Name and first bytes of a path, bytes or data URL. Raises MediaError if it is no readable, filled file."""
    if isinstance(source, str) and is_data_url(source):
        source = data_url_bytes(source)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if not data:
            raise MediaError(f"the media bytes are empty; accepted: {_FORMATS}")
        return _File(f"media of {len(data)} bytes", data, data[:_HEAD_BYTES])
    if not isinstance(source, str | os.PathLike):
        raise MediaError(
            f"cannot load media from {type(source).__name__}; accepted: path, bytes, PIL image, numpy array, "
            f"list of frames, Video"
        )
    text = os.fspath(source)
    if not isinstance(text, str) or _URL.match(text):
        raise MediaError(
            f"{str(text)[:80]!r} is not a local path and URLs are never fetched; give a path, bytes or a data: URL"
        )
    path = Path(text)
    name = repr(path.name[-80:])
    try:
        if not path.is_file():  # also keeps out devices and pipes, which could block for ever
            state = "is not a regular file" if path.exists() else "does not exist"
            raise MediaError(f"{name} {state}; give the path of an image or video: {_FORMATS}")
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        reason = getattr(error, "strerror", None) or "not a valid path"
        raise MediaError(f"{name} cannot be read ({reason}); give the path of an image or video") from error
    if not head:
        raise MediaError(f"{name} is empty; accepted: {_FORMATS}")
    return _File(name, path, head)


def _sniff(head: bytes) -> str | None:
    """Format by magic bytes, of the allow-list only; MP4 is to be confirmed by its boxes."""
    starts = {
        b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF",
        b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
        b"\x1aE\xdf\xa3": "MKV",
    }  # fmt: skip
    for magic, form in starts.items():
        if head.startswith(magic):
            return form
    if head[:4] == b"RIFF":
        return {b"WEBP": "WEBP", b"AVI ": "AVI"}.get(head[8:12])
    return "MP4" if head[4:8] in FIRST_BOXES else None


def _declared_size(form: str, head: bytes) -> tuple[int, int] | None:
    """(width, height) of the formats that state it in their first 32 bytes; None for the others.

    Spares Pillow's own opening, which reads all chunks before the pixels and, for WebP, allocates the canvas.
    """
    if form == "PNG" and len(head) >= 24:
        return struct.unpack(">II", head[16:24])
    if form == "GIF" and len(head) >= 10:
        return struct.unpack("<HH", head[6:10])
    if form == "BMP" and len(head) >= 26 and head[14] >= 40:
        width, height = struct.unpack("<ii", head[18:26])
        return width, abs(height)  # a negative height means rows from top to bottom
    if form == "WEBP" and len(head) >= 30:
        if head[12:16] == b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        if head[12:16] == b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _checked_format(file: _File, limits: Limits) -> str:
    form = _sniff(file.head)
    if form == "MP4":
        with decoding(file.name), file.open() as stream:
            form = "MP4" if is_movie(stream) else None
    if form is None:
        raise MediaError(f"{file.name} is not an image or video of a known format; accepted: {_FORMATS}")
    if size := _declared_size(form, file.head):
        check_size(file.name, *size, limits)
    return form


def _open_pillow(name: str, opened: IO[bytes], form: str, limits: Limits) -> Image.Image:
    try:
        image = Image.open(opened, formats=(form,))
    except UnidentifiedImageError:
        opened.seek(0)
        data = black_is_zero(opened.read()) if form == "TIFF" else None
        if data is None:
            raise
        image = Image.open(BytesIO(data), formats=(form,))
        mark_white_is_zero(image)
    try:
        check_size(name, *image.size, limits)
    except MediaError:
        image.close()
        raise
    return image
