"""Media of chat messages made safe before any work is done for them: nothing is a path, nothing is too large.

Messages come in OpenAI's form and leave in that of the core (``docs/messages.md``) with every medium as encoded bytes:
``data:`` URLs are decoded, addresses on the operator's list fetched. Each message is built anew, key by key, so that
no text can reach the core in a place where it takes paths. How bytes are come by is in
`media_bytes`.

Knows messages and limits. Must not know HTTP servers, runners or models. Errors name the place in the messages, and no
path or address.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anyio

from adaptive_fusion.checks import is_number
from adaptive_fusion.errors import ConfigError, MediaError, MediaRefused
from adaptive_fusion.execution.parts import OF_CLIPS, OF_IMAGES, as_mapping, read_part, says_nothing
from adaptive_fusion.media.inline import characters_for, is_data_url
from adaptive_fusion.serving.fetcher import Fetcher, allowed_origins, read_address
from adaptive_fusion.serving.media_bytes import (
    LABEL_CHARACTERS,
    Gates,
    Medium,
    Tally,
    at,
    check_pixels,
    fetcher_of,
    gates_of,
    take,
)
from adaptive_fusion.serving.media_limits import MediaLimits

_KINDS: dict[str, Literal["image", "video"]] = {"image_url": "image", "video_url": "video"}
_LONGEST_OPTION = 64
_LARGEST_OPTION = 1e15


async def check_media(
    messages: Sequence[Mapping[str, Any]], limits: MediaLimits, *, fetcher: Fetcher | None = None
) -> list[dict[str, Any]]:
    """Messages with their media as bytes, within limits.

    Args:
        messages: As OpenAI's API has them: content is a string or a list of parts of the types ``text``, ``image_url``
            and ``video_url``, a medium's URL plain or under ``url``. The options of ``docs/messages.md`` may stand
            beside it. Other keys of a message are left to the core.
        limits: What is let in.
        fetcher: Gets media from addresses; None makes one of the limits.

    Returns:
        New messages for `AdaptiveRunner.chat`; media are ``bytes`` under ``image`` or ``video``.

    Raises:
        MediaRefused: For a medium that is not let in, with the reason.
        ConfigError: For messages, parts or options of another form.
    """
    request = Tally(limits)
    checked = [_message(f"messages[{index}]", message, request) for index, message in enumerate(messages)]
    gates = gates_of(limits)
    if fetcher is None and any(medium.address for medium in request.media):
        fetcher = fetcher_of(limits)
    if len(request.media) == 1:
        await take(request.media[0], request, gates, fetcher)
    elif request.media:
        await _take_all(request, gates, fetcher)
    check_pixels(request)
    return checked


async def _take_all(request: Tally, gates: Gates, fetcher: Fetcher | None) -> None:
    """Take media side by side; the first that is refused ends it."""
    try:
        async with anyio.create_task_group() as tasks:
            for medium in request.media:
                tasks.start_soon(take, medium, request, gates, fetcher)
    except BaseExceptionGroup as failed:
        own = [error for error in failed.exceptions if isinstance(error, MediaError | ConfigError)]
        if own and len(own) == len(failed.exceptions):
            raise own[0] from None
        raise


def _message(where: str, message: Any, request: Tally) -> dict[str, Any]:
    """A message with its content built anew; what it shows is added to the request."""
    given = _object(message)
    if given is None:
        raise ConfigError(f"{where} is {type(message).__name__}; expected an object with role and content")
    content = given.get("content")
    rest = {key: value for key, value in given.items() if key != "content"}
    if "content" not in given or content is None:
        return rest
    if isinstance(content, str):
        return {**rest, "content": content}
    if not isinstance(content, list):
        raise ConfigError(f"{where}.content is {type(content).__name__}; expected a string or a list of parts")
    request.parts += len(content)
    if request.parts > request.limits.max_parts:
        raise ConfigError(f"the messages have more than {request.limits.max_parts} parts, the most that are taken")
    return {**rest, "content": [_part(f"{where}.content[{n}]", part, request) for n, part in enumerate(content)]}


def _part(where: str, part: Any, request: Tally) -> dict[str, Any]:
    """A text as it is, or a medium without its bytes, which is added to the request."""
    given = {"type": "text", "text": part} if isinstance(part, str) else _object(part)
    if given is None:
        raise ConfigError(f"{where} is {type(part).__name__}; expected an object with a type")
    given = {key: value for key, value in given.items() if not says_nothing(value)}
    kind = given.get("type")
    if kind == "text":
        with at(where):
            if not isinstance(given.get("text"), str):
                raise ConfigError(f"text is {type(given.get('text')).__name__}; expected a string")
            if strange := sorted(given.keys() - {"type", "text"}):
                raise ConfigError(f"a text part has {_named(strange)}; expected nothing beside its text")
            read_part(given)
        return given
    if not isinstance(kind, str) or kind not in _KINDS:
        shown = repr(kind[:_LONGEST_OPTION]) if isinstance(kind, str) else type(kind).__name__
        raise ConfigError(f"{where}.type is {shown}; expected {', '.join(('text', *_KINDS))}")
    if len(request.media) >= request.limits.max_media:
        raise MediaRefused(f"the request has more than {request.limits.max_media} images and clips", "count")
    with at(where):
        medium = _medium(where, kind, given, request)
    request.media.append(medium)
    return medium.part


def _medium(where: str, key: str, given: Mapping[str, Any], request: Tally) -> Medium:
    """What a part shows, its options checked and its source looked at but not yet taken."""
    source, beside = given.get(key), {name: value for name, value in given.items() if name not in ("type", key)}
    if (nested := _object(source)) is not None:
        inner = {name: value for name, value in nested.items() if not says_nothing(value)}
        source = inner.pop("url", None)
        if twice := sorted(map(str, inner.keys() & beside.keys())):
            raise ConfigError(f"{_named(twice)} stands beside {key} and inside it; expected it once")
        beside |= inner
    if not isinstance(source, str):
        raise ConfigError(f"{key} is {type(source).__name__}; expected a URL, or an object with one under url")
    kind = _KINDS[key]
    part: dict[str, Any] = {"type": kind, kind: b"", **_options(key, beside)}
    read_part({**part, kind: b"?"})
    limits = request.limits
    if not is_data_url(source):
        return Medium(where, part, kind, "", read_address(source, allowed_origins(limits.allowed_domains)))
    longest = characters_for(limits.max_medium_bytes) + LABEL_CHARACTERS
    if len(source) > longest:
        raise MediaRefused(
            f"the data URL has {len(source)} characters; at most {longest} are read "
            f"({limits.max_medium_bytes / (1 << 20):g} MiB)",
            "size",
        )
    request.claim(len(source))
    return Medium(where, part, kind, source, None)


def _options(key: str, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a part: known names with plain, short values; the core checks what they mean."""
    allowed = OF_IMAGES if _KINDS[key] == "image" else OF_CLIPS
    for name, value in beside.items():
        if name not in allowed:
            raise ConfigError(f"{_named([name])} is not known beside {key}; accepted are {', '.join(allowed)}")
        short = isinstance(value, str) and len(value) <= _LONGEST_OPTION
        if not (short or isinstance(value, bool) or (is_number(value) and abs(value) <= _LARGEST_OPTION)):
            raise ConfigError(f"{name} is {type(value).__name__}; expected a plain value of ordinary size")
    return dict(beside)


def _object(value: Any) -> Mapping[str, Any] | None:
    """A mapping as JSON has it, whose keys are texts; else None."""
    found = as_mapping(value)
    return found if found is not None and all(isinstance(key, str) for key in found) else None


def _named(keys: Sequence[str]) -> str:
    return ", ".join(repr(key[:_LONGEST_OPTION]) for key in keys[:8])
