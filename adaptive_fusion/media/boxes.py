"""Whether a file is a movie of the MP4 and QuickTime family, by the boxes that it is made of.

Knows the outermost boxes of ISO 14496-12 and QuickTime: four bytes of size, four of type. Must not know what is inside
them, nor other formats.
"""

from typing import IO

_MEDIA = frozenset({b"moov", b"mdat", b"moof", b"styp"})
_PADDING = frozenset({b"free", b"skip", b"wide", b"uuid", b"junk", b"ediw"})
# Previews, notes, profiles, indices and events.
_BESIDE = frozenset({b"pnot", b"prfl", b"PICT", b"pict", b"udta", b"sidx", b"emsg", b"prft", b"pdin"})
FIRST_BOXES = frozenset({b"ftyp"}) | _MEDIA | _PADDING | _BESIDE
"""Types that a file may begin with; some cameras and servers put padding or a preview before the type of the file."""
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_MOST_BOXES = 64


def is_movie(stream: IO[bytes]) -> bool:
    """Whether the boxes are those of a movie, not of a still picture (HEIC, AVIF) and not bytes that only look so.

    The file's type decides where it is given. Without it, which QuickTime allows, there must be media: a box that holds
    them, reached by the sizes of those before it.
    """
    length, at, media = stream.seek(0, 2), 0, False
    for _ in range(_MOST_BOXES):
        stream.seek(at)
        head = stream.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if kind == b"ftyp":
            return head[8:12] not in _STILL_BRANDS
        media = media or kind in _MEDIA
        if kind not in FIRST_BOXES and (at == 0 or not kind.isascii()):
            break
        if size == 1:  # the size follows in eight bytes
            size = int.from_bytes(head[8:16], "big")
        at += size
        if size < 8 or at + 8 > length:
            break
    return media
