"""Complexity: what must hold of the features for any pixels, of clips, and of the score against people's."""

import importlib.util
import json
import os
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from adaptive_fusion.errors import MediaError
from adaptive_fusion.features.complexity import (
    FEATURE_NAMES,
    MOTION_FEATURES,
    VERSION,
    Complexity,
    human_score,
    measure_complexity,
)
from adaptive_fusion.features.image import _nearest, _regions, edge_density_and_entropy, take_sample

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("ADAPTIVE_FUSION_DATA", ""))
Array = np.ndarray[Any, np.dtype[Any]]

sides = st.integers(1, 40)
shapes = st.tuples(sides, sides).flatmap(lambda s: st.sampled_from([s, (*s, 3), (*s, 4)]))
dtypes = st.sampled_from([np.bool_, np.uint8, np.uint16, np.float32])


def images(dtype: Any) -> st.SearchStrategy[Array]:
    elements = st.floats(0, 1, width=32) if dtype is np.float32 else None
    return hnp.arrays(dtype, shapes, elements=elements)


def screen(widgets: int, size: tuple[int, int] = (800, 600), seed: int = 0) -> Image.Image:
    """A white screen with that many labelled boxes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for number in range(widgets):
        left, top = int(rng.integers(size[0] - 60)), int(rng.integers(size[1] - 40))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        draw.rectangle((left, top, left + 20 + number % 40, top + 12 + number % 25), colour, "black")
        draw.text((left + 2, top), f"item {number}", "black")
    return image


def moving_box(steps: list[int]) -> list[Image.Image]:
    frames = []
    for left in steps:
        frame = Image.new("RGB", (320, 240), "white")
        ImageDraw.Draw(frame).rectangle((left, 80, left + 60, 140), "navy")
        frames.append(frame)
    return frames


@given(dtypes.flatmap(images))
@settings(max_examples=50, deadline=None)
def test_any_pixels_give_finite_features_twice_alike_and_stay_unchanged(array: Array) -> None:
    before = array.copy()
    first, second = measure_complexity(array), measure_complexity(array)
    assert np.array_equal(array, before)
    assert first == second
    assert tuple(first.features) == FEATURE_NAMES
    assert np.isfinite(first.vector()).all() and first.vector().shape == (len(FEATURE_NAMES),)
    assert 0.0 <= first.score <= 1.0
    assert first.kind == "image" and first.version == VERSION
    assert all(first.features[name] == 0.0 for name in MOTION_FEATURES)
    assert all(type(value) is float for value in first.features.values())


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["L", "RGB", "RGBA"]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_pil_image_and_array_of_the_same_pixels_agree_exactly(width: int, height: int, mode: str, seed: int) -> None:
    width, height = max(width, -(-height // 200)), max(height, -(-width // 200))
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = measure_complexity(Image.fromarray(array))
    assert measure_complexity(array) == image
    assert measure_complexity(np.asfortranarray(array)) == image
    assert measure_complexity(array.astype(np.uint16) * 257) == image


@given(st.integers(1, 5000), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_nearest_rows_are_those_pillow_takes(size: int, count: int) -> None:
    pillow = np.asarray(Image.fromarray(np.arange(size, dtype=np.int32)[None]).resize((count, 1), 0))[0]
    assert np.array_equal(_nearest(size, count), pillow)


@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(2, 12), st.integers(2, 12), st.just(3)),
        elements=st.sampled_from([0, 255]),
    )
)
@settings(max_examples=40, deadline=None)
def test_regions_counts_connected_areas_of_equal_colour(image: Array) -> None:
    unseen = {(y, x) for y in range(image.shape[0]) for x in range(image.shape[1])}
    count = 0
    while unseen:
        count += 1
        stack = [unseen.pop()]
        while stack:
            y, x = stack.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in unseen and (image[near] == image[y, x]).all():
                    unseen.remove(near)
                    stack.append(near)
    assert _regions(image) == count


def test_more_on_the_screen_scores_higher_at_any_size_and_the_other_way_round() -> None:
    scores = [measure_complexity(screen(widgets)).score for widgets in (0, 3, 30, 300)]
    assert scores == sorted(scores) and scores[0] < 0.05 and scores[-1] - scores[1] > 0.3
    dense = screen(300)
    assert measure_complexity(dense.resize((3200, 2400))).score == pytest.approx(scores[-1], abs=0.1)
    turned = measure_complexity(dense.transpose(Image.Transpose.TRANSPOSE))
    assert turned.score == pytest.approx(scores[-1], abs=0.1)


def test_known_values() -> None:
    halves = np.zeros((512, 512, 3), np.uint8)
    halves[:, 256:] = 255
    features = measure_complexity(halves).features
    assert features["grey_entropy"] == pytest.approx(1.0)
    assert features["background_share"] == pytest.approx(0.5)
    assert features["colours"] == pytest.approx(np.log(3)) and features["regions"] == pytest.approx(np.log(3))
    assert features["contrast_1px"] == pytest.approx(1 / 511)
    assert features["strokes"] == 0.0
    assert features["log_pixels"] == pytest.approx(np.log(512 * 512)) and features["log_aspect"] == 0.0
    sample = take_sample(halves, with_scan=False)
    assert edge_density_and_entropy(sample.grey) == (features["edge_density"], features["grey_entropy"])


def test_small_print_shows_at_native_resolution_only() -> None:
    """One-pixel lines every 12 pixels are strokes; eight times as thick they are none."""
    thin = np.full((960, 960), 255, np.uint8)
    thin[:, ::12] = 0
    thick = np.full((960, 960), 255, np.uint8)
    thick[:, (np.arange(960) // 8) % 12 == 0] = 0
    features = measure_complexity(thin).features
    assert features["strokes"] == pytest.approx(1 / 12, abs=0.01)
    assert features["fine_edges"] == pytest.approx(2 / 12, abs=0.01)
    assert measure_complexity(thick).features["strokes"] == 0.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"])
def test_every_mode_is_measured_as_its_rgb(mode: str) -> None:
    image = screen(60)
    between = {"RGBa": "RGBA", "I": "L", "F": "L"}.get(mode, "RGB")
    image = image.convert(between).convert(mode)
    pixels = image.tobytes()
    found = measure_complexity(image)
    assert image.mode == mode and image.tobytes() == pixels
    assert found == measure_complexity(image.convert(between).convert("RGB"))


def test_paths_bytes_transparency_and_orientation(tmp_path: Path) -> None:
    image = screen(60, (300, 200))
    image.save(tmp_path / "a.png")
    direct = measure_complexity(image)
    assert measure_complexity(tmp_path / "a.png") == measure_complexity(str(tmp_path / "a.png")) == direct
    assert measure_complexity((tmp_path / "a.png").read_bytes()) == direct
    clear = Image.new("RGBA", (300, 200), (255, 0, 0, 0))
    clear.paste(image.crop((0, 0, 150, 200)), (0, 0))
    flat = Image.new("RGB", (300, 200), "white")
    flat.paste(clear, mask=clear.getchannel("A"))
    assert measure_complexity(clear) == measure_complexity(flat)
    stream = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(stream, "PNG", exif=exif)
    assert measure_complexity(Image.open(stream)) == measure_complexity(stream.getvalue())
    assert measure_complexity(Image.open(stream)) == measure_complexity(image.transpose(Image.Transpose.ROTATE_270))


def test_result_does_not_depend_on_where_in_memory_the_buffers_lie() -> None:
    """Some vectorised kernels round differently at other alignments, which would break replays and caches."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    found, held = measure_complexity(array), []
    for _ in range(50):
        held.append(np.empty(int(rng.integers(1, 5000)), np.uint8))
        assert measure_complexity(array) == found


def test_extreme_shapes_and_constant_colour_are_simple() -> None:
    for shape in ((1, 1, 3), (1, 150), (1500, 10, 3), (3000, 20, 4)):
        assert measure_complexity(np.full(shape, 255, np.uint8)).score < 0.01


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((5, 5), np.nan), "floats must be in"),
        (np.full((5, 5), 255.0), "floats must be in"),
        (np.zeros((5, 5), np.int64), "int64"),
        (np.zeros((0, 5, 3), np.uint8), "5x0"),
        (np.zeros((5, 5, 7), np.uint8), r"\(5, 5, 7\)"),
        (np.zeros(5, np.uint8), r"\(5,\)"),
        (np.zeros((2, 500, 3), np.uint8), "250.0:1"),
        ([], "no frames"),
        (["a", "b"], "str"),
        (None, "NoneType"),
        (b"", "empty"),
        ("nowhere.png", "does not exist"),
    ],
)
def test_what_is_no_image_is_refused_by_name(source: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        measure_complexity(source)


def test_a_file_that_breaks_while_decoding_is_refused() -> None:
    stream = BytesIO()
    screen(60).save(stream, "PNG")
    with pytest.raises(MediaError, match="PIL image"):
        measure_complexity(Image.open(BytesIO(stream.getvalue()[:3000])))


def test_motion_grows_with_change_and_is_zero_without() -> None:
    still, slow, fast = (
        measure_complexity(moving_box(steps))
        for steps in ([100] * 8, list(range(100, 140, 5)), list(range(0, 240, 30)))
    )
    assert still.kind == slow.kind == "video"
    assert all(still.features[name] == 0.0 for name in MOTION_FEATURES)
    for name in ("motion_mean", "motion_area", "motion_peak"):
        assert 0.0 < slow.features[name] < fast.features[name] <= 1.0
    assert fast.features["scene_cuts"] == 0.0
    assert still.features["edge_density"] == measure_complexity(moving_box([100])[0]).features["edge_density"]


def test_scene_cuts_are_counted_and_every_form_of_a_clip_agrees() -> None:
    dark = np.full((120, 160, 3), 20, np.uint8)
    clip = np.stack([dark, dark, 255 - dark, 255 - dark, dark, dark])
    found = measure_complexity(clip)
    assert found.features["scene_cuts"] == 2.0
    assert found == measure_complexity(list(clip)) == measure_complexity([Image.fromarray(f) for f in clip])
    assert measure_complexity(clip[:1]) == measure_complexity(clip[0])


def test_long_clips_read_at_most_eight_frames() -> None:
    class Frames(list[Array]):
        read: set[int]

        def __getitem__(self, index: Any) -> Any:
            self.read.add(index)
            return super().__getitem__(index)

    frames = Frames([np.zeros((4, 4, 3), np.uint8)] * 1000)
    frames.read = set()
    measure_complexity(frames)
    assert len(frames.read) == 8 and {0, 999} <= frames.read


def test_opencv_keeps_its_threads_and_images_need_none() -> None:
    before = cv2.getNumThreads()
    measure_complexity(screen(10))
    assert cv2.getNumThreads() == before


def test_coefficients_fit_this_version_and_only_ever_raise_the_score() -> None:
    fitted = json.loads((files("adaptive_fusion") / "data" / "complexity-v1.json").read_text("utf-8"))
    assert fitted["feature_version"] == VERSION and len(fitted["data"]["sha256"]) == 64
    features = measure_complexity(screen(30)).features
    for name in fitted["features"]:
        assert human_score({**features, name: features[name] + 0.1}) > human_score(features)
    assert human_score(dict.fromkeys(FEATURE_NAMES, 1e9)) == 1.0
    assert human_score(dict.fromkeys(FEATURE_NAMES, -1e9)) == 0.0


def test_complexity_is_frozen() -> None:
    found = measure_complexity(screen(1))
    with pytest.raises(AttributeError):
        found.score = 1.0  # type: ignore[misc]
    assert (
        Complexity(found.score, found.features, found.version, found.kind, found.detail, found.detail_version) == found
    )


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("complexity_fit", ROOT / "training" / "complexity" / "fit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipe_finds_weights_across_categories_on_other_scales_and_none_for_noise() -> None:
    recipe, rng = load_recipe(), np.random.default_rng(0)
    categories = np.repeat(["a", "b", "c"], [40, 80, 160])
    truth = rng.normal(size=280)
    shift = np.repeat([0.0, 5.0, -3.0], [40, 80, 160])
    features = np.stack([truth + shift, -truth, rng.normal(size=280), np.ones(280)], axis=1)
    scores = np.exp(truth) * np.repeat([1.0, 10.0, 0.1], [40, 80, 160])
    _, scale, weight = recipe.fit_weights(features, categories, recipe.ranks(categories, scores))
    assert weight[0] > 0.1 and weight[1] == 0.0 and abs(weight[2]) < 0.05 and weight[3] == 0.0
    assert scale[3] == 1.0
    assert recipe.leave_one_out(features, categories, scores)["mean"] > 0.95


@pytest.mark.skipif(
    not (DATA / "complexity" / "scores.csv").is_file(),
    reason="needs the folder complexity/ with scores.csv under $ADAPTIVE_FUSION_DATA",
)
def test_score_agrees_with_people() -> None:
    """Every fifth image: the shipped coefficients rank each category as people do."""
    recipe = load_recipe()
    rows = recipe.read_scores(DATA / "complexity")[::5]
    found = np.array([measure_complexity(DATA / "complexity" / row["file"]).score for row in rows])
    human = np.array([float(row["score"]) for row in rows])
    categories = np.array([row["category"] for row in rows])
    agreement = [recipe.spearman(found[categories == c], human[categories == c]) for c in set(categories)]
    assert np.mean(agreement) > 0.65
    assert found.min() < 0.1 and found.max() > 0.9
