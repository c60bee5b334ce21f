"""Detail features against images whose strokes and text are known."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptive_fusion.errors import MediaError
from adaptive_fusion.features.detail import DETAIL_FEATURES, detail_features

LENGTHS = ("text_height_low", "text_height", "stroke_low", "stroke")


def measured(image):
    return dict(zip(DETAIL_FEATURES, detail_features(image), strict=True))


def page(scale=0.6, thickness=1, width=900, height=700):
    """Black text on white, as OpenCV draws it."""
    image = np.full((height, width, 3), 255, np.uint8)
    for y in range(int(40 * scale), height, int(44 * scale)):
        cv2.putText(
            image, "the quick brown fox 1234 jumps over a lazy dog " * 4, (8, y), cv2.FONT_HERSHEY_SIMPLEX, scale,
            (0, 0, 0), thickness, cv2.LINE_AA,
        )  # fmt: skip
    return image


def stripes(stroke, gap, size=256):
    row = np.tile(np.r_[np.zeros(stroke), np.full(gap, 255)], size // (stroke + gap) + 1)[:size]
    return np.tile(row, (size, 1)).astype(np.uint8)


@pytest.mark.parametrize(("stroke", "gap"), [(1, 9), (3, 20), (8, 24), (30, 60)])
def test_width_of_the_narrower_of_strokes_and_gaps(stroke, gap):
    for image in (stripes(stroke, gap), 255 - stripes(stroke, gap)):
        assert measured(image)["stroke_low"] == pytest.approx(np.log2(stroke), abs=0.05)


def test_width_is_measured_in_fractions_of_pixels_where_edges_are_smooth():
    smooth = cv2.GaussianBlur(stripes(6, 18), (0, 0), 1.5)
    assert measured(smooth)["stroke_low"] == pytest.approx(np.log2(6), abs=0.2)
    assert measured(smooth)["flank"] > measured(stripes(6, 18))["flank"] + 1


def test_wiggles_below_the_contrast_are_no_strokes():
    noisy = stripes(8, 24).astype(int) * 0.8 + 25 + np.random.default_rng(0).integers(-10, 11, (256, 256))
    assert measured(noisy.astype(np.uint8))["stroke_low"] == pytest.approx(3, abs=0.3)


def test_height_of_text_is_that_of_a_small_x():
    for scale in (0.6, 1.2, 2.4):
        x = cv2.getTextSize("x", cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][1] * 0.66  # of a capital's height
        found = measured(page(scale, thickness=max(1, round(2 * scale)), width=1400, height=1000))
        assert found["text_share"] > 0.6
        assert found["text_height"] == pytest.approx(np.log2(x), abs=0.45)


@pytest.mark.parametrize("times", [2, 3])
def test_lengths_grow_with_the_image(times):
    image = page(1.0, thickness=2)
    large = cv2.resize(image, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)
    before, after = measured(image), measured(large)
    for name in ("text_height_low", "text_height", "stroke"):
        assert after[name] - before[name] == pytest.approx(np.log2(times), abs=0.25), name
    assert abs(after["text_share"] - before["text_share"]) < 0.2


@pytest.mark.parametrize("kind", ["NEAREST", "BILINEAR", "BICUBIC", "LANCZOS"])
@pytest.mark.parametrize("times", [2, 4])
def test_an_enlarged_image_says_how_much(kind, times):
    image = Image.fromarray(page(0.5))
    assert measured(image)["enlarged"] == 0
    large = image.resize((image.width * times, image.height * times), Image.Resampling[kind])
    assert measured(large)["enlarged"] == pytest.approx(np.log2(times), abs=0.35)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: 255 - image,
        lambda image: (image * np.array([0.7, 0.5, 0.9]) + [60, 20, 10]).astype(np.uint8),
        lambda image: cv2.imdecode(cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, 60))[1], cv2.IMREAD_COLOR),
    ],
    ids=["inverted", "coloured", "jpeg"],
)
def test_size_of_text_is_the_same_in_other_colours_and_with_noise(change):
    image = page(0.8, thickness=2)
    before, after = measured(image), measured(change(image))
    assert after["text_height_low"] == pytest.approx(before["text_height_low"], abs=0.25)
    assert after["text_share"] == pytest.approx(before["text_share"], abs=0.2)
    assert after["enlarged"] == 0


def test_small_print_is_found_on_a_page_with_little_else():
    image = np.full((800, 1280, 3), 255, np.uint8)
    cv2.putText(image, "LOGO", (380, 360), cv2.FONT_HERSHEY_SIMPLEX, 6.0, (200, 80, 40), 24, cv2.LINE_AA)
    for y in (30, 500, 780):
        cv2.putText(
            image, "privacy terms settings " * 3, (100, y), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (90, 90, 90), 1, cv2.LINE_AA
        )
    assert measured(image)["text_height_low"] < 3.5


def test_larger_text_never_measures_smaller():
    found = [measured(page(scale, thickness=1 + int(scale))) for scale in (0.5, 1.0, 2.0, 3.0)]
    for name in ("text_height_low", "stroke"):
        values = [each[name] for each in found]
        assert values == sorted(values), name


def test_texture_is_no_text():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (400, 500, 3), dtype=np.uint8)
    cloud = cv2.resize(rng.integers(0, 256, (40, 50), dtype=np.uint8), (500, 400), interpolation=cv2.INTER_CUBIC)
    assert measured(noise)["text_share"] < 0.1
    assert measured(cloud)["text_share"] < 0.4
    assert measured(page())["text_share"] > 0.6


@pytest.mark.parametrize("colour", [0, 127, 255])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (64, 64)])
def test_without_a_stroke_the_text_is_none_and_large(size, colour):
    found = measured(np.full(size, colour, np.uint8))
    assert found["text_share"] == found["stroke_count"] == 0
    assert {found[name] for name in LENGTHS} == {6.0}


def test_a_pil_image_and_its_array_give_the_same():
    image = page()
    image[300:, 400:] = np.random.default_rng(1).integers(0, 256, image[300:, 400:].shape, dtype=np.uint8)
    rgb = Image.fromarray(image)
    expected = detail_features(image)
    assert detail_features(rgb) == expected
    assert detail_features(rgb.convert("RGBA")) == expected
    assert detail_features(np.asfortranarray(image)) == expected
    assert detail_features(image / 255) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(), (3,), (4,)]), st.integers(0, 2**32 - 1))
def test_any_image_gives_finite_numbers_twice_and_is_left_alone(height, width, channels, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    copy = image.copy()
    values = detail_features(image)
    assert len(values) == len(DETAIL_FEATURES) and np.isfinite(values).all()
    assert detail_features(image) == values
    assert (image == copy).all()


@pytest.mark.parametrize("image", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.int64), "page.png"])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(MediaError):
        detail_features(image)
