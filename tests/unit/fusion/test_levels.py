import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.fusion.levels import depth_profile, group_levels, select_levels


@st.composite
def vits(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    depth = draw(st.integers(1, 40))
    taps = draw(st.sets(st.integers(0, depth - 1), max_size=4))
    return depth, tuple(sorted(taps))


@settings(max_examples=100, deadline=None)
@given(vits(), st.integers(1, 45))
def test_selection_keeps_its_promises(vit: tuple[int, tuple[int, ...]], layers: int) -> None:
    depth, taps = vit
    chosen = select_levels(depth, taps, layers)

    assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(range(depth))
    assert set(taps) <= set(chosen)
    assert len(chosen) == max(len(taps), min(layers, depth))
    if layers > 3:
        assert set(chosen) <= set(select_levels(depth, taps, layers + 1))
    lower = [i for i in range(depth) if i < depth / 2]
    if layers > max(3, len(taps)):
        room = len(set(taps) | {depth - 1} if not taps else set(taps))
        reachable = min(3, len(lower), len(set(lower) & set(taps)) + layers - room)
        assert len(set(lower) & set(chosen)) >= reachable


@settings(max_examples=100, deadline=None)
@given(vits(), st.integers(1, 45))
def test_every_level_joins_the_next_tap_at_or_above_it(vit: tuple[int, tuple[int, ...]], layers: int) -> None:
    depth, taps = vit
    levels = select_levels(depth, taps, layers)
    groups = group_levels(levels, taps)

    assert len(groups) == len(taps)
    if not taps:
        return
    assert sorted(sum(groups, ())) == list(levels)
    for index, (tap, group) in enumerate(zip(taps, groups, strict=True)):
        assert tap in group
        below = taps[index - 1] if index else -1
        assert all(below < level for level in group)
        assert index == len(taps) - 1 or all(level <= tap for level in group)


def test_published_shapes() -> None:
    assert select_levels(24, (5, 11, 17), 3) == (5, 11, 17)
    assert select_levels(27, (8, 16, 24), 3) == (8, 16, 24)
    six = select_levels(24, (5, 11, 17), 6)
    assert group_levels(six, (5, 11, 17)) == ((2, 5), (11,), (14, 17, 21))
    assert select_levels(12, (2, 5, 8), 12) == tuple(range(12))


@pytest.mark.parametrize("count", [1, 2, 3, 6, 9, 12])
def test_profile_increases_with_depth_and_sums_to_one(count: int) -> None:
    profile = depth_profile(count)
    assert len(profile) == count
    assert list(profile) == sorted(set(profile))
    assert sum(profile) == pytest.approx(1)


def test_profile_of_six() -> None:
    assert depth_profile(6) == pytest.approx((0.05, 0.08, 0.12, 0.15, 0.25, 0.35))


@pytest.mark.parametrize(
    ("depth", "taps", "layers", "named"),
    [
        (0, (), 3, "depth is 0"),
        (10**9, (), 3, "depth is 1000000000; expected an integer from 1 to 1024"),
        (24, (), 0, "layers is 0"),
        (24, (), True, "layers is True"),
        (24, (), 3.0, "layers is 3.0"),
        (24, (5, 24), 3, r"\[5, 24\].*0 to 23"),
        (24, (11, 5), 3, r"\[11, 5\]"),
        (24, (5, 5), 3, r"\[5, 5\]"),
        (24, (-1,), 3, r"\[-1\]"),
    ],
)
def test_bad_selection_names_the_value(depth: int, taps: tuple[int, ...], layers: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        select_levels(depth, taps, layers)


def test_a_group_without_its_tap_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[11\]"):
        group_levels((2, 5), (5, 11))
