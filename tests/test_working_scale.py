"""At which scale a tile is looked at, and one list of objects out of several looks."""

from __future__ import annotations

import pytest
import torch

from model_server.dense.scale_search import OTHERS, Sighting, combined
from model_server.dense.working_scale import ANY_BOX, BOXES, MASKS, box_scales, change_scale, mask_scales, suited
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
    assert box_scales("ship", "optical", 30) == (2.8,)


def test_where_nothing_is_known_objects_are_searched() -> None:
    assert len(box_scales(None, "optical", None)) == len(box_scales(None, "optical", 0.5)) > 2
    for modality in ("optical", "sar"):  # boats and freighters, from the air and from orbit
        scales = box_scales("ship", modality, None)
        assert scales[-1] / scales[0] > 3


def test_a_look_that_would_enlarge_too_much_is_left_out_where_there_are_others() -> None:
    assert box_scales("car", "optical", 0.4) == pytest.approx((1.481,), rel=0.01)  # not 3.08, for the smallest cars
    assert box_scales("car", "optical", 0.8) == pytest.approx((2.963,), rel=0.01)
    assert box_scales("ship", "optical", 1.0) == (0.5, 1.0, 2.0)  # not 5


def test_radar_has_entries_of_its_own_where_a_table_names_them() -> None:
    table = {"ship": 1, "ship sar": 2, "water": 3}
    assert [suited(table, "ship", "optical"), suited(table, "ship", "sar")] == [1, 2]
    assert [suited(table, "water", "sar"), suited(table, "tree", "sar"), suited(table, None, "sar")] == [3, None, None]


def test_coarse_radar_has_entries_of_its_own_where_the_pixel_size_is_known() -> None:
    table = {"ship": 1, "ship sar": 2, "ship sar coarse": 3, "water sar": 4}
    assert [suited(table, "ship", "sar", gsd_m) for gsd_m in (None, 1.0, 3.9, 4.0, 10)] == [2, 2, 2, 3, 3]
    assert suited(table, "ship", "optical", 10) == 1
    assert suited(table, "water", "sar", 10) == 4


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


def test_a_vote_is_between_scales_next_to_each_other_and_the_surest_vote_is_believed() -> None:
    ship = (100.0, 100.0, 140.0, 112.0)
    looks = [
        sighting(0.5, (0.0, 0.0, 300.0, 200.0, 0.35)),
        sighting(0.75),
        sighting(1.0, (*ship, 0.6)),
        sighting(1.5, (*ship, 0.9)),
        sighting(2.0, (*ship, 0.9), (100.0, 100.0, 110.0, 112.0, 0.5)),
    ]
    found = combined(looks)
    assert found.scale == 1.5
    assert found.boxes[0].tolist() == pytest.approx(list(ship))
    assert found.scores[0] == pytest.approx(0.9)  # of 1.5 and 2.0, in which 1.0 would have less to say
    assert combined(looks[:-1]).scores[0] == pytest.approx(0.75)  # of 1.0 and 1.5


def test_of_votes_as_sure_as_each_other_the_coarser_is_believed() -> None:
    hull, part = (0.0, 0.0, 100.0, 20.0), (0.0, 0.0, 40.0, 20.0)
    found = combined([sighting(0.4, (*hull, 0.8)), sighting(1.4, (*part, 0.8))])
    assert (found.scale, found.boxes.tolist()) == (0.4, [list(hull)])


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
