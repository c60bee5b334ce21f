"""Which requests a model's costs are measured by: images of many sizes, points, lengths of prompts and answers.

Knows what an adapter can run and where it runs. Must not know how a request is run or measured.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from adaptive_fusion.models.base import Adapter, Size
from adaptive_fusion.point import MIN_PIXELS, NATIVE, OperatingPoint

SHAPES = (
    (384, 384), (128, 128), (240, 368), (272, 272), (336, 160), (208, 304), (400, 248), (176, 192),
    (288, 256), (144, 240), (360, 312), (220, 220), (312, 392), (264, 136), (192, 192), (344, 344),
    (96, 64), (64, 112), (112, 88), (128, 136),
)  # fmt: skip
"""Width and height of the images measured, all different as real ones are: what a request takes also depends on what
requests of other sizes left in the heap. The last are small: what every request takes, of whatever size, shows there.
"""
LARGEST = 4_000_000
"""Pixels of the largest image where the model computes on something faster than a CPU; all others grow with it. There
the small ones take no less than launching what they need, and say nothing of the large ones."""
ANSWERS = (4, 24)
SHORT_ANSWERS = (2, 8)
"""Tokens of answers on a CPU, and elsewhere, where a token takes as long as the host takes to launch it."""
BATCHES = ((4, 0, 1.0), (2, 5, 1.0), (3, 11, 0.5), (4, 7, 0.5), (2, 16, 0.5), (4, 13, 1.0), (2, 10, 0.25), (3, 2, 1.0))
"""Rows, the first of their `SHAPES`, and what is left of their tokens' grid: requests that run in one pass, of like and
of unlike sizes."""
FEWER = 6
"""Of these, on anything faster than a CPU."""
CHECK_SIDES = ((352, 288), (224, 320), (256, 256), (184, 360), (376, 328), (304, 200), (272, 384), (320, 320))
SAID = (
    (None, 40),
    (0, 300),
    (None, 160),
    (7, 150),
    (None, 600),
    (16, 900),
    (None, 1500),
    (3, 600),
    (None, 300),
    (9, 60),
)
"""Which of the shapes, or no image at all, and words of the prompt: where the language model needs more memory than the
encoder, and a text without an image."""
CHECK_SAID = ((None, 90), (1, 450), (None, 900), (5, 1200))
LONGER = 4
"""Prompts are so many times as long where the model computes on something faster than a CPU."""


class Request(NamedTuple):
    """One of them: sides of its image in pixels or None, operating point, tokens of the answer, and how many words the
    prompt has beside the question."""

    sides: tuple[int, int] | None
    point: OperatingPoint
    tokens: int
    words: int = 0

    @property
    def prompt(self) -> str:
        """What is asked."""
        return " ".join(["Describe.", *["the"] * self.words])


def requests(adapter: Adapter) -> list[Request]:
    """Every size untouched, downsampled and at a point that does more, most of these on fewer pixels; and those with
    longer prompts."""
    others = (
        (OperatingPoint("gated", 12, adapter_rank=8), 1),
        (OperatingPoint("weighted", 6, 0.5, adapter_rank=4), 2),
        (NATIVE, 4),
        (OperatingPoint("gated", 12, 0.5, adapter_rank=8), 1),
        (OperatingPoint("weighted", 6, 0.5, adapter_rank=4), 4),
        (OperatingPoint("weighted", 6, adapter_rank=4), 1),
        (OperatingPoint("gated", 12, 0.5, adapter_rank=8), 3),
        (OperatingPoint("weighted", 6, 0.25, adapter_rank=4), 8),
    )
    found: dict[tuple[tuple[int, int], OperatingPoint], None] = {}
    for index, sides in enumerate(shapes(adapter)):
        more, part = others[index % len(others)]
        few = max(MIN_PIXELS, sides[0] * sides[1] // part) if part > 1 else None
        for point in (NATIVE, replace(NATIVE, downsample=(0.5, 0.25)[index % 2]), replace(more, max_pixels=few)):
            found[sides, adapter.restrict(point)[0]] = None
    tokens = answers(adapter)
    shown = [Request(sides, point, tokens[index // 2 % 2]) for index, (sides, point) in enumerate(found)]
    return [*shown, *_said(adapter, SAID, shapes(adapter), tokens)]


def check_requests(adapter: Adapter) -> list[Request]:
    """Others to judge a profile by."""
    sides = _scaled(adapter, CHECK_SIDES)
    shown = [
        Request(each, point, (6, 16)[index % 2])
        for each in sides
        for index, point in enumerate(_check_points(adapter, each))
    ]
    return [*shown, *_said(adapter, CHECK_SAID, sides, (6, 16))]


def _said(
    adapter: Adapter,
    listed: Sequence[tuple[int | None, int]],
    shapes: Sequence[tuple[int, int]],
    tokens: tuple[int, int],
) -> list[Request]:
    """Requests with long prompts, alone and about an image, which is pooled in every other."""
    most = int(getattr(adapter.model.config.get_text_config(), "max_position_embeddings", 0) or 4096) // 2
    longer = 1 if adapter.device.type == "cpu" else LONGER
    found = []
    for index, (shape, words) in enumerate(listed):
        sides = None if shape is None else shapes[shape % len(shapes)]
        pooled = replace(NATIVE, downsample=0.5) if sides is not None and index % 4 == 1 else NATIVE
        found.append(Request(sides, adapter.restrict(pooled)[0], tokens[index // 2 % 2], min(longer * words, most)))
    return found


def first(adapter: Adapter, plan: list[Request]) -> list[Request]:
    """What is run before anything is measured: everything. Elsewhere than on a CPU with the shorter answer, as there it
    is for the kernels alone."""
    if adapter.device.type == "cpu":
        return plan
    return [each._replace(tokens=answers(adapter)[0]) for each in plan]


def batches(adapter: Adapter) -> Sequence[tuple[int, int, float]]:
    """See `BATCHES`, the first of which on anything faster than a CPU; none where requests cannot share a pass."""
    return (BATCHES if adapter.device.type == "cpu" else BATCHES[:FEWER]) if adapter.packed else ()


def shapes(adapter: Adapter) -> Sequence[tuple[int, int]]:
    """`SHAPES`, of which there are fewer and larger ones on anything faster than a CPU."""
    if adapter.device.type == "cpu":
        return SHAPES
    # Half of them: what is measured there has to be done within a minute.
    return _scaled(adapter, SHAPES[::2])


def answers(adapter: Adapter) -> tuple[int, int]:
    """Tokens of the short and of the long answers."""
    return ANSWERS if adapter.device.type == "cpu" else SHORT_ANSWERS


def _check_points(adapter: Adapter, sides: tuple[int, int]) -> list[OperatingPoint]:
    pixels = sides[0] * sides[1]
    points = [
        NATIVE,
        replace(NATIVE, downsample=0.5),
        OperatingPoint("gated", 12, adapter_rank=8),
        OperatingPoint("weighted", 6, 0.5, max(MIN_PIXELS, pixels // 3), 4),
    ]
    return list(dict.fromkeys(adapter.restrict(point)[0] for point in points))


def _scaled(adapter: Adapter, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    scale = _scale(adapter)
    return [(round(scale * width), round(scale * height)) for width, height in shapes]


def _scale(adapter: Adapter) -> float:
    """How much larger images are than they are listed."""
    if adapter.device.type == "cpu":
        return 1.0
    most = max(width * height for width, height in SHAPES)
    return max(1.0, math.sqrt(min(LARGEST, adapter.native_pixels(Size(1, 8192, 8192))) / most))
