"""The client of a model server at an address, and what it makes of servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from processes import picture
from scripted import GUILTY, ScriptedPerceiver, tile

from model_server.engine import Engine
from model_server.protocol import MAX_BODY_BYTES, PerceiveRequest, TileChange
from rs_tools.client import ModelClient
from rs_tools.errors import (
    InputError,
    NotServed,
    ServerBusy,
    ServerError,
    ServerUnavailable,
)
from rs_tools.model_facts import ModelFacts

CAPTION = PerceiveRequest(task="caption")


@asynccontextmanager
async def always(answer: bytes) -> AsyncIterator[ModelClient]:
    """A client of a server that answers every call with the same bytes."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    async with server, ModelClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        yield client


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - the worker thread gives no event to wait for
            await asyncio.sleep(0.001)


async def test_a_url_where_nobody_listens_is_named_in_the_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with ModelClient(url) as client:
            with pytest.raises(ServerUnavailable, match=url):
                await client.perceive(CAPTION, [picture(1)])


async def test_one_broken_connection_is_survived() -> None:
    calls = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.readline()
        if calls == 2:
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"calls":2}')
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, ModelClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        assert await client.health() == {"calls": 2}
        with pytest.raises(ServerUnavailable):
            await client.health()
    assert calls == 4


async def test_a_server_of_another_kind_is_not_mistaken_for_ours() -> None:
    async with always(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello") as client:
        with pytest.raises(ServerError, match="protocol"):
            await client.perceive(CAPTION, [tile(1)])
        with pytest.raises(ServerError, match="rs-model-server"):
            await client.health()


async def test_a_busy_server_says_when_to_call_again(
    scripted_url: str, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        perceiver.gate.clear()
        running = asyncio.create_task(client.perceive(CAPTION, [tile(1)]))
        await until(lambda: len(perceiver.batches) == 1)
        waiting = asyncio.create_task(client.perceive(CAPTION, [tile(2)] * 32))
        await until(lambda: engine.waiting == 32)
        with pytest.raises(ServerBusy, match="call again in") as refusal:
            await client.perceive(CAPTION, [tile(3)])
        assert refusal.value.retry_after_s >= 1
        perceiver.gate.set()
        assert (await running).captions[0].caption == "colour 1"
        assert len((await waiting).captions) == 32


async def test_the_words_of_the_server_reach_the_caller(scripted_url: str) -> None:
    async with ModelClient(scripted_url, token="secret") as client:
        with pytest.raises(ServerError, match="unlucky tile"):
            await client.perceive(CAPTION, [tile(GUILTY)])


async def test_arrays_arrive_on_the_answers_of_their_tiles(scripted_url: str) -> None:
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((5, 7), (5, 7), (8, 3), (8, 3))]
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        masks = (await client.perceive(PerceiveRequest(task="segment", labels=["road", "sea"]), tiles)).masks
        changes = (await client.perceive(PerceiveRequest(task="detect_change"), tiles)).changes
    for tile_, mask in zip(tiles, masks, strict=True):
        np.testing.assert_array_equal(mask.probabilities, np.stack([tile_[..., 0]] * 2))
    for before, after, change in zip(tiles[::2], tiles[1::2], changes, strict=True):
        np.testing.assert_array_equal(change.probabilities, after[..., 0] - before[..., 0])


async def test_an_array_that_does_not_fit_its_tile_is_not_passed_on(
    scripted_url: str, perceiver: ScriptedPerceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = TileChange(threshold=0.5, scale=1, probabilities=np.zeros((9, 9), np.uint8))
    monkeypatch.setattr(perceiver, "answer", lambda queries: [change] * len(queries))
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        with pytest.raises(ServerError, match=r"probabilities \(9, 9\) for a tile of 4x4"):
            await client.perceive(PerceiveRequest(task="detect_change"), [tile(1), tile(2)])


async def test_a_model_that_cannot_do_a_task_is_named_with_what_it_can(
    scripted_url: str, perceiver: ScriptedPerceiver
) -> None:
    perceiver.tasks = ("caption", "vqa")
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        with pytest.raises(NotServed, match=r"^the loaded model 'scripted' has no part for ground") as refusal:
            await client.perceive(PerceiveRequest(task="ground", text="ship"), [tile(1)])
    assert "it serves caption, vqa: use one of these" in str(refusal.value)


async def test_a_cancelled_call_frees_its_place_on_the_server(
    scripted_url: str, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    async with asyncio.timeout(300), ModelClient(scripted_url, token="secret") as client:
        perceiver.gate.clear()
        running = asyncio.create_task(client.perceive(CAPTION, [tile(1)]))
        await until(lambda: len(perceiver.batches) == 1)
        cancelled = asyncio.create_task(client.perceive(CAPTION, [tile(2)] * 9))
        await until(lambda: engine.waiting == 9)
        cancelled.cancel()
        await until(lambda: engine.waiting == 0)
        perceiver.gate.set()
        await running


async def test_more_bytes_than_a_request_may_have_are_refused_before_they_travel() -> None:
    side = 2048
    tiles = [picture(0, side)] * (MAX_BODY_BYTES // (side * side * 3) + 1)
    async with ModelClient("http://127.0.0.1:1") as client:
        with pytest.raises(InputError, match="smaller region"):
            await client.perceive(CAPTION, tiles)


def test_the_client_does_not_import_torch() -> None:
    program = "import sys, rs_tools.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=300, check=False).returncode == 0


async def test_too_many_calls_are_a_busy_server_too() -> None:
    async with always(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 4\r\n\r\nwait") as client:
        with pytest.raises(ServerBusy, match="call again in 3 s"):
            await client.health()


@pytest.mark.parametrize("said", ["Wed, 21 Oct 2026 07:28:00 GMT", "soon", "nan", "-5"])
async def test_a_busy_server_that_names_no_seconds_is_called_again_soon(said: str) -> None:
    """As a proxy in front of it may: the header may be a date."""
    async with always(f"HTTP/1.1 503 Busy\r\nRetry-After: {said}\r\nContent-Length: 4\r\n\r\nwait".encode()) as client:
        with pytest.raises(ServerBusy, match="call again in 1 s") as refusal:
            await client.perceive(CAPTION, [tile(1)])
    assert refusal.value.retry_after_s == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8765", "http://host:port", "http://host:99999", "http://[::1", "file:///x"])
def test_an_address_that_is_none_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(InputError, match="is no address of a server: give one such as"):
        ModelClient(url)


@pytest.mark.parametrize("token", ["hush-4711\nhush-4712", "hush-4711 é"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_quoted(token: str) -> None:
    with pytest.raises(InputError, match="one line of ASCII") as refusal:
        ModelClient("http://127.0.0.1:8765", token)
    assert "hush" not in str(refusal.value)


async def test_the_address_may_be_the_one_that_openai_clients_are_given(scripted_url: str) -> None:
    async with ModelClient(f"{scripted_url}/v1/", token="secret\n") as client:
        assert (await client.perceive(CAPTION, [tile(7)])).captions[0].caption == "colour 7"


async def test_no_proxy_stands_between_this_machine_and_itself(
    scripted_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with ModelClient(scripted_url, token="secret") as client:
        assert (await client.perceive(CAPTION, [tile(7)])).captions[0].caption == "colour 7"
    assert (await ModelFacts(scripted_url, "secret", None).taxonomy()).model == "scripted"


async def test_an_answer_that_cannot_be_unpacked_is_a_typed_error() -> None:
    async with always(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnone") as client:
        with pytest.raises(ServerUnavailable, match="DecodingError"):
            await client.health()
