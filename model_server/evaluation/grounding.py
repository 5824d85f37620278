"""Boxes of a phrase against all labelled boxes (protocol `map`), of things that the labels deny (`absent`), and of
ships where no box is labelled (`elsewhere`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from model_server.evaluation.asking import Model
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.dense_metrics import (
    ImageBoxes,
    average_precision,
    detection_f1,
    from_counts,
    match_boxes,
    mean_average_precision,
)
from model_server.evaluation.elsewhere import evaluate_elsewhere
from model_server.evaluation.labelled import affirmed, box_labels, denied, other_words, true_boxes, words_for
from model_server.evaluation.looking import as_arrays, find
from model_server.evaluation.results import Controls, Results, Row
from model_server.protocol import TileObjects
from model_server.text.concepts import DISTRACTORS
from model_server.training.records import Record

AP_IOUS = {"ap50": 0.5, "ap75": 0.75, "ap30": 0.3}
F1_IOUS = {"f1_50": 0.5, "f1_25": 0.25, "f1_40": 0.4}
MEASURES = ("ap50", "ap75", "ap50_95", "ap30", "f1_50", "f1_25", "f1_40")

Figures = dict[str, float]  # metric -> value; `metric/label` for one label


def evaluate_grounding(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the detection rows of one set, where it has boxes, and its hallucination rates, where labels deny things."""
    records = [record for record in data.records if len(record.images) == 1]
    labels = [label for label in box_labels(data) if any(len(true_boxes(record, label)) for record in records)]
    if not labels:
        results.notes.append(f"{data.name}: no boxes in split {data.split!r}, so no detection row")
    if labels:
        _detections(model, data, records, labels, results)
    if any(denied(record) for record in records):
        _denials(model, data, records, results)
    evaluate_elsewhere(model, data, records, results)


# --- boxes that are there --------------------------------------------------------------------------------------------


def _detections(model: Model, data: EvaluatedSet, records: Sequence[Record], labels: Sequence[str],
                results: Results) -> None:  # fmt: skip
    # All that is asked about an image by any part of this task is asked at once, so that it is encoded once.
    texts = [words_for(label) for label in labels]
    others = {label: other_words(label) for label in labels if other_words(label)}
    unusual = [text for words in others.values() for text in words]
    find(model, data, records, lambda record: [*texts, *unusual, *denied(record), *affirmed(record)], "objects")
    find(model, data, records, lambda _: texts, "objects, blind", blind=True)
    ours = box_figures({label: found_boxes(data, records, label, words_for(label)) for label in labels})
    controls = {
        "blind": box_figures({label: found_boxes(data, records, label, words_for(label), True) for label in labels}),
        "constant": _constant(data, records, labels),
    }
    counts = {label: sum(len(true_boxes(record, label)) for record in records) for label in labels}
    results.rows += _rows(data, "map", ours, counts, controls)
    if others:
        most = max(map(len, others.values()))
        ways = [{label: words[i % len(words)] for label, words in others.items()} for i in range(most)]
        by_words = [
            box_figures({label: found_boxes(data, records, label, text) for label, text in way.items()}) for way in ways
        ]
        mean = {metric: float(np.mean([figures[metric] for figures in by_words])) for metric in by_words[0]}
        usual = box_figures({label: found_boxes(data, records, label, words_for(label)) for label in others})
        counts = {label: counts[label] for label in others}
        results.rows += _rows(data, "map/held-out-phrasing", mean, counts, {"label_words": usual})


def found_boxes(data: EvaluatedSet, records: Sequence[Record], label: str, text: str, blind: bool = False
                ) -> tuple[list[ImageBoxes], list[ImageBoxes]]:  # fmt: skip
    """What was answered to one phrase beside the label's true boxes: every box, and those worth giving."""
    everything, given = [], []
    for record in records:
        boxes, scores, keep = as_arrays(data.found[record.id, text, blind])
        truth = true_boxes(record, label)
        everything.append(ImageBoxes(boxes, scores, truth))
        given.append(ImageBoxes(boxes[keep], scores[keep], truth))
    return everything, given


def box_figures(found: Mapping[str, tuple[list[ImageBoxes], list[ImageBoxes]]]) -> Figures:
    """Every measure for each label; over labels AP is the mean, as mAP is, and F1 is of all their boxes together."""
    out: Figures = {}
    hits = {metric: np.zeros(3) for metric in F1_IOUS}
    for label, (everything, given) in found.items():
        for metric, iou in AP_IOUS.items():
            out[f"{metric}/{label}"] = average_precision(everything, iou)
        out[f"ap50_95/{label}"] = mean_average_precision(everything)
        for metric, iou in F1_IOUS.items():
            out[f"{metric}/{label}"] = detection_f1(given, iou).f1
            hits[metric] += _counts(given, iou)
    for metric in (*AP_IOUS, "ap50_95"):
        out[metric] = float(np.mean([out[f"{metric}/{label}"] for label in found]))
    return out | {metric: from_counts(*counts).f1 for metric, counts in hits.items()}


def _counts(images: Sequence[ImageBoxes], iou: float) -> np.ndarray:
    """Boxes that hit, boxes that do not, and true boxes missed: [3]."""
    true = sum(int(match_boxes(image, iou, len(image.boxes))[1].sum()) for image in images)
    given, there = sum(len(image.boxes) for image in images), sum(len(image.truth) for image in images)
    return np.array([true, given - true, there - true])


def _constant(data: EvaluatedSet, records: Sequence[Record], labels: Sequence[str]) -> Figures | None:
    """The figures of the boxes of one training image, stretched onto every image: that of the median number of them."""
    found = {}
    for label in labels:
        train = [record for record in data.train if len(true_boxes(record, label))]
        if not train:
            return None
        usual = sorted(train, key=lambda record: (len(true_boxes(record, label)), record.id))[len(train) // 2]
        shares = true_boxes(usual, label) / [usual.width, usual.height, usual.width, usual.height]
        images = [
            ImageBoxes(shares * [r.width, r.height, r.width, r.height], np.ones(len(shares)), true_boxes(r, label))
            for r in records
        ]
        found[label] = (images, images)
    return box_figures(found)


def _rows(data: EvaluatedSet, protocol: str, ours: Figures, counts: Mapping[str, int],
          controls: Mapping[str, Figures | None]) -> list[Row]:  # fmt: skip
    rows = []
    for suffix in ("", *(f"/{label}" for label in counts)):
        n = counts[suffix[1:]] if suffix else sum(counts.values())
        for metric in (f"{name}{suffix}" for name in MEASURES):
            beside: Controls = {name: figures[metric] if figures else None for name, figures in controls.items()}
            rows.append(Row(data.name, data.split, "ground", protocol, metric, ours[metric], n, beside))
    return rows


# --- things that are not there ---------------------------------------------------------------------------------------


def _denials(model: Model, data: EvaluatedSet, records: Sequence[Record], results: Results) -> None:
    """Share of images where something is asserted that the labels deny, beside the share where they affirm it."""
    find(model, data, records, lambda record: [*denied(record), *affirmed(record)], "denied objects")

    def asserted(record: Record, text: str) -> bool:
        return _asserts(data.found[record.id, text, False])

    def add(metric: str, false: Sequence[bool], true: Sequence[bool]) -> None:
        controls = {"present": float(np.mean(true)) if true else None}
        value = float(np.mean(false))
        results.rows.append(Row(data.name, data.split, "ground", "absent", metric, value, len(false), controls))

    false, true = ([(r, text) for r in records for text in phrases(r)] for phrases in (denied, affirmed))
    texts = sorted({text for _, text in false})
    add(
        "hallucination",
        [any(asserted(record, text) for text in denied(record)) for record in records if denied(record)],
        [any(asserted(record, text) for text in affirmed(record)) for record in records if affirmed(record)],
    )
    add("hallucination/per_question", *([asserted(r, t) for r, t in pairs if t in texts] for pairs in (false, true)))
    never = [asserted(record, text) for record, text in false if text in DISTRACTORS]
    if never:
        add("hallucination/distractors", never, [])
    for text in (text for text in texts if text not in DISTRACTORS):
        metric = f"hallucination/{text.replace(' ', '_')}"
        add(metric, *([asserted(r, t) for r, t in pairs if t == text] for pairs in (false, true)))


def _asserts(answer: TileObjects) -> bool:
    """Whether an answer claims an object: one of a known phrase that reaches the threshold."""
    return answer.known and any(score >= answer.threshold for score in answer.scores)
