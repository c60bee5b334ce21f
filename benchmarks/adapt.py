"""Does a policy carry over to a model that nothing was fitted to, and what does `adapt` buy with so many images?

    python benchmarks/adapt.py training/transfer/plain training/transfer/narrow --out runs/adapt

For each model a pool of synthetic screens (half simple, the rest dense and reading) is answered once, at the shares
that `adapt` would run, in a work folder that a later run goes on with: about 1.4 CPU seconds an image of a small model,
and it may be stopped at any time. Each draw then orders the images of the pool: all rows are judged on its last ones,
which no draw's policies have seen, and `adapt` has the first 25, 50, ... of the others, so that its policies differ
by the number of images alone. Rows:

- native, which is what figures are shares of;
- a policy of another model carried over, taken at its word (``escalate=False``) and as the library uses it, with a
  warning and asking the model (on the first images of the pool, since its plans have to be run as well);
- the general policy where it is trusted, and with escalation: what a model gets that nothing was fitted to;
- what `adapt` leaves in place: its policy, or the general one where its gate refuses;
- an oracle that knows the cheapest pass that is good enough.

Times to the first token are those that the cost model predicts after it has been measured on this machine
(`--no-measure`: from the model's shape), so that what else runs while the pool is answered does not show. The 95 %
intervals resample draws and images.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from adaptive_fusion.calibrate import calibrate
from adaptive_fusion.commands.output import progress
from adaptive_fusion.cost.estimate import CPU, analytic_profile, model_shape
from adaptive_fusion.cost.profiles import profile_key
from adaptive_fusion.errors import PolicyMismatchWarning
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.statistics import Interval, resamples
from adaptive_fusion.learning.adapting.adapt import Adaptation, policy_name
from adaptive_fusion.learning.adapting.answers import Answers, read_answers
from adaptive_fusion.learning.adapting.judge import Taken, priced, take
from adaptive_fusion.learning.adapting.settle import settle
from adaptive_fusion.learning.adapting.source import Beside
from adaptive_fusion.learning.data.dataset import BoolArray, FloatArray
from adaptive_fusion.learning.fitting.card import finite
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.learning.labelling.oracle import label_inputs
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG, ModelScorer
from adaptive_fusion.loading import open_runner
from adaptive_fusion.policy.policy import COMPLEX, SIMPLE
from adaptive_fusion.progress import Progress, Steps
from adaptive_fusion.reference.screens import Kind, make_scene
from adaptive_fusion.runner import AdaptiveRunner

KINDS: tuple[Kind, ...] = ("simple", "dense", "simple", "reading")
PROMPTS = {"simple": ("Describe the screen.",), "dense": ("Describe the screen.", "Read the text.")}
PROMPTS["reading"] = PROMPTS["dense"]
FIRST = 50_000
"""Seed of the first scene, beyond those that the models were trained on."""
COUNTS = (25, 50, 100, 200, 1000)
HELD = 60
"""Fewest images that are left to judge by."""
CARRIED = 600
"""Images on which a policy of another model is run; each draw leaves out a sixth of them."""
FIGURES = ("kept", "ttft", "tokens", "second")
RESAMPLES = 1000
GENERAL, FEW, SOME = "general, escalating", "adapt, 25 images", "adapt, 100 images"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", default=["reference"], help="folders, ids or 'reference'")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--skip", type=int, default=0, help="first scenes to leave out: settings were chosen on these")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--carried", default="reference-balanced", help="policy of another model; '' for none")
    parser.add_argument("--no-measure", action="store_true", help="costs by the model's shape even if they are known")
    parser.add_argument("--json", action="store_true", help="one object for each model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    for model in options.models:
        with progress(options.json) as shown:
            found = measured(model, options, shown)
        print(json.dumps(found, allow_nan=False) if options.json else table(found), flush=True)


def measured(model: str, options: argparse.Namespace, shown: Progress) -> dict[str, Any]:
    """All figures of one model."""
    runner = open_runner(model, "balanced")
    if options.no_measure:
        by_shape(runner)
    elif not runner.profile.samples:
        calibrate(runner, progress=shown)
    folder, name = options.out / Path(model).name, policy_name(model, runner.fingerprint.digest)
    questions = list(scenes(options.images, options.skip))
    work = Adaptation(Beside(runner), questions, folder, name, measure=False, progress=shown)
    began, before = time.process_time(), work.ahead().answered
    pool = priced(Beside(runner), work.base, work.answered())
    new = len(pool) - before
    counts = [count for count in sorted(options.counts) if pool.images - count >= HELD]
    bench = Bench(pool, runner, work, counts, options.draws)
    rows = bench.rows(shown)
    figures, differences = bench.figures(rows)
    found = {
        "model": Path(model).name,
        "images": pool.images,
        "questions": len(pool),
        "shares": list(map(float, pool.shares)),
        "draws": options.draws,
        "judged on": int(bench.held_images),
        "left out": [count for count in options.counts if count not in counts],
        "cpu_s_a_question": (time.process_time() - began) / new if new else None,
        "costs": runner.profile.errors if runner.profile.samples else "by the model's shape",
        "refused": bench.refused,
        "rows": {row: {key: asdict(value) for key, value in each.items()} for row, each in figures.items()},
        "differences": {key: asdict(value) for key, value in differences.items()},
    }
    return dict(finite(found | carried(model, options, work, shown)))


def scenes(count: int, skip: int = 0) -> Iterator[Question]:
    """Questions about so many screens, after the first that are left out."""
    for seed in range(skip, skip + count):
        kind = KINDS[seed % len(KINDS)]
        image = make_scene(kind, FIRST + seed, "train", sides=(256, 384)).image
        yield from (Question(image, prompt, slices={"scene": kind}) for prompt in PROMPTS[kind])


def by_shape(runner: AdaptiveRunner) -> None:
    """Costs by the model's shape, whatever was measured of it on this machine before."""
    adapter = runner.adapter
    estimate = analytic_profile(
        model_shape(adapter), profile_key(adapter), dtype_bytes=adapter.dtype.itemsize, rates=CPU
    )
    runner.use_profile(estimate, "estimated from the model's shape")


class Bench:
    """One pool, and what each row of the table does with it in each draw.

    Args:
        pool: With the costs that are meant.
        runner: Of the model.
        work: With the general policy.
        counts: Images that `adapt` has, rising.
        draws: Orders of the pool's images.
    """

    def __init__(
        self, pool: Answers, runner: AdaptiveRunner, work: Adaptation, counts: Sequence[int], draws: int
    ) -> None:
        self.pool, self.source, self.work, self.counts = pool, Beside(runner), work, counts
        images = np.unique(pool.group)
        self.orders = [np.random.default_rng(draw).permutation(images) for draw in range(draws)]
        self.held_images = len(images) - max(counts, default=0)
        self.held = [np.isin(pool.group, order[max(counts, default=0) :]) for order in self.orders]
        self.refused: dict[str, int] = {}

    @cached_property
    def native(self) -> Taken:
        column = [rung.name for rung in self.pool.rungs].index(NATIVE_RUNG.name)
        parts = (self.pool.quality[:, column], self.pool.cost[:, column], self.pool.tokens[:, column])
        return Taken(*parts, np.zeros(len(self.pool), dtype=bool))

    def rows(self, shown: Progress) -> dict[str, list[Taken]]:
        """What each row does in each draw, in the places of the pool's rows; only those held out count."""
        pool, base = self.pool, self.work.base
        trusted = take(self.source, base, pool, asks=False)
        found = {"native": [self.native] * len(self.held), "general, trusted": [trusted] * len(self.held)}
        steps = Steps(shown, "judge", len(self.orders) * (1 + len(self.counts)))

        def judged(policy: Any, held: BoolArray) -> Taken:
            taken = take(self.source, policy, pool.take(held))
            steps.advance()
            return Taken.together({0: (held, taken)}, len(pool))

        found[GENERAL] = [judged(base, held) for held in self.held]
        for count in self.counts:
            name = f"adapt, {count} images"
            found[name], refused = [], 0
            for order, held in zip(self.orders, self.held, strict=True):
                taught = pool.take(np.isin(pool.group, order[:count]))
                done = settle(self.source, taught, base, "adapted")
                refused += bool(done.refusal)
                found[name].append(judged(done.policy, held))
            self.refused[name] = refused
        found["oracle"] = [oracle(pool)] * len(self.held)
        return found

    def figures(
        self, rows: Mapping[str, Sequence[Taken]]
    ) -> tuple[dict[str, dict[str, Interval]], dict[str, Interval]]:
        """Of every row, and of pairs of rows: means over draws, with intervals over draws and images at once."""
        several = self._resampled(lambda weights: statistics(rows, self.native, weights))
        figures = {row: {key: several[f"{row}|{key}"] for key in FIGURES} for row in rows}
        return figures, {key.removeprefix("|"): value for key, value in several.items() if key.startswith("|")}

    def _resampled(self, of: Callable[[list[FloatArray]], dict[str, float]]) -> dict[str, Interval]:
        held = [mask.astype(np.float64) for mask in self.held]
        whole, rng, drawn = of(held), np.random.default_rng(1), list[dict[str, float]]()
        for weight in resamples(self.pool.group, RESAMPLES, 0):
            chosen = rng.integers(len(held), size=len(held))
            times = np.bincount(chosen, minlength=len(held))
            drawn.append(of([mask * weight * time for mask, time in zip(held, times, strict=True)]))
        return {
            key: Interval(value, *map(float, np.nanquantile([each[key] for each in drawn], (0.025, 0.975))))
            for key, value in whole.items()
        }


def statistics(rows: Mapping[str, Sequence[Taken]], native: Taken, weights: Sequence[FloatArray]) -> dict[str, float]:
    """Figures by row and name, and the differences that are asked about, under weights of each draw's rows."""
    found: dict[str, float] = {}
    total = sum(weight.sum() for weight in weights)
    cost = sum(weight @ native.cost for weight in weights)
    tokens = sum(weight @ native.tokens for weight in weights)
    for row, draws in rows.items():
        pairs = list(zip(weights, draws, strict=True))
        found[f"{row}|kept"] = sum(weight @ taken.quality for weight, taken in pairs) / total
        found[f"{row}|ttft"] = sum(weight @ taken.cost for weight, taken in pairs) / cost
        found[f"{row}|tokens"] = sum(weight @ taken.tokens for weight, taken in pairs) / tokens
        found[f"{row}|second"] = sum(weight @ taken.second for weight, taken in pairs) / total
    most = max((row for row in rows if row.startswith("adapt, ")), key=lambda row: int(row.split()[1]), default="")
    for one, other in ((SOME, most), (FEW, GENERAL), (SOME, GENERAL), (most, GENERAL)):
        if one in rows and other in rows and one != other:
            for key in ("kept", "ttft"):
                found[f"|{key}: {one} over {other}"] = found[f"{one}|{key}"] - found[f"{other}|{key}"]
            saved = 1 - found[f"{other}|ttft"]
            found[f"|saving: {one} of {other}"] = (1 - found[f"{one}|ttft"]) / saved if saved > 0 else float("nan")
    return found


def oracle(pool: Answers) -> Taken:
    """The cheapest pass that is good enough, known beforehand."""
    column = np.where(pool.quality >= 1 - pool.tolerance, pool.cost, np.inf).argmin(axis=1)
    row = np.arange(len(pool))
    parts = (pool.quality[row, column], pool.cost[row, column], pool.tokens[row, column])
    return Taken(*parts, np.zeros(len(pool), dtype=bool))


def carried(model: str, options: argparse.Namespace, work: Adaptation, shown: Progress) -> dict[str, Any]:
    """What a policy of another model does here: at its word, and as the library uses it."""
    if not options.carried:
        return {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", PolicyMismatchWarning)
        runner = open_runner(model, options.carried)
    if options.no_measure:
        by_shape(runner)
    images = list(dict.fromkeys(case.subject.content_hash for case in work.cases))[:CARRIED]
    cases = [case for case in work.cases if case.subject.content_hash in set(images)]
    lanes = (rung for lane in (SIMPLE, COMPLEX) for rung in runner.policy.lanes[lane])
    rungs = tuple({rung.name: rung for rung in (NATIVE_RUNG, runner.policy.cheap_rung, *lanes)}.values())
    file = options.out / Path(model).name / f"carried-{options.carried}.jsonl"
    scorer = ModelScorer(RunnerModel(runner, max_new_tokens=work.max_new_tokens))
    label_inputs(scorer, [case.question for case in cases], rungs, file, progress=shown, source_id=work.name)
    pool = read_answers(file, cases, rungs, work.base.tolerance, runner.fingerprint)
    pool = priced(Beside(runner), work.base, pool)
    bench = Bench(pool, runner, work, (pool.images // 6,), options.draws)
    rows = {
        f"{options.carried}, {how}": [take(bench.source, runner.policy, pool, asks=asks)] * options.draws
        for how, asks in (("trusted", False), ("as it is used", True))
    }
    figures, _ = bench.figures(rows)
    return {
        "carried": {row: {key: asdict(value) for key, value in each.items()} for row, each in figures.items()},
        "carried on": pool.images,
        "warning": "; ".join(dict.fromkeys(str(each.message) for each in warned)),
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"## {found['model']}",
        "",
        f"{found['images']} images, {found['questions']} questions, {found['draws']} draws, judged on"
        f" {found['judged on']} images each; mean (95 % interval).",
        "",
        "| | kept of native's | time to the first token | visual tokens | second passes |",
        "|---|---|---|---|---|",
    ]
    for row, each in {**found["rows"], **found.get("carried", {})}.items():
        gone = f" ({found['refused'][row]} refused)" if found["refused"].get(row) else ""
        lines.append(f"| {row}{gone} | " + " | ".join(said(each[key]) for key in FIGURES) + " |")
    lines += ["", *(f"- {key}: {said(value)}" for key, value in found["differences"].items())]
    if found.get("warning"):
        lines += ["", f"Of the carried policy, on {found['carried on']} images: {found['warning']}"]
    if found["left out"]:
        lines += ["", f"Too few images for {', '.join(map(str, found['left out']))}."]
    return "\n".join([*lines, ""])


def said(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


if __name__ == "__main__":
    main()
