"""The log's file: what a torn write costs, and which settings and ratings are refused."""

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from adaptive_fusion.decision_log import DecisionLog, feedback_record
from adaptive_fusion.errors import ConfigError


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
