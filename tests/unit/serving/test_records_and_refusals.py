"""Errors tell nothing of this machine, and only what was answered can be rated."""

import asyncio
import json

import pytest

from adaptive_fusion.errors import (
    BudgetError,
    ConfigError,
    ContextLengthError,
    InfeasibleBudgetError,
    MediaError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from adaptive_fusion.serving.records import Records
from adaptive_fusion.serving.refusals import Refusal, as_refusal, error_response


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (MediaError("m"), 400, "invalid_media"),
        (BudgetError("b"), 400, "invalid_value"),
        (ContextLengthError("c"), 400, "context_length_exceeded"),
        (UnsupportedModelError("u"), 400, "unsupported_point"),
        (InfeasibleBudgetError("i"), 400, "budget_infeasible"),
        (OutOfMemoryError("o"), 503, "out_of_memory"),
        (Refusal("r", 429, code="queue_full", retry_s=0.2), 429, "queue_full"),
    ],
)
def test_each_error_of_the_library_has_its_status(error: Exception, status: int, code: str) -> None:
    response = error_response(error)
    body = json.loads(bytes(response.body))["error"]
    assert (response.status_code, body["code"], body["message"]) == (status, code, str(error))
    assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (MediaError("messages[0].content[12]: too large"), "messages[0].content[12]"),
        (ConfigError("messages[3].content is int"), "messages[3].content"),
        (MediaError("media of 100 bytes is cut short"), "messages"),
        (ContextLengthError("the prompt has 9 tokens"), "messages"),
        (BudgetError("b"), None),
    ],
)
def test_the_field_to_blame_is_named(error: Exception, field: str | None) -> None:
    assert as_refusal(error).param == field


def test_of_an_error_of_others_nothing_is_told() -> None:
    response = error_response(OSError(2, "No such file", "/home/someone/secret"))
    assert response.status_code == 500 and b"secret" not in response.body and b"home" not in response.body


def test_half_a_character_can_be_told_back() -> None:
    assert "\ud800" in json.loads(bytes(error_response(Refusal("\ud800")).body))["error"]["message"]


async def _rated_once() -> None:
    records = Records(2)
    for name in ("a", "b", "c"):
        records.add(name, {"request_id": name})
    assert [row["request_id"] for row in await records.last(5)] == ["c", "b"]
    with pytest.raises(Refusal, match="'a' is not known") as raised:
        await records.require("a")
    assert raised.value.status == 404
    await records.require("c")
    said = [
        await records.rated("c", source, rating)
        for source, rating in ((None, 1.0), (None, 1.0), ("x", 1.0), (None, 0.0))
    ]
    assert said == [True, False, True, True]


def test_the_last_are_kept_and_a_rating_counts_once() -> None:
    asyncio.run(_rated_once())
