"""The HTTP face of the engine: what each route answers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model_server.engine import Engine, EngineNotReady
from model_server.http.chat import read_chat
from model_server.http.chat_answers import Completion, say, shortened
from model_server.http.embeddings import Embedding, HasVectors, NoVectors
from model_server.http.entry import MAX_CALLS, MAX_JSON_BYTES, Entry, unless_gone
from model_server.http.metrics import MEDIA_TYPE as METRICS_TYPE
from model_server.http.metrics import render
from model_server.http.openai_wire import UnknownModel
from model_server.http.refusals import LOADING_RETRY_S
from model_server.http.request_log import record_of
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


class Api:
    """The handlers, over one engine."""

    def __init__(self, engine: Engine, entry: Entry) -> None:
        self._engine = engine
        self._entry = entry
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
        self._entry.authorize(request)
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def model(self, request: Request) -> Response:
        self._entry.authorize(request)
        card, asked = self._model_card(), request.path_params["model"]
        if asked != card["id"]:
            raise UnknownModel(asked, card["id"])
        return JSONResponse(card)

    async def perceive(self, request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        with self._entry.at_work(request), contextlib.ExitStack() as held:
            if content_type != MEDIA_TYPE:
                raise HTTPException(415, f"the content type must be {MEDIA_TYPE}, it is {content_type or 'missing'}")
            body = await self._entry.read(request, held, self._entry.max_body)
            asked, tiles = await run_in_threadpool(decode_request, body)
            del body  # the tiles are copies
            _note(request, asked, len(tiles))
            answer = await unless_gone(request, self._engine.perceive(asked, tiles))
        return Response(await run_in_threadpool(encode_response, answer), media_type=MEDIA_TYPE)

    async def chat(self, request: Request) -> Response:
        """OpenAI's chat completions. A stream begins when the answer is known: until then errors have their status."""
        with self._entry.at_work(request), contextlib.ExitStack() as held:
            body = await self._entry.read(request, held, min(self._entry.max_body, MAX_JSON_BYTES))
            model = self._model()
            asked = await self._entry.decoded(read_chat, body, model.info.model)
            del body
            self._entry.hold(sum(tile.nbytes for tile in asked.tiles), held)
            _note(request, asked.request, len(asked.tiles))
            response = await unless_gone(request, self._engine.perceive(asked.request, asked.tiles))
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
        with self._entry.at_work(request), contextlib.ExitStack() as held:
            body = await self._entry.read(request, held, min(self._entry.max_body, MAX_JSON_BYTES))
            model = self._model()
            name = model.info.model
            embedding = await self._entry.decoded(Embedding, body, name)
            del body
            self._entry.hold(embedding.pixel_bytes, held)
            record_of(request.scope).notes.update(inputs=len(embedding.items))
            if not isinstance(model, HasVectors):
                raise NoVectors(name)
            vectors = await unless_gone(request, self._engine.call(embedding.vectors))
        return JSONResponse(await run_in_threadpool(embedding.answer, vectors, name, model))

    async def metrics(self, request: Request) -> Response:
        self._entry.authorize(request)
        uptime_s = round(time.monotonic() - self._started, 3)
        text = render(self._engine.metrics(), self._entry.ended, self._entry.activity.calls, uptime_s)
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


def _words(text: str) -> int:
    return len(text.split())


def _note(request: Request, asked: PerceiveRequest, tiles: int) -> None:
    record_of(request.scope).notes.update(task=asked.task, priority=asked.priority, tiles=tiles)


def create_app(
    engine: Engine, *, token: str | None = None, max_body: int = MAX_BODY_BYTES, max_calls: int = MAX_CALLS
) -> Starlette:
    """The ASGI application over an engine that somebody else starts and closes.

    Args:
        engine: answers.
        token, max_body, max_calls: see `Entry`.
    """
    entry = Entry(token, max_body, max_calls)
    api = Api(engine, entry)
    return entry.app(
        [
            Route("/health", api.health),
            Route("/ready", api.ready),
            Route("/v1/models", api.models),
            Route("/v1/models/{model:path}", api.model),
            Route("/v1/perceive", api.perceive, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/embeddings", api.embeddings, methods=["POST"]),
            Route("/metrics", api.metrics),
        ]
    )
