"""An experiment: what is tried, on whom, by which steps and with which care.

Knows guardrails and units. Must not know of events, requests, stores or runners.

Kinds: ``audit`` decides by the new policy, logs that and runs natively; ``shadow`` answers by the old policy and runs
the new one beside it on a sampled share; ``ab`` gives each arm a fixed share; ``canary`` raises the new policy's share
step by step, and at the last it has everything. Every kind but audit is guarded.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaptive_fusion.checks import integer, number
from adaptive_fusion.errors import ConfigError
from adaptive_fusion.rollout.assignment import UNITS
from adaptive_fusion.rollout.guardrails import BESIDE, DEFAULT, PAIRED, Guardrail, guardrails_from

AUDIT, SHADOW, AB, CANARIES = "audit", "shadow", "ab", "canary"
KINDS = (AUDIT, SHADOW, AB, CANARIES)
RUNNING, ROLLED_BACK, ABORTED, PROMOTED = "running", "rolled_back", "aborted", "promoted"
STEPS = (0.01, 0.05, 0.25, 0.5, 1.0)
LEAST = (20, 50, 150, 400)
"""The canary's outcomes at each step but the last, at least, before the next."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Experiment:
    """What is tried, on whom and with which care.

    Attributes:
        name: Letters, digits, ``.``, ``-`` and ``_``.
        kind: One of `KINDS`.
        canary: The new policy: a shipped one's name or a path.
        control: The old one's name, for people; the server's own is what runs.
        unit: What keeps its arm: see `UNITS`.
        salt: Of the assignment; another experiment should have another.
        steps: The canary's share at each step, rising. An ``ab`` has one, of a shadow or audit it is the sampled share.
        least: The canary's outcomes at each step but the last, at least, before the next.
        guardrails: What it must not be worse in.
        estimate: What the new policy's answers would have been worth on logged traffic, 0 to 1: ``mean``, ``low`` and
            ``high``. It stands beside what is measured, and nothing follows from it. None is none.

    Raises:
        ConfigError: For a value that is out of range.
    """

    name: str
    kind: str
    canary: str
    control: str = ""
    unit: str = "request"
    salt: str = ""
    steps: tuple[float, ...] = STEPS
    least: tuple[int, ...] = LEAST
    guardrails: tuple[Guardrail, ...] = DEFAULT
    estimate: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(f"name is {self.name!r}; expected 1 to 64 letters, digits, ., - and _")
        for what, value, valid in (("kind", self.kind, KINDS), ("unit", self.unit, UNITS)):
            if value not in valid:
                raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(valid)}")
        if not isinstance(self.canary, str) or not self.canary:
            raise ConfigError(f"canary is {self.canary!r}; expected a policy's name or path")
        steps = tuple(number(share, "a step", above=0.0, high=1.0) for share in self.steps)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "least", tuple(integer(count, "least of a step", 1) for count in self.least))
        if self.kind == CANARIES:
            if list(steps) != sorted(set(steps)) or len(steps) < 2 or steps[-1] != 1.0:
                raise ConfigError(f"steps are {list(steps)}; expected at least two rising shares that end with 1")
            if len(self.least) != len(steps) - 1:
                raise ConfigError(f"least has {len(self.least)} numbers; expected {len(steps) - 1}, one a step but 1")
        elif len(steps) != 1 or (self.kind == AB and steps[0] == 1.0):
            raise ConfigError(f"steps of an {self.kind} are {list(steps)}; expected one share, of an ab below 1")
        object.__setattr__(self, "guardrails", tuple(self.guardrails))
        if not self.guardrails or not all(isinstance(rail, Guardrail) for rail in self.guardrails):
            raise ConfigError("guardrails are none; expected at least one Guardrail")
        self._check_that_values_come()
        object.__setattr__(self, "salt", self.salt or self.name)
        if self.estimate is not None:
            object.__setattr__(self, "estimate", _checked(self.estimate))

    def _check_that_values_come(self) -> None:
        """What no value ever comes of guards nothing: a canary would rise on no evidence."""
        names = {rail.name for rail in self.guardrails}
        if self.kind in (AB, CANARIES) and names <= set(BESIDE):
            raise ConfigError(
                f"guardrails of the {self.kind} are {', '.join(sorted(names))}, of which only a shadow has values; "
                "expected one of live requests among them, such as errors, or a shadow"
            )
        if self.kind == SHADOW and names <= {rail.name for rail in DEFAULT} - set(PAIRED):
            raise ConfigError(
                f"guardrails of the shadow are {', '.join(sorted(names))}, of which only live requests have values; "
                f"expected one of {', '.join(PAIRED)} among them"
            )

    def to_dict(self) -> dict[str, Any]:
        """In plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Experiment":
        """The way back.

        Raises:
            ConfigError: For unknown or missing keys, or values out of range.
        """
        known = set(cls.__dataclass_fields__)
        if not isinstance(values, Mapping) or set(values) - known or not {"name", "kind", "canary"} <= set(values):
            raise ConfigError(
                f"the experiment has the keys {sorted(map(str, values))}; expected name, kind, canary and some of "
                f"{', '.join(sorted(known))}"
            )
        given = dict(values)
        if "guardrails" in given:
            given["guardrails"] = guardrails_from(given["guardrails"])
        for name in ("steps", "least"):
            if name in given:
                if not isinstance(given[name], list | tuple):
                    raise ConfigError(f"{name} is {given[name]!r}; expected a list of numbers")
                given[name] = tuple(given[name])
        return cls(**given)


def _checked(estimate: Any) -> dict[str, float]:
    ends = ("low", "mean", "high")
    if not isinstance(estimate, Mapping) or set(estimate) != set(ends):
        raise ConfigError(f"estimate is {estimate!r}; expected low, mean and high")
    return {name: number(estimate[name], f"{name} of estimate") for name in ends}
