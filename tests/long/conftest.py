"""Counts of the long tests. `make test-long` runs them in full; `ADAPTIVE_FUSION_LONG_SHARE=0.1` a tenth of each."""

import os
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def share_of() -> Callable[[int], int]:
    """A full count, scaled by the share that this run does, at least 1."""
    share = float(os.environ.get("ADAPTIVE_FUSION_LONG_SHARE", "1"))
    if not 0 < share <= 1:
        raise pytest.UsageError(f"ADAPTIVE_FUSION_LONG_SHARE is {share}; expected above 0, at most 1")
    return lambda count: max(1, round(count * share))
