"""The command line: one typer app put together from one sub-app per file in `commands`.

Knows which commands there are, and that a library error ends the process with exit code 2. Must not know what
commands do; nothing heavy is imported until one runs.
"""

import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from adaptive_fusion.commands import (
    adapt,
    bench,
    calibrate,
    demo,
    distil,
    doctor,
    evaluate,
    explain,
    gateway,
    label,
    learn,
    logs,
    policies,
    rollout,
    run,
    serve,
    train,
)
from adaptive_fusion.commands.output import BAD_INPUT, complain
from adaptive_fusion.errors import AdaptiveFusionError, PolicyMismatchWarning

SUB_APPS = (
    run.app,
    serve.app,
    gateway.app,
    explain.app,
    demo.app,
    doctor.app,
    policies.app,
    calibrate.app,
    bench.app,
    label.app,
    train.app,
    evaluate.app,
    logs.app,
    rollout.app,
    distil.app,
    adapt.app,
    learn.app,
)
"""An app without a name puts its command at the top level; one with a name is a group of commands."""


class _Root(TyperGroup):
    """Turns the library's errors into one line and an exit code, whichever command raised them, and what it warns of
    into one line."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _told_in_one_line(warnings.showwarning)
            try:
                return super().invoke(ctx)
            except AdaptiveFusionError as error:
                complain(f"{type(error).__name__}: {error}")
                raise typer.Exit(BAD_INPUT) from error


def _told_in_one_line(usual: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: the library's own without a place in its code, which says nothing to people."""

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, PolicyMismatchWarning):
            complain(f"warning: {message}")
        else:
            usual(message, category, *place, **more)

    return show


app = typer.Typer(
    name="adaptive-fusion",
    cls=_Root,
    help="Spend a vision-language model's visual compute per request, within a latency and memory budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _sub_app in SUB_APPS:
    app.add_typer(_sub_app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from adaptive_fusion import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``adaptive-fusion`` script."""
    app()


if __name__ == "__main__":
    main()
