"""How many octaves of pixels a model itself needs beside the general needs: learned from what its own answers lost.

Knows names of features, kinds of questions and fitted numbers. Must not know what the general needs are, nor how any
of it was learned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_fusion.checks import check_keys, number, numbers
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.features.complexity import FEATURE_NAMES, Complexity
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.prompts import PROMPT_KINDS

MOST_OCTAVES = 8.0
"""A 256th of the pixels, or so many times: beyond that nothing was ever measured."""
_KNOWN = frozenset((*FEATURE_NAMES, *DETAIL_FEATURES))


@dataclass(frozen=True)
class OwnNeeds:
    """``octaves = kinds[kind] + sum of weights[i] (x[i] - middle[i]) + margin``, of images and of kinds of questions
    that were asked.

    Attributes:
        kinds: Octaves by kind of question; for others, and for clips, the general needs hold.
        names: Features of the image.
        middle: Of each feature, where it adds nothing.
        weights: Of each feature, octaves for each unit above its middle.
        margin: Octaves on top, so that what is lost on average stays within the policy's tolerance.
        per_octave: Quality lost by each octave below what is needed.

    Raises:
        PolicyError: For an unknown feature or kind, lists of different lengths, or numbers out of range.
    """

    kinds: Mapping[str, float]
    names: tuple[str, ...]
    middle: tuple[float, ...]
    weights: tuple[float, ...]
    margin: float
    per_octave: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for what in ("middle", "weights"):
            object.__setattr__(self, what, numbers(getattr(self, what), what, error=PolicyError))
        if not len(self.names) == len(self.middle) == len(self.weights):
            raise PolicyError(
                f"own needs have {len(self.names)} names, {len(self.middle)} middles and {len(self.weights)} weights;"
                " expected as many of each"
            )
        if unknown := sorted(set(self.names) - _KNOWN):
            raise PolicyError(f"own needs read the features {unknown}; expected some of {', '.join(sorted(_KNOWN))}")
        if unknown := sorted(map(str, set(self.kinds) - set(PROMPT_KINDS))):
            raise PolicyError(f"own needs have the kinds {unknown}; expected some of {', '.join(PROMPT_KINDS)}")
        kinds = {kind: number(value, f"own needs of {kind}", error=PolicyError) for kind, value in self.kinds.items()}
        object.__setattr__(self, "kinds", kinds)
        number(self.margin, "margin of own needs", error=PolicyError)
        number(self.per_octave, "per_octave of own needs", 0, error=PolicyError)

    def octaves(self, kind: str, complexity: Complexity) -> float | None:
        """What to add to log2 of the pixels that are generally enough; None where nothing was learned of such a
        request, and the general needs hold."""
        if complexity.kind != "image" or kind not in self.kinds:
            return None
        found = {**complexity.features, **complexity.detail}
        if not found.keys() >= set(self.names):
            return None
        total = self.kinds[kind] + self.margin
        for name, middle, weight in zip(self.names, self.middle, self.weights, strict=True):
            total += weight * (found[name] - middle)
        return min(MOST_OCTAVES, max(-MOST_OCTAVES, total))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        return {
            "kinds": dict(self.kinds),
            "names": [*self.names],
            "middle": [*self.middle],
            "weights": [*self.weights],
            "margin": self.margin,
            "per_octave": self.per_octave,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "OwnNeeds":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "own needs", ("kinds", "names", "middle", "weights", "margin", "per_octave"))
        if not isinstance(table["kinds"], Mapping):
            raise PolicyError(f"kinds of own needs is {type(table['kinds']).__name__}; expected a table of octaves")
        if not isinstance(table["names"], list) or not all(isinstance(name, str) for name in table["names"]):
            raise PolicyError(f"names of own needs is {table['names']!r}; expected a list of names")
        return cls(**table)
