"""The benchmark on real images in words and cells, for terminal tables and for the page alike. Computes nothing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from adaptive_fusion.bench.real_rows import ENTROPY, ORACLE, SAME_KEPT, SQUEEZER
from adaptive_fusion.bench.report import empty_table, with_interval

Cells = tuple[str, ...]

TITLES = {
    "text": "Text kept: of what a reader reads natively, on {n} images",
    "objects": "Objects kept: those that still span a patch, on {n} photographs",
    "answers": "Answers that can still be read, each planned for its own question: {n} questions",
}
HEADS = ("kept", "5th perc.", "share", "pixels", "tokens of native", "tokens", "answers", "policy beside it")
SOURCE_HEADS = ("source", "row", "n", *HEADS[:-1])
RANK_HEADS = ("measured", "published")


def row_cells(result: Mapping[str, Any], what: str) -> Iterator[Cells]:
    """Name and figures of each row over all images; fixed rows have what the policy does beside them."""
    beside = {(v["policy"], v["row"], v["same"]): v for v in result["kinds"][what]["versus"]}
    for record in result["kinds"][what]["rows"]:
        key = record.get("beside"), record["row"], record.get("same")
        yield (*_cells(record), _beside(beside[key]) if key in beside else "")


def source_cells(result: Mapping[str, Any], what: str) -> Iterator[Cells]:
    """Source, images, and each row of that source that is matched to nothing, with the figures."""
    for source, records in result["kinds"][what]["sources"].items():
        for record in records:
            if "beside" not in record:
                name, *figures = _cells(record)
                yield (source, name, str(record["n"]), *figures)


def rank_cells(result: Mapping[str, Any]) -> Iterator[Cells]:
    """Loss at a quarter of the pixels by source and kind of question."""
    for row in result["ranking"]["rows"]:
        published = "-" if row["published"] is None else f"{row['published']:.3f} ({row['like']})"
        expected = ("-" if value is None else f"{value:.3f}" for value in row["expected"].values())
        yield (row["source"], row["asks"], str(row["n"]), *expected, f"{row['measured']:.3f}", published)


def rank_notes(result: Mapping[str, Any]) -> list[str]:
    """Rank correlations, one line a policy."""
    lines = []
    for policy, found in result["ranking"]["rank_correlation"].items():
        said = (
            f"{'not to be had' if found[key] is None else format(found[key], '.2f')} with {key} loss"
            for key in RANK_HEADS
        )
        lines.append(f"Rank correlation of what {policy} expects: {', '.join(said)}.")
    return lines


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Terminal tables: rows and sources of each kind, then ranks."""
    for what in result["kinds"]:
        table = empty_table(title(result, what), ("row",), HEADS)
        for row in row_cells(result, what):
            table.add_row(*row)
        yield table
        table = empty_table(f"{what.capitalize()}, by source", ("source", "row"), SOURCE_HEADS[2:])
        last = ""
        for source, *cells in source_cells(result, what):
            if last and source != last:
                table.add_section()
            table.add_row(source if source != last else "", *cells)
            last = source
        yield table
    table = empty_table("Loss at a quarter of the native pixels", ("source", "asks"), rank_heads(result)[2:])
    for ranked in rank_cells(result):
        table.add_row(*ranked)
    yield table


def rank_heads(result: Mapping[str, Any]) -> Cells:
    """Heads of `rank_cells`."""
    expected = (f"{policy} expects" for policy in result["policies"])
    return ("source", "asks", "n", *expected, *RANK_HEADS)


def title(result: Mapping[str, Any], what: str) -> str:
    """What a kind's table shows."""
    return TITLES[what].format(n=result["kinds"][what]["rows"][0]["n"])


def notes(result: Mapping[str, Any]) -> list[str]:
    """How the figures were had, and what is not in them."""
    asked = "; ".join(
        f"{name}: {found['images']} images, {found['prompt']!r}" for name, found in result["sources"].items()
    )
    said = [
        f"Asked: {asked}.",
        "Native is what the processor of the released models makes of an image: 65,536 to 16,777,216 pixels, patches "
        "of 16, merged 2 by 2. Plans are those of a request without a budget; limits that a policy sets itself are "
        "left out. What pooling averages counts as not to be told apart.",
        "5th perc.: of what is kept of an image. In brackets: 95 % bootstrap intervals over images. policy beside it: "
        "its tokens over those of a fixed row that keeps as much, or what it keeps more than one of as many tokens.",
        f"{ENTROPY}: a quarter of the pixels for images whose grey entropy is below the median, native for the others. "
        f"{ORACLE}: the smallest step of the ladder that keeps .98, known only after reading.",
    ]
    if any(row["published"] is not None for row in result["ranking"]["rows"]):
        said.append(
            "published: part of its score that Qwen2.5-VL-7B loses at a quarter of the tokens, on a benchmark of "
            "images like those that the folder's name tells of. Their sizes differ: DocVQA's pages have several "
            "megapixels, and smaller documents lose more."
        )
    if result["exact"]:
        said.append("All rows were read at their own sizes.")
    elif "text" in result["kinds"]:
        said.append(
            "~: taken off the curve of the shares that were read, not falling and linear in log share between them; "
            "--exact reads them. A reader's slips at one size are in the policies' own rows and not in these; the "
            "column beside them has both by the curve. The oracle's bisection takes it that a larger share keeps no "
            "less."
        )
    return [*said, *_missing(result), *rank_notes(result)]


def _missing(result: Mapping[str, Any]) -> Iterator[str]:
    """What is not in the figures."""
    if result["squeezer"] == "absent":
        yield f"No row {SQUEEZER}: it is not installed (pip install vision-squeezer)."
    elif result["squeezer"]:
        yield f"No row {SQUEEZER}: it failed on {result['squeezer']}."
    if result["nothing"]:
        counted = ", ".join(f"{count} of {source}" for source, count in result["nothing"].items())
        yield f"In no row, having too little text or no object that spans a patch natively: {counted}."
    if result["failed"]:
        yield f"Failed: {len(result['failed'])}."


def _cells(record: Mapping[str, Any]) -> Cells:
    name = record["row"]
    if "beside" in record:
        name = f"  {name} {record['setting']}, {record['same']}"
    elif "setting" in record:
        name = f"{name}, {record['setting']}"
    about = "" if record["measured"] else "~"
    return (
        name,
        about + with_interval(record["kept"], 3),
        f"{about}{record['kept_p5']:.3f}",
        f"{record['share']:.3f}",
        f"{record['pixels']:.3f}",
        with_interval(record["tokens"], 3),
        f"{record['mean_tokens']:,.0f}",
        "-" if record["answers"] is None else f"{about}{record['answers']:.3f}",
    )


def _beside(found: Mapping[str, Any]) -> str:
    if found["same"] == SAME_KEPT:
        return f"x {with_interval(found['tokens_ratio'], 3)}"
    gain: Mapping[str, float] = found["kept_difference"]
    return f"{gain['mean']:+.3f} ({gain['low']:+.3f}..{gain['high']:+.3f})"


def points(result: Mapping[str, Any], what: str) -> Sequence[tuple[str, float, float]]:
    """Name, tokens of native and kept of each row, for a plot."""
    return [(_cells(r)[0].strip(), r["tokens"]["mean"], r["kept"]["mean"]) for r in result["kinds"][what]["rows"]]
