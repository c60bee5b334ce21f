"""What a model's answers are worth: against references, or by the likelihood of its own full-compute answer.

Knows text metrics and likelihoods. The model is behind a small protocol (`labeller` has a real one); must not
know runners, adapters, tensors or files.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from adaptive_fusion.bench.scenes import recall
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.ladder import Rung
from adaptive_fusion.learning.labels import Subject
from adaptive_fusion.learning.metrics import anls, exact_match, tokenize
from adaptive_fusion.learning.oracle import Scores
from adaptive_fusion.point import NATIVE

NATIVE_RUNG = Rung(NATIVE)


@dataclass(frozen=True)
class Example:
    """An input to label: media, a question, and right answers if there are any.

    Attributes:
        media: What the model takes, or a function that gives it (so that several processes need not be sent
            the pixels).
        prompt: The question.
        references: Right answers; without any, the model's own full-compute answer counts.
        metric: How answers are scored against the references; one of `METRICS`.
        slices: Go into the label.
    """

    media: Any
    prompt: str
    references: tuple[str, ...] = ()
    metric: str = "words"
    slices: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages: the file's name, or the question."""
        return Path(self.media).name if isinstance(self.media, str | Path) else self.prompt


@dataclass(frozen=True)
class Took:
    """What a rung took on an input: times in milliseconds, counts of patches and tokens; None if not measured.

    `latency_ms` is the time to the last token.
    """

    ttft_ms: float
    latency_ms: float | None = None
    patches: int | None = None
    visual_tokens: int | None = None
    new_tokens: int | None = None

    def to_dict(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Model(Protocol):
    """What the scorer needs of a model. Rungs come together, so that a model can share work among them."""

    def describe(self, example: Example, /) -> Subject:
        """Hashes and features of the media and the question."""
        ...

    def answers(self, example: Example, rungs: Sequence[Rung], /) -> Mapping[str, tuple[str, Took]]:
        """The greedy answer by rung name, and what it took."""
        ...

    def likelihoods(self, example: Example, text: str, rungs: Sequence[Rung], /) -> Mapping[str, tuple[float, Took]]:
        """By rung name the mean log-likelihood per token of `text` as the answer, teacher-forced, and what
        the pass took."""
        ...


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words against the closest reference (Rajpurkar et al.
    2016)."""
    best = 0.0
    said = Counter(tokenize(prediction))
    for reference in references:
        words = Counter(tokenize(reference))
        shared = (said & words).total()
        total = said.total() + words.total()
        best = max(best, 2 * shared / total if total else 1.0)
    return best


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "anls": anls,
    "elements": recall,
    "exact": exact_match,
    "words": word_f1,
}
"""How an answer is scored against references, in [0, 1]: read text, elements of a reference scene's
description, short answers, captions."""


@dataclass(frozen=True)
class ModelScorer:
    """Scores rungs by a model's answers against references, or without any by the likelihood of its own
    answer.

    Without references the native point answers first; a rung's quality is then
    ``min(1, exp(loglik(rung) - loglik(native)))``, the ratio of the geometric mean token probabilities of
    that answer, one forward pass a rung. The native point has quality 1. The cost is the time to the first
    token.
    """

    model: Model

    def describe(self, item: Example) -> Subject:
        """See `Scorer`."""
        return self.model.describe(item)

    def score(self, item: Example, rungs: Sequence[Rung]) -> Scores:
        """See `Scorer`.

        Raises:
            ConfigError: For an unknown metric or a likelihood that is not finite.
        """
        return self._by_references(item, rungs) if item.references else self._by_likelihood(item, rungs)

    def _by_references(self, item: Example, rungs: Sequence[Rung]) -> Scores:
        if item.metric not in METRICS:
            raise ConfigError(f"metric is {item.metric!r}; expected one of {', '.join(sorted(METRICS))}")
        found = self.model.answers(item, _with_native(rungs))
        quality = {name: METRICS[item.metric](text, item.references) for name, (text, _) in found.items()}
        return _scores(quality, quality[NATIVE_RUNG.name], {name: took for name, (_, took) in found.items()})

    def _by_likelihood(self, item: Example, rungs: Sequence[Rung]) -> Scores:
        text, _ = self.model.answers(item, [NATIVE_RUNG])[NATIVE_RUNG.name]
        found = self.model.likelihoods(item, text, _with_native(rungs))
        for name, (value, _) in found.items():
            if not math.isfinite(value):
                raise ConfigError(f"log-likelihood under {name} is {value}; expected a number")
        full, _ = found[NATIVE_RUNG.name]
        quality = {name: min(1.0, math.exp(value - full)) for name, (value, _) in found.items()}
        return _scores(quality, 1.0, {name: took for name, (_, took) in found.items()})


def _scores(quality: Mapping[str, float], reference: float, took: Mapping[str, Took]) -> Scores:
    cost = {name: each.ttft_ms for name, each in took.items()}
    return Scores(quality, reference, cost, {name: each.to_dict() for name, each in took.items()})


def _with_native(rungs: Sequence[Rung]) -> list[Rung]:
    return [NATIVE_RUNG, *(rung for rung in rungs if rung.name != NATIVE_RUNG.name)]
