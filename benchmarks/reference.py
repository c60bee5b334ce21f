"""What the reference policies keep of the reference model's own quality, and at which share of its time, on scenes that
were never drawn before (a seed from the clock unless one is given; it is printed).

Each draw has as many scenes of every kind; traffic is half simple screens, the rest dense ones, text and clips in equal
parts. Every arm answers every scene, in turns; an arm is a policy as it ships, `escalation` (everything starts at the
cheap plan, no router, and goes on where the model is not sure) or a point such as gated12r8@1. Intervals are paired
bootstraps by scene.

    python benchmarks/reference.py [--model FOLDER] [--scenes 100] [--draws 3] [--seed N] [--arms ...] [--jobs 2]
        [--rows FILE]

With `--rows` what was answered is kept in that file, and the same command with the same seed goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from adaptive_fusion import AdaptiveRunner
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import METRIC_OF_TASK, media
from adaptive_fusion.evaluation.statistics import Interval, bootstrap_diff
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.escalation import Escalation
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.reference.screens import KINDS, PROMPTS, make_scene

NATIVE, ESCALATION = "native", "escalation"
ARMS = ("reference-balanced", "reference-latency", "reference-quality", ESCALATION, "gated12r8@1")
SHARES = {"simple": 0.5, "dense": 1 / 6, "reading": 1 / 6, "clip": 1 / 6}
TARGETS = (
    ("reference-balanced", "kept", "mean", 0.99),
    ("reference-balanced", "kept", "low", 0.97),
    ("reference-balanced", "ttft_share", "mean", -0.5),
    (ESCALATION, "kept", "mean", 0.98),
    (ESCALATION, "ttft_share", "mean", -0.65),
)
"""Arm, figure, which end, and the least value; below 0 the most."""
SLICE_TARGET = 0.97
STRIDE = 100_000_000
MOST = 160


def runner_of(arm: str, first: AdaptiveRunner | None, model: str) -> AdaptiveRunner:
    """The arm on a shared model."""
    if arm == ESCALATION:
        policy = Policy.load("reference-balanced")
        rules = replace(policy.escalation or Escalation(), sure={})  # nobody vouches for anything without a router
        policy = replace(policy, router=constant_router(), threshold=0.75, escalation=rules)
    else:
        policy = Policy.load(("reference-balanced" if model == "reference" else NATIVE) if "@" in arm else arm)
    if first is None:
        return AdaptiveRunner.from_pretrained(model, policy=policy)
    return AdaptiveRunner(first.model, first.processor, policy=policy)


Job = tuple[str, tuple[str, ...], list[tuple[str, int]]]
"""The model, arms and scenes (kind and seed) of one part."""


def answers(job: Job) -> list[dict[str, list[float]]]:
    """Quality, TTFT in ms, latency in ms, visual tokens and passes given up, by arm, of each scene."""
    model, arms, scenes = job
    torch.set_num_threads(1)
    runners: dict[str, AdaptiveRunner] = {}
    for arm in arms:
        runners[arm] = runner_of(arm, next(iter(runners.values()), None), model)
        runners[arm].warm_up()
    found = []
    for number, (kind, seed) in enumerate(scenes):
        scene = make_scene(kind, seed, "eval")  # type: ignore[arg-type]
        asked = Question(media(scene), PROMPTS[scene.task], (scene.answers[scene.task],), METRIC_OF_TASK[scene.task])
        row = {}
        for arm in (*arms[number % len(arms) :], *arms[: number % len(arms)]):
            point = OperatingPoint.parse(arm) if "@" in arm else None
            reply = runners[arm].chat(asked.media, asked.prompt, point=point, max_new_tokens=MOST)
            took = reply.measurement
            score = asked.score(reply.text.strip())
            assert score is not None and took.ttft_ms is not None
            escalated = float(reply.decision.escalated is True)
            row[arm] = [score, took.ttft_ms, took.latency_ms, took.visual_tokens, escalated]
        found.append(row)
    return found


def all_answers(parts: list[Job], jobs: int, kept: Path | None, quiet: bool) -> list[dict[str, list[float]]]:
    """The answers of all parts, in order; those that are `kept` in a file are not asked for again."""
    lines = kept.read_text().splitlines() if kept is not None and kept.exists() else []
    known = {key: rows for key, rows in map(json.loads, lines)}
    keys = [repr(part) for part in parts]
    missing = [(key, part) for key, part in zip(keys, parts, strict=True) if key not in known]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        asked = {pool.submit(answers, part): key for key, part in missing}
        for done in tqdm(as_completed(asked), total=len(asked), unit="40 scenes", disable=quiet):
            known[asked[done]] = done.result()
            if kept is not None:
                with kept.open("a") as file:
                    file.write(json.dumps([asked[done], done.result()]) + "\n")
    return [row for key in keys for row in known[key]]


def mixed(values: npt.NDArray[np.float64], kinds: npt.NDArray[np.str_]) -> float:
    """The mean over traffic of that mix."""
    return float(sum(share * values[kinds == kind].mean() for kind, share in SHARES.items()))


def share_of(own: npt.NDArray[np.float64], whole: npt.NDArray[np.float64], draws: npt.NDArray[np.int64]) -> Interval:
    """Ratio of the mixed means, with its interval over `draws` ``[resamples, scenes]`` of equally many of each kind."""
    mean = own.mean() / whole.mean()
    low, high = np.quantile(own[draws].mean(1) / whole[draws].mean(1), (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))


def stratified(kinds: npt.NDArray[np.str_], resamples: int) -> npt.NDArray[np.int64]:
    """Indices of the scenes drawn with replacement, as many of each kind as there are: ``[resamples, scenes]``."""
    rng = np.random.default_rng(0)
    parts = [np.flatnonzero(kinds == kind) for kind in SHARES]
    return np.concatenate([part[rng.integers(len(part), size=(resamples, len(part)))] for part in parts], axis=1)


def summary(rows: list[dict[str, list[float]]], kinds: npt.NDArray[np.str_], resamples: int) -> dict[str, Any]:
    """By arm: quality, share of native's kept, shares of times and tokens, and the same by kind of scene."""
    table = {arm: np.array([row[arm] for row in rows]) for arm in rows[0]}
    native = table[NATIVE]
    draws = stratified(kinds, resamples)
    # Every kind has as many scenes, so that its share of traffic is the weight of each of them.
    weight = np.array([SHARES[kind] for kind in kinds])

    def share(own: npt.NDArray[np.float64], column: int) -> dict[str, float]:
        return asdict(share_of(own[:, column] * weight, native[:, column] * weight, draws))

    found: dict[str, Any] = {}
    for arm, own in table.items():
        figures: dict[str, Any] = {
            "quality": mixed(own[:, 0], kinds),
            "kept": share(own, 0),
            "ttft_share": share(own, 1),
            "latency_share": share(own, 2),
            "token_share": share(own, 3),
            "escalated": mixed(own[:, 4], kinds),
            "kinds": {},
        }
        for kind in KINDS:
            at = kinds == kind
            mean = native[at, 0].mean()
            figures["kinds"][kind] = {
                "scenes": int(at.sum()),
                "quality": float(own[at, 0].mean()),
                "kept": float(own[at, 0].mean() / mean),
                "difference": asdict(bootstrap_diff(own[at, 0], native[at, 0], seed=0, n=resamples)),
                "ttft_share": float(own[at, 1].mean() / native[at, 1].mean()),
                "escalated": float(own[at, 4].mean()),
            }
        found[arm] = figures
    return found


def shortfalls(found: dict[str, Any]) -> list[str]:
    """What the figures were to be and are not."""
    missed = []
    for arm, figure, end, bound in TARGETS:
        if arm in found:
            value = found[arm][figure][end]
            if value < bound if bound > 0 else value > -bound:
                missed.append(f"{arm}: {figure} ({end}) is {value:.3f}; asked {bound:+.2f}")
    for kind, row in found.get("reference-balanced", {}).get("kinds", {}).items():
        if row["kept"] < SLICE_TARGET:
            missed.append(f"reference-balanced keeps {row['kept']:.3f} of {kind}; asked {SLICE_TARGET}")
    for kind, row in found.get("gated12r8@1", {}).get("kinds", {}).items():
        if row["difference"]["high"] < 0:
            missed.append(f"gated12r8@1 is below native on {kind}: {row['difference']['mean']:+.3f}")
    return missed


def lines(result: dict[str, Any]) -> list[str]:
    """Two tables in Markdown."""
    out = [
        f"seed {result['seed']}: {result['draws']} draws of {result['scenes']} scenes of each kind",
        "",
        "| | quality | of native's | TTFT | latency | visual tokens | second passes |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, row in result["arms"].items():
        spans = [f"{row[k]['mean']:.3f} ({row[k]['low']:.3f}-{row[k]['high']:.3f})" for k in ("kept", "ttft_share")]
        out.append(
            f"| {arm} | {row['quality']:.3f} | {spans[0]} | {spans[1]} | {row['latency_share']['mean']:.3f} |"
            f" {row['token_share']['mean']:.3f} | {row['escalated']:.3f} |"
        )
    out += ["", "| of native's quality; TTFT | " + " | ".join(KINDS) + " |", "|---|---|---|---|---|"]
    for arm, row in result["arms"].items():
        cells = [f"{r['quality']:.3f}, {r['kept']:.3f}; {r['ttft_share']:.3f}" for r in row["kinds"].values()]
        out.append(f"| {arm} | " + " | ".join(cells) + " |")
    kept = [f"each draw's share, {result['first']}: " + ", ".join(f"{value:.3f}" for value in result["by_draw"])]
    return [*out, "", *(kept if result["by_draw"] else []), *(f"short: {line}" for line in result["shortfalls"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100, help="of each kind in each draw")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--model", default="reference", help="or the folder of one that answers the same questions")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--rows", type=Path, help="file that keeps what was answered")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if min(args.scenes, args.draws, args.jobs, args.resamples) < 1 or args.scenes > 10_000 or (args.seed or 0) < 0:
        parser.error(
            f"got {args.scenes} scenes, {args.draws} draws, {args.jobs} jobs, {args.resamples} resamples and seed"
            f" {args.seed}; expected at least 1 of each, at most 10000 scenes, and a seed of at least 0"
        )
    for arm in args.arms:  # a name that is none is told before anything runs
        if "@" in arm:
            OperatingPoint.parse(arm)
        elif arm != ESCALATION:
            Policy.load(arm)
    seed = args.seed if args.seed is not None else time.time_ns() % 1_000_000
    arms = tuple(dict.fromkeys((NATIVE, *args.arms)))
    scenes = [
        (kind, STRIDE * (1 + seed) + draw * 10_000 + number)
        for draw in range(args.draws)
        for number in range(args.scenes)
        for kind in KINDS
    ]
    parts = [(args.model, arms, scenes[start : start + 40]) for start in range(0, len(scenes), 40)]
    rows = all_answers(parts, args.jobs, args.rows, args.json)
    kinds = np.array([kind for kind, _ in scenes])
    found = summary(rows, kinds, args.resamples)
    each = len(scenes) // args.draws
    first = args.arms[0]
    by_draw = [
        mixed(np.array([r[first][0] for r in rows[at : at + each]]), kinds[at : at + each])
        / mixed(np.array([r[NATIVE][0] for r in rows[at : at + each]]), kinds[at : at + each])
        for at in range(0, len(rows), each)
    ]
    result = {
        "seed": seed,
        "draws": args.draws,
        "scenes": args.scenes,
        "arms": found,
        "first": first,
        "by_draw": by_draw,
        "shortfalls": shortfalls(found),
    }
    print(json.dumps(result) if args.json else "\n".join(lines(result)))
    raise SystemExit(bool(result["shortfalls"]))


if __name__ == "__main__":
    main()
