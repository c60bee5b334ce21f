"""What every shipped policy must do."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from unfamiliar import FAMILIES, blurred

from adaptive_fusion.features.complexity import Complexity, measure_complexity
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy import LANES, Policy
from adaptive_fusion.policy.files import shipped_root
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import BLANKS_LOSE
from adaptive_fusion.reference.screens import KINDS, PROMPTS, Kind, make_scene

GENERAL = ("balanced", "latency", "quality")
REFERENCE = ("reference-balanced", "reference-latency", "reference-quality")
SHIPPED = ("balanced", "latency", "native", "quality", *REFERENCE)
SEEDS = range(20)
REFERENCE_FPS = 2.0


@pytest.fixture(scope="module")
def measured() -> dict[Kind, list[tuple[Complexity, str]]]:
    """Complexity and question of held-out scenes of each kind."""
    scenes = {kind: [make_scene(kind, seed, "eval") for seed in SEEDS] for kind in KINDS}
    return {
        kind: [
            (measure_complexity(scene.frames if kind == "clip" else scene.image), PROMPTS[scene.task]) for scene in some
        ]
        for kind, some in scenes.items()
    }


def cost(rung: Rung) -> float:
    """Share of native's encoder and language-model work, weighted equally: a ladder steps down in it."""
    frames = min(1.0, (rung.point.max_fps or REFERENCE_FPS) / REFERENCE_FPS)
    return frames * rung.pixel_share * (1 + rung.point.downsample**2) / 2


def test_the_shipped_policies_are_these() -> None:
    assert Policy.shipped() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_the_same_each_time_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    policy = Policy.load(name)
    assert policy.name == name
    assert Policy.load(name) == policy
    saved = policy.save(tmp_path / "copy")
    weights = tuple(saved / path.name for path in policy.fusion_weights)
    assert Policy.load(saved) == replace(policy, fusion_weights=weights)
    for path in saved.iterdir():  # shipped as `save` writes it, so that a retrained one differs only in its figures
        assert path.read_bytes() == (shipped_root() / name / path.name).read_bytes()


@pytest.mark.parametrize("name", SHIPPED)
def test_ladders_step_down_in_cost_and_quality(name: str) -> None:
    policy = Policy.load(name)
    for lane in LANES:
        ladder = policy.ladder(lane)
        for spared in (False, True):  # what blank parts spare depends on the image, so these are compared apart
            costs = [cost(rung) for rung in ladder if (rung.point.blanks is not None) == spared]
            assert costs == sorted(costs, reverse=True)
            assert len(set(costs)) == len(costs), f"{lane}: two rungs cost the same"
        qualities = [rung.quality for rung in ladder]
        assert len(set(qualities)) == len(qualities), f"{lane}: a cheaper rung is as good"
        for pixels in (1, 147_456, 16_777_216):
            limits = [rung.resolve(pixels).max_pixels for rung in ladder]
            assert all(limit is None or 1024 <= limit <= max(1024, pixels) for limit in limits)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_policy_has_a_card_that_says_what_was_measured(name: str) -> None:
    card = (shipped_root() / name / "README.md").read_text(encoding="utf-8")
    for heading in ("Lanes", "Router", "Training data", "Limits", "Command"):
        assert re.search(rf"^## {heading}", card, re.MULTILINE), f"{name}: no section {heading}"
    assert re.search(r"\b[0-9a-f]{64}\b", card), f"{name}: no hash of the training data"
    for lane in LANES:
        for rung in Policy.load(name).ladder(lane):
            assert f"`{rung.name}`" in card, f"{name}: the card does not name {rung.name}"


@pytest.mark.parametrize("name", SHIPPED)
def test_scores_are_probabilities_and_do_not_depend_on_order(
    name: str, measured: dict[Kind, list[tuple[Complexity, str]]]
) -> None:
    policy = Policy.load(name)
    pairs = [pair for some in measured.values() for pair in some]
    routes = [policy.route(complexity, prompt) for complexity, prompt in pairs]
    assert all(0 <= route.score <= 1 for route in routes)
    assert [policy.route(complexity, prompt) for complexity, prompt in reversed(pairs)] == routes[::-1]
    assert {policy.route(complexity, prompt).lane for complexity, prompt in measured["clip"]} == {"video"}


@pytest.mark.parametrize("name", ["reference-balanced", "reference-quality"])
def test_simple_scenes_take_the_cheap_lane_and_dense_ones_the_other(
    name: str, measured: dict[Kind, list[tuple[Complexity, str]]]
) -> None:
    policy = Policy.load(name)
    assert policy.escalation is not None
    sure = policy.escalation.sure["weighted"]  # above it the model is asked before an answer of the cheap lane is taken
    routes = {kind: [policy.route(complexity, prompt) for complexity, prompt in measured[kind]] for kind in KINDS}
    cheap = {kind: sum(route.lane == "weighted" and route.score <= sure for route in routes[kind]) for kind in KINDS}
    assert cheap["simple"] >= 0.9 * len(SEEDS)
    assert cheap["dense"] <= 0.1 * len(SEEDS)
    assert cheap["reading"] <= 0.1 * len(SEEDS)
    for kind in ("dense", "reading"):
        assert sum(route.lane == "gated" for route in routes[kind]) >= 0.8 * len(SEEDS)


def test_native_never_reduces_anything() -> None:
    policy = Policy.load("native")
    assert {rung for lane in LANES for rung in policy.ladder(lane)} == {Rung(NATIVE)}


def test_the_policies_differ_as_their_names_say() -> None:
    latency, balanced, quality = (Policy.load(f"reference-{name}") for name in ("latency", "balanced", "quality"))
    for lane in LANES:
        first = [cost(policy.ladder(lane)[0]) for policy in (latency, balanced, quality)]
        assert first == sorted(first)


WORDS = "Total amount due 1,284.50 for the delivery of 17 July, net of tax, to be paid by transfer within thirty days"

# General policies: fitted to no model, for what people send.


def drawn(words: str, size: tuple[int, int], letters: int, lines: int = 1000) -> Image.Image:
    """Lines of the same words, dark on white."""
    image = Image.new("RGB", size, "white")
    for line in range(min(lines, int(size[1] / letters / 1.5) - 1)):
        said = words[line % 7 :] if lines > 1 else words
        place = (letters, int(letters * (0.5 + 1.5 * line)))
        ImageDraw.Draw(image).text(place, said, fill=(20, 20, 20), font=ImageFont.load_default(letters))
    return image


@pytest.mark.parametrize("name", GENERAL)
def test_general_policies_know_no_model_and_only_what_released_models_know(name: str) -> None:
    policy = Policy.load(name)
    assert policy.fitted.is_general and policy.fitted.kinds and not policy.fusion_weights
    assert policy.sufficiency is not None and policy.familiar is not None and policy.margin >= 1
    assert not policy.router.inputs.reads_prompt  # the lane comes from the image alone
    assert policy.floors == {"count": 1024, "event": 256, "other": 1024, "yesno": 1024}
    assert Rung.parse(policy.cheap) == Rung(NATIVE, pixel_share=0.25)
    for lane in LANES:
        for rung in policy.ladder(lane):
            assert rung.point.downsample == 1 and rung.point.fusion in ("weighted", "gated")
            assert rung.point.adapter_rank == 0 and rung.point.max_pixels is None
    shares = [rung.pixel_share for rung in policy.ladder("gated") if rung.point.blanks is None]
    for lane in (SIMPLE, COMPLEX):
        [spared] = [rung for rung in policy.ladder(lane) if rung.point.blanks is not None]
        assert spared.point.spares_blanks_only and spared.pixel_share == 1
        assert spared.quality == pytest.approx(1 - BLANKS_LOSE)  # one number, wherever it is written
    assert shares[0] == 1 and set(shares) >= {1, 0.71, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625}
    # An image of which a little else is measured is planned pixels within 25 %.
    assert max(high / low for high, low in pairwise(shares)) <= 1.25


@pytest.mark.parametrize("name", GENERAL)
def test_empty_images_are_simple_and_pages_are_not(name: str) -> None:
    policy = Policy.load(name)
    ramp = np.tile(np.linspace(40, 220, 640).astype(np.uint8)[None, :, None], (480, 1, 3))
    for image in (
        drawn("", (640, 480), 20),
        ramp,
        drawn("Cancelled", (640, 480), 28, 1),
        drawn("OK", (1280, 800), 18, 1),
    ):
        assert policy.route(measure_complexity(image)).lane == "weighted"
    assert policy.route(measure_complexity(drawn(WORDS, (900, 1100), 16))).lane == "gated"


@pytest.mark.parametrize("name", GENERAL)
def test_strange_images_are_noticed_and_plain_ones_are_not(name: str) -> None:
    policy = Policy.load(name)
    for family, makers in FAMILIES.items():
        found = [
            bool(policy.unlike(measure_complexity(maker(np.random.default_rng(seed)))))
            for maker in makers
            for seed in range(4)
        ]
        assert np.mean(found) >= 0.9, f"{family}: {np.mean(found):.2f} noticed"
    page = drawn(WORDS, (900, 1100), 18)
    blurs = [
        policy.unlike(measure_complexity(blurred(np.random.default_rng(seed), np.asarray(page)))) for seed in range(6)
    ]
    assert all("fitted on" in said for said in blurs)
    plain = [page, drawn("", (640, 480), 20), drawn(WORDS, (600, 800), 26)]
    scenes = [make_scene(kind, seed, "eval").image for kind in ("simple", "dense") for seed in range(6)]
    assert sum(bool(policy.unlike(measure_complexity(image))) for image in (*plain, *scenes)) <= 1


def test_general_policies_differ_as_their_names_say() -> None:
    latency, balanced, quality = (Policy.load(name) for name in ("latency", "balanced", "quality"))
    assert latency.tolerance > balanced.tolerance > quality.tolerance
    assert latency.margin < balanced.margin < quality.margin
