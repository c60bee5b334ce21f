"""Whether inputs and outcomes are still like those that a policy was fitted on: two-sample tests, one flag.

Knows samples of numbers and a policy's range of familiar images. Must not know logs or how a policy is fitted.

Each feature and each outcome is tested by Kolmogorov and Smirnov's two-sample test (scipy's `ks_2samp`), which needs no
assumption about how values are distributed; the share of images outside the policy's range by an exact binomial test
against the share that the range itself allows. The tests are dependent and the question is one, "did anything
change?", so p-values are adjusted by Holm (1979): the chance of a flag where nothing changed is at most `LEVEL`,
however the tests hang together. Of many rows the least change is sure without mattering, so a change must be large as
well: at least `LEAST` between the two distribution functions, or twice the share that the range allows.

Kept libraries for this (alibi-detect, evidently, frouros) bring in frameworks or servers for what are two calls of
scipy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.learning.data.dataset import Dataset, FloatArray
from adaptive_fusion.learning.data.labels import SOURCES
from adaptive_fusion.learning.data.samples import FILE, NAMES, Sample, read_samples, sample_of
from adaptive_fusion.learning.judging.arms import lanes_of
from adaptive_fusion.policy.files import find_policy
from adaptive_fusion.policy.policy import Policy

LEVEL = 0.01
"""Chance of a flag where nothing changed."""
LEAST = 0.1
"""Smallest change that is flagged: the largest difference of two distribution functions."""
MIN_VALUES = 50
"""Fewest values on either side that are tested."""
RANGE = "images outside the policy's range"


@dataclass(frozen=True)
class Change:
    """One test.

    Attributes:
        name: Of the feature or outcome.
        kind: ``feature``, ``outcome`` or ``range``.
        size: Of the change: the largest difference of the distribution functions; of the range, the share outside.
        p: Adjusted by Holm.
        before, recent: Medians; of the range, the share that it allows and the share that is outside.
        counts: Values on both sides.
        drifted: Whether it is sure and large.
    """

    name: str
    kind: str
    size: float
    p: float
    before: float
    recent: float
    counts: tuple[int, int]
    drifted: bool

    def in_words(self) -> str:
        """For people."""
        if self.kind == "range":
            return f"{self.recent:.0%} of images are outside the policy's range, which allows {self.before:.0%}"
        return (
            f"{self.name}: median {self.before:.3g}, now {self.recent:.3g} (distance {self.size:.2f}, p {self.p:.1g})"
        )


@dataclass(frozen=True)
class Drift:
    """What was found.

    Attributes:
        changes: All tests, the largest changes first among those that drifted, then the others.
        against: What the recent logs were compared with, in words.
        contents: Different contents on both sides.
        note: Why something was not tested; empty where all was.
        samples: Both sides, for pictures.
    """

    changes: tuple[Change, ...]
    against: str
    contents: tuple[int, int]
    note: str = ""
    samples: tuple[Sample, Sample] | None = field(default=None, compare=False, repr=False)

    @property
    def drifted(self) -> tuple[Change, ...]:
        """Those that raise the flag."""
        return tuple(change for change in self.changes if change.drifted)

    def in_words(self) -> str:
        """One line for people."""
        if not self.changes:
            return self.note or "nothing could be tested"
        if not self.drifted:
            return f"no drift in {len(self.changes)} tests against {self.against}"
        shown = "; ".join(change.in_words() for change in self.drifted[:3])
        more = f"; and {len(self.drifted) - 3} more" if len(self.drifted) > 3 else ""
        return f"drift against {self.against}: {shown}{more}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "drifted": [change.name for change in self.drifted],
            "against": self.against,
            "contents": list(self.contents),
            "note": self.note,
            "changes": [{**vars(change), "counts": list(change.counts)} for change in self.changes],
        }


def compare(before: Sample, recent: Sample, policy: Policy | None = None, against: str = "before") -> Drift:
    """Test all that both sides have enough values of, and the policy's range where it has one."""
    from scipy.stats import binomtest, ks_2samp

    tested: list[tuple[str, str, float, float, float, float, tuple[int, int]]] = []
    for kind, old, new in (
        ("feature", before.features, recent.features),
        ("outcome", before.outcomes, recent.outcomes),
    ):
        for name, a, b in _pairs(old, new):
            found = ks_2samp(a, b)
            middle = float(np.median(a)), float(np.median(b))
            tested.append((name, kind, float(found.statistic), float(found.pvalue), *middle, (len(a), len(b))))
    outside = None if policy is None else _outside(policy, recent.rows)
    if policy is not None and policy.familiar is not None and outside is not None:
        alpha, share = policy.familiar.alpha, float(np.mean(outside))
        p = binomtest(int(outside.sum()), len(outside), alpha, alternative="greater").pvalue
        tested.append((RANGE, "range", share, float(p), alpha, share, (0, len(outside))))
    changes = []
    adjusted = holm([row[3] for row in tested])
    for (name, kind, size, _, usual, now, counts), p in zip(tested, adjusted, strict=True):
        large = size >= (2 * usual if kind == "range" else LEAST)
        changes.append(Change(name, kind, size, p, usual, now, counts, large and p < LEVEL))
    changes.sort(key=lambda change: (not change.drifted, -change.size, change.name))
    note = "" if tested else f"too little to compare: {before.contents} images before and {recent.contents} recent ones"
    return Drift(tuple(changes), against, (before.contents, recent.contents), note, (before, recent))


def drift(logs: Iterable[str | Path], policy: str | Path | Policy | None = None) -> Drift:
    """Whether recent logs are like what a policy was trained on, by the file beside it; of a policy without one, like
    the earlier half of the logs.

    Args:
        logs: See `log_files`.
        policy: A name, a path or a policy; without one only the logs are compared with each other.

    Raises:
        PolicyError: If the policy cannot be loaded.
        ConfigError: If there are no logs or they cannot be read.
    """
    loaded = policy if isinstance(policy, Policy) or policy is None else Policy.load(policy)
    file = None if isinstance(policy, Policy) or policy is None else find_policy(policy).parent / FILE
    if file is not None and loaded is not None and file.exists():
        known = Sample.load(file)
        _, recent = read_samples(logs, split_s=known.until_s)
        found = compare(known, recent, loaded, f"what {loaded.name} was trained on")
        if not recent.contents and not found.changes:
            return Drift((), found.against, found.contents, f"no image was logged since {loaded.name} was trained")
        return found
    before, recent = read_samples(logs, halves=True)
    return compare(before, recent, loaded, "the earlier half of the logs")


def training_sample(policy: Policy, data: Dataset) -> Sample:
    """What the data were like that a policy was trained on, for `drift` later."""
    _, first = np.unique(data.group, return_index=True)
    some = data.take(first[~data.video[first]])
    columns = some.columns(NAMES)
    rows = [{name: float(v) for name, v in zip(NAMES, row, strict=True) if np.isfinite(v)} for row in columns]
    rated = data.source == SOURCES.index("feedback")
    outcomes: dict[str, FloatArray] = {}
    for lane, inside in lanes_of(policy, data).items():
        for index, rung in enumerate(data.rungs):
            # A rating of an answer is one of the rung that gave it.
            for name, among in ((f"quality {rung} ({lane})", ~rated), (f"rating ({lane})", rated)):
                values = data.quality[inside & among, index]
                found = np.concatenate([outcomes.get(name, np.zeros(0)), values[np.isfinite(values)]])
                if len(found):
                    outcomes[name] = found
    return sample_of(rows, outcomes, len(some), data.until_s)


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted for as many tests, in their order (Holm 1979): (m - rank) p, never falling, at most 1."""
    found, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        found[index] = highest
    return found


def _pairs(
    old: Mapping[str, FloatArray], new: Mapping[str, FloatArray]
) -> Iterable[tuple[str, FloatArray, FloatArray]]:
    """What both sides have enough values of; not what is one and the same number throughout."""
    for name in old:
        if name in new and min(len(old[name]), len(new[name])) >= MIN_VALUES:
            both = old[name], new[name]
            if np.ptp(np.concatenate(both)) > 0:
                yield name, *both


def _outside(policy: Policy, rows: Sequence[Mapping[str, float]]) -> FloatArray | None:
    """1 for each image that the policy's range does not hold, 0 for others; None where too few can be asked."""
    range_ = policy.familiar
    if range_ is None:
        return None
    names = range_.clouds.space.names
    asked = [row for row in rows if all(name in row for name in names)]
    if len(asked) < MIN_VALUES:
        return None
    return np.asarray([float(range_.is_unlike(row)) for row in asked])
