"""``adaptive-fusion bench budget``: how well the controller and others keep budgets under load that changes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.bench.shared import Plot, check_plot, machine, print_lines
from adaptive_fusion.commands.options import Json, Model, PolicyName
from adaptive_fusion.commands.output import emit, progress, refusing
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.bench.traces import Trace, World
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.runner import AdaptiveRunner


def budget(
    as_json: Json = False,
    plot: Plot = None,
    model: Model = "reference",
    policy: PolicyName = "auto",
    attainment: Annotated[
        list[float] | None,
        typer.Option(help="Share of the feasible requests that must be in time, 0.95; once or more."),
    ] = None,
    ttft_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", help="Deadline for the first token; native's median over the questions if not given."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=2000, help="Requests of each replayed trace.")] = 2000,
    real: Annotated[
        int, typer.Option(min=0, help="Requests run for real, twice, to check the replay; 0 leaves that out.")
    ] = 30,
    scenes: Annotated[int, typer.Option(min=2, help="Scenes of each slice (three times as many simple ones).")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Times each question is measured at each point.")] = 3,
    hogs: Annotated[
        int | None,
        typer.Option(min=0, help="Busy processes that the trace hog measures beside; as many as cores if not given."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Replay this file: a column load, and if wanted work, simple, elapsed_ms, free_gb."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the traces.")] = 0,
) -> None:
    """Attainment and quality of this controller and others under load that changes, for each target on one table.

    Times are measured on the model, several times at each operating point, calm and beside processes that keep all
    cores busy. The traces (stationary, step of x1.7, sine, burst, memory squeeze, busy processes) are replayed over
    these times; a shorter part is run for real, with injected delays and with busy processes, to check the replay.
    Rows: native, best static (one point a lane, chosen in hindsight), AIMD, PID, ours, oracle.
    """
    with refusing([model], as_json):
        targets = attainment or [0.95]
        _check(targets, ttft_ms, plot)
        drawn = None if trace is None else _read(trace, seed)
        background = (os.cpu_count() or 1) if hogs is None else hogs
        measured = _measure(model, policy, scenes, repeats, background, ttft_ms, as_json)
        for target in targets:
            found = _replay(measured, target, requests, real, seed, drawn, as_json)
            _show({"model": model, "policy": measured.runner.policy.name, **found}, plot, as_json)


def _check(targets: list[float], ttft_ms: float | None, plot: Path | None) -> None:
    """Refuse what cannot come to a result, before anything is run."""
    from adaptive_fusion.bench.baselines import require_pid
    from adaptive_fusion.budget import Budget

    require_pid()
    check_plot(plot)
    for target in targets:
        Budget(ttft_ms=ttft_ms, attainment=target)  # refuses what is out of range
    if plot is not None and len(targets) > 1:
        raise ConfigError(f"--plot draws one target; got {len(targets)} of --attainment")


def _read(trace: Path, seed: int) -> "Callable[[World], Trace]":
    from adaptive_fusion.bench.traces import read_trace

    return read_trace(trace, seed)


@dataclass(frozen=True)
class _Measured:
    """A model and the world of its times: `repeats` calm ones, and as many beside `background` busy processes."""

    runner: "AdaptiveRunner"
    questions: "list[Question]"
    world: "World"
    repeats: int
    background: int


def _measure(
    model: str, policy: str, scenes: int, repeats: int, background: int, ttft_ms: float | None, as_json: bool
) -> _Measured:
    """Calibrate the model if it never was, and measure every question at every point of its lane."""
    from adaptive_fusion.bench.measured import measure_table, measured_world
    from adaptive_fusion.calibrate import calibrate
    from adaptive_fusion.evaluation.scenes import reference_questions
    from adaptive_fusion.loading import open_runner

    questions = reference_questions(scenes)
    runner = open_runner(model, policy)
    with progress(as_json) as shown:
        if not runner.profile.samples:
            calibrate(runner, save=False, progress=shown)
        table = measure_table(runner, questions, repeats=repeats, background=background, progress=shown)
    world = measured_world(table, ttft_ms or table.default_deadline_ms, runner.profile.memory_margin)
    return _Measured(runner, questions, world, repeats, background)


def _replay(
    measured: _Measured,
    target: float,
    requests: int,
    real: int,
    seed: int,
    trace: "Callable[[World], Trace] | None",
    as_json: bool,
) -> dict[str, Any]:
    """Every row on every trace for one target, and the check by `real` requests, as fields of the command's JSON."""
    from adaptive_fusion.bench.budget import replay, run_real

    runner, world = measured.runner, measured.world
    with progress(as_json) as shown:
        found = replay(world, target, requests, seed=seed, trace=trace, progress=shown)
        checks = []
        if real:
            options = {"background": measured.background, "seed": seed}
            checks = run_real(runner, measured.questions, world, target, real, progress=shown, **options)
    return {
        "profile": runner.profile_note,
        "repeats": measured.repeats,
        "hogs": measured.background,
        "machine": machine(),
        **found,
        "real": checks,
    }


def _show(result: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    from adaptive_fusion.bench import report

    if plot is not None:
        report.plot_budget(result, plot)
    if as_json:
        emit(result)
        return
    out = report.console()
    out.print(report.budget_table(result))
    print_lines(out, report.budget_notes(result))
