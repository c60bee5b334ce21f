"""The simulation of replicas against queueing theory and the rule that requests follow."""

import math
import random
from statistics import mean

import pytest

from adaptive_fusion.serving.affinity import choose
from benchmarks.fleet import Load, _Simulation, at_rate, by_clients


@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_one_replica_waits_as_theory_says(busy: float) -> None:
    """Pollaczek and Khinchine: an M/G/1 queue waits rate * E[S^2] / (2 (1 - busy)) on average."""
    times = [0.05, 0.1, 0.3]
    rate = busy / mean(times)
    waits = rate * mean(time**2 for time in times) / (2 * (1 - busy))
    found = mean(mean(at_rate(Load(times), 1, rate, 20_000, seed).took_s) for seed in range(2))
    assert found == pytest.approx(mean(times) + waits, rel=0.08)


def test_what_shares_cores_takes_longer_and_does_no_more_in_all() -> None:
    alone = by_clients(Load([0.1]), 1, 8, 500).throughput
    assert alone == pytest.approx(10.0, rel=0.02)
    assert by_clients(Load([0.1]), 2, 8, 500).throughput == pytest.approx(20.0, rel=0.05)
    # Four replicas on two cores do what two do; work around them takes its part of the cores.
    assert by_clients(Load([0.1], cores=2), 4, 16, 500).throughput == pytest.approx(20.0, rel=0.05)
    assert by_clients(Load([0.1], around_s=0.05, cores=2), 4, 16, 500).throughput == pytest.approx(2 / 0.15, rel=0.05)
    # Where no core is wanting, work around a replica takes time and no throughput.
    apart = by_clients(Load([0.1], around_s=0.05), 1, 8, 500)
    assert apart.throughput == pytest.approx(10.0, rel=0.02)
    assert min(apart.took_s) == pytest.approx(0.15)


def test_little_holds() -> None:
    """Requests under way on average are their rate times their time."""
    found = by_clients(Load([0.02, 0.2], around_s=0.01, cores=3), 3, 7, 4000)
    assert found.throughput * mean(found.took_s) == pytest.approx(7, rel=0.05)


def test_requests_find_the_replica_that_the_router_would_ask_first() -> None:
    rng = random.Random(1)
    for _ in range(30):
        simulation = _Simulation(Load([1.0]), rng.randint(1, 6), 0)
        for name in simulation.names:
            for _ in range(rng.randint(0, 4)):
                simulation._count(int(name), 1)
        waiting = dict(zip(simulation.names, simulation.lengths, strict=True))
        image = rng.randrange(1000)
        assert str(simulation._place(image)) == choose(str(image), waiting)[0]


def test_images_stay_with_their_replica_so_that_caches_add_up() -> None:
    """Ten replicas that hold fifty images each hold most of five hundred; one holds a tenth of them."""
    load = Load([0.1], [0.02], images=500, zipf=0.0, held=50)
    one = at_rate(load, 1, 2.0, 3000).hit_rate
    ten = at_rate(load, 10, 20.0, 10_000).hit_rate
    assert one == pytest.approx(0.1, abs=0.03)
    assert ten > 0.6
    assert at_rate(Load([0.1], images=5, held=0), 1, 1.0, 100).hit_rate == 0.0
    assert math.isinf(Load([0.1]).cores)
