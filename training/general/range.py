"""Fit what images of the known kinds are like, so that a policy can tell when an image is unlike all of them.

    python training/general/range.py DIR... --out range.json [--cache DIR] [--strange 48] [--json]

Each DIR is a kind: a folder of images; other files in it are left alone. Every image is measured as it is and at
another size (half to twice), so that sizes are no surprise. Kinds drawn here, plain grounds, boxes and the reference
model's screens, are added: an empty image is nothing to be careful about. The strange families are drawn by
`strange.py`; the blurred ones are made of the folders' images.

Judged by random splits within kinds, by leaving a folder out (its share of unlike images is reported only), and by
leaving out the strange generator, or the whole family, that is judged. The same images give the same file. Features are
cached by content.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.progress import track
from strange import BLURS, FAMILIES

from adaptive_fusion.evaluation.folders import media_files
from adaptive_fusion.features.detail import DETAIL_FEATURES, detail_features
from adaptive_fusion.features.image import IMAGE_FEATURES, image_features, take_sample
from adaptive_fusion.learning.fitting.familiar import fit_familiar
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import load_media
from adaptive_fusion.policy.familiar import Familiar
from adaptive_fusion.reference.screens import make_scene

Floats = np.ndarray[Any, np.dtype[np.float64]]

LEFT_OUT = ("log_pixels", "log_aspect", "text_height_low", "text_height", "stroke_low", "stroke")
"""Sizes: a large image of a known kind is of that kind."""
ALL = (*IMAGE_FEATURES, *DETAIL_FEATURES)
NAMES = tuple(name for name in ALL if name not in LEFT_OUT)
RESIZED = (0.5, 2.0)
LARGEST = 20_000_000  # pixels, after enlarging
DRAWN = 40  # images of each kind that is drawn here
SPLITS = 5
TESTED = 0.2  # of each kind, in a random split
STILL = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ENOUGH_FOLDERS = 2  # to leave one out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="a kind of images")
    parser.add_argument("--out", type=Path, required=True, help="what was fitted, as JSON")
    parser.add_argument("--cache", type=Path, default=Path("runs/range"), help="folder of cached features")
    parser.add_argument("--strange", type=int, default=48, help="images of each strange generator")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    cache = Cache(options.cache)
    kinds = {name: rows for name, rows in measured_folders(options.folders, cache, options.json)}
    made = {"drawn screens": screens(), "one colour": plain(0), "a few boxes": plain(3)}
    drawn = {name: np.stack([[measure(image)] for image in images]) for name, images in made.items()}
    strange = dict(measured_strange(options.folders, options.strange, cache, options.json))
    kept = [ALL.index(name) for name in NAMES]
    kinds = {name: rows[:, :, kept] for name, rows in kinds.items()}
    drawn = {name: rows[:, :, kept] for name, rows in drawn.items()}
    strange = {key: rows[:, kept] for key, rows in strange.items()}
    fitted = fit(kinds | drawn, strange)
    options.out.write_text(json.dumps(fitted.to_dict(), separators=(",", ":")) + "\n", "utf-8")
    figures = judge(kinds, drawn, strange)
    print(json.dumps(figures) if options.json else in_words(figures))


class Cache:
    """Rows of features by key, one file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        source = "".join(
            (Path(__file__).parents[2] / "adaptive_fusion/features" / f"{name}.py").read_text("utf-8")
            for name in ("image", "detail")
        ) + (Path(__file__).with_name("strange.py").read_text("utf-8"))
        self._version = hashlib.sha256(source.encode()).hexdigest()

    def get(self, key: str, make: Callable[[], Any]) -> Floats:
        name = hashlib.sha256(f"{self._version} {key}".encode()).hexdigest()[:24]
        path = self._folder / f"{name}.npy"
        if not path.exists():
            np.save(path, np.asarray(make(), np.float64))
        return np.asarray(np.load(path))


def measure(image: Image.Image) -> list[float]:
    """Values of `ALL`."""
    return [*image_features(take_sample(image)), *detail_features(image)]


def images_of(folder: Path) -> list[Path]:
    return [path for path in media_files([folder])[0] if path.suffix.lower() in STILL]


def measured_folders(folders: list[Path], cache: Cache, quiet: bool) -> Iterator[tuple[str, Floats]]:
    """(images, 2, ALL) of each folder: as it is, and at another size."""
    for folder in folders:
        rows = []
        for path in track(images_of(folder), folder.name, disable=quiet):
            key = content_hash(path)
            rows.append(cache.get(f"two sizes {key}", lambda path=path, key=key: two_sizes(path, key)))
        yield folder.name, np.stack(rows)


def two_sizes(path: Path, key: str) -> list[list[float]]:
    image = load_media(path).convert("RGB")
    rng = np.random.default_rng(list(key.encode()))
    times = np.exp(rng.uniform(*np.log(RESIZED)))
    size = (max(32, int(image.width * times)), max(32, int(image.height * times)))
    how = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)[rng.integers(3)]
    other = image.resize(size, how) if size[0] * size[1] <= LARGEST else image
    return [measure(image), measure(other)]


def screens() -> Iterator[Image.Image]:
    """Screens of the reference model's training, of several sizes."""
    for seed in range(DRAWN):
        kind = ("simple", "dense", "reading")[seed % 3]
        yield make_scene(kind, seed, "train", (256, 640)).image


def plain(boxes: int) -> Iterator[Image.Image]:
    """One colour, with up to so many boxes on it."""
    rng = np.random.default_rng(0)
    for index in range(DRAWN):
        height, width = rng.integers(64, 1200, 2)
        colour = rng.choice([0, 128, 245, 255]) if index % 2 else rng.integers(0, 256, 3)
        image = np.full((height, width, 3), colour, np.uint8)
        for _ in range(min(boxes, 1 + index % 3)):
            x, y = rng.integers(0, width), rng.integers(0, height)
            corner = (int(x + rng.integers(8, width)), int(y + rng.integers(8, height)))
            cv2.rectangle(image, (int(x), int(y)), corner, [int(v) for v in rng.integers(0, 256, 3)], -1)
        yield Image.fromarray(image)


def measured_strange(
    folders: list[Path], count: int, cache: Cache, quiet: bool
) -> Iterator[tuple[tuple[str, str], Floats]]:
    """(images, ALL) by family and generator."""
    for family, generators in FAMILIES.items():
        for index, generator in enumerate(generators):
            name = generator.__name__.strip("_")
            seeds = track(range(count), name, disable=quiet)
            rows = [
                cache.get(
                    f"{name} {seed}",
                    lambda generator=generator, seed=seed, index=index: measure(
                        Image.fromarray(generator(np.random.default_rng([seed, index])))
                    ),
                )
                for seed in seeds
            ]
            yield (family, name), np.stack(rows)
    paths = [images_of(folder) for folder in folders]
    for index, blur in enumerate(BLURS):
        rows = []
        for seed in track(range(2 * count), blur.__name__, disable=quiet):
            rng = np.random.default_rng([seed, index])
            path = paths[seed % len(paths)][rng.integers(len(paths[seed % len(paths)]))]
            rows.append(
                cache.get(
                    f"{blur.__name__} {seed} {content_hash(path)}", lambda b=blur, r=rng, p=path: blurred(b, r, p)
                )
            )
        yield ("blur", blur.__name__), np.stack(rows)


def blurred(blur: Callable[..., Any], rng: np.random.Generator, path: Path) -> list[float]:
    return measure(Image.fromarray(blur(rng, np.asarray(load_media(path).convert("RGB")))))


def fit(kinds: dict[str, Floats], strange: dict[tuple[str, str], Floats], seed: int = 0) -> Familiar:
    families = {family: [rows for key, rows in strange.items() if key[0] == family] for family, _ in strange}
    return fit_familiar(NAMES, kinds, {family: np.concatenate(rows) for family, rows in families.items()}, seed=seed)


def unlike(fitted: Familiar, rows: Floats) -> float:
    """Share of images (n, NAMES) that are unlike."""
    return float(np.mean([fitted.is_unlike(dict(zip(NAMES, row, strict=True))) for row in rows.tolist()]))


def judge(kinds: dict[str, Floats], drawn: dict[str, Floats], strange: dict[tuple[str, str], Floats]) -> dict[str, Any]:
    """Shares of unlike images: of known kinds, of folders left out, and of strange generators and families left out."""
    figures: dict[str, Any] = {"known": {}, "splits": [], "resized": [], "left out": {}, "generator": {}, "family": {}}
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        seen, unseen = {}, {}
        for name, rows in (kinds | drawn).items():
            order = rng.permutation(len(rows))
            count = int(TESTED * len(rows))
            unseen[name], seen[name] = rows[order[:count]], rows[order[count:]]
        fitted = fit(seen, strange, seed)
        figures["splits"].append(unlike(fitted, np.concatenate([rows[:, 0] for rows in unseen.values()])))
        figures["resized"].append(unlike(fitted, np.concatenate([rows[:, -1] for rows in unseen.values()])))
        for name, rows in unseen.items():
            figures["known"].setdefault(name, []).append(unlike(fitted, rows[:, 0]))
    figures["known"] = {name: float(np.mean(shares)) for name, shares in figures["known"].items()}
    for name in kinds if len(kinds) >= ENOUGH_FOLDERS else ():
        fitted = fit({other: rows for other, rows in (kinds | drawn).items() if other != name}, strange)
        figures["left out"][name] = unlike(fitted, kinds[name][:, 0])
    for family, generator in strange:
        others = {key: rows for key, rows in strange.items() if key != (family, generator)}
        figures["generator"][f"{family}: {generator}"] = unlike(fit(kinds | drawn, others), strange[family, generator])
    for family in {family: None for family, _ in strange}:
        fitted = fit(kinds | drawn, {key: rows for key, rows in strange.items() if key[0] != family})
        rows = np.concatenate([rows for key, rows in strange.items() if key[0] == family])
        figures["family"][family] = unlike(fitted, rows)
    return figures


def in_words(figures: dict[str, Any]) -> str:
    lines = [
        "Share of images that are called unlike",
        f"known kinds, {SPLITS} random splits: {', '.join(f'{share:.3f}' for share in figures['splits'])}",
        f"the same, resized: {', '.join(f'{share:.3f}' for share in figures['resized'])}",
    ]
    for title, key in (
        ("by kind", "known"),
        ("folder left out", "left out"),
        ("strange generator, left out", "generator"),
        ("strange family, left out", "family"),
    ):
        lines += ["", title, *(f"  {name:40}{share:6.3f}" for name, share in figures[key].items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
