"""What people said of inputs, as labels: ratings and judgements from their files.

Knows two tables, of judgements and of ratings. Must not know how labels are joined or fitted.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.decision_log import THUMBS, feedback_record
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.evaluation.tables import read_table
from adaptive_fusion.learning.data.labels import Subject, label_record

_HUMAN = {"simple": 0.0, "complex": 1.0}


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
