"""The HTTP face of the engine: wire format, authorization, bounded bodies, one table from failure to status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_server.engine import Engine, EngineBusy, EngineError, EngineNotReady, QueryFailed
from model_server.protocol import (
    MAX_BODY_BYTES,
    SERVICE,
    PerceiveResponse,
    TaskNotServed,
    WireError,
    decode_request,
    encode_response,
)

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/octet-stream"
LOADING_RETRY_S = 2
LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]


class BodyTooLarge(Exception):
    """The body has more bytes than a request may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"a request may have {limit} bytes: send fewer or smaller tiles")


class Activity:
    """When the server last had something to do; the clock stands while calls are in work."""

    def __init__(self) -> None:
        self.calls = 0
        self.last = time.monotonic()

    def __enter__(self) -> None:
        self.calls += 1

    def __exit__(self, *_: object) -> None:
        self.calls -= 1
        self.last = time.monotonic()

    def idle_s(self) -> float:
        return 0.0 if self.calls else time.monotonic() - self.last


class Api:
    """The handlers, over one engine. Bodies in memory are bounded: each by `max_body`, all by twice that."""

    def __init__(self, engine: Engine, token: str | None, max_body: int) -> None:
        self.activity = Activity()
        self._engine = engine
        self._token = token
        self._max_body = max_body
        self._held_bytes = 0
        self._started = time.monotonic()

    async def health(self, request: Request) -> Response:
        return JSONResponse(
            {
                "service": SERVICE,
                "status": "ok",
                "ready": self._engine.ready,
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started, 3),
                "engine": self._engine.metrics(),
            }
        )

    async def ready(self, request: Request) -> Response:
        if self._engine.ready:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False}, 503, {"Retry-After": str(LOADING_RETRY_S)})

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        perceiver = self._engine.perceiver
        if perceiver is None:
            raise EngineNotReady("the model is still loading")
        info = perceiver.info.model_dump()
        model = {"id": info["model"], "object": "model", "owned_by": "rs-perception", **info}
        model |= {"tasks": list(perceiver.tasks), "taxonomy": list(perceiver.taxonomy)}
        return JSONResponse({"object": "list", "data": [model]})

    async def perceive(self, request: Request) -> Response:
        self._authorize(request)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if content_type != MEDIA_TYPE:
            raise HTTPException(415, f"the content type must be {MEDIA_TYPE}, it is {content_type or 'missing'}")
        with self.activity, contextlib.ExitStack() as held:
            body = await self._read(request, held)
            asked, tiles = await run_in_threadpool(decode_request, body)
            del body  # the tiles are copies
            answer = await self._unless_gone(request, self._engine.perceive(asked, tiles))
        logger.info("perceive task=%s tiles=%d elapsed_s=%.3f", asked.task, len(tiles), answer.elapsed_s)
        return Response(await run_in_threadpool(encode_response, answer), media_type=MEDIA_TYPE)

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode(), self._token.encode()):
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request, held: contextlib.ExitStack) -> bytes:
        """The body; its bytes count as held until `held` closes."""
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_body:
            raise BodyTooLarge(self._max_body)
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > self._max_body:
                raise BodyTooLarge(self._max_body)
            if self._held_bytes + len(chunk) > 2 * self._max_body:
                raise EngineBusy(self._engine.waiting, LOADING_RETRY_S)
            self._held_bytes += len(chunk)
            held.callback(self._release, len(chunk))
            body += chunk
        return bytes(body)

    def _release(self, size: int) -> None:
        self._held_bytes -= size

    async def _unless_gone(self, request: Request, work: Coroutine[Any, Any, PerceiveResponse]) -> PerceiveResponse:
        """The result of `work`, which is cancelled when the caller disconnects."""
        working = asyncio.create_task(work)
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return working.result()
        finally:
            working.cancel()
            leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# What a failure looks like to the caller: (exception, status, type in the JSON body).
ERRORS: list[tuple[type[Exception], int, str]] = [
    (WireError, 400, "bad_request"),
    (TaskNotServed, 501, "not_served"),
    (BodyTooLarge, 413, "too_large"),
    (EngineBusy, 503, "busy"),
    (EngineNotReady, 503, "not_ready"),
    (QueryFailed, 500, "failed"),
]


def _error_response(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    logger.warning("refused status=%d type=%s message=%r", status, kind, message)
    return JSONResponse({"error": {"type": kind, "message": message}}, status, headers)


def _handler(status: int, kind: str) -> Callable[[Request, Exception], Response]:
    def handle(request: Request, error: Exception) -> Response:
        headers: dict[str, str] = {}
        if isinstance(error, EngineError) and status == 503:
            wait_s = error.retry_after_s if isinstance(error, EngineBusy) else LOADING_RETRY_S
            headers["Retry-After"] = str(math.ceil(wait_s))
        return _error_response(status, kind, str(error), headers)

    return handle


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    return _error_response(error.status_code, kind, error.detail, dict(error.headers or {}))


def _gone(request: Request, error: Exception) -> Response:
    logger.info("the caller disconnected; its request was dropped")
    return Response(status_code=499)  # nobody reads it


def create_app(engine: Engine, *, token: str | None = None, max_body: int = MAX_BODY_BYTES) -> Starlette:
    """The ASGI application over an engine that somebody else starts and closes.

    Without a token only requests addressed to this machine by name are served, so that no web page can reach the
    server through a name of its own (DNS rebinding).
    """
    api = Api(engine, token, max_body)
    app = Starlette(
        routes=[
            Route("/health", api.health),
            Route("/ready", api.ready),
            Route("/v1/models", api.models),
            Route("/v1/perceive", api.perceive, methods=["POST"]),
        ],
        middleware=[] if token else [Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS)],
        exception_handlers={
            **{error: _handler(status, kind) for error, status, kind in ERRORS},
            HTTPException: _http_error,
            ClientDisconnect: _gone,
        },
    )
    app.state.activity = api.activity
    return app
