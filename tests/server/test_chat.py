"""From a conversation to a task, and from an answer to text, without a server."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from chats import data_url, user
from PIL import Image
from processes import picture

from model_server.http.chat import read_chat
from model_server.http.chat_answers import say, shortened
from model_server.http.openai_wire import CallError, UnknownModel
from model_server.protocol import PerceiveRequest, PerceiveResponse, TileChange, TileMasks, TileObjects
from model_server.text.boxes import BoxDialect, parse_boxes
from model_server.text.masks import parse_mask

IMAGE = picture(1)
URL = data_url(IMAGE)


def asked(text: str | None, *urls: str, **fields: Any) -> PerceiveRequest:
    return read_chat(body([user(text, *(urls or (URL,)))], **fields), "nano").request


def body(messages: Sequence[Mapping[str, Any]], **fields: Any) -> bytes:
    return json.dumps({"model": "nano", "messages": messages, **fields}).encode()


@pytest.mark.parametrize(
    ("text", "task", "words"),
    [
        (None, "caption", ""),
        ("  ", "caption", ""),
        ("Describe this image.", "caption", ""),
        ("What do you see?", "caption", ""),
        ("Is there a road?", "vqa", "Is there a road?"),
        ("Find out how many ships there are.", "vqa", "Find out how many ships there are."),
        ("Find all ships.", "ground", "ships"),
        ("Please locate every storage tank in the image. Answer as JSON.", "ground", "storage tank"),
        ("find the largest ship", "ground", "the largest ship"),
        ("Detect ships?", "vqa", "Detect ships?"),
        ("[VG] ship", "ground", "ship"),
        ("[vqa] find what?", "vqa", "find what?"),
        ("[CAP]", "caption", ""),
        ("[CAP] Describe this image briefly.", "caption", ""),
        ("[VG] Where is the storage tank?", "ground", "storage tank"),
        ("Is it urban?\nAnswer the question using a single word or phrase.", "vqa", "Is it urban?"),
        ("[VQA] Is it urban? Answer with one word or phrase.", "vqa", "Is it urban?"),
    ],
)
def test_words_become_a_task(text: str | None, task: str, words: str) -> None:
    request = asked(text)
    assert (request.task, request.text) == (task, words)


@pytest.mark.parametrize(
    ("text", "task", "labels"),
    [
        ("Segment the road, trees and water.", "segment", ["road", "trees", "water"]),
        ("[SEG] road, sea", "segment", ["road", "sea"]),
        ("Classify the scene: forest, harbor", "classify", ["forest", "harbor"]),
        ("Classify the scene.", "classify", []),
        ("[CLS] forest, harbor", "classify", ["forest", "harbor"]),
        ("[CLS] Choose one of: forest, harbor. Answer with one word.", "classify", ["forest", "harbor"]),
        ("Classify it as one of: forest, harbor. Answer with the class alone.", "classify", ["forest", "harbor"]),
        ("[SEG] road.", "segment", ["road"]),
    ],
)
def test_lists_of_classes_become_labels(text: str, task: str, labels: list[str]) -> None:
    request = asked(text)
    assert (request.task, request.labels) == (task, labels)


def test_metadata_goes_before_words() -> None:
    metadata = {"task": "ground", "gsd_m": "0.5", "modality": "sar", "priority": "bulk", "x": "y"}
    request = asked("ship", metadata=metadata)
    assert request == PerceiveRequest(task="ground", text="ship", gsd_m=0.5, modality="sar", priority="bulk")
    request = asked("ignored", metadata={"task": "segment", "labels": "road, rail and water"})
    assert request == PerceiveRequest(task="segment", labels=["road", "rail", "water"], text="ignored")


def test_two_images_are_compared_in_their_order() -> None:
    later = picture(2)
    read = read_chat(body([user("What changed?", URL, data_url(later))]), "nano")
    assert read.request.task == "detect_change"
    np.testing.assert_array_equal(read.tiles, [IMAGE, later])


def test_a_later_question_is_about_the_image_of_an_earlier_message() -> None:
    messages = [
        {"role": "system", "content": "You are a pilot."},
        user("Describe it.", data_url(picture(9))),
        {"role": "assistant", "content": "A field."},
        user(None, URL),
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "user", "content": "Is there a road?"},
    ]
    read = read_chat(body(messages), "nano")
    assert read.request == PerceiveRequest(task="vqa", text="Is there a road?")
    np.testing.assert_array_equal(read.tiles, [IMAGE])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_pictures_of_each_format_are_read(kind: str) -> None:
    (tile,) = read_chat(body([user("", data_url(IMAGE, kind))]), "nano").tiles
    assert (tile.shape, tile.dtype) == (IMAGE.shape, np.uint8)


def saved(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def bomb() -> str:
    """A header that promises 10^10 pixels, on a few bytes."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param("https://example.org/a.png", "nothing is fetched", id="address"),
        pytest.param("file:///etc/passwd", "nothing is fetched", id="file"),
        pytest.param("data:image/png,abc", "data URLs only", id="not base64"),
        pytest.param("data:image/png;base64,@@@", "not base64", id="noise"),
        pytest.param("data:image/png;base64,AAAA", "none of PNG", id="no image"),
        pytest.param(URL[:-40], "cannot be decoded", id="truncated"),
        pytest.param(saved(Image.new("RGB", (8, 8)), "bmp"), "none of PNG", id="another format"),
        pytest.param(saved(Image.new("I;16", (8, 8)), "png"), "8 bits a channel", id="16 bits"),
        pytest.param(data_url(np.zeros((1, 2049, 3), np.uint8)), "2049x1", id="too wide"),
        pytest.param(bomb(), "100000x100000|cannot be decoded", id="bomb"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_reason(url: str, reason: str) -> None:
    with pytest.raises(CallError, match=reason) as refusal:
        asked("", url)
    assert refusal.value.param == "messages"
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("content", "param", "reason"),
    [
        pytest.param(b"", None, "JSON", id="empty"),
        pytest.param(b"\xff\xfe", None, "JSON|UTF", id="noise"),
        pytest.param(b"[]", None, "object|dictionary", id="no object"),
        pytest.param(b'{"model": "nano"}', "messages", "Field required", id="no messages"),
        pytest.param(body([]), "messages", "at least 1", id="no message"),
        pytest.param(body([{"role": "system", "content": "x"}]), "messages", "role user", id="no user"),
        pytest.param(body([{"role": "user", "content": "Is there a road?"}]), "messages", "image", id="no image"),
        pytest.param(body([{"role": "user", "content": 7}]), "messages", "text", id="no content"),
        pytest.param(body([user("", URL, URL, URL)]), "messages", "this message has 3", id="three images"),
        pytest.param(body([user("[CCD]", URL)]), "messages", "looks at 2 images", id="half a pair"),
        pytest.param(body([user("", URL, data_url(picture(1, 32)))]), "messages", "one size", id="uneven pair"),
        pytest.param(body([user("[REF] what is [1, 2, 3, 4]?", URL)]), "messages", "REF", id="region to words"),
        pytest.param(body([user("[VG]", URL)]), "messages", "phrase", id="no phrase"),
        pytest.param(body([user("why? " * 200, URL)]), "messages", "500", id="long question"),
        pytest.param(body([{"role": "user"}] * 100_002), None, "more than 100000 values", id="long conversation"),
        pytest.param(body([user("", URL)], metadata={"task": "teleport"}), "metadata", "task", id="unknown task"),
        pytest.param(body([user("", URL)], metadata={"gsd_m": "-1"}), "metadata", "gsd_m", id="bad resolution"),
        pytest.param(body([user("", URL)], tools=[{"type": "function"}]), "tools", "no tools", id="tools"),
        pytest.param(body([user("", URL)], n=2), "n", "one answer", id="several answers"),
        pytest.param(
            body([user("", URL)], response_format={"type": "json_object"}), "response_format", "form", id="another form"
        ),
    ],
)
def test_a_request_that_cannot_be_served_names_the_field(content: bytes, param: str | None, reason: str) -> None:
    with pytest.raises(CallError, match=reason) as refusal:
        read_chat(content, "nano")
    assert refusal.value.param == param


def test_a_long_text_is_refused_in_time_that_grows_as_its_length() -> None:
    """With its square it would be an hour in which the server answers nobody."""
    text = "[VQA] a" + " " * 1_000_000 + "b"
    program = "import sys; from model_server.http.chat import read_chat; read_chat(sys.stdin.buffer.read(), 'nano')"
    command, conversation = [sys.executable, "-c", program], body([user(text, URL)])
    refused = subprocess.run(command, input=conversation, capture_output=True, timeout=120, check=False)
    assert b"CallError: text: String should have at most 500 characters" in refused.stderr


def test_a_refusal_never_quotes_an_image() -> None:
    with pytest.raises(CallError) as refusal:
        read_chat(body([{"role": "user", "content": [{"type": "image_url", "image_url": URL}]}]), "nano")
    assert URL[-50:] not in str(refusal.value)


def test_another_model_is_not_answered_for() -> None:
    with pytest.raises(UnknownModel, match="'gpt' is not loaded here, 'nano' is"):
        read_chat(json.dumps({"model": "gpt", "messages": [user("", URL)]}).encode(), "nano")


def response(**answers: Any) -> PerceiveResponse:
    info = {"model": "m", "weights_digest": "0", "attention_backend": "", "precision": "", "device": ""}
    fields = {"model": info, "task_token": "[X]", "expert": "image", "elapsed_s": 1.0}
    return PerceiveResponse.model_validate(fields | answers)


def test_boxes_are_json_that_the_qwen_parser_reads_back() -> None:
    objects = TileObjects(
        boxes=[(1.24, 2, 30, 40), (5, 6, 7, 8)], scores=[0.9, 0.1], threshold=0.3, known=True, scale=1
    )
    said = say(PerceiveRequest(task="ground", text="ship"), response(objects=[objects]))
    assert json.loads(said.text) == [{"bbox_2d": [1.2, 2.0, 30.0, 40.0], "label": "ship", "score": 0.9}]
    assert said.confidence == 0.9
    (box,) = parse_boxes(said.text, BoxDialect.QWEN, (64, 64), strict=True).boxes
    assert (box.x1, box.y1, box.x2, box.y2, box.label) == (1.2, 2.0, 30.0, 40.0, "ship")


def test_no_box_is_an_empty_list_without_a_confidence() -> None:
    objects = TileObjects(boxes=[(1, 2, 3, 4)], scores=[0.1], threshold=0.3, known=True, scale=1)
    said = say(PerceiveRequest(task="ground", text="ship"), response(objects=[objects]))
    assert (said.text, said.confidence) == ("[]", None)


def test_masks_are_shares_extents_and_a_grid_that_the_mask_parser_reads_back() -> None:
    masks = TileMasks(labels=["Road, main", "sea"], thresholds=[0.2, 0.5], known=[True, True], scale=1)
    masks.probabilities = np.zeros((2, 40, 80), np.uint8)
    masks.probabilities[0, 10:20, 20:60] = 51  # just at its threshold of 0.2
    masks.probabilities[1, 35:, :] = 127  # just below one half
    request = PerceiveRequest(task="segment", labels=masks.labels)
    said = json.loads(say(request, response(masks=[masks])).text)
    assert said["classes"] == [
        {"label": "Road, main", "share": 0.125, "bbox_2d": [20, 10, 60, 20]},
        {"label": "sea", "share": 0, "bbox_2d": None},
    ]
    grid = parse_mask(said["mask"])
    assert (grid.values.shape, grid.names, grid.warnings) == ((16, 32), ("others", "road main"), ())
    np.testing.assert_array_equal(grid.mask("road main", 80, 40), masks.probabilities[0] == 51)


def test_change_is_a_mask_of_one_class() -> None:
    change = TileChange(threshold=0.5, scale=1, probabilities=np.full((8, 8), 255, np.uint8))
    said = say(PerceiveRequest(task="detect_change"), response(changes=[change]))
    assert json.loads(said.text)["classes"] == [{"label": "changed", "share": 1, "bbox_2d": [0, 0, 8, 8]}]
    assert said.confidence is None


@pytest.mark.parametrize(("limit", "text"), [(None, "a road  and a river"), (3, "a road  and"), (0, "")])
def test_a_text_is_shortened_by_whole_words(limit: int | None, text: str) -> None:
    assert shortened("a road  and a river", limit, lambda words: len(words.split())) == text
