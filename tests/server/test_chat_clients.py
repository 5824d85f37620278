"""OpenAI's own client and LangChain's, unchanged, against a real server process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from chats import content, data_url, user
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion
from processes import REQUESTS, ServerProcess, picture, server_process
from pydantic import SecretStr

from model_server.protocol import PerceiveRequest, PerceiveResponse, decode_response, encode_request
from model_server.text.boxes import BoxDialect, parse_boxes
from model_server.text.masks import parse_mask

IMAGE = picture(1)
URL = data_url(IMAGE)
VQA = REQUESTS[1]


@pytest.fixture(scope="module")
def server(dense_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with server_process(log, "--weights", str(dense_weights)) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: str | None, *urls: str, **fields: Any) -> ChatCompletion:
    return client.chat.completions.create(model="debug", messages=[user(text, *(urls or (URL,)))], **fields)


def text_of(completion: ChatCompletion) -> str:
    text = completion.choices[0].message.content
    assert text is not None
    return text


def perception_of(completion: Any) -> dict[str, Any]:
    return completion.model_extra["perception"]


def native(server: ServerProcess, request: PerceiveRequest) -> PerceiveResponse:
    headers = {"Content-Type": "application/octet-stream"}
    body = encode_request(request, [IMAGE])
    return decode_response(httpx.post(f"{server.url}/v1/perceive", content=body, headers=headers, timeout=300).content)


def test_the_answer_and_its_confidence_are_those_of_the_native_wire(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    completion = ask(client, VQA.text, logprobs=True)
    answer = native(server, VQA)
    assert text_of(completion) == answer.vqa[0].answer
    told = perception_of(completion)
    assert (told["task"], told["kind"], told["abstained"]) == ("vqa", answer.vqa[0].kind, answer.vqa[0].abstained)
    assert told["confidence"] == pytest.approx(answer.vqa[0].confidence, abs=1e-3)
    assert told["weights_digest"] == answer.model.weights_digest
    assert completion.choices[0].finish_reason == "stop"
    assert completion.system_fingerprint == f"fp_{answer.model.weights_digest[:12]}"
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert np.exp(logprobs.content[0].logprob) == pytest.approx(told["confidence"])
    assert logprobs.content[0].token == text_of(completion)


def test_usage_counts_the_image_the_question_and_the_answer(client: openai.OpenAI) -> None:
    short, long = (ask(client, text).usage for text in ("Is it a road?", "Is it a road or is it a very long river?"))
    plain = ask(client, None).usage
    assert short is not None
    assert long is not None
    assert plain is not None
    assert short.total_tokens == short.prompt_tokens + short.completion_tokens
    assert long.prompt_tokens > short.prompt_tokens > 8  # the debug model's 2 x 2 + 4 visual tokens
    assert plain.completion_tokens > 1


def test_a_stream_is_the_same_answer_word_by_word_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = ask(client, None)
    chunks = list(ask_stream(client))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text_of(whole)
    assert len(chunks) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert perception_of(chunks[-2])["confidence"] == pytest.approx(perception_of(whole)["confidence"], abs=1e-3)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def ask_stream(client: openai.OpenAI) -> Iterator[Any]:
    yield from client.chat.completions.create(
        model="debug", messages=[user(None, URL)], stream=True, stream_options={"include_usage": True}
    )


def test_boxes_come_in_pixels_of_the_image_that_was_sent(client: openai.OpenAI, server: ServerProcess) -> None:
    objects = native(server, PerceiveRequest(task="ground", text="ship")).objects[0]
    text = text_of(ask(client, "[VG] ship"))
    expected = [box for box, score in zip(objects.boxes, objects.scores, strict=True) if score >= objects.threshold]
    found = parse_boxes(text, BoxDialect.QWEN, (64, 64)).boxes
    assert [[b.x1, b.y1, b.x2, b.y2] for b in found] == [pytest.approx(box, abs=0.06) for box in expected]


def test_masks_come_as_shares_and_a_coarse_grid(client: openai.OpenAI) -> None:
    said = json.loads(text_of(ask(client, "Segment road and sea.")))
    assert [one["label"] for one in said["classes"]] == ["road", "sea"]
    assert parse_mask(said["mask"]).values.shape == (32, 32)


def test_two_images_are_compared(client: openai.OpenAI) -> None:
    completion = ask(client, "What changed?", URL, data_url(picture(2)))
    assert perception_of(completion)["task"] == "detect_change"
    assert 0 <= json.loads(text_of(completion))["classes"][0]["share"] <= 1


def test_a_limit_on_tokens_cuts_the_answer_and_says_so(client: openai.OpenAI) -> None:
    whole, cut = ask(client, None), ask(client, None, max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert text_of(whole).startswith(text_of(cut))
    assert cut.usage is not None
    assert cut.usage.completion_tokens <= 4


def test_errors_are_those_of_openai_with_the_field_that_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="nothing is fetched") as refusal:
        ask(client, None, "https://example.org/image.png")
    assert (refusal.value.code, refusal.value.param, refusal.value.type) == (
        "bad_request", "messages", "invalid_request_error",
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="'debug' is") as unknown:
        client.chat.completions.create(model="gpt", messages=[user(None, URL)])
    assert unknown.value.code == "model_not_found"


def test_the_models_of_the_server_are_listed_and_found(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model == client.models.retrieve(model.id)
    assert (model.id, model.owned_by) == ("debug", "rs-perception")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_texts_and_pictures_have_unit_vectors_of_one_space(client: openai.OpenAI) -> None:
    inputs = ["a harbour with ships", URL, "a harbour with ships", data_url(np.zeros((64, 64, 3), np.uint8))]
    answer = client.embeddings.create(model="debug", input=inputs)
    vectors = np.array([one.embedding for one in answer.data])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert not np.array_equal(vectors[1], vectors[3])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 2


@pytest.fixture
def langchain(server: ServerProcess) -> ChatOpenAI:
    return ChatOpenAI(model="debug", base_url=f"{server.url}/v1", api_key=SecretStr("none"), max_retries=0)


async def test_langchain_asks_and_finds_the_confidence(langchain: ChatOpenAI, client: openai.OpenAI) -> None:
    message = HumanMessage(content=[dict(part) for part in content(VQA.text, URL)])
    answer = await langchain.bind(logprobs=True).ainvoke([message])
    reference = ask(client, VQA.text)
    assert answer.content == text_of(reference)
    (token,) = answer.response_metadata["logprobs"]["content"]
    assert np.exp(token["logprob"]) == pytest.approx(perception_of(reference)["confidence"], abs=1e-3)
    assert answer.usage_metadata is not None
    assert reference.usage is not None
    assert answer.usage_metadata["total_tokens"] == reference.usage.total_tokens


def test_langchain_streams(langchain: ChatOpenAI) -> None:
    message = HumanMessage(content=[dict(part) for part in content(None, URL)])
    pieces = [chunk.content for chunk in langchain.stream([message])]
    assert "".join(map(str, pieces)) == langchain.invoke([message]).content
    assert len(pieces) > 2
