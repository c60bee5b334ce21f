"""``adaptive-fusion explain``: what would be done with each file, and why, without running the model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import Result, complain, decision_fields, each, panel, printable, refusing

if TYPE_CHECKING:
    from adaptive_fusion.decisions import Decision

app = typer.Typer()


@app.command()
def explain(
    files: options.Files,
    prompt: Annotated[str | None, typer.Option(help="The question that would be asked.")] = None,
    latency_ms: options.LatencyMs = None,
    ttft_ms: options.TtftMs = None,
    vram_gb: options.VramGb = None,
    attainment: options.Attainment = None,
    policy: options.PolicyName = "auto",
    model: options.Model = "reference",
    save_plot: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw image, edge map and features, one row per file."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show features, P(complex), lane, operating point and the reason for each FILE; nothing is generated."""
    with refusing(files, as_json):
        budget = options.budget_of(latency_ms, ttft_ms, vram_gb, attainment)
        if save_plot is not None:
            from adaptive_fusion.plots import check_target

            check_target(save_plot)
        from adaptive_fusion.loading import open_runner

        runner = open_runner(model, policy)
    decided: list[tuple[str, Decision]] = []

    def decide(name: str) -> Result:
        decision = runner.decide(name, prompt, budget=budget)
        decided.append((name, decision))
        return decision_fields(decision), _panel(name, decision)

    try:
        each(files, as_json, decide)
    finally:
        if save_plot is not None and decided:
            from adaptive_fusion.commands.pictures import explain_plot

            explain_plot(decided, save_plot)
            if not as_json:
                complain(f"plot written to {save_plot}")


def _panel(name: str, decision: "Decision") -> Panel:
    measured = decision.complexity
    features = {**measured.features, **measured.detail} if measured else {}
    cells = [Text(f"{key} {value:.4g}") for key, value in features.items()]
    body = Group(Text(printable(decision.explain())), Text(), Columns(cells, column_first=True, padding=(0, 3)))
    return panel(name, body)
