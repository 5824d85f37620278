"""Counts of things (protocol `mae`): the boxes worth giving, and beside them what the model says when asked."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from model_server.evaluation.answering import answers_to
from model_server.evaluation.asking import Model
from model_server.evaluation.dataset import EvaluatedSet
from model_server.evaluation.labelled import box_labels, true_boxes, words_for
from model_server.evaluation.looking import as_arrays, find
from model_server.evaluation.results import Controls, Results, Row
from model_server.text.answers import normalise
from model_server.text.questions import plural, singular
from model_server.training.records import Record


def evaluate_counts(model: Model, data: EvaluatedSet, results: Results) -> None:
    """Add the counting rows of one set with boxes: mean absolute error and share of exact counts, all and by label."""
    records = [record for record in data.records if len(record.images) == 1]
    labels = [label for label in box_labels(data) if any(len(true_boxes(record, label)) for record in records)]
    if not labels:
        results.notes.append(f"{data.name}: no boxes to count in split {data.split!r}, so no counting row")
        return
    texts = [words_for(label) for label in labels]
    find(model, data, records, lambda _: texts, "objects to count")
    find(model, data, records, lambda _: texts, "objects to count, blind", blind=True)
    asked = [(record, _question(text)) for record in records for text in texts]
    said = answers_to(model, data, asked, f"{data.name} how many", blind=False)
    truth = np.array([[len(true_boxes(record, label)) for label in labels] for record in records])
    given = _given(data, records, texts, blind=False)
    controls = {
        "text": np.array([number(answer.answer) for answer in said]).reshape(truth.shape),
        "blind": _given(data, records, texts, blind=True),
        "median": _medians(data, labels, truth.shape),
    }
    for suffix, column in (("", slice(None)), *((f"/{label}", i) for i, label in enumerate(labels))):
        for metric, measure in (("mae", _mean_error), ("exact", _exact)):
            there = truth[:, column]
            ours = measure(given[:, column], there)
            beside: Controls = {
                name: None if guess is None else measure(guess[:, column], there) for name, guess in controls.items()
            }
            results.rows.append(Row(data.name, data.split, "count", "mae", metric + suffix, ours, there.size, beside))


def number(answer: str) -> float:
    """The first number in an answer; 0 where it has none, as in "no"."""
    found = re.search(r"\d+(\.\d+)?", normalise(answer))
    return float(found.group()) if found else 0.0


def _question(text: str) -> str:
    return f"How many {plural(singular(text))} are there?"


def _given(data: EvaluatedSet, records: Sequence[Record], texts: Sequence[str], blind: bool) -> np.ndarray:
    """Boxes that reach the threshold: [records, texts]."""
    return np.array([[as_arrays(data.found[r.id, text, blind])[2].sum() for text in texts] for r in records])


def _medians(data: EvaluatedSet, labels: Sequence[str], shape: tuple[int, ...]) -> np.ndarray | None:
    """The median count of each label over the training images, said of every image."""
    train = [record for record in data.train if len(record.images) == 1]
    if not train:
        return None
    medians = [np.median([len(true_boxes(record, label)) for record in train]) for label in labels]
    return np.broadcast_to(np.array(medians), shape)


def _mean_error(counts: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(counts - truth).mean())


def _exact(counts: np.ndarray, truth: np.ndarray) -> float:
    return float((counts == truth).mean())
