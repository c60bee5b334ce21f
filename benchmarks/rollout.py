"""How rollouts decide: false alarms, how soon a worse canary is found, how surely a better one rises, what it costs.

    python benchmarks/rollout.py [--runs 400] [--requests 5000] [--jobs 2] [--seed N] [--json]
    python benchmarks/rollout.py --runs 0      # only what it costs

Requests are drawn at random, from a seed that the clock gives and the output tells; everything else is what servers
run: the course of an experiment with all default guardrails, looked at after every request, the price of a miss moved
by the controller's own law. Times are CPU times of one thread. Exit code 1 if a figure falls short of its target.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from adaptive_fusion.control import law
from adaptive_fusion.control.estimators import Price
from adaptive_fusion.rollout.assignment import CANARY, CONTROL
from adaptive_fusion.rollout.conversations import conversation_key
from adaptive_fusion.rollout.course import Course
from adaptive_fusion.rollout.events import Outcome
from adaptive_fusion.rollout.experiment import PROMOTED, ROLLED_BACK, RUNNING, Experiment
from adaptive_fusion.rollout.live import Live

LABELLED, RATED = 0.1, 0.1
"""Shares of requests that get a shadow label and a rating."""
ATTAINMENT = 0.95
IMAGES = tuple(f"data:image/png;base64,{number:08d}" + 50_000 * "A" for number in range(16))


@dataclass(frozen=True)
class Arm:
    """What requests of an arm come to: probabilities, and of quality the mean loss."""

    misses: float = 0.05
    errors: float = 0.002
    memory: float = 0.001
    escalations: float = 0.2
    liked: float = 0.8
    loss: float = 0.05


@dataclass(frozen=True)
class Run:
    """How one ended: its status, the canary's requests, and all of them."""

    status: str
    canary: int
    requests: int
    why: str


def simulate(kind: str, canary: Arm, requests: int, seed: int) -> Run:
    """One experiment; it ends with the `requests` of both arms together, if not before."""
    draws = random.Random(seed)
    steps = {"steps": (0.5,), "least": ()} if kind == "ab" else {}
    course = Course(Experiment("try", kind, "new", **steps))  # type: ignore[arg-type]
    arms = {CONTROL: (Arm(), Price()), CANARY: (canary, Price())}
    why = ""
    for _ in range(requests):
        name = CANARY if draws.random() < course.share else CONTROL
        change = course.on(Outcome(name, _outcome(*arms[name], draws)))
        why = change.why if change is not None else why
        if course.status != RUNNING:
            break
    return Run(course.status, course.requests[CANARY], sum(course.requests.values()), why)


def _outcome(arm: Arm, price: Price, draws: random.Random) -> dict[str, float]:
    late, failed = draws.random() < arm.misses, draws.random() < arm.errors
    price.move(ATTAINMENT, missed=late)
    found = {
        "deadline_misses": float(late),
        "errors": float(failed),
        "dead": float(failed),
        "out_of_memory": float(draws.random() < arm.memory),
        "escalations": float(draws.random() < arm.escalations),
        "miss_price": math.log(price.value / law.PRICE_MIN) / math.log(law.PRICE_MAX / law.PRICE_MIN),
    }
    if draws.random() < RATED:
        found["ratings"] = float(draws.random() < arm.liked)
    if draws.random() < LABELLED:
        found["quality"] = 1.0 - min(draws.expovariate(1.0 / arm.loss), 1.0)
    return found


CASES: dict[str, tuple[str, Arm]] = {
    "no difference, half each": ("ab", Arm()),
    "no difference, canary": ("canary", Arm()),
    "misses 5 to 10 %, half each": ("ab", Arm(misses=0.10)),
    "misses 5 to 10 %, canary": ("canary", Arm(misses=0.10)),
    "dead, half each": ("ab", Arm(errors=1.0)),
    "dead, canary": ("canary", Arm(errors=1.0)),
    "better, canary": ("canary", Arm(misses=0.03, escalations=0.15, liked=0.85, loss=0.04)),
}


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def figures(runs: int, requests: int, jobs: int, seed: int) -> dict[str, dict[str, float]]:
    """By case: shares of runs taken back and promoted, and the canary's requests until then."""
    found: dict[str, dict[str, float]] = {}
    if not runs:
        return found
    with ProcessPoolExecutor(jobs) as pool:
        for index, (name, (kind, canary)) in enumerate(CASES.items()):
            one = partial(simulate, kind, canary, 2 * requests)
            first = seed + 100_000 * index
            ended = list(pool.map(one, range(first, first + runs), chunksize=4))
            back = [run for run in ended if run.status == ROLLED_BACK]
            until = [run.canary if run.status == ROLLED_BACK else math.inf for run in ended]
            found[name] = {
                "runs": runs,
                "taken_back": len(back) / runs,
                "promoted": sum(run.status == PROMOTED for run in ended) / runs,
                "canary_requests_median": min(percentile(until, 0.5), 1e9),
                "canary_requests_p90": min(percentile(until, 0.9), 1e9),
                "canary_requests_most": min(percentile(until, 1.0), 1e9),
            }
            print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
    return found


def cost_us(requests: int = 4000, repeats: int = 5) -> dict[str, float]:
    """CPU time of a request's part in an experiment, in microseconds, the median of some repeats: which conversation it
    belongs to and its arm; the outcome with all that follows from it; both."""
    runs = [_cost_us(requests) for _ in range(repeats)]
    return {name: median(run[name] for run in runs) for name in runs[0]}


def _cost_us(requests: int) -> dict[str, float]:
    draws, price, arm = random.Random(0), Price(), Arm()
    asked = [
        (_asking(index), f"{draws.getrandbits(128):032x}", _outcome(arm, price, draws)) for index in range(requests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        live = Live(Path(folder) / "rollout.db")
        live.start(Experiment("try", "ab", "new", steps=(0.5,), least=()))
        begun = time.thread_time()
        for messages, request, outcome in asked:
            conversation, follows = conversation_key(messages)
            live.finished(live.assign(conversation=conversation, follows=follows), request, outcome)
        both = time.thread_time()
        for messages, _, _ in asked:
            conversation, follows = conversation_key(messages)
            live.assign(conversation=conversation, follows=follows)
        ended = time.thread_time()
        live.store.close()
    total, assign = (both - begun) / requests * 1e6, (ended - both) / requests * 1e6
    return {"assign_us": assign, "log_us": total - assign, "total_us": total}


def _asking(index: int) -> list[dict[str, Any]]:
    """The messages of a request with an image, a conversation of its own."""
    image = {"type": "image_url", "image_url": {"url": IMAGES[index % len(IMAGES)]}}
    return [{"role": "user", "content": [image, {"type": "text", "text": f"What is shown? {index}"}]}]


def shortfalls(found: dict[str, dict[str, float]], cost: dict[str, float]) -> list[str]:
    """What misses its target."""
    targets = (
        ("no difference, half each", "taken_back", 0.05, False),
        ("no difference, canary", "taken_back", 0.05, False),
        ("misses 5 to 10 %, half each", "canary_requests_p90", 1200, False),
        ("dead, half each", "canary_requests_most", 10, False),
        ("dead, canary", "canary_requests_most", 10, False),
        ("better, canary", "promoted", 0.95, True),
    )
    said = [
        f"{case}: {figure} is {found[case][figure]:g}; expected at {'least' if least else 'most'} {target:g}"
        for case, figure, target, least in targets
        if found and (found[case][figure] < target) is least and found[case][figure] != target
    ]
    if cost["total_us"] > 100.0:
        said.append(f"assigning and logging take {cost['total_us']:.0f} us; expected at most 100")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--requests", type=int, default=5000, help="of each arm")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, help="from the clock if left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    cost = cost_us()
    found = figures(options.runs, options.requests, options.jobs, seed)
    short = shortfalls(found, cost)
    if options.json:
        print(json.dumps({"seed": seed, "cases": found, "cost": cost, "shortfalls": short}))
    else:
        print(f"seed {seed}")
        for name, row in found.items():
            print(f"{name:30} " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        print("  ".join(f"{key} {value:.1f}" for key, value in cost.items()))
        for line in short:
            print(f"falls short: {line}")
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
