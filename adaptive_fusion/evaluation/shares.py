"""An image at a share of its native pixels, and how what is kept of it depends on the share.

*Native* is what the processors of the released models make of an image; shares are of its pixels. Knows their limits,
the steps of the general ladder and curves over shares. Must not know of policies, models or where images come from.
"""

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from adaptive_fusion.models.base import Size
from adaptive_fusion.models.resize import resized

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Sides = tuple[int, int]
"""Width and height in pixels."""

SHARES = (1.0, 0.71, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)
"""Steps of the general ladder, as shares of native pixels, largest first."""

ENOUGH = 0.98
"""Part kept from which on a share counts as sufficient."""

LEAST_CHARACTERS = 21
"""An image with fewer on it is left out where text is judged: one word more or less would decide."""

RELEASED = SimpleNamespace(
    patch_size=16, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 65_536, "longest_edge": 16_777_216}
)
"""Patches and limits, in pixels, of the released models' image processors."""

TOKEN_PIXELS = (RELEASED.patch_size * RELEASED.merge_size) ** 2
"""Pixels that become one visual token."""

BELOW = 0.3
"""What each halving of the share costs below the smallest one that was read: about what it does there on average."""


def within(file: Sides, max_pixels: int | None = None) -> Sides:
    """Sides that the processor gives an image file of these sides, natively or within `max_pixels`."""
    height, width = resized(RELEASED, Size(1, file[1], file[0]), max_pixels)
    return width, height


def sized(file: Sides, share: float) -> Sides:
    """Sides that the processor gives an image file with a share of its native pixels, rounded as a rung's is."""
    native = within(file)
    return within(file, round(share * math.prod(native))) if share < 1 else native


def shown(image: Image.Image, small: Sides) -> Bytes:
    """(H, W, 3) uint8 RGB of native size that shows no more than `small` sides of pixels do.

    Scaled back up, so that a reader's own smallest size is not what is measured.
    """
    seen = image.resize(small, Image.Resampling.BICUBIC)
    return np.asarray(seen.resize(within(image.size), Image.Resampling.BICUBIC))


def shares_to_read(kept: Mapping[float, float]) -> Iterator[float]:
    """Shares to read next, while `kept` grows by them: a bisection of `SHARES` for the smallest that is sufficient.

    It takes it that a larger share keeps no less; `kept` has the share 1.
    """
    low, high = 0, len(SHARES)  # SHARES[low] is known to be sufficient, SHARES[high] not to be
    while high - low > 1:
        middle = (low + high) // 2
        if SHARES[middle] not in kept:
            yield SHARES[middle]
        low, high = (middle, high) if kept[SHARES[middle]] >= ENOUGH else (low, middle)


class Curve:
    """What is kept at any share, not falling with it: between shares that were read linear in log2 of the share, below
    the smallest `BELOW` less an octave.

    Args:
        kept: By share, at least one. A share above another one that kept more counts as keeping as much.
    """

    def __init__(self, kept: Mapping[float, float]) -> None:
        shares = sorted(kept)
        self._octaves = np.log2(shares)
        self._kept = np.maximum.accumulate([kept[share] for share in shares])

    def at(self, shares: float | Floats | tuple[float, ...]) -> Floats:
        """Kept at each of `shares`, above 0: any shape."""
        octaves = np.log2(shares)
        found = np.interp(octaves, self._octaves, self._kept)
        below = np.maximum(0.0, self._kept[0] - BELOW * (self._octaves[0] - octaves))
        return np.asarray(np.where(octaves < self._octaves[0], below, found))
