"""Clips: which frames are taken, with which times, upright and small enough."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from media_files import CONTAINERS, FPS, animation, clip, encode, shown_frames
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import kind, load_media
from adaptive_fusion.media.pixels import Limits

VIDEOS = Path(os.environ.get("ADAPTIVE_FUSION_DATA", "data")) / "videos"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_clips_with_their_own_times(form: str) -> None:
    video = load_media(animation(form, [100, 300, 50, 250, 0, 500]))
    assert isinstance(video, Video) and kind(video) == "video" and video.total_frames == 6
    # 0 ms counts as 100 ms; 1.3 s at 2 a second is below the minimum of 4 frames: 0, 2, 3 and 5 are taken.
    assert video.timestamps_s == pytest.approx((0.0, 0.4, 0.45, 0.8)) and video.duration_s == pytest.approx(1.3)
    assert np.abs(video.frames[:, 0, 0, 0].astype(int) - [0, 20, 30, 50]).max() <= 2


def test_a_long_animation_is_thinned_evenly_in_one_pass() -> None:
    frames = [Image.new("L", (4, 4), i) for i in range(200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40)
    video = load_media(data, limits=Limits(max_frames=32, video_fps=1))
    assert video.total_frames == 200 and len(video.frames) == 8 and video.duration_s == pytest.approx(8)
    steps = np.diff(video.timestamps_s)
    assert video.timestamps_s[0] == 0 and steps.min() > 0.6 * steps.max() and video.timestamps_s[-1] > 7
    shades = video.frames[:, 0, 0, 0].astype(int)
    assert (shades == [round(t / 0.04) for t in video.timestamps_s]).all()


def test_the_still_of_an_apng_is_not_part_of_the_clip() -> None:
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in (200, 10, 20)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True, duration=100)
    assert load_media(data).frames[:, 0, 0, 0].tolist() == [10, 20]


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_videos_are_sampled_at_two_frames_a_second_with_true_times(container: str, codec: str) -> None:
    video = load_media(clip(container, codec))
    wanted = [round(i * 47 / 7) for i in range(8)]  # 48 frames, 4 s: 8 frames with both ends
    assert shown_frames(video) == wanted and video.total_frames == 48
    assert video.timestamps_s == pytest.approx([i / FPS for i in wanted], abs=2e-3)
    assert video.duration_s == pytest.approx(4, abs=2e-3) and video.fps == pytest.approx(2, abs=2e-3)


@pytest.mark.parametrize("gop", [1, 7, 1000])
def test_seeking_by_keyframe_finds_the_same_frames_as_reading_on(gop: int) -> None:
    video = load_media(clip(frames=50, gop=gop), limits=Limits(video_fps=1.5))
    assert shown_frames(video) == [round(i * 49 / 5) for i in range(6)]


def test_a_variable_frame_rate_keeps_its_times() -> None:
    ticks = (0, 100, 150, 1900, 2000, 4000)
    video = load_media(clip("matroska", frames=6, ticks=ticks), limits=Limits(min_frames=6))
    assert video.timestamps_s == pytest.approx([t / 1000 for t in ticks])


def test_frames_come_upright_and_shrunk() -> None:
    video = load_media(clip(size=(128, 64), rotation=90), limits=Limits(max_side=40))
    assert video.frames.shape[1:] == (40, 20, 3)
    corner = video.frames[0, -8:, :4].mean()  # 90 degrees counter-clockwise takes the upper left mark down
    assert corner > 240 and video.frames[0, :8].mean() < 20


def test_a_video_that_is_long_to_decode_is_sampled_at_keyframes_or_refused() -> None:
    few = Limits(max_decode_megapixels=12 * 64 * 48 / 1e6)  # 12 frames
    video = load_media(clip(frames=50, gop=10), limits=few)
    assert len(video.frames) >= 4 and all(frame % 10 == 0 for frame in shown_frames(video))
    assert video.timestamps_s == pytest.approx([i / FPS for i in shown_frames(video)], abs=1e-3)
    with pytest.raises(MediaError, match="keyframes"):
        load_media(clip(frames=50, gop=1000), limits=few)
    with pytest.raises(MediaError, match="more than"):
        load_media(animation("GIF", [20] * 30), limits=Limits(max_decode_megapixels=20 * 200 / 1e6))


def test_bare_frames_are_taken_at_the_sampling_rate() -> None:
    frames = np.stack([np.full((6, 8, 3), i, np.uint8) for i in range(100)])
    for source in (frames, list(frames), [Image.fromarray(f) for f in frames]):
        video = load_media(source)
        assert len(video.frames) == 64 and video.total_frames == 100 and video.fps == pytest.approx(64 / 50)
        assert [2 * t for t in video.timestamps_s] == video.frames[:, 0, 0, 0].tolist()
        assert load_media(video) is video
    small = load_media(frames[:4] / 255, limits=Limits(max_side=4))
    assert small.frames.shape == (4, 3, 4, 3) and small.frames[3].max() == 3


def test_metadata_gives_transformers_the_true_times() -> None:
    ticks = (0, 100, 150, 1900, 2000, 4000)
    metadata = load_media(clip("matroska", frames=6, ticks=ticks), limits=Limits(min_frames=6)).metadata()
    # transformers.video_utils.VideoMetadata.timestamps, and .sampled_fps
    times = [index / metadata["fps"] for index in metadata["frames_indices"]]
    assert times == pytest.approx([t / 1000 for t in ticks])
    sampled_fps = len(times) / metadata["total_num_frames"] * metadata["fps"]
    assert sampled_fps == pytest.approx(6 / metadata["duration"])
    assert metadata["total_num_frames"] > metadata["frames_indices"][-1]


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="needs the folder videos/ with real clips under $ADAPTIVE_FUSION_DATA")
@pytest.mark.parametrize("name", ["intel_asl_again.mkv", "opencv_tree.avi", "mmaction_demo.mp4"])
def test_real_clips_load_with_increasing_times(name: str) -> None:
    video = load_media(VIDEOS / name, limits=Limits(max_frames=4, max_side=160))
    assert len(video.frames) == 4 and max(video.frames.shape[1:3]) == 160
    assert 0 == video.timestamps_s[0] < video.timestamps_s[1] < video.timestamps_s[-1] <= video.duration_s


def test_without_pyav_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"pip install adaptive-fusion\[video\]"):
        load_media(clip())
