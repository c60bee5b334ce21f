"""Progress is reported in one form by all library code, and drawn by commands alone."""

import io
from typing import Any

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.commands import output
from adaptive_fusion.progress import Steps


@given(st.integers(0, 5), st.lists(st.integers(1, 7), max_size=8))
def test_steps_are_told_from_where_they_begin_to_the_last(done: int, counts: list[int]) -> None:
    told: list[tuple[int, int, str]] = []
    total = done + sum(counts)
    steps = Steps(lambda *step: told.append(step), "work", total, done)
    for count in counts:
        steps.advance(count)
    assert told == [(done + sum(counts[:k]), total, "work") for k in range(len(counts) + 1)]


@pytest.mark.parametrize(
    ("terminal", "as_json", "drawn"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_bar_is_drawn_on_terminals_for_people_and_counts_each_stage(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, as_json: bool, drawn: bool
) -> None:
    written = io.StringIO()

    def console(**options: Any) -> rich.console.Console:
        assert options == {"stderr": True}
        return rich.console.Console(file=written, force_terminal=terminal, width=80, _environ={"TERM": "xterm"})

    monkeypatch.setattr(output, "Console", console)
    with output.progress(as_json) as report:
        for stage, total in (("ask", 3), ("alone", 1), ("distil", 5)):
            steps = Steps(report, stage, total)
            for _ in range(total):
                steps.advance()
        assert not written.getvalue() or drawn
    shown = written.getvalue()
    assert ("distil" in shown and "5/5" in shown) == drawn and bool(shown) == drawn
    assert "alone" not in shown
