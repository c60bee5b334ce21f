"""Images that no policy is meant for, by family and seed: noise, scans of bodies, ground from above, far out of focus.

Drawn by other means than those that shipped ranges were fitted with (`training/general/strange.py`).
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Rng = np.random.Generator
SIZES = ((256, 256), (336, 448), (512, 384), (480, 640), (720, 960))


def size(rng: Rng) -> tuple[int, int]:
    return SIZES[rng.integers(len(SIZES))]


def as_image(values: Any) -> Pixels:
    """(H, W) or (H, W, 3) of any numbers, cut off at 0 and 255."""
    found = np.clip(values, 0, 255).astype(np.uint8)
    return np.dstack([found] * 3) if found.ndim == 2 else found


def soft(rng: Rng, shape: tuple[int, int], sigma: float) -> Any:
    """Smoothed noise of mean 0 and variance 1."""
    field = cv2.GaussianBlur(rng.normal(size=shape), (0, 0), sigma)
    return (field - field.mean()) / (field.std() + 1e-6)


def uniform(rng: Rng) -> Pixels:
    return rng.integers(0, 256, (*size(rng), 3), dtype=np.uint8)


def gaussian(rng: Rng) -> Pixels:
    shape = size(rng)
    return as_image(rng.normal(128, rng.uniform(20, 64), shape if rng.random() < 0.5 else (*shape, 3)))


def salt_and_pepper(rng: Rng) -> Pixels:
    values, chance, share = np.full(shape := size(rng), 128.0), rng.random(shape), rng.uniform(0.05, 0.5)
    values[chance < share / 2], values[chance > 1 - share / 2] = 0, 255
    return as_image(values)


def blocks(rng: Rng) -> Pixels:
    (height, width), side = size(rng), int(rng.choice([4, 8, 16, 32]))
    cells = rng.integers(0, 256, (-(-height // side), -(-width // side), 3))
    return as_image(np.kron(cells, np.ones((side, side, 1)))[:height, :width])


def octaves(rng: Rng) -> Pixels:
    """Enlarged noise of several scales, as clouds are drawn."""
    height, width = size(rng)
    field = sum(
        cv2.resize(
            rng.normal(size=(height // cell + 1, width // cell + 1)), (width, height), interpolation=cv2.INTER_CUBIC
        )
        * share
        for cell, share in ((64, 1), (32, 0.7), (16, 0.5), (8, 0.3), (4, 0.15))
    )
    return as_image((field - field.min()) / np.ptp(field) * rng.uniform(120, 255))


def echo(rng: Rng) -> Pixels:
    """Rayleigh speckle, brighter here and there."""
    shape = size(rng)
    field = cv2.GaussianBlur(rng.rayleigh(1, shape), (0, 0), rng.uniform(0.5, 2)) * (
        1.5 + soft(rng, shape, rng.uniform(8, 30)).clip(-1.3, 3)
    )
    return as_image(field / field.max() * 255 * rng.uniform(0.8, 1.5))


def cross_section(rng: Rng) -> Pixels:
    """Ellipses within an ellipse, smoothed, with grain, on black."""
    shape = height, width = size(rng)
    image, middle = np.zeros(shape), (width // 2, height // 2)
    axes = (int(width * rng.uniform(0.3, 0.45)), int(height * rng.uniform(0.3, 0.45)))
    cv2.ellipse(image, middle, axes, 0, 0, 360, rng.uniform(80, 140), -1)
    for _ in range(rng.integers(3, 10)):
        at = (int(middle[0] + rng.normal() * width * 0.12), int(middle[1] + rng.normal() * height * 0.12))
        axes = (int(rng.uniform(0.03, 0.12) * width), int(rng.uniform(0.03, 0.12) * height))
        cv2.ellipse(image, at, axes, rng.uniform(0, 180), 0, 360, rng.uniform(20, 230), -1)
    return as_image(cv2.GaussianBlur(image, (0, 0), rng.uniform(1.5, 5)) + rng.normal(0, rng.uniform(3, 12), shape))


def chest(rng: Rng) -> Pixels:
    """Two dark lungs, ribs, grain."""
    shape = size(rng)
    y, x = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    lungs = sum(120 * np.exp(-((x - side) ** 2 / 0.02 + (y - 0.5) ** 2 / 0.08)) for side in (0.3, 0.7))
    ribs = 12 * np.sin(2 * np.pi * (y * rng.uniform(5, 10) + 0.3 * np.abs(x - 0.5)))
    grain = soft(rng, shape, rng.uniform(1, 3)) * rng.uniform(1, 5) + rng.normal(0, rng.uniform(1, 4), shape)
    return as_image(200 - lungs + ribs + grain)


def farmland(rng: Rng) -> Pixels:
    """Voronoi cells in colours of the land, with grain; roads and roofs now and then."""
    shape = size(rng)
    points = rng.random((int(rng.integers(20, 80)), 2)) * shape
    y, x = np.mgrid[: shape[0] : 2, : shape[1] : 2]
    cell = np.stack([(y - a) ** 2 + (x - b) ** 2 for a, b in points]).argmin(axis=0).astype(np.uint8)
    cell = cv2.resize(cell, shape[::-1], interpolation=cv2.INTER_NEAREST)
    colours = rng.uniform((40, 60, 30), (170, 170, 120), (len(points), 3))
    image = as_image(colours[cell] + rng.normal(0, rng.uniform(5, 20), (*shape, 1)))
    for _ in range(rng.integers(0, 8)):
        ends = [(int(rng.uniform(0, shape[1])), row) for row in (0, shape[0])]
        cv2.line(image, *ends, (130, 125, 120), int(rng.integers(2, 8)))
    for _ in range(rng.integers(0, 60)):
        left, top = int(rng.uniform(0, shape[1])), int(rng.uniform(0, shape[0]))
        right, bottom = left + int(rng.integers(6, 30)), top + int(rng.integers(6, 30))
        cv2.rectangle(image, (left, top), (right, bottom), [int(v) for v in rng.integers(80, 220, 3)], -1)
    return image


def grid(rng: Rng) -> Pixels:
    """Square tiles, each of a colour and a texture, some with furrows."""
    height, width = size(rng)
    side = int(rng.integers(24, 100))
    image = np.zeros((height + side, width + side, 3))
    for top in range(0, height, side):
        for left in range(0, width, side):
            texture = soft(rng, (side, side), rng.uniform(0.6, 3)) * rng.uniform(5, 25)
            if rng.random() < 0.4:
                texture += np.sin(np.arange(side) * 2 * np.pi / rng.uniform(3, 10)) * rng.uniform(5, 20)
            colour = rng.uniform((50, 70, 40), (160, 160, 110))
            image[top : top + side, left : left + side] = colour + texture[:, :, None]
    return as_image(image[:height, :width])


def pixels_of_land(rng: Rng) -> Pixels:
    """Coarse cells of colour under one fine texture."""
    height, width = size(rng)
    side = int(rng.choice([16, 32, 64]))
    cells = rng.uniform(60, 160, (-(-height // side), -(-width // side), 3)) * [0.9, 1, 0.7]
    texture = sum(soft(rng, (height, width), sigma) for sigma in (1, 2, 4)) * rng.uniform(2, 7)
    return as_image(np.kron(cells, np.ones((side, side, 1)))[:height, :width] + texture[:, :, None])


def blurred(rng: Rng, image: Pixels) -> Pixels:
    """By a Gaussian of 6 to 10 pixels, by a wide box, or reduced to a sixteenth and enlarged."""
    how = rng.integers(3)
    if how == 0:
        return as_image(cv2.GaussianBlur(image, (0, 0), rng.uniform(6, 10)))
    if how == 1:
        return as_image(cv2.blur(image, (31, 31)))
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(2, width // 16), max(2, height // 16)), interpolation=cv2.INTER_AREA)
    return as_image(cv2.resize(small, (width, height), interpolation=int(rng.integers(1, 3))))


FAMILIES: dict[str, tuple[Callable[[Rng], Pixels], ...]] = {
    "noise": (uniform, gaussian, salt_and_pepper, blocks),
    "medical": (octaves, echo, cross_section, chest),
    "satellite": (farmland, grid, pixels_of_land),
}
