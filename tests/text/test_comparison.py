"""Comparisons are read in many wordings, and only comparisons of two numbers are."""

from __future__ import annotations

import pytest

from model_server.text.comparison import Comparison, Kind, odds, read_comparison
from model_server.text.phrasings import HELD_OUT, HELD_OUT_PLACES, PLACES, TRAIN

THINGS = (("small roads", "water areas"), ("shops next to a road", "residential buildings on the left of a water area"))
KINDS: tuple[Kind, ...] = ("more", "less", "equal")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("things", THINGS, ids=["plain", "with places"])
@pytest.mark.parametrize(("bank", "places"), [(TRAIN, PLACES), (HELD_OUT, HELD_OUT_PLACES)], ids=["known", "held out"])
def test_every_wording_of_the_banks_is_read(kind: Kind, things: tuple[str, str], bank: dict, places: tuple) -> None:
    a, b = things
    forms = {"some": a, "Some": a.capitalize(), "other": b, "are": "are", "do": "do", "Are": "Are", "Do": "Do"}
    for wording in bank[kind]:
        for where in places:
            question = wording.format(**forms, where=where)
            assert read_comparison(question) == Comparison(kind, a, b), question


@pytest.mark.parametrize(
    "question",
    [
        "Is there more water than land?",  # of ground, not of numbers
        "Are there more ships in the harbor than in the sea?",  # one thing in two places
        "How many more cars than trucks are there?",
        "Is it more urban than rural?",
        "Are there more than 5 ships?",
        "Is the forest larger than the lake?",
        "Is there a road next to a building?",
        "What is more common here?",
        "",
    ],
)
def test_what_compares_no_two_numbers_is_left_alone(question: str) -> None:
    assert read_comparison(question) is None


def test_a_comparison_asks_for_both_numbers() -> None:
    comparison = read_comparison("Do trees outnumber cars in this image?")
    assert comparison is not None
    assert comparison.questions() == ("What is the number of trees?", "What is the number of cars?")


def test_odds_follow_from_how_probable_each_number_is() -> None:
    few, many = {0: 0.5, 2: 0.5}, {1: 0.5, 9: 0.5}
    assert odds("more", many, few) == pytest.approx(1.0986, abs=1e-3)  # 3 of 4
    assert odds("less", many, few) == pytest.approx(-1.0986, abs=1e-3)
    assert odds("equal", {0: 1.0}, {0: 0.75, 3: 0.25}) == pytest.approx(1.0986, abs=1e-3)
    assert odds("more", {5: 1.0}, {1: 1.0}) < 10  # never certain
