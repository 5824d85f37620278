"""Phrases that single one thing out among its like: "the largest ship", "the car in the upper left".

The dense branch finds things; which of them is meant follows from their boxes. Shared by both sides of the wire: the
model server picks within one tile, the tools within a scene. Needs numpy only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from model_server.text.questions import singular

_SIZES = {"largest": 1, "biggest": 1, "smallest": -1}
_SIDES = {
    "leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "uppermost": (1, 1),
    "bottommost": (1, -1), "lowest": (1, -1), "left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1),
}  # fmt: skip  # axis, and the sign that makes the one that is meant the least
_ROWS = {"upper": 0, "top": 0, "lower": 2, "bottom": 2}
_COLUMNS = {"left": 0, "right": 2}

_ARTICLE = r"(?:the |an? )?"
_OF_IMAGE = r"(?: (?:corner|part|side))?(?: of the (?:image|picture|scene|photo|tile))?"
_FIRST = re.compile(rf"{_ARTICLE}(?P<word>{'|'.join((*_SIZES, *list(_SIDES)[:6]))}) (?P<head>[\w -]+)")
_CORNER = re.compile(
    rf"{_ARTICLE}(?P<head>[\w -]+?) (?:in|at|near) the (?P<row>{'|'.join(_ROWS)})[ -](?P<column>left|right){_OF_IMAGE}"
)
_MIDDLE = re.compile(rf"{_ARTICLE}(?P<head>[\w -]+?) (?:in|at|near) the (?:centre|center|middle){_OF_IMAGE}")
_SIDE = re.compile(rf"{_ARTICLE}(?P<head>[\w -]+?) (?:in|at|on|near) the (?P<word>left|right|top|bottom){_OF_IMAGE}")


@dataclass(frozen=True)
class Relation:
    """What is looked for, and which one of them: by size (sign), along an axis (axis, sign), or in a ninth
    (column, row) of the image."""

    head: str
    size: int = 0
    side: tuple[int, int] | None = None
    ninth: tuple[int, int] | None = None

    def pick(self, boxes: np.ndarray, scores: np.ndarray, extent: tuple[float, float, float, float]) -> int:
        """Row of the box that is meant among [N, 4] with scores [N], N > 0; `extent` is the image's x1, y1, x2, y2.

        Of several in a ninth the surest one; where none has its middle there, the nearest.
        """
        if self.size:
            return int((self.size * (boxes[:, 2:] - boxes[:, :2]).prod(1)).argmax())
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2
        if self.side is not None:
            axis, sign = self.side
            return int((sign * middles[:, axis]).argmin())
        assert self.ninth is not None
        corner, size = np.array(extent[:2]), np.array(extent[2:]) - np.array(extent[:2])
        off = np.abs((middles - corner) / size * 3 - np.array(self.ninth) - 0.5).max(1)  # up to a half is inside
        inside = np.flatnonzero(off <= 0.5)
        return int(inside[scores[inside].argmax()]) if len(inside) else int(off.argmin())


def parse(phrase: str) -> Relation | None:
    """The relation that a phrase for a single thing states; None where it states none that is known, or means many."""
    text = re.sub(r"\s+", " ", phrase).strip().rstrip(".").lower()
    if match := _FIRST.fullmatch(text):
        word = match["word"]
        relation = Relation(match["head"], size=_SIZES[word]) if word in _SIZES else (
            Relation(match["head"], side=_SIDES[word])
        )  # fmt: skip
    elif match := _CORNER.fullmatch(text):
        relation = Relation(match["head"], ninth=(_COLUMNS[match["column"]], _ROWS[match["row"]]))
    elif match := _MIDDLE.fullmatch(text):
        relation = Relation(match["head"], ninth=(1, 1))
    elif match := _SIDE.fullmatch(text):
        relation = Relation(match["head"], side=_SIDES[match["word"]])
    else:
        return None
    return relation if singular(relation.head) == relation.head else None
