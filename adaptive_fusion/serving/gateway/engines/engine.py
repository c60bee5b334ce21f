"""What differs between the engines behind a gateway: extra fields they take, log-probabilities, what they count.

Each engine is one `Engine` in a file of its own, made of what its documentation and source say. The size of an image
never depends on this: images are resized before they are sent. Must not know of plans, bytes or HTTP.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]


@dataclass(frozen=True)
class Agreed:
    """Limits on which all media of a request agree; None where they do not, or where there are none.

    Args:
        min_pixels: Least pixels of every image, as the model's processor has them.
        max_pixels: Most pixels of every image.
        max_frames: Most frames of every clip.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_frames: int | None = None


def no_fields(body: Mapping[str, Any], agreed: Agreed) -> Fields:
    """Of an engine that takes no such field."""
    return {}


def no_count(usage: Mapping[str, Any]) -> int | None:
    """Of an engine that does not count the tokens of images apart."""
    return None


def image_tokens_of_prompt(usage: Mapping[str, Any]) -> int | None:
    """``prompt_tokens_details.image_tokens`` of an answer's usage; None where it is not there."""
    details = usage.get("prompt_tokens_details")
    count = details.get("image_tokens") if isinstance(details, Mapping) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


@dataclass(frozen=True)
class Engine:
    """An engine as a gateway sees it.

    Args:
        name: As it is asked for.
        fields: Of a chat request and its `Agreed` limits, the top-level fields that say them to the engine as well.
            They reach media that are sent by address, too. What the request has already is never among them.
        logprobs: Whether chat answers come with log-probabilities of tokens, where they are asked for.
        image_tokens: Of an answer's ``usage``, the tokens of images in the prompt; None where they are not counted.
        stream_usage: Whether ``stream_options: {"include_usage": true}`` is taken.
        notes: What it does not take, in words for its operator.
        source: Where that is written.
    """

    name: str
    fields: Callable[[Mapping[str, Any], Agreed], Fields] = no_fields
    logprobs: bool = False
    image_tokens: Callable[[Mapping[str, Any]], int | None] = no_count
    stream_usage: bool = True
    notes: tuple[str, ...] = ()
    source: str = ""


def kinds(body: Mapping[str, Any]) -> set[str]:
    """Types of the parts of a chat request's messages."""
    return set(_types(body))


def _types(body: Mapping[str, Any]) -> Iterator[str]:
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str):
                yield kind


def without_taken(body: Mapping[str, Any], fields: Fields) -> Fields:
    """`fields` that are not in the request already: what a client says goes before."""
    return {name: value for name, value in fields.items() if name not in body}
