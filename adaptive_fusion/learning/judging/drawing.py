"""Cost-quality curves as a picture. Draws what it is given; computes nothing, and needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_fusion.plots import new_figure, save_figure

if TYPE_CHECKING:
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
