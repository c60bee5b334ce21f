"""Fit how many pixels are enough to read an image, and judge it on sources that the fit has not seen.

    python training/general/fit.py DIR... --labels labels.jsonl [--out sufficiency.json] [--json]

DIR... are the folders that `label.py` read. What is fitted is

    log2 share = finest + text (min(finest, intercept - 2 size) - finest)
    size       = min(text_height_low, stroke_low + STROKES)
    finest     = -2 enlarged
    text       = clip((text_share - TEXTURE) / (TEXT - TEXTURE), 0, 1)

Pixels are planned so that the lower lines of text, or those of the thinnest strokes, come out at a height that can be
read. The factor 2 is that of area
over length: an image enlarged twice is planned a quarter of the share, the same pixels. Where few of the finer strokes
lie in a band of text, what was measured may be texture and the text finer than it: the plan goes over to `finest`, all
the pixels that have something to show, which is all of those of an image that does not look enlarged. A share is that
of native pixels, so lengths are taken at native size.

Each source is left out in turn, and the intercept is the smallest with which the others keep `GOAL`, each of them
counting the same: a quantile of what images need, set by what is lost beyond it. For forms with more coefficients,
those are fitted by the pinball loss, and the intercept is set on shares that the other sources were given by a fit
without them. Nothing is tuned to single images. The same labels give the same file.

Longer than other modules: a recipe is read from top to bottom, forms, fit, judging and tables in turn.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from label import read_labels
from PIL import Image
from rich.progress import track
from scipy.optimize import minimize

from adaptive_fusion.evaluation.shares import ENOUGH, RELEASED, SHARES, Curve, sized
from adaptive_fusion.evaluation.statistics import bootstrap_mean, bootstrap_ratio
from adaptive_fusion.features.detail import DETAIL_FEATURES, VERSION, detail_features
from adaptive_fusion.features.image import IMAGE_FEATURES, image_features, take_sample
from adaptive_fusion.media.load import load_media

Floats = np.ndarray[Any, np.dtype[np.float64]]
Record = dict[str, Any]
"""A label of label.py."""
Model = Callable[[Floats, float], Floats]
"""log2 shares, not cut off at 1, of rows of features and an intercept, with which they do not fall."""

STEPS = np.log2(SHARES)
"""Of the labels and of the oracle."""
LADDER = (
    1.0, 0.84, 0.71, 0.59, 0.5, 0.42, 0.35, 0.3, 0.25, 0.21, 0.18, 0.15, 0.125, 0.105, 0.09, 0.074, 0.0625,
    0.053, 0.044, 0.037, 0.031, 0.026, 0.022, 0.0186, 0.0156,
)  # fmt: skip
"""Shares of the general policies' steps: four to an octave, so that an image and its enlargement, of which not quite
the same is measured, are planned pixels within 25 %; and down to a 64th, which of an enlarged image is not little."""
RUNGS = np.log2(LADDER)
GOAL = (0.991, 0.955)
"""Mean and 5th percentile of text kept that the intercept is set for: above .985 and .93, which other sources must
keep."""
QUANTILE = 0.85
MARGIN = 1.1
"""In linear scale, over what the reader needs; see the policy's field."""
LENGTHS = ("text_height_low", "text_height", "stroke_low", "stroke", "flank")
ENLARGED = DETAIL_FEATURES.index("enlarged")
STROKES = 3.2  # octaves between the thinnest strokes and the height of the lower lines, where both are text's
TEXTURE, TEXT = 0.2, 0.8  # text_share up to which nothing is taken for text, and from which on all is
FEATURES = (*DETAIL_FEATURES, *IMAGE_FEATURES)
SMOOTH = 0.1  # of the corner of the pinball loss, in log2
RIDGE = 0.02
SEED = 0
KINDS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.NEAREST)
ENLARGEMENTS = tuple((kind, times) for kind in KINDS for times in (2, 4))


@dataclass(frozen=True)
class Table:
    """One row an image.

    `features`: (n, FEATURES), lengths in native pixels; `kept`: (n, SHARES) text kept, not falling with the share;
    `heights`: (n,) log2 of the 5th percentile of the reader's own line heights, by character; `pixels`: (n,) native.
    """

    source: np.ndarray[Any, Any]
    features: Floats
    kept: Floats
    words: Floats
    heights: Floats
    pixels: Floats

    @property
    def oracle(self) -> Floats:
        """log2 of the smallest step that keeps `ENOUGH`."""
        return STEPS[(self.kept >= ENOUGH).sum(axis=1) - 1]

    def column(self, *names: str) -> Floats:
        return self.features[:, [FEATURES.index(name) for name in names]]

    def part(self, rows: np.ndarray[Any, Any]) -> "Table":
        fields = (self.source, self.features, self.kept, self.words, self.heights, self.pixels)
        return Table(*(field[rows] for field in fields))

    def text_kept(self, log_share: Floats, words: bool = False) -> Floats:
        """Text kept at any share, linear in log2 of it between the steps."""
        rows = self.words if words else self.kept
        return np.array([np.interp(x, STEPS[::-1], row[::-1]) for x, row in zip(log_share, rows, strict=True)])

    @property
    def weight(self) -> Floats:
        """Every source counts the same."""
        names, index, count = np.unique(self.source, return_inverse=True, return_counts=True)
        return np.asarray(1.0 / (count[index] * len(names)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="DIR", help="folders of images")
    parser.add_argument("--labels", type=Path, required=True, help="from label.py")
    parser.add_argument("--judge", type=Path, help="labels whose images that are not in --labels are judged instead")
    parser.add_argument("--out", type=Path, help="coefficients and figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    folders = {folder.name: folder for folder in options.sources}
    fitted = list(read_labels(options.labels).values())
    judged = fitted if options.judge is None else unseen(options.judge, fitted)
    table = read(fitted, folders, quiet=options.json)
    figures = judge(table, table if options.judge is None else read(judged, folders, quiet=options.json))
    figures["enlarged"] = enlarged(table, judged, folders)
    if options.out:
        options.out.write_text(json.dumps(artefact(table) | {"figures": figures}, indent=2) + "\n", "utf-8")
    print(json.dumps(figures) if options.json else in_words(figures))


def unseen(labels: Path, fitted: list[Record]) -> list[Record]:
    """Labels of images that are not among those fitted, by their content."""
    known = {record["content_hash"] for record in fitted}
    return [record for record in read_labels(labels).values() if record["content_hash"] not in known]


def with_text(labels: list[Record], folders: dict[str, Path]) -> list[Record]:
    return [record for record in labels if len(record["kept"]) > 1 and record["source"] in folders]


def read(labels: list[Record], folders: dict[str, Path], quiet: bool = False) -> Table:
    """Labels of the folders' images with text, and their features."""
    records, rows = with_text(labels, folders), []
    for record in track(records, "features", disable=quiet):
        image = load_media(folders[record["source"]] / record["file"])
        sizes = sorted(height for count, height in record["lines"] for _ in range(count))
        height = float(np.log2(sizes[len(sizes) // 20]))
        kept, words = curve(record["kept"]), curve(record["words_kept"])
        rows.append((record["source"], measure(image), kept, words, height, float(np.prod(record["native"]))))
    source, features, kept, words, heights, pixels = map(np.array, zip(*rows, strict=True))
    return Table(source, features, kept, words, heights, pixels)


def measure(image: Image.Image) -> Floats:
    """Features of an image, lengths in pixels of its native size."""
    width, height = sized(image.size, 1.0)
    scale = np.log2(width * height / (image.width * image.height)) / 2
    detail = [
        value + scale if name in LENGTHS else value
        for name, value in zip(DETAIL_FEATURES, detail_features(image), strict=True)
    ]
    detail[ENLARGED] = max(0.0, detail[ENLARGED] + scale)  # what is shrunk to native size has no pixels to spare
    return np.array([*detail, *image_features(take_sample(image))])


def curve(kept: dict[str, float]) -> Floats:
    """Text kept at each step; see `Curve`."""
    return Curve({float(share): part for share, part in kept.items()}).at(SHARES)


def finer(table: Table) -> Model:
    """The form that is used."""
    del table
    return predict


def predict(features: Floats, intercept: float, sizes: Sequence[str] = ("text_height_low", "stroke_low")) -> Floats:
    """log2 of the sufficient share, not cut off at 1."""
    text_share, enlarged = (features[:, FEATURES.index(name)] for name in ("text_share", "enlarged"))
    octaves = {"text_height_low": 0.0, "stroke_low": STROKES}
    length = np.min([features[:, FEATURES.index(name)] + octaves[name] for name in sizes], axis=0)
    finest = -2 * enlarged
    text = np.clip((text_share - TEXTURE) / (TEXT - TEXTURE), 0, 1)
    return np.asarray(finest + text * (np.minimum(finest, intercept - 2 * length) - finest))


def strokes(table: Table) -> Model:
    del table
    return lambda x, intercept: predict(x, intercept, ("stroke_low",))


def heights(table: Table) -> Model:
    del table
    return lambda x, intercept: predict(x, intercept, ("text_height_low",))


def heights_alone(table: Table) -> Model:
    del table
    return lambda x, intercept: intercept - 2 * x[:, FEATURES.index("text_height_low")]


def boosted(table: Table) -> Model:
    """Boosted trees on all features, falling where lengths and text rise."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    falling = [-1 if name in (*LENGTHS, "text_share") else 0 for name in FEATURES]
    trees = HistGradientBoostingRegressor(
        loss="quantile", quantile=QUANTILE, max_iter=80, learning_rate=0.08, max_leaf_nodes=8, min_samples_leaf=8,
        monotonic_cst=falling, random_state=SEED,
    )  # fmt: skip
    trees.fit(table.features, table.oracle, sample_weight=table.weight * len(table.source))
    return lambda x, intercept: np.asarray(intercept + trees.predict(x))


def ridge_all(table: Table) -> Model:
    """Linear on all features by the pinball loss, standardised, lengths and text with weights of at most 0."""
    mean, spread = table.features.mean(axis=0), table.features.std(axis=0) + 1e-9
    x, target, weight = (table.features - mean) / spread, table.oracle, table.weight

    def loss(p: Floats) -> float:
        error = target - np.minimum(p[0] + x @ p[1:], 0)
        pinball = QUANTILE * error + SMOOTH * np.logaddexp(0, -error / SMOOTH)
        return float((weight * pinball).sum() + RIDGE * (p[1:] ** 2).sum())

    bounds = [(None, None), *((None, 0) if n in (*LENGTHS, "text_share") else (None, None) for n in FEATURES)]
    best = minimize(loss, np.zeros(1 + x.shape[1]), method="L-BFGS-B", bounds=bounds).x
    return lambda f, intercept: np.asarray(intercept + best[0] + (f - mean) / spread @ best[1:])


FORMS: dict[str, Callable[[Table], Model]] = {
    "height of text or strokes, careful without text": finer,
    "height of text, careful without text": heights,
    "height of text alone": heights_alone,
    "strokes, careful without text": strokes,
    "all features, linear": ridge_all,
    "all features, boosted trees": boosted,
}


def left_out_shares(table: Table, form: Callable[[Table], Model], judged: Table) -> Floats:
    """log2 shares of what is judged, each source's by a model of the table's others."""
    found = np.zeros(len(judged.source))
    for name in np.unique(judged.source):
        own, others = judged.source == name, table.part(table.source != name)
        found[own] = form(others)(judged.features[own], intercept(others, form))
    return np.minimum(found, 0)


def intercept(table: Table, form: Callable[[Table], Model]) -> float:
    """The smallest with which `GOAL` is reached on sources left out of the table in turn."""
    models = [(table.source == name, form(table.part(table.source != name))) for name in np.unique(table.source)]

    def shares(value: float) -> Floats:
        found = np.zeros(len(table.source))
        for own, model in models:
            found[own] = model(table.features[own], value)
        return found

    return smallest(table, shares)


def smallest(table: Table, shares: Callable[[float], Floats]) -> float:
    """The smallest value whose log2 shares reach `GOAL`, in steps of .02; shares do not fall with it."""
    low, high = -600, 800
    while high - low > 1:
        middle = (low + high) // 2
        kept = table.text_kept(to_step(np.minimum(shares(middle / 50), 0)))
        reached = np.average(kept, weights=table.weight) >= GOAL[0] and np.quantile(kept, 0.05) >= GOAL[1]
        low, high = (low, middle) if reached else (middle, high)
    return high / 50


def to_step(log_share: Floats) -> Floats:
    """The next step of the ladder up."""
    return np.array([min(step for step in RUNGS if step >= min(x, 0.0) - 1e-9) for x in log_share])


def judge(fitted: Table, table: Table) -> dict[str, Any]:
    """Figures of all forms on a table, and of the one that is used by source and margin."""
    figures: dict[str, Any] = {"images": len(table.source), "forms": {}}
    for name, form in FORMS.items():
        shares = left_out_shares(fitted, form, table)
        figures["forms"][name] = summary(table, to_step(shares))
        if form is finer:
            chosen = shares
    ceiling = -2 * table.heights
    ceiling = np.minimum(ceiling + smallest(table, lambda value: ceiling + value), 0)
    figures["forms"]["the reader's own line heights (not known before reading)"] = summary(table, to_step(ceiling))
    figures["forms"]["oracle"] = summary(table, table.oracle)
    figures["sources"] = {
        str(name): summary(table.part(table.source == name), to_step(chosen)[table.source == name])
        for name in np.unique(table.source)
    }
    figures["margin 1, any share"] = against(table, chosen)
    figures["margin 1"] = against(table, to_step(chosen))
    figures[f"margin {MARGIN}"] = against(table, to_step(np.minimum(chosen + 2 * np.log2(MARGIN), 0)))
    return figures


def summary(table: Table, log_share: Floats) -> dict[str, float]:
    kept = table.text_kept(log_share)
    return {
        "images": len(kept),
        "kept": float(kept.mean()),
        "kept_p5": float(np.quantile(kept, 0.05)),
        "words_kept": float(table.text_kept(log_share, words=True).mean()),
        "share": float(np.exp2(log_share).mean()),
        "oracle": float(np.exp2(table.oracle).mean()),
        "over_oracle": float(np.exp2(log_share).mean() / np.exp2(table.oracle).mean()),
        "tokens": float((np.exp2(log_share) * table.pixels).sum() / table.pixels.sum()),
    }


def against(table: Table, log_share: Floats) -> dict[str, Any]:
    """Tokens against the smallest fixed share and the smallest fixed `max_pixels` of no less text kept."""
    found: dict[str, Any] = summary(table, log_share)
    kept = bootstrap_mean(table.text_kept(log_share), seed=SEED)
    found["kept_interval"] = [kept.low, kept.high]
    need = found["kept"], found["kept_p5"]
    constants = {
        "fixed share": np.repeat(np.linspace(STEPS[-1], 0, 400)[:, None], len(table.source), axis=1),
        "fixed max_pixels": np.minimum(np.linspace(14, 24, 600)[:, None] - np.log2(table.pixels), 0),
    }
    for name, candidates in constants.items():
        for shares in candidates:
            reached = table.text_kept(shares)
            if reached.mean() >= need[0] and np.quantile(reached, 0.05) >= need[1]:
                break
        tokens = np.exp2(shares) * table.pixels
        ratio = bootstrap_ratio(np.exp2(log_share) * table.pixels, tokens, seed=SEED)
        found[name] = {
            "share": float(np.exp2(shares).mean()),
            "max_pixels": float(tokens.max()),
            "tokens": float(tokens.sum() / table.pixels.sum()),
            "ratio": [ratio.mean, ratio.low, ratio.high],
        }
    return found


def enlarged(table: Table, labels: list[Record], folders: dict[str, Path]) -> dict[str, Any]:
    """Pixels planned for images enlarged over those for the images as they are, on the ladder; every fourth image."""
    value = intercept(table, finer)
    records = with_text(labels, folders)[::4]
    ratios: dict[str, list[float]] = {f"{kind.name.lower()} {times}x": [] for kind, times in ENLARGEMENTS}
    for record in records:
        image = load_media(folders[record["source"]] / record["file"]).convert("RGB")
        planned = pixels(image, value)
        for kind, times in ENLARGEMENTS:
            if image.width * image.height * times**2 <= RELEASED.size["longest_edge"]:  # beyond it native is smaller
                large = image.resize((image.width * times, image.height * times), kind)
                ratios[f"{kind.name.lower()} {times}x"].append(pixels(large, value) / planned)
    return {
        name: {
            "images": len(each),
            "median": float(np.median(each)),
            "within_25_percent": float(np.mean([0.8 <= ratio <= 1.25 for ratio in each])),
            "quantiles_5_95": np.quantile(each, [0.05, 0.95]).tolist(),
        }
        for name, each in ratios.items()
    }


def pixels(image: Image.Image, value: float) -> float:
    """Planned for an image by the ladder, at the margin."""
    share = min(predict(measure(image)[None], value)[0] + 2 * np.log2(MARGIN), 0.0)
    return float(np.exp2(to_step(np.array([share]))[0]) * np.prod(sized(image.size, 1.0)))


def artefact(table: Table) -> dict[str, Any]:
    """What was fitted, on all sources."""
    return {
        "schema": 3,
        "detail_version": VERSION,
        "intercept": round(intercept(table, finer), 4),
        "strokes": STROKES,
        "texture": TEXTURE,
        "text": TEXT,
        "features": {
            name: [round(float(end), 4) for end in (column.min(), column.max())]
            for name, column in zip(FEATURES, table.features.T, strict=True)
        },
    }


def in_words(figures: dict[str, Any]) -> str:
    def row(name: str, f: dict[str, float]) -> str:
        keys = ("images", "kept", "kept_p5", "words_kept", "share", "oracle", "over_oracle", "tokens")
        return f"{name[:44]:44}" + "".join(f"{f[key]:10.0f}" if key == "images" else f"{f[key]:10.3f}" for key in keys)

    head = f"{'':44}" + "".join(
        f"{k:>10}" for k in ("images", "kept", "5th pct", "words", "share", "oracle", "ratio", "tokens")
    )
    lines = ["Each source left out in turn, margin 1", head]
    lines += [row(name, f) for name, f in figures["forms"].items()]
    lines += ["", "The form that is used, by source left out", head]
    lines += [row(name, f) for name, f in figures["sources"].items()]
    for name in ("margin 1, any share", "margin 1", f"margin {MARGIN}"):
        f = figures[name]
        lines += ["", name, head, row("", f), f"  text kept, 95 % interval {f['kept_interval']}"]
        for fixed in ("fixed share", "fixed max_pixels"):
            g = f[fixed]
            low, high = g["ratio"][1:]
            lines.append(
                f"  {fixed:17} of no less text kept: share {g['share']:.3f}, largest {g['max_pixels'] / 1e6:.2f} MP, "
                f"tokens {g['tokens']:.3f}; ours over it {g['ratio'][0]:.3f} [{low:.3f}, {high:.3f}]"
            )
    for times, f in figures["enlarged"].items():
        lines.append(
            f"enlarged {times}: planned pixels over those before, median {f['median']:.3f}, 5th to 95th percentile "
            f"{f['quantiles_5_95'][0]:.2f} to {f['quantiles_5_95'][1]:.2f}, within 25 %: {f['within_25_percent']:.2f} "
            f"of {f['images']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
