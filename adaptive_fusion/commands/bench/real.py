"""``adaptive-fusion bench real``: what policies keep of real images, and what they spend."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adaptive_fusion.commands.bench.shared import print_lines
from adaptive_fusion.commands.options import Json
from adaptive_fusion.commands.output import BAD_INPUT, complain, emit, progress, refusing
from adaptive_fusion.errors import ConfigError

if TYPE_CHECKING:
    from adaptive_fusion.bench.real import Bad
    from adaptive_fusion.evaluation.readers import Reader
    from adaptive_fusion.evaluation.truth import Source


def real(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Folders of images, one a source, with truth.jsonl or without."),
    ],
    as_json: Json = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy's name or path; several times for several. If not given, the general ones."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Most images of each source.")] = 30,
    prompt: Annotated[
        str | None,
        typer.Option(help="Asked about every image. If not given, to describe photographs and to read the rest."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep readings here, so that a run that was stopped goes on. They are the text "
            "on the images; if not given, nothing is kept.",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Read fixed rows too, in place of taking them off curves.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one page with tables and the worst cases as pictures."),
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="Cases on the page that the first policy keeps least of.")] = 12,
) -> None:
    """Text, objects and answers kept of real images, and pixels and tokens spent, beside rows that do not look at them.

    Rows: the policies, each beside a fixed share and a fixed number of pixels that keep or spend as much; routing by
    entropy; vision-squeezer, where installed (pip install vision-squeezer); and the oracle. Plans are those for a
    released model without a budget. Text is read by an OCR engine (the extra "readers" of this package), some six
    readings of 2.5 seconds an image. The truth's form is described in training/general/README.md. Exit code 2 if an
    input was refused; the tables then have the others.
    """
    with refusing(folders, as_json):
        from adaptive_fusion.bench import report
        from adaptive_fusion.bench.real import GENERAL
        from adaptive_fusion.bench.real_page import check_page, write_page
        from adaptive_fusion.bench.real_report import notes, tables
        from adaptive_fusion.loading import quieten

        quieten()
        if page is not None:
            check_page(page)
        result, bad = _measured(folders, list(policy or GENERAL), images, prompt, cache, exact, worst, as_json)
        if page is not None:
            write_page(result, bad, page)
        for failure in result["failed"]:
            complain(f"{failure['input']}: {failure['error']}")
        if as_json:
            emit(result)
        else:
            out = report.console()
            for table in tables(result):
                out.print(table)
            print_lines(out, notes(result))
        if result["failed"]:
            raise typer.Exit(BAD_INPUT)


def _measured(
    folders: list[str],
    names: list[str],
    images: int,
    prompt: str | None,
    cache: Path | None,
    exact: bool,
    worst: int,
    as_json: bool,
) -> "tuple[dict[str, Any], list[Bad]]":
    """The command's JSON, and the cases that are shown as pictures."""
    from adaptive_fusion.bench import real as bench
    from adaptive_fusion.bench.real_cases import squeezer
    from adaptive_fusion.bench.real_plans import load_policies
    from adaptive_fusion.evaluation.truth import read_sources

    policies = load_policies(names)
    sources, failed = read_sources(folders)
    if not any(source.items for source in sources):
        raise ConfigError("no image to measure: " + "; ".join(f"{name}: {why}" for name, why in failed)[:500])
    reader = _reader(sources, cache)
    with progress(as_json) as shown:
        cases = bench.measure(sources, policies, reader, images=images, prompt=prompt, progress=shown)
        found = bench.judge(cases, names, exact=exact, reader=reader, progress=shown)
    bad = bench.worst(cases, names[0], worst)
    squeezed = "absent" if squeezer() is None else "; ".join(f"{n} ({w})" for n, w in cases.unsqueezed)
    about = {
        "policies": names,
        "images": images,
        "exact": exact,
        "reader": reader.name if reader is not None else None,
        "sources": {
            source.name: {
                "images": len(source.items[:images]),
                "prompt": bench.question_for(source, prompt),
            }
            for source in sources
        },
    }
    wrong = [{"input": name, "error": why} for name, why in (*failed, *cases.failed)]
    rest = {"squeezer": squeezed, "nothing": dict(cases.nothing), "failed": wrong}
    return {**about, **found, **rest, "worst": [one.to_dict() for one in bad]}, bad


def _reader(sources: "Sequence[Source]", cache: Path | None) -> "Reader | None":
    """The reader, if any of the sources is judged by text."""
    from adaptive_fusion.bench.real import needs_reader
    from adaptive_fusion.evaluation.readers import CachedReader, RapidReader

    if not needs_reader(sources):
        return None
    return RapidReader() if cache is None else CachedReader(RapidReader(), cache)
