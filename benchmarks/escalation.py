"""What asking the model costs, and what its first token's entropy tells of what a cheap plan loses.

The cost is that of a request which is kept, beside the same request without asking: the median over pairs that take
turns at going first, on the smallest image, for one token, on one core's own time. Then fresh scenes of the reference
model (a seed from the clock unless one is given) are answered at cheap plans and at full compute: by rung the area
under the ROC curve for the answers that lose, what thresholds keep and lose, and the one that conformal risk control
finds.

    python benchmarks/escalation.py [--pairs 300] [--scenes 120] [--seed N] [--k 1] [--json]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from adaptive_fusion import AdaptiveRunner
from adaptive_fusion.evaluation.scenes import scene_questions
from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.fitting.escalation import COARSE_ALPHA, FOLDS, auc, fit_threshold, known_rows
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.learning.labelling.oracle import label_inputs
from adaptive_fusion.learning.labelling.scoring import ModelScorer
from adaptive_fusion.policy.escalation import ANY, Escalation, Threshold
from adaptive_fusion.policy.policy import LANES, Policy
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reference.screens import PROMPTS, make_scene

CHEAP = ("weighted6r4@0.5/25%", "weighted6r4@0.5/12.5%", "native@0.5/50%")
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
NEVER_REACHED = 1e6


def added_ms(pairs: int) -> dict[str, float]:
    """Median milliseconds of a kept request with and without asking, and of their paired difference, of the thread's
    own time: other work on the machine adds less to it."""
    rung = replace(Rung.parse(CHEAP[0]), quality=0.5)
    plain = replace(Policy.load("reference-balanced"), lanes=dict.fromkeys(LANES, (rung,)))
    asked = replace(plain, escalation=Escalation(thresholds={ANY: {ANY: Threshold(NEVER_REACHED)}}))
    first = AdaptiveRunner.from_pretrained("reference", policy=plain)
    runners = {"plain": first, "asked": AdaptiveRunner(first.model, first.processor, policy=asked)}
    image = make_scene("simple", 0, "eval", (64, 64)).image

    def one(name: str) -> float:
        began = time.thread_time()
        reply = runners[name].chat(image, PROMPTS["describe"], max_new_tokens=1)
        took = (time.thread_time() - began) * 1e3
        if reply.decision.escalated is not (False if name == "asked" else None):
            raise SystemExit(f"the {name} request was escalated {reply.decision.escalated}")
        return took

    for name in runners:
        for _ in range(5):
            one(name)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(pairs):
        for name in sorted(runners, reverse=bool(index % 2)):
            times[name].append(one(name))
    low, middle, high = quantiles([a - p for a, p in zip(times["asked"], times["plain"], strict=True)], n=4)
    return {"plain_ms": median(times["plain"]), "added_ms": middle, "added_low": low, "added_high": high}


def fresh_labels(scenes: int, seed: int) -> Dataset:
    """Answers of fresh scenes at the cheap plans and at full compute."""
    runner = AdaptiveRunner.from_pretrained("reference", policy="reference-balanced")
    rungs = [Rung.parse(name) for name in ("native@1", *CHEAP)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "labels.jsonl"
        label_inputs(ModelScorer(RunnerModel(runner)), scene_questions(scenes, "eval", seed), rungs, out)
        return build_dataset([out], cheap=CHEAP[0], rungs=[rung.name for rung in rungs])


def told(data: Dataset, rung: str, k: int) -> dict[str, Any]:
    """What a rung's entropies tell of its losses."""
    rows, entropy, loss = known_rows(data, rung, k)
    e, lost = entropy[rows], loss[rows]
    kinds = {kind: rows & (data.asked == code) for code, kind in enumerate(PROMPT_KINDS)}
    kept = {each: e <= each for each in THRESHOLDS}
    found = fit_threshold(
        e, lost, data.group[rows], data.folds(FOLDS)[rows], alpha=COARSE_ALPHA, tolerance=data.tolerance
    )
    return {
        "rows": int(rows.sum()),
        "loss": float(lost.mean()),
        "auc": auc(e, lost > data.tolerance),
        "auc_by_kind": {k: auc(entropy[some], loss[some] > data.tolerance) for k, some in kinds.items() if some.any()},
        "thresholds": {
            str(each): {"kept": float(few.mean()), "loss": float(np.where(few, lost, 0.0).mean())}
            for each, few in kept.items()
        },
        "controlled": None if found is None else found.to_dict(),
    }


def lines(result: dict[str, Any]) -> Sequence[str]:
    """The result in words."""
    cost = result["cost"]
    out = [
        f"asking adds {cost['added_ms']:+.3f} ms (quartiles {cost['added_low']:+.3f} to {cost['added_high']:+.3f}) to a"
        f" request of {cost['plain_ms']:.1f} ms that is kept",
        f"scenes {result['scenes']}, seed {result['seed']}, first {result['k']} tokens",
    ]
    for rung, found in result["rungs"].items():
        by_kind = ", ".join(
            f"{kind} {'n/a' if value is None else f'{value:.3f}'}" for kind, value in found["auc_by_kind"].items()
        )
        out.append(
            f"{rung}: {found['rows']} rows lose {found['loss']:.3f}; AUC {found['auc']:.3f} (within a kind: {by_kind})"
        )
        out += [
            f"  above {each} nats goes on: keeps {row['kept']:.2f}, loses {row['loss']:.4f}"
            for each, row in found["thresholds"].items()
        ]
        out.append(f"  within {COARSE_ALPHA}: {found['controlled']}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = args.seed if args.seed is not None else time.time_ns() % 1_000_000
    data = fresh_labels(args.scenes, seed)
    result = {
        "cost": added_ms(args.pairs),
        "scenes": args.scenes,
        "seed": seed,
        "k": args.k,
        "rungs": {rung: told(data, rung, args.k) for rung in CHEAP},
    }
    print(json.dumps(result) if args.json else "\n".join(lines(result)))


if __name__ == "__main__":
    main()
