"""Fit the lane of the general policies, P(complex), and judge it on categories and sources that the fit has not seen.

    python training/general/lanes.py --people DIR --text DIR... --labels labels.jsonl [--plain DIR...] \
        [--others DIR...] [--out router.json] [--json]

An image is complex if people judge it to be in the upper half of its category, or if the cheap plan, a quarter of the
native pixels, keeps less than .98 of the text that a reader finds: any of two reasons is enough. So there are two
linear models, of what looks complex and of fine text, and the larger score counts. One linear model of both would take
something of each for enough, and photographs have something of each.

- *Looks*: logistic regression on the upper half of each category. Weights are at least 0: a feature that means more
  detail never lowers P. Categories differ in level, and no category is known at run time: what their mean scores differ
  by is penalised.
- *Fine text*: logistic regression of images that lose text against images without any that people find simple, images
  of few characters, icons and drawn dialogs of a few words. Images that keep their text count little: they lose nothing
  in the gated lane.

Where each model's score is enough is chosen on images that the models were not fitted to, each group left out in turn:
the two levels around which the worst margin over the three goals is largest. The model of text is shifted so that both
levels are one, and Platt's method makes a probability of the larger score, in which the level is the policy's
threshold. All of this is repeated without each group for the figures. The same data give the same file.
"""

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fit import STEPS, curve
from label import read_labels
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from scipy.ndimage import uniform_filter
from scipy.optimize import minimize
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from adaptive_fusion.evaluation.shares import ENOUGH
from adaptive_fusion.features.complexity import Complexity, measure_complexity
from adaptive_fusion.media.load import load_media
from adaptive_fusion.policy.calibration import Platt
from adaptive_fusion.policy.predictors import LargestModel, LinearModel
from adaptive_fusion.policy.router import Inputs, PlainRouter

Floats = np.ndarray[Any, np.dtype[np.float64]]
Names = np.ndarray[Any, np.dtype[np.str_]]
Rows = np.ndarray[Any, np.dtype[np.bool_]]

LOOKS = (
    "grey_entropy", "hue_entropy", "chroma_colours", "corners", "flat_regions", "edge_objects", "jpeg_bits",
    "stroke_contrast",
)  # fmt: skip
"""Those of the score, and two by which flat drawings and photographs come to the same level."""
FINE_TEXT = ("text_share", "text_height_low", "stroke_count")
NAMES = (*LOOKS, *FINE_TEXT)
SIGNS = np.array([-1.0 if name == "text_height_low" else 1.0 for name in NAMES])
"""Of each feature's weight: -1 where less of it means finer detail."""
CHEAP = 0.25
RIDGE_LOOKS, LEVELS, RIDGE_TEXT = 0.2, 0.05, 0.003
KEEPS, PLAIN = 0.1, 1.0
"""Weight of the images that keep their text, and of those with next to none, to those that lose it."""
GOALS = (0.87, 0.25, 0.86)
"""Gated of the most complex third, at least; of the simplest, at most; of images that lose text, at least.

A little more than the .85, .25 and .85 that are asked.
"""
DIALOGS = 80
IMAGES = 40  # of each of the other folders
EVERY = 5  # image is enlarged, to see what that changes
SCREENS = ((1280, 800), (1920, 1080), (1080, 1920), (640, 480), (800, 600), (320, 240))
SAID = ("Done", "Cancel", "OK", "Saved", "Delete", "this file?", "Please wait", "Connected", "Update", "ready", "Retry")
PEOPLE, TEXT, EMPTY = 0, 1, 2


@dataclass(frozen=True)
class Table:
    """One row an image.

    `kind`: (n,) PEOPLE, TEXT or EMPTY; `group`: (n,) category or source; `features`: (n, NAMES); `rank`: (n,) within
    the category, 0 to 1, of PEOPLE; `complex`: (n,) upper half, or text lost; `large`: (n, NAMES) features enlarged
    twice, NaN where that was not measured.
    """

    kind: np.ndarray[Any, np.dtype[np.int64]]
    group: Names
    features: Floats
    rank: Floats
    complex: Rows
    large: Floats

    def of(self, kind: int) -> list[str]:
        """Names of the groups."""
        return sorted({*self.group[self.kind == kind].tolist()})

    def part(self, rows: Rows) -> "Table":
        columns = (self.kind, self.group, self.features, self.rank, self.complex, self.large)
        return Table(*(column[rows] for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--people", type=Path, required=True, help="folder with scores.csv and the images")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="DIR", help="folders of the labels")
    parser.add_argument("--labels", type=Path, required=True, help="from label.py")
    parser.add_argument("--plain", type=Path, nargs="*", default=[], metavar="DIR", help="simple, without text")
    parser.add_argument("--others", type=Path, nargs="*", default=[], metavar="DIR", help="only judged")
    parser.add_argument("--out", type=Path, help="router, threshold and figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    table = read(options.people, {folder.name: folder for folder in options.text}, options.labels, options.plain)
    router, threshold = fit(table)
    found = figures(table, router, threshold, [*options.text, *options.plain, *options.others])
    if options.out:
        kinds = sorted({*table.of(PEOPLE), *table.of(TEXT), *(folder.name for folder in options.plain)})
        values = {"router": router.to_dict(), "threshold": threshold, "kinds": kinds, "figures": found}
        options.out.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    print(json.dumps(found, indent=None if options.json else 2))


def read(people: Path, folders: dict[str, Path], labels: Path, plain: list[Path]) -> Table:
    """All images with their features; enlarged, every so many."""
    files: list[tuple[int, str, Path, float, bool]] = []
    with (people / "scores.csv").open(encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    for category in sorted({row["category"] for row in scores}):
        own = [row for row in scores if row["category"] == category]
        ranks = (rankdata([float(row["score"]) for row in own]) - 0.5) / len(own)
        files += [
            (PEOPLE, category, people / row["file"], rank, bool(rank > 0.5))
            for row, rank in zip(own, ranks.tolist(), strict=True)
        ]
    for record in read_labels(labels).values():
        if record["source"] in folders:
            kind = TEXT if len(record["kept"]) > 1 else EMPTY
            lost = kind == TEXT and text_kept(record) < ENOUGH
            files.append((kind, record["source"], folders[record["source"]] / record["file"], np.nan, lost))
    files += [(EMPTY, folder.name, path, np.nan, False) for folder in plain for path in images_of(folder)]
    drawn = [dialog(seed) for seed in range(DIALOGS)]
    files += [(EMPTY, "dialogs", Path(), np.nan, False)] * DIALOGS
    rows, large = [], []
    for index, (_, group, path, _, _) in enumerate(track(files, "features", console=Console(stderr=True))):
        image = drawn.pop() if group == "dialogs" else load_media(path)
        rows.append(row(measure_complexity(image)))
        twice = image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC) if not index % EVERY else 0
        large.append(row(measure_complexity(twice)) if twice else [np.nan] * len(NAMES))
    kind, group, _, rank, lost = zip(*files, strict=True)
    return Table(*map(np.array, (kind, group, rows, rank, lost, large)))


def text_kept(record: dict[str, Any]) -> float:
    """By the cheap plan."""
    return float(curve(record["kept"])[int(np.argmin(np.abs(STEPS - np.log2(CHEAP))))])


def images_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:IMAGES]


def row(measured: Complexity) -> list[float]:
    return Inputs(NAMES).row(measured)


def logistic(x: Floats, y: Rows, weight: Floats, ridge: float, levels: Floats | None = None) -> tuple[Floats, float]:
    """Weights of at least 0 and bias of columns `x`; `levels`: (groups, columns) whose scores are to differ little."""
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
    z = (x - mean) / scale
    apart = np.zeros((1, x.shape[1])) if levels is None else (levels - levels.mean(axis=0)) / scale
    penalty = ridge * np.eye(x.shape[1]) + LEVELS * apart.T @ apart / len(apart)

    def loss(p: Floats) -> tuple[float, Floats]:
        score = p[0] + z @ p[1:]
        error = weight * (0.5 + 0.5 * np.tanh(score / 2) - y)
        value = weight @ (np.logaddexp(0, score) - y * score) + p[1:] @ penalty @ p[1:]
        return float(value), np.r_[error.sum(), z.T @ error + 2 * penalty @ p[1:]]

    bounds = [(None, None), *[(0, None)] * x.shape[1]]
    best = minimize(loss, np.zeros(1 + x.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return best[1:] / scale, float(best[0] - (best[1:] / scale) @ mean)


def model(names: tuple[str, ...], weights: Floats, bias: float, fill: Floats) -> LinearModel:
    """Of all `NAMES`, with weights for signed features."""
    spread = np.zeros(len(NAMES))
    spread[[NAMES.index(name) for name in names]] = weights
    return LinearModel(tuple((spread * SIGNS).tolist()), tuple(fill.tolist()), bias)


def signed(table: Table, names: tuple[str, ...]) -> Floats:
    return (table.features * SIGNS)[:, [NAMES.index(name) for name in names]]


def weights(groups: Names, power: float) -> Floats:
    """That sum to 1, and over each group in proportion to a power of its images: 0 for groups that count the same."""
    _, index, count = np.unique(groups, return_inverse=True, return_counts=True)
    each: Floats = count[index] ** (power - 1.0)
    return each / each.sum()


def looks(table: Table) -> LinearModel:
    own = table.part(table.kind == PEOPLE)
    x = signed(own, LOOKS)
    levels = np.array([x[own.group == name].mean(axis=0) for name in own.of(PEOPLE)])
    found = logistic(x, own.complex, weights(own.group, 0.0), RIDGE_LOOKS, levels)
    return model(LOOKS, *found, table.features.mean(axis=0))


def fine_text(table: Table) -> LinearModel:
    simple = (table.kind == PEOPLE) & (table.rank < 1 / 3)
    lost, kept = (table.kind == TEXT) & table.complex, (table.kind == TEXT) & ~table.complex
    weight = np.zeros(len(table.kind))
    for rows, share in ((simple, 1.0), (lost, 1.0), (kept, KEEPS), (table.kind == EMPTY, PLAIN)):
        if rows.any():
            weight[rows] = share * weights(table.group[rows], 0.5)
    used = weight > 0
    found = logistic(signed(table, FINE_TEXT)[used], lost[used], weight[used], RIDGE_TEXT)
    return model(FINE_TEXT, *found, table.features.mean(axis=0))


def left_out(table: Table) -> Floats:
    """(n, 2) scores of both models, each group's by a fit without it."""
    scores = np.zeros((len(table.kind), 2))
    for name in np.unique(table.group):
        own = table.group == name
        rest = table.part(~own)
        scores[own] = np.stack([m(rest).raw_batch(table.features[own]) for m in (looks, fine_text)], axis=1)
    return scores


def shares(table: Table, gated: Rows) -> tuple[float, float, float]:
    """Gated of the most complex and of the simplest third, categories counting the same, and of what loses text."""
    categories = table.of(PEOPLE)
    thirds = [
        float(np.mean([gated[(table.group == name) & third].mean() for name in categories]))
        for third in (table.rank > 2 / 3, table.rank < 1 / 3)
    ]
    return thirds[0], thirds[1], float(gated[(table.kind == TEXT) & table.complex].mean())


def margin(table: Table, gated: Rows) -> float:
    """The worst over the three goals."""
    high, low, lost = shares(table, gated)
    return min(high - GOALS[0], GOALS[1] - low, lost - GOALS[2])


def fit(table: Table) -> tuple[PlainRouter, float]:
    """The router, and the threshold on its probability."""
    outside = left_out(table)
    people, lost = table.kind == PEOPLE, (table.kind == TEXT) & table.complex
    first, second = (
        np.quantile(outside[rows, column], np.linspace(low, high, 60))
        for column, rows, low, high in ((0, people, 0.3, 0.75), (1, lost, 0.0, 0.6))
    )
    margins = [[margin(table, (outside[:, 0] >= a) | (outside[:, 1] >= b)) for b in second] for a in first]
    smooth = uniform_filter(np.array(margins), 5, mode="nearest")  # one image more or less decides nothing
    a, b = np.unravel_index(smooth.argmax(), smooth.shape)
    level, shift = float(first[a]), float(first[a] - second[b])
    text = fine_text(table)
    both = LargestModel((looks(table), LinearModel(text.weights, text.fill, text.bias + shift)))
    score = np.maximum(outside[:, 0], outside[:, 1] + shift)
    labelled = table.kind != EMPTY
    weight = np.where(people, weights(np.where(people, table.group, ""), 0.0), 0.0)
    weight[table.kind == TEXT] = weights(table.group[table.kind == TEXT], 0.5)
    slope, intercept = logistic(score[labelled, None], table.complex[labelled], weight[labelled], 0.0)
    platt = Platt(float(slope[0]), intercept)
    return PlainRouter(Inputs(NAMES), both, platt), platt(level)


def figures(table: Table, router: PlainRouter, threshold: float, folders: list[Path]) -> dict[str, Any]:
    """Each category and source judged by a fit without it, threshold included; then the fit on all of them."""
    p, gated, outside = np.zeros(len(table.kind)), np.zeros(len(table.kind), bool), left_out(table)
    for name in track(np.unique(table.group), "left out", console=Console(stderr=True)):
        own = table.group == name
        without, level = fit(table.part(~own))
        p[own] = without.p_complex_batch(table.features[own])
        gated[own] = p[own] >= level
    categories = {}
    for name in table.of(PEOPLE):
        own = table.group == name
        high, low = (own & third for third in (table.rank > 2 / 3, table.rank < 1 / 3))
        labels = np.r_[np.ones(high.sum()), np.zeros(low.sum())]
        categories[name] = {
            "most complex third gated": float(gated[high].mean()),
            "simplest third gated": float(gated[low].mean()),
            "AUC": float(roc_auc_score(labels, np.r_[p[high], p[low]])),
            "AUC of looks alone": float(roc_auc_score(labels, np.r_[outside[high, 0], outside[low, 0]])),
        }
    sources = {}
    for name in table.of(TEXT):
        lost = (table.group == name) & (table.kind == TEXT) & table.complex
        sources[name] = {"images that lose text": int(lost.sum()), "gated": float(gated[lost].mean())}
    high, low, lost = shares(table, gated)
    final = router.p_complex_batch(table.features)
    large = router.p_complex_batch(table.large)
    was = ~np.isnan(table.large).all(axis=1)
    return {
        "images": len(table.kind),
        "threshold": threshold,
        "left out": {"most complex third gated": high, "simplest third gated": low, "text lost, gated": lost},
        "fitted on all": dict(
            zip(
                ("most complex third gated", "simplest third gated", "text lost, gated"),
                shares(table, final >= threshold),
                strict=True,
            )
        ),
        "categories, left out": categories,
        "sources, left out": sources,
        "folders, gated": {folder.name: gated_of(folder, router, threshold) for folder in folders},
        "enlarged 2x": enlarged(table, was, final, large, threshold),
        "made": {name: router.p_complex(measure_complexity(image)) for name, image in made().items()},
    }


def gated_of(folder: Path, router: PlainRouter, threshold: float) -> float:
    """Share of a folder's first images."""
    return float(np.mean([router.p_complex(measure_complexity(p)) >= threshold for p in images_of(folder)]))


def enlarged(table: Table, was: Rows, before: Floats, after: Floats, threshold: float) -> dict[str, Any]:
    """How P and the lane change; text twice as large is lost by fewer."""
    return {
        kind: {
            "images": int(rows.sum()),
            "median change of P": float(np.median(np.abs(after - before)[rows])),
            "other lane": float(((after >= threshold) != (before >= threshold))[rows].mean()),
        }
        for kind, rows in (("people", was & (table.kind == PEOPLE)), ("text", was & (table.kind == TEXT)))
    }


def made() -> dict[str, Image.Image]:
    """Images whose lane is known without labels: simple ones and a page."""
    blank = Image.new("RGB", (1280, 800), "white")
    gradient = Image.fromarray(np.tile(np.linspace(60, 200, 1280).astype(np.uint8), (800, 1))).convert("RGB")
    done, page = Image.new("RGB", (1280, 800), "#e8e8e8"), blank.copy()
    draw = ImageDraw.Draw(done)
    draw.rectangle((400, 300, 880, 500), fill="white", outline="#808080")
    draw.text((600, 380), "Done", fill="black", font=ImageFont.load_default(28))
    words, font = "the reader finds every word of this dense page of plain text ", ImageFont.load_default(14)
    for line in range(46):
        shown = (words[line % 7 :] + words * 3)[:170]
        ImageDraw.Draw(page).text((30, 20 + 16 * line), shown, fill="black", font=font)
    few = {f"dialog {seed}": dialog(seed) for seed in range(DIALOGS, DIALOGS + 8)}
    return {"blank": blank, "gradient": gradient, "one word": done, **few, "page": page}


def dialog(seed: int) -> Image.Image:
    """A box with a sentence or two and a button or two, on a plain ground of any screen's size."""
    rng = np.random.default_rng(seed)
    width, height = SCREENS[int(rng.integers(len(SCREENS)))]
    dark = bool(rng.random() < 0.3)
    ground, paper, ink = ("#202124", "#303134", "#e8eaed") if dark else ("#e8e8e8", "white", "#202020")
    image = Image.new("RGB", (width, height), paper if rng.random() < 0.3 else ground)
    draw, size = ImageDraw.Draw(image), int(rng.integers(12, 34))
    font = ImageFont.load_default(size)
    left, top = int(rng.uniform(0.05, 0.4) * width), int(rng.uniform(0.1, 0.5) * height)
    right, bottom = int(width - left * rng.uniform(0.5, 1.0)), min(height - 2, top + size * int(rng.integers(6, 11)))
    draw.rectangle((left, top, right, bottom), fill=paper, outline="#808080")
    for line in range(int(rng.integers(1, 3))):
        said = " ".join(rng.choice(SAID, int(rng.integers(1, 5))))
        draw.text((left + size, top + size * (1 + 1.4 * line)), said, fill=ink, font=font)
    for button in range(int(rng.integers(0, 3))):
        x, y = right - (button + 1) * size * 6, bottom - int(2.2 * size)
        draw.rectangle((x, y, x + size * 5, y + int(1.7 * size)), fill="#1a73e8" if button else "#d0d0d0")
        draw.text((x + size, y + size * 0.3), str(rng.choice(SAID)), fill="white" if button else "black", font=font)
    return image


if __name__ == "__main__":
    main()
