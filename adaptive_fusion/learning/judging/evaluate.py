"""Policies on labelled inputs, beside the baselines: what they keep, what they cost, where they fail.

Knows policies, labelled data and the figures of `curve`. Must not know how a policy was fitted, and runs no
model.

Routing is judged on stills, between the two arms of `arms`. The baselines are a random router; the entropy of
the grey values as the score, at any threshold and at its median (routing by an entropy threshold, as ERASE
does); the best single rung for everything within the policy's cost; and the oracle, which knows what the strong
arm adds to each request. The figures of the whole traffic, clips included, are against the native point.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.data.dataset import NATIVE_NAME, BoolArray, Dataset, FloatArray
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.judging.arms import arm_names, goes_on, judges, policy_arms, scores, sure, two_arms
from adaptive_fusion.learning.judging.compare import Requests, best_static, compare
from adaptive_fusion.learning.judging.curve import Arms, Curve, calibration_error
from adaptive_fusion.learning.judging.offpolicy import OffPolicyValue, off_policy
from adaptive_fusion.policy.policy import COMPLEX, VIDEO, Policy
from adaptive_fusion.policy.rungs import Rung

ENTROPY = "grey_entropy"
THIRDS = {
    "size": ("log_pixels", ("small", "medium", "large")),
    "text_density": ("strokes", ("little text", "some text", "much text")),
}
"""Slicings made from a feature, by thirds of the data, where the labels do not name them."""
MIN_SLICE = 20
"""Slices of fewer requests are left out: their mean says nothing."""


@dataclass(frozen=True)
class PolicyReport:
    """One policy on one set of labelled stills.

    Attributes:
        policy: Its name.
        rows: How many stills were judged.
        arms: Names of the cheap and the strong rung.
        figures: On stills, those of `compare` against the strong arm, and ``accuracy``, ``calibration_error``,
            ``cheap_quality``, ``strong_quality``; each with its bootstrap interval over contents.
        static: Name of the best rung that costs no more than the policy, if it were used for all stills.
        traffic: Those of `compare` on all inputs against the native point, clips included, each at the first
            rung of its lane; and ``native_quality``, ``native_cost``. Needs clips or the cost of ``native@1``.
        traffic_rows: How many inputs those are.
        traffic_static: Name of the best rung that costs no more than the policy, if it were used for all.
        slices: By slicing and slice: rows, share of strong calls, quality, quality of the strong arm, and
            what is lost against it; the worst first.
        clips: Rows, quality and cost of clips at the first rung of the video lane, where labelled.
        curves: Cost-quality curve of the policy and of each baseline.
        off_policy: What the policy would have been worth on the logged decisions that were rated, where
            there are any.
        off_policy_note: Why the logged decisions do not tell, where there are some and they do not.
    """

    policy: str
    rows: int
    arms: tuple[str, str]
    figures: Mapping[str, Interval]
    static: str
    traffic: Mapping[str, Interval]
    traffic_rows: int
    traffic_static: str
    slices: Mapping[str, Mapping[str, Mapping[str, float]]]
    clips: Mapping[str, float]
    curves: Mapping[str, Curve] = field(repr=False)
    off_policy: OffPolicyValue | None = None
    off_policy_note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; the policy's curve at up to 101 shares of strong calls."""
        curve = self.curves["policy"]
        some = np.unique(np.linspace(0, len(curve.share) - 1, min(101, len(curve.share))).astype(int))
        parts = ("share", "quality", "cost")
        return {
            "policy": self.policy,
            "rows": self.rows,
            "cheap": self.arms[0],
            "strong": self.arms[1],
            "figures": {name: _plain(asdict(value)) for name, value in self.figures.items()},
            "static": self.static,
            "traffic": {
                "rows": self.traffic_rows,
                "static": self.traffic_static,
                "figures": {name: _plain(asdict(value)) for name, value in self.traffic.items()},
            },
            "slices": {name: {k: dict(v) for k, v in table.items()} for name, table in self.slices.items()},
            "clips": dict(self.clips),
            "curve": {part: getattr(curve, part)[some].tolist() for part in parts},
            "off_policy": None if self.off_policy is None else self.off_policy.to_dict(),
            "off_policy_note": self.off_policy_note,
        }


def evaluate(
    policies: Sequence[str | Path | Policy],
    logs: Iterable[str | Path],
    *,
    tolerance: float = 0.02,
    split: str | None = None,
    plot: str | Path | None = None,
    seed: int = 0,
    n: int = 500,
    allow_pickle: bool = False,
) -> list[PolicyReport]:
    """Judge policies on the trusted labels of some logs, or on all labels of those with too few (see `judges`).

    Args:
        policies: Names, paths or policies.
        logs: See `log_files`.
        tolerance: Loss of quality up to which the cheap lane is good enough.
        split: Only this split (see `Dataset.split`): ``test`` if the policies were trained on these very
            logs.
        plot: PNG of the cost-quality curves to write.
        seed: Of the split and the bootstrap.
        n: Resamples.
        allow_pickle: See `Policy.load`.

    Raises:
        PolicyError: For a policy that cannot be loaded.
        ConfigError: If the logs hold no label that judges one of the policies.
    """
    loaded = [p if isinstance(p, Policy) else Policy.load(p, allow_pickle=allow_pickle) for p in policies]
    if not loaded:
        raise ConfigError("no policy to evaluate; expected at least one")
    ladders = [ladder for policy in loaded for ladder in (*policy.lanes.values(), (policy.cheap_rung,))]
    rungs = list(dict.fromkeys(rung.name for ladder in ladders for rung in ladder))
    data = build_dataset(logs, cheap=arm_names(loaded[0])[0], rungs=rungs, tolerance=tolerance, all_rungs=True)
    if split is not None:
        data = data.take(data.split(split, seed))
    judged = data.take(judges(data))
    decided = np.isfinite(data.propensity) & (data.taken >= 0)
    reports = []
    for policy in loaded:
        report = evaluate_policy(policy, judged, seed=seed, n=n)
        if decided.any():
            try:
                report = replace(report, off_policy=off_policy(policy, data, seed=seed, n=n))
            except ConfigError as error:  # the other figures stand
                report = replace(report, off_policy_note=str(error))
        reports.append(report)
    if plot is not None:
        from adaptive_fusion.learning.judging.drawing import plot_curves

        plot_curves(reports, plot)
    return reports


def evaluate_policy(policy: Policy, data: Dataset, *, seed: int = 0, n: int = 500) -> PolicyReport:
    """Judge one policy on all rows of `data`, without the off-policy part; see `evaluate`.

    Raises:
        ConfigError: If no row judges a choice between the policy's arms.
    """
    cheap, strong = arm_names(policy)
    arms, y, rows = policy_arms(policy, data)
    stills = data.take(rows)
    p = scores(policy, stills)
    to_strong = p >= policy.threshold
    spent = float(arms.routed(to_strong)[1].mean())
    single, _, _ = two_arms(data, cheap, strong)
    offers = {cheap: (single.cheap, single.cheap_cost), strong: (single.strong, single.strong_cost)}
    static, statics = best_static(stills, offers, spent)
    requests = Requests(arms, p, to_strong, _entropy(stills), arms.strong, arms.strong_cost, statics)

    def more(weight: FloatArray) -> dict[str, float]:
        return {
            "accuracy": float(np.average(to_strong == (y > 0.5), weights=weight)),
            "calibration_error": calibration_error(p, y, weight),
            "cheap_quality": float(np.average(single.cheap, weights=weight)),
            "strong_quality": float(np.average(arms.strong, weights=weight)),
        }

    figures, curves = compare(requests, more, seed=seed, n=n)
    traffic, traffic_rows, traffic_static = _traffic(policy, data, seed, n)
    return PolicyReport(
        policy=policy.name,
        rows=len(p),
        arms=(cheap, strong),
        figures=figures,
        static=static,
        traffic=traffic,
        traffic_rows=traffic_rows,
        traffic_static=traffic_static,
        slices=_slices(stills, arms, to_strong, requests.quality),
        clips=_clips(policy, data),
        curves=curves,
    )


def _entropy(data: Dataset) -> FloatArray:
    entropy = data.columns([ENTROPY])[:, 0]
    return np.where(np.isfinite(entropy), entropy, 0.0)


def _traffic(policy: Policy, data: Dataset, seed: int, n: int) -> tuple[dict[str, Interval], int, str]:
    """Figures of all inputs against the native point, how many inputs, and the best static rung.

    The arms of a clip are the first rung of its lane and the native point; the policy never sends it to the
    latter, so clips come last in the order of its score.
    """
    native, native_cost = data.reference, _column(data, data.cost, NATIVE_NAME)
    if not data.video.any() and not np.isfinite(native_cost).any():
        return {}, 0, ""  # stills without native's cost: nothing beyond the other figures

    def offer(rung: Rung) -> tuple[FloatArray, FloatArray]:
        worth, spent = _column(data, data.quality, rung.name), _column(data, data.cost, rung.name)
        if not rung.is_full:
            return worth, spent
        return np.where(np.isnan(worth), native, worth), np.where(np.isnan(spent), native_cost, spent)

    first = (policy.cheap_rung, policy.lanes[VIDEO][0], policy.lanes[COMPLEX][0])
    (low, low_cost), (clip, clip_cost), (high, high_cost) = map(offer, first)
    unsure = goes_on(policy, data, first[0].name) & ~sure(policy, data)
    low, low_cost = np.where(unsure, high, low), np.where(unsure, low_cost + high_cost, low_cost)
    low, low_cost = np.where(data.video, clip, low), np.where(data.video, clip_cost, low_cost)
    high, high_cost = np.where(data.video, native, high), np.where(data.video, native_cost, high_cost)
    rows = np.isfinite(low) & np.isfinite(high) & np.isfinite(native)
    if not rows.any():
        return {}, 0, ""
    priced = bool(np.isfinite(low_cost[rows]).all() and np.isfinite(high_cost[rows]).all())
    if not priced:
        low_cost, high_cost = np.zeros(len(data)), np.ones(len(data))
    some = data.take(rows)
    arms = Arms(low[rows], high[rows], low_cost[rows], high_cost[rows], some.group)
    score = np.where(some.video, -1.0, scores(policy, some))
    to_strong = score >= policy.threshold
    spent = float(arms.routed(to_strong)[1].mean())
    static, statics = best_static(some, {}, spent)
    reference_cost = native_cost[rows] if priced else arms.strong_cost
    requests = Requests(arms, score, to_strong, _entropy(some), some.reference, reference_cost, statics)

    def more(weight: FloatArray) -> dict[str, float]:
        native = {"native_quality": requests.reference, "native_cost": requests.reference_cost}
        return {name: float(np.average(values, weights=weight)) for name, values in native.items()}

    return compare(requests, more, seed=seed, n=n)[0], int(rows.sum()), static


def _column(data: Dataset, table: FloatArray, rung: str) -> FloatArray:
    return table[:, data.rungs.index(rung)] if rung in data.rungs else np.full(len(data), np.nan)


def _slices(
    data: Dataset, arms: Arms, to_strong: BoolArray, quality: FloatArray
) -> dict[str, dict[str, dict[str, float]]]:
    out: dict[str, dict[str, dict[str, float]]] = {}
    slicings = dict(data.slices)
    for slicing, (feature, thirds) in THIRDS.items():
        values = data.columns([feature])[:, 0]
        if slicing not in slicings and np.isfinite(values).any() and np.nanmin(values) < np.nanmax(values):
            codes = np.searchsorted(np.nanquantile(values, [1 / 3, 2 / 3]), values, side="left")
            slicings[slicing] = (codes.astype(np.int64), thirds)
    for slicing, (codes, names) in slicings.items():
        table = {}
        for code, name in enumerate(names):
            rows = codes == code
            if rows.sum() < MIN_SLICE:
                continue
            table[name or "other"] = {
                "rows": int(rows.sum()),
                "strong_share": float(to_strong[rows].mean()),
                "quality": float(quality[rows].mean()),
                "strong_quality": float(arms.strong[rows].mean()),
                "lost": float((arms.strong - quality)[rows].mean()),
            }
        if table:
            out[slicing] = dict(sorted(table.items(), key=lambda item: -item[1]["lost"]))
    return out


def _clips(policy: Policy, data: Dataset) -> dict[str, float]:
    name = policy.lanes[VIDEO][0].name
    if name not in data.rungs:
        return {}
    quality, cost = (table[:, data.rungs.index(name)] for table in (data.quality, data.cost))
    rows = data.video & np.isfinite(quality)
    if not rows.any():
        return {}
    found = {"rows": int(rows.sum()), "quality": float(quality[rows].mean())}
    return found | ({"cost": float(cost[rows].mean())} if np.isfinite(cost[rows]).all() else {})


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}
