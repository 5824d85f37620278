"""The sentence that others agree with."""

from __future__ import annotations

import math

import pytest

from model_server.evaluation.caption_metrics import bleu
from model_server.text.agreement import _bleu, grams, most_agreed, tokenize

BOAT = "many boats are docked at the harbor"
BOATS = "many white boats are docked at the harbor"
LONER = "a runway beside some grass"


def test_the_likeliest_sentence_yields_to_several_that_say_nearly_the_same() -> None:
    said = [LONER, BOAT, BOATS]
    assert most_agreed(said, [math.log(0.4), math.log(0.3), math.log(0.3)]) in (1, 2)


def test_a_sentence_that_is_far_likelier_than_all_others_is_said() -> None:
    assert most_agreed([LONER, BOAT, BOATS], [math.log(0.999999), -30.0, -31.0]) == 0


def test_one_sentence_is_said_whatever_it_is() -> None:
    assert most_agreed([""], [-3.0]) == 0


@pytest.mark.parametrize("other", [BOAT, BOATS, LONER, "boats boats boats", "harbor"])
def test_agreement_is_the_sum_of_the_four_bleu_scores(other: str) -> None:
    a, b = tokenize(BOATS), tokenize(other)
    assert _bleu(grams(a), grams(b)) == pytest.approx(sum(bleu([a], [[b]])), abs=1e-3)
