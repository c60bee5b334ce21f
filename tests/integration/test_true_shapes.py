"""The released configurations build, and the adapter plans for them without running anything."""

from typing import Any

import pytest
import torch

from adaptive_fusion.bench.shapes import SHAPES, ShapeProcessor, shape
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.models import Size, adapter_for
from adaptive_fusion.point import NATIVE, OperatingPoint

# size: parameters (billions, as the model cards round them), LLM layers, KV heads, taps, ViT depth and width
PUBLISHED = {
    "2b": (2.1, 28, 8, (5, 11, 17), 24, 1024),
    "4b": (4.4, 36, 8, (5, 11, 17), 24, 1024),
    "8b": (8.8, 36, 8, (8, 16, 24), 27, 1152),
    "32b": (33.4, 64, 8, (8, 16, 24), 27, 1152),
    "30b-a3b": (31.1, 48, 4, (8, 16, 24), 27, 1152),
    "235b-a22b": (235.7, 94, 4, (8, 16, 24), 27, 1152),
}


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def planned(request: pytest.FixtureRequest) -> tuple[str, Any]:
    of = shape(request.param)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = of.model_class()(of.config())
    finally:
        torch.set_default_dtype(before)
    return request.param, adapter_for(model, ShapeProcessor())


def test_every_released_size_is_listed() -> None:
    assert set(SHAPES) == set(PUBLISHED)
    with pytest.raises(ConfigError, match="'3b'"):
        shape("3b")


def test_the_shape_is_the_published_one(planned: tuple[str, Any]) -> None:
    size, adapter = planned
    billions, layers, kv_heads, taps, depth, width = PUBLISHED[size]
    assert sum(p.numel() for p in adapter.model.parameters()) / 1e9 == pytest.approx(billions, abs=0.06)
    text, vision = adapter.model.config.text_config, adapter.model.config.vision_config
    assert (text.num_hidden_layers, text.num_key_value_heads, text.head_dim) == (layers, kv_heads, 128)
    assert (vision.depth, vision.hidden_size, vision.out_hidden_size) == (depth, width, text.hidden_size)
    assert (adapter.taps, adapter.depth) == (taps, depth)


def test_patches_and_tokens_follow_from_the_grid(planned: tuple[str, Any]) -> None:
    _, adapter = planned
    image = Size(1, 512, 512)  # 32 x 32 patches of 16 pixels, 16 x 16 merged
    for point, patches, tokens in (
        (NATIVE, 1024, 256),
        (OperatingPoint(downsample=0.5), 1024, 64),
        (OperatingPoint(downsample=0.25), 1024, 16),
        (OperatingPoint(max_pixels=256 * 256), 256, 64),
        (OperatingPoint("weighted", 6, 0.5, 256 * 256, 4), 256, 16),
    ):
        plan = adapter.plan([image], point)
        assert (plan.patches, plan.tokens) == (patches, tokens), point.name
    both = adapter.plan([image, Size(4, 320, 480, clip=True)], NATIVE)
    assert both.segments == (1024, 600, 600) and both.tokens == 256 + 2 * 150


def test_levels_hold_the_taps_and_the_lower_half(planned: tuple[str, Any]) -> None:
    _, adapter = planned
    assert adapter.levels(OperatingPoint("top")) == ()
    for layers in (3, 6, 9, 12):
        assert adapter.levels(OperatingPoint("gated", layers)) == adapter.taps  # untrained
        levels = adapter.spec(OperatingPoint("gated", layers)).levels
        assert len(levels) == layers and set(adapter.taps) <= set(levels) <= set(range(adapter.depth))
        assert layers == 3 or sum(level < adapter.depth / 2 for level in levels) >= 3
