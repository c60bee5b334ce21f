"""Video files to sampled clips: which frames to decode, and where to start.

Knows containers, frame times and rotation. PyAV (FFmpeg) is the optional extra `[video]`, imported only when a file is
decoded. Must not know of models.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.pixels import Array, Limits, check_size, fit
from adaptive_fusion.media.sampling import sample

_LEAST_SHARE_PRESENT = 0.9


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
    pictures: list[Array] = []
    shown_s: list[float] = []
    with _opened(name, file, demuxer, limits) as (container, stream):
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


def video_size(name: str, file: IO[bytes], demuxer: str, limits: Limits) -> tuple[int, int]:
    """(width, height) of a video's frames as its header has them; arguments and errors as of `decode_video`."""
    with _opened(name, file, demuxer, limits) as (_, stream):
        return stream.width, stream.height


@contextmanager
def _opened(name: str, file: IO[bytes], demuxer: str, limits: Limits) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, of a size within the limits."""
    try:
        import av
    except ImportError as error:
        raise MediaError(f"{name} is a video; to decode it: pip install adaptive-fusion[video]") from error
    with av.open(
        file, "r", format=demuxer, io_open=_refuse_reference, metadata_errors="replace", buffer_size=1 << 18
    ) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise MediaError(f"{name} has no video stream")
        check_size(name, stream.width, stream.height, limits)
        yield container, stream


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
    """Ticks of the frames to take: evenly spread over time, or their keyframes if that is too much to decode."""
    times, keys = index.times, index.keys
    affordable = limits.max_decode_megapixels * 1e6 / (width * height)
    shown_s = [(ticks - times[0]) * index.tick_s for ticks in times]
    targets = [times[i] for i in sample(shown_s, index.duration_s, limits)]
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
