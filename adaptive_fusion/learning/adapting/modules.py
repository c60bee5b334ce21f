"""Fusion modules trained for a model before its answers are taken, and the lanes that run them.

Knows points, distillation and a work folder. Must not know labels, fits or judging.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.adapting.work import Work
from adaptive_fusion.learning.distillation.distil import distil
from adaptive_fusion.learning.distillation.settings import Settings
from adaptive_fusion.models import Adapter
from adaptive_fusion.models.trained import add_trained
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, Policy
from adaptive_fusion.progress import Progress

POINTS = {
    SIMPLE: OperatingPoint("weighted", 6, adapter_rank=4),
    COMPLEX: OperatingPoint("gated", 12, adapter_rank=8),
}
"""What each lane of stills runs where modules were trained."""
STEPS, BATCH = 300, 4
RATIOS, PIXELS = {1.0: 1.0}, {1.0: 1.0, 0.5: 1.0, 0.25: 1.0}
"""The lanes take pixels away and no tokens after the encoder, so that is what modules are trained for."""


@dataclass(frozen=True)
class Modules:
    """The modules of a model that are there or are to be trained; none for a model that keeps its own taps.

    Attributes:
        adapter: Of the model.
        work: Where they are kept.
        max_new_tokens: Upper bound of the model's answers that they learn from.
        points: By lane.
    """

    adapter: Adapter | None
    work: Work | None
    max_new_tokens: int
    points: Mapping[str, OperatingPoint]

    @classmethod
    def none(cls) -> "Modules":
        """For lanes that stay as they are."""
        return cls(None, None, 1, {})

    @classmethod
    def of(cls, adapter: Adapter, work: Work, max_new_tokens: int) -> "Modules":
        """One for each lane of stills.

        Raises:
            UnsupportedModelError: For a model without levels to fuse.
        """
        for point in POINTS.values():
            adapter.require(point)
        return cls(adapter, work, max_new_tokens, POINTS)

    @property
    def files(self) -> tuple[Path, ...]:
        """Where the modules are, or will be."""
        return tuple(self._file(point) for point in self.points.values())

    @property
    def questions(self) -> int:
        """Questions that are trained on, those of modules that are there not counted."""
        return STEPS * BATCH * sum(not file.exists() for file in self.files)

    def used_by(self, policy: Policy) -> Policy:
        """The policy with lanes that run them where pixels are taken away; with all pixels, and on clips, the model
        keeps its own taps."""
        lanes = dict(policy.lanes)
        for lane, point in self.points.items():
            lanes[lane] = tuple(
                replace(rung, point=replace(NATIVE, blanks=rung.point.blanks) if rung.pixel_share == 1 else point)
                for rung in policy.lanes[lane]
            )
        return replace(policy, lanes=lanes)

    def train(self, questions: Sequence[Question], progress: Progress) -> None:
        """Train those that are not there, and let the model run all of them; goes on where an earlier run stopped.

        Raises:
            UnsupportedModelError: For a model without taps.
            ConfigError: For too few images to hold some out.
        """
        if self.adapter is None or self.work is None:
            return
        settings = Settings(
            steps=STEPS, batch=BATCH, ratios=RATIOS, pixel_shares=PIXELS, max_new_tokens=self.max_new_tokens
        )
        for point, file in zip(self.points.values(), self.files, strict=True):
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                shared = file.parent / "answers"
                distil(self.adapter, questions, point, file, settings, answers=shared, resume=True, progress=progress)
        add_trained(self.adapter, self.files)

    def _file(self, point: OperatingPoint) -> Path:
        assert self.work is not None  # there are no points without
        return self.work.module(point.name.partition("@")[0])
