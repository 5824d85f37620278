"""Who may use the HTTP service, from where, and how much of it: real processes and real requests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_processes import ACCEPT, CALL, Service, running_service
from mcp_processes import text_of

import mcp_server
from rs_tools.serving.rates import Rates
from rs_tools.serving.tokens import BearerTokens

SCENE = "itaipu_landsat8.tif"
ALICE, BOB = "alice-000111222333444", "bob-55566677788899900"
PAGE = "https://app.example.org"
MIB = 2**20


@pytest.fixture(scope="module")
def service(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """With tokens for two callers, a name of its own and a web page that may call it."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "tokens").write_text(f"# who, and what they send\nalice {ALICE}\n\nbob {BOB}\n")
    options = ["--tokens", str(folder / "tokens"), "--allowed-host", "rs.example.org", "--allowed-origin", PAGE]
    with running_service(folder, "--root", str(root), *options) as running:
        yield running


@pytest.mark.parametrize("path", ["/mcp", "/images"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer " + ALICE[:-1]},
        {"Authorization": f"Bearer {ALICE} {BOB}"},
        {"Authorization": "Bearer x"},
        {"Authorization": ALICE},
        {"Authorization": f"Basic {ALICE}"},
        {"Cookie": f"access_token={ALICE}"},
    ],
)
def test_without_a_token_of_the_file_nothing_is_answered(
    service: Service, path: str, headers: dict[str, str]
) -> None:
    answer = service.post(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


@pytest.mark.parametrize("path", ["/mcp", "/images"])
def test_a_token_in_the_address_or_the_body_lets_nobody_in(service: Service, path: str) -> None:
    assert service.post(f"{path}?access_token={ALICE}&token={ALICE}").status_code == 401
    assert service.post(path, json=CALL | {"access_token": ALICE}).status_code == 401


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_caller_with_a_token_uses_the_tools_in_both_eras_of_the_protocol(service: Service, mode: str) -> None:
    async with service.client(BOB, mode) as client:
        assert not (await client.call_tool("inspect_image", {"image": SCENE})).is_error


def test_health_asks_for_nothing_and_tells_no_more_than_that_the_process_answers(service: Service) -> None:
    answer = service.get("/health", Host="10.0.0.7:8000")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_with_tokens_of_a_file_no_authorization_server_is_named(service: Service) -> None:
    assert service.get("/.well-known/oauth-protected-resource/mcp").status_code == 404
    assert "resource_metadata" not in service.post().headers["WWW-Authenticate"]


@pytest.mark.parametrize("path", ["/mcp", "/images"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "rs.example.org.evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example:80"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"{PAGE}.evil.example"}, 403),
        ({"Origin": "http://app.example.org"}, 403),
    ],
)
def test_a_foreign_host_or_origin_is_refused_even_with_a_token(
    service: Service, path: str, headers: dict[str, str], status: int
) -> None:
    assert service.post(path, token=ALICE, headers=headers).status_code == status


@pytest.mark.parametrize(
    "headers",
    [{"Host": "rs.example.org"}, {"Host": "rs.example.org:443"}, {"Origin": PAGE}, {"Origin": "http://localhost:5173"}],
)
def test_the_service_answers_to_its_own_names_and_to_allowed_pages(service: Service, headers: dict[str, str]) -> None:
    assert service.post(token=ALICE, headers=headers).status_code not in (403, 421)


def test_the_page_of_an_allowed_origin_may_ask_what_it_may_send_and_others_may_not(service: Service) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,mcp-protocol-version",
        }
        return httpx.options(f"{service.url}/mcp", headers=headers, trust_env=False, timeout=60)

    allowed, other = preflight(PAGE), preflight("https://evil.example")
    assert (allowed.status_code, allowed.headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    assert "Access-Control-Allow-Origin" not in other.headers


def test_a_call_larger_than_a_mebibyte_is_refused(service: Service) -> None:
    assert service.post(token=ALICE, json=CALL | {"x": "x" * MIB}).status_code == 413


def test_a_large_body_without_a_length_is_refused_when_it_is_too_large(service: Service) -> None:
    chunks = iter([b"x" * (MIB // 2)] * 3)
    headers = {"Content-Type": "application/json"}
    assert service.post(token=ALICE, content=chunks, headers=headers).status_code == 413


@pytest.mark.parametrize("path", ["/mcp", "/images"])
def test_an_enormous_body_is_refused_before_it_is_sent(service: Service, path: str) -> None:
    port = int(service.url.rpartition(":")[2])
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {ALICE}\r\n"
    head += f"Content-Type: application/json\r\nAccept: {ACCEPT['Accept']}\r\nContent-Length: {2**40}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_caller_who_asks_too_often_waits_and_others_do_not(root: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"alice {ALICE}\nbob {BOB}\n")
    options = ["--tokens", str(tmp_path / "tokens"), "--rate-limit", "1"]
    with running_service(tmp_path, "--root", str(root), *options) as service:
        answers = [service.post(token=ALICE) for _ in range(2)]
        assert [answer.status_code == 429 for answer in answers] == [False, True]
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
        assert service.post("/images", token=ALICE).status_code == 429
        assert service.post(token=BOB).status_code != 429
        assert [service.post().status_code for _ in range(2)] == [401, 429]
        assert service.get("/health").status_code == 200


def test_a_caller_may_ask_again_when_the_time_that_was_told_is_over() -> None:
    now = 0.0
    rates = Rates(per_minute=6, clock=lambda: now)
    assert [rates.wait_s("a") for _ in range(7)] == [0, 0, 0, 0, 0, 0, 10]
    now = 4
    assert rates.wait_s("a") == pytest.approx(6)
    now = 10
    assert [rates.wait_s("a"), rates.wait_s("a")] == [0, 10]
    now = 10_000
    assert [bool(rates.wait_s("a")) for _ in range(7)] == [False] * 6 + [True]


async def test_the_log_names_callers_and_what_they_asked_for_and_nothing_secret(service: Service) -> None:
    service.post(f"/mcp?access_token={ALICE}")
    service.post(token="a-wrong-token-of-somebody")
    service.post("/images", token=BOB, headers={"Host": "evil.example"})
    async with service.client(BOB) as client:
        assert "allowed" in text_of(await client.call_tool("inspect_image", {"image": "/etc/passwd"}))
    log = service.told("'bob' POST '/mcp': 200")
    assert "127.0.0.1 POST '/mcp': 401" in log
    for secret in (ALICE, BOB, "a-wrong-token-of-somebody", "access_token"):
        assert secret not in log
    assert "Traceback" not in log


# --- options


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "there is no token in it"),
        ("# only a remark\n", "there is no token in it"),
        ("alice short", "line 1 has fewer than 20"),
        (f"alice {ALICE}\n{BOB}", "line 2 is not of the form: NAME TOKEN"),
        (f"alice {ALICE}\nbob {ALICE}", "line 2 came before"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_meant_is_refused_without_its_content(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as refusal:
        BearerTokens(path)
    assert ALICE not in str(refusal.value)
    assert BOB not in str(refusal.value)


async def test_tokens_added_and_withdrawn_count_without_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"alice {ALICE}\n")
    tokens = BearerTokens(path)

    async def let_in() -> list[str]:
        found = [await tokens.verify_token(token) for token in (ALICE, BOB)]
        return [one.client_id for one in found if one is not None]

    assert await let_in() == ["alice"]
    path.write_text(f"alice {ALICE}\nbob {BOB}\n")
    assert await let_in() == ["alice", "bob"]
    (tmp_path / "new").write_text(f"bob {BOB}\n")
    (tmp_path / "new").replace(path)
    assert await let_in() == ["bob"]
    path.write_text(f"alice {ALICE} by mistake\n")
    assert await let_in() == ["bob"]
    path.unlink()
    assert await let_in() == ["bob"]
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert ["line 1" in said[0], "No such file" in said[1], len(said)] == [True, True, 2]
    assert ALICE not in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "not authenticated"),
        (["--host", "::"], "not authenticated"),
        (["--host", "192.0.2.1"], "not authenticated"),
        (["--host", "localhost.evil.example"], "not authenticated"),
        (["--host", "0.0.0.0", "--tokens", "TOKENS"], "--allowed-host"),
        (["--tokens", "/nowhere"], "/nowhere"),
        (["--tokens", "TOKENS", "--oauth-issuer", "https://as.example.org"], "exclude each other"),
        (["--oauth-issuer", "https://as.example.org"], "go together"),
        (["--oauth-issuer", "http://as.example.org", "--oauth-resource", "https://rs.example.org/mcp"], "not an https"),
        (["--oauth-scope", "read"], "--oauth-issuer"),
        (["--rate-limit", "0"], "at least 1"),
        (["--allowed-host", "https://rs.example.org"], "--allowed-host is a name"),
        (["--allowed-host", "*"], "--allowed-host is a name"),
        (["--allowed-origin", "app.example.org"], "--allowed-origin is an origin"),
        (["--allowed-origin", "https://app.example.org/"], "--allowed-origin is an origin"),
    ],
)
def test_options_of_http_that_do_not_fit_end_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    (tmp_path / "TOKENS").write_text(f"alice {ALICE}\n")
    given = [str(tmp_path / "TOKENS") if option == "TOKENS" else option for option in options]
    with pytest.raises(SystemExit) as ended:
        mcp_server.main(["--root", str(tmp_path), "--http", "--uploads", str(tmp_path / "uploads"), *given])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_options_of_http_without_http_are_refused_and_not_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mcp_server.main(["--root", ".", "--tokens", "tokens"])
    assert "--tokens is for --http" in capsys.readouterr().err
