"""The HTTP API over a real socket, with a scripted perceiver where a test has to hold or break the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import numpy as np
import pytest
from chats import data_url, user
from safetensors.numpy import save
from scripted import GUILTY, ScriptedPerceiver, tile

from model_server.engine import Engine
from model_server.http import entry
from model_server.http.api import create_app
from model_server.perceiver import Perceiver
from model_server.protocol import PerceiveRequest, decode_response, encode_request

CAPTION = PerceiveRequest(task="caption")
GOOD = encode_request(CAPTION, [tile(7)])
HEADERS = {"Authorization": "Bearer secret", "Content-Type": "application/octet-stream"}


def body_of(request: dict[str, object], **tensors: np.ndarray) -> bytes:
    return save(tensors or {"tile_0": tile(1)}, metadata={"request": json.dumps(request)})


def with_header(header: dict[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.fixture
async def http(scripted_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with asyncio.timeout(300), httpx.AsyncClient(base_url=scripted_url, headers=HEADERS, timeout=300) as client:
        yield client


async def perceive(http: httpx.AsyncClient, body: bytes) -> httpx.Response:
    return await http.post("/v1/perceive", content=body)


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - the worker thread gives no event to wait for
            await asyncio.sleep(0.001)


async def test_an_answer_names_the_model_the_task_token_and_the_expert(http: httpx.AsyncClient) -> None:
    response = await perceive(http, GOOD)
    answer = decode_response(response.content)
    assert answer.captions[0].caption == "colour 7"
    assert (answer.model.model, answer.task_token, answer.expert) == ("scripted", "[caption]", "image")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff" * 100, id="noise"),
        pytest.param(GOOD[: len(GOOD) - 5], id="truncated"),
        pytest.param((2**62).to_bytes(8, "little") + GOOD[8:], id="lying header length"),
        pytest.param(save({"tile_0": tile(1)}), id="no request"),
        pytest.param(with_header({"__metadata__": None}), id="no metadata"),
        pytest.param(body_of({"task": "teleport"}), id="unknown task"),
        pytest.param(body_of({"task": "caption", "colour": "red"}), id="unknown field"),
        pytest.param(body_of({"task": "vqa", "text": " "}), id="blank question"),
        pytest.param(body_of({"task": "classify", "labels": ["x" * 81]}), id="over-long label"),
        pytest.param(body_of({"task": "caption"}, tile_0=np.zeros((4, 4), np.uint8)), id="flat tile"),
        pytest.param(body_of({"task": "caption"}, tile_0=np.zeros((4, 4, 3), np.float32)), id="float tile"),
        pytest.param(body_of({"task": "caption"}, tile_1=tile(1)), id="misnamed tile"),
        pytest.param(body_of({"task": "ground"}), id="no phrase"),
        pytest.param(body_of({"task": "segment"}), id="no classes"),
        pytest.param(body_of({"task": "detect_change"}), id="half a pair"),
    ],
)
async def test_a_malformed_body_is_refused_and_the_next_request_is_served(http: httpx.AsyncClient, body: bytes) -> None:
    refusal = await perceive(http, body)
    assert error_of(refusal) == (400, "bad_request")
    assert refusal.json()["error"]["message"]
    assert (await perceive(http, GOOD)).status_code == 200


@pytest.mark.parametrize("announced", [True, False], ids=["by its length", "as it streams"])
async def test_an_oversize_body_is_refused_and_the_next_request_is_served(engine: Engine, announced: bool) -> None:
    # In-process transport: over a socket the client may see the closed connection before it reads the refusal.
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield bytes(1 << 10)

    app = httpx.ASGITransport(create_app(engine, token="secret", max_body=4 << 10))
    async with httpx.AsyncClient(transport=app, base_url="http://test", headers=HEADERS) as client:
        content = bytes(5 << 10) if announced else stream()
        assert error_of(await client.post("/v1/perceive", content=content)) == (413, "too_large")
        assert (await perceive(client, GOOD)).status_code == 200


async def test_an_oversize_announcement_is_refused_before_its_bytes_arrive(scripted_url: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(scripted_url).port)
    head = "POST /v1/perceive HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
    writer.write((head + "".join(f"{key}: {value}\r\n" for key, value in HEADERS.items()) + "\r\n").encode())
    async with asyncio.timeout(300):
        assert b" 413 " in await reader.readline()
    writer.close()


async def test_a_caller_that_leaves_in_mid_body_leaves_the_server_serving(
    http: httpx.AsyncClient, scripted_url: str
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(scripted_url).port)
    head = f"POST /v1/perceive HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(GOOD)}\r\n"
    head += "".join(f"{key}: {value}\r\n" for key, value in HEADERS.items())
    writer.write(head.encode() + b"\r\n" + GOOD[:50])
    await writer.drain()
    writer.close()
    assert (await perceive(http, GOOD)).status_code == 200


@pytest.mark.parametrize("token", ["", "Bearer wrong", "Basic secret"])
async def test_a_wrong_token_gets_nothing_but_health(http: httpx.AsyncClient, token: str) -> None:
    wrong = {"Authorization": token}
    response = await http.post("/v1/perceive", content=GOOD, headers=wrong)
    assert error_of(response) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert (await http.get("/v1/models", headers=wrong)).status_code == 401
    assert (await http.get("/health", headers=wrong)).status_code == 200


async def test_a_full_queue_answers_503_with_retry_after(
    http: httpx.AsyncClient, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.gate.clear()
    running = asyncio.create_task(perceive(http, GOOD))
    await until(lambda: len(perceiver.batches) == 1)
    waiting = asyncio.create_task(perceive(http, encode_request(CAPTION, [tile(1)] * 32)))
    await until(lambda: engine.waiting == 32)
    refusal = await perceive(http, GOOD)
    assert error_of(refusal) == (503, "busy")
    assert int(refusal.headers["Retry-After"]) >= 1
    perceiver.gate.set()
    assert (await running).status_code == (await waiting).status_code == 200


async def test_bodies_in_memory_are_bounded_together(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    app = httpx.ASGITransport(create_app(engine, token="secret", max_body=len(GOOD)))
    perceiver.gate.clear()
    async with httpx.AsyncClient(transport=app, base_url="http://test", headers=HEADERS) as client:
        held = [asyncio.create_task(perceive(client, GOOD)) for _ in range(2)]
        await until(lambda: engine.stats.requests.get("caption") == 2)
        assert error_of(await perceive(client, GOOD)) == (503, "busy")
        perceiver.gate.set()
        assert [response.status_code for response in await asyncio.gather(*held)] == [200, 200]
        assert (await perceive(client, GOOD)).status_code == 200


async def test_the_pixels_of_pictures_count_as_bytes_in_memory(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    """A picture of one colour is a file of some hundred bytes, whatever its size."""
    flat = {"model": "scripted", "messages": [user(None, data_url(np.full((64, 64, 3), 7, np.uint8)))]}
    app = httpx.ASGITransport(create_app(engine, token="secret", max_body=10_000))
    perceiver.gate.clear()
    async with (
        asyncio.timeout(300),
        httpx.AsyncClient(transport=app, base_url="http://test", headers=HEADERS) as client,
    ):
        held = asyncio.create_task(client.post("/v1/chat/completions", json=flat))
        await until(lambda: engine.stats.requests.get("caption") == 1)
        assert error_of(await client.post("/v1/chat/completions", json=flat)) == (503, "busy")
        pictures = {"model": "scripted", "input": [data_url(np.full((64, 64, 3), 7, np.uint8))]}
        assert error_of(await client.post("/v1/embeddings", json=pictures)) == (503, "busy")
        perceiver.gate.set()
        assert (await held).status_code == 200
        assert (await client.post("/v1/chat/completions", json=flat)).status_code == 200


async def test_a_body_that_does_not_come_is_waited_for_no_longer(
    http: httpx.AsyncClient, scripted_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "BODY_S", 0.1)
    port = httpx.URL(scripted_url).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/perceive HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nContent-Length: 1000\r\n"
    writer.write(head + b"Content-Type: application/octet-stream\r\n\r\nand no more")
    async with asyncio.timeout(300):
        answer = await reader.read()  # up to the end of the connection
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"too_slow"' in answer
    writer.close()
    assert (await perceive(http, GOOD)).status_code == 200


async def test_a_caller_that_disconnects_frees_its_place(
    http: httpx.AsyncClient, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.gate.clear()
    running = asyncio.create_task(perceive(http, GOOD))
    await until(lambda: len(perceiver.batches) == 1)
    leaving = asyncio.create_task(perceive(http, encode_request(CAPTION, [tile(66)] * 20)))
    await until(lambda: engine.waiting == 20)
    leaving.cancel()
    await until(lambda: engine.waiting == 0)
    perceiver.gate.set()
    assert (await running).status_code == 200
    assert perceiver.batches == [[7]]


async def test_a_failure_of_the_model_is_told_to_its_caller_only(http: httpx.AsyncClient) -> None:
    failed, good = await asyncio.gather(perceive(http, encode_request(CAPTION, [tile(GUILTY)])), perceive(http, GOOD))
    assert error_of(failed) == (500, "failed")
    assert "unlucky tile" in failed.json()["error"]["message"]
    assert good.status_code == 200


async def test_a_task_that_the_model_has_no_part_for_is_not_implemented(
    http: httpx.AsyncClient, perceiver: ScriptedPerceiver
) -> None:
    perceiver.tasks = ("caption", "vqa", "classify")
    refusal = await perceive(http, encode_request(PerceiveRequest(task="segment", labels=["road"]), [tile(1)]))
    assert error_of(refusal) == (501, "not_served")
    assert "'scripted' has no part for segment" in refusal.json()["error"]["message"]
    (model,) = (await http.get("/v1/models")).json()["data"]
    assert model["tasks"] == ["caption", "vqa", "classify"]
    assert (await perceive(http, GOOD)).status_code == 200


async def test_before_the_model_is_loaded_the_server_says_so(loader: Callable[[], Perceiver]) -> None:
    engine = Engine(loader)
    app = httpx.ASGITransport(create_app(engine))
    async with httpx.AsyncClient(transport=app, base_url="http://localhost", headers=HEADERS) as client:
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).json()["ready"] is False
        refusal = await perceive(client, GOOD)
        assert error_of(refusal) == (503, "not_ready")
        assert "Retry-After" in refusal.headers
        await engine.start()
        assert (await client.get("/ready")).status_code == 200
    await engine.close()


async def test_without_a_token_a_foreign_host_name_is_refused(engine: Engine) -> None:
    app = httpx.ASGITransport(create_app(engine))
    async with httpx.AsyncClient(transport=app, base_url="http://attacker.example", headers=HEADERS) as client:
        assert (await perceive(client, GOOD)).status_code == 400
    async with httpx.AsyncClient(transport=app, base_url="http://127.0.0.1:8765", headers=HEADERS) as client:
        assert (await perceive(client, GOOD)).status_code == 200


@pytest.mark.parametrize("origin", ["https://attacker.example", "null", "http://localhost.attacker.example", "http://["])
async def test_without_a_token_a_web_page_of_another_origin_is_refused(engine: Engine, origin: str) -> None:
    """What it may send without asking first: plain text."""
    body = json.dumps({"model": "scripted", "messages": [user(None, data_url(tile(7)))]})
    app = httpx.ASGITransport(create_app(engine))
    async with httpx.AsyncClient(transport=app, base_url="http://127.0.0.1:8765") as client:
        page = {"Content-Type": "text/plain", "Origin": origin}
        refusal = await client.post("/v1/chat/completions", content=body, headers=page)
        assert error_of(refusal) == (403, "forbidden")
        here = {**page, "Origin": "http://localhost:3000"}
        assert (await client.post("/v1/chat/completions", content=body, headers=here)).status_code == 200


async def test_models_lists_what_is_loaded(http: httpx.AsyncClient) -> None:
    (model,) = (await http.get("/v1/models")).json()["data"]
    assert (model["id"], model["weights_digest"], model["taxonomy"]) == ("scripted", "0", ["beach", "forest"])
