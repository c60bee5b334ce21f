"""``adaptive-fusion logs``: pack decision logs, and say what is in them."""

from pathlib import Path
from typing import Annotated

import typer

from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import console, emit, printable, refusing

app = typer.Typer(name="logs", help="Pack decision logs and labels.", no_args_is_help=True)


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
