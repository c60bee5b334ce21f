"""Thresholds on the model's uncertainty: the risk that they promise, and what reaches them from labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learning_data import CHEAP, RUNGS, base_policy, oracle_labels, subject, write_jsonl
from sklearn.metrics import roc_auc_score

from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.learning.data.labels import label_record
from adaptive_fusion.learning.data.matrix import build_dataset
from adaptive_fusion.learning.fitting.escalation import auc, cheap_rungs, fit_escalation, largest_threshold
from adaptive_fusion.learning.fitting.train import train
from adaptive_fusion.policy.escalation import ANY, LEAST_AUC
from adaptive_fusion.policy.policy import Policy


def draws(rng: np.random.Generator, images: int, informed: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropies, losses and images of one to three questions an image, which have their difficulty in common."""
    group = np.repeat(np.arange(images), rng.integers(1, 4, images))
    hard = np.repeat(rng.random(images), np.bincount(group))
    loss = (rng.random(len(group)) < 0.6 * hard) * rng.random(len(group))
    entropy = informed * loss + (1 - informed) * rng.random(len(group))
    return np.round(entropy, 2), loss, group


def risk(threshold: float, entropy: np.ndarray, loss: np.ndarray, group: np.ndarray) -> float:
    """Mean over images of the mean loss of their questions."""
    kept = np.where(entropy <= threshold, loss, 0.0)
    return float(np.mean(np.bincount(group, kept) / np.bincount(group)))


@pytest.mark.parametrize("informed", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("images", "alpha"), [(40, 0.05), (150, 0.02)])
def test_the_risk_is_within_alpha_on_average_over_draws(informed: float, images: int, alpha: float) -> None:
    rng = np.random.default_rng(0)
    fresh = draws(rng, 20_000, informed)
    risks = []
    for _ in range(300):
        threshold = largest_threshold(*draws(rng, images, informed), alpha)
        assert threshold is not None
        risks.append(risk(threshold, *fresh))
    error = np.std(risks) / np.sqrt(len(risks))
    assert np.mean(risks) <= alpha + 2 * error
    assert np.mean(risks) > 0.3 * alpha - 1 / (images + 1)  # and not by keeping nothing


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 80), st.sampled_from([0.02, 0.05, 0.2]))
def test_it_is_the_largest_threshold_within_the_bound(seed: int, images: int, alpha: float) -> None:
    entropy, loss, group = draws(np.random.default_rng(seed), images, 0.5)
    found = largest_threshold(entropy, loss, group, alpha)
    if images < 1 / alpha - 1 - 1e-9:
        assert found is None
        return

    def bound(threshold: float) -> float:
        return (images * risk(threshold, entropy, loss, group) + 1) / (images + 1)

    assert found is not None and (found == 0.0 or bound(found) <= alpha + 1e-9)
    assert all(bound(each) > alpha - 1e-9 for each in entropy[entropy > found])


def test_the_area_under_the_curve_is_the_usual_one() -> None:
    rng = np.random.default_rng(1)
    score, wrong = rng.integers(0, 9, 200) / 8, rng.random(200) < 0.3
    assert auc(score, wrong) == pytest.approx(roc_auc_score(wrong, score))
    assert auc(score, wrong & False) is None


def labels(n: int, informed: float, tokens: int = 2) -> list[dict[str, object]]:
    """Labels whose cheap rung's entropy tells what it loses, as far as it is `informed`."""
    rng = np.random.default_rng(5)
    made = []
    for record in oracle_labels(n, 3):
        lost = record["reference_quality"] - record["quality"][CHEAP]
        first = informed * lost + (1 - informed) * rng.random()
        reads = record["prompt_features"]["prompt_read"]
        made.append(
            {**record, "entropies": {CHEAP: [first, 1.0][:tokens]}, "prompt_kind": "read" if reads else "describe"}
        )
    return made


def test_entropies_of_labels_reach_the_thresholds(tmp_path: Path) -> None:
    records = [*labels(300, 1.0), label_record(subject(np.zeros(2), 9), "human", target=1.0)]
    data = build_dataset([write_jsonl(tmp_path / "a.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    assert data.entropy is not None and data.entropy.shape == (301, len(RUNGS), 4) and data.asked is not None
    column = data.entropy[:, RUNGS.index(CHEAP)]
    said = np.isfinite(column[:, 0])
    lost = (data.reference - data.quality[:, RUNGS.index(CHEAP)])[said]
    assert said.sum() == 300 and np.allclose(column[said, 0], lost) and (column[said, 1] == 1).all()
    assert np.isnan(column[:, 2:]).all() and {PROMPT_KINDS[i] for i in data.asked[said]} == {"describe", "read"}
    found = fit_escalation(data, cheap_rungs(base_policy()))
    assert found is not None and found.alpha == 0.05  # 150 images
    assert set(found.thresholds) == {CHEAP} and set(found.thresholds[CHEAP]) == {ANY, "describe", "read"}
    rule = found.threshold(CHEAP, "read")
    assert rule.threshold is not None and rule.auc == 1.0 and rule.left <= 0.05 < rule.loss and 0 < rule.share < 1
    both = fit_escalation(data, [CHEAP], k=2)
    assert both is not None and both.threshold(CHEAP, "event").threshold > 0.5  # the mean with 1.0
    assert fit_escalation(data.take(np.arange(10)), [CHEAP]) is None
    digest = data.digest()
    assert replace(data, entropy=data.entropy + 1).digest() != digest
    plain = build_dataset([write_jsonl(tmp_path / "b.jsonl", oracle_labels(60, 3))], cheap=CHEAP, rungs=RUNGS)
    assert plain.entropy is None and fit_escalation(plain, [CHEAP]) is None


def test_an_entropy_that_tells_too_little_is_not_looked_at(tmp_path: Path) -> None:
    data = build_dataset([write_jsonl(tmp_path / "a.jsonl", labels(300, 0.0))], cheap=CHEAP, rungs=RUNGS)
    found = fit_escalation(data, [CHEAP])
    assert found is not None
    rule = found.threshold(CHEAP, "count")
    assert rule.threshold is None and rule.auc is not None and rule.auc < LEAST_AUC


def test_a_kind_within_which_it_tells_nothing_says_what_the_threshold_for_all_leaves_of_it(tmp_path: Path) -> None:
    rng, records = np.random.default_rng(2), labels(300, 1.0)
    for record in records:
        if record["prompt_kind"] == "read":
            record["entropies"] = {CHEAP: [0.001 * rng.random()]}
    data = build_dataset([write_jsonl(tmp_path / "a.jsonl", records)], cheap=CHEAP, rungs=RUNGS)
    found = fit_escalation(data, [CHEAP], alpha=0.3)
    assert found is not None
    read, of_all = found.threshold(CHEAP, "read"), found.threshold(CHEAP, "count")
    assert read.threshold == of_all.threshold is not None and read.rows < of_all.rows
    assert read.auc is not None and read.auc < LEAST_AUC
    # Every such answer is kept, so all that they lose is left.
    assert read.left == pytest.approx(read.loss) and read.share == 0.0 and read.left > of_all.left


def test_train_learns_them_and_the_card_says_so(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "labels.jsonl", labels(400, 0.9))
    out = train([log], tmp_path / "out", base=base_policy(), n=20, estimators=("logistic",), jobs=1, force=True).folder
    policy = Policy.load(out)
    assert policy.escalation is not None
    rule = policy.escalation.thresholds[CHEAP]["read"]
    card = (out / "README.md").read_text()
    assert "within 0.05 of quality" in card and f"| `{CHEAP}` | read | {rule.rows} | {rule.auc:.3f} |" in card
