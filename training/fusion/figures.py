"""What distilled fusion modules win back: means, paired differences and shares won back, and the table of them.

Knows scores by row. Must not know of models or of how anything was trained.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_fusion.evaluation.statistics import Interval, bootstrap_diff, bootstrap_mean, won_back

RATIOS = (1.0, 0.5, 0.25)


def summarise(found: Mapping[str, Mapping[str, Sequence[float]]], parts: Sequence[str]) -> list[dict[str, Any]]:
    """One record per slice, metric and ratio: means, differences, shares won back, with paired intervals."""
    records = []
    slices = np.array(parts)
    for part in dict.fromkeys(parts):
        at = np.flatnonzero(slices == part)
        for metric in ("quality", "token_accuracy"):
            values = {row: np.asarray(columns[metric])[at] for row, columns in found.items()}
            full = values["average@1"]
            for ratio in RATIOS:
                average = values[f"average@{ratio:g}"]
                record: dict[str, Any] = {"slice": part, "metric": metric, "ratio": ratio, "n": len(at)}
                record |= {"full": mean(full), "average": mean(average), "lost": plain(diff(full, average))}
                for name in ("weighted", "gated"):
                    own = values[f"{name}@{ratio:g}"]
                    record[name] = mean(own)
                    record[f"{name} gains"] = plain(diff(own, average))
                    record[f"{name} won back"] = plain(won_back(full, average, own, seed=0))
                    beyond = (own - average) - (full - average) / 3
                    record[f"{name} beyond a third"] = plain(bootstrap_mean(beyond, seed=0))
                record["gated over weighted"] = plain(diff(values[f"gated@{ratio:g}"], values[f"weighted@{ratio:g}"]))
                records.append(record)
    return records


def mean(values: Any) -> float:
    return float(np.mean(values))


def diff(a: Any, b: Any) -> Interval:
    return bootstrap_diff(a, b, seed=0)


def plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {"mean": interval.mean, "low": interval.low, "high": interval.high}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as text; [low to high] is a 95 % interval."""

    def span(found: Mapping[str, float] | None, percent: bool = False) -> str:
        if found is None:
            return "-"
        form = "{:.0%} [{:.0%} to {:.0%}]" if percent else "{:+.3f} [{:+.3f} to {:+.3f}]"
        return form.format(found["mean"], found["low"], found["high"])

    head = ("slice", "metric", "ratio", "full", "average", "weighted", "gated")
    head += ("weighted won back", "gated won back", "gated over weighted")
    rows = [head, tuple("---" for _ in head)]
    for r in records:
        rows.append(
            (
                r["slice"],
                r["metric"],
                f"{r['ratio']:g}",
                *(f"{r[name]:.3f}" for name in ("full", "average", "weighted", "gated")),
                *(span(r[f"{name} won back"], percent=True) for name in ("weighted", "gated")),
                span(r["gated over weighted"]),
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
