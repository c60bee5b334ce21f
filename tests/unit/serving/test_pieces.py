"""A stop string cuts a stream where it cuts the whole text, however the text comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.serving.pieces import StopFilter, until_stop

LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_pieces_add_up_to_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    shown = StopFilter(stops)
    parts = [shown.feed(piece) for piece in pieces]
    whole = "".join(pieces)
    assert "".join(parts) + shown.flush() == until_stop(whole, stops)
    assert shown.ended == any(stop in whole for stop in stops)


@given(LETTERS, STOPS)
def test_the_text_before_the_first_stop_has_none(text: str, stops: list[str]) -> None:
    found = until_stop(text, stops)
    assert text.startswith(found) and not any(stop in found for stop in stops)
    assert found == text or any(text[len(found) :].startswith(stop) for stop in stops)


@given(st.lists(LETTERS, max_size=8))
def test_without_stops_nothing_is_kept_back(pieces: list[str]) -> None:
    shown = StopFilter(())
    assert [shown.feed(piece) for piece in pieces] == pieces
