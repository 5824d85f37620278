"""The door of several replicas without Ray: which image a call is about, who comes in, and what callers get back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import typer
from chats import data_url, user
from safetensors.numpy import save
from scripted import ScriptedPerceiver, tile

from model_server.batching.feature_cache import image_key
from model_server.engine import Engine, EngineNotReady
from model_server.http.api import create_app
from model_server.http.entry import Entry
from model_server.protocol import PerceiveRequest, decode_response, encode_request
from model_server.replicas import __main__ as replicas
from model_server.replicas.calls import AllBusy, Answer, Call, ReplicaLost
from model_server.replicas.digest import NATIVE, image_of
from model_server.replicas.door import create_door
from model_server.replicas.metrics import merged

CHAT = "/v1/chat/completions"
CAPTION = PerceiveRequest(task="caption")
GOOD = encode_request(CAPTION, [tile(7)])
HEADERS = {"Authorization": "Bearer secret", "Content-Type": "application/octet-stream"}


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)


def conversation(question: str, *urls: str) -> bytes:
    return json.dumps({"model": "scripted", "messages": [user(question, *urls)]}).encode()


# --- which image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        CAPTION,
        PerceiveRequest(task="vqa", text="Is there a tile_0?"),
        PerceiveRequest(task="classify", labels=["a", "b"], anchors=[np.zeros((2, 66), np.float32)]),
    ],
    ids=["caption", "vqa", "anchors"],
)
def test_a_native_call_is_about_its_first_tile_as_the_cache_of_features_knows_it(request_: PerceiveRequest) -> None:
    body = encode_request(request_, [picture(1)])
    assert image_of(NATIVE, body) == image_key(picture(1)).hex()


def test_more_tiles_change_nothing_and_another_first_tile_is_another_image() -> None:
    alone = image_of(NATIVE, encode_request(CAPTION, [picture(1)]))
    assert image_of(NATIVE, encode_request(CAPTION, [picture(i) for i in range(1, 13)])) == alone
    assert image_of(NATIVE, encode_request(CAPTION, [picture(2), picture(1)])) != alone
    assert image_of(NATIVE, encode_request(CAPTION, [picture(1).reshape(32, 24, 3)])) != alone


def test_a_chat_is_about_the_picture_that_it_shows_last() -> None:
    one, other = data_url(picture(1)), data_url(picture(2))
    key = image_of(CHAT, conversation("Is there a ship?", one))
    assert key is not None
    assert image_of(CHAT, conversation("How many ships are there?", one)) == key
    assert image_of(CHAT, conversation("Is there a ship?", other)) != key
    assert image_of(CHAT, conversation("What has changed?", other, one)) == key


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 100, id="noise"),
        pytest.param(GOOD[: len(GOOD) - 5], id="truncated"),
        pytest.param((2**62).to_bytes(8, "little") + GOOD[8:], id="lying header length"),
        pytest.param(save({"tile_1": tile(1)}), id="no first tile"),
        *(
            pytest.param(len(header).to_bytes(8, "little") + header + b"x" * 48, id=header.decode()[:60])
            for header in (
                b"[]", b'{"tile_0": 7}', b'{"tile_0": {"data_offsets": [0]}}', b"[" * 100_000,
                b'{"tile_0": {"data_offsets": [0, 48], "shape": [7, 4, 3]}}',
                b'{"tile_0": {"data_offsets": [0, 1e3], "shape": [4, 4, 3]}}',
                b'{"tile_0": {"data_offsets": [-9, 39], "shape": "4"}}',
                b'{"tile_0": {"data_offsets": [1000000000000000000000, 1000000000000000000048], "shape": [4, 4, 3]}}',
            )
        ),
    ],
)  # fmt: skip
def test_a_body_that_is_wrong_is_about_no_image(body: bytes) -> None:
    assert image_of(NATIVE, body) is None


@pytest.mark.parametrize("body", [b"", b'{"input": ["a harbour"]}', b'{"url": "data:image/png;base64,AAAA'])
def test_json_without_a_whole_picture_is_about_no_image(body: bytes) -> None:
    assert image_of(CHAT, body) is None


def test_metrics_of_several_processes_are_one_page_that_tells_them_apart() -> None:
    head = "# HELP rs_tiles_total Tiles answered.\n# TYPE rs_tiles_total counter\n"
    calls = '# HELP rs_calls Calls.\n# TYPE rs_calls gauge\nrs_calls{{path="/a b",status="200"}} {}\n'
    one = head + "rs_tiles_total 3\n" + calls.format(1)
    other = head + "rs_tiles_total 40\n" + calls.format(2)
    assert merged({"one": one, "other": other}) == (
        head + 'rs_tiles_total{replica="one"} 3\nrs_tiles_total{replica="other"} 40\n'
        "# HELP rs_calls Calls.\n# TYPE rs_calls gauge\n"
        'rs_calls{replica="one",path="/a b",status="200"} 1\nrs_calls{replica="other",path="/a b",status="200"} 2\n'
    )


# --- the door --------------------------------------------------------------------------------------------------------


class InThisProcess:
    """A replica without Ray: the same application over an engine; `fault` is what happens to the next call."""

    def __init__(self, engine: Engine) -> None:
        self._app = httpx.ASGITransport(create_app(engine), raise_app_exceptions=False)
        self.fault: Exception | None = None
        self.asked: list[tuple[Call, str | None]] = []

    async def answer(self, call: Call, image: str | None) -> Answer:
        self.asked.append((call, image))
        if self.fault is not None:
            raise self.fault
        headers = {"Content-Type": call.content_type, "X-Request-ID": call.id}
        request = httpx.Request(call.method, f"http://localhost{call.path}", headers=headers, content=call.body)
        response = await self._app.handle_async_request(request)
        return Answer("first", response.status_code, dict(response.headers), await response.aread())

    async def everyone(self, call: Call) -> list[Answer]:
        return [] if self.fault is not None else [await self.answer(call, None)]


@pytest.fixture
def behind(engine: Engine) -> InThisProcess:
    return InThisProcess(engine)


def caller(behind: InThisProcess, entry: Entry, address: str = "127.0.0.1", **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_door(behind, entry), raise_app_exceptions=False, client=(address, 1))
    return httpx.AsyncClient(**{"transport": transport, "base_url": "http://test", "headers": HEADERS, **options})


@pytest.fixture
async def http(behind: InThisProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with asyncio.timeout(300), caller(behind, Entry("secret", max_body=1 << 20)) as client:
        yield client


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_what_a_replica_answers_reaches_the_caller_under_one_id(
    http: httpx.AsyncClient, behind: InThisProcess
) -> None:
    response = await http.post(NATIVE, content=GOOD, headers={"X-Request-ID": "mine-1"})
    assert decode_response(response.content).captions[0].caption == "colour 7"
    assert response.headers.get_list("X-Request-ID") == ["mine-1"]
    assert response.headers["X-Replica"] == "first"
    ((call, image),) = behind.asked
    assert (call.id, image) == ("mine-1", image_key(tile(7)).hex())


async def test_a_replicas_refusal_reaches_the_caller_as_it_is(http: httpx.AsyncClient) -> None:
    refused = await http.post(NATIVE, content=b"nonsense")
    assert error_of(refused) == (400, "bad_request")
    unknown = await http.get("/v1/models/some/other")
    assert error_of(unknown) == (404, "model_not_found")
    chat = await http.post(CHAT, content=conversation("Is it 7?", data_url(tile(7))))
    assert chat.json()["choices"][0]["message"]["content"] == "Is it 7? 7"


@pytest.mark.parametrize("path", [NATIVE, CHAT, "/v1/embeddings", "/v1/models", "/metrics"])
async def test_without_the_token_nothing_reaches_a_replica(
    http: httpx.AsyncClient, behind: InThisProcess, path: str
) -> None:
    method = "GET" if path in ("/v1/models", "/metrics") else "POST"
    for given in ("", "Bearer wrong", "Basic secret"):
        refused = await http.request(method, path, headers={"Authorization": given})
        assert error_of(refused) == (401, "unauthorized")
    assert behind.asked == []


async def test_a_body_beyond_the_limit_reaches_no_replica_whether_announced_or_not(
    http: httpx.AsyncClient, behind: InThisProcess
) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * (1 << 15)

    assert error_of(await http.post(NATIVE, content=b"x" * (1 << 20 | 1))) == (413, "too_large")
    assert error_of(await http.post(NATIVE, content=trickle())) == (413, "too_large")
    assert behind.asked == []


async def test_without_a_token_a_foreign_host_name_is_refused(behind: InThisProcess) -> None:
    async with caller(behind, Entry(), base_url="http://attacker.example") as client:
        assert (await client.post(NATIVE, content=GOOD)).status_code == 400
    async with caller(behind, Entry(), base_url="http://localhost:8765") as client:
        assert (await client.post(NATIVE, content=GOOD)).status_code == 200


@pytest.mark.parametrize(
    ("fault", "status", "code", "header"),
    [
        (EngineNotReady("no replica runs"), 503, "not_ready", "Retry-After"),
        (AllBusy(), 503, "busy", "Retry-After"),
        (ReplicaLost(), 500, "failed", "X-Should-Retry"),
    ],
    ids=["none runs", "all busy", "lost"],
)
async def test_replicas_that_cannot_answer_are_an_error_of_the_table_and_the_next_call_is_served(
    http: httpx.AsyncClient, behind: InThisProcess, fault: Exception, status: int, code: str, header: str
) -> None:
    behind.fault = fault
    refused = await http.post(NATIVE, content=GOOD)
    assert error_of(refused) == (status, code)
    assert refused.json()["error"]["message"] == str(fault)
    assert header in refused.headers
    behind.fault = None
    assert (await http.post(NATIVE, content=GOOD)).status_code == 200


async def test_the_limit_of_one_address_holds_over_all_replicas(
    behind: InThisProcess, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.gate.clear()
    async with asyncio.timeout(300), caller(behind, Entry("secret", max_calls=1), "203.0.113.7") as client:
        held = asyncio.create_task(client.post(NATIVE, content=GOOD))
        while not engine.stats.requests:  # noqa: ASYNC110 - the engine gives no event to wait for
            await asyncio.sleep(0.001)
        refused = await client.post(NATIVE, content=GOOD)
        assert error_of(refused) == (429, "too_many_calls")
        assert int(refused.headers["Retry-After"]) >= 1
        perceiver.gate.set()
        assert (await held).status_code == 200


async def test_ready_health_and_metrics_speak_of_the_replicas(http: httpx.AsyncClient, behind: InThisProcess) -> None:
    await http.post(NATIVE, content=GOOD)
    assert (await http.get("/ready")).json() == {"ready": True, "replicas": 1}
    health = (await http.get("/health")).json()
    assert health["ready"] is True
    assert health["replicas"]["first"]["engine"]["requests"] == {"caption": 1}
    samples = (await http.get("/metrics")).text.splitlines()
    assert 'rs_requests_total{replica="first",task="caption"} 1' in samples
    assert 'rs_http_calls_total{replica="door",path="/v1/perceive",status="200"} 1' in samples

    behind.fault = EngineNotReady("no replica runs")
    unready = await http.get("/ready")
    assert (unready.status_code, unready.json()) == (503, {"ready": False, "replicas": 0})
    assert "Retry-After" in unready.headers
    assert (await http.get("/health")).json()["ready"] is False
    assert (await http.get("/metrics")).status_code == 200


def test_without_ray_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "find_spec", lambda name: None)
    with pytest.raises(typer.BadParameter, match=r"pip install 'rs-perception\[ray\]'"):
        replicas.command()


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="--max is 1, fewer than the 2 of --min"):
        replicas.command(least=2)
