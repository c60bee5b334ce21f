"""A chat request's JSON, read and checked; each error names the field.

Knows OpenAI's form of a request and the library's budgets and points. Must not know of models, HTTP or queues. What a
message is made of is checked where it is read (`execution`); here only that nothing in it can name a file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import integer
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.serving.fields import sort_fields
from adaptive_fusion.serving.generate_options import generate_options, most_tokens, seed_of, stops_of
from adaptive_fusion.serving.reading import checked, flag, refused
from adaptive_fusion.serving.refusals import Refusal

ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS: Mapping[str, str] = {"text": "text", "image_url": "image_url", "video_url": "video_url"}
"""Types of the parts of a message, and where each has what it shows."""
OWN_KEYS = ("budget", "policy", "point")
LIMITS = ("latency_ms", "ttft_ms", "vram_gb", "attainment", "on_infeasible", "on_deadline")
MAX_TOP_LOGPROBS, MAX_MESSAGES = 20, 2000
USER_FIELDS, SESSION_FIELDS = ("user", "safety_identifier"), ("prompt_cache_key", "metadata")
"""Fields that name who asks, and in which session, for experiments by user or session."""


@dataclass(frozen=True)
class ChatCall:
    """A checked request.

    Attributes:
        model: The name it asks for.
        messages: In OpenAI's form, media still in text.
        options: For ``generate``.
        max_new_tokens: Most tokens of the answer; None where it does not say.
        seed: Of the sampling.
        stops: Strings at which the answer ends, without them.
        continues: Whether the answer goes on with the last message.
        stream: Whether it is to come in pieces.
        include_usage: Whether a stream ends with the usage.
        logprobs: Whether the log-probability of each token is wanted.
        top_logprobs: Of how many of the likeliest tokens too.
        budget: The request's own limits.
        policy: Name of the policy to decide by; None takes the server's.
        point: Exactly what to run; None decides.
        ignored: Names of fields that change nothing.
        user: Key of who asks: of ``user`` or ``safety_identifier``; empty where neither is given.
        session: Key of the session: of ``prompt_cache_key`` or ``session_id`` in ``metadata``.
    """

    model: str
    messages: list[dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    continues: bool = False
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    budget: Budget = Budget()  # noqa: RUF009 (frozen)
    policy: str | None = None
    point: OperatingPoint | None = None
    ignored: tuple[str, ...] = ()
    user: str = ""
    session: str = ""


def read_json(text: bytes) -> Any:
    """A body's JSON.

    Raises:
        Refusal: 400 if it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(
            f"the body is no JSON ({type(error).__name__}); expected an object", code="invalid_json"
        ) from None


def read_object(body: Any) -> Mapping[str, Any]:
    """A body that is an object.

    Raises:
        Refusal: 400 for anything else.
    """
    if not isinstance(body, Mapping):
        raise Refusal(f"the body is {type(body).__name__}; expected an object", code="invalid_json")
    return body


def read_chat(body: Any) -> ChatCall:
    """A request of ``/v1/chat/completions`` and of the endpoints that decide without answering.

    Raises:
        Refusal: 400 with the field's name.
    """
    given, ignored = sort_fields(read_object(body))
    stream = flag(given, "stream")
    logprobs = flag(given, "logprobs")
    top = checked("top_logprobs", lambda: integer(given.get("top_logprobs", 0), "top_logprobs", 0, MAX_TOP_LOGPROBS))
    if top and not logprobs:
        raise refused("top_logprobs", f"top_logprobs is {top} without logprobs; expected logprobs true beside it")
    include_usage, options_ignored = _stream_options(given, stream)
    budget, policy, point = read_own(given.get("adaptive_fusion", {}))
    return ChatCall(
        model=_model(given),
        messages=_messages(given.get("messages")),
        options=generate_options(given) | ({"output_logits": True} if logprobs else {}),
        max_new_tokens=most_tokens(given),
        seed=seed_of(given),
        stops=stops_of(given),
        continues=_continues(given),
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
        top_logprobs=top,
        budget=budget,
        policy=policy,
        point=point,
        ignored=(*ignored, *options_ignored),
        user=key_of(body, *USER_FIELDS),
        session=key_of(body, *SESSION_FIELDS),
    )


def key_of(body: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that is a text; of ``metadata`` its session."""
    for name in names:
        value = body.get(name)
        if isinstance(value, Mapping):
            value = value.get("session_id")
        if isinstance(value, str) and value:
            return value
    return ""


def _model(given: Mapping[str, Any]) -> str:
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise refused("model", f"model is {str(model)[:80]!r}; expected a name of /v1/models")
    return model


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise refused("messages", "messages is missing, empty or no list; expected a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise refused("messages", f"there are {len(messages)} messages; expected at most {MAX_MESSAGES}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise refused(where, f"{where} is {type(message).__name__}; expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise refused(f"{where}.role", f"{where}.role is {str(role)[:80]!r}; expected {', '.join(ROLES)}")
    if isinstance(content, list):
        if not content:
            raise refused(f"{where}.content", f"{where}.content is empty; expected a string or a list of parts")
        content = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    elif not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
        raise refused(
            f"{where}.content", f"{where}.content is {type(content).__name__}; expected a string or a list of parts"
        )
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part that has its medium where OpenAI's API has it; in no other place, which might name a file."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
        shown = kind if isinstance(kind, str) else type(part).__name__
        raise refused(where, f"{where} is {str(shown)[:80]!r}; expected a type of {', '.join(PARTS)}")
    if PARTS[kind] not in part:
        raise refused(where, f"{where} has no {PARTS[kind]}; expected one in a part of type {kind}")
    return dict(part)


def _continues(given: Mapping[str, Any]) -> bool:
    """Whether to go on with the last message; vLLM's pair of fields, which must not say both."""
    continues = flag(given, "continue_final_message")
    if flag(given, "add_generation_prompt", not continues) is continues:
        raise refused(
            "continue_final_message",
            f"continue_final_message and add_generation_prompt are both {str(continues).lower()}; expected one of them",
        )
    return continues


def _stream_options(given: Mapping[str, Any], stream: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether a stream ends with the usage, and the names of options that change nothing."""
    wanted = given.get("stream_options", {})
    if not isinstance(wanted, dict):
        raise refused("stream_options", f"stream_options is {type(wanted).__name__}; expected an object")
    if wanted and not stream:
        raise refused("stream_options", "stream_options is given without stream; expected stream true beside it")
    said = {name: value for name, value in wanted.items() if value is not None}
    ignored = tuple(f"stream_options.{name[:80]}" for name in sorted(said) if name != "include_usage")
    return flag(said, "include_usage"), ignored


def read_own(values: Any) -> tuple[Budget, str | None, OperatingPoint | None]:
    """Budget, policy and point of ``adaptive_fusion``, whose keys are all ours: an unknown one is a mistake."""
    name = "adaptive_fusion"
    if not isinstance(values, Mapping):
        raise refused(name, f"{name} is {type(values).__name__}; expected an object of {', '.join(OWN_KEYS)}")
    unknown = sorted(str(key) for key in values if key not in (*OWN_KEYS, *LIMITS))
    if unknown:
        raise refused(
            f"{name}.{unknown[0][:80]}", f"{name} has {unknown[0][:80]!r}; expected {', '.join((*OWN_KEYS, *LIMITS))}"
        )
    nested = values["budget"] if values.get("budget") is not None else {}
    flat = {key: values[key] for key in LIMITS if values.get(key) is not None}
    if not isinstance(nested, Mapping) or flat.keys() & nested.keys():
        raise refused(f"{name}.budget", f"{name}.budget is no object, or says a limit twice; expected it once")
    budget = checked(f"{name}.budget", lambda: Budget.from_dict({**nested, **flat}))
    policy = values.get("policy")
    if policy is not None and not isinstance(policy, str):
        raise refused(f"{name}.policy", f"{name}.policy is {type(policy).__name__}; expected the name of a policy")
    return budget, policy, _point(values.get("point"), f"{name}.point")


def _point(value: Any, where: str) -> OperatingPoint | None:
    if value is None:
        return None
    if isinstance(value, str):
        return checked(where, lambda: OperatingPoint.parse(value))
    if isinstance(value, Mapping):
        return checked(where, lambda: OperatingPoint.from_dict(value))
    raise refused(where, f"{where} is {type(value).__name__}; expected a name such as native, or an object of knobs")
