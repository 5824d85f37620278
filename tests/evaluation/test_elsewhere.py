"""Ships without labelled boxes, and what captions of change claim: figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dense_toy import HEIGHT, WIDTH, ScriptedDense, paint, write_pairs, write_records

from model_server.change_words import ChangeFacts
from model_server.evaluation import __main__ as command
from model_server.evaluation.change_facts import facts_of, regions_of
from model_server.evaluation.results import Results


def measured(folder: Path, sets: str, task: str) -> dict[str, tuple[float, int, dict[str, float | None]]]:
    arguments = [str(folder), "--sets", sets, "--tasks", task, "--out", str(folder.parent / "results.json")]
    results: Results = command.evaluate(ScriptedDense(), command.parser().parse_args(arguments))
    rows = [row for row in results.rows if row.protocol in ("elsewhere", "facts")]
    return {row.metric: (row.value, row.n, dict(row.controls)) for row in rows}


def test_presence_by_boxes_is_held_against_the_label_of_the_image(tmp_path: Path) -> None:
    data, rows = tmp_path / "data", []
    for i, (ships, label) in enumerate([([(10, 10, 30, 25)], True), ([], True), ([(40, 30, 60, 45)], False)]):
        paint(data / "ucm" / f"images/{i}.png", ships)
        rows.append({"id": f"u{i}", "split": "val", "images": [f"images/{i}.png"], "presence": {"ship": label}})
    write_records(data, "ucm", rows)
    found = measured(data, "ucm", "ground")
    assert found["presence_recall"] == (0.5, 3, {"always": 1.0, "blind": 0.0})
    assert found["presence_precision"][0] == 0.5
    assert found["presence_f1"][2]["always"] == pytest.approx(0.8)


def test_a_chip_s_ship_is_found_where_a_box_of_its_length_covers_the_middle(tmp_path: Path) -> None:
    data, rows = tmp_path / "data", []
    middle, aside = (35, 20, 55, 40), (0, 0, 30, 25)
    for i, (ships, length) in enumerate([([middle], 200.0), ([middle], 900.0), ([aside], 200.0), ([], None)]):
        paint(data / "opensarship" / f"images/{i}.png", ships)
        rows.append({"id": f"c{i}", "split": "val", "images": [f"images/{i}.png"], "modality": "sar", "gsd_m": 10,
                     "length_m": length, "scene": "cargo"})  # fmt: skip
    write_records(data, "opensarship", rows)
    found = measured(data, "opensarship", "ground")
    assert found["centre"][:2] == (0.5, 4)
    assert found["centre_length"][:2] == (pytest.approx(1 / 3), 3)
    assert found["off_centre"][0] == pytest.approx(1 / 16)  # the box in the corner covers one of four points
    assert found["centre"][2] == {"whole": 1.0, "blind": 0.0}
    assert found["boxes"][0] == 0.75


def test_regions_are_connected_by_sides_and_come_largest_first() -> None:
    mask = np.zeros((8, 12), bool)
    mask[0:2, 0:2] = mask[2:4, 2:4] = True  # touch at a corner only
    mask[1:7, 6] = mask[6, 6:10] = mask[1:7, 9] = True  # a U is one
    mask[0, 11] = True  # too small to be spoken of
    assert [(pixels, box) for pixels, box in regions_of(mask)] == [
        (14, (6, 1, 10, 7)), (4, (0, 0, 2, 2)), (4, (2, 2, 4, 4)),
    ]  # fmt: skip
    assert facts_of(np.zeros((5, 5), bool)) is None


def test_the_caption_states_its_facts() -> None:
    one = ChangeFacts(1, 0.0123, 1.0, "centre").said("3.1 ha")
    assert one == "One region changed: 1.23% of what both images show, 3.1 ha. It lies in the centre."
    many = ChangeFacts(3, 0.5, 0.25, "upper left").said()
    assert many.endswith("50.00% of what both images show. The largest, 25% of the change, lies in the upper left.")


def test_place_and_amount_are_held_against_the_labelled_mask(tmp_path: Path) -> None:
    data = tmp_path / "data"
    corner = (0, 0, 12, 12)
    write_pairs(data, "val", [(corner, corner), ((60, 45, 90, 60), corner)])
    found = measured(data, "oscd", "detect_change")
    # Both wholes and the quarter with the label of each: the first is right in all, the second in none.
    assert found["place"][:2] == (0.5, 4)
    assert found["place_holds"][0] == 0.5
    assert found["amount"][0] == 0.5
    share = 144 / (WIDTH * HEIGHT)
    other = 450 / (WIDTH * HEIGHT)
    assert found["amount_error"][0] == pytest.approx((abs(share - other) + 4 * share) / 4)
    assert set(found["place"][2]) == {"dropped_before", "centre"}
