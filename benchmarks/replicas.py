"""How soon replicas keep their deadlines again: after one of two was killed, and as a new one.

    python benchmarks/replicas.py [--requests 200] [--share 0.4] [--deadline 5] [--json]

Parts:

- ``killed``: two replicas with `--share` of what they can do, a deadline each; one is killed with -9. Requests after
  the kill until attainment over the last 20 is back at .95, those that were late, refused or failed, and how many were
  asked again of the other replica. Then all are replaced under that load, with deadlines that leave room for four
  processes that start on the same cores; `update_kept` says how many would have kept the shorter one;
- ``fresh`` and ``snapshot``: requests of a new replica until that holds, one that knows nothing beside one that goes
  on with what another has learned. The machine has no profile, so that what is not learned is a guess.

Run it on an otherwise idle machine. Exit code 1 if attainment is not back within 30 requests after the kill, or not
reached within 10 from a snapshot; if an answer is lost, given twice or not logged; if a client gets anything but an
answer or, after the kill, a refusal that names the deadline.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """One of two is killed in the middle of a load; then all are replaced in the middle of another."""
    asked = bodies(16, 8)
    with two(folder) as server, httpx.Client(timeout=600) as client:
        took = [_took(client, server, asked[number % 16]) for number in range(40)]
        limit_s = options.deadline * median(took[15:])
        must_be_answered(saturate(server.port, asked, 8, 5))
        began = time.perf_counter()
        must_be_answered(saturate(server.port, asked, 8, 20))
        rate = options.share * 160 / (time.perf_counter() - began)
        asked, patient = limited(asked, limit_s), limited(asked, options.deadline_update * limit_s / options.deadline)
        before = offer(server.port, asked, rate, options.requests / rate)
        victim, sent = next(iter(there(server).values()))["pid"], [0]

        def kill() -> None:
            sent[0] += 1
            if sent[0] == options.requests // 4:
                os.kill(victim, signal.SIGKILL)

        after = offer(server.port, asked, rate, options.requests / rate, kill)
        text = httpx.get(f"http://127.0.0.1:{server.port}/metrics", timeout=60).text
        again = [line.split()[-1] for line in text.splitlines() if line.startswith("adaptive_fusion:front_asked_again")]
        updated = _updated(server, patient, rate)
        found = wholeness([*before, *after, *updated], folder)
    return {
        "rate": rate,
        "deadline_ms": limit_s * 1e3,
        "before": sum(kept(before, limit_s)) / len(before),
        "until_kept": until_kept(kept(after, limit_s)[options.requests // 4 :]),
        "late": sum(o.status == 200 and o.took_s > limit_s for o in after),
        "statuses": statuses(after),
        "asked_again": int(again[0]),
        "update": statuses(updated),
        "update_kept": sum(kept(updated, limit_s)) / len(updated),
        "update_slowest_ms": max(o.took_s for o in updated) * 1e3,
        **found,
    }


def _updated(server: ServerProcess, asked: Sequence[dict[str, Any]], rate: float) -> list[Outcome]:
    """What becomes of requests from the signal until all replicas are others."""
    another(server, set(), 2)
    old, out, ends = set(there(server)), [], time.monotonic() + WAIT_S
    server.process.send_signal(signal.SIGHUP)
    while old & set(there(server)) and time.monotonic() < ends:
        out += offer(server.port, asked, rate, 5.0)
    return out


def statuses(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many there are of each."""
    return {str(status): count for status, count in sorted(Counter(o.status for o in outcomes).items())}


def logged(folder: Path) -> tuple[dict[str, list[str]], int]:
    """Requests that each replica has logged, in order, by its file's name; and how many lines are torn."""
    found: dict[str, list[str]] = {}
    torn = 0
    for path in folder.glob("log-*.jsonl"):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                torn += 1
                continue
            if record.get("event", "decision") == "decision":
                found.setdefault(path.stem.removeprefix("log-"), []).append(record["request_id"])
    return found, torn


def wholeness(outcomes: Sequence[Outcome], folder: Path) -> dict[str, int]:
    """Answers that clients have, those that they have twice or that are in the logs not once, and torn lines."""
    names = Counter(o.values["adaptive_fusion"]["request_id"] for o in outcomes if o.status == 200)
    records, torn = logged(folder)
    times = Counter(name for rows in records.values() for name in rows)
    return {
        "answers": len(names),
        "answered_twice": sum(count > 1 for count in names.values()),
        "not_logged_once": sum(times[name] != 1 for name in names),
        "torn_lines": torn,
    }


@contextmanager
def two(folder: Path) -> Iterator[ServerProcess]:
    """Two replicas that write logs."""
    options = ("--served-name", "benchmark", "--replicas", "2", "--log", str(folder / "log.jsonl"))
    with server_process(folder, *options) as server:
        another(server, set(), 2)
        yield server


def _took(client: httpx.Client, server: ServerProcess, asked: dict[str, Any]) -> float:
    began = time.perf_counter()
    client.post(server.url, json=asked).raise_for_status()
    return time.perf_counter() - began


def new(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """First requests, under load, of two replicas that know nothing, and of the one that comes in place of one that
    was killed."""
    native_s = alone_s(folder)
    limit_s, rate = options.deadline_new * native_s, options.share_new / native_s
    asked = limited(bodies(16, 8), limit_s)
    with two(folder) as server:
        met: dict[str, bool] = {}
        _until(server, asked, rate, met, folder, set(), options.requests // 4)
        before = set(there(server))
        fresh = {name: _first(folder, met, name) for name in before}
        time.sleep(5)  # what was learned is published every two seconds
        os.kill(next(iter(there(server).values()))["pid"], signal.SIGKILL)
        _until(server, asked, rate, met, folder, before, options.requests // 4)
        names = set(logged(folder)[0]) - before
        snapshot = {name: _first(folder, met, name) for name in names}
    return {
        "deadline_ms": limit_s * 1e3,
        "rate": rate,
        "fresh": list(fresh.values()),
        "snapshot": list(snapshot.values()),
    }


def _until(
    server: ServerProcess,
    asked: Sequence[dict[str, Any]],
    rate: float,
    met: dict[str, bool],
    folder: Path,
    without: set[str],
    count: int,
) -> None:
    """Load until each replica that is not among `without` has answered so many; whether each request was in time."""
    ends = time.monotonic() + WAIT_S
    while time.monotonic() < ends:
        for outcome in offer(server.port, asked, rate, 10 / rate):
            if outcome.status == 200:
                own = outcome.values["adaptive_fusion"]
                met[own["request_id"]] = own["met"] is True
        found = [len(rows) for name, rows in logged(folder)[0].items() if name not in without]
        if found and min(found) >= count and len(found) >= (1 if without else 2):
            return
    raise RuntimeError("a replica has not got its requests")


def _first(folder: Path, met: dict[str, bool], replica: str) -> dict[str, Any]:
    """What a replica kept of its first requests; of those that nobody waited for any more nothing is known."""
    rows = [met[name] for name in logged(folder)[0][replica] if name in met]
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


def shortfalls(found: dict[str, Any]) -> list[str]:
    """What is not as it is to be, in words."""
    short, rows = [], found["killed"]
    if (back := rows["until_kept"]) is None or back > BACK:
        short.append(f"after a kill attainment is back after {back} requests; expected {BACK}")
    short += [
        f"{rows[name]} of {name}; expected {most}"
        for name, most in (("answered_twice", 0), ("not_logged_once", 0), ("torn_lines", 1))
        if rows[name] > most
    ]
    short += [
        f"{rows[name]} of {name}; expected {' and '.join(sorted(only))} only"
        for name, only in (("statuses", {"200", "429"}), ("update", {"200"}))
        if set(rows[name]) - only
    ]
    for row in found["new"]["snapshot"]:
        if row["until_kept"] is None or row["until_kept"] > NEW:
            short.append(f"from a snapshot attainment is reached after {row['until_kept']} requests; expected {NEW}")
    return short


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="of each load")
    parser.add_argument("--share", type=float, default=0.4, help="of the saturating load")
    parser.add_argument("--deadline", type=float, default=5.0, help="in times of a request alone")
    parser.add_argument("--deadline-update", type=float, default=25.0, help="while all replicas are replaced")
    parser.add_argument("--deadline-new", type=float, default=0.9, help="of a new replica, in times of a native one")
    parser.add_argument("--share-new", type=float, default=0.5, help="requests of that load while one takes its time")
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
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    short = shortfalls(found)
    if options.json:
        print(json.dumps({**found, "shortfalls": short}))
    else:
        for name, rows in found.items():
            print(name, *(f"  {key}: {value}" for key, value in rows.items()), sep="\n")
        print("falls short: " + ("; ".join(short) if short else "nothing"))
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
