"""Dense questions about one image at a time, so that it is encoded once, and the merging where it was cut.

An image of at most 2048 pixels a side goes to the model whole, as the wire takes it. A larger one is cut into windows
that overlap: boxes are merged by non-maximum suppression, probabilities are averaged where windows overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import TypeVar

import numpy as np

from model_server.evaluation.asking import Answering, mean_colour, progress
from model_server.evaluation.dataset import EvaluatedSet
from model_server.perceiver import Query
from model_server.protocol import MAX_CLASSES, MAX_TILE_SIDE, Modality, TileChange, TileMasks, TileObjects
from model_server.training.records import Record, load_image

OVERLAP = 256  # pixels that neighbouring windows share
SAME = 0.6  # of the smaller box's area, from which two boxes of overlapping windows are one object
RIM = 2  # pixels from a window's edge, where a box ends that was cut there

Dense = TypeVar("Dense", TileObjects, TileMasks, TileChange)
Window = tuple[int, int, int, int]


def windows(width: int, height: int, side: int = MAX_TILE_SIDE, overlap: int = OVERLAP) -> list[Window]:
    """x1, y1, x2, y2 of windows of at most `side` pixels that cover the image, row by row."""

    def spans(length: int) -> list[tuple[int, int]]:
        n = 1 if length <= side else -(-(length - overlap) // (side - overlap))
        size = min(length, side)
        return [(start, start + size) for start in ((length - size) * i // max(n - 1, 1) for i in range(n))]

    return [(x1, y1, x2, y2) for (y1, y2), (x1, x2) in product(spans(height), spans(width))]


def look(model: Answering, queries: Sequence[Query], kind: type[Dense], side: int = MAX_TILE_SIDE) -> list[Dense]:
    """Answers of one kind to queries about one image (or pair), in their order.

    Raises TypeError when the model answers with another kind than `kind`.
    """
    height, width = queries[0].image.shape[:2]
    parts: list[tuple[Window, list[Dense]]] = []
    for window in windows(width, height, side):
        answers: list[Dense] = []
        for answer in model.answer(_cut(queries, window)):
            if not isinstance(answer, kind):
                raise TypeError(f"asked for {kind.__name__}, the model answered {type(answer).__name__}")
            answers.append(answer)
        parts.append((window, answers))
    if len(parts) == 1:
        return parts[0][1]
    return [_merge([(window, answers[i]) for window, answers in parts], height, width) for i in range(len(queries))]


def _cut(queries: Sequence[Query], window: Window) -> list[Query]:
    """The queries about a window. Those about one array still share one, which is then encoded once."""
    x1, y1, x2, y2 = window
    if queries[0].image.shape[:2] == (y2 - y1, x2 - x1):
        return list(queries)
    arrays = {id(a): a for q in queries for a in (q.image, q.after) if a is not None}
    pieces = {key: np.ascontiguousarray(a[y1:y2, x1:x2]) for key, a in arrays.items()}
    return [
        replace(q, image=pieces[id(q.image)], after=None if q.after is None else pieces[id(q.after)]) for q in queries
    ]


def _merge(parts: Sequence[tuple[Window, Dense]], height: int, width: int) -> Dense:
    first = parts[0][1]
    if isinstance(first, TileObjects):
        return merge_objects([(w, a) for w, a in parts if isinstance(a, TileObjects)])
    planes = [(w, a.probabilities) for w, a in parts if not isinstance(a, TileObjects)]
    total = np.zeros((*planes[0][1].shape[:-2], height, width), np.float32)
    seen = np.zeros((height, width), np.float32)
    for (x1, y1, x2, y2), plane in planes:
        total[..., y1:y2, x1:x2] += plane
        seen[y1:y2, x1:x2] += 1
    return first.model_copy(update={"probabilities": np.rint(total / seen).astype(np.uint8)})


def merge_objects(parts: Sequence[tuple[Window, TileObjects]]) -> TileObjects:
    """Boxes that end at an edge between windows are taken last: a neighbour has seen more of the object."""
    right, bottom = (max(window[i] for window, _ in parts) for i in (2, 3))
    shifted, partial = [], []
    for (x1, y1, x2, y2), answer in parts:
        boxes = np.reshape(answer.boxes, (-1, 4)) + np.array([x1, y1, x1, y1])
        inner = np.array([x1 > 0, y1 > 0, x2 < right, y2 < bottom])
        shifted.append(boxes)
        partial.append((inner & (np.abs(boxes - [x1, y1, x2, y2]) < RIM)).any(1))
    boxes, cut = np.concatenate(shifted), np.concatenate(partial)
    scores = np.array([score for _, answer in parts for score in answer.scores], np.float64)
    kept: list[int] = []
    for i in np.lexsort((-scores, cut)):
        if not kept or _overlap(boxes[i], boxes[kept]).max() < SAME:
            kept.append(int(i))
    kept.sort(key=lambda i: -scores[i])
    merged = {
        "boxes": [tuple(box) for box in boxes[kept].tolist()],
        "scores": scores[kept].tolist(),
        "known": any(answer.known for _, answer in parts),
    }
    return parts[0][1].model_copy(update=merged)


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Shared area over that of the smaller box, float [N]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    areas = np.minimum((box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(1))
    return shared / np.maximum(areas, 1e-9)


def find(model: Answering, data: EvaluatedSet, records: Sequence[Record], phrases: Callable[[Record], Iterable[str]],
         title: str, blind: bool = False) -> None:  # fmt: skip
    """Ask for the objects of each record's phrases; `data.found` has the answers then, by id, phrase and blindness.

    What an earlier task has asked already is not asked again.
    """
    wanted = []
    for record in records:
        new = [text for text in dict.fromkeys(phrases(record)) if (record.id, text, blind) not in data.found]
        if new:
            wanted.append((record, new))
    for record, new in progress(wanted, f"{data.name} {title}", len(wanted)):
        image = shown(record, blind)
        queries = [Query("ground", image, text=text, gsd_m=record.gsd_m, modality=modality(record)) for text in new]
        for text, answer in zip(new, look(model, queries, TileObjects), strict=True):
            data.found[record.id, text, blind] = answer


def as_arrays(answer: TileObjects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes float64 [N, 4], scores [N], and bool [N]: the score reaches the answer's threshold."""
    scores = np.array(answer.scores, np.float64)
    return np.array(answer.boxes, np.float64).reshape(-1, 4), scores, scores >= answer.threshold


def outline(model: Answering, records: Sequence[Record], phrases: Callable[[Record], Sequence[str]], title: str,
            blind: bool = False) -> Iterator[tuple[Record, dict[str, np.ndarray]]]:  # fmt: skip
    """Each record with the mask, bool [H, W], of each of its phrases at the threshold that the answer names."""
    for record in progress(records, title, len(records)):
        texts = phrases(record)
        image = shown(record, blind)
        queries = [
            Query("segment", image, labels=tuple(texts[i : i + MAX_CLASSES]), gsd_m=record.gsd_m,
                  modality=modality(record))
            for i in range(0, len(texts), MAX_CLASSES)
        ]  # fmt: skip
        yield record, {
            label: plane / 255 >= threshold
            for answer in look(model, queries, TileMasks)
            for label, threshold, plane in zip(answer.labels, answer.thresholds, answer.probabilities, strict=True)
        }


def changed(model: Answering, record: Record, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where a pair is said to have changed, bool [H, W], at the threshold that the answer names."""
    query = Query("detect_change", before, after=after, gsd_m=record.gsd_m, modality=modality(record))
    (answer,) = look(model, [query], TileChange)
    return answer.probabilities / 255 >= answer.threshold


def shown(record: Record, blind: bool) -> np.ndarray:
    """The record's first image, or its mean colour alone."""
    image = load_image(record.images[0])
    return mean_colour(image) if blind else image


def modality(record: Record) -> Modality:
    """The record's modality as a query names it."""
    return "sar" if record.modality == "sar" else "optical"
