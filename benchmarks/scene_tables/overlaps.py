"""What the overlap of tiles costs, and what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from measuring.figures import head, line

from rs_tools.imagery.tiling import MODEL_SIDE, tile_grid
from scene_tables.child import typical
from scene_tables.files import SWEPT, swept_scene

OVERLAPS = [0, 16, 32, 64, 128]


def measure(folder: Path) -> list[dict[str, Any]]:
    path = swept_scene(folder)
    print(head(["overlap", "tiles", "CPU s", "objects of 32 pixels whole in a tile"]))
    runs = []
    for overlap in OVERLAPS:
        run = {"overlap": overlap, "whole": whole_share(overlap), **typical("ours", path, SWEPT, overlap)}
        runs.append(run)
        print(line([f"{overlap}", f"{run['tiles']}", f"{run['cpu_s']:.2f}", f"{run['whole']:.1%}"]), flush=True)
    return runs


def whole_share(overlap: int, size: int = 32) -> float:
    """Share of objects of `size` pixels, anywhere in a large scene, that lie whole in at least one tile."""
    spans = tile_grid((0, 0, 20_000, MODEL_SIDE), MODEL_SIDE, overlap).regions
    starts = np.random.default_rng(0).integers(0, 20_000 - size, (2, 20_000))
    along = np.zeros(starts.shape, bool)
    for x1, _, x2, _ in spans:
        along |= (starts >= x1) & (starts + size <= x2)
    return float(along.all(axis=0).mean())
