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
from adaptive_fusion.learning.distil import Settings, divergence, frozen, split
from adaptive_fusion.learning.teacher import Question, Told, collate

VOCABULARY = 12


def told_of(logits: Tensor, kept: int) -> Told:
    best = torch.log_softmax(logits, -1).topk(kept, sorted=False)
    return Told(logits.argmax(-1), best.indices.int(), best.values, torch.tensor(4))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, VOCABULARY), st.floats(0.1, 8))
def test_divergence_is_that_of_the_outcomes_kept(seed: int, kept: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(5, VOCABULARY, generator=generator) * scale for _ in range(2))
    found = divergence(told_of(teacher, kept), student)
    full = nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    if kept == VOCABULARY:
        torch.testing.assert_close(found, full.sum(1), rtol=1e-3, atol=1e-4)
    # Merging outcomes never makes two distributions easier to tell apart.
    assert bool((found >= -1e-4).all()) and bool((found <= full.sum(1) + 1e-3).all())
    torch.testing.assert_close(divergence(told_of(teacher, kept), teacher), torch.zeros(5), rtol=0, atol=1e-4)


def test_divergence_stays_finite_and_has_gradient_where_the_student_is_sure_of_something_else() -> None:
    teacher, student = torch.full((1, VOCABULARY), -60.0), torch.full((1, VOCABULARY), -60.0)
    teacher[0, 0], student[0, 1] = 60.0, 60.0
    student.requires_grad_()
    found = divergence(told_of(teacher, 2), student)
    torch.autograd.backward(found.sum())
    assert math.isfinite(found.item()) and found.item() > 10
    assert student.grad is not None and bool(student.grad.isfinite().all()) and float(student.grad.abs().max()) > 0.5


def question(index: int, prompt: str = "?") -> Question:
    return Question(np.full((8, 8, 3), index, np.uint8), prompt)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.05, 0.6), st.integers(0, 9))
def test_the_split_is_by_image_whatever_the_order(count: int, holdout: float, seed: int) -> None:
    asked = [question(i, prompt) for i in range(count) for prompt in ("What?", "Where?")]
    chosen = Settings(holdout=holdout, seed=seed, judged=1000)
    train, held = split(asked, chosen)
    again, held_again = split(asked[::-1], chosen)
    assert {q.key for q in train} == {q.key for q in again} and {q.key for q in held} == {q.key for q in held_again}
    assert train and held and len(train) + len(held) == len(asked)
    assert not {q.content for q in train} & {q.content for q in held}
    assert len(split(asked, Settings(holdout=holdout, seed=seed, judged=1))[1]) == 1


def test_one_image_is_too_few_however_often_it_is_asked_about() -> None:
    with pytest.raises(ConfigError, match="got 1 different images; expected at least 2"):
        split([question(1, "a"), question(1, "b")], Settings())


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


def test_rows_are_padded_on_the_left_and_followed_by_their_answers() -> None:
    rows = [
        {
            "input_ids": torch.tensor([[5, 6, 7]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.long),
            "mm_token_type_ids": torch.tensor([[0, 1, 0]]),
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
        },
        {
            "input_ids": torch.tensor([[8]]),
            "attention_mask": torch.ones(1, 1, dtype=torch.long),
            "mm_token_type_ids": torch.tensor([[0]]),
        },
    ]
    batch = collate(rows, [torch.tensor([1]), torch.tensor([2, 3])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [0, 8, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert collate(rows[:1])["input_ids"].tolist() == [[5, 6, 7]]
