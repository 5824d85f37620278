"""The OpenAI-compatible side over a real socket, with a scripted perceiver where a test has to hold or break the model;
and what every call leaves in the log and the metrics."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest
from chats import data_url, user
from scripted import GUILTY, ScriptedPerceiver, tile

from model_server.engine import Engine
from model_server.http.api import create_app
from model_server.protocol import PerceiveRequest, encode_request
from model_server.resident import Resident

SECRET = "Is the hidden bunker at 12 degrees?"


@pytest.fixture
async def client(scripted_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"{scripted_url}/v1"
    async with asyncio.timeout(300), openai.AsyncOpenAI(base_url=base, api_key="secret", max_retries=0) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, text: str | None, colour: int = 7, **fields: Any) -> Any:
    messages: Any = [user(text, data_url(tile(colour)))]
    return await client.chat.completions.create(model="scripted", messages=messages, **fields)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - the worker thread gives no event to wait for
            await asyncio.sleep(0.001)


async def test_a_busy_server_is_a_server_error_with_retry_after(
    client: openai.AsyncOpenAI, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.gate.clear()
    running = asyncio.create_task(ask(client, None))
    await until(lambda: len(perceiver.batches) == 1)
    waiting = [asyncio.create_task(ask(client, None, colour)) for colour in range(20, 52)]
    await until(lambda: engine.waiting == 32)
    with pytest.raises(openai.InternalServerError) as refusal:
        await ask(client, None)
    assert (refusal.value.status_code, refusal.value.code) == (503, "busy")
    assert int(refusal.value.response.headers["Retry-After"]) >= 1
    perceiver.gate.set()
    answers = await asyncio.gather(running, *waiting)
    assert [one.choices[0].message.content for one in answers] == [f"colour {n}" for n in (7, *range(20, 52))]


async def test_a_failure_of_the_model_is_not_asked_for_again(
    client: openai.AsyncOpenAI, perceiver: ScriptedPerceiver
) -> None:
    with pytest.raises(openai.InternalServerError, match="unlucky tile"):
        await ask(client.with_options(max_retries=2), None, GUILTY)
    assert perceiver.batches == [[GUILTY]]


async def test_a_deadline_in_the_metadata_ends_the_call(
    client: openai.AsyncOpenAI, engine: Engine, perceiver: ScriptedPerceiver
) -> None:
    perceiver.gate.clear()
    with pytest.raises(openai.InternalServerError, match="deadline") as refusal:
        await ask(client, None, metadata={"deadline_s": "0.05"})
    assert refusal.value.status_code == 504
    perceiver.gate.set()


async def test_a_wrong_key_is_an_authentication_error(client: openai.AsyncOpenAI) -> None:
    stranger = client.with_options(api_key="guessed")
    for call in (ask(stranger, None), stranger.embeddings.create(model="scripted", input="x"), stranger.models.list()):
        with pytest.raises(openai.AuthenticationError):
            await call


async def test_a_model_without_vectors_says_so(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="no contrastive head") as refusal:
        await client.embeddings.create(model="scripted", input="a road")
    assert (refusal.value.status_code, refusal.value.code) == (501, "not_served")
    (card,) = (await client.models.list()).data
    assert card.model_extra is not None
    assert card.model_extra["embeddings"] is False


class WithVectors(ScriptedPerceiver):
    """Its vectors tell texts by their length and pictures by their colour."""

    def text_vectors(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(text), 0.0] for text in texts])

    def image_vectors(self, images: list[np.ndarray]) -> np.ndarray:
        return np.array([[0.0, image[0, 0, 0]] for image in images])


@pytest.fixture
def with_vectors(engine: Engine) -> None:
    engine.perceiver = cast(Resident, WithVectors())


@pytest.mark.usefixtures("with_vectors")
@pytest.mark.parametrize("form", ["float", "base64"])
async def test_vectors_come_in_the_order_of_the_inputs(client: openai.AsyncOpenAI, form: Any) -> None:
    inputs = ["road", data_url(tile(9)), "a lake", data_url(tile(3))]
    raw = await client.embeddings.with_raw_response.create(model="scripted", input=inputs, encoding_format=form)
    assert isinstance(json.loads(raw.content)["data"][0]["embedding"], list if form == "float" else str)
    vectors = await client.embeddings.create(model="scripted", input=inputs)  # base64, read by the client
    assert [one.embedding for one in vectors.data] == [[4, 0], [0, 9], [6, 0], [0, 3]]


@pytest.mark.usefixtures("with_vectors")
@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"input": []}, "input", "at least 1"),
        ({"input": " "}, "input", "0"),
        ({"input": ["x" * 501]}, "input", "501"),
        ({"input": ["x"] * 65}, "input", "64"),
        ({"input": "data:image/png;base64,AAAA"}, "input", "none of PNG"),
        ({"input": [data_url(np.zeros((2048, 2048, 3), np.uint8))] * 11}, "input", "128 MiB"),
        ({"input": "x", "dimensions": 7}, "dimensions", "2 dimensions"),
    ],
)
async def test_inputs_that_have_no_vector_are_refused(
    client: openai.AsyncOpenAI, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as refusal:
        await client.embeddings.create(model="scripted", **fields)
    assert str(refusal.value.param).startswith(param)


async def test_one_address_may_have_so_many_calls_in_work(engine: Engine, perceiver: ScriptedPerceiver) -> None:
    app = create_app(engine, token="secret", max_calls=2)
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/octet-stream"}
    body = encode_request(PerceiveRequest(task="caption"), [tile(1)])

    def caller(address: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, client=(address, 1))
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    perceiver.gate.clear()
    async with caller("203.0.113.7") as one, caller("203.0.113.8") as other, caller("127.0.0.1") as here:
        held = [asyncio.create_task(one.post("/v1/perceive", content=body)) for _ in range(2)]
        await until(lambda: engine.stats.requests.get("caption") == 2)
        refusal = await one.post("/v1/perceive", content=body)
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "too_many_calls")
        assert int(refusal.headers["Retry-After"]) >= 1
        held += [asyncio.create_task(who.post("/v1/perceive", content=body)) for who in (other, here, here, here)]
        await until(lambda: engine.stats.requests.get("caption") == 6)
        perceiver.gate.set()
        assert {response.status_code for response in await asyncio.gather(*held)} == {200}
        assert (await one.post("/v1/perceive", content=body)).status_code == 200


async def test_a_fault_of_ours_names_the_line_of_the_log(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "metrics", lambda: 1 / 0)
    app = httpx.ASGITransport(create_app(engine, token="secret"), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=app, base_url="http://test") as http:
        response = await http.get("/health", headers={"X-Request-ID": "mine-7"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    assert "mine-7" in response.json()["error"]["message"]
    assert response.headers["X-Request-ID"] == "mine-7"


async def test_a_request_id_is_taken_over_returned_and_logged(
    client: openai.AsyncOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "model_server")
    raw = await client.with_options(default_headers={"X-Request-ID": "mine-1"}).models.with_raw_response.list()
    assert raw.headers["X-Request-ID"] == "mine-1"
    forged = await client.with_options(default_headers={"X-Request-ID": "a id=b"}).models.with_raw_response.list()
    assert forged.headers["X-Request-ID"] not in ("a id=b", "mine-1")
    first, second = (record.getMessage() for record in caplog.records if "path=/v1/models" in record.getMessage())
    assert "call id=mine-1 method=GET path=/v1/models status=200" in first
    assert f"id={forged.headers['X-Request-ID']} " in second


async def test_the_log_names_the_task_and_never_what_was_asked_shown_or_sent(
    client: openai.AsyncOpenAI, scripted_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "model_server")
    completion = await ask(client, SECRET)
    assert SECRET in completion.choices[0].message.content
    with pytest.raises(openai.BadRequestError):
        await ask(client, SECRET * 20)
    with pytest.raises(openai.BadRequestError):
        await ask(client, SECRET, metadata={"task": SECRET})
    with pytest.raises(openai.InternalServerError):
        await ask(client, SECRET, GUILTY)
    async with httpx.AsyncClient(base_url=scripted_url) as http:
        await http.get(f"/{SECRET}", params={"token": SECRET})
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "task=vqa priority=interactive tiles=1" in told
    assert "status=400" in told
    assert "path=(other) status=404" in told
    assert "error=failed" in told
    for hidden in ("bunker", "secret", "base64", "iVBOR"):
        assert hidden not in told


async def test_metrics_are_prometheus_text_and_count_what_happened(
    client: openai.AsyncOpenAI, scripted_url: str
) -> None:
    await ask(client, None)
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    async with httpx.AsyncClient(base_url=scripted_url) as http:
        assert (await http.get("/metrics")).status_code == 401
        response = await http.get("/metrics", headers={"Authorization": "Bearer secret"})
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    values = samples(response.text)
    assert values['rs_http_calls_total{path="/v1/chat/completions",status="200"}'] == 1
    assert values['rs_http_calls_total{path="/v1/chat/completions",status="404"}'] == 1
    assert values['rs_requests_total{task="caption"}'] == 1
    assert values["rs_tiles_total"] == 1
    assert values["rs_queue_tiles" + '{priority="interactive"}'] == 0
    assert values['rs_answer_seconds_count{priority="interactive"}'] == 1
    assert values['rs_answer_seconds_bucket{priority="interactive",le="+Inf"}'] == 1
    assert values["rs_resident_memory_bytes"] > 1e6
    for name in ("rs_first_token_seconds_sum", "rs_tokens_total", 'rs_cache_lookups_total{outcome="hit"}'):
        assert name in values


def samples(text: str) -> dict[str, float]:
    """The samples of an exposition; fails where a line is none, or stands outside its family."""
    values: dict[str, float] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
        elif line.startswith("# TYPE "):
            assert line.split()[2] == family
        else:
            name, value = line.rsplit(" ", 1)
            assert name.startswith(family)
            assert name not in values
            values[name] = float(value)
    return values
