"""How fusion's kernels are best cut: each with other tiles than it has.

Every tile's result is compared with float64's (`error`, of a tap over two images) before it is timed, alone, on levels
of the 4B shape. Building so many programs takes longer than timing them, so it is shared by processes first. What is
found best here is what `adaptive_fusion.fusion.triton_launch` should say.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_fusion.bench.shapes import SHAPES
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, select_levels
from adaptive_fusion.fusion.kernels import weighted_sum
from benchmarks.gpu.book import Desk, Row, Skip
from benchmarks.gpu.models import Scale
from benchmarks.gpu.timing import copy_bandwidth, device_times_ms, spread

ROOT = Path(__file__).resolve().parents[2]
VISION = SHAPES["4b"].vision
PATCHES = {"4 MP": 16384, "1 MP": 4096}
CHECKED = (700, 300)
Cut = tuple[int, int, int, int]
"""Patches, columns, warps, steps read ahead."""
TILES: dict[str, tuple[Cut, ...]] = {
    "scored": ((64, 128, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (64, 256, 4, 2)),
    "coded": (
        (16, 256, 4, 3), (32, 128, 4, 3), (32, 128, 8, 3), (64, 128, 4, 3), (64, 128, 8, 3), (32, 256, 4, 3),
        (32, 256, 8, 3), (16, 512, 4, 3), (16, 512, 8, 3), (64, 64, 4, 3), (16, 128, 4, 3), (32, 64, 4, 3),
    ),
    "adapted": (
        (16, 256, 4, 3), (16, 256, 4, 2), (16, 512, 4, 2), (16, 512, 8, 2), (16, 256, 2, 2), (16, 128, 2, 3),
        (32, 256, 8, 2), (32, 128, 8, 3), (16, 1024, 8, 1),
    ),
    "plain": ((8, 1024, 8, 3), (4, 1024, 8, 3), (4, 1024, 4, 3)),
}  # fmt: skip
NAMES = {"scored": "SCORED", "coded": "CODED", "adapted": "ADAPTED", "plain": "PLAIN"}


def run(desk: Desk, scale: Scale) -> None:
    """The kernels, each a row."""
    rate = desk.row("copy", lambda: {"bytes_per_s": copy_bandwidth(scale.device, 1 << (22 if scale.tiny else 30))})
    made = desk.row("built", partial(_built, scale), needs_s=40)
    if rate is None or made is None:
        return
    for kind in TILES:
        with as_they_are():
            desk.row(kind, partial(_row, scale, kind, made["errors"][kind], rate["bytes_per_s"]["median"]), needs_s=4)


@contextmanager
def as_they_are() -> Iterator[None]:
    """After this context the kernels have the tiles that they had before."""
    from adaptive_fusion.fusion import triton_launch

    before = {name: getattr(triton_launch, name) for name in NAMES.values()}
    try:
        yield
    finally:
        for name, tile in before.items():
            setattr(triton_launch, name, tile)


def _built(scale: Scale) -> Row:
    """Every program built and checked, by as many processes as there are cores."""
    if scale.device.type != "cuda":
        raise Skip("Triton's kernels are those of a GPU")
    count = min(14, os.cpu_count() or 1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "benchmarks.gpu.tiles", str(scale.device)]
    others = [
        subprocess.Popen([*command, str(i), str(count)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    errors: dict[str, dict[str, Any]] = {kind: {} for kind in TILES}
    for other in others:
        said, _ = other.communicate()
        for kind, cut, error in map(json.loads, said.splitlines()):
            errors[kind][cut] = error
    return {"errors": errors}


def _row(scale: Scale, kind: str, errors: dict[str, Any], bytes_per_s: float) -> Row:
    row: Row = {}
    for cut in TILES[kind]:
        name = "x".join(map(str, cut))
        error = errors.get(name, "not built")
        row[name] = {"error": error}
        if isinstance(error, str):
            continue
        for where, patches in PATCHES.items():
            with torch.no_grad():
                call, moved = _call(kind, cut, patches, scale.device)
                own, host = device_times_ms(call, scale.device, repeats=8)
            floor_ms = moved / bytes_per_s * 1e3
            row[name][where] = {
                "ms": spread(own),
                "over_floor": round(spread(own)["median"] / floor_ms, 3),
                "host_ms": spread(host)["median"],
            }
    return row


def _tap(kind: str, device: torch.device) -> Any:
    """A tap as after training, by Triton's kernels: of the strategy and the adapters that the kernel is for."""
    from adaptive_fusion.fusion.kernels_triton import TritonSum

    strategy, layers, rank = ("gated", 12, 8) if kind in ("scored", "coded") else ("weighted", 6, 4 * (kind != "plain"))
    levels = select_levels(VISION.depth, VISION.taps, layers)
    torch.manual_seed(0)
    tap = DeepStackFusion(FusionSpec(strategy, VISION.taps, levels, VISION.width, rank)).to(device).eval().taps[0]
    for parameter in tap.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tap.combine = TritonSum()  # type: ignore[assignment]
    return tap


def _levels(tap: Any, patches: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    count = next(len(parameter) for parameter in tap.weights.parameters())
    return [torch.randn(patches, VISION.width, generator=generator, device=device).bfloat16() for _ in range(count)]


def _call(kind: str, cut: Cut, patches: int, device: torch.device) -> tuple[Callable[[], Any], int]:
    """The kernel alone, and the bytes of levels that it has to move."""
    from adaptive_fusion.fusion import triton_launch

    tap = _tap(kind, device)
    levels, lengths = _levels(tap, patches, device), [patches]
    row = levels[0].nbytes
    setattr(triton_launch, NAMES[kind], triton_launch.Tile(*cut))
    if kind in ("plain", "adapted"):
        return partial(tap.fuse, levels, lengths), (len(levels) + 1) * row
    kernel, weights = tap.combine, tap.weights
    into = kernel._scored(levels, tap.adapters.down, weights.weight, tap.gate_weight, tap.tap)
    score = partial(triton_launch.score, levels, lengths, into, tap.tap, tap.adapters.down.shape[1])
    if kind == "scored":
        return score, len(levels) * row
    sums, codes = score()
    scores = triton_launch.Scores(sums, tap.gate_bias, torch.empty(1, device=device))
    wide = kernel._back(tap.adapters.up, levels[0])
    own = (levels, lengths, "sigmoid", weights.bias, tap.mix, tap.tap, codes, wide, scores)
    return partial(triton_launch.weigh, *own), (len(levels) + 1) * row


def _error(kind: str, cut: Cut, device: torch.device) -> float | str:
    """What a tap gives by these kernels beside float64's: the norm of the difference over the norm."""
    from adaptive_fusion.fusion import triton_launch

    tap, lengths = _tap(kind, device), list(CHECKED)
    levels = _levels(tap, sum(CHECKED), device)
    with torch.no_grad():
        setattr(triton_launch, NAMES[kind], triton_launch.Tile(*cut))
        found = tap.both(levels, lengths)[0]
        if tap.combine.broken:
            return str(tap.combine.broken)
        tap.combine = weighted_sum
        exact = tap.double().both([level.double() for level in levels], lengths)[0]
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    device, first, step = torch.device(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    every = [(kind, cut) for kind, cuts in TILES.items() for cut in cuts]
    for kind, cut in every[first::step]:
        try:
            with as_they_are():
                error: float | str = _error(kind, cut, device)
        except Exception as failed:
            error = f"{type(failed).__name__}: {(str(failed).splitlines() or [''])[0][:150]}"
        print(json.dumps([kind, "x".join(map(str, cut)), error]), flush=True)


if __name__ == "__main__":
    main()
