"""A policy for one model from its own answers: every part of the general policy moved as far as the images allow.

Knows answers and what a policy is made of. Must not know files, how answers are had or how a policy is judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from adaptive_fusion.learning.adapting.answers import NAMES, Answers
from adaptive_fusion.learning.adapting.asking import MANY, choose_asking
from adaptive_fusion.learning.adapting.lanes import Laned, choose_lanes
from adaptive_fusion.learning.adapting.needs import FOLDS, fit_own_needs
from adaptive_fusion.learning.adapting.router import fit_router, scores_out_of_fold, widened
from adaptive_fusion.learning.fitting.fit import fitted_to
from adaptive_fusion.policy.escalation import UNFITTED
from adaptive_fusion.policy.familiar import Familiar
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, Policy
from adaptive_fusion.policy.rungs import Rung

LANE_ROWS = 20.0
"""Rows that a rung's general quality counts as beside the model's own."""


@dataclass(frozen=True)
class Adapted:
    """A policy, and what became of each of its parts: ``own`` or ``general``, with the reason."""

    policy: Policy
    parts: Mapping[str, str]


def ladders(base: Policy, shares: Sequence[float]) -> dict[str, tuple[Rung, ...]]:
    """The base's lanes with those steps of stills that are run: what was not run is not offered."""
    wanted = {1.0, *shares}
    stills = {
        lane: tuple(rung for rung in base.lanes[lane] if rung.pixel_share in wanted) for lane in (SIMPLE, COMPLEX)
    }
    return {**base.lanes, **stills}


def adapt_policy(
    answers: Answers, base: Policy, name: str, weights: Sequence[Path] = (), *, many: bool = True
) -> Adapted:
    """Fit every part that the answers are enough for; the others stay the general policy's. The same answers give the
    same policy, to the last bit.

    Args:
        answers: The model's own, at the rungs of `base`'s lanes for stills and at its cheap plan.
        base: The general policy, whose lanes have the steps that were run and no others.
        name: Of the new policy.
        weights: Fusion modules that the lanes run.
        many: Whether what takes `MANY` images may be fitted, where there are so many.

    Raises:
        ConfigError: If the base's router or needs are of a form that cannot be a prior.
    """
    with threadpool_limits(1, user_api="blas"):  # the order of sums must not depend on the machine's cores
        return _adapted(answers, base, name, weights, many and answers.images >= MANY)


def _adapted(answers: Answers, base: Policy, name: str, weights: Sequence[Path], many: bool) -> Adapted:
    data = answers.dataset(base.cheap_rung.name)
    policy = replace(
        base,
        name=name,
        description=f"Fitted to one model by its own answers on {answers.images} images.",
        fitted=replace(fitted_to(data), kinds=(f"{answers.images} images of the user's own",)),
        fusion_weights=tuple(weights),
    )
    parts = dict[str, str]()
    if answers.tells and not many:
        # A margin that so few images can vouch for costs more than asking does, and a threshold needs more of them.
        few = f"{answers.images} images are too few for another that could be judged"
        parts |= dict.fromkeys(("router", "needs", "escalation"), f"general: {few}")
        policy = replace(policy, escalation=UNFITTED)
    else:
        router = widened(base.router, data.names, data.x)
        x = data.columns(router.inputs.names)
        parts["router"] = f"general, moved by {answers.images} images"
        lanes = {lane: _qualities(base.lanes[lane], answers) for lane in base.lanes}
        policy = replace(policy, router=fit_router(router, x, data.y), lanes=lanes)
        laned = None
        if many:
            unseen = scores_out_of_fold(router, x, data.y, answers.folds(FOLDS))
            laned = choose_lanes(answers, unseen, base.threshold, base.lanes)
        policy = _with_needs(policy, answers, parts, many, laned)
    return Adapted(_with_familiar(policy, answers, parts), parts)


def _qualities(ladder: Sequence[Rung], answers: Answers) -> tuple[Rung, ...]:
    """With the mean that each rung keeps, drawn to its general quality; a rung is never better than the one before."""
    known = {rung.name: column for rung, column in zip(answers.rungs, answers.quality.T, strict=True)}
    out, limit = list[Rung](), 1.0
    for rung in ladder:
        own = known.get(rung.name, np.empty(0))
        mean = (LANE_ROWS * rung.quality + float(own.sum())) / (LANE_ROWS + len(own))
        limit = min(limit, 1.0 if rung.is_full else mean)
        out.append(replace(rung, quality=limit))
    return tuple(out)


def _with_lanes(policy: Policy, laned: Laned, parts: dict[str, str]) -> Policy:
    """The policy with the steps that its lanes take first."""
    said = [
        f"{kind} in {lane}: {name or 'full compute'}"
        for lane, kinds in laned.rules.first.items()
        for kind, name in kinds.items()
    ]
    parts["needs"] = "general, where a budget asks for less than the first steps"
    parts["escalation"] = f"own first steps and thresholds ({'; '.join(said)})"
    return replace(policy, threshold=laned.cut, escalation=laned.rules)


def _of_pixels(lanes: Mapping[str, tuple[Rung, ...]]) -> dict[str, tuple[Rung, ...]]:
    """The lanes with steps of pixels alone for stills, where there are such."""
    pixels = {
        lane: tuple(rung for rung in lanes[lane] if rung.point.blanks is None) or lanes[lane]
        for lane in (SIMPLE, COMPLEX)
    }
    return {**lanes, **pixels}


def _with_needs(policy: Policy, answers: Answers, parts: dict[str, str], many: bool, laned: Laned | None) -> Policy:
    """The policy with the model's own needs, and what is asked about them, or with lanes where these cost less; with
    too few images what is enough stays a guess, and is asked about as for a model that nothing was fitted to."""
    enough = policy.sufficiency
    if answers.tells:
        policy = replace(policy, escalation=UNFITTED)
        few = f"with {answers.images} images nothing below full compute is trusted without a look"
        parts["escalation"] = f"general: {few}"
    else:
        parts["escalation"] = "none: the engine gave no log-probabilities to look at"
    if enough is None:
        parts["needs"] = "general: the base policy has none"
        return policy if laned is None else _with_lanes(policy, laned, parts)
    own, octaves = fit_own_needs(answers, enough.text.per_octave)
    asked = choose_asking(answers, octaves) if many and own is not None else None
    if laned is not None and (asked is None or laned.cost < asked.cost):
        return _with_lanes(policy, laned, parts)
    if own is None:
        parts["needs"] = (
            f"general, with its margin of {policy.margin:g}: {answers.images} images are too few for another"
        )
        return policy
    parts["needs"] = f"own, by kind of question ({', '.join(own.kinds)}), in place of the reader's margin"
    # What it needs is a number of pixels: of steps that spare something else nothing was learned.
    policy = replace(policy, lanes=_of_pixels(policy.lanes))
    if asked is not None:
        kinds = {kind: value + asked.margins[kind] for kind, value in own.kinds.items()}
        own = replace(own, kinds=kinds, margin=0.0)
        policy = replace(policy, escalation=asked.rules if answers.tells else None)
        looked = [kind for kind in kinds if asked.rules.threshold("", kind).threshold is not None]
        if answers.tells:
            parts["escalation"] = f"own thresholds for {', '.join(looked)}" if looked else "not needed at these margins"
    return replace(policy, sufficiency=replace(enough, own=own))


def _with_familiar(policy: Policy, answers: Answers, parts: dict[str, str]) -> Policy:
    """The range of familiar images, wide enough for the user's own: none of these was used to fit the distance, so the
    limit that they calibrate holds for others like them."""
    known = policy.familiar
    if known is None:
        return policy
    _, first = np.unique(answers.group, return_index=True)
    rows = [dict(zip(NAMES, answers.features[row], strict=True)) for row in first]
    distances = tuple(sorted(known.distance(row) for row in rows if np.isfinite(list(row.values())).all()))
    if len(distances) < 1 / known.alpha - 1:
        parts["familiar"] = f"general: {len(distances)} images are too few for another limit"
        return policy
    own = Familiar(known.clouds, known.middle, known.spread, distances, known.alpha)
    wider = own.limit > known.limit
    parts["familiar"] = "own: the limit is wider" if wider else "general: the images lie within it"
    return replace(policy, familiar=own) if wider else policy
