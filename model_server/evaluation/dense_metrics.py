"""Measures of boxes and masks: average precision as pycocotools computes it, F1, IoU, boundary F1, binary F1.

Every function takes the raw predictions of all images at once; nothing is averaged over images. Boxes are float
[N, 4] as x1, y1, x2, y2 in pixels, masks bool [H, W].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0, 1, 101)
COCO_IOUS = tuple(float(v) for v in np.linspace(0.5, 0.95, 10))


@dataclass(frozen=True)
class ImageBoxes:
    """One image: predicted boxes [N, 4] with scores [N], and the true boxes [M, 4]."""

    boxes: np.ndarray
    scores: np.ndarray
    truth: np.ndarray


def iou_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of each box of [N, 4] with each of [M, 4] -> [N, M]; 0 where both are empty."""
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = (np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (a, b))
    union = area_a[:, None] + area_b[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def match_boxes(image: ImageBoxes, iou: float, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and hits of one image's best `limit` boxes: each takes the free true box it overlaps most."""
    order = np.argsort(-image.scores, kind="mergesort")[:limit]
    overlaps = iou_matrix(image.boxes[order], image.truth)
    free = np.ones(len(image.truth), bool)
    hits = np.zeros(len(order), bool)
    for i, row in enumerate(overlaps):
        if not free.any():
            break
        best = len(row) - 1 - int(np.where(free, row, -1.0)[::-1].argmax())  # of equal ones the last, as in pycocotools
        if row[best] >= min(iou, 1 - 1e-10):
            hits[i], free[best] = True, False
    return image.scores[order], hits


def average_precision(images: Sequence[ImageBoxes], iou: float = 0.5, max_detections: int = 100) -> float:
    """AP at one IoU as `pycocotools.COCOeval` computes it: 101 recalls, precision made monotonous, the best
    `max_detections` boxes of an image. nan where there is no true box.
    """
    positives = sum(len(image.truth) for image in images)
    if not positives:
        return float("nan")
    matched = [match_boxes(image, iou, max_detections) for image in images]
    scores = np.concatenate([s for s, _ in matched])
    hits = np.concatenate([h for _, h in matched])[np.argsort(-scores, kind="mergesort")]
    true, false = np.cumsum(hits), np.cumsum(~hits)
    recall = true / positives
    precision = true / np.maximum(true + false, np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(places, len(precision))].mean())


def mean_average_precision(images: Sequence[ImageBoxes], max_detections: int = 100) -> float:
    """AP@[.5:.95]: the mean over ten IoUs."""
    return float(np.mean([average_precision(images, iou, max_detections) for iou in COCO_IOUS]))


@dataclass(frozen=True)
class Scores:
    """Precision, recall, F1 and IoU of a yes/no decision, from counts."""

    precision: float
    recall: float
    f1: float
    iou: float


def from_counts(true: float, false: float, missed: float) -> Scores:
    """0 where a ratio is of nothing."""

    def ratio(a: float, b: float) -> float:
        return float(a / b) if b else 0.0

    return Scores(
        ratio(true, true + false), ratio(true, true + missed), ratio(2 * true, 2 * true + false + missed),
        ratio(true, true + false + missed),
    )  # fmt: skip


def detection_f1(images: Sequence[ImageBoxes], iou: float = 0.5, threshold: float = 0.0) -> Scores:
    """Of all boxes with at least this score, matched greedily by score. `Scores.iou` counts boxes, not pixels."""
    true = false = missed = 0
    for image in images:
        keep = image.scores >= threshold
        kept = ImageBoxes(image.boxes[keep], image.scores[keep], image.truth)
        hits = int(match_boxes(kept, iou, len(kept.boxes))[1].sum())
        true, false, missed = true + hits, false + len(kept.boxes) - hits, missed + len(image.truth) - hits
    return from_counts(true, false, missed)


def best_f1(images: Sequence[ImageBoxes], iou: float = 0.5) -> float:
    """The highest F1 that a threshold gives."""
    return float(_f1_curve(images, iou)[1].max(initial=0.0))


def steady_threshold(images: Sequence[ImageBoxes], iou: float = 0.5) -> float:
    """The score in the middle of those around the best threshold whose F1 is within a standard error of its own.

    With few objects the very best threshold is a matter of chance, and may lie at a brink.
    """
    scores, f1 = _f1_curve(images, iou)
    if not len(scores):
        return 1.0
    best = int(f1.argmax())
    error = math.sqrt(f1[best] * (1 - f1[best]) / sum(len(image.truth) for image in images))
    (worse,) = np.nonzero(f1 < f1[best] - error)
    first = int(worse[worse < best].max(initial=-1)) + 1
    last = int(worse[worse > best].min(initial=len(scores))) - 1
    return float(scores[first] + scores[last]) / 2


def _f1_curve(images: Sequence[ImageBoxes], iou: float) -> tuple[np.ndarray, np.ndarray]:
    """All scores, highest first, and the F1 with each as the threshold."""
    matched = [match_boxes(image, iou, len(image.boxes)) for image in images]
    positives = sum(len(image.truth) for image in images)
    scores, hits = np.concatenate([s for s, _ in matched]), np.concatenate([h for _, h in matched])
    order = np.argsort(-scores, kind="mergesort")
    true = np.cumsum(hits[order])
    return scores[order], 2 * true / (np.arange(1, len(order) + 1) + positives)


def mask_scores(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray],
                known: Sequence[np.ndarray] | None = None) -> Scores:  # fmt: skip
    """Protocol `binary`: counts over all pixels of all images; `known` masks the pixels that count."""
    tally = MaskTally()
    for i, (p, t) in enumerate(zip(predicted, truth, strict=True)):
        where = np.ones(t.shape, bool) if known is None else known[i]
        tally.add(p & where, t & where)
    return tally.scores()


@dataclass
class MaskTally:
    """Pixels right, false and missed of one yes/no mask, and all pixels, image after image."""

    true: int = 0
    false: int = 0
    missed: int = 0
    total: int = 0

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Masks bool [H, W] of one image."""
        both = int((predicted & truth).sum())
        self.true += both
        self.false += int(predicted.sum()) - both
        self.missed += int(truth.sum()) - both
        self.total += truth.size

    def scores(self) -> Scores:
        return from_counts(self.true, self.false, self.missed)


class ProbabilityCounts:
    """Histograms of probabilities on true and other pixels, from which every threshold's scores follow at once."""

    def __init__(self, bins: int = 200) -> None:
        self.bins = bins
        self.inside, self.outside = np.zeros(bins, np.int64), np.zeros(bins, np.int64)

    def add(self, probability: np.ndarray, truth: np.ndarray) -> None:
        """Probabilities 0..1 and truth, of the same shape."""
        place = np.minimum((probability * self.bins).astype(np.int64), self.bins - 1)
        self.inside += np.bincount(place[truth], minlength=self.bins)
        self.outside += np.bincount(place[~truth], minlength=self.bins)

    def at(self, threshold: float) -> Scores:
        """Scores of `probability >= threshold`, the threshold rounded to a bin's edge."""
        first = round(threshold * self.bins)
        true, false = int(self.inside[first:].sum()), int(self.outside[first:].sum())
        return from_counts(true, false, int(self.inside[:first].sum()))

    def best(self) -> tuple[float, Scores]:
        """The threshold of the highest F1 (which is that of the highest IoU, too) and its scores."""
        edges = [i / self.bins for i in range(1, self.bins)]
        threshold = max(edges, key=lambda t: self.at(t).f1)
        return threshold, self.at(threshold)


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a 4-neighbour outside it; the image's rim is no boundary."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """All pixels within `radius` (Euclidean) of the mask: row by row of the disc, each a run of pixels."""
    h, w = mask.shape
    out = np.zeros_like(mask)
    before = np.zeros((h, w + 2 * radius + 1), np.int32)  # how many pixels of the row lie left of each place
    np.cumsum(np.pad(mask, ((0, 0), (radius, radius))), axis=1, out=before[:, 1:])
    for dy in range(min(radius, h - 1) + 1):
        dx = math.isqrt(radius * radius - dy * dy)
        wide = before[:, radius + dx + 1 : radius + dx + 1 + w] > before[:, radius - dx : radius - dx + w]
        out[: h - dy] |= wide[dy:]
        out[dy:] |= wide[: h - dy]
    return out


@dataclass
class BoundaryTally:
    """Boundary F1 (Csurka et al. 2013; Perazzi et al. 2016): boundary pixels within `tolerance` of the image's diagonal
    of the other boundary, counted over all images.
    """

    tolerance: float = 0.0075
    predicted: int = 0
    predicted_near: int = 0
    true: int = 0
    true_near: int = 0

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Masks bool [H, W] of one image."""
        radius = max(1, round(self.tolerance * float(np.hypot(*truth.shape))))
        edge_p, edge_t = _boundary(predicted), _boundary(truth)
        self.predicted += int(edge_p.sum())
        self.true += int(edge_t.sum())
        if edge_p.any() and edge_t.any():
            self.predicted_near += int((edge_p & _dilate(edge_t, radius)).sum())
            self.true_near += int((edge_t & _dilate(edge_p, radius)).sum())

    def f1(self) -> float:
        """0 where either side has no boundary."""
        if not self.predicted_near or not self.true_near:
            return 0.0
        precision, recall = self.predicted_near / self.predicted, self.true_near / self.true
        return 2 * precision * recall / (precision + recall)


def boundary_f1(predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray], tolerance: float = 0.0075) -> float:
    """Boundary F1 of many images at once; see `BoundaryTally`."""
    tally = BoundaryTally(tolerance)
    for p, t in zip(predicted, truth, strict=True):
        tally.add(p, t)
    return tally.f1()
