"""A chat request's JSON, read and checked; each error names the field.

Knows OpenAI's form of a request and the library's budgets and points. Must not know of models, HTTP or queues. What a
message is made of is checked where it is read (`execution`); here only that nothing in it can name a file.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import integer, number, whole_characters
from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.serving.fields import sort_fields
from adaptive_fusion.serving.refusals import Refusal

T = TypeVar("T")

ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS: Mapping[str, str] = {"text": "text", "image_url": "image_url", "video_url": "video_url"}
"""Types of the parts of a message, and where each has what it shows."""
OWN_KEYS = ("budget", "policy", "point")
LIMITS = ("latency_ms", "ttft_ms", "vram_gb", "attainment", "on_infeasible", "on_deadline")
MAX_STOPS, MAX_TOP_LOGPROBS, MAX_MESSAGES = 16, 20, 2000
MAX_SEED = 2**63 - 1


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
    stream = _flag(given, "stream")
    logprobs = _flag(given, "logprobs")
    top = checked("top_logprobs", lambda: integer(given.get("top_logprobs", 0), "top_logprobs", 0, MAX_TOP_LOGPROBS))
    if top and not logprobs:
        raise _refused("top_logprobs", f"top_logprobs is {top} without logprobs; expected logprobs true beside it")
    include_usage, options_ignored = _stream_options(given, stream)
    budget, policy, point = _own(given.get("adaptive_fusion", {}))
    return ChatCall(
        model=_model(given),
        messages=_messages(given.get("messages")),
        options=_sampling(given)
        | _at_least(given)
        | ({"output_logits": True} if logprobs else {})
        | _stop_option(given),
        max_new_tokens=_most_tokens(given),
        seed=None if "seed" not in given else checked("seed", lambda: _seed(given["seed"])),
        stops=_stops(given.get("stop")),
        continues=_continues(given),
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs,
        top_logprobs=top,
        budget=budget,
        policy=policy,
        point=point,
        ignored=(*ignored, *options_ignored),
    )


def checked(name: str, read: Callable[[], T]) -> T:
    """What `read` gives; its errors become refusals that name the field."""
    try:
        return read()
    except Refusal:
        raise
    except AdaptiveFusionError as error:
        raise _refused(name, str(error)) from error


def _refused(name: str, message: str) -> Refusal:
    return Refusal(message, param=name)


def _flag(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise _refused(name, f"{name} is {str(value)[:80]!r}; expected true or false")
    return value


def _model(given: Mapping[str, Any]) -> str:
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise _refused("model", f"model is {str(model)[:80]!r}; expected a name of /v1/models")
    return model


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _refused("messages", "messages is missing, empty or no list; expected a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise _refused("messages", f"there are {len(messages)} messages; expected at most {MAX_MESSAGES}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _refused(where, f"{where} is {type(message).__name__}; expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _refused(f"{where}.role", f"{where}.role is {str(role)[:80]!r}; expected {', '.join(ROLES)}")
    if isinstance(content, list):
        if not content:
            raise _refused(f"{where}.content", f"{where}.content is empty; expected a string or a list of parts")
        content = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    elif not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
        raise _refused(
            f"{where}.content", f"{where}.content is {type(content).__name__}; expected a string or a list of parts"
        )
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part that has its medium where OpenAI's API has it; in no other place, which might name a file."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PARTS:
        shown = kind if isinstance(kind, str) else type(part).__name__
        raise _refused(where, f"{where} is {str(shown)[:80]!r}; expected a type of {', '.join(PARTS)}")
    if PARTS[kind] not in part:
        raise _refused(where, f"{where} has no {PARTS[kind]}; expected one in a part of type {kind}")
    return dict(part)


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``generate`` that choose tokens. Without a word about it the model's own configuration holds."""
    options: dict[str, Any] = {}
    if "temperature" in given:
        heat = checked("temperature", lambda: number(given["temperature"], "temperature", 0.0, 2.0))
        options |= {"do_sample": True, "temperature": heat} if heat > 0 else {"do_sample": False}
    bounds = {"top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
    for name, (low, high) in bounds.items():
        if name in given:
            options[name] = checked(name, lambda n=name, a=low, b=high: number(given[n], n, a, b))  # type: ignore[misc]
    if "top_k" in given:
        top_k = checked("top_k", lambda: integer(given["top_k"], "top_k", -1, 1_000_000))
        options["top_k"] = max(top_k, 0)
    # Whoever narrows the choice wants one to be made.
    narrowed = options.get("top_p", 1.0) < 1.0 or options.get("min_p", 0.0) > 0.0 or options.get("top_k", 0) > 0
    if narrowed and "do_sample" not in options:
        options["do_sample"] = True
    if options.get("do_sample") is False:
        options = {"do_sample": False}
    if "repetition_penalty" in given:
        options["repetition_penalty"] = checked(
            "repetition_penalty", lambda: number(given["repetition_penalty"], "repetition_penalty", 0.01, 10.0)
        )
    return options


def _at_least(given: Mapping[str, Any]) -> dict[str, Any]:
    """The option that keeps an answer from ending early; ``ignore_eos`` lets it end at its limit alone."""
    least = checked("min_tokens", lambda: integer(given.get("min_tokens", 0), "min_tokens", 0, 1_000_000))
    if _flag(given, "ignore_eos"):
        least = _most_tokens(given) or 0
        if not least:
            raise _refused("ignore_eos", "ignore_eos is true without max_tokens; expected max_tokens beside it")
    return {"min_new_tokens": least} if least else {}


def _most_tokens(given: Mapping[str, Any]) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    values = {name: checked(name, lambda n=name: integer(given[n], n, 1, 1_000_000)) for name in names}  # type: ignore[misc]
    if len(set(values.values())) > 1:
        said = " and ".join(f"{name} {value}" for name, value in values.items())
        raise _refused(names[0], f"the request says {said}; expected one of them")
    most = next(iter(values.values()), None)
    if most is not None and isinstance(given.get("min_tokens"), int) and given["min_tokens"] > most:
        raise _refused("min_tokens", f"min_tokens is {given['min_tokens']}; expected at most the {most} of {names[0]}")
    return most


def _seed(value: Any) -> int:
    return integer(value, "seed", -MAX_SEED - 1, MAX_SEED)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None or value == []:
        return ()
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(stop, str) and stop for stop in found):
        raise _refused("stop", "stop is empty or no text; expected a string or a list of strings")
    if len(found) > MAX_STOPS:
        raise _refused("stop", f"stop has {len(found)} strings; expected at most {MAX_STOPS}")
    if any(len(stop) > 200 for stop in found):
        raise _refused("stop", "stop has a string of more than 200 characters; expected shorter ones")
    return tuple(checked("stop", lambda s=stop: whole_characters(s, "stop")) for stop in found)  # type: ignore[misc]


def _stop_option(given: Mapping[str, Any]) -> dict[str, Any]:
    stops = _stops(given.get("stop"))
    return {"stop_strings": list(stops)} if stops else {}


def _continues(given: Mapping[str, Any]) -> bool:
    """Whether to go on with the last message; vLLM's pair of fields, which must not say both."""
    continues = _flag(given, "continue_final_message")
    if _flag(given, "add_generation_prompt", not continues) is continues:
        raise _refused(
            "continue_final_message",
            f"continue_final_message and add_generation_prompt are both {str(continues).lower()}; expected one of them",
        )
    return continues


def _stream_options(given: Mapping[str, Any], stream: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether a stream ends with the usage, and the names of options that change nothing."""
    wanted = given.get("stream_options", {})
    if not isinstance(wanted, dict):
        raise _refused("stream_options", f"stream_options is {type(wanted).__name__}; expected an object")
    if wanted and not stream:
        raise _refused("stream_options", "stream_options is given without stream; expected stream true beside it")
    said = {name: value for name, value in wanted.items() if value is not None}
    ignored = tuple(f"stream_options.{name[:80]}" for name in sorted(said) if name != "include_usage")
    return _flag(said, "include_usage"), ignored


def _own(values: Any) -> tuple[Budget, str | None, OperatingPoint | None]:
    """Budget, policy and point of ``adaptive_fusion``, whose keys are all ours: an unknown one is a mistake."""
    name = "adaptive_fusion"
    if not isinstance(values, Mapping):
        raise _refused(name, f"{name} is {type(values).__name__}; expected an object of {', '.join(OWN_KEYS)}")
    unknown = sorted(str(key) for key in values if key not in (*OWN_KEYS, *LIMITS))
    if unknown:
        raise _refused(
            f"{name}.{unknown[0][:80]}", f"{name} has {unknown[0][:80]!r}; expected {', '.join((*OWN_KEYS, *LIMITS))}"
        )
    nested = values["budget"] if values.get("budget") is not None else {}
    flat = {key: values[key] for key in LIMITS if values.get(key) is not None}
    if not isinstance(nested, Mapping) or flat.keys() & nested.keys():
        raise _refused(f"{name}.budget", f"{name}.budget is no object, or says a limit twice; expected it once")
    budget = checked(f"{name}.budget", lambda: Budget.from_dict({**nested, **flat}))
    policy = values.get("policy")
    if policy is not None and not isinstance(policy, str):
        raise _refused(f"{name}.policy", f"{name}.policy is {type(policy).__name__}; expected the name of a policy")
    return budget, policy, _point(values.get("point"), f"{name}.point")


def _point(value: Any, where: str) -> OperatingPoint | None:
    if value is None:
        return None
    if isinstance(value, str):
        return checked(where, lambda: OperatingPoint.parse(value))
    if isinstance(value, Mapping):
        return checked(where, lambda: OperatingPoint.from_dict(value))
    raise _refused(where, f"{where} is {type(value).__name__}; expected a name such as native, or an object of knobs")
