"""What replicas hold: measured with one and two on this machine, predicted for up to a thousand.

    python benchmarks/scale.py [--seconds 20] [--deadline 5] [--json] [--keep FILE] [--from FILE]

Parts, each with servers of its own (``adaptive-fusion serve --replicas N --batch 1``):

- ``work``: requests one after the other against one replica: their time, processor seconds of one in its replica and
  outside it (proxy, front, client), what all of it takes while nothing comes; ``cached``: with images that are cached;
- ``beside``: processor time of a request where two clients keep two replicas busy, which share memory and caches;
- ``measured``, for one and for two replicas: answers a second with 8 clients that each send the next request when the
  last was answered, and the time of a request with `--share` of that load;
- ``predicted``: the same by the simulation (`fleet`), which knows nothing but these and the number of cores, with what
  each prediction is off by;
- ``one``: requests a second that one replica with a machine of its own holds with 95 % within ``--deadline`` times a
  request alone; ``fleet``: what 1 to 1,000 such replicas hold, their waiting times and how often an image is cached.

The first three take turns, since a machine's speed drifts. Run it on an otherwise idle machine. Exit code 1 if a
prediction is off by more than 15 %. With ``--from`` a file that ``--keep`` has written nothing is measured.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

from benchmarks.capacity import CALM, draw, fleets, predictions
from benchmarks.load import Outcome, ServerProcess, offer, saturate, server_process
from benchmarks.serving import body, picture

OFF = 0.15
CLIENTS = 8
ALONE = 60
WARM = 25
"""Requests of each client before anything is measured: the first hundred of a process take longer."""
IDLE_S = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")


def tree(root: int) -> dict[int, str]:
    """A process and all that it has started, with their names."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
                parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names.get(pid, "") for pid in found}


def processor_s(pids: Sequence[int]) -> float:
    """Processor seconds that processes have taken so far."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


class Meter:
    """Processor seconds of replicas, and of everything else that a request needs."""

    def __init__(self, server: ServerProcess) -> None:
        named = tree(server.process.pid)
        self.replicas = [pid for pid, name in named.items() if "ReplicaServer" in name]
        self.around = [pid for pid in named if pid not in self.replicas]

    def __call__(self) -> tuple[float, float, float]:
        """Of replicas; of the others, this process too; and the time."""
        return processor_s(self.replicas), processor_s(self.around) + time.process_time(), time.perf_counter()


@contextmanager
def replicas(folder: Path, count: int, model: str, cache_mb: int = 0) -> Iterator[ServerProcess]:
    """A server of so many replicas, one request at a time each."""
    place = folder / f"{count}-{cache_mb}-{time.time_ns()}"
    place.mkdir()
    options = ("--model", model, "--served-name", "benchmark", "--batch", "1", "--queue", "1000")
    with server_process(
        place,
        "--replicas",
        str(count),
        "--encoder-cache-mb",
        str(cache_mb),
        *options,
        "--log",
        str(place / "log.jsonl"),
    ) as server:
        yield server


def bodies(count: int, tokens: int, height: int = 200) -> list[dict[str, Any]]:
    """Requests with images of their own; those of another height have others."""
    return [body(picture(300 + number, height), tokens) | {"min_tokens": tokens} for number in range(count)]


def by_few(
    server: ServerProcess, asked: Sequence[dict[str, Any]], clients: int, each: int, resting: Sequence[float]
) -> dict[str, Any]:
    """Processor seconds and times of requests by clients that each send the next when the last was answered: with one
    there is nobody else, with as many as cores each has one. `resting` is what replicas and the others take of a core
    while nothing comes."""
    meter = Meter(server)
    must_be_answered(saturate(server.port, asked, clients, 2))
    began = meter()
    outcomes = saturate(server.port, asked, clients, each)
    ended, count = meter(), len(outcomes)
    must_be_answered(outcomes)
    seconds = ended[2] - began[2]
    taken = latencies(server, count)
    return {
        "replica_s": (ended[0] - began[0] - resting[0] * seconds) / count,
        "around_s": (ended[1] - began[1] - resting[1] * seconds) / count,
        "resting": sum(resting),
        "alone_s": median(o.took_s for o in outcomes),
        "mean_s": mean(o.took_s for o in outcomes),
        "logged_s": mean(taken),
        "spread": [each / mean(taken) for each in taken],
    }


def at_rest(server: ServerProcess) -> list[float]:
    """Processor seconds a second that replicas and the others take while nothing comes."""
    meter = Meter(server)
    time.sleep(1.0)
    began = meter()
    time.sleep(IDLE_S)
    ended = meter()
    return [(ended[part] - began[part]) / (ended[2] - began[2]) for part in (0, 1)]


def together(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rounds of one measurement as one: means, and all of what is in lists."""
    return {
        key: [each for one in rounds for each in one[key]]
        if isinstance(value, list)
        else mean(one[key] for one in rounds)
        for key, value in rounds[0].items()
    }


def latencies(server: ServerProcess, count: int) -> list[float]:
    """Seconds of the last requests in their replicas, by its log."""
    lines = [line for path in server.said.parent.glob("log-*.jsonl") for line in path.read_text().splitlines()]
    decisions = [record for record in map(json.loads, lines) if record.get("event", "decision") == "decision"]
    decisions.sort(key=lambda record: record["time_s"])
    return [record["measurement"]["latency_ms"] / 1e3 for record in decisions[-count:]]


def measured(server: ServerProcess, asked: Sequence[dict[str, Any]], seconds: float, share: float) -> dict[str, float]:
    """Answers a second with clients that wait for each, and the time of requests at a share of that."""
    saturate(server.port, asked, CLIENTS, 4)
    rounds = 10
    while True:  # as many as take the time that was asked for
        began = time.perf_counter()
        outcomes = saturate(server.port, asked, CLIENTS, rounds)
        if (spent := time.perf_counter() - began) >= seconds / 2:
            break
        rounds = max(rounds + 1, int(rounds * seconds / spent))
    must_be_answered(outcomes)
    most = len(outcomes) / spent
    outcomes = offer(server.port, asked, share * most, seconds)
    must_be_answered(outcomes)
    return {"throughput": most, "mean_s": mean(o.took_s for o in outcomes), "rate": share * most}


def must_be_answered(outcomes: Sequence[Outcome]) -> None:
    """Raises RuntimeError unless all were."""
    if wrong := [o for o in outcomes if o.status != 200]:
        raise RuntimeError(f"{len(wrong)} of {len(outcomes)} requests were not answered: {wrong[0]}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that is measured: in rounds, so that a machine that is faster for a minute is so for all of it."""
    asked = bodies(32, options.tokens)
    found: dict[str, Any] = {"cores": os.cpu_count(), "measured": {}, "work": {}}
    each = max(3, options.alone // options.rounds)
    for count in (1, 2):
        rounds: dict[str, list[dict[str, Any]]] = {"work": [], "beside": [], "measured": []}
        with replicas(folder, count, options.model) as server:
            must_be_answered(saturate(server.port, asked, CLIENTS, WARM))
            resting = at_rest(server)
            for _ in range(options.rounds):
                rounds["work"].append(by_few(server, asked, 1, each, resting))
                if count > 1:
                    rounds["beside"].append(by_few(server, asked, 2, each, resting))
                rounds["measured"].append(measured(server, asked, options.seconds / options.rounds, options.share))
        found["work"][str(count)] = together(rounds["work"])
        found["measured"][str(count)] = together(rounds["measured"])
        if count > 1:
            found["beside"] = together(rounds["beside"])
    with replicas(folder, 1, options.model, cache_mb=256) as server:
        must_be_answered(saturate(server.port, asked[:1], CLIENTS, WARM))
        resting, rounds = at_rest(server), {"cached": [], "new": []}
        for number in range(options.rounds):
            rounds["cached"].append(by_few(server, asked[:1], 1, each, resting))
            rounds["new"].append(by_few(server, bodies(each + 2, options.tokens, 201 + number), 1, each, resting))
    found["cached"], new = together(rounds["cached"]), together(rounds["new"])
    found["cached"]["of_new"] = found["cached"]["replica_s"] / new["replica_s"]
    return found


def lines(found: dict[str, Any], short: Sequence[str]) -> list[str]:
    """The result in words."""
    work, cached = found["work"]["1"], found["cached"]
    out = [
        f"work of a request: {work['replica_s'] * 1e3:.1f} ms in its replica ({cached['of_new']:.0%} of it where "
        f"the image is cached), {work['around_s'] * 1e3:.1f} around it; at rest {work['resting']:.2f} of "
        f"{found['cores']} cores; alone {work['alone_s'] * 1e3:.1f} ms",
    ]
    for count, row in found["measured"].items():
        said = found["predicted"][count]
        out.append(
            f"{count} replicas: {row['throughput']:.1f} a second ({said['throughput']:.1f} predicted, "
            f"{said['throughput_off']:+.0%}); at {row['rate']:.1f} a second {row['mean_s'] * 1e3:.0f} ms "
            f"({said['mean_s'] * 1e3:.0f} predicted, {said['mean_off']:+.0%})"
        )
    for row in found["fleet"]:
        out.append(
            f"{row['replicas']:>5} with machines of their own: {row['held']:.1f} a second, with caches "
            f"{row['held_cached']:.1f} (at {CALM:.0%} of that: hits {row['hit_rate']:.2f}, median "
            f"{row['median_s'] * 1e3:.0f} ms, 95 % {row['p95_s'] * 1e3:.0f} ms)"
        )
    return [*out, "falls short: " + ("; ".join(short) if short else "nothing")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--share", type=float, default=0.6, help="of the saturating load, for the time of a request")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--rounds", type=int, default=4, help="in which these are measured in turn")
    parser.add_argument("--alone", type=int, default=ALONE * 3 // 2, help="requests one after the other")
    parser.add_argument("--deadline", type=float, default=5.0, help="in times of a request alone")
    parser.add_argument("--most", type=int, default=1000, help="replicas that are simulated")
    parser.add_argument("--images", type=int, default=10_000, help="of the simulated load, asked for by Zipf's law")
    parser.add_argument("--held", type=int, default=200, help="images that a simulated cache holds")
    parser.add_argument("--keep", type=Path, help="write what was measured there")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing, take it from there")
    parser.add_argument("--plot", type=Path, help="PNG of what is held and cached with up to so many replicas")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    if options.alone < 3 or options.rounds < 1:
        parser.error("--alone needs at least 3 and --rounds at least 1")
    if options.source is not None:
        found = json.loads(options.source.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder))
    if options.keep is not None:
        options.keep.write_text(json.dumps(found))
    found["predicted"] = predictions(found, CLIENTS)
    found["fleet"] = fleets(found, options.deadline, options.most, options.images, options.held)
    if options.plot is not None:
        draw(found["fleet"], options.plot)
    short = [
        f"{count} replicas: {name} off by {row[f'{name}_off']:+.0%}; expected at most {OFF:.0%}"
        for count, row in found["predicted"].items()
        for name in ("throughput", "mean")
        if abs(row[f"{name}_off"]) > OFF
    ]
    print(json.dumps({**found, "shortfalls": short}) if options.json else "\n".join(lines(found, short)))
    return 1 if short else 0


if __name__ == "__main__":
    raise SystemExit(main())
