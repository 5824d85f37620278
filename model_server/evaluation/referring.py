"""Phrases for single objects, made from their boxes, and the one box answered to each (protocols `iou`, `vrsbench`).

A phrase is made only where the boxes leave no doubt what it means: "the largest ship" where the next in size is a
quarter smaller, "the car in the upper left" where that third of width and height holds one car and no other reaches
into it. The phrase is asked as it is, and the best box of the answer is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from model_server.evaluation.asking import Answering
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.dense_metrics import iou_matrix
from model_server.evaluation.labelled import box_labels, true_boxes, words_for
from model_server.evaluation.looking import find
from model_server.evaluation.results import Results, Row
from model_server.protocol import TileObjects
from model_server.text.questions import singular
from model_server.training.records import Record

PHRASES = 6  # of one image at most
CLEARLY = 1.25  # how much larger, or further, than the next an object must be
SIDES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}  # axis, direction
PLACES = {
    "upper left": (0, 0), "upper right": (2, 0), "lower left": (0, 2), "lower right": (2, 2), "centre": (1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A phrase that means one box of an image: float64 [4]."""

    record: Record
    phrase: str
    label: str
    box: np.ndarray


def references(record: Record, labels: Iterable[str]) -> list[Reference]:
    """At most six phrases about an image, the same in every run."""
    out = [
        Reference(record, phrase, label, boxes[i])
        for label in labels
        for boxes in [true_boxes(record, label)]
        for phrase, i in _phrases(boxes, singular(words_for(label)), record.width, record.height)
    ]
    if len(out) > PHRASES:
        out = [out[i] for i in sorted(Random(record.id).sample(range(len(out)), PHRASES))]
    return out


def _phrases(boxes: np.ndarray, noun: str, width: int, height: int) -> list[tuple[str, int]]:
    """Every phrase without doubt, with the row of its box."""
    if len(boxes) == 1:
        return [(f"the {noun}", 0)]
    if not len(boxes):
        return []
    out = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = np.argsort(areas, kind="stable")
    if areas[order[-1]] >= CLEARLY * areas[order[-2]]:
        out.append((f"the largest {noun}", int(order[-1])))
    if areas[order[1]] >= CLEARLY * areas[order[0]]:
        out.append((f"the smallest {noun}", int(order[0])))
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    for name, (axis, sign) in SIDES.items():
        along = np.sort(sign * middles[:, axis])
        if along[1] - along[0] >= 0.05 * (width, height)[axis]:
            out.append((f"the {name} {noun}", int((sign * middles[:, axis]).argmin())))
    third = np.array([width, height]) / 3
    for name, place in PLACES.items():
        low: np.ndarray = np.array(place) * third
        reaching = (boxes[:, :2] < low + third).all(1) & (boxes[:, 2:] > low).all(1)
        i = int(reaching.argmax())
        if reaching.sum() == 1 and (middles[i] >= low).all() and (middles[i] < low + third).all():
            out.append((f"the {noun} in the {name}", i))
    return out


def evaluate_referring(model: Answering, data: EvaluatedSet, results: Results) -> None:
    """Add the referring rows of one set with boxes: `acc50` and `acc70`, strict and as VRSBench measures."""
    labels = box_labels(data)
    asked = [ref for record in data.records if len(record.images) == 1 for ref in references(record, labels)]
    if not asked:
        results.notes.append(f"{data.name}: no boxes to refer to in split {data.split!r}, so no referring row")
        return
    records = list({ref.record.id: ref.record for ref in asked}.values())
    of = {record.id: [ref for ref in asked if ref.record is record] for record in records}
    # The same without the phrase's relation tells how much of it is understood.
    plain = {record.id: list(dict.fromkeys(words_for(ref.label) for ref in of[record.id])) for record in records}
    find(model, data, records, lambda r: [*(ref.phrase for ref in of[r.id]), *plain[r.id]], "phrases")
    find(model, data, records, lambda r: plain[r.id], "phrases, blind", blind=True)
    constant = _constant(data)
    answers: dict[str, list[np.ndarray | None]] = {
        "ours": [_best(data.found[ref.record.id, ref.phrase, False]) for ref in asked],
        "label_only": [_best(data.found[ref.record.id, words_for(ref.label), False]) for ref in asked],
        "blind": [_best(data.found[ref.record.id, words_for(ref.label), True]) for ref in asked],
        "constant": [constant(ref) for ref in asked],
    }
    for protocol, measure in (("iou", strict_iou), ("vrsbench", vrsbench_iou)):
        overlaps = {name: _overlaps(asked, boxes, measure) for name, boxes in answers.items()}
        for metric, least in (("acc50", 0.5), ("acc70", 0.7)):
            value, *rest = (float((each >= least).mean()) for each in overlaps.values())
            controls: dict[str, float | None] = dict(zip(("label_only", "blind", "constant"), rest, strict=True))
            if not data.train:
                controls["constant"] = None
            results.rows.append(Row(data.name, data.split, "refer", protocol, metric, value, len(asked), controls))


def strict_iou(box: np.ndarray, truth: np.ndarray, record: Record) -> float:
    """IoU in pixels of the source image."""
    return float(iou_matrix(box, truth)[0, 0])


def vrsbench_iou(box: np.ndarray, truth: np.ndarray, record: Record) -> float:
    """IoU of boxes as integers in 0..100 of the image's sides, each pixel row and column counted: w = x2 - x1 + 1."""
    size = np.array([record.width, record.height] * 2)
    a, b = (np.clip(np.rint(100 * corners / size), 0, 100) for corners in (box, truth))
    shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + 1, 0, None).prod()
    return float(shared / ((a[2:] - a[:2] + 1).prod() + (b[2:] - b[:2] + 1).prod() - shared))


def _best(answer: TileObjects) -> np.ndarray | None:
    return np.array(answer.boxes[int(np.argmax(answer.scores))]) if answer.boxes else None


def _overlaps(asked: Sequence[Reference], boxes: Sequence[np.ndarray | None],
              measure: Callable[[np.ndarray, np.ndarray, Record], float]) -> np.ndarray:  # fmt: skip
    return np.array(
        [0.0 if box is None else measure(box, ref.box, ref.record) for ref, box in zip(asked, boxes, strict=True)]
    )


def _constant(data: EvaluatedSet) -> Callable[[Reference], np.ndarray | None]:
    """The median box of the label in training, as shares of the image's sides."""
    medians = {}
    for label in box_labels(data):
        shares = [
            true_boxes(record, label) / [record.width, record.height, record.width, record.height]
            for record in data.train
        ]
        if sum(map(len, shares)):
            medians[label] = np.median(np.concatenate(shares), axis=0)

    def box(ref: Reference) -> np.ndarray | None:
        shares = medians.get(ref.label)
        return None if shares is None else shares * np.array([ref.record.width, ref.record.height] * 2)

    return box
