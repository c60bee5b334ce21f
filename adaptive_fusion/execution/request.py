"""A chat request: media loaded and measured, messages in the form that chat templates take.

Knows media, complexity and message parts. Must not know of policies, models or budgets. Nothing is fetched: a source
that looks like an address is refused by the media loader.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import Complexity, measure_complexity
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.hashes import content_hash
from adaptive_fusion.media.load import Media, load_media
from adaptive_fusion.media.pixels import Array
from adaptive_fusion.models.base import Size


@dataclass(frozen=True)
class ChatRequest:
    """What one chat request asks: template messages with loaded media, and what was measured on them."""

    messages: tuple[dict[str, Any], ...]
    media: tuple[Media | Array, ...]
    prompt: str
    complexities: tuple[Complexity, ...]
    content_hash: str | None

    @property
    def texts(self) -> list[str]:
        """Everything said in the conversation, in order."""
        return [part["text"] for message in self.messages for part in message["content"] if part["type"] == "text"]

    @property
    def sizes(self) -> list[Size]:
        """Sizes of the media, in order."""
        return [media_size(medium) for medium in self.media]

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


def media_size(medium: Media | Array) -> Size:
    """Frames, height and width of a loaded medium, or of an image that is still an array."""
    if isinstance(medium, Video):
        frames, height, width = medium.frames.shape[:3]
        return Size(frames, height, width, clip=True)
    if isinstance(medium, np.ndarray):
        return Size(1, *medium.shape[:2])
    return Size(1, medium.height, medium.width)


def is_messages(value: object) -> bool:
    """Whether `value` is a list of chat messages rather than media."""
    return isinstance(value, Sequence) and bool(value) and all(isinstance(v, Mapping) and "role" in v for v in value)


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


def build_request(
    media_or_messages: Any, prompt: str | None, *, hashed: bool = False, to_run: bool = True
) -> ChatRequest:
    """Load and measure everything that a request names.

    Args:
        media_or_messages: None, one medium (path, encoded bytes, PIL image, array, `Video`), a list of media (a list
            inside it is the frames of one clip), or chat messages whose content is a string or a list of parts
            ``{"type": "text", "text": ...}``, ``{"type": "image", "image": ...}``, ``{"type": "video", "video": ...}``.
        prompt: Asked after the media; with messages it becomes one more user message, or None.
        hashed: Take the media's content hash too, for a log.
        to_run: Whether the request will be run. If not, an image that is an array stays one: it is measured by its
            samples, of which alone the values are then checked (shape, size and dtype are checked always).

    Raises:
        MediaError: For a medium that cannot be used.
        ConfigError: For a message or part of an unknown form, or a request without media and prompt.
    """
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError(f"prompt is {type(prompt).__name__}; expected a string")
    if is_messages(media_or_messages):
        raw = [dict(message) for message in media_or_messages]
        if prompt is not None:
            raw.append({"role": "user", "content": prompt})
    else:
        sources = _as_list(media_or_messages)
        if not sources and not prompt:
            raise ConfigError("a request needs media or a prompt; got neither")
        content = [{"type": "media", "media": source} for source in sources]
        raw = [{"role": "user", "content": [*content, {"type": "text", "text": prompt or ""}]}]
    media: list[Media | Array] = []
    hashes: list[str] | None = [] if hashed else None
    texts: list[str] = []
    messages = [_message(message, media, hashes, texts, to_run) for message in raw]
    complexities = tuple(measure_complexity(m) for m in media)
    joined = "+".join(hashes) if hashes else None
    return ChatRequest(tuple(messages), tuple(media), texts[-1] if texts else "", complexities, joined)


def _as_list(media: Any) -> list[Any]:
    if media is None:
        return []
    if isinstance(media, str | bytes | Path | Image.Image | np.ndarray | Video):
        return [media]
    if isinstance(media, list | tuple):
        return list(media)
    raise ConfigError(
        f"media is {type(media).__name__}; expected a path, bytes, PIL image, array, Video, a list of these, "
        "or messages"
    )


def _message(
    message: dict[str, Any], media: list[Media | Array], hashes: list[str] | None, texts: list[str], to_run: bool
) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ConfigError(f"message role is {role!r}; expected system, user or assistant")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ConfigError(f"message content is {type(content).__name__}; expected a string or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
            if role == "user":
                texts.append(part["text"])
        elif kind in ("image", "video", "media") and part.get(kind) is not None:
            source = part[kind]
            as_it_is = not to_run and isinstance(source, np.ndarray) and source.ndim != 4
            loaded = source if as_it_is else load_media(source)
            # What it is, not what it was called: an animated image is a clip.
            found = "video" if isinstance(loaded, Video) else "image"
            media.append(loaded)
            if hashes is not None:
                hashes.append(content_hash(source))
            parts.append({"type": found, found: loaded})
        else:
            raise ConfigError(f"message part is {kind!r}; expected text, image or video with its value")
    return {"role": role, "content": parts}
