"""Measures of boxes and masks against cases worked out by hand, and against pycocotools where it is installed."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from model_server.evaluation.dense_metrics import (
    ImageBoxes,
    ProbabilityCounts,
    average_precision,
    best_f1,
    boundary_f1,
    detection_f1,
    iou_matrix,
    mask_scores,
    mean_average_precision,
    steady_threshold,
)

BOX = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]


def image(boxes: list[list[float]], scores: list[float], truth: list[list[float]]) -> ImageBoxes:
    return ImageBoxes(np.array(boxes).reshape(-1, 4), np.array(scores), np.array(truth).reshape(-1, 4))


def random_images(seed: int, n: int = 12) -> list[ImageBoxes]:
    """Noisy copies of true boxes, some missed, some invented, scores with ties."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(n):
        corner = rng.uniform(0, 200, (rng.integers(0, 9), 2))
        truth = np.concatenate((corner, corner + rng.uniform(8, 60, corner.shape)), 1)
        kept = truth[rng.random(len(truth)) < 0.8]
        noisy = kept + np.clip(rng.normal(0, 2, kept.shape), -3, 3)
        other = rng.uniform(0, 200, (rng.integers(0, 5), 2))
        boxes = np.concatenate((noisy, np.concatenate((other, other + 30), 1)))
        images.append(ImageBoxes(boxes, rng.integers(1, 30, len(boxes)) / 30, truth))
    return images


def test_iou_of_boxes_that_share_a_quarter_side() -> None:
    assert iou_matrix(np.array([BOX]), np.array([[5.0, 5.0, 15.0, 15.0], FAR])).tolist() == [[25 / 175, 0.0]]


def test_a_perfect_detector_has_ap_one_and_a_blind_one_zero() -> None:
    truth = [BOX, FAR]
    assert average_precision([image(truth, [0.9, 0.8], truth)]) == pytest.approx(1.0)
    assert average_precision([image([], [], truth)]) == 0.0


def test_ap_of_a_hit_a_miss_and_a_late_hit_is_that_of_the_interpolated_curve() -> None:
    # precision 1 up to recall 1/2, then 2/3: 51 of 101 recalls at 1, 50 at 2/3
    found = image([BOX, [100, 100, 110, 110], FAR], [0.9, 0.8, 0.7], [BOX, FAR])
    assert average_precision([found]) == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_second_box_on_one_object_is_a_false_one() -> None:
    twice = image([BOX, BOX], [0.9, 0.8], [BOX])
    assert detection_f1([twice]).precision == 0.5
    assert detection_f1([twice], threshold=0.85).f1 == 1.0


def test_ap_counts_only_the_best_boxes_of_an_image() -> None:
    found = image([FAR, BOX], [0.9, 0.8], [BOX])
    assert average_precision([found], max_detections=1) == 0.0
    assert average_precision([found], max_detections=2) == pytest.approx(0.5)


def test_ap_without_any_true_box_is_not_a_number() -> None:
    assert np.isnan(average_precision([image([BOX], [0.5], [])]))


def test_a_threshold_leaves_out_the_false_boxes_below_it() -> None:
    found = image([BOX, FAR, [100, 0, 110, 10]], [0.9, 0.7, 0.2], [BOX, FAR])
    assert best_f1([found]) == 1.0
    assert steady_threshold([found]) == pytest.approx(0.7)


def test_a_threshold_stands_in_the_middle_of_those_that_are_as_good_and_not_at_the_brink() -> None:
    def row(hits: str) -> ImageBoxes:
        boxes = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(len(hits))]
        scores = [round(0.9 - 0.1 * i, 1) for i in range(len(hits))]
        return image(boxes, scores, [box for box, hit in zip(boxes, hits, strict=True) if hit == "x"])

    # F1 with each as the threshold: .33, .57, .75, .89, 1, .91, .83, .77; where all is right there is no error
    assert steady_threshold([row("xxxxx---")]) == pytest.approx(0.5)
    # .40, .33, .57, .50, .67, .60, .73 of four objects: the last three are within the error of .22
    assert best_f1([row("x-x-x-x")]) == pytest.approx(8 / 11)
    assert steady_threshold([row("x-x-x-x")]) == pytest.approx((0.5 + 0.3) / 2)


def test_where_nothing_is_found_no_score_is_enough() -> None:
    nothing = image([], [], [BOX])
    assert (best_f1([nothing]), steady_threshold([nothing])) == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_ap_equals_pycocotools(seed: int) -> None:
    coco_module = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from pycocotools.cocoeval import COCOeval  # pyright: ignore[reportMissingImports] (of an extra)

    def annotation(box: np.ndarray, number: int, which: int) -> dict:
        x1, y1, x2, y2 = (float(v) for v in box)
        return {"id": number, "image_id": which, "category_id": 1, "iscrowd": 0, "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1)}  # fmt: skip

    images = random_images(seed)
    truth = [(i, b) for i, entry in enumerate(images) for b in entry.truth]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = {"images": [{"id": i} for i in range(len(images))], "categories": [{"id": 1, "name": "x"}],
                        "annotations": [annotation(b, n + 1, i) for n, (i, b) in enumerate(truth)]}  # fmt: skip
        coco.createIndex()
        found = coco.loadRes(
            [annotation(b, 0, i) | {"score": float(s)} for i, entry in enumerate(images)
             for b, s in zip(entry.boxes, entry.scores, strict=True)]
        )  # fmt: skip
        judge = COCOeval(coco, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert average_precision(images, 0.5) == pytest.approx(judge.stats[1], abs=1e-9)
    assert average_precision(images, 0.75) == pytest.approx(judge.stats[2], abs=1e-9)
    assert mean_average_precision(images) == pytest.approx(judge.stats[0], abs=1e-9)


def test_mask_scores_count_pixels_of_all_images_together() -> None:
    truth = [np.array([[1, 1, 0, 0]], bool), np.array([[0, 0, 0, 0]], bool)]
    said = [np.array([[1, 0, 1, 0]], bool), np.array([[1, 0, 0, 0]], bool)]
    scores = mask_scores(said, truth)
    assert (scores.precision, scores.recall, scores.f1, scores.iou) == (1 / 3, 1 / 2, 2 / 5, 1 / 4)
    known = [np.array([[1, 1, 0, 0]], bool), np.zeros((1, 4), bool)]
    assert mask_scores(said, truth, known).precision == 1.0


def test_counts_by_probability_give_the_scores_of_every_threshold() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((64, 64)) < 0.3
    probability = np.clip(rng.normal(0.4 + 0.3 * truth, 0.15), 0, 1)
    counts = ProbabilityCounts()
    counts.add(probability, truth)
    for threshold in (0.25, 0.5, 0.75):
        assert counts.at(threshold) == mask_scores([probability >= threshold], [truth])
    best, scores = counts.best()
    assert scores.f1 >= max(counts.at(t).f1 for t in (0.25, 0.5, 0.75))
    assert 0.4 < best < 0.7


def test_boundary_f1_forgives_a_shift_within_the_tolerance_only() -> None:
    truth, near, far = (np.zeros((100, 100), bool) for _ in range(3))
    truth[20:60, 20:60] = True
    near[21:61, 20:60] = True
    far[26:66, 20:60] = True
    assert boundary_f1([truth], [truth]) == 1.0
    assert boundary_f1([near], [truth]) == 1.0
    assert boundary_f1([far], [truth]) < 0.7
    assert boundary_f1([np.zeros_like(truth)], [truth]) == 0.0
