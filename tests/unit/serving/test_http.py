"""Bodies of all requests together stay within a bound, and what was refused holds nothing."""

import asyncio
import gc
import weakref
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from adaptive_fusion.serving.http import Bodies, afterwards, while_connected
from adaptive_fusion.serving.refusals import Refusal

MIB = 1 << 20


def test_large_bodies_are_told_to_come_back_and_small_ones_are_let_in() -> None:
    bodies = Bodies(2 * MIB)
    with bodies.counting() as first, bodies.counting() as second:
        first(MIB)
        first(2 * MIB)
        second(100)
        with pytest.raises(Refusal) as raised:
            second(MIB)
        assert (raised.value.status, raised.value.code) == (429, "busy") and raised.value.retry_s


@given(st.lists(st.lists(st.integers(0, 3 * MIB), max_size=4).map(sorted), max_size=6))
def test_whatever_was_refused_all_of_it_is_given_back(growths: list[list[int]]) -> None:
    bodies = Bodies(4 * MIB)
    for growth in growths:
        with bodies.counting() as held, bodies.counting() as grown:
            held(2 * MIB)
            for size in growth:
                try:
                    grown(size)
                except Refusal:
                    assert size > 2 * MIB
                else:
                    assert size <= 2 * MIB
    with bodies.counting() as whole:
        whole(4 * MIB)


class Body(bytearray):
    """Bytes that can be watched."""


class Connected:
    """A request whose client stays."""

    async def receive(self) -> dict[str, Any]:
        return await asyncio.Future()


def test_a_request_that_fails_holds_its_body_no_longer() -> None:
    async def work(body: Body) -> Response:
        raise Refusal(f"{len(body)} bytes")

    async def ask() -> weakref.ref[Body]:
        body = Body(10)
        watched = weakref.ref(body)
        with pytest.raises(Refusal):
            await while_connected(cast(Request, Connected()), work(body))
        return watched

    gc.disable()
    try:
        assert asyncio.run(ask())() is None
    finally:
        gc.enable()


def test_what_a_client_need_not_wait_for_is_done_when_its_answer_is_sent() -> None:
    done = list[str]()

    async def send(message: Any) -> None:
        done.append(message["type"])

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    whole = Response(b"x")
    afterwards(whole, lambda: done.append("counted"))
    afterwards(whole, lambda: done.append("logged"))
    assert not done
    asyncio.run(whole({"type": "http"}, receive, send))
    assert done == ["http.response.start", "http.response.body", "counted", "logged"]
    afterwards(StreamingResponse(iter([b"x"])), lambda: done.append("begun"))
    assert done[-1] == "begun"
