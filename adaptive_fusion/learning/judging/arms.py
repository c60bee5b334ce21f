"""A policy seen as a choice between two arms: their names, its scores, and what the arms were worth.

Knows policies and labelled data. Must not know figures, fits or files.

The arms are the policy's cheap plan and the first rung of the strong lane. Where the policy asks the model and its
labels say that it was not sure of a cheap answer, the cheap arm is both passes: worth what the strong one is, at the
cost of both. Where labels carry no quality
of the strong rung the native reference stands for it; where they carry no quality at all (a person's "simple"
or "complex") the cheap arm is worth 1 on a simple input, 0 on a complex one, and the strong arm 1. Without
costs the strong arm costs 1 and the cheap arm 0, so that cost is the share of strong calls.
"""

from dataclasses import replace

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray, mean_of_first
from adaptive_fusion.learning.judging.curve import Arms
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, VIDEO, Policy

MIN_ROWS = 20
"""Fewest rows to judge by."""


def arm_names(policy: Policy) -> tuple[str, str]:
    """Names of the cheap and the strong rung of a policy."""
    return policy.cheap_rung.name, policy.lanes[COMPLEX][0].name


def scores(policy: Policy, data: Dataset) -> FloatArray:
    """P(complex) of each row, ``[n]``."""
    return policy.router.p_complex_batch(data.columns(policy.router.inputs.names))


def judges(data: Dataset, among: BoolArray | None = None) -> BoolArray:
    """The rows ``[n]``, of those `among` or of all, that may judge: measured qualities of trusted sources, not
    opinions, where there are enough of them; else whatever trusted sources said; else all."""
    rows = np.ones(len(data), dtype=bool) if among is None else among
    for better in (data.trusted(), np.isfinite(data.quality).any(axis=1)):
        if (rows & better).sum() >= MIN_ROWS:
            rows = rows & better
    return rows


def two_arms(data: Dataset, cheap: str, strong: str) -> tuple[Arms, FloatArray, BoolArray]:
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


def policy_arms(policy: Policy, data: Dataset) -> tuple[Arms, FloatArray, BoolArray]:
    """As `two_arms` of a policy, with the second passes that it takes.

    Raises:
        ConfigError: If no row judges.
    """
    cheap, strong = arm_names(policy)
    arms, y, rows = two_arms(data, cheap, strong)
    unsure = (goes_on(policy, data, cheap) & ~sure(policy, data))[rows]
    both = replace(
        arms,
        cheap=np.where(unsure, arms.strong, arms.cheap),
        cheap_cost=np.where(unsure, arms.cheap_cost + arms.strong_cost, arms.cheap_cost),
    )
    return both, y, rows


def goes_on(policy: Policy, data: Dataset, rung: str) -> BoolArray:
    """The rows ``[n]`` whose answer at a rung the policy would give up, by the entropies of their labels; not those
    without any."""
    found = np.zeros(len(data), dtype=bool)
    rules = policy.escalation
    if rules is None or data.entropy is None or data.asked is None or rung not in data.rungs:
        return found
    entropy = mean_of_first(data.entropy[:, data.rungs.index(rung)], rules.k)
    for code in np.unique(data.asked):
        limit = rules.threshold(rung, PROMPT_KINDS[code] if code >= 0 else "").threshold
        if limit is not None:
            found |= (data.asked == code) & (entropy > limit)
    return found


def sure(policy: Policy, data: Dataset) -> BoolArray:
    """The rows ``[n]`` whose lane's first rung is taken without asking the model."""
    limits = {} if policy.escalation is None else policy.escalation.sure
    p, found = scores(policy, data), np.zeros(len(data), dtype=bool)
    for lane, rows in lanes_of(policy, data).items():
        found |= rows & (p <= limits.get(lane, -1.0))
    return found


def lanes_of(policy: Policy, data: Dataset) -> dict[str, BoolArray]:
    """Which rows ``[n]`` the policy sends to each lane."""
    to_strong = scores(policy, data) >= policy.threshold
    return {SIMPLE: ~data.video & ~to_strong, COMPLEX: ~data.video & to_strong, VIDEO: data.video}
