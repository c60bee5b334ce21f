"""Thousands of records of several processes in one log: all there, once each."""

from pathlib import Path

import pytest
from log_processes import PROCESSES, expected, on_disk, reported, write_together

COUNT = 3000


@pytest.mark.parametrize("max_bytes", [1, 400, 2000])
def test_nothing_written_is_lost_or_doubled_however_small_the_files(tmp_path: Path, max_bytes: int) -> None:
    found = reported(*write_together(tmp_path / "log.jsonl", COUNT, max_bytes=max_bytes, keep=PROCESSES * COUNT))
    assert found == (PROCESSES * COUNT, 0)
    assert on_disk(tmp_path) == expected(COUNT)
