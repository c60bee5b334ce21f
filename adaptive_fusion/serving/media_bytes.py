"""Media on their way from a text to bytes: data URLs decoded, addresses fetched, headers read, sizes added up.

Counts and sizes are checked on the texts, then on bytes, then on headers, each before the next costs anything; decoding
runs beside the event loop, only so much at a time. Knows media and limits. Must not know the form of messages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread

from adaptive_fusion.errors import ConfigError, MediaError, MediaRefused
from adaptive_fusion.execution.parts import MediumPart, read_part
from adaptive_fusion.media.inline import characters_for, data_url_bytes
from adaptive_fusion.media.load import Header, read_header
from adaptive_fusion.media.pixels import DEFAULT, fit
from adaptive_fusion.serving.fetcher import Address, Fetcher, allowed_origins
from adaptive_fusion.serving.media_limits import MediaLimits

REASONS = ("address", "count", "encoding", "fetch", "header", "pixels", "size")
"""Why a medium is refused: the `reason` of `MediaRefused`."""
_SMALL = 64 << 10
_STILL = (b"\x89PNG", b"\xff\xd8\xff")
"""Media that are read on the event loop: so few characters, and of a form whose header is found at once."""
LABEL_CHARACTERS = 256
_LABELS_CHARACTERS = 1 << 14
"""Left for what stands before the data, in one data URL and in all of a request."""


@dataclass
class Medium:
    """One medium on its way: where it stands in the request, what it is to be and where it comes from."""

    where: str
    part: dict[str, Any]
    kind: Literal["image", "video"]
    text: str
    address: Address | None
    header: Header | None = None


@dataclass
class Tally:
    """What was found in the messages, and what is left of the limits."""

    limits: MediaLimits
    parts: int = 0
    characters: int = 0
    size: int = 0
    media: list[Medium] = field(default_factory=list)

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


@dataclass(frozen=True)
class Gates:
    """How much happens at a time, of all requests of an event loop."""

    fetches: anyio.CapacityLimiter
    decoders: anyio.CapacityLimiter


_GATES: anyio.lowlevel.RunVar[dict[tuple[int, int], Gates]] = anyio.lowlevel.RunVar("adaptive_fusion_media_gates")


def gates_of(limits: MediaLimits) -> Gates:
    """The gates of this event loop for such limits."""
    try:
        known = _GATES.get()
    except LookupError:
        _GATES.set(known := {})
    key = limits.max_fetches, limits.max_decoders
    if key not in known:
        known[key] = Gates(*map(anyio.CapacityLimiter, key))
    return known[key]


@lru_cache(maxsize=8)
def fetcher_of(limits: MediaLimits) -> Fetcher:
    """What gets media from the addresses that the limits allow."""
    return Fetcher(allowed_origins(limits.allowed_domains), timeout_s=limits.fetch_timeout_s)


async def take(medium: Medium, request: Tally, gates: Gates, fetcher: Fetcher | None) -> None:
    """Put a medium's bytes into its part, and its header beside it."""
    limits = request.limits
    with at(medium.where):
        data = b""
        if medium.address is not None:
            assert fetcher is not None
            async with gates.fetches:
                data = await fetcher.fetch(medium.address, limits.max_medium_bytes, request.spend)
        elif len(medium.text) <= _SMALL:
            data = _decoded(medium, limits)
        if len(data) <= _SMALL and data.startswith(_STILL):
            medium.header = _header(data, limits)  # sooner done than told to a thread
        else:
            data, medium.header = await anyio.to_thread.run_sync(_read, medium, data, limits, limiter=gates.decoders)
        if medium.address is None:
            request.spend(len(data))
        medium.part[medium.kind], medium.text = data, ""


def _read(medium: Medium, data: bytes, limits: MediaLimits) -> tuple[bytes, Header]:
    """Bytes and header of a medium, of which the first may be there already."""
    if medium.address is None and not data:
        data = _decoded(medium, limits)
    return data, _header(data, limits)


def _decoded(medium: Medium, limits: MediaLimits) -> bytes:
    """The bytes in a data URL."""
    with _because("encoding"):
        return data_url_bytes(medium.text, limits.max_medium_bytes)


def _header(data: bytes, limits: MediaLimits) -> Header:
    with _because("header"):
        return read_header(data, limits=replace(DEFAULT, max_megapixels=limits.max_megapixels))


def check_pixels(request: Tally) -> None:
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


@contextmanager
def at(where: str) -> Iterator[None]:
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
