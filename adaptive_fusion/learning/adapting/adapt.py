"""From a model and questions about images to an installed policy: the steps in their order.

Each step keeps what it made before the next begins, so that a run that was stopped goes on there. Knows the steps and
what each needs of the others. Must not know what happens inside one.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count as count_from
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError, GateRefused
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.adapting.answers import Answers, answered, read_answers
from adaptive_fusion.learning.adapting.card import card
from adaptive_fusion.learning.adapting.cases import Case, Looked, halves, images_of, look, octaves_of, planner_for
from adaptive_fusion.learning.adapting.choice import informative
from adaptive_fusion.learning.adapting.fit import Adapted, ladders
from adaptive_fusion.learning.adapting.install import install
from adaptive_fusion.learning.adapting.judge import FOLDS
from adaptive_fusion.learning.adapting.modules import Modules
from adaptive_fusion.learning.adapting.needs import LEAST_IMAGES
from adaptive_fusion.learning.adapting.settle import settle
from adaptive_fusion.learning.adapting.source import Source
from adaptive_fusion.learning.adapting.work import Terms, Work
from adaptive_fusion.learning.fitting.card import finite
from adaptive_fusion.learning.fitting.gate import Verdict
from adaptive_fusion.learning.labelling.oracle import label_inputs
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG
from adaptive_fusion.models import Adapter
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE, Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, silent

LEAST_JUDGED = next(n for n in count_from(LEAST_IMAGES) if n - -(-n // FOLDS) >= LEAST_IMAGES)
"""Fewest images of which the policies that are judged, each without a fold, learn what the installed one does."""
SAMPLED = 16
"""Cases whose predicted times stand for all."""


@dataclass(frozen=True)
class Ahead:
    """What a run will do.

    Attributes:
        images: Different images that can be used.
        questions: Questions about them; with modules, about those that none is trained on.
        answered: Of these, answered by an earlier run.
        passes: Runs of the model that are left: full answers, and prefills of cheaper plans.
        calibrating: Requests that are measured first; 0 where this machine's profile is known.
        training: Questions that fusion modules are trained on, steps times batch; 0 without.
        seconds: About how long the passes take, by predictions.
        measured: Whether these come from a measured profile.
        shares: Of native pixels, what is run.
        repeated: Inputs that came twice.
        failed: Inputs left out, each with the reason.
    """

    images: int
    questions: int
    answered: int
    passes: int
    calibrating: int
    training: int
    seconds: float
    measured: bool
    shares: tuple[float, ...]
    repeated: int
    failed: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Installed:
    """A policy in its place, and what it buys.

    Attributes:
        policy: It.
        folder: Where it is.
        parts: What became of each part of the general policy.
        figures: See `judge.figures`; of ``adapted`` by policies of other folds, of ``general`` as it is.
        images: How many answered.
        failed: Inputs that the model failed on.
    """

    policy: Policy
    folder: Path
    parts: Mapping[str, str]
    figures: Mapping[str, Interval]
    images: int
    failed: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "policy": self.policy.name,
            "folder": str(self.folder),
            "images": self.images,
            "parts": dict(self.parts),
            "figures": finite({name: asdict(value) for name, value in self.figures.items()}),
            "failed": [{"input": name, "error": why} for name, why in self.failed],
        }


@dataclass
class Adaptation:
    """One model, one set of images.

    Args:
        source: The model, with the general policy that is the prior.
        questions: Images with questions.
        folder: Work folder; what an earlier run left there is used.
        name: Of the policy.
        distil: Whether fusion modules are trained for the lanes first.
        measure: Whether costs are measured where no profile of this machine is known.
        max_new_tokens: Upper bound of an answer.
        progress: See `Progress`.

    Raises:
        ConfigError: For a general policy that was fitted to a model, fewer images than can say anything, or a work
            folder that cannot be one; nothing has run then.
        OSError: If the work folder cannot be written.
    """

    source: Source
    questions: Sequence[Question]
    folder: Path
    name: str
    distil: bool = False
    measure: bool = True
    max_new_tokens: int = 160
    progress: Progress = silent
    failed: tuple[tuple[str, str], ...] = field(default=(), init=False)
    _looked: Looked = field(init=False)
    _cases: list[Case] = field(init=False)
    _taught: list[Case] = field(init=False)
    _work: Work = field(init=False)
    _shares: list[float] = field(init=False)

    def __post_init__(self) -> None:
        general = self.source.policy
        if not general.fitted.is_general:
            raise ConfigError(f"base is {general.name!r}, fitted to a model; expected a general one such as balanced")
        terms = Terms(self.source.fingerprint, general.name, self.distil, self.max_new_tokens)
        self._work = Work(self.folder, terms)
        planner = planner_for(self.source.adapter, general, self.source.profile)
        self._looked = look(planner, self.questions, max_new_tokens=self.max_new_tokens, progress=self.progress)
        # What modules were trained on says nothing of what they lose on other images.
        self._taught, self._cases = halves(self._looked.cases) if self.distil else ([], self._looked.cases)
        images = images_of(self._cases)
        if images < LEAST_JUDGED:
            which = f" of {self._looked.images}, beside those to train modules on," if self.distil else ""
            why = "; ".join(f"{name}: {reason}" for name, reason in self._looked.failed[:3])
            raise ConfigError(
                f"{images} different images{which} can be used; expected at least {LEAST_JUDGED}, below which nothing "
                f"is learned that could be judged, and the general policy stays{f' ({why})' if why else ''}"
            )
        self.source.check(self._cases[0].question)
        offered = [rung.pixel_share for rung in general.lanes[SIMPLE] if rung.pixel_share < 1]
        always = [share for share in (general.cheap_rung.pixel_share,) if share in offered]
        chosen = informative(octaves_of(self._cases), offered, always=always)
        begun = not answered(self._work.labels).isdisjoint(case.key for case in self._cases)
        self._shares = self._work.shares(chosen, begun=begun)

    @property
    def cases(self) -> Sequence[Case]:
        """The questions that the model is asked, each once."""
        return self._cases

    @cached_property
    def _modules(self) -> Modules:
        if not self.distil:
            return Modules.none()
        if not isinstance(self.source.adapter, Adapter):
            raise ConfigError("fusion modules are to be trained; expected a model that runs here")
        return Modules.of(self.source.adapter, self._work, self.max_new_tokens)

    @cached_property
    def base(self) -> Policy:
        """The general policy with the steps that are run and no others."""
        general = self.source.policy
        return self._modules.used_by(replace(general, lanes=ladders(general, self._shares)))

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """All that is run: native, the cheap plan and the lanes of stills. Rungs that are one computation run once."""
        lanes = (rung for lane in (SIMPLE, COMPLEX) for rung in self.base.lanes[lane])
        return tuple({rung.name: rung for rung in (NATIVE_RUNG, self.base.cheap_rung, *lanes)}.values())

    @cached_property
    def _spared(self) -> tuple[Rung, ...]:
        """Of several rungs that spare blank parts and are one computation the first; none where the model cannot."""
        adapter = self.source.adapter
        points = {adapter.computed(adapter.restrict(rung.point)[0]): rung for rung in reversed(self.rungs)}
        return tuple(rung for point, rung in points.items() if point.blanks is not None)

    def ahead(self) -> Ahead:
        """What `run` will do, from what is there already."""
        cases, source = self._cases, self.source
        known = {case.key for case in self._answers().cases}
        left = [case for case in cases if case.key not in known]
        return Ahead(
            images=self._looked.images,
            questions=len(cases),
            answered=len(known),
            passes=len(left) * (len(self._shares) + len(self._spared) + (1 if source.by_text else 3)),
            calibrating=source.to_calibrate() if self.measure else 0,
            training=self._modules.questions,
            seconds=self._seconds(left),
            measured=source.profile.samples > 0,
            shares=tuple(sorted(self._shares, reverse=True)),
            repeated=self._looked.repeated,
            failed=tuple(self._looked.failed),
        )

    def _seconds(self, left: Sequence[Case]) -> float:
        """What the passes on these cases will take, by the predictions for some of them."""
        planner = planner_for(self.source.adapter, self.base, self.source.profile)
        some = left[:: -(-len(left) // SAMPLED) or 1]
        total = 0.0
        for case in some:
            below = [replace(NATIVE_RUNG, pixel_share=share) for share in self._shares]
            for rung in (NATIVE_RUNG, *below, *self._spared):
                point = self.source.adapter.resolve(rung, case.info.sizes)
                predicted = planner.candidate(point, 1.0, case.info).predicted
                if self.source.by_text:
                    total += predicted.latency_ms
                    continue
                # A full answer is run for its first tokens, as a whole and once more with its tokens given.
                total += 2 * predicted.ttft_ms + predicted.latency_ms if rung is NATIVE_RUNG else predicted.ttft_ms
        return total / 1e3 * len(left) / max(1, len(some))

    def run(self, root: Path) -> Installed:
        """All steps, those that were done before left out; the policy is then in `root`.

        Raises:
            GateRefused: If the policy is no better than the general one; nothing is installed.
            ConfigError: If the model could not answer about enough of the images, or another run is at work here.
            OSError: If a folder cannot be written; what was done so far is kept.
        """
        with self._work.alone():
            return self._run(root)

    def _run(self, root: Path) -> Installed:
        progress = self.progress
        if self.measure and self.source.to_calibrate():
            self.source.calibrate(progress)
        answers = self.answered()
        progress(0, 1, "fit")
        done = settle(self.source, answers, self.base, self.name, self._modules.files)
        if why := done.refusal:
            raise GateRefused(
                f"the general policy {self.base.name!r} stays: {why}",
                Verdict(False, (why,), done.figures, len(answers)),
            )
        folder = install(self._written(done.found, done.figures, answers), root, self.name)
        return Installed(done.policy, folder, done.found.parts, done.figures, answers.images, self.failed)

    def answered(self) -> Answers:
        """The model's answers to all questions; those that an earlier run had are not run again.

        Raises:
            ConfigError: If the model could not answer about enough of the images.
            OSError: If the work folder cannot be written.
        """
        self._modules.train([case.question for case in self._taught], self.progress)
        questions = [case.question for case in self._cases]
        scorer = self.source.scorer(self.max_new_tokens)
        out, progress = self._work.labels, self.progress
        done = label_inputs(scorer, questions, self.rungs, out, progress=progress, source_id=self.name)
        self.failed = done.failed
        answers = self._answers()
        if answers.images < LEAST_JUDGED:
            why = "; ".join(f"{name}: {reason}" for name, reason in done.failed[:3])
            raise ConfigError(f"the model answered about {answers.images} images, expected {LEAST_JUDGED} ({why})")
        return answers

    def _answers(self) -> Answers:
        tolerance, model = self.base.tolerance, self.source.fingerprint
        return read_answers(self._work.labels, self._cases, self.rungs, tolerance, model)

    def _written(self, found: Adapted, judged: Mapping[str, Interval], answers: Answers) -> Path:
        """The policy's files in the work folder."""
        shutil.rmtree(self._work.policy, ignore_errors=True)
        folder = found.policy.save(self._work.policy)
        report = {"parts": dict(found.parts), "figures": {name: asdict(value) for name, value in judged.items()}}
        text = json.dumps(finite(report), indent=1, sort_keys=True, allow_nan=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(card(found, judged, answers, self.base.name), encoding="utf-8")
        return folder


def policy_name(model: str, digest: str) -> str:
    """A policy's name from the model's, such as ``adapted-Qwen3-VL-2B-0123abcd``."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in Path(model).name)
    return "-".join(filter(None, ("adapted", stem.strip("-_")[:40], digest[:8])))
