"""``adaptive-fusion demo``: native beside adaptive on rendered screens and a clip."""

import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adaptive_fusion.commands import options
from adaptive_fusion.commands.output import complain, console, decision_fields, emit, printable, progress
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.demo import AnswerPair, Summary
    from adaptive_fusion.reply import Reply

app = typer.Typer()


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the files here, with a picture of the results.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Latency budget; 160 % of native's slowest answer if not set.")
    ] = None,
    policy: options.PolicyName = "auto",
    model: options.Model = "reference",
    seed: Annotated[int, typer.Option(help="Of the rendered screens.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Render screens and a clip to files, answer each natively and under a latency budget, and compare."""
    with ExitStack() as stack:
        options.budget_of(latency_ms, None, None, None)  # refused before the model is loaded
        from adaptive_fusion.demo import compare, render, summarise
        from adaptive_fusion.loading import open_runner

        runner = open_runner(model, policy)
        folder = _folder(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        questions = render(folder, seed)
        runner.warm_up()
        with progress(as_json) as report:
            rows = list(compare(runner, questions, latency_ms, report))
        summary = summarise(rows)
        if as_json:
            for row in rows:
                emit(_fields(row))
            emit({"summary": asdict(summary)})
        else:
            _show(console(), rows, summary)
        if out is not None:
            _draw(rows, out)


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"folder {out.name!r} cannot be made ({error.strerror}); expected a folder to write to"
        ) from error
    return out


def _fields(row: "AnswerPair") -> dict[str, Any]:
    return {
        "input": row.question.name,
        "content": row.question.slice,
        "prompt": row.question.prompt,
        "truth": row.truth,
        **decision_fields(row.adaptive.decision),
        "text": row.adaptive.text,
        "measurement": asdict(row.adaptive.measurement),
        "met": row.adaptive.met,
        "native": {"text": row.native.text, "measurement": asdict(row.native.measurement)},
    }


def _show(out: Console, rows: list["AnswerPair"], summary: "Summary") -> None:
    plans = Table(title=f"Plans under a latency budget of {summary.budget_ms:.0f} ms", title_justify="left")
    for column, justify in (("file", "left"), ("content", "left"), ("", "left"), ("lane", "left"), ("point", "left")):
        plans.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("tokens", "TTFT ms", "latency ms", "budget"):
        plans.add_column(column, justify="right")
    answers = Table(title="Answers", title_justify="left", show_lines=True)
    for column in ("file", "truth", "native", "adaptive"):
        answers.add_column(column, overflow="fold")
    for row in rows:
        decision = row.adaptive.decision
        plans.add_row(
            row.question.name, row.question.slice, "native", "", "native@1", *_costs(row.native, summary.budget_ms)
        )
        plans.add_row("", "", "adaptive", decision.lane, decision.point.name, *_costs(row.adaptive, summary.budget_ms))
        plans.add_section()
        answers.add_row(row.question.name, row.truth, printable(row.native.text), printable(row.adaptive.text))
    out.print(plans)
    out.print(answers)
    out.print(
        f"adaptive against native over {summary.files} files: {summary.tokens_saved:.0%} of the visual tokens, "
        f"{summary.ttft_saved:.0%} of the time to the first token and {summary.latency_saved:.0%} of the latency "
        f"saved; budget kept {summary.met_adaptive} of {summary.files} times (native {summary.met_native}); "
        f"right parts of the answers {summary.right_adaptive:.0%} (native {summary.right_native:.0%})"
    )


def _costs(reply: "Reply", budget_ms: float) -> tuple[str, str, str, str]:
    took = reply.measurement
    kept = "met" if took.latency_ms <= budget_ms else "missed"
    return str(took.visual_tokens), f"{took.ttft_ms:.0f}", f"{took.latency_ms:.0f}", kept


def _draw(rows: list["AnswerPair"], out: Path) -> None:
    from adaptive_fusion.commands.pictures import demo_plot
    from adaptive_fusion.errors import MissingExtraError

    try:
        demo_plot(rows, out / "demo.png")
    except MissingExtraError as error:
        complain(f"no picture of the results: {error}")
    else:
        complain(f"files and demo.png are in {out}")
