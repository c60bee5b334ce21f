"""Reference scenes as questions to label: every task of a scene, with its exact answer and how that is scored.

Knows the synthetic screens. Must not know models or rungs. A scene asked two questions gives two labels with one
content hash, which is how the question's effect can be told from the image's.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from adaptive_fusion.bench.scenes import media
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.reference.screens import PROMPTS, Kind, Scene, Split, Task, make_scene
from adaptive_fusion.runner import AdaptiveRunner

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


def open_on_one_thread(model: str, policy: str) -> AdaptiveRunner:
    """A runner in a process whose tensor work keeps to one thread, so that the thread's own time is its cost."""
    torch.set_num_threads(1)
    return AdaptiveRunner.from_pretrained(model, policy=policy)
