"""The benchmark of the server, small: every part runs, and what falls short of its target is said."""

import copy
import json
from collections.abc import Callable
from types import ModuleType

import pytest


def test_every_part_is_measured_and_judged(
    load_benchmark: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = load_benchmark("serving")
    monkeypatch.setattr(benchmark, "ALONE", 6)
    monkeypatch.setattr(benchmark, "SATURATING", 16)
    code = benchmark.main(["--pairs", "4", "--seconds", "1", "--storm-seconds", "1", "--deadline", "100", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == bool(found["shortfalls"])
    assert found["overhead"]["server_ms"] > 0 and found["load"]["alone_ms"] > 0 and found["load"]["saturating"] > 0
    for stage in ("below", "above"):
        row = found[stage]
        assert set(row["statuses"]) <= {"200", "429"} and sum(row["statuses"].values()) == row["requests"] > 0
    good = {
        "overhead": {"overhead_ms": 5.0},
        "below": {"statuses": {200: 95, 429: 5}, "requests": 100, "in_time": 0.95},
        "above": {"statuses": {200: 1, 429: 9}, "in_time": 0.95, "refused_median_ms": 10.0, "refused_p99_ms": 50.0},
        "recovery_s": 5.0,
    }
    assert benchmark.shortfalls(good) == []
    for worse, said in {
        ("overhead", "overhead_ms", 5.1): "overhead 5.1 ms",
        ("below", "in_time", 0.94): "below: 0.940 in time",
        ("below", "in_time", None): "below: nothing was answered",
        ("below", "statuses", ((200, 94),)): "below: 94 of 100 answered",
        ("above", "statuses", ((200, 1), (500, 1))): "above: statuses [500]",
        ("above", "refused_p99_ms", 51.0): "above: refused in 10.0 ms",
        ("above", "refused_median_ms", None): "above: nothing was refused",
    }.items():
        stage, key, value = worse
        bad = copy.deepcopy(good)
        bad[stage][key] = dict(value) if isinstance(value, tuple) else value
        assert [text.startswith(said) for text in benchmark.shortfalls(bad)] == [True], worse
    assert benchmark.shortfalls({**good, "recovery_s": None}) == ["recovery: never; expected within 5 s"]
