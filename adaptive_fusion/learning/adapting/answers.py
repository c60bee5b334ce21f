"""What the model's own answers say: labels of a file as arrays, in the order of the cases that they are of.

Knows label records and rungs. Must not know fits, planners or how answers are had.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_fusion.errors import ConfigError
from adaptive_fusion.features.complexity import FEATURE_NAMES
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.learning.adapting.cases import Case, octaves_of
from adaptive_fusion.learning.data.dataset import BoolArray, Dataset, FloatArray, IntArray
from adaptive_fusion.learning.data.labels import SOURCES
from adaptive_fusion.policy.escalation import MOST_TOKENS
from adaptive_fusion.policy.fitted import Fingerprint
from adaptive_fusion.policy.rungs import Rung

NAMES = (*FEATURE_NAMES, *DETAIL_FEATURES)


@dataclass(frozen=True)
class Answers:
    """Cases that were answered, and what each rung kept of the answer at full compute.

    Attributes:
        cases: One a row, n of them.
        rungs: What was run, native among them.
        quality: ``[n, rungs]``, 0 to 1; native has 1.
        cost: Milliseconds to the first token, ``[n, rungs]``.
        tokens: Visual tokens, ``[n, rungs]``.
        entropy: Of the first tokens' distributions, in nats, ``[n, rungs, MOST_TOKENS]``; NaN past an answer's end.
        tolerance: Loss up to which an answer is good enough.
        model: Whose answers they are.
        wait: Milliseconds that each more token takes that is looked at, ``[n]``; none of it where nobody knows.
        patches: That were encoded, ``[n, rungs]``; NaN where nobody counted them.
    """

    cases: tuple[Case, ...]
    rungs: tuple[Rung, ...]
    quality: FloatArray
    cost: FloatArray
    tokens: FloatArray
    entropy: FloatArray
    tolerance: float
    model: Fingerprint
    wait: FloatArray = field(default_factory=lambda: np.zeros(0))
    patches: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))

    def __post_init__(self) -> None:
        if not len(self.wait):
            object.__setattr__(self, "wait", np.zeros(len(self.cases)))
        if not len(self.patches):
            object.__setattr__(self, "patches", np.full(self.quality.shape, np.nan))

    def __len__(self) -> int:
        return len(self.cases)

    @cached_property
    def shares(self) -> FloatArray:
        """Different shares of the native pixels below 1, the largest first."""
        found = {rung.pixel_share for rung in self.rungs if rung.point.blanks is None} - {1.0}
        return np.array(sorted(found, reverse=True), dtype=np.float64)

    @cached_property
    def kept(self) -> FloatArray:
        """What each of `shares` keeps, ``[n, shares]``: of several rungs of a share the least, and no more than a
        larger share does, so that a need may be read off it."""
        of_pixels = [(i, rung.pixel_share) for i, rung in enumerate(self.rungs) if rung.point.blanks is None]
        by_share = [
            np.min([self.quality[:, i] for i, each in of_pixels if each == share], axis=0) for share in self.shares
        ]
        return np.minimum.accumulate(np.stack(by_share, axis=1), axis=1)

    @cached_property
    def group(self) -> IntArray:
        """Hash of each row's image, ``[n]``."""
        return np.array([int(case.subject.content_hash[:15], 16) for case in self.cases], dtype=np.int64)

    @property
    def images(self) -> int:
        """How many different images there are."""
        return len(np.unique(self.group))

    @cached_property
    def tells(self) -> bool:
        """Whether the model says how sure it is: an engine need not give log-probabilities."""
        return bool(np.isfinite(self.entropy).any())

    @cached_property
    def features(self) -> FloatArray:
        """``[n, NAMES]`` features of the images."""
        rows = [{**case.subject.features, **case.subject.detail} for case in self.cases]
        return np.array([[row.get(name, np.nan) for name in NAMES] for row in rows], dtype=np.float64)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each row's question."""
        return tuple(case.subject.prompt_kind or "other" for case in self.cases)

    @cached_property
    def octaves(self) -> FloatArray:
        """log2 of the share that is generally enough, ``[n]``."""
        return octaves_of(self.cases)

    def take(self, rows: BoolArray) -> "Answers":
        """Those rows, by mask."""
        cases = tuple(case for case, wanted in zip(self.cases, rows, strict=True) if wanted)
        parts = (self.quality[rows], self.cost[rows], self.tokens[rows], self.entropy[rows])
        return Answers(cases, self.rungs, *parts, self.tolerance, self.model, self.wait[rows], self.patches[rows])

    def folds(self, count: int) -> IntArray:
        """A fold for each row, ``[n]``, the same for all rows of an image; every fold has an image where there are
        enough. It follows from the images alone, in whatever order they came."""
        _, place = np.unique(self.group, return_inverse=True)
        return np.asarray(place % count, dtype=np.int64)

    def dataset(self, cheap: str) -> Dataset:
        """The same for the fits that labels of any source go through."""
        n = len(self)
        data = Dataset(
            names=NAMES,
            x=self.features,
            y=np.full(n, np.nan),
            target=np.full(n, np.nan),
            quality=self.quality,
            reference=np.ones(n),
            cost=self.cost,
            rungs=tuple(rung.name for rung in self.rungs),
            taken=np.full(n, -1, dtype=np.int64),
            propensity=np.full(n, np.nan),
            group=self.group,
            weight=np.ones(n),
            source=np.full(n, SOURCES.index("oracle"), dtype=np.int64),
            source_id=np.zeros(n, dtype=np.int64),
            video=np.zeros(n, dtype=bool),
            entropy=self.entropy,
            asked=np.array([PROMPT_KINDS.index(kind) for kind in self.kinds], dtype=np.int64),
            tolerance=self.tolerance,
            model=self.model,
        )
        return replace(data, y=data.loses(cheap))


def read_answers(
    file: Path, cases: Sequence[Case], rungs: Sequence[Rung], tolerance: float, model: Fingerprint
) -> Answers:
    """The labels of a file for those of the cases that have one with all these rungs, in an order that follows from the
    cases alone; the last of several counts.

    Raises:
        ConfigError: For a label of another model.
    """
    names = [rung.name for rung in rungs]
    records = _records(file, set(names))
    for record in records.values():
        other = Fingerprint.from_dict(record["model"]) if record.get("model") else model
        if not model.is_same(other):
            raise ConfigError(f"{file.name} has labels of {other.in_words()}; expected those of {model.in_words()}")
    known = sorted((case for case in cases if case.key in records), key=lambda case: str(case.key))
    rows = [records[case.key] for case in known]
    return Answers(
        tuple(known),
        tuple(rungs),
        _table(rows, names, lambda row, name: row["quality"][name]),
        _table(rows, names, lambda row, name: row["cost"][name]),
        _table(rows, names, lambda row, name: row["measurement"][name]["visual_tokens"]),
        np.array([[_first(row, name) for name in names] for row in rows]).reshape(len(rows), len(names), MOST_TOKENS),
        tolerance,
        model,
        patches=_table(rows, names, lambda row, name: row["measurement"][name].get("patches", np.nan)),
    )


def answered(file: Path) -> set[tuple[str, str | None]]:
    """Content and question of all labels of a file."""
    return set(_records(file, set()))


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], value: Any) -> FloatArray:
    return np.array([[value(row, name) for name in names] for row in rows], np.float64).reshape(len(rows), len(names))


def _first(row: Mapping[str, Any], name: str) -> list[float]:
    found = [float(value) for value in row["entropies"].get(name, ())][:MOST_TOKENS]
    return found + [float("nan")] * (MOST_TOKENS - len(found))


def _records(file: Path, rungs: set[str]) -> dict[tuple[str, str | None], Mapping[str, Any]]:
    """The labels with all these rungs, by content and question."""
    found: dict[tuple[str, str | None], Mapping[str, Any]] = {}
    if not file.exists():
        return found
    with file.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the torn end of a run that was killed
                continue
            if not isinstance(record, dict) or not isinstance(record.get("quality"), dict):
                continue
            if record.get("content_hash") and rungs <= set(record["quality"]):
                found[record["content_hash"], record.get("prompt_hash")] = record
    return found
