"""Blank parts left out of the encoder, through a runner with the reference model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from adaptive_fusion.budget import Budget
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import METRIC_OF_TASK, media
from adaptive_fusion.models import standing
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import LANES
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reference.screens import PROMPTS, make_scene
from adaptive_fusion.runner import AdaptiveRunner

BLANKS = OperatingPoint(blanks=2)


@pytest.fixture(scope="module")
def runner(reference_model: Any, processor: Any) -> AdaptiveRunner:
    return AdaptiveRunner(reference_model, processor, policy="native", encoder_cache_mb=16)


def test_screens_are_told_as_well_with_fewer_patches(runner: AdaptiveRunner) -> None:
    for kind in ("simple", "reading", "clip"):
        scene = make_scene(kind, 3, "eval", (256, 256))  # type: ignore[arg-type]
        asked = Question(media(scene), "", (scene.answers[scene.task],), METRIC_OF_TASK[scene.task])
        native, spared = (
            runner.chat(media(scene), PROMPTS[scene.task], point=point, max_new_tokens=40, do_sample=False)
            for point in (NATIVE, BLANKS)
        )
        assert (asked.score(spared.text.strip()) or 0) >= 0.8 * (asked.score(native.text.strip()) or 0) > 0
        assert spared.measurement.patches < 0.7 * native.measurement.patches
        assert spared.measurement.visual_tokens == native.measurement.visual_tokens
        assert spared.decision.encoder_cache == "miss"  # what full compute kept is not what it is
        again = runner.chat(media(scene), PROMPTS[scene.task], point=BLANKS, max_new_tokens=40, do_sample=False)
        assert again.decision.encoder_cache == "hit" and again.text == spared.text
        assert again.measurement.patches == 0


def test_weights_as_columns_of_keys_give_what_a_mask_gives(
    runner: AdaptiveRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What devices other than a CPU take, where flash kernels have no masks.
    scene = make_scene("reading", 5, "eval", (256, 256))
    inputs = runner.adapter.prepare(
        [{"role": "user", "content": [{"type": "image", "image": media(scene)}, {"type": "text", "text": "Read."}]}],
        BLANKS,
    )
    found = []
    for attend in (standing.masked, standing.widened):
        monkeypatch.setattr(standing, "masked", attend)
        found.append(runner.adapter.encode(inputs, BLANKS).inputs["mm_encoder_outputs"]["image"])
    assert found[0].pooler_output[0].abs().max() > 0.1
    for mask, columns in zip(
        [*found[0].pooler_output, *found[0].deepstack_features],
        [*found[1].pooler_output, *found[1].deepstack_features],
        strict=True,
    ):
        torch.testing.assert_close(torch.cat([*columns]), torch.cat([*mask]), atol=1e-3, rtol=1e-3)


def test_what_is_predicted_follows_how_much_is_blank(runner: AdaptiveRunner, noise_image: Any) -> None:
    busy, blank = noise_image(256, 256), Image.new("RGB", (256, 256), "white")
    for image, least, most in ((busy, 0.8, 1.0), (blank, 0.25, 0.3)):
        share = sum(runner.work(image, "?", BLANKS, 4).patches) / sum(runner.work(image, "?", NATIVE, 4).patches)
        assert least <= share <= most
        reply = runner.chat(image, "Describe the screen.", point=BLANKS, max_new_tokens=2)
        assert share == pytest.approx(reply.measurement.patches / 1024, abs=0.2)


def test_a_limit_on_memory_counts_every_patch(runner: AdaptiveRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is spared is not known before, and every patch is prepared for the encoder.
    ladder = (Rung(NATIVE), Rung(BLANKS, quality=0.99))
    both = AdaptiveRunner(
        runner.model, runner.processor, policy=replace(runner.policy, lanes=dict.fromkeys(LANES, ladder))
    )
    image = Image.new("RGB", (320, 320), "white")
    costs = {each.point: each.predicted for each in both.offers(image, "Describe the screen.")[1]}
    assert costs[BLANKS].encode_ms < 0.9 * costs[NATIVE].encode_ms
    with monkeypatch.context() as elsewhere:  # where nobody knows that it saves time no plan is taken for that
        elsewhere.setattr(type(both.adapter), "blanks_save_time", False)
        assert {each.point: each.predicted for each in both.offers(image, "Describe the screen.")[1]} == {
            NATIVE: costs[NATIVE],
            BLANKS: costs[NATIVE],
        }
    assert both.adapter.blanks_save_time
    whole = costs[NATIVE].peak_memory_gb
    assert costs[BLANKS].peak_memory_gb == whole > 0
    # What the encoder made of every patch is there for native alone, what it made of the rest for the other alone.
    for point in (NATIVE, BLANKS):
        kept = AdaptiveRunner(runner.model, runner.processor, policy=both.policy, encoder_cache_mb=16)
        kept.chat(image, "Describe the screen.", point=point, max_new_tokens=2)
        costs = {each.point: each.predicted for each in kept.offers(image, "Describe the screen.")[1]}
        peaks = {each: costs[each].peak_memory_gb for each in costs}
        other = BLANKS if point == NATIVE else NATIVE
        assert peaks[other] == whole > peaks[point]  # what the language model needs is left


def test_general_policies_spare_blank_parts_only_where_that_is_known_to_save_time(
    runner: AdaptiveRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = AdaptiveRunner(runner.model, runner.processor, policy="balanced")
    screens = [make_scene("simple", seed, "eval", (400, 400)).image for seed in range(6)]

    def spared() -> int:
        budgets = (None, Budget(ttft_ms=2000), Budget(vram_gb=0.02))
        found = [general.decide(screen, PROMPTS["describe"], budget=budget) for screen in screens for budget in budgets]
        return sum(decision.point.blanks is not None for decision in found)

    assert spared() > 0
    monkeypatch.setattr(type(general.adapter), "blanks_save_time", False)
    assert spared() == 0


def test_full_detail_is_given_all_patches(runner: AdaptiveRunner) -> None:
    assert not BLANKS.is_full and BLANKS.before_encoder == {} and BLANKS.name == "native@1/2blank"
    sure = replace(runner.policy, lanes=dict.fromkeys(LANES, (Rung(BLANKS),)))
    spares = AdaptiveRunner(runner.model, runner.processor, policy=sure)
    image = Image.new("RGB", (128, 128), "white")
    for part, point in (
        ({"type": "image", "image": image}, BLANKS),
        ({"type": "image", "image": image, "detail": "high"}, NATIVE),
    ):
        assert spares.chat([part], "Describe the screen.", max_new_tokens=2).decision.point == point
