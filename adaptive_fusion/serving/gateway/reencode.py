"""Encoded images and clips made smaller, in their own format, to the size at which the model upstream would see them.

A picture is brought upright by its EXIF orientation and to multiples of a token's side, so that the engine's own
resize leaves it alone. JPEG keeps its quantisation tables and subsampling, PNG stays lossless, a profile is kept;
other metadata is not. The same bytes in give the same bytes out. Headers are checked before pixels are decoded.

Knows bytes, formats and sizes. Must not know of requests, plans or engines.
"""

import struct
import zlib
from io import BytesIO
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from adaptive_fusion.media.load import opened_still
from adaptive_fusion.media.pixels import DEFAULT, ORIENTATION_TAG, Limits
from adaptive_fusion.serving.gateway.clips import Reencoded, clip
from adaptive_fusion.serving.gateway.processors import ImageGrid

__all__ = ["Reencoded", "clip", "image", "left_alone", "target"]

_SIDEWAYS = range(5, 9)
"""EXIF orientations that swap width and height."""
_DRAFT = 1.0
"""JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 that is at least this many times as large as asked for."""
_ALL_COLOURS = 0
"""Pillow's number for chroma that is not subsampled."""
_WEBP_QUALITY = 90
"""Of lossy WebP, which does not say how well it was encoded."""
_PNG_OPTIONS = [
    cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP,
]  # fmt: skip
_WEBP_HEAD = 1 << 16
"""Where the name of its first chunk of pixels stands, behind a colour profile if there is one."""
_PNG_HEAD = 33
"""Bytes of signature and first chunk, after which a colour profile may stand."""
_ENCODED = ("JPEG", "PNG", "WEBP", "BMP")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")


def image(data: bytes, max_pixels: int, grid: ImageGrid, *, limits: Limits = DEFAULT) -> bytes | None:
    """The picture at `max_pixels`, encoded as it was; None where it is to be sent as it came.

    None are: what has no more tokens than asked for already, or would have to be enlarged; and what `left_alone` names.

    Args:
        data: Encoded picture.
        max_pixels: Budget, as `ImageGrid.size` takes it.
        grid: Of the model upstream.
        limits: On what the header claims.

    Raises:
        MediaError: For what is no picture or clip, is broken, or is beyond the limits.
    """
    with opened_still(data, limits=limits) as picture:
        if picture is None or _why_left(picture) is not None:
            return None
        orientation = picture.getexif().get(ORIENTATION_TAG, 1)
        width, height = picture.size[::-1] if orientation in _SIDEWAYS else picture.size
        size = target(width, height, max_pixels, grid)
        if size is None:
            return None
        small = _shrunk(picture, size[::-1] if orientation in _SIDEWAYS else size)
        if orientation in range(2, 9):
            small.getexif()[ORIENTATION_TAG] = orientation
            small = ImageOps.exif_transpose(small)
        return _encoded(small, picture, data)


def target(width: int, height: int, max_pixels: int, grid: ImageGrid) -> tuple[int, int] | None:
    """(width, height) to which `image` brings an upright picture; None where it is to be sent as it came."""
    wide, high = grid.size(width, height, max_pixels)
    size = min(wide, width), min(high, height)  # a strip thinner than a token is enlarged upstream, not here
    fewer = grid.tokens(*size) < grid.tokens(width, height)
    return size if fewer else None


def left_alone(data: bytes, *, limits: Limits = DEFAULT) -> str | None:
    """Why an encoded medium is never changed by `image`, in words for its sender; None if it can be.

    Raises:
        MediaError: As `image`.
    """
    with opened_still(data, limits=limits) as picture:
        return "it moves" if picture is None else _why_left(picture)


def _why_left(picture: Image.Image) -> str | None:
    """As `left_alone`, of an opened still."""
    form = _form(picture)
    if form not in _ENCODED:
        return f"{form} is not written again"
    if picture.mode not in _MODES:
        return f"{form} of mode {picture.mode} is not written again"
    if picture.mode == "I;16" and "transparency" in picture.info:
        return "a transparent grey of 16 bits is not written again"
    return None


def _form(picture: Image.Image) -> str:
    """The format; a JPEG of several pictures counts by its first."""
    return "JPEG" if isinstance(picture, JpegImageFile) else str(picture.format)


def _shrunk(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture's pixels at `size` (width, height, as stored), each an average of those it covers."""
    if isinstance(picture, JpegImageFile):
        picture.draft(None, (int(size[0] * _DRAFT), int(size[1] * _DRAFT)))
    picture.load()
    if picture.mode == "P" or "transparency" in picture.info:
        transparent = picture.has_transparency_data
        grey = picture.mode in ("1", "L")
        picture = picture.convert(("LA" if grey else "RGBA") if transparent else "RGB")
    elif picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode in ("LA", "RGBA") and picture.getchannel("A").getextrema() != (255, 255):
        # Pillow weighs colours by their opacity, so that what is hidden does not shine through at edges.
        return picture.resize(size, Image.Resampling.BOX)
    pixels = cv2.resize(np.asarray(picture), size, interpolation=cv2.INTER_AREA)
    return Image.frombytes(picture.mode, size, pixels.tobytes())


def _encoded(small: Image.Image, was: Image.Image, data: bytes) -> bytes:
    """`small` in the format of the picture that it was made of, whose bytes are `data`."""
    form = _form(was)
    if form == "JPEG":
        return _jpeg(small, was)
    if form == "PNG":
        return _png(small, was)
    if form == "WEBP":
        return _webp(small, was, lossless=b"VP8L" in data[:_WEBP_HEAD])
    return _written(small, form, was)


def _jpeg(small: Image.Image, was: Image.Image) -> bytes:
    # A sampling that Pillow has no name for is written with all its colours.
    sampling = max(get_sampling(was), _ALL_COLOURS)
    return _written(small, "JPEG", was, qtables=was.quantization, subsampling=sampling)  # type: ignore[attr-defined]


def _png(small: Image.Image, was: Image.Image) -> bytes:
    """A PNG whose rows are predicted from those above and packed by runs: on photographs a third of the time, and no
    more bytes, than zlib's fastest search."""
    if small.mode == "LA":  # which OpenCV does not write
        return _written(small, "PNG", was, compress_level=1, compress_type=zlib.Z_RLE)
    pixels = np.asarray(small)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    done, encoded = cv2.imencode(".png", pixels, _PNG_OPTIONS)
    assert done
    data, profile = encoded.tobytes(), was.info.get("icc_profile")
    if not profile:
        return data
    chunk = b"iCCPICC Profile\0\0" + zlib.compress(profile, 1)
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:_PNG_HEAD] + whole + data[_PNG_HEAD:]


def _webp(small: Image.Image, was: Image.Image, lossless: bool) -> bytes:
    return _written(small, "WEBP", was, lossless=lossless, quality=0 if lossless else _WEBP_QUALITY, method=0)


def _written(small: Image.Image, form: str, was: Image.Image, **options: Any) -> bytes:
    profile = was.info.get("icc_profile")
    out = BytesIO()
    small.save(out, form, **options, **({"icc_profile": profile} if profile and form != "BMP" else {}))
    return out.getvalue()
