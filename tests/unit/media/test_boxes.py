"""Movies are told by the boxes that they are made of, whichever comes first."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import clip, encode, scene, shown_frames

from adaptive_fusion.errors import MediaError
from adaptive_fusion.media.boxes import FIRST_BOXES, is_movie
from adaptive_fusion.media.clips import Video
from adaptive_fusion.media.load import load_media

STREAMED = "frag_keyframe+empty_moov+default_base_moof"  # nothing in it counts from the beginning of the file


def box(kind: bytes, size: int = 40) -> bytes:
    return struct.pack(">I", size) + kind + bytes(size - 8)


def without_type(kind: bytes) -> bytes:
    """A movie whose first box has another type than ``ftyp``; all others stay where they are."""
    data = clip("mp4", flags="faststart")
    assert data[4:8] == b"ftyp"
    return data[:4] + kind + data[8:]


PREFIXES = {
    "padding": box(b"free"),
    "a page of padding": box(b"skip", 5000),
    "padding with a long size": struct.pack(">I4sQ", 1, b"free", 200) + bytes(184),
    "an empty box": box(b"wide", 8),
    "a preview": box(b"pnot", 20) + box(b"PICT", 300),
    "a private box": box(b"uuid", 64),
    "several": box(b"free", 8) * 20 + box(b"uuid"),
    "a segment's type and index": box(b"styp", 24) + box(b"sidx", 44) + box(b"emsg", 60),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_what_stands_before_the_type_of_a_movie_is_passed_over(name: str) -> None:
    movie = clip("mp4", flags=STREAMED)
    found, plain = load_media(PREFIXES[name] + movie), load_media(movie)
    assert isinstance(found, Video) and shown_frames(found) == shown_frames(plain)


@pytest.mark.parametrize("kind", [b"free", b"skip", b"styp", b"uuid", b"pnot", b"wide", b"ediw", b"prfl"])
def test_a_movie_needs_no_type(kind: bytes) -> None:
    assert shown_frames(load_media(without_type(kind))) == shown_frames(load_media(clip("mp4")))


def test_stills_and_bytes_that_only_begin_alike_are_refused() -> None:
    avif = encode(scene(), "AVIF")
    noise = np.random.default_rng(0).bytes(4000)
    lookalikes = [
        *(prefix + avif for prefix in PREFIXES.values() if b"styp" not in prefix),
        box(b"free") + struct.pack(">I4s4s", 24, b"ftyp", b"heic") + bytes(12) + box(b"meta", 400) + box(b"mdat"),
        *(box(kind) + noise for kind in FIRST_BOXES - {b"ftyp", b"moov", b"mdat", b"moof", b"styp"}),
        b"the free encyclopedia" * 50, b"it's wide", box(b"free"), box(b"free") * 100, b"\0\0\0\x07free" + noise,
    ]  # fmt: skip
    for data in lookalikes:
        with pytest.raises(MediaError, match="not an image or video of a known format"):
            load_media(data)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FIRST_BOXES)), st.binary(max_size=64), st.integers(0, 2**32 - 1))
def test_any_bytes_after_a_first_box_end_the_walk(kind: bytes, rest: bytes, size: int) -> None:
    data = struct.pack(">I", size) + kind + rest
    assert is_movie(io.BytesIO(data)) in (True, False)
    with pytest.raises(MediaError):
        load_media(data)
