"""Spans of requests for OpenTelemetry, with the attributes of its conventions for generative models.

Where no SDK is set up a span costs nothing and goes nowhere. Only the attributes named here can be set: there is none
for prompts, answers, media or where they came from. Knows names and numbers. Must not know of HTTP or models.

Source of the names: OpenTelemetry semantic conventions, generative AI, client spans.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.reply import Reply

PROVIDER = "adaptive_fusion"
REQUEST = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "stream": "gen_ai.request.stream",
}
"""Options of a request that spans carry, by their names in OpenAI's API."""
ATTRIBUTES = frozenset(
    {
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.output.type",
        "gen_ai.request.model",
        *REQUEST.values(),
        "gen_ai.response.id",
        "gen_ai.response.model",
        "gen_ai.response.finish_reasons",
        "gen_ai.response.time_to_first_chunk",
        "gen_ai.usage.input_tokens",
        "gen_ai.usage.output_tokens",
        "error.type",
        "http.route",
        "http.response.status_code",
        "adaptive_fusion.lane",
        "adaptive_fusion.plan",
        "adaptive_fusion.policy",
        "adaptive_fusion.feasible",
        "adaptive_fusion.met",
        "adaptive_fusion.escalated",
        "adaptive_fusion.batch",
        "adaptive_fusion.predicted_ms",
        "adaptive_fusion.latency_ms",
        "adaptive_fusion.queue_ms",
        "adaptive_fusion.media",
        "adaptive_fusion.visual_tokens",
        "adaptive_fusion.visual_tokens_native",
    }
)
"""All that a span may say."""
_LONGEST = 200


@contextmanager
def span(
    name: str,
    attributes: Mapping[str, Any] | None = None,
    *,
    context: Context | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
) -> Iterator[Span]:
    """A span around what is done in it. An error that leaves it is told by its type alone, for texts may hold content.

    Args:
        name: Such as ``chat <model>``.
        attributes: Of `ATTRIBUTES`; a value of None is left out.
        context: Of the caller's trace, see `caller_context`; None is what runs already.
        kind: ``SERVER`` for the span of a whole request.

    Raises:
        ConfigError: For an attribute that no span has.
    """
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # no SDK is set up
        _known(attributes or {})
        yield trace.INVALID_SPAN
        return
    tracer = trace.get_tracer("adaptive_fusion")
    with tracer.start_as_current_span(
        name[:_LONGEST],
        context=context,
        kind=kind,
        attributes=_checked(attributes or {}),
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except BaseException as error:
            current.set_attribute("error.type", type(error).__name__)
            current.set_status(Status(StatusCode.ERROR))
            raise


def say(current: Span, attributes: Mapping[str, Any]) -> None:
    """Add attributes, of `ATTRIBUTES`, to a span."""
    if current.is_recording():
        current.set_attributes(_checked(attributes))
    else:
        _known(attributes)


def caller_context(headers: Mapping[str, str]) -> Context:
    """The trace that a request's ``traceparent`` belongs to."""
    return TraceContextTextMapPropagator().extract(dict(headers)) if "traceparent" in headers else Context()


def request_attributes(model: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Attributes of a chat request: the model and what of its options spans carry."""
    options = options or {}
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.output.type": "text",
        "gen_ai.request.model": model,
        **{name: options[option] for option, name in REQUEST.items() if options.get(option) is not None},
    }


def reply_attributes(reply: Reply) -> dict[str, Any]:
    """Attributes of an answer: its decision, its tokens and times, none of its text."""
    decision, took = reply.decision, reply.measurement
    return {
        "gen_ai.response.id": decision.request_id,
        "gen_ai.response.finish_reasons": [reply.finish_reason],
        "gen_ai.response.time_to_first_chunk": took.ttft_ms / 1e3,
        "gen_ai.usage.input_tokens": took.prompt_tokens,
        "gen_ai.usage.output_tokens": took.new_tokens,
        "adaptive_fusion.lane": decision.lane,
        "adaptive_fusion.plan": decision.rung or decision.point.name,
        "adaptive_fusion.policy": decision.policy,
        "adaptive_fusion.feasible": decision.feasible,
        "adaptive_fusion.met": reply.met,
        "adaptive_fusion.predicted_ms": decision.predicted.latency_ms if decision.predicted else None,
        "adaptive_fusion.latency_ms": took.latency_ms,
        "adaptive_fusion.visual_tokens": took.visual_tokens,
    }


def _known(attributes: Mapping[str, Any]) -> None:
    if unknown := sorted(attributes.keys() - ATTRIBUTES):
        raise ConfigError(f"span attributes {unknown} are not known; expected some of {', '.join(sorted(ATTRIBUTES))}")


def _checked(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Known attributes with plain values; texts are cut and what is not finite left out."""
    _known(attributes)
    plain: dict[str, Any] = {}
    for name, value in attributes.items():
        if isinstance(value, list | tuple):
            plain[name] = [str(entry)[:_LONGEST] for entry in value]
        elif isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            plain[name] = value
        elif isinstance(value, str):
            plain[name] = value[:_LONGEST]
    return plain
