"""``adaptive-fusion policies``: the policies that come with the library."""

import typer
from rich.table import Table

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import console, emit

app = typer.Typer()


@app.command()
def policies(as_json: options.Json = False) -> None:
    """List the shipped policies with their lanes and the model that each was fitted to."""
    from adaptive_fusion.policy.policy import Policy

    loaded = [Policy.load(name) for name in Policy.shipped()]
    table = Table(title="Shipped policies", title_justify="left")
    for column in ("name", "description", "weighted", "gated", "video"):
        table.add_column(column, overflow="fold")
    for policy in loaded:
        lanes = {lane: [rung.name for rung in ladder] for lane, ladder in policy.lanes.items()}
        if as_json:
            fields = {"name": policy.name, "description": policy.description, "threshold": policy.threshold}
            fitted = policy.fitted.to_dict()
            emit({**fields, "fitted": fitted, "budget": policy.budget.to_dict(), "lanes": lanes})
        table.add_row(
            policy.name,
            f"{policy.description}\nFitted to {policy.fitted.in_words()}.",
            *("\n".join(lanes[lane]) for lane in ("weighted", "gated", "video")),
        )
    if not as_json:
        console().print(table)
