"""Images unlike any photograph, screen, page or drawing: four families, several generators each, by seed.

Noise, textures as medical scanners give them, ground seen from above, and images far out of focus. No generator reads a
file; `out_of_focus` blurs the image that it is given.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Field = np.ndarray[Any, np.dtype[np.float64]]
Rng = np.random.Generator
SIDES = (192, 1024)


def sides(rng: Rng) -> tuple[int, int]:
    """Height and width, log-uniform."""
    low, high = np.log(SIDES)
    height, width = (int(side) for side in np.exp(rng.uniform(low, high, 2)))
    return height, min(max(width, height // 2), height * 2)


def to_bytes(field: Field) -> Pixels:
    return np.asarray(np.clip(np.round(field), 0, 255), np.uint8)


def grey(field: Field) -> Pixels:
    return np.repeat(to_bytes(field)[:, :, None], 3, axis=2)


def stretched(field: Field, low: float, high: float) -> Field:
    """The field with its 1st and 99th percentile at two grey values."""
    a, b = np.quantile(field[::4, ::4], [0.01, 0.99])
    return low + (field - a) * ((high - low) / max(b - a, 1e-9))


def power_law(rng: Rng, shape: tuple[int, int], exponent: float, anisotropy: float = 1.0) -> Field:
    """Gaussian field whose amplitude falls with frequency to the power of -exponent; zero mean, unit variance."""
    size = [cv2.getOptimalDFTSize(side) for side in shape]
    radius = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None, :] * anisotropy)
    radius[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=size)) * radius**-exponent
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, size)[: shape[0], : shape[1]]
    return np.asarray((field - field.mean()) / (field.std() + 1e-12))


def falling(x: Field) -> Field:
    """From 1 to 0 around 0."""
    return np.asarray(0.5 - 0.5 * np.tanh(x / 2))


def smooth(field: Field, sigma: float) -> Field:
    return np.asarray(cv2.GaussianBlur(field, (0, 0), sigma)) if sigma > 0.1 else field


def enlarged(field: Any, shape: tuple[int, int], how: int = cv2.INTER_NEAREST) -> Any:
    return cv2.resize(field, shape[::-1], interpolation=how)


# Noise


def uniform_noise(rng: Rng) -> Pixels:
    """Every value as likely, grey or coloured, of full or of less contrast."""
    shape = sides(rng)
    channels = 3 if rng.random() < 0.6 else 1
    low, high = sorted(rng.uniform(0, 255, 2)) if rng.random() < 0.5 else (0, 256)
    values = rng.uniform(low, max(high, low + 60), (*shape, channels))
    return to_bytes(np.broadcast_to(values, (*shape, 3)))


def gaussian_noise(rng: Rng) -> Pixels:
    """Around one grey or colour."""
    shape = sides(rng)
    channels = 3 if rng.random() < 0.6 else 1
    values = rng.normal(size=(*shape, channels)) * rng.uniform(15, 90) + rng.uniform(40, 215, 3)
    return to_bytes(np.broadcast_to(values if channels == 3 else values[:, :, :1], (*shape, 3)))


def salt_and_pepper(rng: Rng) -> Pixels:
    """Black and white pixels, or of pure colours, on one ground."""
    shape = sides(rng)
    ground = np.full((*shape, 3), rng.uniform(0, 255))
    share = rng.uniform(0.05, 1.0)
    if rng.random() < 0.3:  # each channel by itself
        hit, value = rng.random((*shape, 3)) < share, 255.0 * (rng.random((*shape, 3)) < 0.5)
    else:
        hit, value = rng.random((*shape, 1)) < share, 255.0 * (rng.random((*shape, 1)) < 0.5)
    return to_bytes(np.where(hit, value, ground))


def blocky_noise(rng: Rng) -> Pixels:
    """Noise of which each value is a block of pixels."""
    shape = sides(rng)
    size = int(rng.integers(2, 25))
    small = (shape[0] // size + 1, shape[1] // size + 1, 3 if rng.random() < 0.6 else 1)
    values = rng.uniform(0, 255, small) if rng.random() < 0.6 else rng.normal(128, rng.uniform(30, 80), small)
    blocks = np.repeat(np.repeat(values, size, axis=0), size, axis=1)[: shape[0], : shape[1]]
    return to_bytes(np.broadcast_to(blocks, (*shape, 3)))


def coloured_noise(rng: Rng) -> Pixels:
    """Neighbours that are alike: fields with falling or rising spectra, in colour or grey."""
    shape = sides(rng)
    exponent = rng.uniform(-0.6, 1.0)
    count = 3 if rng.random() < 0.7 else 1
    fields = np.stack([power_law(rng, shape, exponent) for _ in range(count)], axis=2)
    return to_bytes(np.broadcast_to(128 + fields * rng.uniform(25, 70), (*shape, 3)))


def dotted_noise(rng: Rng) -> Pixels:
    """Two values only, or long-tailed ones, now and then smoothed a little."""
    shape = sides(rng)
    if rng.random() < 0.5:
        values = 255.0 * (rng.random(shape) < rng.uniform(0.1, 0.9))
    else:
        values = rng.exponential(rng.uniform(30, 90), shape)
    return grey(smooth(values, rng.choice([0.0, 0.0, 0.6, 1.0])))


# Textures as scanners give them: grey, soft, without edges that were drawn


def tissue(rng: Rng) -> Pixels:
    """A power-law field, as of mammograms (exponent near 1.5)."""
    shape = sides(rng)
    field = power_law(rng, shape, rng.uniform(1.0, 2.2), rng.uniform(0.7, 1.5))
    grain = rng.normal(size=shape) * rng.uniform(0, 6)
    return grey(stretched(field, rng.uniform(0, 70), rng.uniform(140, 250)) + grain)


def soft_blobs(rng: Rng) -> Pixels:
    """Round bodies with soft edges, of several sizes, and a little grain."""
    shape = sides(rng)
    y, x = np.mgrid[: shape[0] : 2, : shape[1] : 2].astype(np.float64)
    field = np.zeros(y.shape)
    for _ in range(int(rng.integers(8, 60))):
        radius = min(shape) * np.exp(rng.uniform(np.log(0.02), np.log(0.25)))
        cy, cx, stretch = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(0.6, 1.6)
        distance = np.hypot(y - cy, (x - cx) * stretch)
        field += rng.uniform(-0.6, 1) * falling((distance - radius) / (radius * rng.uniform(0.08, 0.4)))
    field = enlarged(field, shape, cv2.INTER_LINEAR)
    grain = smooth(rng.normal(size=shape), rng.uniform(0, 1.5)) * rng.uniform(1, 12)
    return grey(stretched(field, rng.uniform(5, 60), rng.uniform(140, 245)) + grain)


def speckle(rng: Rng) -> Pixels:
    """Rayleigh statistics of coherent scatter over a slowly varying echo, log-compressed as on ultrasound screens."""
    shape = sides(rng)
    parts = [rng.normal(size=shape) for _ in range(2)]
    fine, wide = rng.uniform(0.6, 2.5), rng.uniform(1.0, 5.0)
    parts = [np.asarray(cv2.GaussianBlur(part, (0, 0), sigmaX=wide, sigmaY=fine)) for part in parts]
    envelope = np.hypot(*parts)
    echo = np.exp(power_law(rng, shape, rng.uniform(1.5, 2.5)) * rng.uniform(0.3, 1.0))
    if rng.random() < 0.4:
        return grey(stretched(envelope * echo, 0, rng.uniform(150, 240)))
    return grey(
        stretched(np.log(envelope * echo + 1e-3 * envelope.mean()), rng.uniform(-60, 10), rng.uniform(150, 240))
    )


def fan(rng: Rng) -> Pixels:
    """Speckle within the fan of a probe, black around it."""
    field = speckle(rng)
    height, width = field.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float64)
    top, reach, open_ = -height * rng.uniform(0.0, 0.3), height * rng.uniform(0.9, 1.2), rng.uniform(0.4, 0.9)
    radius, angle = np.hypot(y - top, x - width / 2), np.arctan2(x - width / 2, y - top)
    inside = (np.abs(angle) < open_) & (radius < reach) & (radius > -top + height * 0.03)
    return np.where(inside[:, :, None], field, 0).astype(np.uint8)


def slice_(rng: Rng) -> Pixels:
    """A body in cross-section: an ellipse of organs with a bright rim, on black."""
    shape = sides(rng)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    y, x = (y / shape[0] - 0.5) / rng.uniform(0.3, 0.46), (x / shape[1] - 0.5) / rng.uniform(0.3, 0.46)
    wobble = 1 + 0.05 * power_law(rng, shape, 2.5)
    radius = np.hypot(y, x) * wobble
    inside = falling((radius - 1) / 0.015)
    rim = np.exp(-(((radius - 0.93) / rng.uniform(0.02, 0.06)) ** 2)) * rng.uniform(40, 150)
    texture = stretched(power_law(rng, shape, rng.uniform(1.2, 2.2)), rng.uniform(30, 80), rng.uniform(110, 190))
    organs = np.zeros(shape)
    for _ in range(int(rng.integers(2, 9))):
        cy, cx, size = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), rng.uniform(0.08, 0.35)
        distance = np.hypot(y - cy, (x - cx) * rng.uniform(0.6, 1.6))
        organs += rng.uniform(-70, 70) * falling((distance - size) / 0.02)
    grain = smooth(rng.normal(size=shape), rng.uniform(0.3, 1.2)) * rng.uniform(2, 15)
    return grey(inside * (texture + organs + rim + grain) + np.abs(rng.normal(size=shape)) * rng.uniform(0, 4))


def radiograph(rng: Rng) -> Pixels:
    """Soft bright bands over a soft ground, as ribs over a lung."""
    shape = sides(rng)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    ground = stretched(power_law(rng, shape, rng.uniform(1.8, 2.6)), rng.uniform(20, 70), rng.uniform(130, 190))
    period, bend = shape[0] / rng.uniform(4, 11), rng.uniform(-0.3, 0.3) * shape[0]
    phase = (y + bend * ((x / shape[1] - 0.5) * 2) ** 2) / period
    bands = np.maximum(0, np.sin(2 * np.pi * phase)) ** rng.uniform(0.5, 2) * rng.uniform(10, 45)
    spine = np.exp(-((((x / shape[1]) - rng.uniform(0.3, 0.7)) / 0.08) ** 2)) * rng.uniform(0, 70)
    grain = smooth(rng.normal(size=shape), rng.uniform(0.3, 1.5)) * rng.uniform(1, 10)
    return grey(smooth(ground + bands + spine, rng.uniform(1, 3)) + grain)


# Ground from above: patches of different texture, no text


def earth(rng: Rng) -> Field:
    """A colour of fields, woods, soil, water or roofs, 0 to 255."""
    grounds = (
        (70, 95, 50),
        (110, 125, 65),
        (150, 130, 90),
        (185, 170, 125),
        (45, 65, 40),
        (50, 75, 95),
        (125, 120, 115),
    )
    return np.asarray(grounds[rng.integers(len(grounds))] + rng.normal(size=3) * 14)


def ground(rng: Rng, shape: tuple[int, int]) -> Field:
    """(H, W, 3): one patch of texture: furrows, crowns of trees, grain or nothing much."""
    kind = rng.integers(5)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    if kind == 0:
        angle, period = rng.uniform(0, np.pi), rng.uniform(3, 12)
        texture = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period) * rng.uniform(5, 22)
    elif kind == 1:
        texture = smooth(rng.normal(size=shape), rng.uniform(1, 3)) * rng.uniform(40, 110)
    elif kind == 2:
        texture = smooth(rng.normal(size=shape), rng.uniform(0.5, 4))
        texture *= rng.uniform(4, 25) / (texture.std() + 1e-9)
    else:
        texture = power_law(rng, shape, rng.uniform(0.4, 1.8)) * rng.uniform(5, 25)
    grain = rng.uniform(0, 9) if rng.random() < 0.6 else 0.0
    texture = texture + rng.normal(size=shape) * grain
    return np.asarray(earth(rng) + texture[:, :, None])


def patchwork(rng: Rng, cell: Pixels, count: int, shape: tuple[int, int]) -> Field:
    """Each cell of a map, (H, W) of numbers below `count`, shows one of some textures in a shade of its own."""
    textures = [ground(rng, shape) for _ in range(min(count, 7))]
    found = np.zeros((*shape, 3))
    chosen, shade = rng.integers(len(textures), size=count), rng.normal(size=(count, 3)) * 12
    for index, texture in enumerate(textures):
        mask = chosen[cell] == index
        found[mask] = texture[mask]
    return np.asarray(found + shade[cell])


def fields(rng: Rng) -> Pixels:
    """Cells of a Voronoi map, with paths between them now and then."""
    shape = sides(rng)
    count = int(rng.integers(12, 90))
    small = (shape[0] // 2 + 1, shape[1] // 2 + 1)
    y, x = np.mgrid[: small[0], : small[1]].astype(np.float64)
    points = rng.uniform(0, 1, (count, 2)) * small
    stretch = rng.uniform(0.6, 1.6)
    distance = np.stack([np.hypot(y - cy, (x - cx) * stretch) for cy, cx in points])
    cell = enlarged(distance.argmin(axis=0).astype(np.uint8), shape)
    image = patchwork(rng, cell, count, shape)
    if rng.random() < 0.6:
        nearest = np.partition(distance, 1, axis=0)[:2]
        path = enlarged((nearest[1] - nearest[0] < rng.uniform(0.7, 2.5)).astype(np.uint8), shape) > 0
        image[path] = earth(rng)
    return to_bytes(image)


def parcels(rng: Rng) -> Pixels:
    """Rectangular parcels, turned, with hedges."""
    shape = sides(rng)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    reach = np.hypot(*shape)
    cuts = [np.sort(rng.uniform(-reach, reach, int(rng.integers(10, 60)))) for _ in range(2)]
    row, column = np.searchsorted(cuts[0], u), np.searchsorted(cuts[1], v + row_shift(rng, cuts[0], u))
    cell = (row * 61 + column * 17) % 97
    image = patchwork(rng, cell.astype(np.int64), 97, shape)
    if rng.random() < 0.5:
        hedge = (np.diff(cell, axis=0, prepend=cell[:1]) != 0) | (np.diff(cell, axis=1, prepend=cell[:, :1]) != 0)
        hedge = cv2.dilate(hedge.astype(np.uint8), np.ones((int(rng.integers(1, 5)),) * 2)) > 0
        image[hedge] = earth(rng)
    return to_bytes(image)


def row_shift(rng: Rng, cuts: Field, u: Field) -> Field:
    """Parcels of one strip are not in line with those of the next."""
    return np.asarray(rng.uniform(-40, 40, len(cuts) + 1)[np.searchsorted(cuts, u)])


def tiles(rng: Rng) -> Pixels:
    """A mosaic of square tiles, each of another place."""
    shape = sides(rng)
    size = int(np.exp(rng.uniform(np.log(16), np.log(200))))
    rows, columns = shape[0] // size + 1, shape[1] // size + 1
    image = np.zeros((rows * size, columns * size, 3))
    for i in range(rows):
        for j in range(columns):
            image[i * size : (i + 1) * size, j * size : (j + 1) * size] = ground(rng, (size, size))
    return to_bytes(image[: shape[0], : shape[1]])


def town(rng: Rng) -> Pixels:
    """Roofs in rows along streets, with shadows, trees between."""
    shape = sides(rng)
    image = to_bytes(ground(rng, shape))
    street = int(rng.integers(40, 120))
    for y in range(int(rng.integers(street)), shape[0], street):
        cv2.rectangle(image, (0, y), (shape[1], y + int(rng.integers(4, 12))), (120, 118, 115), -1)
    for _ in range(int(shape[0] * shape[1] / rng.uniform(900, 4000))):
        centre, size = (rng.uniform(0, shape[1]), rng.uniform(0, shape[0])), tuple(rng.uniform(8, 30, 2))
        turn = float(rng.choice([0, 90]) + rng.normal() * 4)
        box = cv2.boxPoints((centre, size, turn)).astype(np.int32)
        cv2.fillConvexPoly(image, box + 3, (40, 42, 38))
        cv2.fillConvexPoly(image, box, tuple(float(c) for c in rng.uniform(90, 210) + rng.normal(size=3) * 20))
    return to_bytes(image + rng.normal(size=image.shape) * rng.uniform(3, 9))


def wilderness(rng: Rng) -> Pixels:
    """Land cover that follows the height of a landscape, with a river."""
    shape = sides(rng)
    height = power_law(rng, shape, rng.uniform(1.6, 2.4))
    level = np.digitize(height, np.sort(rng.uniform(-1.8, 1.8, int(rng.integers(3, 7)))))
    image = patchwork(rng, level, 8, shape)
    if rng.random() < 0.6:
        bend = power_law(rng, shape, 2.4)
        image[np.abs(bend) < rng.uniform(0.01, 0.06)] = (55, 80, 95)
    light = power_law(rng, shape, 1.5)
    return to_bytes(image + light[:, :, None] * rng.uniform(2, 14))


# Far out of focus


def gaussian_blur(rng: Rng, image: Pixels) -> Pixels:
    """A standard deviation of 6 to 16 pixels."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(6, 16)), np.uint8)


def lens_blur(rng: Rng, image: Pixels) -> Pixels:
    """A disc of 12 to 28 pixels' radius."""
    radius = int(rng.integers(12, 29))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disc = (np.hypot(y, x) <= radius).astype(np.float32)
    return np.asarray(cv2.filter2D(image, -1, disc / disc.sum()), np.uint8)


def repeated_box_blur(rng: Rng, image: Pixels) -> Pixels:
    """A square of 17 to 41 pixels, twice."""
    side = int(rng.integers(8, 21)) * 2 + 1
    return np.asarray(cv2.blur(cv2.blur(image, (side, side)), (side, side)), np.uint8)


def reduced_and_enlarged(rng: Rng, image: Pixels) -> Pixels:
    """A sixteenth of the width and back, or less."""
    times = rng.uniform(14, 24)
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(4, int(width / times)), max(4, int(height / times))), interpolation=cv2.INTER_AREA)
    how = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)[rng.integers(3)]
    return np.asarray(cv2.resize(small, (width, height), interpolation=how), np.uint8)


NOISE = (uniform_noise, gaussian_noise, salt_and_pepper, blocky_noise, coloured_noise, dotted_noise)
MEDICAL = (tissue, soft_blobs, speckle, fan, slice_, radiograph)
SATELLITE = (fields, parcels, tiles, town, wilderness)
FAMILIES: dict[str, tuple[Callable[[Rng], Pixels], ...]] = {"noise": NOISE, "medical": MEDICAL, "satellite": SATELLITE}
BLURS: tuple[Callable[[Rng, Pixels], Pixels], ...] = (
    gaussian_blur,
    lens_blur,
    repeated_box_blur,
    reduced_and_enlarged,
)
