"""Labels in one schema: what each rung of the ladders was worth on an input, or what a person said of it.

Knows four sources: oracle runs, people's files, users' feedback and shadow runs of live traffic. Must not
know how labels are fitted. Labels are log records (``event`` = ``label``, ``feedback`` or ``shadow``), so
that one reader takes logs and labels alike; `join_labels` makes one table of them.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.decisions import SCHEMA, THUMBS, feedback_record
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.learning.logs import LogTable
from adaptive_fusion.learning.tables import read_table

SOURCES = ("feedback", "human", "oracle", "shadow")
TRUSTED = ("human", "oracle", "shadow")
"""Sources that the operator controls; only these may judge a candidate policy."""

_HUMAN = {"simple": 0.0, "complex": 1.0}


@dataclass(frozen=True)
class Subject:
    """What is known of an input apart from its quality; numbers and hashes only.

    Attributes:
        content_hash: Of the encoded bytes; inputs that share it stay in one split.
        kind: ``image``, ``video`` or ``text``.
        features: Complexity features by name, of extractor `features_version`.
        prompt_features: Prompt features by name, of extractor `prompt_version`.
        prompt_hash: Of the question; the same image under two questions is two subjects.
        slices: Names for reports, such as ``{"scene": "dense", "size": "large"}``.
    """

    content_hash: str
    kind: str
    features: Mapping[str, float]
    features_version: str | None = None
    prompt_features: Mapping[str, float] = field(default_factory=dict)
    prompt_version: str | None = None
    prompt_hash: str | None = None
    slices: Mapping[str, str] = field(default_factory=dict)


def label_record(
    subject: Subject,
    source: str,
    *,
    quality: Mapping[str, float] | None = None,
    reference_quality: float | None = None,
    cost: Mapping[str, float] | None = None,
    measurement: Mapping[str, Mapping[str, float]] | None = None,
    target: float | None = None,
    weight: float = 1.0,
    source_id: str | None = None,
    time_s: float = 0.0,
) -> dict[str, Any]:
    """One label as a log record.

    Args:
        subject: What was labelled.
        source: One of `SOURCES`.
        quality: Quality in [0, 1] by rung name.
        reference_quality: Quality of the native point, in [0, 1].
        cost: Cost by rung name, in one unit for all labels, such as milliseconds to the first token.
        measurement: What else was measured by rung name, such as ``latency_ms`` and ``visual_tokens``.
        target: 0 (simple) to 1 (complex), where a person said so instead.
        weight: How much the label counts.
        source_id: Who labelled: a rater, user or file; shares of weight are capped per id.
        time_s: When, seconds since the epoch; the newest of several equal labels counts.

    Raises:
        ConfigError: For an unknown source or a value out of range.
    """
    if source not in SOURCES:
        raise ConfigError(f"label source is {source!r}; expected one of {', '.join(SOURCES)}")
    shares = {**(quality or {}), "reference_quality": reference_quality, "target": target}
    for name, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} of a label is {value!r}; expected 0 to 1")
    for name, value in {**(cost or {}), "weight": weight}.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} of a label is {value!r}; expected a finite number, 0 or more")
    return {
        "schema": SCHEMA,
        "event": "label",
        "time_s": time_s,
        "source": source,
        "source_id": source_id,
        "content_hash": subject.content_hash,
        "prompt_hash": subject.prompt_hash,
        "kind": subject.kind,
        "features": dict(subject.features),
        "features_version": subject.features_version,
        "prompt_features": dict(subject.prompt_features),
        "prompt_version": subject.prompt_version,
        "quality": dict(quality or {}),
        "reference_quality": reference_quality,
        "cost": dict(cost or {}),
        "measurement": {name: dict(values) for name, values in (measurement or {}).items()},
        "target": target,
        "weight": weight,
        "slices": dict(subject.slices),
    }


def human_labels(
    file: str | Path, describe: Callable[[Path], Subject], *, source_id: str | None = None
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Labels from a CSV with the columns ``path`` and either ``label`` (simple, complex) or ``score``.

    A score counts by its rank within its ``group`` (a column; all rows are one group without it), because
    scores of different groups are seldom on one scale: rank 0 is the group's simplest, 1 its most complex,
    ties share their mean rank. A rank near the middle says little about the side it is on, so its weight is
    ``|2 rank - 1|``. Paths are relative to the CSV.

    Returns:
        The labels, and for each row that could not be used its path and the reason.

    Raises:
        ConfigError: For a file that cannot be read or is without those columns.
    """
    file = Path(file)
    columns, rows = read_table(file)
    given = [name for name in ("label", "score") if name in columns]
    if "path" not in columns or len(given) != 1:
        raise ConfigError(f"{file.name} has columns {columns}; expected path and label or score")
    targets, failed = _by_label(rows) if given == ["label"] else _by_rank(rows)
    labels = []
    for row, target in zip(rows, targets, strict=True):
        if target is None:
            continue
        try:
            subject = describe(file.parent / (row["path"] or ""))
        except AdaptiveFusionError as error:
            failed.append((row["path"], str(error)))
            continue
        weight = 1.0 if given == ["label"] else abs(2 * target - 1)
        labels.append(label_record(subject, "human", target=target, weight=weight, source_id=source_id or file.name))
    return labels, failed


def _by_label(rows: list[dict[str, Any]]) -> tuple[list[float | None], list[tuple[str, str]]]:
    targets = [_HUMAN.get((row["label"] or "").strip().lower()) for row in rows]
    failed = [
        (row["path"], f"label is {row['label']!r}; expected simple or complex")
        for row, target in zip(rows, targets, strict=True)
        if target is None
    ]
    return targets, failed


def _by_rank(rows: list[dict[str, Any]]) -> tuple[list[float | None], list[tuple[str, str]]]:
    scores = np.array([_finite(row["score"]) for row in rows])
    groups = [row.get("group") or "" for row in rows]
    targets: list[float | None] = [None] * len(rows)
    failed = [
        (row["path"], f"score is {row['score']!r}; expected a finite number")
        for row, score in zip(rows, scores, strict=True)
        if np.isnan(score)
    ]
    for group in sorted(set(groups)):
        members = [i for i, name in enumerate(groups) if name == group and not np.isnan(scores[i])]
        values = np.sort(scores[members])
        for i in members:
            left, right = (np.searchsorted(values, scores[i], side) for side in ("left", "right"))
            mean_rank = (int(left) + int(right) - 1) / 2
            targets[i] = mean_rank / (len(values) - 1) if len(values) > 1 else 0.5
    return targets, failed


def _finite(text: str | None) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def feedback_from_csv(file: str | Path, *, best: float = 1.0, worst: float = 0.0) -> Iterator[dict[str, Any]]:
    """Feedback records from a CSV with ``request_id``, ``rating`` and optionally ``source_id`` and
    ``time_s``.

    Ratings are ``up``, ``down`` or numbers from `worst` to `best` (stars: ``worst=1, best=5``).

    Raises:
        ConfigError: For a file that cannot be read or is without those columns or a rating out of range.
    """
    file = Path(file)
    columns, rows = read_table(file)
    if not {"request_id", "rating"} <= set(columns):
        raise ConfigError(f"{file.name} has columns {columns}; expected request_id and rating")
    for number, row in enumerate(rows, 2):
        text = (row["rating"] or "").strip().lower()
        rating = text if text in THUMBS else (_finite(text) - worst) / (best - worst)
        if not isinstance(rating, str) and not 0 <= rating <= 1:
            raise ConfigError(
                f"{file.name} has rating {row['rating']!r} in row {number}; expected up, down or a number from"
                f" {worst:g} to {best:g}"
            )
        time_s = _finite(row.get("time_s"))
        yield feedback_record(
            row["request_id"],
            rating,
            source_id=row.get("source_id") or None,
            time_s=0.0 if math.isnan(time_s) else time_s,
        )


def shadow_record(
    request_id: str, quality: Mapping[str, float], *, reference_quality: float = 1.0, time_s: float = 0.0
) -> dict[str, Any]:
    """What a background run at full compute found: the quality, by rung name, of what the user got (and of
    others that were tried) against the full answer. `request_id` names the decision, whose features count."""
    return {
        "schema": SCHEMA,
        "event": "shadow",
        "time_s": time_s,
        "request_id": request_id,
        "quality": dict(quality),
        "reference_quality": reference_quality,
    }


def append_records(records: Iterable[Mapping[str, Any]], out: str | Path) -> int:
    """Append records to a JSONL file, made with its folder if need be; returns how many.

    All of them are made before the first is written, so that a record that is refused leaves the file as it was.

    Raises:
        ConfigError: For a file that ends in something else than a record.
        ValueError: For a number that JSON does not have.
    """
    out = Path(out)
    lines = [json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n" for record in records]
    out.parent.mkdir(parents=True, exist_ok=True)
    mend_tail(out)
    with out.open("a", encoding="utf-8") as handle:
        handle.writelines(lines)
    return len(lines)


def mend_tail(out: Path) -> None:
    """Let a JSONL file end in a whole line, if it is there, so that what is appended begins one of its own.

    A last line without its end is ended where it is a whole record, and cut off where it is a torn one.

    Raises:
        ConfigError: If it is neither: the file is not ours to cut.
    """
    if not out.exists():
        return
    with out.open("rb+") as handle:
        tail = deque(handle, maxlen=1).pop() if out.stat().st_size else b""
        if not tail or tail.endswith(b"\n"):
            return
        if not tail.startswith(b"{"):
            raise ConfigError(f"{out.name!r} ends in {tail[:40]!r}; expected a file of JSON records, one a line")
        try:
            json.loads(tail)
        except ValueError:
            handle.truncate(handle.tell() - len(tail))
        else:
            handle.write(b"\n")


_JOIN = f"""
CREATE TABLE joined AS
WITH decided AS (
  SELECT request_id, min(rowid) AS subject, min(nullif(rung, '')) AS rung, min(propensity) AS propensity
  FROM log WHERE event = 'decision'
    AND request_id IN (SELECT request_id FROM log WHERE event IN ('feedback', 'shadow'))
  GROUP BY request_id
  HAVING min(rung) IS NOT DISTINCT FROM max(rung) AND min(content_hash) IS NOT DISTINCT FROM max(content_hash)
)
SELECT rowid AS subject, source, source_id, request_id, content_hash, prompt_hash, quality, reference_quality,
  cost, target, coalesce(weight, 1) AS weight, coalesce(time_s, 0) AS time_s, slices, rung, propensity
FROM log WHERE event = 'label' AND source IN ({", ".join(f"'{name}'" for name in SOURCES)})
UNION ALL
SELECT d.subject, 'feedback', f.source_id, f.request_id, NULL, NULL, to_json(map([d.rung], [f.rating])), NULL,
  NULL, NULL, 1, coalesce(f.time_s, 0), NULL, d.rung, d.propensity
FROM log f JOIN decided d USING (request_id)
WHERE f.event = 'feedback' AND d.rung IS NOT NULL AND f.rating BETWEEN 0 AND 1
UNION ALL
SELECT d.subject, 'shadow', f.source_id, f.request_id, NULL, NULL, f.quality, f.reference_quality, f.cost,
  NULL, 1, coalesce(f.time_s, 0), NULL, d.rung, d.propensity
FROM log f JOIN decided d USING (request_id)
WHERE f.event = 'shadow'
"""
_NEWEST = """
CREATE TABLE labels AS SELECT * FROM joined WHERE rowid IN (
  SELECT arg_max(rowid, (time_s, hash(quality, target)))
  FROM joined GROUP BY hash(source, source_id, request_id, content_hash, prompt_hash,
    CASE WHEN request_id IS NULL AND content_hash IS NULL THEN rowid END)
)
"""


def join_labels(table: LogTable) -> dict[str, int]:
    """Make the table ``labels`` of an open log: one row a label, feedback and shadow runs joined to their
    decision.

    Its column ``subject`` is the rowid in ``log`` of the record with the features. Of several labels by one
    source id on one request or input the newest counts, so that neither replayed votes nor logs given twice
    (compacted and not) count twice. A request id under which two different decisions were logged joins none.

    Returns:
        ``labels`` (rows), ``unjoined`` (feedback and shadow records without a decision, a rung or a valid
        rating), ``repeated`` (older or equal labels left out), ``unlabelled`` (label records of an unknown
        source).
    """
    run = table.connection.execute
    run(_JOIN)
    run(_NEWEST)

    def count(query: str) -> int:
        return int(run(f"SELECT count(*) FROM {query}").fetchone()[0])

    records = count("log WHERE event IN ('feedback', 'label', 'shadow')")
    unknown = count("log WHERE event = 'label'") - count("joined WHERE content_hash IS NOT NULL")
    joined, labels = count("joined"), count("labels")
    return {
        "labels": labels,
        "unjoined": records - unknown - joined,
        "repeated": joined - labels,
        "unlabelled": unknown,
    }
