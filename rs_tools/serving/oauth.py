"""OAuth 2.1 resource server: access tokens that an authorization server issued for this server, as signed JWTs.

The SDK serves the metadata (RFC 9728), asks for tokens and compares the audience; here a token becomes its claims. Keys
come from the issuer's own metadata (RFC 8414, or OpenID Connect's) and are fetched again when a token names a new one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
from mcp.server.auth.provider import AccessToken

from rs_tools.serving.addresses import is_loopback

logger = logging.getLogger(__name__)

# Signatures that only the issuer can make: never `none`, and never a secret shared with it.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
KEYS_FRESH_S = 3600.0
KEYS_AGAIN_S = 30.0  # no sooner are keys asked for again, whatever tokens come
LEEWAY_S = 10.0


class JwtVerifier:
    """Verifies access tokens of one issuer (RFC 9068 claims).

    Args:
        issuer: the authorization server's address, as its tokens and metadata give it.
        resource: the address of this server's MCP endpoint, which a token's audience must name.

    Raises:
        ValueError: an address is not https (http on this machine passes).
    """

    def __init__(self, issuer: str, resource: str) -> None:
        self.issuer, self.resource = issuer, resource
        _check_address(issuer)
        _check_address(resource)
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched = float("-inf")
        self._lock = asyncio.Lock()

    async def verify_token(self, token: str) -> AccessToken | None:
        """The claims of a token with a good signature, issuer and time; its audience is for the SDK to compare."""
        try:
            key = await self._key(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                return None
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"], "verify_aud": False},
            )
        except jwt.InvalidTokenError as error:
            logger.info("a token was refused: %s", type(error).__name__)
            return None
        return AccessToken(
            token="",  # nothing needs it again
            client_id=str(claims.get("client_id") or claims.get("azp") or claims["sub"]),
            scopes=_scopes(claims),
            expires_at=int(claims["exp"]),
            resource=self._audience(claims["aud"]),
            subject=str(claims["sub"]),
            claims={"iss": claims["iss"]},
        )

    def _audience(self, audience: str | list[str]) -> str | None:
        """The one that names this server, where there are several."""
        named = [audience] if isinstance(audience, str) else audience
        ours = [one for one in named if one.removesuffix("/") == self.resource.removesuffix("/")]
        return next(iter(ours or named), None)

    async def _key(self, kid: str | None) -> jwt.PyJWK | None:
        if kid in self._keys and time.monotonic() - self._fetched <= KEYS_FRESH_S:
            return self._keys[kid]  # and does not wait while keys are fetched for a token that names another
        async with self._lock:
            age = time.monotonic() - self._fetched
            if age > KEYS_FRESH_S or (kid not in self._keys and age > KEYS_AGAIN_S):
                self._fetched = time.monotonic()
                try:
                    self._keys = await self._fetch()
                except (httpx.HTTPError, ValueError, jwt.PyJWTError) as error:
                    # Without keys nobody can be let in who is not known already.
                    logger.error("keys of %s cannot be had: %s: %s", self.issuer, type(error).__name__, error)
        return self._keys.get(kid)

    async def _fetch(self) -> dict[str | None, jwt.PyJWK]:
        # A proxy from the environment must not stand between us and loopback.
        trust_env = not is_loopback(urlsplit(self.issuer).hostname or "")
        async with httpx.AsyncClient(timeout=10, trust_env=trust_env) as client:
            metadata = await self._metadata(client)
            if metadata.get("issuer") != self.issuer:
                raise ValueError(f"its metadata is of another issuer, {metadata.get('issuer')!r}")
            address = str(metadata.get("jwks_uri"))
            _check_address(address)
            answer = await client.get(address)
            answer.raise_for_status()
            keys = jwt.PyJWKSet.from_dict(answer.json()).keys
        return {key.key_id: key for key in keys}

    async def _metadata(self, client: httpx.AsyncClient) -> dict[str, Any]:
        parts = urlsplit(self.issuer)
        path = parts.path.rstrip("/")
        origin = f"{parts.scheme}://{parts.netloc}"
        answer = await client.get(f"{origin}/.well-known/oauth-authorization-server{path}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            answer = await client.get(f"{origin}{path}/.well-known/openid-configuration")
        answer.raise_for_status()
        return answer.json()


def _scopes(claims: dict[str, Any]) -> list[str]:
    scopes = claims.get("scope", claims.get("scp", []))
    return scopes.split() if isinstance(scopes, str) else list(scopes)


def _check_address(address: str) -> None:
    parts = urlsplit(address)
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))):
        raise ValueError(f"{address!r} is not an https address")
