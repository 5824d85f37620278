"""Comparisons made from an image's counts are true, in training words, and as the data put them."""

from __future__ import annotations

from random import Random

import pytest

from model_server.text.questions import QA, Question, parse
from model_server.training import counted
from model_server.training.counted import compared, known_counts

ASKED = [
    QA("How many buildings are there?", "12", "count"),
    QA("What is the number of roads in the image?", "5", "count"),
    QA("Is there a water area?", "no", "presence"),
    QA("Is a forest present?", "yes", "presence"),
    QA("What is the area covered by buildings?", "120m2", "area"),
    QA("Are there more roads than buildings?", "no", "comparison"),
    QA("What a lovely picture", "yes", "presence"),
]


def test_counts_and_noes_settle_how_many_there_are_and_a_yes_does_not() -> None:
    assert known_counts(ASKED) == {("building", ""): 12, ("road", ""): 5, ("water area", ""): 0}


PLAINLY = {
    "more": "Are there more {0}s than {1}s?", "less": "Are there less {0}s than {1}s?",
    "equal": "Is the number of {0}s equal to the number of {1}s?", "presence": "Is there a {0}?",
}  # fmt: skip


def plainly(question: Question, rng: Random) -> str:
    """The first template that `parse` reads back."""
    nouns = [noun.head for noun in (question.subject, question.other) if noun is not None]
    return PLAINLY[question.kind].format(*nouns)


def test_every_comparison_made_from_counts_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "ask", plainly)
    counts, seen = known_counts(ASKED), set()
    for qa in (qa for seed in range(40) for qa in compared(ASKED, Random(seed), 6) if qa.type == "comparison"):
        meaning = parse(qa.question)
        assert meaning is not None
        assert meaning.subject is not None
        assert meaning.other is not None
        a, b = (counts[noun.head, noun.tail] for noun in (meaning.subject, meaning.other))
        true = {"more": a > b, "less": a < b, "equal": a == b}[meaning.kind]
        assert qa.answer == ("yes" if true else "no"), qa
        seen.add((meaning.kind, qa.answer))
    assert seen == {("more", "yes"), ("more", "no"), ("less", "yes"), ("less", "no"), ("equal", "no")}


def test_presence_follows_from_counts() -> None:
    made = [qa for seed in range(20) for qa in compared(ASKED, Random(seed), 6) if qa.type == "presence"]
    assert {qa.answer for qa in made if "water" in qa.question.lower()} == {"no"}
    assert {qa.answer for qa in made if "road" in qa.question.lower()} == {"yes"}


def test_an_image_that_counts_one_thing_alone_compares_nothing() -> None:
    assert compared(ASKED[:1], Random(0), 6) == []
    assert compared([], Random(0), 6) == []
