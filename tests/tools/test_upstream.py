"""Other models behind the same tools, against a scripted endpoint that answers well, badly or not at all."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from mcp import Client
from mcp.types import TextResourceContents
from PIL import Image
from rasters import BUNDLED
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mcp_server import build_server
from model_server.app import bind
from model_server.protocol import PerceiveRequest, PerceiveResponse
from rs_tools.errors import InputError, NotServed, ServerBusy, ServerError, ServerUnavailable
from rs_tools.imagery.access import AccessPolicy
from rs_tools.mcp.resources import MODEL_CARD
from rs_tools.upstream.choosing import KEY_VARIABLE, PROFILE_NAMES, chosen
from rs_tools.upstream.client import UpstreamClient
from rs_tools.upstream.profiles import PROFILES
from rs_tools.upstream.reading import UNCALIBRATED, UNKNOWN

TILE = np.full((40, 60, 3), 90, np.uint8)
CAPTION = PerceiveRequest(task="caption")
VQA = PerceiveRequest(task="vqa", text="Is there a road?")
SHIPS = PerceiveRequest(task="ground", text="ship")
CLASSES = PerceiveRequest(task="classify", labels=["bare soil", "soil", "sea"])
KEY = "sk-hush"


class Endpoint:
    """Answers with what the test put into `texts`, the last of them again and again, or with `response`."""

    def __init__(self) -> None:
        self.url = ""
        self.texts: list[str] = ["a field"]
        self.message: dict[str, Any] = {}
        self.finish = "stop"
        self.response: Response | None = None
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def complete(self, request: Request) -> Response:
        self.asked.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        await self.hold.wait()
        if self.response is not None:
            return self.response
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        message = {"role": "assistant", "content": text, **self.message}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return JSONResponse({"id": "x", "object": "chat.completion", "model": "sees", "choices": [choice]})

    async def models(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [{"id": "another"}, {"id": "eye"}]})

    def prompt(self, index: int = 0) -> str:
        return self.asked[index]["messages"][0]["content"][-1]["text"]

    def picture(self, index: int = 0) -> Image.Image:
        url = self.asked[index]["messages"][0]["content"][0]["image_url"]["url"]
        return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    endpoint = Endpoint()
    routes = [Route("/v1/chat/completions", endpoint.complete, methods=["POST"]), Route("/v1/models", endpoint.models)]
    app = Starlette(routes=routes)
    sock = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    endpoint.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    yield endpoint
    endpoint.hold.set()
    server.should_exit = True
    await serving


async def ask(
    endpoint: Endpoint, request: PerceiveRequest, *tiles: np.ndarray, profile: str = "generic", **options: Any
) -> PerceiveResponse:
    async with asyncio.timeout(60), UpstreamClient(endpoint.url, "eye", PROFILES[profile], KEY, **options) as client:
        return await client.perceive(request, list(tiles or [TILE]))


async def test_a_caption_names_its_model_and_says_that_nothing_is_calibrated(endpoint: Endpoint) -> None:
    endpoint.texts = [" A field\nof wheat. "]
    response = await ask(endpoint, CAPTION)
    assert (response.captions[0].caption, response.captions[0].confidence) == ("A field of wheat.", UNKNOWN)
    assert response.warnings == [UNCALIBRATED]
    assert response.model.model == "sees"
    assert endpoint.keys == [f"Bearer {KEY}"]
    assert endpoint.asked[0]["model"] == "eye"


async def test_every_tile_is_asked_about_and_answers_keep_their_order(endpoint: Endpoint) -> None:
    tiles = [np.full((8, 8 + i, 3), i, np.uint8) for i in range(20)]

    class ByWidth(Endpoint):
        async def complete(self, request: Request) -> Response:
            content = (await request.json())["messages"][0]["content"]
            picture = Image.open(io.BytesIO(base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])))
            message = {"content": str(picture.width)}
            return JSONResponse({"choices": [{"message": message}]})

    other = ByWidth()
    app = httpx.ASGITransport(Starlette(routes=[Route("/v1/chat/completions", other.complete, methods=["POST"])]))
    client = UpstreamClient("http://test/v1/", "eye", PROFILES["generic"])
    client._http = httpx.AsyncClient(transport=app)
    async with client:
        response = await client.perceive(CAPTION, tiles)
    assert [one.caption for one in response.captions] == [str(8 + i) for i in range(20)]


@pytest.mark.parametrize(
    ("said", "answer", "kind"),
    [
        ("Yes, there is one.", "yes", "yes_no"),
        ("No", "no", "yes_no"),
        ("Nothing", "Nothing", "category"),
        ("two", "2", "count"),
        ("17.", "17", "count"),
        ("In the upper left corner of it", "In the upper left corner of it", "text"),
    ],
)
async def test_answers_take_the_form_of_our_own(endpoint: Endpoint, said: str, answer: str, kind: str) -> None:
    endpoint.texts = [said]
    (found,) = (await ask(endpoint, VQA)).vqa
    assert (found.answer, found.kind, found.abstained) == (answer, kind, False)


@pytest.mark.parametrize(("said", "label"), [("Sea.", "sea"), ("It is bare soil", "bare soil"), ("soil", "soil")])
async def test_a_class_is_recognised_in_words(endpoint: Endpoint, said: str, label: str) -> None:
    endpoint.texts = [said]
    response = await ask(endpoint, CLASSES)
    assert response.classes[0].scores == [float(one == label) for one in CLASSES.labels]
    assert any("no probabilities" in warning for warning in response.warnings)


@pytest.mark.parametrize("said", ["sea or soil", "forest", ""])
async def test_words_that_name_no_single_class_are_an_error(endpoint: Endpoint, said: str) -> None:
    endpoint.texts = [said]
    with pytest.raises(ServerError, match="cannot be read"):
        await ask(endpoint, CLASSES)


async def test_a_classification_needs_labels(endpoint: Endpoint) -> None:
    with pytest.raises(InputError, match="two labels"):
        await ask(endpoint, PerceiveRequest(task="classify"))
    assert endpoint.asked == []


@pytest.mark.parametrize(
    ("profile", "said", "box"),
    [
        ("generic", '```json\n[{"bbox_2d": [6, 4, 30, 20], "label": "ship"}]\n```', (6, 4, 30, 20)),
        ("qwen-vl", '[{"bbox_2d": [28, 7, 56, 14], "label": "ship"}]', (30, 10, 60, 20)),  # of 56 x 28
        ("geochat", "<p>ship</p>{<10><10><50><50>|<30>}", (6, 4, 30, 20)),
        ("rsunivlm", "[10, 10, 50, 50]", (6, 4, 30, 20)),
        ("rsunivlm", '[{"bbox_2d": [6, 4, 30, 20], "label": "ship", "score": 0.9}]', (6, 4, 30, 20)),
    ],
)
async def test_boxes_of_each_dialect_come_in_pixels_of_the_tile(
    endpoint: Endpoint, profile: str, said: str, box: tuple[float, ...]
) -> None:
    endpoint.texts = [said]
    response = await ask(endpoint, SHIPS, profile=profile)
    (found,) = response.objects
    assert [pytest.approx(one) for one in found.boxes] == [box]
    assert found.scores == [UNKNOWN]
    assert UNCALIBRATED in response.warnings
    assert PROFILES[profile].limits in response.warnings
    assert "ship" in endpoint.prompt()


async def test_a_picture_for_qwen_has_sides_that_it_does_not_change(endpoint: Endpoint) -> None:
    endpoint.texts = ["None"]
    assert (await ask(endpoint, SHIPS, profile="qwen-vl")).objects[0].boxes == []
    assert endpoint.picture().size == (56, 28)


@pytest.mark.parametrize("said", ["[]", "None", "There is no ship in the image.", "```json\n[]\n```"])
async def test_that_there_is_nothing_is_an_answer(endpoint: Endpoint, said: str) -> None:
    endpoint.texts = [said]
    assert (await ask(endpoint, SHIPS)).objects[0].boxes == []


@pytest.mark.parametrize(
    "said", ["", "I see a harbour.", '[{"bbox_2d": [1, 2], "label": "ship"}]', "{" * 5000, "[[[[", "\x00" * 50]
)
async def test_malformed_boxes_are_a_typed_error(endpoint: Endpoint, said: str) -> None:
    endpoint.texts = [said]
    with pytest.raises(ServerError, match="cannot be read") as error:
        await ask(endpoint, SHIPS)
    assert len(str(error.value)) < 600


async def test_malformed_boxes_of_one_tile_among_many_are_told_in_a_warning(endpoint: Endpoint) -> None:
    endpoint.texts = ["I see a harbour.", '[{"bbox_2d": [6, 4, 30, 20], "label": "ship"}]']
    response = await ask(endpoint, SHIPS, TILE, TILE, TILE)
    assert sorted(len(one.boxes) for one in response.objects) == [0, 1, 1]
    assert any(warning.startswith("The answers for 1 of 3 tiles") for warning in response.warnings)


async def test_an_answer_that_was_cut_is_repaired_and_told(endpoint: Endpoint) -> None:
    endpoint.texts, endpoint.finish = ['[{"bbox_2d": [6, 4, 30, 20], "label": "ship"}, {"bbox_2d": [1, 2,'], "length"
    response = await ask(endpoint, SHIPS)
    assert response.objects[0].boxes == [(6, 4, 30, 20)]
    assert any("cut off" in warning for warning in response.warnings)


async def test_masks_as_text_are_laid_on_the_tile_one_class_at_a_time(endpoint: Endpoint) -> None:
    endpoint.texts = ["others*1, road*1\nothers*2", "others*2\nsea*2"]
    request = PerceiveRequest(task="segment", labels=["road", "sea"])
    response = await ask(endpoint, request, profile="rsunivlm")
    masks = response.masks[0].probabilities
    assert masks.shape == (2, 40, 60)
    assert (masks[0, :20, 30:] == 255).all()
    assert (masks[1, 20:] == 255).all()
    assert masks.sum() == 255 * (20 * 30 + 20 * 60)
    assert [endpoint.prompt(0), endpoint.prompt(1)] == ["[SEG] road.", "[SEG] sea."]
    assert any("grid of 2 x 2 cells" in warning for warning in response.warnings)


async def test_change_is_a_mask_of_a_pair(endpoint: Endpoint) -> None:
    endpoint.texts = ["others*1, changed*1"]
    response = await ask(endpoint, PerceiveRequest(task="detect_change"), TILE, TILE, profile="rsunivlm")
    assert (response.changes[0].probabilities[:, 30:] == 255).all()
    assert len(endpoint.asked) == 1
    assert len(endpoint.asked[0]["messages"][0]["content"]) == 3


@pytest.mark.parametrize("profile", ["generic", "qwen-vl", "geochat"])
async def test_a_family_without_masks_does_not_serve_them(endpoint: Endpoint, profile: str) -> None:
    for request in (PerceiveRequest(task="segment", labels=["sea"]), PerceiveRequest(task="detect_change")):
        with pytest.raises(NotServed, match="draws no masks"):
            await ask(endpoint, request, TILE, TILE, profile=profile)
    assert endpoint.asked == []


def failed(status: int, **headers: str) -> Response:
    return JSONResponse({"error": {"message": "not today"}}, status, headers)


@pytest.mark.parametrize(
    ("response", "error", "words"),
    [
        (failed(429, **{"Retry-After": "7"}), ServerBusy, "7 s"),
        (failed(503), ServerBusy, "5 s"),
        (failed(500), ServerError, "500: not today"),
        (failed(401), ServerError, KEY_VARIABLE),
        (failed(404), ServerError, "--model"),
        (Response("<html>proxy</html>", 502), ServerError, "proxy"),
        (Response("<html>login</html>", 200), ServerError, "chat completions"),
        (JSONResponse({"choices": []}), ServerError, "no answer"),
        (JSONResponse([1]), ServerError, "chat completions"),
        (JSONResponse({"choices": [{"message": {}}], "perception": {"confidence": 7}}), ServerError, "completions"),
        (Response("none", headers={"Content-Encoding": "gzip"}), ServerUnavailable, "DecodingError"),
    ],
)
async def test_failures_of_the_endpoint_are_typed(
    endpoint: Endpoint, response: Response, error: type[Exception], words: str
) -> None:
    endpoint.response = response
    with pytest.raises(error, match=words) as failure:
        await ask(endpoint, CAPTION)
    assert KEY not in str(failure.value)
    if isinstance(failure.value, ServerBusy):
        assert failure.value.retry_after_s in (5, 7)


async def test_a_refusal_is_an_error_in_the_models_words(endpoint: Endpoint) -> None:
    endpoint.message = {"content": None, "refusal": "I will not look at that."}
    with pytest.raises(ServerError, match=r"refused to answer: I will not look"):
        await ask(endpoint, CAPTION)
    endpoint.message, endpoint.finish = {"content": None}, "content_filter"
    with pytest.raises(ServerError, match="content filter"):
        await ask(endpoint, CAPTION)


async def test_an_endpoint_that_does_not_answer_in_time_is_unavailable(endpoint: Endpoint) -> None:
    endpoint.hold.clear()
    with pytest.raises(ServerUnavailable, match=r"no answer within 0.3 s"):
        await ask(endpoint, CAPTION, timeout=httpx.Timeout(10, read=0.3))


async def test_an_endpoint_where_nobody_listens_is_named() -> None:
    endpoint = Endpoint()
    endpoint.url = "http://127.0.0.1:9"
    with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:9/v1 does not answer.*--model-url"):
        await ask(endpoint, CAPTION)


async def test_what_our_own_server_knows_of_its_answer_is_taken_over(endpoint: Endpoint) -> None:
    said = {"confidence": 0.8, "abstained": True, "alternatives": [{"answer": "no", "confidence": 0.2}]}
    message = {"message": {"content": "yes"}, "finish_reason": "stop"}
    endpoint.response = JSONResponse({"choices": [message], "perception": said})
    response = await ask(endpoint, VQA)
    assert response.vqa[0].model_dump() == {"answer": "yes", "kind": "yes_no", **said}
    assert response.warnings == []
    row = {"bbox_2d": [6, 4, 30, 20], "label": "ship", "score": 0.7}
    endpoint.response = JSONResponse(
        {"choices": [{"message": {"content": json.dumps([row])}}], "perception": {"confidence": 0.7, "known": False}}
    )
    (objects,) = (await ask(endpoint, SHIPS)).objects
    assert (objects.scores, objects.known) == ([0.7], False)


def test_the_names_of_profiles_are_those_that_there_are() -> None:
    assert set(PROFILE_NAMES) == set(PROFILES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((None, "eye", None), "--model-url"),
        (("http://x", None, "generic"), "--model,"),
        (("http://x", "eye", "gpt"), "qwen-vl"),
        (("http://x", "eye", None, "file"), KEY_VARIABLE),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        chosen(*options)


async def test_the_key_comes_from_the_environment(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "from-environment")
    upstream = chosen(endpoint.url, "eye", None)
    assert upstream is not None
    assert "from-environment" not in repr(upstream)
    async with upstream.open() as client:
        await client.perceive(CAPTION, [TILE])
    assert endpoint.keys == ["Bearer from-environment"]


def test_a_key_that_no_header_can_carry_is_refused_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-hush\nsk-other")
    with pytest.raises(InputError, match=f"{KEY_VARIABLE}: .* one line of ASCII") as refusal:
        chosen("http://127.0.0.1:1", "eye", None)
    assert "hush" not in str(refusal.value)


async def test_no_proxy_stands_between_this_machine_and_itself(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert (await ask(endpoint, CAPTION)).captions


async def test_the_card_of_an_endpoint_is_that_of_the_model_that_was_chosen(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several, asked with the key."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server = build_server(AccessPolicy([BUNDLED]), upstream=chosen(f"{endpoint.url}/v1", "eye", None))
    async with Client(server) as client:
        [card] = (await client.read_resource(MODEL_CARD)).contents
    assert isinstance(card, TextResourceContents)
    assert card.text.startswith("# eye")
    assert endpoint.keys == [f"Bearer {KEY}"]
