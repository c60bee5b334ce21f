"""What the benchmark commands have in common: options, the machine that times were measured on, how lines are printed.

Knows typer. Must not know what is measured.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from adaptive_fusion.policy.rungs import Rung

Plot = Annotated[Path | None, typer.Option("--plot", metavar="PNG", help="Draw the result into a PNG file.")]
Points = Annotated[
    list[str] | None,
    typer.Option(metavar="POINT", help="Rows instead of the usual ones: weighted6r4@0.5/25%, native@0.25..."),
]


def check_plot(plot: Path | None) -> None:
    """Refuse a picture that could not be written, before anything is measured.

    Raises:
        ConfigError: For a place that cannot be written to.
        MissingExtraError: Without matplotlib.
    """
    from adaptive_fusion.plots import check_target

    if plot is not None:
        check_target(plot)


def rungs_of(points: list[str] | None, usual: "Iterable[Rung]") -> "list[Rung]":
    """The rungs that were named, or the usual ones.

    Raises:
        ConfigError: For a text that names no rung.
    """
    from adaptive_fusion.policy.rungs import Rung

    return [Rung.parse(text) for text in points] if points else list(usual)


def print_lines(out: "Console", lines: Iterable[str]) -> None:
    """Notes below a table, as they are."""
    for line in lines:
        out.print(line, markup=False, highlight=False)


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    import os
    import platform

    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": gpu,
    }
