"""A clip is sent with fewer frames at the times that they had, or as it came."""

import numpy as np
import pytest
from server import mp4, png

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media
from adaptive_fusion.media.pixels import Limits
from adaptive_fusion.serving.gateway.clips import clip

EVERY = Limits(video_fps=1000, max_frames=64, min_frames=2)


def test_fewer_frames_keep_their_times_and_what_they_show() -> None:
    data = mp4(12)
    made, before = clip(data, 4, None), load_media(data, limits=EVERY)
    assert made is not None and made == clip(data, 4, None) and isinstance(before, Video)
    after = load_media(made.data, limits=EVERY)
    assert isinstance(after, Video)
    assert (made.frames, made.total_frames, len(after.frames)) == (4, 12, 4)
    assert after.duration_s == pytest.approx(before.duration_s, abs=0.01)
    for frame, shown_s in zip(after.frames, after.timestamps_s, strict=True):
        nearest = int(np.argmin([abs(each - shown_s) for each in before.timestamps_s]))
        assert before.timestamps_s[nearest] == pytest.approx(shown_s, abs=1e-3)
        assert abs(frame.astype(int) - before.frames[nearest]).mean() < 4


def test_frames_are_made_smaller_to_multiples() -> None:
    made = clip(mp4(6), None, 32 * 24 + 8, side=4)
    assert made is not None and made.frames == 6
    assert made.width % 4 == made.height % 4 == 0 and made.width * made.height <= 32 * 24 + 8


def test_what_is_small_enough_or_no_film_is_left_alone() -> None:
    assert clip(mp4(6), 6, 64 * 48) is None and clip(mp4(6), None, None) is None and clip(png(64, 48), 2, 64) is None
    with pytest.raises(MediaError):
        clip(mp4(6)[:200], 2, None)
