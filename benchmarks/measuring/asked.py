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
DENSE_TILE = 512
DENSE = {
    "ships, pixel size unknown": PerceiveRequest(task="ground", text="ship"),
    "ships at 0.5 m per pixel": PerceiveRequest(task="ground", text="ship", gsd_m=0.5),
    "cars at 0.2 m": PerceiveRequest(task="ground", text="car", gsd_m=0.2),
    "a phrase of no known concept": PerceiveRequest(task="ground", text="elephant"),
    "mask of road, water and forest": PerceiveRequest(task="segment", labels=["road", "water", "forest"]),
    "change, pixel size unknown": PerceiveRequest(task="detect_change"),
    "change at 10 m": PerceiveRequest(task="detect_change", gsd_m=10),
}


def read_tiles(image: Path, count: int, side: int = TILE) -> list[np.ndarray]:
    """`count` different uint8 [side, side, 3] windows of the scene; once each has been asked about, all are known."""
    with rasterio.open(image) as scene:
        pixels = np.moveaxis(scene.read([1, 2, 3] if scene.count >= 3 else [1, 1, 1]), 0, -1).astype(np.float64)
    low, high = np.nanpercentile(pixels, [2, 98])
    stretched = (np.nan_to_num((pixels - low) / max(high - low, 1e-9)).clip(0, 1) * 255).astype(np.uint8)
    repeats = [max(1, -(-2 * side // length)) for length in stretched.shape[:2]]
    large = np.tile(stretched, (*repeats, 1))
    places = np.random.default_rng(0).integers(0, [length - side + 1 for length in large.shape[:2]], (count, 2))
    return [np.ascontiguousarray(large[y : y + side, x : x + side]) for y, x in places]
