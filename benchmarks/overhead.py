"""What the runner itself costs: `native` beside ``model.generate``, and the time of a decision.

A request of 1,024 patches and 40 new tokens on the embedded reference model, in pairs that take turns at going first;
the overhead is the median over pairs of the relative difference. Run it on an otherwise idle machine:

    python benchmarks/overhead.py [--pairs 20] [--json]
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from PIL import Image

from adaptive_fusion import AdaptiveRunner, Budget, measure_complexity
from adaptive_fusion.control.controller import Controller
from adaptive_fusion.control.planner import Planner
from adaptive_fusion.control.request_info import TEMPLATE_TOKENS, RequestInfo
from adaptive_fusion.cost.lengths import LengthModel
from adaptive_fusion.cost.model import CostModel
from adaptive_fusion.models import Size
from adaptive_fusion.reference.screens import PROMPTS, make_scene

NEW_TOKENS = 40
SIZES = {"1080p": (1920, 1080), "4K": (3840, 2160)}


def timed_ms(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def runner_overhead(pairs: int) -> dict[str, float]:
    """Medians in milliseconds and the relative overhead of the drop-in `generate` and of the bypass."""
    runner = AdaptiveRunner.from_pretrained("reference", policy="native")
    image = make_scene("dense", 0, "eval", (256, 256)).image  # 32 x 32 patches of 8 pixels
    text = runner.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS["describe"]}]}],
        add_generation_prompt=True,
    )
    inputs = dict(runner.processor(text=[text], images=[image], return_tensors="pt"))
    patches = int(inputs["image_grid_thw"].prod())
    if patches != 1024:
        raise SystemExit(f"the request has {patches} patches; expected 1024")
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    calls = {
        "model": lambda: runner.model.generate(**inputs, **limits),
        "runner": lambda: runner.generate(**inputs, **limits),
    }
    tokens = {name: call() for name, call in calls.items()}  # also the warm-up
    if not torch.equal(tokens["model"], tokens["runner"]):
        raise SystemExit("the runner's tokens are not the model's")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(pairs):
        for name in sorted(calls, reverse=bool(index % 2)):
            times[name].append(timed_ms(calls[name]))
    shares = [r / m - 1 for r, m in zip(times["runner"], times["model"], strict=True)]
    low, _, high = quantiles(shares, n=4)
    return {
        "pairs": pairs,
        "patches": patches,
        "new_tokens": NEW_TOKENS,
        "model_ms": median(times["model"]),
        "runner_ms": median(times["runner"]),
        "overhead": median(shares),
        "overhead_quartile_low": low,
        "overhead_quartile_high": high,
    }


def decision_ms(repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of features, of features + route + plan, and of `decide` with the medium's conversion."""
    runner = AdaptiveRunner.from_pretrained("reference", policy="reference-balanced", budget=Budget(latency_ms=500))
    cost = CostModel(runner.profile)
    planner = Planner(runner.adapter, runner.policy, cost, Controller(), LengthModel())
    prompt = PROMPTS["describe"]
    rng = np.random.default_rng(0)
    found = {}
    for name, (width, height) in SIZES.items():
        screen = np.asarray(make_scene("dense", 1, "eval", (384, 384)).image.resize((width, height)))
        array = (screen.astype(np.int16) + rng.integers(-6, 7, (height, width, 1))).clip(0, 255).astype(np.uint8)
        size = Size(1, height, width)
        for form, medium in (("PIL image", Image.fromarray(array)), ("array", array)):

            def plan(medium: Any = medium, size: Size = size) -> None:
                complexity = measure_complexity(medium)
                info = RequestInfo(complexity.kind, [size], [complexity], prompt, 256, TEMPLATE_TOKENS)
                planner.decide(info, runner.budget)

            steps: dict[str, Callable[[], Any]] = {
                "features": partial(measure_complexity, medium),
                "features + route + plan": plan,
                "decide, conversion included": partial(runner.decide, medium, prompt),
            }
            for call in steps.values():
                call()
            found[f"{name} {form}"] = {
                step: median(timed_ms(call) for _ in range(repeats)) for step, call in steps.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=50, help="decisions per size and form")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error("--pairs needs at least 2")
    torch.set_num_threads(1)
    result = {"runner": runner_overhead(args.pairs), "decision_ms": decision_ms(args.repeats)}
    if args.json:
        print(json.dumps(result))
        return
    run = result["runner"]
    low, middle, high = (100 * run[key] for key in ("overhead_quartile_low", "overhead", "overhead_quartile_high"))
    print(f"{run['patches']} patches, {run['new_tokens']} new tokens, median of {run['pairs']} pairs:")
    print(f"  model.generate {run['model_ms']:.1f} ms, runner.generate {run['runner_ms']:.1f} ms")
    print(f"  overhead {middle:+.2f} % (quartiles {low:+.2f} to {high:+.2f} %)")
    for name, steps in result["decision_ms"].items():
        print(f"{name}: " + ", ".join(f"{step} {value:.2f} ms" for step, value in steps.items()))


if __name__ == "__main__":
    main()
