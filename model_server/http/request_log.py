"""One line in the log for each call, with an id that its caller knows too. Never pixels, tokens or what was asked."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

HEADER = "X-Request-ID"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # another is not taken over: it would break the line or fill the log
PROBES = ("/health", "/ready", "/metrics")  # asked again and again: they would drown the rest
_OTHER = "(other)"  # an address we do not serve may hold anything, also secrets


@dataclass
class CallRecord:
    """What the log says of one call; `notes` are single words and numbers that handlers add."""

    id: str
    started: float
    status: int = 499  # until a response starts: the caller left
    bytes_in: int = 0
    bytes_out: int = 0
    notes: dict[str, str | int | float] = field(default_factory=dict)


class RequestLog:
    """ASGI middleware: gives each call an id (the caller's own X-Request-ID if it has the form of one), returns it with
    the response, logs the call when it ends and counts it.

    Args:
        app: what it wraps.
        paths: those that are served; all others are one to the log.
        counts: calls by path and status; grows with each one.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str], counts: Counter[tuple[str, int]]) -> None:
        self._app = app
        self._paths = paths
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get(HEADER, "")
        record = CallRecord(asked if _ID.fullmatch(asked) else secrets.token_hex(8), time.monotonic())
        scope["call"] = record

        async def received() -> Message:
            message = await receive()
            record.bytes_in += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[HEADER] = record.id
            record.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, received, sent)
        except Exception:  # whatever it is goes on to the server, which answers 500: the log and the counts say so
            record.status = 500
            raise
        finally:
            self._end(scope, record)

    def _end(self, scope: Scope, record: CallRecord) -> None:
        path = scope["path"] if scope["path"] in self._paths else _OTHER
        self._counts[path, record.status] += 1
        notes = "".join(f" {key}={value}" for key, value in record.notes.items())
        level = logging.WARNING if record.status >= 400 else logging.INFO
        logger.log(
            logging.DEBUG if path in PROBES else level,
            "call id=%s method=%s path=%s status=%d elapsed_s=%.3f bytes_in=%d bytes_out=%d%s",
            record.id, scope["method"], path, record.status, time.monotonic() - record.started,
            record.bytes_in, record.bytes_out, notes,
        )  # fmt: skip


def record_of(scope: Scope) -> CallRecord:
    """The record of the call that this scope belongs to."""
    return scope["call"]
