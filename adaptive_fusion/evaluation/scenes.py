"""Reference scenes as questions with right answers, with wrong captions that nearly fit, and how answers are scored.

Knows the synthetic screens and the text metrics. Must not know of models, operating points or times. A scene asked
two questions gives two labels with one content hash, which is how the question's effect can be told from the
image's.
"""

import random
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from adaptive_fusion.checks import integer
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import SLICE, Question
from adaptive_fusion.media.clips import Video
from adaptive_fusion.reference.screens import (
    BINS,
    COLORS,
    GROUNDS,
    LABEL_CHARS,
    MOVES,
    PROMPTS,
    SHAPES,
    Kind,
    Scene,
    Split,
    Task,
    make_scene,
)

SLICES: dict[str, Kind] = {"simple": "simple", "dense": "dense", "reading": "reading", "clips": "clip"}
SIMPLE_SHARE = 3
"""Simple scenes per scene of each other slice, so that simple ones are half of the mixed set."""
FIRST_SEED = 100_000
"""Seeds of the evaluation scenes start here; small seeds are looked at while training."""
NEGATIVES = 3


METRIC_OF_SLICE = {"simple": "elements", "dense": "elements", "reading": "anls", "clips": "exact"}

METRIC_OF_TASK: dict[Task, str] = {"describe": "elements", "read": "anls", "event": "exact"}
MIX: tuple[Kind, ...] = ("simple", "dense", "simple", "reading", "simple", "clip")
"""Half simple, the rest in equal parts; any run of six scenes has this mix."""
SIDES = (256, 384)
"""Sides of stills of every kind, in pixels: a large image can be simple."""
SIZES = ((95_000, "small"), (110_000, "medium"))
"""Upper bounds of the size slices, in pixels; above the last they are large."""
DENSITIES = ((0, "no text"), (180, "little text"))
"""Upper bounds of the text slices, in characters per megapixel; above the last there is much text."""
STRIDE = 1_000_000


def reference_questions(scenes: int, sides: tuple[int, int] = (256, 384)) -> list[Question]:
    """Evaluation-split scenes: `scenes` each of dense, reading and clips, three times as many simple ones.

    All of them together are the mixed set. `sides` bounds a still's sides in pixels (see `make_scene`).

    Raises:
        ConfigError: For fewer than 2 scenes: a shuffled pair needs two.
    """
    integer(scenes, "scenes", 2)
    counts = {name: scenes * (SIMPLE_SHARE if name == "simple" else 1) for name in SLICES}
    return [
        _question(name, make_scene(kind, FIRST_SEED + index, "eval", sides))
        for name, kind in SLICES.items()
        for index in range(counts[name])
    ]


def _question(name: str, scene: Scene) -> Question:
    truth = scene.answers[scene.task]
    wrong = tuple(hard_negatives(truth, scene.kind))
    return Question(
        media(scene), PROMPTS[scene.task], (truth,), METRIC_OF_SLICE[name], negatives=wrong, slices={SLICE: name}
    )


def media(scene: Scene) -> Any:
    """A scene as the library takes it: a PIL image, or a clip of two frames a second."""
    if len(scene.frames) == 1:
        return scene.image
    frames = np.stack([np.asarray(frame) for frame in scene.frames])
    times = tuple(index / 2 for index in range(len(frames)))
    return Video(frames, times, len(frames) / 2, len(frames))


def hard_negatives(truth: str, kind: Kind, count: int = NEGATIVES) -> list[str]:
    """Captions unlike `truth` in one word (colour, shape, place, ground, event) or one character of text.

    The same caption always gives the same ones, each of them once.
    """
    rng = random.Random(zlib.crc32(f"{kind}/{truth}".encode()))
    found: dict[str, None] = {}
    while len(found) < count:
        caption = _changed(truth, kind, rng)
        if caption != truth:
            found[caption] = None
    return list(found)


_CLASSES: tuple[tuple[str, ...], ...] = (
    tuple(COLORS),
    SHAPES,
    tuple(GROUNDS),
    ("left", "right"),
    ("top", "bottom"),
    ("up", "down"),
    ("appears", "disappears"),
)
_PLACES = tuple(f"{row}{column}" for row in "abcdefgh" for column in range(1, BINS + 1))


def _changed(truth: str, kind: Kind, rng: random.Random) -> str:
    if kind == "reading":
        spots = [i for i, char in enumerate(truth) if not char.isspace()]
        spot = rng.choice(spots)
        return truth[:spot] + rng.choice(_like(truth[spot])) + truth[spot + 1 :]
    parts = truth.split(", ")
    index = rng.randrange(len(parts))
    words = parts[index].split(" ")
    spot = rng.randrange(len(words))
    words[spot] = _other(words[spot], kind, rng)
    parts[index] = " ".join(words)
    return ", ".join(parts)


def _other(word: str, kind: Kind, rng: random.Random) -> str:
    """Another word of the same class; the word itself where its class has no other."""
    if kind == "clip" and word in MOVES:
        return rng.choice(sorted(set(MOVES) - {word}))
    if word in _PLACES:
        return rng.choice(_PLACES)
    for group in _CLASSES:
        if word in group:
            return rng.choice([other for other in group if other != word])
    if word.isupper() or word.isdigit():
        spot = rng.randrange(len(word))
        return word[:spot] + rng.choice(LABEL_CHARS) + word[spot + 1 :]
    return word


def _like(char: str) -> str:
    return "0123456789" if char.isdigit() else "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def scene_questions(count: int, split: Split, seed: int = 0, sides: tuple[int, int] = SIDES) -> Iterator[Question]:
    """All questions about `count` mixed scenes, those about one scene together.

    Scenes of another `seed` or split are others.

    Raises:
        ConfigError: For fewer than one scene, or a seed out of 0 to 999.
    """
    if not 1 <= count <= STRIDE or seed < 0:
        raise ConfigError(f"got {count} scenes and seed {seed}; expected 1 to {STRIDE} and a seed of at least 0")
    for number in range(count):
        kind, index = MIX[number % len(MIX)], (1 + seed) * STRIDE + number
        scene = make_scene(kind, index, split, sides)
        for task, answer in scene.answers.items():
            slices = {"scene": kind, "task": task, **_looks(scene)}
            yield Question(
                partial(_rendered, kind, index, split, sides),
                PROMPTS[task],
                (answer,),
                METRIC_OF_TASK[task],
                slices=slices,
            )


def _rendered(kind: Kind, seed: int, split: Split, sides: tuple[int, int]) -> Any:
    return media(make_scene(kind, seed, split, sides))


def _looks(scene: Scene) -> dict[str, str]:
    pixels = scene.image.width * scene.image.height
    characters = 1e6 * len(scene.glyphs) / pixels
    size = next((name for most, name in SIZES if pixels <= most), "large")
    density = next((name for most, name in DENSITIES if characters <= most), "much text")
    return {"size": size, "text_density": density}
