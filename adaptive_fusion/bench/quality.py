"""What each operating point is worth and what it takes: scores and times of every row, per slice, with intervals.

Knows answers and metrics. Must not know how a table is drawn. No figure here is anything but measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_fusion.bench.answers import ADAPTIVE, NATIVE, RATIOS, Answer, Decide, answer_all, gated, native, weighted
from adaptive_fusion.bench.scenes import Item
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.ladder import Rung
from adaptive_fusion.learning.cider import cider_d
from adaptive_fusion.learning.metrics import (
    Interval,
    bleu4,
    bleu_statistics,
    bootstrap,
    bootstrap_diff,
    bootstrap_mean,
    bootstrap_ratio,
    matching_accuracy,
    tokenize,
)
from adaptive_fusion.models import Adapter

FloatArray = npt.NDArray[np.float64]

DRAWS = 1000
STAGES = ("preprocess_ms", "encode_ms", "prefill_ms", "decode_ms", "ttft_ms", "latency_ms")
MIXED = "mixed"


def evaluate(
    adapter: Adapter,
    items: Sequence[Item],
    rows: Mapping[str, Rung],
    decide: Decide | None = None,
    *,
    max_new_tokens: int = 160,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Everything: answers, tables per slice, paired comparisons and the Pareto front, as plain values.

    Raises:
        AdaptiveFusionError: If the metrics' optional dependency is missing; before anything is run.
    """
    bleu_statistics([["a"]], [[["a"]]])
    answers = answer_all(adapter, items, rows, decide, max_new_tokens=max_new_tokens, advance=advance)
    scores = score_all(items, answers)
    tables = summarise(items, scores)
    everything = MIXED if MIXED in tables else next(iter(tables))
    return {
        "rows": {name: rung.to_dict() for name, rung in rows.items()},
        "slices": tables,
        "comparisons": compare(items, scores),
        "pareto_slice": everything,
        "pareto": pareto_front(tables[everything]),
    }


@dataclass(frozen=True)
class Scores:
    """Per-item columns of one row, each ``[items]`` (NaN where a metric does not apply), and BLEU's statistics."""

    columns: dict[str, FloatArray]
    bleu: npt.NDArray[np.int64]
    timed: bool

    def take(self, name: str, chosen: npt.NDArray[np.int64]) -> FloatArray:
        """The chosen items' values that apply."""
        values = self.columns[name][chosen]
        return values[~np.isnan(values)]


def score_all(items: Sequence[Item], answers: Mapping[str, Sequence[Answer]]) -> dict[str, Scores]:
    """Quality, CIDEr-D, matching, token accuracy and measurements of every row, per item.

    CIDEr-D takes its document frequencies from all references of the evaluation set.
    """
    references = [[tokenize(text) for text in item.references] for item in items]
    return {name: _scores(items, references, row) for name, row in answers.items()}


def _scores(items: Sequence[Item], references: Sequence[Sequence[list[str]]], answers: Sequence[Answer]) -> Scores:
    texts = [tokenize(answer.text) for answer in answers]
    columns: dict[str, FloatArray] = {
        "quality": _column(
            i.score(a.text, i.references) if i.score else None for i, a in zip(items, answers, strict=True)
        ),
        "exact": _column(float(a.text.strip() in i.references) for i, a in zip(items, answers, strict=True)),
        "cider": cider_d(texts, references),
        "matching": _column(_matched(item, answer.likelihoods) for item, answer in zip(items, answers, strict=True)),
        "token_accuracy": _column(answer.token_accuracy for answer in answers),
    }
    measured = [answer.measurement for answer in answers]
    timed = all(m is not None for m in measured)
    for key in (*STAGES, "visual_tokens", "patches", "new_tokens", "peak_memory_gb"):
        columns[key] = _column(None if m is None else float(getattr(m, key)) for m in measured)
    return Scores(columns, bleu_statistics(texts, references), timed)


def _matched(item: Item, likelihoods: Sequence[float]) -> float | None:
    if not item.negatives:
        return None
    if not likelihoods:  # nobody looked: a guess among the candidates
        return 1.0 / (1 + len(item.negatives))
    return float(matching_accuracy([likelihoods])[0])


def _column(values: Any) -> FloatArray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def summarise(
    items: Sequence[Item], scores: Mapping[str, Scores], *, seed: int = 0, draws: int = DRAWS
) -> dict[str, list[dict[str, Any]]]:
    """For each slice (and `mixed`, all items) one record per row; qualities as {mean, low, high}."""
    return {
        name: [_record(row, scores, chosen, seed, draws) for row in scores] for name, chosen in slices(items).items()
    }


def slices(items: Sequence[Item]) -> dict[str, npt.NDArray[np.int64]]:
    """Indices of each slice's items; `mixed` is all of them where there are several slices."""
    names = list(dict.fromkeys(item.slice for item in items))
    found = {name: np.array([i for i, item in enumerate(items) if item.slice == name]) for name in names}
    return found if len(names) == 1 else {**found, MIXED: np.arange(len(items))}


def _record(
    row: str, scores: Mapping[str, Scores], chosen: npt.NDArray[np.int64], seed: int, draws: int
) -> dict[str, Any]:
    own = scores[row]
    record: dict[str, Any] = {"row": row, "n": len(chosen)}
    for key in ("quality", "exact", "cider", "matching", "token_accuracy"):
        values = own.take(key, chosen)
        record[key] = _dict(bootstrap_mean(values, seed=seed, n=draws)) if len(values) else None
    statistics = own.bleu[chosen]
    record["bleu4"] = _dict(bootstrap(lambda at: bleu4(statistics[at]), len(chosen), seed=seed, n=draws))
    if NATIVE in scores and row != NATIVE:
        record["kept"] = {
            key: _ratio(own.take(key, chosen), scores[NATIVE].take(key, chosen), seed, draws)
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
        for key in ("visual_tokens", "patches", "new_tokens", "peak_memory_gb"):
            record[key] = float(own.take(key, chosen).mean())
    return record


def compare(
    items: Sequence[Item], scores: Mapping[str, Scores], *, seed: int = 0, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """Paired comparisons between rows with bootstrap intervals: what fusion adds, and what `adaptive` keeps
    and saves.

    `best` is the fixed row of the highest mean quality (CIDEr-D without a task score), `cheapest` the one of
    the lowest mean TTFT.
    """
    parts = slices(items)
    everything = MIXED if MIXED in parts else next(iter(parts))
    found: list[dict[str, Any]] = []

    def add(kind: str, a: str, b: str, part: str, key: str) -> None:
        if a not in scores or b not in scores or part not in parts:
            return
        first, second = (scores[row].take(key, parts[part]) for row in (a, b))
        if len(first) and len(first) == len(second):
            value = (
                _ratio(first, second, seed, draws)
                if kind == "ratio"
                else _dict(bootstrap_diff(first, second, seed=seed, n=draws))
            )
            found.append({"kind": kind, "a": a, "b": b, "slice": part, "metric": key, "value": value})

    add("difference", gated().name, NATIVE, everything, "cider")
    add("difference", gated().name, NATIVE, "reading", "quality")
    for ratio in RATIOS:
        for part in ("dense", "reading"):
            add("difference", gated(ratio).name, weighted(ratio).name, part, "quality")
            if ratio != 1:
                add("difference", native(ratio).name, NATIVE, part, "quality")
                add("difference", gated(ratio).name, native(ratio).name, part, "quality")
    fixed = [row for row, own in scores.items() if own.timed and row != ADAPTIVE]
    if ADAPTIVE in scores and fixed:
        worth = "quality" if len(scores[fixed[0]].take("quality", parts[everything])) else "cider"
        best = max(fixed, key=lambda row: scores[row].take(worth, parts[everything]).mean())
        cheapest = min(fixed, key=lambda row: scores[row].columns["ttft_ms"].mean())
        for row in dict.fromkeys((best, NATIVE)):
            for key in ("quality", "cider", "matching", "ttft_ms", "latency_ms", "visual_tokens"):
                add("ratio", ADAPTIVE, row, everything, key)
            add("ratio", ADAPTIVE, row, "reading", "quality")
        add("ratio", ADAPTIVE, cheapest, everything, "matching")
    return found


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


def _ratio(a: FloatArray, b: FloatArray, seed: int, draws: int) -> dict[str, float] | None:
    if not len(a):
        return None
    try:
        return _dict(bootstrap_ratio(a, b, seed=seed, n=draws))
    except ConfigError:  # the baseline is 0 in the sample or a resample: there is no ratio to speak of
        return None


def _dict(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
