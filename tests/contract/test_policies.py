"""What every shipped policy must do."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from adaptive_fusion.features.complexity import Complexity, measure_complexity
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy import LANES, Policy
from adaptive_fusion.policy.files import shipped_root
from adaptive_fusion.policy.rungs import Rung
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
        costs = [cost(rung) for rung in ladder]
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
    lanes = {kind: [policy.route(complexity, prompt).lane for complexity, prompt in measured[kind]] for kind in KINDS}
    assert lanes["simple"].count("weighted") >= 0.9 * len(SEEDS)
    assert lanes["dense"].count("gated") >= 0.9 * len(SEEDS)
    assert lanes["reading"].count("gated") >= 0.9 * len(SEEDS)


def test_native_never_reduces_anything() -> None:
    policy = Policy.load("native")
    assert {rung for lane in LANES for rung in policy.ladder(lane)} == {Rung(NATIVE)}


def test_the_policies_differ_as_their_names_say() -> None:
    latency, balanced, quality = (Policy.load(f"reference-{name}") for name in ("latency", "balanced", "quality"))
    for lane in LANES:
        first = [cost(policy.ladder(lane)[0]) for policy in (latency, balanced, quality)]
        assert first == sorted(first)
