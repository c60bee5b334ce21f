"""Distil a fusion module for a frozen model from the model's own full-compute answers on unlabelled images.

The teacher is the model at its native point, the student the same weights at a fused and downsampled point. For
questions q with the teacher's greedy answer y the loss is the mean over answer positions of

    KL(p_teacher(. | q, y_<t) || p_student(. | q, y_<t)),

teacher-forced (Hinton et al., arXiv:1503.02531). Only the module's parameters train: the vision tower runs once per
question without gradient, gradient passes through the frozen mergers and language model. One module serves all
downsampling ratios, so every step draws one. Knows the parts of a run; nothing of policies or files of logs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError, UnsupportedModelError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.distillation.divergence import Judged
from adaptive_fusion.learning.distillation.draws import split
from adaptive_fusion.learning.distillation.frozen import frozen
from adaptive_fusion.learning.distillation.settings import Settings
from adaptive_fusion.learning.distillation.teacher import Teacher
from adaptive_fusion.learning.distillation.training import Training
from adaptive_fusion.models import Adapter, GridAdapter
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.progress import Progress, Steps, silent

TRAINABLE = ("gated", "weighted")


@dataclass(frozen=True)
class DistillationReport:
    """What came of a run."""

    steps: int
    stopped_early: bool
    trained_on: int
    held_out: int
    parameters: int
    before: Judged
    after: Judged

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ratios become texts."""
        found = asdict(self)
        for when in ("before", "after"):
            found[when] = {
                name: {f"{ratio:g}": value for ratio, value in values.items()} for name, values in found[when].items()
            }
        return found


def distil(
    adapter: Adapter,
    questions: Sequence[Question],
    point: OperatingPoint,
    out: str | Path,
    settings: Settings | None = None,
    *,
    answers: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    note: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> DistillationReport:
    """Train the fusion module of `point` (its fusion, layers and adapter_rank) and write it to `out`.

    The best module by held-out KL over all ratios is written; if nothing was better than the start, that is the
    untrained one. Afterwards `adapter` runs it. The state of the run lies in the folder ``<out>.work`` beside it.

    Args:
        adapter: Of a model with DeepStack taps.
        questions: Unlabelled; of equal ones only the first counts.
        point: What to train for; its downsampling and pixel budget do not matter.
        out: A ``.safetensors`` file, as a policy's `fusion_weights` take it.
        settings: See `Settings`.
        answers: Folder of the teacher's answers, so that several runs can share them; the work folder if left out.
        resume: Go on from the work folder's state, if there is one.
        progress: See `Progress`; first a step is a question that the teacher is asked, then an optimizer step.
        note: Called with every look at the held-out questions: step, and KL and agreement by ratio.

    Raises:
        UnsupportedModelError: For a model without taps.
        ConfigError: For a point without trainable fusion, too few images to hold some out, or a state to resume that
            belongs to another run.
        MediaError: For a medium that cannot be used.
    """
    settings = settings or Settings()
    grid = _with_taps(adapter, point)
    out = Path(out)
    work = out.with_name(out.name + ".work")
    questions = list({question.key: question for question in questions}.values())
    train, held = split(questions, holdout=settings.holdout, judged=settings.judged, seed=settings.seed)
    asked = [*train, *held]
    with frozen(grid.model):
        teacher = Teacher(grid, answers or work, max_new_tokens=settings.max_new_tokens, batch=settings.batch)
        outputs = dict(zip((question.key for question in asked), teacher.ask(asked, progress), strict=True))
        run = Training(grid, point, train, held, outputs, settings, work, note)
        if resume:
            run.resume()
        steps = Steps(progress, "distil", settings.steps, done=run.step)
        before = run.start()
        while not run.over:
            run.advance()
            steps.advance()
        run.take_best()
        run.module.save(out)
    return _report(run, settings, before, len(train), len(held))


def _report(run: Training, settings: Settings, before: Judged, trained_on: int, held_out: int) -> DistillationReport:
    return DistillationReport(
        steps=run.step,
        stopped_early=run.step < settings.steps,
        trained_on=trained_on,
        held_out=held_out,
        parameters=sum(p.numel() for p in run.module.parameters()),
        before=before,
        after=run.judged(run.best_step),
    )


def _with_taps(adapter: Adapter, point: OperatingPoint) -> GridAdapter:
    """The adapter, if there is something to train at `point`."""
    if point.fusion not in TRAINABLE:
        raise ConfigError(f"fusion is {point.fusion!r}; expected one of {', '.join(TRAINABLE)}")
    adapter.require(point)
    if not isinstance(adapter, GridAdapter):
        raise UnsupportedModelError(f"{type(adapter.model).__name__} has no DeepStack taps; there is nothing to distil")
    return adapter
