"""The HTTP face of the engine: routes, authorization, bounded bodies, callers that leave."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_server.engine import Engine, EngineNotReady
from model_server.http.chat import read_chat
from model_server.http.chat_answers import Completion, say, shortened
from model_server.http.embeddings import Embedding, HasVectors, NoVectors
from model_server.http.metrics import MEDIA_TYPE as METRICS_TYPE
from model_server.http.metrics import render
from model_server.http.openai_wire import UnknownModel
from model_server.http.refusals import HANDLERS, LOADING_RETRY_S, BodiesFull, BodyTooLarge, TooManyCalls
from model_server.http.request_log import RequestLog, record_of
from model_server.http.usage import CountsTokens, usage_of
from model_server.protocol import (
    MAX_BODY_BYTES,
    MAX_LABELS,
    MAX_TEXT,
    MAX_TILE_SIDE,
    SERVICE,
    PerceiveRequest,
    decode_request,
    encode_response,
)

if TYPE_CHECKING:
    from model_server.resident import Resident

MEDIA_TYPE = "application/octet-stream"
MAX_JSON_BYTES = 64 * 2**20  # of a body with pictures in base64
MAX_CALLS = 64  # in work at a time, of one address that is not this machine's
LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]

_T = TypeVar("_T")


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

    def __init__(self, engine: Engine, token: str | None, max_body: int, max_calls: int) -> None:
        self.activity = Activity()
        self.ended: Counter[tuple[str, int]] = Counter()  # calls by path and status
        self._engine = engine
        self._token = token
        self._max_body = max_body
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self._held_bytes = 0
        self._started = time.monotonic()
        self._born = int(time.time())

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
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._authorize(request)
        card, asked = self._model_card(), request.path_params["model"]
        if asked != card["id"]:
            raise UnknownModel(asked, card["id"])
        return JSONResponse(card)

    async def perceive(self, request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        with self._at_work(request), contextlib.ExitStack() as held:
            if content_type != MEDIA_TYPE:
                raise HTTPException(415, f"the content type must be {MEDIA_TYPE}, it is {content_type or 'missing'}")
            body = await self._read(request, held, self._max_body)
            asked, tiles = await run_in_threadpool(decode_request, body)
            del body  # the tiles are copies
            _note(request, asked, len(tiles))
            answer = await self._unless_gone(request, self._engine.perceive(asked, tiles))
        return Response(await run_in_threadpool(encode_response, answer), media_type=MEDIA_TYPE)

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions. A stream begins when the answer is known: until then errors have their status."""
        with self._at_work(request), contextlib.ExitStack() as held:
            body = await self._read(request, held, min(self._max_body, MAX_JSON_BYTES))
            model = self._model()
            asked = await run_in_threadpool(read_chat, body, model.info.model)
            del body
            _note(request, asked.request, len(asked.tiles))
            response = await self._unless_gone(request, self._engine.perceive(asked.request, asked.tiles))
        said = await run_in_threadpool(say, asked.request, response)
        count = model.answer_tokens if isinstance(model, CountsTokens) else _words
        text = shortened(said.text, asked.chat.limit, count)
        completion = Completion(
            id=f"chatcmpl-{record_of(request.scope).id}",
            response=response,
            request=asked.request,
            said=said,
            text=text,
            cut=text != said.text,
            usage=usage_of(model, asked.request, len(asked.tiles), text),
            logprobs=bool(asked.chat.logprobs),
        )
        if not asked.chat.stream:
            return JSONResponse(completion.whole())
        events = [json.dumps(chunk) for chunk in completion.chunks(asked.chat.usage_wanted)]
        body = "".join(f"data: {event}\n\n" for event in (*events, "[DONE]"))
        return Response(body, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def embeddings(self, request: Request) -> Response:
        with self._at_work(request), contextlib.ExitStack() as held:
            body = await self._read(request, held, min(self._max_body, MAX_JSON_BYTES))
            model = self._model()
            name = model.info.model
            embedding = await run_in_threadpool(Embedding, body, name)
            del body
            record_of(request.scope).notes.update(inputs=len(embedding.items))
            if not isinstance(model, HasVectors):
                raise NoVectors(name)
            vectors = await self._unless_gone(request, self._engine.call(embedding.vectors))
        return JSONResponse(await run_in_threadpool(embedding.answer, vectors, name, model))

    async def metrics(self, request: Request) -> Response:
        self._authorize(request)
        uptime_s = round(time.monotonic() - self._started, 3)
        text = render(self._engine.metrics(), self.ended, self.activity.calls, uptime_s)
        return Response(text, media_type=METRICS_TYPE)

    def _model(self) -> Resident:
        model = self._engine.perceiver
        if model is None:
            raise EngineNotReady("the model is still loading")
        return model

    def _model_card(self) -> dict[str, Any]:
        model = self._model()
        info = model.info.model_dump()
        card = {"id": info["model"], "object": "model", "created": self._born, "owned_by": "rs-perception", **info}
        limits = {"max_image_side": MAX_TILE_SIDE, "max_text": MAX_TEXT, "max_labels": MAX_LABELS}
        card |= {"tasks": list(model.tasks), "taxonomy": list(model.taxonomy), "limits": limits}
        return card | {"embeddings": isinstance(model, HasVectors)}

    @contextlib.contextmanager
    def _at_work(self, request: Request) -> Iterator[None]:
        """While a call that asks the model is in work: it is allowed, counted, and not one too many of its caller."""
        self._authorize(request)
        address = request.client.host if request.client else ""
        if not _is_here(address):
            if self._calls[address] >= self._max_calls:
                raise TooManyCalls(self._max_calls)
            self._calls[address] += 1
        try:
            with self.activity:
                yield
        finally:
            if not _is_here(address):
                self._calls[address] -= 1
                self._calls += Counter()  # drops those at 0

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode(), self._token.encode()):
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request, held: contextlib.ExitStack, limit: int) -> bytes:
        """The body; its bytes count as held until `held` closes."""
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise BodyTooLarge(limit)
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                raise BodyTooLarge(limit)
            if self._held_bytes + len(chunk) > 2 * self._max_body:
                raise BodiesFull
            self._held_bytes += len(chunk)
            held.callback(self._release, len(chunk))
            body += chunk
        return bytes(body)

    def _release(self, size: int) -> None:
        self._held_bytes -= size

    async def _unless_gone(self, request: Request, work: Coroutine[Any, Any, _T]) -> _T:
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


def _is_here(address: str) -> bool:
    """Whether it is this machine's: all its callers share one address, so that nobody could be told from another."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return True  # no address: another way than a network


def _words(text: str) -> int:
    return len(text.split())


def _note(request: Request, asked: PerceiveRequest, tiles: int) -> None:
    record_of(request.scope).notes.update(task=asked.task, priority=asked.priority, tiles=tiles)


def create_app(
    engine: Engine, *, token: str | None = None, max_body: int = MAX_BODY_BYTES, max_calls: int = MAX_CALLS
) -> Starlette:
    """The ASGI application over an engine that somebody else starts and closes.

    Without a token only requests addressed to this machine by name are served, so that no web page can reach the
    server through a name of its own (DNS rebinding).

    Args:
        engine: answers.
        token: what callers must send as bearer token.
        max_body: bytes of one request.
        max_calls: at a time, of one address that is not this machine's.
    """
    api = Api(engine, token, max_body, max_calls)
    routes = [
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/v1/perceive", api.perceive, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
        Route("/metrics", api.metrics),
    ]
    served = frozenset(route.path for route in routes)
    middleware = [Middleware(RequestLog, paths=served, counts=api.ended)]
    if token is None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS))
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS)
    app.state.activity = api.activity
    return app
