"""Fit how many pixels are enough to read an image, and judge it on sources that the fit has not seen.

    python training/general/fit.py DIR... --labels labels.jsonl [--out sufficiency.json] [--json]

DIR... are the folders that `label.py` read. What is fitted is

    log2 share = intercept - 2 stroke_low + CAREFUL max(0, 1 - text_share / TEXT)

Pixels are planned so that the finest strokes come out at a width that can be read: to keep .98 of the text, it is the
finest one in fifty that counts. The factor 2 is that of area over length: an image enlarged twice is planned a quarter
of the share, the same pixels. Where fewer than half of the finer strokes lie in a band of text, what was measured may
be texture and the text finer than it: the plan goes over to all pixels. A share is that of native pixels, so lengths
are taken at native size.

Each source is left out in turn, and the intercept is the smallest with which the others keep `GOAL`, each of them
counting the same: a quantile of what images need, set by what is lost beyond it. For forms with more coefficients,
those are fitted by the pinball loss, and the intercept is set on shares that the other sources were given by a fit
without them. Nothing is tuned to single images. The same labels give the same file.

Longer than other modules: a recipe is read from top to bottom, forms, fit, judging and tables in turn.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from label import read_labels
from PIL import Image
from rich.progress import track
from scipy.optimize import minimize

from adaptive_fusion.evaluation.shares import ENOUGH, SHARES, Curve, sized
from adaptive_fusion.evaluation.statistics import bootstrap_mean, bootstrap_ratio
from adaptive_fusion.features.detail import DETAIL_FEATURES, VERSION, detail_features
from adaptive_fusion.features.image import IMAGE_FEATURES, image_features, take_sample
from adaptive_fusion.media.load import load_media

Floats = np.ndarray[Any, np.dtype[np.float64]]
Model = Callable[[Floats], Floats]

STEPS = np.log2(SHARES)
GOAL = (0.986, 0.935)
"""Mean and 5th percentile of text kept that the intercept is set for: a little above .985 and .93."""
QUANTILE = 0.85
MARGIN = 1.1
"""In linear scale, over what the reader needs; see the policy's field."""
LENGTHS = ("text_height_low", "text_height", "stroke_low", "stroke", "flank")
TEXT = 0.5  # text_share from which on the strokes are taken for those of text
CAREFUL = 6.0  # octaves: 64 times the share, which is all pixels where strokes are up to 8 times as wide as needed
FEATURES = (*DETAIL_FEATURES, *IMAGE_FEATURES)
SMOOTH = 0.1  # of the corner of the pinball loss, in log2
RIDGE = 0.02
SEED = 0


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
    parser.add_argument("--out", type=Path, help="coefficients and figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    table = read(options.labels, {folder.name: folder for folder in options.sources}, quiet=options.json)
    figures, left_out = judge(table)
    figures["enlarged"] = enlarged(table, options.labels, {folder.name: folder for folder in options.sources}, left_out)
    if options.out:
        options.out.write_text(json.dumps(artefact(table) | {"figures": figures}, indent=2) + "\n", "utf-8")
    print(json.dumps(figures) if options.json else in_words(figures))


def read(labels: Path, folders: dict[str, Path], quiet: bool = False) -> Table:
    """Labels of the folders' images with text, and their features."""
    records = [r for r in read_labels(labels).values() if len(r["kept"]) > 1 and r["source"] in folders]
    rows = []
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
    return np.array([*detail, *image_features(take_sample(image))])


def curve(kept: dict[str, float]) -> Floats:
    """Text kept at each step; see `Curve`."""
    return Curve({float(share): part for share, part in kept.items()}).at(SHARES)


def strokes(table: Table) -> Model:
    """The form that is used, without its intercept."""
    del table
    return lambda x: predict(x)


def predict(features: Floats, length: str = "stroke_low") -> Floats:
    """log2 of the sufficient share, less the intercept and not cut off at 1."""
    size, text = (features[:, FEATURES.index(name)] for name in (length, "text_share"))
    return np.asarray(-2 * size + CAREFUL * np.maximum(0, 1 - text / TEXT))


def heights(table: Table) -> Model:
    del table
    return lambda x: predict(x, "text_height_low")


def strokes_alone(table: Table) -> Model:
    del table
    return lambda x: -2 * x[:, FEATURES.index("stroke_low")]


def boosted(table: Table) -> Model:
    """Boosted trees on all features, falling where lengths and text rise."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    falling = [-1 if name in (*LENGTHS, "text_share") else 0 for name in FEATURES]
    trees = HistGradientBoostingRegressor(
        loss="quantile", quantile=QUANTILE, max_iter=80, learning_rate=0.08, max_leaf_nodes=8, min_samples_leaf=8,
        monotonic_cst=falling, random_state=SEED,
    )  # fmt: skip
    trees.fit(table.features, table.oracle, sample_weight=table.weight * len(table.source))
    return lambda x: np.asarray(trees.predict(x))


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
    return lambda f: np.asarray(best[0] + (f - mean) / spread @ best[1:])


FORMS: dict[str, Callable[[Table], Model]] = {
    "strokes, careful without text": strokes,
    "strokes alone": strokes_alone,
    "height of text, careful without text": heights,
    "all features, linear": ridge_all,
    "all features, boosted trees": boosted,
}


def left_out_shares(table: Table, form: Callable[[Table], Model]) -> Floats:
    """log2 shares, each source's by a model of the others."""
    found = np.zeros(len(table.source))
    for name in np.unique(table.source):
        own = table.source == name
        found[own] = calibrated(table.part(~own), form)(table.features[own])
    return np.minimum(found, 0)


def calibrated(table: Table, form: Callable[[Table], Model]) -> Model:
    """A model whose intercept reaches `GOAL` on sources left out of its own data."""
    outside = np.zeros(len(table.source))
    for name in np.unique(table.source):
        own = table.source == name
        outside[own] = form(table.part(~own))(table.features[own])
    shift = smallest_shift(table, outside)
    model = form(table)
    return lambda x: model(x) + shift


def smallest_shift(table: Table, log_share: Floats) -> float:
    """What to add to log2 shares for `GOAL` to be reached, in steps of .02."""
    for shift in np.arange(-12, 16, 0.02):
        kept = table.text_kept(to_step(np.minimum(log_share + shift, 0)))
        if np.average(kept, weights=table.weight) >= GOAL[0] and np.quantile(kept, 0.05) >= GOAL[1]:
            return float(shift)
    return 16.0


def to_step(log_share: Floats) -> Floats:
    """The next step of the ladder up."""
    return np.array([min(step for step in STEPS if step >= min(x, 0.0) - 1e-9) for x in log_share])


def judge(table: Table) -> tuple[dict[str, Any], Floats]:
    """Figures of all forms, and the log2 shares of the one that is used."""
    figures: dict[str, Any] = {"images": len(table.source), "forms": {}}
    for name, form in FORMS.items():
        shares = left_out_shares(table, form)
        figures["forms"][name] = summary(table, to_step(shares))
        if form is strokes:
            chosen = shares
    ceiling = -2 * table.heights
    ceiling = np.minimum(ceiling + smallest_shift(table, ceiling), 0)
    figures["forms"]["the reader's own line heights (not known before reading)"] = summary(table, to_step(ceiling))
    figures["forms"]["oracle"] = summary(table, table.oracle)
    figures["sources"] = {
        str(name): summary(table.part(table.source == name), to_step(chosen)[table.source == name])
        for name in np.unique(table.source)
    }
    figures["margin 1, any share"] = against(table, chosen)
    figures["margin 1"] = against(table, to_step(chosen))
    figures[f"margin {MARGIN}"] = against(table, to_step(np.minimum(chosen + 2 * np.log2(MARGIN), 0)))
    return figures, chosen


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


def enlarged(table: Table, labels: Path, folders: dict[str, Path], chosen: Floats) -> dict[str, Any]:
    """Planned pixels of images enlarged (bicubic) over those of the images as they are; every fourth image."""
    model = calibrated(table, strokes)
    records = [r for r in read_labels(labels).values() if len(r["kept"]) > 1 and r["source"] in folders][::4]
    found: dict[str, Any] = {}
    for times in (2, 4):
        ratios = []
        for record in records:
            image = load_media(folders[record["source"]] / record["file"])
            if image.width * image.height * times**2 > 5e7:
                continue
            large = image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
            planned = [
                np.exp2(min(model(measure(i)[None])[0], 0.0)) * np.prod(sized(i.size, 1.0)) for i in (image, large)
            ]
            ratios.append(planned[1] / planned[0])
        found[f"{times}x"] = {
            "images": len(ratios),
            "median": float(np.median(ratios)),
            "within_25_percent": float(np.mean([0.8 <= ratio <= 1.25 for ratio in ratios])),
            "quantiles_5_95": np.quantile(ratios, [0.05, 0.95]).tolist(),
        }
    return found


def artefact(table: Table) -> dict[str, Any]:
    """What was fitted, on all sources."""
    features = table.features[:1]
    return {
        "schema": 1,
        "detail_version": VERSION,
        "intercept": round(float((calibrated(table, strokes)(features) - predict(features))[0]), 4),
        "text": TEXT,
        "careful": CAREFUL,
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
