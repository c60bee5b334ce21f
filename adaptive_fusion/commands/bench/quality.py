"""``adaptive-fusion bench quality``: what every row answers on held-out questions, scored and timed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.bench.shared import Plot, Points, check_plot, machine, print_lines, rungs_of
from adaptive_fusion.commands.options import Json, Model, PolicyName
from adaptive_fusion.commands.output import BAD_INPUT, complain, emit, progress, refusing
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.policy.rungs import Rung
    from adaptive_fusion.runner import AdaptiveRunner


def quality(
    as_json: Json = False,
    plot: Plot = None,
    model: Model = "reference",
    policy: PolicyName = "auto",
    scenes: Annotated[
        int, typer.Option(help="Scenes of each slice (three times as many simple ones); images with --data.")
    ] = 12,
    points: Points = None,
    knobs: Annotated[
        bool, typer.Option(help="Only native, its downsamplings and no taps, and what each keeps.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of images to use instead of the scenes.")] = None,
    captions: Annotated[Path | None, typer.Option(help="COCO-format captions of the images in --data.")] = None,
    prompt: Annotated[str, typer.Option(help="Asked about each image in --data.")] = "Describe the image.",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Upper bound of an answer.")] = 160,
    weights: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Trained fusion module (safetensors) to run in place of the policy's."),
    ] = None,
) -> None:
    """Answers on held-out scenes (or captioned images), scored and timed, for every row.

    Row `adaptive` takes the policy's choice for each input, under no limits but the policy's own; the first point of
    its lane for simple images is a row of its own, taken for every input. Rows `shuffled` (native's answers scored on
    other images) and `chance` (other images' own right answers) show what a model that does not look would get.
    Exit code 2 if an input was refused; the tables then have the others.
    """
    with refusing([model], as_json):
        _check(data, captions, knobs, points)
        check_plot(plot)
        questions = _questions(scenes, data, captions, prompt)
        runner, rows, cheap = _open(model, policy, points, knobs, weights or [])
        found = _evaluated(runner, questions, rows, cheap, knobs, max_new_tokens, as_json)
        result = {"model": model, "policy": runner.policy.name, **_made_of(runner, rows, weights or []), **found}
        if plot is not None:
            from adaptive_fusion.bench.report import plot_quality

            plot_quality(result, plot)
        for failure in found["failed"]:
            complain(f"{failure['input']}: {failure['error']}")
        if as_json:
            emit(result)
        else:
            _print(result, knobs)
        if found["failed"]:
            raise typer.Exit(BAD_INPUT)


def _check(data: Path | None, captions: Path | None, knobs: bool, points: list[str] | None) -> None:
    if (data is None) != (captions is None):
        raise ConfigError("--data and --captions belong together; got only one of them")
    if knobs and points:
        raise ConfigError(f"--knobs has rows of its own; got --points {', '.join(points)} as well")


def _questions(scenes: int, data: Path | None, captions: Path | None, prompt: str) -> "list[Question]":
    """Captioned images, or the held-out scenes."""
    from adaptive_fusion.evaluation.folders import folder_questions
    from adaptive_fusion.evaluation.scenes import reference_questions

    if data is None or captions is None:
        return reference_questions(scenes)
    return folder_questions(data, captions, prompt, limit=scenes)


def _open(
    model: str, policy: str, points: list[str] | None, knobs: bool, weights: list[Path]
) -> "tuple[AdaptiveRunner, dict[str, Rung], Rung | None]":
    """A runner with the weights, the rows that it can run, and the one that is taken for every input."""
    from adaptive_fusion.bench.answers import KNOB_ROWS, ROWS, cheap_rung, rows_for, use_weights
    from adaptive_fusion.loading import open_runner

    chosen = rungs_of(points, KNOB_ROWS if knobs else ROWS)
    runner = open_runner(model, policy)
    # The policy is judged as it ships: limits in the environment are this machine's.
    runner.budget = runner.policy.budget
    cheap = None if knobs else cheap_rung(runner.adapter, runner.policy)
    rows = rows_for(runner.adapter, [*chosen, *([cheap] if cheap else [])])
    ladders = runner.policy.lanes.values()
    use_weights(runner.adapter, [*rows.values(), *(rung for lane in ladders for rung in lane)], weights)
    return runner, rows, cheap


def _evaluated(
    runner: "AdaptiveRunner",
    questions: "list[Question]",
    rows: "dict[str, Rung]",
    cheap: "Rung | None",
    knobs: bool,
    max_new_tokens: int,
    as_json: bool,
) -> dict[str, Any]:
    from adaptive_fusion.bench.quality import evaluate

    decide = None if knobs else lambda media, prompt: runner.decide(media, prompt, max_new_tokens=max_new_tokens)
    with progress(as_json) as shown:
        return evaluate(
            runner.adapter,
            questions,
            rows,
            decide,
            cheap=cheap.name if cheap else None,
            max_new_tokens=max_new_tokens,
            progress=shown,
        )


def _made_of(runner: "AdaptiveRunner", rows: "dict[str, Rung]", weights: list[Path]) -> dict[str, Any]:
    """Limits, trained weights and machine behind the figures."""
    from adaptive_fusion.bench.answers import trained_rows

    return {
        "budget": runner.budget.to_dict(),
        "weights": trained_rows(runner.adapter, rows, [*runner.policy.fusion_weights, *weights]),
        "machine": machine(),
    }


def _print(result: dict[str, Any], knobs: bool) -> None:
    from adaptive_fusion.bench import report

    out = report.console()
    for table in [report.knob_table(result)] if knobs else report.quality_tables(result):
        out.print(table)
    if not knobs:
        out.print(report.comparison_table(result))
        print_lines(out, report.quality_notes(result))
