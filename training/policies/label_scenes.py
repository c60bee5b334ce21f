"""Label reference scenes at every rung that the shipped policies may use: what they are trained on and judged by.

    python training/policies/label_scenes.py --out runs/policies/train.jsonl --scenes 360 --jobs 2
    python training/policies/label_scenes.py --out runs/policies/eval.jsonl --scenes 150 --split eval --jobs 2

Half of the scenes are simple, the others dense, reading and clips in equal parts; each is asked every question
that it has an answer to. Quality is element recall (describe), ANLS (read) or an exact match (clips) in free
generation. Each process keeps to one thread, and times are that thread's own, so that other work on the machine
does not change them. Run again with the same arguments, it goes on where it stopped.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from recipes import RECIPES

from adaptive_fusion.commands.output import progress
from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.evaluation.scenes import SIDES, scene_questions
from adaptive_fusion.learning.labelling.labeller import RunnerModel
from adaptive_fusion.learning.labelling.oracle import label_inputs
from adaptive_fusion.learning.labelling.scoring import NATIVE_RUNG, ModelScorer
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.runner import AdaptiveRunner


def open_on_one_thread(model: str, policy: str) -> AdaptiveRunner:
    """A runner in a process whose tensor work keeps to one thread, so that the thread's own time is its cost."""
    torch.set_num_threads(1)
    return AdaptiveRunner.from_pretrained(model, policy=policy)


def shipped_rungs() -> list[Rung]:
    """Native, and every rung once that a lane of a shipped policy may have."""
    ladders = [ladder for recipe in RECIPES.values() for ladder in recipe.lanes.values()]
    return list({rung.name: rung for rung in (NATIVE_RUNG, *(rung for ladder in ladders for rung in ladder))}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="labels are appended to this file")
    parser.add_argument("--scenes", type=int, default=360)
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes")
    parser.add_argument("--sides", type=int, nargs=2, default=SIDES, metavar="PIXELS", help="of stills, least and most")
    parser.add_argument("--points", nargs="*", help="rungs such as native@0.5 instead of the recipes'")
    parser.add_argument("--policy", default="reference-balanced", help="whose fusion weights are used")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its own model")
    args = parser.parse_args()

    rungs = [Rung.parse(text) for text in args.points] if args.points else shipped_rungs()
    model = RunnerModel(open_on_one_thread, args.model, args.policy, clock=time.thread_time)
    questions = list(scene_questions(args.scenes, args.split, args.seed, tuple(args.sides)))
    began = time.monotonic()
    source = f"scenes-{args.split}-{args.seed}"
    with progress(as_json=False) as shown:
        run = label_inputs(
            ModelScorer(model), questions, rungs, args.out, jobs=args.jobs, progress=shown, source_id=source
        )
    seconds = time.monotonic() - began
    each = ""
    if run.scored:
        question = seconds / run.scored
        each = f", {question:.2f} s a question, {question * len(questions) / args.scenes:.2f} s a scene"
    print(f"{run.scored} questions at {len(rungs)} rungs in {seconds:.0f} s{each}; {run.resumed} were there already")
    for name, reason in run.failed:
        print(f"left out: {name}: {reason}")
    if run.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveFusionError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
