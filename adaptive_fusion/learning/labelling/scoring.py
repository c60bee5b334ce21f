"""What a model's answers are worth: against references, or by the likelihood of its own full-compute answer.

Knows text metrics and likelihoods. The model is behind a small protocol (`labeller` has a real one); must not
know runners, adapters, tensors or files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.learning.labelling.oracle import RungScores
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.rungs import Rung

NATIVE_RUNG = Rung(NATIVE)


@dataclass(frozen=True)
class RungTiming:
    """What a rung took on an input: times in milliseconds, counts of patches and tokens; None if not measured.

    `latency_ms` is the time to the last token. `entropies` are those of the first tokens' distributions, in nats, by
    the model's own logits.
    """

    ttft_ms: float
    latency_ms: float | None = None
    patches: int | None = None
    visual_tokens: int | None = None
    new_tokens: int | None = None
    entropies: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, float]:
        """What was measured, by name, without the entropies."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value for name, value in found.items() if name != "entropies"}


class Model(Protocol):
    """What the scorer needs of a model. Rungs come together, so that a model can share work among them."""

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Which model it is; None where that is not known."""
        ...

    def describe(self, question: Question, /) -> Subject:
        """Hashes and features of the media and the question."""
        ...

    def answers(self, question: Question, rungs: Sequence[Rung], /) -> Mapping[str, tuple[str, RungTiming]]:
        """The greedy answer by rung name, and what it took."""
        ...

    def likelihoods(
        self, question: Question, text: str, rungs: Sequence[Rung], /
    ) -> Mapping[str, tuple[float, RungTiming]]:
        """By rung name the mean log-likelihood per token of `text` as the answer, teacher-forced, and what
        the pass took."""
        ...


@dataclass(frozen=True)
class ModelScorer:
    """RungScores rungs by a model's answers against references, or without any by the likelihood of its own
    answer.

    Without references the native point answers first; a rung's quality is then
    ``min(1, exp(loglik(rung) - loglik(native)))``, the ratio of the geometric mean token probabilities of
    that answer, one forward pass a rung. The native point has quality 1. The cost is the time to the first
    token.
    """

    model: Model

    def describe(self, question: Question) -> Subject:
        """See `Scorer`."""
        return self.model.describe(question)

    def score(self, question: Question, rungs: Sequence[Rung]) -> RungScores:
        """See `Scorer`.

        Raises:
            ConfigError: For an unknown metric or a likelihood that is not finite.
        """
        return self._by_references(question, rungs) if question.references else self._by_likelihood(question, rungs)

    def _scores(self, quality: Mapping[str, float], reference: float, took: Mapping[str, RungTiming]) -> RungScores:
        cost = {name: each.ttft_ms for name, each in took.items()}
        entropies = {name: each.entropies for name, each in took.items() if each.entropies}
        measured = {name: each.to_dict() for name, each in took.items()}
        return RungScores(quality, reference, cost, measured, entropies, self.model.fingerprint)

    def _by_references(self, question: Question, rungs: Sequence[Rung]) -> RungScores:
        if question.score("") is None:  # an unknown metric is refused before anything is run
            raise ConfigError("metric is None; expected one to score answers against the references by")
        found = self.model.answers(question, _with_native(rungs))
        quality = {name: float(question.score(text) or 0.0) for name, (text, _) in found.items()}
        return self._scores(quality, quality[NATIVE_RUNG.name], {name: took for name, (_, took) in found.items()})

    def _by_likelihood(self, question: Question, rungs: Sequence[Rung]) -> RungScores:
        text, _ = self.model.answers(question, [NATIVE_RUNG])[NATIVE_RUNG.name]
        found = self.model.likelihoods(question, text, _with_native(rungs))
        for name, (value, _) in found.items():
            if not math.isfinite(value):
                raise ConfigError(f"log-likelihood under {name} is {value}; expected a number")
        full, _ = found[NATIVE_RUNG.name]
        quality = {name: min(1.0, math.exp(value - full)) for name, (value, _) in found.items()}
        return self._scores(quality, 1.0, {name: took for name, (_, took) in found.items()})


def _with_native(rungs: Sequence[Rung]) -> list[Rung]:
    return [NATIVE_RUNG, *(rung for rung in rungs if rung.name != NATIVE_RUNG.name)]
