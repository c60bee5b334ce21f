"""The schema of the decision log: which fields a record has, of which type, and in which events.

Writers make their records with `new_record`, and readers and compaction take their columns from `FIELDS`, so that no
field is written that is not read. Knows names and types. Must not know files, databases or what the values mean.
"""

from typing import Any, Literal, NamedTuple

from adaptive_fusion.errors import ConfigError

SCHEMA = 1
"""Version, in every record."""

Kind = Literal["text", "number", "integer", "boolean", "json"]
"""Type of a field; ``json`` is an object or a list."""
Event = Literal["decision", "feedback", "label", "shadow"]
"""What a record is about; one without ``event`` is a decision."""


class Field(NamedTuple):
    """One field of the log, and the events whose records may have it."""

    name: str
    kind: Kind
    events: tuple[Event, ...]


_DECISION: tuple[Event, ...] = ("decision",)
_FEEDBACK: tuple[Event, ...] = ("feedback",)
_LABEL: tuple[Event, ...] = ("label",)
_SUBJECT: tuple[Event, ...] = ("decision", "label")
_JOINED: tuple[Event, ...] = ("decision", "feedback", "shadow")
_MEASURED: tuple[Event, ...] = ("label", "shadow")
_SAID: tuple[Event, ...] = ("feedback", "label", "shadow")
_ANY: tuple[Event, ...] = ("decision", "feedback", "label", "shadow")

FIELDS = (
    Field("schema", "integer", _ANY),
    Field("event", "text", _ANY),
    Field("time_s", "number", _ANY),
    Field("request_id", "text", _JOINED),
    Field("content_hash", "text", _SUBJECT),
    Field("prompt_hash", "text", _SUBJECT),
    Field("kind", "text", _SUBJECT),
    Field("complexity", "number", _DECISION),
    Field("features", "json", _SUBJECT),
    Field("features_version", "text", _SUBJECT),
    Field("detail_version", "text", _SUBJECT),
    Field("prompt_features", "json", _SUBJECT),
    Field("prompt_version", "text", _SUBJECT),
    Field("p_complex", "number", _DECISION),
    Field("lane", "text", _DECISION),
    Field("point", "json", _DECISION),
    Field("rung", "text", _DECISION),
    Field("needs", "json", _DECISION),
    Field("propensity", "number", _DECISION),
    Field("explored", "boolean", _DECISION),
    Field("policy", "text", _DECISION),
    Field("budget", "json", _DECISION),
    Field("feasible", "boolean", _DECISION),
    Field("predicted", "json", _DECISION),
    Field("p_late", "number", _DECISION),
    Field("reason", "text", _DECISION),
    Field("batch", "integer", _DECISION),
    Field("escalated", "boolean", _DECISION),
    Field("escalation", "json", _DECISION),
    Field("encoder_cache", "text", _DECISION),
    Field("conversation", "json", _DECISION),
    Field("measurement", "json", _SUBJECT),
    Field("finish_reason", "text", _DECISION),
    Field("audit", "json", _DECISION),
    Field("error", "text", _DECISION),
    Field("source", "text", _LABEL),
    Field("source_id", "text", _SAID),
    Field("quality", "json", _MEASURED),
    Field("reference_quality", "number", _MEASURED),
    Field("cost", "json", _MEASURED),
    Field("entropies", "json", _LABEL),
    Field("prompt_kind", "text", _LABEL),
    Field("target", "number", _LABEL),
    Field("rating", "number", _FEEDBACK),
    Field("comment", "text", _FEEDBACK),
    Field("weight", "number", _LABEL),
    Field("model", "json", _LABEL),
    Field("votes", "json", _LABEL),
    Field("slices", "json", _LABEL),
)
"""Every field; what each means is in training/README.md."""


def fields_of(event: Event) -> frozenset[str]:
    """Names of the fields that records of an event may have."""
    return frozenset(field.name for field in FIELDS if event in field.events)


def new_record(event: Event, /, **values: Any) -> dict[str, Any]:
    """A record of an event: its version, its event and `values`, in that order.

    Raises:
        ConfigError: For a field that the schema does not have for that event.
    """
    unknown = sorted(set(values) - (_ALLOWED[event] - {"schema", "event"}))
    if unknown:
        raise ConfigError(
            f"a {event} record has the fields {unknown}; expected some of {', '.join(sorted(_ALLOWED[event]))}"
        )
    head = {"schema": SCHEMA} if event == "decision" else {"schema": SCHEMA, "event": event}
    return {**head, **values}


_ALLOWED: dict[Event, frozenset[str]] = {event: fields_of(event) for event in _ANY}
