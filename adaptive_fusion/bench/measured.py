"""Times, memory and answers of every question at every point of its lane, as measured, and the world made of them.

Knows runners and questions. Must not know of rows, nor of traces beyond the world that they are drawn from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from adaptive_fusion.bench.load import background_load
from adaptive_fusion.bench.traces import BoolArray, Case, FloatArray, IntArray, World
from adaptive_fusion.budget import MAX_VRAM_GB, Budget
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.decisions import Measurement
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, Steps, silent
from adaptive_fusion.runner import AdaptiveRunner

ANSWER_TOKENS = 160


@dataclass(frozen=True)
class MeasuredTable:
    """What was measured: milliseconds to the first token ``[cases, columns, repeats]`` calm and (``busy``) beside other
    processes, peak GiB and answer quality ``[cases, columns]``; infinite, or 0 for quality, beyond a case's ladder.
    """

    cases: tuple[Case, ...]
    calm: FloatArray
    busy: FloatArray | None
    memory: FloatArray
    answered: FloatArray

    @property
    def slowdown(self) -> float | None:
        """The median factor that other processes put on a time; None if not measured."""
        if self.busy is None:
            return None
        real = np.isfinite(self.calm[:, :, 0])
        return float(np.median(np.median(self.busy, 2)[real] / np.median(self.calm, 2)[real]))

    @property
    def default_deadline_ms(self) -> float:
        """Native's median time to the first token over the cases: half of them need more than native would get."""
        return float(np.median(self.calm[:, 0]))


def measure_table(
    runner: AdaptiveRunner,
    questions: Sequence[Question],
    *,
    repeats: int = 3,
    background: int = 0,
    progress: Progress = silent,
) -> MeasuredTable:
    """Run every question at native and at each point of its lane, `repeats` times calm and as often beside `background`
    busy processes, if there are to be any.

    Peak memory (once) and times are those of requests that run alone and stop at the second token; they are measured
    apart, because measuring memory takes time on the CPU. Points take turns, so that a slow minute of the machine falls
    on all of them. Before that every question is answered in full, at all its points in one batch, for the quality of
    the answers.

    Args:
        progress: See `Progress`; a step is an answer or a request.

    Raises:
        ConfigError: For a question whose answers have no quality, or a number of repeats below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats!r}; expected at least 1")
    offers = [runner.offers(question.load(), question.prompt, max_new_tokens=ANSWER_TOKENS) for question in questions]
    points = [[NATIVE, *(candidate.point for candidate in found)] for _, found in offers]
    jobs = [(case, column) for case, row in enumerate(points) for column in range(len(row))]
    steps = Steps(progress, "measure", len(jobs) * (2 + repeats * (2 if background else 1)))
    shape = (len(questions), max(map(len, points)))
    calm, busy = np.full((*shape, repeats), math.inf), np.full((*shape, repeats), math.inf)
    memory, answered = np.full(shape, math.inf), np.zeros(shape)

    def ask(case: int, column: int, budget: Budget | None = None) -> Measurement:
        question, point = questions[case], points[case][column]
        reply = runner.chat(
            question.load(), question.prompt, point=point, budget=budget, max_new_tokens=2, do_sample=False
        )
        steps.advance()
        return reply.measurement

    measured = Budget(vram_gb=MAX_VRAM_GB)  # never reached; without one the peak may go unmeasured
    for case, column in jobs:
        memory[case, column] = ask(case, column, measured).peak_memory_gb
    model = RunnerModel(runner, max_new_tokens=ANSWER_TOKENS)
    for case, question in enumerate(questions):
        for column, worth in enumerate(_answered(model, question, points[case])):
            answered[case, column] = worth
            steps.advance()
    for turn in range(repeats):
        for case, column in [*jobs[turn % len(jobs) :], *jobs[: turn % len(jobs)]]:
            calm[case, column, turn] = ask(case, column).ttft_ms
    if background:
        with background_load(background):
            for turn in range(repeats):
                for case, column in jobs:
                    busy[case, column, turn] = ask(case, column).ttft_ms
    return MeasuredTable(_cases(questions, offers), calm, busy if background else None, memory, answered)


def _answered(model: RunnerModel, question: Question, points: Sequence[OperatingPoint]) -> list[float]:
    """What the answers at these points are worth."""
    if question.metric is None:
        raise ConfigError(f"a question of {question.slice} has no metric; expected questions with one")
    rungs = [Rung(point) for point in points]
    found = model.answers(question, rungs)
    return [float(question.score(found[rung.name][0]) or 0.0) for rung in rungs]


def _cases(questions: Sequence[Question], offers: Sequence[tuple[str, list[Candidate]]]) -> tuple[Case, ...]:
    works = [max(c.predicted.encode_ms for c in found) for _, found in offers]
    usual = median(works)
    return tuple(
        Case(lane, tuple(found), question.slice == "simple", work / usual)
        for question, (lane, found), work in zip(questions, offers, works, strict=True)
    )


def measured_world(table: MeasuredTable, deadline_ms: float, memory_margin: float) -> World:
    """Requests like those of the table, half of them simple if its questions are; all points of a request are drawn
    from one round of measuring, times and memory as they were.
    """
    width = table.calm.shape[1]
    quality = np.full((len(table.cases), width), -1.0)
    for row, case in zip(quality, table.cases, strict=True):
        row[: 1 + len(case.candidates)] = [1.0, *(candidate.quality for candidate in case.candidates)]
    middle = np.median(table.calm[:, 1:], 2)

    def draw(case: IntArray, beside: BoolArray, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        turn = rng.integers(0, table.calm.shape[2], len(case))
        times = table.calm[case, :, turn]
        if table.busy is not None and beside.any():
            times = np.where(beside[:, None], table.busy[case, :, turn], times)
        return times, table.memory[case]

    return World(
        cases=table.cases,
        quality=quality,
        limit="ttft_ms",
        deadline_ms=deadline_ms,
        squeeze_gb=_squeeze(table),
        memory_margin=memory_margin,
        draw=draw,
        cheapest=middle.argmin(1) + 1,
        slowdown=table.slowdown,
        answered=table.answered,
    )


def _squeeze(table: MeasuredTable) -> float:
    """Half way between the largest need of any case's most frugal point and that of its hungriest."""
    frugal = max(
        float(row[1 : 1 + len(case.candidates)].min()) for row, case in zip(table.memory, table.cases, strict=True)
    )
    return (frugal + float(table.memory[np.isfinite(table.memory)].max())) / 2
