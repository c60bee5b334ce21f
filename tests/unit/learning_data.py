"""Synthetic labelled logs with known truth, for the tests of learning."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION
from adaptive_fusion.features.prompts import PROMPT_FEATURE_NAMES
from adaptive_fusion.learning.data.dataset import Dataset
from adaptive_fusion.learning.data.labels import Subject, label_record
from adaptive_fusion.learning.judging.arms import scores
from adaptive_fusion.point import OperatingPoint
from adaptive_fusion.policy.policy import Policy
from adaptive_fusion.policy.router import constant_router
from adaptive_fusion.policy.rungs import Rung

STRONG, MIDDLE, CHEAP = "gated3@1", "weighted3@1", "weighted3@0.5"
RUNGS = (STRONG, MIDDLE, CHEAP)
LADDERS = {"weighted": (CHEAP,), "gated": (STRONG, MIDDLE, CHEAP), "video": (STRONG, CHEAP)}
RECORDS = 1600
"""Of the log that the tests share."""
COSTS = {STRONG: 100.0, MIDDLE: 90.0, CHEAP: 40.0}


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def subject(row: np.ndarray, index: int, *, reads: bool = False, kind: str = "image") -> Subject:
    """An input whose first features are `row` (others 0) and whose question asks to read, or not."""
    asked = dict.fromkeys(PROMPT_FEATURE_NAMES, 0.0) | {"prompt_read": float(reads)}
    features = dict.fromkeys(FEATURE_NAMES, 0.0) | dict(zip(FEATURE_NAMES, map(float, row), strict=False))
    return Subject(
        content_hash=hashlib.sha256(str(index).encode()).hexdigest(),
        kind=kind,
        features=features,
        features_version=VERSION,
        prompt_features=asked,
        prompt_hash=str(int(reads)),
        slices={"scene": "dense" if row[0] > 0 else "simple"},
    )


def p_hard(row: np.ndarray, reads: bool) -> float:
    """P(the cheap lane loses more than the tolerance), by construction."""
    return 1 / (1 + math.exp(-(2.5 * row[0] + 1.5 * row[1] - 0.5 + (2.0 if reads else -2.0))))


def oracle_labels(n: int, seed: int, *, asks: bool = True) -> list[dict[str, Any]]:
    """Oracle labels of `n` inputs, nearly half hard for the cheap rung; each content under two questions."""
    rng = np.random.default_rng(seed)
    records = []
    for index in range(n):
        if index % 2 == 0 or not asks:
            row = rng.normal(size=4)
        reads = bool(index % 2) and asks
        hard = rng.random() < p_hard(row, reads)
        native = 0.9 + 0.1 * rng.random()
        kept = native - (0.2 + 0.5 * rng.random() if hard else 0.0)
        quality = {STRONG: native, MIDDLE: (native + kept) / 2, CHEAP: kept}
        content = seed * 1_000_000 + (index // 2 if asks else index)
        records.append(
            label_record(
                subject(row, content, reads=reads),
                "oracle",
                quality=quality,
                reference_quality=native,
                cost=COSTS,
            )
        )
    return records


def accuracy(policy: Policy, data: Dataset) -> float:
    """Share of the labels that `policy`'s router is right about at P(complex) = 0.5."""
    return float(np.mean((scores(policy, data) >= 0.5) == data.y))


def base_policy() -> Policy:
    """A policy with the ladders that the synthetic labels are for, and a router that knows nothing."""
    ladders = {lane: tuple(map(rung, names)) for lane, names in LADDERS.items()}
    return Policy("base", constant_router(), 0.5, ladders)


def rung(name: str) -> Rung:
    fusion, _, rest = name.partition("@")
    return Rung(OperatingPoint(fusion.rstrip("3"), downsample=float(rest)))
