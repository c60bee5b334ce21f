"""Fusion against the bandwidth of memory: time over the least time in which the bytes could be moved.

The floor of a weighted sum is every level read once and the result written once, at the rate of a measured copy. A
gated module has to pool every level before it can weigh it, and reads it twice. Times are those of the kernels, queued
behind other work as the encoder queues them; what launching takes is beside them as ``host_ms``, and is in the costs of
the operating points. Beside them the attention of the encoder at lengths that are new to it, host and device together.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_fusion.bench.shapes import SHAPES
from adaptive_fusion.execution.timing import synchronize
from adaptive_fusion.fusion import DeepStackFusion, FusionSpec, select_levels
from adaptive_fusion.fusion.kernels import Combine, CompiledSum, weighted_sum
from adaptive_fusion.fusion.levels import depth_profile
from adaptive_fusion.models.flash import flash_first
from benchmarks.gpu.book import Desk, Row, Skip
from benchmarks.gpu.models import Scale
from benchmarks.gpu.timing import copy_bandwidth, device_times_ms, spread

LEVELS = (3, 6, 12)
LENGTHS = tuple(range(1000, 6000, 257))
"""Of the patches of an image, no two alike, for attention."""
PATCHES = {"1 MP": 4096, "4 MP": 16384}
MODULES = {"weighted6r4": ("weighted", 6, 4), "gated12r8": ("gated", 12, 8)}
MOST = 1.3
"""Most that a kernel may take of its floor."""


def run(desk: Desk, scale: Scale) -> None:
    """The bandwidth, sums of levels by every kernel, whole modules eager and compiled."""
    rate = desk.row("copy", partial(_copy, scale), needs_s=3)
    if rate is None:
        return
    bytes_per_s = rate["bytes_per_s"]["median"]
    desk.row("attention, lengths not seen before", partial(_attention, scale), needs_s=4)
    for where, patches in scale.few([*PATCHES.items()]):
        count = max(64, patches // 64) if scale.tiny else patches
        for levels in LEVELS:
            make = partial(_sums, scale, levels, count, bytes_per_s)
            desk.row(f"sum of {levels} at {where}", make, needs_s=12 if levels == LEVELS[0] else 3)
        for name in MODULES:
            desk.row(f"{name} at {where}", partial(_module, scale, name, count, bytes_per_s), needs_s=6)


def _copy(scale: Scale) -> Row:
    return {"bytes_per_s": copy_bandwidth(scale.device, 1 << 22 if scale.tiny else 1 << 30)}


def _features(scale: Scale, levels: int, patches: int, width: int) -> list[Tensor]:
    dtype = torch.float32 if scale.device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(scale.device).manual_seed(0)
    return [torch.randn(patches, width, generator=generator, device=scale.device).to(dtype) for _ in range(levels)]


def _width(scale: Scale) -> int:
    return 64 if scale.tiny else SHAPES["4b"].vision.width


def _attention(scale: Scale) -> Row:
    """Attention of the encoder's shape by PyTorch's own order of kernels and without cuDNN's: milliseconds, host and
    device together, of the first call at each length and of the next, one length after the other."""
    vision = SHAPES["4b"].vision
    dtype = torch.float32 if scale.device.type == "cpu" else torch.bfloat16
    row: Row = {}
    for name, off in (("own order", False), ("without cuDNN", True)):
        first, again = list[float](), list[float]()
        # Lengths that the other has not had: what was planned for those is still there.
        for length in scale.few([length + off for length in LENGTHS]):
            shape = (1, vision.heads, min(length, 64) if scale.tiny else length, vision.width // vision.heads)
            query, key, value = (torch.randn(shape, device=scale.device).to(dtype) for _ in range(3))
            attend = partial(F.scaled_dot_product_attention, query, key, value)
            with flash_first(scale.device) if off else nullcontext():
                for taken in (first, again):
                    synchronize(scale.device)
                    began = time.perf_counter()
                    attend()
                    synchronize(scale.device)
                    taken.append((time.perf_counter() - began) * 1e3)
        row[name] = {"first_ms": spread(first), "again_ms": spread(again)}
    return row


def _sums(scale: Scale, levels: int, patches: int, bytes_per_s: float) -> Row:
    """A weighted sum, by each kernel; `error` is relative to float64's, largest over largest."""
    features = _features(scale, levels, patches, _width(scale))
    weights = torch.tensor(depth_profile(levels), device=scale.device)
    floor_ms = (levels + 1) * features[0].nbytes / bytes_per_s * 1e3
    exact = sum(weight * level.double() for weight, level in zip(weights.double(), features, strict=True))

    def measured(name: str) -> Row:
        kernel = _kernel(name, scale)
        call = partial(kernel, features, weights, [patches])
        error = (call().double() - exact).abs().max() / exact.abs().max()
        _refuse_broken(kernel)
        return {**_timed(scale, call, floor_ms), "error": float(error)}

    row: Row = {"patches": patches, "width": features[0].shape[1], "levels": levels, "floor_ms": round(floor_ms, 5)}
    return row | _each(measured)


def _module(scale: Scale, name: str, patches: int, bytes_per_s: float) -> Row:
    """A whole fusion module of the 4B shape over all its taps, adapters included, as after training."""
    strategy, layers, rank = MODULES[name]
    vision = SHAPES["4b"].vision
    levels = select_levels(vision.depth, vision.taps, layers)
    module = DeepStackFusion(FusionSpec(strategy, vision.taps, levels, _width(scale), rank)).to(scale.device).eval()
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features = dict(zip(levels, _features(scale, len(levels), patches, _width(scale)), strict=True))
    reads = sum(len(group) * (2 if strategy == "gated" and len(group) > 1 else 1) for group in module.spec.groups)
    floor_ms = (reads + len(vision.taps)) * patches * _width(scale) * features[levels[0]].itemsize / bytes_per_s * 1e3
    row: Row = {"patches": patches, "levels": layers, "rank": rank, "floor_ms": round(floor_ms, 5)}

    def measured(name: str) -> Row:
        for tap in module.taps:
            tap.combine = _kernel(name, scale)
        found = _timed(scale, partial(_fuse, module, features, [patches]), floor_ms)
        for tap in module.taps:
            _refuse_broken(tap.combine)
        return found

    return row | _each(measured)


def _each(measured: Callable[[str], Row]) -> Row:
    """Every kernel's figures by its name; of one that fails, why, and the others go on."""
    found: Row = {}
    for name in ("eager", "compiled", "triton"):
        try:
            with torch.inference_mode():
                found[name] = measured(name)
        except Skip as reason:
            found[name] = {"skipped": str(reason)}
        except Exception as error:
            if name == "eager":
                raise
            found[name] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    return found


def _kernel(name: str, scale: Scale) -> Combine:
    if name == "eager":
        return weighted_sum
    if name == "compiled":
        return _compiled(scale.device.type)
    if scale.device.type != "cuda":
        raise Skip("Triton's kernels are those of a GPU")
    from adaptive_fusion.fusion.kernels_triton import TritonSum

    return TritonSum()


def _refuse_broken(kernel: Any) -> None:
    """Triton's kernels that could not run gave way to the eager form, whose times are not theirs."""
    if getattr(kernel, "broken", None):
        raise RuntimeError(f"Triton's kernels do not run here: {kernel.broken}")


@cache
def _compiled(device: str) -> CompiledSum:
    """One for all rows: compiling takes seconds."""
    # A compiler on the CPU is not what is measured here.
    return CompiledSum(backend="inductor" if device == "cuda" else "eager")


def _fuse(module: DeepStackFusion, features: dict[int, Tensor], lengths: Sequence[int]) -> list[Tensor]:
    return [module.fuse_and_gate(tap, features, lengths)[0] for tap in range(len(module.taps))]


def _timed(scale: Scale, call: Callable[[], Any], floor_ms: float) -> Row:
    taken, host = device_times_ms(call, scale.device, repeats=scale.repeats)
    return {"ms": spread(taken), "over_floor": spread([ms / floor_ms for ms in taken]), "host_ms": spread(host)}


def shortfalls(rows: dict[str, Any]) -> list[str]:
    """Kernels at four megapixels that no variant brings within `MOST` of the floor."""
    found = []
    for key, row in rows.items():
        timed = {name: each for name, each in row.items() if isinstance(each, dict) and "over_floor" in each}
        ratios = {name: each["over_floor"]["median"] for name, each in timed.items()}
        if key.endswith("4 MP") and ratios and min(ratios.values()) > MOST:
            shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            found.append(f"{key}: {shown} of the floor, must be <= {MOST:g}")
    return found
