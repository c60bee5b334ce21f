"""How fine the details of an image are, in its own pixels: widths of strokes, height of lines of text.

Knows how to read thin lines and small windows of a PIL image or an array, and what to measure on them. Must not know
of shares, models or policies: how many pixels are enough is for the policy to say, from these numbers.

What decides whether a reader can read is the size of the smallest text in pixels. It is measured in steps, none of
which passes over the whole image:

- a *first look* at a few whole rows at full resolution: how steep flanks are, how far apart changes are at least, up to
  which frequency there is anything (`_cutoff`). An enlarged image says by these that it has fewer details than pixels;
- *scan lines*, rows at the same places of every image, read as coarsely as its flanks allow: so an image and its
  enlargement are seen alike. The values of a row are cut into rising and falling flanks, wiggles of less than
  `_CONTRAST` are taken into the flank around them (the hysteresis of rainflow counting, Matsuishi & Endo 1968), and the
  distance between the centres of two flanks is the width of the stroke or gap between them. The centre is the mean
  position weighed by the change, so widths are fractions of pixels where edges are smooth;
- *windows* around some of the finer strokes, spread over the image, as large as 40 times their width: a line of text
  shows as a band of rows full of edges between quiet rows (the projection profile of document analysis, O'Gorman 1993),
  and its height, about that of a small x, is measured where the activity falls off. What has no such band is texture.

Every length grows with the image: enlarged twice, it is twice as many pixels.
"""

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.features.image import Bytes, Pixels, _nearest, _thin_array, _thin_pil, ready_to_sample
from adaptive_fusion.media.pixels import DEFAULT, check_size, to_rgb

VERSION = "2"
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
    "enlarged",  # log2 of how many pixels there are to each that the details need: 0 unless it looks enlarged
    "octave_1",  # log2 of the mean difference of pixels 2 apart over that of neighbours: 1 on smooth ground, 0 at noise
    "octave_2",  # the same of 4 and 2
    "octave_4",  # the same of 8 and 4
    "sparsity_1",  # mean difference of neighbours, squared, over the mean square: low where few of them are large
    "sparsity_4",  # the same of pixels 4 apart
    "busy_spread",  # standard deviation of ln mean difference of neighbours, from block to block of a line
)
"""Names in the order of `detail_features`; all values are finite."""

_CONTRAST = 32
_FIRST_LINES, _FIRST_VARIATION = 16, 8_000  # of the first look
_LINES = 64  # so many that a line of small print is not missed
_VARIATION = 30_000  # of scan lines: grey levels, those of some hundred strokes
_LEAST = 64  # pixels of each
_MOST_APART = 16.0
_WINDOWS = 32
_ROWS, _COLUMNS = 40, 24  # samples of a window, a stroke's width apart
_FINER = 0.5  # share of the strokes, the finer ones, that windows are laid around
_FALL = 0.3  # of the activity within a band: where it ends
_QUIET = 0.2  # of the activity within a band: at most between two
_BAND = (3.0, 14.0)  # height over stroke width of a band that may be text
_BLOCK, _FLOOR = 32, 0.25  # pixels of a line; grey levels added to mean differences, for what has none
_NO_STROKE = 6.0  # log2 pixels: what is said of an image without any stroke
_USUAL = 2.6  # log2 of the height of a small x over the width of its strokes, where no band shows it
_FEW = 20  # changes that say nothing about repeated pixels
_USUAL_WEIGHT = 4  # bands that this counts as
_LOW = 0.25  # of the heights
_LOW_STROKES = (0.02, 0.25)
_NOISE, _ROUNDS = 3, 12  # grey levels of a flank that is none; of merging, more than are ever needed but in noise
_GOLDEN = 0.6180339887498949
_SEGMENT, _SEGMENTS = 128, 48  # pixels; how many, those with most changes
_HANN = np.hanning(_SEGMENT + 2)[1:-1].astype(np.float32)
_DECIBELS = 16.0  # below the strongest frequencies: where the spectrum is taken to end
_CUTOFF = 0.73  # cycles a pixel of the image before, where that of an enlarged one ends: above .5 as it falls slowly
_SHARP = 0.45  # cycles a pixel: images that reach this far are not enlarged

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
    apart, enlarged = _first_look(source)
    rows, lines = source.lines(_LINES, max(1.0, apart))
    strokes = _Strokes(lines, source.width / lines.shape[1], _VARIATION)
    texture = _texture(lines[::4])
    if not len(strokes.width):
        return [_NO_STROKE, _NO_STROKE, 0.0, _NO_STROKE, _NO_STROKE, 0.0, 0.0, _NO_STROKE, enlarged, *texture]
    order = np.argsort((strokes.width * 16).astype(np.uint16), kind="stable")  # sorts whole numbers ten times as fast
    heights, text_share = _bands(source, rows, strokes, order)
    low, quarter = (float(np.log2(strokes.width[order[int(share * len(order))]])) for share in _LOW_STROKES)
    usual = quarter + _USUAL
    low_height, height = (heights[int(len(heights) * _LOW)], heights[len(heights) // 2]) if heights else (usual, usual)
    return [
        (low_height * len(heights) + usual * _USUAL_WEIGHT) / (len(heights) + _USUAL_WEIGHT),
        height,
        text_share,
        low,
        quarter,
        float(np.log1p(1000 * len(order) / (strokes.pixels * source.width / lines.shape[1]))),
        float(np.partition(strokes.contrast, len(order) // 2)[len(order) // 2]) / 255,
        float(np.log2(_quantile(strokes.spread, 10))),
        enlarged,
        *texture,
    ]


def _variation(lines: Bytes) -> float:
    return float(cv2.norm(lines[:, 1:], lines[:, :-1], cv2.NORM_L1)) if lines.shape[1] > 1 else 0.0


def _first_look(source: "_Source") -> tuple[float, float]:
    """How many pixels apart lines can be read without missing a flank; `enlarged`."""
    lines = source.lines(_FIRST_LINES, 1)[1]
    strokes = _Strokes(lines, 1, _FIRST_VARIATION)
    repeated, cutoff = _repeated(strokes.changes), _cutoff(lines[::2])
    enlarged = max(float(repeated), _CUTOFF / cutoff if cutoff < _SHARP else 1.0)
    apart = max(repeated, 2 * _quantile(strokes.spread, 10) if len(strokes.spread) else 1)
    return min(apart, _MOST_APART), float(np.log2(enlarged))


def _repeated(changes: Ints) -> int:
    """How often each pixel is repeated along a line, as by enlargement by nearest neighbour; 1 where it is not."""
    gaps = np.diff(changes)
    if len(gaps) < _FEW:
        return 1
    times = int(np.searchsorted(np.bincount(np.minimum(gaps, 64)).cumsum(), len(gaps) // 50, "right"))
    return times if times <= _MOST_APART and np.count_nonzero(gaps % times) * 10 <= len(gaps) else 1


def _cutoff(lines: Bytes) -> float:
    """Cycles a pixel up to which differences of neighbours have a spectrum, `_DECIBELS` below its strongest part.

    That of a sharp edge is flat, and what cameras, scanners and JPEG leave still reaches .5; interpolation has nothing
    to put above half a cycle per pixel of the image before (Kirchner 2008).
    """
    segments = (lines.shape[1] - 1) // _SEGMENT
    if not segments:
        return 0.5
    here, after = (lines[:, at : at + segments * _SEGMENT].reshape(-1, _SEGMENT) for at in (0, 1))
    if len(here) > _SEGMENTS:
        energy = cv2.reduce(cv2.absdiff(here, after), 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel()
        most = np.argpartition(energy, len(here) - _SEGMENTS)[-_SEGMENTS:]
        here, after = here[most], after[most]
    steps = after.astype(np.float32) - here
    parts = np.asarray(cv2.dft(steps * _HANN, flags=cv2.DFT_ROWS))[:, 1:-1]  # without the mean and half a cycle a pixel
    power = (parts * parts).sum(axis=0, dtype=np.float64).reshape(-1, 2).sum(axis=1)
    power = np.convolve(np.pad(power, 1, mode="edge"), np.ones(3) / 3, "valid")
    level = 10 * np.log10(power + 1e-9)
    above = level - (np.partition(level, -6)[-6] - _DECIBELS)
    # Where it falls below, not where it last is above: linear interpolation has side lobes.
    fallen = np.flatnonzero((above[:-1] > 0) & (above[1:] <= 0))
    fallen = fallen[fallen >= int(np.argmax(level))]
    if not len(fallen):
        return 0.5
    last = int(fallen[0])
    return float(last + 1 + above[last] / (above[last] - above[last + 1])) / _SEGMENT


def _quantile(values: np.ndarray[Any, np.dtype[Any]], one_in: int) -> float:
    return float(np.partition(values, len(values) // one_in)[len(values) // one_in])


class _Source:
    """Rows and windows of an image, in grey; only the pixels that are asked for are converted."""

    def __init__(self, image: Pixels) -> None:
        if isinstance(image, Image.Image):
            image = ready_to_sample(image)
            self.width, self.height = image.size
        elif isinstance(image, np.ndarray):
            if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
                raise MediaError(f"array has shape {image.shape}; accepted: (H, W), (H, W, 3), (H, W, 4)")
            self.height, self.width = image.shape[:2]
            check_size("array", self.width, self.height, DEFAULT)
        else:
            raise MediaError(f"cannot measure {type(image).__name__}; accepted: PIL image, numpy array")
        self._image = image

    def lines(self, count: int, apart: float) -> tuple[Ints, Bytes]:
        """Rows spread over the height, `count` at most, read every so many pixels: (rows, pixels) uint8."""
        count, columns = min(count, self.height), max(1, int(self.width / apart))
        if isinstance(self._image, Image.Image):
            rgb = _thin_pil(self._image, columns, count)
        else:
            rgb = _thin_array(self._image, columns, count)
        return _nearest(self.height, count), np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))

    def windows(self, x: Floats, y: Floats, step: Floats) -> Bytes:
        """(windows, _ROWS, _COLUMNS) uint8 around points, sampled `step` pixels apart; black outside the image."""
        left, top = x - step * _COLUMNS / 2, y - step * _ROWS / 2
        down = np.floor(top[:, None] + step[:, None] * (np.arange(_ROWS) + 0.5)).astype(np.int64)
        across = np.floor(left[:, None] + step[:, None] * (np.arange(_COLUMNS) + 0.5)).astype(np.int64)
        inside = ((down >= 0) & (down < self.height))[:, :, None] & ((across >= 0) & (across < self.width))[:, None, :]
        if isinstance(self._image, Image.Image):
            # One call for all: each would cost more than the reading.
            ends = np.stack([left, top, left + step * _COLUMNS, top + step * _ROWS], axis=1).tolist()
            mesh = [
                ((0, i * _ROWS, _COLUMNS, (i + 1) * _ROWS), (x0, y0, x0, y1, x1, y1, x1, y0))
                for i, (x0, y0, x1, y1) in enumerate(ends)
            ]
            stacked = self._image.transform((_COLUMNS, _ROWS * len(mesh)), Image.Transform.MESH, mesh)
            if stacked.mode != "RGB" or stacked.has_transparency_data:
                stacked = to_rgb(stacked)
            return np.where(inside, np.asarray(stacked)[:, :, 1].reshape(inside.shape), 0).astype(np.uint8)
        down, across = down.clip(0, self.height - 1), across.clip(0, self.width - 1)
        if self._image.dtype == np.uint8 and self._image.shape[2:] == (3,):
            green = self._image[:, :, 1][down[:, :, None], across[:, None, :]]
        else:
            picked = self._image[down[:, :, None], across[:, None, :]]
            flat = picked.reshape(-1, _COLUMNS, *picked.shape[3:])
            green = _thin_array(flat, _COLUMNS, len(flat))[:, :, 1].reshape(inside.shape)
        return np.where(inside, green, 0).astype(np.uint8)


class _Strokes:
    """Strokes and gaps along scan lines, or a part of each where there are many.

    `width`, `contrast` (of the fainter flank), `spread` (of the left flank), `line` and `middle` (pixels from the left)
    have one entry each; `changes` are the places in the `pixels` looked at that differ from the next.
    """

    def __init__(self, lines: Bytes, apart: float, variation: int) -> None:
        seen, left = _part(lines, variation)
        columns, pixel = seen.shape[1], seen.ravel()
        self.changes = np.flatnonzero(pixel[1:] != pixel[:-1])  # of booleans it is three times as fast
        self.changes = self.changes[(self.changes + 1) % columns != 0]  # the end of a line
        self.pixels = seen.size
        change = pixel[self.changes + 1].astype(np.float64) - pixel[self.changes]
        size, centre, spread = _flanks(change, self.changes + 0.5)
        line = (centre / columns).astype(np.int64)
        width, contrast = centre[1:] - centre[:-1], np.minimum(size[1:], size[:-1])
        # A flank that a wiggle was taken into can have its centre outside: a width of nothing is none.
        ok = np.flatnonzero((contrast >= _CONTRAST) & (line[1:] == line[:-1]) & (width >= 0.5))
        self.width, self.contrast, self.line = width[ok] * apart, contrast[ok], line[ok]
        self.spread = spread[ok] * apart
        self.middle = (left[self.line] + (centre[ok] + width[ok] / 2) % columns) * apart


def _part(lines: Bytes, variation: int) -> tuple[Bytes, Ints]:
    """As much of each line, here and there, as has so much variation in all; and how far from the left it begins.

    Variation, the sum of differences of neighbours, is the same of an enlarged image: so the same parts are seen.
    """
    count, columns = lines.shape
    part = min(columns, max(_LEAST, int(columns * variation / max(_variation(lines), 1.0))))
    if part == columns:
        return lines, np.zeros(count, np.int64)
    left = ((np.arange(count) * _GOLDEN) % 1 * (columns - part)).astype(np.int64)
    return np.stack([line[x : x + part] for line, x in zip(lines, left.tolist(), strict=True)]), left


def _flanks(change: Floats, position: np.ndarray[Any, np.dtype[np.floating[Any]]]) -> tuple[Floats, Floats, Floats]:
    """Height, centre and spread (standard deviation) of each rising or falling flank, from left to right."""
    if not len(change):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    moment = change * position
    sums = _runs(np.stack([change, moment, moment * position]))
    # Noise goes at once: merged with the flanks around it, it would take many rounds.
    sums = _runs(sums[:, np.abs(sums[0]) > _NOISE])
    for _ in range(_ROUNDS):
        size = np.abs(sums[0])
        wiggle = (size[1:-1] < _CONTRAST) & (size[1:-1] <= size[:-2]) & (size[1:-1] < size[2:])
        merged = np.flatnonzero(wiggle) + 1
        if not len(merged):
            break
        keep = np.ones(len(size), bool)
        keep[merged] = keep[merged + 1] = False  # it and the flank after it become part of the flank before it
        sums = np.add.reduceat(sums, np.flatnonzero(keep), axis=1)
    swing, centre = sums[0], sums[1] / sums[0]
    variance = np.maximum(sums[2] / swing - centre * centre, 0) + 1 / 12  # a pixel's own
    return np.abs(swing), centre, np.sqrt(variance)


def _runs(sums: Floats) -> Floats:
    """Neighbours that both rise or both fall made one; the first row says which they do."""
    rising = sums[0] > 0
    starts = np.flatnonzero(rising[1:] != rising[:-1]) + 1
    return np.add.reduceat(sums, np.concatenate(([0], starts)), axis=1) if len(rising) else sums


def _bands(source: _Source, rows: Ints, strokes: _Strokes, order: Ints) -> tuple[list[float], float]:
    """log2 heights, sorted, of the bands of text around the finer strokes, and the share of windows that show one."""
    finer = max(min(8, len(order)), int(len(order) * _FINER))
    # Spread over the image: by rank, one stroke more or less would choose all others.
    chosen = np.sort(order[:finer])[np.linspace(0, finer - 1, min(_WINDOWS, finer)).astype(np.int64)]
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


def _texture(lines: Bytes) -> list[float]:
    """The octaves, both sparsities and `busy_spread`."""
    means, sparsity, busy = [], [], 0.0
    for apart in (1, 2, 4, 8):
        if lines.shape[1] <= apart:
            means.append(0.0)
            continue
        change = cv2.absdiff(lines[:, apart:], lines[:, :-apart])
        means.append(cv2.norm(change, cv2.NORM_L1) / change.size)
        if apart in (1, 4):
            square = cv2.norm(change, cv2.NORM_L2SQR) / change.size
            sparsity.append((means[-1] + _FLOOR) ** 2 / (square + _FLOOR**2))
        if apart == 1 and change.shape[1] >= _BLOCK:
            blocks = change[:, : change.shape[1] // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
            sums = cv2.reduce(blocks, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32F)
            busy = float(np.log(sums / _BLOCK + _FLOOR).std())
    octaves = [float(np.log2((far + _FLOOR) / (near + _FLOOR))) for near, far in pairwise(means)]
    return [*octaves, *[*sparsity, 1.0, 1.0][:2], busy]
