"""How a region of a scene is cut into tiles for the model."""

from __future__ import annotations

from dataclasses import dataclass

from rs_tools.imagery.scene import Region

TILE_SIDE = 512


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one size that cover a region, row by row.

    Attributes:
        regions: the window of each tile in scene pixels.
        columns, rows: their arrangement.
        tile_size: (width, height) in pixels of every tile as it is read.
        decimation: scene pixels per tile pixel.
    """

    regions: tuple[Region, ...]
    columns: int
    rows: int
    tile_size: tuple[int, int]
    decimation: float


def single_tile(region: Region) -> TilePlan:
    """The whole region in one look, decimated to at most `TILE_SIDE` pixels on its long side, never enlarged."""
    x1, y1, x2, y2 = region
    width, height = x2 - x1, y2 - y1
    decimation = max(1.0, max(width, height) / TILE_SIDE)
    size = max(1, round(width / decimation)), max(1, round(height / decimation))
    return TilePlan((region,), columns=1, rows=1, tile_size=size, decimation=decimation)
