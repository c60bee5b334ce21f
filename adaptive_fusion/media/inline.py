"""Media written out in a text: ``data:`` URLs (RFC 2397) and plain base64, within a size.

Knows texts and bytes. What the bytes are is told by themselves, never by the label of the URL, so the label is not
read. Line breaks and escaped characters (``%2B``) are read as what they stand for: programs that write base64 put them
in. Must not know of formats, messages or models.
"""

import base64
import binascii
import re

from adaptive_fusion.errors import MediaError

MAX_INLINE_BYTES = 64 << 20
"""Most bytes that a text may stand for; an 8K photograph takes about 20 MiB as JPEG."""
_SHOWN = 60
_DATA_URL = re.compile(r"\s*data:(?P<label>[^,]*),", re.IGNORECASE)
_LINE_BREAKS = str.maketrans("", "", " \t\r\n")
_IN_BASE64 = re.compile(r"; *base64$", re.IGNORECASE)
_ESCAPES = {"%2B": "+", "%2F": "/", "%3D": "="}
_ESCAPED = re.compile("|".join(_ESCAPES), re.IGNORECASE)


def is_data_url(text: str) -> bool:
    """Whether `text` is a ``data:`` URL, well formed or not."""
    return text[:_SHOWN].lstrip()[:5].lower() == "data:"


def characters_for(size: int) -> int:
    """How many characters of base64 stand for `size` bytes."""
    return -(-size // 3) * 4


def data_url_bytes(text: str, most: int = MAX_INLINE_BYTES) -> bytes:
    """The bytes of ``data:[<media type>];base64,<data>``.

    Raises:
        MediaError: For another encoding than base64, broken base64 or more than `most` bytes.
    """
    found = _DATA_URL.match(text)
    if found is None or not _IN_BASE64.search(found["label"]):
        raise MediaError(f"{text[:_SHOWN]!r} is not a data URL in base64; expected data:image/png;base64,...")
    data = text[found.end() :]
    if "%" in data[: characters_for(most)]:
        data = _ESCAPED.sub(lambda escape: _ESCAPES[escape.group().upper()], data)
    return base64_bytes(data, "a data URL", most)


def base64_bytes(text: str, what: str = "base64", most: int = MAX_INLINE_BYTES) -> bytes:
    """The bytes that `text` stands for in the standard alphabet with padding; line breaks and spaces mean nothing.

    Args:
        text: The characters.
        what: Names the text in messages.
        most: Bytes that it may stand for.

    Raises:
        MediaError: For other characters, wrong padding, nothing, or more than `most` bytes.
    """
    if len(text) > characters_for(most):
        raise MediaError(
            f"{what} has {len(text)} characters; at most {characters_for(most)} ({most / (1 << 20):g} MiB) are read"
        )
    try:
        data = base64.b64decode(text.translate(_LINE_BREAKS), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(
            f"{what} is not valid base64 ({error}): {text[:_SHOWN]!r}; expected A-Z a-z 0-9 + / ="
        ) from error
    if not data:
        raise MediaError(f"{what} is empty; expected an encoded image or video")
    return data
