"""Mask texts: what the published code reads, what is repaired, what is refused, and that nothing else can happen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from model_server.text.malformed import MalformedText
from model_server.text.masks import MAX_SIDE, LabelGrid, MaskDialect, parse_mask, write_mask


def test_masks_are_read_as_the_published_code_reads_them(oracles: Path) -> None:
    cases = json.loads((oracles / "rsunivlm/text/text_cases.json").read_text())
    cases = [case for case in cases if case["function"].startswith("parse_output_string")]
    assert len(cases) == 40
    for case in cases:
        text, (width, height) = case["input"]["text"], case["input"]["imgsize"]
        if case["output"] is None:
            with pytest.raises(MalformedText):
                parse_mask(text, MaskDialect.RSUNIVLM, strict=True)
            continue
        white = ~parse_mask(text, MaskDialect.RSUNIVLM, strict=True).mask("others", width, height)
        assert (white * 255).tolist() == case["output"]["channel0"], text


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("others*3, building*2\nothers*4\nothers*5", ["ooobb", "ooooo", "ooooo"]),
        ("others*2\nothers*7\nbuilding*2", ["oo", "oo", "bb"]),
        ("Others*1,building*1,", ["ob"]),
        ("mask: others*1, building*1", ["ob"]),
        ("others*1, ???, building*1", ["ob"]),
        ("others*1, building*999999999", ["o" + "b" * (MAX_SIDE - 1)]),
        ("<seg>others *1| building *1\n others *2", ["ob", "oo"]),
        ("Sure! <seg>others *1| building *1\n others *2</seg> Done.", ["ob", "oo"]),
    ],
)
def test_what_can_be_repaired_is_repaired(text: str, rows: list[str]) -> None:
    grid = parse_mask(text)
    shown = {"others": "o", "building": "b"}
    assert ["".join(shown[grid.names[value]] for value in row) for row in grid.values] == rows


@pytest.mark.parametrize(
    "text", ["others*3, building*2\nothers*4", "mask: others*2", "others*2, what", "<seg>others *2", "others*3*2"]
)
def test_a_repair_is_reported(text: str) -> None:
    assert parse_mask(text).warnings


def test_a_sound_mask_has_no_warnings() -> None:
    assert parse_mask("others*3, building*2\nothers*5").warnings == ()
    assert parse_mask("<seg>others *3| building *2\n others *5</seg>").warnings == ()


@pytest.mark.parametrize("text", ["", "\n", "others", "others*", "*5", "others*x", "a town", "<seg></seg>"])
def test_what_cannot_be_repaired_is_one_typed_error(text: str) -> None:
    with pytest.raises(MalformedText, match="The text was"):
        parse_mask(text)


def test_an_expected_shape_fills_cuts_and_unfolds() -> None:
    assert parse_mask("a*2\na*1, b*1", shape=(3, 3)).values.tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert parse_mask("a*4\nb*4\na*4", shape=(2, 2)).values.tolist() == [[0, 0], [1, 1]]
    unfolded = parse_mask("a*3, b*3", shape=(2, 3))
    assert unfolded.values.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert unfolded.warnings


def test_text4seg_read_strictly_counts_cells_and_fills_with_the_last_label() -> None:
    grid = parse_mask("<seg>others *3| ship *2</seg>", MaskDialect.TEXT4SEG, (2, 4), strict=True)
    assert grid.values.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    cut = parse_mask("others *3| ship *20", MaskDialect.TEXT4SEG, (1, 4), strict=True)
    assert cut.values.tolist() == [[0, 0, 0, 1]]


def test_cells_are_enlarged_by_the_nearest_from_the_top_left() -> None:
    grid = parse_mask("others*2, a*1\nothers*3\na*3")
    assert grid.resize(7, 5).tolist()[0] == [0, 0, 0, 0, 0, 1, 1]
    assert grid.mask("a", 7, 5).sum() == 2 * 2 + 7
    assert not grid.mask("nowhere", 7, 5).any()


@pytest.mark.parametrize("name", ["", "a*b", "a|b", "a,b", "line\nbreak"])
def test_a_label_that_separates_runs_cannot_be_written(name: str) -> None:
    for dialect in MaskDialect:
        with pytest.raises(ValueError, match="cannot write the label"):
            write_mask(LabelGrid((name,), np.zeros((1, 1), np.int16)), dialect)


words = st.lists(st.text("abcxyz", min_size=1, max_size=6), min_size=1, max_size=3).map(" ".join)
grids = st.tuples(
    npst.arrays(np.int16, npst.array_shapes(min_dims=2, max_dims=2, max_side=30), elements=st.integers(0, 3)),
    st.lists(words, min_size=4, max_size=4, unique=True),
)


@settings(max_examples=80, deadline=None)
@given(grids, st.sampled_from(MaskDialect), st.booleans())
def test_masks_come_back_from_their_text_exactly(
    case: tuple[np.ndarray, list[str]], dialect: MaskDialect, strict: bool
) -> None:
    values, names = case
    text = write_mask(LabelGrid(tuple(names), values), dialect)
    read = parse_mask(text, dialect, strict=strict)
    assert not read.warnings
    assert np.array_equal(np.array(read.names)[read.values], np.array(names)[values])


fragments = st.sampled_from(
    ["others", "a", "*", "*1", "*3", "*-2", "*99999999999", "*" + "9" * 5000, "|", "| ", ",", ", ", "\n", "\n ", " ",
     ":", "<seg>", "</seg>", "é", "\x00", "١", "İ"]
)  # fmt: skip
texts = st.one_of(st.text(), st.lists(fragments, max_size=60).map("".join))
shapes = st.one_of(st.none(), st.tuples(st.integers(1, 40), st.integers(1, 40)))


@settings(max_examples=150, deadline=None)
@given(texts, st.sampled_from([None, *MaskDialect]), shapes, st.booleans())
def test_arbitrary_text_gives_a_grid_or_the_typed_error(
    text: str, dialect: MaskDialect | None, shape: tuple[int, int] | None, strict: bool
) -> None:
    try:
        grid = parse_mask(text, dialect, shape, strict)
    except MalformedText:
        return
    assert 0 < grid.values.size <= MAX_SIDE**2
    assert set(np.unique(grid.values)) == set(range(len(grid.names)))
    if shape is not None and (not strict or dialect is MaskDialect.TEXT4SEG):
        assert grid.values.shape == shape


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dialect", MaskDialect)
def test_long_hostile_text_is_read_in_linear_time_and_bounded_memory(dialect: MaskDialect, strict: bool) -> None:
    """Nothing is timed: quadratic reading of these 150,000 characters would take a minute each."""
    for piece in ("a", "*", "a*1, ", "a *999999999| ", "a*999999999\n", "a *1\n ", ",", "\n", "<seg>", " "):
        text = piece * (150_000 // len(piece))
        try:
            assert parse_mask(text, dialect, strict=strict).values.size <= MAX_SIDE**2
        except MalformedText:
            continue
