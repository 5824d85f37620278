"""Questions about every tile of a scene, put to the real model server."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model_server.protocol import PerceiveRequest
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.scene import Region, Scene
from rs_tools.imagery.tiling import MODEL_SIDE, Looks, tile_grid
from rs_tools.looking import stream


async def asked(path: Path, side: int, batch: int) -> dict[str, Any]:
    from rs_tools.client import ModelClient

    scene = Scene.open(AccessPolicy([path.parent]), str(path))
    plan = tile_grid((0, 0, side, side), MODEL_SIDE, 0)
    async with ModelClient() as client:

        async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> list[Any]:
            # Noise in one corner: the scene's blocks are alike, and a cache of equal tiles must not help.
            for tile in tiles:
                tile[:8, :8] = np.frombuffer(os.urandom(192), np.uint8).reshape(8, 8, 3)
            return list((await client.perceive(PerceiveRequest(task="vqa", text="Is there a road?"), tiles)).vqa)

        await stream(scene, Looks(None, tile_grid((0, 0, 512, 512), MODEL_SIDE)), ask, seconds=600)  # warm
        wall = time.perf_counter()
        await stream(scene, Looks(None, plan), ask, seconds=3600, batch=batch)
    return {"tiles": len(plan.regions), "wall_s": time.perf_counter() - wall}
