"""``adaptive-fusion label``: what each operating point is worth on each input, and what people said, as labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.options import EngineName, Json, Model, PolicyName, Processor, Upstream
from adaptive_fusion.commands.output import BAD_INPUT, complain, console, emit, progress, refusing
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.policy.files import AUTO

if TYPE_CHECKING:
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.learning.labelling.oracle import Scorer
    from adaptive_fusion.learning.labelling.scoring import ModelScorer
    from adaptive_fusion.policy.policy import Policy
    from adaptive_fusion.policy.rungs import Rung

app = typer.Typer()

Failed = list[tuple[str, str]]
"""Inputs and rows that were left out, each with its reason."""

References = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Right answers: COCO captions (.json), or a CSV of path, reference and, if they differ, prompt and"
        " metric. Without any, answers are compared with the model's own at full compute.",
    ),
]
_SAID = "What people said"
Human = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV",
        help="path and label (simple, complex) or score, optionally rater and group. Several raters of an input become"
        " one label.",
        rich_help_panel=_SAID,
    ),
]
Rater = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Who judged in --human, where the table does not say; else the table's name stands for one.",
        show_default=False,
        rich_help_panel=_SAID,
    ),
]
Feedback = Annotated[
    Path | None,
    typer.Option(
        metavar="CSV",
        help="request_id and rating (up, down, 0 to 1), optionally source_id and time_s (seconds to nanoseconds since"
        " the epoch, or ISO 8601).",
        rich_help_panel=_SAID,
    ),
]


@app.command()
def label(
    out: Annotated[
        Path,
        typer.Option(metavar="JSONL", help="Labels are appended; what is there is not run again.", show_default=False),
    ],
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUTS...", help="Images, clips or folders of them.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Asked about each input.")] = "Describe the image.",
    references: References = None,
    metric: Annotated[
        str, typer.Option(help="Of answers against references: words, anls (read text), exact or elements.")
    ] = "words",
    points: Annotated[
        list[str] | None,
        typer.Option(metavar="POINT", help="Instead of the policy's ladders: native@0.5, weighted6r4@0.5/25%..."),
    ] = None,
    policy: PolicyName = "auto",
    model: Model = "reference",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Upper bound of an answer.")] = 160,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each with its own copy of the model.")] = 1,
    upstream: Upstream = None,
    engine: EngineName = "openai",
    processor: Processor = "qwen3-vl",
    human: Human = None,
    rater: Rater = None,
    feedback: Feedback = None,
    as_json: Json = False,
) -> None:
    """Run the policy's operating points on each of INPUTS and append what they were worth and what they took.

    Quality is scored against references, or without any by the likelihood of the model's own full-compute answer
    under each point. The same content and question runs once; a run that was stopped goes on where it was.
    --human and --feedback turn tables of what people said into labels of the same file. Exit code 2 if an input or
    a row was refused; what else is worth knowing about a table goes to standard error.
    """
    with refusing(inputs or [], as_json):
        if not inputs and human is None and feedback is None:
            raise ConfigError("there is nothing to label; expected INPUTS, --human or --feedback")
        notes: list[str] = []
        result, failed = _said_by_people(human, rater, feedback, out, notes)
        if inputs:
            named = _rungs(points, policy if upstream is None else AUTO)
            questions, unknown = _questions(inputs, prompt, references, metric)
            failed += unknown
            if questions:
                # One process loads the model before anything else, so that a wrong name ends the command at once.
                scorer: Scorer
                if upstream is None:
                    scorer, rungs = _scorer(model, policy, max_new_tokens, named, loaded=jobs == 1)
                else:
                    scorer, rungs = _remote_scorer(upstream, model, engine, processor, policy, max_new_tokens, named)
                found, refused = _scored(scorer, questions, rungs, out, jobs, Path(model).name, as_json)
                result, failed = {**result, **found}, [*failed, *refused]
    _print(out, result, notes, failed, as_json)
    if failed:
        raise typer.Exit(BAD_INPUT)


def _said_by_people(
    human: Path | None, rater: str | None, feedback: Path | None, out: Path, notes: list[str]
) -> tuple[dict[str, Any], Failed]:
    """Append what people said; how many labels that is, and what was refused. `notes` gets what they should know."""
    from adaptive_fusion.jsonl import append_records
    from adaptive_fusion.learning.data.people import feedback_from_csv

    result: dict[str, Any] = {}
    failed: Failed = []
    if human is not None:
        result["human"] = _human(human, rater, out, failed, notes)
    if feedback is not None:
        result["feedback"] = append_records(feedback_from_csv(feedback, say=notes.append), out)
    return result, failed


def _human(table: Path, rater: str | None, out: Path, failed: Failed, notes: list[str]) -> int:
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.jsonl import append_records
    from adaptive_fusion.learning.data.people import human_labels
    from adaptive_fusion.learning.labelling.labeller import describe

    labels, refused = human_labels(table, lambda path: describe(Question(path, "")), source_id=rater, say=notes.append)
    failed += refused
    return append_records(labels, out)


def _rungs(points: list[str] | None, policy: str) -> "list[Rung] | None":
    """The points that were named, or those of the policy; None where it is the model that decides which policy."""
    from adaptive_fusion.policy.policy import Policy
    from adaptive_fusion.policy.rungs import Rung

    loaded = None if policy == AUTO else Policy.load(policy)
    if points:
        return list({rung.name: rung for rung in map(Rung.parse, points)}.values())
    return None if loaded is None else _ladders(loaded)


def _ladders(policy: "Policy") -> "list[Rung]":
    """The rungs of a policy's lanes, each once."""
    return list({rung.name: rung for ladder in policy.lanes.values() for rung in ladder}.values())


def _questions(inputs: list[str], prompt: str, references: Path | None, metric: str) -> "tuple[list[Question], Failed]":
    """What is asked about each input, and what is left out: folders without media, and inputs without a right answer
    where there are some."""
    from adaptive_fusion.evaluation.folders import media_files, questions, read_references
    from adaptive_fusion.evaluation.text import METRICS

    if metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}; expected one of {', '.join(sorted(METRICS))}")
    known = None if references is None else read_references(references, prompt, metric)
    files, failed = media_files(inputs)
    found, unknown = questions(files, prompt, known)
    return found, [*failed, *unknown]


def _scorer(
    model: str, policy: str, max_new_tokens: int, rungs: "list[Rung] | None", *, loaded: bool
) -> "tuple[ModelScorer, list[Rung]]":
    """What scores rungs, with the model loaded now or by each process that it is sent to; and the rungs, if none are
    given those of the policy that the model gets."""
    from adaptive_fusion.learning.labelling.labeller import RunnerModel
    from adaptive_fusion.learning.labelling.scoring import ModelScorer
    from adaptive_fusion.loading import open_runner

    source: Any = (open_runner(model, policy),) if loaded else (open_runner, model, policy)
    runs = RunnerModel(*source, max_new_tokens=max_new_tokens)
    return ModelScorer(runs), rungs if rungs is not None else _ladders(runs.runner.policy)


def _remote_scorer(
    url: str,
    model: str,
    engine: str,
    processor: str,
    policy: str,
    max_new_tokens: int,
    rungs: "list[Rung] | None",
) -> "tuple[Scorer, list[Rung]]":
    """What scores rungs by an engine's answers, and the rungs: without any the policy's, as far as they can be had."""
    from adaptive_fusion.commands.options import require_serving

    require_serving()
    from adaptive_fusion.learning.labelling.by_text import TextScorer, asked_of
    from adaptive_fusion.runner import AdaptiveRunner

    remote = AdaptiveRunner.remote(url, model, engine=engine, processor=processor, policy=policy)
    usable = _ladders(remote.policy) if rungs is None else rungs
    for rung in usable:
        remote.upstream.adapter.require(rung.point)
    return TextScorer(asked_of(remote, max_new_tokens)), usable


def _scored(
    scorer: "Scorer",
    questions: "list[Question]",
    rungs: "list[Rung]",
    out: Path,
    jobs: int,
    source_id: str,
    as_json: bool,
) -> tuple[dict[str, Any], Failed]:
    """Run the rungs on every question; what came of it, and the inputs that failed."""
    from adaptive_fusion.learning.labelling.oracle import label_inputs

    with progress(as_json) as shown:
        run = label_inputs(scorer, questions, rungs, out, jobs=jobs, progress=shown, source_id=source_id)
    counts = {"scored": run.scored, "resumed": run.resumed, "repeated": run.repeated}
    return {**counts, "rungs": [rung.name for rung in rungs]}, list(run.failed)


def _print(out: Path, result: dict[str, Any], notes: list[str], failed: Failed, as_json: bool) -> None:
    for note in notes:
        complain(note)
    for name, reason in failed:
        complain(f"{name}: {reason}")
    if as_json:
        refused = [{"input": name, "error": reason} for name, reason in failed]
        emit({"out": str(out), **result, "notes": notes, "failed": refused})
    else:
        counts = ", ".join(f"{count} {what}" for what, count in result.items() if isinstance(count, int))
        console().print(f"{counts or 'nothing labelled'}; {len(failed)} left out. Labels are in {out}")
