"""From what several people said, in any order and in any number of files, to the target that is trained on."""

import csv
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_data import CHEAP, RUNGS, subject, write_jsonl

from adaptive_fusion.decision_log import feedback_record
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import VERSION
from adaptive_fusion.jsonl import append_records
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import Subject, label_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.data.people import RATERS, feedback_from_csv, human_labels

PATHS = ("a.png", "b.png", "c.png")
FIVE = [("ann", "complex"), ("bob", "complex"), ("cem", "simple"), ("dee", "complex"), ("eli", "complex")]


def describe(path: Path) -> Subject:
    """An input that its name stands for; its first feature is the name's place in `PATHS`."""
    place = PATHS.index(path.name) if path.name in PATHS else -1
    return subject(np.array([float(place)]), zlib.crc32(path.name.encode()))


def table(file: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    file.parent.mkdir(exist_ok=True, parents=True)
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([columns, *rows])
    os.utime(file, (1e9, 1e9))
    return file


def labels(file: Path, **options: Any) -> tuple[list[dict[str, Any]], list[str], list[tuple[str, str]]]:
    """The labels of a table, what was said of it, and the rows that were refused."""
    notes: list[str] = []
    found, failed = human_labels(file, describe, say=notes.append, **options)
    return found, notes, failed


def build(path: Path) -> Dataset:
    return build_dataset([path], cheap=CHEAP, rungs=RUNGS)


def judged(data: Dataset) -> dict[str, tuple[float, float, float]]:
    """Of each input in a dataset target, weight and what it is trained as."""
    names = [PATHS[int(place)] for place in data.x[:, 0]]
    assert len(set(names)) == len(names)
    return {
        name: (round(float(target), 9), round(float(weight), 9), float(y))
        for name, target, weight, y in zip(names, data.target, data.weight, data.y, strict=True)
    }


@pytest.mark.parametrize("column", [*RATERS, "Annotator ", None])
def test_the_majority_of_raters_decides_and_their_agreement_weighs(tmp_path: Path, column: str | None) -> None:
    tie = [("ann", "simple"), ("bob", "complex")]
    rows = [("a.png", *said) for said in FIVE] + [("b.png", *said) for said in tie] + [("c.png", "ann", "simple")]
    columns = ["path", column or "notes", "label"]
    found, notes, failed = labels(table(tmp_path / "people.csv", columns, rows))
    assert [(r["target"], r["weight"]) for r in found] == [(1.0, 0.6), (0.5, 0.0), (0.0, 1.0)] and not failed
    read = f"raters are read from the column '{column}'" if column else "columns ['notes'] are not used"
    assert any(read in note for note in notes) and any("b.png: raters are divided" in note for note in notes)
    append_records(found, tmp_path / "l.jsonl")
    data = build(tmp_path / "l.jsonl")
    assert judged(data) == {"a.png": (1.0, 0.6, 1.0), "b.png": (0.5, 0.0, 0.0), "c.png": (0.0, 1.0, 0.0)}
    assert not data.report["repeated"] and not data.report["pooled"]


ROWS = st.lists(
    st.tuples(st.sampled_from(PATHS), st.sampled_from(["", "ann", "bob", "cem"]), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, scored=st.booleans(), data=st.data())
def test_no_order_of_the_rows_changes_a_label(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], scored: bool, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("people")
    columns = ["path", "rater", "score" if scored else "label", "group"]
    given = [(p, who, s / 3 if scored else ("simple", "complex")[s % 2], "xy"[g]) for p, who, s, g in rows]
    first, first_notes, _ = labels(table(folder / "people.csv", columns, given))
    other, other_notes, _ = labels(table(folder / "people.csv", columns, data.draw(st.permutations(given))))
    assert first == other
    assert len(first_notes) == len(other_notes)
    assert [r["content_hash"] for r in first] == [describe(Path(p)).content_hash for p in sorted({r[0] for r in rows})]


def test_scores_are_ranked_by_rater_and_their_ranks_averaged(tmp_path: Path) -> None:
    rows = [("a.png", "ann", 1), ("b.png", "ann", 2), ("c.png", "ann", 3)]
    rows += [("a.png", "bob", 50), ("b.png", "bob", 10), ("c.png", "bob", 90)]  # another scale
    found, _, _ = labels(table(tmp_path / "people.csv", ["path", "rater", "score"], rows))
    assert [(r["target"], r["weight"]) for r in found] == [(0.25, 0.5), (0.25, 0.5), (1.0, 1.0)]


def test_a_rater_who_says_two_things_has_one_vote(tmp_path: Path) -> None:
    rows = [("a.png", "ann", "complex"), ("a.png", "bob", "simple"), ("a.png", "bob", "complex")]
    rows += [("b.png", "ann", "simple"), *[("b.png", "bob", "complex")] * 3, ("b.png", "cem", "simple")]
    found, notes, _ = labels(table(tmp_path / "people.csv", ["path", "rater", "label"], rows))
    assert [(r["target"], round(r["weight"], 9)) for r in found] == [(1.0, 0.5), (0.0, round(1 / 3, 9))]
    assert any("'bob' says different things of a.png in rows 3, 4; their mean counts" in note for note in notes)


def test_rows_that_cannot_be_used_and_columns_that_are_not_are_named(tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_text("path,rater,label,note\na.png,ann,nice,x\n,ann,simple,\nb.png,ann,simple,x,y\nc.png,,simple,\n")
    found, notes, failed = labels(file)
    assert [reason for _, reason in failed] == [
        "label is 'nice' in row 2; expected simple or complex",
        "path is '' in row 3; expected a file",
        "row 4 has more cells than there are columns",
    ]
    assert [r["source_id"] for r in found] == ["people.csv"]
    assert any("columns ['note'] are not used" in note for note in notes)
    assert any("rows without a rater, each taken for a person of its own: 5" in note for note in notes)
    file.write_text("path,label,label\na.png,simple,complex\n")
    with pytest.raises(ConfigError, match=r"'people.csv' has the columns \['label'\] more than once"):
        labels(file)
    with pytest.warns(UserWarning, match="are not used"):
        human_labels(table(file, ["path", "label", "mood"], [("a.png", "simple", "")]), describe)


@pytest.mark.parametrize("named", [True, False])
def test_files_of_a_rater_each_give_what_one_file_of_all_gives(tmp_path: Path, named: bool) -> None:
    said = {"ann": (1, 0, 1), "bob": (1, 1, 0), "cem": (0, 1, 1), "dee": (1, 0, 0), "eli": (1, 0, 1)}
    rows = [
        (p, who, ("simple", "complex")[v]) for who, votes in said.items() for p, v in zip(PATHS, votes, strict=True)
    ]
    together, _, _ = labels(table(tmp_path / "all.csv", ["path", "rater", "label"], rows))
    append_records(together, tmp_path / "together.jsonl")
    for who in said:
        own = [row for row in rows if row[1] == who]
        columns = ["path", "rater" if named else "name", "label"]
        found, _, _ = labels(table(tmp_path / f"{who}.csv", columns, own))
        assert {r["source_id"] for r in found} == {who if named else f"{who}.csv"}
        append_records(found, tmp_path / "apart" / f"{zlib.crc32(who.encode())}.jsonl")
    one, five = build(tmp_path / "together.jsonl"), build(tmp_path / "apart")
    assert judged(one) == judged(five) == {"a.png": (1.0, 0.6, 1), "b.png": (0.0, 0.2, 0), "c.png": (1.0, 0.2, 1)}
    assert (one.report["pooled"], five.report["pooled"], five.report["repeated"]) == (0, 12, 0)
    if named:  # a later export that has the same votes once more, and a file given twice
        append_records(together, tmp_path / "apart" / "more.jsonl")
        append_records(together, tmp_path / "apart" / "twice.jsonl")
        assert judged(build(tmp_path / "apart")) == judged(one)


def test_a_corrected_file_replaces_what_its_raters_said_before(tmp_path: Path) -> None:
    file, out = tmp_path / "people.csv", tmp_path / "l.jsonl"
    before, _, _ = labels(table(file, ["path", "label"], [("a.png", "simple")] * 3))
    table(file, ["path", "label"], [("a.png", "complex")])
    os.utime(file, (1e9 + 5, 1e9 + 5))
    after, _, _ = labels(file)
    for records in ([*before, *after], [*after, *before]):
        out.unlink(missing_ok=True)
        append_records(records, out)
        assert judged(build(out)) == {"a.png": (1.0, 1.0, 1.0)}


def old(targets: Sequence[float], source_id: str | None) -> list[dict[str, Any]]:
    """Labels as they were written before raters were told apart: one a row, all at the time 0."""
    known = [label_record(describe(Path("a.png")), "human", target=t, source_id=source_id) for t in targets]
    return [{name: value for name, value in record.items() if name != "votes"} for record in known]


@settings(max_examples=6, deadline=None)
@given(targets=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=7), data=st.data())
def test_rows_of_one_source_and_time_are_decided_by_what_most_of_them_say(
    tmp_path_factory: pytest.TempPathFactory, targets: list[float], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("old")
    found = [
        judged(build(write_jsonl(folder / f"{i}.jsonl", old(order, "people.csv"))))["a.png"]
        for i, order in enumerate((targets, data.draw(st.permutations(targets)), targets * 2))
    ]
    assert found[0] == found[1] == found[2]
    share = sum(targets) / len(targets)
    assert found[0][1] == pytest.approx(abs(2 * share - 1)) and found[0][2] == (share > 0.5)


def decision(request_id: str, place: int) -> dict[str, Any]:
    known = describe(Path(PATHS[place]))
    return {
        "schema": 1,
        "request_id": request_id,
        "content_hash": known.content_hash,
        "kind": "image",
        "features": dict(known.features),
        "features_version": VERSION,
        "rung": CHEAP,
    }


def votes(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    notes: list[str] = []
    return list(feedback_from_csv(file, say=notes.append)), notes


FORMS = [
    ("2023-11-14T22:13:20Z", "2023-11-14T22:13:21Z"),
    ("2023-11-14 22:13:20", "2023-11-15"),
    ("2023-11-14T23:13:20+01:00", "2023-11-14T22:13:20.5Z"),
    ("1700000000000", "1700000000001"),
    ("1.7e15", "1700000000000001"),
    ("1700000000000000000", "1700000001000000000"),
    ("1700000000", "1700000000.25"),
    ("1700000000001", "2023-11-14T22:13:21Z"),
]


@pytest.mark.parametrize(("first", "then"), FORMS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_later_vote_counts_in_every_form_of_time(tmp_path: Path, first: str, then: str, turned: bool) -> None:
    rows = [("r", "up", "ann", first), ("r", "down", "ann", then)]
    columns = ["request_id", "rating", "source_id", "time_s"]
    found, _ = votes(table(tmp_path / "votes.csv", columns, rows[::-1] if turned else rows))
    assert all(abs(record["time_s"] - 1.7e9) < 86400 for record in found)
    data = build(write_jsonl(tmp_path / "log.jsonl", [decision("r", 0), *found]))
    assert data.y.tolist() == [1.0] and data.report["repeated"] == 1


@pytest.mark.parametrize("time_s", [None, "", "1700000000", "2023-11-14T22:13:20Z"])
@pytest.mark.parametrize("turned", [False, True])
def test_different_votes_of_one_moment_are_averaged(tmp_path: Path, time_s: str | None, turned: bool) -> None:
    rows = [("r", "1", "ann"), ("r", "0", "ann"), ("s", "0.2", "ann"), ("s", "0.6", "ann"), ("s", "0.6", "ann")]
    columns = ["request_id", "rating", "source_id"]
    if time_s is not None:
        columns, rows = [*columns, "time_s"], [(*row, time_s) for row in rows]
    found, _ = votes(table(tmp_path / "votes.csv", columns, rows[::-1] if turned else rows))
    data = build(write_jsonl(tmp_path / "log.jsonl", [decision("r", 0), decision("s", 1), *found]))
    quality = dict(zip(data.x[:, 0].tolist(), data.quality[:, RUNGS.index(CHEAP)].tolist(), strict=True))
    assert quality == {0.0: 0.5, 1.0: pytest.approx(0.4)}
    assert data.report["repeated"] == 3 and data.report["unjoined"] == 0


@pytest.mark.parametrize("written", ["05/01/2024 10:00", "yesterday", "-5", "nan", "20240501", "45413000000"])
def test_a_time_that_cannot_be_read_is_refused_by_row(tmp_path: Path, written: str) -> None:
    rows = [("r", "up", "1700000000"), ("s", "up", written)]
    file = table(tmp_path / "votes.csv", ["request_id", "rating", "time_s"], rows)
    with pytest.raises(ConfigError, match=r"time_s of votes.csv in row 3 is '.*'; expected seconds, .* or ISO 8601"):
        append_records(votes(file)[0], tmp_path / "l.jsonl")


def test_how_a_feedback_table_was_read_is_said(tmp_path: Path) -> None:
    rows = [
        ("a", "up", "2024-05-01 10:00", "x"),
        ("b", "up", "1700000000000", "x"),
        ("c", "up", "", "x"),
        ("d", "up", "1700000000", "x"),
    ]
    _, notes = votes(table(tmp_path / "votes.csv", ["request_id", "rating", "time_s", "user"], rows))
    for part in (
        "columns ['user'] are not used",
        "without a zone in row 2, taken for UTC",
        "read as milliseconds in 1 rows",
        "row 4 without a time_s, taken for older",
    ):
        assert sum(part in note for note in notes) == 1
    assert len(notes) == 4
    for text, message in (("x,up,1\n,up,2\n", "no request_id in row 3"), ("x,up,1,2\n", "more cells .* in row 2")):
        (tmp_path / "votes.csv").write_text("request_id,rating,time_s\n" + text)
        with pytest.raises(ConfigError, match=message):
            votes(tmp_path / "votes.csv")


def test_votes_without_a_source_are_one_raters(tmp_path: Path) -> None:
    records = [decision("r", 0), feedback_record("r", "up", time_s=1), feedback_record("r", "down", time_s=2)]
    assert build(write_jsonl(tmp_path / "log.jsonl", records)).y.tolist() == [1.0]
