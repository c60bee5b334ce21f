"""Paired comparisons between rows, what each must come to, and which of them falls short.

Knows per-question scores and the names of the usual rows. Must not know how answers were had or how a table is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptive_fusion.bench.answers import ADAPTIVE, NATIVE, RATIOS, gated, native, weighted
from adaptive_fusion.bench.scores import FloatArray, IntArray, RowScores, all_together
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval, bootstrap_diff, bootstrap_ratio, won_back

DRAWS, SEED = 1000, 0
"""Of every bootstrap."""
KEPT, SAVED, MATCHING_GAIN, WON_BACK, NOTABLE_LOSS = 0.98, 0.60, 1.18, 1 / 3, 0.10
"""What must hold: `adaptive` keeps this share of the best scheme's CIDEr-D and reading, at no more than this share of
its time to the first token and of its tokens, and matches this much better than the cheap scheme (or as well as the
best one); fusion wins back this share of what downsampling loses, where that is at least so much quality."""


@dataclass(frozen=True)
class Limit:
    """What the value of a comparison must come to.

    Attributes:
        at_least: Whether `bound` is the least or the most it may be.
        bound: For the value itself.
        beyond: What the interval must leave out, on that side; None asks nothing of the interval.
        group: Of the comparisons that share a group one is enough.
    """

    bound: float
    at_least: bool = True
    beyond: float | None = None
    group: str | None = None

    def verdict(self, value: Mapping[str, float] | None) -> str:
        """``yes``; ``unsure`` where only the interval reaches the bound; ``no``, also without a value."""
        if value is None:
            return "no"
        sign = 1 if self.at_least else -1
        far, near = (value["high"], value["low"]) if self.at_least else (value["low"], value["high"])
        if self.beyond is not None and sign * near <= sign * self.beyond:
            return "unsure" if sign * far > sign * self.beyond else "no"
        if sign * value["mean"] >= sign * self.bound:
            return "yes"
        return "unsure" if sign * far >= sign * self.bound else "no"

    def to_dict(self, value: Mapping[str, float] | None) -> dict[str, Any]:
        """The limit in words, and whether `value` keeps it."""
        text = f"{'>=' if self.at_least else '<='} {self.bound:.3g}"
        if self.beyond == self.bound:
            text = f"{'>' if self.at_least else '<'} {self.bound:.3g}, interval too"
        elif self.beyond is not None:
            text += f", interval {'>' if self.at_least else '<'} {self.beyond:.3g}"
        return {"text": text, "holds": self.verdict(value), "group": self.group}


@dataclass
class _Table:
    scores: Mapping[str, RowScores]
    parts: Mapping[str, IntArray]
    draws: int
    found: list[dict[str, Any]] = field(default_factory=list)

    def mean(self, row: str, part: str, key: str) -> float:
        values = self.scores[row].take(key, self.parts[part]) if part in self.parts else np.empty(0)
        return float(values.mean()) if len(values) else float("nan")

    def add(self, kind: str, rows: Sequence[str], part: str, key: str, limit: Limit | None = None) -> None:
        """``difference`` a - b, ``ratio`` a / b, or ``won back`` (a - b) / (c - b), where all of it was measured."""
        if part not in self.parts or any(row not in self.scores for row in rows):
            return
        a, b, *rest = (self.scores[row].take(key, self.parts[part]) for row in rows)
        if not len(a) or len(a) != len(b):
            return
        value: dict[str, float] | None
        if kind == "difference":
            value = as_dict(bootstrap_diff(a, b, seed=SEED, n=self.draws))
        elif kind == "ratio":
            value = ratio(a, b, self.draws)
        else:
            [full] = rest
            share = won_back(full, b, a, seed=SEED, n=self.draws)
            value = None if share is None else as_dict(share)
        entry = {"kind": kind, "rows": list(rows), "slice": part, "metric": key, "value": value}
        self.found.append(entry | ({"limit": limit.to_dict(value)} if limit else {}))


def compare(
    scores: Mapping[str, RowScores],
    parts: Mapping[str, IntArray],
    cheap: str | None = None,
    *,
    draws: int = DRAWS,
) -> list[dict[str, Any]]:
    """What fusion adds, what `adaptive` keeps and saves, each with a paired bootstrap interval, and the limits of those
    that have one.

    The best scheme is the fixed row of the highest mean quality over everything (CIDEr-D without a task score).

    Args:
        scores: Of every row.
        parts: Items of each slice; see `scores.slices`.
        cheap: The row that takes the cheapest scheme for every input.
    """
    table = _Table(scores, parts, draws)
    everything = all_together(parts)
    table.add("difference", (gated().name, NATIVE), everything, "cider", Limit(0))
    table.add("difference", (gated().name, NATIVE), "reading", "reading", Limit(0))
    for share in RATIOS:
        for part, key in (("dense", "quality"), ("reading", "reading")):
            table.add("difference", (gated(share).name, weighted(share).name), part, key, Limit(0, beyond=0))
    for share in RATIOS[1:]:
        for part, key in (("dense", "quality"), ("reading", "reading")):
            rows = gated(share).name, native(share).name, NATIVE
            table.add("difference", rows[1:], part, key)
            table.add("difference", rows[:2], part, key)
            lost = table.mean(NATIVE, part, key) - table.mean(rows[1], part, key) if rows[1] in scores else 0.0
            asked = part == "dense" and (share == min(RATIOS) or lost >= NOTABLE_LOSS)
            table.add("won back", rows, part, key, Limit(WON_BACK, beyond=0) if asked else None)
    if ADAPTIVE in scores:
        _compare_adaptive(table, everything, cheap)
    return table.found


def _compare_adaptive(table: _Table, everything: str, cheap: str | None) -> None:
    fixed = [row for row, own in table.scores.items() if own.timed and row != ADAPTIVE]
    if not fixed:
        return
    worth = "quality" if np.isfinite(table.mean(fixed[0], everything, "quality")) else "cider"
    best = max(fixed, key=lambda row: table.mean(row, everything, worth))
    kept, saved = Limit(KEPT), Limit(SAVED, at_least=False)
    for row in dict.fromkeys((best, NATIVE)):
        limited = row == best
        table.add("ratio", (ADAPTIVE, row), everything, "quality")
        table.add("ratio", (ADAPTIVE, row), everything, "cider", kept if limited else None)
        table.add("ratio", (ADAPTIVE, row), "reading", "reading", kept if limited else None)
        for key in ("ttft_ms", "visual_tokens"):
            table.add("ratio", (ADAPTIVE, row), everything, key, saved if limited else None)
        table.add("ratio", (ADAPTIVE, row), everything, "latency_ms")
        match = Limit(1, group="matching") if limited else None
        table.add("ratio", (ADAPTIVE, row), everything, "matching", match)
    if cheap is not None:
        table.add("ratio", (ADAPTIVE, cheap), everything, "matching", Limit(MATCHING_GAIN, group="matching"))
        table.add("ratio", (ADAPTIVE, cheap), everything, "quality")


def shortfalls(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every limit that is not kept for sure, in words; of a group only if none of it is kept."""
    limited = [entry for entry in comparisons if "limit" in entry]
    kept = {entry["limit"]["group"] for entry in limited if entry["limit"]["holds"] == "yes"} - {None}
    return [
        f"{describe(entry)}, {entry['slice']} {entry['metric']}: {_value(entry['value'])}, must be {limit['text']}"
        + (" (the interval reaches it)" if limit["holds"] == "unsure" else "")
        for entry in limited
        if (limit := entry["limit"])["holds"] != "yes" and limit["group"] not in kept
    ]


def describe(entry: Mapping[str, Any]) -> str:
    """What a comparison compares."""
    a, b, *rest = entry["rows"]
    if rest:
        return f"({a} - {b}) / ({rest[0]} - {b})"
    return f"{a} {'-' if entry['kind'] == 'difference' else '/'} {b}"


def ratio(a: FloatArray, b: FloatArray, draws: int) -> dict[str, float] | None:
    """mean(a) / mean(b), paired; None where there is none to speak of: the mean of b is 0 in the sample or a
    resample."""
    if not len(a):
        return None
    try:
        return as_dict(bootstrap_ratio(a, b, seed=SEED, n=draws))
    except ConfigError:
        return None


def as_dict(interval: Interval) -> dict[str, float]:
    """An interval as plain values."""
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _value(value: Mapping[str, float] | None) -> str:
    return "no value" if value is None else f"{value['mean']:.3f} ({value['low']:.3f}..{value['high']:.3f})"
