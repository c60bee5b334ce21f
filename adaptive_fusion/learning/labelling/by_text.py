"""What pixels keep of an engine's answers, by their texts: for models whose tokens nobody can see.

Without references the full answer is the measure: what a rung's answer shares with it, by the F1 of their words, and
where the question asks to read, by ANLS. Knows questions, rungs and texts. The engine is behind a small protocol; must
not know addresses, requests or policies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.text import anls, word_f1
from adaptive_fusion.features.prompts import prompt_kind
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.learning.labelling.labeller import describe
from adaptive_fusion.learning.labelling.oracle import RungScores
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG, RungTiming
from adaptive_fusion.policy.rungs import Rung

READING = "read"
"""The kind of question whose answers are compared letter by letter."""


class Asked(Protocol):
    """An engine that answers at a rung."""

    def __call__(self, question: Question, rung: Rung, /) -> tuple[str, RungTiming]:
        """The greedy answer and what it took; the first tokens' entropies where the engine gives them."""
        ...


class AnswersAt(Protocol):
    """A model behind an address."""

    def answer_at(
        self, media: Any, prompt: str | None, rung: Rung, max_new_tokens: int, /
    ) -> tuple[str, Measurement, tuple[float, ...]]:
        """The greedy answer at a rung, what it took, and the entropies of its first tokens."""
        ...


def asked_of(engine: AnswersAt, max_new_tokens: int) -> Asked:
    """The same for labels."""

    def asked(question: Question, rung: Rung) -> tuple[str, RungTiming]:
        text, took, unsure = engine.answer_at(question.load(), question.prompt or None, rung, max_new_tokens)
        timing = RungTiming(took.ttft_ms, took.latency_ms, None, took.visual_tokens, took.new_tokens, entropies=unsure)
        return text, timing

    return asked


@dataclass(frozen=True)
class TextScorer:
    """Scores rungs by the texts of an engine's answers; see `oracle.Scorer`."""

    asked: Asked

    def describe(self, question: Question) -> Subject:
        """See `Scorer`."""
        return describe(question)

    def score(self, question: Question, rungs: Sequence[Rung]) -> RungScores:
        """See `Scorer`.

        Raises:
            ConfigError: For references without a metric.
        """
        named = {rung.name: rung for rung in (NATIVE_RUNG, *rungs)}
        found = {name: self.asked(question, rung) for name, rung in named.items()}
        full = found[NATIVE_RUNG.name][0]
        quality = {name: self._worth(question, text, full) for name, (text, _) in found.items()}
        reference = quality[NATIVE_RUNG.name]
        took = {name: each for name, (_, each) in found.items()}
        return RungScores(
            quality,
            reference,
            {name: each.ttft_ms for name, each in took.items()},
            {name: each.to_dict() for name, each in took.items()},
            {name: each.entropies for name, each in took.items() if each.entropies},
        )

    def _worth(self, question: Question, text: str, full: str) -> float:
        if question.references:
            if (worth := question.score(text)) is None:
                raise ConfigError("metric is None; expected one to score answers against the references by")
            return float(worth)
        if not full.strip():
            return float(not text.strip())
        reads = prompt_kind(question.prompt) == READING
        return float(anls(text, [full]) if reads else word_f1(text, [full]))
