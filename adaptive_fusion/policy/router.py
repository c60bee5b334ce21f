"""P(complex) from an image's complexity and a question's features: the score, without the threshold.

"Complex" means that the cheap lane loses more quality than the tolerance, which is not the same as looking
complex. Knows feature names, their versions and fitted parameters. Must not know of lanes, thresholds,
budgets or files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from adaptive_fusion.checks import check_keys, number
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.features.complexity import FEATURE_NAMES, VERSION, Complexity
from adaptive_fusion.features.detail import DETAIL_FEATURES
from adaptive_fusion.features.detail import VERSION as DETAIL_VERSION
from adaptive_fusion.features.prompts import PROMPT_FEATURE_NAMES, PROMPT_VERSION
from adaptive_fusion.policy.calibration import Calibration, Platt, calibration_from_dict
from adaptive_fusion.policy.predictors import LargestModel, LinearModel, Matrix, Model, model_from_dict

SCHEMA = 1
"""Version of the JSON form of routers and quality models."""

LOGISTIC = Platt()
"""No calibration beyond the logistic function."""

_KNOWN = frozenset((*FEATURE_NAMES, *DETAIL_FEATURES, *PROMPT_FEATURE_NAMES))
_DETAIL = frozenset(DETAIL_FEATURES)
_PROMPT = frozenset(PROMPT_FEATURE_NAMES)


@dataclass(frozen=True)
class Inputs:
    """The features a fitted model reads, in order, and the versions of the extractors that made them.

    Raises:
        PolicyError: For a feature that no extractor here gives, one named twice, or another extractor
            version: a model fitted on other numbers would answer, and be wrong.
    """

    names: tuple[str, ...]
    complexity: str = VERSION
    prompt: str = PROMPT_VERSION
    detail: str = DETAIL_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        unknown = sorted({str(name) for name in self.names} - _KNOWN)
        if unknown:
            raise PolicyError(f"unknown features {unknown}; expected some of {', '.join(sorted(_KNOWN))}")
        if len(set(self.names)) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise PolicyError(f"features {twice} are named more than once; expected each at most once")
        for what, found, here, read in (
            ("complexity", self.complexity, VERSION, self.reads_image),
            ("prompt", self.prompt, PROMPT_VERSION, self.reads_prompt),
            ("detail", self.detail, DETAIL_VERSION, self.reads_detail),
        ):
            if read and found != here:
                raise PolicyError(f"fitted on {what} features of version {found!r}; expected {here!r}: fit it again")

    @property
    def reads_image(self) -> bool:
        """Whether any feature says how complex the image or clip is."""
        return not (_PROMPT | _DETAIL).issuperset(self.names)

    @property
    def reads_detail(self) -> bool:
        """Whether any feature says how fine the image's details are."""
        return not _DETAIL.isdisjoint(self.names)

    @property
    def reads_prompt(self) -> bool:
        """Whether any feature comes from the prompt; if none does, it need not be measured."""
        return not _PROMPT.isdisjoint(self.names)

    def row(self, complexity: Complexity, prompt: Mapping[str, float] | None = None) -> list[float]:
        """The features in order; NaN for one that was not measured or is not finite.

        Raises:
            PolicyError: If `complexity` was measured by another version of the extractor.
        """
        if self.reads_image and complexity.version != self.complexity:
            raise PolicyError(f"complexity is of version {complexity.version!r}; expected {self.complexity!r}")
        found = complexity.features
        if self.reads_detail and complexity.detail:
            if complexity.detail_version != self.detail:
                raise PolicyError(f"detail is of version {complexity.detail_version!r}; expected {self.detail!r}")
            found = {**found, **complexity.detail}
        asked = prompt or {}
        row = [asked.get(name, math.nan) if name in _PROMPT else found.get(name, math.nan) for name in self.names]
        return [x if -math.inf < x < math.inf else math.nan for x in row]

    def to_dict(self) -> dict[str, Any]:
        """JSON- and TOML-able."""
        detail = {"detail": self.detail} if self.reads_detail else {}
        return {"complexity": self.complexity, "prompt": self.prompt, **detail, "names": [*self.names]}

    @classmethod
    def from_dict(cls, values: Any) -> "Inputs":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "features", ("complexity", "prompt", "names"), ("detail",))
        names = table["names"]
        if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
            raise PolicyError(f"names of features is {names!r}; expected a list of names")
        return cls(tuple(names), table["complexity"], table["prompt"], table.get("detail", DETAIL_VERSION))

    def check_width(self, model: Model, what: str) -> None:
        """Raise PolicyError unless `model` reads rows of this many values."""
        exact = isinstance(model, LinearModel | LargestModel)
        if model.width > len(self.names) or (exact and model.width != len(self.names)):
            raise PolicyError(f"{what} reads {model.width} features and {len(self.names)} are named; expected as many")


class Router(Protocol):
    """One method to extend: P(complex) of one request. Deterministic; the threshold lies elsewhere."""

    @property
    def inputs(self) -> Inputs:
        """What it reads."""
        ...

    def p_complex(self, complexity: Complexity, prompt: Mapping[str, float] | None = None) -> float:
        """P(the cheap lane loses more than the tolerance), 0 to 1, for an image or clip and a prompt."""
        ...

    def p_complex_batch(self, rows: Matrix) -> Matrix:
        """The same, ``[n]``, for rows ``[n, features]`` in the order of `inputs`, for evaluation offline."""
        ...


@dataclass(frozen=True)
class PlainRouter:
    """A router of plain parameters: a linear model or a few trees, then calibration. 1 to 50 µs a request.

    Raises:
        PolicyError: If the model reads another number of features than are named.
    """

    inputs: Inputs
    model: Model
    calibration: Calibration = LOGISTIC

    def __post_init__(self) -> None:
        self.inputs.check_width(self.model, "the router")

    def p_complex(self, complexity: Complexity, prompt: Mapping[str, float] | None = None) -> float:
        """See `Router`."""
        return self.calibration(self.model.raw(self.inputs.row(complexity, prompt)))

    def p_complex_batch(self, rows: Matrix) -> Matrix:
        """See `Router`."""
        return self.calibration.batch(self.model.raw_batch(rows))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact: `from_dict` gives an equal router."""
        return {
            "schema": SCHEMA,
            "features": self.inputs.to_dict(),
            "model": self.model.to_dict(),
            "calibration": self.calibration.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "PlainRouter":
        """Read `to_dict`'s form.

        Raises:
            PolicyError: For another schema version, unknown or missing keys, features or kinds, other
                extractor versions, or parameters that are not finite numbers; the message says what was
                found.
        """
        table = _schema(values, "router", ("features", "model", "calibration"))
        return cls(
            Inputs.from_dict(table["features"]),
            model_from_dict(table["model"]),
            calibration_from_dict(table["calibration"]),
        )


class Estimator(Protocol):
    """What a fitted scikit-learn classifier offers."""

    def predict_proba(self, X: Any, /) -> Any:
        """Probabilities ``[n, 2]``; the second column is P(complex)."""
        ...


@dataclass(frozen=True)
class EstimatorRouter:
    """A router around any fitted classifier with `predict_proba`: for trying out, being slow."""

    inputs: Inputs
    estimator: Estimator

    def p_complex(self, complexity: Complexity, prompt: Mapping[str, float] | None = None) -> float:
        """See `Router`."""
        return float(self.p_complex_batch(np.asarray([self.inputs.row(complexity, prompt)]))[0])

    def p_complex_batch(self, rows: Matrix) -> Matrix:
        """See `Router`."""
        p: Matrix = np.asarray(self.estimator.predict_proba(rows), np.float64)[:, 1]
        return p


@dataclass(frozen=True)
class QualityModel:
    """Expected quality of each operating point for this very request: more than two arms.

    `models` maps a rung's name to a model of its quality, clipped to 0 to 1; points without one keep the
    policy's static figure.
    """

    inputs: Inputs
    models: Mapping[str, Model]

    def __post_init__(self) -> None:
        for name, model in self.models.items():
            self.inputs.check_width(model, f"the quality model of {name}")

    def expected(
        self, names: Sequence[str], complexity: Complexity, prompt: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Expected quality, 0 to 1, of those of the named rungs that have a model."""
        row = self.inputs.row(complexity, prompt)
        return {name: min(1.0, max(0.0, self.models[name].raw(row))) for name in names if name in self.models}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, exact."""
        models = {name: self.models[name].to_dict() for name in sorted(self.models)}
        return {"schema": SCHEMA, "features": self.inputs.to_dict(), "models": models}

    @classmethod
    def from_dict(cls, values: Any) -> "QualityModel":
        """Read `to_dict`'s form; raises PolicyError as `PlainRouter.from_dict` does."""
        table = _schema(values, "quality model", ("features", "models"))
        if not isinstance(table["models"], Mapping):
            raise PolicyError(f"models is {type(table['models']).__name__}; expected a table by rung name")
        models = {str(name): model_from_dict(model) for name, model in table["models"].items()}
        return cls(Inputs.from_dict(table["features"]), models)


def constant_router(p_complex: float = 0.5) -> PlainRouter:
    """A router that reads nothing and always says `p_complex`, in (0, 1), for lanes that are alike.

    Raises:
        PolicyError: For a probability out of that range.
    """
    if not 0 < number(p_complex, "p_complex", error=PolicyError) < 1:
        raise PolicyError(f"p_complex is {p_complex!r}; expected above 0 and below 1")
    return PlainRouter(Inputs(()), LinearModel((), (), math.log(p_complex / (1 - p_complex))))


def _schema(values: Any, what: str, required: tuple[str, ...]) -> Mapping[str, Any]:
    found = values.get("schema") if isinstance(values, Mapping) else None
    if found != SCHEMA or isinstance(found, bool):
        raise PolicyError(f"{what} has schema version {found!r}; expected {SCHEMA}")
    return check_keys(values, what, ("schema", *required))
