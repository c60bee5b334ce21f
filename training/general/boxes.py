"""Fit how many pixels are enough to see the objects of a photograph, for questions that ask for a description.

    python training/general/boxes.py DIR... [--also DIR...] [--out boxes.json] [--json]

DIR... are folders of photographs with the boxes of their objects (`truth.jsonl`, see README.md); of `--also` only the
planned shares are reported. An object counts where the shorter side of its box spans a patch (16 pixels) natively, and
is kept at a share s of the pixels where side x sqrt(s) still does. What is fitted is

    log2 pixels = intercept + slope x flat_regions,        share = min(1, pixels / native pixels)

`flat_regions` is ln(1 + surfaces) of the image at 64 pixels (`adaptive_fusion/features/image.py`): more surfaces,
smaller things. It is no length, so an image enlarged twice is planned the same pixels.

Two numbers come from data. The slope, at least 0, is the smallest that keeps about as many objects as the best one, on
average over `LEVELS` of the mean share: no one level decides. The intercept is the smallest that keeps `GOAL` of the
objects of the folders together. Each folder is left out in turn, and the photographs of each in folds; the fixed share
to beat spends the same pixels in all.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.folders import media_files
from adaptive_fusion.evaluation.shares import SHARES, within
from adaptive_fusion.evaluation.statistics import bootstrap_ratio
from adaptive_fusion.features.complexity import VERSION, measure_complexity
from adaptive_fusion.media.load import load_media

Floats = np.ndarray[Any, np.dtype[np.float64]]
Rows = np.ndarray[Any, np.dtype[np.int64]]

PATCH = 16
GOAL = 0.97
LEVELS = (0.25, 0.35, 0.45, 0.6, 0.75)
"""Mean shares that the slope is judged at, and that figures are given for."""
SLOPES = np.linspace(0.0, 2.0, 41)
ALIKE = (
    0.002  # of the objects: slopes that differ by less in what they keep are equally good, and the smallest is taken
)
TOKEN = 32 * 32  # pixels
FLOORS = (0, 64, 96, 128, 192, 256)
FOLDS, REPEATS = 8, 5
FEW = 30
SEED = 0
EPSILON = 1e-9


@dataclass(frozen=True)
class Photos:
    """One row a photograph with an object that counts.

    `photo`: (n,) its number, the same where one is taken at several sizes; `values`: (n, 2) flat_regions and the
    complexity score; `pixels`: (n,) native; `needs`: of each the log2 shares that its objects need.
    """

    source: np.ndarray[Any, Any]
    photo: Rows
    values: Floats
    pixels: Floats
    needs: tuple[Floats, ...]

    def part(self, rows: Rows) -> "Photos":
        needs = tuple(self.needs[row] for row in rows)
        return Photos(self.source[rows], self.photo[rows], self.values[rows], self.pixels[rows], needs)

    def counts(self) -> Floats:
        return np.array([len(need) for need in self.needs], dtype=np.float64)

    @cached_property
    def each(self) -> tuple[Rows, Floats]:
        """Of every object the row of its photograph, and what it needs."""
        return np.repeat(np.arange(len(self.needs)), [len(need) for need in self.needs]), np.concatenate(self.needs)

    def kept(self, log_share: Floats) -> Floats:
        """How many objects of each are kept."""
        row, need = self.each
        kept = need <= log_share[row] + EPSILON
        return np.bincount(row, weights=kept, minlength=len(self.needs)).astype(np.float64)

    def share_kept(self, log_share: Floats) -> float:
        return float(self.kept(log_share).sum() / self.counts().sum())


@dataclass(frozen=True)
class Form:
    """log2 pixels = intercept + slope x value + growth x log2 native pixels, with a slope of 0 or a fitted one."""

    column: int = 0
    growth: float = 0.0
    sloped: bool = True

    def relative(self, photos: Photos, slope: float) -> Floats:
        """log2 share less the intercept, not cut off at 1."""
        return np.asarray(slope * photos.values[:, self.column] + (self.growth - 1) * np.log2(photos.pixels))

    def slope(self, photos: Photos) -> float:
        """The smallest slope that keeps, on average over `LEVELS`, about as much as the best one."""

        def kept(slope: float) -> float:
            relative = self.relative(photos, slope)
            return float(np.mean([photos.share_kept(at_mean(relative, level)) for level in LEVELS]))

        if not self.sloped:
            return 0.0
        means = np.array([kept(float(slope)) for slope in SLOPES])
        return float(SLOPES[np.argmax(means >= means.max() - ALIKE)])


FORMS = {
    "surfaces": Form(),
    "surfaces, growing with the root of native": Form(growth=0.5),
    "surfaces, as a share": Form(growth=1.0),
    "complexity score": Form(column=1),
    "fixed pixels": Form(sloped=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", type=Path, nargs="+", metavar="DIR", help="folders of photographs with boxes")
    parser.add_argument("--also", type=Path, nargs="*", default=[], metavar="DIR", help="folders to report shares of")
    parser.add_argument("--out", type=Path, help="coefficients and figures as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    photos = read(options.sources, quiet=options.json)
    found = artefact(photos) | {"figures": judge(photos)}
    intercept, slope = found["intercept"], found["slope"]
    found["figures"]["sizes"] = sizes(options.sources, intercept, slope, quiet=options.json)
    found["figures"]["enlarged"] = enlarged(options.sources, slope, found["intercepts"])
    found["figures"]["also"] = {path.name: shares_of(path, intercept, slope) for path in options.also}
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(json.dumps(found) if options.json else in_words(found))


def read(folders: Sequence[Path], times: Sequence[int] = (1,), quiet: bool = False) -> Photos:
    """Photographs of the folders with at least one box whose shorter side spans a patch natively.

    Each is taken `times`, as if the file had so many times the width and height.

    Raises:
        ConfigError: Where there is none.
    """
    rows: list[tuple[Any, ...]] = []
    number = 0
    for folder in folders:
        lines = (folder / "truth.jsonl").read_text("utf-8").splitlines()
        for record in track([json.loads(line) for line in lines if line], folder.name, disable=quiet):
            number += 1
            image = load_media(folder / record["file"])
            pixels = native(image)
            scale = np.sqrt(pixels / (image.width * image.height))
            boxes = np.array([box["box"] for box in record.get("boxes", ())], dtype=np.float64).reshape(-1, 4)
            sides = scale * np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
            for side in times:
                counted = side * sides[side * sides >= PATCH]
                if len(counted):
                    needs = 2 * np.log2(PATCH / counted)
                    rows.append((folder.name, number, values(image), side**2 * pixels, needs))
    if not rows:
        raise ConfigError(f"no photograph with a box that spans {PATCH} pixels in {[f.name for f in folders]}")
    source, photo, measured, pixels, needs = zip(*rows, strict=True)
    return Photos(np.array(source), np.array(photo), np.array(measured), np.array(pixels), needs)


def native(image: Image.Image) -> float:
    return float(np.prod(within(image.size)))


def values(image: Image.Image) -> list[float]:
    measured = measure_complexity(image)
    return [measured.features["flat_regions"], measured.score]


def least(enough: Callable[[float], bool]) -> float:
    """The least number from -60 to 60 that is enough, to a millionth."""
    low, high = -60.0, 60.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def at_mean(relative: Floats, share: float) -> Floats:
    """log2 shares with a mean share."""
    intercept = least(lambda x: float(np.exp2(np.minimum(relative + x, 0)).mean()) >= share)
    return np.minimum(relative + intercept, 0)


def intercept_for(photos: Photos, relative: Floats, goal: float) -> float:
    """The smallest intercept that keeps a share of the objects."""
    return least(lambda x: photos.share_kept(np.minimum(relative + x, 0)) >= goal)


def unseen(photos: Photos, form: Form, level: float | None, parts: Sequence[tuple[Rows, Rows]]) -> Floats:
    """log2 shares of photographs by fits without them: at a mean share, or to keep `GOAL` (None).

    At a mean share, it is that of each part: what is asked is only which photographs get more of it.
    """
    shares = np.zeros(len(photos.pixels))
    for fitted, left in parts:
        slope = form.slope(photos.part(fitted))
        relative = form.relative(photos.part(left), slope)
        if level is not None:
            shares[left] = at_mean(relative, level)
        else:
            seen = photos.part(fitted)
            shares[left] = np.minimum(relative + intercept_for(seen, form.relative(seen, slope), GOAL), 0)
    return shares


def folds(rows: Rows, seed: int) -> list[tuple[Rows, Rows]]:
    order = np.random.default_rng(seed).permutation(rows)
    return [(np.setdiff1d(order, order[part::FOLDS]), order[part::FOLDS]) for part in range(FOLDS)]


def against(photos: Photos, log_share: Floats) -> dict[str, Any]:
    """Objects kept, less those of the fixed share of equal pixels in all, with a paired 95 % interval."""
    share = np.exp2(log_share)
    fixed = float((share * photos.pixels).sum() / photos.pixels.sum())
    same = photos.kept(np.full(len(share), np.log2(fixed)))
    gain = bootstrap_ratio(photos.kept(log_share) - same, photos.counts(), seed=SEED, groups=photos.photo)
    return {
        "photos": len(share),
        "kept": photos.share_kept(log_share),
        "share": float(share.mean()),
        "pixels": fixed,
        "gain": [gain.mean, gain.low, gain.high],
    }


def judge(photos: Photos) -> dict[str, Any]:
    """Figures of photographs that the fit has not seen."""
    everything = np.arange(len(photos.pixels))
    names = [str(name) for name in np.unique(photos.source)]
    apart = [(everything[photos.source != name], everything[photos.source == name]) for name in names]
    figures: dict[str, Any] = {"images": len(everything), "objects": int(photos.counts().sum())}
    figures["forms, in folds"] = {
        name: {str(level): against(photos, unseen(photos, form, level, folds(everything, SEED))) for level in LEVELS}
        for name, form in FORMS.items()
    }
    form = FORMS["surfaces"]
    for name in names:
        own = everything[photos.source == name]
        others = [pair for pair in apart if len(pair[0]) and photos.source[pair[1][0]] == name]
        rounds = [folds(own, seed) for seed in range(REPEATS)]
        figures[f"{name}, in folds"] = {str(level): repeated(photos, form, level, own, rounds) for level in LEVELS}
        if others:
            figures[f"{name}, left out"] = {
                str(level): repeated(photos, form, level, own, [others]) for level in LEVELS
            }
            figures[f"{name}, left out"][f"kept {GOAL}"] = repeated(photos, form, None, own, [others])
    shares = unseen(photos, form, None, folds(everything, SEED))
    figures[f"kept {GOAL}, in folds"] = against(photos, shares)
    figures[f"kept {GOAL}, in folds, next step up"] = against(photos, to_step(shares))
    needed = np.array([need.max() for need in photos.needs])
    figures["all objects, known"] = against(photos, needed)
    figures["floors"] = {str(tokens): against(photos, at_least(photos, shares, tokens)) for tokens in FLOORS}
    return figures


def repeated(
    photos: Photos, form: Form, level: float | None, own: Rows, rounds: Sequence[Sequence[tuple[Rows, Rows]]]
) -> dict[str, Any]:
    """`against`, the mean of several ways to cut into folds."""
    found = [against(photos.part(own), unseen(photos, form, level, parts)[own]) for parts in rounds]
    means = {key: float(np.mean([f[key] for f in found])) for key in ("kept", "share", "pixels")}
    return {"photos": len(own), **means, "gain": np.mean([f["gain"] for f in found], axis=0).tolist()}


def to_step(log_share: Floats) -> Floats:
    """The next step of the ladder up."""
    steps = np.log2(SHARES)
    return np.array(
        [min(step for step in steps if step >= share - EPSILON) for share in np.maximum(log_share, steps[-1])]
    )


def at_least(photos: Photos, log_share: Floats, tokens: int) -> Floats:
    floor = np.log2(max(tokens, 1) * TOKEN / photos.pixels)
    return np.minimum(np.maximum(log_share, floor), 0)


def artefact(photos: Photos) -> dict[str, Any]:
    """What was fitted, on all folders; intercepts by what they keep or spend on them."""
    form = FORMS["surfaces"]
    slope = round(form.slope(photos), 4)
    relative = form.relative(photos, slope)
    others = {f"kept {goal}": intercept_for(photos, relative, goal) for goal in (0.9, 0.95, 0.97)}
    others |= {f"mean share {level}": float((at_mean(relative, level) - relative).max()) for level in LEVELS}
    return {
        "schema": 1,
        "feature": "flat_regions",
        "feature_version": VERSION,
        "slope": slope,
        "intercept": round(intercept_for(photos, relative, GOAL), 4),
        "intercepts": {name: round(value, 4) for name, value in others.items()},
    }


def sizes(folders: Sequence[Path], intercept: float, slope: float, quiet: bool) -> dict[str, Any]:
    """Figures of photographs of other sizes, and of several at once; what is planned at 2**18 pixels is the same."""
    found = {}
    for times in ((2,), (4,), (1, 2, 4)):
        photos = read(folders, times, quiet)
        for name, form in FORMS.items():
            if form.column == 0 and form.sloped:
                relative = form.relative(photos, slope)
                shares = np.minimum(relative + intercept - 18 * form.growth, 0)
                found[f"width times {', '.join(map(str, times))}; {name}"] = against(photos, shares)
    return found


def planned(image: Image.Image, intercept: float, slope: float) -> float:
    return float(min(np.exp2(intercept + slope * values(image)[0]), native(image)))


def enlarged(folders: Sequence[Path], slope: float, intercepts: dict[str, float]) -> dict[str, Any]:
    """Planned pixels of photographs enlarged (bicubic) over those of the photographs as they are, by intercept.

    A photograph that is planned all its pixels, but needs more, is planned more of them when enlarged.
    """
    images = [image for folder in folders for image in some_of(folder)]
    found: dict[str, Any] = {}
    for times in (2, 4):
        large = [
            image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC) for image in images
        ]
        for name, intercept in intercepts.items():
            before, after = (np.array([planned(i, intercept, slope) for i in them]) for them in (images, large))
            within = float(np.mean((after >= 0.8 * before) & (after <= 1.25 * before)))
            median = float(np.median(after / before))
            found[f"{times}x, {name}"] = {"images": len(images), "median": median, "within_25_percent": within}
    return found


def shares_of(folder: Path, intercept: float, slope: float) -> dict[str, Any]:
    """Shares and tokens that some images of a folder are planned."""
    images = some_of(folder)
    pixels = np.array([planned(image, intercept, slope) for image in images])
    shares = pixels / np.array([native(image) for image in images])
    spread = np.quantile(shares, [0.05, 0.5, 0.95]).tolist()
    return {"images": len(images), "share": float(shares.mean()), "quantiles": spread, "tokens": pixels.mean() / TOKEN}


def some_of(folder: Path) -> list[Image.Image]:
    """`FEW` images of a folder, that only their names choose."""
    found = media_files([folder])[0]
    return [load_media(path) for path in sorted(found, key=lambda p: hashlib.sha256(p.name.encode()).digest())[:FEW]]


def in_words(found: dict[str, Any]) -> str:
    figures = found["figures"]

    def row(name: str, f: dict[str, Any]) -> str:
        gain, low, high = f["gain"]
        return (
            f"{name[:62]:62}{f['kept']:7.3f}{f['share']:7.3f}{f['pixels']:8.3f}   {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        )

    lines = [f"log2 pixels = {found['intercept']} + {found['slope']} flat_regions; {found['intercepts']}"]
    lines += [f"{figures['images']} photographs, {figures['objects']} objects, shares fitted without them"]
    lines += [f"{'':62}{'kept':>7}{'share':>7}{'pixels':>8}   over the fixed share of equal pixels"]
    for name, f in figures.items():
        if isinstance(f, dict) and "gain" in f:
            lines.append(row(name, f))
        elif "folds" in name or "left out" in name or name in ("floors", "sizes"):
            for key, inner in f.items():
                cells = inner if "gain" not in inner else {"": inner}
                lines += [row(f"{name}: {key} {level}", cell) for level, cell in cells.items()]
    for times, f in figures["enlarged"].items():
        lines.append(
            f"enlarged {times}: median {f['median']:.3f}, within 25 %: {f['within_25_percent']:.2f} of {f['images']}"
        )
    for name, f in figures["also"].items():
        low, middle, high = f["quantiles"]
        lines.append(f"{name}: share {f['share']:.3f} ({low:.2f}, {middle:.2f}, {high:.2f}), {f['tokens']:.0f} tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
