"""Which replica has an image: a key of a request's first medium, and the order in which replicas are asked for it.

Knows bytes, names and queue lengths. Must not know Ray or what a replica does. Nothing is decided by it but the place
where a request runs.
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TypeVar

R = TypeVar("R")
SLACK = 1
"""Requests that the replica with the image may have more than the one with fewest: running the encoder again takes less
than waiting for two others."""
_MEDIUM = re.compile(rb'"(?:url|image_url|video_url)"\s*:\s*"([^"]+)"')


def key_of(body: bytes) -> str:
    """Names the first medium of a chat request, as it is written there; empty if it has none. Later turns of a
    conversation repeat that medium, so that they have the same key."""
    found = _MEDIUM.search(body)
    return blake2b(found[1], digest_size=16).hexdigest() if found is not None else ""


def ranked(key: str, replicas: Sequence[str]) -> list[str]:
    """Replicas in the order in which `key` belongs to them: rendezvous hashing (Thaler and Ravishankar 1998), so that
    one that comes or goes moves no other's keys."""
    return sorted(replicas, key=lambda name: blake2b(f"{key}:{name}".encode(), digest_size=8).digest(), reverse=True)


def choose(key: str, waiting: Mapping[str, int]) -> list[str]:
    """The replicas to be asked, in order: the first that the key belongs to and that has at most `SLACK` requests more
    than the one with fewest (bounded loads, Mirrokni et al. 2018), then the others by their number of requests."""
    if not waiting:
        return []
    fewest = min(waiting.values())
    order = ranked(key, list(waiting))
    first = next(name for name in order if waiting[name] <= fewest + SLACK)
    return [first, *sorted((name for name in order if name != first), key=waiting.__getitem__)]
