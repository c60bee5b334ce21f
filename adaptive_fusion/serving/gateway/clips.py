"""Encoded videos made smaller: fewer frames, each no larger than asked for, at the times that they had.

What comes out is MP4 with H.264, whatever came in, without sound. PyAV is the optional extra ``[video]``. The same
bytes in give the same bytes out. Knows bytes and frames. Must not know of requests, plans or engines.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from math import sqrt
from typing import Any

import cv2

from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media, read_header
from adaptive_fusion.media.pixels import DEFAULT, Limits

_CLOCK_HZ = 90_000
_MOST_FRAMES = 768
"""Frames above which a clip is sampled even where only its pixels are to be fewer; Qwen's own limit."""
_ALL_FPS = 1000.0
"""A rate that no clip has: `max_frames` alone decides."""
_PICTURES = (b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II", b"MM")
_OPTIONS = {"crf": "18", "preset": "veryfast", "bf": "0", "threads": "1"}


@dataclass(frozen=True)
class Reencoded:
    """A clip encoded anew: its bytes and what they are, frames now and before, and pixels of a frame."""

    data: bytes
    frames: int
    total_frames: int
    width: int
    height: int
    media_type: str = "video/mp4"


def unavailable() -> str | None:
    """Why no clip is encoded anew here; None where clips are."""
    return None if find_spec("av") is not None else "clips need: pip install adaptive-fusion[video]"


def clip(
    data: bytes, max_frames: int | None, max_pixels: int | None, *, side: int = 2, limits: Limits = DEFAULT
) -> Reencoded | None:
    """The clip with at most `max_frames` frames, evenly spread, of at most `max_pixels` each; None where it is to be
    sent as it came: it is small enough, an animated image, a clip of one frame, or `unavailable` has a reason.

    Args:
        data: Encoded video.
        max_frames: At least 2; None keeps all, up to 768.
        max_pixels: Of a frame; None keeps them, within ``limits.max_side``.
        side: Sides of frames are rounded down to multiples of this even number.
        limits: On what the header claims and what is decoded.

    Raises:
        MediaError: For what is no picture or clip, is broken, or is beyond the limits.
    """
    picture = data.startswith(_PICTURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    if unavailable() is not None or picture or (max_frames is None and max_pixels is None):
        return None
    _, width, height = read_header(data, limits=limits)
    longest = limits.max_side
    if max_pixels is not None:
        longest = min(longest, max(1, int(max(width, height) * min(1.0, sqrt(max_pixels / (width * height))))))
    most = max(2, max_frames or _MOST_FRAMES)
    wanted = replace(limits, video_fps=_ALL_FPS, min_frames=2, max_frames=most, max_side=longest)
    video = load_media(data, limits=wanted)
    if not isinstance(video, Video):
        return None
    smaller = max_pixels is not None and width * height > max_pixels
    if len(video.frames) == video.total_frames and not smaller:
        return None
    return encoded(video, side)


def encoded(video: Video, side: int = 2) -> Reencoded:
    """Sampled frames as MP4 with H.264, each at its time; sides are multiples of `side`."""
    high, wide = (max(side, edge - edge % side) for edge in video.frames.shape[1:3])
    return Reencoded(_written(video, wide, high), len(video.frames), video.total_frames, wide, high)


def _written(video: Video, width: int, height: int) -> bytes:
    """The frames, each at its time; the last one lasts until the clip's end."""
    import av

    out = BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=max(1, round(video.fps)), options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, _CLOCK_HZ)
        packets = list(_packets(stream, video, width, height))
        end = round(video.duration_s * _CLOCK_HZ)
        for packet, after in zip(packets, [*(one.pts for one in packets[1:]), end], strict=True):
            packet.duration = max(1, after - packet.pts)
            container.mux(packet)
    return out.getvalue()


def _packets(stream: Any, video: Video, width: int, height: int) -> Iterator[Any]:
    import av

    for pixels, shown_s in zip(video.frames, video.timestamps_s, strict=True):
        if pixels.shape[:2] != (height, width):
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = round(shown_s * _CLOCK_HZ), Fraction(1, _CLOCK_HZ)
        yield from stream.encode(frame)
    yield from stream.encode(None)
