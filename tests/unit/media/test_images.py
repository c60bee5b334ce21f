"""Odd but valid images are read right, whatever road they come by."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from media_files import (
    RAMP,
    RAMP_RGB,
    animation,
    clip,
    encode,
    half_transparent,
    near,
    pixels,
    scene,
)
from PIL import Image

from adaptive_fusion.media.load import load_media

WHITE_AND_RED = np.full((10, 20, 3), (200, 10, 10))
WHITE_AND_RED[:, :10] = 255
GREY = np.asarray(half_transparent("RGBA").convert("L"))[0, -1]
WHITE_AND_GREY = np.where(WHITE_AND_RED == 255, 255, int(GREY))

ODD: dict[str, tuple[Callable[[], Any], Any, int]] = {
    "1x1 PNG": (lambda: encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), [[[9, 8, 7]]], 0),
    "1x3 GIF": (lambda: encode(Image.new("L", (1, 3), 77), "GIF"), np.full((3, 1, 3), 77), 0),
    "150:1 PNG": (lambda: encode(scene(600, 4), "PNG"), scene(600, 4), 0),
    "200:1 BMP": (lambda: encode(scene(3, 600), "BMP"), scene(3, 600), 0),
    "1-bit TIFF": (lambda: encode(scene().convert("1"), "TIFF"), scene().convert("1").convert("RGB"), 0),
    "grey JPEG": (
        lambda: encode(scene().convert("L"), "JPEG", quality=98),
        scene().convert("L").convert("RGB"),
        6,
    ),
    "CMYK JPEG": (lambda: encode(scene().convert("CMYK"), "JPEG", quality=98), scene(), 12),
    "CMYK TIFF": (lambda: encode(scene().convert("CMYK"), "TIFF"), scene(), 0),
    "LZW TIFF": (lambda: encode(scene(), "TIFF", compression="tiff_lzw"), scene(), 0),
    "16-bit PNG": (lambda: encode(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), RAMP_RGB, 1),
    "16-bit TIFF": (lambda: encode(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"), RAMP_RGB, 1),
    "16-bit big-endian TIFF": (lambda: encode(Image.fromarray(RAMP.astype(">u2")), "TIFF"), RAMP_RGB, 1),
    "32-bit TIFF, 16-bit data": (lambda: encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), RAMP_RGB, 1),
    "32-bit TIFF, signed": (
        lambda: encode(Image.fromarray((RAMP * 9 - 7e5).astype(np.int32)), "TIFF"),
        RAMP_RGB,
        1,
    ),
    "float TIFF in [0, 1]": (
        lambda: encode(Image.fromarray((RAMP / 65535).astype("f4")), "TIFF"),
        RAMP_RGB,
        1,
    ),
    "float TIFF, huge": (lambda: encode(Image.fromarray((RAMP * 1e30).astype("f4")), "TIFF"), RAMP_RGB, 1),
    "float TIFF with NaN": (
        lambda: encode(Image.fromarray(np.array([[np.nan, 1.0, np.inf]], "f4")), "TIFF"),
        [[[0] * 3, [255] * 3, [0] * 3]],
        0,
    ),
    "RGBA WebP": (lambda: encode(half_transparent("RGBA"), "WEBP", lossless=True), WHITE_AND_RED, 0),
    "LA PNG": (lambda: encode(half_transparent("LA"), "PNG"), WHITE_AND_GREY, 0),
    "palette with transparency PNG": (lambda: encode(half_transparent("P"), "PNG"), WHITE_AND_RED, 0),
    "palette with transparency GIF": (lambda: encode(half_transparent("P"), "GIF"), WHITE_AND_RED, 0),
    "colour-keyed RGB PNG": (
        lambda: encode(Image.fromarray(WHITE_AND_RED.astype(np.uint8)), "PNG", transparency=(200, 10, 10)),
        np.full((10, 20, 3), 255),
        0,
    ),
    "PIL LAB": (lambda: Image.new("LAB", (4, 4), (255, 128, 128)), np.full((4, 4, 3), 255), 2),
    "PIL premultiplied": (lambda: half_transparent("RGBA").convert("RGBa"), WHITE_AND_RED, 0),
    "multi-page TIFF": (
        lambda: encode(scene(), "TIFF", save_all=True, append_images=[scene().rotate(180)]),
        scene(),
        0,
    ),
    "one-frame GIF": (lambda: animation("GIF", [100]), np.full((10, 20, 3), (0, 0, 255)), 0),
    "one-frame MP4": (lambda: clip(frames=1)[:], None, 0),
    "array (H, W)": (lambda: np.full((2, 3), 5, np.uint8), np.full((2, 3, 3), 5), 0),
    "array (H, W, 4)": (lambda: np.asarray(half_transparent("RGBA")), WHITE_AND_RED, 0),
    "array uint16": (lambda: RAMP.astype(np.uint16), RAMP_RGB, 1),
    "array big-endian uint16": (lambda: RAMP.astype(">u2"), RAMP_RGB, 1),
    "array float": (lambda: RAMP / 65535, RAMP_RGB, 1),
    "array bool": (lambda: np.eye(4, dtype=bool), np.repeat(np.eye(4)[:, :, None] * 255, 3, axis=2), 0),
    "array not contiguous": (lambda: np.asarray(scene())[::-1, ::2], np.asarray(scene())[::-1, ::2], 0),
    "list of one frame": (lambda: [scene()], scene(), 0),
    "PNG with JPEG's name": (lambda: encode(scene(), "PNG"), scene(), 0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_valid_input_is_read_right(name: str, tmp_path: Path) -> None:
    make, expected, tolerance = ODD[name]
    source = make()
    if isinstance(source, bytes):
        path = tmp_path / "mislabelled.jpg"
        path.write_bytes(source)
        assert (pixels(load_media(path)) == pixels(load_media(source))).all()
    loaded = load_media(source)
    assert expected is None or near(loaded, expected, tolerance)
    assert not loaded.info  # nothing a later step could apply a second time


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(form: str, orientation: int) -> None:
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }.get(orientation)  # fmt: skip
    upright = scene()
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"JPEG": {"quality": 98}, "WEBP": {"lossless": True}}.get(form, {})
    data = encode(stored, form, exif=exif, **options)
    loaded = load_media(data)
    assert near(loaded, upright, 16 if form == "JPEG" else 0)
    assert near(load_media(loaded), loaded)
    lazy = Image.open(io.BytesIO(data))
    assert near(load_media(lazy), loaded) and lazy.size == Image.open(io.BytesIO(data)).size


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
@settings(max_examples=60, deadline=None)
def test_rgb_arrays_survive_every_road_unchanged(array: np.ndarray) -> None:
    before = array.copy()
    for source in (array, Image.fromarray(array), encode(Image.fromarray(array), "PNG"), array / 255):
        assert near(load_media(source), before)
    assert (array == before).all()


@given(hnp.arrays(st.sampled_from([np.int32, np.float32]), st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=100, deadline=None)
def test_wide_samples_keep_their_order(array: np.ndarray) -> None:
    shades = pixels(load_media(Image.fromarray(array)))[:, :, 0].ravel()
    values = np.where(np.isfinite(array), array, 0).astype(float).ravel()
    assert (np.diff(shades[np.argsort(values, kind="stable")]) >= 0).all()
    if values.min() < 0 and values.max() > values.min():
        assert shades.min() == 0 and shades.max() == 255
