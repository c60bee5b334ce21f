"""Which replica a request's image belongs to, and when another takes it."""

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.serving.affinity import SLACK, choose, key_of, ranked

NAMES = st.lists(st.integers(0, 10**6).map(str), min_size=1, max_size=12, unique=True)


def body(*urls: str) -> bytes:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return json.dumps({"messages": [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}]}).encode()


def test_a_conversation_keeps_its_key_and_a_text_has_none() -> None:
    first = key_of(body("data:image/png;base64,AAAA"))
    assert first and first == key_of(body("data:image/png;base64,AAAA", "data:image/png;base64,BBBB"))
    assert first != key_of(body("data:image/png;base64,BBBB"))
    assert key_of(body()) == "" == key_of(b"") == key_of(b"\xff{")


@given(st.text(max_size=20), NAMES, st.data())
def test_one_that_goes_or_comes_moves_no_other_key(key: str, names: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    order = ranked(key, names)
    assert sorted(order) == sorted(names)
    assert [name for name in order if name != gone] == ranked(key, [name for name in names if name != gone])


@given(st.text(max_size=20), st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 100), max_size=12))
def test_the_first_asked_has_the_key_unless_it_is_busier(key: str, waiting: dict[str, int]) -> None:
    order = choose(key, waiting)
    assert sorted(order) == sorted(waiting)
    if order:
        fewest = min(waiting.values())
        assert waiting[order[0]] <= fewest + SLACK
        before = ranked(key, list(waiting))
        assert all(waiting[name] > fewest + SLACK for name in before[: before.index(order[0])])


def test_keys_are_spread() -> None:
    names = [f"replica-{number}" for number in range(5)]
    owners = Counter(ranked(f"key-{number}", names)[0] for number in range(2000))
    assert set(owners) == set(names) and max(owners.values()) < 2 * min(owners.values())
