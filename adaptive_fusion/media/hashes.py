"""Hashes of media: a quick one that names a medium in logs and finds duplicates, and an exact one to recognise it by.

Knows sources of media and their pixels. Must not know of models or who asks.
"""

import hashlib

import numpy as np
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import Media, MediaSource, _open_source
from adaptive_fusion.media.pixels import Array, decoding

_HASH_VERSION = "1"
_HASH_SIDE = 384  # a picture is hashed at most this large: SHA-256 over a whole 4K frame takes 17 ms
_HASH_CLIP_SIDE = 64


def content_hash(source: MediaSource) -> str:
    """SHA-256 (hex) that names a medium in logs and finds duplicates; not a cache key.

    Encoded media (paths, bytes) hash all their bytes. Decoded ones hash mode, dtype, shape and every n-th
    pixel, so that 4K takes about a millisecond; differences smaller than the step (10 pixels at 4K) can go
    unseen. An RGB image and the equal uint8 array share a hash. Every field is prefixed by its length.

    Raises:
        MediaError: the source cannot be read or is not a medium.
    """
    if isinstance(source, Video):
        return _digest("clip", repr(source.timestamps_s).encode(), *_thin(source.frames, _HASH_CLIP_SIDE))
    if isinstance(source, np.ndarray):
        side = _HASH_CLIP_SIDE if source.ndim == 4 else _HASH_SIDE
        return _digest("clip" if source.ndim == 4 else "image", *_thin(source, side))
    if isinstance(source, Image.Image):
        with decoding("PIL image"):
            return _digest("image", *_thin_image(source))
    if isinstance(source, list | tuple):
        return _digest("frames", *(content_hash(frame).encode() for frame in source))
    file = _open_source(source)
    with decoding(file.name), file.open() as stream:
        return _digest("encoded", hashlib.file_digest(stream, "sha256").digest())


def exact_hash(medium: Media) -> str:
    """SHA-256 (hex) over all that a loaded medium is, so that no two different ones share it: a key for caches.

    Of an image mode, size, palette and every pixel; of a clip dtype, shape and every pixel of every frame, with the
    times. Every field is prefixed by its length, so that neither a transpose nor another split of the same bytes is
    the same. Takes about 20 ms for 4K.
    """
    if isinstance(medium, Video):
        frames = np.ascontiguousarray(medium.frames)
        times = repr((medium.timestamps_s, medium.duration_s, medium.total_frames))
        return length_prefixed("exact clip", frames.dtype.str, repr(frames.shape), frames.data.cast("B"), times)
    # Equal indices mean nothing without their palette.
    colours = medium.convert("RGBA").tobytes() if medium.mode in ("P", "PA") else b""
    return length_prefixed("exact image", medium.mode, repr(medium.size), medium.tobytes(), colours)


def length_prefixed(*fields: str | bytes | memoryview) -> str:
    """SHA-256 (hex) over fields, each with its length before it, so that no two lists of fields run together alike."""
    digest = hashlib.sha256()
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def _digest(*fields: str | bytes) -> str:
    return length_prefixed(_HASH_VERSION, *fields)


def _steps(width: int, height: int, side: int) -> tuple[int, int]:
    return max(1, -(-width // side)), max(1, -(-height // side))


def _thin(array: Array, side: int) -> tuple[bytes, ...]:
    """Mode, dtype, shape and pixels of (H, W[, C]) or (T, H, W, C), thinned to the middle of every step."""
    if array.ndim not in (2, 3, 4) or array.size == 0 or array.dtype.kind not in "bufi":
        raise MediaError(f"array of dtype {array.dtype} and shape {array.shape} is neither an image nor a clip")
    axis = 1 if array.ndim == 4 else 0
    height, width = array.shape[axis : axis + 2]
    across, down = _steps(width, height, side)
    rows = np.arange(down // 2, height // down * down, down)
    columns = np.arange(across // 2, width // across * across, across)
    small = array.take(rows, axis).take(columns, axis + 1)  # half the time of slicing both at once
    mode = "L" if array.ndim == 2 else {3: "RGB", 4: "RGBA"}.get(array.shape[-1], "")
    return mode.encode(), array.dtype.str.encode(), repr(array.shape).encode(), small.tobytes()


def _thin_image(image: Image.Image) -> tuple[bytes, ...]:
    """The fields of `_thin` for a PIL image; nearest sampling inside Pillow picks the same pixels."""
    across, down = _steps(*image.size, _HASH_SIDE)
    width, height = image.width // across, image.height // down
    box = (0, 0, width * across, height * down)
    small = image.resize((width, height), Image.Resampling.NEAREST, box=box)
    if image.mode in ("P", "PA"):
        small = small.convert("RGBA")  # equal indices mean nothing without their palette
    dtype = "|u1" if image.mode in ("L", "RGB", "RGBA") else ""
    bands = len(image.getbands())
    shape = (image.height, image.width, bands) if bands > 1 else (image.height, image.width)
    return image.mode.encode(), dtype.encode(), repr(shape).encode(), small.tobytes()
