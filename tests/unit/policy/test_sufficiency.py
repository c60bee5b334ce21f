"""How many pixels are enough: what the needs promise, whatever the image and the question."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import PolicyError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION, Complexity
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.own_needs import OwnNeeds
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import (
    AT_NEED,
    BLANKS_LOSE,
    MOVING_FPS,
    Need,
    Needs,
    Scene,
    Sufficiency,
    Text,
    together,
)

ENOUGH = Sufficiency(Text(6.0, 3.2, 0.1, 0.8, 0.2), Scene(("edge_density",), (2.0,), 17.0, 0.1))
LENGTHS = ("text_height_low", "text_height", "stroke_low", "stroke", "flank", "enlarged")

number = st.floats(-8, 8)
complexities = st.builds(
    lambda features, detail, share: Complexity(
        0.5,
        dict(zip(FEATURE_NAMES, features, strict=True)),
        VERSION,
        "image",
        {**dict(zip(DETAIL_FEATURES, detail, strict=True)), "text_share": share, "enlarged": abs(detail[0])},
        DETAIL_VERSION,
    ),
    st.lists(st.floats(0, 4), min_size=len(FEATURE_NAMES), max_size=len(FEATURE_NAMES)),
    st.lists(number, min_size=len(DETAIL_FEATURES), max_size=len(DETAIL_FEATURES)),
    st.floats(0, 1),
)
sizes = st.integers(1024, 1 << 24)


def asked(kind: str, of: Complexity, own: int, native: int, **more: Any) -> Needs:
    found = ENOUGH.needs(kind, of, own, native, **{"margin": 1.1, "floor": 0.0, **more})
    assert found is not None
    return found


@given(complexities, sizes, st.sampled_from(PROMPT_KINDS), st.floats(0, 1e7))
def test_reading_needs_no_less_than_anything_and_nothing_more_than_native(
    complexity: Complexity, native: int, kind: str, floor: float
) -> None:
    read, described = (asked(kind, complexity, native, native) for kind in ("read", "describe"))
    other = asked(kind, complexity, native, native, floor=floor)
    assert described.pixels <= read.pixels <= native
    assert min(floor, native) <= other.pixels <= native
    assert other.pixels <= max(read.pixels, floor)


@given(complexities, sizes, st.sampled_from((2, 4)))
def test_an_enlarged_image_needs_the_same_pixels(complexity: Complexity, native: int, times: int) -> None:
    octaves = math.log2(times)
    longer = {k: v + octaves if k in LENGTHS else v for k, v in complexity.detail.items()}
    large = replace(complexity, detail=longer)
    for kind in ("read", "describe"):
        before = asked(kind, complexity, native, native)
        after = asked(kind, large, native * times**2, native * times**2)
        if before.pixels < native:  # what needs all of it may be the image's own limit
            assert after.pixels == pytest.approx(before.pixels)
        # The same file at a processor that shrinks it to what it was.
        assert asked(kind, large, native * times**2, native).pixels == pytest.approx(before.pixels)


@given(complexities, sizes, st.floats(1, 2))
def test_a_margin_is_on_the_linear_scale(complexity: Complexity, native: int, margin: float) -> None:
    def text(margin: float) -> float:
        needs = asked("read", complexity, native, native, margin=margin).needs
        return next(need.pixels for need in needs if need.what == "text")

    assert text(margin) == pytest.approx(min(native, text(1.0) * margin**2))


@given(st.lists(st.tuples(sizes, st.floats(0.001, 1), st.floats(0.01, 0.5)), min_size=1, max_size=4), st.data())
def test_quality_falls_with_the_pixels_and_is_whole_with_all(
    media: list[tuple[int, float, float]], data: st.DataObject
) -> None:
    each = [Needs(native, (Need("text", share * native, slope),)) for native, share, slope in media]
    all_of_them = together(each)
    assert all_of_them is not None and all_of_them.quality(all_of_them.native) == 1.0
    shares = sorted(data.draw(st.lists(st.floats(1e-3, 1), min_size=2, max_size=6)))
    found = [all_of_them.quality(share * all_of_them.native) for share in shares]
    assert found == sorted(found) and all(0 <= quality <= 1 for quality in found)
    # No medium is worse off under the common limit than the common quality says.
    for share, quality in zip(shares, found, strict=True):
        limit = share * all_of_them.native
        assert quality <= min(one.quality(min(limit, one.native)) for one in each) + 1e-9
    needed = all_of_them.pixels
    assert all_of_them.quality(needed) >= 1 - AT_NEED - 1e-9


def test_frames_and_tokens_of_a_rung_count() -> None:
    still = Needs(100_000, (Need("objects", 50_000, 0.1),), fps=0.5)
    half = Rung(OperatingPoint(), pixel_share=0.5)
    assert still.quality_of(half) == pytest.approx(1 - AT_NEED)
    assert still.quality_of(replace(half, point=OperatingPoint(max_fps=0.5))) == still.quality_of(half)
    assert still.quality_of(replace(half, point=OperatingPoint(max_fps=0.25))) < still.quality_of(half) - 0.2
    assert still.quality_of(Rung(OperatingPoint(downsample=0.5))) == pytest.approx(1 - AT_NEED - 0.1)
    assert still.quality_of(Rung(OperatingPoint(max_pixels=50_000))) == still.quality_of(half)
    whole = Rung(OperatingPoint(blanks=2))
    for rung in (whole, replace(half, point=whole.point)):
        without = replace(rung, point=OperatingPoint())
        assert still.quality_of(rung) == pytest.approx(still.quality_of(without) - BLANKS_LOSE)
    assert still.quality_of(whole) < 1 - AT_NEED  # not as good as any where the tolerance is the usual one
    assert together([]) is None
    mixed = together([still, Needs(10, (Need("text", 5, 0.1),))])
    assert mixed is not None and mixed.fps == 0.5 and mixed.native == 100_000
    moving = still._replace(fps=MOVING_FPS)
    for media in ([moving, Needs(10, (Need("text", 5, 0.1),))], [still, moving]):
        kept = together(media)
        assert kept is not None
        assert kept.quality_of(half) - kept.quality_of(replace(half, point=OperatingPoint(max_fps=1.0))) > 0.2


def test_what_was_not_measured_is_not_guessed() -> None:
    bare = Complexity(0.5, dict.fromkeys(FEATURE_NAMES, 0.1), VERSION, "image")
    assert ENOUGH.needs("read", bare, 1000, 1000, margin=1.0, floor=0.0) is None


def test_files_are_read_back_and_refused() -> None:
    values = ENOUGH.to_dict()
    assert Sufficiency.from_dict(values) == ENOUGH
    for wrong, said in (
        ({"schema": 9}, "schema version 9; expected 1"),
        ({"text": {}}, "text has missing"),
        ({"text": {**values["text"], "texture": "much"}}, "texture is 'much'"),
        ({"scene": {**values["scene"], "weights": [1]}}, "weights of scene is"),
        ({"scene": {**values["scene"], "weights": {"magic": 1.0}}}, "magic"),
        ({"features": {"complexity": VERSION, "detail": "0"}}, "fit it again"),
        ({"more": 1}, "unknown"),
    ):
        with pytest.raises(PolicyError, match=said):
            Sufficiency.from_dict({**values, **wrong})


@given(complexities, sizes, st.sampled_from(PROMPT_KINDS), st.floats(-9, 9), st.floats(0, 1e7))
def test_a_models_own_needs_move_what_was_asked_and_nothing_else(
    complexity: Complexity, native: int, kind: str, margin: float, floor: float
) -> None:
    own = OwnNeeds({"read": 0.5, "count": -1.0}, ("edge_density", "stroke"), (1.0, 0.0), (0.3, -0.1), margin, 0.4)
    mine = replace(ENOUGH, own=own)
    general = asked(kind, complexity, native, native, floor=floor)
    found = mine.needs(kind, complexity, native, native, margin=1.1, floor=floor)
    octaves = own.octaves(kind, complexity)
    assert found is not None
    if kind in own.kinds:
        assert octaves is not None and abs(octaves) <= 8
        assert found.pixels == pytest.approx(max(1.0, min(native, general.pixels * 2**octaves)))
        assert found.most.per_octave == 0.4
        # All there is loses nothing, even where more would be needed.
        expected = 1.0 if found.pixels >= native else pytest.approx(1 - AT_NEED, abs=0.02)
        assert found.quality(found.pixels) == expected
    else:
        assert octaves is None and found == general
    clip = replace(complexity, kind="video")
    assert own.octaves(kind, clip) is None
    assert mine.needs(kind, clip, native, native, margin=1.1, floor=floor) == asked(
        kind, clip, native, native, floor=floor
    )
    assert Sufficiency.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kinds": {"sing": 1.0}}, "sing"),
        ({"names": ["beauty"]}, "beauty"),
        ({"weights": []}, "0 weights"),
        ({"margin": math.inf}, "margin"),
        ({"more": 1}, "more"),
    ],
)
def test_own_needs_that_are_none_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        OwnNeeds.from_dict({**OwnNeeds({"read": 0.0}, ("edge_density",), (0.0,), (1.0,), 0.0, 0.1).to_dict(), **wrong})
