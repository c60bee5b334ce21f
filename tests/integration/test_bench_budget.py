"""Budgets on measured times: the table, its replay, trace files, injected delay, and the command."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from adaptive_fusion.bench import report
from adaptive_fusion.bench.baselines import Ours, run
from adaptive_fusion.bench.budget import replay, run_real
from adaptive_fusion.bench.load import Delay, background_load
from adaptive_fusion.bench.measured import MeasuredTable, measure_table, measured_world
from adaptive_fusion.bench.outcomes import best_static, oracle, score
from adaptive_fusion.bench.traces import BACKGROUND, TRACES, Case, World, build, read_trace
from adaptive_fusion.commands.bench import app
from adaptive_fusion.control.candidates import Candidate
from adaptive_fusion.decisions import Prediction
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.evaluation.scenes import reference_questions
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.runner import AdaptiveRunner

TIMES, QUALITY = (100.0, 60.0, 30.0, 15.0), (1.0, 0.9, 0.7, 0.5)


def made_up(lanes: int = 2, repeats: int = 4) -> MeasuredTable:
    """Cases of two lanes with ladders of three and four points, whose times are as predicted but for noise."""
    rng = np.random.default_rng(0)
    cases, calm = [], np.full((4, 5, repeats), np.inf)
    memory, answered = np.full((4, 5), np.inf), np.zeros((4, 5))
    for index in range(4):
        size, lane = 1.0 + 0.3 * index, index % lanes
        rungs = list(zip(TIMES, QUALITY, strict=True))[lane:]
        cases.append(
            Case(
                f"lane {lane}",
                tuple(
                    Candidate(OperatingPoint(max_pixels=2000 + int(ms)), q, Prediction(ms * size, 5.0, 50.0, ms / 1e3))
                    for ms, q in rungs
                ),
                lane == 0,
                size,
            )
        )
        for column, ms in enumerate([TIMES[0], *(ms for ms, _ in rungs)]):
            calm[index, column] = (ms * size + 5) * np.exp(rng.normal(0, 0.08, repeats))
            memory[index, column] = ms / 1e3
            answered[index, column] = 0.5
    return MeasuredTable(tuple(cases), calm, 1.6 * calm, memory, answered)


@pytest.fixture(scope="module")
def world() -> World:
    return measured_world(made_up(), 90.0, 1.1)


def test_a_replay_holds_what_must_hold_and_says_what_it_is_made_of(world: World, tmp_path: Path) -> None:
    found = replay(world, 0.95, 2000)
    assert list(found["traces"]) == [*TRACES, BACKGROUND] and found["hog_factor"] == pytest.approx(1.6)
    for name, rows in found["traces"].items():
        assert list(rows) == ["native", "best static", "aimd", "pid", "ours", "oracle"]
        assert rows["oracle"]["attainment"] == 1.0 and rows["ours"]["attainment"] >= 0.95, name
        assert rows["ours"]["of_oracle"] >= 0.9 and rows["native"]["attainment"] < 0.8
        assert rows["ours"]["answered"] == pytest.approx(0.5, abs=0.05) and rows["ours"]["decision_us"] > 0
    assert "recover" in found["traces"]["step"]["ours"] and "misses" in found["traces"][BACKGROUND]["ours"]
    json.dumps(found, allow_nan=False)
    report.plot_budget(found, tmp_path / "budget.png")
    with Image.open(tmp_path / "budget.png") as image:
        assert image.format == "PNG"
    out = report.console()
    with out.capture() as capture:
        out.print(report.budget_table(found))
    assert all(name in capture.get() for name in found["traces"])
    notes = report.budget_notes({**found, "hogs": 2, "repeats": 4, "profile": "p", "real": []})
    assert "replayed over measured times" in notes[0] and "Must hold" in notes[-1]


def test_the_best_static_choice_is_found_by_trying_all(world: World) -> None:
    trace = build("burst", world, 2000, 3)
    best, static = oracle(trace), best_static(trace, 0.9)
    scores = {}
    lanes = np.array([case.lane for case in world.cases])[trace.case]
    for first in range(1, 5):
        for second in range(1, 4):
            index = np.where(lanes == "lane 0", first, second)
            n = np.arange(len(index))
            tried = replace(static, index=index, latency=trace.elapsed + trace.times[n, index])
            scores[first, second] = score(trace, tried, best)
    held = [values["quality"] for values in scores.values() if values["attainment"] >= 0.9]
    assert held and score(trace, static, best)["quality"] == pytest.approx(max(held))
    assert score(trace, best_static(trace, 0.9999999), best)["attainment"] == max(
        s["attainment"] for s in scores.values()
    )


def test_a_trace_file_picks_load_and_cases(world: World, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{1.7 if 200 <= i < 400 else 1.0},1.6,{i % 2},{i % 30},8.0" for i in range(600)]
    path.write_text("load,work,simple,elapsed_ms,free_gb\n" + "\n".join(rows))
    trace = read_trace(path, 0)(world)
    assert trace.load[200:400].min() == 1.7 and trace.elapsed[29] == 29 and trace.free[0] == 8.0
    assert [world.cases[case].simple for case in trace.case[:4]] == [False, True, False, True]
    assert {world.cases[case].work for case in trace.case} == {1.6, 1.9}
    assert len(run(trace, Ours(world, 0.95)).index) == 600


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "expected at least load"),
        ("", "expected at least load"),
        ("load\nfast\n", "something else than numbers in column load"),
        ("load,work\n1,0\n", "0 in work"),
        ("load\nnan\n", "nan in load"),
        ("load\n-1\n", "-1 in load"),
    ],
)
def test_a_bad_trace_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_trace(path, 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv", 0)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    found = reference_questions(2, (64, 64))
    return [found[0], found[7], found[-1]]  # simple, dense, a clip


def test_measured_replayed_and_run_for_real(
    tiny_dense: Any, processor: Any, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive_fusion.bench.measured.ANSWER_TOKENS", 8)
    runner = AdaptiveRunner(tiny_dense, processor, policy="reference-latency")
    steps: list[tuple[int, int, str]] = []
    table = measure_table(runner, questions, repeats=2, progress=lambda *step: steps.append(step))
    columns = [1 + len(case.candidates) for case in table.cases]
    count = 4 * sum(columns)
    assert steps == [(done, count, "measure") for done in range(count + 1)]
    assert table.busy is None and table.slowdown is None
    for case, width in enumerate(columns):
        assert np.isfinite(table.calm[case, :width]).all() and np.isinf(table.calm[case, width:]).all()
        assert (table.memory[case, :width] >= 0).all() and (table.answered[case] >= 0).all()
    world = measured_world(table, table.default_deadline_ms, 1.25)
    assert BACKGROUND not in replay(world, 0.9, 2000)["traces"]
    [check] = run_real(runner, questions, world, 0.9, 12)
    assert check["requests"] == 12 and 0 <= check["attainment"] <= 1 and check["ratio"] > 0
    with pytest.raises(ConfigError, match="3 requests"):
        run_real(runner, questions, world, 0.9, 3)


def test_delay_stretches_the_model_and_leaves_it_as_it_was(
    tiny_dense: Any, processor: Any, noise_image: Callable[..., Any]
) -> None:
    runner = AdaptiveRunner(tiny_dense, processor, policy="native")
    encode, hooks = runner.adapter.encode, len(tiny_dense._forward_hooks)
    with Delay(runner) as delay:
        delay.factor = 3.0
        began = time.perf_counter()
        delay._wait(began - 0.01)  # ten milliseconds of work become thirty
        assert time.perf_counter() - began >= 0.0199
        assert runner.chat(noise_image(48, 48), "?", max_new_tokens=2).measurement.new_tokens >= 1
        assert runner.adapter.encode != encode
    assert runner.adapter.encode == encode and "prepare" not in vars(runner.adapter)
    assert len(tiny_dense._forward_hooks) == hooks and not tiny_dense._forward_pre_hooks


def test_busy_processes_end_with_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = []

    class Known(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            busy.append(self)

    monkeypatch.setattr(subprocess, "Popen", Known)
    with pytest.raises(KeyError), background_load(2):
        assert [process.poll() for process in busy] == [None, None]
        raise KeyError
    assert len(busy) == 2 and all(process.returncode is not None for process in busy)


def test_the_command_and_its_refusals(
    tiny_dense: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Small pictures: what is tried here is the command, not the model.
    monkeypatch.setattr("adaptive_fusion.bench.measured.ANSWER_TOKENS", 8)
    monkeypatch.setattr("adaptive_fusion.cost.plan.SHAPES", ((96, 96), (80, 64), (64, 80), (48, 48)))
    monkeypatch.setattr(
        "adaptive_fusion.evaluation.scenes.reference_questions", lambda n: reference_questions(n, (64, 64))
    )
    tiny_dense.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trace = tmp_path / "trace.csv"
    trace.write_text("load\n" + "\n".join(["1.0"] * 40 + ["1.7"] * 40))
    small = ["budget", "--model", str(tmp_path / "model"), "--policy", "native", "--repeats", "1", "--hogs", "0"]
    done = CliRunner().invoke(app, [*small, "--real", "12", "--trace", str(trace), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["requests"] == 80 and list(result["traces"]) == ["file"] and len(result["real"]) == 1
    assert "requests" in result["profile"] or result["profile"] == "given"
    for wrong in (["--attainment", "2"], ["--ttft-ms", "-1"], ["--policy", "none-such"]):
        assert CliRunner().invoke(app, [*small, *wrong]).exit_code == 2
    monkeypatch.setitem(sys.modules, "simple_pid", None)
    refused = CliRunner().invoke(app, small)
    assert refused.exit_code == 2 and "adaptive-fusion[train]" in refused.output
