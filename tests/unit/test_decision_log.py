"""The log's file: who shares it, what a torn write costs, and which settings and ratings are refused."""

import json
import os
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from log_processes import PROCESSES, expected, on_disk, reported, write_together

from adaptive_fusion import decision_log, file_lock
from adaptive_fusion.decision_log import DecisionLog, feedback_record
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.file_lock import appending


def records(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def test_a_line_torn_by_a_kill_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n":0}\n{"n":1')
    log = DecisionLog(path)
    log.write({"n": 2})
    log.write({"n": 3})
    assert [r["n"] for r in records(path)] == [0, 2, 3] and b"\n\n" not in path.read_bytes()
    assert (log.written, log.dropped) == (2, 0)


def test_a_line_torn_by_a_full_disk_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = DecisionLog(path)
    log.write({"n": 0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # A real short write: the file may grow by 20 bytes and no more.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        log.write({"n": 1, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert log.dropped == 1 and not path.read_bytes().endswith(b"\n")
    log.write({"n": 2})
    log.write({"n": 3})
    assert [r["n"] for r in records(path)] == [0, 2, 3] and log.written == 3


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, float("nan")])
@pytest.mark.parametrize("name", ["max_bytes", "keep"])
def test_absurd_sizes_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; expected an integer"):
        DecisionLog(tmp_path / "log.jsonl", **{name: value})


@pytest.mark.parametrize(
    "rating", [None, [], True, b"up", "sideways", -0.1, 1.1, float("nan"), pytest.param(10**400, id="10^400")]
)
def test_ratings_that_are_none_are_refused(rating: Any) -> None:
    with pytest.raises(ConfigError, match=r"rating is .*; expected up, down or a number from 0 to 1"):
        feedback_record("id", rating)


@pytest.mark.parametrize("max_bytes", [1, 600])
@pytest.mark.parametrize("lock", ["flock", "claim"])
def test_several_processes_lose_no_record_and_double_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str, max_bytes: int
) -> None:
    if lock == "claim":
        monkeypatch.setattr(file_lock, "fcntl", None)
    count = 300 if lock == "flock" else 60
    found = reported(*write_together(tmp_path / "log.jsonl", count, max_bytes=max_bytes, keep=PROCESSES * count))
    assert found == (PROCESSES * count, 0)
    assert on_disk(tmp_path) == expected(count)


def test_threads_and_logs_of_one_file_share_it(tmp_path: Path) -> None:
    logs = [DecisionLog(tmp_path / "log.jsonl", max_bytes=300, keep=1000) for _ in range(2)]

    def write(who: int) -> None:
        for number in range(100):
            logs[who % 2].write({"request_id": f"{who}-{number}"})

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(write, range(PROCESSES)))
    assert sum(log.written for log in logs) == PROCESSES * 100 and on_disk(tmp_path) == expected(100)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_writes_though_a_thread_held_the_lock(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    log.write({"n": 0})
    with log._lock:  # as another thread may at the moment of a fork
        child = os.fork()
        if child == 0:
            log.write({"n": 1})
            os._exit(0 if (log.written, log.dropped) == (1, 0) else 1)
    assert os.waitpid(child, 0)[1] == 0
    log.write({"n": 2})
    assert [r["n"] for r in records(log.path)] == [0, 1, 2] and log.written == 2


def test_a_killed_writer_costs_the_others_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    workers, results = write_together(path, 10**6, max_bytes=2000, keep=10**6)
    log = DecisionLog(path, max_bytes=2000, keep=10**6)
    for number in range(200):
        log.write({"request_id": f"mine-{number}"})
        if number % 50 == 25:
            workers[number // 50].kill()
            workers[number // 50].join(60)
    results.close()
    broken = 0
    mine = []
    for file in tmp_path.iterdir():
        for line in file.read_bytes().splitlines():
            try:
                mine.append(json.loads(line)["request_id"])
            except ValueError:
                broken += 1
    assert broken <= len(workers)
    assert sorted(name for name in mine if name.startswith("mine")) == sorted(f"mine-{n}" for n in range(200))
    ahead = [[int(name.split("-")[1]) for name in mine if name.startswith(f"{who}-")] for who in range(PROCESSES)]
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in ahead)  # none but the last is missing


def test_another_writer_that_hangs_fails_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_log, "_WAIT_S", 0.0)
    log = DecisionLog(tmp_path / "log.jsonl", max_bytes=1)
    log.write({"n": 0})
    with appending(log.path, 0.0):
        log.write({"n": 1})
    assert [r["n"] for r in records(log.path)] == [0, 1] and log.written == 2  # beyond its size, but there
    log.write({"n": 2})
    assert [r["n"] for r in records(log.path)] == [2] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("keep", [1, 2, 16, 17, 20])
def test_files_set_aside_are_at_most_those_kept_and_the_newest(tmp_path: Path, keep: int) -> None:
    log = DecisionLog(tmp_path / "log.jsonl", max_bytes=1, keep=keep)
    for number in range(60):
        log.write({"n": number})
        os.utime(log.path, (number, number))  # what lies behind those in order is told apart by its time of writing
    found = {file.name: records(file)[0]["n"] for file in tmp_path.iterdir()}
    assert sorted(found.values()) == list(range(59 - keep, 60)) and log.dropped == 0
    assert set(found) == {"log.jsonl", *(f"log.jsonl.{index}" for index in range(1, keep + 1))}
    in_order = [found[f"log.jsonl.{index}"] for index in range(1, min(keep, 16) + 1)]
    assert in_order == list(range(58, 58 - len(in_order), -1))
    DecisionLog(log.path, max_bytes=1, keep=1).write({"n": 60})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_rotation_that_a_kill_cut_short_loses_nothing(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl", max_bytes=1, keep=10)
    for number in range(6):
        log.write({"n": number})
    (tmp_path / "log.jsonl.3").rename(tmp_path / "log.jsonl.6")
    (tmp_path / "log.jsonl.4").rename(tmp_path / "log.jsonl.7")
    for number in range(6, 9):
        log.write({"n": number})
    found = sorted(records(file)[0]["n"] for file in tmp_path.iterdir())
    assert found == list(range(9))


def test_a_folder_that_went_away_is_made_again(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "deep" / "log.jsonl")
    log.write({"n": 0})
    shutil.rmtree(tmp_path / "deep")
    log.write({"n": 1})
    assert [r["n"] for r in records(log.path)] == [1] and log.written == 2


def test_what_json_has_no_type_for_fails_no_request(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    log.write(
        {"a": np.float32(0.5), "b": np.int64(3), "c": float("inf"), "d": tmp_path.__class__, "e": {1: (True, None)}}
    )
    [found] = records(log.path)
    assert found == {"a": 0.5, "b": 3, "c": None, "d": str(tmp_path.__class__), "e": {"1": [True, None]}}


def test_the_time_of_a_rating_is_read_or_refused(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl")
    for written in (1.7e9, 1.7e12, "2023-11-14T22:13:20Z"):
        log.feedback("r", "up", time_s=written)
    assert {r["time_s"] for r in records(log.path)} == {1.7e9}
    with pytest.raises(ConfigError, match="time_s of a rating is 'today'"):
        log.feedback("r", "up", time_s="today")
