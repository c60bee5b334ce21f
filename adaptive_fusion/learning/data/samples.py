"""What inputs and outcomes of a stretch of logs were like: one sample of numbers for each feature and each outcome.

Knows logs in DuckDB, names of features and of rungs. Must not know what is compared with what.

Of several decisions about one content the newest counts, so that an image that comes back a thousand times is one.
Outcomes are told apart by lane and rung: what `native@1/25%` keeps of the images that a policy sends to it says nothing
of what it would keep of the others.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.file_lock import write_whole
from adaptive_fusion.learning.data.dataset import FloatArray
from adaptive_fusion.learning.data.labels import join_labels
from adaptive_fusion.learning.data.logs import SECONDS, LogTable, open_logs

SCHEMA = 1
FILE = "training.json"
"""Beside a policy that was trained on logs: what those were like."""
KEPT = 400
"""Values that are kept of a sample: with as many on the other side, what differs by a tenth shows."""
NEWEST = 4000
"""Contents that stand for a stretch of logs, the newest first."""
NAMES = (*FEATURE_NAMES, *DETAIL_FEATURES)


@dataclass(frozen=True)
class Sample:
    """Numbers of a stretch of logs.

    Attributes:
        features: Values of each feature of images, one a content.
        outcomes: Values of each outcome: ``quality RUNG (LANE)`` by shadow runs or other labels, ``rating (LANE)`` by
            users, from 0 to 1.
        contents: How many different contents that is.
        until_s: When the newest record was made, in seconds since the epoch; 0 where none says so.
        rows: Each content's features by name, for what looks at whole images; not kept in files.
    """

    features: Mapping[str, FloatArray]
    outcomes: Mapping[str, FloatArray]
    contents: int
    until_s: float
    rows: tuple[Mapping[str, float], ...] = field(default=(), compare=False, repr=False)

    def save(self, file: Path) -> None:
        """Write it, of each sample at most `KEPT` values, evenly over its order."""
        kept = {
            part: {name: _thinned(values) for name, values in getattr(self, part).items()}
            for part in ("features", "outcomes")
        }
        head = {"schema": SCHEMA, "contents": self.contents, "until_s": self.until_s}
        write_whole(file, json.dumps({**head, **kept}, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Sample":
        """Read what `save` wrote.

        Raises:
            ConfigError: For anything else.
        """
        try:
            found = json.loads(file.read_text("utf-8"))
            if found.get("schema") != SCHEMA:
                raise ConfigError(f"{file.name} has schema {found.get('schema')!r}; expected {SCHEMA}")
            features, outcomes = (
                {str(name): np.asarray(values, np.float64) for name, values in found[part].items()}
                for part in ("features", "outcomes")
            )
            return cls(features, outcomes, int(found["contents"]), float(found["until_s"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file.name} cannot be read ({type(error).__name__}); train the policy again") from error


def read_samples(
    logs: Iterable[str | Path], *, split_s: float | None = None, halves: bool = False, threads: int = 2
) -> tuple[Sample, Sample]:
    """The samples of decisions up to a moment and of those after it; what is not known of a side is empty.

    Args:
        logs: See `log_files`.
        split_s: The moment; None takes all as after it.
        halves: Without a moment, take the one that has half of the contents before it.
        threads: Threads of DuckDB.

    Raises:
        ConfigError: As `open_logs`.
    """
    with open_logs(logs, threads=threads) as table:
        join_labels(table)
        rows = _contents(table)
        if split_s is None:
            split_s = float(np.median([row[0] for row in rows])) if halves and rows else -math.inf
        before = [row for row in rows if row[0] <= split_s]
        after = [row for row in rows if row[0] > split_s]
        said = _outcomes(table)
        return (
            _sample(before[:NEWEST], [each for each in said if each[0] <= split_s]),
            _sample(after[:NEWEST], [each for each in said if each[0] > split_s]),
        )


def sample_of(
    rows: Iterable[Mapping[str, float]], outcomes: Mapping[str, FloatArray], contents: int, until_s: float
) -> Sample:
    """A sample from features of contents, by name, and outcomes."""
    known = tuple(rows)
    table = {name: np.asarray([row.get(name, np.nan) for row in known], np.float64) for name in NAMES}
    finite = {name: values[np.isfinite(values)] for name, values in table.items()}
    return Sample({name: values for name, values in finite.items() if len(values)}, outcomes, contents, until_s, known)


_CONTENTS = f"""
SELECT max({SECONDS}) AS last_s, arg_max(features::VARCHAR, ({SECONDS}, rowid)) AS measured,
  arg_max(detail_version, ({SECONDS}, rowid)) AS version
FROM log WHERE event = 'decision' AND kind = 'image' AND features_version = $image
GROUP BY coalesce(content_hash, request_id, rowid::VARCHAR)
ORDER BY last_s DESC, measured LIMIT {2 * NEWEST}
"""
_OUTCOMES = f"""
SELECT {SECONDS.replace("time_s", "s.time_s")} AS time_s, s.lane, l.source, l.rung, l.quality::VARCHAR
FROM labels l JOIN log s ON s.rowid = l.subject
WHERE l.source IN ('shadow', 'feedback') AND l.rung IS NOT NULL AND s.lane IS NOT NULL
ORDER BY time_s, l.request_id, l.quality::VARCHAR
"""

_Content = tuple[float, Mapping[str, float]]
_Said = tuple[float, str, float]


def _contents(table: LogTable) -> list[_Content]:
    """Time and features of each content, the newest first."""
    found: list[_Content] = []
    for time_s, text, detail in table.connection.execute(_CONTENTS, {"image": VERSION}).fetchall():
        values = json.loads(text or "null")
        if isinstance(values, dict):
            names = NAMES if detail == DETAIL_VERSION else FEATURE_NAMES
            found.append((float(time_s or 0.0), {name: values[name] for name in names if _is_number(values.get(name))}))
    return found


def _outcomes(table: LogTable) -> list[_Said]:
    """When the request was, what the outcome is called, and its value."""
    found = []
    for time_s, lane, source, rung, text in table.connection.execute(_OUTCOMES).fetchall():
        value = json.loads(text or "{}").get(rung)
        if _is_number(value) and 0 <= value <= 1:
            name = f"rating ({lane})" if source == "feedback" else f"quality {rung} ({lane})"
            found.append((float(time_s or 0.0), name, float(value)))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sample(rows: list[_Content], said: list[_Said]) -> Sample:
    outcomes: dict[str, list[float]] = {}
    for _, name, value in said:
        outcomes.setdefault(name, []).append(value)
    arrays = {name: np.asarray(values) for name, values in sorted(outcomes.items())}
    until = max([*(row[0] for row in rows), *(each[0] for each in said), 0.0])
    return sample_of((row[1] for row in rows), arrays, len(rows), until)


def _thinned(values: FloatArray) -> list[float]:
    ordered = np.sort(values)
    if len(ordered) > KEPT:
        ordered = ordered[((np.arange(KEPT) + 0.5) * len(ordered) / KEPT).astype(int)]
    return [float(f"{value:.5g}") for value in ordered]
