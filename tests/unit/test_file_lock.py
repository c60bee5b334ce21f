"""The lock of a file: one holder, through renames, forks and deaths, and nobody waits for ever."""

import os
import threading
from pathlib import Path

import pytest

from adaptive_fusion import file_lock
from adaptive_fusion.file_lock import STALE_S, appending, settled_size


@pytest.fixture(params=["flock", "claim"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "claim":
        monkeypatch.setattr(file_lock, "fcntl", None)  # as on a system without it
    return str(request.param)


def test_a_second_writer_is_told_that_it_does_not_hold_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    with appending(path, 0.0) as first:
        assert first.held
        with appending(path, 0.0) as second:
            assert not second.held
            os.write(second.handle, b"two\n")  # it may write all the same
        with appending(path, 0.0) as third:
            assert not third.held  # the second did not free what it never held
        os.write(first.handle, b"one\n")
    with appending(path, 0.0) as fourth:
        assert fourth.held
    assert path.read_bytes() == b"two\none\n" and os.listdir(tmp_path) == ["log"]


def test_a_writer_that_waited_gets_the_file_of_that_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    waiting = threading.Event()

    def write() -> None:
        waiting.set()
        with appending(path, 30.0) as file:
            assert file.held
            os.write(file.handle, b"new\n")

    thread = threading.Thread(target=write)
    with appending(path, 0.0) as file:
        thread.start()
        waiting.wait(10)
        os.write(file.handle, b"old\n")
        file.before_rename()
        path.rename(tmp_path / "log.1")
    thread.join(30)
    assert (path.read_bytes(), (tmp_path / "log.1").read_bytes()) == (b"new\n", b"old\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_go_on_holding_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "log"
    ended, end = os.pipe()
    with appending(path, 0.0):
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(ended, 1)  # until the parent is done
            os._exit(0)
    with appending(path, 0.0) as file:
        assert file.held
    os.close(end)
    os.waitpid(child, 0)
    os.close(ended)


def test_the_claim_of_a_dead_process_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "fcntl", None)
    claim = tmp_path / "log.lock"
    claim.touch()
    with appending(tmp_path / "log", 0.0) as file:
        assert not file.held and claim.exists()
    old = claim.stat().st_mtime - STALE_S - 1
    os.utime(claim, (old, old))
    with appending(tmp_path / "log", 10.0) as file:
        assert file.held
    assert not claim.exists()


def test_the_size_beside_a_writer_is_that_of_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "log"
    begun, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with appending(path, 10.0) as file:
            os.write(file.handle, b"half a ")
            begun.set()
            go_on.wait(10)
            os.write(file.handle, b"record\n")

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait(10)
    with path.open("rb") as reader:
        assert settled_size(reader.fileno(), 0.0) == 7  # who does not wait gets what is there
        go_on.set()
        assert settled_size(reader.fileno(), 10.0) == len(b"half a record\n")
    thread.join(10)
