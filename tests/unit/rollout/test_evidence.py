"""Evidence: valid whatever the truth within the hypothesis, as published, quick where there is something to find."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.evidence import EAGER_RATIOS, RATIOS, Single, Unpaired, _Plan
from adaptive_fusion.rollout.means import MeanSequence

SHARES = st.floats(0, 1)


@given(st.integers(1, 4), st.integers(1, 3), st.floats(1e-3, 0.999), st.floats(-0.6, 0.6), SHARES, SHARES)
def test_no_block_is_worth_more_than_one_on_average_while_the_canary_is_no_worse(
    n_a: int, n_b: int, mean: float, margin: float, a: float, b: float
) -> None:
    """Exactly, over all outcomes of a block, for every bet, wherever the truth is."""
    b = min(b, a + margin)
    if b < 0.0:
        return
    for ratios in (RATIOS, EAGER_RATIOS):
        plan = _Plan(ratios, n_a, n_b, mean, margin, mean * (1.0 - mean), 1)
        worth = [0.0] * len(plan.bets)
        for outcome in itertools.product((0.0, 1.0), repeat=n_a + n_b):
            chance = math.prod((p if y else 1.0 - p) for y, p in zip(outcome, [a] * n_a + [b] * n_b, strict=True))
            gains = plan.gains(outcome[:n_a], outcome[n_a:])
            assert min(gains) >= 0.0
            worth = [w + chance * gain for w, gain in zip(worth, gains, strict=True)]
        assert max(worth) <= 1.0 + 1e-9


@given(st.integers(1, 20), st.integers(1, 3), st.floats(0.01, 0.2))
def test_of_two_proportions_a_block_is_the_likelihood_ratio_of_turner_ly_and_gruenwald(
    n_a: int, n_b: int, mean: float
) -> None:
    """Theirs: each arm's own proportion against the pooled one, (n_a a + n_b b) / (n_a + n_b)."""
    plan = _Plan((2.0,), n_a, n_b, mean, 0.0, mean * (1.0 - mean), 1)
    a = (n_a + n_b) * mean / (n_a + 2.0 * n_b)
    b = 2.0 * a
    for bad_a, bad_b in ((0, 0), (0, n_b), (n_a, 0), (1, 1)):
        outcomes = [float(i < bad_a) for i in range(n_a)], [float(i < bad_b) for i in range(n_b)]
        ratio = (a / mean) ** bad_a * ((1 - a) / (1 - mean)) ** (n_a - bad_a)
        ratio *= (b / mean) ** bad_b * ((1 - b) / (1 - mean)) ** (n_b - bad_b)
        assert plan.gains(*outcomes)[0] == pytest.approx(ratio)


def test_means_are_those_of_the_published_implementation() -> None:
    """confseq 0.0.11, `predmix.predmix_empbern_cs` at alpha 0.05 without running intersection, by the authors of the
    paper; it starts its means at the first value, the paper at 1/2, which is worth a little at the start."""
    tenths, rare = MeanSequence(), MeanSequence()
    published = {
        100: ((0.27173788618069894, 0.5265754604523271), (0.0, 0.14742483114205984)),
        400: ((0.33866633669515844, 0.463789703047095), (0.012151832487679176, 0.09132422558766051)),
    }
    for i in range(400):
        tenths.observe((i * i * 7 + 3 * i) % 11 / 10)
        rare.observe(float(i % 20 == 3))
        if expected := published.get(i + 1):
            assert tenths.interval == pytest.approx(expected[0], abs=0.006)
            assert rare.interval == pytest.approx(expected[1], abs=0.006)
    assert MeanSequence().interval == (0.0, 1.0) and MeanSequence().mean is None


def found_after(control: float, canary: float, share: float, most: int, seed: int, **options: bool) -> int | None:
    """The canary's requests after which evidence of 50 to 1 is there."""
    draws, process, count = random.Random(seed), Unpaired(**options), 0
    process.ratio(share)
    while count < most:
        mine = draws.random() < share
        process.observe(mine, float(draws.random() < (canary if mine else control)))
        count += mine
        if process.peak >= math.log(50.0):
            return count
    return None


def test_twice_as_many_misses_are_found_in_time_and_none_where_there_are_none() -> None:
    found = sorted(found_after(0.05, 0.10, 0.5, 1600, seed) or 9999 for seed in range(20))
    assert found[17] <= 1200
    uneven = sorted(found_after(0.05, 0.10, 0.05, 800, seed) or 9999 for seed in range(10))
    assert uneven[8] <= 600  # nineteen of the control say more of it than one
    assert all(found_after(0.05, 0.05, 0.5, 1500, seed) is None for seed in range(10))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25])
def test_a_dead_canary_is_found_within_ten(share: float) -> None:
    assert max(found_after(0.0, 1.0, share, 50, seed, eager=True) or 99 for seed in range(40)) <= 10


def test_one_mean_above_a_limit_is_found_and_one_below_is_not() -> None:
    dead = Single(0.5, low=0.0, bets=(0.98,))
    for _ in range(9):
        dead.observe(1.0)
    assert dead.peak >= math.log(400.0)
    draws, worse, alike = random.Random(1), Single(0.01), Single(0.01)
    for _ in range(600):
        worse.observe(draws.choice((0.0, 0.0, 0.2)))
        alike.observe(draws.uniform(-0.1, 0.1))
    assert worse.peak > math.log(200.0) > math.log(10.0) > alike.peak


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from((0.0, 0.0, 0.0, 1.0, 0.3))), max_size=120), st.integers(0, 119)
)
def test_a_process_goes_on_where_it_was_kept(outcomes: list[tuple[bool, float]], cut: int) -> None:
    whole, looked = Unpaired(binary=False), Unpaired(binary=False)
    for process in (whole, looked):
        process.ratio(0.3)
    for index, (mine, bad) in enumerate(outcomes):
        whole.observe(mine, bad)
        if index == cut:
            kept, looked = looked.state(), Unpaired(binary=False)
            looked.restore(kept)
        looked.observe(mine, bad)
        assert looked.log_e <= looked.peak + 1e-9
    assert looked.peak == pytest.approx(whole.peak) and looked.log_e == pytest.approx(whole.log_e)


@pytest.mark.parametrize("margin", [1.0, -1.0])
def test_a_margin_without_sense_is_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin is"):
        Unpaired(margin)
