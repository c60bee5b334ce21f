"""Pieces of HTML and SVG that the pages are drawn with. All text is escaped here, so that nothing that was said, named
or refused becomes markup.

Knows HTML. Must not know what the pieces say.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape


class Safe(str):
    """A text that is markup already."""


def safe(value: object) -> Safe:
    """`value` as markup: escaped, unless it is markup."""
    return value if isinstance(value, Safe) else Safe(escape(str(value)))


def join(parts: Iterable[object]) -> Safe:
    """Pieces one after the other."""
    return Safe("".join(safe(part) for part in parts))


def element(name: str, *inside: object, **attributes: object) -> Safe:
    """An element. ``class_`` loses its last underscore, others inside become hyphens; None is no attribute."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "br"):
        return Safe(f"<{name}{said}>")
    return Safe(f"<{name}{said}>{join(inside)}</{name}>")


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], marked: Iterable[int] = ()) -> Safe:
    """A table whose first cell of each row is its head; it scrolls by itself where the page is narrow."""
    chosen = set(marked)
    body = join(
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
            class_="af-marked" if index in chosen else None,
        )
        for index, row in enumerate(rows)
    )
    head = element("thead", element("tr", *(element("th", name, scope="col") for name in heads)))
    whole = element("table", element("caption", caption), head, element("tbody", body))
    return element("div", whole, class_="af-scroll", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, object]]) -> Safe:
    """Names and what they are."""
    return element("dl", *(element("div", element("dt", k), element("dd", v)) for k, v in pairs), class_="af-facts")


def notice(said: str) -> Safe:
    """What went wrong or was done, told to screen readers as it appears."""
    return element("p", said, role="alert", class_="af-notice") if said else Safe("")


def shares(caption: str, counts: Mapping[str, int]) -> Safe:
    """Parts of a whole as bars with their numbers."""
    whole = sum(counts.values()) or 1
    parts = sorted(counts.items(), key=lambda pair: -pair[1])
    rows = [
        element(
            "li",
            element("span", f"{name} {count}"),
            element("span", style=f"width:{100 * count / whole:.1f}%", class_="af-bar"),
        )
        for name, count in parts
    ]
    return element("section", element("h2", caption), element("ul", *rows, class_="af-shares"))


def lines(caption: str, series: Mapping[str, Sequence[float | None]], width: int = 640, height: int = 160) -> Safe:
    """Values in order as lines with a common scale from 0; None leaves a gap. The highest is written beside it."""
    known = [value for values in series.values() for value in values if value is not None]
    top = max(known, default=0.0) or 1.0
    drawn = []
    for index, (name, values) in enumerate(series.items()):
        step = width / max(len(values) - 1, 1)
        path, pen = [], "M"
        for place, value in enumerate(values):
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{place * step:.1f} {height * (1 - value / top):.1f}")
            pen = "L"
        title = element("title", name)
        drawn.append(element("path", title, d=" ".join(path), class_=f"af-line af-line-{index}", fill="none"))
    picture = element(
        "svg",
        *drawn,
        viewBox=f"-4 -4 {width + 8} {height + 8}",
        role="img",
        aria_label=f"{caption}: {', '.join(series)}; 0 – {top:.0f}",
        preserveAspectRatio="none",
    )
    legend = join(element("span", name, class_=f"af-key af-key-{i}") for i, name in enumerate(series))
    head = element("figcaption", caption, f" (0 – {top:.0f}) ", legend)
    return element("figure", head, picture, class_="af-lines")
