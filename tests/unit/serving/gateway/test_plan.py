"""What each image of a request gets: no more than the decision, no less than its conversation gave it, nothing taken in
an audit."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, scene
from server import asking, data_url, text

from adaptive_fusion.control.upstream import Upstream
from adaptive_fusion.execution.turns import turns_of
from adaptive_fusion.serving.gateway.plan import Medium, Planned, Plans
from adaptive_fusion.serving.gateway.processors import ImageGrid
from adaptive_fusion.serving.gateway.reading import read_call
from adaptive_fusion.serving.gateway.sizing import Given, Sizing
from adaptive_fusion.serving.refusals import Refusal

GRID = ImageGrid(16, 2, 2, 4096, 1 << 22)
SIZES = Sizing(GRID, 64)
PICTURES = [encoded(scene(width, height), "PNG") for width, height in ((640, 480), (1280, 960), (96, 64), (1600, 400))]
QUESTIONS = ("Read the text.", "What colour is it?", "Describe it.", "How many are there?")


def plans(*, audit: bool = False) -> Plans:
    return Plans(Upstream(GRID, "m", policy="balanced", seed=0), audit=audit, gives_logprobs=False)


def planned(by: Plans, turns: list[tuple[list[int], str]], detail: str = "", **own: Any) -> Planned:
    """The plan of the last of some turns, each with the numbers of its pictures and a question."""
    messages: list[Any] = []
    for shown, question in turns:
        parts = []
        for number in shown:
            place = {"url": data_url(PICTURES[number], "image/png"), **({"detail": detail} if detail else {})}
            parts.append({"type": "image_url", "image_url": place})
        messages += [*asking(*parts, text(question)), {"role": "assistant", "content": "yes"}]
    body = {"messages": messages[:-1], **({"adaptive_fusion": own} if own else {})}
    call = read_call(json.dumps(body).encode())
    data = [PICTURES[number] for shown, _ in turns for number in shown]
    media = [Medium(SIZES.measure(each, "image"), detail, data=each) for each in data]
    names = [each.measured.name for each in media if each.measured is not None]
    return by.decide(call, media, turns_of(call.messages, names, ""), 0.0)


TURNS = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=2), st.sampled_from(QUESTIONS)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(TURNS, st.sampled_from(["", "low", "high"]))
def test_images_get_no_more_than_is_decided_and_no_less_than_they_had(
    turns: list[tuple[list[int], str]], detail: str
) -> None:
    by, had = plans(), dict[str, Given]()
    for count in range(1, len(turns) + 1):
        found = planned(by, turns[:count], detail)
        assert len(found.given) == len(found.media)
        assert found.tokens <= found.native_tokens
        for medium, one in zip(found.media, found.given, strict=True):
            assert medium.measured is not None and one.max_fps is None
            name = medium.measured.name
            if name in had:
                before = had[name].max_pixels
                assert one.max_pixels is None or (before is not None and one.max_pixels >= before)
            elif found.decision.point.max_pixels is not None and one.max_pixels is not None:
                assert one.max_pixels <= found.decision.point.max_pixels
            had[name] = one
        # The same turn again is the same plan.
        assert planned(by, turns[:count], detail).given == found.given


@given(TURNS, st.sampled_from(["", "low", "high"]))
@settings(max_examples=15)
def test_an_audit_takes_nothing(turns: list[tuple[list[int], str]], detail: str) -> None:
    found = planned(plans(audit=True), turns, detail)
    assert set(found.given) <= {Given()} and found.tokens == found.native_tokens and found.second is None


def test_a_point_of_the_clients_own_is_what_all_get() -> None:
    found = planned(plans(), [([0, 1], QUESTIONS[0])], point="native/65536px")
    assert found.given == (Given(65536), Given(65536)) and found.decision.lane == "fixed"


def test_what_is_left_as_it_came_is_counted_by_its_reason() -> None:
    by, whole = plans(), json.dumps({"messages": asking(text("?"))}).encode()
    media = [Medium(None, why=why) for why in ("sent by address", "it moves", "sent by address")]
    found = by.decide(read_call(whole), media, turns_of((), [], ""), 0.0)
    assert found.given == (Given(),) * 3 and found.tokens == 0
    assert "2 of 3 media left as they came: sent by address" in found.decision.reason
    assert "1 of 3 media left as they came: it moves" in found.decision.reason


@pytest.mark.parametrize("pressed", [False, True])
def test_a_conversation_falls_only_where_the_budget_cannot_be_met_otherwise(pressed: bool) -> None:
    by = plans()
    first = planned(by, [([1], QUESTIONS[0])], "high")
    assert first.given == (Given(),)
    stays = first.ran.predicted.ttft_ms
    limits = {"ttft_ms": stays * 0.7, "attainment": 0.5} if pressed else {}
    second = planned(by, [([1], QUESTIONS[0]), ([], QUESTIONS[1])], "high", **limits)
    change = second.decision.conversation["change"]
    assert change == ("falls" if pressed else "stays")
    assert (second.given == first.given) is not pressed


@pytest.mark.parametrize(("own", "named"), [({"vram_gb": 8}, "vram_gb"), ({"on_deadline": "stop"}, "on_deadline")])
def test_limits_that_only_an_engine_could_keep_are_refused_by_name(own: dict[str, Any], named: str) -> None:
    with pytest.raises(Refusal, match=named) as raised:
        planned(plans(), [([0], QUESTIONS[0])], **own)
    assert raised.value.param == f"adaptive_fusion.{named}"
    planned(plans(), [([0], QUESTIONS[0])], on_deadline="finish")
