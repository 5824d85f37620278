"""Who is calling over HTTP, and bearer tokens from a file."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken, principal_components

MIN_TOKEN = 20  # characters; 32 random hexadecimal digits are 128 bits

ANYONE = "anyone"  # every caller, where none is asked for a token


def current_caller() -> str:
    """The caller in whose context this runs; the same text for the same caller, and for no other."""
    token = get_access_token()
    return ANYONE if token is None else caller_of(token)


def caller_of(token: AccessToken) -> str:
    return json.dumps(principal_components(token))


class BearerTokens:
    """Callers by their tokens. Of a token only its digest is kept.

    Args:
        path: a file of lines `NAME TOKEN`; empty lines, and lines that begin with #, do not count. A name may come
            more than once: that caller then has several tokens.

    Raises:
        ValueError: there is no token in it, a line is not of that form, or a token is short or comes twice. The
            message tells the line by its number: what it holds is secret.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._digests: list[tuple[bytes, str]] = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fields = line.split()
            if not fields or fields[0].startswith("#"):
                continue
            if len(fields) != 2:
                raise ValueError(f"line {number} is not of the form: NAME TOKEN")
            name, token = fields
            if len(token) < MIN_TOKEN:
                raise ValueError(f"the token in line {number} has fewer than {MIN_TOKEN} characters")
            if any(_digest(token) == known for known, _ in self._digests):
                raise ValueError(f"the token in line {number} came before")
            self._digests.append((_digest(token), name))
        if not self._digests:
            raise ValueError("there is no token in it; give lines of the form: NAME TOKEN")

    async def verify_token(self, token: str) -> AccessToken | None:
        """The caller with this token. Takes as long whichever token it is, or none."""
        given, name = _digest(token), None
        for known, owner in self._digests:
            if hmac.compare_digest(given, known):
                name = owner
        # Nothing needs the token itself again, so it is not passed on.
        return None if name is None else AccessToken(token="", client_id=name, scopes=[])


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
