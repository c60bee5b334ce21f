"""``adaptive-fusion calibrate``: measure what requests cost on this machine, so that its budgets are kept."""

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import console, emit, progress
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.cost import Profile

app = typer.Typer()


@app.command()
def calibrate(
    model: options.Model = "reference",
    repeats: Annotated[int, typer.Option(min=1, help="Times each request is measured.")] = 2,
    as_json: options.Json = False,
) -> None:
    """Measure a model's costs on this machine and keep them in the user's cache, where they are found again."""
    from adaptive_fusion.calibrate import calibrate as measure
    from adaptive_fusion.commands.session import open_runner
    from adaptive_fusion.profiles import profile_path, user_cache_dir

    runner = open_runner(model, "native")
    try:
        with progress(0, as_json) as advance:
            profile = measure(runner, repeats=repeats, progress=lambda _done, total: advance(total))
    except OSError as error:
        raise ConfigError(f"the profile cannot be kept ({error.strerror}); set XDG_CACHE_HOME to a folder") from error
    path = profile_path(user_cache_dir(os.environ), profile.key)
    if as_json:
        emit({"model": model, "path": str(path), "profile": profile.to_dict()})
    else:
        console().print(_table(profile))
        console().print(f"kept in {path}")


def _table(profile: "Profile") -> Table:
    table = Table(title=f"Fitted to {profile.samples} requests", title_justify="left")
    table.add_column("stage")
    table.add_column("median error of its prediction", justify="right")
    for stage, error in profile.errors.items():
        table.add_row(stage, f"{error:.1%}")
    return table
