"""How MF-RSVLM, FUSAR-GPT and plain models are asked, and how their words become answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from model_server.batching.engine_errors import QueryFailed
from model_server.families.asking import Ask, Dialect, Said
from model_server.families.fusar import FusarDialect
from model_server.families.mfrsvlm import SYSTEM, MFRSVLMDialect, prompt
from model_server.families.perceiver import PublishedPerceiver
from model_server.families.plain import PlainDialect, square_boxes
from model_server.protocol import (
    ModelInfo,
    PerceiveRequest,
    Task,
    TaskNotServed,
    TileCaption,
    TileClasses,
    TileObjects,
    TileVqa,
)
from model_server.query import Query
from model_server.text.malformed import MalformedText

IMAGE = np.zeros((40, 80, 3), np.uint8)
# A question of the authors' own examples, word for word.
DETECT = (
    "This is a SAR image. Please carefully check the image and detect the following object: plane. Output each "
    "detected target’s bbox coordinates in JSON format. The format of the bbox coordinates is:  '''json [ {  "
    '"bbox_2d": [x1, y1, x2, y2], "label": "category name" }, {  "bbox_2d": [x1, y1, x2, y2], "label": "category '
    "name\" } ]  '''  If "
    "there are no such targets in the image, simply respond with None."
)


def message(dialect: Dialect, query: Query) -> str:
    (ask,) = dialect.ask(query)
    return ask.message


def boxes(dialect: Dialect, text: str) -> list[tuple[float, ...]]:
    answer = dialect.read(Query("ground", IMAGE, text="ship"), [Said(text, -1.0, 4)])
    assert isinstance(answer, TileObjects)
    return [tuple(box) for box in answer.boxes]


def test_mf_rsvlm_is_asked_as_in_its_fine_tuning_data() -> None:
    dialect = MFRSVLMDialect(336)
    assert message(dialect, Query("caption", IMAGE)) == "{IT} Describe the remote sensing image in detail."
    assert message(dialect, Query("vqa", IMAGE, text="Is it rural?")) == "{VQA} Is it rural? Answer briefly."
    assert message(dialect, Query("ground", IMAGE, text="the ship")) == (
        "{VG} the ship Answer with bounding box coordinates in the format [x_min, y_min, x_max, y_max] scaled to "
        "0-1000."
    )
    assert prompt("{VQA} x") == f"{SYSTEM} USER: <image>\n{{VQA}} x ASSISTANT:"
    assert prompt("x", marked=True) == f"{SYSTEM} USER: <im_start><image><im_end>\nx ASSISTANT:"


def test_mf_rsvlms_boxes_are_thousandths() -> None:
    assert boxes(MFRSVLMDialect(336), "[[100,200,300,1000]]") == [(8, 8, 24, 40)]


def test_fusar_is_asked_for_boxes_in_the_words_of_its_examples() -> None:
    assert message(FusarDialect(504), Query("ground", IMAGE, text="plane")) == DETECT


def test_fusars_boxes_are_pixels_of_its_square_and_none_is_no_box() -> None:
    dialect = FusarDialect(504)
    assert boxes(dialect, '[{"bbox_2d": [0, 252, 504, 600], "label": "ship"}]') == [(0, 20, 80, 40)]
    assert boxes(dialect, "None") == []
    with pytest.raises(MalformedText):
        boxes(dialect, "Some ships.")


def test_fusar_says_that_it_got_no_anchors_and_when_the_imagery_is_not_radar() -> None:
    said = [len(FusarDialect(504).cautions(PerceiveRequest(task="caption", modality=m))) for m in ("sar", "optical")]
    assert said == [1, 2]


@pytest.mark.parametrize(
    ("cropped", "box"), [(False, (0.0, 0.0, 80.0, 20.0)), (True, (20.0, 0.0, 60.0, 20.0))]
)  # of a square padded about the picture, or cut out of its middle
def test_llavas_boxes_are_shares_of_the_square_it_saw(cropped: bool, box: tuple[float, ...]) -> None:
    dialect = PlainDialect("llava", "{}", partial(square_boxes, cropped=cropped), lambda width, height: 1.0)
    assert boxes(dialect, "[0.0, 0.0, 1.0, 0.5]") == [box]


def test_short_answers_are_told_apart_by_kind_and_carry_the_words_probability() -> None:
    for text, kind, confidence in (("Yes.", "yes_no", 0.5), ("12", "count", 0.5), ("a b c d e f", "text", 0.5**0.25)):
        answer = MFRSVLMDialect(336).read(Query("vqa", IMAGE, text="?"), [Said(text, np.log(0.5), 4)])
        assert isinstance(answer, TileVqa)
        assert (answer.kind, answer.abstained) == (kind, False)
        assert answer.confidence == pytest.approx(confidence)
    with pytest.raises(MalformedText, match="said nothing"):
        MFRSVLMDialect(336).read(Query("vqa", IMAGE, text="?"), [Said("")])


class Parrot:
    """A speaker that says what it was given, or weighs options evenly."""

    precision = "none"

    def __init__(self, text: str) -> None:
        self.text = text

    def say(self, asks: Sequence[Ask]) -> list[Said]:
        return [Said(self.text, weights=tuple(1 / len(ask.options) for _ in ask.options)) for ask in asks]

    def quantise(self) -> None:
        """It has no weights."""


def perceiver(text: str = "a town") -> PublishedPerceiver:
    info = ModelInfo(model="m", weights_digest="d", attention_backend="b", precision="p", device="cpu")
    return PublishedPerceiver(MFRSVLMDialect(336), Parrot(text), info, ("forest", "harbor", "farm"))


def test_a_classification_that_names_no_labels_gets_the_taxonomy() -> None:
    found = perceiver().answer([Query("classify", IMAGE), Query("classify", IMAGE, labels=("a", "b"))])
    assert [answer.labels for answer in found if isinstance(answer, TileClasses)] == [
        ["forest", "harbor", "farm"], ["a", "b"]
    ]  # fmt: skip


def test_words_that_cannot_be_read_fail_their_query_and_no_other() -> None:
    asked = [Query("ground", IMAGE, text="ship"), Query("caption", IMAGE)]
    boxes, words = perceiver("[1, 2, 3]").answer(asked)
    assert isinstance(boxes, QueryFailed)
    assert "cannot be read" in str(boxes)
    assert isinstance(words, TileCaption)


@pytest.mark.parametrize("task", ["segment", "detect_change"])
def test_what_a_family_cannot_do_is_refused_by_name_with_what_it_can(task: Task) -> None:
    with pytest.raises(TaskNotServed, match=f"no part for {task}, it serves caption, vqa, classify, ground"):
        perceiver().answer([Query(task, IMAGE, labels=("water",), after=IMAGE)])


def test_every_answer_comes_with_the_warning_that_nothing_is_calibrated() -> None:
    assert "not calibrated" in perceiver().warnings(PerceiveRequest(task="caption"))[0]
