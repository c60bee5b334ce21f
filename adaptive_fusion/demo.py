"""The demo: screens and a clip rendered to files, answered natively and adaptively, side by side.

Knows the reference screens and the runner's public side. The policy sees only the files, whose names say nothing
of what is in them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_fusion.budget import Budget
from adaptive_fusion.evaluation.questions import SLICE, Question
from adaptive_fusion.point import NATIVE
from adaptive_fusion.progress import Progress, Steps, silent
from adaptive_fusion.reference.screens import PROMPTS, Kind, Scene, elements, make_scene

if TYPE_CHECKING:
    from adaptive_fusion.reply import Reply
    from adaptive_fusion.runner import AdaptiveRunner

CONTENT: tuple[Kind, ...] = ("simple", "dense", "simple", "reading", "dense", "clip")
"""What is rendered, in this order."""
MAX_NEW_TOKENS = 160
_FRAME_MS = 500
_SHARE = 1.6
"""A fresh controller does not know the spread of times yet: a tighter budget would not leave full compute to what needs
it."""


@dataclass(frozen=True)
class AnswerPair:
    """A question about a rendered file with the native and the adaptive answer."""

    question: Question
    native: "Reply"
    adaptive: "Reply"

    @property
    def truth(self) -> str:
        """The only right answer."""
        return self.question.references[0]


@dataclass(frozen=True)
class Summary:
    """All rows together: shares saved against native, in [0, 1] (below 0 if more was spent)."""

    files: int
    budget_ms: float
    met_native: int
    met_adaptive: int
    tokens_saved: float
    ttft_saved: float
    latency_saved: float
    right_native: float
    right_adaptive: float


def render(folder: Path, seed: int = 0) -> list[Question]:
    """Write `CONTENT` to PNG files and a GIF in `folder`; scenes are of the evaluation split, never trained on."""
    questions = []
    for index, kind in enumerate(CONTENT):
        scene = make_scene(kind, seed + index, "eval")
        path = folder / f"{index + 1}{'.gif' if kind == 'clip' else '.png'}"
        _write(scene, path)
        answer = scene.answers[scene.task]
        questions.append(Question(str(path), PROMPTS[scene.task], (answer,), slices={SLICE: kind}))
    return questions


def _write(scene: Scene, path: Path) -> None:
    if scene.kind == "clip":
        first, *others = scene.frames
        # disposal 1 keeps every frame whole; the screens have few colours, so a palette loses nothing.
        first.save(path, save_all=True, append_images=others, duration=_FRAME_MS, loop=0, disposal=1)
    else:
        scene.image.save(path)


def compare(
    runner: "AdaptiveRunner",
    questions: Sequence[Question],
    latency_ms: float | None,
    progress: Progress = silent,
) -> Iterator[AnswerPair]:
    """Answer every question natively, then under the budget; yields a row per question.

    Args:
        runner: Its policy decides; the native answers teach its cost model this machine.
        questions: What `render` wrote.
        latency_ms: The budget; None takes 160 % of native's slowest answer.
        progress: See `Progress`; a step is an answer.
    """
    steps = Steps(progress, "answer", 2 * len(questions))
    natives = []
    for question in questions:
        natives.append(runner.chat(question.media, question.prompt, point=NATIVE, max_new_tokens=MAX_NEW_TOKENS))
        steps.advance()
    if latency_ms is None:
        latency_ms = round(_SHARE * max(reply.measurement.latency_ms for reply in natives))
    budget = Budget(latency_ms=latency_ms)
    for question, native in zip(questions, natives, strict=True):
        adaptive = runner.chat(question.media, question.prompt, budget=budget, max_new_tokens=MAX_NEW_TOKENS)
        steps.advance()
        yield AnswerPair(question, native, adaptive)


def right_share(truth: str, answer: str) -> float:
    """Share of the parts of the true answer (elements of a screen, lines of a text) that the answer states."""
    parts = _parts(truth)
    return len(parts & _parts(answer)) / len(parts)


def _parts(text: str) -> set[str]:
    return {part.strip().lower() for line in text.splitlines() for part in elements(line)}


def summarise(rows: Sequence[AnswerPair]) -> Summary:
    """Totals over at least one row."""
    limit = float(rows[0].adaptive.decision.budget["latency_ms"])
    native = [row.native.measurement for row in rows]
    adaptive = [row.adaptive.measurement for row in rows]

    def saved(name: str) -> float:
        spent, before = (sum(float(getattr(took, name)) for took in side) for side in (adaptive, native))
        return 1 - spent / before

    return Summary(
        files=len(rows),
        budget_ms=limit,
        met_native=sum(took.latency_ms <= limit for took in native),
        met_adaptive=sum(took.latency_ms <= limit for took in adaptive),
        tokens_saved=saved("visual_tokens"),
        ttft_saved=saved("ttft_ms"),
        latency_saved=saved("latency_ms"),
        right_native=sum(right_share(row.truth, row.native.text) for row in rows) / len(rows),
        right_adaptive=sum(right_share(row.truth, row.adaptive.text) for row in rows) / len(rows),
    )
