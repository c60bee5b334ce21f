"""What becomes of a model's answers: a policy, what it buys, and whether it may take the general one's place.

Knows fits and judgements. Must not know files, or how answers are had.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.adapting.answers import Answers
from adaptive_fusion.learning.adapting.asking import MANY
from adaptive_fusion.learning.adapting.fit import Adapted, adapt_policy
from adaptive_fusion.learning.adapting.judge import FOLDS, Taken, cross_fitted, figures, priced, refused, take
from adaptive_fusion.learning.adapting.source import Source
from adaptive_fusion.policy.policy import Policy


@dataclass(frozen=True)
class Settled:
    """What the answers lead to.

    Attributes:
        base: The general policy that was the prior.
        found: The policy that was fitted, with what became of its parts.
        figures: See `judge.figures`; of ``adapted`` by policies of other folds, of ``general`` as it is.
        refusal: Why it must not be used, in words; empty where it may.
    """

    base: Policy
    found: Adapted
    figures: Mapping[str, Interval]
    refusal: str

    @property
    def policy(self) -> Policy:
        """The one that is used from then on."""
        return self.base if self.refusal else self.found.policy


def settle(source: Source, answers: Answers, base: Policy, name: str, weights: Sequence[Path] = ()) -> Settled:
    """Fit a policy, judge it by policies that were fitted on other images, and decide.

    Args:
        source: The model whose answers they are.
        answers: The model's own.
        base: See `adapt_policy`.
        name: Of the new policy.
        weights: Fusion modules that the lanes run.
    """

    answers = priced(source, base, answers)
    folds = answers.folds(FOLDS)
    # The policies that are judged, each without a fold, must be of the kind that is used.
    many = min(answers.take(folds != fold).images for fold in np.unique(folds)) >= MANY

    def fit(some: Answers) -> Adapted:
        return adapt_policy(some, base, name, weights, many=many)

    def judge(policy: Policy, some: Answers) -> Taken:
        return take(source, policy, some)

    # Both in the same folds, since verdicts teach how many requests go on: where nothing was learned they are one.
    adapted = cross_fitted(answers, lambda some: fit(some).policy, judge)
    general = cross_fitted(answers, lambda some: base, judge)
    found = figures(answers, {"adapted": adapted, "general": general})
    return Settled(base, fit(answers), found, refused(found, "general", answers.tolerance, answers.images))
