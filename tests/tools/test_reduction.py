"""How many looks' answers become one."""

from __future__ import annotations

from random import Random
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_server.protocol import AnswerKind, RankedAnswer, TileCaption, TileClasses, TileVqa
from model_server.text.phrasings import Kind
from model_server.text.questions import Noun, Question, ask
from rs_tools.imagery.tiling import tile_grid
from rs_tools.reduction import (
    MAX_EVIDENCE,
    Look,
    Scope,
    question_scope,
    reduce_answers,
    reduce_captions,
    reduce_classes,
)

WHOLE = (0, 0, 900, 900)
NINTHS = tile_grid(WHOLE, 300).regions


def vqa(
    answer: str, kind: AnswerKind, confidence: float = 0.9, *, abstained: bool = False, index: int = 0
) -> Look[TileVqa]:
    said = TileVqa(answer=answer, kind=kind, confidence=confidence, abstained=abstained, alternatives=[])
    return Look(NINTHS[index], said, share=1 / 9)


def overview(answer: str, kind: AnswerKind, confidence: float = 0.9) -> Look[TileVqa]:
    said = TileVqa(answer=answer, kind=kind, confidence=confidence, abstained=False, alternatives=[])
    return Look(WHOLE, said, overview=True)


def captions(first: str, *parts: str, confidence: float = 0.5) -> list[Look[TileCaption]]:
    found = [Look(WHOLE, TileCaption(caption=first, confidence=confidence), overview=True)]
    return found + [
        Look(region, TileCaption(caption=text, confidence=confidence), share=1 / 9)
        for region, text in zip(NINTHS, parts, strict=False)
    ]


# --- what a question asks for

SCOPES: dict[Kind, Scope] = {
    "presence": "presence",
    "count": "count",
    "more": "once",
    "less": "once",
    "equal": "once",
    "area": "area",
    "rural_urban": "whole",
    "theme": "whole",
    "location": "once",
}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", SCOPES)
def test_every_way_of_asking_is_understood(kind: Kind, held_out: bool) -> None:
    for seed in range(200):
        random = Random(seed)
        noun = Noun(random.choice(["building", "small road", "water area", "car", "residential area", "sand"]))
        question = ask(Question(kind, noun, Noun("tree")), random, held_out)
        assert question_scope(question) == SCOPES[kind], question


@pytest.mark.parametrize(
    ("question", "scope"),
    [
        ("Is there a ship at the top of the image?", "once"),
        ("Describe the land cover.", "whole"),
        ("ships?", "presence"),
        ("  HOW many\nships ", "count"),
        ("How many hectares of forest are there?", "area"),
        ("How many acres have burnt?", "area"),
    ],
)
def test_questions_in_other_words_are_understood_too(question: str, scope: Scope) -> None:
    assert question_scope(question) == scope


# --- one look


@given(st.sampled_from(["presence", "count", "area", "once", "whole"]), st.floats(0, 1), st.booleans())
def test_a_single_answer_stays_as_it_is(scope: Scope, confidence: float, abstained: bool) -> None:
    said = TileVqa(
        answer="3",
        kind="count",
        confidence=confidence,
        abstained=abstained,
        alternatives=[RankedAnswer(answer="4", confidence=0.1)],
    )
    found = reduce_answers(scope, [Look(WHOLE, said, overview=True)])
    assert (found.answer, found.kind, found.confidence, found.abstained) == ("3", "count", confidence, abstained)
    assert found.alternatives == [("4", 0.1)]
    assert [look.region for look in found.evidence] == [WHOLE]
    assert found.warnings == []


def test_a_single_caption_or_class_list_stays_as_it_is() -> None:
    [look] = captions("A river.")
    found = reduce_captions([look], "short")
    assert (found.caption, found.confidence, found.parts) == ("A river.", 0.5, [])
    classes = TileClasses(labels=["sea", "city"], scores=[0.1, 0.2])
    assert reduce_classes([Look(WHOLE, classes, share=0.3)]) == {"sea": 0.1, "city": 0.2}


# --- presence


def test_one_tile_that_sees_it_suffices_and_the_surest_vouches_for_it() -> None:
    looks = [overview("no", "yes_no"), vqa("no", "yes_no", 0.99)]
    looks += [vqa("yes", "yes_no", 0.7, index=4), vqa("yes", "yes_no", 0.8, index=7)]
    found = reduce_answers("presence", looks)
    assert (found.answer, found.kind, found.confidence, found.abstained) == ("yes", "yes_no", 0.8, False)
    assert [look.region for look in found.evidence] == [NINTHS[7], NINTHS[4]]
    assert found.alternatives == [("no", pytest.approx(0.2))]


def test_a_yes_that_no_tile_is_sure_of_abstains() -> None:
    looks = [vqa("no", "yes_no"), vqa("yes", "yes_no", 0.55, abstained=True)]
    found = reduce_answers("presence", looks)
    assert (found.answer, found.confidence, found.abstained) == ("yes", 0.55, True)


def test_no_is_as_sure_as_its_least_sure_tile() -> None:
    looks = [vqa("no", "yes_no", 0.9), vqa("no", "yes_no", 0.6, abstained=True, index=3)]
    found = reduce_answers("presence", looks)
    assert (found.answer, found.confidence, found.abstained) == ("no", 0.6, True)
    assert found.evidence[0].region == NINTHS[3]


def test_tiles_that_answer_neither_yes_nor_no_are_left_out_and_counted() -> None:
    found = reduce_answers("presence", [vqa("yes", "yes_no"), vqa("unknown", "category", 1)])
    assert found.answer == "yes"
    assert found.warnings == ["1 of 2 looks did not answer with yes or no and were left out."]
    assert reduce_answers("presence", [vqa("sea", "category"), vqa("sea", "category")]).answer == "sea"


def test_evidence_is_bounded() -> None:
    assert len(reduce_answers("presence", [vqa("yes", "yes_no")] * 100).evidence) == MAX_EVIDENCE


# --- counts and areas


def test_counts_of_a_partition_add_up_and_the_answer_says_how_far_to_trust_them() -> None:
    looks = [vqa("3", "count", 0.8), vqa("0", "count", 0.99, index=1), vqa("1", "count", 0.4, index=2)]
    found = reduce_answers("count", looks)
    assert (found.answer, found.kind, found.abstained) == ("4", "count", False)
    assert found.confidence == pytest.approx((3 * 0.8 + 1 * 0.4) / 4)
    assert [look.answer.answer for look in found.evidence] == ["3", "1"]
    assert "count twice" in found.warnings[0]


def test_nothing_counted_anywhere_is_a_count_of_zero() -> None:
    found = reduce_answers("count", [vqa("0", "count", 0.8), vqa("0", "count", 0.6)])
    assert (found.answer, found.confidence) == ("0", pytest.approx(0.7))
    assert len(found.evidence) == 2


def test_a_count_that_rests_on_unsure_tiles_abstains() -> None:
    assert reduce_answers("count", [vqa("3", "count", 0.3, abstained=True), vqa("1", "count")]).abstained
    assert not reduce_answers("count", [vqa("1", "count", 0.3, abstained=True), vqa("3", "count")]).abstained


def test_an_overview_never_adds_to_a_count() -> None:
    assert reduce_answers("count", [overview("9", "count"), vqa("1", "count"), vqa("2", "count")]).answer == "3"


def test_tiles_that_give_no_number_are_left_out_and_counted() -> None:
    found = reduce_answers("count", [vqa("2", "count"), vqa("many", "category")])
    assert found.answer == "2"
    assert "1 of 2 looks did not answer with a number and were left out." in found.warnings


@pytest.mark.parametrize(("tiles", "total"), [(["431m2", "69 m2"], "500m2"), (["0m2", "0m2"], "0m2")])
def test_areas_of_a_partition_add_up(tiles: list[str], total: str) -> None:
    found = reduce_answers("area", [vqa(tile, "area") for tile in tiles])
    assert (found.answer, found.kind) == (total, "area")
    assert "sum of the model's areas" in found.warnings[0]


# --- majorities


def test_the_surer_majority_wins_and_the_others_are_alternatives() -> None:
    looks = [overview("urban", "category", 0.5)]
    looks += [vqa("rural", "category", 0.9, index=i) for i in range(8)] + [vqa("urban", "category", 0.3, index=8)]
    found = reduce_answers("whole", looks)
    assert found.answer == "rural"
    assert found.confidence == pytest.approx(8 / 9 * 0.9 / 2)
    assert found.alternatives == [("urban", pytest.approx((0.5 + 0.3 / 9) / 2))]
    assert all(look.answer.answer == "rural" for look in found.evidence)


def test_a_sure_overview_outweighs_parts_that_disagree_among_themselves() -> None:
    parts = [vqa(f"thing {i}", "category", 0.9, index=i) for i in range(9)]
    found = reduce_answers("whole", [overview("harbour", "category"), *parts])
    assert found.answer == "harbour"
    assert found.evidence[0].region == WHOLE


def test_a_majority_of_unsure_looks_abstains() -> None:
    unsure = [vqa("sea", "category", 0.4, abstained=True, index=i) for i in range(5)]
    assert reduce_answers("whole", [*unsure, vqa("city", "category", 0.4)]).abstained


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), min_size=2, max_size=9))
def test_confidences_of_a_majority_are_shares_of_one(votes: list[tuple[str, float]]) -> None:
    looks = [vqa(answer, "category", confidence, index=i) for i, (answer, confidence) in enumerate(votes)]
    found = reduce_answers("whole", looks)
    assert found.confidence + sum(share for _, share in found.alternatives) <= 1 + 1e-9
    assert all(share <= found.confidence for _, share in found.alternatives)


# --- classes


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=2, max_size=9))
def test_probabilities_still_add_up_to_one(rows: list[list[float]]) -> None:
    looks = [
        Look(NINTHS[i], TileClasses(labels=["a", "b", "c"], scores=[value / sum(row) for value in row]), share=1 / 9)
        for i, row in enumerate(rows)
    ]
    assert sum(reduce_classes(looks).values()) == pytest.approx(1)


def test_sure_and_large_looks_count_more() -> None:
    sure = Look(WHOLE, TileClasses(labels=["sea", "city"], scores=[0.9, 0.1]), share=0.5)
    unsure = Look(WHOLE, TileClasses(labels=["sea", "city"], scores=[0.45, 0.55]), share=0.5)
    assert reduce_classes([sure, unsure])["sea"] == pytest.approx((0.9 * 0.9 + 0.55 * 0.45) / (0.9 + 0.55))
    small = Look(WHOLE, sure.answer, share=0.01)
    assert reduce_classes([small, unsure])["sea"] < 0.47


# --- captions


def test_a_caption_tells_what_the_parts_add_and_where_not_all_that_they_say() -> None:
    sentences = ["Many green trees in a forest."] * 7 + ["Some boats in a harbour.", "Many trees are in a forest."]
    looks = captions("A piece of green forest.", *sentences)
    found = reduce_captions(looks, "short")
    assert found.caption == "A piece of green forest. In the lower part: some boats in a harbour."
    assert [part.region for part in found.parts] == list(NINTHS)
    assert found.confidence == 0.5


def test_parts_that_say_the_same_are_told_together() -> None:
    sentences = ["Some boats.", *["A lake."] * 7, "Some boats."]
    found = reduce_captions(captions("A lake with blue water.", *sentences), "short")
    assert found.caption == "A lake with blue water. In the upper left and lower right: some boats."


@pytest.mark.parametrize(("detail", "sentences"), [("short", 3), ("full", 5)])
def test_a_caption_stays_short_however_many_parts_there_are(
    detail: Literal["short", "full"], sentences: int
) -> None:
    words = ["boats", "trees", "houses", "planes", "cars", "tanks", "roads", "bridges", "lakes"]
    looks = captions("A desert.", *(f"Many {word}. The scene looks like {word}." for word in words))
    found = reduce_captions(looks, detail)
    assert found.caption.count(".") == sentences


def test_without_an_overview_the_surest_part_leads() -> None:
    parts = captions("-", "A lake.", "A lake.")[1:]
    surest = Look(NINTHS[5], TileCaption(caption="A river.", confidence=0.9), share=1 / 9)
    assert reduce_captions([*parts, surest], "short").caption.startswith("A river.")
