"""Which questions must be asked of the upright image."""

from __future__ import annotations

import pytest

from model_server.text.phrasings import HELD_OUT, TRAIN
from model_server.text.sides import names_a_side


@pytest.mark.parametrize(
    "question",
    [
        "Where is the ship?",
        "In which part of the image is the airport?",
        "Is there a road on the left of the building?",
        "How many cars are in the Upper right?",
        "Does the river run from north to south?",
        "What is the orientation of the runway?",
        "Is the harbor at the bottom?",
    ],
)
def test_questions_of_sides_and_places_name_a_side(question: str) -> None:
    assert names_a_side(question)


@pytest.mark.parametrize(
    "question",
    [
        "Is there a ship?", "How many buildings are there?", "Are there more roads than water areas?",
        "Is it a rural or an urban area?", "What is the theme of this picture?", "Is there a road next to a building?",
    ],
)  # fmt: skip
def test_other_questions_name_none(question: str) -> None:
    assert not names_a_side(question)


@pytest.mark.parametrize("bank", [TRAIN, HELD_OUT], ids=["known", "held out"])
def test_every_wording_that_asks_for_a_place_names_a_side(bank: dict) -> None:
    assert all(names_a_side(wording) for wording in bank["location"])
