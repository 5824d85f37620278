"""What the model is asked, and about which tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio

from model_server.protocol import PerceiveRequest

SCENE = Path(__file__).parents[2] / "examples" / "data" / "ordway_swisher_neon.tif"
TILE = 256
WORDS = (
    PerceiveRequest(task="caption"),
    PerceiveRequest(task="vqa", text="Is there a road in the image?"),
    PerceiveRequest(task="classify"),
)


def read_tiles(image: Path, count: int) -> list[np.ndarray]:
    """`count` different uint8 [TILE, TILE, 3] windows of the scene; once each has been asked about, all are known."""
    with rasterio.open(image) as scene:
        pixels = np.moveaxis(scene.read([1, 2, 3] if scene.count >= 3 else [1, 1, 1]), 0, -1).astype(np.float64)
    low, high = np.nanpercentile(pixels, [2, 98])
    stretched = (np.nan_to_num((pixels - low) / max(high - low, 1e-9)).clip(0, 1) * 255).astype(np.uint8)
    repeats = [max(1, -(-2 * TILE // side)) for side in stretched.shape[:2]]
    large = np.tile(stretched, (*repeats, 1))
    places = np.random.default_rng(0).integers(0, [side - TILE + 1 for side in large.shape[:2]], (count, 2))
    return [np.ascontiguousarray(large[y : y + TILE, x : x + TILE]) for y, x in places]
