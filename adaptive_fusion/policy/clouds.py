"""Clouds of images in a space of light features, and how far an image is from them, in several parts.

Knows feature names, their versions and fitted parameters. Must not know of limits, files or policies.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from adaptive_fusion.checks import check_keys, number, numbers
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.features.complexity import VERSION
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.features.image import IMAGE_FEATURES
from adaptive_fusion.policy.predictors import Matrix

NEAREST = "nearest"
_KNOWN = frozenset((*IMAGE_FEATURES, *DETAIL_FEATURES))


@dataclass(frozen=True)
class Cloud:
    """A Gaussian of the standardised features of one kind of images, ``d`` of them.

    Args:
        name: What it is called.
        mean: (d,).
        whiten: d rows of a lower triangular matrix W with a positive diagonal, of 1 to d numbers; the inverse of W'W is
            the covariance.

    Raises:
        PolicyError: For other shapes, or a diagonal that is not positive.
    """

    name: str
    mean: tuple[float, ...]
    whiten: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PolicyError(f"name of a kind is {self.name!r}; expected a text")
        object.__setattr__(self, "mean", numbers(self.mean, f"mean of {self.name}", error=PolicyError))
        if not isinstance(self.whiten, list | tuple):
            raise PolicyError(f"whiten of {self.name} is {type(self.whiten).__name__}; expected a list of rows")
        rows = tuple(numbers(row, f"a row of whiten of {self.name}", error=PolicyError) for row in self.whiten)
        object.__setattr__(self, "whiten", rows)
        if [len(row) for row in rows] != [*range(1, len(self.mean) + 1)]:
            raise PolicyError(
                f"whiten of {self.name} has rows of {[len(row) for row in rows]} numbers; expected 1 to "
                f"{len(self.mean)}, as its mean has {len(self.mean)}"
            )
        for row in rows:
            number(row[-1], f"the diagonal of whiten of {self.name}", above=0, error=PolicyError)

    def matrix(self) -> Matrix:
        """W, (d, d)."""
        found = np.zeros((len(self.mean),) * 2)
        for i, row in enumerate(self.whiten):
            found[i, : i + 1] = row
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        return {"name": self.name, "mean": [*self.mean], "whiten": [[*row] for row in self.whiten]}

    @classmethod
    def from_dict(cls, values: Any) -> "Cloud":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "a kind of images", ("name", "mean", "whiten"))
        return cls(table["name"], table["mean"], table["whiten"])


@dataclass(frozen=True)
class Space:
    """Features as the clouds see them: ``(x - centre) / scale``, no further than `reach` from 0.

    Args:
        names: Features, of `IMAGE_FEATURES` and `DETAIL_FEATURES`.
        centre: Of each.
        scale: Of each, above 0.
        offset: Of each: where it is above 0, the logarithm of the feature plus this is taken first, as of shares that
            differ by factors; 0 elsewhere.
        reach: Above 0: one feature far out must not outweigh all.
        complexity, detail: Versions of the extractors.

    Raises:
        PolicyError: For a feature that no extractor here gives, one named twice, another extractor version, or
            numbers out of range.
    """

    names: tuple[str, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    reach: float
    complexity: str = VERSION
    detail: str = DETAIL_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        unknown = sorted({str(name) for name in self.names} - _KNOWN)
        if unknown or not self.names:
            raise PolicyError(f"unknown features {unknown}; expected some of {', '.join(sorted(_KNOWN))}")
        if len(set(self.names)) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise PolicyError(f"features {twice} are named more than once; expected each at most once")
        for what, found, here in (("complexity", self.complexity, VERSION), ("detail", self.detail, DETAIL_VERSION)):
            if found != here:
                raise PolicyError(f"fitted on {what} features of version {found!r}; expected {here!r}: fit it again")
        for what in ("centre", "scale", "offset"):
            values = numbers(getattr(self, what), f"{what} of features", error=PolicyError)
            if len(values) != len(self.names):
                raise PolicyError(f"{what} has {len(values)} numbers for {len(self.names)} features; expected as many")
            object.__setattr__(self, what, values)
        for name, scale, offset in zip(self.names, self.scale, self.offset, strict=True):
            number(scale, f"scale of {name}", above=0, error=PolicyError)
            number(offset, f"offset of {name}", 0, error=PolicyError)
        object.__setattr__(self, "reach", number(self.reach, "reach", above=0, error=PolicyError))

    def rows(self, values: Matrix) -> Matrix:
        """(n, d) standardised, of features (n, d) in their order."""
        offset = np.asarray(self.offset)
        logs = np.log(np.maximum(values, 0) + np.where(offset > 0, offset, 1))
        z = (np.where(offset > 0, logs, values) - np.asarray(self.centre)) / np.asarray(self.scale)
        return np.asarray(np.clip(z, -self.reach, self.reach))

    def row(self, features: Mapping[str, float]) -> Matrix:
        """(d,) standardised.

        Raises:
            PolicyError: For a feature that is missing or not finite.
        """
        values = [features.get(name, math.nan) for name in self.names]
        if not math.isfinite(sum(values)):
            wrong = [name for name, value in zip(self.names, values, strict=True) if not math.isfinite(value)]
            raise PolicyError(f"features {wrong} are missing or not finite; expected all of {', '.join(self.names)}")
        return np.asarray(self.rows(np.asarray([values]))[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        return {
            "complexity": self.complexity,
            "detail": self.detail,
            "names": [*self.names],
            "centre": [*self.centre],
            "scale": [*self.scale],
            "offset": [*self.offset],
            "reach": self.reach,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Space":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        keys = ("names", "centre", "scale", "offset", "reach", "complexity", "detail")
        table = check_keys(values, "features", keys)
        if not isinstance(table["names"], list) or any(not isinstance(name, str) for name in table["names"]):
            raise PolicyError(f"names of features is {table['names']!r}; expected a list of names")
        return cls(*(table[key] for key in keys))


@dataclass(frozen=True)
class Strange:
    """A family of images that a policy is not meant for.

    Args:
        cloud: What its images are like.
        weights: (d,), and
        intercept: of a linear log odds of the family against all known kinds.

    Raises:
        PolicyError: For weights of another number than the cloud's features.
    """

    cloud: Cloud
    weights: tuple[float, ...]
    intercept: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", numbers(self.weights, f"weights of {self.cloud.name}", error=PolicyError))
        object.__setattr__(self, "intercept", number(self.intercept, "intercept", error=PolicyError))
        if len(self.weights) != len(self.cloud.mean):
            raise PolicyError(
                f"weights of {self.cloud.name} are {len(self.weights)} numbers; expected {len(self.cloud.mean)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        return {"cloud": self.cloud.to_dict(), "weights": [*self.weights], "intercept": self.intercept}

    @classmethod
    def from_dict(cls, values: Any) -> "Strange":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "a strange family", ("cloud", "weights", "intercept"))
        return cls(Cloud.from_dict(table["cloud"]), table["weights"], table["intercept"])


@dataclass(frozen=True)
class Clouds:
    """Known kinds and strange families in one space.

    Raises:
        PolicyError: For no kind, a name given twice, or another number of features than the space has.
    """

    space: Space
    kinds: tuple[Cloud, ...]
    strange: tuple[Strange, ...] = ()
    _whiten: Matrix = field(init=False, compare=False, repr=False)
    _shift: Matrix = field(init=False, compare=False, repr=False)
    _spread: Matrix = field(init=False, compare=False, repr=False)
    _base: Matrix = field(init=False, compare=False, repr=False)
    _weights: Matrix = field(init=False, compare=False, repr=False)
    _intercepts: Matrix = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        every, width = (*self.kinds, *(family.cloud for family in self.strange)), len(self.space.names)
        wrong = sorted({len(cloud.mean) for cloud in every} - {width})
        names = [cloud.name for cloud in every]
        if not self.kinds or wrong or len({*names, NEAREST}) != len(names) + 1:
            raise PolicyError(
                f"kinds are {names} of {wrong or [width]} features; expected one or more, each named once and none "
                f"{NEAREST!r}, of {width} features"
            )
        whiten = np.stack([cloud.matrix() for cloud in every])
        means = np.asarray([cloud.mean for cloud in every])
        weights = np.asarray([family.weights for family in self.strange]).reshape(len(self.strange), width)
        for name, value in (
            ("_whiten", whiten.reshape(-1, width)),
            ("_shift", np.einsum("kij,kj->ki", whiten, means)),
            ("_spread", np.sqrt((np.linalg.inv(whiten) ** 2).sum(axis=2))),
            ("_base", -2 * np.log(np.diagonal(whiten, axis1=1, axis2=2)).sum(axis=1)),
            ("_weights", weights),
            ("_intercepts", np.asarray([family.intercept for family in self.strange])),
        ):
            object.__setattr__(self, name, value)

    @property
    def parts(self) -> tuple[str, ...]:
        """What each part is about: the known kinds, and each strange family twice."""
        names = [family.cloud.name for family in self.strange]
        return (NEAREST, *names, *names)

    def parts_of(self, z: Matrix) -> Matrix:
        """(n, parts) of standardised rows (n, d): see the module of `Familiar`."""
        found = self._each(z)
        nearest = found[:, : len(self.kinds)].min(axis=1, keepdims=True)
        linear = z @ self._weights.T + self._intercepts
        return np.concatenate((nearest, nearest - found[:, len(self.kinds) :], linear), axis=1)

    def furthest(self, z: Matrix) -> tuple[str, str, float]:
        """The nearest kind of a row (d,), and the feature furthest from its mean, in its standard deviations."""
        kind = int(self._each(z[None])[0, : len(self.kinds)].argmin())
        away = (z - np.asarray(self.kinds[kind].mean)) / self._spread[kind]
        which = int(np.abs(away).argmax())
        return self.kinds[kind].name, self.space.names[which], float(away[which])

    def _each(self, z: Matrix) -> Matrix:
        """(n, kinds + strange) -2 times the log density of standardised rows, up to one constant."""
        away = (z @ self._whiten.T).reshape(len(z), *self._shift.shape) - self._shift
        return np.asarray((away * away).sum(axis=2) + self._base)
