"""The resident model as one object: mixed batches, routing, answer forms, calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model_server.calibration import Calibration, Logistic
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver, Query, WeightsError
from model_server.protocol import TileCaption, TileClasses, TileVqa
from model_server.text.answers import answer_kind

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
        alone = perceiver.answer([query])[0]
        if isinstance(answer, TileClasses):
            assert isinstance(alone, TileClasses)
            assert answer.labels == alone.labels
            np.testing.assert_allclose(answer.scores, alone.scores, atol=1e-4)
        elif isinstance(answer, TileCaption):
            assert isinstance(alone, TileCaption)
            assert answer.caption == alone.caption
        else:
            assert isinstance(answer, TileVqa)
            assert isinstance(alone, TileVqa)
            assert answer.answer == alone.answer
            assert answer.confidence == pytest.approx(alone.confidence, abs=1e-4)


def test_queries_on_one_array_share_its_encoding(perceiver: Perceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = perceiver.model.encode
    monkeypatch.setattr(perceiver.model, "encode", lambda x, turned: encoded.append(len(x)) or encode(x, turned))
    image = picture(5)
    perceiver.answer([Query("caption", image), Query("classify", image), Query("classify", picture(6))])
    assert encoded == [2]


def test_class_scores_are_probabilities_over_just_the_labels_asked_for(perceiver: Perceiver) -> None:
    (answer,) = perceiver.answer([Query("classify", picture(1), labels=("forest", "a red barn", "Storage_Tanks"))])
    assert isinstance(answer, TileClasses)
    assert answer.labels == ["forest", "a red barn", "Storage_Tanks"]
    assert sum(answer.scores) == pytest.approx(1, abs=1e-4)


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


def test_a_leaning_towards_no_is_mended_by_the_calibration(
    perceiver: Perceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"no": float(np.log(0.6)), "yes": float(np.log(0.3)), "farmland": float(np.log(0.01))}
    monkeypatch.setattr(perceiver, "calibration", Calibration(yes_no=Logistic(1.0, 0.0)))
    plain = perceiver._yes_or_no(said)
    assert (plain.answer, plain.confidence) == ("no", pytest.approx(2 / 3))
    monkeypatch.setattr(perceiver, "calibration", Calibration(yes_no=Logistic(1.0, 1.5)))
    mended = perceiver._yes_or_no(said)
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
