"""Curves, thresholds, reports and the gate, against values worked out by hand or by brute force."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_data import (
    CHEAP,
    COSTS,
    LADDERS,
    MIDDLE,
    RUNGS,
    STRONG,
    base_policy,
    oracle_labels,
    rung,
    subject,
    write_jsonl,
)

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.statistics import intervals
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import label_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.fitting.gate import gate
from adaptive_fusion.learning.fitting.threshold import choose_threshold
from adaptive_fusion.learning.judging.curve import Arms, RoutingCurve, calibration_error
from adaptive_fusion.learning.judging.evaluate import evaluate, evaluate_policy
from adaptive_fusion.policy.escalation import Escalation
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.predictors import LinearModel
from adaptive_fusion.policy.router import Inputs, PlainRouter, constant_router


def arms_of(cheap: list[float], strong: list[float]) -> Arms:
    n = len(cheap)
    return Arms(np.array(cheap), np.array(strong), np.full(n, 1.0), np.full(n, 3.0), np.arange(n))


def linear(*weights: float, bias: float = 0.0, reads: float = 0.0) -> PlainRouter:
    names = (*(("edge_density", "grey_entropy")[: len(weights)]), "prompt_read")
    return PlainRouter(Inputs(names), LinearModel((*weights, reads), (0.0,) * len(names), bias))


def policy(router: PlainRouter, name: str = "tested", threshold: float = 0.5) -> Policy:
    return replace(base_policy(), name=name, router=router, threshold=threshold)


TRUE = linear(2.5, 1.5, reads=4.0, bias=-2.5)
"""The rule by which `oracle_labels` makes inputs hard."""


def test_the_figures_of_routellm_on_a_case_done_by_hand() -> None:
    arms = arms_of([0, 0, 1, 1], [1, 1, 1, 1])
    curve = RoutingCurve(np.array([0.9, 0.8, 0.2, 0.1]), arms).curve()
    assert curve.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.quality.tolist() == [0.5, 0.75, 1, 1, 1]
    assert curve.cost.tolist() == [1, 1.5, 2, 2.5, 3]
    assert curve.apgr == pytest.approx(0.75)
    assert (curve.cpt(0.5), curve.cpt(0.8), curve.cpt(1.0)) == pytest.approx((0.25, 0.4, 0.5))
    assert (curve.at_cost(1.25), curve.at_cost(3)) == pytest.approx((0.625, 1))
    assert (curve.to_reach(0.5), curve.to_reach(0.875), curve.to_reach(1.0)) == pytest.approx((1, 1.75, 2))
    assert np.isnan(curve.to_reach(1.01))
    # equal scores are routed at random: the diagonal, whatever the arms
    flat = RoutingCurve(np.zeros(4), arms).curve()
    assert (flat.apgr, flat.cpt(0.5), flat.cpt(0.8)) == pytest.approx((0.5, 0.5, 0.8))
    # where the strong arm spoils an answer, less may be spent than there is
    assert RoutingCurve(np.array([0.9, 0.1]), arms_of([0, 1], [1, 0])).curve().at_cost(3) == 1.0
    # a strong arm that is no better recovers nothing
    same = RoutingCurve(np.arange(3.0), arms_of([1, 0, 1], [1, 0, 1])).curve()
    assert np.isnan(same.apgr) and np.isnan(same.cpt(0.5))


cases = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    min_size=2,
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(case=cases, seed=st.integers(0, 1000))
def test_weights_count_as_repeated_requests_and_no_score_beats_the_oracle(
    case: list[tuple[int, float, float]], seed: int
) -> None:
    score, cheap, strong = (np.array(column, float) for column in zip(*case, strict=True))
    weight = np.random.default_rng(seed).integers(0, 3, len(score))
    weight[0] += 1
    rows = np.repeat(np.arange(len(score)), weight)
    arms = arms_of(cheap.tolist(), strong.tolist())
    weighted = RoutingCurve(score, arms).curve(weight.astype(float))
    repeated = RoutingCurve(score[rows], arms_of(cheap[rows].tolist(), strong[rows].tolist())).curve()
    at = np.linspace(0, 1, 21)
    for part in ("quality", "cost"):
        np.testing.assert_allclose(
            np.interp(at, weighted.share, getattr(weighted, part)),
            np.interp(at, repeated.share, getattr(repeated, part)),
            atol=1e-12,
        )
    oracle = RoutingCurve(arms.gain, arms).curve(weight.astype(float))
    assert (
        np.interp(at, oracle.share, oracle.quality) >= np.interp(at, weighted.share, weighted.quality) - 1e-12
    ).all()


def test_the_threshold_is_the_cheapest_that_keeps_the_tolerance() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(400)
    lost = np.where(rng.random(400) < score**2, 0.5, 0.0)
    arms = Arms(0.9 - lost, np.full(400, 0.9), np.full(400, 1.0), np.full(400, 3.0), np.arange(400))

    def kept(threshold: float) -> float:
        return float(np.where(score >= threshold, 0.9, 0.9 - lost).mean() / 0.9)

    cost = choose_threshold(score, arms, objective="cost", tolerance=0.02, n=200)
    assert cost.met and kept(cost.value.mean) >= 0.98
    assert cost.quality.mean == pytest.approx(kept(cost.value.mean))
    assert cost.share.mean == pytest.approx((score >= cost.value.mean).mean())
    # nothing cheaper keeps it: 200 candidates stand for 400 scores, so look beyond the next two
    assert all(kept(t) < 0.98 for t in np.sort(score[score > cost.value.mean])[3:])
    quality = choose_threshold(score, arms, objective="quality", tolerance=0.02, n=200)
    assert quality.met and quality.value.mean < cost.value.mean and quality.quality.low >= 0.98
    assert cost.value.low <= cost.value.mean <= cost.value.high
    none = choose_threshold(score, replace(arms, cheap=np.zeros(400)), tolerance=0.0, n=50)
    assert none.value.mean == 0.0 and none.share.mean == 1.0
    with pytest.raises(ConfigError, match="'speed'"):
        choose_threshold(score, arms, objective="speed")


def test_calibration_error_of_known_forecasts() -> None:
    p = np.repeat([0.1, 0.9], 100)
    y = np.concatenate([np.arange(100) < 10, np.arange(100) < 60]).astype(float)
    assert calibration_error(p, y) == pytest.approx(0.5 * 0.0 + 0.5 * 0.3)
    assert calibration_error(p, y, np.where(p > 0.5, 3.0, 1.0)) == pytest.approx(0.75 * 0.3)
    assert calibration_error(np.ones(5), np.ones(5)) == 0


def test_bootstrap_intervals_resample_whole_groups() -> None:
    group = np.repeat(np.arange(40), 25)
    values = np.random.default_rng(0).normal(size=40)[group]
    mean = {"mean": lambda w: float(np.average(values, weights=w))}
    by_group = intervals(lambda w: {"mean": mean["mean"](w)}, group, seed=0)["mean"]
    by_row = intervals(lambda w: {"mean": mean["mean"](w)}, np.arange(1000), seed=0)["mean"]
    assert by_group.high - by_group.low > 3 * (by_row.high - by_row.low)


def test_a_report_stands_beside_its_baselines(data: Dataset) -> None:
    report = evaluate_policy(policy(TRUE, threshold=0.3), data, n=100)
    figures = report.figures
    p = TRUE.p_complex_batch(data.columns(TRUE.inputs.names))
    to_strong = p >= 0.3
    quality = np.where(to_strong, data.quality[:, 0], data.quality[:, 2])
    assert figures["quality"].mean == pytest.approx(quality.mean())
    assert figures["cost"].mean == pytest.approx(np.where(to_strong, COSTS[STRONG], COSTS[CHEAP]).mean())
    assert figures["accuracy"].mean == pytest.approx(np.mean(to_strong == data.y))
    assert figures["calibration_error"].mean < 0.05
    assert figures["random_apgr"].mean == pytest.approx(0.5)
    oracle, apgr = figures["oracle_apgr"].mean, figures["apgr"].mean
    assert figures["gap_closed"].mean == pytest.approx((apgr - 0.5) / (oracle - 0.5))
    assert oracle > apgr > figures["entropy_apgr"].mean > 0.5
    assert figures["over_entropy"].low > 0 and figures["over_static"].low > 0 and figures["over_random"].low > 0
    entropy = data.columns(["grey_entropy"])[:, 0]
    above = np.where(entropy > np.median(entropy), data.quality[:, 0], data.quality[:, 2])
    assert figures["entropy_quality"].mean == pytest.approx(above.mean())
    assert report.static == CHEAP and figures["static_quality"].mean == pytest.approx(data.quality[:, 2].mean())
    for interval in figures.values():
        assert interval.low <= interval.mean <= interval.high
    scene = report.slices["scene"]
    assert sum(part["rows"] for part in scene.values()) == report.rows == len(data)
    assert sum(part["rows"] * part["quality"] for part in scene.values()) == pytest.approx(quality.sum())
    lost = [part["lost"] for part in scene.values()]
    assert lost == sorted(lost, reverse=True)


def test_evaluate_writes_json_and_a_plot(logs: Path, tmp_path: Path) -> None:
    good = policy(TRUE, "good").save(tmp_path / "good")
    reports = evaluate([good, base_policy()], [logs], plot=tmp_path / "plot.png", split="test", n=50)
    assert [report.policy for report in reports] == ["good", "base"]
    assert reports[0].rows == pytest.approx(300, abs=60)
    again = json.loads(json.dumps([report.to_dict() for report in reports], allow_nan=False))
    assert again[0]["curve"]["share"][-1] == 1 and len(again[0]["curve"]["share"]) <= 101
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_people_and_clips_are_judged_by_what_is_known_of_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    people = [
        label_record(subject(row, i), "human", target=float(row[0] > 0))
        for i, row in enumerate(rng.normal(size=(60, 4)))
    ]
    clips = [
        label_record(subject(row, 100 + i, kind="video"), "oracle", quality={STRONG: 0.8}, reference_quality=1.0)
        for i, row in enumerate(rng.normal(size=(30, 4)))
    ]
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", people + clips)], cheap=CHEAP, rungs=RUNGS)
    report = evaluate_policy(policy(linear(5.0, reads=0.0)), data, n=50)
    assert report.rows == 60 and report.figures["quality"].mean == 1.0 and report.figures["accuracy"].mean == 1.0
    assert report.figures["cost"].mean == report.figures["strong_share"].mean  # no costs: the share of strong calls
    assert report.clips == {"rows": 30, "quality": pytest.approx(0.8)}
    other = replace(base_policy(), lanes={lane: (rung("sum3@0.25"),) for lane in LADDERS})
    with pytest.raises(ConfigError, match=r"rung is 'sum3@0\.25'"):
        evaluate_policy(other, data)


def test_clips_count_as_traffic_and_come_last_in_the_routers_order(data: Dataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    quality = {STRONG: 0.8, CHEAP: 0.6, "native@1": 1.0}
    clips = [
        label_record(
            subject(row, 10**8 + i, kind="video"), "oracle", quality=quality, cost={**COSTS, "native@1": 200.0}
        )
        for i, row in enumerate(rng.normal(size=(50, 4)))
    ]
    stills = oracle_labels(300, 3)
    for record in stills:
        record["quality"]["native@1"], record["cost"]["native@1"] = record["reference_quality"], 120.0
    path = write_jsonl(tmp_path / "l.jsonl", clips + stills)
    both = build_dataset([path], cheap=CHEAP, rungs=[*RUNGS, "native@1"])
    report = evaluate_policy(policy(TRUE), both, n=50)
    still, traffic = report.figures, report.traffic
    assert (report.rows, report.traffic_rows) == (300, 350)
    assert traffic["quality"].mean == pytest.approx((300 * still["quality"].mean + 50 * 0.8) / 350)
    assert traffic["native_cost"].mean == pytest.approx((300 * 120 + 50 * 200) / 350)
    assert traffic["cost_share"].mean == pytest.approx(traffic["cost"].mean / traffic["native_cost"].mean)
    assert traffic["kept"].mean == pytest.approx(traffic["quality"].mean / traffic["native_quality"].mean)
    assert traffic["oracle_apgr"].mean > traffic["apgr"].mean > 0.5
    # the policy never sends a clip to native, so at equal cost some router that does may be better, never the oracle
    assert traffic["oracle_quality"].mean >= traffic["quality"].mean


def test_the_gate_refuses_what_is_worse_beyond_the_interval_and_says_why(data: Dataset) -> None:
    good, noisy = policy(TRUE), policy(linear(2.3, 1.4, reads=3.7, bias=-2.3))
    assert gate(good, good, data, n=100).accepted
    assert gate(noisy, good, data, n=100).accepted
    # On few rows somewhat worse is not surely worse.
    unsure = gate(policy(linear(1.5, 2, reads=3.0, bias=-2.0)), good, data.take(np.arange(200)), n=100)
    assert unsure.accepted and unsure.figures["apgr_difference"].mean < 0 < unsure.figures["apgr_difference"].high
    blind = gate(policy(linear(2.5, 1.5, reads=-4.0, bias=1.0)), good, data, n=100)
    assert not blind.accepted and blind.figures["apgr_difference"].high < 0
    assert blind.reasons[0].startswith(f"apgr_difference is {blind.figures['apgr_difference'].mean:.4f}")
    careless = gate(policy(TRUE, threshold=0.97), good, data, n=100)
    assert [reason.split()[0] for reason in careless.reasons] == ["quality_difference"]
    assert gate(good, None, data, n=100).accepted
    assert not gate(policy(linear(-2.0)), None, data, n=100).accepted


def test_the_gate_never_judges_by_feedback_unless_told_to(data: Dataset) -> None:
    lies = replace(data, source=np.zeros_like(data.source), y=1 - data.y)
    with pytest.raises(ConfigError, match="0 rows of human, oracle, shadow"):
        gate(policy(TRUE), policy(TRUE), lies)
    assert gate(policy(TRUE), policy(TRUE), lies, trusted=("feedback",), n=50).accepted


def test_a_native_point_that_costs_nothing_has_no_cost_share(tmp_path: Path) -> None:
    records = oracle_labels(100, 1)
    for record in records:
        record["cost"] = dict.fromkeys(record["cost"], 0.0)
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    report = evaluate_policy(policy(TRUE), data, n=20)
    assert np.isnan(report.figures["cost_share"].mean) and report.figures["kept"].mean > 0.9
    json.dumps(report.to_dict(), allow_nan=False)


def test_second_passes_of_a_policy_that_asks_are_counted(tmp_path: Path) -> None:
    """Answers that lose are unsure here: going on keeps all, and the second pass is paid for."""
    records = oracle_labels(200, 1, asks=False)
    for record in records:
        hard = record["reference_quality"] - record["quality"][CHEAP] > 0.02
        record |= {"entropies": {CHEAP: [1.0 if hard else 0.0]}, "prompt_kind": "read"}
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    alone = policy(constant_router(0.4))  # all to the cheap lane
    asks = replace(alone, escalation=Escalation())
    unsure = float(data.y.mean())
    before, after = (evaluate_policy(each, data, n=20).figures for each in (alone, asks))
    assert 0.2 < unsure < 0.8 and before["kept"].mean < 0.9 and after["kept"].mean == pytest.approx(1.0)
    assert before["cost"].mean == COSTS[CHEAP]
    assert after["cost"].mean == pytest.approx(COSTS[CHEAP] + unsure * COSTS[STRONG])
    verdict = gate(asks, alone, data, n=50)
    assert verdict.figures["cost"].mean == pytest.approx(after["cost"].mean)
    unknown = replace(data, entropy=None)
    assert evaluate_policy(asks, unknown, n=20).figures["cost"].mean == COSTS[CHEAP]


def test_the_cheap_arm_is_the_policys_cheap_plan(tmp_path: Path) -> None:
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", oracle_labels(100, 1))], cheap=CHEAP, rungs=RUNGS)
    ladders = {**base_policy().lanes, "weighted": (rung(MIDDLE), rung(CHEAP))}
    named = replace(policy(TRUE), lanes=ladders, cheap=CHEAP)
    assert evaluate_policy(named, data, n=20).arms == (CHEAP, STRONG)
    assert evaluate_policy(replace(named, cheap=""), data, n=20).arms == (MIDDLE, STRONG)
