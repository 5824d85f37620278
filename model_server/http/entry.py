"""Who may come in and with how much: authorization, bounded bodies, calls of one address, callers that leave.

Knows nothing of what is asked. The API over one engine and the door of several replicas both stand behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route

from model_server.http.refusals import HANDLERS, BodiesFull, BodyTooLarge, BodyTooSlow, TooManyCalls
from model_server.http.request_log import RequestLog
from model_server.protocol import MAX_BODY_BYTES

MAX_JSON_BYTES = 64 * 2**20  # of a body with pictures in base64
MAX_CALLS = 64  # in work at a time, of one address that is not this machine's
BODY_S = 300.0  # for a body to come in: a caller who is gone without a word holds its place no longer
DECODING = 4  # bodies with pictures that are read at a time: a small file may hold many pixels
LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]
_HERE = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d+)?")  # origins of web pages

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


class Entry:
    """What every call passes. Bodies in memory are bounded: each by `max_body`, all by twice that, with the pixels of
    pictures in them.

    Args:
        token: what callers must send as bearer token; None = nothing.
        max_body: bytes of one request.
        max_calls: at a time, of one address that is not this machine's.
    """

    def __init__(self, token: str | None = None, max_body: int = MAX_BODY_BYTES, max_calls: int = MAX_CALLS) -> None:
        self.max_body = max_body
        self.activity = Activity()
        self.ended: Counter[tuple[str, int]] = Counter()  # calls by path and status
        self._token = token
        self._max_calls = max_calls
        self._calls: Counter[str] = Counter()
        self._held_bytes = 0
        self._decoding = anyio.CapacityLimiter(DECODING)

    def app(self, routes: Sequence[Route]) -> Starlette:
        """The ASGI application of these routes: calls logged and counted, failures answered from one table.

        Without a token only requests addressed to this machine by name are served, so that no web page can reach the
        server through a name of its own (DNS rebinding), and none from web pages of other origins.
        """
        middleware = [Middleware(RequestLog, paths=frozenset(route.path for route in routes), counts=self.ended)]
        if self._token is None:
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS))
        app = Starlette(routes=list(routes), middleware=middleware, exception_handlers=HANDLERS)
        app.state.activity = self.activity
        return app

    def authorize(self, request: Request) -> None:
        """Raises HTTPException: 401 where the token is not the one that is needed; 403 where none is, and a web page of
        another origin calls: it would get no answer to read, but the work would be done."""
        if self._token is None:
            if not _HERE.fullmatch(request.headers.get("origin", "http://localhost")):
                raise HTTPException(403, "web pages of other origins may not call a server without a token")
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode(), self._token.encode()):
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @contextlib.contextmanager
    def at_work(self, request: Request) -> Iterator[None]:
        """While a call that asks the model is in work: it is allowed, counted, and not one too many of its caller."""
        self.authorize(request)
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

    async def read(self, request: Request, held: contextlib.ExitStack, limit: int) -> bytes:
        """The body; its bytes count as held until `held` closes."""
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise BodyTooLarge(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limit:
                        raise BodyTooLarge(limit)
                    self.hold(len(chunk), held)
                    body += chunk
        except TimeoutError:
            raise BodyTooSlow(BODY_S) from None
        return bytes(body)

    async def decoded(self, read: Callable[[bytes, str], _T], body: bytes, model: str) -> _T:
        """What a body with pictures holds, read in a thread; `hold` its pixels next."""
        return await anyio.to_thread.run_sync(read, body, model, limiter=self._decoding)

    def hold(self, size: int, held: contextlib.ExitStack) -> None:
        """Count bytes as held until `held` closes. Raises BodiesFull."""
        if self._held_bytes + size > 2 * self.max_body:
            raise BodiesFull
        self._held_bytes += size
        held.callback(self._release, size)

    def _release(self, size: int) -> None:
        self._held_bytes -= size


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
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
