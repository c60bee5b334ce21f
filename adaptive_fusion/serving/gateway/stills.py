"""An encoded picture decoded once: for its features, and for what is sent in its place.

Headers are checked before pixels are decoded. Knows formats, modes and pixels. Must not know of sizes that are asked
for, requests, plans or engines.
"""

import struct
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.features.image import Bytes
from adaptive_fusion.media.load import opened_still
from adaptive_fusion.media.pixels import DEFAULT, ORIENTATION_TAG, Array, Limits, to_rgb
from adaptive_fusion.media.scans import samples_of

UPRIGHT, SIDEWAYS = range(2, 9), range(5, 9)
"""EXIF orientations by which a picture has to be turned, and those of them that swap width and height."""
_ENCODED = ("JPEG", "PNG", "WEBP", "BMP")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
_WEBP_HEAD = 1 << 16
"""Where the name of its first chunk of pixels stands, behind a colour profile if there is one."""
_ALL_COLOURS = 0
"""Pillow's number for chroma that is not subsampled."""
_MOST_CHUNKS = 1 << 14
"""Of a PNG that are gone through to see what stands behind its pixels."""


class NotPlanned(AdaptiveFusionError):
    """A medium that is left as it is, and why."""


@dataclass(frozen=True)
class Still:
    """A decoded picture and what is needed to write it again as it was.

    Attributes:
        pixels: (height, width) or (height, width, channels) as it is stored, not turned; palettes and transparent
            colours are resolved.
        mode: Pillow's, of `pixels`.
        form: ``JPEG``, ``PNG``, ``WEBP`` or ``BMP``.
        orientation: EXIF's; 1 is upright.
        profile: Of colours; empty without one.
        jpeg: Its quantisation tables and sampling.
        lossless: Of WebP.
    """

    pixels: Array = field(repr=False)
    mode: str
    form: str
    orientation: int = 1
    profile: bytes = field(default=b"", repr=False)
    jpeg: dict[str, Any] = field(default_factory=dict, repr=False)
    lossless: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        height, width = self.pixels.shape[:2]
        return (height, width) if self.orientation in SIDEWAYS else (width, height)


def decoded(data: bytes, *, limits: Limits = DEFAULT) -> tuple[Still, Bytes]:
    """A picture as it is stored, and its upright RGB (height, width, 3) as `load_media` gives it.

    Args:
        data: Encoded picture.
        limits: On what the header claims.

    Raises:
        NotPlanned: For what moves, and what cannot be written again as it was; nothing has been decoded then.
        MediaError: For what is no picture or clip, is broken, or is beyond the limits.
    """
    with opened_still(data, limits=limits) as picture:
        if (why := _why_left(picture)) is not None:
            raise NotPlanned(why)
        assert picture is not None
        pixels, rgb, mode = _read(picture, data)
        # Of what is not loaded by now everything is known: a PNG would be decoded to look for more.
        orientation = Image.Image.getexif(picture).get(ORIENTATION_TAG, 1)
        if rgb is None:
            rgb = upright(pixels, orientation)
        jpeg = {}
        if isinstance(picture, JpegImageFile):
            # A sampling that Pillow has no name for is written with all its colours.
            tables: Any = picture.quantization
            jpeg = {"qtables": tables, "subsampling": max(get_sampling(picture), _ALL_COLOURS)}
        form = _form(picture)
        still = Still(
            pixels,
            mode,
            form,
            orientation,
            picture.info.get("icc_profile") or b"",
            jpeg,
            form == "WEBP" and b"VP8L" in data[:_WEBP_HEAD],
        )
        return still, rgb


def upright(pixels: Array, orientation: int) -> Array:
    """Pixels (height, width[, channels]) turned as EXIF's `orientation` says."""
    if orientation not in UPRIGHT:
        return pixels
    turned = pixels.swapaxes(0, 1) if orientation in SIDEWAYS else pixels
    down, across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(turned[:: -1 if down else 1, :: -1 if across else 1])


def left_alone(data: bytes, *, limits: Limits = DEFAULT) -> str | None:
    """Why an encoded medium is never written again, in words for its sender; None if it can be. Decodes nothing.

    Raises:
        MediaError: As `decoded`.
    """
    with opened_still(data, limits=limits) as picture:
        return _why_left(picture)


def _why_left(picture: Image.Image | None) -> str | None:
    """As `left_alone`, of an opened still; None is what moves."""
    if picture is None:
        return "it moves"
    form = _form(picture)
    if form not in _ENCODED:
        return f"{form} is not written again"
    if picture.mode not in _MODES:
        return f"{form} of mode {picture.mode} is not written again"
    if picture.mode == "I;16" and "transparency" in picture.info:
        return "a transparent grey of 16 bits is not written again"
    return None


def _read(picture: Image.Image, data: bytes) -> tuple[Array, Bytes | None, str]:
    """The pixels as they are stored, those of `to_rgb` unless the former say them too, and the mode of the former."""
    key = samples_of(picture).key  # before it is loaded
    plain = picture.mode == "RGB" and key is None
    if plain and (pixels := _read_plain(picture, data)) is not None:
        return pixels, None, "RGB"
    rgb = None if plain else np.asarray(to_rgb(picture))
    picture.load()
    if key is not None:
        picture.info["transparency"] = key
    stored = _resolved(picture)
    # Of its own: what is read from Pillow cannot be written, which PyTorch asks for.
    return np.array(stored), rgb, stored.mode


def _read_plain(picture: Image.Image, data: bytes) -> Array | None:
    """The pixels of an RGB picture straight into an array, the same as by Pillow in half of the time, which copies them
    thrice on their way to one. None where Pillow has to read them: other forms, what is broken, and what may have more
    to say behind its pixels.
    """
    form = _form(picture)
    if form == "JPEG":
        pixels = _read_jpeg(data)
    else:
        pixels = _read_png(data) if form == "PNG" and _ends_with_pixels(data) else None
    return pixels if pixels is not None and pixels.shape == (*picture.size[::-1], 3) else None


def _read_jpeg(data: bytes) -> Array | None:
    """By torchvision: OpenCV hands out what it has read of a stream that breaks."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        planes = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None
    pixels: Array = planes.permute(1, 2, 0).numpy()  # as it lies in memory
    return pixels


def _read_png(data: bytes) -> Array | None:
    """By OpenCV: torchvision does not survive every broken one."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return None if pixels is None else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels))


def _ends_with_pixels(data: bytes) -> bool:
    """Whether a PNG of 8 bits without interlace has nothing behind its pixels, such as an orientation."""
    if data[24] != 8 or data[28]:
        return False
    at, before = 8, b""
    for _ in range(_MOST_CHUNKS):
        if at + 8 > len(data):
            return False
        length, name = struct.unpack_from(">I4s", data, at)
        if before == b"IDAT" != name:
            return bool(name == b"IEND")
        at, before = at + 12 + length, name
    return False


def _form(picture: Image.Image) -> str:
    """The format; a JPEG of several pictures counts by its first."""
    return "JPEG" if isinstance(picture, JpegImageFile) else str(picture.format)


def _resolved(picture: Image.Image) -> Image.Image:
    """The picture in a mode whose pixels can be averaged."""
    if picture.mode == "P" or "transparency" in picture.info:
        transparent = picture.has_transparency_data
        grey = picture.mode in ("1", "L")
        return picture.convert(("LA" if grey else "RGBA") if transparent else "RGB")
    return picture.convert("L") if picture.mode == "1" else picture
