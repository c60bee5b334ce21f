"""Benchmark results as terminal tables and PNG plots. Draws what it is given; computes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adaptive_fusion.bench.comparisons import describe
from adaptive_fusion.plots import new_figure, save_figure

WIDTH = 220
"""Columns of a table when the output is not a terminal."""


def console() -> Console:
    """Stdout, wide enough for a table when it is piped."""
    # Without markup and emoji: file names are in what is printed.
    found = Console(markup=False, emoji=False)
    return found if found.is_terminal else Console(markup=False, emoji=False, width=WIDTH)


def quality_tables(result: Mapping[str, Any]) -> list[Table]:
    """One table per slice; qualities with their 95 % bootstrap intervals, times as median / 95th percentile."""
    tables = []
    for name, records in result["slices"].items():
        table = Table(title=f"{name} ({records[0]['n']} questions)")
        for head in ("row", "quality", "CIDEr-D", "BLEU-4", "reading", "matching", "token acc.", "tokens"):
            table.add_column(head, justify="left" if head == "row" else "right", no_wrap=head == "row")
        for head in ("encode ms", "prefill ms", "TTFT ms", "total ms", "peak MiB"):
            table.add_column(head, justify="right")
        front = set(result["pareto"]) if name == result["pareto_slice"] else set()
        for record in records:
            timed = "ttft_ms" in record
            table.add_row(
                record["row"] + (" *" if record["row"] in front else ""),
                with_interval(record["quality"]),
                with_interval(record["cider"]),
                with_interval(record["bleu4"], 1),
                with_interval(record["reading"]),
                with_interval(record["matching"]),
                with_interval(record["token_accuracy"]),
                f"{record['visual_tokens']:.0f}" if timed else "-",
                *(_spread(record.get(key)) for key in ("encode_ms", "prefill_ms", "ttft_ms", "latency_ms")),
                f"{record['peak_memory_gb'] * 1024:.1f}" if timed else "-",
            )
        if front:
            table.caption = "* on the Pareto front of mean TTFT and quality"
        tables.append(table)
    return tables


def knob_table(result: Mapping[str, Any]) -> Table:
    """Each slice at each row, with the share of native's own value that is kept."""
    heads = ("tokens", "quality", "kept", "token acc.", "kept", "CIDEr-D", "kept")
    table = empty_table("What each knob keeps of native (95 % bootstrap intervals)", ("slice", "row"), heads)
    for name, records in result["slices"].items():
        for record in records:
            kept = record.get("kept", {})
            table.add_row(
                name,
                record["row"],
                f"{record['visual_tokens']:.0f}" if "visual_tokens" in record else "-",
                with_interval(record["quality"]),
                with_interval(kept.get("quality"), percent=True),
                with_interval(record["token_accuracy"]),
                with_interval(kept.get("token_accuracy"), percent=True),
                with_interval(record["cider"]),
                with_interval(kept.get("cider"), percent=True),
            )
        table.add_section()
    return table


def comparison_table(result: Mapping[str, Any]) -> Table:
    """Paired comparisons; `sure` where the interval excludes no difference, and whether limits hold."""
    heads = ("slice", "metric", "what", "value", "sure", "must be", "holds")
    table = empty_table("Paired comparisons (95 % bootstrap intervals)", heads)
    for entry in result["comparisons"]:
        difference, value, limit = entry["kind"] == "difference", entry["value"], entry.get("limit")
        neutral = 1.0 if entry["kind"] == "ratio" else 0.0
        sure = "-" if value is None else "yes" if not value["low"] <= neutral <= value["high"] else "no"
        wanted = (limit["text"], limit["holds"]) if limit else ("", "")
        shown = with_interval(value, 3 if difference else 2, percent=not difference)
        table.add_row(entry["slice"], entry["metric"], describe(entry), shown, sure, *wanted)
    return table


def quality_notes(result: Mapping[str, Any]) -> list[str]:
    """What the rows are made of, and what does not hold."""
    trained = ", ".join(f"{row} ({file})" for row, file in result["weights"].items())
    return [
        f"Fusion weights: {trained or 'none, fused rows run untrained modules'}.",
        f"Always cheap: {result['cheap']}. adaptive: {result['policy']}, limits {result['budget'] or 'none'}.",
        "reading: ANLS of the reading items. unsure: only the interval reaches the limit; of matching's two limits one "
        "is enough.",
        must_hold(result["shortfalls"]),
    ]


def cost_table(result: Mapping[str, Any]) -> Table:
    """Medians and ratios to native; for encode + prefill the least and the most over the rounds as well."""
    what = f"{result['size']} in {result['dtype']}, {result['image']} x {result['image']} pixels"
    heads = {
        "encode_ms": ("encode ms", 0),
        "prefill_ms": ("prefill ms", 0),
        "encode_prefill_ms": ("encode + prefill", 0),
        "decode_ms_per_token": ("decode ms/token", 1),
        "peak_memory_gb": ("peak GiB", 3),
    }
    title = f"{what}, {result['repeats']} rounds (in brackets: of native's)"
    table = empty_table(title, ("row",), ("patches", "tokens", *(head for head, _ in heads.values())))
    for record in result["rows"]:
        cells = []
        for key, (_, digits) in heads.items():
            ratio = record[f"{key}_ratio"]
            cell = f"{record[key]:.{digits}f}"
            if ratio is not None:
                spread = f", {ratio['low']:.3f}..{ratio['high']:.3f}" if key == "encode_prefill_ms" else ""
                cell += f" ({ratio['median']:.3f}{spread})"
            cells.append(cell)
        name = record["row"] + (f" [{record['lane']} lane]" if record["lane"] else "")
        table.add_row(name.replace("[", "\\["), str(record["patches"]), str(record["visual_tokens"]), *cells)
    return table


def cost_notes(result: Mapping[str, Any]) -> list[str]:
    """How the ratios were had, and what does not hold at a published shape."""
    how = (
        f"The model was there in {result['build_s']:.0f} s. Ratios are to the native runs just before and after; "
        "native's own are to its neighbours and say what is noise."
    )
    missing = result["shortfalls"]
    return [how] if missing is None else [how, must_hold(missing)]


def budget_table(result: Mapping[str, Any]) -> Table:
    """Every row on every trace."""
    limit = f"{result['limit'].removesuffix('_ms')} of {result['deadline_ms']:.0f} ms"
    heads = {
        "attainment": ("attained", 4),
        "feasible": ("feasible", 3),
        "quality": ("quality", 4),
        "of_oracle": ("of oracle's", 4),
        "answered": ("answers", 3),
        "misses": ("misses in 20", 2),
        "misses_max": ("most", 0),
        "recover": ("recovered after", 0),
        "recover_max": ("most", 0),
        "decision_us": ("decision us", 1),
    }
    title = f"{limit}, target {result['attainment']:g}, {result['requests']} requests a trace"
    table = empty_table(title, ("trace", "row"), [head for head, _ in heads.values()])
    for name, rows in result["traces"].items():
        for row, values in rows.items():
            cells = (f"{values[key]:.{digits}f}" if key in values else "-" for key, (_, digits) in heads.items())
            table.add_row(name, row, *cells)
        table.add_section()
    return table


def budget_notes(result: Mapping[str, Any]) -> list[str]:
    """What the table is made of, how it compares with what was run for real, and what does not hold."""
    busy = f"{result['hogs']} busy processes made times x{result['hog_factor']:.2f}" if result["hog_factor"] else ""
    notes = [
        f"Traces are replayed over measured times: {result['cases']} questions at every point of their lane, "
        f"{result['repeats']} times each{'; ' + busy if busy else ''}. Profile: {result['profile']}.",
        "quality: expected by the policy, native 1; answers: measured quality of the answers at the same points.",
    ]
    for check in result["real"]:
        loaded = "" if check["ratio_loaded"] is None else f", x{check['ratio_loaded']:.2f} under load"
        notes.append(
            f"Run for real, {check['trace']}, {check['requests']} requests: attained {check['attainment']:.3f} "
            f"(replayed {check['attainment_replayed']:.3f}), quality {check['quality']:.3f} "
            f"({check['quality_replayed']:.3f}), time x{check['ratio']:.2f} of the replayed{loaded}, "
            f"same point in {check['agreed']:.0%}."
        )
    return [*notes, must_hold(result["shortfalls"])]


def plot_budget(result: Mapping[str, Any], path: Path) -> None:
    """Attainment against quality, one panel per trace, as PNG."""
    traces = result["traces"]
    figure = new_figure(3.2 * len(traces), 3.4)
    axes = figure.subplots(1, len(traces), squeeze=False)
    for axis, (name, rows) in zip(axes[0], traces.items(), strict=True):
        for row, values in rows.items():
            axis.scatter(values["attainment"], values["quality"], label=row, marker="*" if row == "ours" else "o")
        axis.axvline(result["attainment"], linestyle=":", color="grey")
        axis.set(title=name, xlabel="attainment")
    axes[0][0].set_ylabel("mean quality")
    axes[0][0].legend(fontsize=7)
    save_figure(figure, path)


def plot_quality(result: Mapping[str, Any], path: Path) -> None:
    """Quality (CIDEr-D without a task score) against mean TTFT of every row, with the Pareto front, as PNG."""
    records = [r for r in result["slices"][result["pareto_slice"]] if "ttft_ms" in r]
    figure = new_figure(10, 6)
    from matplotlib import colormaps  # new_figure has said what to install where it is not there

    axes = figure.subplots()
    worth = {r["row"]: r["quality"] or r["cider"] for r in records}
    at = {r["row"]: (r["ttft_ms"]["mean"], worth[r["row"]]["mean"]) for r in records}
    front = [at[row] for row in result["pareto"]]
    # A step each, and on to the slowest row: what the front gives for the time.
    xs, ys = [*(x for x, _ in front), max(x for x, _ in at.values())], [*(y for _, y in front), front[-1][1]]
    axes.step(xs, ys, where="post", color="0.6", lw=1.5, label="Pareto front")
    colors = colormaps["tab20"]
    for index, (row, (x, y)) in enumerate(at.items()):
        value, large = worth[row], row == "adaptive"
        errors = [[max(0.0, y - value["low"])], [max(0.0, value["high"] - y)]]
        look = {"fmt": "*" if large else "os^Dv"[index % 5], "ms": 14 if large else 6, "elinewidth": 0.8}
        label = row + (" (always cheap)" if row == result["cheap"] else "")
        axes.errorbar(x, y, errors, color=colors(index % colors.N), label=label, **look)
    axes.set_xlabel("mean TTFT, ms")
    axes.set_ylabel("mean quality" if records[0]["quality"] else "CIDEr-D")
    axes.set_title(f"{Path(result['model']).name}, {result['pareto_slice']} set, {records[0]['n']} questions")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    save_figure(figure, path)


def plot_costs(result: Mapping[str, Any], path: Path) -> None:
    """Encode and prefill of every row as bars, as PNG."""
    rows = result["rows"][::-1]
    figure = new_figure(9, 0.35 * len(rows) + 1.5)
    axes = figure.subplots()
    names = [record["row"] for record in rows]
    encode = [record["encode_ms"] for record in rows]
    axes.barh(names, encode, label="encode")
    axes.barh(names, [record["prefill_ms"] for record in rows], left=encode, label="prefill")
    axes.set_xlabel("ms (median)")
    axes.set_title(f"{result['size']}, {result['image']} x {result['image']} pixels")
    axes.legend()
    save_figure(figure, path)


def must_hold(shortfalls: Sequence[str]) -> str:
    """What does not hold of what must, in one line."""
    return "Must hold: " + ("; ".join(shortfalls) or "all of it holds")


def empty_table(title: str, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table of columns that are never wrapped, words on the `left` and figures on the `right`."""
    table = Table(title=title)
    for head in left:
        table.add_column(head, no_wrap=True)
    for head in right:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def with_interval(value: Mapping[str, float] | None, digits: int = 2, *, percent: bool = False) -> str:
    """A value and its interval; a dash where there is none."""
    if value is None:
        return "-"
    scale, digits, unit = (100, 1, " %") if percent else (1, digits, "")
    mean, low, high = (f"{scale * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} ({low}..{high})"


def _spread(value: Mapping[str, float] | None) -> str:
    return "-" if value is None else f"{value['median']:.0f} / {value['p95']:.0f}"
