"""A thousand mixed requests in batches: each answer is the one that the request has alone, but for ties of logits.

Sizes, texts without an image, clips, several images, plans (the policy's own, and points given), lengths and questions
are drawn; a batch is whatever four come one after the other.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from batches import TIE, first_difference, gap, paying, steady, together

from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.prepared import Prepared, Turn
from adaptive_fusion.reference.screens import make_scene
from adaptive_fusion.runner import AdaptiveRunner

QUESTIONS = ("Describe the screen.", "Read the text.", "What is this?", "How many?", "Is anything red? Say why.")
POINTS = (
    None,
    None,
    NATIVE,
    OperatingPoint(downsample=0.5),
    OperatingPoint("weighted", 6, 0.5, adapter_rank=4),
    OperatingPoint("gated", 12, adapter_rank=8, max_pixels=40_000),
    OperatingPoint("top", downsample=0.25),
)
EQUAL = 0.995
ROWS = 4


def drawn(runner: AdaptiveRunner, number: int) -> Prepared:
    """One of all requests."""
    rng = random.Random(number)
    kind = rng.choice(("none", "one", "one", "one", "two", "clip"))
    side = rng.choice((64, 96, 128, 200, 288))

    def screen(of: str) -> Any:
        return make_scene(of, rng.randrange(10**6), "train", (64, side))

    media: Any = {
        "none": lambda: None,
        "one": lambda: screen(rng.choice(("simple", "dense"))).image,
        "two": lambda: [screen("simple").image, screen("dense").image],
        "clip": lambda: _clip(screen("clip")),
    }[kind]()
    point = rng.choice(POINTS)
    return runner.prepared(
        media, rng.choice(QUESTIONS), point=point, max_new_tokens=rng.choice((1, 4, 12, 24)), do_sample=False
    )


def _clip(scene: Any) -> Any:
    import numpy as np

    from adaptive_fusion.media.clips import Video

    frames = np.stack([np.asarray(frame) for frame in scene.frames])
    return Video(frames, tuple(i / 2 for i in range(len(frames))), len(frames) / 2, len(frames))


def test_answers_in_batches_are_those_alone(
    reference_model: Any, processor: Any, share_of: Callable[[int], int]
) -> None:
    # Prompts of like length share a prefill, others have one of their own.
    profile = replace(paying(), prefill=(50.0, 1.0, 0.0))
    runner = steady(
        AdaptiveRunner(reference_model, processor, policy="reference-balanced", profile=profile, escalate=False)
    )
    sizes: Counter[int] = Counter()
    same, ties, others = 0, [], []
    for start in range(0, share_of(1000), ROWS):
        calls = [drawn(runner, start + row) for row in range(ROWS)]
        rows = together([Turn(call) for call in calls])
        for number, (call, row) in enumerate(zip(calls, rows, strict=True), start):
            sizes[row.decision.batch] += 1
            if row.decision.batch == 1:
                continue
            alone = runner.prepared(
                call.call.media, call.call.prompt, point=row.decision.point,
                max_new_tokens=call.call.arguments.most_new_tokens(0), do_sample=False,
            ).chat()  # fmt: skip
            place = first_difference(alone.token_ids, row.token_ids)
            if place < 0 and (row.text, row.finish_reason) == (alone.text, alone.finish_reason):
                same += 1
                continue
            apart = gap(runner, call.request.messages, alone, place)
            (ties if apart < TIE else others).append((number, row.decision.point.name, place, apart))
    batched = same + len(ties) + len(others)
    print(f"{batched} in batches {dict(sizes)}: {same} the same, ties of logits {ties}, others {others}")
    assert batched >= 0.9 * sum(sizes.values())
    assert not others
    assert same >= EQUAL * batched or len(ties) <= 1
