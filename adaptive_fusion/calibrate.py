"""A model's costs measured on this machine.

Sits above the runner, which it drives to measure. The fit and the cache files are the package `cost`'s.
"""

import itertools
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from adaptive_fusion.budget import MAX_VRAM_GB, Budget
from adaptive_fusion.cost.fit import Sample, fit_profile
from adaptive_fusion.cost.model import SIZES, CostModel, Profile
from adaptive_fusion.cost.profiles import profile_key, save_profile
from adaptive_fusion.models.base import Adapter, Size
from adaptive_fusion.point import MIN_PIXELS, NATIVE, OperatingPoint
from adaptive_fusion.progress import Progress, Steps, silent
from adaptive_fusion.user_cache import user_cache_dir

if TYPE_CHECKING:
    from adaptive_fusion.runner import AdaptiveRunner

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
_Request = tuple[tuple[int, int], OperatingPoint, int]
"""Sides of the image, point, and tokens of the answer."""
CHECK_SIDES = ((352, 288), (224, 320), (256, 256), (184, 360), (376, 328), (304, 200), (272, 384), (320, 320))


@dataclass(frozen=True)
class Calibration:
    """A fitted profile, and how far off it is on requests of sizes and shapes that it was not fitted to.

    `errors` has, for each of encode, prefill, decode and memory, what `relative_errors` returns; it is empty if that
    was not asked for.
    """

    profile: Profile
    errors: Mapping[str, Mapping[str, float]]


def calibrate(
    runner: "AdaptiveRunner",
    *,
    repeats: int | None = None,
    check: bool = False,
    save: bool = True,
    progress: Progress = silent,
) -> Calibration:
    """Measure requests over sizes, downsampling, fusion and answer lengths, alone and in batches; fit, save and use the
    profile.

    Where measuring memory takes time, on the CPU, memory and times are measured apart. Memory comes first: requests
    that ran unmeasured leave a heap in which others take a quarter more. Elsewhere one request gives both.

    On anything faster than a CPU images are as large as those of use, up to 4 megapixels and the processor's limit.

    Args:
        runner: The model to measure; its controller starts anew afterwards.
        repeats: Rounds over all requests for their memory and, where that is measured apart, as many for their times,
            after one to warm up. None is 2 on a CPU and 1 elsewhere.
        check: Also measure requests to judge the profile by.
        save: Keep the profile in the user's cache directory, where `find_profile` looks.
        progress: See `Progress`; a step is a request.
    """
    repeats = _repeats(runner.adapter, repeats)
    plan, unseen = _requests(runner.adapter), _check_requests(runner.adapter) if check else []
    samples: list[Sample] = []
    held_out: list[Sample] = []
    apart = not runner.meter.free_of_charge
    # In rounds, so that no request follows its like. The first brings everything to where later ones find it: the heap
    # on a CPU, elsewhere the kernels of each size, which are loaded when it first comes.
    rounds = [(_first(runner.adapter, plan), True, None), *[(plan, True, samples)] * repeats, (unseen, True, held_out)]
    if apart:
        rounds += [*[(plan, False, samples)] * repeats, (unseen, False, held_out)]
    together, shapes, answers = _batches(runner.adapter), _shapes(runner.adapter), _answers(runner.adapter)
    steps = Steps(progress, "calibrate", sum(len(requests) for requests, *_ in rounds) + repeats * len(together))
    images = itertools.count()
    order = random.Random(0)
    # What fusion takes is measured on every model: a profile outlives the policy that the runner has.
    with runner.adapter.built(point for requests in (plan, unseen) for _, point, _ in requests):
        for requests, memory, kept in rounds:
            for sides, point, tokens in order.sample(requests, len(requests)):
                # A new image each time, as requests bring them: one that was there before takes less.
                image = _scene(next(images), sides)
                found = _measured(runner, image, point, tokens, memory=memory, apart=apart)
                if kept is not None:
                    kept.append(found)
                steps.advance()
        for _ in range(repeats):
            for number, (rows, first, left) in enumerate(together):
                images_of = [_scene(next(images), shapes[(first + row) % len(shapes)]) for row in range(rows)]
                point = runner.adapter.restrict(replace(NATIVE, downsample=left))[0]
                samples.append(_measured_together(runner, images_of, point, answers[number % 2]))
                steps.advance()
    profile = fit_profile(samples, profile_key(runner.adapter))
    if save:
        save_profile(user_cache_dir(os.environ), profile)
    runner.use_profile(profile)
    return Calibration(profile, _errors(profile, held_out))


def count(runner: "AdaptiveRunner", repeats: int | None = None) -> int:
    """How many requests and batches `calibrate` measures, without those of a check."""
    repeats, plan = _repeats(runner.adapter, repeats), _requests(runner.adapter)
    rounds = repeats + (0 if runner.meter.free_of_charge else repeats)
    return (1 + rounds) * len(plan) + repeats * len(_batches(runner.adapter))


def _repeats(adapter: Adapter, repeats: int | None) -> int:
    return repeats if repeats is not None else 2 if adapter.device.type == "cpu" else 1


def _first(adapter: Adapter, plan: list[_Request]) -> list[_Request]:
    """What is run before anything is measured: everything. Elsewhere than on a CPU with the shorter answer, as there it
    is for the kernels alone."""
    if adapter.device.type == "cpu":
        return plan
    return [(sides, point, _answers(adapter)[0]) for sides, point, _ in plan]


def _answers(adapter: Adapter) -> tuple[int, int]:
    return ANSWERS if adapter.device.type == "cpu" else SHORT_ANSWERS


def _scale(adapter: Adapter) -> float:
    """How much larger images are than they are listed."""
    if adapter.device.type == "cpu":
        return 1.0
    most = max(width * height for width, height in SHAPES)
    return max(1.0, math.sqrt(min(LARGEST, adapter.native_pixels(Size(1, 8192, 8192))) / most))


def _scaled(adapter: Adapter, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    scale = _scale(adapter)
    return [(round(scale * width), round(scale * height)) for width, height in shapes]


def _shapes(adapter: Adapter) -> Sequence[tuple[int, int]]:
    """`SHAPES`, of which there are fewer and larger ones on anything faster than a CPU."""
    if adapter.device.type == "cpu":
        return SHAPES
    # Two of three: what is measured there has to be done within a minute.
    return _scaled(adapter, [sides for index, sides in enumerate(SHAPES) if index % 3 != 1])


def _batches(adapter: Adapter) -> Sequence[tuple[int, int, float]]:
    """See `BATCHES`, the first of which on anything faster than a CPU; none where requests cannot share a pass."""
    return (BATCHES if adapter.device.type == "cpu" else BATCHES[:FEWER]) if adapter.packed else ()


def _scene(seed: int, sides: tuple[int, int]) -> Any:
    """An image of these sides that no other seed has."""
    from adaptive_fusion.reference.screens import make_scene

    return make_scene("dense" if seed % 2 else "simple", seed, "train", (400, 400)).image.resize(sides)


def _measured_together(runner: "AdaptiveRunner", images: Sequence[Any], point: OperatingPoint, tokens: int) -> Sample:
    """The times of requests in one batch; the peak is left out, as it is that of the whole batch."""
    work, took = runner.work_together([(image, "Describe.") for image in images], point, tokens)
    return point, work, replace(took, peak_memory_gb=0.0)


def _measured(
    runner: "AdaptiveRunner", image: Any, point: OperatingPoint, tokens: int, *, memory: bool, apart: bool
) -> Sample:  # fmt: skip
    """One request's peak and times; where they are measured `apart` only one of these."""
    # The memory budget is never reached; without one the peak may go unmeasured.
    budget = Budget(vram_gb=MAX_VRAM_GB) if memory else None
    reply = runner.chat(
        image, "Describe.", point=point, budget=budget, max_new_tokens=tokens, min_new_tokens=tokens
    )  # fmt: skip
    took = reply.measurement
    if memory and apart:
        took = replace(
            took, preprocess_ms=0.0, encode_ms=0.0, prefill_ms=0.0, decode_ms=0.0, ttft_ms=0.0, latency_ms=0.0
        )
    return point, runner.work(image, "Describe.", point, took.new_tokens), took


def _errors(profile: Profile, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    model = CostModel(profile)
    found: dict[str, list[tuple[float, float]]] = {stage: [] for stage in SIZES}
    for point, work, took in samples:
        said = model.predict(point, work)
        for stage, predicted, measured in (
            ("encode", said.encode_ms, took.ttft_ms - took.prefill_ms),
            ("prefill", said.prefill_ms, took.prefill_ms),
            ("decode", said.decode_ms, took.decode_ms),
            ("memory", said.peak_memory_gb, took.peak_memory_gb),
        ):
            if measured > 0.0:
                found[stage].append((predicted, measured))
    return {stage: relative_errors(pairs) for stage, pairs in found.items() if pairs}


def _check_requests(adapter: Adapter) -> list[_Request]:
    return [
        (sides, point, (6, 16)[index % 2])
        for sides in _scaled(adapter, CHECK_SIDES)
        for index, point in enumerate(_check_points(adapter, sides))
    ]


def _check_points(adapter: Adapter, sides: tuple[int, int]) -> list[OperatingPoint]:
    pixels = sides[0] * sides[1]
    points = [
        NATIVE,
        replace(NATIVE, downsample=0.5),
        OperatingPoint("gated", 12, adapter_rank=8),
        OperatingPoint("weighted", 6, 0.5, max(MIN_PIXELS, pixels // 3), 4),
    ]
    return list(dict.fromkeys(adapter.restrict(point)[0] for point in points))


def relative_errors(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of pairs of predicted and measured: `median` and `p95` of |predicted / measured - 1|, `bias` (its median with the
    sign), and `constant_p95`, the 95th percentile that the best constant would have (the one for which it is least).
    """

    def high(errors: list[float]) -> float:
        return sorted(errors)[math.ceil(0.95 * len(errors)) - 1]

    errors = [abs(predicted / measured - 1.0) for predicted, measured in pairs]
    least, most = (limit(measured for _, measured in pairs) for limit in (min, max))
    steps = [least * (most / least) ** (step / 400) for step in range(401)]
    best = min(high([abs(constant / measured - 1.0) for _, measured in pairs]) for constant in steps)
    bias = median(predicted / measured - 1.0 for predicted, measured in pairs)
    return {"median": median(errors), "bias": bias, "p95": high(errors), "constant_p95": best}


def _requests(adapter: Adapter) -> list[_Request]:
    """Every size untouched, downsampled and at a point that does more, most of these on fewer pixels."""
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
    for index, sides in enumerate(_shapes(adapter)):
        more, part = others[index % len(others)]
        few = max(MIN_PIXELS, sides[0] * sides[1] // part) if part > 1 else None
        for point in (NATIVE, replace(NATIVE, downsample=(0.5, 0.25)[index % 2]), replace(more, max_pixels=few)):
            found[sides, adapter.restrict(point)[0]] = None
    answers = _answers(adapter)
    return [(sides, point, answers[index // 2 % 2]) for index, (sides, point) in enumerate(found)]
