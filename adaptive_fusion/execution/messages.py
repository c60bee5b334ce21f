"""Chat messages: who says what, with which keys, and whether the last one is an answer to go on with.

Knows roles and keys as OpenAI's API and chat templates have them; `parts` knows what a message is made of. Every key
is kept for the template or refused by name. Must not know of models, templates or how media are loaded.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptive_fusion.checks import strings, whole_characters
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.parts import MediumPart, Part, TextPart, as_mapping, read_part, says_nothing

ROLES = ("system", "user", "assistant", "tool")
_KEPT: dict[str, tuple[str, ...]] = {
    "assistant": ("tool_calls", "reasoning_content"),
    "tool": ("tool_call_id", "name"),
}
"""By role, the keys beside role and content that go to the chat template, which refuses what it does not show."""


@dataclass(frozen=True)
class Message:
    """One message: its role, its parts in order, and what else the chat template gets."""

    role: str
    parts: tuple[Part, ...]
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def media(self) -> list[MediumPart]:
        """What it shows."""
        return [part for part in self.parts if isinstance(part, MediumPart)]


def is_messages(value: object) -> bool:
    """Whether `value` is a list of chat messages rather than media."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    return bool(value) and all("role" in (as_mapping(message) or ()) for message in value)


def read_messages(values: Sequence[Any]) -> list[Message]:
    """Messages as people have them, checked.

    Raises:
        ConfigError: For an unknown role, key or part, half a character, or a tool's answer to a call that nobody made.
        MediaError: For an address.
    """
    messages = [_message(value) for value in values]
    called: set[Any] = set()
    for message in messages:
        called |= {*_calls(message)}
        for key in ("tool_call_id", "name"):
            if message.role == "tool" and key in message.kept and message.kept[key] not in called:
                known = ", ".join(sorted(map(repr, called - {None}))) or "none"
                raise ConfigError(
                    f"a tool message has {key} {message.kept[key]!r}; expected one of the calls before it: {known}"
                )
    return messages


def begun_answer(messages: Sequence[Message], wanted: bool | None) -> bool:
    """Whether the last message is an answer that the model is to go on with.

    Args:
        messages: The conversation.
        wanted: What the caller says; None goes on wherever the last message is the assistant's.

    Raises:
        ConfigError: If the caller wants to go on with a message of another role, or the answer has no text at its end.
    """
    last = messages[-1]
    if wanted is not None and not isinstance(wanted, bool):
        raise ConfigError(f"continue_final_message is {wanted!r}; expected True, False or None")
    if wanted and last.role != "assistant":
        raise ConfigError(
            f"continue_final_message is True and the last message is of the {last.role}; expected one of the assistant"
        )
    if last.role != "assistant" or wanted is False:
        return False
    if "tool_calls" in last.kept or not last.parts or not isinstance(last.parts[-1], TextPart):
        raise ConfigError(
            "the last message is an answer of the assistant that ends in a tool call or a medium; expected text to go "
            "on with, or the tool's or user's message after it"
        )
    return True


def check_tools(tools: Any) -> list[Any] | None:
    """Descriptions of tools, for the chat template: JSON schemas, or functions that transformers describes.

    Raises:
        ConfigError: For anything but a list of mappings and functions.
    """
    if says_nothing(tools):
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise ConfigError(f"tools is {type(tools).__name__}; expected a list of JSON schemas or functions")
    try:
        json.dumps([tool for tool in tools if isinstance(tool, Mapping)])
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"a tool is no JSON schema ({error}); expected JSON schemas or functions") from error
    for text in strings(tools):
        whole_characters(text, "a tool")
    return [dict(tool) if isinstance(tool, Mapping) else tool for tool in tools]


def _message(value: Any) -> Message:
    values = dict(as_mapping(value) or {})
    role, content = values.pop("role", None), values.pop("content", None)
    given = {key: entry for key, entry in values.items() if not says_nothing(entry)}
    if role not in ROLES:
        raise ConfigError(f"message role is {role!r:.80}; expected {', '.join(ROLES)}")
    accepted = _KEPT.get(role, ())
    for key, entry in given.items():
        if key not in accepted:
            raise ConfigError(
                f"a message of the {role} has {key} {str(entry)[:80]!r}; accepted beside role and content "
                f"{'are ' + ', '.join(accepted) if accepted else 'is nothing'}"
            )
    for text in strings(given):
        whole_characters(text, f"a message of the {role}")
    _check_kept(role, given)
    if content is None and "tool_calls" in given:
        content = []
    return Message(role, tuple(_parts(content)), given)


def _check_kept(role: str, given: Mapping[str, Any]) -> None:
    """Refuse calls and names of another form; what is in a call beside its id is the template's business."""
    for key in ("tool_call_id", "name", "reasoning_content"):
        if not isinstance(given.get(key, ""), str):
            raise ConfigError(f"a message of the {role} has {key} {str(given[key])[:80]!r}; expected a string")
    calls = given.get("tool_calls", ())
    if not isinstance(calls, list | tuple) or any(as_mapping(call) is None for call in calls):
        raise ConfigError(f"tool_calls is {str(calls)[:80]!r}; expected a list of calls, each with a function")


def _parts(content: Any) -> list[Part]:
    # Gradio's chats hold a file as a tuple that begins with its path, or as a mapping.
    file = isinstance(content, tuple) and content and isinstance(content[0], str | os.PathLike)
    if isinstance(content, str) or file or as_mapping(content) is not None:
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ConfigError(f"message content is {type(content).__name__}; expected a string or a list of parts")
    return [read_part(part) for part in content]


def _calls(message: Message) -> Iterator[Any]:
    """Ids and names of the calls that a message makes."""
    for call in message.kept.get("tool_calls", ()):
        call = as_mapping(call) or {}
        named = call.get("id"), (as_mapping(call.get("function")) or call).get("name")
        yield from (name for name in named if isinstance(name, str))
