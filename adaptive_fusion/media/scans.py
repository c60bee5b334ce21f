"""What the numbers of a scan mean, where Pillow leaves that to its reader.

Pillow hands out samples of more than 8 bits as the file has them, whether zero is black or white and whatever the
largest value is, and gives a PNG's transparent colour in the file's depth, not in that of its pixels. Knows the tags
of TIFF and Pillow's records of an opened file. Must not know how pixels become RGB.
"""

import struct
from typing import Any, NamedTuple

from PIL import Image

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339
_WHITE_IS_ZERO, _BLACK_IS_ZERO = 0, 1
_UNSIGNED, _SIGNED = 1, 2
_READ_RIGHT = ("1", "L")  # modes in which Pillow turns white-is-zero itself
_GREY_STEP = {"L;2": 85, "L;4": 17}  # what a grey of 2 or 4 bits is multiplied by


class Samples(NamedTuple):
    """How the samples of an image in memory are to be read.

    `top` is the white of unsigned 16-bit samples; `dtype` the numpy type that they really have, empty for that of the
    mode; `key` the colour that is transparent, as it stands in memory, or None.
    """

    white_is_zero: bool = False
    top: int = 65535
    dtype: str = ""
    key: Any = None


def samples_of(image: Image.Image) -> Samples:
    """Read it before the image is loaded: then Pillow forgets the depth of a PNG."""
    key = image.info.get("transparency")
    tile = getattr(image, "tile", None)
    raw = tile[0][3] if tile and image.format == "PNG" else None
    if raw in _GREY_STEP and isinstance(key, int):
        key *= _GREY_STEP[raw]
    elif raw == "RGB;16B" and isinstance(key, tuple):
        key = tuple(sample >> 8 for sample in key)
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return Samples(key=key)
    bits, form = (tags.get(tag, (default,))[0] for tag, default in ((_BITS, 1), (_SAMPLE_FORMAT, _UNSIGNED)))
    dtype = "u4" if image.mode == "I" and (bits, form) == (32, _UNSIGNED) else ""
    if image.mode == "L" and form == _SIGNED:
        dtype = "i1"
    white_is_zero = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and image.mode not in _READ_RIGHT
    return Samples(white_is_zero, 4095 if bits == 12 else 65535, dtype, key)


def can_be_thinned(image: Image.Image) -> bool:
    """Whether single pixels of an image, taken out with its `info`, still mean what they meant in it."""
    return samples_of(image) == Samples(key=image.info.get("transparency"))


def black_is_zero(data: bytes) -> bytes | None:
    """A TIFF of which zero is white with its tag set to black, for Pillow, which knows few of the former.

    The samples stay as they are: whoever opens it sets the tag back (`mark_white_is_zero`). None for other files.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return None
    try:
        big = struct.unpack_from(order + "H", data, 2)[0] == 43
        at = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
        count = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
        at += 8 if big else 2
        for entry in range(at, at + min(count, 65535) * (20 if big else 12), 20 if big else 12):
            tag, value = (struct.unpack_from(order + "H", data, entry + step)[0] for step in (0, 12 if big else 8))
            if (tag, value) == (_PHOTOMETRIC, _WHITE_IS_ZERO):
                where = entry + (12 if big else 8)
                return data[:where] + struct.pack(order + "H", _BLACK_IS_ZERO) + data[where + 2 :]
    except struct.error:
        pass
    return None


def mark_white_is_zero(image: Image.Image) -> None:
    """Say of an opened TIFF that its zero is white."""
    image.tag_v2[_PHOTOMETRIC] = _WHITE_IS_ZERO  # type: ignore[attr-defined]
