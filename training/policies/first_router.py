"""Make the shipped policies: fit the first router, set the ladders, write ``policies/`` with their cards.

    python training/policies/first_router.py --human scores.csv --screens webpages

The router is a small boosted ensemble on complexity features. Its examples are synthetic screens of the
training split (simple against dense and reading); with ``--human``, photographs and graphics with a human
complexity score, of which the lowest and the highest 40 % of each category count as simple and complex (scores
are compared within a category only); and with ``--screens``, screenshots full of text, all complex. Labels
like these stand in for what a cheap lane loses; measured losses replace them when policies are trained from
labelled logs.
"""

import argparse
import csv
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from adaptive_fusion.complexity import MOTION_FEATURES, VERSION, measure_complexity
from adaptive_fusion.ladder import Rung
from adaptive_fusion.learning.export import export_classifier
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.policy import LANES, Policy
from adaptive_fusion.reference.screens import Kind, make_scene
from adaptive_fusion.router import Inputs, PlainRouter

SYNTHETIC: dict[Kind, bool] = {"simple": False, "dense": True, "reading": True}
UNUSED = ("log_pixels", "log_aspect", *MOTION_FEATURES)
"""A large image can be simple, so size must not decide; stills do not move."""
SIDES = ((256, 384), (256, 384), (256, 384), (384, 1024))
"""Sides of the scenes in pixels, in turn."""
SCREENS = "screenshots"
TAIL = 0.4
"""Share of a category at either end of its scores that counts as simple or complex."""


@dataclass(frozen=True)
class Examples:
    """Rows ``[n, features]`` with labels and the group (kind of scene or category) that each comes from."""

    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def only(self, mask: np.ndarray) -> "Examples":
        """Those that the mask picks."""
        return Examples(self.rows[mask], self.labels[mask], self.groups[mask])


Labelled = list[tuple[dict[str, float], bool, str]]
"""Features, whether complex, and the group."""


def synthetic(seeds: range) -> Labelled:
    """Scenes of the training split, as many complex as simple."""
    return [
        (
            measure_complexity(make_scene(kind, seed, "train", SIDES[seed // 2 % 4]).image).features,
            label,
            kind,
        )
        for kind, label in SYNTHETIC.items()
        for seed in (seeds if kind == "simple" else seeds[::2])
    ]


def human(scores: Path) -> Labelled:
    """The lowest and highest `TAIL` of each category; ``scores`` has file, category and score."""
    categories: dict[str, list[tuple[float, str]]] = defaultdict(list)
    with scores.open(newline="") as file:
        for row in csv.DictReader(file):
            categories[row["category"]].append((float(row["score"]), row["file"]))
    found: Labelled = []
    for category, rated in sorted(categories.items()):
        rated.sort()
        tail = int(len(rated) * TAIL)
        for part, label in ((rated[:tail], False), (rated[-tail:], True)):
            found += [(measure_complexity(scores.parent / name).features, label, category) for _, name in part]
    return found


def screenshots(folder: Path) -> Labelled:
    """Real screens full of text, all of them complex."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    return [(measure_complexity(path).features, True, SCREENS) for path in files]


def gather(names: tuple[str, ...], labelled: Labelled) -> Examples:
    """One matrix of them all."""
    rows = [[features[name] for name in names] for features, _, _ in labelled]
    labels, groups = [label for _, label, _ in labelled], [group for _, _, group in labelled]
    return Examples(np.array(rows), np.array(labels, int), np.array(groups))


def fit(examples: Examples) -> HistGradientBoostingClassifier:
    """Few shallow trees. Synthetic and rated examples weigh the same, both labels too, screenshots half.

    No linear model serves them all: the plainest photograph has more of every feature than a dense screen.
    """
    made, screens = np.isin(examples.groups, list(SYNTHETIC)), examples.groups == SCREENS
    weights = np.zeros(len(made))
    for source, weight in ((made, 1.0), (~made & ~screens, 1.0), (screens, 0.5)):
        for label in (0, 1):
            part = source & (examples.labels == label)
            weights[part] = weight / max(1, part.sum())
    model = HistGradientBoostingClassifier(
        max_iter=60,
        learning_rate=0.1,
        max_leaf_nodes=4,
        min_samples_leaf=20,
        l2_regularization=5.0,
        early_stopping=False,
        random_state=0,
    )
    return model.fit(examples.rows, examples.labels, weights / weights.mean())


def left_out(examples: Examples) -> tuple[dict[str, tuple[int, int]], float]:
    """Right answers on each category by a model that has not seen it (screenshots: by fifths); mean AUC."""
    counts: dict[str, tuple[int, int]] = {}
    areas = []
    for group in np.setdiff1d(np.unique(examples.groups), list(SYNTHETIC)):
        mine = np.flatnonzero(examples.groups == group)
        right = 0
        for part in np.array_split(mine, 5) if group == SCREENS else [mine]:
            own = np.isin(np.arange(len(examples.labels)), part)
            p = fit(examples.only(~own)).predict_proba(examples.rows[part])[:, 1]
            right += int(((p >= 0.5) == examples.labels[part]).sum())
            if group != SCREENS:
                areas.append(roc_auc_score(examples.labels[part], p))
        counts[str(group)] = right, len(mine)
    return counts, float(np.mean(areas)) if areas else float("nan")


def accuracies(model: HistGradientBoostingClassifier, examples: Examples) -> dict[str, tuple[int, int]]:
    """Right answers and examples of each group."""
    right = model.predict(examples.rows) == examples.labels
    return {
        str(group): (int(right[examples.groups == group].sum()), int((examples.groups == group).sum()))
        for group in np.unique(examples.groups)
    }


def rung(fusion: str, downsample: float, share: float, quality: float, fps: float | None = None) -> Rung:
    """A rung with the fusion's usual number of levels and adapter rank."""
    layers, rank = {"weighted": (6, 4), "gated": (12, 8)}[fusion]
    return Rung(OperatingPoint(fusion, layers, downsample, None, rank, fps), quality, share)


def w(downsample: float, share: float, quality: float) -> Rung:
    return rung("weighted", downsample, share, quality)


def g(downsample: float, share: float, quality: float, fps: float | None = None) -> Rung:
    return rung("gated", downsample, share, quality, fps)


LAST_RESORT = (g(0.5, 0.25, 0.5), g(0.25, 0.25, 0.35))
FEW_FRAMES = g(0.5, 0.25, 0.7, 1)

# Expected qualities are guesses until they are measured: their order is what the controller goes by.
POLICIES: dict[str, tuple[str, float, dict[str, tuple[Rung, ...]]]] = {
    "native": (
        "The model untouched on every input: the yardstick.",
        0.5,
        dict.fromkeys(LANES, (Rung(NATIVE),)),
    ),
    "balanced": (
        "A quarter of the pixels for simple images, everything for complex ones while the budget holds.",
        0.5,
        {
            "weighted": (w(1, 0.25, 0.98), w(0.5, 0.25, 0.95), w(0.5, 0.125, 0.88), w(0.25, 0.125, 0.7)),
            "gated": (g(1, 1, 1), g(0.5, 1, 0.88), g(1, 0.5, 0.8), g(0.5, 0.5, 0.7), *LAST_RESORT),
            "video": (g(1, 1, 1), g(1, 0.5, 0.97), g(0.5, 0.5, 0.93), g(0.5, 0.25, 0.85), FEW_FRAMES),
        },
    ),
    "latency": (
        "The fewest tokens that still answer: for tight budgets and bulk captioning.",
        0.7,
        {
            "weighted": (w(0.5, 0.25, 0.95), w(0.5, 0.125, 0.88), w(0.25, 0.125, 0.7)),
            "gated": (g(0.5, 1, 0.88), g(1, 0.5, 0.8), g(0.5, 0.5, 0.7), *LAST_RESORT),
            "video": (g(0.5, 0.5, 0.93), g(0.5, 0.25, 0.85), FEW_FRAMES, g(0.25, 0.25, 0.55, 0.5)),
        },
    ),
    "quality": (
        "Saves only where nothing is lost: for documents, dense screens and small text.",
        0.3,
        {
            "weighted": (w(1, 1, 1), w(1, 0.5, 0.99), w(1, 0.25, 0.98), w(0.5, 0.25, 0.95)),
            "gated": (g(1, 1, 1), g(0.5, 1, 0.88), g(1, 0.5, 0.8), g(0.5, 0.5, 0.7)),
            "video": (g(1, 1, 1), g(1, 0.5, 0.97), g(0.5, 0.5, 0.93)),
        },
    ),
}  # fmt: skip


def card(policy: Policy, figures: str, data: str) -> str:
    """The policy's README."""
    lanes = "\n".join(
        f"| {lane} | `{step.name}` | {step.quality:.2f} |" for lane in LANES for step in policy.ladder(lane)
    )
    return f"""# {policy.name}

{policy.description}

## Lanes

A still whose P(complex) is at least {policy.threshold:g} takes the gated lane, any other the weighted lane;
clips take the video lane. Of its lane's points the controller takes the first that fits the budget.

| lane | point | expected quality (not yet measured) |
|---|---|---|
{lanes}

`@0.5` is the linear downsampling of the visual grid after the encoder (1/4 of the tokens), `/25%` the share
of the input's own pixels before it. Fusion modules are untrained so far: `weighted` and `gated` then answer
as `native` does at the same tokens.

## Router

Sixty boosted trees of four leaves on {len(policy.router.inputs.names)} image features (version {VERSION});
the question is not read yet.

{figures}

## Training data

{data}

## Limits

- Expected qualities are estimates from how the reference scenes are made, not measurements: only their order
  counts.
- Human complexity stands in for the quality that the cheap lane loses; a plain image with one line of small
  print looks simple and is not.
- Fitted on photographs and graphics with sides of at most 640 pixels and screens of 256 to 1,024.

## Command

    python training/policies/first_router.py --human scores.csv --screens webpages
"""


def table(title: str, counts: dict[str, tuple[int, int]]) -> str:
    """A markdown table of accuracies with Wilson intervals."""
    rows = {**counts, "all": tuple(np.sum(list(counts.values()), axis=0).tolist())}
    lines = [f"| {title} | accuracy | 95 % interval | n |", "|---|---|---|---|"]
    for group, (right, total) in rows.items():
        interval = binomtest(right, total).proportion_ci(method="wilson")
        lines.append(f"| {group} | {right / total:.3f} | {interval.low:.3f} to {interval.high:.3f} | {total} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--human", type=Path, help="CSV of file,category,score; images beside it")
    parser.add_argument("--screens", type=Path, help="folder of screenshots of pages full of text")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "policies")
    parser.add_argument("--scenes", type=int, default=400, help="simple scenes to fit on, and as many complex ones")
    args = parser.parse_args()

    fitted, held = synthetic(range(args.scenes)), synthetic(range(10**6, 10**6 + args.scenes // 2))
    rated = human(args.human) if args.human else []
    screens = screenshots(args.screens) if args.screens else []
    names = tuple(name for name in fitted[0][0] if name not in UNUSED)
    examples = gather(names, fitted + rated + screens)
    model = fit(examples)

    figures = [table("held-out training-split scenes", accuracies(model, gather(names, held)))]
    if len(examples.labels) > len(fitted):
        counts, area = left_out(examples)
        figures.append(table("left out of the fit", counts))
        figures.append(f"Mean area under the ROC curve of the left-out categories: {area:.3f}.")
    text = "\n\n".join(figures)
    print(text)

    digest = hashlib.sha256(np.column_stack([examples.rows, examples.labels]).tobytes()).hexdigest()
    data = f"""{len(fitted)} synthetic screens of the training split (half simple, the rest dense and reading),
{len(rated)} rated images (the lowest and highest {TAIL:.0%} of each category) and {len(screens)} screenshots.
SHA-256 of the feature rows and labels: `{digest}`"""
    router = PlainRouter(Inputs(names), *export_classifier(model))
    for name, (description, threshold, lanes) in POLICIES.items():
        policy = Policy(name, router, threshold, lanes, description)
        folder = policy.save(args.out / name)
        (folder / "README.md").write_text(card(policy, text, data), encoding="utf-8")


if __name__ == "__main__":
    main()
