"""A chat request: media loaded and measured, messages in the form that chat templates take.

Knows media and complexity; `messages` and `parts` know the forms in which requests come. Must not know of policies,
models or budgets. Nothing is fetched: an address is refused.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptive_fusion.checks import strings
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.execution.messages import Message, begun_answer, check_tools, is_messages, read_messages
from adaptive_fusion.execution.parts import (
    FRAMES,
    LIMITS,
    LOW_DETAIL_PIXELS,
    OF_CLIPS,
    OF_IMAGES,
    RESIZED,
    MediumPart,
    TextPart,
)
from adaptive_fusion.execution.turns import Turns, turns_of
from adaptive_fusion.features.complexity import Complexity, measure_complexity
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.hashes import content_hash, exact_hash
from adaptive_fusion.media.load import Media, load_media
from adaptive_fusion.media.pixels import Array
from adaptive_fusion.models.base import Size, size_of

TEMPLATE_OPTIONS = ("tools", "continue_final_message")
"""What a caller may say of the prompt beside its messages; `build_request` takes them."""


@dataclass(frozen=True)
class ChatRequest:
    """What one chat request asks: template messages with loaded media, and what was measured on them.

    Attributes:
        messages: As `Adapter.prepare` takes them: content is a list of parts, a medium's with the pixels asked for it.
        media: The loaded media, in order.
        prompt: The user's last text.
        complexities: Of the media, in order.
        content_hash: Names the media and how they are looked at; None unless it was asked for.
        tools: Descriptions for the chat template.
        continues: Whether the answer goes on with the last message.
        full_detail: Whether a part asks for all its pixels and tokens.
        tenant: Whose request it is, where one of several is to see nothing of another's.
        digests: Exact hashes of the media, in order; empty unless they were asked for.
        turns: Its place in its conversation; empty without media.
    """

    messages: tuple[dict[str, Any], ...]
    media: tuple[Media | Array, ...]
    prompt: str
    complexities: tuple[Complexity, ...]
    content_hash: str | None
    tools: tuple[Any, ...] = ()
    continues: bool = False
    full_detail: bool = False
    tenant: str = ""
    digests: tuple[str, ...] = ()
    turns: Turns = Turns()  # noqa: RUF009 (frozen)

    @property
    def texts(self) -> list[str]:
        """Everything said in the conversation, in order, then what is said about tools."""
        said = [part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"]
        beside = [{k: v for k, v in message.items() if k not in ("role", "content")} for message in self.messages]
        named = [json.dumps(tool) if isinstance(tool, Mapping) else str(tool.__doc__) for tool in self.tools]
        return [*said, *strings([entry for entry in beside if entry]), *named]

    @property
    def of_prompt(self) -> dict[str, Any]:
        """What `Adapter.prepare` has to be told beside the messages and a point; mostly nothing."""
        told: dict[str, Any] = {"tools": self.tools} if self.tools else {}
        if self.messages[-1]["role"] == "assistant" and not self.continues:
            told["continues"] = False
        return told

    @property
    def sizes(self) -> list[Size]:
        """Sizes of the media, in order, and the pixels asked for them."""
        return [size_of(part) for message in self.messages for part in message["content"] if part["type"] != "text"]

    @property
    def durations_s(self) -> list[float]:
        """Durations of the media in seconds, in order; 0 for images."""
        return [medium.duration_s if isinstance(medium, Video) else 0.0 for medium in self.media]

    @property
    def frame_times_s(self) -> list[tuple[float, ...]]:
        """Display times in seconds of the frames of the media, in order; none for images."""
        return [medium.timestamps_s if isinstance(medium, Video) else () for medium in self.media]

    @property
    def kind(self) -> str:
        """``text``, ``image``, ``video`` or ``mixed``."""
        return kind_of([complexity.kind for complexity in self.complexities])


def kind_of(kinds: Sequence[str]) -> str:
    """``text``, ``image``, ``video`` or ``mixed``, of the kinds of all media."""
    return "mixed" if len(set(kinds)) > 1 else kinds[0] if kinds else "text"


def each_request(media: Any, prompt: Any) -> list[tuple[Any, str | None]] | None:
    """Media and prompt of each of several requests: for a list of prompts the media of each in a list (None: no media
    at all), or a list of conversations. None where it is one request.

    Raises:
        ConfigError: For lists of different lengths.
    """
    if isinstance(prompt, list | tuple):
        if media is None:
            return [(None, one) for one in prompt]
        if not isinstance(media, list | tuple) or len(media) != len(prompt):
            found = f"{len(media)} media" if isinstance(media, list | tuple) else type(media).__name__
            raise ConfigError(f"there are {len(prompt)} prompts and {found}; expected a list with the media of each")
        return list(zip(media, prompt, strict=True))
    if isinstance(media, list | tuple) and media and all(is_messages(one) for one in media):
        return [(one, prompt) for one in media]
    return None


def conversation(media_or_messages: Any, prompt: str | None) -> list[Message]:
    """What `build_request` takes, as checked messages whose media are not loaded; it says what is refused."""
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError(f"prompt is {type(prompt).__name__}; expected a string")
    if is_messages(media_or_messages):
        raw = list(media_or_messages)
        if prompt is not None:
            raw.append({"role": "user", "content": prompt})
    else:
        sources = _as_list(media_or_messages)
        if not sources and not prompt:
            raise ConfigError("a request needs media or a prompt; got neither")
        content = [source if isinstance(source, Mapping) else {"type": "media", "media": source} for source in sources]
        raw = [{"role": "user", "content": [*content, {"type": "text", "text": prompt or ""}]}]
    return read_messages(raw)


def build_request(
    media_or_messages: Any,
    prompt: str | None,
    *,
    hashed: bool = False,
    to_run: bool = True,
    exact: bool = False,
    tenant: str = "",
    tools: Any = None,
    continue_final_message: bool | None = None,
) -> ChatRequest:
    """Load and measure everything that a request names.

    Args:
        media_or_messages: None, one medium (path, encoded bytes, data URL, PIL image, array, `Video`, or a part of a
            message), a list of media (a list inside it is the frames of one clip), or chat messages whose content is a
            string or a list of parts. Parts and their options are described in ``docs/messages.md``.
        prompt: Asked after the media; with messages it becomes one more user message, or None.
        hashed: Take the media's content hash too, for a log.
        to_run: Whether the request will be run. If not, an image that is an array stays one: it is measured by its
            samples, of which alone the values are then checked (shape, size and dtype are checked always).
        exact: Take the media's exact hashes too, by which to recognise them; then arrays are converted.
        tenant: Whose request it is.
        tools: Descriptions of tools for the chat template.
        continue_final_message: Whether the answer goes on with the last message; None does so if it is the assistant's.

    Raises:
        MediaError: For a medium that cannot be used, or an address.
        ConfigError: For a message, part, key or value of an unknown form, or a request without media and prompt.
    """
    messages = conversation(media_or_messages, prompt)
    continues = begun_answer(messages, continue_final_message)
    shown = [part for message in messages for part in message.media]
    media = [_load(part, to_run or exact) for part in shown]
    loaded = iter(media)
    complexities = tuple(measure_complexity(m) for m in media)
    asked = [part.text for m in messages if m.role == "user" for part in m.parts if isinstance(part, TextPart)]
    filled = tuple(_for_template(message, loaded) for message in messages)
    digests = tuple(exact_hash(m) for m in media if not isinstance(m, np.ndarray)) if exact else ()
    return ChatRequest(
        messages=filled,
        media=tuple(media),
        prompt=asked[-1] if asked else "",
        complexities=complexities,
        content_hash="+".join(map(_hash, shown)) if hashed and shown else None,
        tools=tuple(check_tools(tools) or ()),
        continues=continues,
        full_detail=any(part.options.get("detail") == "high" for part in shown),
        tenant=tenant,
        digests=digests,
        turns=turns_of(filled, digests or [content_hash(m) for m in media], tenant) if media else Turns(),
    )


def _as_list(media: Any) -> list[Any]:
    if media is None:
        return []
    if isinstance(media, str | bytes | Path | Image.Image | np.ndarray | Video | Mapping):
        return [media]
    if isinstance(media, list | tuple):
        return list(media)
    raise ConfigError(
        f"media is {type(media).__name__}; expected a path, bytes, PIL image, array, Video, a list of these, "
        "or messages"
    )


def _load(part: MediumPart, to_run: bool) -> Media | Array:
    """The medium, sampled as the part asks; options that do not apply to what it turned out to be are refused."""
    options = part.options
    timed = [key for key in FRAMES if key in options]
    if timed and isinstance(part.source, Video):
        raise ConfigError(
            f"{timed[0]} is {options[timed[0]]} for a Video, whose frames have their times; expected none"
        )
    as_it_is = not to_run and isinstance(part.source, np.ndarray) and part.source.ndim != 4
    medium = part.source if as_it_is else load_media(part.source, limits=part.limits)
    if isinstance(medium, Video):
        strange = [key for key in RESIZED if key in options]
        what = f"a clip; expected {', '.join(OF_CLIPS)}"
    else:
        strange = timed if part.kind != "video" else []
        what = f"an image; expected {', '.join(OF_IMAGES)}"
    if strange:
        raise ConfigError(f"{strange[0]} is {options[strange[0]]!r} for {what}")
    wanted = options.get("nframes", options.get("min_frames", 0))
    if isinstance(medium, Video) and len(medium.frames) < wanted:
        key = "nframes" if "nframes" in options else "min_frames"
        raise ConfigError(f"{key} is {wanted} for a clip of which {len(medium.frames)} frames can be had")
    return medium


def _for_template(message: Message, loaded: Iterator[Media | Array]) -> dict[str, Any]:
    """The message as chat templates take it; the next of the `loaded` media stands in for each that it shows."""
    parts: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
            continue
        medium = next(loaded)
        pixels = {key: part.options[key] for key in (*LIMITS, *RESIZED) if key in part.options}
        if pixels.pop("detail", None) == "low":
            pixels["most_pixels"] = LOW_DETAIL_PIXELS
        # What it is, not what it was called: an animated image is a clip.
        found = "video" if isinstance(medium, Video) else "image"
        parts.append({"type": found, found: medium, **pixels})
    return {"role": message.role, "content": parts, **message.kept}


def _hash(part: MediumPart) -> str:
    """Names the medium; one that is sampled or sized otherwise is another."""
    name = content_hash(part.source)
    looked = sorted((key, value) for key, value in part.options.items() if value != "high")
    return hashlib.sha256(f"{name} {looked}".encode()).hexdigest() if looked else name
