"""What goes wrong around a rollout's file, and where people are in each other's way: no request fails by it, and a
canary that nobody can watch, or that was taken back, answers nobody."""

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from waits import joined

from adaptive_fusion.cli import app
from adaptive_fusion.errors import ConfigError, RolloutFileError
from adaptive_fusion.rollout import ledger, store
from adaptive_fusion.rollout.assignment import CANARY, CONTROL
from adaptive_fusion.rollout.events import Command
from adaptive_fusion.rollout.experiment import ABORTED, ROLLED_BACK, RUNNING, Experiment
from adaptive_fusion.rollout.ledger import SNAPSHOT, Ledger
from adaptive_fusion.rollout.live import BLIND_S, LOST, SILENT_S, Live
from adaptive_fusion.rollout.store import Store

GOOD = {"errors": 0.0, "dead": 0.0, "out_of_memory": 0.0, "deadline_misses": 0.0}
BAD = {**GOOD, "errors": 1.0, "dead": 1.0}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def trial(name: str = "try", **options: Any) -> Experiment:
    return Experiment(name, **{"kind": "ab", "canary": "new", "steps": (0.999,), "least": (), **options})


def served(live: Live, index: int, canary: dict[str, float]) -> str:
    given = live.assign(key=str(index))
    live.finished(given, f"r{index}", canary if given.arm == CANARY else GOOD)
    return given.arm


def test_where_no_outcome_can_be_kept_the_old_policy_answers_until_one_can(tmp_path: Path) -> None:
    steady, file = Clock(), tmp_path / "r.db"
    live = Live(file, steady=steady)
    live.start(trial())
    served(live, 0, GOOD)
    live.store._db.execute("PRAGMA busy_timeout=1")
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        served(live, 1, BAD)
        assert live.dropped == 1
        for index in range(2, 20):
            steady.now += BLIND_S
            assert served(live, index, BAD) == CONTROL
        other.execute("ROLLBACK")
    steady.now += BLIND_S
    assert served(live, 20, GOOD) == CANARY and live.status()["status"] == RUNNING


def test_a_full_disk_takes_the_canary_from_everybody(tmp_path: Path) -> None:
    steady = Clock()
    live = Live(tmp_path / "r.db", steady=steady)
    live.start(trial())
    pages = live.store._db.execute("PRAGMA page_count").fetchone()[0]
    live.store._db.execute(f"PRAGMA max_page_count={pages}")
    arms = [served(live, index, GOOD) for index in range(2000)]
    assert arms[0] == CANARY and arms[-1] == CONTROL and live.dropped
    live.store._db.execute("PRAGMA max_page_count=1000000")
    steady.now += BLIND_S
    assert served(live, 5000, GOOD) == CANARY


class Unwilling(Store):
    """A file in which outcomes can be kept, and for a time no change."""

    full = False

    def change(self, *arguments: Any) -> bool:
        if self.full:
            raise RolloutFileError("r.db cannot be read or written (database or disk is full)")
        return super().change(*arguments)


def test_what_was_taken_back_serves_nobody_though_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "AGAIN_S", 0.0)
    kept = Unwilling(tmp_path / "r.db")
    live = Live(kept)
    live.start(trial(steps=(0.5,)))
    kept.full = True
    arms = [served(live, index, BAD) for index in range(60)]
    assert 0 < arms.count(CANARY) <= 10 and live.ledger.control.status == ROLLED_BACK
    assert kept.control().status == RUNNING and len(live.history()) == 1
    with pytest.raises(RolloutFileError, match="disk is full"):
        live.abort()
    assert {served(live, 100 + index, BAD) for index in range(20)} == {CONTROL}  # also after a command that failed
    kept.full = False
    assert served(live, 200, BAD) == CONTROL
    assert kept.control().status == ROLLED_BACK and [row["status"] for row in live.history()] == [RUNNING, ROLLED_BACK]


def test_what_could_not_be_read_once_is_seen_at_the_next_look(tmp_path: Path) -> None:
    """Else an experiment that was aborted elsewhere would go on here."""

    class Shaky(Store):
        broken = 0

        def control(self) -> Any:
            if self.broken:
                self.broken -= 1
                raise RolloutFileError("r.db cannot be read or written (disk I/O error)")
            return super().control()

    kept = Shaky(tmp_path / "r.db")
    live = Live(kept)
    live.start(trial())
    assert live.assign().arm == CANARY
    Live(tmp_path / "r.db").abort()
    kept.broken = 1
    assert live.assign().arm == CONTROL and live.dropped == 1
    assert live.assign().arm == CONTROL and live.ledger.control.status == ABORTED


@pytest.mark.parametrize("change", ['{"kind": "guess"}', '{"colour": 1}', "broken"], ids=["kind", "key", "no-json"])
def test_an_experiment_that_this_version_does_not_know_is_answered_by_the_old_policy(
    tmp_path: Path, change: str
) -> None:
    file = tmp_path / "r.db"
    live = Live(file)
    Live(file).start(trial())
    with sqlite3.connect(file) as other:
        spec = json.loads(other.execute("SELECT spec FROM experiments").fetchone()[0])
        text = json.dumps(spec | json.loads(change)) if change.startswith("{") else change
        other.execute("UPDATE experiments SET spec = ?", (text,))
    for _ in range(3):
        given = live.assign()
        live.finished(given, "r", GOOD)
        assert given.arm == CONTROL and not given.observed
    assert live.dropped == 3


def test_a_clock_that_is_set_loses_no_request_and_ends_no_experiment(tmp_path: Path) -> None:
    clock, steady = Clock(), Clock()
    live = Live(tmp_path / "r.db", clock, steady)
    live.start(trial())
    for index in range(2 * LOST):
        live.assign(key=str(index))
    for step in (86_400.0, -90 * 86_400.0):
        clock.now += step
        assert served(live, 1000 + int(step), GOOD) == CANARY
    assert live.status()["status"] == RUNNING
    steady.now += SILENT_S + 1
    live.assign()
    assert live.status()["status"] == ROLLED_BACK


def test_requests_that_one_experiment_lost_do_not_count_for_the_next(tmp_path: Path) -> None:
    steady = Clock()
    live = Live(tmp_path / "r.db", steady=steady)
    for name in ("one", "two"):
        live.start(trial(name))
        for index in range(LOST - 1):
            live.assign(key=str(index))
        steady.now += SILENT_S + 1
        live.assign(key="late")
        assert live.status()["status"] == RUNNING, name
        live.abort()


def test_of_those_who_start_or_end_at_once_one_does(tmp_path: Path) -> None:
    file, count, results = tmp_path / "r.db", 8, list[str]()
    gate = threading.Barrier(count)

    def start(index: int) -> None:
        gate.wait(60)
        live = Live(file)  # all make the file at once
        gate.wait(60)
        try:
            live.start(trial(f"try-{index}"))
            results.append("started")
        except ConfigError as error:
            results.append(str(error))
        gate.wait(60)
        results.append("aborted" if live.abort(str(index)) else "nothing to abort")

    threads = [threading.Thread(target=start, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    joined(threads)
    assert results.count("started") == results.count("aborted") == 1
    assert sum("is running" in said for said in results) == results.count("nothing to abort") == count - 1
    assert [row["status"] for row in Live(file).history()] == [RUNNING, ABORTED]


def test_a_conversation_keeps_its_arm_over_a_restart_and_in_other_processes(tmp_path: Path) -> None:
    file = tmp_path / "r.db"
    live = Live(file)
    live.start(trial(kind="canary", steps=(0.3, 0.9, 1.0), least=(60, 5000)))
    first = {}
    for index in range(60):
        given = live.assign(conversation=f"a talk {index}")
        live.finished(given, f"r{index}", GOOD)
        first[f"a talk {index}"] = given.arm
    assert set(first.values()) == {CONTROL, CANARY}
    for _ in range(400):
        live.finished(live.assign(), None, GOOD)
    assert live.ledger.control.share == 0.9
    again = Live(file)
    assert {name: again.assign(conversation=name, follows=True).arm for name in first} == first
    assert not any(name.encode() in file.read_bytes() for name in first)  # keys are hashed
    assert sum(again.assign(conversation=name).arm == CANARY for name in first) > 30  # begun anew
    again.abort()
    assert {Live(file).assign(conversation=name, follows=True).arm for name in first} == {CONTROL}


def test_old_events_go_and_the_course_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(), tmp_path / "r.db"
    live, sleeper = Live(file, clock), Live(file, clock)
    live.start(trial(steps=(0.5,)))
    sleeper.assign()
    whole = Ledger(Store(file)).course
    assert whole is not None
    for index in range(2 * SNAPSHOT):
        served(live, index, GOOD)
    monkeypatch.setattr(store, "CURVE", 3)
    clock.now += store.KEEP_S + 1
    for index in range(2 * SNAPSHOT, 6 * SNAPSHOT):
        served(live, index, GOOD)
    number = live.ledger.control.experiment
    assert live.ledger.course is not None and len(live.store.after(number, 0)) == 4 * SNAPSHOT
    assert not live.served("r1") and live.served(f"r{5 * SNAPSHOT}") and len(live.status()["series"]) == 3
    for other in (sleeper, Live(file, clock)):
        assert other.status(series=False)["arms"] == live.status(series=False)["arms"]
        assert other.ledger.course is not None and other.ledger.course.state() == live.ledger.course.state()
    monkeypatch.setattr(store, "KEEP", 100)
    for index in range(6 * SNAPSHOT, 7 * SNAPSHOT):
        served(live, index, GOOD)
    assert len(live.store.after(number, 0)) <= 100 + SNAPSHOT


def test_no_event_gets_the_number_of_one_that_went(tmp_path: Path) -> None:
    """Else a process that had folded the one would take the other for folded."""
    kept = Store(tmp_path / "r.db")
    numbers = [kept.add(1, "outcome", CONTROL, GOOD, 0.0, f"r{index}") for index in range(5)]
    kept.prune(5, store.KEEP_S + 1.0)
    assert [row.id for row in kept.after(1, 0)] == numbers[-1:] == [5]
    assert kept.add(1, "outcome", CONTROL, GOOD, store.KEEP_S, "r0") == 6


OLD_INDICES = {
    1: ("ALTER TABLE events DROP COLUMN conversation",),
    2: ("CREATE INDEX talks ON events (conversation) WHERE conversation IS NOT NULL",),
}


@pytest.mark.parametrize("version", OLD_INDICES)
def test_a_file_of_an_earlier_version_goes_on(tmp_path: Path, version: int) -> None:
    file = tmp_path / "r.db"
    live = Live(file)
    live.start(trial())
    served(live, 0, GOOD)
    live.store.close()
    with sqlite3.connect(file) as other:
        for statement in (
            "DROP INDEX once", "DROP INDEX talks", "DROP TABLE listed_to", "ALTER TABLE events DROP COLUMN listed",
            "CREATE UNIQUE INDEX once ON events (request, kind) WHERE request IS NOT NULL", *OLD_INDICES[version],
            f"PRAGMA user_version={version}",
        ):  # fmt: skip
            other.execute(statement)
    again = Live(file)
    given = again.assign(conversation="c")
    again.finished(given, "r1", GOOD)
    assert again.served("r0") and Live(file).assign(conversation="c", follows=True).arm == given.arm
    with sqlite3.connect(file) as other:
        other.execute("PRAGMA user_version=99")
    with pytest.raises(ConfigError, match=r"r\.db is of version 99; expected 3"):
        Live(file)


def test_outcomes_are_found_before_and_after_they_are_in_the_indices(tmp_path: Path) -> None:
    kept = Store(tmp_path / "r.db")
    arms = (CONTROL, CANARY)
    numbers = [
        kept.add(1, "outcome", arms[index % 2], GOOD, 0.0, f"r{index}", f"talk {index // 4}") for index in range(8)
    ]
    assert kept.add(1, "late", CONTROL, {"ratings": 1.0}, 0.0, "r0 ratings") == 9
    for upto in (None, numbers[2], numbers[7], numbers[2]):
        if upto is not None:
            kept.list_to(upto)
        assert [kept.served(f"r{index}") for index in range(9)] == [*[(1, arms[index % 2]) for index in range(8)], None]
        assert [kept.talked(1, f"talk {index}") for index in range(3)] == [CONTROL, CONTROL, None]
        assert kept.talked(2, "talk 0") is None and kept.add(1, "late", CONTROL, {}, 0.0, "r0 ratings") is None
    kept.add(1, "outcome", CANARY, BAD, 0.0, "r0", "talk 0")  # the first stands
    kept.list_to(10)
    assert kept.served("r0") == (1, CONTROL) and kept.talked(1, "talk 0") == CONTROL


def test_a_broken_file_is_told_without_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "r.db"
    live = Live(file)
    live.start(trial())
    live.store.close()
    data = bytearray(file.read_bytes())
    data[4096:] = b"\x55" * (len(data) - 4096)
    file.write_bytes(data)
    for command in ("status", "history", "promote", "abort"):
        done = CliRunner().invoke(app, ["rollout", command, "--file", str(file)])
        assert done.exit_code == 2 and "r.db cannot be" in done.stderr and str(tmp_path) not in done.stderr, command


def test_twice_is_once(tmp_path: Path) -> None:
    live = Live(tmp_path / "r.db")
    live.start(trial(steps=(0.5,)))
    assert live.promote() and not live.promote() and not Live(tmp_path / "r.db").promote()
    assert live.abort() and not live.abort() and not live.promote()
    assert [row["status"] for row in live.history()] == ["running", "promoted", "aborted"]
    assert live.ledger.append(live.ledger.control.experiment, Command("promote", "x", "late"))
    assert live.assign().arm == CONTROL
