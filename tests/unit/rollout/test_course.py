"""The course of an experiment: steps up on evidence, taken back on evidence, and the same for the same events."""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.assignment import CANARY, CONTROL
from adaptive_fusion.rollout.course import Course
from adaptive_fusion.rollout.events import Command, Late, Missing, Outcome, Pair, Transition, from_event, to_event
from adaptive_fusion.rollout.experiment import ABORTED, PROMOTED, ROLLED_BACK, RUNNING, Experiment
from adaptive_fusion.rollout.guardrails import DEFAULT, guardrails_from

GOOD = {"errors": 0.0, "dead": 0.0, "out_of_memory": 0.0, "escalations": 0.0, "deadline_misses": 0.0}
BAD = {**GOOD, "errors": 1.0, "dead": 1.0}


def course(kind: str = "canary", **options: Any) -> Course:
    if kind == "canary":
        options = {"steps": (0.25, 0.5, 1.0), "least": (10, 20), **options}
    else:
        options = {"steps": (0.5,), "least": (), **options}
    return Course(Experiment("try", kind, "new", **options))


def fed(found: Course, count: int, canary: dict[str, float], control: dict[str, float] = GOOD) -> list[Transition]:
    """What `count` requests of the canary bring about, three of the control to each."""
    changes = []
    for _ in range(count):
        for event in (*[Outcome(CONTROL, control)] * 3, Outcome(CANARY, canary)):
            if (change := found.on(event)) is not None:
                changes.append(change)
    return changes


def test_a_good_canary_rises_step_by_step_once_it_has_been_shown_not_to_be_worse() -> None:
    found = course()
    assert found.share == 0.25
    (first,) = fed(found, 30, GOOD)
    assert (first.status, first.step, first.share) == (RUNNING, 1, 0.5) and "10 requests" in first.why
    # 20 at the second step are there, but not yet the evidence that no more than 5 in 100 are lost.
    assert found.status == RUNNING
    (last,) = fed(found, 200, GOOD)
    assert (last.status, last.share) == (PROMOTED, 1.0) and last.who == "adaptive-fusion"


def test_a_dead_canary_is_taken_back_within_ten_and_stays_so() -> None:
    found = course()
    (back,) = fed(found, 10, BAD)
    assert (back.status, back.share) == (ROLLED_BACK, 0.0) and "errors is worse" in back.why
    assert not fed(found, 10, GOOD) and found.share == 0.0
    assert found.on(Command("promote", "me", "")) is None and found.on(Command("abort", "me", "")) is None


def test_where_everything_fails_the_canary_is_taken_back_too() -> None:
    found = course("ab")
    (back,) = fed(found, 10, BAD, BAD)
    assert back.status == ROLLED_BACK and back.why.startswith("dead is worse") and "limit 0.5" in back.why


def test_requests_without_a_metric_that_the_controls_have_take_it_back() -> None:
    without = {name: value for name, value in GOOD.items() if name != "deadline_misses"}
    found = course("ab")
    (back,) = fed(found, 30, without)
    assert "deadline_misses is missing: the canary's last 20" in back.why
    assert not fed(course("ab"), 30, without, without)  # nobody has a deadline
    assert fed(course("ab"), 1, {**GOOD, "errors": 7.0})[0].why.startswith("errors is missing")
    assert course("ab").on(Missing("they never came back")) == Transition(
        ROLLED_BACK, 0, 0.0, "adaptive-fusion", "they never came back"
    )


def test_ratings_and_labels_that_come_late_count() -> None:
    found, changes = course("ab"), []
    for _ in range(60):
        changes += [found.on(Late(CONTROL, {"ratings": 1.0})), found.on(Late(CANARY, {"ratings": 0.0}))]
    (back,) = [change for change in changes if change]
    assert "ratings is worse (control 1, canary 0, margin 0.02)" in back.why


def test_a_shadow_goes_by_pairs_and_serves_nobody() -> None:
    found, changes = course("shadow"), []
    assert (found.share, found.sampled) == (0.0, 0.5)
    for _ in range(200):
        changes.append(found.on(Pair({"quality": 0.9}, {"quality": 0.7})))
    (back,) = [change for change in changes if change]
    assert back.status == ROLLED_BACK and back.why.startswith("quality is worse")
    row = next(row for row in found.rows() if row["name"] == "quality")
    assert row["difference"]["low"] < 0.2 < row["difference"]["high"]  # the loss, which is badness
    assert course("audit").on(Outcome(CANARY, BAD)) is None


def test_people_end_it_and_take_back_what_was_promoted() -> None:
    found = course()
    told = found.on(Command("promote", "ann", "seen enough"))
    assert told is not None and (told.status, told.share, told.who, told.why) == (PROMOTED, 1.0, "ann", "seen enough")
    told = found.on(Command("abort", "bob", "oh no"))
    assert told is not None and (told.status, told.share) == (ABORTED, 0.0)
    with pytest.raises(ConfigError, match="expected promote or abort"):
        found.on(Command("stop", "", ""))
    with pytest.raises(ConfigError, match="arm is 'third'"):
        found.on(Outcome("third", GOOD))


EVENTS = st.one_of(
    st.builds(Outcome, st.sampled_from((CONTROL, CANARY)), st.sampled_from((GOOD, GOOD, GOOD, BAD, {}))),
    st.builds(Late, st.sampled_from((CONTROL, CANARY)), st.fixed_dictionaries({"ratings": st.floats(0, 1)})),
    st.builds(Pair, st.just({"quality": 0.5}), st.fixed_dictionaries({"quality": st.floats(0, 1)})),
)


@given(st.lists(EVENTS, max_size=80), st.integers(0, 79), st.sampled_from(("ab", "canary", "shadow")))
def test_the_same_events_make_the_same_course_also_from_what_was_kept(events: list[Any], cut: int, kind: str) -> None:
    whole, kept = course(kind), course(kind)
    for index, event in enumerate(events):
        assert to_event(*from_event(event)) == event
        if index == cut:
            kept = Course.from_state(kept.experiment, json.loads(json.dumps(kept.state())))
        assert kept.on(event) == whole.on(event)
    assert kept.state() == whole.state()
    json.dumps(whole.rows(), allow_nan=False)


def test_an_experiment_survives_json_and_refuses_what_makes_no_sense() -> None:
    found = Experiment("try", "canary", "new")
    assert Experiment.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert sum(rail.alpha for rail in DEFAULT) <= 0.05 + 1e-12
    bad: tuple[tuple[dict[str, Any], str], ...] = (
        ({"name": "a b"}, "name is 'a b'"),
        ({"kind": "trial"}, "kind is 'trial'; expected one of audit, shadow, ab, canary"),
        ({"unit": "cookie"}, "unit is 'cookie'"),
        ({"steps": [0.5, 0.25, 1.0]}, "expected at least two rising shares that end with 1"),
        ({"steps": [0.5, 1.0]}, "least has 4 numbers; expected 1"),
        ({"kind": "ab", "steps": [1.0]}, "of an ab below 1"),
        ({"steps": 1}, "steps is 1; expected a list"),
        ({"shares": 1}, "has the keys"),
        ({"guardrails": [{"name": "errors", "alpha": 0.0}]}, "alpha of errors is 0.0"),
        ({"guardrails": [{"name": "errors"}, {"name": "errors"}]}, "expected each name once"),
        ({"guardrails": [{"name": "errors", "colour": 1}]}, "unknown"),
        ({"guardrails": [{"name": "errors", "alpha": 0.6}]}, "expected less than 0.5"),
        ({"guardrails": [{"name": "quality"}]}, "guardrails of the canary are quality, of which only a shadow has"),
        (
            {"kind": "shadow", "steps": [0.1], "guardrails": [{"name": "ratings"}, {"name": "deadline_misses"}]},
            "guardrails of the shadow are deadline_misses, ratings, of which only live requests have values",
        ),
    )
    for change, said in bad:
        with pytest.raises(ConfigError, match=said):
            Experiment.from_dict({**found.to_dict(), **change})
    assert guardrails_from([{"name": "errors", "margin": 0.01}])[0].eager  # the rest is the default's
    for kind, steps, names in (
        ("ab", [0.5], ["quality", "errors"]),
        ("ab", [0.5], ["own"]),  # whoever calls the hook may tell whatever it knows
        ("shadow", [0.1], ["quality", "deadline_misses"]),
        ("shadow", [0.1], ["own"]),
        ("audit", [0.1], ["quality"]),
    ):
        rails = [{"name": name, "meaning": ""} for name in names]
        Experiment.from_dict({"name": "t", "kind": kind, "canary": "n", "steps": steps, "guardrails": rails})


@given(st.integers(0, 10**6), st.floats(0.0, 0.2))
@settings(max_examples=20, deadline=None)
def test_who_looks_changes_no_bit(seed: int, bad: float) -> None:
    """Processes that start, stop and are looked at at different events come to the very same course."""
    draws, experiment = random.Random(seed), Experiment("try", "canary", "new", steps=(0.3, 0.6, 1.0), least=(20, 60))
    quiet, watched = Course(experiment), Course(experiment)
    for _ in range(300):
        arm = CANARY if draws.random() < 0.4 else CONTROL
        outcome = Outcome(arm, {name: float(draws.random() < bad) for name in ("errors", "dead", "deadline_misses")})
        quiet.on(outcome)
        watched.on(outcome)
        if draws.random() < 0.2:
            watched.rows()
            watched = Course.from_state(experiment, json.loads(json.dumps(watched.state())))
    assert watched.state() == quiet.state()
