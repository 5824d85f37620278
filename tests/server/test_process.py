"""The real server process with a real, randomly initialised checkpoint, over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from chats import data_url, user
from processes import REQUESTS, ServerProcess, picture, server_process

from model_server.protocol import PerceiveRequest, PerceiveResponse, decode_response, encode_request
from rs_tools.client import ModelClient


@pytest.fixture(scope="module")
def server(debug_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with server_process(log, "--weights", str(debug_weights)) as server:
        server.wait_until_ready()
        yield server


def post(server: ServerProcess, request: PerceiveRequest, *tiles: np.ndarray) -> PerceiveResponse:
    response = httpx.post(
        f"{server.url}/v1/perceive",
        content=encode_request(request, list(tiles)),
        headers={"Content-Type": "application/octet-stream"},
        timeout=300,
    )
    return decode_response(response.raise_for_status().content)


def answers(response: PerceiveResponse) -> list[tuple[object, list[float]]]:
    """The words of an answer apart from its numbers, which depend on the batch in the last digits."""
    return [
        *((answer.caption, [answer.confidence]) for answer in response.captions),
        *(((answer.answer, answer.kind), [answer.confidence]) for answer in response.vqa),
        *((answer.labels, answer.scores) for answer in response.classes),
    ]


def test_each_task_answers_every_tile(server: ServerProcess) -> None:
    caption, vqa, classify = (post(server, request, picture(1), picture(2, side=90)) for request in REQUESTS)
    assert (len(caption.captions), len(vqa.vqa), len(classify.classes)) == (2, 2, 2)
    assert classify.classes[0].labels == ["forest", "harbor", "runway"]
    assert sum(classify.classes[0].scores) == pytest.approx(1, abs=1e-3)
    assert caption.model.weights_digest


def test_models_describes_the_loaded_weights(server: ServerProcess) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models", timeout=300).json()["data"]
    assert model["weights_digest"] == post(server, REQUESTS[0], picture(1)).model.weights_digest
    assert model["tasks"] == ["caption", "vqa", "classify"]
    assert model["taxonomy"]


def test_a_server_in_half_precision_says_so(debug_weights: Path, tmp_path: Path) -> None:
    with server_process(tmp_path / "log", "--weights", str(debug_weights), "--precision", "bfloat16") as server:
        server.wait_until_ready()
        (model,) = httpx.get(f"{server.url}/v1/models", timeout=300).json()["data"]
        answered = post(server, REQUESTS[0], picture(1))
    assert model["precision"] == answered.model.precision == "bfloat16"


async def test_a_model_with_a_dense_branch_answers_boxes_masks_and_change(dense_weights: Path, tmp_path: Path) -> None:
    small, large = picture(1), picture(2, side=90)
    with server_process(tmp_path / "log", "--weights", str(dense_weights)) as server:
        server.wait_until_ready()
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            (model,) = (await http.get("/v1/models")).json()["data"]
        assert model["tasks"] == ["caption", "vqa", "classify", "ground", "segment", "detect_change"]
        async with ModelClient(server.url) as client:
            ground, segment, change = await asyncio.gather(
                client.perceive(PerceiveRequest(task="ground", text="ship"), [small, large]),
                client.perceive(PerceiveRequest(task="segment", labels=["road", "sea"], gsd_m=0.5), [small, large]),
                client.perceive(PerceiveRequest(task="detect_change", gsd_m=10), [small, picture(3), large, large]),
            )
    assert (ground.task_token, ground.expert) == ("[VG]", "region")
    assert (segment.task_token, segment.expert) == ("[SEG]", "pixel")
    assert (change.task_token, change.expert) == ("[CCD]", "pixel")
    for tile, objects in zip((small, large), ground.objects, strict=True):
        assert objects.boxes
        assert objects.known
        assert all(0 <= x1 < x2 <= tile.shape[1] and 0 <= y1 < y2 <= tile.shape[0] for x1, y1, x2, y2 in objects.boxes)
    assert [m.probabilities.shape for m in segment.masks] == [(2, 64, 64), (2, 90, 90)]
    assert [c.probabilities.shape for c in change.changes] == [(64, 64), (90, 90)]
    assert [c.scale for c in change.changes] == pytest.approx([1.49, 1.49], abs=0.01)


def test_a_model_without_a_dense_branch_refuses_boxes(server: ServerProcess) -> None:
    body = encode_request(PerceiveRequest(task="ground", text="ship"), [picture(1)])
    headers = {"Content-Type": "application/octet-stream"}
    refusal = httpx.post(f"{server.url}/v1/perceive", content=body, headers=headers, timeout=300)
    assert refusal.status_code == 501
    assert "no part for ground" in refusal.json()["error"]["message"]


async def test_concurrent_callers_share_batches_and_get_what_they_would_get_alone(server: ServerProcess) -> None:
    asked = [(REQUESTS[i % 3], [picture(100 + i), picture(200 + i)]) for i in range(12)]
    alone = [answers(post(server, request, *tiles)) for request, tiles in asked]
    async with ModelClient(server.url) as client:
        before = (await client.health())["engine"]
        together = await asyncio.gather(*(client.perceive(request, tiles) for request, tiles in asked))
        after = (await client.health())["engine"]

    assert after["shared_batches"] > before["shared_batches"]
    written = after["step_sequences"]["sum"] - before["step_sequences"]["sum"]
    assert written > after["steps"] - before["steps"], "no step wrote for more than one caller"
    for mine, reference in zip(together, alone, strict=True):
        for (words, numbers), (expected_words, expected_numbers) in zip(answers(mine), reference, strict=True):
            assert words == expected_words
            assert numbers == pytest.approx(expected_numbers, abs=1e-3)


def test_sigterm_lets_the_running_request_finish_and_exits_cleanly(debug_weights: Path, tmp_path: Path) -> None:
    with server_process(tmp_path / "log", "--weights", str(debug_weights)) as server:
        server.wait_until_ready()
        body = encode_request(REQUESTS[0], [picture(i) for i in range(64)])
        with httpx.Client(timeout=300) as client:
            headers = {"Content-Type": "application/octet-stream", "Transfer-Encoding": "chunked"}

            def half_then_stop() -> Iterator[bytes]:
                yield body[: len(body) // 2]
                # The server answers here, so it has accepted the request above.
                assert httpx.get(f"{server.url}/health", timeout=300).status_code == 200
                server.process.send_signal(signal.SIGTERM)
                yield body[len(body) // 2 :]

            response = client.post(f"{server.url}/v1/perceive", content=half_then_stop(), headers=headers)
        assert len(decode_response(response.content).captions) == 64
        assert server.process.wait(300) == 0
        assert "Traceback" not in server.log.read_text()


def test_sigterm_answers_a_chat_in_flight_and_no_question_is_logged(debug_weights: Path, tmp_path: Path) -> None:
    question = "Is there a hidden bunker?"
    with server_process(tmp_path / "log", "--weights", str(debug_weights)) as server:
        server.wait_until_ready()
        messages = [user(question, data_url(picture(1, side=512)))]
        body = json.dumps({"model": "debug", "messages": messages, "stream": True}).encode()

        def half_then_stop() -> Iterator[bytes]:
            yield body[: len(body) // 2]
            assert httpx.get(f"{server.url}/health", timeout=300).status_code == 200
            server.process.send_signal(signal.SIGTERM)
            yield body[len(body) // 2 :]

        headers = {"Content-Type": "application/json", "X-Request-ID": "mine"}
        url = f"{server.url}/v1/chat/completions"
        response = httpx.post(url, content=half_then_stop(), headers=headers, timeout=300)
        assert response.text.endswith("data: [DONE]\n\n")
        assert server.process.wait(300) == 0
    told = server.log.read_text()
    assert "call id=mine method=POST path=/v1/chat/completions status=200" in told
    assert "task=vqa" in told
    assert "bunker" not in told
    assert "path=/ready" not in told


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_sigterm_ends_a_server_that_is_still_loading(dense_weights: Path, tmp_path: Path) -> None:
    """From a file that never ends, as large weights over a slow network seem to be."""
    weights = Path(shutil.copytree(dense_weights, tmp_path / "weights"))
    (weights / "dense.json").unlink()
    os.mkfifo(weights / "dense.json")
    with server_process(tmp_path / "log", "--weights", str(weights)) as server:
        while True:
            try:
                pipe = os.open(weights / "dense.json", os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:  # the server has not come to it yet
                assert server.process.poll() is None
                time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        os.close(pipe)
        assert "stopped" in server.log.read_text()


def test_a_server_that_nobody_calls_ends(debug_weights: Path, tmp_path: Path) -> None:
    with server_process(tmp_path / "log", "--weights", str(debug_weights), "--idle-exit", "0.5") as server:
        assert server.process.wait(300) == 0
        assert "idle" in server.log.read_text()


def test_weights_that_cannot_be_loaded_end_the_server_with_the_reason(tmp_path: Path) -> None:
    with server_process(tmp_path / "log", "--weights", str(tmp_path / "nowhere")) as server:
        assert server.process.wait(300) == 1
        assert "nowhere" in server.log.read_text().splitlines()[-2]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_an_address_that_others_can_reach_needs_a_token(host: str) -> None:
    command = [sys.executable, "-m", "model_server.app", "--port", "0", "--host", host]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 2
    assert "--token-file" in refused.stderr


def test_a_port_that_is_taken_is_named(server: ServerProcess) -> None:
    port = str(httpx.URL(server.url).port)
    command = [sys.executable, "-m", "model_server.app", "--port", port]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert refused.returncode == 2
    assert port in refused.stderr


def test_the_token_file_is_what_callers_must_send(debug_weights: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("hush\n")
    arguments = ("--weights", str(debug_weights), "--token-file", str(token), "--host", "0.0.0.0")
    with server_process(tmp_path / "log", *arguments) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/models", timeout=300).status_code == 401
        ServerProcess(server.process, url, server.log).wait_until_ready()
        allowed = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer hush"}, timeout=300)
        assert allowed.status_code == 200
