"""When a cheap plan's answer is not trusted: thresholds on the model's own uncertainty, by rung and kind of question.

The model is uncertain by the entropy of its first token's distribution (of several: their mean), in nats, from its own
logits. Knows rungs' names, kinds of questions and numbers. Must not know how entropies are measured or thresholds
learned.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from adaptive_fusion.checks import check_keys, integer, is_number, number
from adaptive_fusion.errors import ConfigError, PolicyError
from adaptive_fusion.features.prompts import PROMPT_KINDS
from adaptive_fusion.policy.rungs import Rung
from adaptive_fusion.policy.sufficiency import BLANKS_LOSE

ANY = "*"
"""The rung, or the kind of question, that stands for all that have no threshold of their own."""
ANY_SPARED = "*blank"
"""All rungs that leave the model every detail and spare blank parts alone, where one has no threshold of its own."""
MOST_TOKENS = 4
"""The most first tokens that may be looked at."""
GENERAL_THRESHOLD = 0.1
"""Nats above which an answer is not trusted where nothing was learned. On fresh scenes of the reference model it keeps
0.35 to 0.38 of the answers of cheap plans and loses 0.011 to 0.017 of quality (``benchmarks/escalation.py``)."""
UNFITTED_THRESHOLD = 0.05
"""Nats above which an answer is not trusted whose plan was chosen by a policy that was not fitted to the model: the
mean of `MOST_TOKENS` first tokens, since a caption's first token is often certain whatever follows."""
SPARED_THRESHOLD = 1.0
"""Nats above which an answer to all but blank parts is not trusted. With every detail there the model is about as
unsure as at full compute, so that the entropy tells only whether it can do with copies at all."""
GENERAL_SHARE = 0.65
"""Share of requests that is expected to be above it, until it is known better."""
LEAST_AUC = 0.7
"""What the entropy must tell of the loss (area under the ROC curve) for a threshold to be of use."""


@dataclass(frozen=True)
class Threshold:
    """Where a rung's answers stop being trusted.

    Attributes:
        threshold: Entropy in nats above which the better plan runs; None where entropy tells too little, so that it
            is not looked at.
        auc: How well the entropy tells the answers that lose from the others, on the rows it was learned from.
        rows: How many these were; 0 where nothing was learned.
        loss: What is lost to full compute, in quality, where every answer is kept.
        left: What is still lost where those above the threshold go on, on average over rows that did not choose it.
        share: Share of these rows that goes on.
    """

    threshold: float | None = None
    auc: float | None = None
    rows: int = 0
    loss: float = 0.0
    left: float = 0.0
    share: float = GENERAL_SHARE

    def __post_init__(self) -> None:
        if self.threshold is not None:
            object.__setattr__(self, "threshold", number(self.threshold, "threshold", 0, error=PolicyError))
        if self.auc is not None:
            object.__setattr__(self, "auc", number(self.auc, "auc", 0, 1, error=PolicyError))
        integer(self.rows, "rows", 0, error=PolicyError)
        for what in ("loss", "left", "share"):
            object.__setattr__(self, what, number(getattr(self, what), what, 0, 1, error=PolicyError))

    @property
    def learned(self) -> bool:
        """Whether it was learned from answers of this rung."""
        return self.rows > 0

    def to_dict(self) -> dict[str, Any]:
        """TOML-able values; a threshold that is not there is left out, and what is not known."""
        found = {"threshold": self.threshold, "auc": self.auc, "rows": self.rows}
        said = {"loss": self.loss, "left": self.left, "share": self.share}
        known = said if self.learned or said != _UNKNOWN else {}
        return {name: value for name, value in {**found, **known}.items() if value is not None}


GENERAL = Threshold(GENERAL_THRESHOLD)
_UNKNOWN = {"loss": GENERAL.loss, "left": GENERAL.left, "share": GENERAL.share}


@dataclass(frozen=True)
class Escalation:
    """How requests go on from a cheap plan to the better one.

    Attributes:
        k: First tokens that are looked at, 1 to `MOST_TOKENS`. Each after the first costs a stream one more step
            before anything is shown.
        alpha: Loss of quality to the better plan that the thresholds keep to on average.
        thresholds: By rung, then by kind of question; `ANY` stands for all others.
        always: Whether plans that count as good as any are asked about as well, full compute being the better plan.
        sure: By lane, P(complex) up to which its first rung is taken without asking: there the answers kept as much as
            the policy was to keep, so that a second pass would only cost.
        first: By lane, then by kind of question, the rung that was learned to be the first to take, whatever else
            counts as good as any: it is asked about if it has a threshold, and taken as it is if not. Empty for full
            compute. A lane or kind that is not there goes by what counts as good as any.

    Raises:
        PolicyError: For a value out of range or an unknown kind of question.
    """

    k: int = 1
    alpha: float = 0.05
    thresholds: Mapping[str, Mapping[str, Threshold]] = field(default_factory=dict)
    always: bool = False
    sure: Mapping[str, float] = field(default_factory=dict)
    first: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        integer(self.k, "k of escalation", 1, MOST_TOKENS, error=PolicyError)
        object.__setattr__(self, "alpha", number(self.alpha, "alpha", above=0, below=1, error=PolicyError))
        if not isinstance(self.always, bool):
            raise PolicyError(f"always of escalation is {self.always!r}; expected true or false")
        if not isinstance(self.sure, Mapping):
            raise PolicyError(f"sure of escalation is {self.sure!r}; expected a table of P(complex) by lane")
        for lane, p in self.sure.items():
            number(p, f"sure of escalation for the lane {lane}", 0, 1, error=PolicyError)
        for what, tables in (("thresholds", self.thresholds), ("first", self.first)):
            if not isinstance(tables, Mapping) or not all(isinstance(kinds, Mapping) for kinds in tables.values()):
                raise PolicyError(f"{what} of escalation is {tables!r}; expected tables by kind of question")
            for name, kinds in tables.items():
                if unknown := set(kinds) - {ANY, *PROMPT_KINDS}:
                    known = ", ".join((ANY, *PROMPT_KINDS))
                    raise PolicyError(f"{what} of {name} have the kind {min(unknown)!r}; expected one of {known}")
        for lane, rungs in self.first.items():
            if wrong := [rung for rung in rungs.values() if not isinstance(rung, str)]:
                raise PolicyError(f"first of {lane} has {wrong[0]!r}; expected the name of a rung, or nothing")

    def threshold(self, rung: str, kind: str) -> Threshold:
        """The threshold for a rung and a kind of question: its own, else the general ones, else `GENERAL`."""
        spared = ANY_SPARED in self.thresholds and spares_blanks(rung)
        for name in (rung, ANY_SPARED, ANY) if spared else (rung, ANY):
            kinds = self.thresholds.get(name, {})
            if found := kinds.get(kind, kinds.get(ANY)):
                return found
        return GENERAL

    def first_of(self, lane: str, kind: str) -> str | None:
        """The rung that a lane takes first for a kind of question, or for every kind that has none of its own; empty
        for full compute, None where that was not learned."""
        kinds = self.first.get(lane, {})
        return kinds.get(kind, kinds.get(ANY))

    def to_dict(self) -> dict[str, Any]:
        """TOML-able values."""
        tables = {
            rung: {kind: each.to_dict() for kind, each in kinds.items()} for rung, kinds in self.thresholds.items()
        }
        always = {"always": True} if self.always else {}
        sure = {"sure": dict(self.sure)} if self.sure else {}
        first = {"first": {lane: dict(kinds) for lane, kinds in self.first.items()}} if self.first else {}
        return {"k": self.k, "alpha": self.alpha, **always, **sure, **first, "thresholds": tables}

    @classmethod
    def from_dict(cls, values: Any) -> "Escalation":
        """Read `to_dict`'s form; raises PolicyError where it is not one."""
        table = check_keys(values, "escalation", (), ("k", "alpha", "always", "sure", "first", "thresholds"))
        rungs = table.get("thresholds", {})
        if not isinstance(rungs, Mapping) or not all(isinstance(kinds, Mapping) for kinds in rungs.values()):
            raise PolicyError(f"thresholds of escalation is {rungs!r}; expected tables by rung and kind of question")
        read = {str(rung): {str(kind): _read(each) for kind, each in kinds.items()} for rung, kinds in rungs.items()}
        always, sure, first = table.get("always", False), table.get("sure", {}), table.get("first", {})
        return cls(table.get("k", 1), table.get("alpha", 0.05), read, always, sure, first)


UNFITTED = Escalation(
    k=MOST_TOKENS,
    always=True,
    thresholds={
        ANY: {
            "describe": Threshold(UNFITTED_THRESHOLD, loss=0.1, left=0.01, share=0.1),
            ANY: Threshold(UNFITTED_THRESHOLD, loss=0.3, left=0.01, share=0.8),
        },
        ANY_SPARED: {ANY: Threshold(SPARED_THRESHOLD, loss=BLANKS_LOSE, left=0.005, share=0.05)},
    },
)
"""For policies that were not fitted to the model at hand, whose sufficient plans are a guess: what keeping every such
answer may lose, what is lost after the verdict, and how many go on at the least until it is known better."""


@lru_cache(maxsize=4096)
def spares_blanks(rung: str) -> bool:
    """Whether the rung of that name leaves the model every detail and spares blank parts alone; False for a name of
    something else."""
    try:
        step = Rung.parse(rung)
    except (ConfigError, PolicyError):
        return False
    return step.pixel_share == 1.0 and step.point.spares_blanks_only


def _read(values: Any) -> Threshold:
    """A threshold's table, or the number alone."""
    if is_number(values):
        return Threshold(values)
    return Threshold(**check_keys(values, "threshold", (), ("threshold", "auc", "rows", "loss", "left", "share")))
