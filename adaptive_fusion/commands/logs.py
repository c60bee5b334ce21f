"""``adaptive-fusion logs``: pack decision logs, and say what is in them."""

from pathlib import Path
from typing import Annotated

import typer

from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import console, emit, printable, refusing

DRIFTED = 1
"""Exit code where inputs or outcomes have changed."""

app = typer.Typer(name="logs", help="Pack decision logs, and say whether they have changed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def compact(
    logs: Annotated[
        list[str],
        typer.Argument(
            metavar="LOGS...", help="JSONL (rotated too), Parquet, folders or patterns.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Parquet file to write.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Write LOGS into one Parquet file, which reads as the logs do; they are not removed.

    Lines that are no JSON object are counted and left out.
    """
    from adaptive_fusion.learning.data.logs import compact as pack

    with refusing([str(out)], as_json):
        table = pack(logs, out)
    found = {"out": str(out), "files": len(table.files), "rows": table.rows, "broken_lines": table.broken}
    if as_json:
        emit({**found, "bytes": out.stat().st_size})
    else:
        console().print(
            f"{table.rows} records of {len(table.files)} files in {printable(str(out))}"
            f" ({out.stat().st_size / 1e6:.1f} MB); {table.broken} broken lines left out"
        )


@app.command()
def drift(
    logs: Annotated[
        list[str],
        typer.Argument(
            metavar="LOGS...", help="JSONL (rotated too), Parquet, folders or patterns.", show_default=False
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help="What LOGS are compared with: the data that this policy was trained on, and its range of images. "
            "Without one, or where it was not trained on logs, their earlier half stands for it.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the largest changes.")] = None,
    as_json: Json = False,
) -> None:
    """Say whether inputs and outcomes of LOGS are still what a policy was trained on.

    Two-sample tests of every feature and outcome, adjusted for their number: where nothing changed, one flag in a
    hundred. Exit code 1 if there is drift.
    """
    from adaptive_fusion.learning.judging.drawing import plot_drift
    from adaptive_fusion.learning.judging.drift import drift as judge
    from adaptive_fusion.plots import check_target

    with refusing([str(plot) if plot else ""], as_json):
        if plot is not None:
            check_target(plot)
        found = judge(logs, policy)
        if plot is not None:
            plot_drift(found, plot)
    if as_json:
        emit(found.to_dict())
    else:
        console().print(printable(found.in_words()))
        for change in found.drifted:
            console().print(printable(f"- {change.in_words()}"))
    if found.drifted:
        raise typer.Exit(DRIFTED)
