"""Seeded synthetic screens with exact answers: what the reference model is trained and judged on.

Four kinds of scene, each with the tasks that can be asked of it:

- ``simple``: one to three large icons on a flat ground (describe);
- ``dense``: small icons with one- or two-character labels on a textured ground (describe, read);
- ``reading``: lines of small text in a panel (read, describe);
- ``clip``: frames in which one object moves, changes colour, appears or disappears (what happens).

Everything follows from ``(kind, seed, split)``. Training and evaluation are disjoint by construction: a word or a
layout belongs to the evaluation split if and only if its CRC-32 is 0 modulo 8, and each split draws only its own.
Knows nothing of models or tokens. Text is set in the font that Pillow carries.

Longer than other modules: all kinds draw from one stream of random numbers and share how things are placed and
painted, and it is the order of the draws that makes a seed's scene the same everywhere.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adaptive_fusion.errors import ConfigError

Kind = Literal["simple", "dense", "reading", "clip"]
T = TypeVar("T")
Split = Literal["train", "eval"]
Task = Literal["describe", "read", "event"]
KINDS: tuple[Kind, ...] = get_args(Kind)

PROMPTS: dict[Task, str] = {
    "describe": "Describe the screen.",
    "read": "Read the text.",
    "event": "What happens in the clip?",
}
COLORS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 205, 30),
    "orange": (245, 130, 20),
    "purple": (140, 50, 180),
    "cyan": (30, 190, 205),
    "pink": (245, 120, 175),
}
GROUNDS = {"white": (246, 246, 246), "gray": (150, 152, 156), "black": (24, 26, 30)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "bar")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
MOVES = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
BINS = 8
"""Dense scenes name places by an 8 x 8 grid relative to the image: row a-h, column 1-8 (``b3``)."""
CONSONANTS, VOWELS, DIGITS = "BCDFGHJKLMNPRSTVWXZ", "AEIOU", "0123456789"
LABEL_CHARS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"
"""No I, O, Q, 0, 1: in a ten-pixel sans serif they are the same drawing as another character."""
MIN_SIDE, MAX_SIDE = 64, 4096
"""Smaller screens have no room for enough layouts: those of one split may not exist."""
GRID = 16
"""Sides are multiples of this: one visual token of the reference model (2 x 2 patches of 8 px)."""


class Icon(NamedTuple):
    """An icon: its centre and side in pixels, colour and shape."""

    x: float
    y: float
    side: float
    color: str
    shape: str


class Glyph(NamedTuple):
    """A character and its centre in pixels."""

    x: float
    y: float
    char: str


@dataclass(frozen=True)
class Scene:
    """One screen or clip with the answers that are right for it.

    ``frames`` holds one image for a still, four to eight for a clip (2 per second). ``answers`` maps each task that
    can be asked to its only right answer. `icons` and `glyphs` say where everything lies in a still, in pixels;
    `acting` has what the event of a clip happens to in each frame, None where it is not there.
    """

    kind: Kind
    frames: tuple[Image.Image, ...]
    answers: dict[Task, str]
    icons: tuple["Icon", ...] = ()
    glyphs: tuple["Glyph", ...] = ()
    acting: tuple["Icon | None", ...] = ()

    @property
    def task(self) -> Task:
        """The task this kind of scene is judged on."""
        return {"simple": "describe", "dense": "describe", "reading": "read", "clip": "event"}[self.kind]  # type: ignore[return-value]

    @property
    def image(self) -> Image.Image:
        """The first (for a still: the only) frame."""
        return self.frames[0]


def elements(answer: str) -> list[str]:
    """The elements an answer to ``describe`` states, one string each, for element recall."""
    return [part.strip() for part in answer.split(",") if part.strip()]


def held_out(key: str) -> bool:
    """Whether a word or a layout signature belongs to the evaluation split (one in eight does)."""
    return zlib.crc32(key.encode()) % 8 == 0


def make_scene(kind: Kind, seed: int, split: Split, sides: tuple[int, int] = (256, 384), effort: float = 1.0) -> Scene:
    """Render one scene.

    Args:
        kind: One of ``KINDS``.
        seed: Any integer; the same arguments always give the same scene.
        split: ``train`` or ``eval``: words and layouts of one never occur in the other.
        sides: Smallest and largest image side in pixels, 64 to 4096, for stills of every kind alike (clips use half
            of it).
        effort: In (0, 1]; scales how many elements or words a scene may hold (a curriculum starts low).

    Raises:
        ConfigError: For an unknown kind or split, or sides or an effort out of range.
    """
    if kind not in KINDS or split not in get_args(Split):
        raise ConfigError(f"unknown scene {kind!r}/{split!r}; expected kinds {KINDS}, splits {get_args(Split)}")
    if not MIN_SIDE <= sides[0] <= sides[1] <= MAX_SIDE:
        raise ConfigError(f"sides are {sides!r}; expected the smallest and the largest, {MIN_SIDE} to {MAX_SIDE}")
    if not 0 < effort <= 1:
        raise ConfigError(f"effort is {effort!r}; expected above 0, at most 1")
    rng = random.Random(f"{kind}/{split}/{seed}")
    low, high = sides[0] // GRID, sides[1] // GRID
    if kind == "clip":
        low, high = max(5, low // 2), max(6, high // 2)
    size = rng.randint(low, high) * GRID, rng.randint(low, high) * GRID
    draw: dict[Kind, Callable[..., Scene]] = {
        "simple": _simple,
        "dense": _dense,
        "reading": _reading,
        "clip": _clip,
    }
    return draw[kind](rng, split, size, effort)


def _until_split(split: Split, propose: Callable[[], tuple[str, T]]) -> T:
    """Draw until the signature falls on the asked side of the split."""
    while True:
        key, value = propose()
        if held_out(key) == (split == "eval"):
            return value


def _simple(rng: random.Random, split: Split, size: tuple[int, int], effort: float) -> Scene:
    width, height = size
    ground = rng.choice(list(GROUNDS))

    def propose() -> tuple[str, list[tuple[int, tuple[str, str]]]]:
        places = sorted(rng.sample(range(9), rng.choice((1, 1, 2, 3)) if effort > 0.2 else 1))
        looks = [(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in places]
        return "simple" + ground + repr(places) + repr(looks), list(zip(places, looks, strict=True))

    image = Image.new("RGB", size, _jitter(rng, GROUNDS[ground]))
    draw = ImageDraw.Draw(image)
    said: list[str] = []
    icons: list[Icon] = []
    chosen: list[tuple[int, tuple[str, str]]] = _until_split(split, propose)
    for place, (color, shape) in chosen:
        row, column = divmod(place, 3)
        # An icon alone may be larger than its ninth of the screen; it is kept inside the screen.
        side = rng.uniform(0.2, 0.3 if len(chosen) > 1 else 0.6) * min(size)
        x = min(max(width * (column + 0.5 + rng.uniform(-0.06, 0.06)) / 3, side / 2 + 2), width - side / 2 - 2)
        y = min(max(height * (row + 0.5 + rng.uniform(-0.06, 0.06)) / 3, side / 2 + 2), height - side / 2 - 2)
        _shape(draw, shape, x, y, side, _jitter(rng, COLORS[color]))
        icons.append(Icon(x, y, side, color, shape))
        said.append(f"{color} {shape} {PLACES[row][column]}")
    said.append(f"{ground} ground")
    return Scene("simple", (image,), {"describe": ", ".join(said)}, tuple(icons))


def _dense(rng: random.Random, split: Split, size: tuple[int, int], effort: float) -> Scene:
    width, height = size
    bin_w, bin_h = width / BINS, height / BINS
    cell_w, cell_h = 38, 18
    stride_x, stride_y = -(-cell_w // bin_w), -(-cell_h // bin_h)
    columns = [c for c in range(BINS) if cell_w / 2 <= (c + 0.5) * bin_w <= width - cell_w / 2]
    rows = [r for r in range(BINS) if cell_h / 2 <= (r + 0.5) * bin_h <= height - cell_h / 2]

    def propose() -> tuple[str, list[tuple[int, int]]]:
        wanted = rng.randint(max(2, round(5 * effort)), max(3, round(15 * effort)))
        spots: list[tuple[int, int]] = []
        for spot in rng.sample([(r, c) for r in rows for c in columns], len(rows) * len(columns)):
            if all(abs(spot[0] - r) >= stride_y or abs(spot[1] - c) >= stride_x for r, c in spots):
                spots.append(spot)
            if len(spots) == wanted:
                break
        return "dense" + repr(sorted(spots)), sorted(spots)

    image, dark = _textured(rng, size)
    draw = ImageDraw.Draw(image)
    font = _font(rng.choice((12, 13)))
    said: list[str] = []
    labels: list[str] = []
    icons: list[Icon] = []
    glyphs: list[Glyph] = []
    spots: list[tuple[int, int]] = _until_split(split, propose)
    for row, column in spots:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        label = "".join(rng.choice(LABEL_CHARS) for _ in range(rng.choice((1, 2, 2))))
        x = (column + 0.5) * bin_w + rng.uniform(-0.5, 0.5)
        y = (row + 0.5) * bin_h + rng.uniform(-0.5, 0.5)
        side = rng.uniform(11, 14)
        _shape(draw, shape, x - 9, y, side, _jitter(rng, COLORS[color]))
        icons.append(Icon(x - 9, y, side, color, shape))
        glyphs += _glyphs(font, x, y, label)
        draw.text((x, y), label, fill=(245, 245, 245) if dark else (10, 10, 10), font=font, anchor="lm")
        said.append(f"{'abcdefgh'[row]}{column + 1} {color} {shape} {label}")
        labels.append(label)
    answers: dict[Task, str] = {"describe": ", ".join(said), "read": "\n".join(labels)}
    return Scene("dense", (image,), answers, tuple(icons), tuple(glyphs))


def _reading(rng: random.Random, split: Split, size: tuple[int, int], effort: float) -> Scene:
    width, height = size
    image, _ = _textured(rng, size)
    draw = ImageDraw.Draw(image)
    points = rng.choice((12, 13, 14))
    font = _font(points)
    pitch = points + rng.randint(2, 8)
    lines: list[str] = []
    budget = round(40 * effort)
    for _ in range(rng.randint(max(1, round(2 * effort)), max(2, round(7 * effort)))):
        line = _word(rng, split)
        if rng.random() < 0.5 and font.getlength(line) < width * 0.4:
            line += " " + _word(rng, split)
        if font.getlength(line) > width - 14 or (len(lines) + 1) * pitch > height - 14:
            break
        if lines and sum(map(len, lines)) + len(line) > budget:
            break
        lines.append(line)
    lines = lines or [_word(rng, split)[: max(2, (width - 14) // points)]]
    text_w, text_h = max(font.getlength(line) for line in lines), pitch * len(lines)
    ground = rng.choice(list(GROUNDS))
    left = rng.uniform(5, max(5, width - text_w - 7))
    top = rng.uniform(5, max(5, height - text_h - 5))
    panel = (left - 4, top - 3, min(width - 1, left + text_w + 5), min(height - 1, top + text_h + 2))
    draw.rectangle(panel, fill=_jitter(rng, GROUNDS[ground]))
    ink = (15, 15, 15) if ground == "white" else (245, 245, 245) if ground == "black" else (0, 0, 0)
    glyphs: list[Glyph] = []
    for i, line in enumerate(lines):
        draw.text((left, top + (i + 0.5) * pitch), line, fill=ink, font=font, anchor="lm")
        glyphs += _glyphs(font, left, top + (i + 0.5) * pitch, line)
    center_x, center_y = (panel[0] + panel[2]) / 2, (panel[1] + panel[3]) / 2
    place = PLACES[min(2, int(3 * center_y / height))][min(2, int(3 * center_x / width))]
    count = f"{len(lines)} line{'s' if len(lines) > 1 else ''}"
    answers: dict[Task, str] = {"read": "\n".join(lines), "describe": f"{ground} panel {place}, {count}"}
    return Scene("reading", (image,), answers, glyphs=tuple(glyphs))


def _clip(rng: random.Random, split: Split, size: tuple[int, int], effort: float) -> Scene:
    width, height = size
    frames_n = rng.choice((4, 6, 8))
    event = rng.choice(("moves", "turns", "appears", "disappears"))

    def propose() -> tuple[str, list[tuple[int, int]]]:
        spots = rng.sample([(r, c) for r in range(4) for c in range(4)], rng.randint(1, max(1, round(4 * effort))))
        return "clip" + repr(spots), spots

    spots: list[tuple[int, int]] = _until_split(split, propose)
    looks = rng.sample([(c, s) for c in COLORS for s in SHAPES], len(spots))
    ground = _jitter(rng, GROUNDS[rng.choice(list(GROUNDS))])
    side = rng.uniform(0.13, 0.2) * min(size)
    (color, shape), (row, column) = looks[0], spots[0]
    target = rng.choice([c for c in COLORS if c != color])
    direction = rng.choice(list(MOVES))
    switch = rng.randint(frames_n // 2 - 1, frames_n // 2 + 1)
    frames = []
    acting: list[Icon | None] = []
    for k in range(frames_n):
        image = Image.new("RGB", size, ground)
        draw = ImageDraw.Draw(image)
        for (c, s), (r, q) in list(zip(looks, spots, strict=True))[1:]:
            _shape(draw, s, width * (q + 0.5) / 4, height * (r + 0.5) / 4, side, COLORS[c])
        x, y = width * (column + 0.5) / 4, height * (row + 0.5) / 4
        visible, shown = True, color
        if event == "moves":
            # The way is a third of the side, centred on the object's cell and kept inside the frame.
            step = (k / (frames_n - 1) - 0.5) / 3
            dx, dy = MOVES[direction]
            x = min(max(x, width * 0.27), width * 0.73) + dx * step * width if dx else x
            y = min(max(y, height * 0.27), height * 0.73) + dy * step * height if dy else y
        elif event == "turns":
            shown = target if k >= switch else color
        elif event == "appears":
            visible = k >= switch
        else:
            visible = k < switch
        if visible:
            _shape(draw, shape, x, y, side, COLORS[shown])
        acting.append(Icon(x, y, side, shown, shape) if visible else None)
        frames.append(image)
    tail = {"moves": f" {direction}", "turns": f" {target}"}.get(event, "")
    return Scene("clip", tuple(frames), {"event": f"{color} {shape} {event}{tail}"}, acting=tuple(acting))


def _word(rng: random.Random, split: Split) -> str:
    """A pronounceable word of two to six letters, or a number of two to four digits."""

    def propose() -> tuple[str, str]:
        if rng.random() < 0.3:
            word = "".join(rng.choice(DIGITS) for _ in range(rng.randint(2, 4)))
        else:
            start = rng.randint(0, 1)
            word = "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(rng.randint(2, 6)))
        return word, word

    return _until_split(split, propose)


def _textured(rng: random.Random, size: tuple[int, int]) -> tuple[Image.Image, bool]:
    """A faint texture on a light or dark ground, and whether it is dark."""
    dark = rng.random() < 0.35
    base = np.array(_jitter(rng, (40, 44, 52) if dark else (228, 230, 234)), np.float32)
    width, height = size
    noise = np.random.default_rng(rng.getrandbits(32))
    style = rng.choice(("flat", "noise", "stripes", "checks", "gradient"))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    period = rng.randint(6, 24)
    field = np.zeros((height, width), np.float32)
    if style == "noise":
        field = noise.normal(0, 5, (height, width)).astype(np.float32)
    elif style == "stripes":
        field = ((x + (y if rng.random() < 0.5 else 0)) // period % 2) * 14 - 7
    elif style == "checks":
        field = ((x // period + y // period) % 2) * 14 - 7
    elif style == "gradient":
        field = (x / width + y / height - 1) * 18
    pixels = np.clip(base + field[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), dark


def _jitter(rng: random.Random, color: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-8, 8))) for c in color)
    return r, g, b


@lru_cache(maxsize=16)
def _font(points: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(points)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType; install a wheel of Pillow from PyPI")
    return font


def _glyphs(font: ImageFont.FreeTypeFont, x: float, y: float, line: str) -> list[Glyph]:
    """Centres of the characters of a line that starts at x and is centred on y."""
    edges = [x + font.getlength(line[:end]) for end in range(len(line) + 1)]
    return [Glyph((edges[i] + edges[i + 1]) / 2, y, char) for i, char in enumerate(line) if char != " "]


_STAR: list[tuple[float, float]] = [(0, -1), (0.24, -0.31), (0.95, -0.31), (0.38, 0.12), (0.59, 0.81)]
_STAR += [(0, 0.4), (-0.59, 0.81), (-0.38, 0.12), (-0.95, -0.31), (-0.24, -0.31)]
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": _STAR,
}


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, side: float, color: tuple[int, int, int]) -> None:
    """Draw ``shape`` centred at (x, y) within a square of ``side`` pixels."""
    r = side / 2
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        draw.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=color)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=color, width=max(2, round(side / 5)))
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=color)
    elif shape == "bar":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=color)
    else:
        draw.polygon([(x + px * r, y + py * r) for px, py in _POLYGONS[shape]], fill=color)
