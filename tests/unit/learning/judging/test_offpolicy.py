"""Off-policy estimates against the truth of a simulation in which plain averaging is wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_data import CHEAP, RUNGS, base_policy, subject, write_jsonl

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import Interval
from adaptive_fusion.learning.data.labels import shadow_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.judging.offpolicy import Served, estimate, off_policy, reward_model
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.predictors import LinearModel
from adaptive_fusion.policy.router import Inputs, PlainRouter

ACTIONS = 3


def quality(x: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Mean reward: cheap rungs (high numbers) lose on complex inputs."""
    return np.clip(0.95 - 0.18 * action / (1 + np.exp(-3 * x[:, 0])) * (1 + 0.3 * x[:, 1]), 0, 1)


def target_of(x: np.ndarray) -> np.ndarray:
    return np.where(x[:, 0] > -0.5, 0, 2)


def logged(n: int, seed: int, explore: float | None) -> tuple[np.ndarray, ...]:
    """Features, actions, propensities, rewards of a live policy that sends complex inputs to the cheap rung."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    live = np.where(x[:, 0] > 0, 2, 1)
    if explore is None:  # every decision is drawn, complex inputs rarely get full compute
        p = np.exp(np.stack([-0.8 * x[:, 0], 0 * x[:, 0], 0.8 * x[:, 0]], axis=1))
        p = 0.1 + 0.7 * p / p.sum(axis=1, keepdims=True)
    else:
        p = np.full((n, ACTIONS), explore / ACTIONS)
        p[np.arange(n), live] += 1 - explore
    action = (rng.random(n)[:, None] > np.cumsum(p, axis=1)).sum(axis=1).clip(0, ACTIONS - 1)
    reward = (rng.random(n) < quality(x, action)).astype(float)
    return x, action, p[np.arange(n), action], reward


def estimates(n: int, seed: int, explore: float | None):
    x, action, p, reward = logged(n, seed, explore)
    choice = target_of(x)
    q = reward_model(x, action, reward, np.arange(n), ACTIONS)
    rows = np.arange(n)
    return estimate(reward, p, choice == action, predicted=q[rows, action], value=q[rows, choice], seed=seed, n=200)


@pytest.fixture(scope="module")
def truth() -> float:
    x = np.random.default_rng(99).normal(size=(400_000, 3))
    return float(quality(x, target_of(x)).mean())


@pytest.mark.parametrize(
    ("n", "explore", "runs"), [(5_000, None, 4), (100_000, 0.05, 1)], ids=["5000 drawn", "5 % of 100000"]
)
def test_the_value_of_another_policy_is_found_where_averaging_is_wrong(
    n: int, explore: float | None, runs: int, truth: float
) -> None:
    found = [estimates(n, seed, explore) for seed in range(runs)]
    for value in found:
        assert abs(value.doubly_robust.mean - truth) < 0.02
        assert abs(value.snips.mean - truth) < 0.02
        assert abs(value.logged.mean - truth) > 0.05
        assert value.effective_samples < value.decisions == n
    assert abs(np.mean([value.ips.mean for value in found]) - truth) < 0.02
    assert sum(value.doubly_robust.low <= truth <= value.doubly_robust.high for value in found) >= runs - 1


def test_a_policys_value_is_read_from_the_logs_of_another(truth: float, tmp_path: Path) -> None:
    x, action, p, reward = logged(4000, 7, None)
    records = []
    for i, row in enumerate(x):
        known, name = subject(row, i), RUNGS[action[i]]
        hashes = {"content_hash": known.content_hash, "kind": "image", "features": dict(known.features)}
        records.append({"schema": 1, "request_id": str(i), "rung": name, "propensity": p[i], **hashes})
        records.append(shadow_record(str(i), {name: reward[i]}))
    data = build_dataset([write_jsonl(tmp_path / "log.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    router = PlainRouter(Inputs(("edge_density",)), LinearModel((50.0,), (0.0,), 25.0))
    value = off_policy(replace(base_policy(), router=router), data, n=100)
    assert value.decisions == 4000 and value.logged.mean == pytest.approx(reward.mean())
    assert abs(value.doubly_robust.mean - truth) < 0.02 and abs(value.logged.mean - truth) > 0.05
    with pytest.raises(ConfigError, match="no logged decision"):
        off_policy(base_policy(), replace(data, propensity=np.full(len(data), np.nan)))


def test_doubly_robust_survives_a_wrong_model_or_wrong_propensities(truth: float) -> None:
    x, action, p, reward = logged(20_000, 0, None)
    choice = target_of(x)
    hits = choice == action
    zero = np.zeros(len(x))
    assert abs(estimate(reward, p, hits, predicted=zero, value=zero, n=50).doubly_robust.mean - truth) < 0.02
    wrong = np.full(len(x), 0.5)
    exact = estimate(reward, wrong, hits, predicted=quality(x, action), value=quality(x, choice), n=50)
    assert abs(exact.doubly_robust.mean - truth) < 0.02
    assert abs(exact.ips.mean - truth) > 0.05


@settings(max_examples=50, deadline=None)
@given(rewards=st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_without_exploring_every_estimate_is_the_mean(rewards: list[float]) -> None:
    ones = np.ones(len(rewards))
    value = estimate(rewards, ones, ones, predicted=rewards, value=rewards, n=10)
    for found in (value.ips, value.snips, value.doubly_robust, value.logged):
        assert found.mean == pytest.approx(np.mean(rewards), abs=1e-12)
    assert value.effective_samples == pytest.approx(len(rewards))


def test_a_known_effective_sample_size() -> None:
    value = estimate([1, 0, 1, 1], [0.5, 0.5, 0.25, 1], [1, 0, 1, 0], predicted=[0] * 4, value=[0] * 4, n=200)
    assert value.ips.mean == pytest.approx((2 + 4) / 4)
    assert value.snips.mean == pytest.approx(1.0)
    assert value.effective_samples == pytest.approx(36 / 20)


@pytest.mark.parametrize(
    ("p", "pi", "message"),
    [
        ([0.0, 1.0], [1, 1], "propensities run from 0"),
        ([0.5, 1.5], [1, 1], r"to 1\.5"),
        ([0.5, float("nan")], [1, 1], "nan"),
        ([0.5, 0.5], [0, 0], "none of the logged actions"),
        ([0.5], [1, 1], "shapes"),
    ],
)
def test_what_cannot_be_estimated_is_refused(p: list[float], pi: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate([1, 0], p, pi, predicted=[0, 0], value=[0, 0])


def test_the_reward_model_has_not_seen_the_content_that_it_predicts() -> None:
    rng = np.random.default_rng(0)
    contents = np.repeat(np.arange(100), 2)  # two decisions each
    x, reward = rng.normal(size=(100, 15))[contents], rng.random(100)[contents]
    said = reward_model(x, np.zeros(200, np.int64), reward, contents, 1)[:, 0]
    assert said.std() > 0.05 and np.corrcoef(said, reward)[0, 1] < 0.2  # noise cannot be known in advance


def test_what_is_estimated_before_a_rollout_is_measured_after_it(
    load_benchmark: Callable[[str], ModuleType],
) -> None:
    """In few and small worlds; the benchmark has a hundred."""
    benchmark = load_benchmark("offpolicy")
    rows = [benchmark.rollout(seed, n=1500, share=0.25, measured=20_000, draws=100, truth=20_000) for seed in range(8)]
    agree = [value.doubly_robust.low <= after <= value.doubly_robust.high for value, after, _ in rows]
    assert sum(agree) >= 7
    assert sum(abs(value.logged.mean - after) < 0.03 for value, after, _ in rows) < 5  # the plain mean would not do
    after = Served(Interval(0.5, 0.4, 0.6), 20)
    assert after.agrees(Interval(0.6, 0.5, 0.7)) and not after.agrees(Interval(0.6, 0.51, 0.7))


def test_a_policy_that_goes_by_needs_has_no_value_off_policy() -> None:
    with pytest.raises(ConfigError, match="by what an input needs"):
        off_policy(Policy.load("balanced"), None)  # type: ignore[arg-type]  # refused before they are looked at
