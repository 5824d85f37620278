"""Damaged images give a result or an error for the caller; `fuzz_images.py` runs many more of them."""

from __future__ import annotations

from pathlib import Path

import fuzz_images
import pytest

COUNT = 300


def test_damaged_images_neither_end_nor_stop_the_process_and_give_away_no_path(tmp_path: Path) -> None:
    report = fuzz_images.run(tmp_path, COUNT, seed=1)
    assert report.failures == []
    assert report.kinds.total() == COUNT
    assert report.kinds["result"] > COUNT / 10  # else the damage says nothing about reading pixels
    assert report.kinds["ImageError"] > COUNT / 10


def test_the_sound_images_that_are_damaged_all_give_results(tmp_path: Path) -> None:
    root = tmp_path / "sound"
    root.mkdir()
    assert {fuzz_images.outcome_of(root, path.name) for path in fuzz_images.seeds(root)} == {"result"}


def test_a_process_that_dies_is_seen_and_the_next_image_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch itself: a worker that kills itself at its third image."""
    monkeypatch.setenv("FUZZ_DIES_AT", "2")
    report = fuzz_images.run(tmp_path, 4, seed=1)
    assert report.kinds["DIED OR SILENT"] == 1
    assert report.kinds.total() == 4
    assert len(report.failures) == 1
