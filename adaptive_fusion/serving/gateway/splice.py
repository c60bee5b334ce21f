"""Values of a JSON text found and replaced where they stand, everything else left byte for byte as it came.

A text is read once: down the paths that a shape names piece by piece, with the place of every value on them, and past
everything else at the speed of the interpreter's own JSON scanner. Of a key that stands twice the last one counts, as
it does for all common readers. Knows JSON. Must not know what the values mean.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_fusion.errors import ConfigError

MOST_NODES = 50_000
"""Values on the paths of a shape that are looked at in one text."""
Shape = Mapping[str, Any] | Sequence[Any] | None
"""Where to look closer: of an object the keys (``*`` for all others) with the shape of each, of a list the shape of all
of its items, None for what is taken as it is. Anything that has another form is taken as it is too."""
_SPACE = re.compile(r"[ \t\n\r]*")
_SCAN: Any = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_STRING: Any = json.decoder.scanstring  # type: ignore[attr-defined]


class NotReadable(ConfigError):
    """A text that is no JSON, or that is not looked at for its form."""


@dataclass(slots=True)
class Node:
    """A value and its place in the text: `start` inclusive, `end` exclusive.

    Exactly one of `value` (taken as it is), `members` (of an object) and `items` (of a list) is there. `keys` has the
    place of every member in order, those that a later one overrides among them: name, start of its key, end of its
    value.
    """

    start: int
    end: int
    value: Any = None
    members: dict[str, "Node"] | None = None
    items: list["Node"] | None = None
    keys: list[tuple[str, int, int]] | None = None

    def get(self, key: str) -> "Node | None":
        """A member, if this is an object that has it."""
        return None if self.members is None else self.members.get(key)

    def plain(self) -> Any:
        """The value, whatever its form."""
        if self.members is not None:
            return {key: node.plain() for key, node in self.members.items()}
        return [node.plain() for node in self.items] if self.items is not None else self.value


class Body:
    """A JSON text in UTF-8.

    Args:
        data: The bytes.
        shape: Where to look closer.

    Raises:
        NotReadable: If it is no JSON in UTF-8, too deep, or has more than `MOST_NODES` values on the shape's paths.
    """

    def __init__(self, data: bytes, shape: Shape) -> None:
        self.data = data
        try:
            self._text = data.decode()
            self.root = _Reader(self._text).whole(shape)
        except NotReadable:
            raise
        except (ValueError, RecursionError, IndexError, StopIteration) as error:
            raise NotReadable(f"the body is no JSON that is read ({type(error).__name__})") from None
        # Then a place in the text is one in the bytes.
        self._ascii = self._text.isascii()

    def edited(
        self,
        replaced: Sequence[tuple[Node, str]] = (),
        added: Mapping[str, Any] | None = None,
        removed: Sequence[str] = (),
    ) -> bytes:
        """The bytes with some values replaced and top-level members added or removed; the same object without any.

        Args:
            replaced: Nodes, none within another, each with the JSON text to stand there.
            added: Members for the end of the top-level object, which has none of these names, or loses them.
            removed: Names of members of the top-level object, every occurrence of which goes.
        """
        edits = [(node.start, node.end, text) for node, text in replaced]
        if added or any(name in (self.root.members or {}) for name in removed):
            edits += self._members_edited(added or {}, frozenset(removed))
        if not edits:
            return self.data
        edits.sort(key=lambda edit: edit[:2])
        at, pieces = 0, list[str | bytes]()
        source: Any = memoryview(self.data) if self._ascii else self._text
        for start, end, text in edits:
            if start < at:
                raise ValueError("edits overlap")
            pieces += [source[at:start], text.encode() if self._ascii else text]
            at = end
        pieces.append(source[at:])
        if self._ascii:
            return b"".join(pieces)  # type: ignore[arg-type]
        return "".join(pieces).encode()  # type: ignore[arg-type]

    def _members_edited(self, added: Mapping[str, Any], removed: frozenset[str]) -> list[tuple[int, int, str]]:
        """Cuts of whole members with the comma that belongs to each, and the text that goes to the end."""
        root = self.root
        if root.keys is None:
            raise ValueError("the top level is no object")
        edits, last, kept = list[tuple[int, int, str]](), root.start + 1, False
        for index, (name, start, end) in enumerate(root.keys):
            if name not in removed:
                last, kept = end, True
            elif kept:
                edits.append((root.keys[index - 1][2], end, ""))
            else:
                following = root.keys[index + 1][1] if index + 1 < len(root.keys) else end
                edits.append((start, following, ""))
        if added:
            text = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in added.items())
            edits.append((last, last, f",{text}" if kept else text))
        return edits


class _Reader:
    """Reads one text; an index beyond its end is a text that is cut off."""

    def __init__(self, text: str) -> None:
        self._text, self._nodes = text, 0

    def whole(self, shape: Shape) -> Node:
        node = self._read(self._skip(0), shape)
        if self._skip(node.end) != len(self._text):
            raise NotReadable("the body has something after its JSON")
        return node

    def _skip(self, at: int) -> int:
        found = _SPACE.match(self._text, at)
        assert found is not None
        return found.end()

    def _read(self, at: int, shape: Shape) -> Node:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise NotReadable(f"the body has more than {MOST_NODES} values where they are looked at")
        if shape is not None and self._text[at] == ("{" if isinstance(shape, Mapping) else "["):
            return self._object(at, shape) if isinstance(shape, Mapping) else self._list(at, shape[0])
        value, end = _SCAN(self._text, at)
        return Node(at, end, value)

    def _object(self, at: int, shape: Mapping[str, Any]) -> Node:
        node = Node(at, at, members={}, keys=[])
        assert node.members is not None and node.keys is not None
        rest = shape.get("*")
        for begin in self._entries(node, "}"):
            if self._text[begin] != '"':
                raise NotReadable("the body has a key that is no string")
            key, end = _STRING(self._text, begin + 1, True)
            colon = self._skip(end)
            if self._text[colon] != ":":
                raise NotReadable("the body has a key without a value")
            value = self._read(self._skip(colon + 1), shape.get(key, rest))
            node.members[key] = value
            node.keys.append((key, begin, value.end))
            node.end = value.end
        return node

    def _list(self, at: int, shape: Shape) -> Node:
        node = Node(at, at, items=[])
        assert node.items is not None
        for begin in self._entries(node, "]"):
            node.items.append(self._read(begin, shape))
            node.end = node.items[-1].end
        return node

    def _entries(self, node: Node, closing: str) -> Iterator[int]:
        """Where each entry begins; whoever reads it sets the node's end behind it. The node ends behind the closing
        bracket at last."""
        at = self._skip(node.start + 1)
        if self._text[at] != closing:
            while True:
                yield at
                at = self._skip(node.end)
                if self._text[at] == closing:
                    break
                if self._text[at] != ",":
                    raise NotReadable("the body has entries without a comma between them")
                at = self._skip(at + 1)
        node.end = at + 1
