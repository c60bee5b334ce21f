"""Counts of the long tests. `make test-long` runs them in full; `ADAPTIVE_FUSION_LONG_SHARE=0.1` a tenth of each."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM
from PIL import Image, ImageDraw


@pytest.fixture(scope="session")
def share_of() -> Callable[[int], int]:
    """A full count, scaled by the share that this run does, at least 1."""
    share = float(os.environ.get("ADAPTIVE_FUSION_LONG_SHARE", "1"))
    if not 0 < share <= 1:
        raise pytest.UsageError(f"ADAPTIVE_FUSION_LONG_SHARE is {share}; expected above 0, at most 1")
    return lambda count: max(1, round(count * share))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "scene.png"
    image = Image.new("RGB", (320, 200), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 20, 120, 90), fill="red")
    draw.text((150, 120), "hello", fill="black")
    image.save(path)
    return path
