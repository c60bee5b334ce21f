"""Ten thousand damaged files of every accepted format: MediaError or a picture, nothing else."""

from collections.abc import Callable

import pytest
from mutants import fuzz


@pytest.mark.filterwarnings("ignore")  # Pillow warns of corrupt metadata, as it should
def test_mutants_raise_nothing_but_media_error(share_of: Callable[[int], int]) -> None:
    report = fuzz(share_of(10_000), seed=2)
    print(report)  # the slowest one, for whoever looks
    assert report["loaded"] and report["refused"]
