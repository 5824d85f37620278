"""At which scale a tile is looked at, and one list of objects out of several looks."""

from __future__ import annotations

import pytest
import torch

from model_server.dense.scale_search import OTHERS, Sighting, combined
from model_server.dense.working_scale import ANY_BOX, BOXES, MASKS, box_scales, change_scale, mask_scales
from model_server.protocol import Modality


@pytest.mark.parametrize(
    ("concept", "modality", "gsd_m", "scales"),
    [
        ("car", "optical", 0.2, (0.741, 1.538)),
        ("car", "optical", 0.1, (0.37, 0.769)),
        ("tree", "optical", 0.1, (0.752, 1.0)),
        ("ship", "sar", 1.0, (0.556, 0.769)),
        ("ship", "optical", 0.8, (0.4, 0.8, 1.6)),  # freighters to boats
    ],
)
def test_a_known_ground_distance_decides(
    concept: str, modality: Modality, gsd_m: float, scales: tuple[float, ...]
) -> None:
    assert box_scales(concept, modality, gsd_m) == pytest.approx(scales, rel=0.01)


def test_scales_have_limits_and_two_that_are_close_are_one() -> None:
    for rule in (*BOXES.values(), *MASKS.values(), ANY_BOX):
        for gsd_m in (0.001, 0.3, 1, 10, 1000):
            scales = rule.scales(gsd_m)
            assert all(rule.low <= scale <= rule.high for scale in scales)
            assert list(scales) == sorted(set(scales))
    assert box_scales("ship", "optical", 0.05) == (0.25,)
    assert box_scales("ship", "optical", 30) == (2.0,)


def test_where_nothing_is_known_objects_are_searched() -> None:
    assert len(box_scales(None, "optical", None)) == len(box_scales(None, "optical", 0.5)) > 2
    assert len(box_scales("ship", "optical", None)) > 2


def test_coarse_imagery_is_enlarged_for_change() -> None:
    assert change_scale(10) == pytest.approx(1.5, rel=0.02)
    assert change_scale(1.5) == 1.0
    assert change_scale(0.5) == pytest.approx(1.5, rel=0.02)
    assert change_scale(None) == 1.0
    assert change_scale(0.1) < 0.5


def test_radar_of_the_sea_is_seen_as_a_whole() -> None:
    assert mask_scales("water", "sar", 10) == mask_scales("land", "sar", None) == (0.5,)
    assert min(mask_scales("oil spill", "sar", 10)) < 0.5
    assert len(mask_scales("water", "optical", None)) == 2


def sighting(scale: float, *rows: tuple[float, float, float, float, float]) -> Sighting:
    table = torch.tensor(rows).reshape(-1, 5)
    return Sighting(scale, table[:, :4], table[:, 4])


def test_the_surest_look_is_taken_whole_and_what_only_another_sees_counts_less() -> None:
    ship, island, boat = (10.0, 10.0, 90.0, 40.0), (300.0, 300.0, 350.0, 350.0), (200.0, 200.0, 212.0, 208.0)
    coarse = sighting(0.4, (*ship, 0.7), (*island, 0.2))
    fine = sighting(1.5, (*boat, 0.8), (14.0, 9.0, 88.0, 41.0, 0.3))
    found = combined([coarse, fine])
    assert found.scale == 1.5
    assert found.boxes.tolist() == [list(boat), [14, 9, 88, 41], list(island)]
    assert found.scores.tolist() == pytest.approx([0.8, 0.3, 0.2 * OTHERS])


def test_looks_at_nearby_scales_vote_on_a_box_and_on_its_score() -> None:
    first = sighting(0.75, (0.0, 0.0, 40.0, 20.0, 0.8), (100.0, 0.0, 120.0, 20.0, 0.6))
    second = sighting(1.5, (4.0, 0.0, 44.0, 20.0, 0.4))
    found = combined([first, second])
    assert found.scores.tolist() == pytest.approx([0.6, 0.3])  # a look that sees nothing there votes, too
    assert found.boxes[0].tolist() == pytest.approx([4 / 3, 0, 40 + 4 / 3, 20])


def test_many_unsure_parts_do_not_outweigh_a_few_sure_things() -> None:
    hulls = sighting(0.4, *((100.0 * i, 0.0, 100.0 * i + 100, 30.0, 0.8) for i in range(4)))
    parts = sighting(1.5, *((10.0 * i, 0.0, 10.0 * i + 9, 30.0, 0.7) for i in range(40)))
    found = combined([parts, hulls])
    assert (found.scale, len(found.boxes)) == (0.4, 4)


def test_a_part_of_what_is_taken_already_is_no_object_of_its_own() -> None:
    hull = sighting(0.4, (0.0, 0.0, 100.0, 20.0, 0.9))
    parts = sighting(1.5, (0.0, 0.0, 30.0, 20.0, 0.4), (60.0, 2.0, 90.0, 18.0, 0.4), (200.0, 0.0, 230.0, 20.0, 0.5))
    found = combined([parts, hull])
    assert found.scale == 0.4
    assert found.boxes.tolist() == [[0, 0, 100, 20], [200, 0, 230, 20]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5 * OTHERS])


def test_where_nobody_sees_anything_the_list_is_empty_and_the_scale_the_plainest() -> None:
    found = combined([sighting(0.4), sighting(1.0), sighting(1.5)])
    assert (found.scale, len(found.boxes)) == (1.0, 0)
