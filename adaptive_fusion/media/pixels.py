"""One still picture in memory: its limits, and its way to upright 8-bit RGB.

Knows pixel modes, sizes and number ranges. Must not know of files, formats, containers or models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from adaptive_fusion.checks import integer, number
from adaptive_fusion.errors import AdaptiveFusionError, MediaError
from adaptive_fusion.media.scans import Samples, samples_of

Array = np.ndarray[Any, np.dtype[Any]]

ORIENTATION_TAG = 0x0112
_PILLOW_MAX_MEGAPIXELS = 178.0  # beyond twice PIL.Image.MAX_IMAGE_PIXELS Pillow itself refuses
_FLOAT_SLACK = 1e-3  # resampling and arithmetic overshoot [0, 1] by this much in honest float images


@dataclass(frozen=True)
class Limits:
    """What a picture or a clip may cost before it is refused, and how clips are sampled.

    Args:
        max_megapixels: largest accepted picture or frame, in 10^6 pixels, checked on the header before any
            decoding (64 passes 8K, 33 MP, and refuses 20000x20000). At most 178, Pillow's own ceiling.
        max_aspect: longest side over shortest side, in display pixels; Qwen's image processor stops at 200.
        video_fps: sampling rate of clips, frames per second; also the rate assumed for bare frames.
        min_frames: fewest frames sampled from a clip that has as many.
        max_frames: most frames kept of a clip.
        max_side: frames of a clip are shrunk while decoding so that no side exceeds this, in pixels.
        max_decode_megapixels: most pixels decoded for one clip (8,000 is 3,900 frames of 1080p). A longer
            video is sampled at its keyframes instead; an animated image beyond it is refused.

    Raises:
        ConfigError: a value out of range.
    """

    max_megapixels: float = 64.0
    max_aspect: float = 200.0
    video_fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 64
    max_side: int = 1280
    max_decode_megapixels: float = 8000.0

    def __post_init__(self) -> None:
        number(self.max_megapixels, "Limits.max_megapixels", above=0, high=_PILLOW_MAX_MEGAPIXELS)
        number(self.max_aspect, "Limits.max_aspect", 1)
        number(self.video_fps, "Limits.video_fps", above=0)
        integer(self.max_frames, "Limits.max_frames", 2, 4096)
        integer(self.min_frames, "Limits.min_frames", 2, self.max_frames)
        integer(self.max_side, "Limits.max_side", 1, 65536)
        number(self.max_decode_megapixels, "Limits.max_decode_megapixels", above=0)


DEFAULT = Limits()


def check_size(name: str, width: int, height: int, limits: Limits) -> None:
    """Raise MediaError, naming size and limit, for sizes that are empty, too large or too narrow."""
    if width < 1 or height < 1:
        raise MediaError(f"{name} is {width}x{height} pixels; both sides must be at least 1")
    megapixels = width * height / 1e6
    if megapixels > limits.max_megapixels:
        raise MediaError(
            f"{name} is {width}x{height} pixels ({megapixels:.1f} megapixels); "
            f"at most {limits.max_megapixels:g} megapixels are accepted"
        )
    aspect = max(width, height) / min(width, height)
    if aspect > limits.max_aspect:
        raise MediaError(
            f"{name} is {width}x{height} pixels, an aspect of {aspect:.1f}:1; "
            f"at most {limits.max_aspect:g}:1 is accepted"
        )


def fit(width: int, height: int, max_side: int) -> tuple[int, int]:
    """(width, height) shrunk, if needed, so that no side exceeds `max_side`; both stay at least 1."""
    scale = min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into MediaError.

    Pillow and FFmpeg raise some twenty kinds of exception on hostile bytes, and their texts carry absolute
    paths and memory addresses; so the text stays in `__cause__` and the message says only what is wrong.
    """
    try:
        yield
    except AdaptiveFusionError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is larger than {_PILLOW_MAX_MEGAPIXELS:g} megapixels") from error
    except Exception as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        broken = (
            "is broken, or of a variant that is not read," if isinstance(error, UnidentifiedImageError) else "is broken"
        )
        wrong = "is cut short" if cut else f"{broken} and cannot be decoded"
        raise MediaError(f"{name} {wrong} ({type(error).__name__}); give a complete, valid file") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB copy of a PIL image of any mode; the input stays as it is.

    EXIF orientation is applied and transparency is laid on white; where zero is white (TIFF) it comes out white.
    Samples of more than 8 bits are rescaled, never clipped: unsigned 16-bit over 0..65535 (12-bit over 0..4095);
    32-bit integers and floats over the smallest of 0..1 (floats only), 0..255 and 0..65535 that holds the data, else
    from minimum to maximum; NaN and infinities count as 0. Colour profiles are not applied.

    Raises:
        Any exception of Pillow if the image is a broken file not yet decoded; wrap the call in `decoding`.
    """
    samples = samples_of(image)
    image.load()
    if image.getexif().get(ORIENTATION_TAG, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F") or samples.dtype:
        return Image.fromarray(_grey(np.asarray(image), samples)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if samples.white_is_zero:
        grey, *alpha = image.split()
        image = Image.merge(image.mode, (ImageChops.invert(grey), *alpha))
    if image.has_transparency_data:
        if samples.key is not None and image.info["transparency"] != samples.key:
            image = image.copy()
            image.info["transparency"] = samples.key
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
    else:
        rgb = image.convert("RGB")
    rgb.info.clear()  # a leftover orientation, palette or profile must not be applied a second time
    return rgb


def _grey(array: Array, samples: Samples) -> Array:
    """8-bit grey of one wide sample per pixel, by the rule in `to_rgb`."""
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        wide = array if samples.top == 65535 else np.minimum(array, samples.top) * (65535 / samples.top)
        grey = _from_uint16(wide.astype(np.uint16))
    else:
        grey = _from_wide(array.view(samples.dtype) if samples.dtype else array)
    if samples.white_is_zero:
        grey = 255 - grey
    if samples.key is not None:
        grey = np.where(array == samples.key, np.uint8(255), grey)
    return grey


def to_uint8(name: str, array: Array) -> Array:
    """8-bit form of a bool, uint8, uint16 (0..65535) or float (0..1) array. Raises MediaError for others."""
    kind, width = array.dtype.kind, array.dtype.itemsize
    if kind == "u" and width == 1:
        return array
    if kind == "u" and width == 2:
        return _from_uint16(array)
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind != "f":
        raise MediaError(f"{name} has dtype {array.dtype}; accepted: bool, uint8, uint16, float in [0, 1]")
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (low >= -_FLOAT_SLACK and high <= 1 + _FLOAT_SLACK):
        raise MediaError(f"{name} is a float array with values {low:g} to {high:g}; floats must be in [0, 1]")
    return (np.clip(array, 0, 1) * 255 + 0.5).astype(np.uint8)


def from_array(name: str, array: Array, limits: Limits) -> Image.Image:
    """RGB image of (H, W), (H, W, 3) or (H, W, 4) in a dtype `to_uint8` takes. Raises MediaError."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise MediaError(
            f"{name} has shape {array.shape}; accepted: (H, W), (H, W, 3), (H, W, 4); for a clip (T, H, W, 3)"
        )
    check_size(name, array.shape[1], array.shape[0], limits)
    image = Image.fromarray(np.ascontiguousarray(to_uint8(name, array)))
    return image if image.mode == "RGB" else to_rgb(image)  # Pillow's own copy already


@cache
def _uint16_table() -> Array:
    return ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _from_uint16(array: Array) -> Array:
    return _uint16_table()[array]


def _from_wide(array: Array) -> Array:
    """Rescale 32-bit integers or floats to 8 bits by the rule in `to_rgb`."""
    values = array.astype(np.float64)
    values[~np.isfinite(values)] = 0.0
    low, high = float(values.min()), float(values.max())
    tops = (1.0, 255.0, 65535.0) if array.dtype.kind == "f" else (255.0, 65535.0)
    top = next((t for t in tops if low >= 0 and high <= t), None)
    if top is None:
        # Halving first keeps max - min finite when both ends are near the largest double.
        values, top = values / 2 - low / 2, max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    return (values / top * 255 + 0.5).astype(np.uint8)
