"""Examples for the ablation grid: what a record says of its image, in all three granularities, or scenes made here.

The scenes that are made leave something to each mechanism: colours and places for the maps, dots that are seen at twice
the resolution only, and whether a field is irrigated, which nothing but the anchors tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_server.model.vision import square
from model_server.text.boxes import Box, BoxDialect, write_boxes
from model_server.text.masks import LabelGrid, MaskDialect, write_mask
from model_server.text.names import readable
from model_server.training.records import Record, load_image
from model_server.training.texts import caption_text

GRID = 3  # rows and columns of a mask as text
COLOURS = {"crop": (60, 140, 40), "sand": (210, 190, 130), "water": (30, 60, 170)}
LONGEST = 60  # characters of an answer


@dataclass(frozen=True)
class Example:
    """One question about one image. `anchors`: vectors [S, 64] and positions [S, 2], where something is known."""

    image: Tensor  # uint8 [3, S, S]
    canvas: Tensor  # uint8 [3, 2S, 2S], the same place
    task: str
    question: str
    answer: str
    anchors: tuple[Tensor, Tensor] | None = None


def from_records(records: Sequence[Record], side: int, seed: int) -> list[Example]:
    """One example of each kind that a record has an annotation for: caption, question, box, mask."""
    rng = np.random.default_rng(seed)
    found = []
    for record in records:
        texts = [t for t in _texts(record, rng) if len(t[2]) <= LONGEST]
        if texts:
            pixels = load_image(record.images[0])
            views = square(pixels, side), square(pixels, 2 * side)
            found += [Example(*views, *text) for text in texts]
    return found


def _texts(record: Record, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(task token, question, answer) of each annotation."""
    out = []
    if record.captions:
        out.append(("[CAP]", "", caption_text(record.captions[rng.integers(len(record.captions))])))
    if record.qa:
        asked = record.qa[rng.integers(len(record.qa))]
        out.append(("[VQA]", asked.question, asked.answer))
    if record.objects:
        largest = max(record.objects, key=lambda o: (o.bbox[2] - o.bbox[0]) * (o.bbox[3] - o.bbox[1]))
        box = Box(*largest.bbox, label=readable(largest.label))
        size = record.width, record.height
        out.append(("[VG]", readable(largest.label), write_boxes([box], BoxDialect.PERCENT, size)))
    if record.mask is not None and record.mask_classes:
        out.append(("[SEG]", ", ".join(map(readable, record.mask_classes.values())), _mask_text(record)))
    return out


def _mask_text(record: Record) -> str:
    """The mask's commonest class in each cell."""
    assert record.mask is not None
    with Image.open(record.mask) as file:
        values = np.asarray(file)
    rows = [np.array_split(band, GRID, axis=1) for band in np.array_split(values, GRID)]
    common = np.array([[np.bincount(cell.ravel()).argmax() for cell in row] for row in rows])
    ids = sorted(set(common.ravel().tolist()))
    names = tuple(readable(record.mask_classes.get(i, "others")) for i in ids)
    cells = np.searchsorted(ids, common).astype(np.int16)
    return write_mask(LabelGrid(names, cells), MaskDialect.RSUNIVLM)


def made(count: int, side: int, seed: int) -> list[Example]:
    """Made scenes: a field in a corner of sand or water, dots in it, irrigated or not."""
    rng = np.random.default_rng(seed)
    return [example for _ in range(count) for example in _scene(side, rng)]


def _scene(side: int, rng: np.random.Generator) -> list[Example]:
    ground, dots, wet = ("sand", "water")[rng.integers(2)], int(rng.integers(1, 4)), bool(rng.integers(2))
    row, column = (int(n) for n in rng.integers(2, size=2))
    large = np.empty((2 * side, 2 * side, 3))
    large[:] = COLOURS[ground]
    top, left = row * side, column * side
    large[top : top + side, left : left + side] = COLOURS["crop"]
    for y, x in rng.integers(8, side - 8, size=(dots, 2)):  # one pixel each: faint at half the side
        large[top + y, left + x] = 255
    pixels = np.clip(large + rng.normal(0, 6, large.shape), 0, 255).astype(np.uint8)
    views = square(pixels, side), square(pixels, 2 * side)
    vectors = torch.zeros(1, 64)
    vectors[0, int(wet)] = 1.0
    anchors = vectors, torch.full((1, 2), 0.5)
    names = ("crop", ground)
    cells = np.ones((2, 2), np.int16)
    cells[row, column] = 0
    box = Box(left / 2, top / 2, (left + side) / 2, (top + side) / 2)
    texts = [
        ("[CAP]", "", f"a crop field in {ground}"),
        ("[VQA]", "how many dots?", str(dots)),
        ("[VQA]", "is it irrigated?", "yes" if wet else "no"),
        ("[VG]", "crop", write_boxes([box], BoxDialect.PERCENT, (side, side))),
        ("[SEG]", f"crop, {ground}", write_mask(LabelGrid(names, cells), MaskDialect.RSUNIVLM)),
    ]
    return [Example(*views, *text, anchors) for text in texts]
