"""How soon replicas keep their deadlines again: after one of two was killed, and as a new one.

    python benchmarks/replicas.py [--requests 200] [--share 0.4] [--deadline 5] [--json]

Parts:

- ``killed``: two replicas with `--share` of what they can do, a deadline each; one is killed with -9. Requests after
  the kill until attainment over the last 20 is back at .95, those that were late, refused or failed, and how many were
  asked again of the other replica;
- ``fresh`` and ``snapshot``: requests of a new replica until that holds, one that knows nothing beside one that goes
  on with what another has learned. The machine has no profile, so that what is not learned is a guess.

Run it on an otherwise idle machine. Exit code 1 if attainment is not back within 30 requests after the kill, or not
reached within 10 from a snapshot.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

import httpx

from benchmarks.load import Outcome, ServerProcess, offer, saturate, server_process
from benchmarks.scale import bodies, must_be_answered

TARGET = 0.95
WINDOW = 20
BACK, NEW = 30, 10
WAIT_S = 300.0


def until_kept(kept: Sequence[bool]) -> int | None:
    """Requests until a run of them begins, a window long at least, of which enough are kept, and that begins with one
    that is; None if there is none."""
    for start in range(len(kept) - WINDOW + 1):
        if kept[start] and sum(kept[start : start + WINDOW]) >= TARGET * WINDOW:
            return start
    return None


def there(server: ServerProcess) -> dict[str, dict[str, Any]]:
    """Replicas by name."""
    rows = httpx.get(f"http://127.0.0.1:{server.port}/v1/adaptive_fusion/replicas", timeout=60).json()["replicas"]
    return {row["replica"]: row for row in rows}


def another(server: ServerProcess, gone: set[str], count: int) -> None:
    """Wait until there are so many beside those that are gone."""
    ends = time.monotonic() + WAIT_S
    while len(set(there(server)) - gone) < count:
        if time.monotonic() > ends:
            raise RuntimeError("no other replica has come")
        time.sleep(0.2)


def kept(outcomes: Sequence[Outcome], limit_s: float) -> list[bool]:
    """Whether each was answered in time, in the order of sending."""
    return [o.status == 200 and o.took_s <= limit_s for o in outcomes]


def limited(asked: Sequence[dict[str, Any]], limit_s: float) -> list[dict[str, Any]]:
    """The requests with a deadline."""
    return [each | {"adaptive_fusion": {"latency_ms": limit_s * 1e3}} for each in asked]


def killed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One of two is killed in the middle of a load."""
    asked = bodies(16, 8)
    with server_process(folder, "--served-name", "benchmark", "--replicas", "2") as server:
        another(server, set(), 2)
        with httpx.Client(timeout=600) as client:
            took = [_took(client, server, asked[number % 16]) for number in range(40)]
        limit_s = options.deadline * median(took[15:])
        must_be_answered(saturate(server.port, asked, 8, 5))
        began = time.perf_counter()
        must_be_answered(saturate(server.port, asked, 8, 20))
        rate = options.share * 160 / (time.perf_counter() - began)
        before = offer(server.port, limited(asked, limit_s), rate, options.requests / rate)
        sent = []

        def kill() -> None:
            sent.append(1)
            if len(sent) == options.requests // 4:
                os.kill(next(iter(there(server).values()))["pid"], signal.SIGKILL)

        after = offer(server.port, limited(asked, limit_s), rate, options.requests / rate, kill)
        rows = kept(after, limit_s)[options.requests // 4 :]
        text = httpx.get(f"http://127.0.0.1:{server.port}/metrics", timeout=60).text
        again = [line.split()[-1] for line in text.splitlines() if line.startswith("adaptive_fusion:front_asked_again")]
    statuses = [o.status for o in after]
    return {
        "rate": rate,
        "deadline_ms": limit_s * 1e3,
        "before": sum(kept(before, limit_s)) / len(before),
        "until_kept": until_kept(rows),
        "late": sum(o.status == 200 and o.took_s > limit_s for o in after),
        "statuses": {str(status): statuses.count(status) for status in sorted(set(statuses))},
        "asked_again": int(again[0]),
    }


def _took(client: httpx.Client, server: ServerProcess, asked: dict[str, Any]) -> float:
    began = time.perf_counter()
    client.post(server.url, json=asked).raise_for_status()
    return time.perf_counter() - began


def new(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Requests of a replica that knows nothing, and of the one that takes its place after a kill."""
    limit_s = options.deadline_new * alone_s(folder)
    asked = limited(bodies(16, 8), limit_s)
    found: dict[str, Any] = {"deadline_ms": limit_s * 1e3}
    with (
        server_process(folder, "--served-name", "benchmark", "--replicas", "1") as server,
        httpx.Client(timeout=600) as client,
    ):
        another(server, set(), 1)
        found["fresh"] = _started(client, server, asked, options.requests // 2)
        time.sleep(5)  # what was learned is published every two seconds
        gone = there(server)
        os.kill(next(iter(gone.values()))["pid"], signal.SIGKILL)
        another(server, set(gone), 1)
        found["snapshot"] = _started(client, server, asked, options.requests // 2)
    return found


def _started(
    client: httpx.Client, server: ServerProcess, asked: Sequence[dict[str, Any]], requests: int
) -> dict[str, Any]:
    """What a replica keeps of its first requests, one after the other."""
    rows = []
    for number in range(requests):
        answer = client.post(server.url, json=asked[number % len(asked)])
        rows.append(answer.status_code == 200 and answer.json()["adaptive_fusion"]["met"] is True)
    return {"until_kept": until_kept(rows), "missed": rows.count(False), "requests": len(rows)}


def alone_s(folder: Path) -> float:
    """Seconds of a request at the native plan, with nobody else there."""
    place = folder / "alone"
    place.mkdir()
    with (
        server_process(place, "--served-name", "benchmark", "--policy", "native", "--replicas", "1") as server,
        httpx.Client(timeout=600) as client,
    ):
        asked = bodies(16, 8)
        return median([_took(client, server, asked[number % 16]) for number in range(40)][15:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="of each load")
    parser.add_argument("--share", type=float, default=0.4, help="of the saturating load")
    parser.add_argument("--deadline", type=float, default=5.0, help="in times of a request alone")
    parser.add_argument("--deadline-new", type=float, default=0.9, help="of a new replica, in times of a native one")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    if options.requests < 4 * WINDOW:
        parser.error(f"--requests needs at least {4 * WINDOW}")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("killed", killed), ("new", new)):
            place = Path(folder) / name
            place.mkdir()
            found[name] = part(options, place)
    short = []
    back, started = found["killed"]["until_kept"], found["new"]["snapshot"]["until_kept"]
    if back is None or back > BACK:
        short.append(f"after a kill attainment is back after {back} requests; expected {BACK}")
    if started is None or started > NEW:
        short.append(f"from a snapshot attainment is reached after {started} requests; expected {NEW}")
    if options.json:
        print(json.dumps({**found, "shortfalls": short}))
    else:
        for name, rows in found.items():
            print(name, *(f"  {key}: {value}" for key, value in rows.items()), sep="\n")
        print("falls short: " + ("; ".join(short) if short else "nothing"))
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
