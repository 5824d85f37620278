"""The HTTP service: MCP at /mcp, uploads at /images, /health, and who may use them.

The SDK serves MCP, authenticates and tells clients where to get tokens; this adds what it leaves to its user: a rate
limit, uploads, a log without secrets, and answers to browsers of allowed origins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from mcp.server import MCPServer
from mcp.server.auth.middleware.bearer_auth import RequireAuthMiddleware
from mcp.server.auth.provider import TokenVerifier
from mcp.server.auth.routes import build_resource_metadata_url
from mcp.server.auth.settings import AuthSettings
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rs_tools.imagery.access import AccessPolicy
from rs_tools.serving.addresses import is_any
from rs_tools.serving.images import ImageUploads
from rs_tools.serving.oauth import JwtVerifier
from rs_tools.serving.rates import RateLimit, Rates
from rs_tools.serving.tokens import BearerTokens

logger = logging.getLogger(__name__)

MAX_BODY = 2**20  # of a call: arguments are short, images are uploaded
HEALTH = "/health"
IMAGES = "/images"
GRACE_S = 5  # for calls to end when the process is told to stop

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = ("Authorization", "Content-Type", "Last-Event-ID", "Mcp-Method", "Mcp-Name", "Mcp-Protocol-Version")
_HEADERS += ("Mcp-Session-Id",)


class Auth(TypedDict, total=False):
    """Keywords of `build_server`."""

    auth: AuthSettings
    token_verifier: TokenVerifier


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """How to serve over HTTP.

    Attributes:
        host, port: where to listen.
        allowed_hosts: names that callers may use for this server, besides those of this machine.
        allowed_origins: of web pages that may call it, besides those of this machine.
        verifier: tells a caller from a token; None lets anyone in.
        scopes: that an OAuth token must have.
        per_minute: requests of one caller.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    verifier: BearerTokens | JwtVerifier | None = None
    scopes: tuple[str, ...] = ()
    per_minute: int = 1200

    @property
    def auth(self) -> Auth:
        """What the MCP server needs to know."""
        if self.verifier is None:
            return {}
        if isinstance(self.verifier, JwtVerifier):
            issuer, resource = self.verifier.issuer, AnyHttpUrl(self.verifier.resource)
        else:  # nobody issues tokens, so there is no metadata to serve and no issuer to name in it
            issuer, resource = f"http://{_bracketed(self.host)}:{self.port}", None
        settings = AuthSettings(
            issuer_url=AnyHttpUrl(issuer),
            resource_server_url=resource,
            required_scopes=list(self.scopes) or None,
            validate_token_resource=resource is not None,
        )
        return {"auth": settings, "token_verifier": self.verifier}

    @property
    def security(self) -> TransportSecuritySettings:
        """Which names of this server and which web pages a request may come with."""
        hosts = [*_LOOPBACK, *self.allowed_hosts]
        if not is_any(self.host):
            hosts.append(_bracketed(self.host))
        here = [f"http://{name}{port}" for name in _LOOPBACK for port in ("", ":*")]
        return TransportSecuritySettings(
            allowed_hosts=[f"{host}{port}" for host in dict.fromkeys(hosts) for port in ("", ":*")],
            allowed_origins=[*here, *self.allowed_origins],
        )


def http_app(server: MCPServer[Any], settings: HttpSettings, policy: AccessPolicy) -> Starlette:
    """The ASGI app that serves `server`, which was built with `settings.auth`, over streamable HTTP."""
    app = server.streamable_http_app(
        host=settings.host, transport_security=settings.security, max_request_body_size=MAX_BODY
    )
    app.router.routes.append(Route(HEALTH, _health))
    if policy.uploads is not None:
        images: ASGIApp = ImageUploads(policy, policy.uploads, settings.security)
        if auth := settings.auth.get("auth"):
            resource = auth.resource_server_url
            told = None if resource is None else build_resource_metadata_url(resource)
            images = RequireAuthMiddleware(images, auth.required_scopes or [], told)
        app.router.routes.append(Route(IMAGES, images, methods=["POST"]))
    # Innermost: after authentication, which tells whose requests to count.
    app.user_middleware.append(Middleware(RateLimit, rates=Rates(settings.per_minute), exempt=(HEALTH,)))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=_HEADERS,
            expose_headers=["Mcp-Session-Id", "Retry-After", "WWW-Authenticate"],
        )
    app.add_middleware(RequestLog)
    return app


def serve(app: Starlette, settings: HttpSettings) -> None:
    """Serve until the process is told to stop."""
    import uvicorn

    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # it would log query strings, and with them what should not have been there
        proxy_headers=False,  # whoever is on this machine could say that a request came from elsewhere
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )


class RequestLog:
    """ASGI middleware: a line for each request, with who asked, what for and how it ended; no query and no header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == HEALTH:
            return await self._app(scope, receive, send)
        status = 0
        started = time.monotonic()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            asked = f"{_who(scope)} {scope['method']} {scope['path'][:200]!r}"
            logger.info("%s: %s after %.2f s", asked, status or "no answer", time.monotonic() - started)


async def _health(_: Request) -> Response:
    """That the process answers; asked by probes, which have no token and any name for it."""
    return JSONResponse({"status": "ok"})


def _who(scope: Mapping[str, Any]) -> str:
    name = getattr(scope.get("user"), "display_name", "")
    return repr(name) if name else str((scope.get("client") or ("-",))[0])


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
