"""``adaptive-fusion run``: ask one question about each file, within a budget."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import Result, complain, decision_fields, each, panel, printable, refusing

if TYPE_CHECKING:
    from adaptive_fusion.reply import Reply

app = typer.Typer()


@app.command()
def run(
    files: options.Files,
    prompt: Annotated[str, typer.Option(help="The question asked about each file.", show_default=False)],
    latency_ms: options.LatencyMs = None,
    ttft_ms: options.TtftMs = None,
    vram_gb: options.VramGb = None,
    attainment: options.Attainment = None,
    policy: options.PolicyName = "auto",
    model: options.Model = "reference",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Upper bound of the answer.")] = 256,
    point: Annotated[
        str | None,
        typer.Option(help="Run exactly this operating point, such as native or weighted6r4@0.5, and decide nothing."),
    ] = None,
    log: options.LogFile = None,
    as_json: options.Json = False,
) -> None:
    """Answer a question about each FILE with a plan chosen per file.

    Exit code 2 if a file or a value was refused; the other files are answered all the same.
    """
    with refusing(files, as_json):
        budget = options.budget_of(latency_ms, ttft_ms, vram_gb, attainment)
        from adaptive_fusion.point import OperatingPoint

        fixed = None if point is None else OperatingPoint.parse(point)
        from adaptive_fusion.loading import open_runner

        runner = open_runner(model, policy, log)
        runner.warm_up()  # so that first-use work does not count against the first file

    def answer(name: str) -> Result:
        reply = runner.chat(name, prompt, budget=budget, max_new_tokens=max_new_tokens, point=fixed)
        return _fields(reply), _panel(name, reply)

    try:
        each(files, as_json, answer)
    finally:
        if runner.log is not None and runner.log.dropped:
            complain(f"{runner.log.dropped} records could not be written to {log}")


def _fields(reply: "Reply") -> dict[str, Any]:
    return {
        **decision_fields(reply.decision),
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "measurement": asdict(reply.measurement),
        "met": reply.met,
    }


def _panel(name: str, reply: "Reply") -> Panel:
    decision, took = reply.decision, reply.measurement
    score = decision.complexity.score if decision.complexity else 0.0
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column(overflow="fold")
    rows.add_row("answer", printable(reply.text) or "(nothing)")
    rows.add_row("kind", f"{decision.kind}, complexity {score:.2f}, P(complex) {decision.p_complex or 0.0:.2f}")
    rows.add_row("plan", f"{decision.lane} lane, {decision.point.name}")
    rows.add_row("why", decision.reason)
    rows.add_row("tokens", f"{took.visual_tokens} visual, {took.new_tokens} new ({reply.finish_reason})")
    limits = decision.budget
    rows.add_row("first token", _against(took.ttft_ms, limits.get("ttft_ms"), "ms"))
    rows.add_row("latency", _against(took.latency_ms, limits.get("latency_ms"), "ms"))
    if took.peak_memory_gb:
        rows.add_row("memory", _against(took.peak_memory_gb, limits.get("vram_gb"), "GiB"))
    said = decision.predicted
    if said is not None:
        first, whole = (f"{decision.margin * ms:.0f}" for ms in (said.ttft_ms, said.latency_ms))
        rows.add_row(
            "predicted",
            f"first token {said.ttft_ms:.0f} ms, latency {said.latency_ms:.0f} ms (x{decision.margin:.2f} margin: "
            f"{first}, {whole}; late with {100 * decision.p_late:.0f} %), {said.peak_memory_gb:.3f} GiB",
        )
    for row in decision.rejected:
        rows.add_row("not", f"{row.point.name}: {row.reason}")
    return panel(name, rows)


def _against(value: float, limit: float | None, unit: str) -> str:
    shown = f"{value:.3f}" if unit == "GiB" else f"{value:.0f}"
    if limit is None:
        return f"{shown} {unit}"
    return f"{shown} of {limit:g} {unit}, {'met' if value <= limit else 'missed'}"
