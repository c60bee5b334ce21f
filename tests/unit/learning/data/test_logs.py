"""Logs as tables: what is broken is counted and never fatal, and compaction loses nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_processes import PROCESSES, expected, reported, write_together
from waits import MOST_S

from adaptive_fusion.decision_log import DecisionLog
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import VERSION
from adaptive_fusion.learning.data import logs
from adaptive_fusion.learning.data.labels import join_labels
from adaptive_fusion.learning.data.logs import COLUMNS, UNKNOWN, compact, log_files, open_logs
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.log_schema import FIELDS, Event, Kind, new_record

GOOD = [
    {"schema": 1, "request_id": "a", "features": {"x": 1.5}, "point": {"fusion": "native"}},
    {"schema": 1, "request_id": "line\r\nbreaks\t\u2028 \u0000 and 漢字", "time_s": 1e9},
    {
        "schema": 1,
        "request_id": "other types",
        "time_s": [1],
        "features": 3,
        "feasible": "maybe",
        "unknown": 1,
    },
    {"schema": 1, "event": "feedback", "request_id": "a", "rating": 0.5},
]
BROKEN = [
    b"garbage {",
    b"[1, 2]",
    b"3",
    b"null",
    b'"text"',
    b"\xff\xfe not utf-8",
    b'{"request_id": "lone \\ud800 surrogate"}',
    b'{"a": 1}{"b": 2}',
    b"\x00\x00",
    b'{"a": ' + b"[" * 20_000 + b"]",
]


def table(paths: list[Path], select: str) -> list[tuple[object, ...]]:
    with open_logs(paths) as opened:
        return opened.connection.execute(f"SELECT {select} FROM log ORDER BY request_id, event").fetchall()


def counts(*paths: Path) -> tuple[int, int]:
    with open_logs(paths) as opened:
        return opened.rows, opened.broken


def test_broken_lines_are_counted_and_the_others_survive(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    good = [json.dumps(record).encode() for record in GOOD] + [b'{"request_id": "nan", "time_s": NaN}']
    lines = [part for pair in zip(good * 2, BROKEN, strict=True) for part in pair]
    torn = b'{"schema": 1, "request_id": "torn'
    log.write_bytes(b"\n".join([*lines[:9], b"", b"  "]) + b"\n" + b"\r\n".join([*lines[9:], torn]))
    assert counts(log) == (10, len(BROKEN) + 1)
    found = table([log], "DISTINCT request_id, event, time_s, features, feasible")
    by_id = {row[0]: row for row in found if row[1] == "decision"}
    assert by_id["a"][3] == '{"x":1.5}'
    assert by_id[GOOD[1]["request_id"]][2] == 1e9
    assert by_id["other types"][2] is None and by_id["other types"][4] is None


def test_a_line_too_long_for_the_reader_is_one_broken_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log.open("wb") as handle:
        handle.write(b'{"request_id": "before"}\n{"reason": "')
        for _ in range(3):
            handle.write(b"q" * logs.MAX_LINE)
        handle.write(b'"}\n{"request_id": "after"}\n')
    assert counts(log) == (2, 1)


@settings(max_examples=20, deadline=None)
@given(lines=st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b""))))
def test_any_bytes_are_read_and_every_line_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    log.write_bytes(b'{"request_id": "a"}\n' + b"\n".join(lines) + b'\n{"request_id": "b"}\n')
    rows, broken = counts(log)
    filled = sum(bool(line.strip(b" \t\x0b\x0c")) for line in lines)
    assert rows >= 2
    assert rows + broken - 2 <= filled


def test_what_the_decision_log_writes_is_read_back_with_its_rotated_files(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl", max_bytes=2000, keep=5)
    ids = [f"request {i}\r\n\x00{'x' * 50}" for i in range(60)]
    for i, request_id in enumerate(ids):
        log.write({"schema": 1, "request_id": request_id, "time_s": float("nan") if i % 2 else float(i)})
    assert (tmp_path / "log.jsonl.1").exists() and log.dropped == 0
    (tmp_path / "log.jsonl.bak").write_text('{"request_id": "not a log"}\n')
    found = table([tmp_path], "request_id, time_s")
    assert {row[0] for row in found} == set(ids)
    assert all(row[1] == ids.index(str(row[0])) for row in found if row[1] is not None)


def test_compaction_gives_the_same_table_and_mixes_with_jsonl(tmp_path: Path) -> None:
    one, two = tmp_path / "it's.jsonl", tmp_path / "deep" / "log.jsonl.3"
    two.parent.mkdir()
    one.write_text("".join(json.dumps(record) + "\n" for record in GOOD[:2]))
    two.write_text("".join(json.dumps(record) + "\n" for record in GOOD[2:]) + '{"torn')
    everything = ", ".join(COLUMNS)
    before = table([tmp_path], everything)
    packed = compact([one, two], tmp_path / "packed" / "old.parquet")
    assert (packed.rows, packed.broken) == (4, 1)
    assert table([tmp_path / "packed"], everything) == before
    one.unlink()
    two.unlink()
    (tmp_path / "new.jsonl").write_text('{"request_id": "new"}\n')
    assert counts(tmp_path) == (5, 0)
    assert [p.name for p in (tmp_path / "packed").iterdir()] == ["old.parquet"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | NUMBER | TEXT
NESTED = PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(TEXT, PLAIN, max_size=2)
VALUES: dict[Kind, st.SearchStrategy[Any]] = {
    "text": TEXT,
    "number": NUMBER,
    "integer": st.integers(-(2**63), 2**63 - 1),
    "boolean": st.booleans(),
    "json": st.lists(NESTED, max_size=2) | st.dictionaries(TEXT, NESTED, max_size=2),
}
EVENTS: tuple[Event, ...] = ("decision", "feedback", "label", "shadow")
FULL = st.sampled_from(EVENTS).flatmap(
    lambda event: st.fixed_dictionaries(
        {f.name: VALUES[f.kind] for f in FIELDS if event in f.events and f.name not in ("schema", "event")}
    ).map(lambda values: new_record(event, **values))
)
LATER = st.dictionaries(TEXT.filter(lambda name: name not in COLUMNS), NESTED, max_size=2)


def read(path: Path) -> list[dict[str, Any]]:
    """Each record of a log with the fields that are not NULL, nested ones parsed, unknown ones beside the others."""
    nested = {field.name for field in FIELDS if field.kind == "json"} | {UNKNOWN}
    with open_logs([path]) as opened:
        assert opened.broken == 0
        rows = opened.connection.execute(f"SELECT {', '.join(COLUMNS)} FROM log ORDER BY rowid").fetchall()
    found = []
    for row in rows:
        record = {
            name: json.loads(value) if name in nested else value
            for name, value in zip(COLUMNS, row, strict=True)
            if value is not None
        }
        later = record.pop(UNKNOWN, {})
        found.append({**record, **later})
    return found


@settings(max_examples=10, deadline=None)
@given(records=st.lists(st.tuples(FULL, LATER), min_size=1, max_size=12))
def test_what_is_written_is_what_is_read_and_what_is_packed(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = DecisionLog(folder / "log.jsonl")
    written = [{**known, **later} for known, later in records]
    for record in written:
        log.write(record)
    compact([log.path], folder / "old.parquet")
    wanted = [{"event": "decision", **record} for record in written]
    for path in (log.path, folder / "old.parquet"):
        assert read(path) == wanted


OLD = (
    '{"schema":1,"time_s":10.5,"request_id":"r1","content_hash":"c1","prompt_hash":"p1","kind":"image",'
    '"complexity":0.25,"features":{"edge_density":0.125},"features_version":"1","prompt_features":{"prompt_read":1.0},'
    '"prompt_version":"prompt-1","p_complex":0.5,"lane":"weighted","point":{"fusion":"weighted","layers":3,'
    '"downsample":0.5,"adapter_rank":0},"rung":"weighted3@0.5","propensity":0.9,"policy":"balanced",'
    '"budget":{"latency_ms":100.0},"feasible":true,"predicted":{"encode_ms":1,"prefill_ms":2,"decode_ms":3.5,'
    '"peak_memory_gb":0.25},"p_late":0.04,"reason":"cheapest","measurement":{"preprocess_ms":1.0,"encode_ms":2.0,'
    '"prefill_ms":3.0,"decode_ms":4.0,"ttft_ms":6.0,"latency_ms":10.0,"visual_tokens":16,"prompt_tokens":20,'
    '"new_tokens":3,"patches":64,"peak_memory_gb":0.5},"finish_reason":"stop","error":null}',
    '{"schema":1,"event":"feedback","time_s":11.0,"request_id":"r1","rating":0.0,"source_id":"ann"}',
    '{"schema":1,"event":"label","time_s":12.0,"source":"oracle","source_id":"model","content_hash":"c1",'
    '"prompt_hash":"p1","kind":"image","features":{"edge_density":0.125},"features_version":"1",'
    '"prompt_features":{"prompt_read":1.0},"prompt_version":"v","quality":{"weighted3@0.5":0.5,"native@1":0.9},'
    '"reference_quality":0.9,"cost":{"weighted3@0.5":40.0},"measurement":{"weighted3@0.5":{"ttft_ms":40.0}},'
    '"target":null,"weight":1.0,"slices":{"scene":"dense"}}',
    '{"schema":1,"event":"label","time_s":0.0,"source":"human","source_id":"people.csv","content_hash":"c1",'
    '"prompt_hash":"p1","kind":"image","features":{"edge_density":0.125},"features_version":"1",'
    '"prompt_features":{"prompt_read":1.0},"prompt_version":"v","quality":{},"reference_quality":null,"cost":{},'
    '"measurement":{},"target":1.0,"weight":1.0,"slices":{"scene":"dense"}}',
    '{"schema":1,"event":"shadow","time_s":13.0,"request_id":"r1","quality":{"weighted3@0.5":0.5},'
    '"reference_quality":1.0}',
)
"""Records as they were written before there was one schema."""


def test_logs_and_packed_logs_of_before_still_load(tmp_path: Path) -> None:
    import duckdb

    path, packed = tmp_path / "old.jsonl", tmp_path / "old.parquet"
    path.write_text("\n".join(OLD) + "\n")
    wanted = [{"event": "decision", **{k: v for k, v in json.loads(r).items() if v is not None}} for r in OLD]
    assert read(path) == wanted
    with open_logs([path]) as opened:
        counts = join_labels(opened)
        targets = opened.connection.execute("SELECT target, weight FROM labels WHERE source = 'human'").fetchall()
    assert targets == [(1.0, 1.0)]
    assert counts == {"labels": 4, "unjoined": 0, "repeated": 0, "pooled": 0, "unlabelled": 0}
    compact([path], packed)
    kept = ", ".join(name for name in COLUMNS if name not in ("p_late", "votes", UNKNOWN))
    duckdb.execute(f"COPY (SELECT {kept} FROM '{packed}') TO '{tmp_path / 'before.parquet'}' (FORMAT parquet)")
    assert read(tmp_path / "before.parquet") == [{k: v for k, v in r.items() if k != "p_late"} for r in wanted]


def test_packed_logs_of_other_ages_keep_what_only_one_of_them_knew(tmp_path: Path) -> None:
    import duckdb

    def write(name: str, select: str) -> None:
        duckdb.execute(
            f"COPY (SELECT 1 AS schema, 'r' AS request_id, {select}) TO '{tmp_path / name}' (FORMAT parquet)"
        )

    # Packed when nobody knew p_late, and packed by a version that knows more.
    write("before.parquet", """'{"p_late": 0.75, "rest": null, "foo": 1}'::JSON AS unknown_fields""")
    write(
        "later.parquet", """0.5 AS p_late, 42 AS extra, [1, 2] AS "odd ""name", '{"foo": 1}'::JSON AS unknown_fields"""
    )
    write("bare.parquet", "TIMESTAMP '2026-01-01 00:00:00' AS time_s, 7 AS rest, NULL AS extra")
    wanted = {
        "before": {"p_late": 0.75, "rest": None, "foo": 1},
        "later": {"p_late": 0.5, "extra": 42, 'odd "name': [1, 2], "foo": 1},
        "bare": {"time_s": 1767225600.0, "rest": 7},
    }
    for name, fields in wanted.items():
        path = tmp_path / f"{name}.parquet"
        for _ in range(2):
            assert read(path) == [{"schema": 1, "event": "decision", "request_id": "r", **fields}]
            compact([path], tmp_path / "again" / path.name)
            path = tmp_path / "again" / path.name


def test_a_reader_beside_writers_sees_whole_records_each_once(tmp_path: Path) -> None:
    count = 400
    log = tmp_path / "logs" / "log.jsonl"
    DecisionLog(log).write({"request_id": "first", "reason": "x" * 5000})  # lines across pages
    workers, results = write_together(log, count, max_bytes=20_000, keep=10**4)
    seen, running, ends = 0, True, time.monotonic() + MOST_S
    while running:
        assert time.monotonic() < ends, "writers that never end"
        running = any(worker.is_alive() for worker in workers) and results.empty()
        with open_logs([log.parent]) as opened:
            assert opened.broken == 0
            ids = [row[0] for row in opened.connection.execute("SELECT request_id FROM log").fetchall()]
        assert len(ids) == len(set(ids)) >= seen
        seen = len(ids)
    assert reported(workers, results) == (PROCESSES * count, 0)
    with open_logs([log.parent]) as opened:
        ids = [row[0] for row in opened.connection.execute("SELECT request_id FROM log").fetchall()]
    assert sorted(ids) == sorted([*expected(count), "first"])


def test_a_file_that_grows_while_it_is_read_is_read_up_to_where_it_was_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"request_id": "a"}\n{"request_id": "b"}\n')
    load = logs._load_jsonl

    def with_half_a_line(connection: Any, file: Path) -> None:
        if file.name != "copy.jsonl":
            with log.open("a") as handle:
                handle.write('{"request_id": "c", ')
        load(connection, file)

    monkeypatch.setattr(logs, "_load_jsonl", with_half_a_line)
    assert counts(log) == (2, 0)


def test_paths_are_files_folders_or_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.2", "a.jsonl", "notes.txt", "c.jsonl.old"):
        (tmp_path / name).write_text("{}\n")
    assert [p.name for p in log_files([tmp_path])] == ["a.jsonl", "a.jsonl.2", "b.jsonl"]
    (tmp_path / "a.jsonl.10").write_text("{}\n")
    assert [p.name for p in log_files([tmp_path])] == ["a.jsonl", "a.jsonl.2", "a.jsonl.10", "b.jsonl"]
    (tmp_path / "a.jsonl.10").unlink()
    assert [p.name for p in log_files([tmp_path / "a.*", tmp_path / "a.jsonl"])] == ["a.jsonl", "a.jsonl.2"]
    assert log_files([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]
    for nothing in ([], [tmp_path / "missing.jsonl"], [tmp_path / "*.parquet"]):
        with pytest.raises(ConfigError, match="logs"):
            log_files(nothing)


def test_a_broken_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=r"bad\.parquet"), open_logs([tmp_path]):
        pass


def test_a_foreign_parquet_file_lends_the_columns_it_has(tmp_path: Path) -> None:
    import duckdb

    file = tmp_path / "foreign.parquet"
    duckdb.execute(f"COPY (SELECT 'r' AS request_id, 'x' AS time_s, 7 AS other) TO '{file}' (FORMAT parquet)")
    assert table([file], "request_id, time_s, event") == [("r", None, "decision")]


def test_features_of_the_question_left_out_for_being_0_read_as_0(tmp_path: Path) -> None:
    label = {"schema": 1, "event": "label", "source": "oracle", "kind": "image", "features_version": VERSION}
    label |= {"quality": {"cheap@1": 0.5}, "reference_quality": 0.9, "features": {"edge_density": 0.1}}
    asked = {"prompt_log_chars": 2.0, "prompt_read": 1.0}
    rows = [
        {**label, "content_hash": "a", "prompt_features": asked},
        {**label, "content_hash": "b", "prompt_features": asked, "prompt_version": "another"},
        {**label, "content_hash": "c", "prompt_features": {}},
    ]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_dataset([path], cheap="cheap@1", rungs=["cheap@1"])
    found = {tuple(row) for row in data.columns(["prompt_log_chars", "prompt_read", "prompt_count"]).tolist()}
    assert (2.0, 1.0, 0.0) in found and len(data) == 3
    unknown = [row for row in data.columns(["prompt_read"])[:, 0] if row != row]
    assert len(unknown) == 2  # measured by another extractor, or there was no question


def test_a_name_with_brackets_or_asterisks_is_one_file(tmp_path: Path) -> None:
    for index, name in enumerate(("log[1].jsonl", "log1.jsonl", "log*.jsonl")):
        (tmp_path / name).write_text(f'{{"request_id": "{index}"}}\n')
    compact([tmp_path / "log*.jsonl"], tmp_path / "old[1].parquet")
    compact([tmp_path / "log1.jsonl"], tmp_path / "old1.parquet")
    for name, found in (("log[1].jsonl", "0"), ("log*.jsonl", "2"), ("old[1].parquet", "2"), ("old1.parquet", "1")):
        assert table([tmp_path / name], "request_id") == [(found,)]


def test_what_cannot_be_read_or_written_is_refused_by_name(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    (tmp_path / "torn.jsonl.gz").write_bytes(b"\x1f\x8b not really")
    with pytest.raises(ConfigError, match=r"cannot read torn\.jsonl\.gz"), open_logs([tmp_path / "torn.jsonl.gz"]):
        pass
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "taken.parquet.part").mkdir()
    for name in ("old.jsonl", "folder.parquet", "taken.parquet", "log.jsonl/under-a-file.parquet"):
        with pytest.raises(ConfigError, match=f"out is '{Path(name).name}'") as refused:
            compact([log], tmp_path / name)
        assert str(tmp_path) not in str(refused.value)
    assert not (tmp_path / "old.jsonl").exists() and log.read_text() == "{}\n"
