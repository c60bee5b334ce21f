"""A picture is brought to its budget in its own form, upright, never larger, and to what the engine leaves alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, opened, profile, scene
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.serving.gateway.processors import PRESETS, ImageGrid, find
from adaptive_fusion.serving.gateway.reencode import image, target
from adaptive_fusion.serving.gateway.stills import left_alone

GRID = ImageGrid(16, 2, 2, 4096, 1 << 20)


@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 6000), st.integers(1, 6000), st.integers(1, 1 << 23))
def test_what_is_sent_is_smaller_within_budget_and_left_alone_upstream(
    name: str, width: int, height: int, budget: int
) -> None:
    grid = find(name)
    if max(width, height) > 200 * min(width, height):
        return
    size = target(width, height, budget, grid)
    planned = grid.size(width, height, budget)
    if size is None:
        sent = min(planned[0], width), min(planned[1], height)
        strip = min(sent) < grid.side or max(sent) > 200 * min(sent)  # comes out otherwise upstream, or is refused
        assert strip or grid.tokens(*sent) == grid.tokens(width, height)
        return
    assert size[0] <= width and size[1] <= height and max(size) <= 200 * min(size)
    assert grid.tokens(*size) < grid.tokens(width, height)
    assert grid.tokens(*size) <= grid.tokens(width, height, budget)
    if size == planned:  # nothing is rounded up to more than is there
        assert grid.size(*size) == size, "the engine would resize it again"
        assert grid.tokens(*size) == grid.tokens(width, height, budget)
        floor = max(budget, grid.min_pixels, grid.side**2)
        # The least is reached by rounding up, one token at most on each side.
        assert size[0] * size[1] <= floor or (size[0] - grid.side) * (size[1] - grid.side) < floor


@pytest.mark.parametrize("quality, sampling, mode", [(61, 0, "RGB"), (93, 1, "RGB"), (75, 2, "RGB"), (80, 0, "L")])
def test_jpeg_keeps_tables_sampling_mode_and_profile(quality: int, sampling: int, mode: str) -> None:
    data = encoded(scene(640, 480, mode), "JPEG", quality=quality, subsampling=sampling, icc_profile=profile())
    small, was = opened(image(data, 64 * 1024, GRID) or b""), opened(data)
    assert small.format == "JPEG" and small.mode == mode
    assert small.quantization == was.quantization and small.layer == was.layer
    assert small.info["icc_profile"] == was.info["icc_profile"]
    assert small.size == GRID.size(640, 480, 64 * 1024)


FORMS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("PNG", "RGB", "RGB", {}), ("PNG", "L", "L", {}), ("PNG", "P", "RGB", {}), ("PNG", "1", "L", {}),
    ("PNG", "RGBA", "RGBA", {}), ("PNG", "LA", "LA", {}), ("PNG", "I;16", "I;16", {}),
    ("PNG", "P", "RGBA", {"transparency": 0}), ("PNG", "RGB", "RGBA", {"transparency": (0, 0, 255)}),
    ("WEBP", "RGB", "RGB", {"lossless": True}), ("WEBP", "RGBA", "RGBA", {"quality": 80}), ("BMP", "RGB", "RGB", {}),
    ("JPEG", "CMYK", "CMYK", {}),
]  # fmt: skip


@pytest.mark.parametrize("form, mode, then, options", FORMS)
def test_every_form_stays_what_it_is_and_shows_the_same(
    form: str, mode: str, then: str, options: dict[str, Any]
) -> None:
    whole = scene(320, 256, mode)
    data = encoded(whole, form, **options)
    first = image(data, 16 * 1024, GRID)
    assert first is not None and first == image(data, 16 * 1024, GRID), "the same bytes come out"
    small = opened(first)
    assert (small.format, small.mode, small.size) == (form, then, GRID.size(320, 256, 16 * 1024))
    assert ("VP8L" in str(first[:64])) == ("VP8L" in str(data[:64]))
    # Dots of black and white are told apart by none of the ways to average them.
    blurred = 4 if mode == "1" else 1
    small_as = tuple(side // blurred for side in small.size)
    before = opened(data).convert("RGBA").resize(small_as, Image.Resampling.BOX)
    if mode == "I;16":
        assert abs(np.asarray(small).astype(int) - np.asarray(opened(data).resize(small.size)).astype(int)).mean() < 900
        return
    after = small.convert("RGBA").resize(small_as, Image.Resampling.BOX)
    shown = [np.asarray(each).astype(float) for each in (after, before)]
    seen = [each[..., :3] * each[..., 3:] / 255 for each in shown]
    assert abs(seen[0] - seen[1]).mean() < 4 and abs(shown[0][..., 3] - shown[1][..., 3]).mean() < 3


def test_a_profile_of_png_and_webp_is_kept() -> None:
    for form in ("PNG", "WEBP"):
        data = encoded(scene(320, 256), form, icc_profile=profile())
        assert opened(image(data, 16 * 1024, GRID) or b"").info["icc_profile"] == profile()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_comes_out_upright_without_the_tag(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(512, 256), form, exif=exif)
    small = opened(image(data, 32 * 1024, GRID) or b"")
    upright = small.size if orientation < 5 else small.size[::-1]
    assert small.getexif().get(0x0112, 1) == 1 and upright == GRID.size(512, 256, 32 * 1024)
    corners = {(0, 0): (1, 5), (1, 0): (2, 6), (1, 1): (3, 7), (0, 1): (4, 8)}
    blue = np.asarray(small.convert("RGB"))[..., 2].astype(float)
    h, w = blue.shape
    found = max(corners, key=lambda c: blue[c[1] * (h - h // 8) :, c[0] * (w - w // 8) :][: h // 8, : w // 8].mean())
    assert orientation in corners[found]


def test_what_moves_and_what_is_not_written_again_is_left_alone() -> None:
    frames = [scene(320, 256), scene(320, 256).rotate(180)]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
        assert image(data, 4096, GRID) is None and left_alone(data) == "it moves"
    tiff = encoded(frames[0], "TIFF")
    assert image(tiff, 4096, GRID) is None and "TIFF" in (left_alone(tiff) or "")
    plain = encoded(frames[0], "PNG")
    assert image(plain, 1 << 20, GRID) is None and left_alone(plain) is None


def test_bombs_are_refused_by_their_header_and_broken_files_in_words() -> None:
    bomb = bytearray(encoded(scene(64, 64), "PNG"))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    whole = encoded(scene(640, 480), "JPEG")
    for data in (bytes(bomb), whole[: len(whole) // 2], b"no picture", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(MediaError):
            image(data, 16 * 1024, GRID)
