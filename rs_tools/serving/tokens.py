"""Who is calling over HTTP, and bearer tokens from a file."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from pathlib import Path

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken, principal_components

logger = logging.getLogger(__name__)

MIN_TOKEN = 20  # characters; 32 random hexadecimal digits are 128 bits

ANYONE = "anyone"  # every caller, where none is asked for a token


def current_caller() -> str:
    """The caller in whose context this runs; the same text for the same caller, and for no other."""
    token = get_access_token()
    return ANYONE if token is None else caller_of(token)


def caller_of(token: AccessToken) -> str:
    return json.dumps(principal_components(token))


class BearerTokens:
    """Callers by their tokens, as a file says it now. Of a token only its digest is kept.

    The file is read again when it has changed. Where it cannot be used then, who was let in before is let in still, and
    the log says why.

    Args:
        path: a file of lines `NAME TOKEN`; empty lines, and lines that begin with #, do not count. A name may come
            more than once: that caller then has several tokens.

    Raises:
        ValueError: there is no token in it, a line is not of that form, or a token is short or comes twice. The
            message tells the line by its number: what it holds is secret.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._digests = _read(path)

    async def verify_token(self, token: str) -> AccessToken | None:
        """The caller with this token. Takes as long whichever token it is, or none."""
        self._refresh()
        given, name = _digest(token), None
        for known, owner in self._digests:
            if hmac.compare_digest(given, known):
                name = owner
        # Nothing needs the token itself again, so it is not passed on.
        return None if name is None else AccessToken(token="", client_id=name, scopes=[])

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = _read(self._path)
        except (OSError, ValueError) as error:
            logger.error("the changed file of tokens cannot be used, and those read before hold: %s", error)
        else:
            logger.info("the changed file of tokens was read: there are %d", len(self._digests))


def _read(path: Path) -> list[tuple[bytes, str]]:
    """Digests of tokens, and whose they are."""
    digests: dict[bytes, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) != 2:
            raise ValueError(f"line {number} is not of the form: NAME TOKEN")
        name, token = fields
        if len(token) < MIN_TOKEN:
            raise ValueError(f"the token in line {number} has fewer than {MIN_TOKEN} characters")
        if _digest(token) in digests:
            raise ValueError(f"the token in line {number} came before")
        digests[_digest(token)] = name
    if not digests:
        raise ValueError("there is no token in it; give lines of the form: NAME TOKEN")
    return list(digests.items())


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Another one when the file was written or replaced; None where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
