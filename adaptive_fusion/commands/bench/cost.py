"""``adaptive-fusion bench cost``: what every row takes at a model's true shape."""

import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.bench.shared import Plot, Points, check_plot, machine, print_lines, rungs_of
from adaptive_fusion.commands.options import Json, PolicyName
from adaptive_fusion.commands.output import emit, progress, refusing

if TYPE_CHECKING:
    from adaptive_fusion.bench.cost import Workload


def cost(
    as_json: Json = False,
    plot: Plot = None,
    size: Annotated[
        str, typer.Option(help="2b, 4b, 8b, 32b, 30b-a3b, 235b-a22b (random weights) or reference.")
    ] = "2b",
    image: Annotated[int, typer.Option(min=32, max=4096, help="Side of the image in pixels.")] = 512,
    policy: PolicyName = "auto",
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
        from adaptive_fusion.bench.cost import Workload
        from adaptive_fusion.loading import quieten

        quieten()
        check_plot(plot)
        asked = {"image": image, "repeats": repeats, "new_tokens": new_tokens}
        measured = _measured(size, device, dtype, policy, points, Workload(image, new_tokens), repeats, as_json)
        result = {"size": size, "dtype": measured.pop("dtype"), **asked, **measured}
        if plot is not None:
            report.plot_costs(result, plot)
        if as_json:
            emit(result)
            return
        out = report.console()
        out.print(report.cost_table(result))
        print_lines(out, report.cost_notes(result))


def _measured(
    size: str,
    device: str,
    dtype: str | None,
    policy: str,
    points: list[str] | None,
    workload: "Workload",
    repeats: int,
    as_json: bool,
) -> dict[str, Any]:
    """Build the model and run all rows; names and order of the fields are those of the command's JSON."""
    from adaptive_fusion.bench.cost import (
        ROWS,
        adapter_of_size,
        cost_rows,
        measure_costs,
        shortfalls,
        summarise_costs,
    )
    from adaptive_fusion.bench.shapes import SHAPES
    from adaptive_fusion.models.fingerprint import fingerprint
    from adaptive_fusion.policy.auto import choose
    from adaptive_fusion.policy.files import AUTO
    from adaptive_fusion.policy.policy import SIMPLE, Policy

    # A wrong name is told before a model is built.
    named: str | Policy = policy if policy == AUTO else Policy.load(policy)
    usual = rungs_of(points, ROWS)
    began = time.perf_counter()
    adapter = adapter_of_size(size, device, dtype)
    build_s = time.perf_counter() - began
    loaded = choose(named, fingerprint(adapter), os.environ).policy
    rows = cost_rows(loaded, usual)
    with progress(as_json) as shown:
        found = measure_costs(adapter, rows, workload, repeats=repeats, progress=shown)
    records = summarise_costs(found, {rung.name for rung in loaded.lanes[SIMPLE]})
    return {
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "policy": loaded.name,
        "build_s": build_s,
        "machine": machine(),
        "rows": records,
        "shortfalls": shortfalls(records) if size.lower() in SHAPES else None,
    }
