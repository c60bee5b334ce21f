"""The results as text: one block a part, absolutes, ratios to native and predictions side by side, then what falls
short.

Knows the rows' form. Must not know how they were measured.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu import budgets, costs, kernels, starved

TITLES = {
    "identity": "native through the runner equals the model",
    "kernels": "fusion kernels against the bandwidth of memory",
    "tiles": "the same kernels cut otherwise (patches x columns x warps x steps read ahead)",
    "costs": "operating points (median [quartiles], ratio to native, predicted from the shape)",
    "starved": "out of memory",
    "budgets": "predictions and budgets",
    "batching": "batches",
    "recipe": "the reference model's recipe",
}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The whole table."""
    about = found["header"]
    yield ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
    for name, part in found["parts"].items():
        yield ""
        yield f"{name}: {TITLES.get(name, '')}"
        for key, row in part["rows"].items():
            if name == "costs" and "points" in row:
                yield from _costs(key, row)
            elif name == "tiles" and key != "copy":
                yield from _tiles(key, row)
            else:
                yield f"  {key}: {_flat(row)}"
        for kind in ("skipped", "failed"):
            yield from (f"  {key}: {kind}, {reason}" for key, reason in part[kind].items())
    short = shortfalls(found)
    yield ""
    yield "falls short: " + ("; ".join(short) if short else "nothing of what was measured")


def shortfalls(found: Mapping[str, Any]) -> list[str]:
    """What must hold and does not, of what was measured; of a tiny shape only what must hold of any."""
    rows = {name: part["rows"] for name, part in found["parts"].items()}
    short = [
        f"{key}: native through the runner is not the model's (largest difference {row['largest_difference']:g})"
        for key, row in rows.get("identity", {}).items()
        if not (row["tokens_equal"] and row["logits_equal"] and row["prefill_equal"])
    ]
    if found["header"]["tiny"]:
        return short
    short += kernels.shortfalls(rows.get("kernels", {})) + costs.shortfalls(rows.get("costs", {}))
    short += budgets.shortfalls(rows.get("budgets", {}))
    return short + starved.shortfalls(rows.get("starved", {}))


def _costs(key: str, row: Mapping[str, Any]) -> Iterator[str]:
    """One line a point; quartiles of what is decided by, those of the rest are in the file."""
    yield f"  {key} ({row['side']} px, {row['frames']} frames)"
    columns = ("encode_ms", "prefill_ms", "encode_prefill_ms", "decode_ms_per_token", "peak_memory_gb")
    yield f"    {'':14} {'patches':>7} {'tokens':>6}" + "".join(f" | {column:24}" for column in columns)
    for name, figures in row["points"].items():
        cells = [f"    {name:14} {figures['patches']:7d} {figures['visual_tokens']:6d}"]
        for column in columns:
            cell = figures[column]
            ratio = "" if cell["ratio"] is None else f" x{cell['ratio']['median']:.3f}"
            quartiles = f" [{cell['low']:.4g} {cell['high']:.4g}]" if column == "encode_prefill_ms" else ""
            cells.append(f"{cell['median']:.4g}{quartiles}{ratio} ({cell['predicted']:.3g})".ljust(24))
        yield " | ".join(cells)


def _tiles(key: str, row: Mapping[str, Any]) -> Iterator[str]:
    """One line a tile: how far off, and at each size its time, as a multiple of the floor too."""
    for cut, found in row.items():
        if isinstance(found, Mapping) and "error" in found:
            sizes = [
                f"{size} {each['ms']['median']:.4g} ms x{each['over_floor']:.3f}"
                for size, each in found.items()
                if isinstance(each, Mapping)
            ]
            error = found["error"]
            yield f"  {key} {cut}: " + ", ".join(
                [*sizes, f"error {error if isinstance(error, str) else f'{error:.2g}'}"]
            )


def _flat(value: Any) -> str:
    """A row in one line; a median with its quartiles in brackets."""
    if isinstance(value, Mapping):
        if set(value) == {"median", "low", "high"}:
            return f"{value['median']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
        return ", ".join(
            f"{key} ({_flat(each)})" if isinstance(each, Mapping) and "median" not in each else f"{key} {_flat(each)}"
            for key, each in value.items()
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
