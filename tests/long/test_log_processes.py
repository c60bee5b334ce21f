"""Thousands of records of several processes in one log: all there, once each."""

from collections.abc import Callable
from pathlib import Path

import pytest
from log_processes import PROCESSES, expected, on_disk, reported, write_together

COUNT = 3000
"""Records of each process."""


@pytest.mark.parametrize("max_bytes", [1, 400, 2000])
def test_nothing_written_is_lost_or_doubled_however_small_the_files(
    tmp_path: Path, share_of: Callable[[int], int], max_bytes: int
) -> None:
    count = share_of(COUNT)
    found = reported(*write_together(tmp_path / "log.jsonl", count, max_bytes=max_bytes, keep=PROCESSES * count))
    assert found == (PROCESSES * count, 0)
    assert on_disk(tmp_path) == expected(count)
