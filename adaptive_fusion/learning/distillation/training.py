"""One run that trains a fusion module: steps, looks at held-out questions, and its state on disk.

The loss is the divergence that `distil` states. What a step sees follows from settings and step alone (see `draws`),
so that a run that is resumed goes on as if it had not been interrupted. Knows adapters, fusion modules and the
teacher's answers; nothing of how those were had or of what is done with the module.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.fusion import DeepStackFusion, cut
from adaptive_fusion.learning.distillation import checkpoint
from adaptive_fusion.learning.distillation.divergence import Judged, divergence, judge
from adaptive_fusion.learning.distillation.draws import batch_at, draw, share
from adaptive_fusion.learning.distillation.levels import LevelCache
from adaptive_fusion.learning.distillation.settings import Settings
from adaptive_fusion.learning.distillation.teacher import TeacherOutput, answer_logits, fingerprint
from adaptive_fusion.models import GridAdapter, Recorded
from adaptive_fusion.point import Layers, OperatingPoint


class Training:
    """A run that trains the fusion module of `point`: its state, its steps and its looks at held-out questions.

    Args:
        adapter: Reaches the frozen model; it gets the module.
        point: What to train for; its downsampling and pixel budget do not matter.
        train: Questions to train on.
        held: Held-out questions.
        outputs: The teacher's answer to each question, by the question's key.
        settings: See `Settings`.
        work: Folder of the state.
        note: Called with every look at the held-out questions.
    """

    def __init__(
        self,
        adapter: GridAdapter,
        point: OperatingPoint,
        train: Sequence[Question],
        held: Sequence[Question],
        outputs: Mapping[str, TeacherOutput],
        settings: Settings,
        work: Path,
        note: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.note = note
        self.adapter, self.point, self.settings, self.outputs = adapter, point, settings, outputs
        self.train, self.held = list(train), sorted(held, key=self._length)
        spec = adapter.spec(point)
        assert spec is not None  # the point was required to fuse
        spec = replace(spec, elastic=tuple(sorted(set(settings.layers) - {point.layers})))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.module = DeepStackFusion(spec)
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
        """Figures of the untrained module."""
        if not self.history:
            self._look()
        return self.judged(0)

    @property
    def over(self) -> bool:
        """Are all steps done, or have the last looks not been better?"""
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
        counts = settings.layers or {self.point.layers: 1.0}
        count = draw(counts, random.Random(f"{settings.seed}/layers {self.step}").random())
        losses = [divergence(teacher, logits) for teacher, logits in self._compared(questions, ratio, count)]
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
        output = self.outputs[question.key]
        return int(output.length) + len(output.tokens)

    def _seen(self, question: Question) -> tuple[dict[str, Tensor], Recorded]:
        settings = self.settings
        return self.levels.of(question, draw(settings.pixel_shares, share(question.key, settings.seed)))

    def _compared(
        self, questions: Sequence[Question], ratio: float, count: Layers | None = None
    ) -> Iterator[tuple[TeacherOutput, Tensor]]:
        """The teacher's answer to each question, and the student's logits for it, from one batch, with `count` levels
        where it is given and not the point's own."""
        rows, recorded = zip(*(self._seen(question) for question in questions), strict=True)
        device = self.adapter.device
        outputs = [self.outputs[question.key] for question in questions]
        answers = [output.tokens.to(device) for output in outputs]
        point = replace(self.point, downsample=ratio, max_pixels=None, layers=count or self.point.layers)
        if point.layers != self.point.layers:
            self.adapter.add_fusion(cut(self.module, self.adapter.levels(point)))
        logits = answer_logits(self.adapter, rows, answers, point, Recorded.joined(recorded))
        return zip(outputs, logits, strict=True)

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
        """The step of the best look."""
        best: int = min(self.history, key=lambda entry: entry["worth"])["step"]
        return best

    def judged(self, step: int) -> Judged:
        """Figures of the look at that step."""
        entry = next(entry for entry in self.history if entry["step"] == step)
        ratios = list(self.settings.ratios)
        return Judged(*(dict(zip(ratios, entry[name], strict=True)) for name in ("kl", "agreement")))

    def take_best(self) -> None:
        """Put the best look's parameters into the module."""
        self.module.load_state_dict(self.best)
        self.module.eval()
        self.adapter.add_fusion(self.module)

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
        self.best = {name: value.to(self.adapter.device) for name, value in state.best.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state.moments})
        self.step, self.history = state.step, state.history
