"""The benchmark on real images as one HTML page that needs nothing else: tables, plots, the worst cases as pictures.

Knows a result, pictures and HTML. Must not compute figures, and nothing on the page may ask for anything from outside:
pictures are data URIs, and a policy in the page forbids the rest.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from adaptive_fusion.bench.real import MOST_LOST, Bad
from adaptive_fusion.bench.real_report import (
    HEADS,
    SOURCE_HEADS,
    notes,
    points,
    rank_cells,
    rank_heads,
    row_cells,
    source_cells,
    title,
)
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.shares import shown, within
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media

_THUMBNAIL = 360
_DETAIL = (480, 200)  # native pixels around what was lost
_QUALITY = 82
_PLOT = (640, 330)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d5dae0; --paper: #fff; --own: #0b63c5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #39414a; --paper: #15181c; --own: #6db3ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; }
td.part { padding-left: 1.6rem; color: var(--soft); } tr.own td { color: var(--own); font-weight: 600; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
.case { border-top: 1px solid var(--line); padding: 1rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .75rem; } figure { margin: 0; flex: 1 1 16rem; min-width: 0; }
img { width: 100%; height: auto; border: 1px solid var(--line); }
figcaption, .soft { color: var(--soft); font-size: 13px; }
"""


def check_page(path: Path) -> None:
    """Refuse a page that could not be written, before any work is done for it.

    Raises:
        ConfigError: For a name that does not end in .html or .htm, or a folder that is not there.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"page is {path.name!r}; expected a file name ending in .html")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"page {path.name!r} lies in the folder {path.parent.name!r}, which does not exist")


def write_page(result: Mapping[str, Any], bad: Sequence[Bad], path: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: If the file cannot be written.
    """
    try:
        path.write_text(page(result, bad), "utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"page {path.name!r} cannot be written: {error.strerror or type(error).__name__}") from error


def page(result: Mapping[str, Any], bad: Sequence[Bad]) -> str:
    """The whole page."""
    policies = result["policies"]
    parts = ["<h1>Real images: what is kept, and what is spent</h1>"]
    for what in result["kinds"]:
        parts.append(f"<h2>{_text(title(result, what))}</h2>")
        parts.append(_plot(points(result, what), policies, what))
        parts.append(_table(("row", *HEADS), row_cells(result, what), policies))
        parts.append(f"<h2>{_text(what.capitalize())}, by source</h2>")
        parts.append(_table(SOURCE_HEADS, source_cells(result, what), policies, words=2))
    parts.append("<h2>Loss at a quarter of the native pixels</h2>")
    parts.append(_table(rank_heads(result), rank_cells(result), policies, words=2))
    if result["failed"]:
        parts.append("<h2>Failed</h2>")
        failed = ((one["input"], one["error"]) for one in result["failed"])
        parts.append(_table(("input", "why"), failed, policies, words=2))
    parts.append(f"<h2>Least kept by {_text(policies[0])}</h2>")
    parts += [_case(one) for one in bad] or ["<p>All of every image is kept.</p>"]
    parts += ["<h2>How this was measured</h2>", *(f"<p class='soft'>{_text(line)}</p>" for line in notes(result))]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Real images</title>'
        f"<style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], policies: Sequence[str], words: int = 1) -> str:
    """A table that scrolls by itself where the screen is narrow; the first `words` columns are no figures."""
    head = "".join(f"<th{_class(i < words and 'words')}>{_text(name)}</th>" for i, name in enumerate(heads))
    body = []
    for row in rows:
        own = _class(any(cell in policies for cell in row[:words]) and "own")
        cells = (
            f"<td{_class(i < words and ('part' if cell.startswith('  ') else 'words'))}>{_text(cell.strip())}</td>"
            for i, cell in enumerate(row)
        )
        body.append(f"<tr{own}>{''.join(cells)}</tr>")
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _plot(rows: Sequence[tuple[str, float, float]], policies: Sequence[str], what: str) -> str:
    """Kept against tokens, as SVG: policies are filled and named, the rest has its name beside the pointer."""
    width, height = _PLOT
    left, right, top, bottom = 48, 16, 12, 40
    low = min(0.95, *(kept for _, _, kept in rows)) - 0.01
    least = max(0.0, low)

    def place(tokens: float, kept: float) -> tuple[float, float]:
        x = left + min(tokens, 1.1) / 1.1 * (width - left - right)
        return x, top + (1 - (kept - least) / (1 - least)) * (height - top - bottom)

    marks = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(share, least)
        marks.append(f"<text x='{x:.1f}' y='{y + 16:.1f}' text-anchor='middle'>{share:g}</text>")
    for step in range(5):
        kept = least + (1 - least) * step / 4
        x, y = place(0, kept)
        marks.append(f"<line x1='{x:.1f}' x2='{width - right}' y1='{y:.1f}' y2='{y:.1f}' stroke='var(--line)'/>")
        marks.append(f"<text x='{x - 6:.1f}' y='{y + 4:.1f}' text-anchor='end'>{kept:.2f}</text>")
    for name, tokens, kept in rows:
        x, y = place(tokens, kept)
        own = name in policies
        fill = "var(--own)" if own else "none"
        marks.append(
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{fill}' stroke='var(--ink)'><title>{_text(name)}: kept "
            f"{kept:.3f} at {tokens:.3f} of the tokens</title></circle>"
        )
        if own or name in ("oracle", "native", "vision-squeezer"):
            marks.append(f"<text x='{x + 8:.1f}' y='{y + 14:.1f}'>{_text(name)}</text>")
    marks.append(f"<text x='{width / 2}' y='{height - 6}' text-anchor='middle'>tokens of native</text>")
    label = f"{what} kept against tokens"
    return f"<svg viewBox='0 0 {width} {height}' width='{width}' role='img' aria-label='{label}'>{''.join(marks)}</svg>"


def _case(one: Bad) -> str:
    """One image natively and as planned, whole and where something was lost."""
    seen, case, loss = one.seen, one.case, one.loss
    lost = " ".join(loss.lost[:MOST_LOST]) + (f" and {more} more" if (more := len(loss.lost) - MOST_LOST) > 0 else "")
    words = (
        f"<h3>{_text(case.source)}/{_text(case.path.name)}</h3><p>{one.what} kept <b>{seen.kept:.3f}</b> at "
        f"{seen.share:.3f} of {case.native:,} pixels, {seen.tokens:,} tokens. Asked: {_text(case.question)}</p>"
        f"<p class='soft'>Lost: {_text(lost or 'characters within words')}</p>"
    )
    image = load_media(case.path)
    if isinstance(image, Video):
        raise ConfigError(f"{case.path.name!r} is a clip; expected the image that was measured")
    native = image.resize(within(image.size), Image.Resampling.BICUBIC)
    small = _seen_sides(case.file, seen.share)
    planned = Image.fromarray(shown(image, small))
    figures = [_figure(native, f"native, {native.width} x {native.height}")]
    figures.append(_figure(planned, f"as planned, {small[0]} x {small[1]}"))
    if loss.place is not None:
        box = _around(loss.place, native.size)
        figures += [_figure(native.crop(box), "where most was lost: native"), _figure(planned.crop(box), "as planned")]
    return f"<div class='case'>{words}<div class='pictures'>{''.join(figures)}</div></div>"


def _seen_sides(file: tuple[int, int], share: float) -> tuple[int, int]:
    native = within(file)
    scale = share**0.5
    return max(1, round(native[0] * scale)), max(1, round(native[1] * scale))


def _around(place: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box of native pixels with `place` in its middle, inside the image."""
    sides = [min(side, most) for side, most in zip(_DETAIL, size, strict=True)]
    middle = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
    x, y = (int(min(max(0, m - s / 2), w - s)) for m, s, w in zip(middle, sides, size, strict=True))
    return x, y, x + sides[0], y + sides[1]


def _figure(picture: Image.Image, said: str) -> str:
    small = picture.convert("RGB")
    if max(small.size) > _DETAIL[0]:
        small.thumbnail((_THUMBNAIL, _THUMBNAIL * 2))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=_QUALITY)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    shown_as = f"<img alt='{_text(said)}' src='data:image/jpeg;base64,{data}'>"
    return f"<figure>{shown_as}<figcaption>{_text(said)}</figcaption></figure>"


def _text(text: str) -> str:
    return html.escape(text)


def _class(name: str | bool) -> str:
    return f" class='{name}'" if name else ""
