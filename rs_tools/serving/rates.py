"""How often one caller may ask."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Container

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rs_tools.serving.tokens import caller_of

MAX_CALLERS = 10_000


class Rates:
    """A bucket of tokens for each caller: a minute's worth at once, and again as time goes by.

    Args:
        per_minute: requests.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when

    def wait_s(self, caller: str) -> float:
        """Take a token: 0, or, where there is none, the seconds until there is one."""
        now = self._clock()
        tokens, then = self._buckets.pop(caller, (self._per_minute, now))
        tokens = min(self._per_minute, tokens + (now - then) * self._per_minute / 60)
        enough = tokens >= 1
        self._buckets[caller] = (tokens - 1 if enough else tokens, now)
        while len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        return 0 if enough else (1 - tokens) * 60 / self._per_minute


class RateLimit:
    """ASGI middleware: 429 with Retry-After for a caller who asks too often.

    A caller is who its token says, else the address that it calls from. It must run after authentication.
    """

    def __init__(self, app: ASGIApp, rates: Rates, exempt: Container[str] = ()) -> None:
        self._app, self._rates, self._exempt = app, rates, exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._exempt:
            user = scope.get("user")
            host = (scope.get("client") or ("",))[0]
            caller = caller_of(user.access_token) if isinstance(user, AuthenticatedUser) else f"address {host}"
            if wait := self._rates.wait_s(caller):
                seconds = math.ceil(wait)
                answer = PlainTextResponse(
                    f"Too many requests. Try again in {seconds} s.", 429, headers={"Retry-After": str(seconds)}
                )
                return await answer(scope, receive, send)
        await self._app(scope, receive, send)
