"""The controller on the simulated traces: what must hold does."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest

from adaptive_fusion.bench.baselines import Aimd, Ours, run
from adaptive_fusion.bench.outcomes import best_static, native, oracle, score
from adaptive_fusion.bench.traces import TRACES, build


@pytest.fixture(scope="module")
def simulation(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("controller")


@pytest.mark.parametrize("attainment", [0.95, 0.99])
@pytest.mark.parametrize("trace", TRACES)
def test_what_must_hold_on_the_simulated_traces(simulation: ModuleType, trace: str, attainment: float) -> None:
    drawn = build(trace, simulation.stated_world(), 3000, seed=7)
    best = oracle(drawn)
    ours = score(drawn, run(drawn, Ours(drawn.world, attainment)), best)
    assert ours["attainment"] >= attainment
    assert ours["of_oracle"] >= 0.95
    if trace == "step":
        assert ours["misses_max"] <= 4 and ours["recover_max"] <= 60
    rivals = [best_static(drawn, attainment), run(drawn, Aimd(drawn.world, attainment)), native(drawn)]
    tie = 2 * math.sqrt(attainment * (1 - attainment) / 3000)
    for rival in rivals:
        other = score(drawn, rival, best)
        assert other["attainment"] <= ours["attainment"] + tie or other["quality"] <= ours["quality"]
