"""Fit `Complexity.score` to human judgement of visual complexity (SAVOIAS) and say how well it agrees.

    python training/complexity/fit.py --data DIR [--out FILE] [--cache DIR] [--json]

DIR holds `scores.csv` (columns file, category, score) and the images it names. Scores come from votes within
a category, so they are only ever compared within one: the target is the rank within the category, and each
category counts the same. The figure is the Spearman correlation in each category, predicted by a fit on the
others only and one image at a time. The same data give a byte-identical file. Features are cached, keyed by
their content and by the extractor's source.
"""

import argparse
import csv
import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from rich.progress import track
from scipy.optimize import nnls
from scipy.stats import rankdata

from adaptive_fusion.features import image
from adaptive_fusion.features.complexity import VERSION
from adaptive_fusion.features.image import IMAGE_FEATURES, image_features, take_sample
from adaptive_fusion.media.load import load_media

Array = np.ndarray[Any, np.dtype[Any]]

SCORE_FEATURES = (
    "grey_entropy", "hue_entropy", "chroma_colours", "corners", "flat_regions", "edge_objects"
)  # fmt: skip
"""Each rises with complexity in every category; forward selection on any four of them picks nearly these."""

BASELINE = ("edge_density", "grey_entropy")
RIDGE = 0.1
LOGISTIC_TO_NORMAL = 1.702  # the logistic function with this slope is the normal distribution's within 0.01
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "adaptive_fusion" / "data" / "complexity-v1.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with scores.csv and the images")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="coefficients as JSON")
    parser.add_argument("--cache", type=Path, default=Path("runs/complexity"), help="folder of cached features")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()

    rows = read_scores(options.data)
    features, data_hash = extract(options.data, rows, options.cache, quiet=options.json)
    categories = np.array([row["category"] for row in rows])
    scores = np.array([float(row["score"]) for row in rows])
    figures = {
        "score": leave_one_out(select(features, SCORE_FEATURES), categories, scores),
        "edge density + entropy": leave_one_out(select(features, BASELINE), categories, scores),
        "all image features": leave_one_out(features, categories, scores),
        "score, in sample": in_sample(select(features, SCORE_FEATURES), categories, scores),
    }
    artefact = fit_score(select(features, SCORE_FEATURES), categories, scores)
    artefact |= {
        "data": {"images": len(rows), "sha256": data_hash, "name": "SAVOIAS"},
        "leave_one_category_out_spearman": figures,
    }
    options.out.write_text(json.dumps(artefact, indent=2) + "\n", "utf-8")
    if options.json:
        print(json.dumps(figures))
        return
    names = sorted(set(categories.tolist()))
    print("Spearman with human judgement, each category predicted from the others")
    print(f"{'':24}" + "".join(f"{name:>15}" for name in (*names, "mean")))
    for label, figure in figures.items():
        print(f"{label:24}" + "".join(f"{figure[name]:15.3f}" for name in (*names, "mean")))


def read_scores(data: Path) -> list[dict[str, str]]:
    with (data / "scores.csv").open(newline="", encoding="utf-8") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["file"])


def extract(data: Path, rows: list[dict[str, str]], cache: Path, quiet: bool) -> tuple[Array, str]:
    """(images, features) and the SHA-256 over all names, scores and contents."""
    measure = joblib.Memory(cache, verbose=0).cache(_measure, ignore=["path"])
    extractor = hashlib.sha256(inspect.getsource(image).encode()).hexdigest()
    digest, vectors = hashlib.sha256(), []
    for row in track(rows, "features", disable=quiet):
        path = data / row["file"]
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{row['file']},{row['category']},{row['score']},{content}\n".encode())
        vectors.append(measure(path, content, extractor))
    return np.array(vectors), digest.hexdigest()


def _measure(path: Path, content: str, extractor: str) -> Array:
    return np.array(image_features(take_sample(load_media(path))))  # needs no coefficients to begin with


def select(features: Array, names: tuple[str, ...]) -> Array:
    return features[:, [IMAGE_FEATURES.index(name) for name in names]]


def ranks(categories: Array, scores: Array) -> Array:
    """Rank within the category, spread over (-0.5, 0.5)."""
    target = np.zeros(len(scores))
    for category in np.unique(categories):
        own = categories == category
        target[own] = (rankdata(scores[own]) - 0.5) / own.sum() - 0.5
    return target


def fit_weights(features: Array, categories: Array, target: Array) -> tuple[Array, Array, Array]:
    """Mean, scale and weight (at least 0) of each feature: ridge on deviations from the category's mean.

    Categories count the same whatever their size. Scale is the spread within categories. A weight below 0
    would say that more of something makes an image simpler: true within one category at most.
    """
    names = np.unique(categories)
    groups = [features[categories == name] for name in names]
    mean = np.mean([group.mean(axis=0) for group in groups], axis=0)
    scale = np.sqrt(np.mean([group.var(axis=0) for group in groups], axis=0))
    scale = np.where(scale > 0, scale, 1.0)
    gram, moment = RIDGE * np.eye(features.shape[1]), np.zeros(features.shape[1])
    for name, group in zip(names, groups, strict=True):
        centred = (group - group.mean(axis=0)) / scale
        gram += centred.T @ centred / len(group) / len(names)
        moment += centred.T @ target[categories == name] / len(group) / len(names)
    root = np.linalg.cholesky(gram)
    return mean, scale, nnls(root.T, np.linalg.solve(root, moment))[0]


def linear(features: Array, mean: Array, scale: Array, weight: Array) -> Array:
    """As the runtime computes it, but for intercept and slope."""
    return (features - mean) / scale @ weight


def spearman(a: Array, b: Array) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def leave_one_out(features: Array, categories: Array, scores: Array) -> dict[str, float]:
    target, figures = ranks(categories, scores), {}
    for name in np.unique(categories):
        own = categories == name
        fitted = fit_weights(features[~own], categories[~own], target[~own])
        figures[str(name)] = round(spearman(linear(features[own], *fitted), scores[own]), 4)
    return figures | {"mean": round(sum(figures.values()) / len(figures), 4)}


def in_sample(features: Array, categories: Array, scores: Array) -> dict[str, float]:
    total = linear(features, *fit_weights(features, categories, ranks(categories, scores)))
    figures = {
        str(name): round(spearman(total[categories == name], scores[categories == name]), 4)
        for name in np.unique(categories)
    }
    return figures | {"mean": round(sum(figures.values()) / len(figures), 4)}


def fit_score(features: Array, categories: Array, scores: Array) -> dict[str, Any]:
    """Coefficients with which the scores of the fitting data spread evenly over (0, 1)."""
    mean, scale, weight = fit_weights(features, categories, ranks(categories, scores))
    total = linear(features, mean, scale, weight)
    groups = [total[categories == name] for name in np.unique(categories)]
    centre = float(np.mean([group.mean() for group in groups]))
    spread = math.sqrt(float(np.mean([np.mean((group - centre) ** 2) for group in groups])))
    slope = LOGISTIC_TO_NORMAL / spread
    return {
        "schema": 1,
        "feature_version": VERSION,
        "features": list(SCORE_FEATURES),
        "mean": [_rounded(value) for value in mean],
        "scale": [_rounded(value) for value in scale],
        "weight": [_rounded(value * slope) for value in weight],
        "intercept": _rounded(-centre * slope),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # more digits would differ between processors and say nothing


if __name__ == "__main__":
    main()
