"""The door of several replicas: lets calls in as a single server does, and hands each to the replica for its image.

Every route of a single server is here, with the same refusals, limits and log. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_server.batching.counters import Counters, Now
from model_server.batching.scheduler import PRIORITIES
from model_server.http.entry import MAX_JSON_BYTES, Entry, unless_gone
from model_server.http.metrics import MEDIA_TYPE as METRICS_TYPE
from model_server.http.metrics import render
from model_server.http.refusals import LOADING_RETRY_S
from model_server.http.request_log import HEADER, record_of
from model_server.protocol import SERVICE
from model_server.replicas.calls import Answer, Call, Replicas
from model_server.replicas.digest import NATIVE, image_of
from model_server.replicas.metrics import merged

REPLICA = "X-Replica"  # names who answered
OWN = "door"  # the label of the door's own metrics
_OF_THE_CONNECTION = ("content-length", HEADER.lower())  # set anew


class Door:
    """The handlers, over the replicas."""

    def __init__(self, replicas: Replicas, entry: Entry) -> None:
        self._replicas = replicas
        self._entry = entry
        self._started = time.monotonic()

    async def health(self, request: Request) -> Response:
        answers = await self._replicas.everyone(Call("GET", "/health"))
        each = {answer.replica: json.loads(answer.body) for answer in answers if answer.status == 200}
        return JSONResponse(
            {
                "service": SERVICE,
                "status": "ok",
                "ready": any(one["ready"] for one in each.values()),
                "pid": os.getpid(),
                "uptime_s": self._uptime_s(),
                "replicas": each,
            }
        )

    async def ready(self, request: Request) -> Response:
        answers = await self._replicas.everyone(Call("GET", "/ready"))
        ready = sum(answer.status == 200 for answer in answers)
        if ready:
            return JSONResponse({"ready": True, "replicas": ready})
        return JSONResponse({"ready": False, "replicas": 0}, 503, {"Retry-After": str(LOADING_RETRY_S)})

    async def metrics(self, request: Request) -> Response:
        self._entry.authorize(request)
        answers = await self._replicas.everyone(Call("GET", "/metrics"))
        no_engine = Counters().metrics(Now(dict.fromkeys(PRIORITIES, 0)))
        own = render(no_engine, self._entry.ended, self._entry.activity.calls, self._uptime_s())
        each = {answer.replica: answer.body.decode() for answer in answers if answer.status == 200}
        return Response(merged({OWN: own, **each}), media_type=METRICS_TYPE)

    async def models(self, request: Request) -> Response:
        self._entry.authorize(request)
        return _passed_on(request, await self._replicas.answer(_call(request), None))

    async def ask(self, request: Request) -> Response:
        path = request.url.path
        limit = self._entry.max_body if path == NATIVE else min(self._entry.max_body, MAX_JSON_BYTES)
        with self._entry.at_work(request), contextlib.ExitStack() as held:
            body = await self._entry.read(request, held, limit)
            image = await run_in_threadpool(image_of, path, body)
            answer = await unless_gone(request, self._replicas.answer(_call(request, body), image))
        return _passed_on(request, answer)

    def _uptime_s(self) -> float:
        return round(time.monotonic() - self._started, 3)


def _call(request: Request, body: bytes = b"") -> Call:
    content_type = request.headers.get("content-type", "")
    return Call(request.method, request.url.path, record_of(request.scope).id, content_type, body)


def _passed_on(request: Request, answer: Answer) -> Response:
    record_of(request.scope).notes["replica"] = answer.replica
    headers = {name: value for name, value in answer.headers.items() if name not in _OF_THE_CONNECTION}
    return Response(answer.body, answer.status, {**headers, REPLICA: answer.replica})


def create_door(replicas: Replicas, entry: Entry) -> Starlette:
    """The ASGI application over replicas that somebody else starts and closes."""
    door = Door(replicas, entry)
    return entry.app(
        [
            Route("/health", door.health),
            Route("/ready", door.ready),
            Route("/metrics", door.metrics),
            Route("/v1/models", door.models),
            Route("/v1/models/{model:path}", door.models),
            Route(NATIVE, door.ask, methods=["POST"]),
            Route("/v1/chat/completions", door.ask, methods=["POST"]),
            Route("/v1/embeddings", door.ask, methods=["POST"]),
        ]
    )
