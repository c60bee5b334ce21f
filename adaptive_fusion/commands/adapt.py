"""``adaptive-fusion adapt``: from a model and a folder of images to a policy that is fitted to that model."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from adaptive_fusion.commands.options import EngineName, Json, Processor, Upstream, require_serving
from adaptive_fusion.commands.output import complain, console, emit, printable, progress, refusing
from adaptive_fusion.errors import ConfigError, GateRefused

if TYPE_CHECKING:
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.evaluation.statistics import Interval
    from adaptive_fusion.learning.adapting.adapt import Ahead, Installed
    from adaptive_fusion.learning.adapting.source import Source

REFUSED = 1
"""Exit code when the general policy stays; bad input ends with 2."""
PROMPTS = ("Describe the image.", "Read the text in the image.")
"""Asked about each image unless others are given: what a description needs and what reading needs are two things."""

app = typer.Typer()

Named = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder in Hugging Face format, the id of a model on the Hub, or 'reference'.",
        show_default=False,
    ),
]
Images = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGES...", help="Images and folders of them, such as you serve.", show_default=False),
]


@app.command()
def adapt(
    model: Named,
    images: Images,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Questions, one a line, each asked about every image; those that you serve. Else a description and the"
            " text are asked for.",
            show_default=False,
        ),
    ] = None,
    distil: Annotated[
        bool, typer.Option("--distil", help="Train fusion modules for the lanes first; needs DeepStack taps.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of answers and of the finished policy; else one of this model in the cache directory.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[str, typer.Option(help="General policy to start from: balanced, latency or quality.")] = "balanced",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many images, the first by name.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Upper bound of an answer.")] = 160,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Measure costs on this machine first, where they are not known."),
    ] = True,
    upstream: Upstream = None,
    engine: EngineName = "openai",
    processor: Processor = "qwen3-vl",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before starting.")] = False,
    as_json: Json = False,
) -> None:
    """Fit a policy to MODEL by its own answers about IMAGES and install it, so that it is used from then on.

    No labels are needed: the model's own full answer is the measure of what cheaper plans lose. Says first what will
    be run and about how long that takes, and afterwards what was bought. A run that was stopped goes on where it was.
    Exit code 1 if the general policy turns out to be as good, 2 if an input is refused; nothing is installed then.
    """
    with refusing([model], as_json):
        questions = _questions(images, prompts, limit)
        from adaptive_fusion.learning.adapting.adapt import Adaptation, policy_name
        from adaptive_fusion.learning.adapting.install import installed
        from adaptive_fusion.user_cache import user_cache_dir, user_policies_dir

        source = _source(model, base, upstream, engine, processor, distil)
        name = policy_name(model, source.fingerprint.digest)
        root = user_policies_dir(os.environ)
        folder = out or user_cache_dir(os.environ) / "adapting" / name
        try:
            with progress(as_json) as shown:
                work = Adaptation(
                    source, questions, folder, name, distil, measure, max_new_tokens=max_new_tokens, progress=shown
                )
                ahead = work.ahead()
            _say_ahead(ahead, name)
            if not (yes or as_json) and sys.stdin.isatty():
                typer.confirm("Start?", default=True, abort=True, err=True)
            with progress(as_json) as shown:
                work.progress = shown
                found = work.run(root)
        except GateRefused as refused:
            kept = [str(each) for each in installed(root, name)]
            stays = f", and what was installed earlier is used as before: {', '.join(kept)}" if kept else ""
            complain(f"{refused}; nothing was installed{stays}")
            if as_json:
                figures = _plain(refused.verdict.figures)
                emit({"installed": False, "reason": str(refused), "figures": figures, "earlier": kept})
            raise typer.Exit(REFUSED) from refused
        except OSError as error:
            raise ConfigError(
                f"a folder cannot be written ({error.strerror}); nothing was installed, and what was answered so far is"
                " kept: run it again"
            ) from error
    _print(ahead, found, as_json)


def _source(model: str, base: str, upstream: str | None, engine: str, processor: str, distil: bool) -> "Source":
    """The model that is asked."""
    from adaptive_fusion.learning.adapting.source import Behind, Beside

    if upstream is None:
        from adaptive_fusion.loading import open_runner

        return Beside(open_runner(model, base))
    if distil:
        raise ConfigError("distil is given with upstream; expected a model that runs here")
    from adaptive_fusion.runner import AdaptiveRunner

    require_serving()
    return Behind(AdaptiveRunner.remote(upstream, model, engine=engine, processor=processor, policy=base))


def _questions(images: list[Path], prompts: Path | None, limit: int | None) -> "list[Question]":
    """Every question about every image; what cannot be one is named later, when it is loaded."""
    from adaptive_fusion.evaluation.folders import media_files
    from adaptive_fusion.evaluation.questions import Question

    asked = PROMPTS if prompts is None else _read_prompts(prompts)
    files, failed = media_files(images)
    for name, reason in failed:
        complain(f"{name}: {reason}")
    if not files:
        raise ConfigError("there are no images; expected a folder of those that you serve")
    return [Question(file, prompt) for file in files[:limit] for prompt in asked]


def _read_prompts(file: Path) -> tuple[str, ...]:
    """Questions, one a line; empty lines and repeated ones are left out."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()  # some editors begin with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file.name} is not text in UTF-8; expected questions, one a line") from error
    except OSError as error:
        raise ConfigError(f"{file.name!r} cannot be read ({error.strerror}); expected questions, one a line") from error
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise ConfigError(f"{file.name} has no questions; expected one a line")
    return found


def _say_ahead(ahead: "Ahead", name: str) -> None:
    """What will be run, on standard error."""
    for each, reason in ahead.failed:
        complain(f"{each}: {reason}; left out")
    twice = f", {ahead.repeated} came twice and count once" if ahead.repeated else ""
    kept = f"; {ahead.answered} are answered already" if ahead.answered else ""
    complain(f"{name}: {ahead.images} images, {ahead.questions} questions{twice}{kept}")
    first = f"{ahead.calibrating} small requests to measure this machine, " if ahead.calibrating else ""
    trained = f"{ahead.training} questions to train fusion modules on, " if ahead.training else ""
    how = "" if ahead.measured else ", by an estimate from the model's shape"
    complain(f"{first}{trained}{ahead.passes} passes of the model: about {_duration(ahead.seconds)}{how}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _plain(figures: "dict[str, Interval]") -> dict[str, Any]:
    from adaptive_fusion.learning.fitting.card import finite

    found: dict[str, Any] = finite({name: asdict(value) for name, value in figures.items()})
    return found


def _print(ahead: "Ahead", found: "Installed", as_json: bool) -> None:
    for name, reason in found.failed:
        complain(f"{name}: {reason}; left out")
    if as_json:
        emit({"installed": True, "ahead": asdict(ahead), **found.to_dict()})
        return
    from adaptive_fusion.learning.adapting.card import FIGURES

    table = Table(title=f"{found.policy.name}, on {found.images} images", title_justify="left")
    for head in ("", "this policy", "general"):
        table.add_column(head)
    for label, key in FIGURES:
        table.add_row(label, *(_said(found.figures[f"{side} {key}"]) for side in ("adapted", "general")))
    console().print(table)
    for part, what in found.parts.items():
        console().print(f"{part}: {what}")
    console().print(f"installed in {printable(str(found.folder))}; it is used for this model from now on")


def _said(value: "Interval") -> str:
    return f"{value.mean:.3f} ({value.low:.3f} to {value.high:.3f})"
