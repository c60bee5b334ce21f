"""Which frames of a clip are taken: those nearest to times that are spread evenly, whatever its frame rate does.

Knows frame times and rates. Must not know of pixels, files or models.
"""

import math
from collections.abc import Sequence

import numpy as np

from adaptive_fusion.checks import is_number
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.media.pixels import Limits

_MOST_JITTER = 0.25  # of a frame's time: what rounding to milliseconds does, and sampling 4 frames a second at 2
_MOST_TARGETS = 1 << 31


def is_steady(times_s: Sequence[float], most: float = math.inf) -> bool:
    """Whether the frame rate is constant but for a jitter of a quarter of a frame's time, and of `most` of it."""
    times = np.asarray(times_s, dtype=np.float64)
    away = np.abs(times - np.linspace(times[0], times[-1], len(times))).max()
    return bool(away * (len(times) - 1) <= (min(most, _MOST_JITTER) + 1e-9) * (times[-1] - times[0]))


def evenly(times_s: Sequence[float], count: int) -> list[int]:
    """Indices, ascending, of the frames nearest to `count` times spread evenly from the first frame to the last.

    Each frame is taken once, so fewer come back where several of those times have the same nearest frame. Both ends
    are always among them, and every frame is within one step between those times of one that is. At a constant
    rate these are the frames that transformers takes, ``np.linspace(0, len(times_s) - 1, count).round()``.

    Args:
        times_s: display times, never decreasing, at least one.
        count: at least 2.
    """
    total = len(times_s)
    # Taken by index, frames can lie the jitter further apart; thinned by less than that, it would show.
    if is_steady(times_s, most=math.inf if count >= total else (total - 1) / (count - 1) - 1):
        return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()]
    times = np.asarray(times_s, dtype=np.float64)
    step = (times[-1] - times[0]) / (count - 1)
    # Frame i is nearest to what lies between the middles before and after it; it is taken if a multiple of the
    # step does. So no list of the times is needed, however many they are.
    passed = np.minimum(np.floor(((times[:-1] + times[1:]) / 2 - times[0]) / step), count - 2)
    taken = np.diff([-1.0, *passed, count - 1]) > 0
    return [int(i) for i in np.flatnonzero(taken)]


def frames_at(times_s: Sequence[float], duration_s: float, max_fps: float | None) -> list[int]:
    """Indices of the frames of a clip that are left at `max_fps`; None keeps all.

    What is promised: at most ``duration_s * max_fps`` frames in all, and in any stretch of s seconds at most
    ``s * max_fps``, rounded up, and two more: the frames before and after a pause stand for the pause too. The first
    and the last frame always stay.

    Raises:
        ConfigError: If `max_fps` is neither None nor a finite number above 0.
    """
    if max_fps is None:
        return list(range(len(times_s)))
    if not is_number(max_fps) or max_fps <= 0:
        raise ConfigError(f"max_fps is {max_fps!r}; expected None or a finite number above 0")
    return evenly(times_s, max(2, _due(times_s, duration_s, max_fps)))


def sample(times_s: Sequence[float], duration_s: float, limits: Limits) -> list[int]:
    """Indices of `video_fps` frames a second, spread evenly over the time, within the frame limits.

    At a constant rate the rule of transformers' `Qwen3VLVideoProcessor.sample_frames`. Where that finds fewer than
    `min_frames`, the frames furthest from those taken are added.
    """
    wanted = min(_due(times_s, duration_s, limits.video_fps), limits.max_frames)
    taken = evenly(times_s, max(wanted, limits.min_frames))
    times = np.asarray(times_s, dtype=np.float64)
    while len(taken) < min(limits.min_frames, len(times)):
        distance = np.abs(times[:, None] - times[taken]).min(axis=1)
        distance[taken] = -1.0
        taken = sorted([*taken, int(distance.argmax())])
    return taken


def _due(times_s: Sequence[float], duration_s: float, fps: float) -> int:
    """How many frames there may be at `fps`. A last frame that stays on is one frame, however long."""
    over, between = duration_s * fps, (times_s[-1] - times_s[0]) * fps
    return math.floor(min(over, between + 1, _MOST_TARGETS) + 1e-6)
