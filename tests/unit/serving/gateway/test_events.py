"""Events that come in any pieces: all bytes pass in their order, and never a beginning without its end."""

import gzip
import json

from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.serving.gateway.events import MOST_HELD, Events, Whole
from adaptive_fusion.serving.gateway.watch import Watch

ENDS = ("\n", "\r\n", "\r")
LINES = st.sampled_from(["data: {}", "data: [1,", "data: 2]", "event: x", ": ping", "id: 1", "data: \u00e9"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream of events, some with two lines of data or a comment, and the pieces in which it comes."""
    end = draw(st.sampled_from(ENDS))
    events = draw(st.lists(st.lists(LINES, min_size=1, max_size=3), min_size=1, max_size=5))
    data = "".join(end.join(lines) + end + end for lines in events).encode()
    cuts = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=8)))
    return data, [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def said(data: bytes) -> list[bytes]:
    """Lines of fields of a text, whatever ends them."""
    return [line for line in data.splitlines() if line and not line.startswith(b":")]


@given(streams())
def test_what_passes_are_whole_events_in_order(stream: tuple[bytes, list[bytes]]) -> None:
    data, pieces = stream
    whole, passed = Whole(), b""
    for piece in pieces:
        passed += whole.feed(piece)
        assert data.startswith(passed)
        rest = data[len(passed) :]
        # An event that follows stands by itself: no line of another was begun and not ended.
        before = [line for line in (passed + b"data: last").splitlines()[:-1] if line[:1] != b":"]
        assert (passed + b"data: last").splitlines()[-1] == b"data: last"
        assert not before or before[-1] == b""
        assert said(passed) + said(rest) == said(data)
    assert passed + whole.rest() == data and not whole.is_open
    events = Events()
    assert b"".join(event for piece in pieces for event in events.feed(piece)) + events.rest == data


def test_pieces_that_end_with_an_event_pass_as_they_are_and_comments_are_not_held() -> None:
    whole = Whole()
    for piece in (b"data: {}\n\n", b": ping\n", b"\n", b"data: 1\r\n\r\n"):
        assert whole.feed(piece) == piece
    assert whole.feed(b'data: {"a"') == b"" and whole.feed(b": 1}\n") == b""
    assert whole.feed(b"\ndata:") == b'data: {"a": 1}\n\n' and not whole.is_open


def test_an_event_without_end_is_held_up_to_a_limit() -> None:
    whole, long = Whole(), b"data: " + b"x" * MOST_HELD
    assert whole.feed(long) == long and whole.is_open and whole.feed(b"y") == b"y"


def test_a_packed_stream_is_watched_too() -> None:
    chunk = {"choices": [{"delta": {"content": "a"}, "finish_reason": "length"}], "usage": {"completion_tokens": 7}}
    packed = gzip.compress(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    for how, finish, count in ((b"gzip", "length", 7), (b"br", None, None)):
        watch = Watch(iter(range(1, 100)).__next__, 0.0, True)
        watch.encoded(how)
        watch.saw(packed[:20])
        watch.saw(packed[20:])
        assert watch.is_done and watch.first_ms > 0
        assert watch.finish_reason == finish and watch.count("completion_tokens") == count
