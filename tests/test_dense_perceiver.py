"""Boxes, masks and change of a loaded model: batches, geometry under scale and padding, known words, refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_server.batching.feature_cache import ByteCache
from model_server.calibration import DenseCalibration, Logistic
from model_server.dense.known_phrases import KnownPhrases
from model_server.dense.perceiver import FLOOR, DensePerceiver
from model_server.dense.working_scale import BOXES, MASKS, MAX_LOOK_PIXELS, Rule, bounded
from model_server.model.dense import DenseBranch, Found, Maps
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver, Query
from model_server.protocol import PerceiveRequest, TaskNotServed, TileCaption, TileChange, TileMasks, TileObjects
from model_server.text.concepts import DISTRACTORS, every_phrase


@pytest.fixture(scope="module")
def perceiver(dense_weights: Path) -> Perceiver:
    return Perceiver.load(dense_weights)


@pytest.fixture
def dense(perceiver: Perceiver) -> DensePerceiver:
    """A copy that a test may bend."""
    assert perceiver.dense is not None
    copy = object.__new__(DensePerceiver)
    copy.__dict__.update(perceiver.dense.__dict__)
    return copy


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that stay as they are when those of the shipped model are tuned."""
    monkeypatch.setitem(BOXES, "car", Rule(working=(0.2,)))
    for concept, scale in (("forest", 1.0), ("water", 0.75), ("oil spill", 0.5), ("ship sar", 1.5)):
        monkeypatch.setitem(MASKS, concept, Rule(unknown=(scale,)))


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def white_square(height: int, width: int, x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = 255
    return image


def near(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a.astype(int), b.astype(int), atol=1)


def test_a_mixed_batch_answers_each_query_as_it_would_alone(perceiver: Perceiver) -> None:
    shared = picture(0)
    queries = [
        Query("ground", shared, text="ship"),
        Query("caption", shared),
        Query("segment", picture(1, 40, 100), labels=("road", "water", "unheard of")),
        Query("detect_change", picture(2), after=picture(3)),
        Query("ground", picture(4), text="cars", gsd_m=0.4),
        Query("detect_change", picture(5), after=picture(6), gsd_m=10),
        Query("segment", shared, labels=("forest",), modality="sar"),
        Query("ground", shared, text="the tall trees over there"),
    ]
    together = perceiver.answer(queries)
    kinds = [TileObjects, TileCaption, TileMasks, TileChange, TileObjects, TileChange, TileMasks, TileObjects]
    assert [type(a) for a in together] == kinds
    for query, answer in zip(queries, together, strict=True):
        (alone,) = perceiver.answer([query])
        if isinstance(answer, TileObjects):
            assert isinstance(alone, TileObjects)
            assert len(answer.boxes) == len(alone.boxes) > 0
            np.testing.assert_allclose(answer.scores, alone.scores, atol=1e-4)
        elif isinstance(answer, TileMasks | TileChange):
            assert isinstance(alone, TileMasks | TileChange)
            assert answer.probabilities.shape[-2:] == query.image.shape[:2]
            near(answer.probabilities, alone.probabilities)
        assert answer.model_dump(exclude={"boxes", "scores", "confidence"}) == alone.model_dump(
            exclude={"boxes", "scores", "confidence"}
        )


def test_images_of_one_size_go_through_together_and_one_array_at_one_scale_once(
    dense: DensePerceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, ...]] = []
    maps = dense._maps
    monkeypatch.setattr(dense, "_maps", lambda images: passes.append(tuple(images.shape)) or maps(images))
    shared = picture(0, 64, 64)
    dense.answer(
        [
            Query("segment", shared, labels=("forest", "car")),
            Query("segment", shared, labels=("forest",)),
            Query("ground", shared, text="car", gsd_m=0.2),
            Query("segment", picture(1, 60, 50), labels=("forest",)),
            Query("segment", picture(2, 64, 70), labels=("forest",)),
        ]
    )
    assert sorted(passes) == [(1, 3, 64, 96), (2, 3, 64, 64)]


def test_each_image_of_a_series_is_looked_at_once_whatever_it_is_compared_with(
    dense: DensePerceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    maps = dense._maps
    monkeypatch.setattr(dense, "_maps", lambda images: passes.append(len(images)) or maps(images))
    monkeypatch.setattr(dense, "cache", ByteCache[Any](2**26))
    series = [picture(20 + i) for i in range(4)]
    pairs = [Query("detect_change", before, after=after) for before, after in pairwise(series)]
    first = dense.answer(pairs[:2])
    assert passes == [3]
    again = dense.answer([pairs[1], pairs[2]])
    assert passes == [3, 1]
    monkeypatch.setattr(dense, "cache", None)
    for pair, found in zip([*pairs[:2], *pairs[1:]], [*first, *again], strict=True):
        (alone,) = dense.answer([pair])
        assert isinstance(found, TileChange)
        assert isinstance(alone, TileChange)
        near(found.probabilities, alone.probabilities)


@pytest.mark.parametrize(("height", "width"), [(50, 70), (64, 64), (101, 33)])
@pytest.mark.parametrize("gsd_m", [0.1, 0.2, 0.3])  # a car is looked at with 0.5, 1 and 1.5
def test_boxes_lie_on_the_pixels_of_the_tile(dense: DensePerceiver, height: int, width: int, gsd_m: float) -> None:
    scale = gsd_m / 0.2
    column, row = 3, 2  # a cell whose centre is at pixel 15.5, 11.5 of the look

    def detect(features: Tensor, phrases: Tensor) -> Found:
        h, w = features.shape[-2:]
        heat = torch.full((1, 1, h, w), -9.0)
        heat[..., row, column] = 4.0
        heat[..., h - 1, w - 1] = 3.0  # in the grey margin, where there is one
        distances = torch.tensor([6.5, 4.5, 8.5, 400.0]).view(1, 4, 1, 1).expand(1, 4, h, w)
        return Found(heat, distances, torch.full((1, h, w), 3.0))

    dense.branch = cast(DenseBranch, SimpleNamespace(**bare(dense.branch), detect=detect))
    (answer,) = dense.answer([Query("ground", picture(0, height, width), text="car", gsd_m=gsd_m)])
    assert isinstance(answer, TileObjects)
    assert answer.scale == pytest.approx(scale)
    along, down = width / round(width * scale), height / round(height * scale)
    assert answer.boxes[0] == pytest.approx((9 * along, 7 * down, min(24 * along, width), height), abs=1e-3)
    for x1, y1, x2, y2 in answer.boxes:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_a_phrase_for_one_thing_is_answered_by_one_box(dense: DensePerceiver) -> None:
    def detect(features: Tensor, phrases: Tensor) -> Found:
        h, w = features.shape[-2:]
        heat, distances = torch.full((1, phrases.shape[1], h, w), -9.0), torch.full((1, 4, h, w), 6.0)
        heat[..., 2, 2], heat[..., 10, 10] = 4.0, 3.0
        distances[..., 10, 10] = 12.0
        return Found(heat, distances, torch.full((1, h, w), 3.0))

    dense.branch = cast(DenseBranch, SimpleNamespace(**bare(dense.branch), detect=detect))
    image = picture(0, 64, 64)
    texts = ("car", "the largest car", "the car in the upper left")
    answers = dense.answer([Query("ground", image, text=text, gsd_m=0.2) for text in texts])
    every, largest, upper = [answer.boxes for answer in answers if isinstance(answer, TileObjects)]
    assert len(every) == 2
    assert (largest, upper) == (every[1:], every[:1])


def bare(branch: DenseBranch) -> dict[str, object]:
    return {"config": branch.config, "maps": branch.maps, "features": branch.features}


def brightness(dense: DensePerceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are known: a cell's mask is whether it is bright around its centre, its change whether that
    differs."""

    def maps(images: Tensor) -> Maps:
        return {4: F.avg_pool2d(F.pad(images[:, :1].float(), (0, 4, 0, 4)), 8, 4)}

    monkeypatch.setattr(dense, "_maps", maps)

    def features(maps: Maps) -> Tensor:
        return maps[4]

    def segment(x: Tensor, phrases: Tensor) -> Tensor:
        return ((x - 127) / 20).expand(-1, phrases.shape[1], -1, -1)

    def change(before: Maps, after: Maps) -> Tensor:
        return ((before[4] - after[4]).abs()[:, 0] - 127) / 20

    dense.branch = cast(DenseBranch, SimpleNamespace(features=features, segment=segment, change=change))


@pytest.mark.parametrize(("label", "scale"), [("water", 0.75), ("forest", 1.0), ("ship", 1.5), ("oil spill", 0.5)])
def test_masks_lie_on_the_pixels_of_the_tile(
    dense: DensePerceiver, monkeypatch: pytest.MonkeyPatch, label: str, scale: float
) -> None:
    brightness(dense, monkeypatch)
    modality = "sar" if label in ("ship", "oil spill") else "optical"
    image = white_square(230, 310, 80, 60, 200, 190)
    (answer,) = dense.answer([Query("segment", image, labels=("forest", label), modality=modality)])
    assert isinstance(answer, TileMasks)
    assert answer.scale == max(scale, 1.0)
    drawn, true = answer.probabilities[1] > 127, image[..., 0] > 127
    assert (drawn & true).sum() / (drawn | true).sum() > 0.93
    ys, xs = np.nonzero(drawn)
    assert (xs.mean(), ys.mean()) == pytest.approx((139.5, 124.5), abs=1.5)


def test_change_lies_on_the_pixels_of_the_pair_and_pairs_are_not_mixed_up(
    dense: DensePerceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    brightness(dense, monkeypatch)
    ground = np.zeros((150, 170, 3), np.uint8)
    squares = [(40, 30, 120, 110), (80, 60, 160, 140)]
    pairs = [white_square(150, 170, *square) for square in squares]
    answers = dense.answer([Query("detect_change", ground, after=after) for after in (*pairs, ground)])
    for answer, after in zip(answers, (*pairs, ground), strict=True):
        assert isinstance(answer, TileChange)
        drawn, true = answer.probabilities > 127, after[..., 0] > 127
        assert (drawn & true).sum() >= 0.93 * (drawn | true).sum()


def test_a_pair_without_its_other_tile_is_refused(dense: DensePerceiver) -> None:
    with pytest.raises(ValueError, match="shape of `image`"):
        dense.answer([Query("detect_change", picture(0), after=picture(1, 30, 30))])


def test_thresholds_are_those_of_the_nearest_concept_and_scores_are_calibrated(dense: DensePerceiver) -> None:
    dense.calibration = DenseCalibration(
        detect={"default": 0.3, "ship": 0.5},
        mask={"default": 0.4, "road": 0.6},
        change={"default": 0.5, "coarse": 0.2, "fine": 0.7},
        box_confidence={"default": Logistic(2.0, 0.5)},
    )
    image = picture(0)
    queries = [Query("ground", image, text=text) for text in ("ship", "boat", "windmill")]
    queries += [Query("detect_change", image, after=image, gsd_m=gsd_m) for gsd_m in (None, 10, 0.5)]
    queries += [Query("segment", image, labels=("road", "windmill"))]
    *objects, anywhere, coarse, fine, masks = dense.answer(queries)
    sure = [float(torch.sigmoid(2 * torch.logit(torch.tensor(raw)) + 0.5)) for raw in (0.5, 0.5, 0.3)]
    for answer, threshold, known in zip(objects, sure, (True, True, False), strict=True):
        assert isinstance(answer, TileObjects)
        assert (answer.threshold, answer.known) == (pytest.approx(threshold), known)
        assert answer.scores == sorted(answer.scores, reverse=True)
        assert all(score >= FLOOR for score in answer.scores)
    for answer, threshold in ((anywhere, 0.5), (coarse, 0.2), (fine, 0.7)):
        assert isinstance(answer, TileChange)
        assert answer.threshold == threshold
    assert isinstance(masks, TileMasks)
    assert (masks.thresholds, masks.known) == ([0.6, 0.4], [True, False])


def test_a_kind_of_change_that_cannot_be_told_apart_is_said(perceiver: Perceiver) -> None:
    (warning,) = perceiver.warnings(PerceiveRequest(task="detect_change", text="new buildings"))
    assert "not one kind of change from another" in warning
    assert perceiver.warnings(PerceiveRequest(task="detect_change")) == []


def test_a_checkpoint_without_the_branch_says_what_it_can_do(debug_weights: Path) -> None:
    words_only = Perceiver.load(debug_weights)
    assert words_only.tasks == ("caption", "vqa", "classify")
    words_only.warm_up()
    with pytest.raises(TaskNotServed, match=r"'debug' has no part for ground, it serves caption, vqa, classify"):
        words_only.answer([Query("caption", picture(0)), Query("ground", picture(0), text="ship")])


def test_every_dense_task_names_its_token_and_expert(perceiver: Perceiver) -> None:
    perceiver.warm_up()
    assert perceiver.tasks == ("caption", "vqa", "classify", "ground", "segment", "detect_change")
    assert perceiver.route("ground") == ("[VG]", "region")
    assert perceiver.route("segment") == ("[SEG]", "pixel")
    assert perceiver.route("detect_change") == ("[CCD]", "pixel")


def test_a_huge_look_is_made_coarser() -> None:
    image = np.broadcast_to(np.uint8(0), (2048, 2048, 3))
    assert bounded(1.5, image) ** 2 * 2048**2 == pytest.approx(MAX_LOOK_PIXELS)
    assert bounded(0.5, image) == 0.5


class TestWords:
    """The sentence encoder of the shipped weights parts what training taught from what it did not."""

    @pytest.fixture(scope="class")
    @classmethod
    def phrases(cls) -> KnownPhrases:
        return KnownPhrases(Perceiver.load(DEFAULT_WEIGHTS).sentences.vectors)

    def test_words_that_no_training_used_are_known(self, phrases: KnownPhrases) -> None:
        read = phrases.read(every_phrase(held_out=True))
        assert sum(meaning.known for meaning in read.values()) >= 41
        assert (read["vessels"].concept, read["highway"].concept, read["flooded area"].concept) == (
            "ship", "road", "water",
        )  # fmt: skip

    def test_things_that_no_training_showed_are_not(self, phrases: KnownPhrases) -> None:
        others = ["giraffe", "tennis courts", "satellite dish", "asdfgh", "vineyard", "Wind Turbines", "iceberg"]
        assert not any(meaning.known for meaning in phrases.read([*DISTRACTORS, *others]).values())

    def test_left_out_in_turn_they_are_not_known_either(self, phrases: KnownPhrases) -> None:
        read = phrases.read(DISTRACTORS)
        known = []
        for i, name in enumerate(DISTRACTORS):
            rest = object.__new__(KnownPhrases)
            rest.__dict__.update(phrases.__dict__)
            rest._absent = torch.cat((phrases._absent[:i], phrases._absent[i + 1 :]))
            rest._embed = lambda _, vector=read[name].vector: vector[None]
            known += [name for meaning in rest.read([name]).values() if meaning.known]
        assert known == []
