"""Which arm a request belongs to: a keyed hash of its unit, the same on every host, at every restart, for ever.

Knows a salt, a unit's key and a share. Must not know what an arm does, or whether an experiment runs.

The hash gives each unit a place in [0, 1), uniform and independent of every other experiment's (the salt is the key of
the hash). The units below the share are the canary's. So a share that rises only adds units to the canary, and none of
those that it has leaves it.
"""

import hashlib
import math
from functools import lru_cache

from adaptive_fusion.errors import ConfigError

CONTROL, CANARY = "control", "canary"
ARMS = (CONTROL, CANARY)
UNITS = ("request", "conversation", "session", "user")
"""What is assigned as a whole. Whatever it is, a conversation keeps its arm."""
_PLACES = 1 << 53  # every one of them is a float


def place(salt: str, unit: str) -> float:
    """The place of a unit in [0, 1): the first 53 bits of BLAKE2b over salt and unit, each with its length before it.

    Args:
        salt: Of the experiment.
        unit: The key of what is assigned as a whole, such as a user's id.
    """
    digest = _salted(salt).copy()
    digest.update(_field(unit))
    return (int.from_bytes(digest.digest(), "big") >> 11) / _PLACES


@lru_cache(maxsize=64)
def _salted(salt: str) -> hashlib.blake2b:
    """The hash of what every unit of an experiment begins with; copied, never updated."""
    return hashlib.blake2b(_field(salt), digest_size=8, person=b"arm-of-a-unit")


def _field(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"%d:%b" % (len(data), data)


def arm_of(salt: str, unit: str, share: float) -> str:
    """The arm of a unit while `share` of all units, 0 to 1, are the canary's.

    Raises:
        ConfigError: For a share that is out of range.
    """
    if not (isinstance(share, int | float) and math.isfinite(share) and 0.0 <= share <= 1.0):
        raise ConfigError(f"share is {share!r}; expected a number from 0 to 1")
    return CANARY if place(salt, unit) < share else CONTROL
