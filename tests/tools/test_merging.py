"""Objects that several tiles saw become one; objects that one tile told apart stay apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_tools.geometry.measures import TileFrame
from rs_tools.geometry.merging import Detections, merge

SIDE, OVERLAP = 256, 32
Truth = list[tuple[str, tuple[float, float, float, float]]]
Part = tuple[np.ndarray, Sequence[float] | np.ndarray, list[str]]  # a tile's boxes, scores and labels


def grid(columns: int, rows: int, overlap: int = OVERLAP, decimation: int = 1) -> list[TileFrame]:
    step = SIDE - overlap
    return [
        TileFrame(
            (
                x * step * decimation,
                y * step * decimation,
                (x * step + SIDE) * decimation,
                (y * step + SIDE) * decimation,
            ),
            (SIDE, SIDE),
        )
        for y, x in product(range(rows), range(columns))
    ]


def bounds(frames: Sequence[TileFrame]) -> tuple[int, int, int, int]:
    corners = np.array([frame.region for frame in frames])
    low, high = corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def seen(
    frames: Sequence[TileFrame], truth: Truth, noise: float = 0.0, seed: int = 0, least: float = 6.0
) -> list[Part]:
    """What a detector finds that sees each tile by itself: every object's visible part, if it is large enough."""
    random = np.random.default_rng(seed)
    found = []
    for frame in frames:
        boxes, labels = [], []
        for label, box in truth:
            corners = frame.to_tile(np.array(box).reshape(2, 2)).reshape(4) + random.normal(0, noise, 4) * (noise > 0)
            part = np.clip(corners, 0, SIDE)
            if min(part[2] - part[0], part[3] - part[1]) >= least:
                boxes.append(part)
                labels.append(label)
        scores = random.uniform(0.5, 1, len(boxes))
        found.append((np.array(boxes).reshape(-1, 4), scores, labels))
    return found


def together(frames: Sequence[TileFrame], parts: Sequence[Part]) -> Detections:
    boxes, scores, labels = zip(*parts, strict=True)
    return Detections.in_tiles(frames, boxes, scores, labels, bounds(frames))


def merged(frames: Sequence[TileFrame], truth: Truth, noise: float = 0.0, seed: int = 0) -> Detections:
    return merge(together(frames, seen(frames, truth, noise, seed)))


def boxes_of(found: Detections) -> list[list[float]]:
    return sorted(found.boxes.round(3).tolist())


def test_an_object_that_four_tiles_see_whole_is_one() -> None:
    found = merged(grid(2, 2), [("plane", (226, 226, 250, 252))])
    assert boxes_of(found) == [[226, 226, 250, 252]]
    assert found.tiles == (frozenset({0, 1, 2, 3}),)


def test_a_ship_cut_by_a_seam_is_one_ship_of_full_length() -> None:
    assert boxes_of(merged(grid(2, 1), [("ship", (150, 100, 330, 130))])) == [[150, 100, 330, 130]]
    assert boxes_of(merged(grid(1, 2), [("ship", (100, 150, 130, 330))])) == [[100, 150, 130, 330]]


def test_a_seam_without_overlap_is_crossed_too() -> None:
    assert boxes_of(merged(grid(2, 1, overlap=0), [("ship", (150, 100, 330, 130))])) == [[150, 100, 330, 130]]


def test_a_train_across_many_tiles_is_one() -> None:
    assert boxes_of(merged(grid(6, 1), [("train", (20, 100, 1300, 118))])) == [[20, 100, 1300, 118]]


def test_a_field_over_all_tiles_is_one() -> None:
    assert boxes_of(merged(grid(3, 3), [("field", (50, 60, 650, 640))])) == [[50, 60, 650, 640]]


def test_a_ship_that_crosses_a_seam_aslant_is_one() -> None:
    # The visible part of a slanted ship is lower on one side of the seam: boxes of the parts of the line y = x.
    frames = grid(2, 1)
    parts = [[100, 20, 256, 176], [0, 144, 120, 264 - 8]]
    found = merge(together(frames, [(np.array([box]), [0.9], ["ship"]) for box in parts]))
    assert boxes_of(found) == [[100, 20, 344, 256]]


def test_ships_that_touch_side_by_side_across_a_seam_stay_apart() -> None:
    ships: Truth = [("ship", (150, y, 330, y + 22)) for y in (60, 82, 104, 126)]
    for overlap in (0, 32, 64):
        found = merged(grid(2, 1, overlap), ships, noise=1.0)
        assert len(found) == 4
        for i, (_, box) in enumerate(ships):
            assert np.abs(np.array(boxes_of(found)) - box).max(axis=1).min() < 8, i


def test_moored_ships_whose_boxes_overlap_by_half_stay_apart() -> None:
    ships: Truth = [("ship", (190 + d, 60 + d, 280 + d, 150 + d)) for d in (0, 14, 28)]  # diagonal, side by side
    assert len(merged(grid(2, 1, overlap=128), ships, noise=1.0)) == 3


def test_a_boat_beside_a_ship_is_not_swallowed_by_it() -> None:
    found = merged(grid(2, 1, overlap=64), [("ship", (100, 60, 330, 120)), ("ship", (210, 100, 240, 112))])
    assert boxes_of(found) == [[100, 60, 330, 120], [210, 100, 240, 112]]


def test_other_labels_never_merge() -> None:
    found = merged(grid(2, 2), [("car", (230, 230, 250, 250)), ("truck", (230, 230, 250, 250))])
    assert sorted(found.labels) == ["car", "truck"]


def test_a_part_gives_way_to_the_whole_and_lends_its_score() -> None:
    frames = grid(2, 1)
    left: Part = (np.array([[230, 50, 256, 80]]), [0.95], ["ship"])
    right: Part = (np.array([[6, 50, 60, 80]]), [0.6], ["ship"])
    found = merge(together(frames, [left, right]))
    assert boxes_of(found) == [[230, 50, 284, 80]]
    assert found.scores.tolist() == [0.95]


def test_boxes_that_end_at_the_rim_of_the_scene_are_whole() -> None:
    frames = grid(2, 1)
    boxes = np.array([[0, 0, 30, 30], [230, 226, 256, 256]])
    rim = Detections.in_tiles(frames[:1], [boxes], [[1, 1]], [["a", "a"]], bounds(frames))
    assert rim.cut.tolist() == [[False] * 4, [False, False, True, False]]


def test_decimated_tiles_merge_in_scene_pixels() -> None:
    assert boxes_of(merged(grid(2, 1, decimation=4), [("ship", (600, 400, 1320, 520))])) == [[600, 400, 1320, 520]]


def test_nothing_found_merges_to_nothing() -> None:
    assert len(merge(Detections.in_tiles([], [], [], [], (0, 0, 1, 1)))) == 0
    assert len(merged(grid(2, 2), [])) == 0


def test_a_town_of_cars_is_counted_right() -> None:
    random = np.random.default_rng(1)
    places = [(x, y) for x, y in product(range(10, 900, 28), range(10, 900, 16)) if random.random() < 0.8]
    cars: Truth = [("car", (x, y, x + 22, y + 10)) for x, y in places]
    found = merged(grid(4, 4), cars, noise=0.7)
    assert len(found) == len(cars)


sizes = st.floats(8, 300)
objects = st.lists(
    st.builds(
        lambda label, x, y, w, h: (label, (x, y, min(x + w, 704.0), min(y + h, 704.0))),
        st.sampled_from(["ship", "car"]),
        st.floats(0, 690),
        st.floats(0, 690),
        sizes,
        sizes,
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(truth=objects, seed=st.integers(0, 99), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_tiles_does_not_matter_and_merging_again_changes_nothing(truth, seed, shuffle) -> None:
    frames = grid(3, 3)
    parts = seen(frames, truth, noise=2.0, seed=seed)
    once = merge(together(frames, parts))
    order = list(range(len(frames)))
    shuffle.shuffle(order)
    other = merge(together([frames[i] for i in order], [parts[i] for i in order]))
    renumbered = tuple(frozenset(order[i] for i in tiles) for tiles in other.tiles)
    for found in (replace(other, tiles=renumbered), merge(once)):
        np.testing.assert_array_equal(found.boxes, once.boxes)
        np.testing.assert_array_equal(found.scores, once.scores)
        assert found.labels.tolist() == once.labels.tolist()
        assert found.tiles == once.tiles


@settings(deadline=None, max_examples=60)
@given(truth=objects, seed=st.integers(0, 99))
def test_no_tile_and_no_label_loses_an_object(truth, seed) -> None:
    parts = seen(grid(3, 3), truth, noise=2.0, seed=seed)
    found = merge(together(grid(3, 3), parts))
    for i, (_, _, labels) in enumerate(parts):
        for label in ("ship", "car"):
            there = [tiles for tiles, name in zip(found.tiles, found.labels, strict=True) if name == label]
            assert sum(i in tiles for tiles in there) == labels.count(label)


@settings(deadline=None, max_examples=30)
@given(truth=objects)
def test_boxes_within_one_tile_stay_as_they_are(truth) -> None:
    frame = TileFrame((0, 0, 704, 704), (704, 704))
    boxes = np.array([box for _, box in truth]).reshape(-1, 4)
    labels = [name for name, _ in truth]
    found = merge(Detections.in_tiles([frame], [boxes], [[0.5] * len(truth)], [labels], frame.region))
    assert boxes_of(found) == sorted(boxes.round(3).tolist())
