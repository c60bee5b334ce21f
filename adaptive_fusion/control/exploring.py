"""Exploring: a small share of requests takes a random point that fits, so that logs say what other policies would do.

Knows names of requests, numbers and candidates. Must not know models, media or how a choice is weighed.

The law, for a share e and the K points that fit a request's budget, of the few that `Offering` has beside its own:

- with probability e, drawn from the request's id alone, one of the K is taken at random, each with e / K;
- else the controller's own choice, whose propensity is therefore 1 - e + e / K;
- a point fits if the controller would take it were it the only one, at no more risk to be late than the budget allows
  (1 - attainment) or than the controller's own choice has;
- where nothing may be explored (see `Planner`) the propensity is 1.

The draw is a keyed hash of the id, so the same request is drawn alike on every replica, in every process and again when
a log is read: no generator has a state that could be lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from adaptive_fusion.checks import number
from adaptive_fusion.control.candidates import Candidate

MOST = 0.25
"""Largest share that may be asked for: exploring costs quality in proportion to it."""
_BITS = 53  # as many as a float has


@dataclass(frozen=True, slots=True)
class Drawn:
    """With which probability a point was taken, and whether it was drawn at random."""

    propensity: float = 1.0
    explored: bool = False


GREEDY = Drawn()
"""The controller's choice where nothing is explored."""


def check_share(explore: float) -> float:
    """A share to explore with, 0 to `MOST`.

    Raises:
        ConfigError: For anything else.
    """
    return number(explore, "explore", 0, MOST)


def uniforms(request_id: str, seed: int | None = None) -> tuple[float, float]:
    """Two numbers in [0, 1) that follow from the id and the seed: whether it explores, and what."""
    digest = blake2b(request_id.encode(), digest_size=16, key=b"" if seed is None else str(seed).encode()).digest()
    first, second = (int.from_bytes(half) >> (64 - _BITS) for half in (digest[:8], digest[8:]))
    return first * 2.0**-_BITS, second * 2.0**-_BITS


def explores(request_id: str, share: float, seed: int | None = None) -> bool:
    """Whether a request is one of the `share` that explores, if it may."""
    return share > 0.0 and bool(request_id) and uniforms(request_id, seed)[0] < share


def draw(
    fitting: Sequence[Candidate], own: Candidate, request_id: str, share: float, seed: int | None = None
) -> tuple[Candidate, Drawn]:
    """What a request takes of the points that fit, its `own` choice among them, and with which propensity."""
    each = share / len(fitting)
    whether, which = uniforms(request_id, seed)
    if whether >= share:
        return own, Drawn(1.0 - share + each)
    drawn = fitting[int(which * len(fitting))]
    return drawn, Drawn(each + (1.0 - share if drawn.point == own.point else 0.0), explored=True)
