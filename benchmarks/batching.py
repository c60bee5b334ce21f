"""Requests a second of a server that puts requests together, beside one that does not, adaptive and native.

    python benchmarks/batching.py [--mixes long short mixed] [--clients 1 4 16] [--rounds 6] [--requests 20] [--json]

Two servers of the same model run side by side, one with ``--batch 1``. Within every round both get the same requests
under both plans, one after the other in an order that the next round turns round, so that what else the machine does
meets all alike. Clients send the next request when the last was answered. Mixes:

- ``long``: dense screens that are described, answers of more than 40 tokens;
- ``short``: simple screens, answers of 8 tokens;
- ``mixed``: both, texts without an image, and sizes from 96 to 384 pixels.

What must hold: with 4 clients and long answers batches get at least 1.2 times as many requests through; with any mix
and any number of clients not fewer than one after the other; and adaptive not fewer than native. Ratios are medians
and quartiles over rounds of the requests a second of two servers or plans in the same round; 0.95 still counts as not
fewer. Exit code 1 if anything falls short.
"""

import argparse
import base64
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

from adaptive_fusion.commands.output import progress
from adaptive_fusion.progress import Progress, Steps
from adaptive_fusion.reference.screens import make_scene
from benchmarks.load import Outcome, ServerProcess, saturate, server_process

NAME = "benchmark"
MIXES = ("long", "short", "mixed")
PLANS = ("adaptive", "native")
LONG, SHORT = 64, 8
GAIN, NO_LOSS = 1.2, 1.0
SEVERAL = 4
"""Clients with whom long answers must gain."""
NOISE = 0.05
"""By how much a ratio may be below 1.0 and still count as equal: two servers alike differ by as much."""


def body(kind: str, seed: int, side: int, tokens: int, plan: str) -> dict[str, Any]:
    """A request about a screen of its own; of the kind ``text`` about nothing that is shown."""
    content: list[dict[str, Any]] = [{"type": "text", "text": "Describe the screen."}]
    if kind != "text":
        buffer = io.BytesIO()
        make_scene(kind, seed, "train", (side, side)).image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    own = {"policy": "native"} if plan == "native" else {}
    fusion = {"adaptive_fusion": own} if own else {}
    messages = [{"role": "user", "content": content}]
    return {"model": NAME, "messages": messages, "max_tokens": tokens, "temperature": 0, **fusion}


def bodies(mix: str, plan: str, count: int, first: int) -> list[dict[str, Any]]:
    """Requests of a mix, no image of which was there before."""
    kinds = {
        "long": [("dense", 192, LONG)],
        "short": [("simple", 160, SHORT)],
        "mixed": [
            ("dense", 256, LONG),
            ("simple", 96, SHORT),
            ("text", 0, SHORT),
            ("simple", 384, 24),
            ("dense", 128, 40),
        ],
    }[mix]
    return [
        body(kind, first + i, side, tokens, plan)
        for i, (kind, side, tokens) in zip(range(count), itertools.cycle(kinds), strict=False)
    ]


def rate(server: ServerProcess, asked: Sequence[Mapping[str, Any]], clients: int) -> dict[str, float]:
    """Answers a second to requests that `clients` send, mean size of their batches, and tokens of an answer."""
    each, began = max(1, len(asked) // clients), time.perf_counter()
    outcomes: list[Outcome] = saturate(server.port, asked, clients, each)
    took = time.perf_counter() - began
    if bad := [outcome for outcome in outcomes if outcome.status != 200]:
        raise RuntimeError(f"{len(bad)} of {len(outcomes)} requests failed: {bad[0].values}")
    return {
        "per_s": len(outcomes) / took,
        "batch": mean(o.values["adaptive_fusion"]["batch"] for o in outcomes),
        "tokens": mean(o.values["usage"]["completion_tokens"] for o in outcomes),
    }


def measure(options: argparse.Namespace, folder: Path, shown: Progress) -> list[dict[str, Any]]:
    """A row for each mix, plan and number of clients."""
    cases = list(itertools.product(options.mixes, options.clients))
    steps = Steps(shown, "batching", (options.rounds + 1) * len(cases) * 4)
    seeds, found = itertools.count(10_000, 1000), dict[tuple[str, int, str, int], list[dict[str, float]]]()
    with ExitStack() as stack:
        servers = {}
        for batch in (1, options.batch):
            logs = folder / str(batch)
            logs.mkdir()
            arguments = ["--model", options.model, "--served-name", NAME, "--batch", str(batch), "--queue", "64"]
            servers[batch] = stack.enter_context(server_process(logs, *arguments))
        for turn in range(options.rounds + 1):  # the first warms up
            for mix, clients in cases:
                first, count = next(seeds), max(options.requests, 3 * clients) if turn else max(5, clients)
                runs = list(itertools.product(PLANS, servers))
                for plan, batch in runs if turn % 2 else runs[::-1]:
                    seen = rate(servers[batch], bodies(mix, plan, count, first), clients)
                    if turn:
                        found.setdefault((mix, clients, plan, batch), []).append(seen)
                    steps.advance()
    return [_row(found, mix, clients, options.batch) for mix, clients in cases]


def _row(
    found: Mapping[tuple[str, int, str, int], list[dict[str, float]]], mix: str, clients: int, batch: int
) -> dict[str, Any]:
    rows = {(plan, size): found[mix, clients, plan, size] for plan in PLANS for size in (1, batch)}

    def ratio(one: tuple[str, int], other: tuple[str, int]) -> dict[str, float]:
        mine, others = ([each["per_s"] for each in rows[which]] for which in (one, other))
        each = [a / b for a, b in zip(mine, others, strict=True)]
        low, middle, high = quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return {"ratio": middle, "low": low, "high": high}

    return {
        "mix": mix,
        "clients": clients,
        "tokens": mean(each["tokens"] for each in rows["adaptive", batch]),
        "batch": {plan: mean(each["batch"] for each in rows[plan, batch]) for plan in PLANS},
        "per_s": {f"{plan} x{size}": median(each["per_s"] for each in rows[plan, size]) for plan, size in rows},
        "gain": {plan: ratio((plan, batch), (plan, 1)) for plan in PLANS},
        "over_native": ratio(("adaptive", batch), ("native", batch)),
    }


def shortfalls(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must hold and does not."""
    short = []
    for row in rows:
        where = f"{row['mix']}, {row['clients']} clients"
        for plan, gain in row["gain"].items():
            needed = GAIN if row["clients"] == SEVERAL and row["mix"] == "long" else NO_LOSS - NOISE
            if gain["ratio"] < needed:
                short.append(f"{where}: batches get {gain['ratio']:.2f} x of single, {plan}; expected {needed:g}")
        if row["over_native"]["ratio"] < NO_LOSS - NOISE:
            short.append(f"{where}: adaptive gets {row['over_native']['ratio']:.2f} x of native; expected 1")
    return short


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The result in words."""
    out = []
    for row in rows:
        rates = ", ".join(f"{name} {value:.2f}" for name, value in row["per_s"].items())
        gains = ", ".join(
            f"{plan} {_in_words(gain)}, batches of {row['batch'][plan]:.1f}" for plan, gain in row["gain"].items()
        )
        out.append(f"{row['mix']}, {row['clients']} clients, {row['tokens']:.0f} tokens: a second {rates}")
        out.append(f"  batches over single {gains}")
        out.append(f"  adaptive over native {_in_words(row['over_native'])}")
    short = shortfalls(rows)
    return [*out, "falls short: " + ("; ".join(short) if short else "nothing")]


def _in_words(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--rounds", type=int, default=6, help="an even number, so that every order is met as often")
    parser.add_argument("--requests", type=int, default=20, help="of each server and plan in a round, at least")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    if min(options.clients) < 1 or options.rounds < 1 or options.batch < 2:
        parser.error("expected at least 1 client, 1 round and batches of 2")
    with tempfile.TemporaryDirectory() as folder, progress(options.json) as shown:
        rows = measure(options, Path(folder), shown)
    short = shortfalls(rows)
    print(json.dumps({"rows": rows, "shortfalls": short}) if options.json else "\n".join(lines(rows)))
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
