"""Which conversation a request belongs to, and the arm that answered it first, which it keeps.

Knows messages in OpenAI's form and the file of experiments. Must not know how arms are chosen.
"""

import hashlib
import threading
from collections import OrderedDict
from typing import Any

from adaptive_fusion.errors import RolloutFileError
from adaptive_fusion.rollout.place import FarStore
from adaptive_fusion.rollout.store import Store

MOST = 65_536
"""Units and conversations that are remembered, least recently used out first."""


class Talks:
    """Arms of conversations: here the last ones, in the file all that were answered.

    Args:
        store: The file.
    """

    def __init__(self, store: Store | FarStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[int, str, str]] = OrderedDict()

    def kept(self, experiment: int, talk: str, follows: bool, arm: str, unit: str) -> tuple[str, str]:
        """Arm and unit of a request of a conversation: those that it had, also in another process or before a restart,
        or those that it is given now.

        Args:
            experiment: Its number.
            talk: The conversation's key, hashed.
            follows: Whether the conversation had an answer.
            arm: For one that is not known.
            unit: The same.
        """
        if follows:
            with self._lock:
                before = self._known.get(talk)
            if before is not None and before[0] == experiment:
                arm, unit = before[1], before[2]
            elif (found := self._in_file(experiment, talk)) is not None:
                arm, unit = found, f"conversation {talk}"
        with self._lock:
            self._known[talk] = experiment, arm, unit
            self._known.move_to_end(talk)
            while len(self._known) > MOST:
                self._known.popitem(last=False)
        return arm, unit

    def _in_file(self, experiment: int, talk: str) -> str | None:
        try:
            return self._store.talked(experiment, talk)
        except RolloutFileError:
            return None  # as one that nobody knows


def hashed(salt: str, conversation: str) -> str:
    """A conversation's key as it is kept: by itself it says nothing of what was said."""
    return hashlib.blake2b(
        f"{len(salt)}:{salt}{conversation}".encode("utf-8", "surrogatepass"), digest_size=8
    ).hexdigest()


def conversation_key(messages: Any) -> tuple[str, bool]:
    """Key of a conversation in OpenAI's form, and whether it had an answer: what it began with, up to the user's first
    message. Of long texts, which images are, their ends and length count, so that it takes microseconds."""
    begun: list[Any] = []
    for message in messages:
        begun.append(message)
        if message.get("role") == "user":
            break
    rest = messages[len(begun) :]
    follows = bool(rest) and any(message.get("role") == "assistant" for message in rest)
    found: list[str] = []
    _spell(begun, found)
    return hashlib.blake2b("".join(found).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest(), follows


def _spell(value: Any, found: list[str]) -> None:
    """Add a value's parts, each with its kind and length before it, so that no two values are spelled alike."""
    if isinstance(value, str):
        length = len(value)
        if length > 512:
            middle = length // 2
            value = f"{value[:128]}{value[middle : middle + 128]}{value[-128:]}"
        found.append(f"s{length}:{value}")
    elif isinstance(value, dict):
        found.append(f"d{len(value)}:")
        for name in sorted(value):
            _spell(str(name), found)
            _spell(value[name], found)
    elif isinstance(value, list | tuple):
        found.append(f"l{len(value)}:")
        for each in value:
            _spell(each, found)
    else:
        text = str(value)
        found.append(f"o{len(text)}:{text}")
