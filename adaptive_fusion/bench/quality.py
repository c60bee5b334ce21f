"""What each operating point is worth and what it takes: scores and times of every row, per slice, with intervals.

Knows per-question scores. Must not know how a table is drawn. No figure here is anything but measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptive_fusion.bench.answers import NATIVE, Decide, answer_all
from adaptive_fusion.bench.comparisons import DRAWS, SEED, as_dict, compare, ratio, shortfalls
from adaptive_fusion.bench.scores import COUNTS, QUALITIES, STAGES, IntArray, RowScores, all_together, score_all, slices
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.statistics import bootstrap, bootstrap_mean
from adaptive_fusion.evaluation.text import bleu4, bleu_statistics
from adaptive_fusion.models import Adapter
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, silent


def evaluate(
    adapter: Adapter,
    questions: Sequence[Question],
    rows: Mapping[str, Rung],
    decide: Decide | None = None,
    *,
    cheap: str | None = None,
    max_new_tokens: int = 160,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Everything: answers, tables per slice, paired comparisons and the Pareto front, as plain values; and the
    questions that failed.

    Args:
        decide: See `answer_all`.
        cheap: Name of the row that takes the cheapest scheme for every input.
        progress: See `answer_all`.

    Raises:
        AdaptiveFusionError: If the metrics' optional dependency is missing; before anything is run.
    """
    bleu_statistics([["a"]], [[["a"]]])
    answered = answer_all(adapter, questions, rows, decide, max_new_tokens=max_new_tokens, progress=progress)
    scores = score_all(answered.questions, answered.answers)
    parts = slices(answered.questions)
    tables = summarise(scores, parts)
    everything = all_together(parts)
    comparisons = compare(scores, parts, cheap)
    return {
        "rows": {name: rung.to_dict() for name, rung in rows.items()},
        "failed": [{"input": name, "error": reason} for name, reason in answered.failed],
        "cheap": cheap,
        "slices": tables,
        "comparisons": comparisons,
        "shortfalls": shortfalls(comparisons),
        "pareto_slice": everything,
        "pareto": pareto_front(tables[everything]),
    }


def summarise(
    scores: Mapping[str, RowScores], parts: Mapping[str, IntArray], *, draws: int = DRAWS
) -> dict[str, list[dict[str, Any]]]:
    """For each slice one record per row; qualities as {mean, low, high}, times as {median, p95, mean}, counts and GiB
    as means."""
    return {name: [_record(row, scores, chosen, draws) for row in scores] for name, chosen in parts.items()}


def _record(row: str, scores: Mapping[str, RowScores], chosen: IntArray, draws: int) -> dict[str, Any]:
    own = scores[row]
    record: dict[str, Any] = {"row": row, "n": len(chosen)}
    for key in QUALITIES:
        values = own.take(key, chosen)
        record[key] = as_dict(bootstrap_mean(values, seed=SEED, n=draws)) if len(values) else None
    statistics = own.bleu[chosen]
    record["bleu4"] = as_dict(bootstrap(lambda at: bleu4(statistics[at]), len(chosen), seed=SEED, n=draws))
    if NATIVE in scores and row != NATIVE:
        record["kept"] = {
            key: ratio(own.take(key, chosen), scores[NATIVE].take(key, chosen), draws)
            for key in ("quality", "cider", "token_accuracy")
        }
    if own.timed:
        for key in STAGES:
            values = own.take(key, chosen)
            record[key] = {
                "median": float(np.median(values)),
                "p95": float(np.quantile(values, 0.95)),
                "mean": float(values.mean()),
            }
        for key in COUNTS:
            record[key] = float(own.take(key, chosen).mean())
    return record


def pareto_front(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that no other row beats in both mean TTFT and quality (CIDEr-D without a task score), cheapest first."""
    timed = [(r["ttft_ms"]["mean"], (r["quality"] or r["cider"])["mean"], r["row"]) for r in records if "ttft_ms" in r]
    front: list[str] = []
    best = -np.inf
    for _, worth, row in sorted(timed, key=lambda entry: (entry[0], -entry[1])):
        if worth > best:
            front.append(row)
            best = worth
    return front
