"""How far an estimate before a rollout can be believed: simulated rollouts, estimated before and measured after.

Each of RUNS is a world of its own: images with features, three rungs whose quality falls with what an image needs, a
policy in service and another candidate. A log of LOGGED requests is written by the policy in service, which explores a
SHARE of them by the ids of the requests, as the server does, and every request is rated once (0 or 1, with the quality
as the chance). From that log alone `off_policy` states what the candidate would be worth, with its 95 % interval. Then
the candidate has MEASURED requests of its own, and the mean of their ratings is what was measured.

It agrees if what was measured lies in the interval that was stated. Shown beside it: how often the candidate's true
value does, how wide the interval is, and how often the plain mean of the log, which is what one would have without
propensities, would have been right with an interval as wide. `--misses` is the share that may disagree.

    python benchmarks/offpolicy.py                      # 100 rollouts, some minutes
    python benchmarks/offpolicy.py --runs 20 --logged 4000
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass

import numpy as np

from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.control.exploring import draw
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.features.complexity import FEATURE_NAMES
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import SOURCES
from adaptive_fusion.learning.judging.offpolicy import OffPolicyValue, off_policy
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, VIDEO, Policy
from adaptive_fusion.policy.predictors import LinearModel
from adaptive_fusion.policy.router import Inputs, PlainRouter
from adaptive_fusion.policy.rungs import Rung

LADDER = tuple(Rung(OperatingPoint(), pixel_share=share) for share in (1.0, 0.5, 0.25))
NAMES = FEATURE_NAMES[:4]
COUNT = len(LADDER)


@dataclass(frozen=True)
class World:
    """What images need, and two policies.

    Attributes:
        slope: How much quality a rung loses by each feature.
        level: How much it loses at all.
        served, candidate: The policy in service, and the other one.
    """

    slope: np.ndarray
    level: float
    served: Policy
    candidate: Policy

    def quality(self, x: np.ndarray) -> np.ndarray:
        """[n, rungs]: chance of a good rating."""
        lost = self.level / (1 + np.exp(-(x @ self.slope)))
        return np.clip(0.92 - lost[:, None] * np.array([0.0, 0.6, 1.0]), 0.02, 0.98)

    def chosen(self, policy: Policy, x: np.ndarray) -> np.ndarray:
        """[n]: the rung that a policy takes."""
        strong = policy.router.p_complex_batch(x) >= policy.threshold
        lanes = {lane: LADDER.index(policy.lanes[lane][0]) for lane in (SIMPLE, COMPLEX)}
        return np.where(strong, lanes[COMPLEX], lanes[SIMPLE])


def world(rng: np.random.Generator) -> World:
    """A world; its candidate routes by other features, and sends simple images to another rung."""

    def policy(name: str, simple: int, complex_: int) -> Policy:
        weights = tuple(rng.normal(size=len(NAMES)))
        router = PlainRouter(Inputs(NAMES), LinearModel(weights, (0.0,) * len(NAMES), rng.normal() * 0.5))
        rungs = {SIMPLE: LADDER[simple:], COMPLEX: LADDER[complex_:], VIDEO: LADDER}
        return Policy(name, router, 0.5, rungs)

    served, candidate = policy("served", 2, 1), policy("candidate", 1 + int(rng.integers(2)), 0)
    return World(rng.normal(size=len(NAMES)) * 1.5, 0.2 + 0.4 * rng.random(), served, candidate)


def logged(found: World, n: int, share: float, rng: np.random.Generator, name: str) -> Dataset:
    """What the policy in service has logged, as learning reads it."""
    x = rng.normal(size=(n, len(NAMES)))
    own = found.chosen(found.served, x)
    points = [Candidate(OperatingPoint(max_pixels=1024 + i), 1.0, Prediction(1, 1, 1, 0.0)) for i in range(COUNT)]
    taken, propensity = np.empty(n, np.int64), np.empty(n)
    for i in range(n):
        point, drawn = draw(points, points[own[i]], f"{name}-{i}", share)
        taken[i], propensity[i] = points.index(point), drawn.propensity
    rating = (rng.random(n) < found.quality(x)[np.arange(n), taken]).astype(float)
    quality = np.full((n, COUNT), np.nan)
    quality[np.arange(n), taken] = rating
    nothing, zeros = np.full(n, np.nan), np.zeros(n, np.int64)
    return Dataset(
        names=NAMES,
        x=x,
        y=nothing,
        target=nothing,
        quality=quality,
        reference=nothing,
        cost=np.full((n, COUNT), np.nan),
        rungs=tuple(rung.name for rung in LADDER),
        taken=taken,
        propensity=propensity,
        group=np.arange(n),
        weight=np.ones(n),
        source=np.full(n, SOURCES.index("feedback")),
        source_id=zeros,
        video=np.zeros(n, bool),
    )


def rollout(
    seed: int, *, n: int, share: float, measured: int, draws: int, truth: int = 200_000
) -> tuple[OffPolicyValue, float, float]:
    """An estimate, what was measured afterwards, and the truth, from that many more requests."""
    rng = np.random.default_rng(seed)
    found = world(rng)
    value = off_policy(found.candidate, logged(found, n, share, rng, str(seed)), seed=seed, n=draws)
    x = rng.normal(size=(max(truth, measured), len(NAMES)))
    worth = found.quality(x)[np.arange(len(x)), found.chosen(found.candidate, x)]
    after = (rng.random(measured) < worth[:measured]).mean()
    return value, float(after), float(worth.mean())


def main() -> int:
    """Run and print; exit code 1 if more disagree than may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--logged", type=int, default=8000, help="rated requests before")
    parser.add_argument("--share", type=float, default=0.1, help="of them that explore")
    parser.add_argument("--measured", type=int, default=20_000, help="rated requests after")
    parser.add_argument("--draws", type=int, default=1000, help="resamples of the bootstrap")
    parser.add_argument("--misses", type=float, default=0.1)
    parser.add_argument("--seed", type=int, help="of the first rollout; from the clock if left out, and printed")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    first = int(time.time()) if given.seed is None else given.seed
    rows = [
        rollout(seed, n=given.logged, share=given.share, measured=given.measured, draws=given.draws)
        for seed in range(first, first + given.runs)
    ]
    figures = {}
    for name in ("doubly_robust", "snips", "ips"):
        stated = [getattr(value, name) for value, _, _ in rows]
        figures[name] = {
            "agree": float(np.mean([s.low <= after <= s.high for s, (_, after, _) in zip(stated, rows, strict=True)])),
            "true": float(np.mean([s.low <= t <= s.high for s, (_, _, t) in zip(stated, rows, strict=True)])),
            "width": float(np.mean([s.high - s.low for s in stated])),
            "error": float(np.mean([s.mean - t for s, (_, _, t) in zip(stated, rows, strict=True)])),
        }
    wide = [value.doubly_robust.high - value.doubly_robust.low for value, _, _ in rows]
    plain = [abs(value.logged.mean - after) <= w / 2 for (value, after, _), w in zip(rows, wide, strict=True)]
    figures["mean of the log"] = {"agree": float(np.mean(plain))}
    worth = float(np.mean([value.effective_samples for value, _, _ in rows]))
    if given.json:
        print(json.dumps({"runs": given.runs, "seed": first, "effective_samples": worth, "figures": figures}))
    else:
        about = f"{given.runs} rollouts from seed {first}, {given.logged} logged each, worth {worth:.0f}"
        print(f"{about}; {given.share:.0%} explored")
        for name, found in figures.items():
            print(f"{name:>16}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    return int(1 - figures["doubly_robust"]["agree"] > given.misses)


if __name__ == "__main__":
    sys.exit(main())
