"""Rows of the benchmark on real images: what each way to choose pixels shows of the images, keeps and spends.

Knows shares, what is kept at them, and numbers. Must not know of images, readers, policies or how tables are drawn.

Rows are compared on the same images. A fixed share and a fixed number of pixels are given each policy's own score or
its own tokens, so that they show what the same would cost, or buy, without looking at the image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from adaptive_fusion.bench.comparisons import as_dict
from adaptive_fusion.evaluation.shares import ENOUGH, RELEASED, SHARES, TOKEN_PIXELS, Floats, Sides, sized, within
from adaptive_fusion.evaluation.statistics import bootstrap_ratio

NATIVE, ORACLE, ENTROPY, SQUEEZER = "native", "oracle", "entropy-median", "vision-squeezer"
SAME_KEPT, SAME_TOKENS = "as much kept", "as many tokens"
QUARTER = 0.25
SEED = 0
_LEAST_SHARE = 2.0**-8
_LEAST_PIXELS = float(TOKEN_PIXELS)
_CLOSE = 0.004  # octaves to which a constant is searched


class Kept(Protocol):
    """What is kept of an image at shares of its native pixels."""

    def at(self, shares: float | Floats | tuple[float, ...], /) -> Floats:
        """Kept at each of `shares`, in [0, 1]."""


class Objects:
    """Objects count as kept while the shorter side of their box spans a patch.

    Args:
        sides: Shorter sides in native pixels, all of at least a patch.
    """

    def __init__(self, sides: Sequence[float]) -> None:
        self._sides = np.asarray(sides, dtype=np.float64)

    def at(self, shares: float | Floats | tuple[float, ...]) -> Floats:
        """See `Kept`."""
        scale = np.sqrt(np.asarray(shares, dtype=np.float64))
        found = (self._sides * scale[..., None] >= RELEASED.patch_size).mean(axis=-1)
        return np.asarray(np.where(np.asarray(shares) >= 1, 1.0, found))


@dataclass(frozen=True)
class Seen:
    """What a row shows of an image.

    Attributes:
        share: Of the native pixels, that can be told apart.
        pixels, tokens: Spent on it.
        kept: In [0, 1].
        answers: Part of the known answers that can still be read; None without any.
        measured: Whether `kept` was read at this very size, and not off the curve.
    """

    share: float
    pixels: int
    tokens: int
    kept: float
    answers: float | None = None
    measured: bool = True


@dataclass(frozen=True)
class Loss:
    """What a row's picture no longer has: words or objects, and where, in native pixels [x0, y0, x1, y1]."""

    lost: tuple[str, ...]
    place: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Case:
    """One image, or one question about it, and what its rows show.

    Attributes:
        source, path: Where it is from.
        file: Sides of the file.
        question: What was asked.
        kept: By share.
        seen: What policies (and vision-squeezer, where it is installed) show of it, by row.
        expected: Quality that each policy expects to lose at a quarter of the pixels.
        losses: By policy.
        entropy: Grey entropy in bits.
        weight: Objects in it; 1 for text.
        legible: Known answers that can be read natively, and `answers` the part of them by share.
        read: Kept and answers of the image at other sides; None where nothing is read.
    """

    source: str
    path: Path
    file: Sides
    question: str
    kept: Kept
    seen: Mapping[str, Seen]
    expected: Mapping[str, float | None] = field(default_factory=dict)
    losses: Mapping[str, Loss] = field(default_factory=dict)
    entropy: float = 0.0
    weight: float = 1.0
    legible: int = 0
    answers: Kept | None = None
    read: Callable[[Any], tuple[float, float | None]] | None = None

    @property
    def native(self) -> int:
        """Native pixels."""
        return math.prod(within(self.file))

    def at(self, sides: Sides) -> Seen:
        """What the image shows at `sides`, by its curve, and what it takes."""
        pixels = math.prod(sides)
        share = min(1.0, pixels / self.native)
        answers = None if self.answers is None else float(self.answers.at(share))
        measured = self.read is None or share == 1.0
        return Seen(share, pixels, pixels // TOKEN_PIXELS, float(self.kept.at(share)), answers, measured)

    def at_share(self, share: float) -> Seen:
        """What the image shows with a share of its native pixels, in sides that the processor makes of it."""
        return self.at(sized(self.file, share))

    def oracle(self) -> Seen:
        """The smallest step of the ladder that is sufficient; native where no smaller one is."""
        steps = [self.at_share(share) for share in SHARES]
        return min((step for step in steps if step.kept >= ENOUGH), key=lambda step: step.share)


@dataclass(frozen=True)
class Row:
    """One way to choose: `seen` of each case.

    `beside` is the policy that a fixed row is matched to, `same` in what, `setting` the constant in words.
    """

    name: str
    seen: tuple[Seen, ...]
    beside: str = ""
    same: str = ""
    setting: str = ""


def all_rows(cases: Sequence[Case], policies: Sequence[str]) -> list[Row]:
    """All rows over `cases`, at least one: native, each policy and its fixed rows, then the rest."""
    rows = [Row(NATIVE, tuple(case.at(within(case.file)) for case in cases))]
    for policy in policies:
        own = Row(policy, tuple(case.seen[policy] for case in cases))
        rows += [own, *fixed_rows(cases, own)]
    middle = float(np.median([case.entropy for case in cases]))
    shares = [QUARTER if case.entropy < middle else 1.0 for case in cases]
    rows.append(Row(ENTROPY, _at_shares(cases, shares), setting=f"{QUARTER:g} below {middle:.2f} bits"))
    if all(SQUEEZER in case.seen for case in cases):
        rows.append(Row(SQUEEZER, tuple(case.seen[SQUEEZER] for case in cases)))
    # A bisection has read the step that it ends at.
    return [*rows, Row(ORACLE, tuple(replace(case.oracle(), measured=True) for case in cases))]


def fixed_rows(cases: Sequence[Case], policy: Row) -> list[Row]:
    """A fixed share and a fixed `max_pixels` beside a policy: the smallest that keep no less on average and at the 5th
    percentile, and the largest that spend no more tokens.

    What both keep is taken off the curve: a reader's slips at one size must not decide.
    """
    by_curve = [_by_curve(case, seen) for case, seen in zip(cases, policy.seen, strict=True)]
    need, tokens = _score(cases, by_curve), sum(seen.tokens for seen in policy.seen)
    ways: dict[str, tuple[Callable[[float], tuple[Seen, ...]], float, float]] = {
        "fixed share": (lambda share: _at_shares(cases, [share] * len(cases)), _LEAST_SHARE, 1.0),
        "fixed max_pixels": (
            lambda most: tuple(case.at(within(case.file, int(most))) for case in cases),
            _LEAST_PIXELS,
            float(max(case.native for case in cases)),
        ),
    }
    rows = []
    for name, (take, least, most) in ways.items():

        def keeps(value: float, take: Callable[[float], tuple[Seen, ...]] = take) -> bool:
            return all(a >= b - 1e-9 for a, b in zip(_score(cases, take(value)), need, strict=True))

        def exceeds(value: float, take: Callable[[float], tuple[Seen, ...]] = take) -> bool:
            return sum(seen.tokens for seen in take(value)) > tokens

        values = {SAME_KEPT: threshold(keeps, least, most)[1]}
        values[SAME_TOKENS] = most if not exceeds(most) else threshold(exceeds, least, most)[0]
        for same, value in values.items():
            setting = f"{value:.3f}" if most == 1.0 else f"{value:,.0f}"
            rows.append(Row(name, take(value), policy.name, same, setting))
    return rows


def threshold(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Where `holds` begins to be true between `low` and `high`: a value at which it is not yet and one at which it is.

    It is taken to hold at `high`, and to go on once it does; where it holds at `low`, both are `low`.
    """
    if holds(low):
        return low, low
    while math.log2(high / low) > _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def summary(row: Row, cases: Sequence[Case], chosen: Sequence[int] | None = None) -> dict[str, Any]:
    """A row over the cases with the indices `chosen`, or all, as plain values with 95 % bootstrap intervals.

    Of `tokens` and `pixels` the sum is taken over native's, of `kept` the mean by weight.
    """
    index = list(range(len(cases)) if chosen is None else chosen)
    seen, some = [row.seen[i] for i in index], [cases[i] for i in index]
    groups = [f"{case.source}/{case.path.name}" for case in some]
    weight = np.array([case.weight for case in some])
    kept, native = np.array([s.kept for s in seen]), np.array([case.native for case in some])
    spent = np.array([s.tokens for s in seen], dtype=np.float64)
    found: dict[str, Any] = {"row": row.name}
    if row.beside:
        found |= {"beside": row.beside, "same": row.same}
    if row.setting:
        found["setting"] = row.setting
    answers = [(case.legible, s.answers) for case, s in zip(some, seen, strict=True) if s.answers is not None]
    known = sum(count for count, _ in answers)
    return found | {
        "n": len(index),
        "kept": as_dict(bootstrap_ratio(weight * kept, weight, seed=SEED, groups=groups)),
        "kept_p5": float(np.quantile(kept, 0.05)),
        "share": float(np.mean([s.share for s in seen])),
        "pixels": float(sum(s.pixels for s in seen) / native.sum()),
        "tokens": as_dict(bootstrap_ratio(spent, native / TOKEN_PIXELS, seed=SEED, groups=groups)),
        "mean_tokens": float(spent.mean()),
        "answers": sum(count * part for count, part in answers if part is not None) / known if known else None,
        "measured": all(s.measured for s in seen),
    }


def versus(rows: Sequence[Row], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Each policy beside its fixed rows, paired: tokens as a ratio to theirs, kept as a difference, with intervals.

    Kept is compared on the same terms: where the fixed row's is taken off the curve, the policy's is too.
    """
    by_name = {row.name: row for row in rows if not row.beside}
    groups = [f"{case.source}/{case.path.name}" for case in cases]
    weight = np.array([case.weight for case in cases])
    found = []
    for row in rows:
        if not row.beside:
            continue
        own = by_name[row.beside].seen
        tokens = ([float(s.tokens) for s in own], [float(s.tokens) for s in row.seen])
        pairs = zip(cases, own, row.seen, strict=True)
        read = all(seen.measured for seen in row.seen)
        gain = np.array([(a if read else _by_curve(case, a)).kept - b.kept for case, a, b in pairs])
        found.append(
            {
                "policy": row.beside,
                "row": row.name,
                "same": row.same,
                "setting": row.setting,
                "tokens_ratio": as_dict(bootstrap_ratio(*tokens, seed=SEED, groups=groups)),
                "kept_difference": as_dict(bootstrap_ratio(weight * gain, weight, seed=SEED, groups=groups)),
            }
        )
    return found


def _at_shares(cases: Sequence[Case], shares: Sequence[float]) -> tuple[Seen, ...]:
    return tuple(case.at_share(share) for case, share in zip(cases, shares, strict=True))


def _by_curve(case: Case, seen: Seen) -> Seen:
    return replace(seen, kept=float(case.kept.at(seen.share)))


def _score(cases: Sequence[Case], seen: Sequence[Seen]) -> tuple[float, float]:
    """Mean by weight, and 5th percentile, of what is kept."""
    kept = np.array([s.kept for s in seen])
    weight = np.array([case.weight for case in cases])
    return float(np.average(kept, weights=weight)), float(np.quantile(kept, 0.05))
