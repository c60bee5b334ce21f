"""Which conversation a request goes on with: a hash of its messages up to each of the user's.

Whatever comes after a user's message, the next request of the same conversation begins with it. Knows messages in the
form that templates take, and names of their media. Must not know what is remembered of a conversation.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_fusion.media.hashes import length_prefixed


@dataclass(frozen=True, slots=True)
class Turns:
    """A request's place in its conversation.

    Attributes:
        before: Hashes of the messages up to each of the user's earlier ones, the longest first.
        own: The same up to the user's last one; empty if there is none.
    """

    before: tuple[str, ...] = ()
    own: str = ""


def turns_of(messages: Sequence[Mapping[str, Any]], names: Sequence[str], tenant: str) -> Turns:
    """The place of `messages` in their conversation.

    Args:
        messages: Content is a list of parts.
        names: Of the media, in order: the same for the same medium.
        tenant: Whose conversation it is; another's never has the same hash.
    """
    found, named, so_far = list[str](), iter(names), length_prefixed("conversation", tenant)
    for message in messages:
        so_far = length_prefixed(so_far, *_fields(message, named))
        if message["role"] == "user":
            found.append(so_far)
    return Turns(tuple(found[-2::-1]), found[-1]) if found else Turns()


def _fields(message: Mapping[str, Any], names: Iterator[str]) -> Iterator[str]:
    beside = {key: value for key, value in message.items() if key != "content"}
    yield json.dumps(beside, sort_keys=True, default=repr)
    for part in message["content"]:
        if part["type"] == "text":
            yield f"text {part['text']}"
        else:
            asked = {key: value for key, value in part.items() if key not in ("type", part["type"])}
            yield f"{part['type']} {next(names)} {json.dumps(asked, sort_keys=True, default=repr)}"
