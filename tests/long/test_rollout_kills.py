"""kill -9 at random moments of an experiment: nothing is lost, and an arm that was taken back never serves again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from waits import MOST_S

from adaptive_fusion.rollout.assignment import CANARY
from adaptive_fusion.rollout.course import Course
from adaptive_fusion.rollout.events import to_event
from adaptive_fusion.rollout.experiment import ROLLED_BACK, RUNNING, Experiment
from adaptive_fusion.rollout.live import Live

KILLS = 100
WORKER = """
import json, sys
from adaptive_fusion.rollout.live import Live
GOOD = {"errors": 0.0, "dead": 0.0, "out_of_memory": 0.0, "deadline_misses": 0.0}
live, first, bad = Live(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "bad"
sys.stdout.write("ready\\n"); sys.stdout.flush()
for index in range(first, first + 100_000):
    given = live.assign(key=str(index))
    status = live.ledger.control.status
    failed = bad and given.arm == "canary"
    live.finished(given, f"r{index}", {**GOOD, "errors": float(failed), "dead": float(failed)})
    sys.stdout.write(json.dumps([index, given.arm, status, live.ledger.control.generation]) + "\\n"); sys.stdout.flush()
"""


def killed(file: Path, first: int, mood: str, after_lines: int, pause_s: float) -> list[tuple[int, str, str, int]]:
    """What a process told that was killed some time after so many requests."""
    command = [sys.executable, "-c", WORKER, str(file), str(first), mood]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        lines = [process.stdout.readline() for _ in range(after_lines)]
        time.sleep(pause_s)  # where in a request it is hit
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read()
        process.wait(MOST_S)
    told = [*lines, *rest.splitlines(keepends=True)]
    return [tuple(json.loads(line)) for line in told if line.endswith("\n")]


def folded(live: Live) -> Course:
    """The course as all that was kept makes it, from its first event on."""
    number = live.ledger.control.experiment
    spec, _, _ = live.store.experiment(number)
    course = Course(Experiment.from_dict(spec))
    for row in live.store.after(number, 0):
        course.on(to_event(row.kind, row.arm, row.data))
    return course


def test_a_kill_at_any_moment_loses_no_state_and_revives_no_arm(tmp_path: Path, share_of: Callable[[int], int]) -> None:
    draws, kills, experiment = random.Random(7), share_of(KILLS), 0
    file, first, generation = tmp_path / "r.db", 0, 0
    live = Live(file)
    for index in range(kills):
        if index % 5 == 0:  # a new one: of each five kills some hit steps up, some the way back
            if live.status(series=False)["status"] == RUNNING:
                live.abort()
            experiment += 1
            steps = {"steps": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0), "least": (1, 2, 4, 8, 16, 32)}
            live.start(Experiment(f"try-{experiment}", "canary", "new", **steps))  # type: ignore[arg-type]
        ended = live.status(series=False)["status"] != RUNNING
        mood = "bad" if index % 5 >= 2 else "good"
        told = killed(file, first, mood, draws.randrange(1, 30), draws.uniform(0.0, 0.004))
        first = told[-1][0] + 2
        if ended:
            assert not any(arm == CANARY for _, arm, status, _ in told if status == ROLLED_BACK)
        for before, after in pairwise(told):
            assert after[3] >= before[3]
            if before[2] == ROLLED_BACK:
                assert after[1] != CANARY and after[2] == ROLLED_BACK
        live = Live(file)
        status = live.status(series=False)
        # Whatever was told of a running experiment was kept, and the control record is what the events make of it.
        kept = {row.id for row in live.store.after(status["number"], 0)}
        assert len(kept) >= sum(state == RUNNING for _, _, state, _ in told)
        assert all(live.served(f"r{number}") for number, _, state, _ in told[:-1] if state == RUNNING)
        course = folded(live)
        assert live.ledger.course is not None and course.state() == live.ledger.course.state()
        control = live.ledger.control
        assert (control.status, control.step, control.share) == (course.status, course.step, course.share)
        assert control.generation >= generation
        generation = control.generation
    assert any(row["status"] == ROLLED_BACK for row in live.history())
