"""``adaptive-fusion doctor``: whether this set-up is sound, and what to do where it is not."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import console, emit, printable, refusing

if TYPE_CHECKING:
    from adaptive_fusion.doctor import Check

app = typer.Typer()

Model = Annotated[
    str | None,
    typer.Option(help="Load this model too: a folder in Hugging Face format, or the id of a model on the Hub."),
]
Upstream = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Ask the engine at this address what it accepts, instead.", show_default=False),
]
UpstreamModel = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of the model upstream; else the first that the engine lists."),
]
Engine = Annotated[
    str, typer.Option(metavar="NAME", help="Which engine it is: vllm, sglang, lmdeploy, transformers...")
]
Processor = Annotated[
    str | None,
    typer.Option(metavar="ID|PATH|PRESET", help="How its model resizes, to be compared with the tokens it counts."),
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
    upstream: Upstream = None,
    upstream_model: UpstreamModel = None,
    engine: Engine = "openai",
    processor: Processor = None,
    as_json: options.Json = False,
) -> None:
    """Check versions, devices, attention backends, number formats and combinations known to be bad; with a model also
    which policy it gets, what that was fitted to, and what does not fit; with logs, whether those are still like what
    their policy was fitted on. With --upstream, in place of all this, what an engine accepts, found by asking it.

    Exit code 1 if something is broken.
    """
    if upstream is None:
        from adaptive_fusion.doctor import examine

        checks = list(examine(model))
        if logs:
            checks.append(_drifted(logs, policy))
    else:
        with refusing((), as_json):
            checks = _asked(upstream, upstream_model, engine, processor)
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


def _asked(upstream: str, model: str | None, engine: str, processor: str | None) -> "list[Check]":
    """What the engine at an address accepts."""
    from adaptive_fusion.commands.options import require_serving

    require_serving()
    from adaptive_fusion.serving.gateway.probe import examine_upstream

    return list(examine_upstream(upstream, model=model, engine=engine, processor=processor))


def _drifted(logs: Sequence[str], policy: str | None) -> "Check":
    """Whether logs are like what a policy was trained on, or else like their earlier half."""
    from adaptive_fusion.doctor import Check, brief
    from adaptive_fusion.learning.judging.drift import drift

    try:
        found = drift(logs, policy)
    except Exception as error:
        return Check("drift", "broken", brief(error), "expected logs that are there, and 'adaptive-fusion[train]'")
    advice = "`adaptive-fusion learn` fits the policy again; `adaptive-fusion logs drift --plot` draws it"
    return Check("drift", "note" if found.drifted else "ok", found.in_words(), advice if found.drifted else "")
