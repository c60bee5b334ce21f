"""``adaptive-fusion distil``: train a fusion module for a frozen model on unlabelled images.

Parses options, finds the images and prints; the work is in `adaptive_fusion.learning.distillation.distil`, imported
when the command runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from adaptive_fusion.commands.options import Json, Model
from adaptive_fusion.commands.output import complain, console, emit, progress, refusing
from adaptive_fusion.errors import ConfigError, MediaError

if TYPE_CHECKING:
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.learning.distillation.distil import DistillationReport

app = typer.Typer()


@app.command()
def distil(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUTS...", help="Images, clips and folders of them.", show_default=False),
    ],
    prompt: Annotated[list[str], typer.Option(help="Asked about every input; may be given several times.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The module, a .safetensors file for a policy's folder.")],
    model: Model = "reference",
    fusion: Annotated[str, typer.Option(help="gated or weighted.")] = "gated",
    layers: Annotated[int, typer.Option(help="ViT levels that take part: 3, 6, 9 or 12.")] = 12,
    rank: Annotated[int, typer.Option(help="Rank of the adapters: 0, 4, 8 or 16.")] = 8,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Train smaller counts of levels as well: one module serves them all.")
    ] = False,
    downsample: Annotated[
        list[float] | None,
        typer.Option(help="Ratio to train for; may be given several times. All of 1, 0.5 and 0.25 if left out."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 600,
    batch: Annotated[int, typer.Option(help="Questions per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    max_new_tokens: Annotated[int, typer.Option(help="Upper bound of the model's answers.")] = 160,
    seed: Annotated[int, typer.Option(help="Of the split, the order and the module's start.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier call was interrupted.")] = False,
    as_json: Json = False,
) -> None:
    """Train gates, adapters and pooling so that fewer visual tokens lose less.

    The model itself answers the prompt at full compute; the module learns to bring the same answers about at the
    cheaper points. No labels are needed and none of the model's weights changes. State is kept in FILE.work.
    """
    with refusing([str(path) for path in inputs], as_json):
        if out.suffix != ".safetensors" or out.is_dir():
            raise ConfigError(f"--out is {out.name!r}; expected the name of a file that ends in .safetensors")
        from adaptive_fusion.point import LAYERS, OperatingPoint

        point = OperatingPoint.from_dict({"fusion": fusion, "layers": layers, "adapter_rank": rank})
        wanted = [OperatingPoint(downsample=ratio).downsample for ratio in downsample or ()]
        questions = _questions(inputs, prompt)
        from adaptive_fusion.learning.distillation.distil import distil as train
        from adaptive_fusion.learning.distillation.settings import Settings
        from adaptive_fusion.loading import open_runner

        given: dict[str, Any] = {"ratios": dict.fromkeys(wanted, 1.0)} if wanted else {}
        if elastic:
            # Its own count as often as all smaller ones together: what is asked for most must not pay for the others.
            smaller = [count for count in LAYERS if count < layers]
            given["layers"] = {layers: max(1, len(smaller)), **dict.fromkeys(smaller, 1.0)}
        settings = Settings(steps=steps, batch=batch, lr=lr, seed=seed, max_new_tokens=max_new_tokens, **given)
        adapter = open_runner(model, "native").adapter
        try:
            with progress(as_json) as shown:
                report = train(adapter, questions, point, out, settings, resume=resume, progress=shown)
        except OSError as error:
            raise ConfigError(f"--out is {out.name!r}, which cannot be written: {error.strerror}") from error
        if as_json:
            emit({"model": model, "point": point.name, "out": str(out), **report.to_dict()})
        else:
            console().print(_table(report))
            console().print(f"{out}: {point.name}, {report.parameters:,} parameters, {report.steps} steps")


def _questions(inputs: list[Path], prompts: list[str]) -> list["Question"]:
    """Every prompt about every medium; files that cannot be read as one are named and left out."""
    from adaptive_fusion.evaluation.folders import media_files
    from adaptive_fusion.evaluation.questions import Question
    from adaptive_fusion.media.load import load_media

    usable = []
    files, failed = media_files(inputs)
    for name, reason in failed:
        complain(f"{name}: {reason}; left out")
    for path in files:
        try:
            load_media(path)
        except MediaError as error:
            complain(f"{path}: {type(error).__name__}: {error}; left out")
        else:
            usable.append(path)
    return [Question(path, prompt) for path in usable for prompt in prompts]


def _table(report: "DistillationReport") -> Table:
    title = f"Held-out questions ({report.held_out}; trained on {report.trained_on})"
    table = Table(title=title, title_justify="left")
    for name in ("downsample", "KL before", "KL after", "same token before", "same token after"):
        table.add_column(name, justify="right")
    before, after = report.before, report.after
    for ratio in before.kl:
        kl = (f"{judged.kl[ratio]:.4f}" for judged in (before, after))
        same = (f"{judged.agreement[ratio]:.1%}" for judged in (before, after))
        table.add_row(f"{ratio:g}", *kl, *same)
    return table
