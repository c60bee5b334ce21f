"""Pictures of decisions and of demo results, as PNG files.

Knows decisions, media and what a figure is made of. Must not know of models or other commands.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from adaptive_fusion.decisions import Decision
from adaptive_fusion.features.image import edge_map
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media
from adaptive_fusion.plots import new_figure, save_figure

if TYPE_CHECKING:
    from adaptive_fusion.demo import AnswerPair

_ROW_INCHES = 4.4
_SHOWN_SIDE = 512


def explain_plot(decided: Sequence[tuple[str, Decision]], path: Path) -> None:
    """Draw one row per file: the picture (the middle frame of a clip), its edge map, its features as bars.

    The edge map is the one that is measured: Canny at 100/200 on the 64 x 64 sample. The bars of all rows share
    one axis, linear up to 0.1 and logarithmic above, because features range from 0.001 to 100.

    Raises:
        MissingExtraError: Without matplotlib.
        ConfigError: If the file cannot be written.
    """
    figure = new_figure(13, _ROW_INCHES * len(decided) + 0.3)
    axes = figure.subplots(len(decided), 3, squeeze=False, width_ratios=(1, 1, 1.5))
    top = max((v for _, d in decided if d.complexity for v in d.complexity.features.values()), default=1.0)
    for (name, decision), (left, middle, right) in zip(decided, axes, strict=True):
        picture = _picture(name)
        left.imshow(_thumbnail(picture))
        left.set_title(_plain(Path(name).name[-60:]), fontsize=9)
        edges = edge_map(picture)
        middle.imshow(edges, cmap="gray", aspect=picture.height / picture.width)
        middle.set_title(f"edges as measured ({edges.shape[1]} x {edges.shape[0]})", fontsize=9)
        for axis in (left, middle):
            axis.set_axis_off()
        if decision.complexity is not None:
            _bars(right, decision.complexity.features, top)
            right.set_title(
                f"complexity {decision.complexity.score:.2f}, P(complex) {decision.p_complex or 0:.2f}: "
                f"{decision.lane} lane, {decision.point.name}",
                fontsize=9,
            )
    save_figure(figure, path)


def demo_plot(rows: Sequence["AnswerPair"], path: Path) -> None:
    """Draw one row per file of the demo: the picture, what was asked and answered, time and tokens as bars.

    Raises:
        MissingExtraError: Without matplotlib.
        ConfigError: If the file cannot be written.
    """
    figure = new_figure(14, 3.0 * len(rows) + 0.3)
    axes = figure.subplots(len(rows), 4, squeeze=False, width_ratios=(1, 2, 1, 1))
    for row, (picture, words, time, tokens) in zip(rows, axes, strict=True):
        picture.imshow(_thumbnail(_picture(row.question.media)))
        asked, decision = row.question, row.adaptive.decision
        lines = (
            f"{asked.name}, {asked.slice}: {decision.lane} lane, {decision.point.name}",
            f"truth: {row.truth}",
            f"native: {row.native.text}",
            f"adaptive: {row.adaptive.text}",
        )
        text = "\n".join(_wrapped(_plain(line)) for line in lines)
        words.text(0, 1, text, va="top", fontsize=7, family="monospace", transform=words.transAxes)
        for axis in (picture, words):
            axis.set_axis_off()
        pairs = (row.native.measurement, row.adaptive.measurement)
        time.barh(("native", "adaptive"), [took.latency_ms for took in pairs], color=("0.6", "tab:blue"))
        limit = row.adaptive.decision.budget.get("latency_ms")
        if limit is not None:
            time.axvline(limit, color="tab:red", linestyle="--")
        time.set_title("latency, ms (dashed: budget)", fontsize=8)
        tokens.barh(("native", "adaptive"), [took.visual_tokens for took in pairs], color=("0.6", "tab:blue"))
        tokens.set_title("visual tokens", fontsize=8)
        for axis in (time, tokens):
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
    save_figure(figure, path)


def _bars(axis: Any, features: dict[str, float], top: float) -> None:
    names, values = list(features), list(features.values())
    drawn = axis.barh(names, values, color="tab:blue", height=0.7)
    axis.bar_label(drawn, [f"{value:.3g}" for value in values], fontsize=6, padding=2)
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlim(min(0.0, *values), top * 2)
    axis.invert_yaxis()
    axis.tick_params(labelsize=6)


def _picture(source: str) -> Image.Image:
    medium = load_media(source)
    return Image.fromarray(medium.frames[len(medium.frames) // 2]) if isinstance(medium, Video) else medium


def _thumbnail(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return small


def _plain(text: str) -> str:
    # A dollar sign would start mathematics; characters that the font lacks would only raise warnings.
    return "".join(c if c.isascii() and (c.isprintable() or c == "\n") else "?" for c in text).replace("$", r"\$")


def _wrapped(text: str, width: int = 62, most: int = 5) -> str:
    lines = [text[i : i + width] for i in range(0, len(text), width)]
    return "\n".join(lines[:most]) + ("..." if len(lines) > most else "")
