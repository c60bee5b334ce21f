"""Fitted models as plain parameters: a folded linear model, the largest of several, and a small tree ensemble.

Knows rows of numbers (NaN for a missing value) and JSON-able dicts. Must not know of images, prompts or
policies, and never imports scikit-learn, whose predictions it equals in microseconds instead of a
millisecond.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptive_fusion.checks import check_keys, number, numbers
from adaptive_fusion.errors import PolicyError

Matrix = NDArray[np.float64]
MAX_NODES = 1_000_000
"""Most nodes an ensemble may have: a bound for what a file can make this process allocate and walk."""


@dataclass(frozen=True)
class LinearModel:
    """``bias + sum of weights[i] * x[i]``, where a missing x[i] (NaN) counts as ``fill[i]``, its training
    mean.

    Standardisation is folded in: ``weights = w / scale`` and ``bias = b - sum of w * mean / scale``. ``spread[i]``, of
    which scores know nothing, is its standard deviation in training, for people who look at it; empty if not recorded.

    Raises:
        PolicyError: If `weights`, `fill` and `spread` differ in length or hold anything but finite numbers.
    """

    weights: tuple[float, ...]
    fill: tuple[float, ...]
    bias: float = 0.0
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", numbers(self.weights, "weights", error=PolicyError))
        object.__setattr__(self, "fill", numbers(self.fill, "fill", error=PolicyError))
        object.__setattr__(self, "bias", number(self.bias, "bias", error=PolicyError))
        if len(self.weights) != len(self.fill):
            raise PolicyError(f"{len(self.weights)} weights and {len(self.fill)} fill values; expected as many")
        object.__setattr__(self, "spread", numbers(self.spread, "spread", error=PolicyError))
        if self.spread and len(self.spread) != len(self.weights):
            raise PolicyError(f"{len(self.weights)} weights and {len(self.spread)} spreads; expected as many, or none")

    @property
    def width(self) -> int:
        """How many values a row must have; here exactly, for trees at least."""
        return len(self.weights)

    def raw(self, row: Sequence[float]) -> float:
        """The score of one row."""
        total = self.bias
        for weight, fill, x in zip(self.weights, self.fill, row, strict=True):
            total += weight * (x if x == x else fill)
        return total

    def raw_batch(self, rows: Matrix) -> Matrix:
        """The scores ``[n]`` of rows ``[n, width]``."""
        filled = np.where(np.isnan(rows), np.asarray(self.fill), rows)
        scores: Matrix = filled @ np.asarray(self.weights) + self.bias
        return scores

    def to_dict(self) -> dict[str, Any]:
        """JSON-able parameters, exact."""
        spread = {"spread": [*self.spread]} if self.spread else {}
        return {"kind": "linear", "weights": [*self.weights], "fill": [*self.fill], "bias": self.bias, **spread}


@dataclass(frozen=True)
class LargestModel:
    """The largest score of several linear models of the same rows: for what any of several reasons is enough for.

    Where no model falls when a feature rises, neither does the largest.

    Raises:
        PolicyError: Without models, or if they read rows of different width.
    """

    models: tuple[LinearModel, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))
        widths = [model.width for model in self.models]
        if not widths or len({*widths}) > 1:
            raise PolicyError(f"the largest of models of {widths} features; expected at least one, all of as many")

    @property
    def width(self) -> int:
        """How many values a row must have, exactly."""
        return self.models[0].width

    def raw(self, row: Sequence[float]) -> float:
        """The score of one row."""
        return max(model.raw(row) for model in self.models)

    def raw_batch(self, rows: Matrix) -> Matrix:
        """The scores ``[n]`` of rows ``[n, width]``."""
        scores: Matrix = np.max([model.raw_batch(rows) for model in self.models], axis=0)
        return scores

    def to_dict(self) -> dict[str, Any]:
        """JSON-able parameters, exact."""
        return {"kind": "largest", "models": [model.to_dict() for model in self.models]}


@dataclass(frozen=True)
class Tree:
    """One binary tree as parallel lists, the root first; a node with ``left == right == -1`` is a leaf.

    At an inner node x = row[feature] goes left if ``x <= threshold``, and if it is missing (NaN) where
    `missing_left` says; a threshold of infinity parts missing values from all others. Children come after
    their parent.
    """

    feature: tuple[int, ...]
    threshold: tuple[float, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    missing_left: tuple[bool, ...]
    value: tuple[float, ...]

    def __post_init__(self) -> None:
        columns = (self.feature, self.threshold, self.left, self.right, self.missing_left, self.value)
        size = len(self.value)
        if not 0 < size <= MAX_NODES or any(len(column) != size for column in columns):
            raise PolicyError(
                f"a tree has columns of {[len(c) for c in columns]} nodes; expected equal, 1 to {MAX_NODES}"
            )
        for node in range(size):
            left, right, threshold = self.left[node], self.right[node], self.threshold[node]
            leaf = left == right == -1
            if not leaf and not (node < left < size and node < right < size and left != right):
                raise PolicyError(
                    f"tree node {node} has children {left} and {right}; expected two between it and {size}"
                )
            if not leaf and (self.feature[node] < 0 or not threshold > -math.inf):
                raise PolicyError(
                    f"tree node {node} splits feature {self.feature[node]} at {threshold}; expected numbers"
                )
        object.__setattr__(self, "value", numbers(self.value, "value of a tree", error=PolicyError))
        object.__setattr__(self, "threshold", tuple(map(float, self.threshold)))

    def nested(self) -> Any:
        """The tree as ``(feature, threshold, missing_left, left, right)`` or a leaf's value: fast to walk."""
        built: dict[int, Any] = {}
        for i in reversed(range(len(self.value))):
            if self.left[i] == -1:
                built[i] = self.value[i]
            else:
                children = built[self.left[i]], built[self.right[i]]
                built[i] = (self.feature[i], self.threshold[i], self.missing_left[i], *children)
        return built[0]

    def predict(self, rows: Matrix) -> Matrix:
        """Leaf values ``[n]`` of rows ``[n, features]``, all rows walking down at once."""
        feature, left, right = map(np.asarray, (self.feature, self.left, self.right))
        threshold, missing_left, value = map(np.asarray, (self.threshold, self.missing_left, self.value))
        at = np.zeros(len(rows), np.intp)
        going = np.flatnonzero(left[at] >= 0)
        while going.size:
            node = at[going]
            x = rows[going, feature[node]]
            goes_left = np.where(np.isnan(x), missing_left[node], x <= threshold[node])
            at[going] = np.where(goes_left, left[node], right[node])
            going = going[left[at[going]] >= 0]
        leaves: Matrix = value[at]
        return leaves

    def to_dict(self) -> dict[str, Any]:
        """JSON-able columns, exact; JSON has no infinity, so null stands for that threshold."""
        return {
            "feature": [*self.feature],
            "threshold": [None if math.isinf(t) else t for t in self.threshold],
            "left": [*self.left],
            "right": [*self.right],
            "missing_left": [int(m) for m in self.missing_left],
            "value": [*self.value],
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Tree":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "tree", ("feature", "threshold", "left", "right", "missing_left", "value"))

        def whole(key: str) -> tuple[int, ...]:
            column = table[key]
            if not isinstance(column, list) or any(type(v) is not int for v in column):
                raise PolicyError(f"{key} of a tree holds something else than whole numbers")
            return tuple(column)

        threshold = table["threshold"]
        if not isinstance(threshold, list):
            raise PolicyError(f"threshold of a tree is {type(threshold).__name__}; expected a list of numbers")
        return cls(
            whole("feature"),
            tuple(math.inf if t is None else number(t, "threshold of a tree", error=PolicyError) for t in threshold),
            whole("left"),
            whole("right"),
            tuple(bool(m) for m in whole("missing_left")),
            tuple(table["value"]) if isinstance(table["value"], list) else (),
        )


@dataclass(frozen=True)
class TreeModel:
    """``baseline + sum of the trees' leaf values``: a boosted ensemble's raw score (log-odds for log loss).

    The semantics are those of scikit-learn's HistGradientBoosting estimators on numerical features, in
    float64.

    Raises:
        PolicyError: For a tree that is not one, or more than `MAX_NODES` nodes.
    """

    trees: tuple[Tree, ...]
    baseline: float = 0.0
    _nested: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "baseline", number(self.baseline, "baseline", error=PolicyError))
        nodes = sum(len(tree.value) for tree in self.trees)
        if nodes > MAX_NODES:
            raise PolicyError(f"the ensemble has {nodes} nodes; expected at most {MAX_NODES}")
        object.__setattr__(self, "_nested", tuple(tree.nested() for tree in self.trees))

    @property
    def width(self) -> int:
        """How many values a row must have at least."""
        used = (f for tree in self.trees for f, left in zip(tree.feature, tree.left, strict=True) if left >= 0)
        return max(used, default=-1) + 1

    def raw(self, row: Sequence[float]) -> float:
        """The score of one row."""
        total = self.baseline
        for node in self._nested:
            while type(node) is tuple:
                feature, threshold, missing_left, left, right = node
                x = row[feature]
                node = left if (x <= threshold if x == x else missing_left) else right
            total += node
        return total

    def raw_batch(self, rows: Matrix) -> Matrix:
        """The scores ``[n]`` of rows ``[n, features]``."""
        total = np.full(len(rows), self.baseline)
        for tree in self.trees:
            total += tree.predict(rows)
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-able parameters, exact."""
        return {"kind": "trees", "baseline": self.baseline, "trees": [tree.to_dict() for tree in self.trees]}


Model = LinearModel | LargestModel | TreeModel


def model_from_dict(values: Any) -> Model:
    """Read any model's `to_dict` form; raises PolicyError for anything else."""
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if kind == "linear":
        return _linear_from_dict(values)
    if kind == "largest":
        table = check_keys(values, "model", ("kind", "models"))
        if not isinstance(table["models"], list):
            raise PolicyError(f"models is {type(table['models']).__name__}; expected a list of linear models")
        return LargestModel(tuple(_linear_from_dict(model) for model in table["models"]))
    if kind == "trees":
        table = check_keys(values, "tree model", ("kind", "baseline", "trees"))
        if not isinstance(table["trees"], list):
            raise PolicyError(f"trees is {type(table['trees']).__name__}; expected a list")
        return TreeModel(tuple(Tree.from_dict(tree) for tree in table["trees"]), table["baseline"])
    raise PolicyError(f"model kind is {kind!r}; expected largest, linear or trees")


def _linear_from_dict(values: Any) -> LinearModel:
    table = check_keys(values, "linear model", ("kind", "weights", "fill", "bias"), ("spread",))
    if table["kind"] != "linear":
        raise PolicyError(f"model kind is {table['kind']!r}; expected linear")
    return LinearModel(table["weights"], table["fill"], table["bias"], table.get("spread", ()))
