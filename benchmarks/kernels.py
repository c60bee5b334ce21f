"""Speed and exactness of the level-fusion kernels against plain PyTorch and one read of their input.

    python benchmarks/kernels.py [--compile] [--json] [--threads N ...] [--rounds N]

Variants: ``read``, one ``sum()`` of every level, the read-bandwidth floor; ``loop``, the plain sum of
``w * f`` (gated: each level pooled by ``f.mean(0)``); ``einsum`` over a stack; ``ours``; and ``compiled``
with --compile. The variants of a case take turns in random order, so that other load on the machine
and the allocator's state hit all alike: compare the ratios, not the milliseconds. With one thread the clock
is the thread's CPU time, which other processes cannot stretch; otherwise it is wall time, and more threads than
idle cores measure the scheduler.

`xread` is the time over one read of the input for weighted, over two for gated (it must pool before it
can weigh); `over_loop` is the speed-up over `loop`: medians over the rounds of the ratio within a round, with their
quartiles, and beside them the ratio of the best times. `error` is the largest distance to the float64 sum, in
rounding steps of the dtype at the largest value. At the end every limit, with the worst case and whether it holds.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_fusion.fusion.kernels import Combine, CompiledSum, weighted_sum
from adaptive_fusion.fusion.levels import depth_profile
from adaptive_fusion.fusion.weights import GatedWeights

PATCHES, WIDTH, LEVELS = 1024, 1024, (3, 6, 12)
Variant = Callable[[], Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Limit:
    """What the median ratio in `column` must be at least, or at most, for one variant of one kind of case."""

    dtype: str
    kind: str
    variant: str
    column: str
    at_least: bool
    bound: float
    levels: tuple[int, ...] = LEVELS

    def concerns(self, row: Row) -> bool:
        same = (self.dtype, self.kind, self.variant) == (row["dtype"], row["kind"], row["variant"])
        return same and row["levels"] in self.levels

    def judged(self, row: Row) -> Row:
        ratio = row[self.column]
        kept = {key: ratio[key] >= self.bound if self.at_least else ratio[key] <= self.bound for key in ratio}
        what = f"{self.dtype} {self.kind} {self.variant}, {self.column}"
        limit = f"{'>=' if self.at_least else '<='} {self.bound:g}"
        holds = "yes" if kept["median"] else "only at best" if kept["best"] else "no"
        return {"what": what, "limit": limit, "levels": row["levels"], **ratio, "holds": holds}


LIMITS = (
    Limit("float32", "weighted", "ours", "xread", False, 2.5),
    Limit("float32", "weighted", "compiled", "xread", False, 1.7),
    Limit("float32", "weighted", "ours", "over_loop", True, 2.0, levels=(6, 12)),
    Limit("float32", "gated", "ours", "xread", False, 2.5),
    Limit("bfloat16", "weighted", "ours", "over_loop", True, 1.0),
    Limit("bfloat16", "gated", "ours", "over_loop", True, 1.0),
)


def read(features: list[Tensor]) -> Tensor:
    return [feature.sum() for feature in features][-1]


def loop(features: list[Tensor], weights: list[float] | Tensor) -> Tensor:
    total = torch.zeros_like(features[0])
    for weight, feature in zip(weights, features, strict=True):
        total = total + weight * feature
    return total


def einsum(features: list[Tensor], weights: list[float] | Tensor) -> Tensor:
    return torch.einsum("l,lnd->nd", torch.as_tensor(weights).to(features[0].dtype), torch.stack(features))


def plain_gates(features: list[Tensor], gates: GatedWeights) -> Tensor:
    """`GatedWeights` as one would first write it."""
    assert gates.weight is not None and gates.bias is not None
    scores = [f.mean(0) @ w + b for f, w, b in zip(features, gates.weight, gates.bias, strict=True)]
    alphas = torch.sigmoid(torch.stack(scores))
    return alphas / alphas.sum()


def cases(kind: str, features: list[Tensor], compiled: CompiledSum | None) -> dict[str, Variant]:
    """The variants of one case by name, over the same levels and weights."""
    profile, lengths = depth_profile(len(features)), [PATCHES]
    plain = {"loop": loop, "einsum": einsum}
    fast: dict[str, Combine] = {"ours": weighted_sum}
    if compiled is not None:
        fast["compiled"] = compiled
    variants: dict[str, Variant] = {"read": partial(read, features)}
    if kind == "weighted":
        fixed = torch.tensor(profile)
        variants |= {name: partial(run, features, list(profile)) for name, run in plain.items()}
        variants |= {name: partial(run, features, fixed, lengths) for name, run in fast.items()}
        return variants

    gates = GatedWeights(profile, WIDTH)
    assert gates.weight is not None
    torch.nn.init.normal_(gates.weight, std=0.01)
    narrow = GatedWeights(profile, WIDTH).to(features[0].dtype)
    narrow.load_state_dict(gates.state_dict())

    def plain_gated(run: Callable[[list[Tensor], list[float] | Tensor], Tensor]) -> Tensor:
        return run(features, plain_gates(features, narrow))

    def fast_gated(run: Combine) -> Tensor:
        return run(features, gates(features, lengths), lengths)

    variants |= {name: partial(plain_gated, run) for name, run in plain.items()}
    variants |= {name: partial(fast_gated, run) for name, run in fast.items()}
    return variants


def measure(variants: dict[str, Variant], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of every call, all variants a round in random order, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(rounds + 2):
        for name in order.sample(list(variants), len(variants)):
            begin = clock()
            variants[name]()
            times[name].append((clock() - begin) * 1e3)
    return {name: values[2:] for name, values in times.items()}


def error(found: Tensor, features: list[Tensor]) -> float:
    """Distance of the weighted sum from the float64 one, in rounding steps of its dtype."""
    weights = torch.tensor(depth_profile(len(features))).double()
    exact = torch.einsum("l,lnd->nd", weights, torch.stack(features).double())
    step = torch.finfo(found.dtype).eps * exact.abs().max()
    return float((found.double() - exact).abs().max() / step)


def wide_error(features: list[Tensor]) -> float:
    """The error of a sum in float32 that is rounded once."""
    weights = torch.tensor(depth_profile(len(features)))
    return error(torch.einsum("l,lnd->nd", weights, torch.stack(features).float()).to(features[0].dtype), features)


def ratio(top: list[float], bottom: list[float], factor: float = 1.0) -> dict[str, float]:
    """Quartiles over the rounds of top / bottom within a round, and the ratio of the best times."""
    low, median, high = statistics.quantiles([factor * a / b for a, b in zip(top, bottom, strict=True)], n=4)
    best = factor * min(top) / min(bottom)
    return {"median": round(median, 2), "low": round(low, 2), "high": round(high, 2), "best": round(best, 2)}


def run_case(
    kind: str, dtype: torch.dtype, count: int, compiled: CompiledSum | None, rounds: int, clock: Callable[[], float]
) -> list[Row]:
    """One record per variant."""
    features = [torch.randn(PATCHES, WIDTH).to(dtype) for _ in range(count)]
    variants = cases(kind, features, compiled)
    times = measure(variants, rounds, clock)
    rows: list[Row] = []
    for name, values in times.items():
        summed = kind == "weighted" and name != "read"
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "kind": kind,
                "levels": count,
                "variant": name,
                "median_ms": round(statistics.median(values), 3),
                "best_ms": round(min(values), 3),
                "xread": ratio(values, times["read"], 1.0 if kind == "weighted" else 0.5),
                "over_loop": ratio(times["loop"], values),
                "error": round(error(variants[name](), features), 3) if summed else None,
                "wide_error": round(wide_error(features), 3) if summed else None,
            }
        )
    return rows


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """For each limit its worst case, and whether the median keeps it, or only the best times do."""
    found: list[Row] = []
    for limit in LIMITS:
        cases = [row for row in rows if limit.concerns(row)]
        if cases:
            worst = (min if limit.at_least else max)(cases, key=lambda row: float(row[limit.column]["median"]))
            found.append(limit.judged(worst))
    for row in rows:
        if (row["dtype"], row["kind"], row["variant"]) == ("bfloat16", "weighted", "ours"):
            # A hundredth of a rounding step: other sums in float32 differ by as much.
            holds = "yes" if row["error"] <= row["wide_error"] + 0.01 else "no"
            exact = {"limit": f"<= {row['wide_error']}", "levels": row["levels"], "median": row["error"]}
            found.append({"what": "bfloat16 weighted, error of a float32 sum", **exact, "holds": holds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also time the torch.compile form")
    parser.add_argument("--json", action="store_true", help="print one JSON object per number of threads")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.manual_seed(0)
    # glibc takes large blocks fresh from the kernel, page by page, until one of almost 32 MiB was freed; a
    # server is past that.
    torch.empty(31 * 2**18)
    for threads in args.threads:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        compiled = CompiledSum() if args.compile else None
        with torch.inference_mode():
            rows = [
                row
                for dtype in (torch.float32, torch.bfloat16)
                for kind in ("weighted", "gated")
                for count in LEVELS
                for row in run_case(kind, dtype, count, compiled, args.rounds, clock)
            ]
        about = {
            "torch": torch.__version__,
            "threads": threads,
            "rounds": args.rounds,
            "clock": "CPU" if threads == 1 else "wall",
            "patches": PATCHES,
            "width": WIDTH,
        }
        if args.json:
            print(json.dumps({**about, "rows": rows, "limits": verdicts(rows)}))
        else:
            show(about, rows)


def show(about: Row, rows: Sequence[Row]) -> None:
    """The table and the limits, as text."""
    print(*(f"{key}={value}" for key, value in about.items()))
    heads = {"dtype": 9, "kind": 9, "levels": 7, "variant": 9, "median_ms": 10, "best_ms": 8, "error": 6}
    ratios = ("xread", "over_loop")
    print(" ".join(f"{head:>{width}}" for head, width in heads.items()), *(f"{head:>26}" for head in ratios))
    for row in rows:
        cells = [f"{'' if row[head] is None else row[head]!s:>{width}}" for head, width in heads.items()]
        print(" ".join(cells), *(f"{_spread(row[key]):>26}" for key in ratios))
    for entry in verdicts(rows):
        shown = _spread(entry) if "best" in entry else str(entry["median"])
        print(f"{entry['what']}: {shown} at {entry['levels']} levels, must be {entry['limit']}: {entry['holds']}")


def _spread(value: Row) -> str:
    return f"{value['median']} ({value['low']}..{value['high']}), {value['best']}"


if __name__ == "__main__":
    main()
