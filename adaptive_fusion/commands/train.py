"""``adaptive-fusion train``: labelled logs to a policy that is not worse than the one in service."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import complain, console, emit, printable, refusing
from adaptive_fusion.errors import GateRefused

if TYPE_CHECKING:
    from adaptive_fusion.learning.fitting.gate import Verdict
    from adaptive_fusion.learning.fitting.train import Trained

REFUSED = 1
"""Exit code when the gate refused the new policy; bad input ends with 2."""

app = typer.Typer()

Logs = Annotated[
    list[str],
    typer.Argument(metavar="LOGS...", help="Logs and labels: JSONL, Parquet, folders or patterns.", show_default=False),
]

Objective = Annotated[
    str,
    typer.Option(
        help="cost: keep the quality within the tolerance in the mean; quality: with the whole 95 % interval."
    ),
]


@app.command()
def train(
    logs: Logs,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new policy.", show_default=False)],
    base: Annotated[
        str,
        typer.Option(
            help="Policy whose ladders and budget are kept; auto takes the shipped one whose rungs are labelled."
        ),
    ] = "auto",
    name: Annotated[str, typer.Option(help="Name of the new policy, as logs will show it.")] = "trained",
    objective: Objective = "quality",
    tolerance: Annotated[float, typer.Option(help="Loss of quality that is accepted, 0 to 1.")] = 0.02,
    incumbent: Annotated[
        str | None, typer.Option(metavar="POLICY", help="What the new policy must not be worse than; else the base.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the policy although the gate refuses it.")] = False,
    estimator: Annotated[
        list[str] | None, typer.Option(help="logistic or hgb; both are tried if none is named.")
    ] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(metavar="FEATURE", help="A feature that the router must not read.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of splits, fits and bootstraps.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    as_json: Json = False,
) -> None:
    """Train a policy on labelled LOGS and write it with its card, if it passes the gate.

    The gate compares it with the incumbent on contents that neither fit nor threshold saw, by trusted labels
    only. Exit code 1 if it is worse beyond the 95 % interval: nothing is written then. The same logs and seed
    give the same bytes.
    """
    from adaptive_fusion.learning.fitting.train import ESTIMATOR_NAMES
    from adaptive_fusion.learning.fitting.train import train as run

    with refusing([str(out)], as_json):
        try:
            trained = run(
                logs,
                out,
                base=base,
                incumbent=incumbent,
                name=name,
                objective=objective,
                tolerance=tolerance,
                estimators=tuple(estimator or ESTIMATOR_NAMES),
                leave_out=tuple(leave_out or ()),
                force=force,
                seed=seed,
                jobs=jobs,
            )
        except GateRefused as refused:
            complain(f"{refused}; nothing was written (--force writes it all the same)")
            if as_json:
                emit({"accepted": False, **_gate(refused.verdict)})
            raise typer.Exit(REFUSED) from refused
    _print(trained, as_json)


def _print(trained: "Trained", as_json: bool) -> None:
    if as_json:
        emit(_fields(trained))
    else:
        console().print((trained.folder / "README.md").read_text(encoding="utf-8"))
        complain(f"written to {printable(str(trained.folder))}")


def _gate(verdict: "Verdict") -> dict[str, Any]:
    from adaptive_fusion.learning.fitting.card import finite

    figures = {name: asdict(value) for name, value in verdict.figures.items()}
    return {"reasons": list(verdict.reasons), "rows": verdict.rows, "gate": finite(figures)}


def _fields(trained: "Trained") -> dict[str, Any]:
    from adaptive_fusion.learning.fitting.card import finite

    report = trained.fitted.report
    return {
        "policy": trained.fitted.policy.name,
        "folder": str(trained.folder),
        "accepted": trained.verdict.accepted,
        **_gate(trained.verdict),
        **finite({key: report[key] for key in ("data", "chosen", "threshold", "prompt_features", "test")}),
    }
