"""What the model upstream makes of an image is known exactly: asked of transformers' own processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Glm4vImageProcessor, Qwen2VLImageProcessor, SiglipImageProcessor

from adaptive_fusion.errors import ConfigError, UnsupportedModelError
from adaptive_fusion.reference import model_path
from adaptive_fusion.serving.gateway.processors import ImageGrid, find


def seen(processor: Any, width: int, height: int) -> int:
    """Tokens that a processor really makes of an image."""
    out = processor(images=[np.zeros((height, width, 3), np.uint8)], return_tensors="np")
    return int(np.prod(out["image_grid_thw"][0])) // processor.merge_size**2


@settings(max_examples=12)
@given(st.integers(20, 700), st.integers(20, 700))
def test_tokens_are_those_that_the_processor_makes(width: int, height: int) -> None:
    grid = find("reference")
    assert grid.tokens(width, height) == seen(grid.processor, width, height)


def test_a_folder_is_read_whatever_names_its_limits_have(tmp_path: Path) -> None:
    old, new = {"min_pixels": 3136, "max_pixels": 200704}, {"shortest_edge": 3136, "longest_edge": 200704}
    for index, limits in enumerate((old, {"size": new})):
        folder = tmp_path / str(index)
        folder.mkdir()
        kind = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 14, "merge_size": 2}
        (folder / "preprocessor_config.json").write_text(json.dumps({**kind, "temporal_patch_size": 2, **limits}))
        grid = find(str(folder))
        assert grid == ImageGrid(14, 2, 2, 3136, 200704) and grid.tokens(1000, 1000) == 256


def test_limits_that_count_a_still_twice_are_halved(tmp_path: Path) -> None:
    Glm4vImageProcessor(size={"shortest_edge": 112 * 112 * 2, "longest_edge": 1 << 20}).save_pretrained(tmp_path)
    grid = find(str(tmp_path))
    assert grid.max_pixels == 1 << 19
    for width, height in ((900, 900), (300, 1200), (64, 64)):
        assert grid.tokens(width, height) == seen(grid.processor, width, height)
        budget = 256 * grid.side**2
        assert grid.tokens(*grid.size(width, height, budget)) == grid.tokens(width, height, budget) <= 256


def test_presets_are_the_processors_of_their_models() -> None:
    three = Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216})
    assert find("qwen3-vl").tokens(1000, 700) == seen(three, 1000, 700)
    assert find("Qwen2.5-VL").side == 28 and find(str(model_path())) == find("reference")


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"qwen2-vl, qwen2.5-vl, qwen3-vl, reference"):
        find(str(tmp_path))
    SiglipImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="SiglipImageProcessor"):
        find(str(tmp_path))
