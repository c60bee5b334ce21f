"""What a canary must not be worse in, by how much, and how sure one must be: one table.

Knows names, scales and shares of alpha. Must not know requests, arms or how evidence is weighed.

Alpha is the probability that a canary that is no worse is ever rolled back, whatever is looked at and how often. It is
shared out, so that it holds for all guardrails together; what an experiment has no outcomes of costs nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from adaptive_fusion.checks import check_keys, integer, number
from adaptive_fusion.errors import ConfigError, PolicyError


@dataclass(frozen=True)
class Guardrail:
    """One metric of an experiment.

    Attributes:
        name: Of the metric, as outcomes have it.
        meaning: One line for people.
        worse: Whether a ``higher`` or a ``lower`` value is worse.
        margin: By how much the canary may be worse on average, in the metric's unit.
        alpha: Its share of the probability of a false rollback.
        low: The least value.
        high: The highest.
        binary: Whether it is 0 or 1.
        eager: Whether speed at the start counts more than in the long run: of what must not happen at all.
        every: Of an arm's outcomes one in so many counts; of a metric whose values hang together.
        required: How many of the canary's requests in a row may come without it, where the control's come with it.
            0 is any number.
        limit: A mean that the canary must not exceed whatever the control does; None where there is none.
        tolerance: Before it gets everything, the canary must have been shown not to be worse by so much; None asks for
            nothing.
    """

    name: str
    meaning: str
    worse: str = "higher"
    margin: float = 0.0
    alpha: float = 0.005
    low: float = 0.0
    high: float = 1.0
    binary: bool = True
    eager: bool = False
    every: int = 1
    required: int = 0
    limit: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(f"name of a guardrail is {self.name!r}; expected letters, digits and _")
        if self.worse not in ("higher", "lower"):
            raise ConfigError(f"worse of {self.name} is {self.worse!r}; expected higher or lower")
        number(self.low, f"low of {self.name}")
        number(self.high, f"high of {self.name}", above=self.low)
        number(self.margin, f"margin of {self.name}", 0.0, below=self.high - self.low)
        number(self.alpha, f"alpha of {self.name}", above=0.0, below=1.0)
        integer(self.every, f"every of {self.name}", 1)
        integer(self.required, f"required of {self.name}", 0)
        if self.tolerance is not None:
            number(self.tolerance, f"tolerance of {self.name}", above=0.0, below=self.high - self.low)
        if self.limit is not None:
            number(self.limit, f"limit of {self.name}", above=self.low, below=self.high)

    @property
    def scaled_margin(self) -> float:
        """The margin as a share of the metric's range."""
        return self.margin / (self.high - self.low)

    def badness(self, value: float) -> float | None:
        """A value from 0 (good) to 1 (bad); None for what is no value of this metric, which counts as missing."""
        if isinstance(value, str) or not self.low <= value <= self.high:  # which no NaN is
            return None
        share = (value - self.low) / (self.high - self.low)
        return share if self.worse == "higher" else 1.0 - share

    def value(self, badness: float) -> float:
        """The value of a badness: the way back."""
        share = badness if self.worse == "higher" else 1.0 - badness
        return self.low + share * (self.high - self.low)

    def to_dict(self) -> dict[str, Any]:
        """In plain values for JSON."""
        return asdict(self)


DEFAULT = (
    Guardrail("deadline_misses", "answers later than their deadline", alpha=0.02, required=20, tolerance=0.05),
    Guardrail("errors", "requests that ended in an error", alpha=0.01, eager=True, required=1, tolerance=0.05),
    Guardrail("dead", "requests that ended in an error, whatever the control does", alpha=0.0025, limit=0.5),
    Guardrail("out_of_memory", "requests that ran out of memory, answered or not", alpha=0.005, eager=True),
    Guardrail(
        "miss_price", "logarithm of what a miss costs the controller, over its range", margin=0.35, alpha=0.0025,
        binary=False, every=50,
    ),
    Guardrail("escalations", "answers that the better plan had to give", margin=0.05, alpha=0.0025),
    Guardrail("ratings", "what people say of answers", "lower", margin=0.02, alpha=0.0035, binary=False),
    Guardrail(
        "quality", "what is kept of the full answer, by shadow labels", "lower", margin=0.01, alpha=0.004, binary=False
    ),
)  # fmt: skip
"""What every experiment is guarded by, unless it says otherwise; alpha is 0.05 together."""
BESIDE = ("quality",)
"""Of these, what is known only of answers that were judged beside, which a shadow does: live arms have no values."""
PAIRED = (*BESIDE, "errors")
"""Of these, what a shadow can know."""


def guardrails_from(values: Any) -> tuple[Guardrail, ...]:
    """Guardrails from a list of tables; a table needs what differs from the default of its name.

    Raises:
        ConfigError: For unknown keys, values out of range, a name twice, or an alpha that is too large together.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(f"guardrails are {type(values).__name__}; expected a list of at least one table")
    known = {rail.name: rail for rail in DEFAULT}
    found = []
    for table in values:
        name = table.get("name") if isinstance(table, Mapping) else None
        base = known[name].to_dict() if isinstance(name, str) and name in known else {"meaning": ""}
        try:
            check_keys(table, "a guardrail", ("name",), tuple(Guardrail.__dataclass_fields__))
        except PolicyError as error:
            raise ConfigError(str(error)) from None
        found.append(Guardrail(**{**base, **table}))
    names = [rail.name for rail in found]
    if len(set(names)) != len(names):
        raise ConfigError(f"guardrails are {', '.join(names)}; expected each name once")
    whole = math.fsum(rail.alpha for rail in found)
    if whole >= 0.5:
        raise ConfigError(f"alpha of all guardrails is {whole:g} together; expected less than 0.5, such as 0.05")
    return tuple(found)
