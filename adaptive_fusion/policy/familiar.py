"""Whether an image is like those that a policy was fitted on: a distance on light features, with a limit.

Knows feature names, their versions and fitted parameters. Must not know of files, lanes, budgets or what is done with
an image that is unlike all others.

The distance has parts, and the largest counts:

- *nearest*: to each kind of data that was fitted, a Gaussian of the standardised features gives ``|W (z - mean)|^2 -
  2 ln det W`` (Mahalanobis; up to a constant, -2 times the log density). The nearest kind counts;
- two for each *strange* family, images that a policy is not meant for: how much nearer the image is to it than to the
  nearest kind (a log likelihood ratio), and a linear log odds of the family against all kinds (outlier exposure,
  Hendrycks, Mazeika & Dietterich 2019). There may be none.

Parts are brought to one scale by their median and spread on familiar images. What an image must exceed to be unlike
comes from split conformal calibration: of n familiar images that the distance was not fitted on, the
``ceil((1 - alpha) (n + 1))``-th smallest distance. A further image of the same kinds exceeds it with a probability of
at most alpha, whatever the distance is (Vovk, Gammerman & Shafer 2005; Bates et al. 2023, "Testing for outliers with
conformal p-values").
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptive_fusion.checks import check_keys, number, numbers
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.policy.clouds import NEAREST, Cloud, Clouds, Space, Strange
from adaptive_fusion.policy.predictors import Matrix

SCHEMA = 1


@dataclass(frozen=True)
class Familiar:
    """What a policy's images are like. A call takes some tens of microseconds.

    Args:
        clouds: Parts of the distance.
        middle: Of each part, its median on familiar images.
        spread: Of each part, above 0: what it is divided by.
        calibration: Distances, rising, of familiar images that nothing else here was fitted on.
        alpha: Share of familiar images that may be called unlike, in (0, 1).

    Raises:
        PolicyError: For numbers out of range, or fewer images in `calibration` than alpha needs.
    """

    clouds: Clouds
    middle: tuple[float, ...]
    spread: tuple[float, ...]
    calibration: tuple[float, ...]
    alpha: float

    def __post_init__(self) -> None:
        for what in ("middle", "spread", "calibration"):
            object.__setattr__(self, what, numbers(getattr(self, what), what, error=PolicyError))
        for what in ("middle", "spread"):
            found = len(getattr(self, what))
            if found != len(self.clouds.parts):
                raise PolicyError(f"{what} has {found} numbers; expected one for each of {self.clouds.parts}")
        for value in self.spread:
            number(value, "spread", above=0, error=PolicyError)
        object.__setattr__(self, "alpha", number(self.alpha, "alpha", above=0, below=1, error=PolicyError))
        if [*self.calibration] != sorted(self.calibration):
            raise PolicyError("calibration is not sorted; expected distances that never fall")
        if self._rank > len(self.calibration):
            raise PolicyError(
                f"calibration has {len(self.calibration)} distances; expected at least "
                f"{math.ceil(1 / self.alpha - 1)} for alpha {self.alpha:g}"
            )

    @property
    def _rank(self) -> int:
        # Rounded, as .9 x 10 must not become 9.000000000000002 and then 10.
        return math.ceil(round((1 - self.alpha) * (len(self.calibration) + 1), 9))

    @property
    def limit(self) -> float:
        """The distance above which an image is unlike."""
        return self.calibration[self._rank - 1]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of data that were fitted."""
        return tuple(cloud.name for cloud in self.clouds.kinds)

    def distance(self, features: Mapping[str, float]) -> float:
        """How far an image is from what was fitted: about 0 in the middle, and unlike above `limit`.

        Args:
            features: `IMAGE_FEATURES` and `DETAIL_FEATURES` by name; others are not read.

        Raises:
            PolicyError: For a feature that is missing or not finite.
        """
        return float(self._scaled(self.clouds.space.row(features)).max())

    def is_unlike(self, features: Mapping[str, float]) -> bool:
        """Whether `distance` exceeds `limit`."""
        return self.distance(features) > self.limit

    def p_value(self, features: Mapping[str, float]) -> float:
        """Conformal p-value of an image being familiar: the share of familiar ones that are as far, it included."""
        n = len(self.calibration)
        return (n - bisect.bisect_left(self.calibration, self.distance(features)) + 1) / (n + 1)

    def why(self, features: Mapping[str, float]) -> str:
        """Distance, limit and what stands out, in words, for the reason of a decision."""
        z = self.clouds.space.row(features)
        scaled = self._scaled(z)
        part = int(scaled.argmax())
        kind, name, away = self.clouds.furthest(z)
        about = self.clouds.parts[part]
        like = "" if about == NEAREST else f"like {about}; "
        return (
            f"distance {scaled[part]:.1f}, limit {self.limit:.1f}; {like}{name} {'high' if away > 0 else 'low'} "
            f"for {kind}, the nearest kind"
        )

    def _scaled(self, z: Matrix) -> Matrix:
        return np.asarray((self.clouds.parts_of(z[None])[0] - np.asarray(self.middle)) / np.asarray(self.spread))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact: `from_dict` gives an equal one."""
        return {
            "schema": SCHEMA,
            "features": self.clouds.space.to_dict(),
            "kinds": [cloud.to_dict() for cloud in self.clouds.kinds],
            "strange": [family.to_dict() for family in self.clouds.strange],
            "middle": [*self.middle],
            "spread": [*self.spread],
            "calibration": [*self.calibration],
            "alpha": self.alpha,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Familiar":
        """Read `to_dict`'s form.

        Raises:
            PolicyError: For another schema version, unknown or missing keys, other features or extractor versions, or
                parameters that are not finite numbers in range; the message says what was found.
        """
        found = values.get("schema") if isinstance(values, Mapping) else None
        if found != SCHEMA or isinstance(found, bool):
            raise PolicyError(f"familiar images have schema version {found!r}; expected {SCHEMA}")
        own = ("middle", "spread", "calibration", "alpha")
        table = check_keys(values, "familiar images", ("schema", "features", "kinds", "strange", *own))
        for key in ("kinds", "strange"):
            if not isinstance(table[key], list):
                raise PolicyError(f"{key} is {type(table[key]).__name__}; expected a list")
        kinds, strange = map(Cloud.from_dict, table["kinds"]), map(Strange.from_dict, table["strange"])
        clouds = Clouds(Space.from_dict(table["features"]), tuple(kinds), tuple(strange))
        return cls(clouds, *(table[key] for key in own))
