from pathlib import Path
from random import Random

import pytest

from model_server.text.questions import (
    Noun,
    Question,
    ask,
    askable_labels,
    banks,
    parse,
    plural,
    presence_question,
    presence_questions,
    rephrase,
    scene_question,
    singular,
    with_article,
)
from model_server.training.records import Record, read_records


@pytest.mark.parametrize(
    ("question", "meaning"),
    [
        ("Is a road present?", Question("presence", Noun("road", many=False))),
        ("Is there a small water area in the image?", Question("presence", Noun("small water area", many=False))),
        ("Does this picture contain trees?", Question("presence", Noun("tree", many=False))),
        (
            "Is a building at the top of a  road present?",
            Question("presence", Noun("building", "at the top of a road", many=False)),
        ),
        ("How many pitchs are there?", Question("count", Noun("pitch"))),
        ("How many car in the picture?", Question("count", Noun("car", many=False))),
        ("What is the amount of place of worships?", Question("count", Noun("place of worship"))),
        (
            "Are there less roads on the left of a  industrial area than cemeterys in the image?",
            Question("less", Noun("road", "on the left of an industrial area"), Noun("cemetery")),
        ),
        ("Are there more parks than ponds?", Question("more", Noun("park"), Noun("pond"))),
        (
            "Is the number of roads equal to the number of small woods?",
            Question("equal", Noun("road"), Noun("small wood")),
        ),
        (
            "What is the area covered by buildings at the bottom of the  residential area?",
            Question("area", Noun("building", "at the bottom of the residential area")),
        ),
        ("Is it a rural or an urban area", Question("rural_urban")),
        ("What is the theme of this picture?", Question("theme")),
        ("What is the location of the red cars in this picture?", Question("location", Noun("red car"))),
    ],
)
def test_a_template_question_is_read_into_what_it_asks(question: str, meaning: Question) -> None:
    assert parse(question) == meaning


def test_a_question_of_no_template_is_left_as_it_is() -> None:
    question = "Why would anybody park here?"
    assert parse(question) is None
    assert rephrase(question, Random(0)) == question


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("church", "churches"),
        ("cemetery", "cemeteries"),
        ("railway", "railways"),
        ("place of worship", "places of worship"),
        ("aircraft", "aircraft"),
        ("garage", "garages"),
        ("bare soil", "bare soil"),
        ("body of water", "bodies of water"),
        ("recreation ground", "recreation grounds"),
    ],
)
def test_plural_and_singular_undo_each_other(one: str, many: str) -> None:
    assert plural(one) == many
    assert singular(many) == one


def test_articles_follow_the_sound_and_mass_nouns_have_none() -> None:
    assert [with_article(noun) for noun in ("airplane", "road", "urban area", "sand")] == [
        "an airplane",
        "a road",
        "an urban area",
        "sand",
    ]


def test_every_phrasing_keeps_the_things_asked_about_and_agrees_with_them() -> None:
    for held_out in (False, True):
        for seed in range(200):
            rng = Random(seed)
            assert "airplane" in ask(Question("presence", Noun("airplane")), rng, held_out).lower()
            sand = ask(Question("presence", Noun("sand")), rng, held_out).lower()
            assert "sand" in sand
            assert not any(wrong in sand for wrong in ("a sand", "sands", "are there", "do any", "do sand", "are any"))
            comparison = ask(Question("more", Noun("road", "next to a pond"), Noun("park")), rng, held_out).lower()
            assert "roads next to a pond" in comparison
            assert comparison.index("roads") < comparison.index("parks")
            location = ask(Question("location", Noun("white truck", many=False)), rng, held_out).lower()
            assert "the white truck" in location
            assert "trucks" not in location
            assert " are " not in location


def test_no_phrasing_is_both_trained_on_and_held_out() -> None:
    assert not set(banks(held_out=False)) & set(banks(held_out=True))


def test_held_out_questions_never_come_out_of_the_training_bank() -> None:
    trained = {rephrase("Is a road present?", Random(seed)) for seed in range(3000)}
    unseen = {rephrase("Is a road present?", Random(seed), held_out=True) for seed in range(500)}
    assert len(unseen) > 20
    assert not trained & unseen


def test_names_of_a_label_are_split_into_known_and_unseen_ones() -> None:
    known = " ".join(presence_question("airplane", Random(seed)) for seed in range(100)).lower()
    unseen = " ".join(presence_question("airplane", Random(seed), unseen_names=True) for seed in range(100)).lower()
    assert "plane" in known
    assert "aircraft" in known
    assert "aeroplane" not in known
    assert "airplane" not in unseen
    assert "aeroplane" in unseen


def test_a_label_without_a_name_is_asked_by_its_own_words() -> None:
    assert "wind turbine" in presence_question("wind_turbines", Random(1)).lower()


def test_a_no_that_is_only_convention_is_not_asked() -> None:
    assert askable_labels({"sea": True, "water": False, "ship": False}) == ["sea", "ship"]
    assert askable_labels({"sea": True, "water": True}) == ["sea", "water"]
    assert askable_labels({"sea": False, "water": False}) == ["sea", "water"]


def _record(presence: dict[str, bool]) -> Record:
    return Record("r", "toy", "train", (), 8, 8, presence=presence)


def test_a_rare_label_is_asked_where_it_is_and_seldom_where_it_is_not() -> None:
    rng = Random(0)
    there = sum(len(presence_questions(_record({"ship": True}), rng)) for _ in range(500))
    absent = sum(len(presence_questions(_record({"ship": False}), rng)) for _ in range(500))
    assert there == 500
    assert 5 < absent < 60


def test_the_answer_to_a_scene_question_is_the_class_in_words() -> None:
    answers = [scene_question(scene, Random(0)).answer for scene in ("golf_course", "agricultural")]
    assert answers == ["golf course", "farmland"]


def test_nearly_all_questions_of_the_real_data_are_read(labelled_data: Path) -> None:
    records = read_records(labelled_data, ["ucm", "rsvqa_lr", "rsvqa_hr"], None)
    questions = [qa.question for record in records for qa in record.qa]
    assert len(questions) > 10_000
    assert sum(parse(question) is not None for question in questions) / len(questions) > 0.99


def test_presence_questions_of_the_real_data_are_balanced_for_every_label(labelled_data: Path) -> None:
    rng = Random(0)
    answers = [
        (label, qa.answer)
        for record in read_records(labelled_data, ["ucm"], "train")
        for label in record.presence
        for qa in presence_questions(
            Record(record.id, "ucm", "train", (), 8, 8, presence={label: record.presence[label]}), rng
        )
    ]
    for label in {label for label, _ in answers}:
        own = [answer for name, answer in answers if name == label]
        assert 0.4 < own.count("yes") / len(own) < 0.6, label
