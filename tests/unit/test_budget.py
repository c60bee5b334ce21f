import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.budget import Budget
from adaptive_fusion.errors import BudgetError, ConfigError

FIELDS = ("latency_ms", "ttft_ms", "vram_gb", "attainment", "on_infeasible", "on_deadline")


@pytest.mark.parametrize("name", ["latency_ms", "ttft_ms", "vram_gb", "attainment"])
@pytest.mark.parametrize(
    "value", [0, -1, math.nan, math.inf, -math.inf, 1e9, pytest.param(10**400, id="10^400"), True, "100", [1]]
)
def test_absurd_numbers_are_refused_by_name_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget(**{name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value) and "above 0" in str(caught.value)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [("on_infeasible", "stop", "cheapest, refuse"), ("on_deadline", True, "finish, stop")],
)
def test_choices_are_named_in_the_error(name: str, value: Any, valid: str) -> None:
    with pytest.raises(BudgetError, match=valid):
        Budget(**{name: value})


def test_defaults_are_read_but_not_set() -> None:
    budget = Budget(latency_ms=100)
    assert (budget.attainment, budget.on_infeasible, budget.on_deadline) == (0.95, "cheapest", "finish")
    assert budget.to_dict() == {"latency_ms": 100.0} and budget.ttft_ms is None
    assert Budget(attainment=1.0 - 1e-9).attainment < 1.0
    with pytest.raises(BudgetError):
        Budget(attainment=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.latency_ms = 1.0  # type: ignore[misc]


def test_environment() -> None:
    environ = {
        "ADAPTIVE_FUSION_LATENCY_MS": " 250 ",
        "ADAPTIVE_FUSION_ON_DEADLINE": "stop",
        "ADAPTIVE_FUSION_VRAM_GB": "",
        "LATENCY_MS": "1",
    }
    assert Budget.from_env(environ).to_dict() == {"latency_ms": 250.0, "on_deadline": "stop"}
    assert Budget.from_env({}) == Budget()
    for text in ("fast", "nan", "-1", "1e400"):
        with pytest.raises(BudgetError, match="ADAPTIVE_FUSION_"):
            Budget.from_env({"ADAPTIVE_FUSION_TTFT_MS": text})


def test_from_dict_refuses_unknown_names() -> None:
    assert Budget.from_dict({"latency_ms": 5, "ttft_ms": None}).to_dict() == {"latency_ms": 5.0}
    with pytest.raises(BudgetError, match=r"latency_s.*expected latency_ms, ttft_ms"):
        Budget.from_dict({"latency_s": 1})
    for wrong in (None, 5, [1]):
        with pytest.raises(BudgetError, match=r"budget is .*expected a table of latency_ms"):
            Budget.from_dict(wrong)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"budget is \{'latency_ms': 5\}; expected a Budget or None"):
        Budget().merge({"latency_ms": 5})  # type: ignore[arg-type]


budgets = st.builds(
    Budget,
    latency_ms=st.none() | st.floats(1, 1e6),
    ttft_ms=st.none() | st.floats(1, 1e6),
    vram_gb=st.none() | st.floats(0.1, 100),
    attainment=st.none() | st.sampled_from([0.9, 0.95, 0.99]),
    on_infeasible=st.none() | st.sampled_from(["cheapest", "refuse"]),
    on_deadline=st.none() | st.sampled_from(["finish", "stop"]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | budgets, min_size=5, max_size=5))
def test_the_last_source_that_set_a_field_wins(sources: list[Budget | None]) -> None:
    merged = Budget().merge(*sources)
    for name in FIELDS:
        setters = [b for b in sources if b is not None and name in b.to_dict()]
        assert getattr(merged, name) == getattr(
            setters[-1] if setters else Budget(on_deadline=merged.on_deadline), name
        )
        assert (name in merged.given) == bool(setters)
    assert Budget.from_dict(merged.to_dict()) == merged


def test_an_explicit_default_overrides_a_weaker_source() -> None:
    strict = Budget(attainment=0.99, on_infeasible="refuse")
    assert strict.merge(Budget()).attainment == 0.99
    assert strict.merge(Budget(attainment=0.95, on_infeasible="cheapest")).to_dict() == {
        "attainment": 0.95,
        "on_infeasible": "cheapest",
    }


def test_a_hard_deadline_refuses_unless_told_otherwise() -> None:
    assert (
        Budget(on_deadline="stop").on_infeasible == "refuse"
        and Budget(on_deadline="finish").on_infeasible == "cheapest"
    )
    assert Budget(on_deadline="stop", on_infeasible="cheapest").on_infeasible == "cheapest"
    assert Budget(latency_ms=5).merge(Budget(on_deadline="stop")).on_infeasible == "refuse"
