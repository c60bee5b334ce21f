"""What a chat request says that a plan depends on, read out of its body without touching it.

Everything that has another form than expected is the engine's to judge: it is passed over here, never refused. Only
what stands under ``adaptive_fusion`` is this library's own, and refused where it is wrong. Knows OpenAI's form of a
request. Must not know how plans are made or applied.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import is_integer
from adaptive_fusion.media.inline import is_data_url
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.serving.gateway.splice import Body, Node
from adaptive_fusion.serving.refusals import Refusal
from adaptive_fusion.serving.schema import read_own

OWN = "adaptive_fusion"
PLACES: Mapping[str, Literal["image", "video"]] = {
    "image_url": "image", "video_url": "video", "image": "image", "video": "video",
}  # fmt: skip
"""Where a part has what it shows, by its type: as a string, or as an object with it under ``url``."""
_SHOWN = {"url": None, "*": None}
_PART = {**dict.fromkeys(PLACES, _SHOWN), "*": None}
SHAPE = {"messages": [{"content": [_PART], "*": None}], "*": None}
MAX_NEW_TOKENS = 256
"""Of an answer whose request does not say, for predictions only."""
CHARACTERS_A_TOKEN = 4
_PIXELS = ("mm_processor_kwargs", "media_io_kwargs", "images_config", "vl_high_resolution_images")
"""Fields by which a client tells its engine how large media are to be; then nothing is planned."""
_OWN_PIXELS = ("min_pixels", "max_pixels", "resized_height", "resized_width", "image_pixel_limit", "max_dynamic_patch")
"""The same of one part."""


@dataclass(frozen=True)
class Shown:
    """An image or clip of a request.

    Attributes:
        kind: By the type of its part.
        node: The text that names it, in the body.
        text: A data URL, an address or whatever else.
        detail: ``low``, ``high``, or anything else.
        sized: Whether the client says itself how large it is to be.
    """

    kind: Literal["image", "video"]
    node: Node
    text: str
    detail: str = ""
    sized: bool = False

    @property
    def is_data(self) -> bool:
        """Whether its bytes are in the body."""
        return is_data_url(self.text)


@dataclass(frozen=True)
class Call:
    """A chat request as far as it could be read.

    Attributes:
        body: Its JSON.
        shown: Images and clips, in order.
        prompt: The user's last text.
        text_tokens: Of all texts, roughly.
        messages: In the form that `execution.turns` takes.
        model: The name that it asks for; empty without one.
        stream: Whether the answer is to come in pieces.
        max_new_tokens: Most tokens of the answer.
        budget: Its own limits.
        point: What to run; None decides.
        sized: Field by which the client says how large media are to be; empty without one.
        asks_logprobs: Whether the client wants log-probabilities.
        top_logprobs: Of how many.
        why_no_look: Why the engine must not be asked how sure it is, in words; empty where it may.
    """

    body: Body
    shown: tuple[Shown, ...]
    prompt: str
    text_tokens: int
    messages: tuple[Mapping[str, Any], ...]
    model: str = ""
    stream: bool = False
    max_new_tokens: int = MAX_NEW_TOKENS
    budget: Budget = field(default_factory=Budget)
    point: OperatingPoint | None = None
    sized: str = ""
    asks_logprobs: bool = False
    top_logprobs: int = 0
    why_no_look: str = ""


def read_call(data: bytes) -> Call:
    """A request.

    Raises:
        NotReadable: If it is no JSON.
        Refusal: 400 for what is wrong under ``adaptive_fusion``.
    """
    body = Body(data, SHAPE)
    if body.root.members is None:
        return Call(body, (), "", 0, ())
    fields = {key: node.value for key, node in body.root.members.items() if key != "messages"}
    shown, messages = list[Shown](), list[dict[str, Any]]()
    listed = body.root.get("messages")
    for message in (listed.items if listed is not None else None) or ():
        if (found := _message(message, shown)) is not None:
            messages.append(found)
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    asked = [part["text"] for m in messages if m["role"] == "user" for part in m["content"] if part["type"] == "text"]
    budget, point = _own(fields)
    model = fields.get("model")
    return Call(
        body,
        tuple(shown),
        asked[-1] if asked else "",
        sum(map(len, texts)) // CHARACTERS_A_TOKEN,
        tuple(messages),
        model=model if isinstance(model, str) else "",
        stream=fields.get("stream") is True,
        max_new_tokens=_most_tokens(fields),
        budget=budget,
        point=point,
        sized=next((name for name in _PIXELS if fields.get(name) is not None), ""),
        asks_logprobs=fields.get("logprobs") is True,
        top_logprobs=fields["top_logprobs"] if is_integer(fields.get("top_logprobs")) else 0,
        why_no_look=_why_no_look(fields),
    )


def _message(message: Node, shown: list[Shown]) -> dict[str, Any] | None:
    """A message for `execution.turns`, what it shows added to `shown`; None where it is no message."""
    role = message.get("role")
    if message.members is None or role is None or not isinstance(role.value, str):
        return None
    content = message.get("content")
    parts = list[dict[str, Any]]()
    if content is not None and content.items is not None:
        parts = [_part(part, shown) for part in content.items]
    elif content is not None and isinstance(content.value, str):
        parts = [{"type": "text", "text": _whole(content.value)}]
    beside = {key: node.plain() for key, node in message.members.items() if key not in ("role", "content")}
    return {**beside, "role": role.value, "content": parts}


def _part(part: Node, shown: list[Shown]) -> dict[str, Any]:
    kind = part.get("type")
    place = kind.value if kind is not None and isinstance(kind.value, str) else ""
    if place == "text":
        said = part.get("text")
        return {"type": "text", "text": _whole(said.value) if said and isinstance(said.value, str) else ""}
    source = part.get(place) if place in PLACES else None
    url = source.get("url") if source is not None and source.members is not None else source
    if url is None or not isinstance(url.value, str):
        return {"type": "text", "text": _whole(json.dumps(part.plain()))}
    beside = dict(_beside(part, place, source))
    detail = beside.get("detail")
    sized = any(beside.get(name) is not None for name in _OWN_PIXELS)
    shown.append(Shown(PLACES[place], url, url.value, detail if isinstance(detail, str) else "", sized))
    return {"type": PLACES[place], PLACES[place]: "", "beside": beside}


def _beside(part: Node, place: str, source: Node | None) -> Iterator[tuple[str, Any]]:
    """What stands beside a medium and inside of its object."""
    for node, source_key in ((part, place), (source, "url")):
        for key, each in (node.members or {}).items() if node is not None else ():
            if key not in (source_key, "type"):
                yield key, each.plain()


def _whole(text: str) -> str:
    """Without halves of characters, which cannot be hashed."""
    return text.encode("utf-8", "replace").decode()


def _most_tokens(fields: Mapping[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value: Any = fields.get(name)
        if is_integer(value) and 0 < value < 1 << 20:
            return int(value)
    return MAX_NEW_TOKENS


def _own(fields: Mapping[str, Any]) -> tuple[Budget, OperatingPoint | None]:
    given = fields.get(OWN)
    if given is None:
        return Budget(), None
    budget, policy, point = read_own(given)
    if policy is not None:
        raise Refusal(
            "the gateway has one policy for all requests; expected none in the request", param=f"{OWN}.policy"
        )
    if budget.vram_gb is not None:
        raise Refusal("memory is the engine's own; expected no vram_gb in the request", param=f"{OWN}.vram_gb")
    if budget.on_deadline == "stop":
        raise Refusal(
            "an engine's answer is not stopped at its deadline; expected on_deadline 'finish' or none in the request",
            param=f"{OWN}.on_deadline",
        )
    return budget, point


def _why_no_look(fields: Mapping[str, Any]) -> str:
    """What rules a look at the first token out."""
    if fields.get("n", 1) not in (1, None):
        return "several answers are wanted"
    for name in ("tools", "functions", "response_format", "guided_json", "guided_regex", "structured_outputs"):
        if fields.get(name) not in (None, [], {}, {"type": "text"}):
            return f"{name} holds the answer to a form"
    if fields.get("logprobs") is True and (fields.get("top_logprobs") or 0) in range(2):
        return "the client asks for log-probabilities of its own"
    return ""
