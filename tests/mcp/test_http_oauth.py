"""The HTTP service as an OAuth resource server: which tokens of an authorization server it takes."""

from __future__ import annotations

import asyncio
import base64
import hmac
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from http_processes import Service, running_service
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from rs_tools.serving import oauth
from rs_tools.serving.oauth import JwtVerifier

SCENE = "itaipu_landsat8.tif"
RESOURCE = "https://rs.example.org/mcp"
SCOPE = "perceive"


class AuthorizationServer(http.server.ThreadingHTTPServer):
    """Publishes its metadata and its keys; signs whatever it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Publisher)
        self.issuer = f"http://127.0.0.1:{self.server_port}/tenant"
        self.keys: dict[str, Any] = {"ec": ec.generate_private_key(ec.SECP256R1())}
        self.asked: list[str] = []

    def publish(self, path: str) -> dict[str, Any] | None:
        if path == "/.well-known/oauth-authorization-server/tenant":
            return {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"}
        if path == "/tenant/keys":
            return {"keys": [_published(kid, key) for kid, key in self.keys.items()]}
        return None

    def token(self, kid: str = "ec", algorithm: str = "ES256", key: Any = None, **changed: Any) -> str:
        claims = {
            "iss": self.issuer,
            "aud": RESOURCE,
            "sub": "alice",
            "client_id": "an-agent",
            "scope": f"openid {SCOPE}",
            "exp": int(time.time()) + 300,
        }
        claims = {name: value for name, value in (claims | changed).items() if value is not None}
        return jwt.encode(claims, self.keys[kid] if key is None else key, algorithm, headers={"kid": kid})


class Publisher(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, AuthorizationServer)
        self.server.asked.append(self.path)
        published = self.server.publish(self.path)
        self.send_response(404 if published is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(published).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def _published(kid: str, key: Any) -> dict[str, Any]:
    public = key.public_key()
    is_rsa = isinstance(public, rsa.RSAPublicKey)
    jwk = RSAAlgorithm.to_jwk(public, as_dict=True) if is_rsa else ECAlgorithm.to_jwk(public, as_dict=True)
    return {**jwk, "kid": kid, "use": "sig"}


def _encoded(part: dict[str, Any] | bytes) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.fixture(scope="module")
def issuer() -> Iterator[AuthorizationServer]:
    running = AuthorizationServer()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(scope="module")
def service(root: Path, issuer: AuthorizationServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    options = ["--oauth-issuer", issuer.issuer, "--oauth-resource", RESOURCE, "--oauth-scope", SCOPE]
    folder = tmp_path_factory.mktemp("service")
    with running_service(folder, "--root", str(root), *options) as running:
        yield running


def test_a_client_without_a_token_learns_where_to_get_one(service: Service, issuer: AuthorizationServer) -> None:
    for path in ("/mcp", "/images"):
        refused = service.post(path)
        assert refused.status_code == 401
        where = "https://rs.example.org/.well-known/oauth-protected-resource/mcp"
        assert f'resource_metadata="{where}"' in refused.headers["WWW-Authenticate"]
    metadata = service.get("/.well-known/oauth-protected-resource/mcp").json()
    assert metadata["resource"] == RESOURCE
    assert metadata["authorization_servers"] == [issuer.issuer]
    assert metadata["scopes_supported"] == [SCOPE]
    assert metadata["bearer_methods_supported"] == ["header"]


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_token_of_the_issuer_for_this_server_is_taken(
    service: Service, issuer: AuthorizationServer, mode: str
) -> None:
    for audience in (RESOURCE, RESOURCE + "/", ["https://other.example.org", RESOURCE]):
        async with service.client(issuer.token(aud=audience), mode) as client:
            assert not (await client.call_tool("inspect_image", {"image": SCENE})).is_error


@pytest.mark.parametrize("path", ["/mcp", "/images"])
@pytest.mark.parametrize(
    "changed",
    [
        {"aud": "https://rs.example.org"},
        {"aud": "https://rs.example.org/mcp/other"},
        {"aud": "https://rs.example.org.evil.example/mcp"},
        {"aud": ["https://other.example.org"]},
        {"aud": []},
        {"aud": "an-agent"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"exp": 1},
        {"exp": None},
        {"nbf": 2**33},
        {"sub": None},
    ],
)
def test_a_token_for_another_server_of_another_issuer_or_time_is_refused(
    service: Service, issuer: AuthorizationServer, path: str, changed: dict[str, Any]
) -> None:
    assert service.post(path, token=issuer.token(**changed)).status_code == 401


def test_a_token_without_the_scope_is_told_which_one_it_lacks(service: Service, issuer: AuthorizationServer) -> None:
    for path in ("/mcp", "/images"):
        refused = service.post(path, token=issuer.token(scope="openid"))
        assert refused.status_code == 403
        assert 'error="insufficient_scope"' in refused.headers["WWW-Authenticate"]
        assert SCOPE in refused.headers["WWW-Authenticate"]


def test_a_token_that_the_issuer_did_not_sign_is_refused(service: Service, issuer: AuthorizationServer) -> None:
    forged = issuer.token(key=ec.generate_private_key(ec.SECP256R1()))
    unsigned = issuer.token(key="", algorithm="none")
    head, claims, signature = issuer.token().split(".")
    changed = json.loads(base64.urlsafe_b64decode(claims + "==")) | {"sub": "mallory"}
    tampered = f"{head}.{_encoded(changed)}.{signature}"
    public = issuer.keys["ec"].public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # known to everyone: never to be taken for a secret shared with the issuer
    said = f"{_encoded({'alg': 'HS256', 'kid': 'ec'})}.{claims}"
    confused = f"{said}.{_encoded(hmac.digest(public, said.encode(), 'sha256'))}"
    for token in (forged, unsigned, confused, tampered, f"{head}.{claims}.", "a.b.c", "no-jwt-at-all"):
        assert service.post(token=token).status_code == 401, token


async def test_a_token_of_a_known_key_does_not_wait_while_a_strange_one_makes_a_slow_issuer_be_asked(
    issuer: AuthorizationServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can send a strange one."""
    verifier = JwtVerifier(issuer.issuer, RESOURCE)
    assert await verifier.verify_token(issuer.token()) is not None
    asked, answered = asyncio.Event(), asyncio.Event()

    async def slow() -> dict[str | None, jwt.PyJWK]:
        asked.set()
        await answered.wait()
        return {}

    monkeypatch.setattr(oauth, "KEYS_AGAIN_S", -1.0)
    monkeypatch.setattr(verifier, "_fetch", slow)
    strange = jwt.encode({"sub": "mallory"}, issuer.keys["ec"], "ES256", headers={"kid": "strange"})
    refused = asyncio.create_task(verifier.verify_token(strange))
    await asked.wait()
    async with asyncio.timeout(60):
        assert await verifier.verify_token(issuer.token()) is not None
    answered.set()
    assert await refused is None


async def test_keys_that_the_issuer_adds_are_fetched_and_strange_ones_do_not_make_it_be_asked_each_time(
    root: Path, tmp_path: Path, issuer: AuthorizationServer
) -> None:
    options = ["--oauth-issuer", issuer.issuer, "--oauth-resource", RESOURCE]
    issuer.keys["rsa"] = rsa.generate_private_key(65537, 2048)
    strange = issuer.token("rsa", "RS256", rsa.generate_private_key(65537, 2048))
    with running_service(tmp_path, "--root", str(root), *options) as service:
        issuer.asked.clear()
        async with service.client(issuer.token("rsa", "RS256")) as client:
            assert not (await client.call_tool("inspect_image", {"image": SCENE})).is_error
        issuer.keys["other"] = issuer.keys.pop("rsa")
        unknown = issuer.token("other", "RS256")
        assert {service.post(token=token).status_code for token in (strange, unknown, unknown, unknown)} == {401}
    assert issuer.asked == ["/.well-known/oauth-authorization-server/tenant", "/tenant/keys"]


async def test_uploads_belong_to_the_subject_of_a_token_and_not_to_the_token(
    service: Service, issuer: AuthorizationServer, root: Path
) -> None:
    image = (root / SCENE).read_bytes()
    handle = service.post("/images", token=issuer.token(exp=int(time.time()) + 60), content=image).json()["image"]
    for subject, found in (("alice", True), ("bob", False)):
        async with service.client(issuer.token(sub=subject)) as client:
            answer = await client.call_tool("inspect_image", {"image": handle})
        assert answer.is_error is not found


def test_nothing_of_a_token_is_logged(service: Service, issuer: AuthorizationServer) -> None:
    good, bad = issuer.token(), issuer.token(aud="https://other.example.org")
    service.post(token=good)
    service.post(token=bad)
    service.post(f"/nowhere?access_token={good}")
    log = service.told("'/nowhere'")
    for token in (good, bad):
        for part in token.split("."):
            assert part not in log
    assert "Traceback" not in log
