"""One schema of the log: its writers make no field that readers and compaction do not know."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from learning_data import subject

from adaptive_fusion import decisions
from adaptive_fusion.decision_log import DecisionLog, feedback_record
from adaptive_fusion.decisions import Decision, Measurement, Prediction, decision_record
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import VERSION, Complexity
from adaptive_fusion.learning.data.labels import label_record, shadow_record
from adaptive_fusion.learning.data.logs import COLUMNS
from adaptive_fusion.log_schema import FIELDS, fields_of, new_record
from adaptive_fusion.point import OperatingPoint


def a_decision() -> dict[str, Any]:
    took = Measurement(**{field.name: 1 for field in fields(Measurement)})
    known = Complexity(0.25, {"edge_density": 0.125}, VERSION, "image")
    decision = Decision(
        request_id="r",
        kind="image",
        complexity=known,
        p_complex=0.5,
        lane="weighted",
        point=OperatingPoint("weighted"),
        predicted=Prediction(1, 2, 3, 0.5),
        reason="cheapest",
        policy="balanced",
        p_late=0.25,
    )
    return decision_record(decision, took, time_s=1.0)


MADE = {
    "decision": a_decision,
    "feedback": lambda: feedback_record("r", "up"),
    "label": lambda: label_record(subject(np.zeros(1), 0), "human", target=1.0),
    "shadow": lambda: shadow_record("r", {"native@1": 1.0}),
}


@pytest.mark.parametrize("event", MADE)
def test_writers_make_the_fields_of_the_schema_and_no_others(event: Any) -> None:
    made = MADE[event]()
    optional = {"shadow": {"source_id", "cost"}, "decision": {"event"}, "feedback": {"comment"}}.get(event, set())
    assert set(made) == fields_of(event) - optional
    assert made.get("event", "decision") == event and set(made) <= set(COLUMNS)


@pytest.mark.parametrize("event", MADE)
def test_a_field_that_the_schema_lacks_is_refused(event: Any) -> None:
    for field in FIELDS:
        if event not in field.events or field.name in ("schema", "event"):
            with pytest.raises(ConfigError, match=f"{event} record has the fields \\['{field.name}'\\]"):
                new_record(event, **{field.name: 1})
    with pytest.raises(ConfigError, match="'p_later'"):
        new_record(event, p_later=0.1)


def test_the_log_keeps_the_name_that_users_know() -> None:
    assert decisions.DecisionLog is DecisionLog
