"""The parts of a chat message, in the forms in which people have them, read as text or as a medium with its options.

Knows the names that transformers, qwen-vl-utils, OpenAI's API and Gradio give to parts and to their options. Every key
is used or refused by name: what a caller asked is never dropped. Loads nothing; must not know of models or policies.

Pixel options hold for one image, or for each frame of one clip, and stand in place of the processor's own limits; an
operating point's pixel budget caps them. `detail` is OpenAI's: ``low`` is at most 512 x 512 pixels, ``high`` asks for a
decision that keeps all pixels and tokens of the request while its budget allows, ``auto`` leaves it to the policy.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from adaptive_fusion.checks import integer, number, whole_characters
from adaptive_fusion.errors import ConfigError, MediaError
from adaptive_fusion.media.inline import base64_bytes, is_data_url
from adaptive_fusion.media.pixels import DEFAULT, Limits

LOW_DETAIL_PIXELS = 512 * 512
MAX_PIXELS = int(DEFAULT.max_megapixels * 1e6)
"""Most pixels that a part may ask for."""
MAX_FRAMES = 768
"""Most frames that a part may ask for, and taken of a file for which `fps` is given; qwen-vl-utils has the same."""

FRAMES = ("fps", "nframes", "min_frames", "max_frames")
LIMITS = ("min_pixels", "max_pixels", "detail")
RESIZED = ("resized_height", "resized_width")
OF_IMAGES, OF_CLIPS = (*LIMITS, *RESIZED), (*FRAMES, *LIMITS)
TEXT_TYPES = ("text", "input_text", "output_text")
Kind = Literal["image", "video", "media"]

_SOURCES: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "image": ("image", ("image", "path", "url", "base64", "image_url")),
    "image_url": ("image", ("image_url",)),
    "input_image": ("image", ("image_url",)),
    "video": ("video", ("video", "path", "url", "base64", "video_url")),
    "video_url": ("video", ("video_url",)),
    "media": ("media", ("media", "path")),
    "file": ("media", ("file", "path")),
}
"""By type of part: the kind it is called, and the keys under which its medium may stand."""
_UNTYPED = {key: key for key in ("image", "image_url", "video", "video_url", "file")} | {"path": "file"}
"""The type of a part that names none, by the key of its medium."""
_ABOUT_FILE = frozenset({"orig_name", "mime_type", "size", "is_stream", "meta", "url", "filename"})
"""What Gradio and OpenAI write beside a file's path or data. They describe that file and ask for nothing."""


@dataclass(frozen=True)
class TextPart:
    """What is said."""

    text: str


@dataclass(frozen=True)
class MediumPart:
    """An image or clip that is shown.

    Attributes:
        kind: What the message calls it; ``media`` where it does not say.
        source: As `load_media` takes it.
        options: Those of `OF_IMAGES` and `OF_CLIPS` that were given, checked.
    """

    kind: Kind
    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """How a clip is sampled. `fps` is the sampling rate of a file and the rate at which bare frames were taken."""
        asked, chosen = self.options, DEFAULT
        if not asked.keys() & set(FRAMES):
            return chosen
        most = asked.get("max_frames")
        if most is None:
            encoded = isinstance(self.source, str | bytes | os.PathLike)
            most = MAX_FRAMES if "fps" in asked and encoded else max(chosen.max_frames, asked.get("min_frames", 0))
        least = min(asked.get("min_frames", chosen.min_frames), most)
        if "nframes" in asked:
            least = most = asked["nframes"]
        return replace(chosen, video_fps=asked.get("fps", chosen.video_fps), min_frames=least, max_frames=most)


Part = TextPart | MediumPart


def read_part(part: Any) -> Part:
    """One element of a message's content: a string, a mapping with a type, or what Gradio has for a file.

    Raises:
        ConfigError: For an unknown type, key or value, with what is accepted.
        MediaError: For an address, which is never fetched, or broken base64.
    """
    if isinstance(part, str):
        return TextPart(whole_characters(part, "a text part"))
    if isinstance(part, tuple):
        return _gradio_tuple(part)
    part = as_mapping(part)
    if part is None:
        raise ConfigError("message part is of no known type; expected a string or a mapping with a type")
    given = {key: value for key, value in part.items() if not says_nothing(value)}
    kind = given.pop("type", None)
    if kind is None:
        kind = next((_UNTYPED.get(key, key) for key in (*_UNTYPED, "text") if key in given), None)
    if kind in TEXT_TYPES:
        return _text(kind, given)
    if not isinstance(kind, str) or kind not in _SOURCES:
        raise ConfigError(
            f"message part is {kind!r} with the keys {_listed(given)}; expected a type of "
            f"{', '.join((*TEXT_TYPES, *_SOURCES))}"
        )
    return _medium(kind, given)


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """A mapping, or an object of pydantic's as one (what OpenAI's client returns); else None."""
    if isinstance(value, Mapping):
        return value
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) and not isinstance(value, type) else None


def says_nothing(value: Any) -> bool:
    """Whether a key's value is one that clients write for "not given": None, or an empty list of things."""
    return value is None or (isinstance(value, list | tuple) and not value)


def _text(kind: str, given: dict[str, Any]) -> TextPart:
    text = given.pop("text", None)
    if not isinstance(text, str):
        raise ConfigError(f"a {kind} part has text {text!r}; expected a string")
    if given:
        raise ConfigError(f"a {kind} part has {_listed(given)}; expected nothing beside its text")
    return TextPart(whole_characters(text, f"a {kind} part"))


def _gradio_tuple(part: tuple[Any, ...]) -> MediumPart:
    """Gradio's ``(path,)`` or ``(path, alternative text)``."""
    if len(part) in (1, 2) and isinstance(part[0], str | os.PathLike):
        if len(part) == 2 and part[1] is not None:
            raise ConfigError(f"a file's alternative text is {part[1]!r}; expected None: say it in a text part")
        return MediumPart("media", part[0])
    raise ConfigError(
        f"message part is a tuple of {len(part)}; expected the path of a file as its first and only entry"
    )


def _medium(kind: str, given: dict[str, Any]) -> MediumPart:
    called, keys = _SOURCES[kind]
    named = [key for key in keys if key in given]
    if len(named) != 1:
        raise ConfigError(
            f"a {kind} part has {_listed(given)}; expected its medium under one of {', '.join(keys)}, and only one"
        )
    source = _source(named[0], given.pop(named[0]), given)
    allowed = {"image": OF_IMAGES, "video": OF_CLIPS, "media": (*OF_CLIPS, *RESIZED)}[called]
    for key in given:
        if key not in allowed:
            raise ConfigError(
                f"a {kind} part has {key} {_short(given[key])}; accepted beside its medium are {', '.join(allowed)}"
            )
    return MediumPart(called, source, _checked(kind, given))


def _source(key: str, value: Any, beside: dict[str, Any]) -> Any:
    """The medium under `key`; what an API nests with it is moved to `beside`."""
    if key in ("image_url", "video_url", "file") and (nested := as_mapping(value)) is not None:
        rest = {name: entry for name, entry in nested.items() if not says_nothing(entry)}
        inner = next((name for name in ("path", "file_data", "url") if name in rest), None)
        if key == "file" and inner in ("path", "file_data"):
            rest = {name: entry for name, entry in rest.items() if name not in _ABOUT_FILE}
        if inner is None or rest.keys() & beside.keys():
            raise ConfigError(f"{key} has {_listed(rest)}; expected a url, or a file's path or file_data")
        value = rest.pop(inner)
        beside |= rest
        key = "path" if inner == "path" else "url"
    elif key == "path" and isinstance(value, str | os.PathLike):
        for name in _ABOUT_FILE & beside.keys():
            del beside[name]
    if key == "base64":
        if not isinstance(value, str):
            raise ConfigError(f"base64 is {type(value).__name__}; expected a string")
        return value if is_data_url(value) else base64_bytes(value)
    if key in ("url", "image_url", "video_url") and not (isinstance(value, str) and is_data_url(value)):
        raise MediaError(
            f"{key} is {_short(value)}; addresses are never fetched: expected a data: URL, or a file under path"
        )
    if isinstance(value, list | tuple) and any(isinstance(frame, str | bytes | os.PathLike) for frame in value):
        return FrameFiles(value)
    return value


class FrameFiles(list[Any]):
    """Frames of one clip as files: decoded when they are taken, so that only those that are kept are ever held."""

    def __getitem__(self, index: Any) -> Any:
        from adaptive_fusion.media.load import load_media

        frame = super().__getitem__(index)
        return load_media(frame) if isinstance(frame, str | bytes | os.PathLike) else frame


def _checked(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a part, each in range and none against another."""
    what = f"a {kind} part's "
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key == "detail":
            if value not in ("low", "high", "auto"):
                raise ConfigError(f"{what}detail is {value!r}; expected low, high or auto")
            options |= {key: value} if value != "auto" else {}
        elif key == "fps":
            options[key] = number(value, what + key, 0.01, 1000)
        elif key in FRAMES:
            options[key] = integer(value, what + key, 2, MAX_FRAMES)
        else:
            options[key] = integer(value, what + key, 1, MAX_PIXELS)
    _together(what, options)
    return options


def _together(what: str, options: Mapping[str, Any]) -> None:
    height, width = options.get("resized_height"), options.get("resized_width")
    if (height is None) != (width is None):
        raise ConfigError(f"{what}resized_height is {height} and resized_width {width}; expected both or neither")
    sides = [side for side in (height, width) if side is not None]
    if sides and (math.prod(sides) > MAX_PIXELS or max(sides) > DEFAULT.max_aspect * min(sides)):
        raise ConfigError(
            f"{what}resized size is {height} x {width}; expected at most {MAX_PIXELS} pixels and an aspect of at "
            f"most {DEFAULT.max_aspect:g}:1"
        )
    ways = [
        [key for key in ("min_pixels", "max_pixels") if key in options],
        ["resized_height"] if sides else [],
        ["detail"] if options.get("detail") == "low" else [],
    ]
    if sum(map(bool, ways)) > 1:
        given = ", ".join(f"{key} {options[key]}" for way in ways for key in way)
        raise ConfigError(f"{what}size is given more than once ({given}); expected one of them")
    for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
        if low in options and high in options and options[low] > options[high]:
            raise ConfigError(f"{what}{low} is {options[low]} and {high} {options[high]}; expected {low} <= {high}")
    if "nframes" in options and (others := [key for key in FRAMES if key in options and key != "nframes"]):
        raise ConfigError(f"{what}nframes is {options['nframes']} beside {', '.join(others)}; expected it alone")


def _listed(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in given.items()) or "nothing"


def _short(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return shown if len(shown) <= 80 else f"{shown[:76]}..."
