"""How sure a model is, from what engines say of its tokens; and all else of an answer as it was."""

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from adaptive_fusion.serving.gateway.escalate import (
    PAUSE_S,
    Looks,
    choices_of,
    entropies,
    event_without_logprobs,
    without_logprobs,
)


def rows(*tokens: list[float]) -> dict[str, Any]:
    return {"logprobs": {"content": [{"top_logprobs": [{"logprob": each} for each in top]} for top in tokens]}}


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20))
def test_entropy_is_that_of_the_shares_and_of_what_is_missing(weights: list[float]) -> None:
    total = sum(weights) * 1.25  # a fifth is told of nobody
    shares = [each / total for each in weights]
    (found,) = entropies([rows([math.log(each) for each in shares])])
    expected = -sum(p * math.log(p) for p in [*shares, 0.2])
    assert found == approx(expected, abs=1e-6) and found <= math.log(len(shares) + 1) + 1e-9


def test_what_has_no_numbers_says_nothing() -> None:
    strange: list[Any] = [None, [], {}, 3, {"content": None}, {"content": [None]}, {"content": [{"top_logprobs": []}]}]
    for said in strange:
        assert entropies([{"logprobs": said}]) == []
    assert entropies([]) == entropies([None]) == []
    assert entropies([rows([0.0], [])]) == [0.0], "up to the first token that nothing is said of"
    for data in (None, b"", b"[DONE]", b"{", b"[" * 100_000, b'{"choices": 1}'):
        assert choices_of(data) == []


ENDS = ["\n\n", "\r\n\r\n"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=8), JSON, max_size=4), JSON, st.booleans(), st.sampled_from(["\n\n", "\r\n\r\n"])
)
def test_only_the_log_probabilities_are_taken_out(beside: dict[str, Any], text: Any, escaped: bool, end: str) -> None:
    choice = {"delta": {"content": text}, **rows([-1.0]), "finish_reason": None}
    answer = {**beside, "choices": [choice, {**choice, "index": 1}]}
    data = json.dumps(answer, ensure_ascii=escaped)
    expected = {**answer, "choices": [{**each, "logprobs": None} for each in answer["choices"]]}
    assert json.loads(without_logprobs(data.encode("utf-8", "surrogatepass"))) == expected
    event = f"id: 1\ndata: {data}{end}".encode("utf-8", "surrogatepass")
    shown = event_without_logprobs(event)
    assert shown.startswith(b"id: 1\ndata: {") and shown.endswith(end.encode())
    assert json.loads(shown[12:]) == expected


def test_an_engine_that_refused_is_asked_again_after_longer_and_longer() -> None:
    now = [0.0]
    looks = Looks(True, lambda: now[0])
    pauses = list[float]()
    for _ in range(9):
        assert looks.are_given
        looks.refused()
        began = now[0]
        while not looks.are_given:
            now[0] += 10
        pauses.append(now[0] - began)
    assert pauses[:3] == [PAUSE_S[0], 2 * PAUSE_S[0], 4 * PAUSE_S[0]] and pauses[-1] == PAUSE_S[1]
    looks.given()
    looks.refused()
    now[0] += PAUSE_S[0]
    assert looks.are_given and not Looks(False, lambda: 0.0).are_given
