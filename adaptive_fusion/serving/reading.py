"""One field of a request's JSON: read, or refused by its name.

Knows names and values. Must not know what fields there are.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from adaptive_fusion.errors import AdaptiveFusionError
from adaptive_fusion.serving.refusals import Refusal

T = TypeVar("T")


def checked(name: str, read: Callable[[], T]) -> T:
    """What `read` gives; its errors become refusals that name the field."""
    try:
        return read()
    except Refusal:
        raise
    except AdaptiveFusionError as error:
        raise refused(name, str(error)) from error


def refused(name: str, message: str) -> Refusal:
    return Refusal(message, param=name)


def flag(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise refused(name, f"{name} is {str(value)[:80]!r}; expected true or false")
    return value
