"""Labels with a known rule behind them, for the tests that fit and judge policies: written and read once."""

from pathlib import Path

import pytest
from learning_data import CHEAP, RECORDS, RUNGS, oracle_labels, write_jsonl

from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.matrix import build_dataset


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of `RECORDS` labels."""
    return write_jsonl(tmp_path_factory.mktemp("logs") / "labels.jsonl", oracle_labels(RECORDS, 1))


@pytest.fixture(scope="session")
def data(logs: Path) -> Dataset:
    """The labels of `logs`."""
    return build_dataset([logs], cheap=CHEAP, rungs=RUNGS)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Labels of other inputs by the same rule."""
    path = write_jsonl(tmp_path_factory.mktemp("fresh") / "labels.jsonl", oracle_labels(3000, 2))
    return build_dataset([path], cheap=CHEAP, rungs=RUNGS)
