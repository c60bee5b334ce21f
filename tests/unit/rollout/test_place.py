"""Experiments kept in one place and asked for from afar: the same as beside the file, seen within a second."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waits import until

from adaptive_fusion.errors import ConfigError, RolloutFileError
from adaptive_fusion.rollout import place as places
from adaptive_fusion.rollout.assignment import CANARY, CONTROL
from adaptive_fusion.rollout.experiment import ABORTED, ROLLED_BACK, Experiment
from adaptive_fusion.rollout.ledger import Ledger
from adaptive_fusion.rollout.live import Live
from adaptive_fusion.rollout.place import FarLedger, FarStore, Place
from adaptive_fusion.rollout.store import Store

GOOD = {"errors": 0.0, "dead": 0.0, "out_of_memory": 0.0, "deadline_misses": 0.0}
BAD = {**GOOD, "errors": 1.0, "dead": 1.0}


class Wire:
    """Carries plain values, as between processes, to a place that may go away."""

    def __init__(self, file: Path) -> None:
        self.place, self.there = Place(str(file)), True

    def __call__(self, method: str, *arguments: Any) -> Any:
        if not self.there:
            raise ConnectionError("gone")
        return json.loads(json.dumps(getattr(self.place, method)(*json.loads(json.dumps(arguments)))))

    def tell(self, method: str, *arguments: Any) -> None:
        if self.there:
            self(method, *arguments)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Callable[[], tuple[Live, Wire]]]:
    made, wire = list[FarLedger](), Wire(tmp_path / "r.db")

    def another() -> tuple[Live, Wire]:
        made.append(FarLedger(wire, wire.tell))
        return Live(FarStore(wire), ledger=made[-1]), wire

    yield another
    for ledger in made:
        ledger.close()


def trial(name: str = "try", **options: Any) -> Experiment:
    return Experiment(name, **{"kind": "ab", "canary": "new", "steps": (0.5,), "least": (), **options})


def test_hosts_share_an_experiment_and_each_sees_what_another_decides(
    far: Callable[[], tuple[Live, Wire]], tmp_path: Path
) -> None:
    (one, _), (other, _) = far(), far()
    beside = Ledger(Store(tmp_path / "r.db"))  # the command, on the host of the file
    assert one.assign().experiment == 0 and one.status()["status"] == "none"
    beside.start(trial(), "ann", "see")
    until(lambda: one.assign().experiment and other.assign().experiment, "both to see it")
    arms = {str(index): one.assign(key=str(index)).arm for index in range(40)}
    assert {key: other.assign(key=key).arm for key in arms} == arms and set(arms.values()) == {CONTROL, CANARY}
    given = other.assign(key="0", conversation="c")
    for _ in range(2):  # what carries it may do so twice
        other.finished(given, "r0", GOOD)
    assert sum(arm["requests"] for arm in one.status()["arms"].values()) == 1
    assert one.served("r0") and one.late("r0", {"ratings": 1.0}) and not other.late("r0", {"ratings": 0.0})
    assert one.assign(key="9", conversation="c", follows=True).arm == given.arm
    one.store.keep_learned(1, CANARY, {"a": 1})
    assert other.store.learned(1, CANARY) == {"a": 1}
    beside.command("abort", "bob", "enough")
    until(lambda: one.ledger.control.status == other.ledger.control.status == ABORTED, "both to see its end")
    assert {one.assign(key=key).arm for key in arms} == {CONTROL}
    assert one.history() == beside.store.history() and other.status()["status"] == ABORTED
    with pytest.raises(ConfigError, match="name is 'try', which another experiment has"):
        one.start(trial())
    one.start(trial("again"))
    assert one.assign().experiment == 2


def test_a_dead_canary_is_taken_back_wherever_it_fails(far: Callable[[], tuple[Live, Wire]]) -> None:
    lives = [far()[0], far()[0]]
    lives[0].start(trial())
    until(lambda: lives[1].assign().experiment, "the other host to see it")
    for index in range(60):
        live = lives[index % 2]
        given = live.assign(key=str(index))
        live.finished(given, f"r{index}", BAD if given.arm == CANARY else GOOD)
    status = lives[0].status()
    assert status["status"] == ROLLED_BACK and len(status["history"]) == 2
    until(lambda: all(live.ledger.control.status == ROLLED_BACK for live in lives), "both to see it")


def test_where_the_place_cannot_be_reached_the_old_policy_answers(
    far: Callable[[], tuple[Live, Wire]], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, wire = far()
    live.start(trial(steps=(0.999,)))
    assert live.assign().arm == CANARY
    wire.there = False
    monkeypatch.setattr(places, "OLD_S", 0.0)
    assert live.assign().arm == CONTROL and live.dropped == 1 and not live.late("r", {"ratings": 1.0})
    with pytest.raises(RolloutFileError, match="cannot be asked"):
        live.abort()
    wire.there = True
    monkeypatch.setattr(places, "OLD_S", 1e9)
    assert live.assign().arm == CANARY
