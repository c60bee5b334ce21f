"""What is measured on one image: a fixed, ordered set of light features, each in one pass over few pixels.

Knows how to take a small sample from a PIL image or an array and how to compute numbers from it. Must not
know of files, clips, scores or models.

Two samples are taken, whatever the size of the image:

- the *patch*: 128 rows of 256 pixels by nearest neighbour, averaged to 64 x 64. Coarse scales carry what
  people call complex, and the aspect ratio matters little to it. Of a large image, rows are what costs time;
- the *scan*: whole rows at native resolution, spread over the height, about 33,000 pixels. What a
  vision-language model loses with fewer pixels is detail at the scale of single pixels, which no thumbnail
  still shows.

Small arrays make OpenCV run on one thread, so its global thread count is left alone.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.pixels import DEFAULT, check_size, decoding, to_rgb, to_uint8
from adaptive_fusion.media.scans import can_be_thinned

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Pixels = Image.Image | np.ndarray[Any, np.dtype[Any]]

IMAGE_FEATURES = (
    "edge_density",  # share of edge pixels (Canny 100/200): contours
    "grey_entropy",  # bits, 256 levels: tonal variety
    "hue_entropy",  # bits, 180 hues: colour variety
    "chroma_colours",  # ln(1 + occupied cells of a 64 x 64 grid over Lab's a and b): palette without light
    "corners",  # ln(1 + FAST corners, contrast 20): parts that are still there when small
    "corners_32px",  # ln(1 + FAST corners at 32 px, contrast 15): large parts
    "flat_regions",  # ln(1 + areas of at least 3 pixels between steep gradients): surfaces
    "edge_objects",  # ln(1 + connected contours of at least 3 pixels at 32 px): separate things
    "gradient",  # mean square root of the Sobel magnitude: contrast that edge thresholds miss
    "local_entropy",  # bits, mean over 4 x 4 blocks, 16 levels: how much of the image is busy
    "colours",  # ln(1 + 4-bit RGB colours in use)
    "colours_significant",  # the same, counting those of more than 2 pixels
    "background_share",  # share of the most frequent 4-bit colour: empty ground
    "colourfulness",  # Hasler & Suesstrunk 2003, at 32 px
    "regions",  # ln(1 + connected regions of equal 8-bit colour at 32 px)
    "jpeg_bits",  # bits per pixel of a JPEG of quality 90: incompressible texture
    "fine_edges",  # scan: share of neighbours that differ by more than 32 of 255
    "strokes",  # scan: share of pixels on a line under 5 pixels wide (contrast 32): small text
    "contrast_1px",  # scan: mean absolute difference, of 1, of neighbours: twice what averaging pairs loses
    "contrast_2px",  # scan: the same of pixels two apart: little more, where detail is of single pixels
    "log_pixels",  # ln(width x height)
    "log_aspect",  # ln(longer side / shorter side)
)
"""Names in the order of `image_features`; all values are finite."""

_PATCH_SAMPLES = (256, 128)
_PATCH = (64, 64)
_SCAN_PIXELS = 1 << 15
_DATA_DEPENDENT_MODES = ("I", "F")  # their scale to 8 bits needs all pixels, so they cannot be thinned first
_ORIENTATION_TAG = 0x0112
_CONTRAST = 32
_STROKE = 4
_OPPONENT = ((1.0, -1.0, 0.0), (0.5, 0.5, -1.0))  # red - green, yellow - blue
_STEEP = 96  # of the Sobel magnitude
_N_LOG2_N = np.arange(2, 17) * np.log2(np.arange(2, 17))


@dataclass(frozen=True)
class Sample:
    """What the features read of one image of `width` x `height` pixels.

    `patch`: (64, 64, 3) uint8 RGB; `grey`: (64, 64) uint8, its lightness; `scan`: (rows, width, 3) uint8 RGB,
    or None.
    """

    patch: Bytes
    grey: Bytes
    scan: Bytes | None
    width: int
    height: int


def ready_to_sample(image: Image.Image) -> Image.Image:
    """`image`, or an upright RGB copy of it where single pixels taken out would not mean what they mean in it.

    To be called before anything else looks at a PIL image: what its file says of its samples is lost as it is read.

    Raises:
        MediaError: As `take_sample`.
    """
    with decoding("PIL image"):
        check_size("PIL image", *image.size, DEFAULT)
        # The orientation last: to look for it loads a PNG, and the depth of its transparent colour is lost.
        in_whole = image.mode in _DATA_DEPENDENT_MODES or not can_be_thinned(image)
        return to_rgb(image) if in_whole or image.getexif().get(_ORIENTATION_TAG, 1) != 1 else image


def take_sample(image: Pixels, *, with_scan: bool = True) -> Sample:
    """Thin a decoded image out to the few pixels that are measured; a PIL image and its array give the same.

    Args:
        image: PIL image of any mode, or array (H, W), (H, W, 3) or (H, W, 4) of bool, uint8, uint16 or float
            in [0, 1]. Transparency is laid on white. Values out of range are noticed only where sampled.

    Raises:
        MediaError: Wrong type, shape, dtype or values, too large or too narrow, or a file that does not
            decode.
    """
    if isinstance(image, Image.Image):
        image = ready_to_sample(image)
        with decoding("PIL image"):
            patch = _thin_pil(image, *_PATCH_SAMPLES)
            scan = _thin_pil(image, image.width, _scan_rows(*image.size)) if with_scan else None
            width, height = image.size
    elif isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise MediaError(f"array has shape {image.shape}; accepted: (H, W), (H, W, 3), (H, W, 4)")
        height, width = image.shape[:2]
        check_size("array", width, height, DEFAULT)
        patch = _thin_array(image, *_PATCH_SAMPLES)
        scan = _thin_array(image, width, _scan_rows(width, height)) if with_scan else None
    else:
        raise MediaError(f"cannot measure {type(image).__name__}; accepted: PIL image, numpy array")
    # At a ratio of two, linear is the average, and where one side shrinks a fifth of the time of INTER_AREA.
    patch = np.asarray(cv2.resize(_halve(patch), _PATCH, interpolation=cv2.INTER_LINEAR))
    return Sample(patch, _grey(patch), scan, width, height)


def edge_map(image: Pixels) -> Bytes:
    """(64, 64) uint8, 255 where the feature ``edge_density`` counts an edge."""
    return np.asarray(cv2.Canny(take_sample(image, with_scan=False).grey, 100, 200), dtype=np.uint8)


def edge_density_and_entropy(grey: Bytes) -> tuple[float, float]:
    """Share of edge pixels (Canny 1986, thresholds 100 and 200) and entropy in bits, of (H, W) uint8."""
    return cv2.countNonZero(cv2.Canny(grey, 100, 200)) / grey.size, _entropy(_histogram(grey, 256))


def image_features(sample: Sample) -> list[float]:
    """Values of `IMAGE_FEATURES`. Raises MediaError if the sample was taken without its scan."""
    rgb, grey = sample.patch, sample.grey
    rgb32 = _halve(rgb)
    grey32 = _grey(rgb32)
    across, down = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    steepness = across * across + down * down  # cv2.magnitude depends on where in memory its arguments lie
    colours = _histogram(rgb, 16, (0, 1, 2))
    return [
        *edge_density_and_entropy(grey),
        _entropy(_histogram(cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV), 180, top=180)),
        _log_count(_histogram(cv2.cvtColor(rgb, cv2.COLOR_RGB2Lab), 64, (1, 2)) > 0),
        _log_number(_corners(grey, 20)),
        _log_number(_corners(grey32, 15)),
        _log_number(_components((steepness < _STEEP * _STEEP).view(np.uint8))),
        _log_number(_components(cv2.Canny(grey32, 100, 200))),
        float(np.sqrt(np.sqrt(steepness)).mean()),
        _local_entropy(grey),
        _log_count(colours > 0),
        _log_count(colours > 2),
        float(colours.max()) / grey.size,
        _colourfulness(rgb32),
        _log_number(_regions(rgb32)),
        cv2.imencode(".jpg", rgb, (cv2.IMWRITE_JPEG_QUALITY, 90))[1].size * 8 / grey.size,
        *_detail(sample.scan),
        float(np.log(sample.width * sample.height)),
        float(np.log(max(sample.width, sample.height) / min(sample.width, sample.height))),
    ]


def _scan_rows(width: int, height: int) -> int:
    return min(height, max(1, _SCAN_PIXELS // width))


def _thin_pil(image: Image.Image, width: int, height: int) -> Bytes:
    # Nearest neighbour maps single pixels, so the (slow) way to RGB can come after it.
    small = image.resize((width, height), Image.Resampling.NEAREST)
    if small.mode != "RGB" or small.has_transparency_data:
        small = to_rgb(small)
    return np.asarray(small)


def _thin_array(array: np.ndarray[Any, np.dtype[Any]], width: int, height: int) -> Bytes:
    if array.dtype == np.uint8 and array.flags.c_contiguous and width != array.shape[1]:
        small = cv2.resize(array, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)  # as Pillow's NEAREST
    else:
        rows = _nearest(array.shape[0], height)
        # Both at once: whole rows of floats, or of an array that lies column by column, are much to copy.
        small = array[rows] if width == array.shape[1] else array[np.ix_(rows, _nearest(array.shape[1], width))]
    small = to_uint8("array", small)
    if small.ndim == 2:
        return np.asarray(cv2.cvtColor(np.ascontiguousarray(small), cv2.COLOR_GRAY2RGB))
    if small.shape[2] == 4:
        return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(small))))
    return np.ascontiguousarray(small)


def _nearest(size: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Source pixel of each of `count` target pixels, asked of OpenCV so that ties fall as they do there."""
    indices = np.arange(size, dtype=np.float32)[None]
    chosen = cv2.resize(indices, (count, 1), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(chosen[0], dtype=np.int64)


def _halve(image: Bytes) -> Bytes:
    size = (image.shape[1] // 2, image.shape[0] // 2)
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def _grey(rgb: Bytes) -> Bytes:
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY))


def _histogram(image: Bytes, bins: int, channels: tuple[int, ...] = (0,), top: int = 256) -> Floats:
    """Counts over `bins` equal parts of [0, top) of each of the channels."""
    sizes, ranges = [bins] * len(channels), [0, top] * len(channels)
    return np.asarray(cv2.calcHist([image], channels, None, sizes, ranges))


def _entropy(counts: Floats) -> float:
    share = counts[counts > 0] / counts.sum()
    return max(0.0, -float((share * np.log2(share)).sum()))  # a constant image gives 0.0, not -0.0


def _log_count(chosen: np.ndarray[Any, np.dtype[Any]]) -> float:
    return _log_number(int(np.count_nonzero(chosen)))


def _log_number(number: int) -> float:
    return float(np.log1p(number))


def _corners(grey: Bytes, contrast: int) -> int:
    """Corners by FAST (Rosten & Drummond 2006)."""
    return len(cv2.FastFeatureDetector.create(contrast).detect(grey))


def _components(mask: Bytes) -> int:
    """Connected areas of at least 3 pixels."""
    # Counting labels takes half the time of connectedComponentsWithStats, and 8 neighbours a third of 4.
    labels = cv2.connectedComponents(mask, connectivity=8, ltype=cv2.CV_16U)[1]
    return int(np.count_nonzero(np.bincount(labels.ravel())[1:] >= 3))


def _regions(rgb: Bytes) -> int:
    """Connected regions of equal colour, 3 bits of red and green and 2 of blue.

    Pixels become nodes, and equal neighbours links, of a grid twice as fine: one pass counts all colours.
    Links that touch at a corner share a node, so 8 neighbours count the same as 4.
    """
    red, green, blue = cv2.split(rgb)
    colour = (red & 0xE0) | ((green & 0xE0) >> 3) | (blue >> 6)
    height, width = colour.shape
    grid = np.zeros((2 * height - 1, 2 * width - 1), np.uint8)
    grid[::2, ::2] = 1
    grid[1::2, ::2] = colour[1:] == colour[:-1]
    grid[::2, 1::2] = colour[:, 1:] == colour[:, :-1]
    return int(cv2.connectedComponents(grid, connectivity=8)[0]) - 1


def _local_entropy(grey: Bytes) -> float:
    """Mean entropy, in bits, of the 16 pixels of 4 x 4 blocks, in 16 levels."""
    rows, columns = (int(side) // 4 for side in grey.shape)
    block = np.arange(rows * columns, dtype=np.intp).reshape(rows, 1, columns, 1) << 4
    levels = (grey >> 4).reshape(rows, 4, columns, 4) | block
    counts = np.bincount(np.bincount(levels.ravel()), minlength=17)[2:]  # how often 2 to 16 pixels are equal
    # n equal pixels of 16 contribute n/16 (4 - log2 n).
    return 4.0 - float(counts @ _N_LOG2_N) / (16 * rows * columns)


def _colourfulness(rgb: Bytes) -> float:
    means, spreads = cv2.meanStdDev(cv2.transform(rgb.astype(np.float32), np.asarray(_OPPONENT)))
    return float(np.linalg.norm(spreads) + 0.3 * np.linalg.norm(means))


def _detail(scan: Bytes | None) -> tuple[float, float, float, float]:
    """fine_edges, strokes, contrast_1px, contrast_2px of rows at native resolution."""
    if scan is None:
        raise MediaError("the sample has no scan; expected one taken with with_scan=True")
    if scan.shape[1] <= 2 * _STROKE:
        return 0.0, 0.0, 0.0, 0.0  # narrower than any stroke
    grey = _grey(scan)
    step = cv2.absdiff(grey[:, 1:], grey[:, :-1])
    middle, left, right = grey[:, _STROKE:-_STROKE], grey[:, : -2 * _STROKE], grey[:, 2 * _STROKE :]
    dark = cv2.min(cv2.subtract(left, middle), cv2.subtract(right, middle))
    bright = cv2.min(cv2.subtract(middle, left), cv2.subtract(middle, right))
    # threshold, not compare: that takes an array of one pixel for a scalar and refuses it.
    strokes = cv2.threshold(cv2.max(dark, bright), _CONTRAST, 1, cv2.THRESH_BINARY)[1]
    return (
        cv2.countNonZero(cv2.threshold(step, _CONTRAST, 1, cv2.THRESH_BINARY)[1]) / step.size,
        cv2.countNonZero(strokes) / middle.size,
        cv2.mean(step)[0] / 255,
        cv2.mean(cv2.absdiff(grey[:, 2:], grey[:, :-2]))[0] / 255,
    )
