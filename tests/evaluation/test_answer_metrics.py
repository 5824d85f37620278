import numpy as np
import pytest

from model_server.evaluation.answer_metrics import (
    balanced_accuracy,
    expected_calibration_error,
    matches,
    normalise,
    rsvqa_bin,
)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (" Yes. ", "yes"),
        ("Twenty-two", "22"),
        ("zero", "0"),
        ("431 m2", "431m2"),
        ("431 m²", "431m2"),
        ("3.5", "3.5"),
        ("baseball_diamond", "baseball diamond"),
        ("up, center and bottom", "up center and bottom"),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_number_words(answer: str, form: str) -> None:
    assert normalise(answer) == form


def test_matching_is_exact_in_the_normal_form() -> None:
    assert matches(["Yes", "eight", "rivers"], ["yes", "8", "river"]).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("answer", "kind", "expected"),
    [
        ("0", "count", "<= 0"),
        ("1", "count", "<= 10"),
        ("10", "count", "<= 10"),
        ("11", "count", "<= 100"),
        ("1000", "count", "<= 1000"),
        ("14017", "count", "> 1000"),
        ("0m2", "area", "<= 0"),
        ("10.5m2", "area", "<= 100"),
        ("10632m2", "area", "> 1000"),
        ("yes", "presence", "yes"),
        ("many", "count", "many"),
    ],
)
def test_counts_and_areas_fall_into_the_bins_of_rsvqa(answer: str, kind: str, expected: str) -> None:
    assert rsvqa_bin(answer, kind) == expected


def test_balanced_accuracy_gives_a_constant_answer_one_over_the_number_of_answers() -> None:
    truth = ["no"] * 9 + ["yes"]
    assert balanced_accuracy(matches(["no"] * 10, truth), truth) == 0.5


def test_calibration_error_is_the_gap_weighted_by_how_many_share_it() -> None:
    correct = np.array([True, True, False, False, True])
    # 0.9 twice, both right: gap .1; 0.5 twice, both wrong: gap .5; 1.0, right: gap 0.
    assert expected_calibration_error([0.9, 0.9, 0.5, 0.5, 1.0], correct) == pytest.approx((2 * 0.1 + 2 * 0.5) / 5)
    assert expected_calibration_error([1.0, 0.0], np.array([True, False])) == 0
