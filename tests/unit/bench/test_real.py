"""The benchmark on real images: rows over made-up tables, plans of drawn pages, and the page that shows them."""

import importlib.util
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from adaptive_fusion.bench.real import DESCRIBE, GENERAL, READ, judge, measure, worst
from adaptive_fusion.bench.real_cases import ANSWERS, OBJECTS, TEXT
from adaptive_fusion.bench.real_page import check_page, page
from adaptive_fusion.bench.real_plans import Planners, load_policies
from adaptive_fusion.bench.real_ranks import kind_by_name, rank_correlation
from adaptive_fusion.bench.real_report import notes, tables
from adaptive_fusion.bench.real_rows import (
    ENTROPY,
    NATIVE,
    ORACLE,
    SAME_KEPT,
    SAME_TOKENS,
    Case,
    Objects,
    Seen,
    all_rows,
    summary,
    threshold,
    versus,
)
from adaptive_fusion.cli import app
from adaptive_fusion.errors import ConfigError, MissingExtraError
from adaptive_fusion.evaluation.readers import Line, RapidReader
from adaptive_fusion.evaluation.shares import ENOUGH, SHARES, Curve, sized, within
from adaptive_fusion.evaluation.truth import read_sources
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.policy.policy import Policy

WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel")


def drawn(size: tuple[int, int], scale: float) -> np.ndarray:
    """Dark words on white, as large as `scale` says: (H, W, 3) uint8."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    for word, (x, y) in places(size, scale):
        cv2.putText(pixels, word, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, (20, 20, 20), 1, cv2.LINE_AA)
    return pixels


def places(size: tuple[int, int], scale: float):
    step = int(40 * scale) + 8
    return [(word, (10, step * (1 + i))) for i, word in enumerate(WORDS) if step * (1 + i) < size[1]]


class Matching:
    """A reader of pages by `drawn`: finds the words whose shape is still there, by correlation with it."""

    name = "matching"

    def __init__(self, *scales: float):
        self.scales = scales

    def read(self, image):
        size, lines = (image.shape[1], image.shape[0]), []
        for scale in self.scales:
            whole = drawn(size, scale)
            for word, (x, y) in places(size, scale):
                box = (
                    slice(max(0, y - int(24 * scale)), y + int(8 * scale)),
                    slice(x, x + int(18 * scale * len(word))),
                )
                if image[box].std() and np.corrcoef(image[box].ravel(), whole[box].ravel())[0, 1] > 0.97:
                    top, bottom, right = box[0].start, box[0].stop, min(size[0], box[1].stop)
                    corners = ((x, top), (right, top), (right, bottom), (x, bottom))
                    lines.append(Line(word, 1.0, corners))
        return tuple(lines)


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    return load_policies(GENERAL)


@pytest.fixture(scope="module")
def planners(policies) -> Planners:
    return Planners({**policies, "native": Policy.load("native")})


@pytest.fixture
def sources(tmp_path):
    """Two pages, one of fine and one of large letters, and two photographs with boxes."""
    pages, photos = tmp_path / "pages", tmp_path / "photos"
    pages.mkdir()
    photos.mkdir()
    rows = []
    for name, scale in (("fine", 0.5), ("large", 1.5)):
        Image.fromarray(drawn((640, 480), scale)).save(pages / f"{name}.png")
        rows.append({"file": f"{name}.png", "qa": [["What is the first word?", "alpha"], ["And zulu?", "zulu"]]})
    (pages / "truth.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = []
    for seed, name in enumerate(("one", "<b>two&")):
        noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(photos / f"{name}.png")
        boxes = [{"name": f"thing {side}", "box": [10, 10, 10 + side, 300]} for side in (8, 17, 40, 160)]
        rows.append({"file": f"{name}.png", "boxes": boxes, "captions": ["things"]})
    (photos / "truth.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [pages, photos]


def case(kept: dict[float, float], share: float, side: int = 1024, entropy: float = 1.0, weight: float = 1.0) -> Case:
    """A made-up case that policy `p` gives `share` of the pixels."""
    curve, file = Curve({1.0: 1.0, **kept}), (side, side)
    pixels = math.prod(sized(file, share))
    part = pixels / side**2
    seen = {"p": Seen(part, pixels, pixels // 1024, float(curve.at(part)))}
    return Case("made up", Path(f"{side}-{share}"), file, READ, curve, seen, {"p": 0.1}, entropy=entropy, weight=weight,
                read=lambda found: (1.0, None))  # fmt: skip


cases = st.lists(
    st.builds(
        case,
        st.dictionaries(st.sampled_from(SHARES[1:]), st.floats(0.2, 1), min_size=1),
        st.sampled_from(SHARES),
        st.sampled_from((512, 1024, 2048)),
        st.floats(0, 8),
        st.sampled_from((1.0, 3.0)),
    ),
    min_size=1,
    max_size=6,
)


def scored(of, seen):
    kept = np.array([s.kept for s in seen])
    return np.average(kept, weights=[c.weight for c in of]), np.quantile(kept, 0.05)


@settings(max_examples=20, deadline=None)
@given(cases)
def test_fixed_rows_are_the_smallest_that_keep_and_the_largest_that_spend_as_much(of):
    rows = all_rows(of, ["p"])
    own = next(row for row in rows if row.name == "p")
    tokens = sum(seen.tokens for seen in own.seen)
    fixed = [row for row in rows if row.beside]
    assert len(fixed) == 4
    for row in fixed:
        value = float(row.setting.replace(",", ""))
        if row.same == SAME_KEPT:
            assert all(a >= b - 1e-6 for a, b in zip(scored(of, row.seen), scored(of, own.seen), strict=True))
        else:
            assert row.same == SAME_TOKENS and (sum(seen.tokens for seen in row.seen) <= tokens or value <= 1024)
    by_name = {row.name: row for row in rows if not row.beside}
    for one, seen in zip(of, by_name[ORACLE].seen, strict=True):
        assert seen.kept >= ENOUGH
        assert not any(one.at_share(s).kept >= ENOUGH for s in SHARES if one.at_share(s).share < seen.share)
    assert all(seen.kept == 1 and seen.share == 1 for seen in by_name[NATIVE].seen)
    middle = np.median([one.entropy for one in of])
    assert [seen.share < 0.3 for seen in by_name[ENTROPY].seen] == [one.entropy < middle for one in of]


def test_a_row_a_little_smaller_than_the_matched_one_keeps_less():
    of = [case({0.5: 0.99, 0.25: 0.5, 0.0625: 0.1}, 0.5, 2048), case({0.25: 0.9, 0.125: 0.4}, 0.5, 2048)]
    rows = all_rows(of, ["p"])
    need = scored(of, next(row for row in rows if row.name == "p").seen)
    for row in (row for row in rows if row.same == SAME_KEPT):
        value = float(row.setting.replace(",", "")) * 0.9
        less = [one.at_share(value) if value < 1 else one.at(within(one.file, int(value))) for one in of]
        assert any(a < b for a, b in zip(scored(of, less), need, strict=True))


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_threshold_is_bracketed(low, where):
    under, over = threshold(lambda value: value >= where, low, 1.0)
    assert under <= max(where, low) and over >= where and over / under < 1.005


def test_a_policy_beside_itself_is_even():
    of = [case({0.5: 0.9, 0.25: 0.6}, 0.5, side) for side in (512, 1024, 2048)]
    rows = all_rows(of, ["p"])
    for found in versus(rows, of):
        if found["row"] == "fixed share":
            assert found["tokens_ratio"]["mean"] == pytest.approx(1, abs=0.02)
            assert found["kept_difference"]["mean"] == pytest.approx(0, abs=0.01)
    slipped = [replace(one, seen={"p": replace(one.seen["p"], kept=0.3)}) for one in of]
    again = versus(all_rows(slipped, ["p"]), slipped)
    assert again == versus(rows, of), "a slip of the reader at one size decides nothing"
    values = summary(next(row for row in rows if row.name == "p"), of)
    assert values["tokens"]["low"] <= values["tokens"]["mean"] <= values["tokens"]["high"]
    assert values["tokens"]["mean"] == pytest.approx(0.5, abs=0.03) and not json.dumps(values).count("NaN")


@given(st.lists(st.floats(16, 500), min_size=1), st.floats(0.01, 1))
def test_objects_are_kept_while_they_span_a_patch(sides, share):
    kept = Objects(sides)
    assert kept.at(share) == np.mean([side * math.sqrt(share) >= 16 for side in sides]) or share == 1
    assert (np.diff(kept.at(SHARES)) <= 0).all() and kept.at(1.0) == 1


def test_ranks():
    assert rank_correlation([(1, 10), (2, 20), (3, 90), (None, 4)]) == pytest.approx(1)
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    assert rank_correlation([(1, 3), (2, 2)]) is None and rank_correlation([(1, 3), (1, 2), (1, 0)]) is None
    assert [kind_by_name(n) for n in ("real/charts", "my_receipts", "webpages")] == ["charts", "documents", None]


def test_plans_are_the_policies_own_for_a_released_model(planners):
    plans = {}
    for scale in (0.5, 2.5):
        image = Image.fromarray(drawn((1280, 960), scale))
        complexity = measure_complexity(image)
        native = planners.plan("native", image.size, complexity, READ)
        assert native.seen == (1280, 960) and native.tokens == 1280 * 960 / 1024
        for policy in GENERAL:
            read, told = (planners.plan(policy, image.size, complexity, asked) for asked in (READ, DESCRIBE))
            assert read.pixels >= told.pixels and read.tokens == read.pixels // 1024
            loss = [planners.expected_loss(policy, image.size, complexity, READ, share) for share in (1, 0.25, 0.01)]
            assert loss[0] == 0 and loss == sorted(loss)
            plans[policy, scale] = read
    assert all(plans[policy, 0.5].pixels > plans[policy, 2.5].pixels for policy in GENERAL)


class Outside(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self):
        super().__init__()
        self.wanted, self.tags, self.pictures = [], set(), 0

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.pictures += value.startswith("data:image/jpeg;base64,")
                self.wanted += [] if value.startswith("data:image/jpeg;base64,") else [value]
            assert not name.startswith("on")


def test_from_images_to_rows_and_a_page_that_asks_for_nothing(sources, policies):
    found, failed = read_sources(sources)
    reader = Matching(0.5, 1.5)
    measured = measure(found, policies, reader, images=5)
    assert not failed and not measured.failed and not measured.nothing
    assert {what: len(of) for what, of in measured.found.items()} == {TEXT: 2, ANSWERS: 2, OBJECTS: 2}
    assert all(one.legible == 1 for one in measured.found[TEXT])  # nothing says zulu
    assert all(one.weight == 3 for one in measured.found[OBJECTS])  # a side of 8 spans no patch natively
    fine, large = sorted(measured.found[TEXT], key=lambda one: one.path.name)
    assert fine.oracle().share > large.oracle().share
    figures = {exact: judge(measured, GENERAL, exact=exact, reader=reader) for exact in (False, True)}
    for record in figures[True]["kinds"][TEXT]["rows"]:
        assert record["measured"] and 0 <= record["kept"]["mean"] <= 1
    assert not all(record["measured"] for record in figures[False]["kinds"][TEXT]["rows"])
    about = {"policies": list(GENERAL), "exact": False, "squeezer": "absent", "nothing": {}, "sources": {}}
    result = {**about, **figures[False], "failed": [{"input": "<script>x", "error": "broken & <refused>"}]}
    bad = worst(measured, GENERAL[0], 9)
    assert [one.seen.kept for one in bad] == sorted(one.seen.kept for one in bad)
    json.dumps([one.to_dict() for one in bad], allow_nan=False)
    text, parser = page(result, bad), Outside()
    parser.feed(text)
    assert not parser.wanted and "script" not in parser.tags and "link" not in parser.tags
    assert parser.pictures >= 2 * len(bad) and "svg" in parser.tags and "b>two&" not in text
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert len(list(tables(result))) == 7 and any("not installed" in line for line in notes(result))


def test_pages_that_could_not_be_written_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ending in \.html"):
        check_page(tmp_path / "page.txt")
    with pytest.raises(ConfigError, match="does not exist"):
        check_page(tmp_path / "nowhere" / "page.html")


def test_nothing_that_can_be_judged_is_refused(tmp_path, policies):
    folder = tmp_path / "blank"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "x.png")
    with pytest.raises(ConfigError, match="none of 1 images could be measured: no text"):
        measure(read_sources([folder])[0], policies, Matching(0.5), images=3)


def test_text_without_a_reader_says_what_to_install_and_photographs_need_none(sources):
    if importlib.util.find_spec("rapidocr") is None:
        result = CliRunner().invoke(app, ["bench", "real", str(sources[0])])
        assert result.exit_code == 2 and "pip install adaptive-fusion[readers]" in result.stderr
    result = CliRunner().invoke(app, ["bench", "real", str(sources[1]), "--policy", "balanced", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["reader"] is None and list(found["kinds"]) == [OBJECTS]
    assert found["sources"]["photos"] == {"images": 2, "prompt": DESCRIBE}


def test_a_real_reader_loses_text_with_the_pixels(tmp_path):
    try:
        reader = RapidReader()
    except MissingExtraError:
        pytest.skip("needs rapidocr and onnxruntime: pip install adaptive-fusion[readers]")
    page = np.full((160, 448, 3), 255, np.uint8)
    for row, line in enumerate(("total amount 1250", "paid in cash 3400")):
        cv2.putText(page, line, (20, 60 + 50 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (20, 20, 20), 1, cv2.LINE_AA)
    Image.fromarray(page).save(tmp_path / "page.png")
    measured = measure(read_sources([tmp_path])[0], load_policies(["balanced"]), reader, images=1)
    (found,) = measured.found[TEXT]
    assert found.seen["balanced"].kept > 0.9 > found.at_share(0.0625).kept


def test_folders_without_an_image_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["bench", "real", str(tmp_path / "nowhere"), str(tmp_path / "empty")])
    assert result.exit_code == 2 and "nowhere: there is no such folder" in result.stderr and "empty: " in result.stderr
