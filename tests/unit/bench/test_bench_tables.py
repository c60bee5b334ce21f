"""Questions, scores and tables of the benchmarks, without a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptive_fusion.bench import report
from adaptive_fusion.bench.answers import CHANCE, KNOB_ROWS, NATIVE, ROWS, SHUFFLED, Answer
from adaptive_fusion.bench.comparisons import Limit, compare, shortfalls
from adaptive_fusion.bench.cost import RowRun, round_order, summarise_costs
from adaptive_fusion.bench.cost import shortfalls as cost_shortfalls
from adaptive_fusion.bench.quality import pareto_front, summarise
from adaptive_fusion.bench.scores import MIXED, score_all, slices
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.folders import folder_questions
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import METRIC_OF_SLICE, hard_negatives, reference_questions
from adaptive_fusion.point import FUSIONS, OperatingPoint
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reference.screens import KINDS, make_scene

QUESTIONS = reference_questions(4, (64, 96))
TIME = Measurement(1.0, 40.0, 9.0, 50.0, 50.0, 100.0, 64, 80, 10, 256, 0.5)


def answers(texts: list[str], measurement: Measurement | None = None, right: bool = True) -> list[Answer]:
    likely = (-1.0, -2.0, -2.0, -2.0) if right else (-3.0, -2.0, -2.0, -2.0)
    return [Answer(text, likely, 1.0, measurement) for text in texts]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_a_hard_negative_is_one_change_away_and_wrong(kind: Any, seed: int) -> None:
    scene = make_scene(kind, seed, "eval", (64, 128))
    truth = scene.answers[scene.task]
    wrong = hard_negatives(truth, kind)
    assert wrong == hard_negatives(truth, kind) and len(set(wrong)) == len(wrong) == 3
    metric = METRIC_OF_SLICE["clips" if kind == "clip" else kind]
    question = Question(None, "?", (truth,), metric)
    for caption in wrong:
        score = question.score(caption)
        assert score is not None and score < 1.0
        if kind == "reading":
            assert sum(a != b for a, b in zip(caption, truth, strict=True)) == 1
        else:
            assert sum(a != b for a, b in zip(caption.split(), truth.split(), strict=True)) == 1


def test_the_mixed_set_is_half_simple_and_the_right_answer_scores_one() -> None:
    parts = slices(QUESTIONS)
    assert {name: len(chosen) for name, chosen in parts.items()} == {
        "simple": 12, "dense": 4, "reading": 4, "clips": 4, MIXED: 24,
    }  # fmt: skip
    assert all(question.score(question.references[0]) == 1.0 for question in QUESTIONS)
    with pytest.raises(ConfigError, match="scenes is 1"):
        reference_questions(1)


def test_tables_and_comparisons_of_known_answers() -> None:
    truths = [question.references[0] for question in QUESTIONS]
    parts = slices(QUESTIONS)
    half = [text if question.slice != "dense" else "" for text, question in zip(truths, QUESTIONS, strict=True)]
    faster = replace(TIME, ttft_ms=25.0, visual_tokens=16)
    rows = {
        "native@1": answers(truths, TIME),
        "native@0.25": answers(half, faster, right=False),
        "adaptive": answers(truths, faster),
        SHUFFLED: [Answer(truths[-1])] * len(QUESTIONS),
        CHANCE: [Answer(truths[-1])] * len(QUESTIONS),
    }
    scores = score_all(QUESTIONS, rows)
    tables = summarise(scores, parts, draws=50)
    dense = {record["row"]: record for record in tables["dense"]}
    assert dense["native@1"]["quality"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert dense["native@1"]["bleu4"]["mean"] == pytest.approx(100)
    assert dense["native@0.25"]["kept"]["quality"]["mean"] == 0.0
    assert dense["native@0.25"]["matching"]["mean"] == 0.0
    assert dense[SHUFFLED]["matching"]["mean"] == 0.25 and "ttft_ms" not in dense[SHUFFLED]
    mixed = {record["row"]: record for record in tables[MIXED]}
    lost = len(parts["dense"]) / len(QUESTIONS)
    assert mixed["native@0.25"]["quality"]["mean"] == pytest.approx(1 - lost)
    assert mixed["adaptive"]["ttft_ms"] == {"median": 25.0, "p95": 25.0, "mean": 25.0}
    assert dense["native@1"]["reading"] is None and mixed["native@1"]["reading"]["mean"] == 1.0
    comparisons = compare(scores, parts, "native@0.25", draws=50)
    found = {(*c["rows"], c["slice"], c["metric"]): c for c in comparisons}
    ttft = found["adaptive", "native@1", MIXED, "ttft_ms"]
    assert ttft["value"]["mean"] == 0.5 and ttft["limit"]["holds"] == "yes"
    assert found["adaptive", "native@1", MIXED, "visual_tokens"]["value"]["mean"] == 0.25
    assert found["native@0.25", "native@1", "dense", "quality"]["value"]["mean"] == -1.0
    # The cheap row's matching is 0, so there is no ratio to speak of; but adaptive matches as well as the best row.
    gain = found["adaptive", "native@0.25", MIXED, "matching"]
    assert gain["value"] is None and gain["limit"]["holds"] == "no"
    assert shortfalls(comparisons) == []
    assert pareto_front(tables[MIXED]) == ["adaptive"]


def test_what_fusion_wins_back_and_what_falls_short_of_it() -> None:
    truths = [question.references[0] for question in QUESTIONS]
    dense = [i for i, question in enumerate(QUESTIONS) if question.slice == "dense"]
    lost = ["" if i in dense else text for i, text in enumerate(truths)]
    back = [truths[i] if i == dense[0] else text for i, text in enumerate(lost)]
    rows = {"native@1": truths, "native@0.5": lost, "gated12r8@0.5": back, "weighted6r4@0.5": lost}
    scores = score_all(QUESTIONS, {row: answers(texts, TIME) for row, texts in rows.items()})
    comparisons = compare(scores, slices(QUESTIONS), draws=200)
    [won] = [c for c in comparisons if c["kind"] == "won back" and c["slice"] == "dense"]
    assert won["value"]["mean"] == 0.25 and won["limit"]["holds"] == "unsure"  # a quarter, of one scene in four
    # Where nothing is surely lost (the text is read as well at half the size) no share of it comes back.
    [none] = [c for c in comparisons if c["kind"] == "won back" and c["slice"] == "reading"]
    assert none["value"] is None
    missing = shortfalls(comparisons)
    assert any(line.startswith("gated12r8@0.5 - weighted6r4@0.5, dense quality: 0.250") for line in missing)
    assert any("(gated12r8@0.5 - native@0.5) / (native@1 - native@0.5), dense quality" in line for line in missing)


@pytest.mark.parametrize(
    ("limit", "value", "verdict"),
    [
        (Limit(0), (0.0, 0.0, 0.0), "yes"),
        (Limit(0), (-0.1, -0.2, 0.1), "unsure"),
        (Limit(0), (-0.1, -0.2, -0.05), "no"),
        (Limit(0, beyond=0), (0.1, 0.0, 0.2), "unsure"),
        (Limit(0, beyond=0), (0.1, 0.05, 0.2), "yes"),
        (Limit(0, beyond=0), (0.0, 0.0, 0.0), "no"),
        (Limit(1 / 3, beyond=0), (0.3, 0.1, 0.5), "unsure"),
        (Limit(0.6, at_least=False), (0.59, 0.5, 0.7), "yes"),
        (Limit(0.6, at_least=False), (0.65, 0.5, 0.7), "unsure"),
        (Limit(0.6, at_least=False), (0.65, 0.61, 0.7), "no"),
    ],
)
def test_a_limit_is_kept_by_the_mean_and_where_asked_by_the_interval(
    limit: Limit, value: tuple[float, float, float], verdict: str
) -> None:
    assert limit.verdict(dict(zip(("mean", "low", "high"), value, strict=True))) == verdict


def test_report_shows_every_row_and_the_plot_is_a_picture(tmp_path: Path) -> None:
    truths = [question.references[0] for question in QUESTIONS]
    rows = {"native@1": answers(truths, TIME), "native@0.5": answers(truths, replace(TIME, ttft_ms=30.0))}
    rows |= {SHUFFLED: answers(truths), CHANCE: answers(truths)}
    scores = score_all(QUESTIONS, rows)
    parts = slices(QUESTIONS)
    tables = summarise(scores, parts, draws=20)
    comparisons = compare(scores, parts, "native@0.5", draws=20)
    result = {
        "model": "m",
        "policy": "balanced",
        "budget": {},
        "weights": {},
        "cheap": "native@0.5",
        "slices": tables,
        "comparisons": comparisons,
        "shortfalls": shortfalls(comparisons),
        "pareto_slice": MIXED,
        "pareto": pareto_front(tables[MIXED]),
    }
    for shown in (report.quality_tables(result), [report.knob_table(result), *report.quality_notes(result)]):
        out = report.console()
        with out.capture() as capture:
            for table in shown:
                out.print(table)
        text = capture.get()
        assert all(row in text for row in rows) and all(name in text for name in tables)
    report.plot_quality(result, tmp_path / "front.png")
    with Image.open(tmp_path / "front.png") as image:
        assert image.format == "PNG" and len(np.unique(np.asarray(image))) > 10


def test_costs_are_ratios_to_the_native_runs_on_both_sides() -> None:
    def run(row: str, encode_ms: float, **more: Any) -> RowRun:
        return RowRun(row, replace(TIME, encode_ms=encode_ms, prefill_ms=0.0, **more))

    small = {"patches": 64, "visual_tokens": 16}
    runs = [
        run(NATIVE, 100.0), run("gated12r8@1", 110.0), run(NATIVE, 120.0), run("weighted6r4@0.5/12.5%", 60.0, **small),
        run(NATIVE, 80.0), run("gated12r8@1", 88.0), run("weighted6r4@0.5/12.5%", 45.0, **small),
    ]  # fmt: skip
    records = {record["row"]: record for record in summarise_costs(runs, {"weighted6r4@0.5/12.5%"})}
    assert records["gated12r8@1"]["encode_ms_ratio"] == pytest.approx({"median": 1.05, "low": 1.0, "high": 1.1})
    assert records["weighted6r4@0.5/12.5%"]["encode_ms_ratio"]["low"] == pytest.approx(45 / 80)
    assert records[NATIVE]["encode_ms_ratio"]["high"] == pytest.approx(120 / 90)
    assert records[NATIVE]["prefill_ms_ratio"] is None  # nothing to divide by
    assert records["weighted6r4@0.5/12.5%"]["lane"] == "weighted" and records[NATIVE]["lane"] is None
    assert records[NATIVE]["decode_ms_per_token"] == pytest.approx(50 / 9)
    assert [line.split()[4] for line in cost_shortfalls(list(records.values()))] == [
        "gated12r8@1", "weighted6r4@0.5/12.5%",
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 7), st.integers(0, 5), st.integers(0, 9))
def test_every_round_has_each_row_once_and_native_next_to_full_work(full: int, rest: int, number: int) -> None:
    fused, others = [f"full{i}" for i in range(full)], [f"rest{i}" for i in range(rest)]
    order = round_order(fused, others, number)
    assert sorted(row for row in order if row != NATIVE) == sorted([*fused, *others])
    for index, row in enumerate(order):
        if row in fused:
            assert NATIVE in order[max(0, index - 2) : index] and NATIVE in order[index + 1 : index + 3]


RUNGS = st.builds(
    Rung,
    st.builds(
        OperatingPoint,
        st.sampled_from(FUSIONS),
        st.sampled_from((3, 6, 12)),
        st.sampled_from((1.0, 0.5, 0.25)),
        st.none() | st.integers(1024, 1 << 20),
        st.sampled_from((0, 4, 8)),
    ),
    pixel_share=st.sampled_from((1.0, 0.5, 0.125)),
)


@settings(max_examples=60, deadline=None)
@given(RUNGS)
def test_a_rungs_name_reads_back(rung: Rung) -> None:
    assert Rung.parse(rung.name).name == rung.name


def test_default_rows_are_named_once_each() -> None:
    for rows in (ROWS, KNOB_ROWS):
        assert len({rung.name for rung in rows}) == len(rows)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    for index in range(3):
        Image.new("RGB", (48, 32), (80 * index, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def write(folder: Path, **values: Any) -> Path:
    base: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"image_id": i % 2, "caption": f"caption {i}"} for i in range(4)],
    }
    path = folder / "captions.json"
    path.write_text(json.dumps({**base, **values}))
    return path


def test_a_coco_folder_gives_one_question_per_captioned_image(coco: Path) -> None:
    asked = folder_questions(coco, write(coco), "Describe.")
    assert [(question.media.name, question.references) for question in asked] == [
        ("0.png", ("caption 0", "caption 2")),
        ("1.png", ("caption 1", "caption 3")),
    ]
    scores = score_all(asked, {"native@1": answers(["caption 0", "x"])})
    record = summarise(scores, slices(asked), draws=20)["captions"][0]
    assert record["quality"] is None and record["matching"] is None and record["cider"]["mean"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": None}, "lists images and annotations"),
        ({"annotations": [{"image_id": 9, "caption": "x"}]}, "image_id 9"),
        ({"annotations": [{"image_id": 1}]}, "caption None"),
        ({"annotations": [{"image_id": 1, "caption": "x"}]}, "1 images have captions"),
        ({"images": [{"id": i, "file_name": "../0.png"} for i in range(2)]}, "inside the data folder"),
        ({"images": [{"id": i, "file_name": "none.png"} for i in range(2)]}, "'none.png'"),
        ({"images": [{"id": i, "file_name": "a\0b.png"} for i in range(2)]}, "inside the data folder"),
        ({"images": [{"id": i, "file_name": "x" * 5000} for i in range(2)]}, "inside the data folder"),
    ],
)
def test_a_bad_captions_file_is_refused(coco: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        folder_questions(coco, write(coco, **values), "Describe.")


def test_an_unreadable_captions_file_is_refused(coco: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        folder_questions(coco, coco / "absent.json", "?")
    (coco / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        folder_questions(coco, coco / "bad.json", "?")
