"""One table from failure to HTTP status; every error has the body that OpenAI's clients read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from model_server.engine import DeadlinePassed, EngineBusy, EngineNotReady, QueryFailed
from model_server.http.embeddings import NoVectors
from model_server.http.openai_wire import CallError, UnknownModel
from model_server.http.request_log import HEADER, record_of
from model_server.protocol import TaskNotServed, WireError

logger = logging.getLogger(__name__)

LOADING_RETRY_S = 2


class BodyTooLarge(Exception):
    """The body has more bytes than a request may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a request may have {limit} bytes: send fewer or smaller tiles")


class BodyTooSlow(Exception):
    """The body did not come in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the body did not come within {seconds:g} s: send less at a time")


class TooManyCalls(Exception):
    """One caller has as many calls in work as it may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} calls from one address are in work already: wait for one to end")


class BodiesFull(Exception):
    """The bodies of all calls together fill the memory that there is for them."""

    def __init__(self) -> None:
        super().__init__("the bodies of other calls fill the memory that there is for them; try again soon")


# What a failure looks like to the caller: (exception, status, `code` in the JSON body).
ERRORS: list[tuple[type[Exception], int, str]] = [
    (WireError, 400, "bad_request"),
    (CallError, 400, "bad_request"),
    (UnknownModel, 404, "model_not_found"),
    (BodyTooSlow, 408, "too_slow"),
    (BodyTooLarge, 413, "too_large"),
    (TooManyCalls, 429, "too_many_calls"),
    (QueryFailed, 500, "failed"),
    (TaskNotServed, 501, "not_served"),
    (NoVectors, 501, "not_served"),
    (EngineBusy, 503, "busy"),
    (BodiesFull, 503, "busy"),
    (EngineNotReady, 503, "not_ready"),
    (DeadlinePassed, 504, "deadline_passed"),
]
_HTTP_CODES = {401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 501: "invalid_request_error"}


def error_response(
    request: Request,
    status: int,
    code: str,
    message: str,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """`{"error": {message, type, param, code}}`. The log gets the code alone: a message may quote a question."""
    record_of(request.scope).notes["error"] = code
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def _handler(status: int, code: str) -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        headers: dict[str, str] = {}
        if status in (429, 503):
            wait_s = error.retry_after_s if isinstance(error, EngineBusy) else LOADING_RETRY_S
            headers["Retry-After"] = str(math.ceil(wait_s))
        elif status == 408:
            headers["Connection"] = "close"  # nobody waits for the rest
        elif status >= 500:
            headers["X-Should-Retry"] = "false"  # OpenAI's client would ask again: what failed once fails again
        param = error.param if isinstance(error, CallError) else None
        return error_response(request, status, code, str(error), param, headers)

    return handle


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "bad_request")
    return error_response(request, error.status_code, code, error.detail, headers=dict(error.headers or {}))


def _fault(request: Request, error: Exception) -> Response:
    """A fault of ours: Starlette logs it after this."""
    record = record_of(request.scope)
    message = f"the server failed on this call; its log has the reason under {record.id}"
    return error_response(request, 500, "internal", message, headers={HEADER: record.id})


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the caller has left: nobody reads it


HANDLERS: dict[type[Exception] | int, Callable[[Request, Exception], Response]] = {
    **{error: _handler(status, code) for error, status, code in ERRORS},
    HTTPException: _http_error,
    ClientDisconnect: _gone,
    Exception: _fault,
}
