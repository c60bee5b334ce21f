"""Media of chat messages made safe before any work is done for them: nothing is a path, nothing is too large.

Messages come in OpenAI's form and leave in that of the core (``docs/messages.md``) with every medium as encoded bytes:
``data:`` URLs are decoded, addresses on the operator's list fetched. Each message is built anew, key by key, so that
no text can reach the core in a place where it takes paths. Counts and sizes are checked on the texts, then on bytes,
then on headers, each before the next costs anything; decoding runs beside the event loop, only so much at a time.

Knows messages and limits. Must not know HTTP servers, runners or models. Errors name the place in the messages, and no
path or address.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread

from adaptive_fusion.checks import integer, is_number, number
from adaptive_fusion.errors import ConfigError, MediaError, MediaRefused
from adaptive_fusion.execution.parts import OF_CLIPS, OF_IMAGES, MediumPart, as_mapping, read_part, says_nothing
from adaptive_fusion.media.inline import MAX_INLINE_BYTES, characters_for, data_url_bytes, is_data_url
from adaptive_fusion.media.load import Header, read_header
from adaptive_fusion.media.pixels import DEFAULT, fit
from adaptive_fusion.serving.fetcher import Address, Fetcher, allowed_origins, read_address

REASONS = ("address", "count", "encoding", "fetch", "header", "pixels", "size")
"""Why a medium is refused: the `reason` of `MediaRefused`."""
_KINDS: dict[str, Literal["image", "video"]] = {"image_url": "image", "video_url": "video"}
_LONGEST_OPTION = 64
_LARGEST_OPTION = 1e15
_LABEL_CHARACTERS = 256
_LABELS_CHARACTERS = 1 << 14
"""Left for what stands before the data, in one data URL and in all of a request."""


@dataclass(frozen=True)
class MediaLimits:
    """What the media of one request may be, and where they may come from.

    Args:
        max_parts: Parts of all messages together, texts included.
        max_media: Images and clips among them.
        max_medium_bytes: Of one medium, encoded.
        max_request_bytes: Of all media of a request, encoded.
        max_megapixels: Of a picture or a frame, in 10^6 pixels, by its header.
        max_request_megapixels: Of all pictures and of all frames that clips may be sampled to, in 10^6 pixels as they
            are held in memory.
        allowed_domains: Hosts that media are fetched from over https: whole names or IP addresses, with a port where
            it is not 443. None by default.
        fetch_timeout_s: For all of one fetch.
        max_fetches: Fetches at a time, of all requests.
        max_decoders: Media that are decoded at a time, of all requests.

    Raises:
        ConfigError: For a value out of range.
    """

    max_parts: int = 1024
    max_media: int = 32
    max_medium_bytes: int = 32 << 20
    max_request_bytes: int = 64 << 20
    max_megapixels: float = DEFAULT.max_megapixels
    max_request_megapixels: float = 256.0
    allowed_domains: tuple[str, ...] = ()
    fetch_timeout_s: float = 5.0
    max_fetches: int = 16
    max_decoders: int = 2

    def __post_init__(self) -> None:
        for name in ("max_parts", "max_media", "max_fetches", "max_decoders"):
            integer(getattr(self, name), f"MediaLimits.{name}", 1, 1 << 20)
        for name in ("max_medium_bytes", "max_request_bytes"):
            integer(getattr(self, name), f"MediaLimits.{name}", 1, MAX_INLINE_BYTES)
        number(self.max_megapixels, "MediaLimits.max_megapixels", above=0, high=DEFAULT.max_megapixels)
        number(self.max_request_megapixels, "MediaLimits.max_request_megapixels", above=0)
        number(self.fetch_timeout_s, "MediaLimits.fetch_timeout_s", above=0, high=600)
        allowed_origins(self.allowed_domains)
        object.__setattr__(self, "allowed_domains", tuple(self.allowed_domains))  # a list would not be hashable


@dataclass
class _Medium:
    """One medium on its way: where it stands in the request, what it is to be and where it comes from."""

    where: str
    part: dict[str, Any]
    kind: Literal["image", "video"]
    text: str
    address: Address | None
    header: Header | None = None


@dataclass
class _Request:
    """What was found in the messages, and what is left of the limits."""

    limits: MediaLimits
    parts: int = 0
    characters: int = 0
    size: int = 0
    media: list[_Medium] = field(default_factory=list)

    def claim(self, characters: int) -> None:
        """Take note of a data URL that is not decoded yet."""
        self.characters += characters
        self._check(self.characters <= characters_for(self.limits.max_request_bytes) + _LABELS_CHARACTERS)

    def spend(self, size: int) -> None:
        """Take note of bytes of a medium."""
        self.size += size
        self._check(self.size <= self.limits.max_request_bytes)

    def _check(self, kept: bool) -> None:
        if not kept:
            most = self.limits.max_request_bytes / (1 << 20)
            raise MediaRefused(f"the media of the request are larger than {most:g} MiB in all", "size")


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
    request = _Request(limits)
    checked = [_message(f"messages[{index}]", message, request) for index, message in enumerate(messages)]
    gates = _gates(limits)
    if fetcher is None and any(medium.address for medium in request.media):
        fetcher = _fetcher(limits)
    try:
        async with anyio.create_task_group() as tasks:
            for medium in request.media:
                tasks.start_soon(_get, medium, request, gates, fetcher)
    except BaseExceptionGroup as failed:
        own = [error for error in failed.exceptions if isinstance(error, MediaError | ConfigError)]
        if own and len(own) == len(failed.exceptions):
            raise own[0] from None
        raise
    _check_pixels(request)
    return checked


def _message(where: str, message: Any, request: _Request) -> dict[str, Any]:
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


def _part(where: str, part: Any, request: _Request) -> dict[str, Any]:
    """A text as it is, or a medium without its bytes, which is added to the request."""
    given = {"type": "text", "text": part} if isinstance(part, str) else _object(part)
    if given is None:
        raise ConfigError(f"{where} is {type(part).__name__}; expected an object with a type")
    given = {key: value for key, value in given.items() if not says_nothing(value)}
    kind = given.get("type")
    if kind == "text":
        with _at(where):
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
    with _at(where):
        medium = _medium(where, kind, given, request)
    request.media.append(medium)
    return medium.part


def _medium(where: str, key: str, given: Mapping[str, Any], request: _Request) -> _Medium:
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
        return _Medium(where, part, kind, "", read_address(source, allowed_origins(limits.allowed_domains)))
    longest = characters_for(limits.max_medium_bytes) + _LABEL_CHARACTERS
    if len(source) > longest:
        raise MediaRefused(
            f"the data URL has {len(source)} characters; at most {longest} are read "
            f"({limits.max_medium_bytes / (1 << 20):g} MiB)",
            "size",
        )
    request.claim(len(source))
    return _Medium(where, part, kind, source, None)


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


async def _get(medium: _Medium, request: _Request, gates: "_Gates", fetcher: Fetcher | None) -> None:
    """Put a medium's bytes into its part, and its header beside it."""
    limits = request.limits
    with _at(medium.where):
        data = b""
        if medium.address is not None:
            assert fetcher is not None
            async with gates.fetches:
                data = await fetcher.fetch(medium.address, limits.max_medium_bytes, request.spend)
        data, medium.header = await anyio.to_thread.run_sync(_read, medium, data, limits, limiter=gates.decoders)
        if medium.address is None:
            request.spend(len(data))
        medium.part[medium.kind], medium.text = data, ""


def _read(medium: _Medium, data: bytes, limits: MediaLimits) -> tuple[bytes, Header]:
    """Bytes and header of a medium; what was not fetched is decoded from its text."""
    if medium.address is None:
        with _because("encoding"):
            data = data_url_bytes(medium.text, limits.max_medium_bytes)
    with _because("header"):
        return data, read_header(data, limits=replace(DEFAULT, max_megapixels=limits.max_megapixels))


def _check_pixels(request: _Request) -> None:
    """Refuse media that are too much when they are decoded all at once, as a model sees them."""
    megapixels = 0.0
    for medium in request.media:
        assert medium.header is not None
        kind, width, height = medium.header
        frames = 1
        if kind == "video":
            sampled = read_part(medium.part)
            assert isinstance(sampled, MediumPart)
            frames = sampled.limits.max_frames
            width, height = fit(width, height, sampled.limits.max_side)
        megapixels += frames * width * height / 1e6
        if megapixels > request.limits.max_request_megapixels:
            raise MediaRefused(
                f"{medium.where}: the media of the request have more than {request.limits.max_request_megapixels:g} "
                "megapixels in all, counting the frames that clips may be sampled to; send fewer or smaller ones, or "
                "ask for fewer frames (nframes)",
                "pixels",
            )


def _object(value: Any) -> Mapping[str, Any] | None:
    """A mapping as JSON has it, whose keys are texts; else None."""
    found = as_mapping(value)
    return found if found is not None and all(isinstance(key, str) for key in found) else None


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say in errors where in the messages they arose."""
    try:
        yield
    except MediaRefused as error:
        raise MediaRefused(f"{where}: {error}", error.reason) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


@contextmanager
def _because(reason: str) -> Iterator[None]:
    """Give errors of the core about a medium a reason."""
    try:
        yield
    except MediaError as error:
        raise MediaRefused(str(error), reason) from error


def _named(keys: Sequence[str]) -> str:
    return ", ".join(repr(key[:_LONGEST_OPTION]) for key in keys[:8])


@dataclass(frozen=True)
class _Gates:
    """How much happens at a time, of all requests of an event loop."""

    fetches: anyio.CapacityLimiter
    decoders: anyio.CapacityLimiter


_GATES: anyio.lowlevel.RunVar[dict[tuple[int, int], _Gates]] = anyio.lowlevel.RunVar("adaptive_fusion_media_gates")


def _gates(limits: MediaLimits) -> _Gates:
    try:
        known = _GATES.get()
    except LookupError:
        _GATES.set(known := {})
    key = limits.max_fetches, limits.max_decoders
    if key not in known:
        known[key] = _Gates(*map(anyio.CapacityLimiter, key))
    return known[key]


@lru_cache(maxsize=8)
def _fetcher(limits: MediaLimits) -> Fetcher:
    return Fetcher(allowed_origins(limits.allowed_domains), timeout_s=limits.fetch_timeout_s)
