"""Sizes that callers ask for single images: what is planned is what runs, and a point's budget holds for all."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptive_fusion.errors import UnsupportedModelError
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.models import GridAdapter, SquareAdapter
from adaptive_fusion.point import NATIVE

SIDES = st.integers(8, 220)
PIXELS = st.integers(1, 60_000)
OPTIONS = st.one_of(
    st.just({}),
    st.builds(lambda n: {"max_pixels": n}, PIXELS),
    st.builds(lambda n: {"min_pixels": n}, PIXELS),
    st.builds(lambda a, b: {"min_pixels": min(a, b), "max_pixels": max(a, b)}, PIXELS, PIXELS),
    st.builds(lambda h, w: {"resized_height": h, "resized_width": w}, SIDES, SIDES),
    st.just({"detail": "low"}),
)
SHOWN = st.lists(st.tuples(SIDES, SIDES, OPTIONS), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def adapter(tiny_dense: Any, processor: Any) -> GridAdapter:
    return GridAdapter(tiny_dense, processor)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def asked(*shown: tuple[int, int, dict[str, Any]]) -> Any:
    parts = [{"type": "image", "image": picture(height, width), **options} for height, width, options in shown]
    return build_request([{"role": "user", "content": [*parts, "?"]}], None)


@settings(deadline=None, max_examples=50)
@given(SHOWN, st.one_of(st.none(), st.integers(1024, 30_000)))
def test_what_is_planned_is_what_runs(
    adapter: GridAdapter, shown: list[tuple[int, int, dict[str, Any]]], budget: int | None
) -> None:
    request, point = asked(*shown), replace(NATIVE, max_pixels=budget)
    inputs, plan = adapter.prepare(request.messages, point), adapter.plan(request.sizes, point)
    grids = inputs["image_grid_thw"]
    assert [int(h * w) for _, h, w in grids] == list(plan.segments)
    assert int((inputs["input_ids"] == adapter.processor.image_token_id).sum()) == plan.tokens
    assert len(inputs["pixel_values"]) == plan.patches
    patch, factor = adapter.processor.image_processor.patch_size, 16
    for (_, h, w), (_, _, options) in zip(grids.tolist(), shown, strict=True):
        most = min(budget or 10**9, options.get("max_pixels", 10**9))
        # A side is never below one merged patch, whatever is asked. Where nothing is, the processor rounds as it does.
        assert not options or h * w * patch**2 <= max(most, max(h, w) * patch * factor)


def test_an_image_with_a_size_of_its_own_is_as_the_processor_makes_it_alone(adapter: GridAdapter) -> None:
    """Pixel for pixel, beside others that have the processor's own."""
    request = asked((150, 210, {"max_pixels": 9000}), (90, 60, {}))
    both = adapter.prepare(request.messages, NATIVE)
    low, high = adapter.processor.image_processor.size["shortest_edge"], 9000
    alone = adapter.processor.image_processor(
        [request.media[0]], size={"shortest_edge": low, "longest_edge": high}, return_tensors="pt"
    )
    other = adapter.processor.image_processor([request.media[1]], return_tensors="pt")
    assert torch.equal(both["pixel_values"], torch.cat([alone["pixel_values"], other["pixel_values"]]))


def test_a_given_height_and_width_hold_to_the_patch(adapter: GridAdapter) -> None:
    inputs = adapter.prepare(asked((50, 50, {"resized_height": 100, "resized_width": 333})).messages, NATIVE)
    patch = adapter.processor.image_processor.patch_size
    assert [side * patch for side in inputs["image_grid_thw"][0, 1:].tolist()] == [96, 336]


def test_native_is_what_was_asked_for(adapter: GridAdapter) -> None:
    sizes = [asked((400, 400, options)).sizes[0] for options in ({"max_pixels": 2048}, {"min_pixels": 250_000}, {})]
    small, large, own = map(adapter.native_pixels, sizes)
    assert small <= 2048 < own < 250_000 <= large


def test_low_detail_takes_no_more_than_the_processor_would(adapter: GridAdapter) -> None:
    plain, low = (adapter.native_pixels(asked((1000, 900, options)).sizes[0]) for options in ({}, {"detail": "low"}))
    assert low <= min(plain, 512 * 512)


def test_a_model_with_one_fixed_square_refuses_a_size_by_name(tiny_dense: Any, processor: Any) -> None:
    square = SquareAdapter(tiny_dense, processor)
    with pytest.raises(UnsupportedModelError, match=r"min_pixels, max_pixels.*fixed square"):
        square.prepare(asked((50, 50, {"max_pixels": 2048})).messages, NATIVE)
