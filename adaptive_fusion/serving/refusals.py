"""Errors as OpenAI's API has them: which status, which words, and nothing of this machine in them.

Knows the library's errors and HTTP statuses. Must not know of routes or requests.
"""

import json
import math
import re
from typing import Any

from starlette.responses import Response

from adaptive_fusion.errors import (
    AdaptiveFusionError,
    ConfigError,
    ContextLengthError,
    InfeasibleBudgetError,
    MediaError,
    OutOfMemoryError,
    UnsupportedModelError,
)

MAX_MESSAGE = 1000
_PLACE = re.compile(r"messages\[\d+\](\.content(\[\d+\])?)?")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_CODES: tuple[tuple[type[Exception], int, str], ...] = (
    (ContextLengthError, 400, "context_length_exceeded"),
    (MediaError, 400, "invalid_media"),
    (ConfigError, 400, "invalid_value"),
    (UnsupportedModelError, 400, "unsupported_point"),
    (InfeasibleBudgetError, 400, "budget_infeasible"),
    (OutOfMemoryError, 503, "out_of_memory"),
)


class Refusal(AdaptiveFusionError):
    """A request that is refused with an HTTP status.

    Attributes:
        status: The HTTP status.
        code: What went wrong, for programs.
        param: The field of the request that is to blame.
        retry_s: After how many seconds another try may succeed; None where it will not.
    """

    def __init__(
        self, message: str, status: int = 400, *, code: str = "invalid_value", param: str | None = None,
        retry_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s


def as_refusal(error: BaseException) -> Refusal:
    """Any error as what the client is told; of one that is not the library's own nothing but that it happened."""
    if isinstance(error, Refusal):
        return error
    for kind, status, code in _CODES:
        if isinstance(error, kind):
            retry_s = 1.0 if status == 503 else None
            return Refusal(str(error), status, code=code, param=_field_of(error), retry_s=retry_s)
    return Refusal("the server failed on this request; its log says more", 500, code="internal_error")


def _field_of(error: Exception) -> str | None:
    """The field to blame: the place in the messages where the error begins with one, all of them where it is theirs."""
    if (found := _PLACE.match(str(error))) is not None:
        return found[0]
    return "messages" if isinstance(error, MediaError | ContextLengthError) else None


def error_body(refusal: Refusal) -> dict[str, Any]:
    """``{"error": {...}}``."""
    kind = _TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    message = str(refusal)[:MAX_MESSAGE]
    return {"error": {"message": message, "type": kind, "param": refusal.param, "code": refusal.code}}


def error_response(error: BaseException) -> Response:
    """The response that says what went wrong."""
    refusal = as_refusal(error)
    headers = {}
    if refusal.retry_s is not None:
        headers = {
            "retry-after": str(max(1, math.ceil(refusal.retry_s))),
            "retry-after-ms": str(max(1, math.ceil(refusal.retry_s * 1e3))),
        }
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(refusal), refusal.status, headers)


def json_response(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Plain values as JSON. In ASCII: halves of characters that a client sent can be told back to it."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return Response(text, status, headers, "application/json")
