"""Oracle labels: what each rung is worth on each input, found by running the rungs.

Knows how to go through inputs once each, in several processes, and to resume. What a rung is worth is a
scorer's business (`scoring` has the usual one); must not know models, metrics or tensors.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

from joblib import Parallel, delayed

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.oom import of_one_item
from adaptive_fusion.jsonl import append_records
from adaptive_fusion.learning.data.labels import Subject, label_record
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.progress import Progress, Steps, silent


@dataclass(frozen=True)
class RungScores:
    """What one input's rungs were worth: quality in [0, 1] and cost by rung name, the native point's quality,
    and by rung name whatever else was measured, with the entropies of the first tokens' distributions in nats; and the
    model, where one ran."""

    quality: Mapping[str, float]
    reference_quality: float
    cost: Mapping[str, float] = field(default_factory=dict)
    measurement: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    entropies: Mapping[str, Sequence[float]] = field(default_factory=dict)
    model: Fingerprint | None = None


class Scorer(Protocol):
    """Describes an input and scores rungs on it. Picklable ones can be run by several processes."""

    def describe(self, question: Any, /) -> Subject:
        """Hashes and features; cheap, since it decides whether the input is scored at all."""
        ...

    def score(self, question: Any, rungs: Sequence[Rung], /) -> RungScores:
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
    progress: Progress = silent,
    source_id: str | None = None,
    clock: Callable[[], float] = time.time,
) -> LabelRun:
    """Score rungs on inputs and append one label a line to `out` as soon as it is known.

    An input whose content and question are in `out` already, with all these rungs and from the same `source_id`,
    is not run again; nor is one that comes twice. Questions on the same content are scored one after the other, in
    one process, so that a scorer can share work among them. A torn last line, from a run that was killed, is cut
    off first. An input that raises this library's error or runs out of memory is reported and left out; any other
    error stops the run, with what was scored so far on disk.

    Args:
        scorer: Describes and scores.
        inputs: Whatever the scorer takes.
        rungs: What to run on each.
        out: JSONL file of labels.
        jobs: Processes, if the scorer can be pickled; else it runs in this one.
        progress: See `Progress`; a step is an input that is scored now.
        source_id: What labels, such as the model; goes into the labels.
        clock: Seconds since the epoch, for the labels.

    Raises:
        ConfigError: Without rungs, or for an `out` that ends in something else than a record.
    """
    if not rungs:
        raise ConfigError("no rungs to score; expected at least one")
    out = Path(out)
    append_records((), out)  # before anything is run: it may be no file to append to
    plan = _plan(scorer, inputs, _done(out, {rung.name for rung in rungs}, source_id))
    failed, scored = plan.failed, 0
    steps = Steps(progress, "label", len(plan.todo))
    for question, subject, worth in _run(scorer, plan.todo, tuple(rungs), jobs):
        steps.advance()
        if isinstance(worth, str):
            failed.append((_name(question), worth))
            continue
        append_records([_label(subject, worth, source_id, clock())], out)
        scored += 1
    return LabelRun(scored, plan.resumed, plan.repeated, tuple(failed))


@dataclass
class _Plan:
    """The inputs that are to be scored, and what became of the others."""

    todo: list[tuple[Any, Subject]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    resumed: int = 0
    repeated: int = 0


def _plan(scorer: Scorer, inputs: Iterable[Any], done: set[tuple[Any, Any]]) -> _Plan:
    """Describe every input, and leave out those that were scored before or come twice."""
    plan = _Plan()
    known = set(done)
    for question in inputs:
        try:
            subject = scorer.describe(question)
        except Exception as error:
            plan.failed.append((_name(question), str(of_one_item(error))))
            continue
        key = (subject.content_hash, subject.prompt_hash)
        if key in done:
            plan.resumed += 1
        elif key in known:
            plan.repeated += 1
        else:
            plan.todo.append((question, subject))
        known.add(key)
    return plan


def _label(subject: Subject, worth: RungScores, source_id: str | None, time_s: float) -> dict[str, Any]:
    """One input's label."""
    return label_record(
        subject,
        "oracle",
        quality=worth.quality,
        reference_quality=worth.reference_quality,
        cost=worth.cost,
        measurement=worth.measurement,
        entropies=worth.entropies,
        source_id=source_id,
        model=worth.model,
        time_s=time_s,
    )


def _done(out: Path, rungs: set[str], source_id: str | None) -> set[tuple[Any, Any]]:
    """Keys of the labels in `out` by that source that cover the rungs."""
    if not out.exists():
        return set()
    found = set()
    with out.open("rb") as handle:
        for line in handle:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or record.get("source_id") != source_id:
                continue
            if isinstance(record.get("quality"), dict) and rungs <= set(record["quality"]):
                found.add((record.get("content_hash"), record.get("prompt_hash")))
    return found


def _run(
    scorer: Scorer, todo: list[tuple[Any, Subject]], rungs: tuple[Rung, ...], jobs: int
) -> Iterator[tuple[Any, Subject, RungScores | str]]:
    contents: dict[str, list[tuple[Any, Subject]]] = {}
    for question, subject in todo:
        contents.setdefault(subject.content_hash, []).append((question, subject))
    if jobs == 1 or len(contents) < 2 or not _picklable(scorer):
        for pairs in contents.values():
            for question, subject in pairs:
                yield question, subject, _score(scorer, question, rungs)
        return
    work = (delayed(_score_all)(scorer, [question for question, _ in pairs], rungs) for pairs in contents.values())
    results = Parallel(n_jobs=jobs, return_as="generator")(work)
    for pairs, found in zip(contents.values(), results, strict=True):
        for (question, subject), scores in zip(pairs, found, strict=True):
            yield question, subject, scores


def _score_all(scorer: Scorer, questions: Sequence[Any], rungs: tuple[Rung, ...]) -> list[RungScores | str]:
    return [_score(scorer, question, rungs) for question in questions]


def _score(scorer: Scorer, question: Any, rungs: tuple[Rung, ...]) -> RungScores | str:
    try:
        return scorer.score(question, rungs)
    except Exception as error:
        return str(of_one_item(error))


def _picklable(scorer: Scorer) -> bool:
    try:
        ForkingPickler.dumps(scorer)
    except Exception:  # whatever an object's own reduction raises: it then runs in this process
        return False
    return True


def _name(question: Any) -> str:
    return str(getattr(question, "name", question))[-80:]
