"""What a policy does with cases whose answers are known: kept quality and cost, second passes included.

Knows planners, policies and answers. Must not know how a policy was fitted. No model runs: decisions are made as they
would be, and what they lead to is read off the labels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adaptive_fusion.budget import Budget
from adaptive_fusion.control.candidates import Choice
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval, intervals, most_mean, most_mean_by_betting
from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.asking import MANY
from adaptive_fusion.learning.adapting.cases import planner_for
from adaptive_fusion.learning.adapting.needs import by_image
from adaptive_fusion.learning.adapting.source import Source
from adaptive_fusion.learning.data.dataset import BoolArray, FloatArray, mean_of_first
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG
from adaptive_fusion.policy.policy import Policy

FOLDS = 5
SURE = 0.975
"""Confidence of a lower end, as that of a 95 % interval."""
PROMISED = 0.5
"""Share of the tolerance that a policy may lose on average."""
ALLOWED = 0.125
"""Share of the tolerance by which what is seen may fall short of that: it is right as often as not."""
SURELY = 0.9
"""Confidence of the bound on what is kept (`most_mean_by_betting`)."""
FOUR_IN_FIVE = 0.43
"""Of the half width of a 95 % interval: what lies beyond has one chance in five, by the normal distribution."""


@dataclass(frozen=True)
class Taken:
    """What became of each row, ``[n]``: quality, milliseconds to the first token, visual tokens, and whether a second
    pass ran."""

    quality: FloatArray
    cost: FloatArray
    tokens: FloatArray
    second: BoolArray

    @classmethod
    def none_yet(cls, size: int) -> "Taken":
        """Rows that are filled in afterwards."""
        return cls(np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size, dtype=bool))

    @classmethod
    def together(cls, parts: Mapping[int, tuple[BoolArray, "Taken"]], size: int) -> "Taken":
        """Rows of several parts, each with the mask of those that it has."""
        whole = cls.none_yet(size)
        for rows, part in parts.values():
            for name in ("quality", "cost", "tokens", "second"):
                getattr(whole, name)[rows] = getattr(part, name)
        return whole


def take(source: Source, policy: Policy, answers: Answers, *, asks: bool = True) -> Taken:
    """What the policy would have done with every row, one after the other, without a limit on time.

    As in service, verdicts teach how many requests go on.

    Args:
        source: The model whose answers they are.
        policy: Whose rungs for stills were all run.
        answers: The model's own.
        asks: Whether the model is asked at all; else every plan is taken as it is.

    Raises:
        ConfigError: For a decision that no answer is known of.
    """
    planner = planner_for(source.adapter, policy, source.profile)
    column = {rung.name: i for i, rung in enumerate(answers.rungs)}
    found = Taken.none_yet(len(answers))
    for row, case in enumerate(answers.cases):
        asking = source.asking(policy, case.subject.prompt_kind or "other") if asks else None
        decision, choice = planner.decide(replace(case.info, asking=asking), Budget())
        passes, second = [decision.rung], dict(decision.escalation or {})
        if decision.rung not in column:
            raise ConfigError(f"{policy.name} takes {decision.rung}; expected one of {', '.join(column)}")
        if asking is not None and "to" in second:
            entropy = mean_of_first(answers.entropy[[row], column[decision.rung]], int(second["k"]))[0]
            goes_on = bool(entropy > float(second["threshold"]))
            planner.controller.looked_at(choice, choice.candidate.predicted.ttft_ms, escalated=goes_on)
            if goes_on:
                passes.append(str(second["to"]))
        places = [column[name] for name in passes]
        found.quality[row] = answers.quality[row, places[-1]]
        found.cost[row] = answers.cost[row, places].sum() + _waited_ms(choice, answers.cost[row, places[0]])
        found.tokens[row] = answers.tokens[row, places].sum()
        found.second[row] = len(places) > 1
    return found


def _waited_ms(choice: Choice, first_ms: float) -> float:
    """What looking at more than the first token adds to the time to a first one that took so long: as much of it as
    is predicted."""
    second = choice.candidate.second
    return 0.0 if second is None else first_ms * second.wait_ms / choice.candidate.predicted.ttft_ms


def priced(source: Source, policy: Policy, answers: Answers) -> Answers:
    """The same with the predicted times to the first token in place of those that were taken while all else ran, and
    what each more token takes: the same answers then lead to the same policy, however they were had. How many patches
    are blank is not predicted, since they were counted."""
    planner, known = planner_for(source.adapter, policy, source.profile), dict[Any, Prediction]()
    cost, wait = np.empty_like(answers.cost), np.zeros(len(answers))
    for row, case in enumerate(answers.cases):
        tokens = planner.expected_tokens(case.info)
        for column, rung in enumerate(answers.rungs):
            count = answers.patches[row, column] if rung.point.blanks is not None else np.nan
            patches = None if np.isnan(count) else int(count)
            key = tuple(case.info.sizes), case.info.text_tokens, case.info.max_new_tokens, rung.name, patches
            if key not in known:
                point = source.adapter.resolve(rung, case.info.sizes)
                known[key] = planner.predicted(point, case.info, patches=patches)
            cost[row, column] = known[key].ttft_ms
            if rung.name == NATIVE_RUNG.name:
                wait[row] = known[key].decode_ms / max(1.0, tokens - 1)
    return replace(answers, cost=cost, wait=wait)


def cross_fitted(
    answers: Answers, fit: Callable[[Answers], Policy], judge: Callable[[Policy, Answers], Taken]
) -> Taken:
    """Each fold of the images by a policy that was fitted on the others."""
    folds = answers.folds(FOLDS)
    parts: dict[int, tuple[BoolArray, Taken]] = {}
    for fold in map(int, np.unique(folds)):
        held: BoolArray = folds == fold
        parts[fold] = held, judge(fit(answers.take(~held)), answers.take(held))
    return Taken.together(parts, len(answers))


def figures(answers: Answers, sides: Mapping[str, Taken], *, seed: int = 0, n: int = 500) -> dict[str, Interval]:
    """Of every side: quality ``kept`` of native's, ``ttft`` and ``tokens`` as shares of native's, share of ``second``
    passes; and of every side but the first the differences of the first to it. With 95 % bootstrap intervals over
    images, all sides on the same resamples. What is kept has no lower end that so few images cannot promise, whatever
    they showed (`most_mean`). The first side's ``surely`` is a bound on what it keeps, with confidence `SURELY`."""
    native = [rung.name for rung in answers.rungs].index(NATIVE_RUNG.name)
    full_cost, full_tokens = answers.cost[:, native], answers.tokens[:, native]
    first, *others = sides

    def statistics(weight: FloatArray) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, taken in sides.items():
            found[f"{name} kept"] = float(np.average(taken.quality, weights=weight))
            found[f"{name} ttft"] = float(weight @ taken.cost / (weight @ full_cost))
            found[f"{name} tokens"] = float(weight @ taken.tokens / (weight @ full_tokens))
            found[f"{name} second"] = float(np.average(taken.second, weights=weight))
        for name in others:
            for what in ("kept", "ttft", "tokens"):
                found[f"{what} over {name}"] = found[f"{first} {what}"] - found[f"{name} {what}"]
        return found

    found = dict(intervals(statistics, answers.group, seed=seed, n=n))
    for name, taken in sides.items():
        kept = found[f"{name} kept"]
        surely = 1.0 - most_mean(by_image(1.0 - taken.quality, answers.group), level=SURE)
        found[f"{name} kept"] = replace(kept, low=min(kept.low, surely))
    bound = 1.0 - most_mean_by_betting(by_image(1.0 - sides[first].quality, answers.group), level=SURELY)
    return {**found, f"{first} surely": Interval(bound, bound, bound)}


def refused(found: Mapping[str, Interval], other: str, tolerance: float, images: int) -> str:
    """Why a policy must not take the place of `other`, in words; empty where it may.

    What is promised is what `PROMISED` of the tolerance leaves. A policy may not replace the other if it keeps less
    than that and than the other, `ALLOWED` of the tolerance aside; if it keeps less than the other and is not sure to
    lose no more than the tolerance, or as sure as `MANY` images or more can be that lose no more than what is promised;
    or if it is not cheaper with four chances in five, unless the other surely loses more than the tolerance and it
    surely keeps more.
    """
    kept, more, ttft = found["adapted kept"], found[f"kept over {other}"], found[f"ttft over {other}"]
    beside = found[f"{other} kept"]
    least = min(1.0 - PROMISED * tolerance, beside.mean) - ALLOWED * tolerance
    if kept.mean < least:
        return f"it keeps {_said(kept)} of the answers at full compute; expected {least:.4f} or more"
    surely, expected = found["adapted surely"].mean, 1.0 - tolerance
    if images >= MANY:
        nothing_lost = 1.0 - most_mean_by_betting(np.zeros(images), level=SURELY)
        expected = min(expected, nothing_lost - (PROMISED + ALLOWED) * tolerance)
    if more.mean < 0 and surely < expected:
        return f"it keeps less than {other}, and {surely:.4f} is all that is sure; expected {expected:.4f} or more"
    needed = beside.high < 1.0 - tolerance and more.low > 0
    if ttft.mean + FOUR_IN_FIVE * (ttft.high - ttft.mean) > 0 and not needed:
        said = f"{_said(ttft)} more time to the first token, of native's"
        return f"it is not surely as cheap as {other} ({said}), which keeps {beside.mean:.3f}"
    return ""


def _said(value: Interval) -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"
