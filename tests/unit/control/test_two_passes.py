"""Plans of two passes: what is offered, what it costs and risks, and what verdicts teach."""

import json
import math
from dataclasses import replace

import pytest
from controlled import LOOSE, candidate, settled, took
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.budget import Budget
from adaptive_fusion.control import weighing
from adaptive_fusion.control.candidates import Candidate, Second
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.escalating import UNTRUSTED, Asking, doubted, plans, told
from adaptive_fusion.control.learned import Corrections
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.escalation import ANY, GENERAL, UNFITTED, Escalation, Threshold

FULL = replace(candidate(100, 1.0, 2.0), point=NATIVE, key="native@1")
CHEAP = candidate(20, 0.8, key="cheap")
times, shares = st.floats(0.5, 1e4), st.floats(0.0, 1.0)


def in_two(first: Candidate, better: Candidate, share: float, **more: float) -> Candidate:
    return replace(first, second=Second(better, share, 0.1, **more))


@given(times, times, shares, times, times)
def test_the_risk_is_that_of_either_way_by_its_share(a: float, b: float, p: float, left: float, more: float) -> None:
    learned = Corrections(1.25)
    learned.ttft.learn("cheap", 0.2)
    learned.latency.learn("cheap", -0.3)
    learned.latency.learn("better", 0.5)
    first, better = candidate(a, 0.8, key="cheap"), candidate(b, 1.0, key="better")

    def risk(limits: Budget, share: float, **other: float) -> float:
        return weighing.risk_of_two(
            in_two(first, better, share, **other), weighing.times_left(limits, 0.0, learned), learned.ttft
        )[0]

    def alone(each: Candidate, limits: Budget, elapsed: float = 0.0) -> float:
        predicted = each.predicted
        return weighing.risk_of(
            each.key,
            predicted.ttft_ms,
            predicted.latency_ms,
            weighing.times_left(limits, elapsed, learned),
        )[0]

    spent = first.predicted.ttft_ms * learned.ttft.factor("cheap")
    for limits in (Budget(latency_ms=left), Budget(ttft_ms=left)):
        late, both = alone(first, limits), alone(better, limits, spent)
        assert risk(limits, p) == pytest.approx((1 - p) * late + p * both, abs=1e-9)
        assert 0.0 <= risk(limits, p) <= 1.0
        wider = Budget.from_dict({**limits.to_dict(), next(iter(limits.to_dict())): left + more})
        assert risk(wider, p) <= risk(limits, p) + 1e-9
        assert risk(limits, p, wait_ms=more) >= risk(limits, p) - 1e-9
    assert risk(Budget(latency_ms=left, ttft_ms=left / 2), p) == pytest.approx(
        max(risk(Budget(latency_ms=left), p), risk(Budget(ttft_ms=left / 2), p))
    )
    two = in_two(first, better, p)
    assert two.mean_ms == pytest.approx((1 - p) * a + p * (0.4 * a + b)) and two.most_ms == pytest.approx(0.4 * a + b)


def test_a_deadline_takes_two_passes_one_or_the_better_plan_alone() -> None:
    offered = [CHEAP, replace(in_two(CHEAP, FULL, 0.3), quality=0.9)]
    controller = settled(noise=0.05)
    free, wide, narrow = (controller.choose(offered, b) for b in (LOOSE, Budget(latency_ms=300), Budget(latency_ms=70)))
    assert free.candidate is offered[1] and free.reason == "best quality, no time limit set"
    assert wide.candidate is offered[1] and "two passes, latency 8 + 100 of 300 ms with 30 %" in wide.reason
    assert narrow.candidate is CHEAP and narrow.rejected[0].reason.startswith("two passes")
    asking = Asking(Escalation(), "read")
    assert told(wide, asking, True) == {"to": "native@1", "k": 1, "threshold": 0.1, "share": 0.3}
    assert told(narrow, asking, True) == {"why": narrow.rejected[0].reason} and told(narrow, None, True) == {}
    assert not controller.too_late_for(FULL, Budget(latency_ms=300), 100.0)
    assert "late with" in controller.too_late_for(FULL, Budget(latency_ms=300), 210.0)
    assert not controller.too_late_for(FULL, LOOSE, 1e9)
    # Memory is that of the pass that needs most.
    assert controller.choose(offered, Budget(vram_gb=1.0)).candidate is CHEAP


def rules(**changes: float) -> Asking:
    learned = {"threshold": 0.2, "auc": 0.9, "rows": 100, "loss": 0.3, "left": 0.01, "share": 0.4, **changes}
    return Asking(Escalation(thresholds={"cheap": {ANY: Threshold(**learned)}}), "read")


def made(asking: Asking, *lane: Candidate, tolerance: float = 0.02) -> tuple[list[Candidate], int]:
    return plans(lane, FULL, asking, tolerance=tolerance, share=lambda _, before: before, new_tokens=10.0)


def test_what_is_on_offer_by_what_is_known_of_the_plan() -> None:
    general = Asking(Escalation(), "read")
    (one, two), count = made(general, CHEAP)
    assert count == 1 and one == CHEAP and two.second is not None and two.second.candidate is FULL
    # Nothing is known of the entropy: worth what going on at random is.
    assert two.second.share == GENERAL.share and two.quality == pytest.approx(1 - 0.2 * (1 - GENERAL.share))
    sure = replace(CHEAP, quality=0.99)
    assert made(general, sure) == ([sure], 0) and made(rules(loss=0.0), sure)[1] == 0
    (one, two), _ = made(rules(), sure)
    assert one.quality == pytest.approx(0.7) and two.quality == pytest.approx(0.99)  # by its rows
    assert two.second is not None and two.second.key == "cheap read"
    assert made(rules(threshold=None), CHEAP) == ([CHEAP], 0)
    # Going on nearly always costs more than going there at once.
    at_once, count = made(rules(share=0.99), CHEAP)
    assert count == 0 and at_once[-1] is FULL
    assert Controller().choose(at_once, LOOSE).candidate is FULL
    # Where the lane has full compute it is the better plan, and two passes as good as it are cheaper.
    offered, count = made(rules(), FULL, CHEAP)
    assert count == 1 and Controller().choose(offered, LOOSE).candidate.second is not None


def test_the_better_plan_may_be_that_of_another_lane_where_it_is_as_good_as_full_compute_and_takes_less() -> None:
    strong = candidate(45, 0.99, key="native@1/2blank")

    def offered(share: float) -> list[Candidate]:
        asking = rules(share=share)
        found, _ = plans([CHEAP], FULL, asking, tolerance=0.02, share=lambda _, p: p, new_tokens=10.0, strong=[strong])
        return found

    second = Controller().choose(offered(0.4), LOOSE).candidate.second
    assert second is not None and second.candidate is strong
    # Where nearly all go on it is taken at once.
    assert Controller().choose(offered(0.99), LOOSE).candidate.key == strong.key


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), shares, st.floats(0.0, 0.5))
def test_no_tolerance_makes_two_passes_worth_less_than_one(q: float, better: float, p: float, tolerance: float) -> None:
    full = replace(FULL, quality=max(q, better))
    offered, count = plans(
        [replace(CHEAP, quality=q)],
        full,
        Asking(Escalation(), ""),
        tolerance=tolerance,
        share=lambda *_: p,
        new_tokens=5.0,
    )
    assert count == int(full.quality - q > tolerance)
    assert all(offered[0].quality <= two.quality <= full.quality for two in offered[1:])


def test_verdicts_teach_shares_and_each_pass_its_own_rung() -> None:
    controller = Controller(clock=lambda: 0.0)
    choice = controller.choose([in_two(CHEAP, FULL, 0.4, key="cheap read")], LOOSE)
    for _ in range(30):
        controller.looked_at(choice, 1.5 * CHEAP.predicted.ttft_ms, escalated=True)
        controller.update(choice, took(212.0, ttft=92.0), ran=FULL, lost_ms=12.0)
    assert controller.share("cheap read", 0.4) == pytest.approx((30 + 10 * 0.4) / 40)
    assert controller.share("other", 0.4) == 0.4
    assert 1.3 < controller.slowdown("cheap") < 1.9  # its own time, 1.5 times what was predicted
    # The second pass took twice what was predicted, less what the first had used up.
    assert math.exp(controller.state()["latency"]["points"]["native@1"]["offset"]) > 1.0
    held = Controller(clock=lambda: 0.0)
    choice = held.choose([CHEAP], LOOSE)
    for _ in range(30):
        held.update(choice, took(20.0, ttft=12.0), held_ms=4.0)
    assert held.slowdown("cheap") == pytest.approx(1.0)  # the token was there after 8 ms, and held back
    again = Controller.from_state(json.loads(json.dumps(controller.state())))
    assert again.state() == controller.state() and again.share("cheap read", 0.0) == controller.share("cheap read", 0.0)


def test_a_plan_that_is_enough_by_the_models_own_needs_is_not_asked_whatever_its_rung_loses_elsewhere() -> None:
    enough, short = candidate(40, 0.99, key="enough"), candidate(20, 0.9, key="short")
    learned = Threshold(0.2, 0.9, 100, loss=0.3, left=0.01, share=0.4)
    asking = Asking(Escalation(thresholds={ANY: {ANY: learned}}), "read")

    def offered(trusted: bool) -> dict[str, float]:
        found, _ = plans(
            [FULL, enough, short],
            FULL,
            asking,
            tolerance=0.02,
            share=lambda key, share: share,
            new_tokens=10,
            trusted=trusted,
        )
        return {each.key: each.quality for each in found if each.second is None}

    assert offered(True) == {"native@1": 1.0, "enough": 1.0, "short": 0.7}
    assert offered(False)["enough"] == 0.7


@given(
    qualities=st.lists(shares, min_size=1, max_size=4),
    latencies=st.lists(st.floats(1.0, 150.0), min_size=4, max_size=4),
    p=shares,
    kind=st.sampled_from(["describe", "read", ""]),
    asked=st.booleans(),
)
def test_where_the_policy_is_a_guess_nothing_below_full_compute_is_as_good_without_a_verdict(
    qualities: list[float], latencies: list[float], p: float, kind: str, asked: bool
) -> None:
    lane = [candidate(ms, q, key=f"cheap{i}") for i, (ms, q) in enumerate(zip(latencies, qualities, strict=False))]
    asking = Asking(UNFITTED, kind, "" if asked else "num_beams is 2", "a guess", p, ("cheap0",))
    found, count = doubted(
        lane,
        FULL,
        asking,
        tolerance=0.02,
        share=lambda _, expected: expected,
        new_tokens=10,
    )
    best = max(each.quality for each in found)
    for each in found:
        assert each.point.is_full or each.second is not None or each.quality < best
        if each.second is not None:
            assert asked and each.second.candidate is FULL and each.second.k == UNFITTED.k
            assert each.second.share >= p and each.mean_ms < FULL.predicted.latency_ms
            assert each.key == "cheap0" or dict(zip(map(str, range(4)), qualities, strict=False))[each.key[-1]] >= 0.98
    assert count == sum(each.second is not None for each in found)
    assert any(each.point.is_full for each in found)


@pytest.mark.parametrize("tolerance", [0.01, 0.02, 0.05])
def test_doubt_takes_every_detail_before_fewer_pixels_and_fewer_pixels_before_missing_a_deadline(
    tolerance: float,
) -> None:
    spared, fewer = candidate(50, 0.978, key="weighted3@1/2blank"), candidate(20, 0.99, key="weighted3@1/25%")
    controller = Controller(clock=lambda: 0.0)

    def chosen(
        kind: str, limits: Budget = LOOSE, *, simple: bool = True, never: str = "", first: Candidate = spared
    ) -> Candidate:
        worth = (spared.key, fewer.key) if simple else ()
        asking = Asking(UNFITTED, kind, never, "a guess", 0.4, worth)
        offered, _ = doubted([first, fewer], FULL, asking, tolerance=tolerance, share=controller.share, new_tokens=10)
        return controller.choose(offered, limits).candidate

    for kind in ("describe", "read", "count"):
        found = chosen(kind)
        assert found.key == spared.key and found.second is not None
        # P(complex) is of pixels, and all are there; what is looked at is whether the model can do with copies at all.
        assert found.second.share == UNFITTED.threshold(spared.key, kind).share < 0.1
        assert found.second.threshold == UNFITTED.threshold(spared.key, kind).threshold > 0.5
        # Never unasked, and not where the router sees no simple image.
        assert chosen(kind, never="num_beams is 2").point.is_full
        assert chosen(kind, simple=False).key != spared.key
    assert chosen("describe", Budget(latency_ms=40.0)).key == fewer.key
    hardly = candidate(88, 0.978, key=spared.key)  # an image that is hardly blank
    assert chosen("describe", first=hardly).key == fewer.key

    first = controller.choose([chosen("describe")], LOOSE)
    for _ in range(60):
        controller.looked_at(first, spared.predicted.ttft_ms, escalated=True)
    assert chosen("describe").key != spared.key  # what was seen of this model speaks against it


def test_doubt_prefers_full_compute_from_the_start_where_most_go_on_and_says_so() -> None:
    enough, controller = candidate(60, 1.0, key="enough"), Controller(clock=lambda: 0.0)

    def chosen(p_complex: float, limits: Budget = LOOSE) -> tuple[Candidate, dict[str, object]]:
        asking = Asking(UNFITTED, "describe", "", "a guess", p_complex)
        offered, count = doubted([enough], FULL, asking, tolerance=0.02, share=controller.share, new_tokens=10)
        choice = controller.choose(offered, limits)
        return choice.candidate, told(choice, asking, count > 0)

    asks, said = chosen(0.1)
    assert asks.key == "enough" and asks.second is not None and said["to"] == "native@1" and said["doubt"] == "a guess"
    sure, said = chosen(0.8)
    assert sure is not enough and sure.point.is_full and UNTRUSTED in str(said["why"]) and said["doubt"] == "a guess"
    cheap, _ = chosen(0.8, Budget(latency_ms=80.0))  # nothing else fits
    assert cheap.key == "enough" and cheap.second is None
    first = controller.choose([asks], LOOSE)
    for _ in range(40):
        controller.looked_at(first, asks.predicted.ttft_ms, escalated=True)
    assert chosen(0.1)[0].point.is_full  # what was seen of this model speaks against it
