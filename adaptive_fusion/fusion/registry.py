"""A register of named strategy classes. Knows nothing of what they compute."""

from collections.abc import Callable
from typing import Generic, TypeVar

from adaptive_fusion.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named classes of one kind; refuses duplicates and lists its names sorted."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator; raises ConfigError if the name is taken."""

        def add(entry: type[T]) -> type[T]:
            if name in self._entries:
                raise ConfigError(f"{self._kind} {name!r} is registered already, among {', '.join(self.names())}")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        return sorted(self._entries)

    def get(self, name: str) -> type[T]:
        """The class of that name; raises ConfigError naming the value and the valid choices."""
        if not isinstance(name, str) or name not in self._entries:
            raise ConfigError(f"{self._kind} is {name!r}; expected one of {', '.join(self.names())}")
        return self._entries[name]
