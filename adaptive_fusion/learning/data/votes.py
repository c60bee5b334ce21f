"""What several people said of one input, as one label: the side most are on, and how far they agree.

Knows raters, times and targets from 0 (simple) to 1 (complex). Must not know files, tables or what is fitted.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from adaptive_fusion.checks import is_number

_TIE = 1e-9
"""Agreement below which there is none but for rounding."""


class Opinion(NamedTuple):
    """What one label record says.

    `votes` are the targets of its raters, by name; people without a name are those of `source_id`. `sided` says that
    they are for a side each, not ranks. `strength` is what a unanimous vote would weigh; None where the record is a tie
    and does not say.
    """

    source_id: str | None
    time_s: float
    votes: Mapping[str | None, tuple[float, ...]]
    sided: bool
    strength: float | None


def pool(targets: Sequence[float], *, sided: bool, strengths: Sequence[float] | None = None) -> tuple[float, float]:
    """Target and weight of several votes, whatever their order.

    The weight is the agreement, ``|2 mean - 1|``: 1 if all are of one mind, 0 for a tie, whose target is one half.

    Args:
        targets: At least one, each from 0 to 1.
        sided: Whether the target is the side that the majority is on, 0 or 1, and not the mean, as of ranks.
        strengths: How much each counts, above 0, and what it weighs alone; 1 if left out.
    """
    given = [1.0] * len(targets) if strengths is None else strengths
    if len(targets) == 1:
        return targets[0], given[0] * abs(2 * targets[0] - 1)
    whole = math.fsum(given)
    leaning = math.fsum(s * (2 * t - 1) for t, s in zip(targets, given, strict=True))
    if abs(leaning) <= _TIE * whole:
        return 0.5, 0.0
    mean = math.fsum(s * t for t, s in zip(targets, given, strict=True)) / whole
    return float(mean > 0.5) if sided else mean, abs(leaning) / len(targets)


def opinion(source_id: str | None, time_s: float, target: float, weight: float, votes: Any) -> Opinion:
    """The opinion in a record's fields; without valid `votes` it is that of its `source_id` alone."""
    named: dict[str | None, list[float]] = defaultdict(list)
    for vote in votes if isinstance(votes, list) else ():
        value: Any = vote.get("target") if isinstance(vote, dict) else None
        if is_number(value) and 0 <= value <= 1:
            named[vote["rater"] if isinstance(vote.get("rater"), str) else None].append(float(value))
    if not named:
        named[None].append(target)
    sided = target in (0.0, 0.5, 1.0)
    agreement = pool([value for values in named.values() for value in values], sided=sided)[1]
    strength = weight / agreement if agreement else None
    ballots = {rater: tuple(sorted(values)) for rater, values in named.items()}
    return Opinion(source_id, time_s, ballots, sided, strength)


def agree(opinions: Iterable[Opinion]) -> tuple[float, float]:
    """Target and weight of several records on one input, whatever their order.

    Of each rater the newest vote counts. Votes of one rater at one time that differ are averaged; a record of no
    weight does not count. The target is the side that most are on, or where some gave ranks the mean.
    """
    by_rater: dict[str | None, list[tuple[Opinion, tuple[float, ...]]]] = defaultdict(list)
    for said in opinions:
        if said.strength != 0:
            for rater, votes in said.votes.items():
                by_rater[said.source_id if rater is None else rater].append((said, votes))
    known = [said.strength for group in by_rater.values() for said, _ in group if said.strength is not None]
    usual = math.fsum(known) / len(known) if known else 1.0
    targets: list[float] = []
    strengths: list[float] = []
    sided = True
    for group in by_rater.values():
        newest = max(said.time_s for said, _ in group)
        last = [(said, votes) for said, votes in group if said.time_s == newest]
        ballots = [votes for _, votes in last]
        counted = ballots[0]
        if any(ballot != counted for ballot in ballots):
            mean = math.fsum(math.fsum(ballot) / len(ballot) for ballot in ballots) / len(ballots)
            counted = (mean,) * max(map(len, ballots))
        targets += counted
        sided &= all(said.sided for said, _ in last)
        strength = math.fsum(usual if said.strength is None else said.strength for said, _ in last) / len(last)
        strengths += [strength] * len(counted)
    return pool(targets, sided=sided, strengths=strengths) if targets else (0.5, 0.0)
