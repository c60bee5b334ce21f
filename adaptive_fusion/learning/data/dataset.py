"""Labelled inputs as arrays: features, what routes, qualities, weights and groups.

Knows where labels come from, and names of rungs. Must not know how logs are read, estimators, thresholds or policies.

The label that routes is "the cheap lane loses more than the tolerance": with qualities, the reference's less
the cheap rung's is above it; with a person's target, that is above one half; with a user's rating of an
answer that the cheap rung gave, that is below one half. A rating of any other rung says nothing of the cheap
lane.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.learning.data.labels import SOURCES, TRUSTED
from adaptive_fusion.policy.fitted import Fingerprint

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SPLITS = ("train", "valid", "test")
_SHARES = (0.6, 0.2, 0.2 + 1e-9)
NATIVE_NAME = "native@1"


@dataclass(frozen=True)
class Dataset:
    """Labelled inputs, one a row, in an order that follows from the rows alone.

    Attributes:
        names: Names of the features, in the order of the columns of `x`.
        x: Features, ``[n, features]``; NaN where one was not measured.
        y: 1.0 where the cheap lane loses more than the tolerance, else 0.0; NaN where the label does not say.
        target: What a person said, 0 (simple) to 1 (complex); NaN where nobody did.
        quality: Quality in [0, 1] by rung, ``[n, rungs]``; NaN where it was not labelled.
        reference: Quality of the native point, ``[n]``; NaN where unknown.
        cost: Cost by rung, ``[n, rungs]``; NaN where unknown.
        rungs: Names of the columns of `quality` and `cost`.
        taken: Index of the rung that was taken live, ``[n]``; -1 for labels that do not come from traffic.
        propensity: Probability with which it was taken, ``[n]``; NaN where unknown.
        group: 63-bit hash of the content, ``[n]``: rows that share it stay in one split.
        weight: ``[n]``, after the per-source caps.
        source: Index into `SOURCES`, ``[n]``.
        source_id: Index of the labeller, ``[n]``.
        video: Whether the input is a clip, ``[n]``.
        entropy: Of the distributions of each rung's first tokens, in nats, ``[n, rungs, MOST_TOKENS]``; NaN where it is
            not known. None where no label has any.
        asked: Kind of the question as an index into `PROMPT_KINDS`, ``[n]``; -1 where it is not known. None with
            `entropy`.
        slices: By name of the slicing, each row's slice as an index into its names.
        tolerance: Loss of quality above which the cheap lane is not good enough.
        report: What was read and left out, by name.
        model: Whose rungs were labelled; None where no label says so.
        until_s: When the newest record of the logs was made, in seconds since the epoch; 0 where none says so.
    """

    names: tuple[str, ...]
    x: FloatArray
    y: FloatArray
    target: FloatArray
    quality: FloatArray
    reference: FloatArray
    cost: FloatArray
    rungs: tuple[str, ...]
    taken: IntArray
    propensity: FloatArray
    group: IntArray
    weight: FloatArray
    source: IntArray
    source_id: IntArray
    video: BoolArray
    entropy: FloatArray | None = None
    asked: IntArray | None = None
    slices: Mapping[str, tuple[IntArray, tuple[str, ...]]] = field(default_factory=dict)
    tolerance: float = 0.02
    report: Mapping[str, int] = field(default_factory=dict)
    model: Fingerprint | None = None
    until_s: float = 0.0

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: npt.NDArray[Any]) -> "Dataset":
        """Those rows, by index or mask."""
        parts = (
            "x",
            "y",
            "target",
            "quality",
            "reference",
            "cost",
            "taken",
            "propensity",
            "group",
            "weight",
            "source",
            "source_id",
            "video",
        )
        slices = {name: (codes[rows], names) for name, (codes, names) in self.slices.items()}
        beside = tuple(part for part in ("entropy", "asked") if getattr(self, part) is not None)
        return replace(self, slices=slices, **{part: getattr(self, part)[rows] for part in (*parts, *beside)})

    def columns(self, names: Sequence[str]) -> FloatArray:
        """Features ``[n, names]`` in that order; NaN for one that the data do not have."""
        place = {name: i for i, name in enumerate(self.names)}
        out = np.full((len(self), len(names)), np.nan)
        for i, name in enumerate(names):
            if name in place:
                out[:, i] = self.x[:, place[name]]
        return out

    def loses(self, cheap: str) -> FloatArray:
        """`y` for another cheap rung; NaN where the label does not say.

        Raises:
            ConfigError: For a rung whose quality was not read.
        """
        if cheap not in self.rungs:
            raise ConfigError(f"rung is {cheap!r}; expected one of {', '.join(self.rungs)}")
        kept = self.quality[:, self.rungs.index(cheap)]
        rated = self.source == SOURCES.index("feedback")
        with np.errstate(invalid="ignore"):
            lost = np.where(self.reference - kept > self.tolerance + 1e-12, 1.0, 0.0)
            lost = np.where(rated, np.where(kept < 0.5, 1.0, 0.0), lost)
        known = np.isfinite(kept) & (rated | np.isfinite(self.reference))
        asked = np.where(np.isfinite(self.target), np.where(self.target > 0.5, 1.0, 0.0), np.nan)
        return np.where(known, lost, asked)

    def split(self, name: str, seed: int = 0) -> BoolArray:
        """The rows ``[n]`` of one of `SPLITS` (60, 20 and 20 % of the contents), by hash of content and seed.

        Raises:
            ConfigError: For another name.
        """
        if name not in SPLITS:
            raise ConfigError(f"split is {name!r}; expected one of {', '.join(SPLITS)}")
        place = _uniform(self.group, seed)
        k = SPLITS.index(name)
        mask: BoolArray = (place >= sum(_SHARES[:k])) & (place < sum(_SHARES[: k + 1]))
        return mask

    def folds(self, count: int, seed: int = 0) -> IntArray:
        """The fold ``[n]``, 0 to `count` - 1, of each row, by hash of content and seed; not that of `split`."""
        places: IntArray = (_uniform(self.group, seed + 7919) * count).astype(np.int64)
        return places

    def trusted(self, sources: Sequence[str] = TRUSTED) -> BoolArray:
        """The rows ``[n]`` whose label comes from one of `sources`."""
        return np.isin(self.source, [SOURCES.index(name) for name in sources])

    def digest(self) -> str:
        """SHA-256 over everything that a fit can depend on, hex."""
        total = hashlib.sha256(repr((self.names, self.rungs, self.tolerance)).encode())
        for part in (
            self.x,
            self.y,
            self.target,
            self.quality,
            self.reference,
            self.cost,
            self.group,
            self.weight,
            self.video,
        ):
            total.update(np.ascontiguousarray(part).data)
        for known in (self.entropy, self.asked):
            if known is not None:
                total.update(np.ascontiguousarray(known).data)
        return total.hexdigest()


def mean_of_first(entropies: FloatArray, k: int) -> FloatArray:
    """``[n]`` of ``[n, tokens]``: over the first `k` tokens of each row, fewer where its answer ended before."""
    some = entropies[:, :k]
    known = np.isfinite(some)
    total = np.where(known, some, 0.0).sum(axis=1)
    mean: FloatArray = np.where(known[:, 0], total / np.maximum(1, known.sum(axis=1)), np.nan)
    return mean


def fill_empty(x: FloatArray) -> None:
    """Put 0 into the columns of features without a single value, in place: estimators refuse those, and what is
    constant decides nothing."""
    x[:, np.isnan(x).all(axis=0)] = 0.0


def cap_weights(data: Dataset, cap: float) -> FloatArray:
    """Weights ``[n]`` in which no labeller outside the trusted sources has more than `cap` of the whole.

    Labellers above it are scaled down to one common level L with L = cap x total; where there are so few of
    them that no level satisfies that, all are scaled down to the smallest one's weight.
    """
    weight = data.weight
    free = data.trusted()
    if free.all() or not weight.any():
        return weight
    totals = np.bincount(data.source_id[~free], weights=weight[~free])
    present = np.sort(totals[totals > 0])[::-1]
    others = float(weight[free].sum()) + present.sum() - np.cumsum(present)
    if not len(present) or present[0] <= cap * (others[0] + present[0]):
        return weight
    level = float(present[-1])
    # With the k largest at L the total is k L + others[k - 1]; take the first k whose next is within L.
    for k in range(1, len(present) + 1):
        if k * cap >= 1 or others[k - 1] <= 0:
            break
        if k == len(present) or present[k] <= cap * others[k - 1] / (1 - k * cap):
            level = cap * others[k - 1] / (1 - k * cap)
            break
    scale = np.ones(int(data.source_id.max()) + 1)
    over = np.flatnonzero(totals > level)
    scale[over] = level / totals[over]
    return np.where(free, weight, weight * scale[data.source_id])


def _uniform(group: IntArray, seed: int) -> FloatArray:
    """A number in [0, 1) from each group and the seed: splitmix64 (Steele et al. 2014), the same
    everywhere."""
    with np.errstate(over="ignore"):
        z = group.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).astype(np.float64) / 2.0**64
