"""The model, the tiles it is asked about, and the tables measured so far."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measuring.asked import SCENE, read_tiles
from measuring.figures import Row, markdown

from model_server.perceiver import Perceiver
from model_server.protocol import PerceiveRequest

GRANULARITIES = {
    "image": PerceiveRequest(task="caption"),
    "region": PerceiveRequest(task="ground", text="building", gsd_m=0.3),
    "pixel": PerceiveRequest(task="segment", labels=["road"], gsd_m=0.5),
}
STATIC = 16  # callers, answers of a step and prompts of a static batch, wherever one number of them is measured


class Bench:
    """Args: a model that has been warmed up, the requests of each measurement, and the folder of its weights."""

    def __init__(self, perceiver: Perceiver, requests: int, weights: Path) -> None:
        self.perceiver, self.requests, self.weights = perceiver, requests, weights
        self._tiles = read_tiles(SCENE, 16)
        self._made = itertools.count()
        self.tables: dict[str, list[Row]] = {}

    def fresh(self) -> np.ndarray:
        """A tile that nobody has seen."""
        n = next(self._made)
        tile = self._tiles[n % len(self._tiles)].copy()
        tile[0, :8, 0] = [n >> 4 * i & 15 for i in range(8)]
        return tile

    def known(self) -> np.ndarray:
        return self._tiles[next(self._made) % len(self._tiles)]

    def table(self, name: str, header: Row, rows: Sequence[Row]) -> None:
        self.tables[name] = [header, *rows]
        print(f"\n{name}\n\n{markdown(header, rows)}", flush=True)
