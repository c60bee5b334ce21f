"""What share of an image's tokens an encoder is still run for where blank parts are encoded once, and what finding them
takes. Needs no model: an encoder's time follows its patches, what answers are then worth does not.

    python benchmarks/blanks.py FOLDER... [--sides 2 4] [--patch 16] [--merge 2] [--most 100]
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adaptive_fusion.features.complexity import measure_complexity
from adaptive_fusion.media.load import load_media
from adaptive_fusion.reduction.blanks import expected_share, standing

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def packed(image: Image.Image, patch: int, merge: int) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """An image in the order in which processors give patches, and its grid of merged tokens."""
    token = patch * merge
    width, height = (max(1, round(side / token)) for side in image.size)
    pixels = np.asarray(image.resize((width * token, height * token), Image.Resampling.BICUBIC), np.float32)
    cells = torch.from_numpy(pixels).view(height, merge, patch, width, merge, patch, 3).permute(0, 3, 1, 4, 6, 2, 5)
    return cells.reshape(height * width * merge**2, -1), (1, height, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--sides", type=int, nargs="+", default=[2, 4], help="of windows, in merged tokens")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--merge", type=int, default=2)
    parser.add_argument("--most", type=int, default=100, help="images of a folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| folder | images | window | tokens encoded | least, most | predicted off by | ms |")
    print("|---|---|---|---|---|---|---|")
    for folder in args.folders:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)[: args.most]
        if not files:
            parser.error(f"{folder.name} has no file that ends in {', '.join(ENDINGS)}")
        for side in args.sides:
            shares, off, took = list[float](), list[float](), list[float]()
            for path in files:
                image = load_media(path)
                assert isinstance(image, Image.Image)
                pixels, grid = packed(image, args.patch, args.merge)
                began = time.perf_counter()
                found = standing(pixels, torch.ones(3), [grid], args.merge, (3, 1, args.patch), side)
                took.append(1e3 * (time.perf_counter() - began))
                shares.append(len(found.kept) / len(found.source))
                edges = measure_complexity(image).features["edge_density"]
                off.append(abs(expected_share(edges, side) - shares[-1]))
            span = f"{np.mean(shares):.2f} | {min(shares):.2f}, {max(shares):.2f}"
            times = f"{np.mean(off):.2f} | {np.median(took):.1f}"
            print(f"| {folder.name} | {len(files)} | {side} | {span} | {times} |", flush=True)


if __name__ == "__main__":
    main()
