"""Speed and exactness of the level-fusion kernels against plain PyTorch and one read of their input.

    python benchmarks/kernels.py [--compile] [--json] [--threads N] [--rounds N]

Variants: ``read``, one ``sum()`` of every level, the read-bandwidth floor; ``loop``, the plain sum of
``w * f`` (gated: each level pooled by ``f.mean(0)``); ``einsum`` over a stack; ``ours``; and ``compiled``
with --compile. The variants of a case take turns in random order, so that other load on the machine
and the allocator's state hit all alike: compare the ratios, not the milliseconds. With one thread the clock
is the thread's CPU time, which other processes cannot stretch; otherwise it is wall time.

`xread` is the median over one read of the input for weighted, over two for gated (it must pool before it
can weigh). `over_loop` is the speed-up over `loop`. `error` is the largest distance to the float64 sum, in
rounding steps of the dtype at the largest value.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adaptive_fusion.fusion.kernels import Combine, CompiledSum, weighted_sum
from adaptive_fusion.fusion.levels import depth_profile
from adaptive_fusion.fusion.weights import GatedWeights

PATCHES, WIDTH, LEVELS = 1024, 1024, (3, 6, 12)
Variant = Callable[[], Tensor]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also time the torch.compile form")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # glibc takes large blocks fresh from the kernel, page by page, until one of almost 32 MiB was freed; a
    # server is past that.
    torch.empty(31 * 2**18)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    compiled = CompiledSum() if args.compile else None
    rows: list[dict[str, str | int | float | None]] = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("weighted", "gated"):
                for count in LEVELS:
                    features = [torch.randn(PATCHES, WIDTH).to(dtype) for _ in range(count)]
                    variants = cases(kind, features, compiled)
                    times = measure(variants, args.rounds, clock)
                    floor = statistics.median(times["read"]) * (1 if kind == "weighted" else 2)
                    for name, values in times.items():
                        low, median, high = statistics.quantiles(values, n=4)
                        summed = kind == "weighted" and name != "read"
                        rows.append(
                            {
                                "dtype": str(dtype).removeprefix("torch."),
                                "kind": kind,
                                "levels": count,
                                "variant": name,
                                "median_ms": round(median, 3),
                                "iqr_ms": round(high - low, 3),
                                "min_ms": round(min(values), 3),
                                "xread": round(median / floor, 2),
                                "over_loop": round(statistics.median(times["loop"]) / median, 2),
                                "error": round(error(variants[name](), features), 2) if summed else None,
                            }
                        )
    about = {
        "torch": torch.__version__,
        "threads": args.threads,
        "rounds": args.rounds,
        "clock": "CPU" if args.threads == 1 else "wall",
        "patches": PATCHES,
        "width": WIDTH,
    }
    if args.json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(*(f"{key}={value}" for key, value in about.items()))
    print(" ".join(f"{name:>9}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{'' if value is None else value!s:>9}" for value in row.values()))


if __name__ == "__main__":
    main()
