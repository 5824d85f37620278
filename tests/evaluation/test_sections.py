"""Sections that commands of their own write into the page of results."""

from __future__ import annotations

import json
from pathlib import Path

from model_server.evaluation.page import PAGE, put
from model_server.evaluation.scale import scale_section
from model_server.evaluation.sections import appendix

BEFORE = "# Results\n\nOld.\n\n## Captions\n\n| a |\n\n## Scale\n\nold\n\n## Absent\n\n- nothing\n"


def write_scale(folder: Path, value: float) -> None:
    curve = {"set": "ucm", "measure": "caption CIDEr", "n": 2, "gsd_m": None, "values": [value]}
    (folder / "scale.json").write_text(json.dumps({"factors": [1], "curves": [curve]}))


def test_a_section_is_replaced_in_its_place_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / PAGE).write_text(BEFORE)
    write_scale(tmp_path, 3.5)
    assert put(tmp_path, scale_section(tmp_path))
    text = (tmp_path / PAGE).read_text()
    assert "| ucm | caption CIDEr | 2 | unknown | 3.500 |" in text
    assert "\nold\n" not in text
    assert text.startswith("# Results\n\nOld.\n\n## Captions\n\n| a |\n\n## Scale\n\n")
    assert text.endswith("\n\n## Absent\n\n- nothing\n")


def test_refreshing_twice_changes_nothing_more(tmp_path: Path) -> None:
    (tmp_path / PAGE).write_text(BEFORE)
    write_scale(tmp_path, 3.5)
    put(tmp_path, scale_section(tmp_path))
    once = (tmp_path / PAGE).read_text()
    write_scale(tmp_path, 2.0)
    put(tmp_path, scale_section(tmp_path))
    assert (tmp_path / PAGE).read_text() == once.replace("3.500", "2.000")


def test_without_a_page_nothing_is_written(tmp_path: Path) -> None:
    write_scale(tmp_path, 1.0)
    assert not put(tmp_path, scale_section(tmp_path))
    assert not (tmp_path / PAGE).exists()


def test_a_new_section_stands_before_what_is_absent(tmp_path: Path) -> None:
    (tmp_path / PAGE).write_text(BEFORE)
    assert put(tmp_path, ["", "## New", "", "line"])
    titles = [line for line in (tmp_path / PAGE).read_text().splitlines() if line.startswith("## ")]
    assert titles == ["## Captions", "## Scale", "## New", "## Absent"]


def test_the_appendix_holds_what_has_been_measured_into_the_folder(tmp_path: Path) -> None:
    assert appendix(tmp_path) == []
    write_scale(tmp_path, 1.0)
    assert "## Scale" in appendix(tmp_path)
