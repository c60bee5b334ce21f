"""A policy: a router's score, the threshold that turns it into a lane, each lane's ladder of points, and what tells
how much of it an input needs.

Knows its TOML file, the plain parameters beside it and the policies shipped with the library. Must not know
of models, measured costs or the choice within a ladder.

A policy is a folder of data: ``policy.toml`` (all below), the router's parameters as JSON, optionally a
quality model, needs and familiar data as JSON, fusion weights as safetensors, and a README card. Nothing in it is
executed: a router kept as a pickled estimator (``.joblib``) is read only where the caller says so.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from adaptive_fusion.budget import Budget
from adaptive_fusion.checks import check_keys, number
from adaptive_fusion.errors import PolicyError
from adaptive_fusion.features.complexity import Complexity
from adaptive_fusion.features.prompts import prompt_features
from adaptive_fusion.point import NATIVE
from adaptive_fusion.policy.escalation import Escalation
from adaptive_fusion.policy.familiar import Familiar
from adaptive_fusion.policy.files import (
    POLICY_FILE,
    find_policy,
    load_pickled,
    part,
    read_json,
    read_toml,
    shipped_names,
    write_json,
)
from adaptive_fusion.policy.fitted import Fitted
from adaptive_fusion.policy.legacy import point_from_legacy, point_to_legacy
from adaptive_fusion.policy.router import EstimatorRouter, Inputs, PlainRouter, QualityModel, Router, constant_router
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import Sufficiency, check_floors

SCHEMA = 2
"""Version of the TOML form. Files of version 1 are read too: they know nothing of `cheap`, `tolerance` and the rest."""
SIMPLE, COMPLEX, VIDEO, TEXT = "weighted", "gated", "video", "text"
LANES = (SIMPLE, COMPLEX, VIDEO)
"""The lanes a policy defines: simple images, complex images, clips. Text alone takes the native point."""
NO_BUDGET = Budget()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Route(NamedTuple):
    """P(complex), 0 to 1 (0 for text alone), and the lane it leads to."""

    score: float
    lane: str


@dataclass(frozen=True)
class Policy:
    """How requests are routed and which operating points each lane may use. Immutable and safe to share.

    Attributes:
        name: Letters, digits, ``-`` and ``_``.
        router: Gives P(complex).
        threshold: A still whose P(complex) is at least this takes the gated lane, others the weighted lane.
        lanes: For each of `LANES` its ladder, highest expected quality first.
        description: One line for people.
        budget: Defaults where the caller gives no budget.
        explore: Share of requests that may take a random point that fits, so that logs can be evaluated
            off-policy.
        quality_model: Expected quality per point and request, in place of the rungs' static figures.
        fusion_weights: Trained fusion modules, safetensors files whose headers say what they are for.
        cheap: The rung that "the cheap plan" means; P(complex) is about what it loses. Empty where nothing says so.
        tolerance: Points whose expected quality is within this of the best count as equal, and of those the cheapest
            is taken.
        margin: Factor on the linear scale of text over what the labels' reader needed; see `Sufficiency`.
        floors: Tokens by kind of question (of a clip: each frame's) below which nothing is known.
        fitted: To which model and kinds of data.
        sufficiency: How many pixels an input needs; None takes the ladder's own qualities.
        familiar: What images it was fitted on are like: one that is unlike them gets full compute. None takes all.
        escalation: When a cheap answer is not trusted and the better plan runs; None never asks.

    Raises:
        PolicyError: For a value out of range, a lane missing or unknown, an empty ladder, a point twice in a
            ladder, or a ladder whose quality rises from one rung to the next.
    """

    name: str
    router: Router
    threshold: float
    lanes: Mapping[str, tuple[Rung, ...]]
    description: str = ""
    budget: Budget = NO_BUDGET
    explore: float = 0.0
    quality_model: QualityModel | None = None
    fusion_weights: tuple[Path, ...] = ()
    cheap: str = ""
    tolerance: float = 0.0
    margin: float = 1.0
    floors: Mapping[str, int] = field(default_factory=dict)
    fitted: Fitted = field(default_factory=Fitted)
    sufficiency: Sufficiency | None = None
    familiar: Familiar | None = None
    escalation: Escalation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise PolicyError(f"policy name is {self.name!r}; expected 1 to 64 letters, digits, - and _")
        if not isinstance(self.description, str):
            raise PolicyError(f"description is {self.description!r}; expected text")
        for what in ("threshold", "explore", "tolerance"):
            object.__setattr__(self, what, number(getattr(self, what), what, 0, 1, error=PolicyError))
        object.__setattr__(self, "margin", number(self.margin, "margin", 1, 4, error=PolicyError))
        object.__setattr__(self, "floors", check_floors(self.floors))
        if not isinstance(self.cheap, str):
            raise PolicyError(f"cheap is {self.cheap!r}; expected the name of a rung")
        if self.cheap:
            Rung.parse(self.cheap)
        check_keys(self.lanes, "lanes", LANES)
        for lane in LANES:
            rungs = self.lanes[lane]
            if not isinstance(rungs, list | tuple) or not all(isinstance(rung, Rung) for rung in rungs):
                raise PolicyError(f"lane {lane} is {rungs!r}; expected a tuple of rungs")
        object.__setattr__(self, "lanes", {lane: tuple(self.lanes[lane]) for lane in LANES})
        weights = self.fusion_weights
        if not isinstance(weights, list | tuple) or not all(isinstance(path, Path) for path in weights):
            raise PolicyError(f"fusion_weights is {weights!r}; expected a tuple of paths (pathlib.Path)")
        files = [path.name for path in self.fusion_weights]
        if len(set(files)) != len(files):
            raise PolicyError(f"fusion_weights has files {files}; expected each name once")
        for lane, ladder in self.lanes.items():
            names = [rung.name for rung in ladder]
            qualities = [rung.quality for rung in ladder]
            if not names or len(set(names)) != len(names):
                raise PolicyError(f"lane {lane} has points {names}; expected at least one, each once")
            if qualities != sorted(qualities, reverse=True):
                raise PolicyError(f"lane {lane} has qualities {qualities}; expected the best first")

    @property
    def cheap_rung(self) -> Rung:
        """The rung that "the cheap plan" means; where nothing says so, where the lane for simple images begins."""
        return Rung.parse(self.cheap) if self.cheap else self.lanes[SIMPLE][0]

    def route(self, complexity: Complexity | None, prompt: str | None = None) -> Route:
        """P(complex) and the lane: clips take ``video``, None (text alone) ``text``, stills by the threshold.

        `prompt` is read only if the router uses prompt features; without it they count as missing.
        """
        if complexity is None:
            return Route(0.0, TEXT)
        score = self.router.p_complex(complexity, self._asked(self.router.inputs, prompt))
        if complexity.kind == "video":
            return Route(score, VIDEO)
        return Route(score, COMPLEX if score >= self.threshold else SIMPLE)

    def unlike(self, complexity: Complexity) -> str:
        """Why an image is like nothing that the policy was fitted on, in words; empty where it is like some, and where
        that cannot be said: of clips, and of images whose detail was not measured.
        """
        if self.familiar is None or complexity.kind != "image" or not complexity.detail:
            return ""
        features = {**complexity.features, **complexity.detail}
        if not self.familiar.is_unlike(features):
            return ""
        return f"unlike the images that {self.name} was fitted on ({self.familiar.why(features)})"

    def ladder(self, lane: str, complexity: Complexity | None = None, prompt: str | None = None) -> tuple[Rung, ...]:
        """The lane's rungs in the policy's order, with this request's expected quality where a model has it.

        Raises:
            PolicyError: For a lane other than `LANES` and ``text``.
        """
        if lane == TEXT:
            return (Rung(NATIVE),)
        if lane not in self.lanes:
            raise PolicyError(f"lane is {lane!r}; expected one of {', '.join((*LANES, TEXT))}")
        rungs, model = self.lanes[lane], self.quality_model
        if model is None or complexity is None:
            return rungs
        expected = model.expected([rung.name for rung in rungs], complexity, self._asked(model.inputs, prompt))
        return tuple(replace(rung, quality=expected.get(rung.name, rung.quality)) for rung in rungs)

    @staticmethod
    def _asked(inputs: Inputs, prompt: str | None) -> dict[str, float] | None:
        return prompt_features(prompt) if prompt is not None and inputs.reads_prompt else None

    # Files

    def to_toml(self) -> str:
        """The text of ``policy.toml``; the files it names are written by `save`."""
        parts: dict[str, Any] = {
            "schema": SCHEMA,
            "name": self.name,
            "description": self.description,
            "router": "router.joblib" if isinstance(self.router, EstimatorRouter) else "router.json",
            "threshold": self.threshold,
            "explore": self.explore,
            "cheap": self.cheap,
            "tolerance": self.tolerance,
            "margin": self.margin,
        }
        if self.sufficiency is not None:
            parts["sufficiency"] = "sufficiency.json"
        if self.familiar is not None:
            parts["familiar"] = "familiar.json"
        if self.quality_model is not None:
            parts["quality_model"] = "quality.json"
        if self.fusion_weights:
            parts["fusion_weights"] = [path.name for path in self.fusion_weights]
        parts |= {"budget": self.budget.to_dict(), "features": self.router.inputs.to_dict()}
        parts |= {"floors": dict(self.floors), "fitted": self.fitted.to_dict()}
        if self.escalation is not None:
            parts["escalation"] = self.escalation.to_dict()
        parts["lanes"] = {lane: [rung.to_dict() for rung in ladder] for lane, ladder in self.lanes.items()}
        return tomli_w.dumps(parts)

    def save(self, folder: str | Path) -> Path:
        """Write ``policy.toml`` and the files it names into `folder`, made if need be; returns the folder.

        Raises:
            PolicyError: If the router is neither plain parameters nor a fitted estimator.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.router, PlainRouter):
            write_json(folder / "router.json", self.router.to_dict())
        elif isinstance(self.router, EstimatorRouter):
            import joblib  # only here: a plain router needs none

            joblib.dump(self.router.estimator, folder / "router.joblib")
        else:
            raise PolicyError(f"cannot save a {type(self.router).__name__}; expected PlainRouter or EstimatorRouter")
        if self.quality_model is not None:
            write_json(folder / "quality.json", self.quality_model.to_dict())
        if self.sufficiency is not None:
            write_json(folder / "sufficiency.json", self.sufficiency.to_dict())
        if self.familiar is not None:
            write_json(folder / "familiar.json", self.familiar.to_dict(), indent=None)
        for path in self.fusion_weights:
            target = folder / path.name
            if not (target.exists() and target.samefile(path)):
                shutil.copyfile(path, target)
            part(folder, path.name, ".safetensors")  # what cannot be loaded again must not pass for saved
        (folder / POLICY_FILE).write_text(self.to_toml(), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, name_or_path: str | Path, *, allow_pickle: bool = False) -> "Policy":
        """Load a shipped policy by name, or a path: a folder, a .toml file or a ``vision_tower`` .json file.

        A shipped name wins over a folder of that name in the working directory; ``./balanced`` is the folder.

        Args:
            name_or_path: What to load.
            allow_pickle: Read a router from a ``.joblib`` file, which runs whatever code the file holds: only
                for files whose maker is trusted.

        Raises:
            PolicyError: If there is no such policy, or it does not hold what it should; the message says what
                was found and what is expected.
            ConfigError: For an operating point or a budget that is out of range.
        """
        path = find_policy(name_or_path)
        if path.suffix == ".json":
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_")[:64]
            return cls.from_legacy(read_json(path), name=name or "legacy")
        return _read(path, allow_pickle)

    @staticmethod
    def shipped() -> tuple[str, ...]:
        """Names of the policies that come with the library, sorted."""
        return shipped_names()

    @classmethod
    def from_legacy(cls, values: Any, name: str = "legacy") -> "Policy":
        """A policy of one operating point, in every lane, from the older ``vision_tower`` form.

        Raises:
            PolicyError: For unknown keys and values out of range; see `point_from_legacy`.
        """
        rung = Rung(point_from_legacy(values))
        return cls(name, constant_router(), 0.5, dict.fromkeys(LANES, (rung,)))

    def to_legacy(self) -> dict[str, Any]:
        """The older ``vision_tower`` form, if it can hold this policy.

        Raises:
            PolicyError: If the policy has several operating points, or one that limits pixels or frames.
        """
        shares = {(rung.point, rung.pixel_share) for ladder in self.lanes.values() for rung in ladder}
        (point, share), *others = shares
        if others or share != 1:
            names = sorted({rung.name for ladder in self.lanes.values() for rung in ladder})
            raise PolicyError(
                f"{self.name} has {', '.join(names)}; the vision_tower form holds one point, at all pixels"
            )
        return point_to_legacy(point)


def _read(path: Path, allow_pickle: bool) -> Policy:
    values = read_toml(path)
    schema = values.get("schema")
    if schema not in (1, SCHEMA) or isinstance(schema, bool):
        raise PolicyError(f"{path.name} has schema version {schema!r}; expected 1 or {SCHEMA}")
    table = check_keys(
        values,
        path.name,
        ("schema", "name", "router", "threshold", "features", "lanes"),
        (*_OPTIONAL, *(_SINCE_2 if schema == SCHEMA else ())),
    )
    folder = path.parent
    lanes = check_keys(table["lanes"], "lanes", LANES)
    quality, weights = table.get("quality_model"), table.get("fusion_weights", [])
    enough, familiar, escalation = table.get("sufficiency"), table.get("familiar"), table.get("escalation")
    budget = table.get("budget", {})
    if not isinstance(budget, Mapping):
        raise PolicyError(f"budget is {budget!r}; expected a table of limits")
    if not isinstance(weights, list):
        raise PolicyError(f"fusion_weights is {weights!r}; expected a list of .safetensors files")
    return Policy(
        name=table["name"],
        description=table.get("description", ""),
        router=_read_router(
            part(folder, table["router"], ".json", ".joblib"),
            Inputs.from_dict(table["features"]),
            allow_pickle,
        ),
        threshold=table["threshold"],
        explore=table.get("explore", 0.0),
        lanes={lane: _read_ladder(lane, lanes[lane]) for lane in LANES},
        budget=Budget.from_dict(budget),
        quality_model=None if quality is None else QualityModel.from_dict(read_json(part(folder, quality, ".json"))),
        fusion_weights=tuple(part(folder, name, ".safetensors") for name in weights),
        cheap=table.get("cheap", ""),
        tolerance=table.get("tolerance", 0.0),
        margin=table.get("margin", 1.0),
        floors=table.get("floors", {}),
        fitted=Fitted.from_dict(table.get("fitted", {})),
        sufficiency=None if enough is None else Sufficiency.from_dict(read_json(part(folder, enough, ".json"))),
        familiar=None if familiar is None else Familiar.from_dict(read_json(part(folder, familiar, ".json"))),
        escalation=None if escalation is None else Escalation.from_dict(escalation),
    )


_OPTIONAL = ("description", "explore", "budget", "quality_model", "fusion_weights")
_SINCE_2 = ("cheap", "tolerance", "margin", "floors", "fitted", "sufficiency", "familiar", "escalation")


def _read_router(path: Path, inputs: Inputs, allow_pickle: bool) -> Router:
    if path.suffix == ".joblib":
        return EstimatorRouter(inputs, load_pickled(path, allow_pickle))
    router = PlainRouter.from_dict(read_json(path))
    if router.inputs != inputs:
        raise PolicyError(f"{path.name} has features {router.inputs}; expected {inputs}, as {POLICY_FILE} says")
    return router


def _read_ladder(lane: str, rungs: Any) -> tuple[Rung, ...]:
    if not isinstance(rungs, list) or not all(isinstance(rung, Mapping) for rung in rungs):
        raise PolicyError(f"lane {lane} is {type(rungs).__name__}; expected a list of rungs")
    return tuple(Rung.from_dict(rung) for rung in rungs)
