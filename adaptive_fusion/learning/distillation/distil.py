"""Distil a fusion module for a frozen model from the model's own full-compute answers on unlabelled images.

The teacher is the model at its native point, the student the same weights at a fused and downsampled point. For
questions q with the teacher's greedy answer y the loss is the mean over answer positions of

    KL(p_teacher(. | q, y_<t) || p_student(. | q, y_<t)),

teacher-forced (Hinton et al., arXiv:1503.02531). Only the module's parameters train: the vision tower runs once per
question without gradient, gradient passes through the frozen mergers and language model. One module serves all
downsampling ratios, so every step draws one. Knows adapters and fusion modules; nothing of policies or files of logs.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError, UnsupportedModelError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.fusion import DeepStackFusion
from adaptive_fusion.learning.distillation import checkpoint
from adaptive_fusion.learning.distillation.divergence import Judged, divergence, judge
from adaptive_fusion.learning.distillation.draws import batch_at, draw, share, split
from adaptive_fusion.learning.distillation.frozen import frozen
from adaptive_fusion.learning.distillation.levels import LevelCache
from adaptive_fusion.learning.distillation.teacher import Teacher, Told, answer_logits, fingerprint
from adaptive_fusion.models import Adapter, GridAdapter, Recorded
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.progress import Progress, Steps, silent

TRAINABLE = ("gated", "weighted")


@dataclass(frozen=True)
class Settings:
    """How a module is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Questions per step.
        lr: AdamW's rate after a short warm-up; it falls to 0 along a half cosine.
        ratios: How often each downsampling ratio is trained, in any unit.
        max_new_tokens: Upper bound of the teacher's answers.
        pixel_shares: How often a question is seen at each share of its native pixels; the teacher always sees all.
        holdout: Share of the images, by content hash, that are only judged on.
        judged: At most this many held-out questions.
        every: Steps between two looks at the held-out questions, each with a checkpoint.
        patience: Looks without a better one after which training stops.
        seed: Of the order and the module's start.
        cache_gb: Memory for the vision tower's levels of questions seen before.

    Raises:
        ConfigError: For a value out of range.
    """

    steps: int = 600
    batch: int = 8
    lr: float = 3e-3
    ratios: Mapping[float, float] = field(default_factory=lambda: {1.0: 1.0, 0.5: 2.0, 0.25: 2.0})
    pixel_shares: Mapping[float, float] = field(default_factory=lambda: {1.0: 1.0})
    max_new_tokens: int = 160
    holdout: float = 0.15
    judged: int = 64
    every: int = 50
    patience: int = 6
    seed: int = 0
    cache_gb: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "max_new_tokens", "judged", "every", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1")
        for name, high in (("lr", 1.0), ("holdout", 0.9), ("cache_gb", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
                raise ConfigError(f"{name} is {value!r}; expected a number above 0, at most {high}")
        for name in ("ratios", "pixel_shares"):
            found = getattr(self, name)
            if not found or not all(0 < key <= 1 and value > 0 for key, value in found.items()):
                raise ConfigError(f"{name} is {dict(found)!r}; expected values in (0, 1] with weights above 0")


@dataclass(frozen=True)
class Report:
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
) -> Report:
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
    if point.fusion not in TRAINABLE:
        raise ConfigError(f"fusion is {point.fusion!r}; expected one of {', '.join(TRAINABLE)}")
    adapter.require(point)
    if not isinstance(adapter, GridAdapter):
        raise UnsupportedModelError(f"{type(adapter.model).__name__} has no DeepStack taps; there is nothing to distil")
    out = Path(out)
    work = out.with_name(out.name + ".work")
    questions = list({question.key: question for question in questions}.values())
    train, held = split(questions, holdout=settings.holdout, judged=settings.judged, seed=settings.seed)
    asked = [*train, *held]
    with frozen(adapter.model):
        teacher = Teacher(adapter, answers or work, max_new_tokens=settings.max_new_tokens, batch=settings.batch)
        answered = teacher.ask(asked, progress)
        told = dict(zip((question.key for question in asked), answered, strict=True))
        run = _Run(adapter, point, train, held, told, settings, work, note)
        if resume:
            run.resume()
        steps = Steps(progress, "distil", settings.steps, done=run.step)
        before = run.start()
        while not run.over:
            run.advance()
            steps.advance()
        run.take_best()
        run.module.save(out)
    after = run.judged(run.best_step)
    count = sum(p.numel() for p in run.module.parameters())
    return Report(run.step, run.step < settings.steps, len(train), len(held), count, before, after)


class _Run:
    """The state of one training run and its steps."""

    def __init__(
        self,
        adapter: GridAdapter,
        point: OperatingPoint,
        train: Sequence[Question],
        held: Sequence[Question],
        told: Mapping[str, Told],
        settings: Settings,
        work: Path,
        note: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.note = note
        self.adapter, self.point, self.settings, self.told = adapter, point, settings, told
        self.train, self.held = list(train), sorted(held, key=self._length)
        fresh = adapter.fusion(point)
        assert fresh is not None  # the point was required to fuse
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.module = DeepStackFusion(fresh.spec)
        adapter.add_fusion(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0)
        self.levels = LevelCache(adapter, self.module.spec.levels, settings.cache_gb)
        self.step = 0
        self.best = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.path = work / "state.safetensors"
        work.mkdir(parents=True, exist_ok=True)
        keys = [question.key for question in (*train, *held)]
        made_of = [fingerprint(adapter.model), repr(self.module.spec), repr(settings), *keys]
        self.identity = hashlib.sha256("\n".join(made_of).encode()).hexdigest()
        self.history: list[dict[str, Any]] = []

    # Steps

    def start(self) -> Judged:
        if not self.history:
            self._look()
        return self.judged(0)

    @property
    def over(self) -> bool:
        looked = [entry["step"] for entry in self.history if entry["step"] > self.best_step]
        return self.step >= self.settings.steps or len(looked) >= self.settings.patience

    def advance(self) -> None:
        """One step; a look and a checkpoint when they are due."""
        settings = self.settings
        ratio = draw(settings.ratios, random.Random(f"{settings.seed}/{self.step}").random())
        rise = min(1.0, (self.step + 1) / max(1, settings.steps // 20))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * rise * 0.5 * (1 + math.cos(math.pi * self.step / settings.steps))
        questions = batch_at(self.step, self.train, settings.batch, self._length, settings.seed)
        losses = [divergence(told, logits) for told, logits in self._compared(questions, ratio)]
        loss = torch.cat(losses).mean()
        if not torch.isfinite(loss):
            raise AdaptiveFusionError(f"loss is {float(loss)} at step {self.step}; expected a number: lower the rate")
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % settings.every == 0 or self.step == settings.steps:
            self._look()

    def _length(self, question: Question) -> int:
        told = self.told[question.key]
        return int(told.length) + len(told.tokens)

    def _seen(self, question: Question) -> tuple[dict[str, Tensor], Recorded]:
        settings = self.settings
        return self.levels.of(question, draw(settings.pixel_shares, share(question.key, settings.seed)))

    def _compared(self, questions: Sequence[Question], ratio: float) -> Iterator[tuple[Told, Tensor]]:
        """What the teacher told of each question, and the student's logits for it, from one batch."""
        rows, recorded = zip(*(self._seen(question) for question in questions), strict=True)
        device = self.adapter.model.device
        told = [self.told[question.key] for question in questions]
        answers = [each.tokens.to(device) for each in told]
        point = replace(self.point, downsample=ratio, max_pixels=None)
        logits = answer_logits(self.adapter, rows, answers, point, Recorded.joined(recorded))
        return zip(told, logits, strict=True)

    # Looks

    @torch.no_grad()
    def _look(self) -> None:
        kl, agreement = {}, {}
        size = self.settings.batch
        parts = [self.held[start : start + size] for start in range(0, len(self.held), size)]
        for ratio in self.settings.ratios:
            kl[ratio], agreement[ratio] = judge(pair for part in parts for pair in self._compared(part, ratio))
        total = sum(self.settings.ratios.values())
        worth = sum(weight / total * kl[ratio] for ratio, weight in self.settings.ratios.items())
        entry = {"step": self.step, "worth": worth, "kl": list(kl.values()), "agreement": list(agreement.values())}
        better = not self.history or worth < min(past["worth"] for past in self.history)
        self.history.append(entry)
        self.note(entry)
        if better:
            self.best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self._checkpoint()

    @property
    def best_step(self) -> int:
        best: int = min(self.history, key=lambda entry: entry["worth"])["step"]
        return best

    def judged(self, step: int) -> Judged:
        entry = next(entry for entry in self.history if entry["step"] == step)
        ratios = list(self.settings.ratios)
        return Judged(*(dict(zip(ratios, entry[name], strict=True)) for name in ("kl", "agreement")))

    def take_best(self) -> None:
        self.module.load_state_dict(self.best)
        self.module.eval()

    # State on disk

    def _checkpoint(self) -> None:
        moments = self.optimizer.state_dict()["state"]
        state = checkpoint.State(self.step, self.history, self.module.state_dict(), self.best, moments)
        checkpoint.save(self.path, self.identity, state)

    def resume(self) -> None:
        """Go on from the state on disk, if there is one.

        Raises:
            ConfigError: If it is of another run, or no state at all.
        """
        state = checkpoint.load(self.path, self.identity)
        if state is None:
            return
        self.module.load_state_dict(dict(state.now))
        self.best = {name: value.to(self.adapter.model.device) for name, value in state.best.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state.moments})
        self.step, self.history = state.step, state.history
