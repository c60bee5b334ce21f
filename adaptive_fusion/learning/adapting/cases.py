"""What is asked about the user's images, and what the general policy makes of it before any model has run.

Knows questions, requests and planners. Must not know labels, fits or files of results.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.planner import Planner
from adaptive_fusion.control.request_info import TEMPLATE_TOKENS, RequestInfo
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel, Profile
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.execution.oom import of_one_item
from adaptive_fusion.execution.request import build_request
from adaptive_fusion.learning.data.dataset import FloatArray
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.learning.distillation.draws import share
from adaptive_fusion.learning.labelling.labeller import subject_of
from adaptive_fusion.models.base import Planned
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.progress import Progress, Steps, silent

HALF_SEED = 1
"""Not the one by which distillation holds images out: those are some of either half."""
LEAST_OCTAVES = -8.0
"""A 256th of the native pixels: no need is taken for less."""


@dataclass(frozen=True)
class Case:
    """One question about one image.

    Attributes:
        question: With the image.
        subject: Its hashes and features.
        info: What a planner needs to know of it.
        octaves: log2 of the share of the native pixels that is enough by the general policy, at most 0.
    """

    question: Question
    subject: Subject
    info: RequestInfo
    octaves: float

    @property
    def key(self) -> tuple[str, str | None]:
        """Content and question, as labels have them."""
        return self.subject.content_hash, self.subject.prompt_hash


@dataclass
class Looked:
    """The cases, each content and question once; inputs that came twice, and those left out with the reason."""

    cases: list[Case] = field(default_factory=list)
    repeated: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many different images there are."""
        return images_of(self.cases)


def planner_for(adapter: Planned, policy: Policy, profile: Profile) -> Planner:
    """A planner that has learned nothing yet: its decisions follow from its arguments."""
    return Planner(adapter, policy, CostModel(profile), Controller(), LengthModel())


def look(
    planner: Planner, questions: Iterable[Question], *, max_new_tokens: int, progress: Progress = silent
) -> Looked:
    """Load and measure every image; what cannot be used, and clips, are left out and named.

    Args:
        planner: Of the general policy.
        questions: Images with questions.
        max_new_tokens: Upper bound of an answer.
        progress: See `Progress`; a step is a question.
    """
    found, known = Looked(), set[tuple[str, str | None]]()
    asked = list(questions)
    named = set[tuple[int, str]]()  # an input is named once, however many questions are asked about it
    steps = Steps(progress, "look", len(asked))
    for question in asked:
        try:
            case = _case(planner, question, max_new_tokens)
        except Exception as error:
            reason = str(of_one_item(error))
            if (id(question.media), reason) not in named:
                found.failed.append((question.name, reason))
            named.add((id(question.media), reason))
        else:
            if case.key in known:
                found.repeated += 1
            else:
                found.cases.append(case)
            known.add(case.key)
        steps.advance()
    return found


def _case(planner: Planner, question: Question, max_new_tokens: int) -> Case:
    request = build_request(question.load(), question.prompt, hashed=True)
    subject = subject_of(request, question.slices)
    if subject.kind != "image":
        raise ConfigError(f"a {subject.kind}: what clips need is not learned; expected an image")
    text, processor = "\n".join(request.texts), getattr(planner.adapter, "processor", None)
    # Of a model behind an address nobody has the tokenizer.
    tokens = (len(processor.tokenizer(text).input_ids) if processor is not None else len(text) // 4) + TEMPLATE_TOKENS
    info = RequestInfo(
        kind=request.kind,
        sizes=request.sizes,
        complexities=request.complexities,
        prompt=request.prompt,
        max_new_tokens=max_new_tokens,
        text_tokens=tokens,
    )
    needs = planner.needs(info)
    octaves = 0.0 if needs is None else float(np.log2(needs.pixels / needs.native))
    return Case(question, subject, info, min(0.0, max(LEAST_OCTAVES, octaves)))


def images_of(cases: Sequence[Case]) -> int:
    """How many different images cases are about."""
    return len({case.subject.content_hash for case in cases})


def halves(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """About half of the images and the others, by their content alone: one that is added later moves none."""
    first = [share(case.subject.content_hash, HALF_SEED) < 0.5 for case in cases]
    return [c for c, one in zip(cases, first, strict=True) if one], [
        c for c, one in zip(cases, first, strict=True) if not one
    ]


def octaves_of(cases: Sequence[Case]) -> FloatArray:
    """log2 of the share that is generally enough, ``[n]``."""
    return np.array([case.octaves for case in cases], dtype=np.float64)
