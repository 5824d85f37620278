"""How a region of a scene is cut into looks for the model: the one place where scales are chosen.

The model works on `MODEL_SIDE` pixels and was trained on imagery of 0.15 to 10 m per pixel. So:

- A region of at most `TILE_SIDE` pixels a side is one look.
- A question about the whole (what kind of scene, a caption) gets an overview of it and, where that is larger than
  `WHOLE_SIDE`, parts at a middle scale, the geometric mean between the overview's and the finest: about as many parts
  as the region has model sides.
- A question about details (is there a ..., how many ...) gets tiles at the finest scale.
- The finest scale is the image's own, but not finer than `FINEST_GSD_M`, which shows the model less than it knows.
- Boxes and masks come from tiles of `DENSE_SIDE`, which is no working size of the model's: it scales a tile to what it
  knows. A region that is little larger is one tile. The finest scale for them is `FINEST_DENSE_GSD_M`.

All are bounded: beyond `MAX_PARTS` or `MAX_TILES` the scale becomes coarser, which `Looks.coarsened` tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product

from rs_tools.imagery.scene import Region

MODEL_SIDE = 256
TILE_SIDE = 512
WHOLE_SIDE = 1024
FINEST_GSD_M = 0.3
MAX_PARTS = 64
MAX_TILES = 400
DENSE_SIDE = 512
DENSE_ONCE = 768
DENSE_OVERLAP = 64
FINEST_DENSE_GSD_M = 0.1
OVERLAP = 32  # tile pixels; whatever is no larger is seen whole in one tile. benchmarks/scene.py prints what it costs


@dataclass(frozen=True)
class TilePlan:
    """Tiles that cover a region, row by row.

    Attributes:
        regions: the window of each tile in scene pixels.
        columns, rows: their arrangement.
        tile_size: (width, height) in pixels of the largest tile as it is read.
        decimation: scene pixels per tile pixel.
        overlap: scene pixels that neighbours share at least; 0: the tiles are a partition.
    """

    regions: tuple[Region, ...]
    columns: int
    rows: int
    tile_size: tuple[int, int]
    decimation: float
    overlap: int = 0

    def size(self, region: Region) -> tuple[int, int]:
        """(width, height) in pixels of one of the tiles as it is read."""
        x1, y1, x2, y2 = region
        return max(1, round((x2 - x1) / self.decimation)), max(1, round((y2 - y1) / self.decimation))


@dataclass(frozen=True)
class Looks:
    """What the model is shown of a region: an overview, parts, or both.

    Attributes:
        overview: one tile of the whole region.
        parts: tiles of it.
        coarsened: tiles that the intended scale would have taken, where that was too many; else 0.
    """

    overview: TilePlan | None
    parts: TilePlan | None = None
    coarsened: int = 0

    @property
    def finest(self) -> TilePlan:
        plan = self.parts or self.overview
        if plan is None:
            raise ValueError("there is nothing to look at: neither an overview nor parts")
        return plan

    @property
    def windows(self) -> list[tuple[Region, tuple[int, int]]]:
        """Each look's region and the size that it is read in, the overview first."""
        plans = [plan for plan in (self.overview, self.parts) if plan is not None]
        return [(region, plan.size(region)) for plan in plans for region in plan.regions]


def single_tile(region: Region) -> TilePlan:
    """The whole region in one look, decimated to at most `TILE_SIDE` pixels on its long side, never enlarged."""
    x1, y1, x2, y2 = region
    width, height = x2 - x1, y2 - y1
    decimation = max(1.0, max(width, height) / TILE_SIDE)
    size = max(1, round(width / decimation)), max(1, round(height / decimation))
    return TilePlan((region,), columns=1, rows=1, tile_size=size, decimation=decimation)


def tile_grid(region: Region, side: int = MODEL_SIDE, overlap: int = 0, decimation: float = 1.0) -> TilePlan:
    """Tiles of at most `side` x `side` tile pixels that cover the region, none reaching outside it.

    Without overlap they are a partition of nearly equal tiles (no slivers at the rim). With overlap all are of one
    size, and neighbours share at least `overlap` tile pixels.

    Args:
        region: x1, y1, x2, y2 in scene pixels.
        side, overlap: in tile pixels, overlap < side.
        decimation: scene pixels per tile pixel, at least 1.
    """
    if not 0 <= overlap < side or decimation < 1:
        raise ValueError(f"no tiles of side {side} with overlap {overlap} at decimation {decimation}")
    x1, y1, x2, y2 = region
    reach = math.floor(side * decimation)
    shared = math.ceil(overlap * decimation)
    columns, rows = _spans(x1, x2, reach, shared), _spans(y1, y2, reach, shared)
    regions = tuple((left, top, right, bottom) for (top, bottom), (left, right) in product(rows, columns))
    plan = TilePlan(regions, len(columns), len(rows), (0, 0), decimation, shared)
    sizes = [plan.size(one) for one in regions]
    largest = max(width for width, _ in sizes), max(height for _, height in sizes)
    return TilePlan(regions, len(columns), len(rows), largest, decimation, shared)


def look_once(region: Region) -> Looks:
    """An overview alone: what a single look says about everything, such as positions and comparisons."""
    return Looks(single_tile(region))


def look_at_whole(region: Region, gsd_m: float | None) -> Looks:
    """An overview and a partition into parts at a middle scale; `gsd_m` is the scene's metres per pixel, or None."""
    if _within(region, WHOLE_SIDE):
        return look_once(region)
    x1, y1, x2, y2 = region
    overview = math.sqrt((x2 - x1) * (y2 - y1)) / MODEL_SIDE
    finest = _finest(gsd_m)
    wanted = max(1.0, math.sqrt(max(overview, finest) * finest))
    return _bounded(region, overview=True, overlap=0, decimation=wanted, most=MAX_PARTS)


def look_closely(region: Region, gsd_m: float | None, *, overview: bool, overlap: int) -> Looks:
    """Tiles at the finest scale, after an overview if asked; `overlap` as in `tile_grid`."""
    if _within(region, TILE_SIDE):
        return look_once(region)
    return _bounded(region, overview=overview, overlap=overlap, decimation=_finest(gsd_m), most=MAX_TILES)


def look_densely(region: Region, gsd_m: float | None) -> Looks:
    """Overlapping tiles for answers about places and pixels; `gsd_m` is the scene's metres per pixel, or None."""
    decimation = max(1.0, FINEST_DENSE_GSD_M / gsd_m) if gsd_m else 1.0
    if _within(region, math.floor(DENSE_ONCE * decimation)):
        return Looks(None, tile_grid(region, DENSE_ONCE, 0, decimation))
    parts, coarsened = _affordable(region, DENSE_SIDE, DENSE_OVERLAP, decimation, MAX_TILES)
    return Looks(None, parts, coarsened)


def _bounded(region: Region, *, overview: bool, overlap: int, decimation: float, most: int) -> Looks:
    parts, coarsened = _affordable(region, MODEL_SIDE, overlap, decimation, most)
    if len(parts.regions) == 1:
        return look_once(region)
    return Looks(single_tile(region) if overview else None, parts, coarsened)


def _affordable(region: Region, side: int, overlap: int, decimation: float, most: int) -> tuple[TilePlan, int]:
    """At most `most` tiles, coarser where that takes it; and how many the given scale takes where that is more."""
    x1, y1, x2, y2 = region
    wanted = _count(region, side, overlap, decimation)
    if wanted > most:
        decimation = max(decimation, math.sqrt((x2 - x1) * (y2 - y1) / most) / side)
        while _count(region, side, overlap, decimation) > most:
            decimation *= 1.01
    return tile_grid(region, side, overlap, decimation), wanted if wanted > most else 0


def _count(region: Region, side: int, overlap: int, decimation: float) -> int:
    """The number of tiles of `tile_grid`, without making them."""
    x1, y1, x2, y2 = region
    reach, shared = math.floor(side * decimation), math.ceil(overlap * decimation)
    return _number(x2 - x1, reach, shared) * _number(y2 - y1, reach, shared)


def _number(length: int, reach: int, shared: int) -> int:
    return 1 if length <= reach else math.ceil((length - shared) / (reach - shared))


def _spans(start: int, end: int, reach: int, shared: int) -> list[tuple[int, int]]:
    length = end - start
    n = _number(length, reach, shared)
    if n == 1:
        return [(start, end)]
    if shared == 0:
        edges = [start + length * i // n for i in range(n + 1)]
        return list(pairwise(edges))
    # Rounding down keeps every step within reach - shared, a whole number that the exact step does not exceed.
    starts = [start + (length - reach) * i // (n - 1) for i in range(n)]
    return [(left, left + reach) for left in starts]


def _finest(gsd_m: float | None) -> float:
    return max(1.0, FINEST_GSD_M / gsd_m) if gsd_m else 1.0


def _within(region: Region, side: int) -> bool:
    x1, y1, x2, y2 = region
    return max(x2 - x1, y2 - y1) <= side
