"""Drift: a flag where something changed, hardly ever where nothing did, and a range that is fitted again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning_data import CHEAP, base_policy, oracle_labels, subject, write_jsonl

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.features.image import IMAGE_FEATURES
from adaptive_fusion.learning.data.labels import shadow_record
from adaptive_fusion.learning.data.samples import FILE, KEPT, Sample, read_samples, sample_of
from adaptive_fusion.learning.fitting.familiar import LEAST_IMAGES, OWN, fit_familiar, fitted_again
from adaptive_fusion.learning.fitting.train import train
from adaptive_fusion.learning.judging.drawing import plot_drift
from adaptive_fusion.learning.judging.drift import LEVEL, RANGE, compare, drift, holm

SOME = FEATURE_NAMES[:8]


def sample(rng: np.random.Generator, n: int, shift: float = 0.0, share: float = 0.9) -> Sample:
    """Eight features that hang together, of which the first may be shifted, and an outcome."""
    rows = rng.normal(size=(n, 8)) + rng.normal(size=(n, 1))
    rows[:, 0] += shift
    quality = (rng.random(n) < share).astype(float)
    return sample_of([dict(zip(SOME, row, strict=True)) for row in rows], {"quality x (weighted)": quality}, n, 0.0)


def test_where_nothing_changed_there_is_hardly_ever_a_flag_and_a_change_is_found() -> None:
    flags = [
        bool(compare(sample(rng, 300), sample(rng, 200)).drifted)
        for rng in (np.random.default_rng(seed) for seed in range(150))
    ]
    assert np.mean(flags) <= LEVEL + 3 * np.sqrt(LEVEL / len(flags))
    rng = np.random.default_rng(0)
    for other, name in ((sample(rng, 200, shift=1.2), SOME[0]), (sample(rng, 200, share=0.6), "quality x (weighted)")):
        found = compare(sample(rng, 300), other)
        assert [change.name for change in found.drifted] == [name]
        assert name in found.in_words() and found.to_dict()["drifted"] == [name]


def test_a_change_that_is_sure_but_small_raises_no_flag() -> None:
    rng = np.random.default_rng(1)
    found = compare(sample(rng, 6000), sample(rng, 6000, shift=0.15))
    assert min(change.p for change in found.changes) < LEVEL and not found.drifted


@given(p=st.lists(st.floats(0.0, 1.0), max_size=30))
def test_holm_is_no_smaller_than_what_it_adjusts_and_keeps_its_order(p: list[float]) -> None:
    found = holm(p)
    assert all(a <= b <= 1.0 for a, b in zip(p, found, strict=True))
    assert all(found[i] <= found[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])
    if p:
        assert min(found) == pytest.approx(min(1.0, len(p) * min(p)))


def test_holm_of_a_published_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, "holm")


# Logs


def records(n: int, start_s: float, shift: float, seed: int) -> list[dict[str, Any]]:
    """Decisions, each with a shadow run, of which the images may have changed."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for i in range(n):
        row = rng.normal(size=4)
        row[0] += shift
        known, name = subject(row, seed * 10_000 + i), f"{seed}-{i}"
        found.append(
            {
                "schema": 1,
                "time_s": start_s + i,
                "request_id": name,
                "content_hash": known.content_hash,
                "kind": "image",
                "features": dict(known.features),
                "features_version": VERSION,
                "lane": "weighted",
                "rung": CHEAP,
                "propensity": 1.0,
            }
        )
        found.append(shadow_record(name, {CHEAP: float(rng.random() < 0.9)}, time_s=start_s + i))
    return found


def test_logs_are_compared_with_their_earlier_half_and_an_image_counts_once(tmp_path: Path) -> None:
    old, new = records(120, 1e9, 0.0, 1), records(120, 1.1e9, 1.5, 2)
    again = [{**old[0], "request_id": f"again-{i}", "time_s": 1e9} for i in range(500)]
    log = write_jsonl(tmp_path / "log.jsonl", [*old, *again, *new])
    found = drift([log])
    assert found.contents == (120, 120) and found.against == "the earlier half of the logs"
    assert [change.name for change in found.drifted] == [FEATURE_NAMES[0]]
    assert f"quality {CHEAP} (weighted)" in {change.name for change in found.changes}
    plot_drift(found, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert not drift([write_jsonl(tmp_path / "few.jsonl", old[:10])]).changes


def test_a_trained_policy_says_what_it_was_trained_on(tmp_path: Path) -> None:
    labels = write_jsonl(tmp_path / "labels.jsonl", [{**row, "time_s": 1e9} for row in oracle_labels(900, 3)])
    folder = train([labels], tmp_path / "new", base=base_policy(), estimators=("logistic",), n=50).folder
    known = Sample.load(folder / FILE)
    assert known.until_s == 1e9 and known.contents == 450
    assert max(map(len, known.features.values())) == KEPT
    same = write_jsonl(tmp_path / "same.jsonl", records(150, 1.1e9, 0.0, 4))
    found = drift([labels, same], folder)
    assert found.against == "what trained was trained on" and found.contents == (450, 150)
    assert not [change for change in found.drifted if change.kind == "feature"]
    other = write_jsonl(tmp_path / "other.jsonl", records(150, 1.1e9, 1.0, 5))
    assert FEATURE_NAMES[0] in {change.name for change in drift([labels, other], folder).drifted}
    assert "no image was logged since" in drift([labels], folder).in_words()
    (folder / FILE).write_text(json.dumps({"schema": 9}))
    with pytest.raises(ConfigError, match=r"schema 9|cannot be read"):
        drift([same], folder)


def test_reading_splits_at_a_moment(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", records(30, 1e9, 0.0, 6))
    before, after = read_samples([log], split_s=1e9 + 9)
    assert (before.contents, after.contents, before.until_s) == (10, 20, 1e9 + 9)


# The range


def test_images_out_of_range_raise_a_flag_until_the_range_is_fitted_again() -> None:
    """Then at most alpha of them are unlike, those that it held stay, and what is like neither is still unlike."""
    rng = np.random.default_rng(0)
    names = IMAGE_FEATURES[:6]

    def rows(n: int, place: float) -> np.ndarray:
        return rng.normal(size=(n, 6)) + place

    range_ = fit_familiar(names, {"old": rows(400, 10.0)}, {"odd": rows(60, 16.0)}, alpha=0.05)
    policy = replace(base_policy(), familiar=range_)

    def outside(policy: Any, table: np.ndarray) -> float:
        return float(np.mean([policy.familiar.is_unlike(dict(zip(names, row, strict=True))) for row in table]))

    def recent(table: np.ndarray) -> Sample:
        return sample_of([dict(zip(names, row, strict=True)) for row in table], {}, len(table), 0.0)

    nothing = Sample({}, {}, 0, 0.0)
    new = rows(300, 15.0)
    assert outside(policy, new) > 0.9
    assert [change.name for change in compare(nothing, recent(new), policy).drifted] == [RANGE]
    again = replace(policy, familiar=fitted_again(range_, new, names))
    assert again.familiar is not None and again.familiar.kinds == ("old", OWN)
    fresh = rows(400, 15.0)
    assert outside(again, fresh) < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 90)
    assert outside(again, rows(400, 10.0)) < 0.12 and outside(again, rows(200, 30.0)) > 0.9
    assert not compare(nothing, recent(fresh), again).drifted
    twice = fitted_again(again.familiar, rows(200, 20.0), names)
    assert twice is not None and twice.kinds == ("old", OWN, f"{OWN} 2")
    assert fitted_again(range_, new[: LEAST_IMAGES - 1], names) is range_
    assert fitted_again(None, np.full((300, 6), np.nan), names) is None
    alone = fitted_again(None, new, names)
    assert alone is not None and alone.kinds == (OWN,)
