"""How fine the details of an image are, in its own pixels: widths of strokes, height of lines of text.

Knows how to read thin lines and small windows of a PIL image or an array, and what to measure on them. Must not know
of shares, models or policies: how many pixels are enough is for the policy to say, from these numbers.

What decides whether a reader can read is the size of the smallest text in pixels. It is measured in two steps, neither
of which passes over the whole image:

- *scan lines*, whole rows at full resolution: the pixel values of a row are cut into rising and falling flanks, wiggles
  of less than `_CONTRAST` are taken into the flank around them (the hysteresis of rainflow counting, Matsuishi & Endo
  1968), and the distance between the centres of two flanks is the width of the stroke or gap between them. The centre
  is the mean position weighed by the change, so widths are fractions of pixels where edges are smooth;
- *windows* around some of the finer strokes, as large as 40 times their width: a line of text shows as a band of rows
  full of edges between quiet rows (the projection profile of document analysis, O'Gorman 1993), and its height, about
  that of a small x, is measured where the activity falls off. What has no such band is texture.

Every length grows with the image: enlarged twice, it is twice as many pixels.
"""

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.features.image import Bytes, Pixels, _nearest, _thin_array, _thin_pil
from adaptive_fusion.media.pixels import DEFAULT, check_size, decoding, to_rgb
from adaptive_fusion.media.scans import can_be_thinned

VERSION = "1"
"""Version of these features: numbers of different versions must not be compared."""

DETAIL_FEATURES = (
    "text_height_low",  # log2 pixels: a quarter of the bands of text are lower
    "text_height",  # log2 pixels: median
    "text_share",  # share of the windows that show a band of text: 1 on a page, 0 in a photograph
    "stroke_low",  # log2 pixels: one in fifty of the strokes and gaps is narrower
    "stroke",  # log2 pixels: a quarter of the strokes and gaps are narrower
    "stroke_count",  # ln(1 + strokes and gaps per 1,000 pixels of scan line)
    "stroke_contrast",  # median contrast of strokes, of 1
    "flank",  # log2 pixels: a tenth of the flanks are steeper (standard deviation of where the change is); blur
    "octave_1",  # log2 of the mean difference of pixels 2 apart over that of neighbours: 1 on smooth ground, 0 at noise
    "octave_2",  # the same of 4 and 2
    "octave_4",  # the same of 8 and 4
)
"""Names in the order of `detail_features`; all values are finite."""

_CONTRAST = 32
_SCAN_PIXELS = 1 << 16
_CHANGES = 5_000  # pixels that differ from their neighbour; of busy images fewer lines are read
_WINDOWS = 28
_ROWS, _COLUMNS = 40, 24  # samples of a window, a stroke's width apart
_FINER = 0.5  # share of the strokes, the finer ones, that windows are laid around
_FALL = 0.3  # of the activity within a band: where it ends
_QUIET = 0.2  # of the activity within a band: at most between two
_BAND = (3.0, 14.0)  # height over stroke width of a band that may be text
_MODES_READ_WHOLE = ("I", "F")  # their scale to 8 bits needs all pixels
_ORIENTATION_TAG = 0x0112
_NO_STROKE = 6.0  # log2 pixels: what is said of an image without any stroke
_USUAL = 2.6  # log2 of the height of a small x over the width of its strokes, where no band shows it
_LOW = 0.25  # of the heights
_LOW_STROKES = (0.02, 0.25)
_GOLDEN = 0.6180339887498949

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def detail_features(image: Pixels) -> list[float]:
    """Values of `DETAIL_FEATURES`.

    Args:
        image: PIL image of any mode, or array (H, W), (H, W, 3) or (H, W, 4) as `take_sample` has it. Lengths are in
            its pixels.

    Raises:
        MediaError: As `take_sample`.
    """
    source = _Source(image)
    rows, lines = source.lines(max(1, _SCAN_PIXELS // source.width), 1)
    strokes = _Strokes(lines, 1)
    apart = strokes.apart()
    if apart > 1:  # enlarged, or out of focus: more lines of fewer pixels say more
        rows, lines = source.lines(max(1, _SCAN_PIXELS * apart // source.width), apart)
        strokes = _Strokes(lines, apart)
    octaves = _octaves(lines)
    if not len(strokes.width):
        return [_NO_STROKE, _NO_STROKE, 0.0, _NO_STROKE, _NO_STROKE, 0.0, 0.0, _NO_STROKE, *octaves]
    order = np.argsort((strokes.width * 16).astype(np.uint16), kind="stable")  # sorts whole numbers ten times as fast
    heights, text_share = _bands(source, rows, strokes, order)
    low, quarter = (float(np.log2(strokes.width[order[int(share * len(order))]])) for share in _LOW_STROKES)
    low_height, height = (
        (heights[int(len(heights) * _LOW)], heights[len(heights) // 2]) if heights else (quarter + _USUAL,) * 2
    )
    return [
        low_height,
        height,
        text_share,
        low,
        quarter,
        float(np.log1p(1000 * len(order) / strokes.pixels)),
        float(np.partition(strokes.contrast, len(order) // 2)[len(order) // 2]) / 255,
        float(np.log2(np.partition(strokes.spread, len(order) // 10)[len(order) // 10])),
        *octaves,
    ]


class _Source:
    """Rows and windows of an image, in grey; only the pixels that are asked for are converted."""

    def __init__(self, image: Pixels) -> None:
        if isinstance(image, Image.Image):
            with decoding("PIL image"):
                check_size("PIL image", *image.size, DEFAULT)
                in_whole = image.mode in _MODES_READ_WHOLE or not can_be_thinned(image)
                if in_whole or image.mode != "RGB" or image.getexif().get(_ORIENTATION_TAG, 1) != 1:
                    image = to_rgb(image)
            self.width, self.height = image.size
        elif isinstance(image, np.ndarray):
            if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
                raise MediaError(f"array has shape {image.shape}; accepted: (H, W), (H, W, 3), (H, W, 4)")
            self.height, self.width = image.shape[:2]
            check_size("array", self.width, self.height, DEFAULT)
        else:
            raise MediaError(f"cannot measure {type(image).__name__}; accepted: PIL image, numpy array")
        self._image = image

    def lines(self, count: int, apart: int) -> tuple[Ints, Bytes]:
        """Rows spread over the height, `count` at most, and every so many of their pixels, (rows, pixels) uint8.

        They come in an order of which each first part is spread over the height, too.
        """
        count = min(count, self.height)
        order = np.argsort((np.arange(count) * _GOLDEN) % 1, kind="stable")
        if isinstance(self._image, Image.Image):
            rgb = _thin_pil(self._image, self.width // apart, count)
        else:
            rgb = _thin_array(self._image, self.width // apart, count)
        return _nearest(self.height, count)[order], np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))[order]

    def windows(self, x: Floats, y: Floats, step: Floats) -> Bytes:
        """(windows, _ROWS, _COLUMNS) uint8 around points, sampled `step` pixels apart; black outside the image."""
        left, top = x - step * _COLUMNS / 2, y - step * _ROWS / 2
        if isinstance(self._image, Image.Image):
            # One call for all: each would cost more than the reading.
            ends = np.stack([left, top, left + step * _COLUMNS, top + step * _ROWS], axis=1).tolist()
            mesh = [
                ((0, i * _ROWS, _COLUMNS, (i + 1) * _ROWS), (x0, y0, x0, y1, x1, y1, x1, y0))
                for i, (x0, y0, x1, y1) in enumerate(ends)
            ]
            stacked = self._image.transform((_COLUMNS, _ROWS * len(mesh)), Image.Transform.MESH, mesh)
            return np.asarray(stacked)[:, :, 1].reshape(len(mesh), _ROWS, _COLUMNS)
        down = np.floor(top[:, None] + step[:, None] * (np.arange(_ROWS) + 0.5)).astype(np.int64)
        across = np.floor(left[:, None] + step[:, None] * (np.arange(_COLUMNS) + 0.5)).astype(np.int64)
        inside = ((down >= 0) & (down < self.height))[:, :, None] & ((across >= 0) & (across < self.width))[:, None, :]
        down, across = down.clip(0, self.height - 1), across.clip(0, self.width - 1)
        picked = self._image[down[:, :, None], across[:, None, :]]
        flat = picked.reshape(-1, _COLUMNS, *picked.shape[3:])
        rgb = _thin_array(flat, _COLUMNS, len(flat))
        return np.where(inside, rgb[:, :, 1].reshape(len(x), _ROWS, _COLUMNS), 0).astype(np.uint8)


class _Strokes:
    """Strokes and gaps along scan lines.

    `width`, `contrast` (of the fainter flank), `spread` (of the left flank), `line` and `middle` (pixels from the left)
    have one entry each; `pixels` is how many were read.
    """

    def __init__(self, lines: Bytes, apart: int) -> None:
        columns = lines.shape[1]
        step = np.zeros(lines.shape, np.int16)
        np.subtract(lines[:, 1:], lines[:, :-1], out=step[:, :-1], dtype=np.int16)
        changes = np.flatnonzero(step.ravel() != 0)[:_CHANGES]  # of booleans it is three times as fast
        self.pixels = int(changes[-1]) + 1 if len(changes) == _CHANGES else lines.size
        size, centre, spread = _flanks(step.ravel()[changes].astype(np.float64), changes + 0.5)
        line = centre // columns
        width, contrast = centre[1:] - centre[:-1], np.minimum(size[1:], size[:-1])
        # A flank that a wiggle was taken into can have its centre outside: a width of nothing is none.
        ok = np.flatnonzero((contrast >= _CONTRAST) & (line[1:] == line[:-1]) & (width >= 0.5))
        self.width, self.contrast, self.line = width[ok] * apart, contrast[ok], line[ok].astype(np.int64)
        self.spread = spread[ok] * apart
        self.middle = (centre[ok] + width[ok] / 2) % columns * apart

    def apart(self) -> int:
        """How many pixels apart lines can be sampled without missing a flank: 1, 2, 4 or 8."""
        if not len(self.spread):
            return 1
        steep = np.log2(np.partition(self.spread, len(self.spread) // 10)[len(self.spread) // 10])
        return 1 << int(np.clip(steep + 1, 0, 3))


def _flanks(change: Floats, position: np.ndarray[Any, np.dtype[np.floating[Any]]]) -> tuple[Floats, Floats, Floats]:
    """Height, centre and spread (standard deviation) of each rising or falling flank, from left to right."""
    if not len(change):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    rising = change > 0
    starts = np.concatenate(([0], np.flatnonzero(rising[1:] != rising[:-1]) + 1))
    moment = change * position
    sums = [np.add.reduceat(values, starts) for values in (change, moment, moment * position)]
    while len(sums[0]) >= 3:
        size = np.abs(sums[0])
        wiggle = (size[1:-1] < _CONTRAST) & (size[1:-1] <= size[:-2]) & (size[1:-1] < size[2:])
        merged = np.flatnonzero(wiggle) + 1
        if not len(merged):
            break
        keep = np.ones(len(size), bool)
        keep[merged] = keep[merged + 1] = False  # it and the flank after it become part of the flank before it
        starts = np.flatnonzero(keep)
        sums = [np.add.reduceat(values, starts) for values in sums]
    swing, centre = sums[0], sums[1] / sums[0]
    variance = np.maximum(sums[2] / swing - centre * centre, 0) + 1 / 12  # a pixel's own
    return np.abs(swing), centre, np.sqrt(variance)


def _bands(source: _Source, rows: Ints, strokes: _Strokes, order: Ints) -> tuple[list[float], float]:
    """log2 heights, sorted, of the bands of text around the finer strokes, and the share of windows that show one."""
    finer = max(min(8, len(order)), int(len(order) * _FINER))
    chosen = order[np.linspace(0, finer - 1, min(_WINDOWS, finer)).astype(np.int64)]
    width = strokes.width[chosen]
    step = np.maximum(16, np.round(width * 16)) / 16  # sixteenths: the same pixels of a PIL image and of its array
    seen = source.windows(strokes.middle[chosen], rows[strokes.line[chosen]] + 0.5, step).reshape(-1, _COLUMNS)
    edges = cv2.absdiff(seen[:, 1:], seen[:, :-1]).astype(np.float32) @ np.ones(_COLUMNS - 1, np.float32)
    edges = edges.reshape(-1, _ROWS)
    activity = edges.copy()
    activity[:, 1:-1] = (edges[:, :-2] + 2 * edges[:, 1:-1] + edges[:, 2:]) / 4
    middle, each = _ROWS // 2, np.arange(len(chosen))
    within = activity[:, middle - 2 : middle + 3].max(axis=1)
    active = activity >= _FALL * within[:, None]
    up, down = np.argmin(active[:, middle::-1], axis=1), np.argmin(active[:, middle:], axis=1)
    beyond = np.arange(3)[:, None]
    above = activity[each, np.maximum(0, middle - up - beyond)].min(axis=0)
    below = activity[each, np.minimum(_ROWS - 1, middle + down + beyond)].min(axis=0)
    height = (up + down - 1) * step
    in_strokes = height / width
    text = (up > 0) & (down > 0) & (in_strokes >= _BAND[0]) & (in_strokes <= _BAND[1])
    text &= np.maximum(above, below) <= _QUIET * within
    return np.sort(np.log2(height[text])).tolist(), float(np.count_nonzero(text)) / len(text)


def _octaves(lines: Bytes) -> list[float]:
    means = [
        float(cv2.mean(cv2.absdiff(lines[:, apart:], lines[:, :-apart]))[0]) if lines.shape[1] > apart else 0.0
        for apart in (1, 2, 4, 8)
    ]
    return [float(np.log2((far + 0.25) / (near + 0.25))) for near, far in pairwise(means)]
