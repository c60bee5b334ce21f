"""Distillation without a model: the divergence, the split, the frozen context, left-padded batches, settings."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive_fusion.errors import AdaptiveFusionError, ConfigError
from adaptive_fusion.evaluation.questions import Question
from adaptive_fusion.learning.distillation.divergence import divergence, judge
from adaptive_fusion.learning.distillation.draws import batch_at, draw, split
from adaptive_fusion.learning.distillation.frozen import frozen
from adaptive_fusion.learning.distillation.settings import Settings
from adaptive_fusion.learning.distillation.teacher import TeacherOutput

VOCABULARY = 12


def output_of(logits: Tensor, kept: int) -> TeacherOutput:
    best = torch.log_softmax(logits, -1).topk(kept, sorted=False)
    return TeacherOutput(logits.argmax(-1), best.indices.int(), best.values, torch.tensor(4))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, VOCABULARY), st.floats(0.1, 8))
def test_divergence_is_that_of_the_outcomes_kept(seed: int, kept: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(5, VOCABULARY, generator=generator) * scale for _ in range(2))
    found = divergence(output_of(teacher, kept), student)
    full = nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    if kept == VOCABULARY:
        torch.testing.assert_close(found, full.sum(1), rtol=1e-3, atol=1e-4)
    # Merging outcomes never makes two distributions easier to tell apart.
    assert bool((found >= -1e-4).all()) and bool((found <= full.sum(1) + 1e-3).all())
    torch.testing.assert_close(divergence(output_of(teacher, kept), teacher), torch.zeros(5), rtol=0, atol=1e-4)


def test_divergence_stays_finite_and_has_gradient_where_the_student_is_sure_of_something_else() -> None:
    teacher, student = torch.full((1, VOCABULARY), -60.0), torch.full((1, VOCABULARY), -60.0)
    teacher[0, 0], student[0, 1] = 60.0, 60.0
    student.requires_grad_()
    found = divergence(output_of(teacher, 2), student)
    torch.autograd.backward(found.sum())
    assert math.isfinite(found.item()) and found.item() > 10
    assert student.grad is not None and bool(student.grad.isfinite().all()) and float(student.grad.abs().max()) > 0.5


def test_every_token_of_all_answers_counts_as_much() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for length in (1, 4):
        teacher, student = (torch.randn(length, VOCABULARY, generator=generator) for _ in range(2))
        pairs.append((output_of(teacher, VOCABULARY), student))
    kl, agreement = judge(pairs)
    whole = torch.cat([divergence(*pair) for pair in pairs])
    assert kl == pytest.approx(float(whole.mean()))
    hits = [int((student.argmax(-1) == output.tokens).sum()) for output, student in pairs]
    assert agreement == pytest.approx(sum(hits) / 5)
    assert judge([(output_of(student, VOCABULARY), student) for _, student in pairs])[1] == 1


def question(index: int, prompt: str = "?") -> Question:
    return Question(np.full((8, 8, 3), index, np.uint8), prompt)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 0.6), st.integers(0, 9))
def test_the_split_is_by_image_whatever_the_order(count: int, holdout: float, seed: int) -> None:
    asked = [question(i, prompt) for i in range(count) for prompt in ("What?", "Where?")]
    train, held = split(asked, holdout=holdout, seed=seed, judged=1000)
    again, held_again = split(asked[::-1], holdout=holdout, seed=seed, judged=1000)
    assert {q.key for q in train} == {q.key for q in again} and {q.key for q in held} == {q.key for q in held_again}
    assert train and held and len(train) + len(held) == len(asked)
    assert not {q.content for q in train} & {q.content for q in held}
    assert len(split(asked, holdout=holdout, seed=seed, judged=1)[1]) == 1


def test_one_image_is_too_few_however_often_it_is_asked_about() -> None:
    with pytest.raises(ConfigError, match="got 1 different images; expected at least 2"):
        split([question(1, "a"), question(1, "b")], holdout=0.15, seed=0, judged=64)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 9))
def test_an_epoch_asks_no_question_twice_and_batches_are_of_like_lengths(count: int, size: int, seed: int) -> None:
    asked = [question(index) for index in range(count)]
    place = {one.key: index for index, one in enumerate(asked)}
    size_now = min(size, count)
    steps = count // size_now
    first, second = (
        [
            [place[one.key] for one in batch_at(step, asked, size, lambda one: place[one.key], seed)]
            for step in range(start, start + steps)
        ]
        for start in (0, steps)
    )
    for epoch in (first, second):
        assert len({index for batch in epoch for index in batch}) == steps * size_now
        assert all(len(batch) == size_now and batch == sorted(batch) for batch in epoch)
    assert steps <= 8 or first != second


@given(st.floats(0, 1, exclude_max=True))
def test_values_are_drawn_as_often_as_they_weigh(share: float) -> None:
    assert draw({1.0: 1, 0.5: 2, 0.25: 1}, share) == (1.0 if share < 0.25 else 0.5 if share < 0.75 else 0.25)


@pytest.mark.parametrize(
    ("given_settings", "said"),
    [
        ({"steps": 0}, "steps is 0; expected an integer of at least 1"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"lr": math.nan}, "lr is nan; expected a number above 0"),
        ({"holdout": 0.95}, "holdout is 0.95"),
        ({"cache_gb": 0}, "cache_gb is 0"),
        ({"ratios": {}}, "ratios is {}"),
        ({"ratios": {0.5: -1}}, "ratios is {0.5: -1}"),
        ({"pixel_shares": {2.0: 1}}, "pixel_shares is {2.0: 1}"),
    ],
)
def test_settings_out_of_range_are_refused(given_settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("{", r"\{").replace("}", r"\}")):
        Settings(**given_settings)


def test_a_frozen_model_gets_its_flags_back_and_writes_to_it_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with frozen(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        model(torch.ones(3, 2))
    assert model.training and {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(ZeroDivisionError), frozen(model):
        _ = 1 / 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(AdaptiveFusionError, match=r"\['0.bias'\] of the frozen model changed"), frozen(model):
        model[0].bias.mul_(2)
    model.train()
    with pytest.raises(AdaptiveFusionError, match="num_batches_tracked"), frozen(model):
        model.train()
        model(torch.ones(3, 2))
