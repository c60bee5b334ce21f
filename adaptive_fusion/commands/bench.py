"""``adaptive-fusion bench``: what each operating point answers (`quality`), what it takes (`cost`), and how well
budgets are kept (`budget`).

Parses options, shows progress and prints; the work is in `adaptive_fusion.bench`, imported when a command
runs.
"""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.options import Json, Model, PolicyName, point_of
from adaptive_fusion.commands.output import emit, progress, refusing
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.ladder import Rung

app = typer.Typer(
    name="bench", help="Measure what the operating points are worth and what they take.", no_args_is_help=True
)

Plot = Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw the result into a PNG file.")]
Points = Annotated[
    list[str] | None,
    typer.Option(metavar="POINT", help="Rows instead of the usual ones: weighted6r4@0.5/25%, native@0.25..."),
]

_SHARE = re.compile(r"(?P<point>.*)/(?P<percent>\d+(?:\.\d+)?)%")


@app.command()
def quality(
    as_json: Json = False,
    plot: Plot = None,
    model: Model = "reference",
    policy: PolicyName = "balanced",
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
) -> None:
    """Answers on held-out scenes (or captioned images), scored and timed, for every row.

    Rows `shuffled` (native's answers scored on other images) and `chance` (other images' own right answers)
    show what a model that does not look would get.
    """
    with refusing([model], as_json):
        if (data is None) != (captions is None):
            raise ConfigError("--data and --captions belong together; got only one of them")
        from adaptive_fusion.bench import report
        from adaptive_fusion.bench.answers import KNOB_ROWS, ROWS, rows_for
        from adaptive_fusion.bench.folder import folder_items
        from adaptive_fusion.bench.quality import evaluate
        from adaptive_fusion.bench.scenes import reference_items
        from adaptive_fusion.commands.session import open_runner

        if data is None or captions is None:
            items = reference_items(scenes)
        else:
            items = folder_items(data, captions, prompt, limit=scenes)
        chosen = KNOB_ROWS if knobs else [_rung(text) for text in points] if points else ROWS
        runner = open_runner(model, policy)
        rows = rows_for(runner.adapter, chosen)
        most = max_new_tokens
        decide = None if knobs else lambda media, question: runner.decide(media, question, max_new_tokens=most)
        with progress(len(items) * (len(rows) + (decide is not None)), as_json) as advance:
            found = evaluate(runner.adapter, items, rows, decide, max_new_tokens=most, advance=advance)
        result: dict[str, Any] = {"model": model, "policy": policy, "machine": _machine(), **found}
        if plot is not None:
            report.plot_quality(result, plot)
        if as_json:
            emit(result)
            return
        out = report.console()
        for table in [report.knob_table(result)] if knobs else report.quality_tables(result):
            out.print(table)
        if not knobs:
            out.print(report.comparison_table(result))


@app.command()
def cost(
    as_json: Json = False,
    plot: Plot = None,
    size: Annotated[
        str, typer.Option(help="2b, 4b, 8b, 32b, 30b-a3b, 235b-a22b (random weights) or reference.")
    ] = "2b",
    image: Annotated[int, typer.Option(min=32, max=4096, help="Side of the image in pixels.")] = 512,
    policy: PolicyName = "balanced",
    points: Points = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over all rows.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 4,
    device: Annotated[str, typer.Option(help="Where the model is built.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="bfloat16 or float32 (several times faster on processors without bfloat16).")
    ] = "bfloat16",
) -> None:
    """Encode, prefill, decode and peak memory of every row at a model's true shape, as ratios to native.

    The policy's lane for simple images is measured along with the other rows.
    """
    with refusing([size], as_json):
        from adaptive_fusion.bench import report
        from adaptive_fusion.bench.cost import (
            ROWS,
            Workload,
            adapter_of_size,
            cost_rows,
            measure_costs,
            summarise_costs,
        )
        from adaptive_fusion.policy import SIMPLE, Policy

        loaded = Policy.load(policy)
        rows = cost_rows(loaded, [_rung(text) for text in points] if points else ROWS)
        adapter = adapter_of_size(size, device, dtype)
        with progress(len(rows) * repeats, as_json) as advance:
            found = measure_costs(adapter, rows, Workload(image, new_tokens), repeats=repeats, advance=advance)
        lane = {rung.name for rung in loaded.lanes[SIMPLE]}
        result: dict[str, Any] = {
            "size": size,
            "dtype": str(adapter.model.dtype).removeprefix("torch."),
            "image": image,
            "policy": policy,
            "repeats": repeats,
            "new_tokens": new_tokens,
            "machine": _machine(),
            "rows": summarise_costs(found, lane),
        }
        if plot is not None:
            report.plot_costs(result, plot)
        if as_json:
            emit(result)
        else:
            report.console().print(report.cost_table(result))


@app.command()
def budget(
    as_json: Json = False,
    plot: Plot = None,
    model: Model = "reference",
    policy: PolicyName = "balanced",
    attainment: Annotated[float, typer.Option(help="Share of the feasible requests that must be in time.")] = 0.95,
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
    """Attainment and quality of this controller and others under load that changes.

    Times are measured on the model, several times at each operating point, calm and beside processes that keep all
    cores busy. The traces (stationary, step of x1.7, sine, burst, memory squeeze, busy processes) are replayed over
    these times; a shorter part is run for real, with injected delays and with busy processes, to check the replay.
    Rows: native, best static (one point a lane, chosen in hindsight), AIMD, PID, ours, oracle.
    """
    with refusing([model], as_json):
        import os

        from adaptive_fusion.bench import report
        from adaptive_fusion.bench.budget import measure_table, measured_world, replay, run_real
        from adaptive_fusion.bench.rivals import require_pid
        from adaptive_fusion.bench.scenes import reference_items
        from adaptive_fusion.bench.traces import read_trace
        from adaptive_fusion.budget import Budget
        from adaptive_fusion.calibrate import calibrate
        from adaptive_fusion.commands.session import open_runner
        from adaptive_fusion.plots import check_target

        require_pid()
        if plot is not None:
            check_target(plot)
        Budget(ttft_ms=ttft_ms, attainment=attainment)  # refuses what is out of range before anything is run
        items = reference_items(scenes)
        runner = open_runner(model, policy)
        if not runner.profile.samples:
            with progress(0, as_json) as advance:
                calibrate(runner, save=False, progress=lambda _done, total: advance(total))
        beside = (os.cpu_count() or 1) if hogs is None else hogs
        with progress(0, as_json) as advance:
            table = measure_table(runner, items, repeats=repeats, hogs=beside, advance=advance)
        world = measured_world(table, ttft_ms or table.default_deadline_ms, runner.profile.memory_margin)
        chosen = None if trace is None else partial(read_trace, trace, seed=seed)
        found = replay(world, attainment, requests, seed=seed, trace=chosen)
        checks = []
        if real:
            with progress(0, as_json) as advance:
                checks = run_real(runner, items, world, attainment, real, hogs=beside, seed=seed, advance=advance)
        result = {
            "model": model,
            "policy": policy,
            "profile": runner.profile_note,
            "repeats": repeats,
            "hogs": beside,
            "machine": _machine(),
            **found,
            "real": checks,
        }
        if plot is not None:
            report.plot_budget(result, plot)
        if as_json:
            emit(result)
            return
        out = report.console()
        out.print(report.budget_table(result))
        for line in report.budget_notes(result):
            out.print(line, markup=False, highlight=False)


def _rung(text: str) -> "Rung":
    """A point's readable name, with an optional share of the native pixels (``/25%``) at its end."""
    from adaptive_fusion.ladder import Rung

    found = _SHARE.fullmatch(text)
    point = point_of(found["point"] if found else text)
    assert point is not None  # only no name gives no point
    return Rung(point, pixel_share=float(found["percent"]) / 100 if found else 1.0)


def _machine() -> dict[str, Any]:
    """What the times were measured on."""
    import os
    import platform

    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": gpu,
    }
