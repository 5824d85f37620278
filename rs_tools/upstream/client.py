"""The client of an OpenAI-compatible vision endpoint, in the place of `rs_tools.client.ModelClient`."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Awaitable, Sequence
from typing import Any, Self, TypeVar

import httpx
import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError

from model_server.protocol import (
    UNUSED_ANCHORS,
    ModelInfo,
    PerceiveRequest,
    PerceiveResponse,
    RankedAnswer,
    TaskNotServed,
    TileAnswer,
    TileCaption,
    TileChange,
    TileClasses,
    TileMasks,
    TileObjects,
    TileVqa,
    UnitFloat,
)
from model_server.text.malformed import MalformedText
from rs_tools.endpoint import base_url, bearer, retry_after_s, through_proxy
from rs_tools.errors import InputError, NotServed, ServerBusy, ServerError, ServerUnavailable
from rs_tools.upstream.choosing import KEY_VARIABLE
from rs_tools.upstream.profiles import Profile
from rs_tools.upstream.reading import Heard, Spoken, read

TIMEOUT = httpx.Timeout(connect=10, write=60, read=300, pool=None)
AT_ONCE = 8  # requests in work; an endpoint's own limits answer 429
BUSY_S = 5.0  # to wait where a busy endpoint does not say how long

_T = TypeVar("_T")


class _Perception(BaseModel):
    """What our own server says beside its words."""

    confidence: UnitFloat | None = None
    abstained: bool = False
    known: bool | None = None
    alternatives: list[RankedAnswer] = []


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    model: str = ""
    system_fingerprint: str | None = None
    perception: _Perception | None = None


class UpstreamClient:
    """Async client of an endpoint; use it from one event loop, and close it (or `async with`).

    Args:
        url: of the endpoint, up to and with `/v1`.
        model: its name there.
        profile: how models of its family are asked and read.
        key: sent as bearer token; never logged, and in no error.
        timeout: of one request.

    Raises:
        InputError: the url is no address, or the key cannot be sent.
    """

    def __init__(
        self, url: str, model: str, profile: Profile, key: str | None = None, timeout: httpx.Timeout = TIMEOUT
    ) -> None:
        self._url = f"{base_url(url)}/v1"
        self._model = model
        self._profile = profile
        self._timeout = timeout
        self._http = httpx.AsyncClient(timeout=timeout, headers=bearer(key), trust_env=through_proxy(self._url))
        self._places = asyncio.Semaphore(AT_ONCE)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        """Have every tile (each uint8 [H, W, 3] RGB), or pair of tiles, answered, each by requests of its own.

        The warnings say what the endpoint's format cannot hold. Where some tiles' boxes cannot be read, they count as
        none and a warning says how many.

        Raises:
            NotServed: the profile has no text form for this task.
            InputError: a classification without labels: a general endpoint has no classes of its own.
            ServerBusy: the endpoint answers 429 or 503.
            ServerUnavailable: it does not answer, or not in time.
            ServerError: it refuses, fails, or its words cannot be read.
        """
        if request.task not in self._profile.tasks:
            raise NotServed(self._not_served(request))
        if request.task == "classify" and len(request.labels) < 2:
            raise InputError(f"the model {self._model!r} has no classes of its own: give two labels or more")
        started = time.perf_counter()
        step = 2 if request.task == "detect_change" else 1
        heard = Heard()
        if request.anchors:
            heard.note(UNUSED_ANCHORS)
        items = [tiles[i : i + step] for i in range(0, len(tiles), step)]
        pairs = await _all([self._item(request, item, heard) for item in items])
        answers = self._readable(request, [answer for answer, _ in pairs], heard)
        completion = pairs[0][1]
        return PerceiveResponse(
            captions=[answer for answer in answers if isinstance(answer, TileCaption)],
            vqa=[answer for answer in answers if isinstance(answer, TileVqa)],
            classes=[answer for answer in answers if isinstance(answer, TileClasses)],
            objects=[answer for answer in answers if isinstance(answer, TileObjects)],
            masks=[answer for answer in answers if isinstance(answer, TileMasks)],
            changes=[answer for answer in answers if isinstance(answer, TileChange)],
            model=ModelInfo(
                model=completion.model or self._model,
                weights_digest=completion.system_fingerprint or "",
                attention_backend="",
                precision="",
                device="",
            ),
            task_token=self._profile.before.get(request.task, "").strip(),
            expert="",
            warnings=list(heard.warnings),
            elapsed_s=time.perf_counter() - started,
        )

    def _not_served(self, request: PerceiveRequest) -> str:
        why = " since it draws no masks" if request.task in ("segment", "detect_change") else ""
        error = TaskNotServed(request.task, self._model, self._profile.tasks)
        return f"{error}; the profile {self._profile.name!r} has no text form for {request.task}{why}"

    async def _item(
        self, request: PerceiveRequest, item: Sequence[np.ndarray], heard: Heard
    ) -> tuple[TileAnswer | MalformedText, _Completion]:
        """The answer for one tile or pair; the error where the words hold none."""
        height, width = item[0].shape[:2]
        seen = _sides(width, height, self._profile.unit)
        urls = [await asyncio.to_thread(_data_url, tile, seen) for tile in item]
        completions = [await self._ask(prompt, urls) for prompt in self._profile.prompts(request, seen)]
        try:
            spoken = [self._spoken(completion) for completion in completions]
            return read(self._profile, request, (width, height), seen, spoken, heard), completions[0]
        except MalformedText as error:
            return error, completions[0]

    def _readable(
        self, request: PerceiveRequest, found: Sequence[TileAnswer | MalformedText], heard: Heard
    ) -> list[TileAnswer]:
        """All answers. An unreadable one among many is no box; it cannot be no caption, answer, class or mask."""
        errors = [one for one in found if isinstance(one, MalformedText)]
        if errors and (request.task != "ground" or len(errors) == len(found)):
            raise ServerError(f"the answer of {self._model!r} cannot be read: {errors[0]}") from errors[0]
        if errors:
            heard.note(
                f"The answers for {len(errors)} of {len(found)} tiles could not be read, so nothing was found there. "
                f"{errors[0]}"
            )
        nothing = TileObjects(boxes=[], scores=[], threshold=0.0, known=True, scale=1)
        return [nothing if isinstance(one, MalformedText) else one for one in found]

    async def _ask(self, prompt: str, urls: Sequence[str]) -> _Completion:
        """One completion."""
        pictures = ({"type": "image_url", "image_url": {"url": url}} for url in urls)
        message = {"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}
        body = {"model": self._model, "messages": [message], **self._profile.body}
        async with self._places:
            response = await self._send(body)
        self._check(response)
        try:
            completion = _Completion.model_validate_json(response.content)
        except ValidationError as error:
            raise ServerError(f"{self._url} does not answer as a chat completions endpoint does") from error
        if not completion.choices:
            raise ServerError(f"{self._model!r} at {self._url} gave no answer: its list of choices is empty")
        return completion

    async def _send(self, body: dict[str, Any]) -> httpx.Response:
        """A broken connection is tried once more."""
        url = f"{self._url}/chat/completions"
        try:
            try:
                return await self._http.post(url, json=body)
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                return await self._http.post(url, json=body)
        except httpx.TimeoutException as error:
            raise ServerUnavailable(
                f"{self._url} gave no answer within {self._timeout.read:g} s ({type(error).__name__}): ask for a "
                "smaller region, or try again"
            ) from error
        except httpx.RequestError as error:
            raise ServerUnavailable(
                f"{self._url} does not answer ({type(error).__name__}: {error}): check --model-url"
            ) from error

    def _check(self, response: httpx.Response) -> None:
        """Raises what a status other than 200 means."""
        status = response.status_code
        if status == 200:
            return
        message = _message(response)
        if status in (429, 503):
            wait_s = retry_after_s(response, BUSY_S)
            raise ServerBusy(f"{self._url} is busy: {message}; call again in {wait_s:.0f} s", wait_s)
        if status in (401, 403):
            message += f": put the key of the endpoint into the environment variable {KEY_VARIABLE}"
        if status == 404:
            message += f": is {self._model!r} served there? Check --model-url and --model"
        if status == 501:
            raise NotServed(message)
        raise ServerError(f"{self._url} answered {status}: {message}")

    def _spoken(self, completion: _Completion) -> Spoken:
        choice = completion.choices[0]
        if choice.message.refusal or choice.finish_reason == "content_filter":
            said = (choice.message.refusal or "its content filter stopped the answer")[:200]
            raise ServerError(f"the model {self._model!r} refused to answer: {said}")
        told = completion.perception or _Perception()
        return Spoken(
            text=choice.message.content or "",
            cut=choice.finish_reason == "length",
            calibrated=completion.perception is not None,
            confidence=told.confidence,
            abstained=told.abstained,
            known=told.known,
            others=tuple(told.alternatives),
        )


async def _all(work: Sequence[Awaitable[_T]]) -> list[_T]:
    """All results in order; the first failure cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _sides(width: int, height: int, unit: int) -> tuple[int, int]:
    """The nearest multiples of `unit`, at least one."""
    return max(unit, round(width / unit) * unit), max(unit, round(height / unit) * unit)


def _data_url(tile: np.ndarray, size: tuple[int, int]) -> str:
    image = Image.fromarray(tile)
    file = io.BytesIO()
    (image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _message(response: httpx.Response) -> str:
    """The endpoint's own words, or the start of what came instead (a proxy's page)."""
    try:
        return str(response.json()["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "no reason given"
