"""Make the shipped policies from labels of the reference scenes: ``policies/`` with figures measured on others.

    python training/policies/train_policies.py LABELS... --held-out LABELS... [--human scores.csv]

LABELS are label files of scenes of the training split, as ``label_scenes.py`` writes them; those of
``--held-out`` come from the evaluation split and only judge. Of each scene the question of its kind counts: half simple
scenes; dense, reading and clips in equal parts. They are kept as ``mixed.jsonl`` beside the reports. With
``--human``, images with a human complexity score (columns file, category, score; the images beside it) are a
second view of what is complex: they are used where routers fitted with them are not measurably worse at telling
what the cheap lane loses.

Per policy: the lanes begin where routing costs least within the policy's tolerance, router and threshold are
fitted, expected qualities measured, rungs that a cheaper one matches dropped, and the result is compared with
the policy of that name that is shipped now. The same labels and seed give the same bytes. Exit code 1 if the
gate refuses one (``--force`` writes it all the same).
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipes import RECIPES, Recipe

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.evaluation.tables import read_table
from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.features.prompts import PROMPT_FEATURE_NAMES
from adaptive_fusion.jsonl import append_records
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import Subject
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.data.people import human_labels
from adaptive_fusion.learning.fitting.card import card, figure_lines, finite, lane_lines, slice_lines
from adaptive_fusion.learning.fitting.fit import FittedPolicy, fit_policy
from adaptive_fusion.learning.fitting.gate import gate
from adaptive_fusion.learning.fitting.ladders import choose_lanes, labelled, prune
from adaptive_fusion.learning.judging.arms import judges
from adaptive_fusion.learning.judging.evaluate import PolicyReport, evaluate
from adaptive_fusion.models import adapter_for
from adaptive_fusion.models.fingerprint import fingerprint
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.fitted import Fitted
from adaptive_fusion.policy.policy import COMPLEX, LANES, SIMPLE, Policy
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.reference import model_path
from adaptive_fusion.reference.screens import KINDS

LEFT_OUT = ("log_pixels", "log_aspect", *PROMPT_FEATURE_NAMES)
"""A large image can be simple, so size must not decide; and of three fixed questions nobody else's can be told."""
JUDGED = {"simple": "describe", "dense": "describe", "reading": "read", "clip": "event"}
"""The question that each kind of scene is judged by."""
HUMAN_SHARE = 0.5
"""Weight of all rated images together, as a share of that of the measured ones."""


@dataclass(frozen=True)
class Target:
    """A figure that a policy is held to on the held-out traffic; a difference counts with its whole interval."""

    what: str
    figure: str
    bound: float
    end: str = "mean"
    most: bool = False

    def line(self, report: PolicyReport) -> str:
        """The figure beside its bound, and whether it holds."""
        if self.figure not in report.traffic:
            return f"- no: {self.what}: not measured"
        found = report.traffic[self.figure]
        value = getattr(found, self.end)
        holds = value <= self.bound if self.most else value > self.bound if self.end == "low" else value >= self.bound
        sign = "<=" if self.most else ">" if self.end == "low" else ">="
        return (
            f"- {'yes' if holds else 'no'}: {self.what} {found.mean:.4f} ({found.low:.4f} to {found.high:.4f}),"
            f" {self.end} {sign} {self.bound:g}"
        )


TARGETS = (
    Target("quality kept of native's", "kept", 0.98),
    Target("mean cost as a share of native's", "cost_share", 0.6, most=True),
    Target("APGR", "apgr", 0.8),
    Target("share of the gap from random to oracle closed", "gap_closed", 0.6),
    Target("quality above any entropy threshold at the policy's cost", "over_entropy", 0.0, "low"),
    Target("quality above entropy-median routing at its cost", "over_entropy_median", 0.0, "low"),
    Target("cost saved at the quality of entropy-median routing", "saved_to_entropy_median", 0.0, "low"),
    Target("quality above the best static point within the cost", "over_static", 0.0, "low"),
)
"""What `reference-balanced` is held to."""


def human(scores: Path, share_of: float, folder: Path) -> Path:
    """A label file from a CSV of file, category and score, whose weights add up to `share_of`."""
    columns, read = read_table(scores)
    if not {"file", "score", "category"} <= set(columns):
        raise ConfigError(f"{scores.name} has columns {columns}; expected file, score and category")
    rows = [(row["file"], row["score"], row["category"]) for row in read]
    table = folder / "human.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "score", "group"), *((scores.parent / f, s, c) for f, s, c in rows)])

    def describe(path: Path) -> Subject:
        found = measure_complexity(path)
        return Subject(str(path.relative_to(scores.parent)), "image", found.features, found.version)

    records, failed = human_labels(table, describe, source_id=scores.name)
    for path, reason in failed:
        print(f"left out {Path(path).name}: {reason}", file=sys.stderr)
    total = sum(record["weight"] for record in records)
    out = folder / "human.jsonl"
    append_records(({**record, "weight": record["weight"] * share_of / total} for record in records), out)
    return out


def mixed(held_out: Iterable[Path], out: Path) -> Path:
    """The labels of traffic: of each scene, the one of the question that its kind is judged by."""
    lines = (line for path in held_out for line in path.read_text(encoding="utf-8").splitlines())
    records = (json.loads(line) for line in lines if line.startswith("{"))
    kept = [r for r in records if (task := r["slices"].get("task")) and JUDGED.get(r["slices"].get("scene")) == task]
    if not kept:
        raise AdaptiveFusionError(f"no label in {[path.name for path in held_out]} has a scene and its task as slices")
    out.unlink(missing_ok=True)  # not before all is read: it may be one of them
    append_records(kept, out)
    return out


def read(labels: Iterable[Path], recipe: Recipe) -> Dataset:
    """The labels with every rung they name."""
    names = list(dict.fromkeys(rung.name for lane in LANES for rung in recipe.lanes[lane]))
    return build_dataset(labels, cheap=names[0], rungs=names, tolerance=recipe.tolerance, all_rungs=True)


def base_policy(name: str, recipe: Recipe, data: Dataset, seed: int) -> tuple[Policy, dict[str, Any]]:
    """Lanes chosen on what the router will be fitted on, with a router that knows nothing yet."""
    known = data.take(~data.split("test", seed))
    lanes, tried = choose_lanes(
        recipe.lanes,
        known.take(judges(known)),
        tolerance=recipe.tolerance,
        slack=recipe.objective == "cost",
        leave_out=LEFT_OUT,
        seed=seed,
    )
    policy = Policy(name, constant_router(), 0.5, lanes, recipe.description)
    try:
        shipped = Policy.load(name)
    except AdaptiveFusionError:
        return policy, tried
    return replace(policy, budget=shipped.budget, fusion_weights=shipped.fusion_weights), tried


def fitted_to(model: str | Path) -> Fitted:
    """The model that answered for the labels, and the kinds of scenes that they are of."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded = AutoModelForImageTextToText.from_pretrained(model), AutoProcessor.from_pretrained(model)
    return Fitted(fingerprint(adapter_for(*loaded)), KINDS)


def incumbent(name: str, data: Dataset, base: Policy) -> Policy:
    """The policy shipped under that name, if its lanes begin with labelled rungs; else `base`."""
    try:
        shipped = Policy.load(name)
        for lane in (SIMPLE, COMPLEX):
            labelled(shipped.lanes[lane][:1], data)
    except AdaptiveFusionError:
        return base
    return shipped


def fit(
    name: str, recipe: Recipe, labels: list[Path], held: list[Path], options: Any
) -> tuple[PolicyReport | None, bool]:
    """Make one policy; returns its report on the held-out labels and whether the gate let it pass."""
    data = read(labels, recipe)
    base, tried = base_policy(name, recipe, data, options.seed)
    data = replace(data, y=data.loses(base.lanes[SIMPLE][0].name))
    fitted = fit_policy(
        data,
        base,
        name=name,
        objective=recipe.objective,
        seed=options.seed,
        leave_out=LEFT_OUT,
        jobs=options.jobs,
        n=options.resamples,
    )
    policy = replace(prune(fitted.policy), tolerance=recipe.tolerance, fitted=fitted_to(options.model))
    policy = replace(policy, cheap=policy.lanes[SIMPLE][0].name)
    fitted = FittedPolicy(policy, {**fitted.report, "lanes": tried})
    against = incumbent(name, data, base)
    verdict = gate(policy, against, data.take(data.split("test", options.seed)), seed=options.seed, n=options.resamples)
    if not verdict.accepted:
        print(f"{name} is worse than {against.name}: " + "; ".join(verdict.reasons), file=sys.stderr)
        if not options.force:
            return None, False
    report = None
    if held:
        (report,) = evaluate([policy], held, tolerance=recipe.tolerance, seed=options.seed, n=options.resamples)
    folder = options.out / name
    for stale in ("quality.json", "router.joblib"):
        (folder / stale).unlink(missing_ok=True)
    policy.save(folder)
    text = card(fitted, verdict, f"the shipped {name}" if against.name == name else "no router", options.command)
    (folder / "README.md").write_text(with_held_out(text, report, tried), encoding="utf-8")
    options.reports.mkdir(parents=True, exist_ok=True)
    found = {**fitted.report, "held_out": None if report is None else report.to_dict()}
    (options.reports / f"{name}.json").write_text(json.dumps(finite(found), indent=1, sort_keys=True) + "\n")
    return report, True


def with_held_out(text: str, report: PolicyReport | None, tried: dict[str, Any]) -> str:
    """The card with the figures on held-out traffic and how the lanes were chosen, before its training data."""
    lines = ["## How the lanes begin", "", "| lane | begins with | quality kept | cost |", "|---|---|---|---|"]
    for lane, rungs in tried.items():
        for name, found in rungs.items():
            cost = f"{found['cost']['mean']:.3f}" if "cost" in found else ""
            lines.append(f"| {lane} | `{name}` | {found['kept']['mean']:.4f} | {cost} |")
    lines += [
        "",
        "Of the `weighted` lane's candidates the cheapest was taken once routed within the tolerance, quality and"
        " cost as shares of the strong arm's; the `video` lane begins with the last before the first that loses more.",
        "",
    ]
    if report is not None:
        values = report.to_dict()
        lines += ["## Held-out traffic", "", *figure_lines(values), *slice_lines(values["slices"])[2:]]
    return text.replace("## Training data", "\n".join([*lines, "## Training data"]))


def native(data: Dataset, options: Any) -> None:
    """The yardstick: one point everywhere, nothing fitted."""
    policy = Policy(
        "native",
        constant_router(),
        0.5,
        dict.fromkeys(LANES, (Rung(NATIVE),)),
        "The model untouched on every input: the yardstick.",
    )
    folder = policy.save(options.out / "native")
    lines = [
        "# native",
        "",
        policy.description,
        "",
        *lane_lines(policy),
        *("## Router", "", "All lanes are alike: nothing is fitted and nothing is read.", ""),
        *("## Training data", "", "None. The labels that the other policies were fitted on measure against it;"),
        f"SHA-256 of `reference-balanced`'s matrix: `{data.digest()}`.",
        "",
        *("## Limits", "", "- It has one point per lane: a budget that it misses is missed.", ""),
        *("## Command", "", f"    {options.command}", ""),
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, nargs="+", help="label files of scenes of the training split")
    parser.add_argument("--held-out", type=Path, nargs="+", default=[], help="label files that only judge")
    parser.add_argument("--human", type=Path, help="CSV of file, category, score; images beside it")
    parser.add_argument("--model", type=Path, default=model_path(), help="the model that the labels are of")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "policies")
    parser.add_argument("--reports", type=Path, default=Path("runs/policies"), help="folder of the full reports")
    parser.add_argument("--only", choices=sorted(RECIPES), nargs="+", default=list(RECIPES))
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="write policies that the gate refuses")
    options = parser.parse_args()
    names = " ".join(path.name for path in options.labels)
    options.command = f"python training/policies/train_policies.py {names}"
    if options.held_out:
        options.command += f" --held-out {' '.join(path.name for path in options.held_out)}"
    options.command += f" --human {options.human.name}" if options.human else ""
    options.command += f" --seed {options.seed}"

    passed = True
    with tempfile.TemporaryDirectory() as folder:
        # An image's other question would only blur what of the image decides: whoever reads no question cannot tell.
        labels = [mixed(options.labels, Path(folder) / "own.jsonl")]
        if options.human:
            measured = float(read(labels, RECIPES["reference-balanced"]).weight.sum())
            labels.append(human(options.human, HUMAN_SHARE * measured, Path(folder)))
        held = [mixed(options.held_out, options.reports / "mixed.jsonl")] if options.held_out else []
        for name in options.only:
            report, accepted = fit(name, RECIPES[name], labels, held, options)
            passed &= accepted
            if report is None:
                continue
            print(f"{name}, on {report.traffic_rows} held-out inputs:")
            print("\n".join(figure_lines(report.to_dict())))
            if name == "reference-balanced":
                print("Held to, on all traffic:\n" + "\n".join(target.line(report) for target in TARGETS) + "\n")
        native(read(labels, RECIPES["reference-balanced"]), options)
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except AdaptiveFusionError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
