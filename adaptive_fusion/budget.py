"""Limits of a request: latency, time to the first token, memory, and how often they must hold.

Knows numbers and their valid ranges, and how budgets from several sources combine. Knows nothing of
models, points or clocks, and reads no environment by itself: the caller passes the mapping.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from adaptive_fusion.checks import number
from adaptive_fusion.errors import BudgetError

ENV_PREFIX = "ADAPTIVE_FUSION_"
ON_INFEASIBLE = ("cheapest", "refuse")
ON_DEADLINE = ("finish", "stop")
MAX_LATENCY_MS = 3_600_000.0
MAX_VRAM_GB = 4096.0

_NUMBERS = {
    "latency_ms": MAX_LATENCY_MS,
    "ttft_ms": MAX_LATENCY_MS,
    "vram_gb": MAX_VRAM_GB,
    "attainment": 1.0,
}
_CHOICES = {"on_infeasible": ON_INFEASIBLE, "on_deadline": ON_DEADLINE}
_DEFAULTS: dict[str, Any] = {"attainment": 0.95, "on_deadline": "finish"}
_UNSET: Any = None


@dataclass(frozen=True, slots=True)
class Budget:
    """What one request may cost. Every argument left out (or None) is *not set*: it takes no part in
    `merge` and reads as its default.

    Attributes:
        latency_ms: Deadline for the last token, counted from the request's arrival: queueing is included.
        ttft_ms: Deadline for the first token, from arrival likewise.
        vram_gb: GiB that the request may take above the resting set (the weights are not counted).
        attainment: Share of the feasible requests that must keep their deadlines, above 0 and below 1;
            0.95 if not set.
        on_infeasible: When no operating point fits: run the ``cheapest`` all the same, or ``refuse`` before the
            prefill. The default is ``cheapest``; with ``on_deadline="stop"`` it is ``refuse``.
        on_deadline: At the deadline let generation ``finish`` (the default), or ``stop`` it there; then an answer
            that would end late is cut off, and only one that would begin late does not fit.
        given: Names of the fields that were set.

    Raises:
        BudgetError: For a value that is not a finite number in range or not one of the choices.
    """

    latency_ms: float | None = None
    ttft_ms: float | None = None
    vram_gb: float | None = None
    attainment: float = _UNSET
    on_infeasible: str = _UNSET
    on_deadline: str = _UNSET
    given: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = frozenset(name for name in (*_NUMBERS, *_CHOICES) if getattr(self, name) is not None)
        for name in given:
            value = getattr(self, name)
            if name in _CHOICES:
                if value not in _CHOICES[name]:
                    raise BudgetError(f"{name} is {value!r}; expected one of {', '.join(_CHOICES[name])}")
                continue
            top: dict[str, float] = {"below" if name == "attainment" else "high": _NUMBERS[name]}
            object.__setattr__(self, name, number(value, name, above=0, **top, error=BudgetError))
        for name, default in _DEFAULTS.items():
            if name not in given:
                object.__setattr__(self, name, default)
        if "on_infeasible" not in given:
            # A hard deadline starts nothing that is predicted to miss it, unless it is told to.
            object.__setattr__(self, "on_infeasible", "refuse" if self.on_deadline == "stop" else "cheapest")
        object.__setattr__(self, "given", given)

    def to_dict(self) -> dict[str, Any]:
        """Only what was set, in plain values; `from_dict` reads it back."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in self.given}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Budget":
        """Read `to_dict`'s form, as a policy file or a request carries it; None means not set.

        Raises:
            BudgetError: For an unknown name or a value out of range.
        """
        known = (*_NUMBERS, *_CHOICES)
        if not isinstance(values, Mapping):
            raise BudgetError(f"budget is {values!r}; expected a table of {', '.join(known)}")
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise BudgetError(f"budget has unknown limits {unknown}; expected {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Budget":
        """Read ``ADAPTIVE_FUSION_LATENCY_MS``, ``..._TTFT_MS``, ``..._VRAM_GB``, ``..._ATTAINMENT``,
        ``..._ON_INFEASIBLE`` and ``..._ON_DEADLINE`` from the mapping given; empty means not set.

        Raises:
            BudgetError: For a value that is no number, out of range, or not one of the choices; names the
                variable.
        """
        values: dict[str, Any] = {}
        for name in (*_NUMBERS, *_CHOICES):
            text = environ.get(ENV_PREFIX + name.upper(), "").strip()
            if not text:
                continue
            try:
                values[name] = float(text) if name in _NUMBERS else text
            except ValueError:
                raise BudgetError(f"{ENV_PREFIX}{name.upper()} is {text!r}; expected a number") from None
        try:
            return cls(**values)
        except BudgetError as error:
            raise BudgetError(f"in the environment ({ENV_PREFIX}...): {error}") from None

    def merge(self, *stronger: "Budget | None") -> "Budget":
        """This budget with the set fields of stronger ones put over it, each stronger than the one before.

        The order, weakest first: Python, policy file, environment, command line, the request itself. Per
        field: a request that sets only `latency_ms` keeps the memory limit of the policy file.

        Raises:
            BudgetError: For anything that is not a Budget.
        """
        values = self.to_dict()
        for budget in stronger:
            if budget is not None:
                if not isinstance(budget, Budget):
                    raise BudgetError(f"budget is {budget!r}; expected a Budget or None")
                values.update(budget.to_dict())
        return Budget(**values)
