"""From logs and labels to the training matrix: what routes, what joins, what counts how much."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_data import CHEAP, MIDDLE, RUNGS, STRONG, oracle_labels, subject, write_jsonl

from adaptive_fusion.decision_log import DecisionLog, feedback_record
from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.features.complexity import VERSION
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.jsonl import append_records
from adaptive_fusion.learning.data.dataset import SPLITS, Dataset, cap_weights
from adaptive_fusion.learning.data.labels import SOURCES, label_record, shadow_record
from adaptive_fusion.learning.data.logs import compact
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.data.people import feedback_from_csv, human_labels
from adaptive_fusion.policy.fitted import Fingerprint


def build(path: Path, **options: Any) -> Dataset:
    return build_dataset([path], cheap=CHEAP, rungs=RUNGS, **options)


def decision(request_id: str, index: int, rung: str | None) -> dict[str, Any]:
    known = subject(np.array([float(index)]), index)
    return {
        "schema": 1,
        "request_id": request_id,
        "content_hash": known.content_hash,
        "kind": "image",
        "features": dict(known.features),
        "features_version": VERSION,
        "rung": rung,
        "propensity": 0.5,
    }


def test_the_label_that_routes_is_a_loss_above_the_tolerance(tmp_path: Path) -> None:
    losses = [0.0, 0.02, 0.021, 0.3, -0.1]
    records = [
        label_record(
            subject(np.array([float(i)]), i),
            "oracle",
            quality={CHEAP: 0.8 - loss, STRONG: 0.8},
            reference_quality=0.8,
        )
        for i, loss in enumerate(losses)
    ]
    del records[1]["reference_quality"]
    records[1]["quality"]["native@1"] = 0.8
    data = build(write_jsonl(tmp_path / "l.jsonl", records))
    by_input = dict(zip(data.x[:, 0].tolist(), data.y.tolist(), strict=True))
    assert by_input == {0: 0, 1: 0, 2: 1, 3: 1, 4: 0}
    assert np.isnan(data.quality[:, 1]).all() and np.isnan(data.cost).all()
    looser = build(tmp_path / "l.jsonl", tolerance=0.1)
    assert looser.y.sum() == 1 and looser.digest() != data.digest()


def test_feedback_and_shadow_runs_join_their_decision_once(tmp_path: Path) -> None:
    records = [
        *(decision(f"r{i}", i, CHEAP if i != 2 else STRONG) for i in range(5)),
        feedback_record("r0", "down", source_id="ann", time_s=1),
        feedback_record("r0", "up", source_id="ann", time_s=2),  # the newer vote of the same user counts
        *[feedback_record("r1", "down", source_id="bob", time_s=3)] * 4,  # a replay counts once
        feedback_record("r2", "down", source_id="ann"),  # says nothing of the cheap rung
        shadow_record("r3", {CHEAP: 0.5, STRONG: 1.0}),
        feedback_record("missing", "up"),
        decision("twice", 7, CHEAP),
        decision("twice", 8, CHEAP),
        feedback_record("twice", "up"),
        {"schema": 1, "event": "feedback", "request_id": "r4", "rating": 7},
        decision("no rung", 9, None),
        feedback_record("no rung", "up"),
    ]
    data = build(write_jsonl(tmp_path / "log.jsonl", records))
    found = {
        (SOURCES[s], int(x)): (y, taken, p)
        for s, x, y, taken, p in zip(data.source, data.x[:, 0], data.y, data.taken, data.propensity, strict=True)
    }
    cheap, strong = RUNGS.index(CHEAP), RUNGS.index(STRONG)
    assert found[("feedback", 0)] == (0.0, cheap, 0.5)
    assert found[("feedback", 1)] == (1.0, cheap, 0.5)
    assert np.isnan(found[("feedback", 2)][0]) and found[("feedback", 2)][1:] == (strong, 0.5)
    assert found[("shadow", 3)] == (1.0, cheap, 0.5)
    assert len(data) == 4
    assert data.report["unjoined"] == 4 and data.report["repeated"] == 4
    # the same logs once more, compacted: nothing counts twice
    compact([tmp_path / "log.jsonl"], tmp_path / "old.parquet")
    assert build(tmp_path).digest() == data.digest()


JANUARY, FEBRUARY = 1767225600, 1769904000


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
        ("2026-02-01T01:00:00+02:00", FEBRUARY),
        (JANUARY * 1000, FEBRUARY),
        (JANUARY * 10**9, "2026-02-01 00:00:00"),
        (None, "2026-01-01"),
    ],
)
def test_the_newest_vote_in_a_log_counts_in_whatever_form_its_time_is(
    older: Any, newer: Any, packed: bool, tmp_path: Path
) -> None:
    said = {"schema": 1, "event": "feedback", "request_id": "r", "source_id": "ann"}
    votes = [{**said, "rating": 1.0, "time_s": newer}, {**said, "rating": 0.0, "time_s": older}]
    path = write_jsonl(tmp_path / "l.jsonl", [decision("r", 0, CHEAP), *votes])
    if packed:
        compact([path], tmp_path / "l.parquet")
        path = tmp_path / "l.parquet"
    assert build(path).y.tolist() == [0.0]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    good, other, empty, unknown, wild = oracle_labels(5, 0, asks=False)
    other["features_version"] = "some other version"
    empty["quality"] = {"rung of another policy": 0.5}
    unknown["source"] = "rumour"
    wild["quality"] = {CHEAP: 7.0, STRONG: 0.9}
    wild["features"]["edge_density"] = 1e400
    path = write_jsonl(tmp_path / "l.jsonl", [good, other, empty, unknown, wild])
    with path.open("a") as handle:
        handle.write("torn")
    data = build(path)
    report = {k: data.report[k] for k in ("records", "broken_lines", "other_version", "unlabelled", "rows", "no_label")}
    assert report == {
        "records": 5,
        "broken_lines": 1,
        "other_version": 1,
        "unlabelled": 1,
        "rows": 2,
        "no_label": 1,
    }
    assert np.isnan(data.y).sum() == 1 and np.isnan(data.x[:, 0]).sum() == 1
    (tmp_path / "l.jsonl").write_text(json.dumps(other) + "\n")
    with pytest.raises(ConfigError, match="other_version': 1"):
        build(path)


def test_the_order_of_the_lines_does_not_matter_but_their_content_does(tmp_path: Path) -> None:
    records = oracle_labels(60, 3)
    first = build(write_jsonl(tmp_path / "a.jsonl", records))
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "1.jsonl", records[:17:-1])
    write_jsonl(tmp_path / "b" / "2.jsonl", records[:18])
    second = build(tmp_path / "b")
    assert first.digest() == second.digest()
    for name, (codes, values) in first.slices.items():
        assert [values[c] for c in codes] == [second.slices[name][1][c] for c in second.slices[name][0]]
    records[0]["quality"][CHEAP] *= 0.9
    assert build(write_jsonl(tmp_path / "c.jsonl", records)).digest() != first.digest()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**9), n=st.integers(1, 300))
def test_splits_share_no_content_and_cover_all(seed: int, n: int) -> None:
    groups = np.random.default_rng(seed).integers(0, 2**62, max(1, n // 2))[np.arange(n) % max(1, n // 2)]
    data = arrays(n, group=groups)
    masks = [data.split(name, seed) for name in SPLITS]
    assert (np.sum(masks, axis=0) == 1).all()
    homes = {g: {k for k, mask in enumerate(masks) if mask[groups == g].any()} for g in set(groups.tolist())}
    assert all(len(home) == 1 for home in homes.values())


def test_splits_have_their_shares_and_follow_the_seed() -> None:
    data = arrays(20_000, group=np.arange(20_000))
    shares = [data.split(name, 0).mean() for name in SPLITS]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.01)
    assert (data.split("test", 0) & data.split("test", 1)).mean() == pytest.approx(0.04, abs=0.01)
    with pytest.raises(ConfigError, match="'dev'"):
        data.split("dev")


def arrays(n: int, **parts: Any) -> Dataset:
    nothing = np.zeros((n, 0))
    whole = {
        "names": (),
        "x": nothing,
        "y": np.zeros(n),
        "target": np.full(n, np.nan),
        "quality": nothing,
        "reference": np.ones(n),
        "cost": nothing,
        "rungs": (),
        "taken": np.full(n, -1),
        "propensity": np.full(n, np.nan),
        "group": np.arange(n),
        "weight": np.ones(n),
        "source": np.zeros(n, np.int64),
        "source_id": np.zeros(n, np.int64),
        "video": np.zeros(n, bool),
    }
    return Dataset(**{**whole, **parts})


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=30),
    trusted=st.integers(0, 1000),
    cap=st.floats(0.001, 1),
)
def test_no_labeller_outside_the_trusted_sources_has_more_than_its_share(
    sizes: list[int], trusted: int, cap: float
) -> None:
    ids = np.repeat(np.arange(len(sizes) + 1), [trusted, *sizes])
    source = np.where(ids == 0, SOURCES.index("oracle"), SOURCES.index("feedback"))
    weight = cap_weights(arrays(len(ids), source=source, source_id=ids), cap)
    totals = np.bincount(ids, weights=weight, minlength=len(sizes) + 1)
    assert (weight[ids == 0] == 1).all() and (weight > 0).all() and (weight <= 1 + 1e-12).all()
    if trusted or len(sizes) * cap >= 1:
        assert (totals[1:] <= cap * totals.sum() * (1 + 1e-9) + 1e-9).all()
    else:  # no level can satisfy it: nobody has more than the smallest
        assert totals[1:] == pytest.approx(min(sizes))
    fits = np.array(sizes) <= cap * totals.sum() * (1 - 1e-9)
    if trusted:
        assert totals[1:][fits] == pytest.approx(np.array(sizes)[fits])


def test_people_say_simple_or_complex_or_give_scores_ranked_in_their_group(tmp_path: Path) -> None:
    def describe(path: Path) -> Any:
        if path.name == "broken.png":
            raise MediaError("cannot be read")
        return subject(np.array([1.0]), zlib.crc32(path.name.encode()))

    labels = tmp_path / "labels.csv"
    labels.write_text("path,label\na.png,Simple\nb.png, complex \nc.png,nice\nbroken.png,simple\n")
    found, failed = human_labels(labels, describe)
    assert [r["target"] for r in found] == [0.0, 1.0] and {r["source_id"] for r in found} == {"labels.csv"}
    assert [path for path, _ in failed] == ["c.png", "broken.png"] and "'nice'" in failed[0][1]

    scores = tmp_path / "scores.csv"
    rows = [
        ("a", 10, "art"),
        ("b", 30, "art"),
        ("c", 20, "art"),
        ("d", 900, "maps"),
        ("e", 900, "maps"),
        ("f", 1, "x"),
    ]
    text = "\n".join(f"{name}.png,{score},{group}" for name, score, group in rows)
    scores.write_text(f"path,score,group\n{text}\ng.png,inf,art\n")
    found, failed = human_labels(scores, describe)
    assert [r["target"] for r in found] == [0.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert [r["weight"] for r in found] == [1, 1, 0, 0, 0, 0] and [path for path, _ in failed] == ["g.png"]
    assert append_records(found[:2], tmp_path / "deep" / "l.jsonl") == 2
    assert append_records(found[2:], tmp_path / "deep" / "l.jsonl") == len(found) - 2
    assert sorted(build(tmp_path / "deep" / "l.jsonl").y.tolist()) == [0, 0, 0, 0, 0, 1]
    for columns in ("path,rank", "file,label", "path,label,score"):
        labels.write_text(f"{columns}\n")
        with pytest.raises(ConfigError, match="expected path and label or score"):
            human_labels(labels, describe)
    labels.write_bytes(b"path,label\n\xff.png,simple\n")
    for unreadable in (labels, tmp_path / "absent.csv"):
        with pytest.raises(ConfigError, match=f"table '{unreadable.name}' cannot be read"):
            human_labels(unreadable, describe)
        with pytest.raises(ConfigError, match=f"table '{unreadable.name}' cannot be read"):
            list(feedback_from_csv(unreadable))


def test_ratings_written_beside_decisions_become_labels(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    for index, name in enumerate("abc"):
        log.write(decision(name, index, CHEAP))
    log.feedback("a", "up", source_id="ann", time_s=1)
    log.feedback("a", 0.2, source_id="ann", time_s=2)  # a change of mind
    log.feedback("b", "up")
    log.feedback("nothing", "down")
    with pytest.raises(ConfigError, match="'maybe'"):
        log.feedback("c", "maybe")
    data = build(tmp_path / "log.jsonl")
    assert sorted(data.y.tolist()) == [0, 1] and data.report["unjoined"] == 1 and data.report["repeated"] == 1


def test_feedback_files_have_thumbs_or_stars(tmp_path: Path) -> None:
    file = tmp_path / "votes.csv"
    file.write_text("request_id,rating,source_id\na,up,ann\nb,1,\nc,5,bob\n")
    found = list(feedback_from_csv(file, worst=1, best=5))
    assert [(r["request_id"], r["rating"], r["source_id"]) for r in found] == [
        ("a", 1.0, "ann"),
        ("b", 0.0, None),
        ("c", 1.0, "bob"),
    ]
    file.write_text("request_id,rating\na,6\n")
    with pytest.raises(ConfigError, match=r"votes.csv has rating '6' in row 2; .* from 1 to 5"):
        list(feedback_from_csv(file, worst=1, best=5))
    file.write_text("request_id,rating\na,up\nb,\n")
    with pytest.raises(ConfigError, match="rating '' in row 3"):
        append_records(feedback_from_csv(file), tmp_path / "l.jsonl")
    assert not (tmp_path / "l.jsonl").exists()  # all rows or none


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"a":1}\n{"torn": ', '{"a":1}\n'),
        ('{"a":1}\n{"whole":2}', '{"a":1}\n{"whole":2}\n'),
        ('{"a":1}\n', '{"a":1}\n'),
        ("", ""),
    ],
)
def test_what_is_appended_begins_a_line_of_its_own(before: str, after: str, tmp_path: Path) -> None:
    out = tmp_path / "l.jsonl"
    out.write_text(before)
    append_records([{"new": 3}], out)
    assert out.read_text() == after + '{"new":3}\n'


def test_a_file_that_holds_something_else_is_not_cut(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("bread\nand butter")
    with pytest.raises(ConfigError, match=r"'notes.txt' ends in b'and butter'"):
        append_records([{"new": 3}], notes)
    assert notes.read_text() == "bread\nand butter"


@pytest.mark.parametrize("name", ["", CHEAP.upper(), "a'b\"c", "$", "x" * 5000])
def test_a_hostile_rung_name_does_not_stop_the_reading(name: str, tmp_path: Path) -> None:
    records = oracle_labels(20, 1)
    for record in records:
        record["quality"] |= {name: 0.25, "sum3@1": 0.5, "SUM3@1": 0.5}
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", records)], cheap=CHEAP, rungs=RUNGS, all_rungs=True)
    assert len(data) == 20 and np.isfinite(data.quality[:, : len(RUNGS)]).all()
    assert len([found for found in data.rungs if found.lower() == "sum3@1"]) == 1


def test_no_weight_is_too_large_for_the_cap(tmp_path: Path) -> None:
    records = oracle_labels(20, 1)
    records += [
        label_record(subject(np.zeros(4), 10**6 + i), "feedback", target=1.0, weight=weight, source_id="eve")
        for i, weight in enumerate((1e308, 1e308, 1e9))
    ]
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", records)], cheap=CHEAP, rungs=RUNGS, source_cap=0.02)
    assert np.isfinite(data.weight.sum())
    assert data.weight[~data.trusted()].sum() == pytest.approx(0.02 * data.weight.sum())


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "rumour"},
        {"quality": {CHEAP: 1.5}},
        {"quality": {CHEAP: float("nan")}},
        {"target": -1},
        {"weight": float("inf")},
        {"cost": {MIDDLE: -3.0}},
    ],
)
def test_a_label_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        label_record(subject(np.zeros(1), 0), **{"source": "oracle", **wrong})


def test_a_dataset_needs_the_cheap_rung_among_its_rungs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "l.jsonl", oracle_labels(4, 0))
    with pytest.raises(ConfigError, match="among them"):
        build_dataset([tmp_path], cheap="other@1", rungs=RUNGS)
    with pytest.raises(ConfigError, match="tolerance is 2"):
        build(tmp_path, tolerance=2)


def test_labels_of_two_models_are_refused_by_name_and_details_are_features(tmp_path: Path) -> None:
    one = Fingerprint("Model", {"depth": 2}, {"depth": 2}, "aaaa" * 4)
    tuned = replace(one, digest="bbbb" * 4)
    detail = dict(zip(DETAIL_FEATURES, range(1, 99), strict=False))

    def labelled(index: int, model: Fingerprint | None, version: str = DETAIL_VERSION) -> dict[str, Any]:
        known = replace(subject(np.array([float(index)]), index), detail=detail, detail_version=version)
        return label_record(known, "oracle", quality={CHEAP: 0.5}, reference_quality=0.8, model=model)

    of_one = [labelled(0, one), labelled(1, replace(one, digest="")), labelled(2, None), labelled(3, one, "other")]
    data = build(write_jsonl(tmp_path / "one.jsonl", of_one))
    assert data.model is not None and data.model.is_same(one)
    found = data.columns(DETAIL_FEATURES)[np.argsort(data.x[:, 0])]
    assert (found[:3] == [*detail.values()]).all() and np.isnan(found[3]).all()
    assert build(write_jsonl(tmp_path / "none.jsonl", [labelled(0, None)])).model is None
    with pytest.raises(ConfigError, match=r"labels are of two models, .*aaaaaaaa.* and .*bbbbbbbb"):
        build(write_jsonl(tmp_path / "two.jsonl", [labelled(0, one), labelled(1, tuned)]))
