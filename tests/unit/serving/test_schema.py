"""What a request may say: every field has its use, and what is not supported is refused by its name."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

from adaptive_fusion.budget import Budget
from adaptive_fusion.point import NATIVE, OperatingPoint
from adaptive_fusion.serving.document import HONOURED, descriptions
from adaptive_fusion.serving.fields import FIELDS, Use
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.schema import ChatCall, read_chat, read_json

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}}


def read(**fields: Any) -> ChatCall:
    return read_chat({**BASE, **fields})


def test_every_field_of_the_api_is_in_the_table_and_every_honoured_one_in_the_document() -> None:
    assert set(CompletionCreateParamsStreaming.__annotations__) <= set(FIELDS)
    assert {name for name, field in FIELDS.items() if field.use is Use.HONOURED} == set(HONOURED)
    document = descriptions("m")["/v1/chat/completions"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(document["properties"]) == set(FIELDS)


def test_fields_without_meaning_are_listed() -> None:
    call = read(user="me", metadata={"a": "b"}, nonsense=1, temperature=None, another=None)
    assert call.ignored == ("metadata", "nonsense", "user")


def test_options_of_streams_without_meaning_are_listed() -> None:
    call = read(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert call.include_usage and call.ignored == ("stream_options.continuous_usage_stats",)


DEFAULTS: dict[str, list[Any]] = {
    "n": [1],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"]],
    "store": [False],
    "best_of": [1],
    "skip_special_tokens": [True],
    "chat_template_kwargs": [{}],
}
OTHERS: dict[str, list[Any]] = {
    "n": [2, 0, True, "1"],
    "presence_penalty": [0.5, False],
    "frequency_penalty": [-1],
    "logit_bias": [{"5": 1}],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "functions": [[{"name": "f"}]],
    "modalities": [["text", "audio"]],
    "audio": [{}],
    "store": [True],
    "reasoning_effort": ["high"],
    "guided_json": [{}],
    "stop_token_ids": [[1]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in DEFAULTS.items() for v in values])
def test_an_unsupported_field_at_its_default_asks_for_nothing(name: str, value: Any) -> None:
    assert read(**{name: value}) == read()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in OTHERS.items() for v in values])
def test_an_unsupported_field_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(Refusal) as raised:
        read(**{name: value})
    assert raised.value.status == 400 and raised.value.param == name and name in str(raised.value)


WRONG: list[tuple[str, Any, str]] = [
    ("model", None, "model"),
    ("model", 3, "model"),
    ("messages", [], "messages"),
    ("messages", "hi", "messages"),
    ("messages", ["hi"], "messages[0]"),
    ("messages", [{"role": "king", "content": "?"}], "messages[0].role"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content"),
    ("messages", [{"role": "user", "content": {"path": "/etc/hostname"}}], "messages[0].content"),
    ("messages", [{"role": "user", "content": ["/etc/hostname"]}], "messages[0].content[0]"),
    ("messages", [{"role": "user", "content": [{"type": "image", "image": "/x.png"}]}], "messages[0].content[0]"),
    ("messages", [{"role": "user", "content": [{"path": "/x.png"}]}], "messages[0].content[0]"),
    ("messages", [{"role": "user", "content": [{"type": "file", "file": {"path": "x"}}]}], "messages[0].content[0]"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "path": "x"}]}], "messages[0].content[0]"),
    ("stream", "yes", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("max_tokens", 0, "max_tokens"),
    ("max_completion_tokens", 1.5, "max_completion_tokens"),
    ("temperature", 2.1, "temperature"),
    ("temperature", float("nan"), "temperature"),
    ("top_p", -0.1, "top_p"),
    ("top_k", -2, "top_k"),
    ("seed", 2**63, "seed"),
    ("seed", "x", "seed"),
    ("stop", "", "stop"),
    ("stop", [1], "stop"),
    ("stop", ["a"] * 17, "stop"),
    ("stop", "\ud800", "stop"),
    ("ignore_eos", True, "ignore_eos"),
    ("top_logprobs", 3, "top_logprobs"),
    ("logprobs", 5, "logprobs"),
    ("adaptive_fusion", {"latncy_ms": 5}, "adaptive_fusion.latncy_ms"),
    ("adaptive_fusion", {"budget": {"latency": 5}}, "adaptive_fusion.budget"),
    ("adaptive_fusion", {"budget": {"latency_ms": 5}, "latency_ms": 6}, "adaptive_fusion.budget"),
    ("adaptive_fusion", {"latency_ms": 1e12}, "adaptive_fusion.budget"),
    ("adaptive_fusion", {"budget": []}, "adaptive_fusion.budget"),
    ("adaptive_fusion", {"budget": 0}, "adaptive_fusion.budget"),
    ("adaptive_fusion", {"point": "warp9"}, "adaptive_fusion.point"),
    ("adaptive_fusion", {"point": {"warp": 9}}, "adaptive_fusion.point"),
    ("adaptive_fusion", {"policy": 1}, "adaptive_fusion.policy"),
    ("adaptive_fusion", [], "adaptive_fusion"),
]


@pytest.mark.parametrize(("name", "value", "param"), WRONG)
def test_a_wrong_value_is_refused_by_its_name(name: str, value: Any, param: str) -> None:
    with pytest.raises(Refusal) as raised:
        read(**{name: value})
    assert (raised.value.status, raised.value.param) == (400, param)


def test_two_lengths_must_agree() -> None:
    assert read(max_tokens=5, max_completion_tokens=5).max_new_tokens == 5
    with pytest.raises(Refusal, match="max_completion_tokens 6 and max_tokens 5"):
        read(max_tokens=5, max_completion_tokens=6)
    assert read().max_new_tokens is None


def test_answers_are_kept_from_ending_early() -> None:
    assert read(min_tokens=3, max_tokens=5).options == {"min_new_tokens": 3}
    assert read(ignore_eos=True, max_tokens=5).options == {"min_new_tokens": 5}
    with pytest.raises(Refusal, match="min_tokens is 6; expected at most the 5"):
        read(min_tokens=6, max_tokens=5)


def test_sampling_is_what_was_asked_for() -> None:
    assert read().options == {}
    assert read(temperature=0, top_p=0.5).options == {"do_sample": False}
    assert read(temperature=0.7).options == {"do_sample": True, "temperature": 0.7}
    assert read(top_p=0.5).options == {"top_p": 0.5, "do_sample": True}
    assert read(top_p=1).options == {"top_p": 1.0}
    assert read(top_k=-1).options == {"top_k": 0}
    assert read(top_k=5).options == {"top_k": 5, "do_sample": True}
    assert read(stop="x", logprobs=True).options == {"output_logits": True, "stop_strings": ["x"]}


def test_messages_keep_what_they_say() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]
    read_back = read(messages=messages).messages
    assert read_back[0] == {"role": "system", "content": "Be brief."} and read_back[1:] == messages[1:]


def test_budget_policy_and_point_are_read() -> None:
    own = {"latency_ms": 50, "budget": {"ttft_ms": 20}, "policy": "native", "point": "native"}
    call = read(adaptive_fusion=own)
    assert (call.budget, call.policy, call.point) == (Budget(latency_ms=50, ttft_ms=20), "native", NATIVE)
    assert read(adaptive_fusion={"point": {"downsample": 0.5}}).point == OperatingPoint(downsample=0.5)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=5), JSON, max_size=6))
def test_any_object_is_read_or_refused_and_nothing_else(fields: dict[str, Any]) -> None:
    try:
        call = read_chat({**BASE, **fields})
    except Refusal as refusal:
        assert refusal.status == 400 and refusal.param
        json.dumps(str(refusal)).encode()
    else:
        given = {name for name, value in fields.items() if value is not None}
        used = {name for name in given if name in FIELDS and FIELDS[name].use is not Use.LISTED}
        of_fields = {name for name in call.ignored if not name.startswith("stream_options.")}
        assert of_fields == {name for name in given if not name.startswith("stream_options.")} - used


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_read_or_refused(body: bytes) -> None:
    try:
        read_chat(read_json(body))
    except Refusal as refusal:
        assert refusal.status == 400


def test_json_that_nests_without_end_is_refused() -> None:
    with pytest.raises(Refusal, match="no JSON"):
        read_json(b"[" * 100_000)
    with pytest.raises(Refusal, match="no JSON"):
        read_json(b"1" * 10_000)
