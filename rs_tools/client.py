"""The model server as the tools see it: one pooled HTTP client, typed errors, a local server when none is named."""

from __future__ import annotations

import asyncio
from typing import Any, Self

import httpx
import numpy as np

from model_server.protocol import (
    MAX_BODY_BYTES,
    PerceiveRequest,
    PerceiveResponse,
    WireError,
    decode_response,
    encode_request,
)
from rs_tools.endpoint import base_url, bearer, retry_after_s, through_proxy
from rs_tools.errors import DeadlinePassed, InputError, NotServed, ServerBusy, ServerError, ServerUnavailable
from rs_tools.local_server import LocalServer, find_or_start, is_process

# A large scene on a CPU is minutes of work; a deadline for the whole belongs to the caller, who may cancel.
TIMEOUT = httpx.Timeout(connect=5, write=60, read=900, pool=None)
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=16, keepalive_expiry=4)
READY_S = 120
READY_POLL_S = 0.05
BUSY_S = 1.0  # to wait where a busy server does not say how long


class ModelClient:
    """Async client of one model server; use it from one event loop, and close it (or `async with`).

    Args:
        url: of a running model server; None finds or starts the one local server of this user.
        token: bearer token of the server at `url`.
        weights: checkpoint folder for the local server; None is the embedded model.

    Raises:
        InputError: the url is no address, or the token cannot be sent.
    """

    def __init__(self, url: str | None = None, token: str | None = None, weights: str | None = None) -> None:
        self._url = base_url(url) if url else None
        self._authorization = bearer(token)
        self._weights = weights
        self._local: LocalServer | None = None
        self._finding = asyncio.Lock()
        trust_env = self._url is not None and through_proxy(self._url)
        self._http = httpx.AsyncClient(timeout=TIMEOUT, limits=LIMITS, trust_env=trust_env)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. A local server goes on until it is idle: other processes may use it."""
        await self._http.aclose()

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        """Have every tile (each uint8 [H, W, 3] RGB), or pair of tiles, answered. Cancelling frees the place on the
        server.

        The response's `masks` and `changes` hold their `probabilities`, uint8 0..255, on the pixels of the tiles.

        Raises:
            InputError: the tiles are too many bytes for one request.
            ServerBusy: the queue is full, or the model at a given url is still loading.
            ServerUnavailable: nobody answers, also after one reconnect.
            NotServed: the model has no part for this task.
            ServerError: the server refused the request or failed on it.
        """
        body = await asyncio.to_thread(encode_request, request, tiles)
        if len(body) > MAX_BODY_BYTES:
            raise InputError(
                f"{len(tiles)} tiles are {len(body) >> 20} MiB, one request may have {MAX_BODY_BYTES >> 20}: "
                "ask for a smaller region"
            )
        response = await self._call("POST", "/v1/perceive", body)
        try:
            answer = await asyncio.to_thread(decode_response, response.content)
            _check_sizes(answer, tiles)
        except WireError as error:
            raise ServerError(f"{response.url} does not speak this protocol: {error}") from error
        return answer

    async def health(self) -> dict[str, Any]:
        """What `/health` says; finds or starts the local server as `perceive` does. Errors as there."""
        response = await self._call("GET", "/health")
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(f"{response.url} does not answer in JSON: is it an rs-model-server?") from error

    async def _call(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        """One answer with status 200. A broken connection is tried once more: every call may be repeated.

        A local server that had ended before the call is found or started again. One that ends in mid-call is not: what
        was asked may be what ended it. The caller hears so at once, and the next call starts a server.
        """
        server = await self._local_server()
        try:
            return _checked(await self._send(server, method, path, body))
        except httpx.ReadTimeout as error:
            raise ServerUnavailable(
                f"the model server at {self._where(server)[0]} gave no answer within {TIMEOUT.read:.0f} s: "
                "ask for a smaller region"
            ) from error
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._forget(server)  # it may have been killed, or have ended by being idle
            server = await self._local_server()
        except httpx.RequestError:
            pass  # broken in mid-call: by a server that ended, or by the network
        try:
            return _checked(await self._send(server, method, path, body))
        except httpx.RequestError as error:
            self._forget(server)
            where, advice = self._where(server)
            raise ServerUnavailable(
                f"the model server at {where} does not answer ({type(error).__name__}: {error}): {advice}"
            ) from error

    async def _send(self, server: LocalServer | None, method: str, path: str, body: bytes | None) -> httpx.Response:
        url = self._url or "" if server is None else server.url
        headers = dict(self._authorization if server is None else bearer(server.token))
        if body is not None:
            headers["Content-Type"] = "application/octet-stream"
        return await self._http.request(method, url + path, content=body, headers=headers)

    def _where(self, server: LocalServer | None) -> tuple[str, str]:
        if server is not None:
            return server.url, f"call again, and a new one is started; {server.last_words()}"
        return self._url or "this machine", "start it with `rs-model-server`, or check the url"

    def _forget(self, server: LocalServer | None) -> None:
        if self._local is server:  # otherwise another call has a new one already
            self._local = None

    async def _local_server(self) -> LocalServer | None:
        """This user's server, found or started; None where a url is given."""
        if self._url is not None:
            return None
        async with self._finding:
            if self._local is not None and not is_process(self._local.pid):
                self._local = None  # by now its port may be another user's, who would get the tiles
            if self._local is None:
                server = await asyncio.to_thread(find_or_start, self._weights)
                await self._wait_until_ready(server)
                self._local = server
            return self._local

    async def _wait_until_ready(self, server: LocalServer) -> None:
        try:
            async with asyncio.timeout(READY_S):
                while (await self._http.get(f"{server.url}/ready")).status_code != 200:  # noqa: ASYNC110 - a process
                    await asyncio.sleep(READY_POLL_S)
        except httpx.TransportError as error:
            raise ServerUnavailable(f"the local model server ended while it started: {server.last_words()}") from error
        except TimeoutError as error:
            raise ServerUnavailable(
                f"the local model server is not ready after {READY_S} s; call again if it is still loading: "
                f"{server.last_words()}"
            ) from error


def _check_sizes(answer: PerceiveResponse, tiles: list[np.ndarray]) -> None:
    """Raises WireError where an array does not lie on the pixels of its tile."""
    masks = zip(tiles, answer.masks, strict=False)
    changes = zip(tiles[::2], answer.changes, strict=False)
    for tile, dense in (*masks, *changes):
        if dense.probabilities.shape[-2:] != tile.shape[:2]:
            raise WireError(f"probabilities {dense.probabilities.shape} for a tile of {tile.shape[1]}x{tile.shape[0]}")


def _checked(response: httpx.Response) -> httpx.Response:
    if response.status_code == 200:
        return response
    message = _message(response)
    if response.status_code in (429, 503):
        wait_s = retry_after_s(response, BUSY_S)
        raise ServerBusy(f"the model server is busy: {message}; call again in {wait_s:.0f} s", wait_s)
    if response.status_code == 401:
        message = f"{message}: give the token of the server at {response.url.host}"
    if response.status_code == 501:
        raise NotServed(message)  # nothing is wrong with the server: its model cannot do this
    if response.status_code == 504:
        raise DeadlinePassed(message)
    raise ServerError(f"the model server answered {response.status_code}: {message}")


def _message(response: httpx.Response) -> str:
    """The server's own words, or the start of what came instead (a proxy's page)."""
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "no reason given"
