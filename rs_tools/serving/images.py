"""`POST /images`: the bytes of an image in, a handle out that the tools take in place of a path."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from rs_tools.errors import ImageError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.uploads import Incoming, NoRoom, TooLarge, UploadedFiles

logger = logging.getLogger(__name__)

RECEIVE_S = 600.0
AT_ONCE = 8  # uploads on their way; what they reserve is not on the disk yet
_CHUNK = 2**20


class ImageUploads:
    """ASGI endpoint. The caller is who the authentication in front of it let in.

    Answers 201 with `{"image", "bytes", "expires"}`, or with `{"error"}`: 411 without a length, 413 too large, 415 no
    image that the tools read, 408 too slow, 429 too many on their way, 507 no room.
    """

    def __init__(self, policy: AccessPolicy, uploads: UploadedFiles, security: TransportSecuritySettings) -> None:
        self._policy, self._uploads = policy, uploads
        self._security = TransportSecurityMiddleware(security)
        self._on_their_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer = await self._security.validate_request(request) or await self._answer(request)
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            return _error(411, "Send the image as the body, with its length (Content-Length).")
        if self._on_their_way >= AT_ONCE:
            return _error(429, "Too many uploads at once. Try again in 5 s.", {"Retry-After": "5"})
        self._on_their_way += 1
        try:
            async with asyncio.timeout(RECEIVE_S):
                return await self._received(request, int(length))
        except TooLarge as error:
            return _error(413, str(error), {"Connection": "close"})
        except NoRoom as error:
            minutes = self._uploads.lifetime_s / 60
            return _error(507, f"{error} Each is kept {minutes:g} minutes.", {"Connection": "close"})
        except ImageError as error:
            return _error(415, str(error))
        except TimeoutError:
            return _error(408, f"The image did not come within {RECEIVE_S:g} s.", {"Connection": "close"})
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there to read it
        except OSError as error:
            logger.error("an upload could not be kept: %s", error.strerror)
            return _error(507, "The image could not be kept. Try again later.")
        finally:
            self._on_their_way -= 1

    async def _received(self, request: Request, size: int) -> Response:
        with self._uploads.receive(size) as incoming:
            await _write(request, incoming, size)
            await asyncio.to_thread(self._check, incoming)
            image = await asyncio.to_thread(self._uploads.keep, incoming)
        expires = datetime.now(UTC) + timedelta(seconds=self._uploads.lifetime_s)
        told = {"image": image.handle, "bytes": size, "expires": expires.isoformat(timespec="seconds")}
        return JSONResponse(told, 201, headers={"Cache-Control": "no-store"})

    def _check(self, incoming: Incoming) -> None:
        """As every image that is opened: its driver by its first bytes, and its declared size against the limits."""
        incoming.file.flush()
        with self._policy.open(incoming.uploaded):
            pass


async def _write(request: Request, incoming: Incoming, size: int) -> None:
    """At most `size` bytes, for which there is room: where a body comes in chunks, its length is only announced."""
    waiting, left = bytearray(), size
    async for chunk in request.stream():
        left -= len(chunk)
        if left < 0:
            raise TooLarge(f"The image has more than the {size} bytes that its Content-Length announced.")
        waiting += chunk
        if len(waiting) >= _CHUNK:
            await asyncio.to_thread(incoming.file.write, bytes(waiting))
            waiting.clear()
    await asyncio.to_thread(incoming.file.write, bytes(waiting))


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers=headers)
