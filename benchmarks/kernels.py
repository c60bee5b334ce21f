"""Speed of the level-fusion kernels against plain PyTorch and against reading their input once.

    python benchmarks/kernels.py [--compile] [--json] [--threads N] [--rounds N]

Rows: (a) ``loop``, the plain ``sum(w * f)``, gated weights pooled by ``f.mean(0)``; (b) ``einsum`` over a stack; (c) ``read``,
one ``sum()`` of every level, the read-bandwidth floor; ``ours``; and ``compiled`` with --compile. All variants of a case take
turns within each round, so that other load on the machine hits them alike; compare ratios, not milliseconds. `xread` is
the time over one read of the input for weighted, over two reads for gated (it must pool before it can weigh).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptive_fusion.fusion.kernels import CompiledSum, weighted_sum
from adaptive_fusion.fusion.levels import depth_profile
from adaptive_fusion.fusion.weights import GatedWeights

PATCHES, WIDTH, LEVELS = 1024, 1024, (3, 6, 12)


def cases(kind: str, features: list[Tensor], compiled: CompiledSum | None) -> dict[str, Callable[[], Tensor]]:
    """The variants of one case by name, all from the same levels and the same weights."""
    profile = depth_profile(len(features))
    lengths = [PATCHES]
    gates = GatedWeights(profile, WIDTH)
    torch.nn.init.normal_(gates.weight, std=0.01) if gates.weight is not None else None
    fixed = torch.tensor(profile)

    def plain_weights() -> Sequence[float] | Tensor:
        if kind == "weighted":
            return profile
        scores = [
            f.mean(0) @ w.to(f.dtype) + b for f, w, b in zip(features, gates.weight, gates.bias, strict=True)
        ]
        alphas = torch.sigmoid(torch.stack(scores))
        return (alphas / alphas.sum()).to(features[0].dtype)

    def our_weights() -> Tensor:
        return fixed if kind == "weighted" else gates(features, lengths)

    def read() -> Tensor:
        total = torch.zeros(())
        for feature in features:
            total = feature.sum()
        return total

    def einsum() -> Tensor:
        weights = torch.as_tensor(plain_weights()).to(features[0].dtype)
        return torch.einsum("l,lnd->nd", weights, torch.stack(features))

    variants: dict[str, Callable[[], Tensor]] = {
        "read": read,
        "loop": lambda: sum((w * f for w, f in zip(plain_weights(), features, strict=True)), torch.zeros(())),
        "einsum": einsum,
        "ours": lambda: weighted_sum(features, our_weights(), lengths),
    }
    if compiled is not None:
        variants["compiled"] = lambda: compiled(features, our_weights(), lengths)
    return variants


def measure(variants: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, variants in turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            if number >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def error_in_ulp(variant: Callable[[], Tensor], features: list[Tensor], weights: Tensor) -> float:
    """Largest distance to the float64 sum, in units of the result's own rounding step at its largest value."""
    exact = sum(w.double() * f.double() for w, f in zip(weights, features, strict=True))
    assert isinstance(exact, Tensor)
    step = torch.finfo(features[0].dtype).eps * exact.abs().max()
    return float((variant().double() - exact).abs().max() / step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compile", action="store_true", help="also time the torch.compile form (seconds a case)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    compiled = CompiledSum() if args.compile else None
    rows = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("weighted", "gated"):
                for count in LEVELS:
                    features = [torch.randn(PATCHES, WIDTH).to(dtype) for _ in range(count)]
                    variants = cases(kind, features, compiled)
                    times = measure(variants, args.rounds)
                    floor = statistics.median(times["read"]) * (1 if kind == "weighted" else 2)
                    loop = statistics.median(times["loop"])
                    for name, values in times.items():
                        quarters = statistics.quantiles(values, n=4)
                        rows.append(
                            {
                                "dtype": str(dtype).removeprefix("torch."),
                                "kind": kind,
                                "levels": count,
                                "variant": name,
                                "median_ms": round(quarters[1], 3),
                                "iqr_ms": round(quarters[2] - quarters[0], 3),
                                "min_ms": round(min(values), 3),
                                "xread": round(quarters[1] / floor, 2),
                                "speedup_over_loop": round(loop / quarters[1], 2),
                            }
                        )
    if args.json:
        print(
            json.dumps(
                {"threads": args.threads, "rounds": args.rounds, "torch": torch.__version__, "rows": rows}
            )
        )
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, N={PATCHES}, D={WIDTH}")
    print("  ".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>17}" for value in row.values()))


if __name__ == "__main__":
    main()
