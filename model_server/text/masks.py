"""Masks as text: semantic descriptors, coded row by row in runs (Text4Seg, R-RLE; RSUniVLM).

A mask is a coarse grid of labels. Both published dialects are known:

| dialect | text |
| --- | --- |
| `rsunivlm` | `others*3, building*2` and a line break after each row; lower case |
| `text4seg` | `<seg>others *3| building *2` and a line break and a space after each row, `</seg>` at the end |

The parser reads any text in linear time, makes no grid larger than `MAX_SIDE`, and raises nothing but
`MalformedText`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

import numpy as np

from model_server.text.malformed import MalformedText

BACKGROUND = "others"
MAX_SIDE = 1024  # rows or columns of a grid; published grids have 16 to 24
_MAX_NAME = 80

Row = list[tuple[str, int]]  # runs of a row: label, count


class MaskDialect(StrEnum):
    RSUNIVLM = "rsunivlm"
    TEXT4SEG = "text4seg"


@dataclass(frozen=True, eq=False)
class LabelGrid:
    """A coarse mask: `values` int16 [rows, columns] are indices into `names`; the background is first where it occurs.

    `warnings` say what was repaired when it was read.
    """

    names: tuple[str, ...]
    values: np.ndarray
    warnings: tuple[str, ...] = ()

    def resize(self, width: int, height: int) -> np.ndarray:
        """The values on a grid of this size, int16 [height, width], by the nearest cell from the top left."""
        rows, columns = self.values.shape
        at_row = np.arange(height) * rows // height
        at_column = np.arange(width) * columns // width
        return self.values[at_row[:, None], at_column[None, :]]

    def mask(self, name: str, width: int, height: int) -> np.ndarray:
        """Where this label stands, bool [height, width]; nowhere if it does not occur."""
        index = self.names.index(name) if name in self.names else -1
        return self.resize(width, height) == index


def parse_mask(text: str, dialect: MaskDialect | None = None, shape: tuple[int, int] | None = None,
               strict: bool = False) -> LabelGrid:  # fmt: skip
    """Read a label grid out of generated text.

    Args:
        text: what the model wrote.
        dialect: how rows and runs are separated; None tells it from the text.
        shape: (rows, columns) that the model was asked for; repairs aim at it.
        strict: read as the published code reads. `rsunivlm` then refuses ragged rows and labels other than a-z words;
            `text4seg` counts cells regardless of rows, pads with the last label and cuts.

    Raises:
        MalformedText: there is no run `label*count` in it, or strict reading fails.
    """
    if shape is not None and not all(0 < side <= MAX_SIDE for side in shape):
        raise ValueError(f"a grid has 1 to {MAX_SIDE} rows and columns; got {shape}")
    body = text.lower()
    if dialect is None:
        dialect = MaskDialect.TEXT4SEG if "|" in body or "<seg>" in body else MaskDialect.RSUNIVLM
    if strict:
        return _strict_rsunivlm(body, text) if dialect is MaskDialect.RSUNIVLM else _strict_text4seg(body, text, shape)
    notes: list[str] = []
    rows = [row for line in _unwrapped(body, notes).splitlines() if (row := _runs(line, notes))]
    if not rows:
        raise MalformedText(f"No run label*count of the {dialect} dialect can be read.", text)
    if len(rows) > MAX_SIDE:
        notes.append(f"rows beyond the first {MAX_SIDE} were left out.")
    one_line = shape[0] * shape[1] if shape and len(rows) == 1 else MAX_SIDE
    cells = [_cells(row, max(one_line, MAX_SIDE)) for row in rows[:MAX_SIDE]]
    return _grid(_rectangle(cells, shape, notes), notes)


def write_mask(grid: LabelGrid, dialect: MaskDialect) -> str:
    """The grid as text, which `parse_mask` reads back, strict or not; names come back in lower case.

    Raises:
        ValueError: a name is empty or holds a sign that separates runs (`rsunivlm`: anything but a-z words).
    """
    allowed = r"[a-z]+(?: [a-z]+)*" if dialect is MaskDialect.RSUNIVLM else r"[^\s*|,<>:]+(?: [^\s*|,<>:]+)*"
    names = [name.lower() for name in grid.names]
    for name in names:
        if not re.fullmatch(allowed, name) or len(name) > _MAX_NAME:
            raise ValueError(f"the {dialect} dialect cannot write the label {name!r}")
    runs = ([(names[value], len(list(same))) for value, same in groupby(row)] for row in grid.values.tolist())
    if dialect is MaskDialect.RSUNIVLM:
        return "\n".join(", ".join(f"{name}*{count}" for name, count in row) for row in runs)
    return "<seg>" + "\n ".join("| ".join(f"{name} *{count}" for name, count in row) for row in runs) + "</seg>"


# --- as published ----------------------------------------------------------------------------------------------------


def _strict_rsunivlm(body: str, text: str) -> LabelGrid:
    """Rows by line breaks, runs by comma and space, one asterisk each; counts as Python reads integers."""
    rows = [[_strict_run(run.split("*"), text) for run in line.split(", ")] for line in body.strip().split("\n")]
    widths = {sum(max(count, 0) for _, count in row) for row in rows}
    if len(widths) > 1 or widths == {0}:
        raise MalformedText(f"Rows must be of one length above 0; these are of {sorted(widths)[:8]} cells.", text)
    if max(widths) > MAX_SIDE or len(rows) > MAX_SIDE:
        raise MalformedText(f"A grid has at most {MAX_SIDE} rows and columns.", text)
    for label in {label for row in rows for label, count in row if count > 0}:
        if not re.fullmatch(r"[a-z]+(?: [a-z]+)*", label):
            raise MalformedText(f"A label consists of words of a-z; {label[:40]!r} does not.", text)
    return _grid([[label for label, count in row for _ in range(count)] for row in rows], [])


def _strict_text4seg(body: str, text: str, shape: tuple[int, int] | None) -> LabelGrid:
    lines = body.removeprefix("<seg>").removesuffix("</seg>").strip("\n").split("\n ")
    rows = [[_strict_run(run.split(" *"), text) for run in line.split("| ")] for line in lines]
    longest = shape[0] * shape[1] if shape else MAX_SIDE * MAX_SIDE
    cells: list[str] = []
    for label, count in (run for row in rows for run in row):
        cells.extend([label] * min(count, longest - len(cells)))
    if shape is None:
        widths = {sum(max(count, 0) for _, count in row) for row in rows}
        if len(widths) > 1:
            raise MalformedText("Rows differ in length; a shape is needed to read them.", text)
        shape = len(rows), max(widths)
    if not cells or max(shape) > MAX_SIDE:
        raise MalformedText(f"A grid has 1 to {MAX_SIDE} rows and columns.", text)
    cells += [cells[-1]] * (shape[0] * shape[1] - len(cells))
    return _grid([cells[at : at + shape[1]] for at in range(0, shape[0] * shape[1], shape[1])], [])


def _strict_run(parts: Sequence[str], text: str) -> tuple[str, int]:
    if len(parts) != 2:
        raise MalformedText("A run is label*count, with one asterisk.", text)
    try:
        return parts[0].strip(), int(parts[1])
    except ValueError:
        raise MalformedText(f"A count is a whole number; {parts[1][:20]!r} is none.", text) from None


# --- with repairs ----------------------------------------------------------------------------------------------------


def _unwrapped(body: str, notes: list[str]) -> str:
    """The text between the first `<seg>` and the `</seg>` after it, or all of it."""
    _, opened, rest = body.partition("<seg>")
    inside, closed, _ = (rest if opened else body).partition("</seg>")
    if bool(opened) != bool(closed):
        notes.append("the mask was not closed between <seg> and </seg>.")
    return inside


def _runs(line: str, notes: list[str]) -> Row:
    """The runs of one line."""
    row: Row = []
    for run in re.split("[|,]", line):
        before, star, after = run.partition("*")
        label = " ".join(before[-2 * _MAX_NAME :].split())
        digits = re.match(r"\s*\+?(\d{1,9})(?!\d)", after[:40])
        if not star or not label or digits is None:
            if run.strip():
                notes.append("pieces that are no run label*count were left out.")
            continue
        if after[digits.end() :].strip():
            notes.append("signs after a count were left out.")
        if ":" in label:
            label = label.rpartition(":")[2].strip() or BACKGROUND
            notes.append("words before a label were left out.")
        count = int(digits[1])
        if len(label) > _MAX_NAME:
            notes.append(f"labels above {_MAX_NAME} letters were cut.")
        if count > 0:
            row.append((label[:_MAX_NAME], count))
    return row


def _cells(row: Row, limit: int) -> list[str]:
    """The cells of a row, at most `limit`."""
    cells: list[str] = []
    for label, count in row:
        cells.extend([label] * min(count, limit - len(cells)))
    return cells


def _rectangle(rows: list[list[str]], shape: tuple[int, int] | None, notes: list[str]) -> list[list[str]]:
    """Rows of one length: that of `shape`, else the commonest; the last label fills short rows, long ones are cut."""
    if shape is not None and len(rows) == 1 < shape[0] and len(rows[0]) == shape[0] * shape[1]:
        rows = [rows[0][at : at + shape[1]] for at in range(0, len(rows[0]), shape[1])]
        notes.append("all rows stood in one line.")
    lengths = Counter(map(len, rows))
    columns = shape[1] if shape else max(lengths, key=lambda length: (lengths[length], length))
    if ragged := len(rows) - lengths[columns]:
        notes.append(f"{ragged} of {len(rows)} rows were not of {columns} cells and were filled or cut.")
    count = shape[0] if shape else len(rows)
    if count != len(rows):
        notes.append(f"{len(rows)} rows stood where {count} were expected; they were repeated or cut.")
    rows = rows[:count] + [rows[-1]] * (count - len(rows))
    return [row[:columns] + [row[-1]] * (columns - len(row)) for row in rows]


def _grid(rows: Sequence[Sequence[str]], notes: Iterable[str]) -> LabelGrid:
    found = dict.fromkeys(label for row in rows for label in row)
    names = sorted(found, key=lambda name: name != BACKGROUND)  # otherwise in order of appearance
    index = {name: i for i, name in enumerate(names)}
    values = np.array([[index[label] for label in row] for row in rows], np.int16)
    return LabelGrid(tuple(names), values, tuple(dict.fromkeys(notes)))
