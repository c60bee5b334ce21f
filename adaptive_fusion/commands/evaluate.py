"""``adaptive-fusion evaluate``: what policies keep and cost on labelled inputs, beside the baselines."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import complain, console, emit, refusing

if TYPE_CHECKING:
    from rich.console import Console

    from adaptive_fusion.evaluation.statistics import Interval
    from adaptive_fusion.learning.judging.evaluate import PolicyReport

app = typer.Typer()

_SHARES = [tenths / 10 for tenths in range(11)]
_ROUTERS = ("policy", "random", "entropy", "oracle")


@app.command()
def evaluate(
    policies: Annotated[
        list[str], typer.Argument(metavar="POLICY...", help="Shipped policies or paths.", show_default=False)
    ],
    logs: Annotated[
        list[str],
        typer.Option(metavar="LOGS", help="Logs and labels: a file, folder or pattern; may be given several times."),
    ],
    tolerance: Annotated[float, typer.Option(help="Loss of quality that is accepted, 0 to 1.")] = 0.02,
    split: Annotated[
        str | None,
        typer.Option(help="Only this part of the contents: test, if the policies were trained on these very logs."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the cost-quality curves.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Judge policies by the trusted labels of LOGS (by all where fewer than 20 are), with 95 % bootstrap intervals over
    contents.

    Beside each policy stand a random router, entropy as the score and at its median, the best static point
    and the oracle. Rated decisions with a propensity also give its value off-policy (IPS, SNIPS, doubly
    robust).
    """
    with refusing(policies, as_json):
        if plot is not None:
            from adaptive_fusion.plots import check_target

            check_target(plot)
        from adaptive_fusion.learning.judging.evaluate import evaluate as judge

        reports = judge(policies, logs, tolerance=tolerance, split=split, plot=plot, seed=seed)
    for report in reports:
        if as_json:
            emit(report.to_dict())
        else:
            _show(console(), report)
    if plot is not None and not as_json:
        complain(f"plot written to {plot}")


def _show(out: "Console", report: "PolicyReport") -> None:
    from adaptive_fusion.learning.fitting.card import FIGURES, TRAFFIC_FIGURES

    cheap, strong = report.arms
    static = f"best static point {report.static}"
    out.print(
        _figures(f"{report.policy}: {report.rows} stills, {cheap} or {strong}; {static}", report.figures, FIGURES)
    )
    if report.traffic_rows:
        title = f"{report.policy}: all {report.traffic_rows} inputs, clips included"
        title += f"; best static point {report.traffic_static}" if report.traffic_static else ""
        out.print(_figures(title, report.traffic, TRAFFIC_FIGURES))
    out.print(_curves(report))
    if report.slices:
        out.print(_slices(report))
    if report.off_policy is not None:
        value = report.off_policy
        shown = [(name.replace("_", " "), name) for name in ("ips", "snips", "doubly_robust", "logged", "coverage")]
        title = f"{report.policy}: off-policy, {value.decisions} decisions worth {value.effective_samples:.0f}"
        out.print(_figures(title, {name: getattr(value, name) for _, name in shown}, shown))
    if report.off_policy_note:
        out.print(f"{report.policy}: no value off-policy: {report.off_policy_note}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _figures(title: str, figures: Any, shown: Any) -> Table:
    table = _table(title, "figure", "value", "95 % interval")
    for label, name in shown:
        found: Interval = figures[name]
        known = math.isfinite(found.mean)
        interval = f"{found.low:.4f} to {found.high:.4f}" if known else ""
        table.add_row(label, f"{found.mean:.4f}" if known else "n/a", interval)
    return table


def _curves(report: "PolicyReport") -> Table:
    """Quality at shares of strong calls, and the cost there."""
    import numpy as np

    table = _table(f"{report.policy}: quality by share of strong calls", "share", *_ROUTERS, "cost of the policy's")
    curves = report.curves
    for share in _SHARES:
        quality = [float(np.interp(share, curves[name].share, curves[name].quality)) for name in _ROUTERS]
        cost = float(np.interp(share, curves["policy"].share, curves["policy"].cost))
        table.add_row(f"{share:.0%}", *(f"{value:.4f}" for value in quality), f"{cost:.4g}")
    return table


def _slices(report: "PolicyReport") -> Table:
    columns = ("slicing", "slice", "rows", "to the strong arm", "quality", "lost against it")
    table = _table(f"{report.policy}: slices, the worst first", *columns)
    for slicing, parts in report.slices.items():
        for name, part in parts.items():
            share, figures = f"{part['strong_share']:.1%}", (f"{part[key]:.4f}" for key in ("quality", "lost"))
            table.add_row(slicing, name, f"{part['rows']:.0f}", share, *figures)
    return table
