"""Memory budgets kept: requests of every size, each with a memory budget of its own, and how many exceeded it.

    python benchmarks/memory.py [--requests 1000] [--model reference] [--policy auto] [--seed 0] [--json]

Images have random sides, no two alike, and are simple or dense; one prompt in three has up to 600 words, so that what
the language model needs is more than what the encoder does, and one answer in ten may have up to 300 tokens. The
budget of each request is drawn between what its cheapest and its dearest operating point are predicted to need,
margin included, so that most of them rule something out. A request exceeds its budget if its measured peak is more
than 2 % above; one that nothing fits, in the controller's own opinion, is counted apart. The first request of the
process is counted like any other: the libraries and kernels that it would bring into memory, several times its own
need, come with the runner's warm-up before it.
It needs a measured profile: run ``adaptive-fusion calibrate`` before.

Peaks are resident memory, so a machine that runs out of it spoils them: what the kernel takes from this process while a
request runs is missing from its peak, and what it gets back counts. ``/proc/pressure/memory`` says so.
"""

import argparse
import json
import math
import random
from statistics import median
from typing import Any

import torch

from adaptive_fusion import AdaptiveRunner, Budget
from adaptive_fusion.calibrate import relative_errors
from adaptive_fusion.commands.output import progress
from adaptive_fusion.progress import Progress, Steps, silent
from adaptive_fusion.reference.screens import PROMPTS, make_scene

TOLERANCE = 0.02
SIDES = (128, 400)
NEW_TOKENS = (2, 12)
WORDS = 600
LONG_ANSWER = (100, 300)


def keep_budgets(
    runner: AdaptiveRunner,
    requests: int,
    *,
    seed: int = 0,
    sides: tuple[int, int] = SIDES,
    tokens: tuple[int, int] = NEW_TOKENS,
    long_answers: float = 0.1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run the requests and count.

    Returns:
        Numbers of `requests`, those `unmeasured`, `infeasible` and `exceeded` by more than 2 %; of the feasible ones
        the `worst` peak / budget, the median share of the budget that was `used` and the share at which it `limited`
        the choice; `errors` of the prediction as `calibrate --check` gives them; and `over`, what is known of each that
        exceeded its budget.
    """
    rng = random.Random(seed)
    shares: list[float] = []
    pairs: list[tuple[float, float]] = []
    over: list[dict[str, Any]] = []
    counts = {"requests": requests, "unmeasured": 0, "infeasible": 0, "exceeded": 0}
    limited = 0
    steps = Steps(progress, "answer", requests)
    for index in range(requests):
        width, height = rng.randint(*sides), rng.randint(*sides)
        image = make_scene(rng.choice(("simple", "dense")), index, "eval", (400, 400)).image.resize((width, height))
        most = rng.randint(*(LONG_ANSWER if rng.random() < long_answers else tokens))
        prompt = PROMPTS["describe"] + " the" * (rng.randint(1, WORDS) if rng.random() < 1 / 3 else 0)
        _, offers = runner.offers(image, prompt, max_new_tokens=most)
        envelope = math.exp(runner.controller.state()["memory"])
        needs = [envelope * candidate.predicted.peak_memory_gb for candidate in offers]
        budget = Budget(vram_gb=rng.uniform(min(needs), 1.05 * max(needs)))
        reply = runner.chat(
            image, prompt, budget=budget, max_new_tokens=most, min_new_tokens=most // 2, do_sample=False
        )
        steps.advance()
        peak, predicted = reply.measurement.peak_memory_gb, reply.decision.predicted
        if peak <= 0.0 or predicted is None or budget.vram_gb is None:
            counts["unmeasured"] += 1
            continue
        pairs.append((predicted.peak_memory_gb, peak))
        if not reply.decision.feasible:
            counts["infeasible"] += 1
            continue
        shares.append(peak / budget.vram_gb)
        if shares[-1] > 1 + TOLERANCE:
            counts["exceeded"] += 1
            over.append({
                "image": [width, height], "rung": reply.decision.rung, "escalated": reply.decision.escalated,
                "first": reply.decision.escalation.get("first_rung"), "requested": _requested_gb(runner.device),
                "patches": reply.measurement.patches, "tokens": reply.measurement.prompt_tokens,
                "predicted": predicted.peak_memory_gb, "envelope": envelope, "peak": peak, "budget": budget.vram_gb,
            })  # fmt: skip
        limited += bool(reply.decision.rejected)
    return {
        **counts,
        "worst": max(shares, default=None),
        "used": median(shares) if shares else None,
        "limited": limited / len(shares) if shares else None,
        "errors": relative_errors(pairs) if pairs else None,
        "over": over,
    }


def _requested_gb(device: torch.device) -> float | None:
    """Peak of what was asked of a GPU's allocator, which gives it in whole blocks; None elsewhere."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.memory_stats(device)["requested_bytes.all.peak"]) / (1 << 30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.requests < 1:
        parser.error("--requests needs at least 1")
    runner = AdaptiveRunner.from_pretrained(args.model, policy=args.policy)
    if not runner.profile.samples:
        parser.error(f"{args.model} has no measured profile; run first: adaptive-fusion calibrate --model {args.model}")
    with progress(args.json) as shown:
        found = keep_budgets(runner, args.requests, seed=args.seed, progress=shown)
    if args.json:
        print(json.dumps(found))
        return 0
    print(
        f"{found['exceeded']} of {found['requests']} requests exceeded their memory budget by more than 2 %; "
        f"{found['infeasible']} had no point that fits, {found['unmeasured']} were not measured"
    )
    if found["worst"] is not None:
        print(
            f"worst peak {found['worst']:.3f} of the budget, median {found['used']:.3f}; "
            f"the budget ruled a better point out in {found['limited']:.0%}"
        )
    if found["errors"] is not None:
        e = found["errors"]
        print(
            f"prediction: median error {e['median']:.1%}, bias {e['bias']:+.1%}, 95th percentile {e['p95']:.1%} "
            f"(best constant {e['constant_p95']:.1%})"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
