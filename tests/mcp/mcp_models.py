"""A model that stands for the model server where a test is about what surrounds it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model_server.protocol import (
    ModelInfo,
    PerceiveRequest,
    PerceiveResponse,
    RankedAnswer,
    TileCaption,
    TileChange,
    TileClasses,
    TileMasks,
    TileObjects,
    TileVqa,
)
from rs_tools.errors import PerceptionError


@dataclass
class PlantedModel:
    """Sees a ship in every tile, water in its left half, and change in its upper half; or nothing; or fails.

    Attributes:
        sees: False: nothing is found, and questions are not answered with certainty.
        fails: raised by every call.
    """

    sees: bool = True
    fails: PerceptionError | None = None

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        if self.fails is not None:
            raise self.fails
        info = ModelInfo(model="planted", weights_digest="0", attention_backend="none", precision="none", device="none")
        response = PerceiveResponse(model=info, task_token="[VG]", expert="region", elapsed_s=0)
        match request.task:
            case "ground":
                response.objects = [self._ship()] * len(tiles)
            case "segment":
                response.masks = [self._left(request.labels, tile) for tile in tiles]
            case "detect_change":
                response.changes = [self._upper(tile) for tile in tiles[::2]]
            case "vqa":
                response.vqa = [self._said()] * len(tiles)
            case "classify":
                labels = request.labels or ["lake", "forest", "harbour"]
                scores = [0.5, *[0.5 / (len(labels) - 1)] * (len(labels) - 1)]
                response.classes = [TileClasses(labels=labels, scores=scores)] * len(tiles)
            case _:
                response.captions = [TileCaption(caption="A lake.", confidence=0.8)] * len(tiles)
        return response

    async def aclose(self) -> None:
        pass

    def _ship(self) -> TileObjects:
        boxes, scores = ([(10.25, 20.0, 40.0, 32.0)], [0.9]) if self.sees else ([], [])
        return TileObjects(boxes=boxes, scores=scores, threshold=0.4, known=True, scale=1)

    def _left(self, labels: list[str], tile: np.ndarray) -> TileMasks:
        maps = np.zeros((len(labels), *tile.shape[:2]), np.uint8)
        maps[0, :, : tile.shape[1] // 2] = 250 * self.sees
        known = [True] * len(labels)
        return TileMasks(labels=labels, thresholds=[0.5] * len(labels), known=known, scale=1, probabilities=maps)

    def _upper(self, tile: np.ndarray) -> TileChange:
        maps = np.zeros(tile.shape[:2], np.uint8)
        maps[: tile.shape[0] // 2] = 250 * self.sees
        return TileChange(threshold=0.5, scale=1, probabilities=maps)

    def _said(self) -> TileVqa:
        return TileVqa(
            answer="yes" if self.sees else "no",
            kind="yes_no",
            confidence=0.9 if self.sees else 0.3,
            abstained=not self.sees,
            alternatives=[RankedAnswer(answer="no", confidence=0.1)],
        )
