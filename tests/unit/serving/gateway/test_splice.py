"""Values are replaced in a JSON text and nothing else is touched, whatever the text looks like."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_fusion.serving.gateway.splice import Body, Node, NotReadable

SHAPE: Any = {"messages": [{"content": [{"image_url": {"url": None}, "*": None}]}], "*": None}
KEYS = st.sampled_from(["messages", "content", "image_url", "url", "a", "\u00e9", '"', "\\", ""])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["data:image/png;base64,AA+/", "\ud83d\ude00", "\\u0041", "]}", ","]),
)


class Pairs(list[tuple[str, Any]]):
    """Members of an object in order, of which names may stand twice."""


VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.lists(st.tuples(KEYS, inner), max_size=5).map(Pairs)),
    max_leaves=20,
)


def written(value: Any, draw: Any) -> str:
    """JSON of a value with spaces and escapes as nobody would write them."""
    space = draw(st.sampled_from(["", "", " ", "\n", "\t ", "\r\n"]))
    if isinstance(value, Pairs):
        inner = ",".join(f"{space}{written(k, draw)}{space}:{written(v, draw)}" for k, v in value)
        return f"{space}{{{inner}{space}}}{space}"
    if isinstance(value, list):
        return f"{space}[{','.join(written(item, draw) for item in value)}{space}]{space}"
    if isinstance(value, str):
        how = draw(st.integers(0, 3))
        if how == 0:
            return json.dumps(value, ensure_ascii=False)
        if how == 1:
            return json.dumps(value).replace("/", "\\/")
        if how == 2:
            units = value.encode("utf-16-be", "surrogatepass")
            return '"' + "".join(f"\\u{units[i]:02x}{units[i + 1]:02X}" for i in range(0, len(units), 2)) + '"'
    return space + json.dumps(value) + space


def leaves(node: Node, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Node]]:
    if node.members is not None:
        return [found for key, each in node.members.items() for found in leaves(each, (*path, key))]
    if node.items is not None:
        return [found for index, each in enumerate(node.items) for found in leaves(each, (*path, index))]
    return [(path, node)]


def with_value(root: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copied = dict(root) if isinstance(root, dict) else list(root)
    copied[path[0]] = with_value(root[path[0]], path[1:], value)
    return copied


@settings(max_examples=60, deadline=None)
@given(VALUES, st.data())
def test_without_a_change_the_bytes_stay_and_the_values_are_those_of_json(value: Any, data: st.DataObject) -> None:
    text = written(value, data.draw).encode("utf-8", "surrogatepass")
    try:
        body = Body(text, SHAPE)
    except NotReadable:
        with pytest.raises(ValueError):
            json.loads(text.decode())
        return
    assert body.edited() is text
    assert json.dumps(body.root.plain()) == json.dumps(json.loads(text))


@settings(max_examples=60, deadline=None)
@given(VALUES, st.data())
def test_only_what_was_to_change_changes(value: Any, data: st.DataObject) -> None:
    text = written(Pairs([("messages", [Pairs([("content", [Pairs([("image_url", value)])])])]), ("a", 1)]), data.draw)
    raw = text.encode("utf-8", "replace")
    body = Body(raw, SHAPE)
    expected, replaced = json.loads(raw), []
    for path, node in leaves(body.root):
        if data.draw(st.booleans()):
            new = data.draw(st.sampled_from(["new", "data:image/jpeg;base64,\u00e9/+", 7, None, {"b": []}]))
            replaced.append((node, json.dumps(new)))
            expected = with_value(expected, path, new)
    removed = data.draw(st.lists(st.sampled_from(["a", "messages", "not there"]), unique=True))
    if removed:
        replaced = []
        expected = {key: each for key, each in json.loads(raw).items() if key not in removed}
    added = data.draw(st.dictionaries(st.sampled_from(["top_logprobs", "\u00fc"]), st.integers(), max_size=2))
    edited = body.edited(replaced, added, removed)
    assert json.loads(edited) == {**expected, **added}
    if not (replaced or added or removed):
        assert edited == raw


@pytest.mark.parametrize(
    ("text", "removed", "left"),
    [
        ('{"a": 1, "b": 2, "a": 3}', ["a"], '{"b": 2}'),
        ('{ "a" : 1 }', ["a"], "{  }"),
        ('{"b": 2,\n "a": 1 , "c": 3}', ["a"], '{"b": 2 , "c": 3}'),
        ('{"a":1,"b":2,"c":3,"d":4}', ["a", "b", "d"], '{"c":3}'),
        ('{"a":1,"a":2}', ["a"], "{}"),
        ('{"c":1,"a":1,"a":2,"d":3}', ["a"], '{"c":1,"d":3}'),
    ],
)
def test_members_go_with_their_comma(text: str, removed: list[str], left: str) -> None:
    body = Body(text.encode(), {"*": None})
    assert body.edited(removed=removed) == left.encode()
    with_more = json.loads(body.edited(added={"x": 1}, removed=removed))
    assert with_more == {**json.loads(left), "x": 1}


def test_of_a_key_that_stands_twice_the_last_one_is_what_changes() -> None:
    one, two = (b'"messages":[{"content":[{"image_url":{"url":"%s"}}]}]' % each for each in (b"one", b"\\u0074wo"))
    text = b"{" + one + b"," + two + b"}"
    body = Body(text, SHAPE)
    ((_, url),) = leaves(body.root)
    assert url.value == "two"
    assert body.edited([(url, '"three"')]) == text.replace(b'"\\u0074wo"', b'"three"')


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b" ", b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b"[1", b"[1,]", b'{"a":1,}', b"{1:2}", b'{"a" 1}'),
        *(b"{}x", b'{"a":"\n"}', b'{"messages":[{"content":[{]}]}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'"\\x"'),
        *(b"[" * 100_000, b'{"messages":' * 5_000, b'{"a":' + b"1" * 5000 + b"}"),
    ],
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    for shape in (SHAPE, {"*": None}, None, [None]):
        with pytest.raises(NotReadable):
            Body(text, shape)


def test_a_flood_of_parts_is_not_looked_at() -> None:
    text = b'{"messages":[' + b",".join([b"{}"] * 50_001) + b"]}"
    with pytest.raises(NotReadable, match="50000"):
        Body(text, SHAPE)
