"""Replicas on a real Ray Serve: two processes, each with the debug model, behind one real door."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from chats import data_url, user
from processes import REQUESTS, ServerProcess, picture

from model_server.engine import Engine
from model_server.http.api import create_app
from model_server.protocol import PerceiveRequest, PerceiveResponse, decode_response, encode_request
from rs_tools.client import ModelClient
from rs_tools.errors import ServerError

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'rs-perception[ray]'")

TOKEN = "hush"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/octet-stream"}
START_S = 300


@pytest.fixture(scope="module")
def server(debug_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "token").write_text(TOKEN)
    command = [sys.executable, "-m", "model_server.replicas", "--min", "2", "--max", "2", "--port", "0"]
    command += ["--weights", str(debug_weights), "--token-file", str(folder / "token")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        server = ServerProcess(process, json.loads(line)["url"], folder / "log")
        _wait_for_two(server)
        yield server
    finally:
        process.terminate()  # Ray's processes end with it
        process.wait(120)


def _wait_for_two(server: ServerProcess) -> None:
    ends = time.monotonic() + START_S
    while httpx.get(f"{server.url}/ready", timeout=60).json()["replicas"] < 2:
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < ends, server.log.read_text()
        time.sleep(0.5)


def ask(server: ServerProcess, request: PerceiveRequest, *tiles: np.ndarray) -> httpx.Response:
    body = encode_request(request, list(tiles))
    return httpx.post(f"{server.url}/v1/perceive", content=body, headers=HEADERS, timeout=300).raise_for_status()


def health(server: ServerProcess) -> dict[str, dict[str, Any]]:
    """What each replica says of itself, by its name."""
    return httpx.get(f"{server.url}/health", timeout=60).json()["replicas"]


async def until(server: ServerProcess, condition: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """What the replicas say of themselves, once it is so."""
    while not condition(told := list((await asyncio.to_thread(health, server)).values())):  # noqa: ASYNC110 - processes
        await asyncio.sleep(0.05)
    return told


def said(response: PerceiveResponse) -> PerceiveResponse:
    return response.model_copy(update={"elapsed_s": 0.0})


async def test_replicas_answer_what_a_single_server_answers(server: ServerProcess, debug_weights: Path) -> None:
    from model_server.perceiver import Perceiver

    engine = Engine(lambda: Perceiver.load(debug_weights))
    await engine.start()
    transport = httpx.ASGITransport(create_app(engine))
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=HEADERS) as single,
        httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=300) as several,
    ):
        for request in REQUESTS:
            body = encode_request(request, [picture(1), picture(2, side=90)])
            one, other = [await http.post("/v1/perceive", content=body) for http in (single, several)]
            assert said(decode_response(one.content)) == said(decode_response(other.content))
        body = json.dumps({"model": "debug", "messages": [user("Is there a road?", data_url(picture(1)))]})
        one, other = [(await http.post("/v1/chat/completions", content=body)).json() for http in (single, several)]
        assert one["choices"] == other["choices"]
        assert one["usage"] == other["usage"]
        assert {**one["perception"], "elapsed_s": 0} == {**other["perception"], "elapsed_s": 0}
        one, other = [(await http.get("/v1/models")).json()["data"][0] for http in (single, several)]
        assert {**one, "created": 0} == {**other, "created": 0}
    await engine.close()


def test_calls_about_one_image_reach_the_replica_that_has_its_features(server: ServerProcess) -> None:
    before = sum(one["engine"]["cache"]["hits"] for one in health(server).values())
    for seed in range(10, 16):
        answered = [ask(server, request, picture(seed)).headers["X-Replica"] for request in REQUESTS]
        assert len(set(answered)) == 1
    after = sum(one["engine"]["cache"]["hits"] for one in health(server).values())
    assert after - before >= 2 * 6


def test_different_images_are_shared_by_the_replicas(server: ServerProcess) -> None:
    answered = Counter(ask(server, REQUESTS[0], picture(seed)).headers["X-Replica"] for seed in range(100, 116))
    assert len(answered) == 2
    assert min(answered.values()) >= 2


async def test_more_calls_about_one_image_than_a_replica_takes_are_shared_too(server: ServerProcess) -> None:
    body = encode_request(REQUESTS[0], [picture(i) for i in range(4)])
    async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=300) as http:
        responses = await asyncio.gather(*(http.post("/v1/perceive", content=body) for _ in range(30)))
    assert {response.status_code for response in responses} == {200}
    assert len({response.headers["X-Replica"] for response in responses}) == 2


def test_a_wrong_token_is_refused(server: ServerProcess) -> None:
    body = encode_request(REQUESTS[0], [picture(1)])
    for given in ({}, {"Authorization": "Bearer wrong"}):
        headers = {"Content-Type": "application/octet-stream", **given}
        assert httpx.post(f"{server.url}/v1/perceive", content=body, headers=headers, timeout=60).status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60).status_code == 401


async def test_a_caller_that_leaves_frees_its_place_in_the_replica(server: ServerProcess) -> None:
    body = encode_request(REQUESTS[0], [picture(i) for i in range(200)])
    async with asyncio.timeout(300), httpx.AsyncClient(base_url=server.url, headers=HEADERS) as http:
        leaving = asyncio.create_task(http.post("/v1/perceive", content=body))
        await until(server, lambda told: any(one["engine"]["on_device"] for one in told))
        leaving.cancel()
        await until(server, lambda told: sum(one["engine"]["cancellations"] for one in told))
        await until(server, lambda told: not any(one["engine"]["on_device"] for one in told))


async def test_a_killed_replica_costs_its_calls_alone_and_is_replaced(server: ServerProcess) -> None:
    tiles = [picture(i) for i in range(200)]
    async with asyncio.timeout(START_S), ModelClient(server.url, TOKEN) as client:
        asked = asyncio.create_task(client.perceive(REQUESTS[0], tiles))
        told = await until(server, lambda told: any(one["engine"]["on_device"] for one in told))
        assert not asked.done()
        (lost,) = (one["pid"] for one in told if one["engine"]["on_device"])
        os.kill(lost, signal.SIGKILL)
        with pytest.raises(ServerError, match="the replica that worked on this call has ended"):
            await asked
        for seed in range(8):  # those whose images were the dead one's are answered by the other
            assert (await client.perceive(REQUESTS[0], [picture(seed)])).captions
        await asyncio.to_thread(_wait_for_two, server)
        assert lost not in {one["pid"] for one in health(server).values()}


def test_sigterm_lets_the_running_call_finish_and_exits_cleanly(server: ServerProcess) -> None:
    """The last test: it ends the server."""
    body = encode_request(REQUESTS[0], [picture(i) for i in range(64)])

    def half_then_stop() -> Iterator[bytes]:
        yield body[: len(body) // 2]
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        yield body[len(body) // 2 :]

    response = httpx.post(f"{server.url}/v1/perceive", content=half_then_stop(), headers=HEADERS, timeout=300)
    assert len(decode_response(response.content).captions) == 64
    assert server.process.wait(300) == 0
    assert "Traceback" not in server.log.read_text()
