"""Several images and clips in one request: each keeps its own pixels, and what was planned is what runs."""

from copy import copy, deepcopy
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLVideoProcessor

from adaptive_fusion.media.clips import Video
from adaptive_fusion.models import Size
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner

ASKED = "What happens?"
VIDEOS = {
    "limits for the whole clip": lambda own: own,
    "limits for the whole clip, capped per frame": lambda own: _with(own, cap_pixels_per_frame=True),
    "a cap that takes hold": lambda own: _with(own, cap_pixels_per_frame=True, max_video_tokens=9),
    "limits for a frame": lambda own: Qwen2VLVideoProcessor(**_per_frame(own)),
    "limits for a frame, capped": lambda own: Qwen2VLVideoProcessor(**_per_frame(own), cap_pixels_per_frame=True),
    "limits for a frame, a cap that takes hold": lambda own: Qwen2VLVideoProcessor(
        **_per_frame(own), cap_pixels_per_frame=True, max_video_tokens=40
    ),
}


def _with(processor: Any, **changed: Any) -> Any:
    changed_one = deepcopy(processor)
    for name, value in changed.items():
        setattr(changed_one, name, value)
    return changed_one


def _per_frame(own: Any) -> dict[str, Any]:
    return {
        "patch_size": own.patch_size,
        "merge_size": own.merge_size,
        "temporal_patch_size": own.temporal_patch_size,
        "size": {"shortest_edge": 1024, "longest_edge": 147456},
        "return_metadata": True,
    }


@pytest.fixture(scope="module", params=list(VIDEOS))
def runner(request: pytest.FixtureRequest, tiny_dense: Any, processor: Any) -> AdaptiveRunner:
    own = copy(processor)
    own.video_processor = VIDEOS[request.param](processor.video_processor)
    return AdaptiveRunner(tiny_dense, own, policy="native")


@st.composite
def clips(draw: Any) -> Video:
    count, height, width = draw(st.integers(2, 21)), draw(st.integers(2, 140)), draw(st.integers(2, 140))
    gaps = draw(st.sampled_from([[0.5], [0.1], [0.05, 0.05, 0.05, 4.0]]))
    times = tuple(accumulate((gaps[i % len(gaps)] for i in range(count - 1)), initial=0.0))
    return Video(np.zeros((count, height, width, 3), np.uint8), times, times[-1] + 0.5, count)


images = st.builds(Image.new, st.just("RGB"), st.tuples(st.integers(2, 300), st.integers(2, 300)))
points = st.builds(
    OperatingPoint,
    downsample=st.sampled_from([1.0, 0.5, 0.25]),
    max_pixels=st.none() | st.integers(1024, 40_000),
    max_fps=st.none() | st.sampled_from([0.5, 1.0, 3.0]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(images | clips(), min_size=1, max_size=4), points)
@example([Video(np.zeros((4, 3, 40, 3), np.uint8), (0.0, 0.5, 1.0, 1.5), 2.0, 4)], NATIVE)  # channels first, or last?
def test_what_was_planned_is_what_runs(runner: AdaptiveRunner, media: list[Any], point: OperatingPoint) -> None:
    adapter = runner.adapter
    parts = [{"type": (kind := "video" if isinstance(m, Video) else "image"), kind: m} for m in media]
    inputs = adapter.prepare([{"role": "user", "content": [*parts, {"type": "text", "text": ASKED}]}], point)
    real = adapter.plan(adapter.sizes(inputs), point)
    planned = runner.work(media, ASKED, point, 1)
    # Of the same question, all but the visual tokens are the same text.
    text = runner.work(None, ASKED, point, 1).prompt_tokens
    assert sorted(planned.patches) == sorted(real.segments) and planned.prompt_tokens - text == real.tokens
    for kind in ("image", "video"):
        pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
        if pixels in inputs:
            assert len(inputs[pixels]) == int(inputs[f"{kind}_grid_thw"].prod(dim=1).sum())
            placeholders = int((inputs["input_ids"] == getattr(runner.model.config, f"{kind}_token_id")).sum())
            assert 4 * placeholders == len(inputs[pixels])


def moving(count: int, side: int, seed: int) -> Video:
    frames = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Video(frames, tuple(i / 2 for i in range(count)), count / 2, count)


def test_a_short_clip_leaves_a_long_one_its_pixels(tiny_dense: Any, processor: Any) -> None:
    """Each clip gives the tensors that it gives alone, at the same point; the prompt holds both, with their times."""
    adapter = AdaptiveRunner(tiny_dense, processor, policy="native").adapter
    short, long = moving(2, 128, 0), moving(12, 128, 1)
    point = OperatingPoint(max_pixels=128 * 128)

    def prepared(*media: Video) -> dict[str, Any]:
        return adapter.prepare([{"role": "user", "content": [{"type": "video", "video": m} for m in media]}], point)

    alone, both = [prepared(clip) for clip in (short, long)], prepared(short, long)
    assert both["video_grid_thw"].tolist() == [[1, 16, 16], [6, 16, 16]]
    for key in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(both[key], torch.cat([one[key] for one in alone]))
    texts = [processor.tokenizer.decode(each["input_ids"][0]) for each in (*alone, both)]
    inside = [text.split("user\n")[1].split("<|im_end|>")[0] for text in texts]
    assert inside[2] == inside[0] + inside[1] and "<5.2 seconds>" in inside[1]
    assert processor.video_processor is adapter.processor.video_processor


@pytest.mark.parametrize("count", range(2, 12))
def test_a_pixel_budget_is_kept_and_used_whatever_the_number_of_frames(runner: AdaptiveRunner, count: int) -> None:
    message = {"role": "user", "content": [{"type": "video", "video": moving(count, 128, 0)}]}
    [size] = runner.adapter.sizes(runner.adapter.prepare([message], OperatingPoint(max_pixels=5184)))
    native = runner.adapter.native_pixels(Size(count, 128, 128, clip=True))
    assert min(native, 5184) * 0.6 <= size.height * size.width <= min(native, 5184)


def test_native_gives_what_the_processor_and_generate_give(runner: AdaptiveRunner) -> None:
    """Clips of unequal length beside an image, described as transformers itself would take them."""
    short, long = moving(2, 96, 0), moving(11, 72, 1)
    still = Image.fromarray(short.frames[0]).resize((150, 90))
    content = [
        {"type": "video", "video": short}, {"type": "image", "image": still}, {"type": "video", "video": long},
        {"type": "text", "text": ASKED},
    ]  # fmt: skip
    messages = [{"role": "user", "content": content}]
    text = runner.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = runner.processor(
        text=[text],
        images=[still],
        videos=[short.frames, long.frames],
        videos_kwargs={"do_sample_frames": False, "video_metadata": [short.metadata(), long.metadata()]},
        return_tensors="pt",
    )
    inputs = runner.adapter.prepare(messages, NATIVE)
    assert set(inputs) == set(expected)
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    limits: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    new = runner.model.generate(**expected, **limits)[0, expected["input_ids"].shape[1] :]
    reply = runner.chat(messages, point=NATIVE, **limits)
    assert reply.text == runner.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert reply.measurement.prompt_tokens == expected["input_ids"].shape[1]
