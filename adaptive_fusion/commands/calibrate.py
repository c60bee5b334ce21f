"""``adaptive-fusion calibrate``: measure what requests cost on this machine, so that its budgets are kept."""

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import console, emit, progress
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adaptive_fusion.cost.model import Profile

app = typer.Typer()


@app.command()
def calibrate(
    model: options.Model = "reference",
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Times each request is measured: 2 on a CPU, 1 elsewhere.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Also measure requests of other sizes, and print how far off their prediction is."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure a model's costs on this machine and keep them in the user's cache, where they are found again."""
    from adaptive_fusion.calibrate import calibrate as measure
    from adaptive_fusion.cost.profiles import profile_path
    from adaptive_fusion.loading import open_runner
    from adaptive_fusion.user_cache import user_cache_dir

    runner = open_runner(model, "native")
    try:
        with progress(as_json) as report:
            found = measure(runner, repeats=repeats, check=check, progress=report)
    except OSError as error:
        raise ConfigError(f"the profile cannot be kept ({error.strerror}); set XDG_CACHE_HOME to a folder") from error
    path = profile_path(user_cache_dir(os.environ), found.profile.key)
    if as_json:
        errors = found.errors if check else None
        emit({"model": model, "path": str(path), "profile": found.profile.to_dict(), "check": errors})
        return
    console().print(_table(found.profile))
    if check:
        console().print(_checked(found.errors))
    console().print(f"kept in {path}")


def _table(profile: "Profile") -> Table:
    table = Table(title=f"Fitted to {profile.samples} requests", title_justify="left")
    table.add_column("stage")
    table.add_column("median error of its prediction", justify="right")
    for stage, error in profile.errors.items():
        table.add_row(stage, f"{error:.1%}")
    return table


def _checked(found: "Mapping[str, Mapping[str, float]]") -> Table:
    table = Table(title="On requests that it was not fitted to", title_justify="left")
    for head in ("stage", "median error", "bias", "95th percentile", "of the best constant"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for stage, row in found.items():
        table.add_row(stage, *(f"{row[key]:.1%}" for key in ("median", "bias", "p95", "constant_p95")))
    return table
