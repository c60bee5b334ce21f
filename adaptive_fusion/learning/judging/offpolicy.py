"""What a policy would have been worth on traffic that another one served: IPS, SNIPS and doubly robust.

Knows rewards, propensities and target probabilities; `off_policy` reads them from labelled logs, and `served` what a
policy was worth where it ran. Must not know models.

With action a logged with probability p, reward r, and target policy pi, w = pi(a | x) / p:

- IPS (Horvitz & Thompson 1952): mean of w r. Unbiased, of high variance;
- SNIPS (Swaminathan & Joachims 2015): sum of w r / sum of w. Slightly biased, steadier;
- doubly robust (Dudik et al. 2011): mean of v(x) + w (r - q(x, a)), with q a model of the reward and v its
  mean under pi. Right if either the propensities or the model are;
- effective sample size (Kish 1965): (sum of w)^2 / sum of w^2, of as many as were logged.

The model is cross-fitted: a row's q comes from a fit that has not seen its content.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval, bootstrap_mean, intervals
from adaptive_fusion.learning.data.dataset import Dataset, FloatArray, IntArray
from adaptive_fusion.learning.data.labels import join_labels
from adaptive_fusion.learning.data.logs import open_logs
from adaptive_fusion.learning.judging.arms import lanes_of
from adaptive_fusion.policy.policy import Policy

_FOLDS = 5
_SQUARES_UP_TO = 20  # features; beyond, squares and products would outnumber the rows


@dataclass(frozen=True)
class OffPolicyValue:
    """Estimates of a target policy's mean reward, each with its bootstrap interval.

    Attributes:
        ips, snips, doubly_robust: See the module.
        coverage: Mean of w: about 1 if the logging policy could take what the target takes, well below if
            not. What it never takes, only the model behind `doubly_robust` speaks for.
        logged: Plain mean of the logged rewards: the logging policy's value, which the target's differs from.
        effective_samples: Of `decisions` logged ones.
        decisions: How many were logged.
    """

    ips: Interval
    snips: Interval
    doubly_robust: Interval
    logged: Interval
    coverage: Interval
    effective_samples: float
    decisions: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def estimate(
    reward: npt.ArrayLike,
    propensity: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    predicted: npt.ArrayLike,
    value: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    seed: int = 0,
    n: int = 1000,
) -> OffPolicyValue:
    """Estimate from arrays ``[n]``, one entry a decision.

    Args:
        reward: Of the logged action.
        propensity: Probability with which it was logged, in (0, 1].
        target: Probability with which the target policy would have taken it.
        predicted: The model's reward of the logged action, q(x, a).
        value: The model's mean reward under the target policy, v(x).
        groups: Which decisions are not independent.
        seed: Of the bootstrap.
        n: Resamples.

    Raises:
        ConfigError: For propensities out of range, values that are not finite, or a target that never takes a
            logged action.
    """
    r, p, pi, q, v = (np.asarray(part, np.float64) for part in (reward, propensity, target, predicted, value))
    if len({part.shape for part in (r, p, pi, q, v)}) > 1 or r.ndim != 1 or not len(r):
        raise ConfigError(f"got shapes {[part.shape for part in (r, p, pi, q, v)]}; expected one, [n]")
    if not all(np.isfinite(part).all() for part in (r, q, v)):
        raise ConfigError("rewards and the model's predictions must be finite")
    if not ((p > 0) & (p <= 1)).all() or not ((pi >= 0) & (pi <= 1)).all():
        raise ConfigError(
            f"propensities run from {p.min():g} to {p.max():g}, target probabilities from {pi.min():g} to"
            f" {pi.max():g}; expected above 0 and 0 respectively, to 1"
        )
    w = pi / p
    if not w.any():
        raise ConfigError("the target policy takes none of the logged actions; log explored decisions (explore > 0)")
    parts = {"ips": w * r, "snips": w * r, "doubly_robust": v + w * (r - q), "logged": r, "coverage": w}

    def statistics(weight: FloatArray) -> dict[str, float]:
        found = {name: float(weight @ part / weight.sum()) for name, part in parts.items()}
        hits = float(weight @ w)
        return found | {"snips": float(weight @ (w * r)) / hits if hits else np.nan}

    labels = np.arange(len(r)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    figures = intervals(statistics, labels, seed=seed, n=n)
    return OffPolicyValue(**figures, effective_samples=float(w.sum() ** 2 / (w**2).sum()), decisions=len(r))


def reward_model(x: FloatArray, action: IntArray, reward: FloatArray, groups: IntArray, actions: int) -> FloatArray:
    """Cross-fitted ridge regression of the reward per action, ``[n, actions]``, on features and (of few
    features) their squares and products; an action with fewer than 20 rewards in a fit gets the mean
    reward."""
    fold = np.unique(groups, return_inverse=True)[1] % _FOLDS
    out = np.full((len(x), actions), float(reward.mean()))
    useful = np.isfinite(x).any(axis=0)
    x = x[:, useful]
    for k in range(_FOLDS):
        judged = fold == k
        for a in range(actions):
            rows = ~judged & (action == a)
            if rows.sum() < 20 or not judged.any():
                continue
            steps = [SimpleImputer(keep_empty_features=True), StandardScaler()]
            if x.shape[1] <= _SQUARES_UP_TO:
                steps += [PolynomialFeatures(2, include_bias=False)]
            model = make_pipeline(*steps, Ridge(10.0)).fit(x[rows], reward[rows])
            out[judged, a] = np.clip(model.predict(x[judged]), reward.min(), reward.max())
    return out


def off_policy(policy: Policy, data: Dataset, *, seed: int = 0, n: int = 1000) -> OffPolicyValue:
    """Estimate the quality that a policy would have had on logged traffic.

    Rewards are the qualities that feedback and shadow runs gave the rungs that were taken. Without a budget a
    policy takes the first rung of the lane it routes to; that is the target here.

    Args:
        policy: The target.
        data: Labelled logs, read for all rungs that the logging policy could take.
        seed: Of the bootstrap.
        n: Resamples.

    Raises:
        ConfigError: For a policy whose choice within a lane hangs on what an input needs; without decisions that have
            both a reward and a propensity; and as `estimate`.
    """
    if policy.sufficiency is not None:
        raise ConfigError(
            f"{policy.name} chooses within a lane by what an input needs, which logs do not hold; expected a policy"
            " that takes the first rung of a lane"
        )
    reward = np.where(data.taken >= 0, data.quality[np.arange(len(data)), np.maximum(data.taken, 0)], np.nan)
    rows = np.isfinite(reward) & (data.propensity > 0) & (data.propensity <= 1)
    if not rows.any():
        raise ConfigError("no logged decision has both a reward (feedback or a shadow run) and a propensity")
    some, r = data.take(rows), reward[rows]
    q = reward_model(some.x, some.taken, r, some.group, len(data.rungs))
    choice = np.full(len(some), -1)
    for lane, inside in lanes_of(policy, some).items():
        name = policy.lanes[lane][0].name
        choice[inside] = data.rungs.index(name) if name in data.rungs else -1
    index = np.arange(len(some))
    return estimate(
        r,
        some.propensity,
        choice == some.taken,
        predicted=q[index, some.taken],
        value=np.where(choice >= 0, q[index, np.maximum(choice, 0)], r.mean()),
        groups=some.group,
        seed=seed,
        n=n,
    )


@dataclass(frozen=True)
class Served:
    """What a policy was worth where it ran: the mean quality of what it chose, explored decisions left out.

    Attributes:
        value: Mean and bootstrap interval over contents.
        labels: How many labels that is.
    """

    value: Interval
    labels: int

    def agrees(self, estimate: Interval) -> bool:
        """Whether it lies in the interval that was stated before."""
        return estimate.low <= self.value.mean <= estimate.high


_SERVED = """
SELECT TRY_CAST(json_extract(l.quality, '$."' || l.rung || '"') AS DOUBLE) AS reward,
  coalesce(s.content_hash, s.request_id) AS content
FROM labels l JOIN log s ON s.rowid = l.subject
WHERE s.event = 'decision' AND s.policy = $policy AND NOT coalesce(s.explored, false) AND l.rung IS NOT NULL
ORDER BY content, reward
"""


def served(logs: Iterable[str | Path], policy: str, *, seed: int = 0, n: int = 1000) -> Served | None:
    """What the policy of that name was worth on the logged decisions that feedback or shadow runs rated; None without
    any.

    Raises:
        ConfigError: As `open_logs`.
    """
    with open_logs(logs) as table:
        join_labels(table)
        rows = table.connection.execute(_SERVED, {"policy": policy}).fetchall()
    rated = [(reward, content) for reward, content in rows if reward is not None and 0 <= reward <= 1]
    if not rated:
        return None
    rewards, contents = zip(*rated, strict=True)
    return Served(bootstrap_mean(rewards, seed=seed, n=n, groups=contents), len(rated))
