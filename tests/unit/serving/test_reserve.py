"""The reserve comes to rest where the share of late requests is the one that is wanted."""

import random

from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.serving.reserve import LEAST, MISSES, MOST, Reserve


@given(st.lists(st.booleans(), max_size=300))
def test_it_stays_within_bounds_and_rises_only_by_misses(outcomes: list[bool]) -> None:
    reserve = Reserve()
    for in_time in outcomes:
        before = reserve.share
        reserve.observe(in_time)
        assert LEAST <= reserve.share <= MOST
        assert (reserve.share > before) <= (not in_time)


def test_where_a_larger_reserve_helps_misses_come_to_the_wanted_share() -> None:
    reserve, rng, late = Reserve(), random.Random(0), 0
    for number in range(20_000):
        missed = rng.gauss(0.0, 0.1) > reserve.share  # what a wait is longer than expected
        reserve.observe(not missed)
        late += missed and number >= 1000
    assert abs(late / 19_000 - MISSES) < 0.005
