"""Clips as data, and how to sample them from animated images and bare frames.

Knows frames and their times. Must not know where the bytes came from, nor anything of models.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.pixels import Array, Limits, check_size, fit, from_array, to_rgb, to_uint8
from adaptive_fusion.media.sampling import evenly, frames_at, is_steady, sample

_METADATA_CLOCK_HZ = 1_000_000
_BROWSER_DEFAULT_FRAME_S = 0.1  # browsers show animation frames of 10 ms or less for 100 ms
_MAX_ANIMATION_FRAMES = 10_000


@dataclass(frozen=True, eq=False)
class Video:
    """A sampled clip of at least two frames (a clip of one frame is an image).

    Args:
        frames: (T, H, W, 3) uint8 RGB, upright.
        timestamps_s: display time of each frame in seconds from the start of the clip, never decreasing.
        duration_s: length of the whole clip in seconds.
        total_frames: frames of the clip it was sampled from.

    Raises:
        MediaError: shapes, dtype or times that do not fit together.
    """

    frames: Array
    timestamps_s: tuple[float, ...]
    duration_s: float
    total_frames: int

    def __post_init__(self) -> None:
        frames, times = self.frames, self.timestamps_s
        if not isinstance(frames, np.ndarray) or not isinstance(times, tuple):
            raise MediaError(
                f"a clip is made of {type(frames).__name__} and {type(times).__name__}; expected a numpy array of "
                "frames and a tuple of their times"
            )
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or min(frames.shape) < 1:
            raise MediaError(f"clip frames are {frames.dtype} {frames.shape}; they must be uint8 (T, H, W, 3)")
        if len(frames) < 2 or len(times) != len(frames):
            raise MediaError(f"a clip needs T >= 2 frames and T timestamps, got {len(frames)} and {len(times)}")
        if times[0] < 0 or not all(a <= b < math.inf for a, b in pairwise(times)):
            raise MediaError(f"clip timestamps must be finite, at least 0 and not decreasing, got {times[:8]}")
        if not 0 < self.duration_s < math.inf or not len(frames) <= self.total_frames < math.inf:
            raise MediaError(
                f"a clip needs a finite duration above 0 and total_frames >= T, "
                f"got {self.duration_s} s and {self.total_frames}"
            )

    @property
    def fps(self) -> float:
        """Frames per second of the returned frames."""
        return len(self.frames) / self.duration_s

    def at_most(self, max_fps: float | None) -> "Video":
        """This clip with at most `max_fps` frames a second (None: all), evenly thinned; the others keep their times.

        Frames are counted by their times, not by their number; `sampling.frames_at` says what that promises. Both
        ends stay, so there are always two frames; duration and `total_frames` are those of the whole clip.
        """
        chosen = frames_at(self.timestamps_s, self.duration_s, max_fps)
        if len(chosen) == len(self.frames):
            return self
        times = tuple(self.timestamps_s[i] for i in chosen)
        return Video(self.frames[chosen], times, self.duration_s, self.total_frames)

    def metadata(self) -> dict[str, Any]:
        """Fields of `transformers.video_utils.VideoMetadata`, to be passed with `do_sample_frames=False`.

        Its timestamps are `frames_indices / fps`, and source frames of a variable rate do not fit that; so
        the indices count microseconds, at 10^6 "frames" a second. Its `sampled_fps` is our `fps`.
        """
        ticks = [round(t * _METADATA_CLOCK_HZ) for t in self.timestamps_s]
        return {
            "total_num_frames": max(round(self.duration_s * _METADATA_CLOCK_HZ), ticks[-1] + 1),
            "fps": float(_METADATA_CLOCK_HZ),
            "frames_indices": ticks,
            "duration": self.duration_s,
            "height": int(self.frames.shape[1]),
            "width": int(self.frames.shape[2]),
        }


def from_frames(name: str, frames: Array | Sequence[Any], limits: Limits) -> Video | Image.Image:
    """Clip of bare frames: an array (T, H, W, 3) or a list of PIL images and arrays, all of one size.

    Bare frames carry no times: they are taken to be `limits.video_fps` a second. More than
    `limits.max_frames` are thinned evenly and keep their times. One frame is an image. Raises MediaError.
    """
    total = len(frames)
    if total == 0:
        raise MediaError(f"{name} has no frames; a clip needs at least one")
    shown_s = [i / limits.video_fps for i in range(total)]
    chosen = evenly(shown_s, limits.max_frames)
    if isinstance(frames, np.ndarray) and frames.ndim == 4 and frames.shape[3] == 3 and total > 1:
        height, width = frames.shape[1:3]
        check_size(name, width, height, limits)
        if fit(width, height, limits.max_side) == (width, height):
            kept = frames if len(chosen) == total else frames[chosen]
            times = tuple(shown_s[i] for i in chosen)
            return Video(to_uint8(name, kept), times, total / limits.video_fps, total)
    pictures: list[Image.Image] = []
    for i in chosen:
        frame = frames[i]
        if not isinstance(frame, np.ndarray | Image.Image):
            raise MediaError(f"{name} holds a {type(frame).__name__}; frames must be PIL images or arrays")
        if isinstance(frame, Image.Image):
            check_size(name, *frame.size, limits)
        picture = to_rgb(frame) if isinstance(frame, Image.Image) else from_array(name, frame, limits)
        if total == 1:
            return picture
        pictures.append(_shrink(picture, fit(*picture.size, limits.max_side)))
    if len(sizes := {p.size for p in pictures}) > 1:
        raise MediaError(f"{name} has frames of {len(sizes)} sizes, such as {sorted(sizes)[:2]}; a clip has one size")
    times = tuple(shown_s[i] for i in chosen)
    return Video(_stack(pictures), times, total / limits.video_fps, total)


def from_animation(name: str, image: Image.Image, limits: Limits) -> Video | Image.Image:
    """Clip of an opened animated GIF, WebP or APNG; times follow from the durations of its frames.

    These formats decode in order only and need not say how many frames come, nor when. So a first pass finds the
    times of all frames and keeps every 2^k-th of them, with k growing as needed: at most 2 x max_frames are held.
    Where those are not the frames that are wanted (many frames at a variable rate), a second pass takes these. Frame
    durations of 10 ms or less count as 100 ms, as in browsers. Call within `decoding`; raises MediaError when the
    clip exceeds the limits, which each pass may use up.
    """
    kept: dict[int, Image.Image] = {}
    shown_s: list[float] = []
    size, stride, time_s = fit(*image.size, limits.max_side), 1, 0.0  # later frames can enlarge the canvas
    for index in _walk(name, image, limits):
        if index % stride == 0:
            kept[index] = _shrink(to_rgb(image), size) if index else to_rgb(image)
        if len(kept) > 2 * limits.max_frames:
            stride *= 2
            kept = {i: picture for i, picture in kept.items() if i % stride == 0}
        shown_s.append(time_s)
        lasts_s = float(image.info.get("duration", 0)) / 1000
        time_s += lasts_s if 0.01 < lasts_s < math.inf else _BROWSER_DEFAULT_FRAME_S
    if not kept:
        raise MediaError(f"{name} has no frames")
    if len(shown_s) == 1:
        return kept[0]
    if stride == 1 or is_steady(shown_s):
        held = list(kept)
        chosen = [held[i] for i in sample([shown_s[i] for i in held], time_s, limits)]
    else:
        chosen = sample(shown_s, time_s, limits)
        kept = {i: _shrink(to_rgb(image), size) for i in _walk(name, image, limits) if i in set(chosen)}
    frames = _stack([_shrink(kept[i], size) for i in chosen])
    return Video(frames, tuple(shown_s[i] for i in chosen), time_s, len(shown_s))


def _walk(name: str, image: Image.Image, limits: Limits) -> Iterator[int]:
    """Decode the frames of an animation in turn, the image being at each for as long as its number is out."""
    # An APNG may carry a still that is shown only where animation is not supported.
    start, count = 1 if getattr(image, "default_image", False) else 0, 0
    while _seek(image, start + count):
        check_size(name, *image.size, limits)  # a GIF's later frames can enlarge its canvas
        work = (count + 1) * image.width * image.height / 1e6
        if work > limits.max_decode_megapixels or count >= _MAX_ANIMATION_FRAMES:
            raise MediaError(
                f"{name} has more than {count} frames of {image.width}x{image.height} pixels; at most "
                f"{_MAX_ANIMATION_FRAMES} frames and {limits.max_decode_megapixels:g} megapixels in all pass"
            )
        image.load()
        yield count
        count += 1


def _seek(image: Image.Image, index: int) -> bool:
    """Go to a frame; False past the last one. EOFError if the header promised more frames than there are."""
    try:
        image.seek(index)
    except EOFError:
        # Counting a GIF's frames would scan the file, and its header promises nothing.
        if image.format != "GIF" and index < getattr(image, "n_frames", 1):
            raise
        return False
    return True


def _shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _stack(pictures: Sequence[Image.Image]) -> Array:
    return np.stack([np.asarray(picture) for picture in pictures])
