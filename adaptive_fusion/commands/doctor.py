"""``adaptive-fusion doctor``: whether this set-up is sound, and what to do where it is not."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import console, emit, printable

app = typer.Typer()

Model = Annotated[
    str | None,
    typer.Option(help="Load this model too: a folder in Hugging Face format, or the id of a model on the Hub."),
]
_MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


@app.command()
def doctor(
    model: Model = None,
    logs: Annotated[
        list[str] | None,
        typer.Option(metavar="LOGS", help="Say whether these have drifted; may be given several times."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Policy that --logs are compared with.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check versions, devices, attention backends, number formats and combinations known to be bad; with a model also
    which policy it gets, what that was fitted to, and what does not fit; with logs, whether those are still like what
    their policy was fitted on.

    Exit code 1 if something is broken.
    """
    from adaptive_fusion.doctor import examine

    checks = list(examine(model, logs or (), policy))
    broken = [check for check in checks if check.status == "broken"]
    if as_json:
        emit({"ok": not broken, "checks": [asdict(check) for check in checks]})
    else:
        table = Table(show_edge=False, pad_edge=False)
        for column in ("", "check", "found", "what to do"):
            table.add_column(column, overflow="fold")
        for check in checks:
            table.add_row(_MARKS[check.status], check.name, printable(check.found), check.advice)
        console().print(table)
        console().print(f"{len(broken)} broken" if broken else "nothing is broken")
    if broken:
        raise typer.Exit(1)
