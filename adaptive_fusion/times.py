"""Moments as people and programs write them, read as seconds since the epoch.

Knows numbers and ISO 8601. Must not know what happened then.
"""

import math
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

from adaptive_fusion.checks import is_number
from adaptive_fusion.errors import ConfigError

UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
"""Units of numbers since the epoch, by their names."""
NO_ZONE = "ISO 8601 without a zone"
FORMS = f"{', '.join(UNITS)} since the epoch (up to 2100; all but seconds from 2000 on) or ISO 8601"
"""What is accepted, in words."""
LATEST_S = 4_102_444_800
"""The year 2100: no number above it is one of seconds."""
_2000 = 946_684_800
_DAY = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")


class Moment(NamedTuple):
    """When, in seconds since the epoch, and the form it was written in: one of `UNITS`, ISO 8601 or `NO_ZONE`."""

    seconds: float
    form: str


def read_moment(value: Any, what: str) -> Moment:
    """A moment from a number, a text or a datetime; without a zone it is one of UTC.

    The unit of a number follows from its size. Seconds may be any from 0 to the year 2100, so that small ones can
    count from a start of their own. Finer units are read from the year 2000 on: what lies between 2100 in one unit and
    2000 in the next is refused, as are days written as eight digits, which could be seconds.

    Args:
        value: What was written.
        what: Its name, for the message.

    Raises:
        ConfigError: For anything else.
    """
    found = None
    if isinstance(value, datetime):
        found = _of_datetime(value)
    elif isinstance(value, str):
        found = _of_text(value.strip())
    elif is_number(value):
        found = _of_number(value)
    if found is None:
        raise ConfigError(f"{what} is {value!r}; expected {FORMS}")
    return found


def _of_text(text: str) -> Moment | None:
    if _DAY.fullmatch(text):
        return None
    try:
        return _of_number(int(text) if text.isascii() and text.isdigit() else float(text))
    except ValueError:
        pass
    try:
        return _of_datetime(datetime.fromisoformat(re.sub(r"\s*(UTC|GMT)$", "Z", text)))
    except ValueError:
        return None


def _of_number(number: float) -> Moment | None:
    for name, per_second in UNITS.items():
        if (0 if per_second == 1 else _2000 * per_second) <= number <= LATEST_S * per_second:
            return Moment(number / per_second, name)
    return None


def _of_datetime(moment: datetime) -> Moment | None:
    form = "ISO 8601" if moment.tzinfo else NO_ZONE
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return Moment(seconds, form) if 0 <= seconds <= LATEST_S and math.isfinite(seconds) else None
