"""Frames are taken by their times: whatever the rate does, none is far from one that was taken, and none crowd."""

import io
import math
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from media_files import clip, shown_frames
from PIL import Image

from adaptive_fusion.features.complexity import is_still, measure_complexity
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media
from adaptive_fusion.media.pixels import Limits
from adaptive_fusion.media.sampling import evenly, frames_at, sample

gaps = st.one_of(
    st.floats(0, 30),
    st.sampled_from([0.0, 1 / 30, 1 / 12, 0.5, 20.0]),  # bursts and pauses
    st.floats(0.08, 0.12),  # nearly constant
)


@st.composite
def clips(draw: Any) -> tuple[list[float], float]:
    """Times of the frames of a clip, and its duration."""
    if draw(st.booleans()):
        few = st.lists(gaps, min_size=1, max_size=60)
    else:
        few = st.lists(st.floats(0.08, 0.12), min_size=3, max_size=60)
    times = list(accumulate(draw(few), initial=0.0))
    return times, times[-1] + draw(st.sampled_from([0.04, 1.0, 60.0]))


def furthest(times: list[float], taken: list[int]) -> float:
    """The longest way from a frame to one that was taken."""
    return max(min(abs(time - times[i]) for i in taken) for time in times)


@settings(max_examples=300, deadline=None)
@given(clips(), st.integers(2, 80))
def test_every_frame_is_within_one_step_of_one_that_is_taken(clip: tuple[list[float], float], count: int) -> None:
    times, _ = clip
    taken = evenly(times, count)
    assert taken == sorted(set(taken)) and taken[0] == 0 and taken[-1] == len(times) - 1 and len(taken) <= count
    assert furthest(times, taken) <= times[-1] / (count - 1) * (1 + 1e-9) + 1e-9


@settings(max_examples=300, deadline=None)
@given(clips(), st.floats(0.05, 40) | st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.05, 10))
def test_no_stretch_of_time_holds_more_than_its_frames_and_two(
    clip: tuple[list[float], float], fps: float, stretch: float
) -> None:
    times, duration = clip
    taken = [times[i] for i in frames_at(times, duration, fps)]
    assert len(taken) <= max(2, duration * fps + 1e-6)
    for begin in taken:
        assert sum(begin <= time < begin + stretch for time in taken) <= math.ceil(stretch * fps) + 2
    assert len(frames_at(taken, duration, fps)) == len(taken)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 3000),
    st.sampled_from([1, 10, 12, 24, 24000 / 1001, 25, 30000 / 1001, 30, 50, 60, 120]) | st.floats(0.2, 240),
    st.floats(0.1, 250),
    st.sampled_from([Limits(), Limits(video_fps=1, max_frames=16), Limits(video_fps=4, min_frames=8, max_frames=768)]),
)
def test_at_a_constant_rate_the_frames_are_those_of_transformers(
    total: int, rate: float, fps: float, limits: Limits
) -> None:
    times, duration = [i / rate for i in range(total)], total / rate

    def linspace(count: int) -> list[int]:
        return np.linspace(0, total - 1, min(total, count)).round().astype(int).tolist()

    wanted = math.floor(duration * limits.video_fps + 1e-6)
    assert sample(times, duration, limits) == linspace(min(max(wanted, limits.min_frames), limits.max_frames))
    assume(abs(rate - fps) > 1e-6 * rate)  # where thinning just begins, rounding decides
    assert frames_at(times, duration, fps) == linspace(max(2, math.floor(duration * fps + 1e-6)))


def test_absurd_rates_and_crowded_frames_take_no_time_or_memory() -> None:
    for times in ([0.0, 1e-9, 5.0], [0.0] * 5, [0.0, 0.0, 1.0, 1.0], [0.0, 1e12]):
        for fps in (1e-300, 1.0, 1e300):
            taken = frames_at(times, times[-1] + 1.0, fps)
            assert taken[0] == 0 and taken[-1] == len(times) - 1


RECORDING = (*(i * 100 for i in range(48)), 25_000, 45_000)
"""Milliseconds: five seconds of scrolling, a dialog shown for 20 s, another screen."""


def test_a_screen_recording_shows_what_was_on_the_screen_not_how_often_it_was_drawn() -> None:
    """The same file by every way in: a video, its keyframes, an animation, a clip that is thinned."""
    data = clip("matroska", frames=len(RECORDING), ticks=RECORDING)
    video = load_media(data)
    assert {48, 49} <= set(shown_frames(video)) and sum(t < 5 for t in video.timestamps_s) <= 11
    every = load_media(clip("matroska", frames=50, ticks=RECORDING), limits=Limits(video_fps=100, max_frames=768))
    assert len(every.frames) == 50
    thin = every.at_most(1.0)
    assert shown_frames(thin) == shown_frames(every.at_most(1.0).at_most(1.0)) and {48, 49} <= set(shown_frames(thin))
    seconds = [int(t) for t in thin.timestamps_s]
    assert max(seconds.count(s) for s in seconds) <= 2 and len(seconds) <= 9
    keyframes = load_media(
        clip("matroska", frames=50, ticks=RECORDING, gop=2), limits=Limits(max_decode_megapixels=40 * 64 * 48 / 1e6)
    )
    assert sum(t < 5 for t in keyframes.timestamps_s) <= 11 and keyframes.timestamps_s[-1] >= 25


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_of_many_frames_keeps_the_one_that_stays(form: str) -> None:
    lasts = [20] * 150 + [20_000] + [20] * 60
    frames = [Image.new("RGB", (6, 4), (i, 255 - i, 0)) for i in range(len(lasts))]
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=lasts, **options)
    video = load_media(buffer.getvalue(), limits=Limits(max_frames=16))
    shades = video.frames[:, 0, 0, 0].astype(int).tolist()
    assert shades[0] == 0 and shades[-1] == 210 and 150 in shades and video.total_frames == 211
    starts = list(accumulate(lasts, initial=0))
    assert video.timestamps_s == pytest.approx([starts[shade] / 1000 for shade in shades])


def test_a_dialog_after_a_burst_of_equal_frames_is_seen() -> None:
    frames = np.full((50, 64, 64, 3), 255, np.uint8)
    frames[48, 16:48, 16:48] = 0
    burst = Video(frames, tuple(ms / 1000 for ms in RECORDING), 65.0, 50)
    assert not is_still(measure_complexity(burst))
    assert is_still(measure_complexity(Video(frames[:48], burst.timestamps_s[:48], 65.0, 50)))
