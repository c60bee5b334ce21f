"""Images at shares of their native pixels: sizes, the bisection, curves over shares."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adaptive_fusion.evaluation.shares import ENOUGH, SHARES, Curve, shares_to_read, shown, sized, within
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.rungs import Rung

parts = st.floats(0, 1)
files = st.tuples(st.integers(256, 3000), st.integers(256, 3000))  # smaller ones are enlarged


@given(files, st.sampled_from(SHARES))
def test_a_share_never_takes_more_than_it_says_and_sides_are_whole_tokens(file, share):
    native, small = within(file), sized(file, share)
    assert all(side % 32 == 0 for side in (*native, *small))
    assert math.prod(small) <= max(round(share * math.prod(native)), 32 * 32)
    assert sized(file, 1.0) == native == within(native)
    assert small == within(file, Rung(NATIVE, pixel_share=share).resolve(math.prod(native)).max_pixels)


def test_what_is_shown_has_native_size_and_less_detail_the_smaller_the_share():
    pixels = np.random.default_rng(0).integers(0, 256, (320, 448, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    pictures = [shown(image, sized(image.size, share)) for share in (1.0, 0.5, 0.125)]
    assert {picture.shape for picture in pictures} == {(320, 448, 3)}
    assert np.array_equal(pictures[0], pixels)
    assert pictures[0].std() > pictures[1].std() > pictures[2].std()


@given(st.integers(0, len(SHARES) - 1), st.randoms())
def test_the_bisection_ends_at_the_smallest_sufficient_step_after_at_most_four_readings(last, random):
    truth = sorted((random.uniform(ENOUGH, 1) for _ in range(last)), reverse=True)
    truth = [1.0, *truth, *sorted((random.uniform(0, ENOUGH - 0.001) for _ in SHARES[last + 1 :]), reverse=True)]
    kept = {1.0: 1.0}
    for share in shares_to_read(kept):
        kept[share] = truth[SHARES.index(share)]
    assert len(kept) <= 5
    assert min(share for share, part in kept.items() if part >= ENOUGH) == SHARES[last]


@given(st.dictionaries(st.floats(0.01, 1), parts, min_size=1), st.lists(st.floats(0.005, 1), min_size=2))
def test_a_curve_never_falls_and_passes_through_what_was_read(kept, shares):
    curve, shares = Curve(kept), sorted(shares)
    found = curve.at(np.array(shares))
    assert ((found >= 0) & (found <= 1)).all() and (np.diff(found) >= -1e-12).all()
    for share, part in kept.items():
        assert curve.at(share) >= part - 1e-9
    if list(kept.values()) == [kept[share] for share in sorted(kept)] == sorted(kept.values()):
        assert np.allclose([curve.at(share) for share in kept], list(kept.values()))
