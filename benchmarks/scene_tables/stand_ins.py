"""Models that cost next to nothing, so that what is around a model is measured."""

from __future__ import annotations

import numpy as np

from model_server.protocol import ModelInfo, PerceiveRequest, PerceiveResponse, TileCaption, TileChange, TileMasks
from rs_tools.imagery.scene import Region

OBJECT = 24  # pixels; one object in every cell of CELL x CELL
CELL = 128
MARKED = 16  # tile pixels a side of a marking model's cells


def objects(side: int) -> np.ndarray:
    """Boxes float64 [N, 4], one in each cell at a random place."""
    cells = side // CELL
    corner = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), axis=-1).reshape(-1, 2) * CELL
    start = corner + np.random.default_rng(0).integers(0, CELL - OBJECT, corner.shape)
    return np.concatenate([start, start + OBJECT], axis=1).astype(float)


class KnowingModel:
    """Answers a tile with the objects in it, clipped to the tile, in tile pixels; a look-up by cell, so it is quick."""

    def __init__(self, side: int) -> None:
        cells = side // CELL
        self.objects = cells * cells  # in the whole scene
        self._boxes = objects(side).reshape(cells, cells, 4)

    def boxes(self, region: Region) -> np.ndarray:
        x1, y1, x2, y2 = region
        found = self._boxes[y1 // CELL : y2 // CELL + 1, x1 // CELL : x2 // CELL + 1].reshape(-1, 4)
        clipped = np.clip(found, [x1, y1, x1, y1], [x2, y2, x2, y2])
        seen = (clipped[:, 2] - clipped[:, 0] > 4) & (clipped[:, 3] - clipped[:, 1] > 4)
        return clipped[seen] - [x1, y1, x1, y1]


class MarkingModel:
    """Answers a tile (of a pair: the later one) with its red, in cells of `MARKED` pixels, as a probability.

    Each class is the one before, some cells to the right.
    """

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        model = ModelInfo(model="marking", weights_digest="", attention_backend="", precision="", device="cpu")
        answer = PerceiveResponse(model=model, task_token="", expert="", warnings=[], elapsed_s=0)
        if request.task == "segment":
            classes = len(request.labels)
            for tile in tiles:
                one = self._marked(tile)
                maps = np.stack([np.roll(one, 3 * MARKED * i, axis=1) for i in range(classes)])
                thresholds, known = [0.5] * classes, [True] * classes
                answer.masks.append(
                    TileMasks(
                        labels=request.labels, thresholds=thresholds, known=known, scale=1, probabilities=maps
                    )
                )
        elif request.task == "detect_change":
            answer.changes = [
                TileChange(threshold=0.5, scale=1, probabilities=self._marked(tile)) for tile in tiles[1::2]
            ]
        else:
            answer.captions = [TileCaption(caption="A road.", confidence=0.5) for _ in tiles]
        return answer

    def _marked(self, tile: np.ndarray) -> np.ndarray:
        cells = tile[::MARKED, ::MARKED, 0].repeat(MARKED, axis=0).repeat(MARKED, axis=1)
        return np.ascontiguousarray(cells[: tile.shape[0], : tile.shape[1]])
