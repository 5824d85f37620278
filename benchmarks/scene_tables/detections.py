"""Every tile of a scene read, answered by a model that knows the boxes, and the boxes merged, by the tools' parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rs_tools.geometry.measures import TileFrame
from rs_tools.geometry.merging import Detections, merge
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.scene import Region, Scene
from rs_tools.imagery.tiling import MODEL_SIDE, Looks, TilePlan, tile_grid
from rs_tools.looking import stream
from scene_tables.clock import Clock, timed_reader
from scene_tables.stand_ins import KnowingModel


async def ours(path: Path, side: int, overlap: int, batch: int) -> dict[str, Any]:
    """Read, answer and merge everything, as the tools do it."""
    model, clock = KnowingModel(side), Clock()
    with clock.stage("describing"):
        scene = Scene.open(AccessPolicy([path.parent]), str(path))
    scene = timed_reader(scene, clock)
    plan = tile_grid((0, 0, side, side), MODEL_SIDE, overlap)

    async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> list[np.ndarray]:
        with clock.stage("model"):
            return [model.boxes(region) for region in regions]

    seen = await stream(scene, Looks(None, plan), ask, seconds=36_000, batch=batch)
    with clock.stage("merging"):
        found = merge(detections(plan, [look.answer for look in seen.looks]))
    told = {"side": side, "tiles": len(plan.regions), **clock.read()}
    return {**told, "objects": model.objects, "found": len(found)}


def detections(plan: TilePlan, boxes: Sequence[np.ndarray]) -> Detections:
    whole = plan.regions[0][:2] + plan.regions[-1][2:]
    frames = [TileFrame(region, plan.size(region)) for region in plan.regions]
    scores = [np.full(len(some), 0.9) for some in boxes]
    return Detections.in_tiles(frames, boxes, scores, [["ship"] * len(some) for some in boxes], whole)
