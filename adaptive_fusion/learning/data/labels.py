"""Labels in one schema: what each rung of the ladders was worth on an input, or what a person said of it.

Knows four sources: oracle runs, people (`people`), users' feedback and shadow runs of live traffic. Must not
know how labels are fitted. Labels are log records (``event`` = ``label``, ``feedback`` or ``shadow``), so
that one reader takes logs and labels alike; `join_labels` makes one table of them.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.data.logs import SECONDS, LogTable
from adaptive_fusion.learning.data.votes import agree, opinion
from adaptive_fusion.log_schema import new_record
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.times import read_moment

SOURCES = ("feedback", "human", "oracle", "shadow")
TRUSTED = ("human", "oracle", "shadow")
"""Sources that the operator controls; only these may judge a candidate policy."""
MAX_WEIGHT = 1e9
"""Most that a label may weigh; one of more counts nothing, or its source's sum could pass any cap."""


@dataclass(frozen=True)
class Subject:
    """What is known of an input apart from its quality; numbers and hashes only.

    Attributes:
        content_hash: Of the encoded bytes; inputs that share it stay in one split.
        kind: ``image``, ``video`` or ``text``.
        features: Complexity features by name, of extractor `features_version`.
        detail: Features of how fine the details are by name, of extractor `detail_version`; empty where not measured.
        prompt_features: Prompt features by name, of extractor `prompt_version`.
        prompt_hash: Of the question; the same image under two questions is two subjects.
        prompt_kind: What the question asks for, one of `PROMPT_KINDS`; None where nothing was asked.
        slices: Names for reports, such as ``{"scene": "dense", "size": "large"}``.
    """

    content_hash: str
    kind: str
    features: Mapping[str, float]
    features_version: str | None = None
    detail: Mapping[str, float] = field(default_factory=dict)
    detail_version: str | None = None
    prompt_features: Mapping[str, float] = field(default_factory=dict)
    prompt_version: str | None = None
    prompt_hash: str | None = None
    prompt_kind: str | None = None
    slices: Mapping[str, str] = field(default_factory=dict)


def label_record(
    subject: Subject,
    source: str,
    *,
    quality: Mapping[str, float] | None = None,
    reference_quality: float | None = None,
    cost: Mapping[str, float] | None = None,
    measurement: Mapping[str, Mapping[str, float]] | None = None,
    entropies: Mapping[str, Sequence[float]] | None = None,
    target: float | None = None,
    weight: float = 1.0,
    votes: Sequence[tuple[str | None, float]] = (),
    source_id: str | None = None,
    model: Fingerprint | None = None,
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
        entropies: Of the model's distribution at each rung's first tokens, in nats, by rung name.
        target: 0 (simple) to 1 (complex), where a person said so instead.
        weight: How much the label counts.
        votes: The targets of several people behind `target` (see `votes.pool`), each with its rater's name, or None for
            somebody that `source_id` stands for. Records on one input are put together by them.
        source_id: Who labelled: a rater, user or file; shares of weight are capped per id.
        model: Whose rungs were run; None where no model was.
        time_s: When, seconds since the epoch; the newest of several equal labels counts.

    Raises:
        ConfigError: For an unknown source or a value out of range.
    """
    if source not in SOURCES:
        raise ConfigError(f"label source is {source!r}; expected one of {', '.join(SOURCES)}")
    shares = [*(quality or {}).items(), ("reference_quality", reference_quality), ("target", target)]
    _check_values(
        [*shares, *((f"vote of {rater}", value) for rater, value in votes)], {**(cost or {}), "weight": weight}
    )
    return new_record(
        "label",
        time_s=read_moment(time_s, "time_s of a label").seconds,
        source=source,
        source_id=source_id,
        content_hash=subject.content_hash,
        prompt_hash=subject.prompt_hash,
        kind=subject.kind,
        features={**subject.features, **subject.detail},
        features_version=subject.features_version,
        detail_version=subject.detail_version,
        prompt_features=dict(subject.prompt_features),
        prompt_version=subject.prompt_version,
        quality=dict(quality or {}),
        reference_quality=reference_quality,
        cost=dict(cost or {}),
        measurement={name: dict(values) for name, values in (measurement or {}).items()},
        entropies={name: list(values) for name, values in (entropies or {}).items()},
        prompt_kind=subject.prompt_kind,
        target=target,
        weight=weight,
        model=None if model is None else model.to_dict(),
        votes=[{"rater": rater, "target": value} for rater, value in votes],
        slices=dict(subject.slices),
    )


def _check_values(shares: Iterable[tuple[str, float | None]], amounts: Mapping[str, float]) -> None:
    """Refuse shares that are not from 0 to 1 and amounts below 0 or without end."""
    for name, value in shares:
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name} of a label is {value!r}; expected 0 to 1")
    for name, value in amounts.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} of a label is {value!r}; expected a finite number, 0 or more")


def shadow_record(
    request_id: str, quality: Mapping[str, float], *, reference_quality: float = 1.0, time_s: float = 0.0
) -> dict[str, Any]:
    """What a background run at full compute found: the quality, by rung name, of what the user got (and of
    others that were tried) against the full answer. `request_id` names the decision, whose features count."""
    return new_record(
        "shadow", time_s=time_s, request_id=request_id, quality=dict(quality), reference_quality=reference_quality
    )


_JOIN = f"""
CREATE TABLE joined AS
WITH decided AS (
  SELECT request_id, min(rowid) AS subject, min(nullif(rung, '')) AS rung, min(propensity) AS propensity
  FROM log WHERE event = 'decision'
    AND request_id IN (SELECT request_id FROM log WHERE event IN ('feedback', 'shadow'))
  GROUP BY request_id
  HAVING min(rung) IS NOT DISTINCT FROM max(rung) AND min(content_hash) IS NOT DISTINCT FROM max(content_hash)
), rated AS (
  SELECT request_id, source_id, {SECONDS} AS time_s, list_avg(list_sort(list_distinct(list(rating) OVER (
    PARTITION BY request_id, source_id, {SECONDS})))) AS rating
  FROM log WHERE event = 'feedback' AND rating BETWEEN 0 AND 1
)
SELECT rowid AS subject, source, source_id, request_id, content_hash, prompt_hash, quality, reference_quality,
  cost, target, coalesce(weight, 1) AS weight, {SECONDS} AS time_s, slices, rung, propensity
FROM log WHERE event = 'label' AND source IN ({", ".join(f"'{name}'" for name in SOURCES)})
UNION ALL
SELECT d.subject, 'feedback', f.source_id, f.request_id, NULL, NULL, to_json(map([d.rung], [f.rating])), NULL,
  NULL, NULL, 1, f.time_s, NULL, d.rung, d.propensity
FROM rated f JOIN decided d USING (request_id) WHERE d.rung IS NOT NULL
UNION ALL
SELECT d.subject, 'shadow', f.source_id, f.request_id, NULL, NULL, f.quality, f.reference_quality, f.cost,
  NULL, 1, {SECONDS}, NULL, d.rung, d.propensity
FROM log f JOIN decided d USING (request_id)
WHERE f.event = 'shadow'
"""
_JUDGED = """
CREATE TABLE judged AS SELECT rowid AS record, content_hash, prompt_hash FROM joined
WHERE source = 'human' AND content_hash IS NOT NULL AND target BETWEEN 0 AND 1
  AND coalesce(len(json_keys(quality)), 0) = 0
"""
_TOGETHER = f"""
SELECT j.record, j.content_hash, j.prompt_hash, l.source_id, l.time_s, l.target,
  CASE WHEN l.weight BETWEEN 0 AND {MAX_WEIGHT} THEN l.weight ELSE 0 END AS weight, s.votes::VARCHAR AS votes
FROM judged j JOIN joined l ON l.rowid = j.record JOIN log s ON s.rowid = l.subject
QUALIFY count(*) OVER (PARTITION BY j.content_hash, j.prompt_hash) > 1
ORDER BY j.content_hash, j.prompt_hash, l.time_s DESC, hash(s.features, s.kind, s.slices), j.record
"""
_NEWEST = """
CREATE TABLE labels AS SELECT * FROM joined WHERE rowid IN (
  SELECT arg_max(rowid, (time_s, len(json_keys(quality)), quality::VARCHAR, target))
  FROM joined WHERE rowid NOT IN (SELECT record FROM judged)
  GROUP BY hash(source, source_id, request_id, content_hash, prompt_hash,
    CASE WHEN request_id IS NULL AND content_hash IS NULL THEN rowid END)
)
"""
_PUT_TOGETHER = """
INSERT INTO labels SELECT j.* REPLACE (NULL AS source_id, p.target AS target, p.weight AS weight)
FROM (SELECT unnest($record) AS record, unnest($target) AS target, unnest($weight) AS weight) p
JOIN joined j ON j.rowid = p.record
"""
_ALONE = """
INSERT INTO labels SELECT * FROM joined WHERE rowid IN (
  SELECT min(record) FROM judged GROUP BY content_hash, prompt_hash HAVING count(*) = 1)
"""


def join_labels(table: LogTable) -> dict[str, int]:
    """Make the table ``labels`` of an open log: one row a label, feedback and shadow runs joined to their
    decision.

    Its column ``subject`` is the rowid in ``log`` of the record with the features. What people said of one input is one
    row, with the target and the weight of all its raters together (see `votes.agree`). Of several other labels by one
    source id on one request or input the newest counts, so that neither replayed votes nor logs given twice
    (compacted and not) count twice; of equally new ones the one that names the most rungs, and of ratings the mean of
    those that differ. A request id under which two different decisions were logged joins none.

    Returns:
        ``labels`` (rows), ``unjoined`` (feedback and shadow records without a decision, a rung or a valid
        rating), ``repeated`` (older or equal labels left out), ``pooled`` (labels by people that went into the row of
        another one on the same input), ``unlabelled`` (label records of an unknown source).
    """
    run = table.connection.execute
    for query in (_JOIN, _JUDGED, _NEWEST, _ALONE):
        run(query)

    def count(query: str) -> int:
        return int(run(f"SELECT count(*) FROM {query}").fetchone()[0])

    pooled = count("judged") - _put_together(table)
    records = count("log WHERE event IN ('feedback', 'label', 'shadow')")
    unknown = count("log WHERE event = 'label'") - count("joined WHERE content_hash IS NOT NULL")
    joined, labels = count("joined"), count("labels")
    return {
        "labels": labels,
        "unjoined": records - unknown - joined,
        "repeated": joined - labels - pooled,
        "pooled": pooled,
        "unlabelled": unknown,
    }


def _put_together(table: LogTable) -> int:
    """Add one row for each input that several records of people are on; returns how many inputs people judged."""
    run = table.connection.execute
    rows: dict[str, list[Any]] = {"record": [], "target": [], "weight": []}
    found = run(_TOGETHER).fetchall()
    for _, group in groupby(found, key=lambda row: row[1:3]):
        said = list(group)
        opinions = (opinion(who, when, t, w, json.loads(votes or "null")) for _, _, _, who, when, t, w, votes in said)
        target, weight = agree(opinions)
        for name, value in (("record", said[0][0]), ("target", target), ("weight", weight)):
            rows[name].append(value)
    if found:
        run(_PUT_TOGETHER, rows)
    alone = run("SELECT count(*) FROM judged").fetchone()[0] - len(found)
    return int(alone) + len(rows["record"])
