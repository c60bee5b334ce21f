"""``adaptive-fusion bench``: what each operating point answers (`quality`), what it takes (`cost`), and how well
budgets are kept (`budget`).

Parses options, shows progress and prints; the work is in `adaptive_fusion.bench`, imported when a command
runs.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptive_fusion.commands.options import Json, Model, PolicyName
from adaptive_fusion.commands.output import emit, progress, refusing
from adaptive_fusion.errors import ConfigError

app = typer.Typer(
    name="bench", help="Measure what the operating points are worth and what they take.", no_args_is_help=True
)

Plot = Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw the result into a PNG file.")]
Points = Annotated[
    list[str] | None,
    typer.Option(metavar="POINT", help="Rows instead of the usual ones: weighted6r4@0.5/25%, native@0.25..."),
]


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
    weights: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Trained fusion module (safetensors) to run in place of the policy's."),
    ] = None,
) -> None:
    """Answers on held-out scenes (or captioned images), scored and timed, for every row.

    Row `adaptive` takes the policy's choice for each input, under no limits but the policy's own; the first point of
    its lane for simple images is a row of its own, taken for every input. Rows `shuffled` (native's answers scored on
    other images) and `chance` (other images' own right answers) show what a model that does not look would get.
    """
    with refusing([model], as_json):
        if (data is None) != (captions is None):
            raise ConfigError("--data and --captions belong together; got only one of them")
        if knobs and points:
            raise ConfigError(f"--knobs has rows of its own; got --points {', '.join(points)} as well")
        from adaptive_fusion.bench import report
        from adaptive_fusion.bench.answers import KNOB_ROWS, ROWS, cheap_rung, rows_for, trained_rows, use_weights
        from adaptive_fusion.bench.quality import evaluate
        from adaptive_fusion.evaluation.folders import folder_items
        from adaptive_fusion.evaluation.scenes import reference_items
        from adaptive_fusion.loading import open_runner
        from adaptive_fusion.plots import check_target
        from adaptive_fusion.policy.rungs import Rung

        if plot is not None:
            check_target(plot)

        if data is None or captions is None:
            items = reference_items(scenes)
        else:
            items = folder_items(data, captions, prompt, limit=scenes)
        chosen = KNOB_ROWS if knobs else [Rung.parse(text) for text in points] if points else ROWS
        runner = open_runner(model, policy)
        # The policy is judged as it ships: limits in the environment are this machine's.
        runner.budget = runner.policy.budget
        cheap = None if knobs else cheap_rung(runner.adapter, runner.policy)
        rows = rows_for(runner.adapter, [*chosen, *([cheap] if cheap else [])])
        ladders = runner.policy.lanes.values()
        use_weights(runner.adapter, [*rows.values(), *(rung for lane in ladders for rung in lane)], weights or [])
        most = max_new_tokens
        decide = None if knobs else lambda media, question: runner.decide(media, question, max_new_tokens=most)
        with progress(as_json) as shown:
            found = evaluate(
                runner.adapter,
                items,
                rows,
                decide,
                cheap=cheap.name if cheap else None,
                max_new_tokens=most,
                progress=shown,
            )
        result: dict[str, Any] = {
            "model": model,
            "policy": policy,
            "budget": runner.budget.to_dict(),
            "weights": trained_rows(runner.adapter, rows, [*runner.policy.fusion_weights, *(weights or [])]),
            "machine": _machine(),
            **found,
        }
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
            for line in report.quality_notes(result):
                out.print(line, markup=False, highlight=False)


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
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 3,
    device: Annotated[str, typer.Option(help="Where the model is built.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 or float32; if not given bfloat16, but float32 on a processor without bfloat16.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Encode, prefill, decode and peak memory of every row at a model's true shape, as ratios to native.

    The policy's lane for simple images is measured along with the other rows; native again and again between them, so
    that each ratio is to native runs just before and after. The default at 2b takes about seven minutes on two cores.
    """
    with refusing([size], as_json):
        from adaptive_fusion.bench import report
        from adaptive_fusion.bench.cost import (
            ROWS,
            Workload,
            adapter_of_size,
            cost_rows,
            measure_costs,
            shortfalls,
            summarise_costs,
        )
        from adaptive_fusion.bench.shapes import SHAPES
        from adaptive_fusion.loading import quieten
        from adaptive_fusion.plots import check_target
        from adaptive_fusion.policy.policy import SIMPLE, Policy
        from adaptive_fusion.policy.rungs import Rung

        quieten()
        if plot is not None:
            check_target(plot)
        loaded = Policy.load(policy)
        rows = cost_rows(loaded, [Rung.parse(text) for text in points] if points else ROWS)
        began = time.perf_counter()
        adapter = adapter_of_size(size, device, dtype)
        build_s = time.perf_counter() - began
        with progress(as_json) as shown:
            found = measure_costs(adapter, rows, Workload(image, new_tokens), repeats=repeats, progress=shown)
        records = summarise_costs(found, {rung.name for rung in loaded.lanes[SIMPLE]})
        result: dict[str, Any] = {
            "size": size,
            "dtype": str(adapter.model.dtype).removeprefix("torch."),
            "image": image,
            "policy": policy,
            "repeats": repeats,
            "new_tokens": new_tokens,
            "build_s": build_s,
            "machine": _machine(),
            "rows": records,
            "shortfalls": shortfalls(records) if size.lower() in SHAPES else None,
        }
        if plot is not None:
            report.plot_costs(result, plot)
        if as_json:
            emit(result)
            return
        out = report.console()
        out.print(report.cost_table(result))
        for line in report.cost_notes(result):
            out.print(line, markup=False, highlight=False)


@app.command()
def budget(
    as_json: Json = False,
    plot: Plot = None,
    model: Model = "reference",
    policy: PolicyName = "balanced",
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
        import os

        from adaptive_fusion.bench import report
        from adaptive_fusion.bench.baselines import require_pid
        from adaptive_fusion.bench.budget import measure_table, measured_world, replay, run_real
        from adaptive_fusion.bench.traces import read_trace
        from adaptive_fusion.budget import Budget
        from adaptive_fusion.calibrate import calibrate
        from adaptive_fusion.evaluation.scenes import reference_items
        from adaptive_fusion.loading import open_runner
        from adaptive_fusion.plots import check_target

        require_pid()
        if plot is not None:
            check_target(plot)
        targets = attainment or [0.95]
        for target in targets:
            Budget(ttft_ms=ttft_ms, attainment=target)  # refuses what is out of range before anything is run
        chosen = None if trace is None else read_trace(trace, seed)
        if plot is not None and len(targets) > 1:
            raise ConfigError(f"--plot draws one target; got {len(targets)} of --attainment")
        items = reference_items(scenes)
        runner = open_runner(model, policy)
        if not runner.profile.samples:
            with progress(as_json) as shown:
                calibrate(runner, save=False, progress=shown)
        beside = (os.cpu_count() or 1) if hogs is None else hogs
        with progress(as_json) as shown:
            table = measure_table(runner, items, repeats=repeats, hogs=beside, progress=shown)
        world = measured_world(table, ttft_ms or table.default_deadline_ms, runner.profile.memory_margin)
        for target in targets:
            with progress(as_json) as shown:
                found = replay(world, target, requests, seed=seed, trace=chosen, progress=shown)
            checks = []
            if real:
                with progress(as_json) as shown:
                    checks = run_real(runner, items, world, target, real, hogs=beside, seed=seed, progress=shown)
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
                continue
            out = report.console()
            out.print(report.budget_table(result))
            for line in report.budget_notes(result):
                out.print(line, markup=False, highlight=False)


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
