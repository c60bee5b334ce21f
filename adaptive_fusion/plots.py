"""Figures of matplotlib, written as PNG files.

matplotlib is an optional extra and imported only when something is drawn. Must not know what is drawn.
"""

from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError, MissingExtraError


def check_target(path: Path) -> None:
    """Refuse a plot that could not be drawn or written, before any work is done for it.

    Raises:
        MissingExtraError: Without matplotlib.
        ConfigError: For a name that does not end in .png, or a folder that is not there.
    """
    new_figure(1, 1)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"plot is {path.name!r}; expected a file name ending in .png")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"plot {path.name!r} lies in the folder {path.parent.name!r}, which does not exist")


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib, which is not installed: pip install adaptive-fusion[train]"
        ) from error
    # No pyplot: it would keep state, and on a desktop open a window system.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        ConfigError: If the file cannot be written.
    """
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise ConfigError(f"plot {path.name!r} cannot be written: {error.strerror or type(error).__name__}") from error
