"""Quality metrics and bootstrap intervals against published tools, known values and their invariants."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.evaluation.cider import cider_d
from adaptive_fusion.evaluation.statistics import (
    Interval,
    bootstrap,
    bootstrap_diff,
    bootstrap_mean,
    bootstrap_ratio,
    most_mean,
    won_back,
)
from adaptive_fusion.evaluation.text import (
    FloatArray,
    anls,
    bleu4,
    bleu_statistics,
    element_recall,
    exact_match,
    matching_accuracy,
    tokenize,
)

CANDIDATES = [
    "a red button below a blue slider",
    "two text fields and a menu",
    "menu",
    "a chart with three bars bars bars bars",
    "nothing of the kind",
]
REFERENCES = [
    ["a red button below a blue slider", "a blue slider above a red button"],
    ["a menu and two text fields", "two fields with text next to a menu", "a form"],
    ["a menu"],
    ["a chart with three bars", "a bar chart"],
    ["a dialog with a red button"],
]
SPLIT_CANDIDATES = [text.split() for text in CANDIDATES]
SPLIT_REFERENCES = [[text.split() for text in group] for group in REFERENCES]

words = st.lists(st.sampled_from(["red", "blue", "button", "slider", "menu", "a", "the"]), max_size=9)
quick = settings(max_examples=100, deadline=None)


def random_captions(seed: int, samples: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions of 0-14 words, 1-5 references each; a third of the candidates repeat a reference."""
    rng = random.Random(seed)

    def caption() -> list[str]:
        return [f"w{rng.randrange(30)}" for _ in range(rng.randint(0, 14))]

    references = [[caption() for _ in range(rng.randint(1, 5))] for _ in range(samples)]
    return [group[0] if i % 3 == 0 else caption() for i, group in enumerate(references)], references


def test_cider_d_gives_the_values_of_pycocoevalcap() -> None:
    # Cider().compute_score of pycocoevalcap 1.2 on the captions above.
    expected = [7.002308269548, 2.079461515303, 2.465517791860, 2.588475977359, 0.0]
    np.testing.assert_allclose(cider_d(SPLIT_CANDIDATES, SPLIT_REFERENCES), expected, atol=1e-9)


def test_cider_d_equals_the_oracle_on_random_captions() -> None:
    oracle = pytest.importorskip("pycocoevalcap.cider.cider", reason="oracle only: pip install pycocoevalcap")
    candidates, references = random_captions(seed=0, samples=300)
    _, expected = oracle.Cider().compute_score(
        {i: [" ".join(tokens) for tokens in group] for i, group in enumerate(references)},
        {i: [" ".join(tokens)] for i, tokens in enumerate(candidates)},
    )
    np.testing.assert_allclose(cider_d(candidates, references), expected, atol=1e-9)


def test_cider_d_of_a_slice_keeps_the_whole_sets_document_frequencies() -> None:
    whole = cider_d(SPLIT_CANDIDATES, SPLIT_REFERENCES)
    part = cider_d(SPLIT_CANDIDATES[:2], SPLIT_REFERENCES[:2], df_corpus=SPLIT_REFERENCES)
    np.testing.assert_array_equal(part, whole[:2])
    assert not np.allclose(cider_d(SPLIT_CANDIDATES[:2], SPLIT_REFERENCES[:2]), whole[:2])


@quick
@given(other=words, reference=words.filter(lambda tokens: len(tokens) >= 4))
def test_no_candidate_scores_above_the_reference_itself(other: list[str], reference: list[str]) -> None:
    corpus = [[reference], *SPLIT_REFERENCES, [["unrelated"]]]
    same, changed, longer = cider_d([reference, other, [*reference, "extra"]], [[reference]] * 3, df_corpus=corpus)
    assert same == pytest.approx(10.0)
    assert 0.0 <= changed <= same + 1e-9
    assert longer < same
    if sorted(other) != sorted(reference):
        assert changed < same - 1e-9


def test_cider_d_refuses_what_cannot_be_scored() -> None:
    with pytest.raises(ConfigError, match="got 1 candidates for 2 samples"):
        cider_d([["a"]], [[["a"]], [["b"]]])
    with pytest.raises(ConfigError, match="sample 1 has no reference"):
        cider_d([["a"], ["b"]], [[["a"]], []])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A red Button, below (the) slider.", ["a", "red", "button", "below", "the", "slider"]),
        ("At 12:30 it cost $3.50, e-mail me!", ["at", "12:30", "it", "cost", "3.50", "e-mail", "me"]),
        ("don't / don\u2019t", ["don't", "don't"]),
        ("\uff33\uff21\uff36\uff25 \U0001d400", ["save", "a"]),
        ("Cafe\u0301 \u00dcber \u65e5\u672c", ["caf\u00e9", "\u00fcber", "\u65e5\u672c"]),
        (" ...!? ", []),
    ],
)
def test_tokenize(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens


@quick
@given(st.text(max_size=40))
def test_tokenizing_twice_changes_nothing(text: str) -> None:
    tokens = tokenize(text)
    assert tokenize(" ".join(tokens)) == tokens


def test_bleu4_of_summed_statistics_equals_sacrebleu_on_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="part of the [train] extra")
    candidates, references = random_captions(seed=1, samples=60)
    statistics = bleu_statistics(candidates, references)
    for chosen in (range(60), [3, 3, 7, 12, 0, 59], [1]):
        streams = [[" ".join(references[i][min(k, len(references[i]) - 1)]) for i in chosen] for k in range(5)]
        expected = sacrebleu.corpus_bleu(
            [" ".join(candidates[i]) for i in chosen], streams, tokenize="none", force=True
        ).score
        assert bleu4(statistics[list(chosen)]) == pytest.approx(expected, abs=1e-9)
    assert bleu4(bleu_statistics([["a", "b", "c", "d"]], [[["a", "b", "c", "d"]]])) == pytest.approx(100.0)


def test_exact_match_ignores_case_and_space_only() -> None:
    assert exact_match(" Save  As\n", ["open", "save as"]) == 1.0
    assert exact_match("save as.", ["save as"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Invoice 4711", ["invoice 4711"], 1.0),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["ac"], 0.5),  # just the threshold counts
        ("abc", ["axy"], 0.0),  # 1/3 is below it
        ("total: 12", ["zzz", "total 12"], 1 - 1 / 9),
        ("", ["x"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls_known_values(prediction: str, references: list[str], expected: float) -> None:
    assert anls(prediction, references) == pytest.approx(expected)


@quick
@given(a=st.text("abC ", max_size=12), b=st.text("abC ", max_size=12), c=st.text("abC ", max_size=12))
def test_anls_is_a_symmetric_similarity_in_the_unit_range(a: str, b: str, c: str) -> None:
    raw = anls(a, [b], threshold=0.0)
    assert 0.0 <= raw <= 1.0
    assert raw == anls(b, [a], threshold=0.0)
    assert anls(a, [b]) == (raw if raw >= 0.5 else 0.0)
    assert (raw == 1.0) == (exact_match(a, [b]) == 1.0)
    assert anls(a, [b, c]) == max(anls(a, [b]), anls(a, [c]))

    def distance(x: str, y: str) -> float:
        x, y = (" ".join(text.lower().split()) for text in (x, y))
        return round((1 - anls(x, [y], threshold=0.0)) * max(len(x), len(y)), 6)

    assert distance(a, c) <= distance(a, b) + distance(b, c)


def test_element_recall_counts_each_element_once() -> None:
    truth = [("button", "red"), ("button", "red"), ("menu", "blue"), ("field", "grey")]
    assert element_recall([("menu", "blue"), ("button", "red"), ("slider", "red")], truth) == 0.5
    assert element_recall([("button", "red")] * 9, truth) == 0.5
    assert element_recall([], []) == 1.0


@quick
@given(predicted=st.lists(st.integers(0, 5)), more=st.integers(0, 5), truth=st.lists(st.integers(0, 5)))
def test_element_recall_never_falls_when_more_is_said(predicted: list[int], more: int, truth: list[int]) -> None:
    before = element_recall(predicted, truth)
    assert 0.0 <= before <= element_recall([*predicted, more], truth) <= 1.0
    assert element_recall(predicted[::-1], truth) == before
    assert element_recall([*predicted, *truth], truth) == 1.0


def test_matching_accuracy_wants_the_true_caption_strictly_first() -> None:
    loglik = [[-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-1.0, -1.0, -5.0], [-1.0, -math.inf, -2.0]]
    assert matching_accuracy(loglik).tolist() == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ConfigError, match=r"\[2, 1\]"):
        matching_accuracy([[-1.0], [-2.0]])
    with pytest.raises(ConfigError, match="1 NaN"):
        matching_accuracy([[math.nan, -2.0]])


def test_the_bootstrap_interval_of_a_mean_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = [
        not bootstrap_mean(rng.gamma(4.0, 0.25, size=80), seed=trial, n=400).excludes(1.0) for trial in range(1000)
    ]
    assert 0.93 <= float(np.mean(covered)) <= 0.97


def test_grouped_resampling_keeps_its_coverage_where_samples_share_a_cause() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 10)
    covered = np.zeros(2)
    for trial in range(300):
        values = rng.normal(size=40)[groups] + 0.3 * rng.normal(size=400)
        covered[0] += not bootstrap_mean(values, seed=trial, n=300, groups=groups).excludes(0.0)
        covered[1] += not bootstrap_mean(values, seed=trial, n=300).excludes(0.0)
    assert 0.90 <= covered[0] / 300 <= 0.98
    assert covered[1] / 300 < 0.6


def test_the_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scikit-learn brings scipy")
    rng = np.random.default_rng(2)
    b = rng.gamma(2.0, size=200)
    a = 0.5 * b + 0.1 * rng.gamma(2.0, size=200)
    cases: list[tuple[Interval, tuple[FloatArray, ...], Callable[..., float]]] = [
        (bootstrap_mean(a, seed=0, n=20_000, level=0.9), (a,), lambda x: x.mean()),
        (bootstrap_diff(a, b, seed=0, n=20_000, level=0.9), (a, b), lambda x, y: (x - y).mean()),
        (bootstrap_ratio(a, b, seed=0, n=20_000, level=0.9), (a, b), lambda x, y: x.mean() / y.mean()),
    ]
    for ours, samples, statistic in cases:
        other = stats.bootstrap(
            samples, statistic, paired=True, vectorized=False, n_resamples=4_000, confidence_level=0.9,
            method="percentile", rng=np.random.default_rng(3),
        ).confidence_interval  # fmt: skip
        assert ours.mean == pytest.approx(statistic(*samples))
        width = ours.high - ours.low
        assert (ours.low, ours.high) == pytest.approx((other.low, other.high), abs=0.06 * width)


@pytest.mark.parametrize("groups", [None, [f"scene {i // 3}" for i in range(90)]])
def test_the_general_bootstrap_agrees_with_the_fast_one(groups: list[str] | None) -> None:
    values = np.random.default_rng(4).normal(size=90)
    fast = bootstrap_mean(values, seed=5, n=4000, groups=groups)
    general = bootstrap(lambda chosen: values[chosen].mean(), 90, seed=6, n=4000, groups=groups)
    assert general.mean == pytest.approx(fast.mean)
    assert (general.low, general.high) == pytest.approx((fast.low, fast.high), abs=0.1 * (fast.high - fast.low))


def test_bootstrap_is_reproducible_and_handles_constants_and_pairs() -> None:
    values = np.random.default_rng(7).normal(size=50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    assert bootstrap_mean([0.25] * 8, seed=0) == Interval(0.25, 0.25, 0.25)
    # Pairing removes the spread that both sides share.
    assert bootstrap_diff(values + 0.125, values, seed=0).low == pytest.approx(0.125)
    shrunk = bootstrap_ratio(0.5 * (values + 5), values + 5, seed=0)
    assert (shrunk.low, shrunk.high) == pytest.approx((0.5, 0.5))


def test_corpus_statistics_get_an_interval_from_resampled_indices() -> None:
    pytest.importorskip("sacrebleu", reason="part of the [train] extra")
    statistics = bleu_statistics(*random_captions(seed=2, samples=60))
    interval = bootstrap(lambda chosen: bleu4(statistics[chosen]), 60, seed=0, n=300)
    assert interval.mean == bleu4(statistics)
    assert 0 < interval.low < interval.mean < interval.high < 100


def test_bootstrap_refuses_bad_input_naming_it() -> None:
    with pytest.raises(ConfigError, match="at least one sample; got 0"):
        bootstrap_mean([], seed=0)
    with pytest.raises(ConfigError, match="finite"):
        bootstrap_mean([1.0, math.nan], seed=0)
    with pytest.raises(ConfigError, match="got 2 and 3"):
        bootstrap_diff([1, 2], [1, 2, 3], seed=0)
    with pytest.raises(ConfigError, match="level=95"):
        bootstrap_mean([1, 2], seed=0, level=95)
    with pytest.raises(ConfigError, match="each of 3 samples"):
        bootstrap_mean([1, 2, 3], seed=0, groups=["a", "b"])
    with pytest.raises(ConfigError, match="mean of b is 0"):
        bootstrap_ratio([1, 2], [0, 0], seed=0)
    with pytest.raises(ConfigError, match="not finite"):
        bootstrap(lambda chosen: math.nan, 3, seed=0)


def test_what_is_won_back_is_a_share_of_a_sure_loss() -> None:
    rng = np.random.default_rng(0)
    full = rng.uniform(0.7, 1, 60)
    reduced = full - rng.uniform(0.1, 0.5, 60)
    third = won_back(full, reduced, reduced + (full - reduced) / 3, seed=1, n=200)
    assert third is not None and (third.low, third.mean, third.high) == pytest.approx((1 / 3,) * 3)
    some = won_back(full, reduced, reduced + 0.1, seed=1, n=200)
    asked = bootstrap_ratio(np.full(60, 0.1), full - reduced, seed=1, n=200)
    assert some is not None and (some.low, some.mean, some.high) == pytest.approx((asked.low, asked.mean, asked.high))
    for unsure in (full, full + rng.normal(0, 0.1, 60)):
        assert won_back(full, unsure, full, seed=1, n=200) is None


@given(st.integers(1, 300), st.floats(0.5, 0.99))
def test_where_nothing_was_lost_the_bound_is_that_of_a_rare_event(n: int, level: float) -> None:
    assert most_mean(np.zeros(n), level=level) == pytest.approx(1 - (1 - level) ** (1 / n), rel=1e-6)
    assert most_mean(np.ones(n), level=level) == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "true"), [(25, 0.05), (100, 0.02), (40, 0.5)])
def test_the_bound_on_a_mean_holds_as_often_as_it_says(n: int, true: float) -> None:
    draws = np.random.default_rng(0).random((400, n)) < true
    bounds = [most_mean(row.astype(float), level=0.9) for row in draws]
    assert np.mean(np.array(bounds) >= true) >= 0.9
    assert np.mean(bounds) < true + 3 / np.sqrt(n)


def test_a_bound_on_a_mean_is_for_shares() -> None:
    with pytest.raises(ConfigError, match="values reach from 0 to 2; expected 0 to 1"):
        most_mean([0.0, 2.0])
