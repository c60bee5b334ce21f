"""Which field of a chat request an error of the core is about.

Knows requests and the library's errors. Must not know of HTTP or of what raised them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from adaptive_fusion.errors import (
    AdaptiveFusionError,
    ConfigError,
    InfeasibleBudgetError,
    MediaError,
    UnsupportedModelError,
)
from adaptive_fusion.serving.fields import FIELDS
from adaptive_fusion.serving.refusals import Refusal, as_refusal
from adaptive_fusion.serving.schema import ChatCall


@contextmanager
def blaming(call: ChatCall) -> Iterator[None]:
    """Errors of the library become refusals that name the field of `call` which is to blame, where one is."""
    try:
        yield
    except (Refusal, MediaError):  # which say it themselves
        raise
    except AdaptiveFusionError as error:
        refusal = as_refusal(error)
        refusal.param = refusal.param or _field_of(error, call)
        raise refusal from error


def _field_of(error: AdaptiveFusionError, call: ChatCall) -> str | None:
    if isinstance(error, InfeasibleBudgetError):
        # Of the server's own limits no field is to blame.
        return next((f"adaptive_fusion.{name}" for name in call.budget.to_dict()), None)
    if isinstance(error, UnsupportedModelError):
        named = {"point": call.point, "policy": call.policy}
        return next((f"adaptive_fusion.{name}" for name, value in named.items() if value is not None), None)
    if isinstance(error, ConfigError):
        first = str(error).split(maxsplit=1)[0] if str(error) else ""
        return first if first in FIELDS else "messages"
    return None
