import importlib.util
import json
import math
import random
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.bench.rivals import Aimd, Ours, run
from adaptive_fusion.bench.traces import TRACES, best_static, build, native, oracle, score
from adaptive_fusion.budget import Budget
from adaptive_fusion.controller import Candidate, Choice, Controller
from adaptive_fusion.decisions import Measurement, Prediction
from adaptive_fusion.drift import MARGIN_MAX, MAX_LEVELS, MAX_POINTS
from adaptive_fusion.errors import ConfigError, InfeasibleBudgetError
from adaptive_fusion.point import OperatingPoint

LOOSE = Budget()


def candidate(ms: float, quality: float, gb: float = 0.5, key: str = "") -> Candidate:
    """A point that is predicted to take `ms`, 40 % of it to the first token."""
    return Candidate(
        OperatingPoint(max_pixels=1024 + int(ms)), quality, Prediction(0.2 * ms, 0.2 * ms, 0.6 * ms, gb), key
    )


LADDER = [
    candidate(200, 0.9, 2.0),
    candidate(100, 0.8, 1.0),
    candidate(50, 0.6, 0.5),
    candidate(25, 0.4, 0.25),
]


def took(latency: float, *, ttft: float | None = None, gb: float = 0.0) -> Measurement:
    return Measurement(0, 0, 0, 0, 0.4 * latency if ttft is None else ttft, latency, 0, 0, 0, 0, gb)


def settled(load: float = 1.0, attainment: float = 0.95, n: int = 300) -> Controller:
    """A controller that has seen a steady load, without noise."""
    controller = Controller(clock=lambda: 0.0)
    budget = Budget(latency_ms=150, ttft_ms=60, attainment=attainment)
    for _ in range(n):
        choice = controller.choose(LADDER, budget)
        controller.update(choice, took(load * choice.candidate.predicted.latency_ms))
    return controller


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    if isinstance(value, list):
        return all(finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


# The choice


def test_best_quality_that_fits_with_reasons_for_the_rest() -> None:
    controller = Controller()
    shuffled = [LADDER[2], LADDER[0], LADDER[3], LADDER[1]]
    choice = controller.choose(shuffled, Budget(latency_ms=150))  # the margin starts at exp(0.4) = 1.49
    assert choice.candidate is LADDER[1] and choice.feasible and choice.limited == ("latency",)
    assert choice.margin == pytest.approx(math.exp(0.4))
    assert [(r.point, r.reason) for r in choice.rejected] == [(LADDER[0].point, "latency 298 > 150 ms")]
    assert controller.choose(shuffled, LOOSE).candidate is LADDER[0]


def test_every_limit_set_must_hold_and_queueing_counts() -> None:
    controller = Controller()
    assert controller.choose(LADDER, Budget(latency_ms=1e6, ttft_ms=35)).candidate is LADDER[2]
    assert controller.choose(LADDER, Budget(latency_ms=400), elapsed_ms=0).candidate is LADDER[0]
    assert controller.choose(LADDER, Budget(latency_ms=400), elapsed_ms=240).candidate is LADDER[1]
    assert controller.choose(LADDER, Budget(ttft_ms=100), elapsed_ms=75).candidate is LADDER[3]
    assert controller.choose(LADDER, Budget(vram_gb=1.3)).candidate is LADDER[1]
    assert controller.choose(LADDER, Budget(vram_gb=1.3), free_memory_gb=0.7).candidate is LADDER[2]


def test_equal_quality_goes_to_the_cheaper_point() -> None:
    same = [candidate(90, 0.8), candidate(30, 0.8), candidate(60, 0.8)]
    assert Controller().choose(same, LOOSE).candidate is same[1]


def test_nothing_fits() -> None:
    controller = Controller()
    late = controller.choose(LADDER, Budget(latency_ms=10))
    assert not late.feasible and late.candidate is LADDER[3] and "37 > 10 ms" in late.reason
    assert len(late.rejected) == 3
    full = controller.choose(LADDER, Budget(latency_ms=10, vram_gb=0.1))
    assert not full.feasible and full.candidate is LADDER[3]
    # late is better than out of memory: the fastest does not fit in memory, the next one does
    fat = [candidate(100, 0.9, 0.2), candidate(50, 0.5, 4.0)]
    assert controller.choose(fat, Budget(latency_ms=10, vram_gb=1)).candidate is fat[0]
    with pytest.raises(InfeasibleBudgetError, match="latency 37 > 10 ms"):
        controller.choose(LADDER, Budget(latency_ms=10, on_infeasible="refuse"))
    assert controller.state()["counts"]["refused"] == 1
    with pytest.raises(ConfigError, match="none of 0"):
        controller.choose([], LOOSE)


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
def test_a_feasible_choice_keeps_every_limit_and_no_better_one_would(
    rows: list[tuple[float, float, float]],
    latency: float | None,
    ttft: float | None,
    vram: float | None,
    elapsed: float,
) -> None:
    candidates = [candidate(ms, quality, gb) for ms, quality, gb in rows]
    budget = Budget(latency_ms=latency, ttft_ms=ttft, vram_gb=vram)
    choice = Controller(memory_margin=1.25).choose(candidates, budget, elapsed_ms=elapsed)

    def fits(c: Candidate, tolerance: float) -> bool:
        p, factor = c.predicted, math.exp(0.4) * (1 - tolerance)
        return (
            (latency is None or factor * p.latency_ms <= latency - elapsed)
            and (ttft is None or factor * p.ttft_ms <= ttft - elapsed)
            and (vram is None or p.peak_memory_gb * 1.25 * (1 - tolerance) <= vram)
        )

    safe = max((c.quality for c in candidates if fits(c, -1e-9)), default=-1.0)
    assert choice.feasible or safe < 0
    if choice.feasible:
        assert fits(choice.candidate, 1e-9) and choice.candidate.quality >= safe


# The law


def test_drift_is_learned_and_the_right_points_own_part_of_it() -> None:
    controller = settled(load=1.5)
    state = controller.state()["latency"]
    key = LADDER[1].key
    total = state["common"] + state["points"][key]
    assert total == pytest.approx(math.log(1.5), abs=0.02)
    own = [candidate(100, 0.9, key="a"), candidate(100, 0.8, key="b")]
    controller = Controller()
    for i in range(2000):
        which = own[i % 2]
        choice = controller.choose([which], LOOSE)
        controller.update(choice, took(100 * (1.2 if which is own[0] else 0.9)))
    points = controller.state()["latency"]["points"]
    # the leak of d_o (0.995) leaves a sixth of the difference in the residuals
    assert 0.6 * math.log(1.2 / 0.9) < points["a"] - points["b"] < math.log(1.2 / 0.9)


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
    [margin] = controller.state()["latency"]["margins"]
    assert margin["log"] < MARGIN_MAX
    assert missed <= (1 - attainment) * 3000 + (margin["log"] - 0.4) / 0.05 + 1e-6
    assert thought > 1500


def test_a_step_up_is_followed_in_four_requests_and_down_in_five() -> None:
    controller = settled()
    budget = Budget(latency_ms=150, ttft_ms=60)
    for load, allowed in ((1.7, 4), (1.0, 5)):
        for _ in range(allowed):
            choice = controller.choose(LADDER, budget)
            controller.update(choice, took(load * choice.candidate.predicted.latency_ms))
        state = controller.state()["latency"]
        own = state["points"].get(choice.candidate.key, 0.0)
        assert state["common"] + own == pytest.approx(math.log(load), abs=0.3)
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
        assert state["common"] + state["points"][choice.candidate.key] == pytest.approx(math.log(factor), abs=0.5)


def test_timeouts_enter_as_misses_with_a_censored_value() -> None:
    controller = settled()
    before = controller.state()["latency"]
    budget = Budget(latency_ms=150, ttft_ms=60)
    choice = controller.choose(LADDER, budget)
    controller.miss(choice, 150.0)  # predicted 100: at least 1.5 times slower
    after = controller.state()["latency"]
    assert after["common"] > before["common"]
    assert after["margins"][0]["log"] == pytest.approx(before["margins"][0]["log"] + 0.05 * 0.95)
    tight = controller.choose(LADDER, Budget(latency_ms=5, ttft_ms=60))
    controller.miss(tight, 5.0)  # stopped long before its expected end: says nothing
    assert controller.state()["latency"] == after
    controller.miss(choice, 20.0)  # decided under another drift: a miss, but no news of the drift
    last = controller.state()["latency"]
    assert last["common"] == after["common"] and last["margins"][0]["log"] > after["margins"][0]["log"]
    assert controller.state()["counts"]["misses"] == 3
    with pytest.raises(ConfigError, match="expected one of oom, overload, timeout"):
        controller.miss(choice, 1.0, kind="boom")


def test_a_retry_after_out_of_memory_is_learned_for_the_point_that_ran() -> None:
    controller = settled()
    choice = controller.choose(LADDER, Budget(latency_ms=150, ttft_ms=60))
    before = controller.state()["latency"]
    controller.miss(choice, 30.0, kind="oom")
    controller.update(choice, took(80.0, ttft=50.0), ran=LADDER[2], lost_ms=30.0)  # 50 ms of its own, as predicted
    after = controller.state()["latency"]
    assert LADDER[2].key in after["points"] and after["points"][LADDER[1].key] == before["points"][LADDER[1].key]
    assert abs(after["common"] - before["common"]) < 0.02


def test_each_attainment_level_has_its_own_margin_and_levels_are_bounded() -> None:
    rng = random.Random(1)
    controller = Controller()
    for i in range(6000):
        level = (0.8, 0.99)[i % 2]
        choice = controller.choose(LADDER, Budget(latency_ms=150, attainment=level))
        controller.update(choice, took(choice.candidate.predicted.latency_ms * math.exp(rng.gauss(0, 0.15))))
    margins = {row["attainment"]: row["log"] for row in controller.state()["latency"]["margins"]}
    assert margins[0.8] + 0.05 < margins[0.99]
    for i in range(3 * MAX_LEVELS):
        controller.choose(LADDER, Budget(latency_ms=150, attainment=0.5 + i / 1000))
    assert len(controller.state()["latency"]["margins"]) == MAX_LEVELS


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
            barrier.wait()
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
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    state = controller.state()
    assert state["counts"]["decisions"] == 32_000
    assert state["counts"]["updates"] == 32 * 900
    assert state["counts"]["misses"] == 32 * 100 and state["counts"]["ooms"] == 32 * 50
    assert state["counts"]["ignored"] == 0 and finite(state)


# The simulation


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "controller.py"
    spec = importlib.util.spec_from_file_location("controller_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("attainment", [0.95, 0.99])
@pytest.mark.parametrize("trace", TRACES)
def test_what_must_hold_on_the_simulated_traces(simulation: ModuleType, trace: str, attainment: float) -> None:
    drawn = build(trace, simulation.stated_world(), 3000, seed=7)
    best = oracle(drawn)
    ours = score(drawn, run(drawn, Ours(drawn.world, attainment)), best)
    assert ours["attainment"] >= attainment
    assert ours["of_oracle"] >= 0.95
    if trace == "step":
        assert ours["misses_max"] <= 4 and ours["recover_max"] <= 60
    rivals = [best_static(drawn, attainment), run(drawn, Aimd(drawn.world, attainment)), native(drawn)]
    tie = 2 * math.sqrt(attainment * (1 - attainment) / 3000)
    for rival in rivals:
        other = score(drawn, rival, best)
        assert other["attainment"] <= ours["attainment"] + tie or other["quality"] <= ours["quality"]
