"""Policies on labelled inputs, beside the baselines: what they keep, what they cost, where they fail.

Knows policies, labelled data and the figures of `curve`. Must not know how a policy was fitted, and runs no
model.

A policy routes stills between two arms: the first rung of its cheap lane and the first of its strong lane.
Where labels carry no quality of the strong rung the native reference stands for it; where they carry no
quality at all (a person's "simple" or "complex") the cheap arm is worth 1 on a simple input, 0 on a complex
one, and the strong arm 1. Without costs the strong arm costs 1 and the cheap arm 0, so that cost is the share
of strong calls.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.learning.curve import Arms, Curve, Router, calibration_error, intervals
from adaptive_fusion.learning.dataset import Dataset, FloatArray, build_dataset
from adaptive_fusion.learning.metrics import Interval
from adaptive_fusion.policy import COMPLEX, SIMPLE, VIDEO, Policy

ENTROPY = "grey_entropy"
THIRDS = {
    "size": ("log_pixels", ("small", "medium", "large")),
    "text_density": ("strokes", ("little text", "some text", "much text")),
}
"""Slicings made from a feature, by thirds of the data, where the labels do not name them."""
MIN_SLICE = 20
"""Slices of fewer requests are left out: their mean says nothing."""


@dataclass(frozen=True)
class Report:
    """One policy on one set of labelled stills.

    Attributes:
        policy: Its name.
        rows: How many stills were judged.
        arms: Names of the cheap and the strong rung.
        figures: Each with its bootstrap interval over contents. ``quality`` and ``cost`` are means at the
            policy's threshold, ``kept`` the quality as a share of the strong arm's; ``gap_closed`` is the
            share of the APGR between the random router and the oracle; ``entropy_...``, ``static_...``,
            ``oracle_...`` and ``random_...`` are the baselines; ``over_X`` is the quality above baseline X at
            the policy's own cost.
        static: Name of the best rung that costs no more than the policy, if it were used for all.
        slices: By slicing and slice: rows, share of strong calls, quality, quality of the strong arm, and
            what is lost against it; the worst first.
        clips: Rows, quality and cost of clips at the first rung of the video lane, where labelled.
        curves: Cost-quality curve of the policy and of each baseline.
    """

    policy: str
    rows: int
    arms: tuple[str, str]
    figures: Mapping[str, Interval]
    static: str
    slices: Mapping[str, Mapping[str, Mapping[str, float]]]
    clips: Mapping[str, float]
    curves: Mapping[str, Curve] = field(repr=False)

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
            "slices": {name: {k: dict(v) for k, v in table.items()} for name, table in self.slices.items()},
            "clips": dict(self.clips),
            "curve": {part: getattr(curve, part)[some].tolist() for part in parts},
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
) -> list[Report]:
    """Judge policies on the trusted labels of some logs.

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
    rungs = list(dict.fromkeys(r.name for p in loaded for ladder in p.lanes.values() for r in ladder))
    data = build_dataset(logs, cheap=arm_names(loaded[0])[0], rungs=rungs, tolerance=tolerance)
    rows = data.trusted() & (data.split(split, seed) if split else True)
    reports = [evaluate_policy(policy, data.take(rows), seed=seed, n=n) for policy in loaded]
    if plot is not None:
        plot_curves(reports, plot)
    return reports


def arm_names(policy: Policy) -> tuple[str, str]:
    """Names of the cheap and the strong rung of a policy."""
    return policy.lanes[SIMPLE][0].name, policy.lanes[COMPLEX][0].name


def scores(policy: Policy, data: Dataset) -> FloatArray:
    """P(complex) of each row, ``[n]``."""
    return policy.router.p_complex_batch(data.columns(policy.router.inputs.names))


def two_arms(data: Dataset, cheap: str, strong: str) -> tuple[Arms, FloatArray, npt.NDArray[np.bool_]]:
    """The arms and the routing label of the stills that judge a choice between two rungs, and which rows
    those are.

    Raises:
        ConfigError: If there is none.
    """
    y = data.loses(cheap)

    def of(table: FloatArray, rung: str) -> FloatArray:
        return table[:, data.rungs.index(rung)] if rung in data.rungs else np.full(len(data), np.nan)

    weak, best = of(data.quality, cheap), of(data.quality, strong)
    best = np.where(np.isfinite(best), best, data.reference)
    said = ~(np.isfinite(weak) & np.isfinite(best))
    weak, best = np.where(said, 1 - y, weak), np.where(said, 1.0, best)
    low, high = of(data.cost, cheap), of(data.cost, strong)
    rows = np.isfinite(weak) & np.isfinite(best) & np.isfinite(y) & ~data.video
    if not rows.any():
        raise ConfigError(f"no label says what the rung {cheap!r} keeps; label inputs at the policy's own rungs")
    priced = bool(np.isfinite(low[rows]).all() and np.isfinite(high[rows]).all())
    low, high = (low, high) if priced else (np.zeros(len(data)), np.ones(len(data)))
    arms = Arms(weak[rows], best[rows], low[rows], high[rows], data.group[rows])
    return arms, y[rows], rows


def evaluate_policy(policy: Policy, data: Dataset, *, seed: int = 0, n: int = 500) -> Report:
    """Judge one policy on all rows of `data`; see `evaluate`."""
    cheap, strong = arm_names(policy)
    arms, y, rows = two_arms(data, cheap, strong)
    stills = data.take(rows)
    p = scores(policy, stills)
    goes = p >= policy.threshold
    entropy = stills.columns([ENTROPY])[:, 0]
    entropy = np.where(np.isfinite(entropy), entropy, 0.0)
    by_entropy = entropy > np.median(entropy)
    routers = {
        "policy": Router(p, arms),
        "entropy": Router(entropy, arms),
        "oracle": Router(arms.gain, arms),
        "random": Router(np.zeros(len(p)), arms),
    }
    quality, cost = _taken(arms, goes)
    static, statics = _static(stills, arms, cheap, strong, float(cost.mean()))
    entropy_quality, entropy_cost = _taken(arms, by_entropy)

    def statistics(weight: FloatArray) -> dict[str, float]:
        def mean(values: FloatArray) -> float:
            return float(np.average(values, weights=weight))

        curves = {name: router.curve(weight) for name, router in routers.items()}
        kept, spent = mean(quality), mean(cost)
        apgr, oracle = curves["policy"].apgr, curves["oracle"].apgr
        strong_quality = mean(arms.strong)
        return {
            "quality": kept,
            "kept": kept / strong_quality if strong_quality else np.nan,
            "cost": spent,
            "cost_share": spent / mean(arms.strong_cost),
            "strong_share": mean(goes.astype(float)),
            "accuracy": mean((goes == (y > 0.5)).astype(float)),
            "calibration_error": calibration_error(p, y, weight),
            "apgr": apgr,
            "cpt_50": curves["policy"].cpt(0.5),
            "cpt_80": curves["policy"].cpt(0.8),
            "gap_closed": (apgr - 0.5) / (oracle - 0.5) if oracle != 0.5 else np.nan,
            "cheap_quality": mean(arms.cheap),
            "strong_quality": strong_quality,
            "random_apgr": curves["random"].apgr,
            "entropy_apgr": curves["entropy"].apgr,
            "oracle_apgr": oracle,
            "entropy_quality": mean(entropy_quality),
            "entropy_cost": mean(entropy_cost),
            "static_quality": mean(statics),
            "oracle_quality": at_cost(curves["oracle"], spent),
            "over_random": kept - at_cost(curves["random"], spent),
            "over_entropy": kept - at_cost(curves["entropy"], spent),
            "over_static": kept - mean(statics),
        }

    return Report(
        policy=policy.name,
        rows=len(p),
        arms=(cheap, strong),
        figures=intervals(statistics, arms.group, seed=seed, n=n),
        static=static,
        slices=_slices(stills, arms, goes, quality),
        clips=_clips(policy, data),
        curves={name: router.curve() for name, router in routers.items()},
    )


def _taken(arms: Arms, goes: npt.NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    return np.where(goes, arms.strong, arms.cheap), np.where(goes, arms.strong_cost, arms.cheap_cost)


def _static(data: Dataset, arms: Arms, cheap: str, strong: str, limit: float) -> tuple[str, FloatArray]:
    """The rung of the best mean quality whose mean cost is within `limit`, and its quality per row."""
    offers = {cheap: (arms.cheap, arms.cheap_cost), strong: (arms.strong, arms.strong_cost)}
    for i, name in enumerate(data.rungs):
        if np.isfinite(data.quality[:, i]).all() and np.isfinite(data.cost[:, i]).all():
            offers.setdefault(name, (data.quality[:, i], data.cost[:, i]))
    fits = {name: offer for name, offer in offers.items() if offer[1].mean() <= limit * (1 + 1e-9)}
    best = max(sorted(fits) or [cheap], key=lambda name: float(offers[name][0].mean()))
    return best, offers[best][0]


def at_cost(curve: Curve, cost: float) -> float:
    """The best quality that the curve offers at this cost or less."""
    within = curve.quality[curve.cost <= cost * (1 + 1e-12)]
    order = np.argsort(curve.cost, kind="stable")
    between = float(np.interp(cost, curve.cost[order], curve.quality[order]))
    return max(between, float(within.max())) if len(within) else between


def _slices(
    data: Dataset, arms: Arms, goes: npt.NDArray[np.bool_], quality: FloatArray
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
                "strong_share": float(goes[rows].mean()),
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


def plot_curves(reports: Sequence[Report], path: str | Path) -> None:
    """Write a PNG of cost against quality: each policy with its threshold, and the baselines of the first.

    Raises:
        AdaptiveFusionError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdaptiveFusionError("a plot needs matplotlib: pip install 'adaptive-fusion[train]'") from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    first = reports[0]
    for name, style in (("random", "k:"), ("entropy", "C7--"), ("oracle", "k-.")):
        axes.plot(first.curves[name].cost, first.curves[name].quality, style, linewidth=1, label=name)
    for index, report in enumerate(reports):
        curve = report.curves["policy"]
        axes.plot(curve.cost, curve.quality, f"C{index}", label=report.policy)
        cost, quality = report.figures["cost"], report.figures["quality"]
        bars = [[quality.mean - quality.low], [quality.high - quality.mean]]
        axes.errorbar([cost.mean], [quality.mean], yerr=bars, fmt=f"C{index}o", capsize=3)
    axes.set_xlabel("mean cost of a request")
    axes.set_ylabel("mean quality")
    axes.legend(frameon=False)
    figure.savefig(Path(path), dpi=120)
