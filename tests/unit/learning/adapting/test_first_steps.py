"""First steps by lane: the cheapest that keep to a limit, by what was seen, and what a policy makes of them."""

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.statistics import most_mean, most_mean_by_betting
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.learning.adapting import lanes
from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.cases import Case
from adaptive_fusion.learning.adapting.choosing import STEPS, Plan, cheapest, front
from adaptive_fusion.learning.adapting.fit import adapt_policy, ladders
from adaptive_fusion.learning.adapting.lanes import KEPT, Laned, choose_lanes, tells
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.policy.escalation import MOST_TOKENS, Escalation
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, Policy
from adaptive_fusion.policy.rungs import Rung

MODEL = Fingerprint("Model", {"depth": 2}, {"depth": 2}, "abc")
SHARES = (0.71, 0.5, 0.25)
GENERAL = (1.0, 0.98, 0.97, 0.92)
LADDERS = {
    lane: tuple(
        replace(Rung.parse(f"{name}@1{share}"), quality=quality)
        for quality, share in zip(GENERAL, ("", *(f"/{100 * each:g}%" for each in SHARES)), strict=True)
    )
    for lane, name in ((SIMPLE, "weighted3"), (COMPLEX, "gated3"))
}
RUNGS = (Rung.parse("native@1"), *LADDERS[SIMPLE], *LADDERS[COMPLEX])
LOSSES = np.array([0.0, 0.0, 0.01, 0.02, 0.04])


def case(index: int, feature: float) -> Case:
    features = dict.fromkeys(FEATURE_NAMES, 0.0) | {"colours": feature}
    content = hashlib.sha256(str(index).encode()).hexdigest()
    detail = dict.fromkeys(DETAIL_FEATURES, 0.0)
    known = Subject(content, "image", features, VERSION, detail, DETAIL_VERSION, prompt_kind="describe")
    info: Any = None  # nothing here plans
    return Case(Question(str(index), "Describe."), known, info, -1.0)


def pool(n: int, seed: int, *, told: float = 0.0) -> tuple[Answers, np.ndarray]:
    """Half of the images are simple: of these few lose anything, whatever they look like, and the entropy of the first
    token is high for so many of them. All others lose half of what they say below full compute."""
    rng = np.random.default_rng(seed)
    simple = rng.random(n) < 0.5
    lossy = simple & (rng.random(n) < 0.06)
    quality = np.ones((n, len(RUNGS)))
    entropy = np.full((n, len(RUNGS), MOST_TOKENS), 0.1) + 0.01 * rng.random((n, 1, 1))
    for column, rung in enumerate(RUNGS):
        if rung.pixel_share < 1.0:
            quality[:, column] = np.where(simple, np.where(lossy, rung.pixel_share - 0.2, 1.0), 0.5)
            entropy[lossy & (rng.random(n) < told), column] += 1.0
    cost = np.tile([rung.pixel_share for rung in RUNGS], (n, 1))
    cases = tuple(case(100_000 * seed + i, float(not simple[i])) for i in range(n))
    return Answers(cases, RUNGS, quality, cost, cost, entropy, 0.04, MODEL), np.where(simple, 0.2, 0.8)


def used(answers: Answers, score: np.ndarray, found: Laned) -> tuple[float, float]:
    """Mean cost and loss where the rules are kept to."""
    cost, loss = np.empty(len(answers)), np.zeros(len(answers))
    names = [rung.name for rung in answers.rungs]
    for row, value in enumerate(score):
        name = found.rules.first_of(SIMPLE if value < found.cut else COMPLEX, "describe") or "native@1"
        cost[row], loss[row] = answers.cost[row, names.index(name)], 1 - answers.quality[row, names.index(name)]
        threshold = found.rules.threshold(name, "describe").threshold
        entropy = answers.entropy[row, names.index(name), : found.rules.k].mean()
        if name != "native@1" and threshold is not None and entropy > threshold:
            cost[row], loss[row] = cost[row] + 1.0, 0.0
    return float(cost.mean()), float(loss.mean())


def test_lanes_save_more_where_entropies_tell_and_lose_no_more_on_other_images_than_they_may() -> None:
    unseen, scores = pool(4000, 99)
    told_unseen, _ = pool(4000, 99, told=1.0)
    many, told = (choose_lanes(*pool(2000, 1, told=told), 0.5, LADDERS) for told in (0.0, 1.0))
    assert many is not None and told is not None
    for answers, found in ((unseen, many), (told_unseen, told)):
        cost, loss = used(answers, scores, found)
        assert loss <= KEPT * answers.tolerance * 1.2 and found.cost == pytest.approx(cost, abs=0.03)
    assert used(told_unseen, scores, told)[0] < used(unseen, scores, many)[0] - 0.05 < 0.95
    assert told.rules.first_of(COMPLEX, "describe") == "" and told.rules.first_of(SIMPLE, "describe")
    again = Escalation.from_dict(told.rules.to_dict())
    name = told.rules.first_of(SIMPLE, "describe")
    assert again.first == told.rules.first and again.thresholds[name] == told.rules.thresholds[name]

    few = [choose_lanes(*pool(60, seed), 0.5, LADDERS) for seed in range(20)]
    lost = [0.0 if found is None else used(unseen, scores, found)[1] for found in few]
    assert np.mean(lost) <= KEPT * unseen.tolerance * 1.2  # the best of many plans on few images, on others


def test_every_detail_without_blank_parts_is_a_first_step_that_few_images_tell_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It loses a little of everything, where fewer pixels lose much of a few."""
    spared = {lane: Rung.parse(f"{name}@1/2blank") for lane, name in ((SIMPLE, "weighted3"), (COMPLEX, "gated3"))}
    ladders = {lane: (*ladder, replace(spared[lane], quality=0.978)) for lane, ladder in LADDERS.items()}
    rungs = (*RUNGS, *spared.values())

    def with_it(n: int, seed: int) -> tuple[Answers, np.ndarray]:
        answers, scores = pool(n, seed)
        two = (n, 2)
        quality = np.column_stack([answers.quality, np.clip(np.random.default_rng(seed).normal(0.99, 0.01, two), 0, 1)])
        cost = np.column_stack([answers.cost, np.full(two, 0.5)])
        entropy = np.concatenate([answers.entropy, answers.entropy[:, :2]], axis=1)
        return replace(answers, rungs=rungs, quality=quality, cost=cost, tokens=cost, entropy=entropy), scores

    unseen, unseen_scores = with_it(2000, 99)
    assert 1.0 not in unseen.shares and len(unseen.shares) == len(SHARES)  # it is no share of the pixels

    def bought() -> tuple[float, float]:
        """Mean cost and loss on other images of what 100 choose."""
        found = [choose_lanes(*with_it(100, seed), 0.5, ladders) for seed in range(10)]
        pairs = [(1.0, 0.0) if each is None else used(unseen, unseen_scores, each) for each in found]
        cost, loss = np.mean(pairs, axis=0)
        return float(cost), float(loss)

    cost, loss = bought()
    assert cost < 0.55 and loss <= 0.8 * KEPT * unseen.tolerance
    monkeypatch.setattr(lanes, "ROWS_BESIDE", 0.0)
    assert bought()[1] > loss + 0.005  # a quarter of the pixels, where few of the 100 happened to lose
    monkeypatch.setattr(lanes, "ROWS_BESIDE", 20.0)
    monkeypatch.setattr(lanes, "BLANK_ROWS", 200.0)
    assert bought()[0] > cost + 0.1


def test_the_lanes_of_a_policy_are_its_own_routers_and_no_limit_leaves_full_compute() -> None:
    answers, scores = pool(400, 3)
    nothing = replace(answers, tolerance=1e-9)
    assert choose_lanes(nothing, scores, 0.5, LADDERS) is None
    general = Policy.load("balanced")
    base = replace(general, lanes={**ladders(general, SHARES), **LADDERS}, cheap=LADDERS[SIMPLE][-1].name)
    found = adapt_policy(answers, base, "own").policy
    assert found.escalation is not None and found.escalation.first_of(COMPLEX, "describe") == ""
    first = found.escalation.first_of(SIMPLE, "describe")
    assert first in {rung.name for rung in LADDERS[SIMPLE]}
    routed = [found.router.p_complex_batch(_rows(found, [each])) < found.threshold for each in answers.cases]
    assert np.mean(np.ravel(routed) == (scores < 0.5)) > 0.95


def _rows(policy: Policy, cases: Any) -> np.ndarray:
    names = policy.router.inputs.names
    return np.array([[{**c.subject.features, **c.subject.detail}.get(name, np.nan) for name in names] for c in cases])


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.sampled_from(LOSSES.tolist())), min_size=1, max_size=5),
        min_size=1, max_size=3,
    ),
    st.sampled_from([0.0, 0.02, 0.05]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_combination_of_plans_is_cheaper_within_the_limit(cells: list[list[tuple[int, float]]], most: float) -> None:
    offered = {
        str(i): front([Plan(30.0, 0.0, "full"), *(Plan(float(cost), loss, j) for j, (cost, loss) in enumerate(cell))])
        for i, cell in enumerate(cells)
    }
    found = cheapest(offered, most)
    assert sum(plan.loss for plan in found.values()) <= most + 1e-9
    best = min(
        (sum(plan.cost for plan in each), sum(plan.loss for plan in each))
        for each in itertools.product(*offered.values())
        if sum(plan.loss for plan in each) <= most * (1 - len(cells) / STEPS) + 1e-12
    )
    assert sum(plan.cost for plan in found.values()) <= best[0] + 1e-9


def test_an_entropy_tells_where_it_is_above_luck_and_luck_is_rare() -> None:
    rng = np.random.default_rng(0)
    loses = rng.random(200) < 0.2
    assert tells(rng.normal(size=200) + loses, loses) and not tells(rng.normal(size=200), np.zeros(200, dtype=bool))
    assert np.mean([tells(rng.normal(size=200), loses) for _ in range(300)]) < 0.06


def test_the_bound_by_betting_holds_and_is_tighter_where_little_varies() -> None:
    rng = np.random.default_rng(0)

    def losses(n: int) -> np.ndarray:
        return np.where(rng.random(n) < 0.1, 0.1, 0.0)  # of mean .01

    found = [most_mean_by_betting(losses(100), level=0.9) for _ in range(300)]
    assert np.mean(np.array(found) < 0.01) <= 0.1
    assert np.mean(found) < 0.8 * most_mean(losses(100), level=0.9)
    assert most_mean_by_betting(np.zeros(1), level=0.9) > 0.9 and most_mean_by_betting(np.zeros(400)) < 0.01
