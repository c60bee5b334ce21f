"""What replicas hold: measured with one and two on this machine, predicted for up to a thousand.

    python benchmarks/scale.py [--seconds 20] [--deadline 5] [--json] [--keep FILE] [--from FILE]

Parts, each with servers of its own (``adaptive-fusion serve --replicas N --batch 1``):

- ``work``: requests one after the other against one replica: processor seconds of one in its replica and outside it
  (proxy, front, client), what all of it takes while nothing comes, and the same for images that are cached;
- ``measured``, for one and for two replicas: answers a second with 8 clients that each send the next request when the
  last was answered, and the time of a request with `--share` of that load;
- ``predicted``: the same by the simulation (`fleet`), which knows nothing but ``work`` and the number of cores, with
  what each prediction is off by;
- ``one``: requests a second that one replica with a machine of its own holds with 95 % within ``--deadline`` times a
  request alone; ``fleet``: what 1 to 1,000 such replicas hold, their waiting times and how often an image is cached.

Run it on an otherwise idle machine. Exit code 1 if a prediction is off by more than 15 %. With ``--from`` a file that
``--keep`` has written nothing is measured.
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

import httpx

from benchmarks.fleet import Fleet, Load, at_rate, by_clients
from benchmarks.load import Outcome, ServerProcess, offer, saturate, server_process
from benchmarks.serving import body, picture

OFF = 0.15
HELD = 0.95
CLIENTS = 8
ALONE = 60
IDLE_S = 5.0
SIZES = (1, 2, 4, 10, 30, 100, 300, 1000)
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


def bodies(count: int, tokens: int) -> list[dict[str, Any]]:
    """Requests with images of their own."""
    return [body(picture(300 + number, 200), tokens) | {"min_tokens": tokens} for number in range(count)]


def one_by_one(server: ServerProcess, asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Processor seconds and times of requests with nobody else there; the first third warms up."""
    meter, took = Meter(server), []
    with httpx.Client(timeout=600) as client:
        for index, each in enumerate(asked):
            if index == len(asked) // 3:
                began = meter()
            start = time.perf_counter()
            client.post(server.url, json=each).raise_for_status()
            took.append(time.perf_counter() - start)
    ended, count = meter(), len(asked) - len(asked) // 3
    time.sleep(IDLE_S)
    idle = meter()
    resting = [(idle[part] - ended[part]) / (idle[2] - ended[2]) for part in (0, 1)]
    seconds = ended[2] - began[2]
    return {
        "replica_s": (ended[0] - began[0] - resting[0] * seconds) / count,
        "around_s": (ended[1] - began[1] - resting[1] * seconds) / count,
        "resting": sum(resting),
        "alone_s": median(took[len(asked) // 3 :]),
        "spread": spread(server, count),
    }


def spread(server: ServerProcess, count: int) -> list[float]:
    """Times of the last requests in their replica, each over the mean of all."""
    lines = [line for path in server.said.parent.glob("log-*.jsonl") for line in path.read_text().splitlines()]
    decisions = [record for record in map(json.loads, lines) if record.get("event", "decision") == "decision"]
    taken = [record["measurement"]["latency_ms"] for record in decisions[-count:]]
    return [each / mean(taken) for each in taken]


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
    """Everything that is measured."""
    asked = bodies(32, options.tokens)
    found: dict[str, Any] = {"cores": os.cpu_count(), "measured": {}}
    for count in (1, 2):
        with replicas(folder, count, options.model) as server:
            if count == 1:
                found["work"] = one_by_one(server, (asked * 6)[: options.alone])
            found["measured"][str(count)] = measured(server, asked, options.seconds, options.share)
    with replicas(folder, 1, options.model, cache_mb=256) as server:
        found["cached"] = one_by_one(server, asked[:1] * options.alone)
    return found


def load_of(found: dict[str, Any], **more: Any) -> Load:
    """What a request does, as it was measured."""
    work, cached = found["work"], found["cached"]
    return Load(
        [work["replica_s"] * each for each in work["spread"]],
        [cached["replica_s"] * each for each in cached["spread"]],
        around_s=work["around_s"],
        **more,
    )


def predictions(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The simulation's word on what was measured, and what it is off by."""
    load = load_of(found, cores=found["cores"] - found["work"]["resting"], images=32, zipf=0.0)
    out = {}
    for count, row in found["measured"].items():
        most = by_clients(load, int(count), CLIENTS, 4000).throughput
        took = mean(at_rate(load, int(count), row["rate"], 8000, steady=True).took_s)
        out[count] = {
            "throughput": most,
            "throughput_off": most / row["throughput"] - 1,
            "mean_s": took,
            "mean_off": took / row["mean_s"] - 1,
        }
    return out


def held(load: Load, count: int, limit_s: float, requests: int) -> tuple[float, Fleet]:
    """Requests a second that replicas hold with enough of them within the limit, found by bisection, and what it is
    like."""
    low, high = 0.0, 1.5 * count / min(mean(load.miss_s), mean(load.hit_s))
    best = at_rate(load, count, high / 100, requests)
    for _ in range(8):
        rate = (low + high) / 2
        fleet = at_rate(load, count, rate, requests)
        if fleet.within(limit_s) >= HELD:
            low, best = rate, fleet
        else:
            high = rate
    return low, best


def fleets(found: dict[str, Any], deadline: float, most: int, images: int, kept: int) -> list[dict[str, float]]:
    """What replicas on machines of their own hold, with and without caches."""
    limit_s = deadline * found["work"]["alone_s"]
    rows = []
    for count in (size for size in SIZES if size <= most):
        requests = 100 * count if count > 10 else 1500
        plain, _ = held(load_of(found), count, limit_s, requests)
        rate, fleet = held(load_of(found, images=images, held=kept), count, limit_s, requests)
        rows.append(
            {
                "replicas": count,
                "held": plain,
                "held_cached": rate,
                "hit_rate": fleet.hit_rate,
                "median_s": fleet.quantile(0.5),
                "p95_s": fleet.quantile(0.95),
            }
        )
    return rows


def lines(found: dict[str, Any], short: Sequence[str]) -> list[str]:
    """The result in words."""
    work, cached = found["work"], found["cached"]
    out = [
        f"work of a request: {work['replica_s'] * 1e3:.1f} ms in its replica ({cached['replica_s'] * 1e3:.1f} where "
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
            f"{row['held_cached']:.1f} (hits {row['hit_rate']:.2f}, median {row['median_s'] * 1e3:.0f} ms, "
            f"95 % {row['p95_s'] * 1e3:.0f} ms)"
        )
    return [*out, "falls short: " + ("; ".join(short) if short else "nothing")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--share", type=float, default=0.6, help="of the saturating load, for the time of a request")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--alone", type=int, default=ALONE * 3 // 2, help="requests one after the other")
    parser.add_argument("--deadline", type=float, default=5.0, help="in times of a request alone")
    parser.add_argument("--most", type=int, default=1000, help="replicas that are simulated")
    parser.add_argument("--images", type=int, default=10_000, help="of the simulated load, asked for by Zipf's law")
    parser.add_argument("--held", type=int, default=200, help="images that a simulated cache holds")
    parser.add_argument("--keep", type=Path, help="write what was measured there")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing, take it from there")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    if options.alone < 3:
        parser.error("--alone needs at least 3")
    if options.source is not None:
        found = json.loads(options.source.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(options, Path(folder))
    if options.keep is not None:
        options.keep.write_text(json.dumps(found))
    found["predicted"] = predictions(found)
    found["fleet"] = fleets(found, options.deadline, options.most, options.images, options.held)
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
