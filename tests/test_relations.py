"""Which one of several things a phrase means."""

from __future__ import annotations

import numpy as np
import pytest

from model_server.relations import parse

BOXES = np.array([[0, 0, 10, 10], [80, 5, 100, 25], [40, 45, 52, 57], [10, 80, 40, 100]], float)
SCORES = np.array([0.9, 0.8, 0.7, 0.6])
EXTENT = (0.0, 0.0, 100.0, 100.0)


@pytest.mark.parametrize(
    ("phrase", "head", "row"),
    [
        ("the largest ship", "ship", 3),
        ("Biggest storage tank", "storage tank", 3),
        ("the smallest bus", "bus", 0),
        ("the rightmost car", "car", 1),
        ("the topmost tree", "tree", 0),
        ("the lowest building.", "building", 3),
        ("the ship in the upper right", "ship", 1),
        ("the car in the lower left corner of the image", "car", 3),
        ("a tree near the centre", "tree", 2),
        ("the ship on the left", "ship", 0),
        ("the ship at the bottom of the picture", "ship", 3),
        ("the ship in the lower right", "ship", 2),  # none is there: the nearest
    ],
)
def test_a_phrase_for_one_thing_says_what_to_look_for_and_which_is_meant(phrase: str, head: str, row: int) -> None:
    relation = parse(phrase)
    assert relation is not None
    assert relation.head == head
    assert relation.pick(BOXES, SCORES, EXTENT) == row


@pytest.mark.parametrize(
    "phrase", ["ship", "the ships on the left", "largest", "large ship", "ship next to the pier", "leftmost cars", ""]
)
def test_a_phrase_that_singles_nothing_out_is_left_alone(phrase: str) -> None:
    assert parse(phrase) is None


def test_of_several_in_a_place_the_surest_is_meant() -> None:
    relation = parse("the car in the upper left")
    assert relation is not None
    boxes = np.array([[0, 0, 10, 10], [12, 12, 20, 20]], float)
    assert relation.pick(boxes, np.array([0.5, 0.9]), EXTENT) == 1
