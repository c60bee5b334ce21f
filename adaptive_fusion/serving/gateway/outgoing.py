"""Messages of this library's callers as a chat request in OpenAI's form, with every medium as the bytes that it was.

Files and bytes go out as they are; pictures in memory as PNG, frames as MP4. Knows messages, media and data URLs. Must
not know plans or HTTP.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.execution.messages import Message
from adaptive_fusion.execution.parts import MediumPart, TextPart
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.inline import data_url_bytes, is_data_url
from adaptive_fusion.media.load import load_media, read_header
from adaptive_fusion.serving.gateway.clips import encoded, unavailable
from adaptive_fusion.serving.gateway.sizing import as_data_url

_TAKEN = ("detail",)


def chat_body(model: str, messages: Sequence[Message], fields: Mapping[str, Any]) -> bytes:
    """The body of a chat request.

    Args:
        model: Its name upstream.
        messages: As `conversation` reads them.
        fields: Everything else, in OpenAI's words.

    Raises:
        ConfigError: For an option of a medium that cannot be said upstream, or a field that is no JSON.
        MediaError: For a medium that cannot be had.
    """
    if taken := sorted({"model", "messages"} & fields.keys()):
        raise ConfigError(f"{taken[0]} is given beside the messages; expected it once")
    said = [{"role": each.role, **each.kept, "content": _content(each)} for each in messages]
    try:
        return json.dumps({"model": model, "messages": said, **fields}).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a field is no JSON ({error}); expected fields of the engine's API") from error


def _content(message: Message) -> Any:
    if all(isinstance(part, TextPart) for part in message.parts):
        texts = [part.text for part in message.parts if isinstance(part, TextPart)]
        return "\n".join(texts) if texts else None
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else _part(part)
        for part in message.parts
        if not (isinstance(part, TextPart) and not part.text)
    ]


def _part(part: MediumPart) -> dict[str, Any]:
    if strange := sorted(part.options.keys() - set(_TAKEN)):
        raise ConfigError(f"{strange[0]} cannot be asked of a model behind an address; expected {', '.join(_TAKEN)}")
    data, kind = _encoded(part.source)
    key, label = ("video_url", "data:video/mp4") if kind == "video" else ("image_url", "")
    return {"type": key, key: {"url": as_data_url(data, label), **part.options}}


def _encoded(source: Any) -> tuple[bytes, str]:
    """A medium's bytes, as they are where it has some, and whether it is an image or a video."""
    if isinstance(source, str) and is_data_url(source):
        source = data_url_bytes(source)
    elif isinstance(source, str | os.PathLike):
        source = _file(Path(source))
    if isinstance(source, bytes):
        return source, read_header(source).kind
    medium = load_media(source)
    if isinstance(medium, Video):
        if (why := unavailable()) is not None:
            raise MediaError(f"frames cannot be sent as a clip: {why}")
        return encoded(medium).data, "video"
    out = io.BytesIO()
    medium.save(out, "PNG", compress_level=1)
    return out.getvalue(), "image"


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no valid path"
        raise MediaError(f"{path.name} cannot be read ({reason}); give the path of an image or video") from error
