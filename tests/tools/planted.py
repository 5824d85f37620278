"""A model that sees what a test paints: red things, blue water, brown soil, and any pixel that differs between two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import shapely
from rasterio.features import shapes
from rasters import UTM, ScriptedClient, scripted_answer

from model_server.protocol import (
    PerceiveRequest,
    PerceiveResponse,
    TileCaption,
    TileChange,
    TileMasks,
    TileObjects,
)
from rs_tools.imagery.access import AccessPolicy
from rs_tools.tools import Tools

PLACED: dict[str, Any] = {"photometric": "RGB", "crs": "EPSG:32633", "transform": UTM}  # 10 m pixels
RED, BLUE, BROWN, GREEN = (255, 0, 0), (0, 0, 255), (120, 80, 40), (30, 140, 30)
COLORS = {"water": BLUE, "soil": BROWN, "ship": RED}
SURE, UNSURE = 230, 20  # of 255
BOX_THRESHOLD = 0.4
NOT_KNOWN = "cathedral"


class PlantedModel(ScriptedClient):
    """Answers boxes and masks exactly, at the scale of the tile; everything else as the script says.

    `score`: of each box. `thresholds`: of masks, by label; 0.5 where none is named.
    """

    def __init__(self, score: float = 0.9, thresholds: dict[str, float] | None = None) -> None:
        super().__init__()
        self.score = score
        self.thresholds = thresholds or {}

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        self.requests.append(request)
        self.tiles += tiles
        response = scripted_answer(request, len(tiles))
        match request.task:
            case "ground":
                response.objects = [self._boxes(request.text, tile) for tile in tiles]
            case "segment":
                response.masks = [self._masks(request.labels, tile) for tile in tiles]
            case "detect_change":
                pairs = zip(tiles[::2], tiles[1::2], strict=True)
                response.changes = [_change(before, after) for before, after in pairs]
            case "caption":
                words = ["Green fields.", "A lake."]
                response.captions = [
                    TileCaption(caption=words[int((tile == BLUE).all(axis=2).any())], confidence=0.8) for tile in tiles
                ]
        return response

    def _boxes(self, phrase: str, tile: np.ndarray) -> TileObjects:
        red = (tile == COLORS.get(phrase.removesuffix("s"), RED)).all(axis=2)
        found = [shapely.geometry.shape(one).bounds for one, _ in shapes(red.astype(np.uint8), mask=red)]
        return TileObjects(
            boxes=found, scores=[self.score] * len(found), threshold=BOX_THRESHOLD,
            known=phrase != NOT_KNOWN, scale=1,
        )  # fmt: skip

    def _masks(self, labels: list[str], tile: np.ndarray) -> TileMasks:
        planes = [(tile == COLORS.get(label, RED)).all(axis=2) for label in labels]
        return TileMasks(
            labels=labels,
            thresholds=[self.thresholds.get(label, 0.5) for label in labels],
            known=[label != NOT_KNOWN for label in labels],
            scale=1,
            probabilities=np.where(np.stack(planes), SURE, UNSURE).astype(np.uint8),
        )


def over(folder: Path, model: ScriptedClient, deadline_s: float = 900) -> Tools:
    """Tools over `images` in a folder, with `artifacts` beside it."""
    return Tools(AccessPolicy([folder / "images"]), model, deadline_s, folder / "artifacts")


def _change(before: np.ndarray, after: np.ndarray) -> TileChange:
    differs = np.abs(before.astype(int) - after).max(axis=2) > 40
    return TileChange(threshold=0.6, scale=1, probabilities=np.where(differs, SURE, UNSURE).astype(np.uint8))


def painted(height: int, width: int, *patches: tuple[tuple[int, int, int, int], tuple[int, int, int]]) -> np.ndarray:
    """Uint8 [3, H, W], green, with patches: (x1, y1, x2, y2) and a colour."""
    values = np.empty((3, height, width), np.uint8)
    values[:] = np.reshape(GREEN, (3, 1, 1))
    for (x1, y1, x2, y2), color in patches:
        values[:, y1:y2, x1:x2] = np.reshape(color, (3, 1, 1))
    return values
