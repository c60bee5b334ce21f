"""Every error the library raises on purpose, grouped by cause under one root, and what it warns of.

Knows nothing of models, media or budgets. Messages name the received value and the valid choices and carry no
absolute path or network address, so they can be shown to a remote caller.
"""

from collections.abc import Sequence
from typing import Any


class AdaptiveFusionError(Exception):
    """Root of all errors of this library."""


class MediaError(AdaptiveFusionError, ValueError):
    """An image or video that cannot be used: missing, empty, broken, too large or of a refused format."""


class MediaRefused(MediaError):
    """An image or video that a server does not take; `reason` says why in one word, for counting."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ConfigError(AdaptiveFusionError, ValueError):
    """A setting that is out of range or unknown."""


class BudgetError(ConfigError):
    """A latency, memory or attainment budget that is not a finite positive number in range."""


class PolicyError(ConfigError):
    """A policy that cannot be found, read or trusted."""


class ContextLengthError(ConfigError):
    """A prompt and the answer asked for that together are longer than the model's context."""


class RolloutFileError(AdaptiveFusionError, OSError):
    """The file of experiments with policies cannot be read or written now; `ConfigError` says that it is none."""


class UnsupportedModelError(AdaptiveFusionError):
    """The model cannot be driven by an adapter of this library, or a knob does not apply to it."""


class InfeasibleBudgetError(AdaptiveFusionError):
    """No operating point fits the budget and the budget asks for an early refusal."""


class NotCopyableError(AdaptiveFusionError, TypeError):
    """An object that holds a model and its lock was to be pickled or copied."""


class MissingExtraError(AdaptiveFusionError, ImportError):
    """An optional dependency that this function needs is not installed."""


class OutOfMemoryError(AdaptiveFusionError, MemoryError):
    """Every operating point that was tried ran out of memory."""


class PolicyMismatchWarning(UserWarning):
    """The policy in use was fitted to another model, or to none, or brings fusion weights that do not fit."""


class RequestsFailed(AdaptiveFusionError):
    """Of several requests of one call some failed. `outcomes` has, in their order, the `Reply` of each that was
    answered and the error of each that was not."""

    def __init__(self, outcomes: Sequence[Any]) -> None:
        self.outcomes = tuple(outcomes)
        failed = [(index, each) for index, each in enumerate(self.outcomes) if isinstance(each, Exception)]
        index, first = failed[0]
        said = f": {first}" if isinstance(first, AdaptiveFusionError) else ""  # other messages may name files
        super().__init__(
            f"{len(failed)} of {len(self.outcomes)} requests failed, of which the first is number {index} "
            f"({type(first).__name__}{said}); outcomes has the replies to the others"
        )


class Interrupted(AdaptiveFusionError):
    """The work was called off before it ended."""


class GateRefused(AdaptiveFusionError):
    """A new policy that is worse than the incumbent; the message holds the figures, `verdict` all that the gate found
    (`learning.fitting.gate.Verdict`)."""

    def __init__(self, message: str, verdict: Any) -> None:
        super().__init__(message)
        self.verdict = verdict
