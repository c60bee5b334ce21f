"""Oracle labels: what each rung is worth on each input, found by running the rungs.

Knows how to go through inputs once each, resume, and score answers against references or against the model's
own full-compute answer. The model is behind a small protocol; must not know runners, adapters or tensors.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.ladder import Rung
from adaptive_fusion.learning.labels import Subject, label_record
from adaptive_fusion.learning.metrics import anls, exact_match, tokenize
from adaptive_fusion.point import NATIVE

NATIVE_RUNG = Rung(NATIVE)


@dataclass(frozen=True)
class Scores:
    """What one input's rungs were worth: quality in [0, 1] and cost by rung name, and the native point's
    quality."""

    quality: Mapping[str, float]
    reference_quality: float
    cost: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """Describes an input and scores rungs on it. Picklable ones can be run by several processes."""

    def describe(self, item: Any, /) -> Subject:
        """Hashes and features; cheap, since it decides whether the input is scored at all."""
        ...

    def score(self, item: Any, rungs: Sequence[Rung], /) -> Scores:
        """Run the rungs."""
        ...


@dataclass(frozen=True)
class LabelRun:
    """What came of a run: inputs scored now, found scored before, seen twice, and failed with their
    reasons."""

    scored: int
    resumed: int
    repeated: int
    failed: tuple[tuple[str, str], ...]


def label_inputs(
    scorer: Scorer,
    inputs: Iterable[Any],
    rungs: Sequence[Rung],
    out: str | Path,
    *,
    jobs: int = 1,
    progress: bool = True,
    source_id: str | None = None,
    clock: Callable[[], float] = time.time,
) -> LabelRun:
    """Score rungs on inputs and append one label a line to `out` as soon as it is known.

    An input whose content and question are in `out` already, with all these rungs, is not run again; nor is
    one that comes twice. A torn last line, from a run that was killed, is cut off first. An input that raises
    this library's error is reported and left out; any other error stops the run, with what was scored so far
    on disk.

    Args:
        scorer: Describes and scores.
        inputs: Whatever the scorer takes.
        rungs: What to run on each.
        out: JSONL file of labels.
        jobs: Processes, if the scorer can be pickled; else it runs in this one.
        progress: Show a progress bar on standard error.
        source_id: Goes into the labels.
        clock: Seconds since the epoch, for the labels.

    Raises:
        ConfigError: Without rungs.
    """
    if not rungs:
        raise ConfigError("no rungs to score; expected at least one")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = _done(out, {rung.name for rung in rungs})
    todo: list[tuple[Any, Subject]] = []
    failed: list[tuple[str, str]] = []
    resumed = repeated = 0
    known = set(done)
    for item in inputs:
        try:
            subject = scorer.describe(item)
        except AdaptiveFusionError as error:
            failed.append((_name(item), str(error)))
            continue
        key = (subject.content_hash, subject.prompt_hash)
        if key in done:
            resumed += 1
        elif key in known:
            repeated += 1
        else:
            todo.append((item, subject))
        known.add(key)
    scored = 0
    with _bar(progress) as bar, out.open("a", encoding="utf-8") as handle:
        task = bar.add_task("label", total=len(todo))
        for item, subject, scores in _run(scorer, todo, tuple(rungs), jobs):
            bar.advance(task)
            if isinstance(scores, str):
                failed.append((_name(item), scores))
                continue
            record = label_record(
                subject,
                "oracle",
                quality=scores.quality,
                reference_quality=scores.reference_quality,
                cost=scores.cost,
                source_id=source_id,
                time_s=clock(),
            )
            handle.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
            handle.flush()
            scored += 1
    return LabelRun(scored, resumed, repeated, tuple(failed))


def _done(out: Path, rungs: set[str]) -> set[tuple[Any, Any]]:
    """Keys of the labels in `out` that cover the rungs; cuts off a torn last line."""
    if not out.exists():
        return set()
    found = set()
    whole = 0
    with out.open("rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("quality"), dict) and rungs <= set(record["quality"]):
                found.add((record.get("content_hash"), record.get("prompt_hash")))
    if whole < out.stat().st_size:
        with out.open("rb+") as handle:
            handle.truncate(whole)
    return found


def _run(
    scorer: Scorer, todo: list[tuple[Any, Subject]], rungs: tuple[Rung, ...], jobs: int
) -> Iterator[tuple[Any, Subject, Scores | str]]:
    if jobs == 1 or len(todo) < 2 or not _picklable(scorer):
        for item, subject in todo:
            yield item, subject, _score(scorer, item, rungs)
        return
    results = Parallel(n_jobs=jobs, return_as="generator")(delayed(_score)(scorer, item, rungs) for item, _ in todo)
    for (item, subject), scores in zip(todo, results, strict=True):
        yield item, subject, scores


def _score(scorer: Scorer, item: Any, rungs: tuple[Rung, ...]) -> Scores | str:
    try:
        return scorer.score(item, rungs)
    except AdaptiveFusionError as error:
        return str(error)


def _picklable(scorer: Scorer) -> bool:
    try:
        ForkingPickler.dumps(scorer)
    except Exception:  # whatever an object's own reduction raises: it then runs in this process
        return False
    return True


def _name(item: Any) -> str:
    return Path(item).name if isinstance(item, str | Path) else str(item)[:80]


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


# Scoring with a model


@dataclass(frozen=True)
class Example:
    """An input to label: media, a question, and right answers if there are any.

    `metric` is one of `METRICS`; `slices` go into the label.
    """

    media: Any
    prompt: str
    references: tuple[str, ...] = ()
    metric: str = "words"
    slices: Mapping[str, str] = field(default_factory=dict)


class Model(Protocol):
    """What the scorer needs of a model; costs in any one unit, such as milliseconds to the first token."""

    def describe(self, example: Example, /) -> Subject:
        """Hashes and features of the media and the question."""
        ...

    def answer(self, example: Example, rung: Rung, /) -> tuple[str, float]:
        """The greedy answer under a rung, and what it cost."""
        ...

    def loglik(self, example: Example, text: str, rung: Rung, /) -> tuple[float, float]:
        """Mean log-likelihood per token of `text` as the answer under a rung, teacher-forced in one forward
        pass, and what the pass cost."""
        ...


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words against the closest reference (Rajpurkar et al.
    2016)."""
    best = 0.0
    said = Counter(tokenize(prediction))
    for reference in references:
        words = Counter(tokenize(reference))
        shared = (said & words).total()
        total = said.total() + words.total()
        best = max(best, 2 * shared / total if total else 1.0)
    return best


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "anls": anls,
    "exact": exact_match,
    "words": word_f1,
}
"""How an answer is scored against references, in [0, 1]: read text, short answers, captions."""


@dataclass(frozen=True)
class ModelScorer:
    """Scores rungs by a model's answers against references, or without any by the likelihood of its own
    answer.

    Without references the native point answers first; a rung's quality is then
    ``min(1, exp(loglik(rung) - loglik(native)))``, the ratio of the geometric mean token probabilities of
    that answer, one forward pass a rung. The native point has quality 1.
    """

    model: Model

    def describe(self, item: Example) -> Subject:
        """See `Scorer`."""
        return self.model.describe(item)

    def score(self, item: Example, rungs: Sequence[Rung]) -> Scores:
        """See `Scorer`.

        Raises:
            ConfigError: For an unknown metric or a likelihood that is not finite.
        """
        return self._by_references(item, rungs) if item.references else self._by_likelihood(item, rungs)

    def _by_references(self, item: Example, rungs: Sequence[Rung]) -> Scores:
        if item.metric not in METRICS:
            raise ConfigError(f"metric is {item.metric!r}; expected one of {', '.join(sorted(METRICS))}")
        quality, cost = {}, {}
        for rung in _with_native(rungs):
            text, cost[rung.name] = self.model.answer(item, rung)
            quality[rung.name] = METRICS[item.metric](text, item.references)
        return Scores(quality, quality[NATIVE_RUNG.name], cost)

    def _by_likelihood(self, item: Example, rungs: Sequence[Rung]) -> Scores:
        text, _ = self.model.answer(item, NATIVE_RUNG)
        values, cost = {}, {}
        for rung in _with_native(rungs):
            values[rung.name], cost[rung.name] = self.model.loglik(item, text, rung)
            if not math.isfinite(values[rung.name]):
                raise ConfigError(f"log-likelihood under {rung.name} is {values[rung.name]}; expected a number")
        full = values[NATIVE_RUNG.name]
        quality = {name: min(1.0, math.exp(value - full)) for name, value in values.items()}
        return Scores(quality, 1.0, cost)


def _with_native(rungs: Sequence[Rung]) -> list[Rung]:
    return [NATIVE_RUNG, *(rung for rung in rungs if rung.name != NATIVE_RUNG.name)]
