"""What the server says of requests, in spans and in its log: names and numbers, never what was asked or answered."""

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode
from records import SECRET, reply

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.serving.access_log import FIELDS, AccessLog
from adaptive_fusion.serving.tracing import (
    ATTRIBUTES,
    caller_context,
    reply_attributes,
    request_attributes,
    say,
    span,
)


@pytest.fixture(scope="module")
def exported() -> InMemorySpanExporter:
    """Where spans go in this process; it is set once, as by an operator."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


def test_a_span_has_the_attributes_of_the_conventions(exported: InMemorySpanExporter) -> None:
    exported.clear()
    asked = {"max_tokens": 64, "temperature": 0.5, "stream": True, "messages": [SECRET], "seed": None, "stop": SECRET}
    caller = caller_context({"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
    with span("chat m", request_attributes("m", asked), context=caller, kind=SpanKind.SERVER) as current:
        with span("decide"):
            pass
        say(current, {**reply_attributes(reply()), "adaptive_fusion.escalated": False, "gen_ai.response.id": "x" * 999})
    inner, outer = exported.get_finished_spans()
    assert inner.parent.span_id == outer.context.span_id and outer.kind is SpanKind.SERVER
    assert outer.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    found = dict(outer.attributes)
    assert found["gen_ai.operation.name"] == "chat" and found["gen_ai.request.model"] == "m"
    assert found["gen_ai.request.max_tokens"] == 64 and found["gen_ai.request.stream"] is True
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (130, 13)
    assert found["gen_ai.response.finish_reasons"] == ("stop",) and found["adaptive_fusion.plan"] == "half"
    assert found["adaptive_fusion.met"] is True and len(found["gen_ai.response.id"]) == 200
    assert SECRET not in outer.to_json() and "gen_ai.request.seed" not in found


def test_names_of_attributes_are_those_of_the_conventions() -> None:
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    assert {name for name in ATTRIBUTES if name.startswith("gen_ai.")} <= known


def test_an_error_is_told_by_its_type_alone(exported: InMemorySpanExporter) -> None:
    exported.clear()
    with pytest.raises(ConfigError), span("chat m"):
        raise ConfigError(SECRET)
    (found,) = exported.get_finished_spans()
    assert found.attributes["error.type"] == "ConfigError" and found.status.status_code is StatusCode.ERROR
    assert not found.events and SECRET not in found.to_json()


@pytest.mark.parametrize("name", ["gen_ai.prompt", "gen_ai.input.messages", "url.full", "prompt", ""])
def test_an_attribute_that_could_hold_content_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"span attributes \[.*\] are not known"), span("chat m", {name: "x"}):
        pass


def logged(*events: dict[str, Any]) -> list[Any]:
    stream = io.StringIO()
    log = AccessLog(stream, clock=lambda: 12.3456)
    for fields in events:
        log.write("request", **fields)
    text = stream.getvalue()
    assert text.isascii() and text.count("\n") == len(events) and "\r" not in text
    return [json.loads(line) for line in text.splitlines()]


def test_a_request_is_one_line_of_json() -> None:
    fields = {"request_id": "r1", "route": "/v1/chat/completions", "status": 200, "ms": 12.34567, "plan": "half",
              "prompt_tokens": 9, "met": True, "queue_ms": None}  # fmt: skip
    (found,) = logged(fields)
    assert found == {"time_s": 12.346, "event": "request", **{k: v for k, v in fields.items() if v is not None},
                     "ms": 12.346}  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(FIELDS), st.text() | st.floats() | st.integers() | st.booleans() | st.none() | st.binary()
    )
)
def test_no_value_makes_another_line_or_no_json(fields: dict[str, Any]) -> None:
    for hostile in (fields, {**fields, "route": '/\r\n{"event": "forged"}\u2028\x1b[31m\x00\ud800' * 99}):
        (found,) = logged(hostile)
        assert found["event"] == "request"
        assert all(len(entry) <= 200 for entry in found.values() if isinstance(entry, str))
        assert all(math.isfinite(entry) for entry in found.values() if isinstance(entry, float))


@pytest.mark.parametrize("name", ["prompt", "messages", "url", "api_key", "headers", "content"])
def test_a_field_that_could_hold_content_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.* are not known"):
        AccessLog(io.StringIO()).write("request", **{name: "x"})


def test_a_full_disk_and_a_closed_stream_fail_no_request() -> None:
    log = AccessLog(io.TextIOWrapper(io.FileIO("/dev/full", "w")))
    log.write("request", status=200)
    closed = io.StringIO()
    closed.close()
    shut = AccessLog(closed)
    shut.write("request", status=200)
    assert log.lost == shut.lost == 1
