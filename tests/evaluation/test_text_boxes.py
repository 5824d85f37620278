"""Boxes in two ways, on pictures whose answers are known: the figures and their section."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dense_toy import ScriptedDense, write_ships

from model_server.evaluation.page import PAGE
from model_server.evaluation.text_boxes import BLIND, DENSE, TEXT, run, section, write
from model_server.perceiver import Query
from model_server.protocol import TileObjects

LARGE, SMALL = (10, 10, 30, 25), (60, 40, 68, 46)


class Half(ScriptedDense):
    """Writes the first box only."""

    def _objects(self, query: Query) -> TileObjects:
        found = super()._objects(query)
        return found.model_copy(update={"boxes": found.boxes[:1], "scores": found.scores[:1]})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_ships(folder, "train", [([LARGE, SMALL], [])])
    write_ships(folder, "val", [([LARGE, SMALL], []), ([LARGE, SMALL], [])])
    return folder


def test_both_ways_are_measured_alike_and_stand_side_by_side(data: Path, tmp_path: Path) -> None:
    figures = run({TEXT: Half(), DENSE: ScriptedDense()}, data, ["inshore_ships", "missing"], "val", None, tmp_path)
    boxes = {figure.way: figure for figure in figures if not figure.refer}
    assert list(boxes) == [TEXT, BLIND, DENSE]
    assert (boxes[DENSE].n, boxes[DENSE].values["f1_50"]) == (4, 1)
    assert boxes[TEXT].values["f1_50"] == pytest.approx(4 / 6)  # two of four, none invented
    assert boxes[BLIND].values["f1_50"] == 0
    phrases = {figure.way: figure for figure in figures if figure.refer}
    assert phrases[DENSE].n == phrases[TEXT].n > 0
    assert phrases[BLIND].values["acc50"] == 0

    (tmp_path / PAGE).write_text("# Results\n\n## Absent\n\n- nothing\n")
    write(figures, "0123abcd", 300, tmp_path)
    stored = json.loads((tmp_path / "text_boxes.json").read_text())
    assert stored["steps"] == 300
    text = (tmp_path / PAGE).read_text()
    assert "trained alone, 300 steps" in text
    assert "`0123abcd`" in text
    lines = [line for line in text.splitlines() if line.startswith("| inshore_ships |  | 4 |")]
    assert [line.split(" | ")[3] for line in lines] == [TEXT, BLIND, DENSE]


def test_without_figures_there_is_no_section(tmp_path: Path) -> None:
    assert section(tmp_path) == []
