"""What is learned of a model beside the general policy: little from few images, its own from many, within the bound."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.asking import MANY, choose_asking
from adaptive_fusion.learning.adapting.cases import Case
from adaptive_fusion.learning.adapting.choice import informative
from adaptive_fusion.learning.adapting.fit import adapt_policy, ladders
from adaptive_fusion.learning.adapting.modules import POINTS, Modules
from adaptive_fusion.learning.adapting.needs import (
    BOUND,
    LEAST_IMAGES,
    MARGINS,
    choose_margin,
    fit_needs,
    fit_own_needs,
    planned,
    planned_loss,
)
from adaptive_fusion.learning.adapting.router import fit_router
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.policy.escalation import MOST_TOKENS, UNFITTED
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.predictors import Tree, TreeModel
from adaptive_fusion.policy.router import PlainRouter, constant_router
from adaptive_fusion.policy.rungs import Rung

SHARES = (0.84, 0.71, 0.5, 0.35, 0.25, 0.18, 0.125, 0.0625)
RUNGS = tuple(map(Rung.parse, ("native@1", *(f"weighted3@1/{100 * share:g}%" for share in SHARES))))
MODEL = Fingerprint("Model", {"depth": 2}, {"depth": 2}, "abc")
SHIFT, SLOPE = -1.5, 0.8
"""Octaves that the made-up model needs less than is generally enough, and more for each unit of a feature."""


def case(index: int, octaves: float, feature: float) -> Case:
    features = dict.fromkeys(FEATURE_NAMES, 0.0) | {"flat_regions": feature}
    detail = dict.fromkeys(DETAIL_FEATURES, 0.0)
    content = hashlib.sha256(str(index).encode()).hexdigest()
    known = Subject(content, "image", features, VERSION, detail, DETAIL_VERSION, prompt_kind="describe")
    info: Any = None  # nothing here plans
    return Case(Question(str(index), "Describe."), known, info, octaves)


def answers(n: int, seed: int, *, spread: float = 0.25) -> Answers:
    """A model whose needs are the general ones and `SHIFT`, more where a feature is high; below them it loses."""
    rng = np.random.default_rng(seed)
    octaves, feature = rng.uniform(-1.5, 0.0, n), rng.normal(size=n)
    need = octaves + SHIFT + SLOPE * feature + rng.logistic(0, spread, n)
    below = np.maximum(0.0, need[:, None] - np.log2((1.0, *SHARES)))
    quality = np.clip(1.0 - 0.3 * below, 0.0, 1.0)
    quality[:, 0] = 1.0
    cases = tuple(case(1000 * seed + i, float(octaves[i]), float(feature[i])) for i in range(n))
    cost = np.tile([1.0, *SHARES], (n, 1))
    entropy = np.full((n, len(RUNGS), MOST_TOKENS), np.nan)
    return Answers(cases, RUNGS, quality, cost, cost, entropy, 0.02, MODEL)


@pytest.mark.parametrize("name", ["balanced", "latency", "quality"])
def test_lanes_that_run_trained_modules_keep_every_step_once(name: str) -> None:
    general = Policy.load(name)
    base = replace(general, lanes=ladders(general, SHARES))
    found = Modules(None, None, 1, POINTS).used_by(base)
    for lane, point in POINTS.items():
        assert len(found.lanes[lane]) == len(base.lanes[lane])
        whole = [rung.name for rung in found.lanes[lane] if rung.pixel_share == 1]
        assert whole == ["native@1", "native@1/2blank"]
        assert {rung.point for rung in found.lanes[lane] if rung.pixel_share < 1} == {point}


def test_few_images_leave_the_general_needs_and_many_give_the_models_own() -> None:
    none, few, many = (fit_needs(answers(n, 1)) for n in (0, 2, 600))
    unseen = answers(300, 4)
    assert np.array_equal(none.octaves(unseen), unseen.octaves)
    moved = [abs(each.octaves(unseen) - unseen.octaves).mean() for each in (few, many)]
    assert moved[0] < moved[1]
    rows = unseen.features[:, list(FEATURE_NAMES).index("flat_regions")]
    true = unseen.octaves + SHIFT + SLOPE * rows
    inside = (true < -0.3) & (true > -3.7)  # where the shares that are run tell anything
    assert abs(many.octaves(unseen) - true)[inside].mean() < 0.15
    assert fit_own_needs(answers(LEAST_IMAGES - 1, 5), 0.15)[0] is None


def test_what_is_planned_by_the_models_own_needs_keeps_the_tolerance_on_other_images_and_saves() -> None:
    own, unseen = fit_own_needs(answers(200, 6), 0.15)
    assert own is not None and own.kinds.keys() == {"describe"}
    other = answers(2000, 7)
    fitted = fit_needs(answers(200, 6))
    loss = planned_loss(other, fitted.octaves(other) + own.margin)
    assert loss.mean() < 0.03  # .02 was chosen on 200 images; 2,000 others lose a little more or less
    assert np.minimum(0.0, unseen + own.margin).mean() < other.octaves.mean() - 0.5


def unsure(found: Answers, seed: int, told: float) -> Answers:
    """The same with entropies that tell so much of what a plan loses: 1 all, 0 nothing."""
    lost = 1.0 - found.quality
    noise = np.random.default_rng(seed).uniform(0.0, 0.6, lost.shape)
    entropy = np.repeat((told * lost + (1 - told) * noise)[:, :, None], MOST_TOKENS, axis=2)
    return replace(found, entropy=entropy)


def test_a_margin_and_a_threshold_are_chosen_together_and_what_entropies_tell_saves() -> None:
    kept, cost = {}, {}
    for told in (0.0, 1.0):
        found, other = unsure(answers(300, 8, spread=0.6), 1, told), unsure(answers(2000, 9, spread=0.6), 2, told)
        needs = fit_needs(found)
        asked = choose_asking(found, needs.octaves(found))
        assert asked is not None and asked.rules.always and asked.rules.k == 1  # more tokens tell no more here
        rule = asked.rules.threshold("", "describe")
        assert rule.learned and asked.rules.threshold("", "read") == UNFITTED.threshold("", "read")
        place = planned(np.array(SHARES), needs.octaves(other) + asked.margins["describe"])
        at = np.arange(len(other)), place
        up = (place > 0) & (other.entropy[..., 0][at] > (math.inf if rule.threshold is None else rule.threshold))
        kept[told] = 1 - np.where(up, 0.0, 1.0 - other.quality[at]).mean()
        cost[told] = (other.cost[at] + up).mean()
    assert kept[1.0] > kept[0.0] > 0.98 and cost[1.0] < cost[0.0] - 0.02  # both better and cheaper
    assert choose_asking(answers(MANY - 1, 8), np.zeros(MANY - 1)) is None


def test_below_so_many_images_the_general_policy_comes_out_and_without_entropies_the_margin_alone() -> None:
    general = Policy.load("balanced")
    base = replace(general, lanes=ladders(general, SHARES[:-1]))

    def fitted(n: int, told: bool) -> Policy:
        found = answers(n, 8)
        found = unsure(found, 1, 1.0) if told else found
        more = (*RUNGS, base.cheap_rung)
        cheap = SHARES.index(base.cheap_rung.pixel_share) + 1
        columns = [*range(len(RUNGS)), cheap]
        parts = (each[:, columns] for each in (found.quality, found.cost, found.tokens, found.entropy))
        return adapt_policy(Answers(found.cases, more, *parts, found.tolerance, MODEL), base, "own").policy

    few, many, silent = fitted(MANY - 1, told=True), fitted(MANY, told=True), fitted(MANY - 1, told=False)
    assert few.router == base.router and few.sufficiency == base.sufficiency and few.lanes == base.lanes
    assert few.escalation == UNFITTED and few.fitted.fits(MODEL)
    assert many.router != base.router and many.sufficiency is not None and many.sufficiency.own is not None
    assert silent.sufficiency is not None and silent.sufficiency.own is not None and silent.escalation is None


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 80), st.integers(0, 1000), st.floats(-3, 1))
def test_the_margin_is_the_smallest_that_keeps_tolerance_and_bound(n: int, seed: int, guess: float) -> None:
    found = answers(n, seed, spread=0.6)
    octaves = found.octaves + guess
    margin = choose_margin(found, octaves)

    def good(value: float) -> bool:
        mean = float(planned_loss(found, octaves + value).mean())
        return mean <= found.tolerance and (n * mean + 1) / (n + 1) <= BOUND + 1e-9

    assert (margin is None) == (n < LEAST_IMAGES)
    if margin is not None:
        assert all(good(value) for value in MARGINS if value >= margin)
        assert margin == MARGINS[0] or not good(margin - 0.05)


@given(
    st.lists(st.floats(-8, 0), min_size=1, max_size=20),
    st.integers(1, 8),
    st.sampled_from(((), (0.25,), (0.0625, 0.84))),
)
def test_shares_are_different_and_those_wanted_come_first(octaves: list[float], most: int, always: Any) -> None:
    found = informative(np.array(octaves), SHARES, most, always)
    assert found[: len(always)] == [*always] and len(found) == len(set(found)) == max(most, len(always))


def test_shares_are_run_where_needs_are_expected() -> None:
    first = informative(np.full(5, -2.0), SHARES, 1)
    assert first == [0.25]
    assert np.mean(informative(np.full(5, -4.0), SHARES, 4)) < np.mean(informative(np.full(5, -0.2), SHARES, 4))


def test_the_router_moves_with_the_number_of_rows() -> None:
    general = Policy.load("balanced").router
    rng = np.random.default_rng(0)
    width = len(general.inputs.names)
    x = rng.normal(size=(2000, width)) + 2.0
    x[::7, 3] = np.nan
    y = (np.nan_to_num(x[:, 0], nan=2.0) > 2.0).astype(float)
    before = general.p_complex_batch(x)
    assert np.allclose(fit_router(general, x[:0], y[:0]).p_complex_batch(x), before, atol=1e-12)
    few, many = (fit_router(general, x[:n], y[:n]).p_complex_batch(x) for n in (2, 2000))
    assert abs(few - before).mean() < abs(many - before).mean()
    assert np.mean((many > 0.5) == (y > 0.5)) > 0.9 > np.mean((before > 0.5) == (y > 0.5))
    with pytest.raises(ConfigError, match="TreeModel"):
        fit_router(PlainRouter(general.inputs, TreeModel((Tree((0,), (0.0,), (-1,), (-1,), (False,), (0.5,)),))), x, y)
    assert math.isclose(float(fit_router(constant_router(0.3), x[:0, :0], y[:0]).p_complex_batch(x[:1, :0])[0]), 0.3)
