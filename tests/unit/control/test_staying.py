"""Within a conversation a plan rises with the question and falls only with the budget; tables stay bounded."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.staying import FALLS, RISES, STAYS, Conversations, Plan, below, staying
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.point import OperatingPoint

POINTS = [OperatingPoint(downsample=d, max_pixels=p) for d, p in product((0.25, 0.5, 1.0), (4096, 65_536, None))]


def offered(point: OperatingPoint, quality: float) -> Candidate:
    return Candidate(point, quality, Prediction(1.0, 1.0, 1.0, 0.1))


@given(
    st.lists(st.tuples(st.sampled_from(POINTS), st.floats(0, 1)), min_size=1, max_size=9, unique_by=lambda x: x[0]),
    st.sampled_from(POINTS),
    st.sampled_from(POINTS),
    st.floats(0, 1),
    st.sampled_from((0.0, 0.02)),
)
def test_offers_take_nothing_away_and_change_nothing_that_is_enough(
    others: list[tuple[OperatingPoint, float]],
    point: OperatingPoint,
    had: OperatingPoint,
    quality: float,
    tolerance: float,
) -> None:
    plan, candidates = offered(point, quality), [offered(*other) for other in others]
    found = staying(candidates, plan, tolerance, had)
    no_less = {each.point for each in candidates if not below(each.point, point)}
    for offer in found.offers:
        assert offer[0] is plan and not any(below(each.point, point) for each in offer)
    assert {each.point for each in found.offers[-1]} == no_less | {point}
    best = max(each.quality for each in found.offers[-1])
    assert (found.offers[0] == (plan,)) == (best - quality <= tolerance)
    for each in candidates:
        change = found.changed(each)
        assert (change == STAYS) == (each.point == had) and (change == FALLS) == below(each.point, had)
        assert change != RISES or below(had, each.point)
        assert found.said(each) == {"from": plan.key, "to": each.key, "change": change} and found.in_words(each)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=80), st.integers(1, 6))
def test_the_table_is_bounded_and_forgets_what_was_not_used(steps: list[tuple[bool, int]], most: int) -> None:
    table, known = Conversations(most), list[int]()
    for keep, number in steps:
        plan = Plan(str(number), OperatingPoint())
        if keep:
            table.keep(str(number), plan)
        found = table.find(["nobody", str(number)])
        assert found == (plan if keep or number in known else None)
        if found is not None:
            known = [*(each for each in known if each != number), number][-most:]
        assert len(table) == len(known) <= most
