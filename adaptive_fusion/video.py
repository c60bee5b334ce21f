"""Clips as data, and how to sample them from videos, animated images and bare frames.

Knows frames and their times. Must not know where the bytes came from, nor anything of models. PyAV (FFmpeg)
is the optional extra `[video]`, imported only when a video file is decoded.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.pixels import Array, Limits, check_size, fit, from_array, to_rgb, to_uint8

_METADATA_CLOCK_HZ = 1_000_000
_BROWSER_DEFAULT_FRAME_S = 0.1  # browsers show animation frames of 10 ms or less for 100 ms
_MAX_ANIMATION_FRAMES = 10_000
_LEAST_SHARE_PRESENT = 0.9


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

        Both ends stay, so there are always two frames; duration and `total_frames` are those of the whole clip.
        """
        total = len(self.frames)
        count = frames_at(total, self.duration_s, max_fps)
        if count == total:
            return self
        chosen = [int(i) for i in np.linspace(0, total - 1, count).round()]
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


def frames_at(total: int, duration_s: float, max_fps: float | None) -> int:
    """How many of a clip's `total` frames are left at `max_fps`: at least its first and its last.

    Raises:
        ConfigError: If `max_fps` is neither None nor a finite number above 0.
    """
    if max_fps is None:
        return total
    if not isinstance(max_fps, int | float) or not 0 < max_fps < math.inf:
        raise ConfigError(f"max_fps is {max_fps!r}; expected None or a finite number above 0")
    return min(total, max(2, math.floor(duration_s * max_fps + 1e-6)))


def sample(total: int, duration_s: float, limits: Limits) -> list[int]:
    """Indices of `video_fps` frames a second, spread evenly over `total` frames, within the frame limits.

    The rule of transformers' `Qwen3VLVideoProcessor.sample_frames`: both ends are included.
    """
    wanted = math.floor(min(duration_s * limits.video_fps, limits.max_frames) + 1e-6)
    count = min(max(wanted, limits.min_frames), limits.max_frames, total)
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def from_frames(name: str, frames: Array | Sequence[Any], limits: Limits) -> Video | Image.Image:
    """Clip of bare frames: an array (T, H, W, 3) or a list of PIL images and arrays, all of one size.

    Bare frames carry no times: they are taken to be `limits.video_fps` a second. More than
    `limits.max_frames` are thinned evenly and keep their times. One frame is an image. Raises MediaError.
    """
    total = len(frames)
    if total == 0:
        raise MediaError(f"{name} has no frames; a clip needs at least one")
    chosen = [int(i) for i in np.linspace(0, total - 1, min(total, limits.max_frames)).round()]
    if isinstance(frames, np.ndarray) and frames.ndim == 4 and frames.shape[3] == 3 and total > 1:
        height, width = frames.shape[1:3]
        check_size(name, width, height, limits)
        if fit(width, height, limits.max_side) == (width, height):
            kept = frames if len(chosen) == total else frames[chosen]
            times = tuple(i / limits.video_fps for i in chosen)
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
    times = tuple(i / limits.video_fps for i in chosen)
    return Video(_stack(pictures), times, total / limits.video_fps, total)


def from_animation(name: str, image: Image.Image, limits: Limits) -> Video | Image.Image:
    """Clip of an opened animated GIF, WebP or APNG; times follow from the durations of its frames.

    These formats decode in order only and need not say how many frames come, so one pass keeps every 2^k-th
    frame, with k growing as needed: at most 2 x max_frames are held. Frame durations of 10 ms or less count
    as 100 ms, as in browsers. Call within `decoding`; raises MediaError when the clip exceeds the limits.
    """
    kept: list[tuple[float, Image.Image]] = []
    size, stride, time_s, count = image.size, 1, 0.0, 0
    # An APNG may carry a still that is shown only where animation is not supported.
    start = 1 if getattr(image, "default_image", False) else 0
    while _seek(image, start + count):
        check_size(name, *image.size, limits)  # a GIF's later frames can enlarge its canvas
        work = (count + 1) * image.width * image.height / 1e6
        if work > limits.max_decode_megapixels or count >= _MAX_ANIMATION_FRAMES:
            raise MediaError(
                f"{name} has more than {count} frames of {image.width}x{image.height} pixels; at most "
                f"{_MAX_ANIMATION_FRAMES} frames and {limits.max_decode_megapixels:g} megapixels in all pass"
            )
        image.load()
        if count % stride == 0:
            kept.append((time_s, _shrink(to_rgb(image), fit(*size, limits.max_side)) if count else to_rgb(image)))
        if len(kept) > 2 * limits.max_frames:
            kept, stride = kept[::2], stride * 2
        shown_s = float(image.info.get("duration", 0)) / 1000
        time_s += shown_s if 0.01 < shown_s < math.inf else _BROWSER_DEFAULT_FRAME_S
        count += 1
    if count < 2:
        if not kept:
            raise MediaError(f"{name} has no frames")
        return kept[0][1]
    chosen = [kept[i] for i in sample(len(kept), time_s, limits)]
    target = fit(*size, limits.max_side)
    frames = _stack([_shrink(picture, target) for _, picture in chosen])
    return Video(frames, tuple(t for t, _ in chosen), time_s, count)


def decode_video(name: str, file: IO[bytes], demuxer: str, limits: Limits) -> Video | Image.Image:
    """Sample a video file by PyAV without holding more than the sampled frames.

    All packets are read first, undecoded: that gives the exact time of every frame, the keyframes to seek
    to, and the work ahead, whatever the header claims. Frames come upright (by the display matrix) and
    shrunk to `limits.max_side`. A file that ends before what its header lists is refused; Matroska, WebM and
    fragmented MP4 list nothing, being made for streaming, and count as far as they go.

    Args:
        file: seekable; FFmpeg reads nothing else (the demuxer is fixed, references are refused).
        demuxer: FFmpeg's short name: "mov", "matroska" or "avi".

    Raises:
        MediaError: PyAV is missing, no frames, a size beyond the limits, too much to decode, fewer frames
            than the header promises. Other exceptions come from FFmpeg: call within `decoding`.
    """
    try:
        import av
    except ImportError as error:
        raise MediaError(f"{name} is a video; to decode it: pip install adaptive-fusion[video]") from error
    pictures: list[Array] = []
    shown_s: list[float] = []
    with av.open(
        file, "r", format=demuxer, io_open=_refuse_reference, metadata_errors="replace", buffer_size=1 << 18
    ) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise MediaError(f"{name} has no video stream")
        check_size(name, stream.width, stream.height, limits)
        # The codec's own header may claim another size than the container: refuse it before it allocates.
        stream.codec_context.options = {"max_pixels": str(int(limits.max_megapixels * 1e6))}
        stream.thread_type = "AUTO"
        index = _read_index(name, container, stream)
        targets = _plan(name, index, stream.width, stream.height, limits)
        for ticks, frame in _frames_at(container, stream, targets, index.keys):
            pictures.append(_frame_rgb(name, frame, pictures[:1], limits))
            shown_s.append(max(0.0, (ticks - index.times[0]) * index.tick_s))
    if len(pictures) < math.ceil(len(targets) / 2):
        raise MediaError(f"{name} is broken: {len(pictures)} of {len(targets)} sampled frames can be decoded")
    if len(pictures) == 1:
        return Image.fromarray(pictures[0])
    return Video(np.stack(pictures), tuple(shown_s), max(index.duration_s, shown_s[-1]), len(index.times))


class _Index(NamedTuple):
    """Display times of all frames and of the keyframes, ascending, in ticks of `tick_s` seconds."""

    times: list[int]
    keys: list[int]
    tick_s: float
    duration_s: float


def _read_index(name: str, container: Any, stream: Any) -> _Index:
    found: list[tuple[int, int, bool]] = []
    present = 0
    for packet in container.demux(stream):
        ticks = packet.dts if packet.pts is None else packet.pts
        present += packet.size > 0
        if packet.size and ticks is not None and not packet.is_discard:
            found.append((ticks, packet.duration or 0, packet.is_keyframe))
    if not found:
        raise MediaError(f"{name} has no frames")
    found.sort()
    times = [ticks for ticks, _, _ in found]
    keys = [ticks for ticks, _, is_key in found if is_key] or times[:1]
    span = times[-1] - times[0]
    span += found[-1][1] or span // max(1, len(times) - 1)
    # Either alone misleads: AVI counts repeated frames that hold no data, edit lists shorten the duration.
    if max(present / (stream.frames or 1), span / (stream.duration or 1)) < _LEAST_SHARE_PRESENT:
        raise MediaError(f"{name} is cut short: {present} of {stream.frames} frames are there")
    tick_s = float(stream.time_base)
    return _Index(times, keys, tick_s, span * tick_s)


def _plan(name: str, index: _Index, width: int, height: int, limits: Limits) -> list[int]:
    """Ticks of the frames to take: evenly spread, or their keyframes if that is too much to decode."""
    times, keys = index.times, index.keys
    affordable = limits.max_decode_megapixels * 1e6 / (width * height)
    targets = [times[i] for i in sample(len(times), index.duration_s, limits)]
    work, decoded_to = 0, 0
    for target in targets:  # as `_frames_at` walks: from the last target or the nearest keyframe, to the next
        end = bisect_right(times, target)
        work += max(0, end - max(decoded_to, bisect_left(times, _keyframe_before(keys, target))))
        decoded_to = end
    if work <= affordable:
        return targets
    targets = sorted({_keyframe_before(keys, target) for target in targets})
    if min(limits.min_frames, len(times)) <= len(targets) <= affordable:
        return targets
    raise MediaError(
        f"{name} has {len(times)} frames of {width}x{height} pixels but {len(keys)} keyframes; sampling it "
        f"takes more than {limits.max_decode_megapixels:g} megapixels of decoding"
    )


def _keyframe_before(keys: list[int], ticks: int) -> int:
    return keys[max(0, bisect_right(keys, ticks) - 1)]


def _frames_at(container: Any, stream: Any, targets: list[int], keys: list[int]) -> Iterator[tuple[int, Any]]:
    """(ticks, frame) of the first frame at or after each target, skipping ahead by keyframe."""
    position: int = -(1 << 63)
    decoded: Iterator[Any] = iter(())
    for target in targets:
        if position >= target:
            continue
        if (key := _keyframe_before(keys, target)) > position:
            container.seek(key, stream=stream, backward=True)
            decoded = container.decode(stream)
        for frame in decoded:
            ticks = frame.dts if frame.pts is None else frame.pts
            position = position + 1 if ticks is None else int(ticks)
            if position >= target:
                yield position, frame
                break


def _frame_rgb(name: str, frame: Any, first: list[Array], limits: Limits) -> Array:
    """Upright (H, W, 3) uint8 of a decoded frame, in the size of the first frame if there is one."""
    check_size(name, frame.width, frame.height, limits)
    width, height = fit(frame.width, frame.height, limits.max_side)
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="AREA")
    rgb = np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
    if first and rgb.shape != first[0].shape:  # some streams change size midway
        height, width = first[0].shape[:2]
        rgb = np.asarray(Image.fromarray(rgb).resize((width, height)))
    return rgb


def _refuse_reference(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError("references to other files are not followed")


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
