"""Measures of short answers and class decisions: exact match, balanced accuracy, RSVQA's bins, calibration error."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from model_server.text.answers import normalise

_BIN_EDGES = {"count": (0, 10, 100, 1000), "area": (0, 10, 100, 1000)}


def matches(predicted: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """Whether each answer is the true one in its normal form: bool [n]."""
    return np.array([normalise(p) == normalise(t) for p, t in zip(predicted, truth, strict=True)], dtype=bool)


def rsvqa_bin(answer: str, kind: str) -> str:
    """The bin of a count or an area as RSVQA scores it: 0, to 10, to 100, to 1000, above.

    An answer of another kind, or one without a number, is only normalised.
    """
    text = normalise(answer)
    number = re.match(r"\d+(\.\d+)?", text)
    if kind not in _BIN_EDGES or number is None:
        return text
    edges = _BIN_EDGES[kind]
    value = float(number.group())
    return next((f"<= {edge}" for edge in edges if value <= edge), f"> {edges[-1]}")


def balanced_accuracy(correct: np.ndarray, truth: Sequence[str]) -> float:
    """Mean over the true answers of the share answered right, so that a constant answer gets 1 / their number."""
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for right, answer in zip(correct, truth, strict=True):
        groups[normalise(answer)].append(bool(right))
    return float(np.mean([np.mean(group) for group in groups.values()]))


def expected_calibration_error(confidence: Sequence[float], correct: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence, weighted by how many fall in each."""
    sure = np.asarray(confidence, dtype=np.float64)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [
        np.count_nonzero(place == b) * abs(sure[place == b].mean() - correct[place == b].mean())
        for b in np.unique(place)
    ]
    return float(np.sum(gaps) / len(sure))
