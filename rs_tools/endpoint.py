"""The servers that the tools call: addresses and tokens, checked before anything is sent, and how long to wait."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rs_tools.errors import InputError
from rs_tools.serving.addresses import is_loopback

if TYPE_CHECKING:  # the checks of options must not wait for it
    import httpx

LONGEST_WAIT_S = 600.0
_SENDABLE = re.compile(r"[!-~]+")  # in a header


def base_url(url: str) -> str:
    """An address as callers give it, without the `/v1` at its end. Raises InputError where it is none."""
    base = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(base)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, or of brackets
        sound = False
    if not sound:
        raise InputError(f"{url!r} is no address of a server: give one such as http://127.0.0.1:8765")
    return base


def through_proxy(url: str) -> bool:
    """Whether a proxy that the environment names may stand between us and this address."""
    return not is_loopback(urlsplit(url).hostname or "")


def bearer(token: str | None) -> dict[str, str]:
    """The header that carries a token; none for none. Raises InputError, which does not quote it."""
    token = (token or "").strip()
    if not token:
        return {}
    if not _SENDABLE.fullmatch(token):
        raise InputError("the token or key cannot be sent: it must be one line of ASCII letters, digits and signs")
    return {"Authorization": f"Bearer {token}"}


def read_token(file: Path) -> str:
    """The token that is in a file. Raises InputError."""
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file cannot be read: {error}") from error
    if not bearer(token):
        raise InputError(f"--token-file {file} holds no token")
    return token


def retry_after_s(response: httpx.Response, unsaid: float) -> float:
    """The seconds that a busy server asks to wait; a date, which the header may also be, counts as unsaid."""
    given = response.headers.get("Retry-After", "")
    return min(float(given), LONGEST_WAIT_S) if given.replace(".", "", 1).isdecimal() else unsaid
