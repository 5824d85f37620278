"""The resident model as one object: mixed batches, routing, answer forms, calibration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model_server.calibration import Calibration, Logistic
from model_server.model.generate import Hypothesis, beam_search
from model_server.model.vision import square
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver, Query, WeightsError
from model_server.protocol import PerceiveRequest, TileAnswer, TileCaption, TileClasses, TileMasks, TileObjects, TileVqa
from model_server.text.answers import answer_kind
from model_server.wording import vqa_answer, yes_or_no
from model_server.writing import ANSWER_BEAMS, ANSWER_TOKENS, Writing

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def perceiver(debug_weights: Path) -> Perceiver:
    return Perceiver.load(debug_weights)


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_mixed_batch_answers_each_query_as_it_would_alone(perceiver: Perceiver) -> None:
    queries = [
        Query("caption", picture(0)),
        Query("vqa", picture(1), text="Is there a ship?"),
        Query("classify", picture(2)),
        Query("vqa", picture(3), text="How many of the large buildings stand near the river in this image?"),
        Query("classify", picture(0), labels=("forest", "city")),
    ]
    together = perceiver.answer(queries)
    assert [type(a) for a in together] == [TileCaption, TileVqa, TileClasses, TileVqa, TileClasses]
    for query, answer in zip(queries, together, strict=True):
        perceiver.free_memory()
        assert_same(answer, perceiver.answer([query])[0])


def assert_same(answer: TileAnswer, expected: TileAnswer) -> None:
    """Words alike, numbers alike up to rounding."""
    if isinstance(answer, TileClasses):
        assert isinstance(expected, TileClasses)
        assert answer.labels == expected.labels
        np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-4)
    elif isinstance(answer, TileCaption):
        assert isinstance(expected, TileCaption)
        assert answer.caption == expected.caption
        assert answer.confidence == pytest.approx(expected.confidence, abs=1e-4)
    else:
        assert isinstance(answer, TileVqa)
        assert isinstance(expected, TileVqa)
        assert answer.answer == expected.answer
        assert answer.confidence == pytest.approx(expected.confidence, abs=1e-4)


@pytest.fixture
def encoded(perceiver: Perceiver, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each pass of the encoder, views counted."""
    passes: list[int] = []
    forward = perceiver.model.backbone.forward
    monkeypatch.setattr(perceiver.model.backbone, "forward", lambda x: passes.append(len(x)) or forward(x))
    perceiver.free_memory()
    return passes


def test_queries_on_one_image_share_its_encoding_within_a_batch_and_over_batches(
    perceiver: Perceiver, encoded: list[int]
) -> None:
    image, views = picture(5), perceiver.config.views
    perceiver.answer([Query("caption", image), Query("classify", image), Query("classify", picture(6))])
    assert encoded == [2 * views]
    perceiver.answer([Query("vqa", image.copy(), text="Is there a ship?"), Query("caption", picture(6))])
    assert encoded == [2 * views]
    assert (perceiver.cache.hits, len(perceiver.cache)) == (2, 2)


def test_an_answer_about_an_image_that_is_known_already_is_the_one_given_without_the_cache(
    perceiver: Perceiver, encoded: list[int]
) -> None:
    image = picture(7)
    asked = [
        Query("vqa", image, text="Is there a river?"), Query("caption", image, detail="full"), Query("classify", image),
        Query("vqa", image, text="How many of the large buildings stand near the river in this image?"),
    ]  # fmt: skip
    alone = []
    for query in asked:
        perceiver.free_memory()
        alone += perceiver.answer([query])
    assert len(encoded) == len(asked)
    perceiver.free_memory()
    for query, expected in zip(asked, alone, strict=True):
        (cached,) = perceiver.answer([query])
        assert_same(cached, expected)
    assert len(encoded) == len(asked) + 1


@torch.inference_mode()
@pytest.mark.parametrize(("question", "turned"), [("How many large ships?", True), ("Where is the ship?", False)])
def test_a_question_is_read_off_all_turned_views_unless_it_is_about_a_side(
    perceiver: Perceiver, question: str, turned: bool
) -> None:
    image, model, tokenizer = picture(8), perceiver.model, perceiver.tokenizer
    image[:, :30] //= 8  # dark on the left
    pixels = square(image, perceiver.config.image_size)[None]
    views = perceiver.config.views if turned else 1
    task, expert = torch.full((views,), tokenizer.tasks["[VQA]"]), torch.zeros(views, dtype=torch.long)
    logits, state = model.prefill(
        model.encode(pixels, turned), task, perceiver.sentences.questions([question] * views), expert, ANSWER_TOKENS,
        views,
    )  # fmt: skip
    banned = torch.zeros(perceiver.config.decoder.vocab_size, dtype=torch.bool)
    banned[[tokenizer.pad, *tokenizer.tasks.values()]] = True
    (found,) = beam_search(
        model, logits, state, beams=ANSWER_BEAMS, steps=ANSWER_TOKENS, end=tokenizer.end, banned=banned,
        length_power=0.0,
    )  # fmt: skip
    said = [(tokenizer.decode(h.ids), h.logprob) for h in found]
    expected = vqa_answer(said, perceiver.calibration)
    (answer,) = perceiver.answer([Query("vqa", image, text=question)])
    assert isinstance(answer, TileVqa)
    assert [a.answer for a in answer.alternatives] == [a.answer for a in expected.alternatives]
    assert [a.confidence for a in answer.alternatives] == pytest.approx(
        [a.confidence for a in expected.alternatives], rel=2e-4
    )


def test_sequences_that_join_while_others_are_written_change_nobodys_answer(perceiver: Perceiver) -> None:
    queries = [
        Query("vqa" if i % 3 else "caption", picture(20 + i), text=f"Is there {'a very ' * i}large ship?")
        for i in range(9)
    ]
    alone = [perceiver.answer([query])[0] for query in queries]
    answers: dict[int, TileAnswer] = {}
    places: dict[Writing, int] = {}
    coming = list(range(len(queries)))
    while coming or places:
        if coming:  # one joins before each step
            i = coming.pop(0)
            (outcome,) = perceiver.begin([queries[i]])
            if isinstance(outcome, Writing):
                places[outcome] = i
            else:
                answers[i] = outcome
        for writing, answer in perceiver.step():
            answers[places.pop(writing)] = answer
    assert perceiver.writing() == 0
    for i, expected in enumerate(alone):
        assert_same(answers[i], expected)


def test_a_comparison_is_answered_from_the_two_numbers_that_the_model_gives(
    perceiver: Perceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    cars, trees = {"7": 0.8, "2": 0.2}, {"3": 0.9, "none": 0.1}
    said = {"What is the number of cars?": cars, "What is the number of trees?": trees}
    speak(perceiver, said, monkeypatch)
    asked = ["Are there more cars than trees?", "Are there fewer cars than trees?", "Do cars outnumber ships here?"]
    more, fewer, unknown = perceiver.answer([Query("vqa", picture(40), text=text) for text in asked])
    assert isinstance(more, TileVqa)
    assert isinstance(fewer, TileVqa)
    assert isinstance(unknown, TileVqa)
    assert (more.answer, fewer.answer) == ("yes", "no")
    assert more.confidence == pytest.approx(0.8, abs=1e-3)
    assert fewer.confidence == pytest.approx(0.8, abs=1e-3)
    assert unknown.abstained  # it has no number for ships


def speak(perceiver: Perceiver, said: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model say these texts, with these probabilities, to these questions, and "none" to others."""

    def answer(writing: Writing) -> TileAnswer:
        for i, text in enumerate(writing.texts):
            texts = said.get(text, {"none": 1.0})
            writing.said[i] = [Hypothesis(tuple(map(ord, t)), math.log(p)) for t, p in texts.items()]
        return tell(writing)

    tell = perceiver.writer._said
    monkeypatch.setattr(perceiver.writer, "_said", answer)
    monkeypatch.setattr(perceiver.tokenizer, "decode", lambda ids: "".join(map(chr, ids)))


def test_both_numbers_of_a_comparison_take_places_and_leave_them_together(perceiver: Perceiver) -> None:
    room = perceiver.room("vqa")
    comparison = Query("vqa", picture(41), text="Are there more large buildings next to a road than small houses?")
    (begun,) = perceiver.begin([comparison])
    assert isinstance(begun, Writing)
    assert perceiver.writing() == 2
    assert perceiver.room("vqa") == room - 1
    perceiver.drop(begun)
    assert (perceiver.room("vqa"), perceiver.writing()) == (room, 0)
    many = perceiver.answer([comparison] * (room + 1))
    assert len({answer.model_dump_json() for answer in many}) == 1


def test_what_is_dropped_frees_its_place_and_harms_no_other(perceiver: Perceiver) -> None:
    kept, dropped = Query("caption", picture(31)), Query("caption", picture(32))
    (alone,) = perceiver.answer([kept])
    room = perceiver.room("caption")
    first, second = perceiver.begin([dropped, kept])
    assert isinstance(first, Writing)
    assert isinstance(second, Writing)
    assert perceiver.room("caption") == room - 2
    perceiver.step()
    perceiver.drop(first)
    perceiver.drop(first)
    assert perceiver.room("caption") == room - 1
    done = []
    while not done:
        done = perceiver.step()
    ((writing, answer),) = done
    assert writing is second
    assert_same(answer, alone)
    assert perceiver.room("caption") == room


def test_a_batch_that_fails_leaves_nothing_behind(perceiver: Perceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    room = perceiver.room("caption")

    def fail(texts: list[str]) -> None:
        raise ZeroDivisionError("no questions today")

    monkeypatch.setattr(perceiver.sentences, "questions", fail)
    with pytest.raises(ZeroDivisionError):
        perceiver.begin([Query("caption", picture(1)), Query("vqa", picture(1), text="why?")])
    assert (perceiver.room("caption"), perceiver.writing()) == (room, 0)


def test_priorities_have_places_of_their_own(perceiver: Perceiver) -> None:
    room = perceiver.room("caption", "interactive")
    begun = perceiver.begin([Query("caption", picture(1))], "bulk")
    assert (perceiver.room("caption", "interactive"), perceiver.room("caption", "bulk")) == (room, room - 1)
    for writing in begun:
        assert isinstance(writing, Writing)
        perceiver.drop(writing)


def test_more_queries_than_there_are_places_are_all_answered(debug_weights: Path) -> None:
    perceiver = Perceiver.load(debug_weights)
    room = perceiver.room("caption")
    answers = perceiver.answer([Query("caption", picture(i % 3)) for i in range(room + 3)])
    assert len(answers) == room + 3
    assert answers[0] == answers[3]


def test_boxes_and_masks_at_one_scale_share_the_features_of_a_look_and_are_those_found_without_the_cache(
    dense_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perceiver = Perceiver.load(dense_weights)
    assert perceiver.dense is not None
    image = picture(9)
    queries = [
        Query("ground", image, text="ship", gsd_m=0.5), Query("ground", image.copy(), text="vessel", gsd_m=0.5),
        Query("segment", image, labels=("ship",), gsd_m=2.0), Query("segment", image, labels=("sea ice",)),
    ]  # fmt: skip
    alone = []
    for query in queries:
        perceiver.free_memory()
        alone += perceiver.answer([query])
    looked: list[int] = []
    features = perceiver.dense.branch.features
    monkeypatch.setattr(perceiver.dense.branch, "features", lambda maps: looked.append(1) or features(maps))
    perceiver.free_memory()
    first = perceiver.answer(queries[:1])
    passes = len(looked)
    kept = first + [answer for query in queries[1:] for answer in perceiver.answer([query])]
    assert passes > 0
    assert len(looked) < 2 * passes + 2
    for answer, expected in zip(kept, alone, strict=True):
        if isinstance(answer, TileObjects):
            assert isinstance(expected, TileObjects)
            np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-4)
        else:
            assert isinstance(answer, TileMasks)
            assert isinstance(expected, TileMasks)
            assert np.abs(answer.probabilities.astype(int) - expected.probabilities).max() <= 1


def test_class_scores_are_probabilities_over_just_the_labels_asked_for(perceiver: Perceiver) -> None:
    (answer,) = perceiver.answer([Query("classify", picture(1), labels=("forest", "a red barn", "Storage_Tanks"))])
    assert isinstance(answer, TileClasses)
    assert answer.labels == ["forest", "a red barn", "Storage_Tanks"]
    assert sum(answer.scores) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("gsd_m", "far"), [(None, False), (0.1, False), (10, False), (30, True), (0.02, True)])
def test_pixels_far_from_those_of_the_training_images_are_warned_about(
    perceiver: Perceiver, gsd_m: float | None, far: bool
) -> None:
    told = perceiver.warnings(PerceiveRequest(task="caption", gsd_m=gsd_m))
    assert [f"{gsd_m:,.2f} m on the ground" in warning for warning in told] == [True] * far


def test_image_features_are_unit_rows(perceiver: Perceiver) -> None:
    features = perceiver.image_features([picture(0), picture(1)])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-4)


def test_every_task_names_its_token_and_expert(perceiver: Perceiver) -> None:
    assert perceiver.route("caption") == ("[CAP]", "image")
    assert perceiver.route("vqa") == ("[VQA]", "image")
    assert perceiver.route("classify") == ("[CLS]", "image")


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        Perceiver.load(tmp_path)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("yes", "yes_no"),
        ("17", "count"),
        ("twenty-two", "count"),
        ("431m2", "area"),
        ("farmland", "category"),
        ("left and right side", "text"),
    ],
)
def test_the_kind_of_an_answer_is_read_off_it(answer: str, kind: str) -> None:
    assert answer_kind(answer) == kind


def test_calibration_maps_probabilities_monotonically_and_survives_json() -> None:
    calibration = Calibration(yes_no=Logistic(0.8, -0.2), answer=Logistic(1.3, -1.0))
    values = [calibration.answer_confidence(float(np.log(p))) for p in (0.01, 0.3, 0.9, 1.0)]
    assert values == sorted(values)
    assert all(0 < v < 1 for v in values)
    assert Calibration.from_json(calibration.to_json()) == calibration


def test_a_leaning_towards_no_is_mended_by_the_calibration() -> None:
    said = {"no": float(np.log(0.6)), "yes": float(np.log(0.3)), "farmland": float(np.log(0.01))}
    plain = yes_or_no(said, Calibration(yes_no=Logistic(1.0, 0.0)))
    assert (plain.answer, plain.confidence) == ("no", pytest.approx(2 / 3))
    mended = yes_or_no(said, Calibration(yes_no=Logistic(1.0, 1.5)))
    assert mended.answer == "yes"
    assert mended.alternatives[0].answer == "no"
    assert mended.confidence + mended.alternatives[0].confidence == pytest.approx(1)


@pytest.fixture(scope="module")
def shipped() -> Perceiver:
    return Perceiver.load(DEFAULT_WEIGHTS)


class TestDefaultWeights:
    """The model that ships, on a real scene from the examples."""

    def test_they_fit_the_budget(self) -> None:
        sizes = [f.stat().st_size for f in DEFAULT_WEIGHTS.rglob("*") if f.is_file()]
        assert max(sizes) <= 95e6
        assert sum(sizes) <= 120e6

    def test_the_default_taxonomy_names_near_synonyms_once(self, shipped: Perceiver) -> None:
        assert len(shipped.taxonomy) >= 35
        assert "farmland" in shipped.taxonomy
        assert "agricultural" not in shipped.taxonomy

    def test_they_recognise_what_a_real_scene_shows_also_in_words_that_training_never_used(
        self, shipped: Perceiver
    ) -> None:
        scene = ROOT / "examples" / "data" / "ordway_swisher_neon.tif"
        with Image.open(scene) as file:
            savanna = np.asarray(file.convert("RGB"))
        trees, ships, labels = shipped.answer(
            [
                Query("vqa", savanna, text="Are there any trees?"),
                Query("vqa", savanna, text="Can you spot a vessel?"),
                Query("classify", savanna, labels=("woodland with scattered pines", "shopping mall", "marina")),
            ]
        )
        assert isinstance(trees, TileVqa)
        assert isinstance(ships, TileVqa)
        assert isinstance(labels, TileClasses)
        assert (trees.answer, ships.answer) == ("yes", "no")
        assert labels.scores[0] > 0.5
