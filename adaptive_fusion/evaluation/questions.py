"""A question about media with its right answers: what is labelled, distilled from, benchmarked and demonstrated.

Knows media as something that can be loaded, and texts. Must not know of models, operating points or how an answer is
had.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.text import METRICS
from adaptive_fusion.media.hashes import content_hash

SLICE = "slice"
"""The slicing by which benchmarks report."""


@dataclass(frozen=True)
class Question:
    """Media, what is asked about them, and right answers if there are any.

    Attributes:
        media: Anything that a request takes as media (one medium or a list), or a function that gives it, so that
            several processes need not be sent the pixels.
        prompt: The question.
        references: Right answers; without any, a model's own full-compute answer may count.
        metric: How answers are scored against the references, a name in `METRICS`; None where only caption metrics
            apply.
        negatives: Captions that differ from the first reference in one element, word or character.
        slices: Names for reports by slicing, such as ``{"scene": "dense", "size": "large"}``.
    """

    media: Any
    prompt: str
    references: tuple[str, ...] = ()
    metric: str | None = "words"
    negatives: tuple[str, ...] = ()
    slices: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages: the file's name, or the question."""
        file = getattr(self.media, "name", None)
        return Path(self.media).name if isinstance(self.media, str | Path) else str(file or self.prompt)

    @property
    def slice(self) -> str:
        """The slice in which benchmarks report it."""
        return self.slices.get(SLICE, "")

    def load(self) -> Any:
        """The media themselves."""
        return self.media() if callable(self.media) else self.media

    def score(self, answer: str) -> float | None:
        """The quality of an answer in [0, 1]; None without a metric.

        Raises:
            ConfigError: For an unknown metric.
        """
        if self.metric is None:
            return None
        if self.metric not in METRICS:
            raise ConfigError(f"metric is {self.metric!r}; expected one of {', '.join(sorted(METRICS))}")
        return METRICS[self.metric](answer, self.references)

    @cached_property
    def content(self) -> str:
        """Hash of the media: what decides whether a question is held out."""
        media = self.load()
        several = isinstance(media, list | tuple)
        return "+".join(content_hash(one) for one in media) if several else content_hash(media)

    @cached_property
    def key(self) -> str:
        """Names the question in files."""
        return hashlib.sha256(f"{self.content}\n{self.prompt}".encode()).hexdigest()[:32]
