"""The hook and its store: shared by processes, kept over restarts, and never a request's trouble."""

import threading
from pathlib import Path
from typing import Any

import pytest

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.assignment import CANARY, CONTROL
from adaptive_fusion.rollout.conversations import conversation_key
from adaptive_fusion.rollout.experiment import ABORTED, PROMOTED, ROLLED_BACK, Experiment
from adaptive_fusion.rollout.ledger import SNAPSHOT
from adaptive_fusion.rollout.live import LOST, SILENT_S, Assignment, Live

GOOD = {"errors": 0.0, "dead": 0.0, "out_of_memory": 0.0, "deadline_misses": 0.0}
BAD = {**GOOD, "errors": 1.0, "dead": 1.0}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def trial(name: str = "try", **options: Any) -> Experiment:
    return Experiment(name, **{"kind": "ab", "canary": "new", "steps": (0.5,), "least": (), **options})


def answered(live: Live, count: int, canary: dict[str, float] = GOOD, **keys: str) -> list[Assignment]:
    found = []
    for index in range(count):
        given = live.assign(key=f"{index}", **keys)
        live.finished(given, f"r{index}", canary if given.arm == CANARY else GOOD)
        found.append(given)
    return found


def test_without_an_experiment_the_old_policy_answers(tmp_path: Path) -> None:
    live = Live(tmp_path / "new folder" / "r.db")
    given = live.assign(user="ann")
    assert (given.arm, given.policy, given.observed) == (CONTROL, None, False)
    live.finished(given, "r", GOOD)
    assert live.status()["status"] == "none" and live.history() == [] and not live.late("r", {"ratings": 1.0})
    with pytest.raises(ConfigError, match="there is no experiment"):
        live.abort()


def test_what_one_process_decides_the_other_does_at_its_next_request(tmp_path: Path) -> None:
    one, other = Live(tmp_path / "r.db"), Live(tmp_path / "r.db")
    one.start(trial(), "ann", "see")
    assert {given.arm for given in answered(other, 20)} == {CONTROL, CANARY}
    assert one.status()["arms"] == other.status()["arms"]  # one sees what came of the other's
    assert one.abort("bob", "enough")
    assert {given.arm for given in answered(other, 20)} == {CONTROL}
    assert [(row["status"], row["who"], row["why"]) for row in other.history()] == [
        ("running", "ann", "see"),
        (ABORTED, "bob", "enough"),
    ]
    with pytest.raises(ConfigError, match="name is 'try', which another experiment has"):
        other.start(trial())
    other.start(trial("again"))
    with pytest.raises(ConfigError, match="'again' is running; expected it to be promoted or aborted"):
        one.start(trial("third"))
    assert one.promote() and {given.arm for given in answered(other, 5)} == {CANARY}
    assert other.status()["status"] == PROMOTED and not one.promote()


def test_a_dead_canary_is_taken_back_by_itself_whoever_sees_it(tmp_path: Path) -> None:
    lives = [Live(tmp_path / "r.db"), Live(tmp_path / "r.db")]
    lives[0].start(trial())
    served = 0
    for index in range(60):
        given = lives[index % 2].assign(key=str(index))
        served += given.arm == CANARY
        lives[index % 2].finished(given, f"r{index}", BAD if given.arm == CANARY else GOOD)
    assert served <= 10 and [live.status()["status"] for live in lives] == [ROLLED_BACK] * 2
    assert lives[0].status()["history"] == lives[1].status()["history"]


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    live = Live(tmp_path / "r.db")
    live.start(trial())
    before = [given.arm for given in answered(live, SNAPSHOT + 30)]
    again = Live(tmp_path / "r.db")
    assert again.ledger.course is not None and live.ledger.course is not None
    assert again.ledger.course.state() == live.ledger.course.state()
    assert [again.assign(key=f"{index}").arm for index in range(len(before))] == before
    assert len(again.status()["series"]) == 1 and again.served("r3") and not again.served("r-3")


def test_a_rating_counts_once_and_only_for_who_was_served(tmp_path: Path) -> None:
    live = Live(tmp_path / "r.db")
    live.start(trial())
    answered(live, 4)
    assert (
        live.late("r1", {"ratings": 1.0})
        and not live.late("r1", {"ratings": 0.0})
        and not live.late("x", {"ratings": 1})
    )
    row = next(row for row in live.status()["guardrails"] if row["name"] == "ratings")
    assert row["control"]["n"] + row["canary"]["n"] == 1


def test_a_conversation_keeps_its_arm_though_the_share_rises(tmp_path: Path) -> None:
    live = Live(tmp_path / "r.db")
    live.start(trial(kind="canary", steps=(0.1, 0.9, 1.0), least=(1, 500)))
    first = {f"c{index}": live.assign(conversation=f"c{index}").arm for index in range(40)}
    assert set(first.values()) == {CONTROL, CANARY}
    live.finished(next(given for given in (live.assign() for _ in range(999)) if given.arm == CANARY), "r", GOOD)
    assert live.ledger.control.share == 0.9
    assert {name: live.assign(conversation=name, follows=True).arm for name in first} == first
    assert sum(live.assign(conversation=name).arm == CANARY for name in first) > 20  # begun anew
    live.abort()
    assert {live.assign(conversation=name, follows=True).arm for name in first} == {CONTROL}


def test_of_a_user_one_request_has_a_say_but_every_error_counts(tmp_path: Path) -> None:
    live = Live(tmp_path / "r.db")
    live.start(trial(unit="user"))
    given = answered(live, 30, user="ann")
    assert len({each.arm for each in given}) == 1
    rows = {row["name"]: row[given[0].arm]["n"] for row in live.status()["guardrails"]}
    assert rows["deadline_misses"] == 1 and rows["errors"] == 30


def test_requests_that_never_end_take_the_canary_back(tmp_path: Path) -> None:
    clock = Clock()
    live = Live(tmp_path / "r.db", steady=clock)
    live.start(trial(steps=(0.999,)))
    for index in range(LOST):
        live.assign(key=str(index))
    live.cancelled(live.assign(key="gone"))  # whose client went away says nothing
    assert live.status()["status"] == "running"
    clock.now += SILENT_S + 1
    live.assign(key="late")
    assert "never came to an end" in live.status()["history"][-1]["why"]


def test_a_store_that_fails_fails_no_request(tmp_path: Path) -> None:
    live = Live(tmp_path / "r.db")
    live.start(trial(steps=(0.999,)))
    given = live.assign()
    live.store.close()
    live.finished(given, "r", GOOD)
    assert live.assign().arm == CONTROL and live.dropped >= 2
    (tmp_path / "text.db").write_text("no database at all, " * 100)
    with pytest.raises(ConfigError, match=r"text\.db cannot be used"):
        Live(tmp_path / "text.db")


def test_threads_lose_nothing(tmp_path: Path) -> None:
    live = Live(tmp_path / "r.db")
    live.start(trial())

    def work(base: int) -> None:
        for index in range(50):
            given = live.assign(key=f"{base} {index}")
            live.finished(given, f"{base} {index}", GOOD)

    threads = [threading.Thread(target=work, args=(base,)) for base in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(arm["requests"] for arm in live.status()["arms"].values()) == 400 and live.dropped == 0
    assert live.ledger.course is not None
    assert Live(tmp_path / "r.db").ledger.course.state() == live.ledger.course.state()  # type: ignore[union-attr]


def test_a_conversation_is_known_by_how_it_began() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    first = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [image, {"type": "text", "text": "?"}]},
    ]
    later = [*first, {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "sure?"}]
    key, follows = conversation_key(first)
    assert not follows and conversation_key(later) == (key, True)
    other = [first[0], {"role": "user", "content": "?"}]
    assert conversation_key(other)[0] != key and conversation_key([]) == (conversation_key([])[0], False)
