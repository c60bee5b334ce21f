"""How soon replicas on other hosts see what was decided of a rollout: two Ray nodes, a process on each, one file.

    python benchmarks/rollout_nodes.py [--rounds 10] [--json]

Two nodes (a raylet each, with object stores and workers of their own) are started on this machine. On each is a process
with the hook of a replica; the actor that has the file is on the head. In each round an experiment is begun and aborted
by the ledger that `adaptive-fusion rollout` uses, beside the file, and both processes note when a request would have
gone by it: seconds after the history says that it was so. Exit code 1 if one took more than a second.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only this folder is on it

import ray
from ray.cluster_utils import Cluster

from adaptive_fusion.rollout.experiment import ABORTED, RUNNING, Experiment
from adaptive_fusion.rollout.ledger import Ledger
from adaptive_fusion.rollout.store import Store

MOST_S = 1.0
WAIT_S = 60.0


class Process:
    """A replica's part in experiments, without its model.

    Args:
        file: Of the experiments; nobody but the actor on the head opens it.
    """

    def __init__(self, file: str) -> None:
        from adaptive_fusion.serving.ray import trials

        self._live = trials(Path(file), None).live

    def node(self) -> str:
        """Where it runs."""
        return str(ray.get_runtime_context().get_node_id())

    def arms(self, keys: list[str]) -> dict[str, str]:
        """What requests of these keys are given now."""
        return {key: self._live.assign(key=key).arm for key in keys}

    def answered(self, number: int, failed: bool) -> str:
        """A request, of which the canary's fail or do not; its arm."""
        given = self._live.assign(key=str(number))
        bad = float(failed and given.arm == "canary")
        self._live.finished(given, f"request {number}", {"errors": bad, "dead": bad, "out_of_memory": 0.0})
        return str(given.arm)

    def seen_s(self, name: str, status: str) -> float:
        """When, in seconds since the epoch, a request goes by that experiment in that state; infinite if it never
        does."""
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            course, control = self._live.ledger.course, self._live.ledger.control
            if course is not None and (course.experiment.name, control.status) == (name, status):
                return time.time()
            time.sleep(0.002)
        return float("inf")


@contextmanager
def two_nodes(file: Path) -> Iterator[list[Any]]:
    """A process on each of two nodes, the head's first."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"head": 1}})
    try:
        cluster.add_node(num_cpus=1, resources={"other": 1})
        ray.init(address=cluster.address, namespace="rollout-nodes", log_to_driver=False)
        made: Any = ray.remote(Process)
        yield [made.options(num_cpus=0, resources={place: 0.1}).remote(str(file)) for place in ("head", "other")]
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure(rounds: int, file: Path) -> dict[str, list[float]]:
    """By what was done and where: seconds until it was seen."""
    found: dict[str, list[float]] = {}
    with two_nodes(file) as processes:
        nodes = ray.get([each.node.remote() for each in processes])
        assert len(set(nodes)) == 2
        ledger = Ledger(Store(file))
        for index in range(rounds):
            name = f"try-{index}"
            for what, status in (("start", RUNNING), ("abort", ABORTED)):
                waits = [each.seen_s.remote(name, status) for each in processes]
                time.sleep(0.05 + 0.037 * (index % 11))  # at any moment between two looks
                if what == "start":
                    ledger.start(Experiment(name, "ab", "new", steps=(0.5,), least=()))
                else:
                    ledger.command("abort")
                decided_s = ledger.store.history()[-1]["time_s"]
                for place, seen_s in zip(("head", "other node"), ray.get(waits), strict=True):
                    found.setdefault(f"{what}, {place}", []).append(seen_s - decided_s)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.rounds, Path(folder) / "rollout.db")
    if given.json:
        print(json.dumps(found))
    else:
        for name, seconds in found.items():
            print(f"{name:18} median {sorted(seconds)[len(seconds) // 2]:.3f} s, most {max(seconds):.3f} s")
    return int(max(map(max, found.values())) > MOST_S)


if __name__ == "__main__":
    sys.exit(main())
