"""Words of published models as the answers of our protocol.

Confidences are the model's own token probabilities. Nothing is calibrated, so nothing is withheld: thresholds let
through whatever was said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model_server.families.asking import Said
from model_server.protocol import TileCaption, TileChange, TileClasses, TileMasks, TileObjects, TileVqa
from model_server.query import Query
from model_server.text.answers import answer_kind
from model_server.text.boxes import Box
from model_server.text.malformed import MalformedText
from model_server.text.masks import BACKGROUND, LabelGrid

SAID = 0.5  # a pixel whose cell got a label stands above it, any other below
UNCALIBRATED = (
    "The confidence is the checkpoint's own token probability and is not calibrated; nothing is withheld for it."
)


def caption(said: Said) -> TileCaption:
    """Raises MalformedText where nothing was said."""
    if not said.text:
        raise MalformedText("The model said nothing.", said.text)
    return TileCaption(caption=said.text, confidence=said.mean_probability)


def answer(said: Said) -> TileVqa:
    """Raises MalformedText where nothing was said."""
    if not said.text:
        raise MalformedText("The model said nothing.", said.text)
    short = said.text.strip().rstrip(".").lower()
    kind = answer_kind(short)
    return TileVqa(
        answer=short if kind == "yes_no" else said.text,
        kind=kind,
        confidence=said.mean_probability if kind == "text" else said.probability,
        abstained=False,
        alternatives=[],
    )


def classes(labels: Sequence[str], said: Said) -> TileClasses:
    return TileClasses(labels=list(labels), scores=list(said.weights))


def objects(boxes: Sequence[Box], said: Said, scale: float) -> TileObjects:
    """Boxes of some extent, in the order in which they were said."""
    kept = [box for box in boxes if box.x2 > box.x1 and box.y2 > box.y1]
    return TileObjects(
        boxes=[(box.x1, box.y1, box.x2, box.y2) for box in kept],
        scores=[said.mean_probability] * len(kept),
        threshold=0.0,
        known=True,
        scale=scale,
    )


def masks(query: Query, grids: Sequence[LabelGrid], said: Sequence[Said], scale: float) -> TileMasks:
    """One grid for each class of a query."""
    height, width = query.image.shape[:2]
    planes = [
        certainty(grid, width, height, one.mean_probability) for grid, one in zip(grids, said, strict=True)
    ]
    return TileMasks(
        labels=list(query.labels),
        thresholds=[SAID] * len(planes),
        known=[True] * len(planes),
        scale=scale,
        probabilities=np.stack(planes),
    )


def change(query: Query, grid: LabelGrid, said: Said, scale: float) -> TileChange:
    height, width = query.image.shape[:2]
    return TileChange(
        threshold=SAID, scale=scale, probabilities=certainty(grid, width, height, said.mean_probability)
    )


def certainty(grid: LabelGrid, width: int, height: int, probability: float) -> np.ndarray:
    """uint8 [height, width]: above `SAID` where a cell has any label but the background, below elsewhere, by as much as
    the words were probable."""
    on = ~grid.mask(BACKGROUND, width, height)
    away = max(SAID * probability, 1 / 255)
    return np.where(on, round(255 * (SAID + away)), int(255 * (SAID - away))).clip(0, 255).astype(np.uint8)
