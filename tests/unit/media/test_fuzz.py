"""Damaged files of every accepted format raise MediaError or load, nothing else; `tests/long` tries ten thousand."""

import pytest
from mutants import fuzz


@pytest.mark.filterwarnings("ignore")  # Pillow warns of corrupt metadata, as it should
def test_mutants_raise_nothing_but_media_error() -> None:
    report = fuzz(1_000, seed=1)
    assert report["loaded"] > 100 and report["refused"] > 200  # both roads are really taken
