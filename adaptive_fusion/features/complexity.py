"""How complex an image or a clip looks: versioned light features, how fine its details are, one human-scale score.

Knows pixels, frames and the fitted coefficients of the score. Must not know of models, lanes, budgets or
prompts: how hard an input is for a vision-language model is for the router to say, from the same features.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.features.detail import DETAIL_FEATURES, detail_features
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.features.image import IMAGE_FEATURES, Pixels, Sample, image_features, ready_to_sample, take_sample
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media
from adaptive_fusion.media.sampling import evenly

VERSION = "1"
"""Version of the features: numbers of different versions must not be compared or fed to the same router."""

MOTION_FEATURES = (
    "motion_mean",  # mean change between sampled frames, of 1, at 64 px; here and below of the channel with most
    "motion_area",  # mean share of the 16 x 16 cells in which any pixel changed by more than 24 of 255
    "motion_peak",  # largest change of a cell's mean between sampled frames, of 1
    "scene_cuts",  # steps between sampled frames at which most cells and the grey histogram change
)
"""Features of change over time; 0 for images."""

FEATURE_NAMES: tuple[str, ...] = (*IMAGE_FEATURES, *MOTION_FEATURES)
"""All features in the order of `Complexity.vector`."""

_MAX_FRAMES = 8
_FULL_FRAMES = 3
_CHANGE = 24
_CUT_AREA, _CUT_HISTOGRAM = 0.5, 0.3
_STILL_PEAK = 0.02
_COEFFICIENTS = "data/complexity-v1.json"


@dataclass(frozen=True)
class Complexity:
    """What was measured on one image or clip.

    Args:
        score: agreement with human judgement of visual complexity, 0 (simple) to 1 (complex): about the share
            of the images of the fitting data that look simpler. Of a clip: of its frames, not of its motion.
        features: all `FEATURE_NAMES`, in order, finite; of a clip the mean over the frames measured in full.
        version: version of the features, `VERSION`.
        kind: "image" or "video".
        detail: `detail.DETAIL_FEATURES`, lengths in pixels of the image or frame; of a clip those of its middle frame.
            Empty where they were not measured.
        detail_version: version of `detail`; empty where there is none.
    """

    score: float
    features: dict[str, float]
    version: str
    kind: Literal["image", "video"]
    detail: Mapping[str, float] = field(default_factory=dict)
    detail_version: str = ""

    def vector(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(len(FEATURE_NAMES),) float64: the features in their order."""
        return np.array([self.features[name] for name in FEATURE_NAMES], dtype=np.float64)


def measure_complexity(
    source: str | os.PathLike[str] | bytes | Video | Pixels | Sequence[Pixels], *, detail: bool = True
) -> Complexity:
    """Measure one image or clip, in about 1.5 milliseconds when it is already decoded.

    Whatever the size, about 66,000 pixels are read, and as many again for the detail; of a clip, those of up to 8
    frames spread evenly (over time, where their times are known) for motion, 3 of them in full. One frame is an image.

    Args:
        source: a path or encoded bytes (decoded by `media.load_media`); a PIL image of any mode; an array
            (H, W), (H, W, 3) or (H, W, 4) of bool, uint8, uint16 or float in [0, 1]; for a clip a
            `media.Video`, an array (T, H, W, 3) or a sequence of images or arrays. Never changed.
        detail: whether to measure the detail too, which means something at full resolution only.

    Raises:
        MediaError: Missing, empty, broken, too large or too narrow media, or a shape, type or values (NaN
            included) that are no image.
    """
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        source = load_media(source)
    if isinstance(source, Video):
        return _measure_clip(source.frames, source.timestamps_s, detail)
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim != 4):
        if isinstance(source, Image.Image):
            source = ready_to_sample(source)
        features, still = image_features(take_sample(source)), [0.0] * len(MOTION_FEATURES)
        return _complexity(features, still, "image", source if detail else None)
    if not isinstance(source, np.ndarray | list | tuple):
        raise MediaError(
            f"cannot measure {type(source).__name__}; accepted: path, bytes, PIL image, numpy array, "
            f"sequence of frames, Video"
        )
    if len(source) == 0:
        raise MediaError("the clip has no frames; a clip needs at least one")
    if len(source) == 1:
        return measure_complexity(source[0], detail=detail)
    return _measure_clip(source, range(len(source)), detail)


def human_score(features: dict[str, float]) -> float:
    """Score in [0, 1] of a set of features: a logistic function of a linear one, fitted on human judgement.

    Source: ridge regression with weights of at least 0 on within-category ranks of SAVOIAS (Saraee, Jalal &
    Betke 2020). Coefficients, figures and the hash of the data are in `data/complexity-v1.json`.
    """
    fitted = _coefficients()
    total = fitted["intercept"]
    for name, mean, scale, weight in zip(
        fitted["features"], fitted["mean"], fitted["scale"], fitted["weight"], strict=True
    ):
        total += weight * (features[name] - mean) / scale
    return 0.5 + 0.5 * math.tanh(total / 2)  # the logistic function, which cannot overflow in this form


def is_still(complexity: Complexity) -> bool:
    """Whether nothing that is visible at 64 pixels changes in a clip, so that few of its frames show all of it."""
    features = complexity.features
    return (
        complexity.kind == "video"
        and features["motion_area"] == 0.0
        and features["motion_peak"] < _STILL_PEAK
        and features["scene_cuts"] == 0.0
    )


@cache
def _coefficients() -> dict[str, Any]:
    fitted: dict[str, Any] = json.loads((files("adaptive_fusion") / _COEFFICIENTS).read_text("utf-8"))
    return fitted


def _complexity(
    image: list[float], motion: list[float], kind: Literal["image", "video"], still: Pixels | None
) -> Complexity:
    features = dict(zip(FEATURE_NAMES, [*image, *motion], strict=True))
    score = human_score(features)
    if still is None:
        return Complexity(score, features, VERSION, kind)
    detail = dict(zip(DETAIL_FEATURES, detail_features(still), strict=True))
    return Complexity(score, features, VERSION, kind, detail, DETAIL_VERSION)


def _measure_clip(frames: Any, times_s: Sequence[float], detail: bool) -> Complexity:
    chosen = evenly(times_s, _MAX_FRAMES)
    in_full = {chosen[i] for i in evenly(range(len(chosen)), _FULL_FRAMES)}
    samples = {index: take_sample(frames[index], with_scan=index in in_full) for index in chosen}
    rows = [image_features(samples[index]) for index in sorted(in_full)]
    motion = motion_features([samples[index] for index in chosen])
    middle = frames[chosen[len(chosen) // 2]] if detail else None
    return _complexity([float(mean) for mean in np.mean(rows, axis=0)], motion, "video", middle)


def motion_features(samples: Sequence[Sample]) -> list[float]:
    """Values of `MOTION_FEATURES` for at least two sampled frames, in order of time.

    A red thing that turns blue may be as light as before, so change is looked for in each channel.
    """
    histograms = [cv2.calcHist([sample.grey], (0,), None, [16], [0, 256]) / sample.grey.size for sample in samples]
    means, areas, peaks, cuts = [], [], [], 0
    for (before, old), (after, new) in pairwise(zip(samples, histograms, strict=True)):
        change = cv2.absdiff(before.patch, after.patch).max(axis=2)
        cells = change.reshape(16, 4, 16, 4)
        means.append(float(change.mean()) / 255)
        areas.append(float((cells.max(axis=(1, 3)) > _CHANGE).mean()))
        peaks.append(float(cells.mean(axis=(1, 3)).max()) / 255)
        cuts += areas[-1] > _CUT_AREA and float(np.abs(old - new).sum()) / 2 > _CUT_HISTOGRAM
    return [float(np.mean(means)), float(np.mean(areas)), max(peaks), float(cuts)]
