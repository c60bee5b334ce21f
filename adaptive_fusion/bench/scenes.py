"""Held-out reference scenes as questions with right answers, wrong captions that nearly fit, and a score.

Knows the synthetic screens and the text metrics. Must not know of models, operating points or times.
"""

import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import SLICE, Question
from adaptive_fusion.learning.metrics import element_recall
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
    elements,
    make_scene,
)
from adaptive_fusion.video import Video

SLICES: dict[str, Kind] = {"simple": "simple", "dense": "dense", "reading": "reading", "clips": "clip"}
SIMPLE_SHARE = 3
"""Simple scenes per scene of each other slice, so that simple ones are half of the mixed set."""
FIRST_SEED = 100_000
"""Seeds of the evaluation scenes start here; small seeds are looked at while training."""
NEGATIVES = 3


def recall(answer: str, references: Sequence[str]) -> float:
    """Share of the scene's elements that a free description states fully right."""
    return element_recall(elements(answer), elements(references[0]))


METRIC_OF_SLICE = {"simple": "elements", "dense": "elements", "reading": "anls", "clips": "exact"}


def reference_items(scenes: int, sides: tuple[int, int] = (256, 384)) -> list[Question]:
    """Evaluation-split scenes: `scenes` each of dense, reading and clips, three times as many simple ones.

    All of them together are the mixed set. `sides` bounds a still's sides in pixels (see `make_scene`).

    Raises:
        ConfigError: For fewer than 2 scenes: a shuffled pair needs two.
    """
    if isinstance(scenes, bool) or not isinstance(scenes, int) or scenes < 2:
        raise ConfigError(f"scenes is {scenes!r}; expected an integer of at least 2")
    counts = {name: scenes * (SIMPLE_SHARE if name == "simple" else 1) for name in SLICES}
    return [
        _item(name, make_scene(kind, FIRST_SEED + index, "eval", sides))
        for name, kind in SLICES.items()
        for index in range(counts[name])
    ]


def _item(name: str, scene: Scene) -> Question:
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
