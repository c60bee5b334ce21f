"""What people said of inputs, as labels: ratings and judgements from their files.

Knows two tables, of judgements and of ratings. Must not know how labels are joined or fitted.

A row that cannot be used is named by its number, as a spreadsheet counts: the header is row 1. What else is worth
knowing about a file, such as columns that are not used, goes to `say`, a warning by default.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adaptive_fusion.decision_log import THUMBS, feedback_record
from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.evaluation.tables import read_table
from adaptive_fusion.learning.data.labels import Subject, label_record
from adaptive_fusion.learning.data.votes import pool
from adaptive_fusion.times import NO_ZONE, Moment, read_moment

RATERS = ("rater", "annotator", "source_id")
"""Columns that may name the rater of a row, in any case; the first of them that a table has counts."""
_HUMAN = {"simple": 0.0, "complex": 1.0}
_SHOWN = 5

Failed = list[tuple[str, str]]
"""Path and reason of each row that could not be used."""
Vote = tuple[str | None, float]
"""A rater, None for one without a name, and the target."""


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


class _Judgement(NamedTuple):
    """What one rater, or one row without a rater, said of a path: the mean where that is more than one value."""

    path: str
    rater: str | None
    group: str
    value: float


def human_labels(
    file: str | Path,
    describe: Callable[[Path], Subject],
    *,
    source_id: str | None = None,
    say: Callable[[str], None] = _warn,
) -> tuple[list[dict[str, Any]], Failed]:
    """Labels from a CSV with the columns ``path`` and either ``label`` (simple, complex) or ``score``, and optionally
    one of `RATERS`.

    An input has one label, whatever the order of the rows: what most of its raters say, weighted by how far they agree
    (`votes.pool`). Rows without a rater are a person each. Where one rater's rows on a path differ, their mean is the
    rater's vote.

    A score counts by its rank within its ``group`` (a column; all rows are one group without it) and among those of its
    rater, because scores of different groups and people are seldom on one scale: rank 0 is the group's simplest, 1 its
    most complex, ties share their mean rank. The target is the mean of the raters' ranks. A rank near the middle says
    little about the side it is on, so its weight is ``|2 rank - 1|``.

    Args:
        file: Its paths are relative to it. The time of its labels is when it was last changed.
        describe: Gives an input's hash and features.
        source_id: Of the labels; else the one rater's name, or that of the file.
        say: Told what was made of the columns, of ties and of raters who contradict themselves.

    Returns:
        The labels by path, and for each row that could not be used its path and the reason.

    Raises:
        ConfigError: For a file that cannot be read or is without those columns.
    """
    file = Path(file)
    columns, rows = read_table(file)
    column, raters = _judging_columns(file, columns, say)
    scored = column == "score"
    values, failed = _values(rows, column)
    judged = _by_rater(rows, values, raters, say)
    targets = _ranks(judged) if scored else [judgement.value for judgement in judged]
    subjects = _described(file.parent, rows, judged, describe, failed)
    only = {judgement.rater for judgement in judged}
    source = source_id or (only.pop() if len(only) == 1 else None) or file.name
    changed, labels, ties = file.stat().st_mtime, [], []
    for path, ballots in _by_input(judged, targets, subjects):
        target, weight = pool([value for _, value in ballots], sided=not scored)
        if weight == 0 and len(ballots) > 1:
            ties.append(path)
        votes = [] if ballots == [(None, target)] else ballots
        known = subjects[path]
        labels.append(
            label_record(known, "human", target=target, weight=weight, votes=votes, source_id=source, time_s=changed)
        )
    if ties:
        say(f"{file.name}: {_some(ties)}: raters are divided, so the target is 0.5 and the weight 0")
    return labels, failed


def _judging_columns(file: Path, columns: Sequence[str], say: Callable[[str], None]) -> tuple[str, str | None]:
    """The column of the judgements, and that of the raters if there is one."""
    given = [name for name in ("label", "score") if name in columns]
    if "path" not in columns or len(given) != 1:
        raise ConfigError(f"{file.name} has columns {columns}; expected path and label or score")
    raters = next((found for name in RATERS for found in columns if found.strip().lower() == name), None)
    used = ["path", *given, *(["group"] if given == ["score"] else []), *([raters] if raters else [])]
    _say_columns(file, columns, used, say)
    if raters is not None:
        say(f"{file.name}: raters are read from the column {raters!r}")
    return given[0], raters


def _say_columns(file: Path, columns: Sequence[str], used: Sequence[str], say: Callable[[str], None]) -> None:
    unused = [name for name in columns if name not in used]
    if unused:
        say(f"{file.name}: columns {unused} are not used; {', '.join(used)} are")


def _values(rows: list[dict[str, Any]], column: str) -> tuple[list[float | None], Failed]:
    """The number behind each row's label or score; None where there is none."""
    failed = []
    values: list[float | None] = []
    for number, row in enumerate(rows, 2):
        text = (row[column] or "").strip()
        value = _HUMAN.get(text.lower()) if column == "label" else _finite(text)
        reason = ""
        if None in row:
            reason = f"row {number} has more cells than there are columns"
        elif not (row["path"] or "").strip():
            reason = f"path is {row['path']!r} in row {number}; expected a file"
        elif value is None:
            expected = "simple or complex" if column == "label" else "a finite number"
            reason = f"{column} is {row[column]!r} in row {number}; expected {expected}"
        if reason:
            failed.append((row["path"] or "", reason))
        values.append(None if reason else value)
    return values, failed


def _by_rater(
    rows: list[dict[str, Any]], values: list[float | None], raters: str | None, say: Callable[[str], None]
) -> list[_Judgement]:
    """One judgement a rater, group and path; one a row where there is no rater."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    judged, unnamed = [], []
    for number, (row, value) in enumerate(zip(rows, values, strict=True), 2):
        if value is None:
            continue
        path, group = row["path"].strip(), row.get("group") or ""
        rater = (row[raters] or "").strip() if raters else ""
        if rater:
            found[path, group, rater].append((number, value))
        else:
            judged.append(_Judgement(path, None, group, value))
            unnamed.append(number)
    if raters and unnamed:
        say(f"rows without a {raters}, each taken for a person of its own: {_some(unnamed)}")
    for (path, group, rater), said in sorted(found.items()):
        given = [value for _, value in said]
        if len(set(given)) > 1:
            say(f"{rater!r} says different things of {path} in rows {_some([n for n, _ in said])}; their mean counts")
        judged.append(_Judgement(path, rater, group, math.fsum(given) / len(given)))
    return judged


def _ranks(judged: list[_Judgement]) -> list[float]:
    """The rank of each value from 0 to 1 among those of its group and rater, 0.5 if there are no others."""
    scales: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for judgement in judged:
        scales[judgement.group, judgement.rater].append(judgement.value)
    ordered = {scale: np.sort(values) for scale, values in scales.items()}
    ranks = []
    for judgement in judged:
        values = ordered[judgement.group, judgement.rater]
        left, right = (int(np.searchsorted(values, judgement.value, side)) for side in ("left", "right"))
        ranks.append((left + right - 1) / 2 / (len(values) - 1) if len(values) > 1 else 0.5)
    return ranks


def _described(
    folder: Path,
    rows: list[dict[str, Any]],
    judged: list[_Judgement],
    describe: Callable[[Path], Subject],
    failed: Failed,
) -> dict[str, Subject]:
    """The input at each path; those that cannot be used are added to `failed`."""
    subjects = {}
    for path in sorted({judgement.path for judgement in judged}):
        try:
            subjects[path] = describe(folder / path)
        except AdaptiveFusionError as error:
            numbers = [n for n, row in enumerate(rows, 2) if (row["path"] or "").strip() == path]
            failed.append((path, f"{error} (row {_some(numbers)})"))
    return subjects


def _by_input(
    judged: list[_Judgement], targets: list[float], subjects: dict[str, Subject]
) -> list[tuple[str, list[Vote]]]:
    """Of each input its first path and its votes, by path: one vote a rater, the mean of those in several groups and on
    several copies of the input, and every vote without a name."""
    votes: dict[tuple[str, str | None], list[tuple[str, str | None, float]]] = defaultdict(list)
    for judgement, target in zip(judged, targets, strict=True):
        if (subject := subjects.get(judgement.path)) is not None:
            votes[subject.content_hash, subject.prompt_hash].append((judgement.path, judgement.rater, target))
    found = []
    for said in votes.values():
        named: dict[str, list[float]] = defaultdict(list)
        for _, rater, target in said:
            if rater is not None:
                named[rater].append(target)
        ballots: list[Vote] = [(rater, math.fsum(given) / len(given)) for rater, given in sorted(named.items())]
        ballots += sorted((None, target) for _, rater, target in said if rater is None)
        found.append((min(path for path, _, _ in said), ballots))
    return sorted(found, key=lambda pair: pair[0])


def _some(items: Sequence[Any]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def feedback_from_csv(
    file: str | Path, *, best: float = 1.0, worst: float = 0.0, say: Callable[[str], None] = _warn
) -> Iterator[dict[str, Any]]:
    """Feedback records from a CSV with ``request_id``, ``rating`` and optionally ``source_id`` and
    ``time_s``.

    Ratings are ``up``, ``down`` or numbers from `worst` to `best` (stars: ``worst=1, best=5``). Times are read by
    `read_moment`. Of a source's ratings of a request the newest counts; a row without a time is older than any with
    one, and ratings of one moment that differ are averaged.

    Args:
        file: The table.
        best: The best rating.
        worst: The worst.
        say: Told which columns are not used and how times were read.

    Raises:
        ConfigError: For a file that cannot be read or is without those columns, or a row without a request, with a
            rating out of range or with a time that cannot be read.
    """
    file = Path(file)
    columns, rows = read_table(file)
    if not {"request_id", "rating"} <= set(columns):
        raise ConfigError(f"{file.name} has columns {columns}; expected request_id and rating")
    optional = [name for name in ("source_id", "time_s") if name in columns]
    _say_columns(file, columns, ["request_id", "rating", *optional], say)
    forms: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows, 2):
        request_id = (row["request_id"] or "").strip()
        if not request_id or None in row:
            found = "more cells than there are columns" if None in row else "no request_id"
            raise ConfigError(f"{file.name} has {found} in row {number}; expected one rating of one request a row")
        rating = _rating(row["rating"], f"{file.name} has", f"in row {number}", worst, best)
        moment, written = Moment(0.0, "none"), (row.get("time_s") or "").strip()
        if written:
            moment = read_moment(written, f"time_s of {file.name} in row {number}")
        forms[moment.form].append(number)
        source_id = (row.get("source_id") or "").strip() or None
        yield feedback_record(request_id, rating, source_id=source_id, time_s=moment.seconds)
    if "time_s" in columns:
        _say_times(file, forms, say)


def _rating(text: str | None, has: str, where: str, worst: float, best: float) -> float:
    given = (text or "").strip().lower()
    value = _finite(given)
    rating = THUMBS.get(given, math.nan if value is None else (value - worst) / (best - worst))
    if not 0 <= rating <= 1:
        raise ConfigError(f"{has} rating {text!r} {where}; expected up, down or a number from {worst:g} to {best:g}")
    return rating


def _say_times(file: Path, forms: dict[str, list[int]], say: Callable[[str], None]) -> None:
    for form, numbers in sorted(forms.items()):
        if form == "none":
            say(f"{file.name}: row {_some(numbers)} without a time_s, taken for older than any with one")
        elif form == NO_ZONE:
            say(f"{file.name}: time_s is without a zone in row {_some(numbers)}, taken for UTC")
        elif form != "seconds":
            say(f"{file.name}: time_s is read as {form} in {len(numbers)} rows")
