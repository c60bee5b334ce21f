"""Several processes that write one log, and what became of their records."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

from adaptive_fusion.decision_log import DecisionLog

PROCESSES = 4


def _write(path: Path, who: int, count: int, options: dict[str, Any], results: Any) -> None:
    log = DecisionLog(path, **options)
    for number in range(count):
        log.write({"request_id": f"{who}-{number}", "reason": "x" * (number % 50)})
    results.put((log.written, log.dropped))


def write_together(path: Path, count: int, **options: Any) -> tuple[list[Any], Any]:
    """Start `PROCESSES` that write `count` records each; returns them, and where they report."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_write, args=(path, who, count, options, results)) for who in range(PROCESSES)]
    for worker in workers:
        worker.start()
    return workers, results


def reported(workers: list[Any], results: Any) -> tuple[int, int]:
    """Wait for the processes; the records they say they wrote and dropped, in sum."""
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join(60)
    return sum(written for written, _ in found), sum(dropped for _, dropped in found)


def on_disk(folder: Path) -> Counter[str]:
    """How often each request is in the files of a folder; every line must be a record."""
    lines = (line for file in folder.iterdir() for line in file.read_bytes().splitlines())
    return Counter(json.loads(line)["request_id"] for line in lines)


def expected(count: int) -> Counter[str]:
    """Each record once."""
    return Counter(f"{who}-{number}" for who in range(PROCESSES) for number in range(count))
