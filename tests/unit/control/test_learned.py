"""What the controller learns from measurements: drift, spread, prices, memory, ceilings."""

import math
import random

import pytest
from controlled import LADDER, LOOSE, candidate, settled, took

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.estimators import Drift, probability_above
from adaptive_fusion.control.law import MAX_LEVELS, MAX_POINTS, PRICE_MAX, PRICE_MIN
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.point import OperatingPoint


def test_drift_is_learned_and_the_right_points_own_part_of_it() -> None:
    controller = settled(load=1.5)
    state = controller.state()["latency"]
    key = LADDER[1].key
    total = state["common"] + state["points"][key]["offset"]
    assert total == pytest.approx(math.log(1.5), abs=0.02)
    own = [candidate(100, 0.9, key="a"), candidate(100, 0.8, key="b")]
    controller = Controller()
    for i in range(2000):
        which = own[i % 2]
        choice = controller.choose([which], LOOSE)
        controller.update(choice, took(100 * (1.2 if which is own[0] else 0.9)))
    points = controller.state()["latency"]["points"]
    # the leak of d_o (0.995) leaves a sixth of the difference in the residuals
    assert 0.6 * math.log(1.2 / 0.9) < points["a"]["offset"] - points["b"]["offset"] < math.log(1.2 / 0.9)


@pytest.mark.parametrize("attainment", [0.8, 0.95, 0.99])
def test_misses_are_bounded_whatever_the_load_does(attainment: float) -> None:
    controller = Controller()
    budget = Budget(latency_ms=150, attainment=attainment)
    rng = random.Random(0)
    missed = thought = 0
    for i in range(3000):
        choice = controller.choose(LADDER, budget)
        load = math.exp(rng.gauss(0, 0.3) + 0.5 * math.sin(i / 90) + (0.8 if i % 400 < 60 else 0.0))
        latency = load * choice.candidate.predicted.latency_ms
        controller.update(choice, took(latency))
        thought += choice.feasible
        missed += choice.feasible and latency > 150
    [price] = controller.state()["prices"]
    assert price["attainment"] == attainment and price["value"] < PRICE_MAX
    assert missed <= (1 - attainment) * 3000 + (price["value"] - 2) / 0.3 + 1e-6
    assert thought > 1500


def test_a_step_up_is_followed_in_four_requests_and_down_in_five() -> None:
    controller = settled()
    budget = Budget(latency_ms=150, ttft_ms=60)
    for load, allowed in ((1.7, 4), (1.0, 5)):
        for _ in range(allowed):
            choice = controller.choose(LADDER, budget)
            controller.update(choice, took(load * choice.candidate.predicted.latency_ms))
        state = controller.state()["latency"]
        own = state["points"].get(choice.candidate.key, {"offset": 0.0})
        assert state["common"] + own["offset"] == pytest.approx(math.log(load), abs=0.3)
    assert controller.state()["latency"]["steps"] >= 1
    for _ in range(60):
        choice = controller.choose(LADDER, budget)
        controller.update(choice, took(choice.candidate.predicted.latency_ms))
    assert choice.candidate is LADDER[1], "back where it was before the step"


def test_an_estimate_ten_times_off_is_corrected_within_a_dozen_requests() -> None:
    for factor in (10.0, 0.1):
        controller = Controller()
        for _ in range(12):
            choice = controller.choose(LADDER, LOOSE)
            controller.update(choice, took(factor * choice.candidate.predicted.latency_ms))
        state = controller.state()["latency"]
        assert state["common"] + state["points"][choice.candidate.key]["offset"] == pytest.approx(
            math.log(factor), abs=0.5
        )


def test_timeouts_enter_as_misses_with_a_censored_value() -> None:
    controller = settled()

    def price() -> float:
        [row] = controller.state()["prices"]
        return float(row["value"])

    before, cost = controller.state()["latency"], price()
    budget = Budget(latency_ms=150, ttft_ms=60)
    choice = controller.choose(LADDER, budget)
    controller.miss(choice, 150.0)  # predicted 100: at least 1.5 times slower
    after = controller.state()["latency"]
    assert after["common"] > before["common"] and price() == pytest.approx(cost + 0.3 * 0.95)
    tight = controller.choose(LADDER, Budget(latency_ms=5, ttft_ms=60))
    controller.miss(tight, 5.0)  # not thought to fit, and stopped long before its expected end: says nothing
    assert controller.state()["latency"] == after and price() == pytest.approx(cost + 0.3 * 0.95)
    controller.miss(choice, 20.0)  # decided under another drift: a miss, but no news of the drift
    assert controller.state()["latency"] == after and price() == pytest.approx(cost + 2 * 0.3 * 0.95)
    assert controller.state()["counts"]["misses"] == 3
    with pytest.raises(ConfigError, match="expected one of cancelled, oom, overload, timeout"):
        controller.miss(choice, 1.0, kind="boom")


def test_who_gives_up_early_has_not_missed_a_deadline() -> None:
    controller = settled()
    before = controller.state()
    choice = controller.choose(LADDER, Budget(latency_ms=150, ttft_ms=60))
    controller.miss(choice, 20.0, kind="cancelled")
    after = controller.state()
    assert after["prices"] == before["prices"] and after["latency"] == before["latency"]
    assert after["counts"]["cancelled"] == 1 and after["counts"]["misses"] == 0
    controller.miss(choice, 160.0, kind="cancelled")  # too late by then
    assert controller.state()["prices"][0]["value"] > before["prices"][0]["value"]


def test_a_retry_after_out_of_memory_is_learned_for_the_point_that_ran() -> None:
    controller = settled()
    choice = controller.choose(LADDER, Budget(latency_ms=150, ttft_ms=60))
    before = controller.state()["latency"]
    controller.miss(choice, 30.0, kind="oom")
    controller.update(choice, took(80.0, ttft=50.0), ran=LADDER[2], lost_ms=30.0)  # 50 ms of its own, as predicted
    after = controller.state()["latency"]
    assert LADDER[2].key in after["points"] and after["points"][LADDER[1].key] == before["points"][LADDER[1].key]
    assert abs(after["common"] - before["common"]) < 0.02


def test_each_attainment_level_has_its_own_price_and_levels_are_bounded() -> None:
    rng = random.Random(1)
    controller = Controller()
    late = {0.8: 0, 0.99: 0}
    for i in range(6000):
        level = (0.8, 0.99)[i % 2]
        choice = controller.choose(LADDER, Budget(latency_ms=125, attainment=level))
        latency = choice.candidate.predicted.latency_ms * math.exp(rng.gauss(0, 0.15))
        late[level] += latency > 125
        controller.update(choice, took(latency))
    prices = {row["attainment"]: row["value"] for row in controller.state()["prices"]}
    assert prices[0.8] == PRICE_MIN < prices[0.99]
    assert late[0.99] <= 30 + (prices[0.99] - 2) / 0.3 + 1e-6 and late[0.8] > 2 * late[0.99]
    for i in range(3 * MAX_LEVELS):
        controller.choose(LADDER, Budget(latency_ms=150, attainment=0.5 + i / 1000))
    assert len(controller.state()["prices"]) == MAX_LEVELS


def test_the_risk_of_being_late_is_learned_for_each_point() -> None:
    """Two points with noise of their own: how often each exceeds a limit is what was said beforehand."""
    rng = random.Random(2)
    drift = Drift()
    noises = {"steady": 0.05, "wild": 0.15}
    said, was = dict.fromkeys(noises, 0.0), dict.fromkeys(noises, 0)
    n = 4000
    for i in range(2 * n):
        key = ("steady", "wild")[i % 2]
        ratio = rng.gauss(0.2, noises[key])
        said[key] += probability_above(0.2 + noises[key], *drift.expect(key))
        was[key] += ratio > 0.2 + noises[key]
        drift.learn(key, ratio)
    for key in noises:  # a normal exceeds one standard deviation with 0.159
        assert was[key] / n == pytest.approx(0.159, abs=0.02)
        assert said[key] / n == pytest.approx(was[key] / n, abs=0.06)
    assert drift.margin("wild", 0.95) > 1.1 * drift.margin("steady", 0.95) > drift.factor("steady") > 1.1


def test_points_are_bounded_and_kept_by_key() -> None:
    controller = Controller()
    for i in range(3 * MAX_POINTS):
        for key in ("rung", f"size {i}"):
            choice = controller.choose([candidate(100 + i, 0.5, key=key)], LOOSE)
            controller.update(choice, took(130.0))
    assert len(controller.state()["latency"]["points"]) == MAX_POINTS


# Memory


def test_the_memory_envelope_follows_the_largest_measured_peak() -> None:
    controller = Controller(memory_margin=1.05)
    budget = Budget(vram_gb=1.2)
    assert controller.choose(LADDER, budget).candidate is LADDER[1]
    controller.update(controller.choose(LADDER, budget), took(100, gb=1.18))  # 18 % above the prediction
    assert controller.choose(LADDER, budget).candidate is LADDER[2]
    rng = random.Random(0)
    over = 0
    for _ in range(1000):
        choice = controller.choose(LADDER, budget)
        peak = choice.candidate.predicted.peak_memory_gb * rng.uniform(0.8, 1.18)
        over += peak > 1.02 * 1.2
        controller.update(choice, took(100, gb=peak))
    assert over == 0


def test_peaks_with_blank_parts_spared_say_how_high_others_come_only_where_they_are_higher() -> None:
    controller = Controller(memory_margin=1.2)
    spares = Candidate(OperatingPoint(blanks=2), 0.9, Prediction(40, 40, 120, 1.0))
    choice = controller.choose([spares], Budget(vram_gb=4))
    for _ in range(4000):  # of screens of which little is encoded
        controller.update(choice, took(200.0, gb=0.6))
    assert controller.state()["memory"] == pytest.approx(math.log(1.2))
    controller.update(choice, took(200.0, gb=1.3))
    assert controller.state()["memory"] == pytest.approx(math.log(1.3 * 1.05))


def test_short_answers_do_not_make_room_that_a_long_one_would_miss() -> None:
    controller = Controller(memory_margin=1.2)
    choice = controller.choose([LADDER[0]], LOOSE)
    for _ in range(4000):  # far less than what is counted for an answer that may still come
        controller.update(choice, took(200.0, gb=0.3 * choice.candidate.predicted.peak_memory_gb))
    assert controller.state()["memory"] == pytest.approx(math.log(1.05))


def test_out_of_memory_drops_at_once_and_comes_back_in_steps() -> None:
    controller = Controller(memory_margin=1.05)

    def run(n: int) -> list[float]:
        seen = []
        for _ in range(n):
            choice = controller.choose(LADDER, LOOSE)
            seen.append(choice.candidate.predicted.peak_memory_gb)
            controller.update(choice, took(choice.candidate.predicted.latency_ms))
        return seen

    def fail() -> None:
        controller.miss(controller.choose(LADDER, LOOSE), 10.0, kind="oom")

    assert run(3) == [2.0] * 3
    fail()
    assert run(25) == [1.0] * 25, "below the point that failed, for 25 clean requests"
    assert run(1) == [2.0], "then it is tried again"
    fail()
    assert run(50) == [1.0] * 50 and run(1) == [2.0], "a failed try doubles the wait"
    fail()
    fail()
    assert run(99)[0] == 0.5, "each failure drops one further"
    for _ in range(40):
        run(100)
    assert run(1) == [2.0]
    fail()
    assert run(25) == [1.0] * 25 and run(1) == [2.0], "after a long clean spell the wait is short again"


def test_overload_drops_by_time_and_a_timeout_does_not() -> None:
    for kind, expected in (("overload", LADDER[1]), ("timeout", LADDER[0])):
        controller = Controller()
        controller.miss(controller.choose(LADDER, LOOSE), 10.0, kind=kind)
        assert controller.choose(LADDER, LOOSE).candidate is expected


def test_a_memory_probe_that_lies_gives_the_least_hungry_point() -> None:
    controller = Controller()
    for lie in (math.nan, -1.0, math.inf, -math.inf):
        choice = controller.choose(LADDER, Budget(latency_ms=1000), free_memory_gb=lie)
        assert choice.candidate is LADDER[3] and choice.feasible
    assert controller.state()["counts"]["ignored"] == 4
    assert controller.choose(LADDER, LOOSE, free_memory_gb=None).candidate is LADDER[0]
