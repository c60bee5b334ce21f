"""Cost-quality curves and drift as pictures. Draws what it is given; computes nothing, and needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adaptive_fusion.plots import new_figure, save_figure

if TYPE_CHECKING:
    from adaptive_fusion.learning.judging.drift import Drift
    from adaptive_fusion.learning.judging.evaluate import PolicyReport


def plot_curves(reports: Sequence["PolicyReport"], path: str | Path) -> None:
    """Write a PNG of cost against quality: each policy with its threshold, and the baselines of the first.

    Raises:
        MissingExtraError: Without matplotlib.
        ConfigError: If the file cannot be written.
    """
    figure = new_figure(7, 5)
    axes = figure.subplots()
    first = reports[0]
    for name, style in (("random", "k:"), ("entropy", "C7--"), ("oracle", "k-.")):
        axes.plot(first.curves[name].cost, first.curves[name].quality, style, linewidth=1, label=name)
    for index, report in enumerate(reports):
        curve = report.curves["policy"]
        axes.plot(curve.cost, curve.quality, f"C{index}", label=report.policy)
        cost, quality = report.figures["cost"], report.figures["quality"]
        bars = [[quality.mean - quality.low], [quality.high - quality.mean]]
        axes.errorbar([cost.mean], [quality.mean], yerr=bars, fmt=f"C{index}o", capsize=3)
    axes.set_xlabel("mean cost of a request")
    axes.set_ylabel("mean quality")
    axes.legend(frameon=False)
    save_figure(figure, Path(path))


def plot_drift(drift: "Drift", path: str | Path) -> None:
    """Write a PNG with the distribution functions of the tests with the largest changes, before and recently.

    Raises:
        MissingExtraError: Without matplotlib.
        ConfigError: If the file cannot be written.
    """
    figure = new_figure(9, 6)
    shown = [change for change in drift.changes if change.kind != "range"][:6]
    grid = figure.subplots(2, 3).flatten()
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, change in zip(grid, shown, strict=False):
        for sample, name, style in zip(drift.samples or (), ("before", "recent"), ("C7", "C3"), strict=False):
            values = np.sort({**sample.features, **sample.outcomes}[change.name])
            axes.step(values, np.arange(1, len(values) + 1) / len(values), style, label=f"{name} ({len(values)})")
        axes.set_title(
            f"{change.name}{' DRIFT' if change.drifted else ''}\n{change.size:.2f}, p {change.p:.1g}", size=8
        )
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle(drift.in_words() if len(drift.in_words()) < 100 else f"drift against {drift.against}", size=9)
    save_figure(figure, Path(path))
