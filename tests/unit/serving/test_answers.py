"""What of a reply goes out as its text."""

from dataclasses import replace

import pytest
from records import reply

from adaptive_fusion.serving.answers import shown_text


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("said", "stops", "shown"),
    [
        ("Red.\n", (".\n",), "Red"),  # the stop string ends in what is taken away
        (" Red. ", (), "Red."),
        (" Red and blue", ("and",), "Red"),
        ("\nRed", ("\n",), ""),
    ],
)
def test_the_text_ends_before_a_stop_string_whatever_is_stripped(said: str, stops: tuple[str, ...], shown: str) -> None:
    tokens = tuple(map(ord, said))
    assert shown_text(replace(reply(), text=said.strip(), token_ids=tokens), Letters(), stops) == shown
    # A begun answer's spaces stay.
    begun = shown_text(replace(reply(), text=said, token_ids=tokens), Letters(), stops)
    assert begun.strip() == shown and said.startswith(begun)
