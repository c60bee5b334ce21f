"""The general policies on a model that nothing was fitted to, under the limits of the released models' processor."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoProcessor

from adaptive_fusion.budget import Budget
from adaptive_fusion.decisions import Decision
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.adapting.cases import look, planner_for
from adaptive_fusion.media.clips import Video
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.escalation import SPARED_THRESHOLD
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.sufficiency import STILL_FPS
from adaptive_fusion.reference import model_path
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner

READ, DESCRIBE, OTHER = "Read all the text in the image.", "Describe the image.", "Which of them is the cheapest?"
WORDS = ("invoice", "total", "amount", "due", "payment", "received", "customer", "order", "delivery", "address", "tax")


def page(letters: int, size: tuple[int, int] = (1000, 1200), seed: int = 0) -> Image.Image:
    """Paragraphs of words, in letters of so many pixels."""
    rng, image = np.random.default_rng(seed), Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(letters)
    y = 40
    while y < size[1] - 2 * letters:
        line = " ".join(rng.choice(WORDS, int(rng.integers(3, 14))))
        while draw.textlength(line, font=font) > size[0] - 80:
            line = line.rpartition(" ")[0]
        draw.text((40, y), line, fill=(20, 20, 20), font=font)
        y += round(letters * (1.5 if rng.random() < 0.8 else 3.5))
    return image


@pytest.fixture(scope="module")
def released() -> Any:
    found = AutoProcessor.from_pretrained(model_path())
    found.image_processor.size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    return found


@pytest.fixture(scope="module")
def runner_of(tiny_dense: Any, released: Any) -> Callable[..., AdaptiveRunner]:
    def build(policy: str, **options: Any) -> AdaptiveRunner:
        return AdaptiveRunner(tiny_dense, released, policy=policy, seed=0, **{"escalate": False, **options})

    return build


def pixels(decision: Decision) -> int:
    native = decision.needs["native"]
    limit = decision.point.max_pixels
    return native if limit is None else min(native, limit)


def test_the_question_moves_the_plan_and_no_question_more_than_reading(
    runner_of: Callable[..., AdaptiveRunner],
) -> None:
    runner = runner_of("balanced")
    more = 0
    for letters in (14, 24, 32, 48):
        image = page(letters)
        decisions = [runner.decide(image, prompt) for prompt in (READ, DESCRIBE, OTHER)]
        read, described, other = (pixels(decision) for decision in decisions)
        assert described <= read and other >= decisions[2].needs["floor"]
        more += described < read
    assert more >= 2


def test_it_is_the_size_of_the_text_that_decides_and_an_enlarged_image_gets_the_same_pixels(
    runner_of: Callable[..., AdaptiveRunner],
) -> None:
    runner = runner_of("balanced")
    small, large = page(14), page(48)
    assert pixels(runner.decide(large, READ)) < pixels(runner.decide(small, READ)) / 3
    twice = small.resize((2 * small.width, 2 * small.height), Image.Resampling.BICUBIC)
    planned = [pixels(runner.decide(image, READ)) for image in (small, twice)]
    assert planned[1] <= 1.5 * planned[0]


def test_points_within_the_tolerance_count_as_equal_and_the_cheapest_is_taken(
    runner_of: Callable[..., AdaptiveRunner],
) -> None:
    image, taken = page(32), {}
    for name in ("latency", "balanced", "quality"):
        runner = runner_of(name)
        lane, offers = runner.offers(image, READ)
        best = max(offer.quality for offer in offers)
        enough = [offer for offer in offers if offer.quality >= best - Policy.load(name).tolerance]
        cheapest = min(enough, key=lambda offer: offer.predicted.latency_ms)
        decision = runner.decide(image, READ)
        assert decision.lane == lane and decision.point == cheapest.point
        assert "(text)" in decision.reason and decision.rung == cheapest.key
        ample = runner.decide(image, READ, budget=Budget(latency_ms=1e6))
        assert ample.point == cheapest.point  # a limit that binds nothing moves nothing
        taken[name] = pixels(decision)
    assert taken["latency"] <= taken["balanced"] <= taken["quality"]


def test_a_budget_goes_down_the_ladder(runner_of: Callable[..., AdaptiveRunner]) -> None:
    runner, image = runner_of("balanced"), page(14)
    free = runner.decide(image, READ)
    assert free.predicted is not None
    tight = runner.decide(image, READ, budget=Budget(ttft_ms=0.3 * free.predicted.ttft_ms))
    assert pixels(tight) < pixels(free)
    assert tight.rejected and tight.predicted is not None and tight.predicted.ttft_ms < free.predicted.ttft_ms


def test_a_clip_in_which_nothing_changes_gets_few_frames_and_one_that_moves_keeps_its_own(
    runner_of: Callable[..., AdaptiveRunner],
) -> None:
    runner = runner_of("balanced")
    rng = np.random.default_rng(0)
    still = np.repeat(np.asarray(page(24, (480, 320)))[None], 8, axis=0)
    moving = rng.integers(0, 256, (8, 320, 480, 3), np.uint8)
    times = tuple(0.5 * i for i in range(8))
    for frames, expected in ((still, STILL_FPS), (moving, None)):
        decision = runner.decide(Video(frames, times, 4.0, len(frames)), "What happens in the clip?")
        assert decision.lane == "video" and decision.point.max_fps == expected


def test_a_large_clip_that_moves_and_one_beside_an_image_keep_their_frames(
    runner_of: Callable[..., AdaptiveRunner], released: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released.video_processor, "size", {"shortest_edge": 1 << 18, "longest_edge": 1 << 26})
    runner, scene = runner_of("balanced"), np.asarray(page(48, (1100, 900)))
    frames = np.stack([scene[10 * i : 10 * i + 720, 8 * i : 8 * i + 960] for i in range(8)])
    clip = Video(frames, tuple(0.5 * i for i in range(8)), 4.0, len(frames))
    for media in (clip, [page(48), clip]):
        for prompt in (DESCRIBE, "What happens in the clip?"):
            decision = runner.decide(media, prompt)
            assert decision.needs["objects"] < decision.needs["native"] / 4  # fewer pixels would do
            assert decision.lane == "video" and decision.point.max_fps is None
    free = runner.decide(clip, DESCRIBE)
    assert free.predicted is not None
    tight = runner.decide(clip, DESCRIBE, budget=Budget(ttft_ms=0.2 * free.predicted.ttft_ms))
    assert tight.point.max_fps is not None


def test_an_unfamiliar_image_gets_full_compute_and_says_so_even_where_the_budget_forbids_it(
    runner_of: Callable[..., AdaptiveRunner],
) -> None:
    runner, noise = runner_of("balanced"), np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    free = runner.decide(noise, DESCRIBE)
    assert free.point.is_full and free.reason.startswith("unlike the images") and free.predicted is not None
    tight = runner.decide(noise, DESCRIBE, budget=Budget(ttft_ms=0.4 * free.predicted.ttft_ms))
    assert not tight.point.is_full and tight.reason.startswith("unlike the images")
    assert "but full compute does not fit" in tight.reason


def test_a_model_that_nothing_was_fitted_to_is_asked_about_simple_images_without_their_blank_parts(
    reference_model: Any, processor: Any
) -> None:
    runner = AdaptiveRunner(reference_model, processor, policy="balanced")
    screens = [make_scene("simple", seed, "eval", (256, 256)).image for seed in range(6)]
    spared = 0
    for screen in screens:
        for prompt in (DESCRIBE, "Is there a button?"):
            reply = runner.chat(screen, prompt, max_new_tokens=12)
            decision = reply.decision
            assert decision.point.is_full or decision.point.spares_blanks_only
            if not decision.point.is_full:
                assert decision.escalated is False and "not trusted" in decision.reason
                assert 0 <= decision.escalation["entropy"] <= decision.escalation["threshold"] == SPARED_THRESHOLD
                same = runner.chat(screen, prompt, point=OperatingPoint(blanks=2), max_new_tokens=12)
                assert reply.token_ids == same.token_ids
                assert reply.measurement.patches == same.measurement.patches < reply.measurement.visual_tokens * 4
                spared += 1
    assert spared >= 6


def test_the_next_step_that_is_explored_has_fewer_pixels_and_never_stands_for_full_compute(
    runner_of: Callable[..., AdaptiveRunner],
) -> None:
    """Steps without blank parts stand between those with fewer pixels and are none of these."""
    runner = runner_of("balanced")
    planner = planner_for(runner.adapter, runner.policy, runner.profile)
    [case] = look(planner, [Question(page(48, (320, 320)), READ)], max_new_tokens=4).cases
    ladder = [rung for rung in runner.policy.lanes["gated"] if rung.point.blanks is None]
    for own, after in pairwise(ladder):
        taken = {each.key: each.point for each in planner.beside([], own.name, case.info, "gated", None)}
        assert "gated3@1/2blank" not in taken
        # Steps that come to the same pixels on a small image are one.
        assert planner.adapter.resolve(after, case.info.sizes) in taken.values()


def test_after_preprocessing_no_pixels_are_taken_away(runner_of: Callable[..., AdaptiveRunner], released: Any) -> None:
    runner = runner_of("balanced")
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n<|im_start|>assistant\n"
    inputs = released(text=[text], images=[page(48, (320, 320))], return_tensors="pt")
    found = runner.generate(**inputs, max_new_tokens=1, do_sample=False)
    expected = runner.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert runner.last is not None and runner.last[0].point.is_full and found.tolist() == expected.tolist()
    quick = runner_of("latency")  # which gives up a little: blank parts can still be spared
    assert quick.generate(**inputs, max_new_tokens=1, do_sample=False).shape == expected.shape
    assert quick.last is not None and quick.last[0].point.without(["blanks"]).is_full
    assert quick.last[1].patches < runner.last[1].patches


def test_the_log_says_what_was_needed(runner_of: Callable[..., AdaptiveRunner], tmp_path: Path) -> None:
    runner = runner_of("balanced", log=tmp_path / "log.jsonl")
    runner.chat(page(48, (320, 320)), READ, max_new_tokens=1)
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["needs"]["text"] <= row["needs"]["native"] and row["detail_version"] and "stroke_low" in row["features"]
