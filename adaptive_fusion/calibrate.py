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
from adaptive_fusion.cost import plan
from adaptive_fusion.cost.estimate import cache_gb, model_shape
from adaptive_fusion.cost.fit import Sample, fit_profile
from adaptive_fusion.cost.model import SIZES, CostModel, Profile
from adaptive_fusion.cost.profiles import profile_key, save_profile
from adaptive_fusion.models.base import Adapter
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.progress import Progress, Steps, silent
from adaptive_fusion.user_cache import user_cache_dir

if TYPE_CHECKING:
    from adaptive_fusion.runner import AdaptiveRunner


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
    asked, unseen = plan.requests(runner.adapter), plan.check_requests(runner.adapter) if check else []
    samples: list[Sample] = []
    held_out: list[Sample] = []
    apart = not runner.meter.free_of_charge
    # In rounds, so that no request follows its like. The first brings everything to where later ones find it: the heap
    # on a CPU, elsewhere the kernels of each size, which are loaded when it first comes.
    rounds = [
        (plan.first(runner.adapter, asked), True, None),
        *[(asked, True, samples)] * repeats,
        (unseen, True, held_out),
    ]
    if apart:
        rounds += [*[(asked, False, samples)] * repeats, (unseen, False, held_out)]
    together = plan.batches(runner.adapter)
    shapes, answers = plan.shapes(runner.adapter), plan.answers(runner.adapter)
    steps = Steps(progress, "calibrate", sum(len(requests) for requests, *_ in rounds) + repeats * len(together))
    images = itertools.count()
    order = random.Random(0)
    # What fusion takes is measured on every model: a profile outlives the policy that the runner has.
    with runner.adapter.built(each.point for requests in (asked, unseen) for each in requests):
        for requests, memory, kept in rounds:
            for request in order.sample(requests, len(requests)):
                # A new image each time, as requests bring them: one that was there before takes less.
                image = _scene(next(images), request.sides) if request.sides is not None else None
                found = _measured(runner, image, request, memory=memory, apart=apart)
                if kept is not None:
                    kept.append(found)
                steps.advance()
        for _ in range(repeats):
            for number, (rows, first, left) in enumerate(together):
                images_of = [_scene(next(images), shapes[(first + row) % len(shapes)]) for row in range(rows)]
                point = runner.adapter.restrict(replace(NATIVE, downsample=left))[0]
                samples.append(_measured_together(runner, images_of, point, answers[number % 2]))
                steps.advance()
    cache = cache_gb(model_shape(runner.adapter), runner.adapter.dtype.itemsize)
    profile = fit_profile(samples, profile_key(runner.adapter), cache)
    if save:
        save_profile(user_cache_dir(os.environ), profile)
    runner.use_profile(profile)
    return Calibration(profile, _errors(profile, held_out))


def count(runner: "AdaptiveRunner", repeats: int | None = None) -> int:
    """How many requests and batches `calibrate` measures, without those of a check."""
    repeats, asked = _repeats(runner.adapter, repeats), plan.requests(runner.adapter)
    rounds = repeats + (0 if runner.meter.free_of_charge else repeats)
    return (1 + rounds) * len(asked) + repeats * len(plan.batches(runner.adapter))


def _repeats(adapter: Adapter, repeats: int | None) -> int:
    return repeats if repeats is not None else 2 if adapter.device.type == "cpu" else 1


def _scene(seed: int, sides: tuple[int, int]) -> Any:
    """An image of these sides that no other seed has."""
    from adaptive_fusion.reference.screens import make_scene

    return make_scene("dense" if seed % 2 else "simple", seed, "train", (400, 400)).image.resize(sides)


def _measured_together(runner: "AdaptiveRunner", images: Sequence[Any], point: OperatingPoint, tokens: int) -> Sample:
    """The times of requests in one batch; the peak is left out, as it is that of the whole batch."""
    work, took = runner.work_together([(image, "Describe.") for image in images], point, tokens)
    return point, work, replace(took, peak_memory_gb=0.0)


def _measured(runner: "AdaptiveRunner", image: Any, request: plan.Request, *, memory: bool, apart: bool) -> Sample:
    """One request's peak and times; where they are measured `apart` only one of these."""
    # The memory budget is never reached; without one the peak may go unmeasured.
    budget = Budget(vram_gb=MAX_VRAM_GB) if memory else None
    prompt, point, exactly = request.prompt, request.point, {"min_new_tokens": request.tokens}
    reply = runner.chat(image, prompt, point=point, budget=budget, max_new_tokens=request.tokens, **exactly)
    took = reply.measurement
    if memory and apart:
        took = replace(
            took, preprocess_ms=0.0, encode_ms=0.0, prefill_ms=0.0, decode_ms=0.0, ttft_ms=0.0, latency_ms=0.0
        )
    return point, runner.work(image, prompt, point, took.new_tokens), took


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
            if measured > 0.0 and (stage != "encode" or work.patches):  # a text alone has nothing to encode
                found[stage].append((predicted, measured))
    return {stage: relative_errors(pairs) for stage, pairs in found.items() if pairs}


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
