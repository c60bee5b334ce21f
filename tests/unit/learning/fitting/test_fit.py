"""From labels to a policy: as good as the rule behind the labels, calibrated, and no more complex than it pays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning_data import (
    CHEAP,
    COSTS,
    MIDDLE,
    RUNGS,
    STRONG,
    accuracy,
    base_policy,
    oracle_labels,
    p_hard,
    subject,
    write_jsonl,
)
from sklearn.naive_bayes import GaussianNB

from adaptive_fusion.errors import ConfigError, PolicyError
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import label_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.fitting.calibration import fit_calibration
from adaptive_fusion.learning.fitting.fit import FittedPolicy, fit_policy
from adaptive_fusion.learning.judging.arms import scores
from adaptive_fusion.learning.judging.evaluate import evaluate_policy
from adaptive_fusion.policy.calibration import Isotonic
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.predictors import TreeModel
from adaptive_fusion.policy.router import EstimatorRouter, PlainRouter


@pytest.fixture(scope="module")
def trained(data: Dataset) -> FittedPolicy:
    return fit_policy(data, base_policy(), n=100)


def test_the_router_is_as_good_as_the_rule_behind_the_labels(trained: FittedPolicy, fresh: Dataset) -> None:
    policy = trained.policy
    asked = fresh.columns(["prompt_read"])[:, 0]
    best = np.array([p_hard(row, bool(reads)) for row, reads in zip(fresh.x, asked, strict=True)])
    assert np.mean(np.abs(scores(policy, fresh) - best)) < 0.03
    assert accuracy(policy, fresh) > np.mean((best >= 0.5) == fresh.y) - 0.01
    report = evaluate_policy(policy, fresh, n=100)
    assert report.figures["kept"].mean > 0.98 - 0.005 and report.figures["cost_share"].mean < 0.85
    assert report.figures["calibration_error"].mean < 0.04
    said = trained.report["test"]["figures"]["apgr"]
    assert said["low"] <= report.figures["apgr"].mean <= said["high"]


def test_what_the_question_adds_is_found_and_used(trained: FittedPolicy) -> None:
    gain = trained.report["prompt_features"]
    assert gain["with"]["log_loss"] < gain["without"]["log_loss"] - 0.1
    assert gain["with"]["apgr"] > gain["without"]["apgr"] + 0.02
    assert "prompt_read" in trained.policy.router.inputs.names


def test_the_question_is_left_out_where_it_says_nothing(tmp_path: Path) -> None:
    records = oracle_labels(1200, 3, asks=False)
    for i, record in enumerate(records):
        record["prompt_features"]["prompt_read"] = float(i % 2)
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    fitted = fit_policy(data, base_policy(), estimators=("logistic",), n=50)
    assert not fitted.policy.router.inputs.reads_prompt and fitted.report["prompt_features"]


def test_expected_qualities_are_what_the_rungs_kept_in_each_lane(trained: FittedPolicy, data: Dataset) -> None:
    policy = trained.policy
    rows = data.split("train", 0)
    kept = 1 - (data.reference - data.quality[:, RUNGS.index(CHEAP)])
    to_strong = scores(policy, data) >= policy.threshold
    (cheap,) = policy.lanes["weighted"]
    assert cheap.quality == pytest.approx(kept[rows & ~to_strong].mean())
    strong, middle, last = policy.lanes["gated"]
    assert (strong.quality, last.quality) == pytest.approx((1.0, kept[rows & to_strong].mean()))
    assert strong.quality > middle.quality > last.quality
    bins = trained.report["expected_quality"]
    falling = bins["rungs"][CHEAP]
    assert len(bins["edges"]) == 3 and falling == sorted(falling, reverse=True)
    assert sum(bins["rows"]) == rows.sum()


def test_the_objective_cost_is_cheaper_and_quality_more_careful(data: Dataset, trained: FittedPolicy) -> None:
    cost = fit_policy(data, base_policy(), objective="cost", estimators=("logistic",), n=100)
    share = {
        name: report["threshold"]["share"]["mean"]
        for name, report in (("cost", cost.report), ("quality", trained.report))
    }
    assert share["cost"] < share["quality"]
    assert cost.report["threshold"]["quality"]["mean"] >= 0.98
    assert trained.report["threshold"]["quality"]["low"] >= 0.98


def test_boosted_trees_win_where_a_line_cannot(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = []
    for i, row in enumerate(rng.uniform(-1, 1, size=(1500, 4))):
        hard = row[0] * row[1] > 0
        kept = 0.4 if hard else 0.9
        quality = {STRONG: 0.9, CHEAP: kept}
        records.append(label_record(subject(row, i), "oracle", quality=quality, reference_quality=0.9, cost=COSTS))
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    fitted = fit_policy(data, base_policy(), n=50)
    router = fitted.policy.router
    assert isinstance(router, PlainRouter) and isinstance(router.model, TreeModel)
    assert fitted.report["test"]["figures"]["accuracy"]["mean"] > 0.95
    read = Policy.load(fitted.policy.save(tmp_path / "out"))
    assert (scores(read, data) == scores(fitted.policy, data)).all()


def test_a_quality_model_is_kept_only_where_choosing_by_it_wins(tmp_path: Path) -> None:
    def records(crossing: bool) -> list[dict[str, Any]]:
        rng = np.random.default_rng(5)
        out = []
        for i, row in enumerate(rng.normal(size=(1600, 4))):
            hard = row[0] > 0
            # among hard inputs the middle rung fails on one half, the cheap rung on the other
            low, high = (0.3, 0.8) if crossing and row[2] > 0 else (0.8, 0.3)
            quality = {STRONG: 0.9, MIDDLE: low if hard else 0.9, CHEAP: high if hard else 0.9}
            out.append(label_record(subject(row, i), "oracle", quality=quality, reference_quality=0.9, cost=COSTS))
        return out

    found = {}
    for crossing in (True, False):
        path = write_jsonl(tmp_path / f"{crossing}.jsonl", records(crossing))
        data = build_dataset([path], cheap=CHEAP, rungs=RUNGS)
        found[crossing] = fit_policy(data, base_policy(), estimators=("logistic",), n=100)
    model = found[True].policy.quality_model
    assert model is not None and found[True].report["quality_model"]["gain"]["low"] > 0.02
    assert found[False].policy.quality_model is None and not found[False].report["quality_model"]["used"]
    read = Policy.load(found[True].policy.save(tmp_path / "out"))
    assert read.quality_model == model


def test_features_that_only_other_labels_have_do_not_stop_the_fit(tmp_path: Path) -> None:
    records = oracle_labels(500, 3, asks=False)
    for record in records:  # measured without a question; people were shown one
        record["prompt_features"] = {}
    rng = np.random.default_rng(0)
    for i, row in enumerate(rng.normal(size=(300, 4))):
        known = subject(row, 10**6 + i, reads=bool(i % 2))
        records.append(label_record(known, "human", target=float(row[0] > 0)))
    data = build_dataset([write_jsonl(tmp_path / "l.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    fitted = fit_policy(data, base_policy(), estimators=("logistic",), n=20)
    assert set(fitted.report["quality_model"]["errors"]) == {STRONG, MIDDLE, CHEAP}
    assert isinstance(fitted.policy.router, PlainRouter)


def test_an_estimator_of_ones_own_is_calibrated_and_kept_as_it_is(
    data: Dataset, fresh: Dataset, tmp_path: Path
) -> None:
    class Own:
        """Without sample weights, and miscalibrated on purpose."""

        def fit(self, X: Any, y: Any) -> None:
            self.inner = GaussianNB().fit(np.nan_to_num(X), y)

        def predict_proba(self, X: Any) -> Any:
            return self.inner.predict_proba(np.nan_to_num(X)) ** 8 / 2

    own = Own()
    fitted = fit_policy(data, base_policy(), estimators=(own,), n=50)
    assert isinstance(fitted.policy.router, EstimatorRouter) and not hasattr(own, "inner")
    assert fitted.report["test"]["figures"]["calibration_error"]["mean"] < 0.08
    assert accuracy(fitted.policy, fresh) > 0.8

    known = fit_policy(data, base_policy(), estimators=(GaussianNB(),), n=50).policy
    folder = known.save(tmp_path / "out")
    with pytest.raises(PolicyError, match="allow_pickle"):
        Policy.load(folder)
    read = Policy.load(folder, allow_pickle=True)
    assert (scores(read, fresh) == scores(known, fresh)).all()


def test_isotonic_calibration_is_taken_only_where_a_line_is_wrong(data: Dataset) -> None:
    rng = np.random.default_rng(0)
    n = 6000
    raw = rng.uniform(-3, 3, n)
    some = replace(data, y=np.zeros(n), weight=np.ones(n), group=np.arange(n))
    straight = replace(some, y=(rng.random(n) < 1 / (1 + np.exp(-2 * raw))).astype(float))
    steps = replace(some, y=(rng.random(n) < np.where(raw < -1, 0.05, np.where(raw < 2, 0.5, 0.95))).astype(float))
    assert not isinstance(fit_calibration(raw, straight), Isotonic)
    found = fit_calibration(raw, steps)
    assert isinstance(found, Isotonic)
    assert found.batch(np.array([-2.0, 0.0, 2.5])) == pytest.approx([0.05, 0.5, 0.95], abs=0.06)
    few = steps.take(np.arange(500))
    assert not isinstance(fit_calibration(raw[:500], few), Isotonic)
    one = replace(steps, group=np.full(n, 2))  # no other half to judge by
    assert not isinstance(fit_calibration(raw, one), Isotonic)
    # a score that ranks the wrong way round is not turned round
    assert fit_calibration(-raw, straight).batch(np.array([-3.0, 3.0])) == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimators": ("forest",)}, "'forest'"),
        ({"estimators": ()}, "no estimator"),
        ({"objective": "speed"}, "'speed'"),
    ],
)
def test_wrong_options_are_named(data: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_policy(data, base_policy(), n=10, **{"estimators": ("logistic",), **options})


def test_features_can_be_left_out(data: Dataset) -> None:
    fitted = fit_policy(data, base_policy(), estimators=("logistic",), leave_out=("edge_density", "prompt_read"), n=10)
    assert {"grey_entropy"} < set(fitted.policy.router.inputs.names)
    assert not {"edge_density", "prompt_read"} & set(fitted.policy.router.inputs.names)
    with pytest.raises(ConfigError, match="'size'"):
        fit_policy(data, base_policy(), leave_out=("size",))


def test_too_few_labels_of_a_class_are_refused_with_the_numbers(data: Dataset) -> None:
    with pytest.raises(ConfigError, match="and 0 complex"):
        fit_policy(data.take(data.y == 0), base_policy())
