"""Readers: what counts as kept, readings on disk, and the OCR engine where it is installed."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.evaluation.readers import (
    CachedReader,
    Line,
    RapidReader,
    characters,
    is_legible,
    text_kept,
    words,
    words_kept,
)

IMAGE = np.full((60, 320, 3), 255, np.uint8)


class Counting:
    """A reader that says the mean of the pixels and counts how often it is asked."""

    name = "mean"

    def __init__(self):
        self.asked = 0

    def read(self, image):
        self.asked += 1
        return (Line(f"mean {image.mean():.0f}", 0.5, ((0, 0), (4, 0), (4, 3), (0, 3))),)


def test_words_are_lower_cased_runs_of_letters_and_digits():
    assert words(["Total: RM 15.90", "total"]) == Counter({"total": 2, "rm": 1, "15": 1, "90": 1})
    assert words(["ﬁ_x", "Straße"]) == Counter({"fi": 1, "x": 1, "straße": 1})


def test_kept_counts_characters_with_multiplicity():
    before = words(["aa b", "c"])
    assert text_kept(before, words(["a b c"])) == 0.75
    assert words_kept(before, words(["a b c"])) == 0.5
    assert text_kept(words(["ab cd"]), words(["abcd"])) == 1.0
    assert words_kept(words(["ab cd"]), words(["abcd"])) == 0.0
    assert text_kept(words(["..."]), words([])) == words_kept(words([]), words(["x"])) == 1.0


@given(st.lists(st.text("abc1 .", max_size=12)), st.lists(st.text("abc1 .", max_size=12)))
def test_kept_is_a_share_that_more_text_never_lowers(first, second):
    before, after = words(first), words(second)
    assert 0 <= words_kept(before, after) <= text_kept(before, after) <= 1
    assert text_kept(before, before) == words_kept(before, before) == 1
    assert text_kept(before, words([*second, *first])) >= text_kept(before, after)
    assert characters(before).total() == sum(len(word) * count for word, count in before.items())


def test_an_answer_is_legible_if_all_its_words_are_there():
    found = words(["Total 15.90", "RM"])
    assert is_legible("RM 15.90", found)
    assert not is_legible("RM RM", found) and not is_legible("?", found)


def test_height_of_a_line_follows_its_sides():
    assert Line("x", 1.0, ((0, 0), (6, 8), (2, 11), (-4, 3))).height == 5
    assert Line("x", 1.0, ()).height == 0


def test_a_reading_is_kept_by_content_and_reader(tmp_path):
    inner = Counting()
    reader = CachedReader(inner, tmp_path / "readings")
    first = reader.read(IMAGE)
    assert reader.read(IMAGE.copy()) == first == CachedReader(Counting(), tmp_path / "readings").read(IMAGE)
    assert inner.asked == 1
    reader.read(IMAGE.reshape(320, 60, 3))
    inner.name = "another"
    reader.read(IMAGE)
    assert inner.asked == 3
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("content", ["", "[[1]]", "{", json.dumps([["x", "y", []]])])
def test_a_damaged_reading_is_named(tmp_path, content):
    reader = CachedReader(Counting(), tmp_path)
    reader.read(IMAGE)
    next(tmp_path.rglob("*.json")).write_text(content)
    with pytest.raises(ConfigError, match="damaged"):
        reader.read(IMAGE)


@pytest.mark.parametrize("image", [IMAGE[:, :, 0], IMAGE.astype(float), IMAGE[:0]])
def test_other_arrays_are_refused(tmp_path, image):
    with pytest.raises(MediaError, match="uint8"):
        CachedReader(Counting(), tmp_path).read(image)


def test_the_engine_reads_a_line_and_nothing_on_a_blank():
    pytest.importorskip("rapidocr", reason="needs the extra readers")
    pytest.importorskip("onnxruntime", reason="needs the extra readers")
    reader = RapidReader()
    written = IMAGE.copy()
    cv2.putText(written, "Total 1590", (20, 42), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (0, 0, 0), 2, cv2.LINE_AA)
    lines = reader.read(written)
    assert characters(words(line.text for line in lines)) == characters(words(["total 1590"]))
    assert all(15 < line.height < 60 for line in lines)
    assert reader.read(IMAGE) == ()
