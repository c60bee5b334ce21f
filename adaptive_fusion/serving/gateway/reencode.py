"""Encoded images and clips made smaller, in their own format, to the size at which the model upstream would see them.

A picture is brought upright by its EXIF orientation and to multiples of a token's side, so that the engine's own
resize leaves it alone. JPEG keeps its quantisation tables and subsampling, PNG stays lossless, a profile is kept;
other metadata is not. The same bytes in give the same bytes out.

Knows pixels, formats and sizes. Must not know of requests, plans or engines.
"""

import struct
import zlib
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from adaptive_fusion.media.pixels import DEFAULT, Array, Limits
from adaptive_fusion.serving.gateway.clips import Reencoded, clip
from adaptive_fusion.serving.gateway.processors import MAX_ASPECT, ImageGrid
from adaptive_fusion.serving.gateway.stills import SIDEWAYS, NotPlanned, Still, decoded, upright

__all__ = ["Reencoded", "clip", "image", "smaller", "target"]

_WEIGHED = {"LA": "La", "RGBA": "RGBa"}
"""Modes with opacity, and those in which colours are multiplied by it."""
_WEBP_QUALITY = 90
"""Of lossy WebP, which does not say how well it was encoded."""
_PNG_OPTIONS = [
    cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP,
]  # fmt: skip
_PNG_HEAD = 33
"""Bytes of signature and first chunk, after which a colour profile may stand."""


def image(data: bytes, max_pixels: int, grid: ImageGrid, *, limits: Limits = DEFAULT) -> bytes | None:
    """The picture at `max_pixels`, encoded as it was; None where it is to be sent as it came.

    None are: what has no more tokens than asked for already, or would have to be enlarged; and what
    `stills.left_alone` names.

    Args:
        data: Encoded picture.
        max_pixels: Budget, as `ImageGrid.size` takes it.
        grid: Of the model upstream.
        limits: On what the header claims.

    Raises:
        MediaError: For what is no picture or clip, is broken, or is beyond the limits.
    """
    try:
        still, _ = decoded(data, limits=limits)
    except NotPlanned:
        return None
    return smaller(still, max_pixels, grid)


def smaller(still: Still, max_pixels: int, grid: ImageGrid) -> bytes | None:
    """As `image`, of a picture that is decoded already.

    Raises:
        MediaError: If it cannot be written.
    """
    size = target(*still.size, max_pixels, grid)
    if size is None:
        return None
    small = _shrunk(still, size[::-1] if still.orientation in SIDEWAYS else size)
    return _encoded(upright(small, still.orientation), still)


def target(width: int, height: int, max_pixels: int, grid: ImageGrid) -> tuple[int, int] | None:
    """(width, height) to which `image` brings an upright picture; None where it is to be sent as it came."""
    wide, high = grid.size(width, height, max_pixels)
    size = min(wide, width), min(high, height)  # what is rounded up is enlarged upstream, not here
    if min(size) < grid.side or max(size) > MAX_ASPECT * min(size):
        return None  # a strip thinner than a token comes out otherwise upstream, or is refused there
    fewer = grid.tokens(*size) < grid.tokens(width, height)
    return size if fewer else None


def _shrunk(still: Still, size: tuple[int, int]) -> Array:
    """The pixels at `size` (width, height, as stored)."""
    pixels, mode = still.pixels, still.mode
    if mode in _WEIGHED and pixels[..., -1].min() < np.iinfo(pixels.dtype).max:
        # Colours are weighed by their opacity, so that what is hidden does not shine through at edges.
        stored = Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()).convert(_WEIGHED[mode])
        small = resized(np.array(stored), size)
        small[..., :-1] = np.minimum(small[..., :-1], small[..., -1:])
        return np.asarray(Image.frombytes(stored.mode, size, small.tobytes()).convert(mode))
    return resized(pixels, size)


def resized(pixels: Array, size: tuple[int, int]) -> Array:
    """Pixels (height, width[, channels]) of 8 bits, or (height, width) of 16, at `size` (width, height), as the models'
    own processors resize: bicubic, over as many pixels as come together in one."""
    if pixels.dtype != np.uint8:  # rare, and PyTorch has it wrong for a picture of one column
        small = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
        return small.round().clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
    told = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])
    # One picture of so many channels, told in this order: then they stay beside each other in memory.
    planes = told[None].permute(0, 3, 1, 2)
    made = functional.interpolate(planes, size[::-1], mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return np.ascontiguousarray(made.numpy().reshape(*size[::-1], *pixels.shape[2:]))


def _encoded(small: Array, still: Still) -> bytes:
    """Upright pixels as the picture that they were made of was encoded."""
    if still.form == "PNG" and still.mode != "LA":  # which OpenCV does not write
        return _png(small, still.profile)
    picture = Image.frombytes(still.mode, small.shape[1::-1], small.tobytes())
    if still.form == "PNG":
        return _saved(picture, "PNG", still.profile, compress_level=1, compress_type=zlib.Z_RLE)
    if still.form == "WEBP":
        quality = 0 if still.lossless else _WEBP_QUALITY
        return _written(picture, still, lossless=still.lossless, quality=quality, method=0)
    return _written(picture, still, **still.jpeg)


def _png(pixels: Array, profile: bytes) -> bytes:
    """A PNG whose rows are predicted from those above and packed by runs: on photographs a third of the time, and no
    more bytes, than zlib's fastest search."""
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    done, encoded = cv2.imencode(".png", pixels, _PNG_OPTIONS)
    assert done
    data = encoded.tobytes()
    if not profile:
        return data
    chunk = b"iCCPICC Profile\0\0" + zlib.compress(profile, 1)
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:_PNG_HEAD] + whole + data[_PNG_HEAD:]


def _written(small: Image.Image, still: Still, **options: Any) -> bytes:
    return _saved(small, still.form, b"" if still.form == "BMP" else still.profile, **options)


def _saved(small: Image.Image, form: str, profile: bytes, **options: Any) -> bytes:
    out = BytesIO()
    small.save(out, form, **options, **({"icc_profile": profile} if profile else {}))
    return out.getvalue()
