"""Box texts: what the published code reads, what is repaired, what is refused, and that nothing else can happen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_server.text.boxes import Box, BoxDialect, parse_boxes, write_boxes
from model_server.text.malformed import MalformedText

SIZE = (640, 480)


def corners(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


def test_percent_boxes_are_read_as_the_published_code_reads_them(oracles: Path) -> None:
    cases = json.loads((oracles / "rsunivlm/text/text_cases.json").read_text())
    cases = [case for case in cases if case["function"].startswith("draw_box")]
    assert len(cases) == 36
    for case in cases:
        text, size = case["input"]["text"], (case["input"]["width"], case["input"]["height"])
        drawn = [(*box["p1"], *box["p2"]) for box in case["output"]["drawn"]]
        try:
            read = parse_boxes(text, BoxDialect.PERCENT, size, strict=True).boxes
        except MalformedText:
            assert not case["output"]["returned_image"], text
            continue
        # The published painter has six colours and gives up at a seventh box; reading goes on.
        assert case["output"]["returned_image"] or len(read) > 6, text
        assert [tuple(map(int, corners(box))) for box in read[:6]] == drawn, text


def test_json_detections_are_read_as_the_published_code_reads_them(oracles: Path) -> None:
    cases = json.loads((oracles / "fusar/a/data_cases.json").read_text())["parse_detections"]
    assert len(cases) == 19
    for case in cases:
        wanted = case["result"].get("ok")
        if wanted is None:
            with pytest.raises(MalformedText):
                parse_boxes(case["text"], BoxDialect.QWEN, (504, 504), strict=True)
            continue
        read = parse_boxes(case["text"], BoxDialect.QWEN, (504, 504), strict=True).boxes
        assert [(list(corners(box)), box.label) for box in read] == [(w["bbox_2d"], w["label"]) for w in wanted]


@pytest.mark.parametrize(
    ("dialect", "text", "boxes"),
    [
        (BoxDialect.PERCENT, "[1 2 3 4]", [(1, 2, 3, 4)]),
        (BoxDialect.PERCENT, "[40, 50, 10, 20]", [(10, 20, 40, 50)]),
        (BoxDialect.PERCENT, "[-1, 2, 300, 400]", [(0, 2, 100, 100)]),
        (BoxDialect.PERCENT, "a ship at [1, 2, 3, 4] and [5, 6", [(1, 2, 3, 4)]),
        (BoxDialect.PERCENT, "[1, 2, 3, 4", [(1, 2, 3, 4)]),
        (BoxDialect.PERCENT, "(10, 20, 30, 40)", [(10, 20, 30, 40)]),
        (BoxDialect.GEOCHAT, "<p>ship</p> {<1><2><3><4>|<30", [(1, 2, 3, 4)]),
        (BoxDialect.GEOCHAT, "{<1><2><3><4><5>}", [(1, 2, 3, 4)]),
        (BoxDialect.FALCON, "<box><100><200><300><400>", [(10.05, 20.05, 30.05, 40.05)]),
        (BoxDialect.QWEN, '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "ship"}, {"bbox_2d": [5, 6', [(1, 2, 3, 4)]),
        (BoxDialect.QWEN, "There: {'bbox_2d': [-1, 2, 3, 4], 'label': 'ship'}.", [(0, 2, 3, 4)]),
        (BoxDialect.QWEN, '[{"bbox_2d": ["1", "2", "3", "4"]}, {"bbox_2d": [1, 2]}]', [(1, 2, 3, 4)]),
    ],
)
def test_what_can_be_repaired_is_repaired_with_a_warning(
    dialect: BoxDialect, text: str, boxes: list[tuple[float, ...]]
) -> None:
    read = parse_boxes(text, dialect, (100, 100))
    assert [corners(box) for box in read.boxes] == [pytest.approx(box) for box in boxes]
    assert read.warnings


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (BoxDialect.PERCENT, "[1, 2, 3]"),
        (BoxDialect.PERCENT, "[1..2, 3, 4, 5]"),
        (BoxDialect.GEOCHAT, "<p>ship</p>{<1><2>}"),
        (BoxDialect.FALCON, "<quad><1><2><3><4></quad>"),
        (BoxDialect.QWEN, "There is a ship."),
        (BoxDialect.QWEN, '[{"bbox_2d": [1, 2, NaN, 4], "label": "x"}]'),
        (BoxDialect.QWEN, "[" * 100_000),
    ],
)
def test_what_cannot_be_repaired_is_one_typed_error_that_quotes_the_text(dialect: BoxDialect, text: str) -> None:
    with pytest.raises(MalformedText, match="The text was") as refused:
        parse_boxes(text, dialect, (100, 100))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (BoxDialect.PERCENT, "no ship [VG]"),
        (BoxDialect.GEOCHAT, "none"),
        (BoxDialect.FALCON, ""),
        (BoxDialect.QWEN, "None"),
    ],
)
def test_a_text_without_boxes_has_none(dialect: BoxDialect, text: str) -> None:
    assert parse_boxes(text, dialect, SIZE).boxes == ()


def test_shares_and_thousandths_of_the_image_are_read_as_mf_rsvlm_and_llava_write_them() -> None:
    assert corners(parse_boxes("[[100,200,300,1000]]", BoxDialect.PERMILLE, (50, 10)).boxes[0]) == (5, 2, 15, 10)
    assert corners(parse_boxes("[0.1, 0.2, 0.3, 1.0]", BoxDialect.UNIT, (50, 10)).boxes[0]) == (5, 2, 15, 10)


def test_geochat_boxes_carry_label_and_angle() -> None:
    read = parse_boxes("<p>ship</p>{<10><20><30><40>|<45>}<delim>{<1><2><3><4>|<-9>}", BoxDialect.GEOCHAT, (100, 100))
    assert [(box.label, box.angle) for box in read.boxes] == [("ship", 45), ("ship", -9)]
    assert not read.warnings


def test_falcon_reads_rings_by_the_middle_of_bins_and_the_last_edge_as_the_image_border() -> None:
    text = "harbor<quad><703><420><703><292><571><292><571><420></quad>, road <poly><1000><0><488><0><465><221></poly>"
    quad, poly = parse_boxes(text, BoxDialect.FALCON, (1000, 1000)).boxes
    assert (quad.label, poly.label) == ("harbor", "road")
    assert corners(quad) == (571.5, 292.5, 703.5, 420.5)
    assert poly.ring == ((1000, 0.5), (488.5, 0.5), (465.5, 221.5))


def test_qwen_boxes_come_back_from_the_size_the_model_saw() -> None:
    read = parse_boxes('[{"bbox_2d": [0, 252, 504, 504], "label": "ship"}]', BoxDialect.QWEN, (1008, 252), (504, 504))
    assert corners(read.boxes[0]) == (0, 126, 1008, 252)


sides = st.integers(1, 5000)
names = st.text("abcdefghij ", min_size=1, max_size=12).map(lambda s: " ".join(s.split())).filter(bool)


@st.composite
def boxes_and_size(draw: st.DrawFn) -> tuple[list[Box], tuple[int, int]]:
    width, height = draw(sides), draw(sides)
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        x1, x2 = sorted(draw(st.lists(st.floats(0, width), min_size=2, max_size=2)))
        y1, y2 = sorted(draw(st.lists(st.floats(0, height), min_size=2, max_size=2)))
        boxes.append(Box(x1, y1, x2, y2, draw(names)))
    return boxes, (width, height)


@settings(max_examples=60, deadline=None)
@given(boxes_and_size(), st.sampled_from(BoxDialect))
def test_boxes_come_back_from_their_text_to_the_resolution_of_the_dialect(
    case: tuple[list[Box], tuple[int, int]], dialect: BoxDialect
) -> None:
    boxes, size = case
    seen = (504, 504)
    text = write_boxes(boxes, dialect, size, seen)
    read = parse_boxes(text, dialect, size, seen)
    assert not read.warnings
    step = {
        BoxDialect.PERCENT: 100, BoxDialect.PERMILLE: 1000, BoxDialect.UNIT: 1000, BoxDialect.GEOCHAT: 100,
        BoxDialect.FALCON: 1000, BoxDialect.QWEN: 504,
    }[dialect]  # fmt: skip
    unlabelled = (BoxDialect.PERCENT, BoxDialect.PERMILLE, BoxDialect.UNIT)
    for before, after in zip(boxes, read.boxes, strict=True):
        assert after.label == ("" if dialect in unlabelled else before.label)
        for a, b, side in zip(corners(before), corners(after), size * 2, strict=True):
            assert abs(a - b) <= 0.5001 * side / step
    assert write_boxes(read.boxes, dialect, size, seen) == text


fragments = st.sampled_from(
    ["[", "]", "(", "{", "}", "<p>", "</p>", "<delim>", "<box>", "</box>", "<poly>", "<", ">", "|", ",", " ", "1", "-",
     ".", "99", "1e999", "9" * 5000, "null", "NaN", '"bbox_2d"', ":", '"label"', '"x"', "```json\n", "\n", "é", "<12>"]
)  # fmt: skip
texts = st.one_of(st.text(), st.lists(fragments, max_size=40).map("".join))


@settings(max_examples=150, deadline=None)
@given(texts, st.sampled_from(BoxDialect), sides, sides, st.booleans())
def test_arbitrary_text_gives_boxes_or_the_typed_error(
    text: str, dialect: BoxDialect, width: int, height: int, strict: bool
) -> None:
    try:
        read = parse_boxes(text, dialect, (width, height), (504, 504), strict)
    except MalformedText:
        return
    if not strict:
        for box in read.boxes:
            assert 0 <= box.x1 <= box.x2 <= width
            assert 0 <= box.y1 <= box.y2 <= height


HOSTILE = ("[", "[1", "(", "{", "{<1", "<p>", "<p></p>", "<", "<box>", "<box><1>", "<1>", "1", "1,", " ", "</", "```")


@pytest.mark.parametrize("dialect", BoxDialect)
@pytest.mark.parametrize("strict", [False, True])
def test_long_hostile_text_is_read_in_linear_time(dialect: BoxDialect, strict: bool) -> None:
    """Nothing is timed: quadratic reading of these 150,000 characters would take a minute each."""
    for piece in HOSTILE:
        for lead in ("", "[", "<box>", '{"bbox_2d": ['):
            text = lead + piece * (150_000 // len(piece))
            try:
                assert parse_boxes(text, dialect, SIZE, strict=strict).boxes is not None
            except MalformedText:
                continue
