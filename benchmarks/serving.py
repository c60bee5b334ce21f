"""What the server costs, and what it keeps below and far above what it can do.

    python benchmarks/serving.py [--pairs 100] [--below 0.7] [--above 10] [--deadline 5] [--seconds 60] [--json]

Parts, in this order, against one server in a process of its own:

- ``overhead``: a request of 4 tokens with a small image, sent over an open connection as bytes that were written
  beforehand and answered as bytes, less ``runner.chat`` of the same at the same operating point, in pairs that take
  turns at going first; and what the official client's own work adds for the same request;
- ``load``: seconds of a request with nobody before it, and the saturating load: answers a second with 8 clients that
  each send the next request when the last was answered;
- ``below``: ``--below`` times the saturating load, with a deadline each of ``--deadline`` times a request alone;
- ``above``: ``--above`` times the saturating load: how many of those let in are in time, how soon the others are told;
- ``recovery``: seconds from the last answer of that storm until a request takes less than twice what one takes alone.

Deadlines are counted at the client, waiting included; ``met`` is what the server says of the same requests. Run it on
an otherwise idle machine: server, clients and runner share it. Exit code 1 if anything falls short of its target.
"""

import argparse
import base64
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

import httpx
import torch
from openai import OpenAI
from PIL import Image

from adaptive_fusion import AdaptiveRunner
from adaptive_fusion.commands.output import progress
from adaptive_fusion.progress import Progress, Steps
from benchmarks.load import Line, Outcome, ServerProcess, offer, saturate, server_process

NAME = "benchmark"
"""By which the server knows its model, whichever it is."""
PLAN = "native"
"""Operating point of the pairs, so that server and runner do the same."""
QUESTION = "Describe the image."
ALONE = 40
"""Requests one after the other; the first third of them warms up."""
CLIENTS = 8
SATURATING = 160
"""Requests of these clients, in all."""
RECOVERY_S = 60.0
"""When to give up waiting for a server to be its old self."""

OVERHEAD_MS = 5.0
KEPT = 0.95
REFUSED_MEDIAN_MS, REFUSED_P99_MS = 10.0, 50.0
RECOVERED_S = 5.0


def picture(width: int, height: int) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def body(image: bytes, tokens: int, **own: Any) -> dict[str, Any]:
    """A request that shows an image; `own` goes to ``adaptive_fusion``."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    fusion = {"adaptive_fusion": own} if own else {}
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, **fusion}


def overhead(server: ServerProcess, model: str, pairs: int, shown: Progress) -> dict[str, float]:
    """Milliseconds of a request to the server and of one to a runner, of the difference in pairs, and of what the
    official client adds."""
    runner, image = AdaptiveRunner.from_pretrained(model, policy=PLAN), picture(64, 48)
    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    asked = body(image, 4)
    calls: dict[str, Callable[[], object]] = {
        "runner": lambda: runner.chat(image, QUESTION, max_new_tokens=4),
        "server": Line(server.port, body(image, 4, policy=PLAN)),
        "client": lambda: client.chat.completions.create(**asked, extra_body={"adaptive_fusion": {"policy": PLAN}}),
    }
    for call in (*calls.values(), *calls.values()):
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    steps = Steps(shown, "overhead", pairs)
    for index in range(pairs):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            began = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - began) * 1e3)
        steps.advance()
    low, middle, high = quantiles([s - r for s, r in zip(times["server"], times["runner"], strict=True)], n=4)
    adds = median([c - s for c, s in zip(times["client"], times["server"], strict=True)])
    return {
        "pairs": pairs,
        "runner_ms": median(times["runner"]),
        "server_ms": median(times["server"]),
        "overhead_ms": middle,
        "overhead_low_ms": low,
        "overhead_high_ms": high,
        "client_ms": adds,
    }


def alone_s(server: ServerProcess, asked: Mapping[str, Any], shown: Progress) -> float:
    """Median seconds of a request with nobody before it."""
    steps, took = Steps(shown, "alone", ALONE), []
    with httpx.Client(timeout=60) as client:
        for _ in range(ALONE):
            took.append(_one(client, server, asked))
            steps.advance()
    return median(took[ALONE // 3 :])


def _one(client: httpx.Client, server: ServerProcess, asked: Mapping[str, Any]) -> float:
    began = time.perf_counter()
    client.post(server.url, json=asked).raise_for_status()
    return time.perf_counter() - began


def saturating(server: ServerProcess, asked: Mapping[str, Any], shown: Progress) -> float:
    """Answers a second of a server that always has somebody waiting."""
    steps, began = Steps(shown, "saturating", SATURATING), time.perf_counter()
    outcomes = saturate(server.port, asked, CLIENTS, SATURATING // CLIENTS, steps.advance)
    return sum(o.status == 200 for o in outcomes) / (time.perf_counter() - began)


def offered(
    server: ServerProcess, asked: Mapping[str, Any], rate: float, seconds: float, stage: str, shown: Progress
) -> dict[str, Any]:
    """What becomes of `rate` requests a second; the deadline is the body's."""
    steps = Steps(shown, stage, max(1, round(rate * seconds)))
    outcomes = offer(server.port, asked, rate, seconds, steps.advance)
    limit_s = asked["adaptive_fusion"]["latency_ms"] / 1e3
    answered = [o for o in outcomes if o.status == 200]
    refused = sorted(o.took_s * 1e3 for o in outcomes if o.status == 429)
    return {
        "rate": rate,
        "seconds": seconds,
        "requests": len(outcomes),
        "statuses": dict(sorted(Counter(o.status for o in outcomes).items())),
        "in_time": mean(o.took_s <= limit_s for o in answered) if answered else None,
        "met": mean(_met(o) for o in answered) if answered else None,
        "refused_median_ms": median(refused) if refused else None,
        "refused_p99_ms": refused[int(0.99 * len(refused))] if refused else None,
        "codes": dict(Counter(o.values["error"]["code"] for o in outcomes if o.status != 200)),
    }


def _met(outcome: Outcome) -> bool:
    return bool(outcome.values["adaptive_fusion"]["met"])


def recovery_s(server: ServerProcess, asked: Mapping[str, Any], alone: float) -> float | None:
    """Seconds until a request takes less than twice what one takes alone; None if it never does."""
    began = time.perf_counter()
    with httpx.Client(timeout=60) as client:
        while (now := time.perf_counter()) < began + RECOVERY_S:
            if _one(client, server, asked) < 2 * alone:
                return now - began
    return None


def measure(options: argparse.Namespace, folder: Path, shown: Progress) -> dict[str, Any]:
    """All parts."""
    image = picture(300, 200)
    plain = body(image, 8)
    with server_process(
        folder, "--model", options.model, "--served-name", NAME, "--queue", str(options.queue)
    ) as server:
        cost = overhead(server, options.model, options.pairs, shown)
        alone = alone_s(server, plain, shown)
        most = saturating(server, plain, shown)
        limited = body(image, 8, latency_ms=options.deadline * alone * 1e3)
        found: dict[str, Any] = {
            "overhead": cost,
            "load": {"alone_ms": alone * 1e3, "saturating": most, "deadline_ms": options.deadline * alone * 1e3},
        }
        stages = (("below", options.below, options.seconds), ("above", options.above, options.storm_seconds))
        for stage, times, seconds in stages:
            found[stage] = {"times": times, **offered(server, limited, times * most, seconds, stage, shown)}
        found["recovery_s"] = recovery_s(server, plain, alone)
    return found


def shortfalls(found: Mapping[str, Any]) -> list[str]:
    """What must hold and does not."""
    short = []
    if found["overhead"]["overhead_ms"] > OVERHEAD_MS:
        short.append(f"overhead {found['overhead']['overhead_ms']:.1f} ms; expected at most {OVERHEAD_MS:g}")
    for stage in ("below", "above"):
        row = found[stage]
        if other := {status for status in row["statuses"] if status not in (200, 429)}:
            short.append(f"{stage}: statuses {sorted(other)}; expected 200 and 429 alone")
        if row["in_time"] is None or row["in_time"] < KEPT:
            said = "nothing was answered" if row["in_time"] is None else f"{row['in_time']:.3f} in time"
            short.append(f"{stage}: {said}; expected at least {KEPT:g} of those let in")
    below, above = found["below"], found["above"]
    if below["statuses"].get(200, 0) < KEPT * below["requests"]:
        short.append(
            f"below: {below['statuses'].get(200, 0)} of {below['requests']} answered; expected {KEPT:g} of them"
        )
    if above["refused_median_ms"] is None:
        short.append("above: nothing was refused; expected a load that is too much")
    elif above["refused_median_ms"] > REFUSED_MEDIAN_MS or above["refused_p99_ms"] > REFUSED_P99_MS:
        short.append(
            f"above: refused in {above['refused_median_ms']:.1f} ms, 99th percentile {above['refused_p99_ms']:.1f}; "
            f"expected {REFUSED_MEDIAN_MS:g} and {REFUSED_P99_MS:g}"
        )
    if found["recovery_s"] is None or found["recovery_s"] > RECOVERED_S:
        said = "never" if found["recovery_s"] is None else f"after {found['recovery_s']:.1f} s"
        short.append(f"recovery: {said}; expected within {RECOVERED_S:g} s")
    return short


def lines(found: Mapping[str, Any]) -> list[str]:
    """The result in words."""
    cost, load = found["overhead"], found["load"]
    out = [
        f"overhead: {cost['overhead_ms']:+.2f} ms (quartiles {cost['overhead_low_ms']:+.2f} to "
        f"{cost['overhead_high_ms']:+.2f}), runner {cost['runner_ms']:.1f}, server {cost['server_ms']:.1f}; "
        f"the official client adds {cost['client_ms']:.2f} ms of its own",
        f"load: alone {load['alone_ms']:.1f} ms, saturating {load['saturating']:.1f} a second, "
        f"deadline {load['deadline_ms']:.0f} ms",
    ]
    for stage in ("below", "above"):
        row = found[stage]
        statuses = ", ".join(f"{count} x {status}" for status, count in row["statuses"].items())
        kept = "none" if row["in_time"] is None else f"{row['in_time']:.3f} (the server says {row['met']:.3f})"
        out.append(f"{stage}: {row['times']:g} x ({row['rate']:.1f} a second): {statuses}; in time {kept}")
        if row["refused_median_ms"] is not None:
            said = f"median {row['refused_median_ms']:.1f} ms, 99th percentile {row['refused_p99_ms']:.1f}"
            out.append(f"  refused: {said}; {row['codes']}")
    recovered = found["recovery_s"]
    out.append(f"recovery: {'never' if recovered is None else f'{recovered:.2f} s'}")
    short = shortfalls(found)
    return [*out, "falls short: " + ("; ".join(short) if short else "nothing")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--below", type=float, default=0.7, help="of the saturating load")
    parser.add_argument("--above", type=float, default=10.0, help="times the saturating load")
    parser.add_argument("--deadline", type=float, default=5.0, help="in times of a request alone")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load below")
    parser.add_argument("--storm-seconds", type=float, default=30.0, help="of the load above")
    parser.add_argument("--queue", type=int, default=32, help="of the server")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    if options.pairs < 2:
        parser.error("--pairs needs at least 2")
    for name in ("below", "above", "deadline", "seconds", "storm_seconds"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name):g}; expected more than 0")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, progress(options.json) as shown:
        found = measure(options, Path(folder), shown)
    short = shortfalls(found)
    print(json.dumps({**found, "shortfalls": short}) if options.json else "\n".join(lines(found)))
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
