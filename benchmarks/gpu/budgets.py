"""Predictions and budgets of the real loop: profiles, errors, deadlines kept calm and under load, memory kept.

Deadlines are native's median time to the first token on the same requests, so that half of them need more than native
would get: calm and for a step, which nobody foresees, measured alone, for a load that is there all the time beside it.
Images of these two are large, since on small ones a GPU waits for its host, whatever it is asked to compute. Attainment
counts the requests that the controller itself calls feasible; the others are counted beside it.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptive_fusion.bench.load import Delay
from adaptive_fusion.bench.traces import STEP
from adaptive_fusion.budget import Budget
from adaptive_fusion.calibrate import calibrate, relative_errors
from adaptive_fusion.cost.model import CostModel
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import reference_questions
from adaptive_fusion.execution.timing import synchronize
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.reference.screens import PROMPTS, make_scene
from adaptive_fusion.runner import AdaptiveRunner
from benchmarks.gpu.book import Desk, Row, Skip
from benchmarks.gpu.load import matrix_load
from benchmarks.gpu.models import QUESTION, Scale, analytic, noise
from benchmarks.gpu.timing import spread
from benchmarks.memory import keep_budgets

TARGET = 0.95
CONDITIONS = {"calm": 240, "beside": 40, "step": 90}
"""Requests under each."""
MEMORY_REQUESTS, MEMORY_TOKENS = 200, (2, 4)
ANSWER_TOKENS = 160
SIDES = (512, 768, 1024, 1448, 2048)
LARGE = (1792, 2048, 2304)


def run(desk: Desk, scale: Scale) -> None:
    """The reference model, whose answers have a quality, and 4B, whose sizes are those of use."""
    runners = _Runners(scale)
    desk.row("decision", partial(_decision, scale, runners), needs_s=5)
    desk.row("4b calibrate", partial(_calibrated, scale, runners, "4b"), needs_s=45)
    desk.row("4b predictions", partial(_predictions, scale, runners), needs_s=12)
    for size in ("4b", "reference"):
        if size == "reference":
            desk.row("reference calibrate", partial(_calibrated, scale, runners, size), needs_s=25)
        for condition in CONDITIONS:
            desk.row(f"{size} {condition}", partial(_loop, scale, runners, size, condition), needs_s=30)
            if condition == "calm":
                desk.row(f"{size} memory", partial(_memory, scale, runners, size), needs_s=30)


class _Runners:
    """A runner of each size, opened once and used with whatever profile it has."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.open: dict[str, AdaptiveRunner] = {}

    def __call__(self, size: str) -> AdaptiveRunner:
        if size not in self.open:
            self.open[size] = self.scale.runner(size)
        return self.open[size]


def _calibrated(scale: Scale, runners: _Runners, size: str) -> Row:
    """Seconds of calibrating, and the median errors of the profile on what it was fitted to."""
    runner = runners(size)
    if scale.tiny:
        raise Skip("calibrating takes as many requests at a tiny shape as at a true one")
    began = time.perf_counter()
    found = calibrate(runner, repeats=1, save=False)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "samples": found.profile.samples,
        "memory_margin": found.profile.memory_margin,
        "errors": dict(found.profile.errors),
    }


def _predictions(scale: Scale, runners: _Runners) -> Row:
    """Predicted beside measured, at sizes of use: by the profile and from the shape alone."""
    runner = runners("4b")
    measured: dict[str, list[float]] = {"ttft_ms": [], "peak_memory_gb": []}
    said: dict[str, list[tuple[float, float]]] = {"profile": [], "shape": []}
    models = {"profile": CostModel(runner.profile), "shape": analytic(runner.adapter)}
    for turn in range(2 if scale.tiny else 4):
        for seed, pixels in enumerate(SIDES[:2] if scale.tiny else SIDES):
            image = noise(scale.side(pixels), seed)
            for share in (1, 4):
                most = scale.side(pixels) ** 2 // share
                point = OperatingPoint(max_pixels=most) if share > 1 else NATIVE
                reply = runner.chat(image, QUESTION, point=point, max_new_tokens=2, min_new_tokens=2)
                if not turn:
                    continue  # kernels of this size are loaded
                measured["ttft_ms"].append(reply.measurement.ttft_ms)
                measured["peak_memory_gb"].append(reply.measurement.peak_memory_gb)
                work = runner.work(image, QUESTION, point, 2)
                for name, model in models.items():
                    found = model.predict(point, work)
                    said[name].append((found.ttft_ms, found.peak_memory_gb))
    errors = {
        name: {
            key: relative_errors([(pair[i], value) for pair, value in zip(pairs, measured[key], strict=True) if value])
            for i, key in enumerate(measured)
            if any(measured[key])
        }
        for name, pairs in said.items()
    }
    return {"requests": len(measured["ttft_ms"]), "calibrated": runner.profile.samples > 0, "errors": errors}


# The real loop


def _questions(scale: Scale, size: str, sides: Sequence[int]) -> list[Question]:
    """Scenes with right answers for the reference model; for a random one images of these sizes."""
    if size == "reference":
        return reference_questions(2, (64, 96) if scale.tiny else (256, 384))
    rng = random.Random(0)
    drawn = [scale.side(rng.choice(sides)) for _ in range(4 if scale.tiny else 12)]
    scenes = [make_scene(rng.choice(("simple", "dense")), seed, "eval", (400, 400)) for seed in range(len(drawn))]
    return [
        Question(scene.image.resize((side, side)), PROMPTS["describe"])
        for scene, side in zip(scenes, drawn, strict=True)
    ]


def _loop(scale: Scale, runners: _Runners, size: str, condition: str) -> Row:
    """Requests one after the other with a deadline for the first token; the middle third of `step` is slowed down, all
    of `beside` runs next to matrix products on the same device. Quality only where answers can be right."""
    if scale.tiny and size == "4b" and condition != "calm":
        raise Skip("the reference model is enough at a tiny scale")
    runner, questions = runners(size), _questions(scale, size, SIDES if condition == "calm" else LARGE)
    many = 6 if scale.tiny else CONDITIONS[condition] if size == "4b" else 40
    rng = random.Random(1)
    order = [rng.randrange(len(questions)) for _ in range(many)]
    tokens = 2 if size != "reference" or scale.tiny else ANSWER_TOKENS
    runner.use_profile(runner.profile, runner.profile_note)  # the controller starts anew
    beside: AbstractContextManager[None] = matrix_load(scale.device) if condition == "beside" else nullcontext()
    asked = []
    with beside:
        native = _native_ttft_ms(runner, questions, order)
        budget = Budget(ttft_ms=native, attainment=TARGET)
        with Delay(runner) as delay:
            for index, chosen in enumerate(order):
                delay.factor = STEP if condition == "step" and index * 3 // many == 1 else 1.0
                question = questions[chosen]
                reply = runner.chat(
                    question.load(), question.prompt, budget=budget, max_new_tokens=tokens, do_sample=False
                )
                asked.append((question, reply))
    return _kept(asked, native, size == "reference")


def _native_ttft_ms(runner: AdaptiveRunner, questions: Sequence[Question], order: Sequence[int]) -> float:
    """Native's median over the requests, after a round that does not count."""
    took = []
    for turn in range(2):
        for chosen in dict.fromkeys(order):
            question = questions[chosen]
            reply = runner.chat(question.load(), question.prompt, point=NATIVE, max_new_tokens=2, do_sample=False)
            if turn:
                took.append(reply.measurement.ttft_ms)
    return median(took)


def _kept(asked: Sequence[tuple[Question, Any]], deadline_ms: float, scored: bool) -> Row:
    took = np.array([reply.measurement.ttft_ms for _, reply in asked])
    could = np.array([reply.decision.feasible for _, reply in asked])
    parts = np.arange(len(asked)) * 3 // len(asked)
    in_time = took <= deadline_ms
    points: dict[str, int] = {}
    for _, reply in asked:
        points[reply.decision.rung] = points.get(reply.decision.rung, 0) + 1
    row: Row = {
        "requests": len(asked),
        "deadline_ms": round(deadline_ms, 3),
        "feasible": int(could.sum()),
        "feasible_by_third": [int(could[parts == part].sum()) for part in range(3)],
        "in_time": int(in_time.sum()),
        "attainment": _share(in_time[could]),
        "by_third": [_share(in_time[could & (parts == part)]) for part in range(3)],
        "ttft_ms": spread(took.tolist()),
        "points": points,
        "late": [_late(index, asked[index][1]) for index in np.flatnonzero(could & ~in_time)],
    }
    if scored:
        row["quality"] = float(np.mean([question.score(reply.text) or 0.0 for question, reply in asked]))
    return row


def _late(index: int, reply: Any) -> Row:
    """Of a request that was thought to fit and came late: what was expected, and which step of it took long."""
    decision, measured = reply.decision, reply.measurement
    return {
        "request": int(index), "patches": measured.patches, "rung": decision.rung, "escalated": decision.escalated,
        "p_late": round(decision.p_late, 4), "margin": round(decision.margin, 3),
        "predicted_ms": round(decision.predicted.ttft_ms, 1), "elapsed_ms": round(decision.elapsed_ms, 1),
        "preprocess_ms": round(measured.preprocess_ms, 1), "encode_ms": round(measured.encode_ms, 1),
        "prefill_ms": round(measured.prefill_ms, 1), "ttft_ms": round(measured.ttft_ms, 1),
    }  # fmt: skip


def _share(kept: npt.NDArray[np.bool_]) -> float | None:
    return float(kept.mean()) if len(kept) else None


def _memory(scale: Scale, runners: _Runners, size: str) -> Row:
    """Requests with a memory budget each; see `benchmarks.memory`."""
    sides = (64, 96) if scale.tiny else (128, 400) if size == "reference" else (256, 1448)
    many = 3 if scale.tiny else MEMORY_REQUESTS
    return dict(keep_budgets(runners(size), many, sides=sides, tokens=MEMORY_TOKENS, long_answers=0.0))


def _decision(scale: Scale, runners: _Runners) -> Row:
    """Milliseconds of deciding for an image of one megapixel, beside what measuring free memory takes of it."""
    runner, image = runners("4b"), noise(scale.side(1024), 0)
    budget = Budget(ttft_ms=1000.0, attainment=TARGET)
    calls: dict[str, Callable[[], Any]] = {
        "decide": lambda: runner.decide(image, QUESTION, budget=budget),
        "free_memory": runner.meter.free_gb,
        "offers": lambda: runner.offers(image, QUESTION),
    }
    synchronize(scale.device)
    row: Row = {}
    for name, call in calls.items():
        call()
        taken = []
        for _ in range(5 * scale.repeats):
            began = time.perf_counter()
            call()
            taken.append((time.perf_counter() - began) * 1e3)
        row[f"{name}_ms"] = spread(taken)
    return row


def shortfalls(rows: dict[str, Any]) -> list[str]:
    """Deadlines and memory budgets that were not kept."""
    found = []
    for key, row in rows.items():
        kept = row.get("attainment")
        if kept is not None and kept < TARGET:
            found.append(f"{key}: {kept:.3f} of the feasible requests in time, must be >= {TARGET:g}")
        if row.get("exceeded"):
            found.append(f"{key}: {row['exceeded']} of {row['requests']} memory budgets exceeded by more than 2 %")
        if (row.get("seconds") or 0) > 60:
            found.append(f"{key}: {row['seconds']} s, must be <= 60")
    return found
