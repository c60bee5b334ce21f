"""What the controller chooses, and that nothing breaks it."""

import json
import math
import random
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
from controlled import LADDER, LOOSE, candidate, finite, settled, took
from hypothesis import given, settings
from hypothesis import strategies as st
from waits import MOST_S, joined

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate, Choice
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.law import RISK_MAX
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.errors import ConfigError, InfeasibleBudgetError

# The choice


def test_the_best_worth_with_reasons_for_what_would_be_better() -> None:
    controller = Controller()
    shuffled = [LADDER[2], LADDER[0], LADDER[3], LADDER[1]]
    choice = controller.choose(shuffled, Budget(latency_ms=150))
    assert choice.candidate is LADDER[1] and choice.feasible
    # Student's t with 2 degrees of freedom: the spread starts at 0.3, and a miss costs 2 answers
    t = math.log(150 / 100) / (0.3 / math.sqrt(2))
    assert choice.p_late == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))
    assert choice.reason == "best quality for its risk: latency 100 of 150 ms, late with 10 %"
    assert [(r.point, r.reason) for r in choice.rejected] == [
        (LADDER[0].point, "latency 200 of 150 ms, late with 85 %")
    ]
    # the 95 % quantile of that distribution is 2.920
    assert choice.margin == pytest.approx(math.exp(2.920 * 0.3 / math.sqrt(2)), rel=1e-3)
    free = controller.choose(shuffled, LOOSE)
    assert free.candidate is LADDER[0] and free.p_late == 0.0 and free.margin == 1.0


def test_every_limit_set_must_hold_and_queueing_counts() -> None:
    controller = Controller()
    assert controller.choose(LADDER, Budget(latency_ms=1e6, ttft_ms=35)).candidate is LADDER[2]
    assert controller.choose(LADDER, Budget(latency_ms=900), elapsed_ms=0).candidate is LADDER[0]
    assert controller.choose(LADDER, Budget(latency_ms=900), elapsed_ms=650).candidate is LADDER[1]
    assert controller.choose(LADDER, Budget(ttft_ms=100), elapsed_ms=75).candidate is LADDER[3]
    assert controller.choose(LADDER, Budget(vram_gb=1.3)).candidate is LADDER[1]
    assert controller.choose(LADDER, Budget(vram_gb=1.3), free_memory_gb=0.7).candidate is LADDER[2]


def test_misses_are_allowed_where_they_buy_most() -> None:
    """Both points are as likely to be late; only the one that is worth it is taken."""
    budget = Budget(latency_ms=120)
    dear, cheap = candidate(100, 0.9), candidate(20, 0.3)
    controller = settled(noise=0.15)
    much = controller.choose([dear, cheap], budget)
    little = controller.choose([dear, replace(cheap, quality=0.88)], budget)
    assert much.candidate is dear and little.candidate.predicted == cheap.predicted
    assert much.p_late > 0.05 > little.p_late


def test_equal_quality_goes_to_the_cheaper_point() -> None:
    same = [candidate(90, 0.8), candidate(30, 0.8), candidate(60, 0.8)]
    assert Controller().choose(same, LOOSE).candidate is same[1]


def test_nothing_fits() -> None:
    controller = Controller()
    late = controller.choose(LADDER, Budget(latency_ms=10))
    assert not late.feasible and late.candidate is LADDER[3] and "25 of 10 ms, late with 98 %" in late.reason
    assert len(late.rejected) == 3
    full = controller.choose(LADDER, Budget(latency_ms=10, vram_gb=0.1))
    assert not full.feasible and full.candidate is LADDER[3]
    # late is better than out of memory: the fastest does not fit in memory, the next one does
    fat = [candidate(100, 0.9, 0.2), candidate(50, 0.5, 4.0)]
    assert controller.choose(fat, Budget(latency_ms=10, vram_gb=1)).candidate is fat[0]
    with pytest.raises(InfeasibleBudgetError, match="latency 25 of 10 ms"):
        controller.choose(LADDER, Budget(latency_ms=10, on_infeasible="refuse"))
    assert controller.state()["counts"]["refused"] == 1
    with pytest.raises(ConfigError, match="none of 0"):
        controller.choose([], LOOSE)


def test_where_nothing_fits_the_least_work_runs_whatever_was_learned_under_the_load() -> None:
    controller, budget = Controller(), Budget(latency_ms=20)
    dear, cheap = LADDER[2], LADDER[3]
    for _ in range(60):  # the cheap one was hit by the load, the other seen as it was over
        for each, factor in ((cheap, 6.0), (dear, 1.0)):
            controller.update(controller.choose([each], LOOSE), took(factor * each.predicted.latency_ms))
    assert controller.slowdown(cheap.key) > 2 * controller.slowdown(dear.key)
    late = controller.choose([dear, cheap], budget)
    assert not late.feasible and late.candidate is cheap


def test_a_hard_deadline_refuses_only_what_would_begin_late() -> None:
    hard = Budget(latency_ms=15, on_deadline="stop")
    controller = Controller()
    begins = controller.choose(LADDER, hard)  # the cheapest takes 25 ms, its first token comes after 10
    assert begins.candidate is LADDER[3] and not begins.feasible
    with pytest.raises(InfeasibleBudgetError):
        controller.choose(LADDER, hard, elapsed_ms=6)
    assert controller.choose(LADDER, Budget(latency_ms=15, on_deadline="stop", on_infeasible="cheapest"), elapsed_ms=6)
    with pytest.raises(InfeasibleBudgetError):
        controller.choose(LADDER, replace(hard, latency_ms=1000), free_memory_gb=0.1)
    for _ in range(40):  # everything takes twice as long as predicted
        choice = controller.choose(LADDER, LOOSE)
        controller.update(choice, took(2 * choice.candidate.predicted.latency_ms))
    assert controller.slowdown(LADDER[0].key) == pytest.approx(2, rel=0.1)
    with pytest.raises(InfeasibleBudgetError):
        controller.choose(LADDER, hard)


def test_refusing_does_not_last_for_ever() -> None:
    """Once the load is over, a controller that refuses everything finds out."""
    controller = Controller()
    for _ in range(100):
        controller.update(controller.choose(LADDER, LOOSE), took(2000))  # ten times the prediction
    budget, refused = Budget(latency_ms=60, on_infeasible="refuse"), 0
    for _ in range(1000):
        try:
            choice = controller.choose(LADDER, budget)
        except InfeasibleBudgetError:
            refused += 1
            continue
        controller.update(choice, took(choice.candidate.predicted.latency_ms))
    assert 10 < refused < 150 and controller.state()["counts"]["refused"] == refused
    assert controller.choose(LADDER, budget).feasible


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0, 50.0, 200.0])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 500), st.floats(0, 1), st.floats(0, 8)), min_size=1, max_size=10),
    st.none() | st.floats(1, 1000),
    st.none() | st.floats(1, 1000),
    st.none() | st.floats(0.1, 8),
    st.floats(0, 500),
)
def test_no_point_is_worth_more_than_the_chosen_one(
    rows: list[tuple[float, float, float]],
    latency: float | None,
    ttft: float | None,
    vram: float | None,
    elapsed: float,
) -> None:
    candidates = [candidate(ms, quality, gb) for ms, quality, gb in rows]
    budget = Budget(latency_ms=latency, ttft_ms=ttft, vram_gb=vram)
    choice = Controller(memory_margin=1.25).choose(candidates, budget, elapsed_ms=elapsed)

    def p_late(c: Candidate) -> float:
        limits = [(latency, c.predicted.latency_ms), (ttft, c.predicted.ttft_ms)]
        return max((student(left - elapsed, ms) for left, ms in limits if left is not None), default=0.0)

    def student(left: float, ms: float) -> float:
        t = math.log(max(left, 1e-300) / ms) * math.sqrt(2) / 0.3
        return 0.5 - t / (2 * math.sqrt(2 + t * t)) if left > 0 else 1.0

    worth = {
        i: c.quality - 2.0 * p_late(c)
        for i, c in enumerate(candidates)
        if (vram is None or c.predicted.peak_memory_gb * 1.25 <= vram) and p_late(c) <= RISK_MAX
    }
    timed = latency is not None or ttft is not None
    if not choice.feasible:
        assert all(value <= 1e-9 for value in worth.values()) if timed else not worth
        return
    index = next(i for i, c in enumerate(candidates) if c is choice.candidate)
    assert worth[index] >= max(worth.values()) - 1e-9
    assert choice.p_late == pytest.approx(p_late(choice.candidate))


# Faults


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["update", "timeout", "oom", "overload"]),
            numbers,
            numbers,
            numbers,
            numbers,
            numbers,
        ),
        max_size=30,
    )
)
def test_no_input_leaves_a_state_that_is_not_finite(
    events: list[tuple[str, float, float, float, float, float]],
) -> None:
    now = [0.0]
    controller = Controller(clock=lambda: now[0])
    budget = Budget(latency_ms=150, ttft_ms=60, vram_gb=3)
    for kind, latency, ttft, peak, elapsed, jump in events:
        choice = controller.choose(LADDER, budget, elapsed_ms=elapsed, free_memory_gb=peak)
        now[0] = jump  # the clock stops, leaps, runs backwards or is not a number
        odd = replace(choice.candidate, predicted=Prediction(latency, ttft, 1.0, peak))
        if kind == "update":
            controller.update(choice, took(latency, ttft=ttft, gb=peak), lost_ms=elapsed)
            controller.update(choice, took(50.0), ran=odd)
        else:
            controller.miss(choice, latency, kind=kind, lost_ms=elapsed)
            controller.miss(choice, 50.0, kind=kind, ran=odd)
    state = controller.state()
    assert finite(state)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert math.isfinite(controller.choose(LADDER, budget).margin)


def test_bad_numbers_are_ignored_one_by_one_and_counted() -> None:
    controller = Controller(clock=lambda: 0.0)
    choice = controller.choose(LADDER, LOOSE)
    controller.update(choice, took(math.nan, ttft=80.0, gb=-1.0))
    state = controller.state()
    assert state["latency"]["points"] == {} and list(state["ttft"]["points"]) == [LADDER[0].key]
    assert state["counts"]["ignored"] == 2
    odd = [Candidate(LADDER[0].point, math.nan, LADDER[0].predicted), LADDER[1]]
    assert controller.choose(odd, LOOSE).candidate is LADDER[1]
    assert controller.state()["counts"]["ignored"] == 3


def test_a_stale_decision_is_ignored() -> None:
    now = [1000.0]
    controller = Controller(clock=lambda: now[0])
    choice = controller.choose(LADDER, LOOSE)
    now[0] += 601
    controller.update(choice, took(900))
    assert controller.state()["latency"]["points"] == {} and controller.state()["counts"]["ignored"] == 1
    now[0] = 5.0  # the clock stepped back: the measured duration is still good
    controller.update(choice, took(900))
    assert controller.state()["latency"]["points"] != {}


def test_state_survives_json_and_goes_on_the_same() -> None:
    first = settled(load=1.3)
    first.miss(first.choose(LADDER, LOOSE), 10.0, kind="oom")
    second = Controller.from_state(json.loads(json.dumps(first.state())), clock=lambda: 0.0)
    assert second.state() == first.state()
    rng = random.Random(0)
    for _ in range(100):
        latency = 100 * math.exp(rng.gauss(0, 0.3))
        choices: list[Choice] = []
        for controller in (first, second):
            choices.append(controller.choose(LADDER, Budget(latency_ms=150, ttft_ms=60)))
            controller.update(choices[-1], took(latency, gb=0.3))
        assert choices[0] == choices[1]
    assert second.state() == first.state()


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 9},
        {"memory": math.nan},
        {"latency": None},
        {"counts": {}},
        {"ttft": {"common": math.inf}},
        {"memory_ceiling": {"limit": "high"}},
    ],
)
def test_a_broken_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Controller.from_state({**settled(n=3).state(), **change})


def test_thirty_two_threads_reconcile() -> None:
    controller = Controller()
    errors: list[BaseException] = []
    barrier = threading.Barrier(32)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            barrier.wait(MOST_S)
            for i in range(1000):
                choice = controller.choose(LADDER, Budget(latency_ms=rng.uniform(20, 400)))
                if i % 10 == 0:
                    controller.miss(choice, 500.0, kind=("timeout", "oom")[i % 20 == 0])
                else:
                    controller.update(choice, took(rng.uniform(10, 500), gb=rng.uniform(0.1, 2)))
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(32)]
        for thread in threads:
            thread.start()
        joined(threads)
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    state = controller.state()
    assert state["counts"]["decisions"] == 32_000
    assert state["counts"]["updates"] == 32 * 900
    assert state["counts"]["misses"] == 32 * 100 and state["counts"]["ooms"] == 32 * 50
    assert state["counts"]["ignored"] == 0 and finite(state)
