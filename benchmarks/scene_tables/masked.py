"""Masks of a whole scene by the tools themselves, with outlines and preview."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rs_tools.imagery.access import AccessPolicy
from rs_tools.results import DetectChangeResult, SegmentResult
from rs_tools.tools import Tools
from scene_tables.clock import Clock
from scene_tables.stand_ins import MarkingModel

CLASSES = {"segment": 1, "segment, 16 classes": 16}
KINDS = (*CLASSES, "detect_change")


def later(path: Path) -> Path:
    """Where the later image of a scene lies."""
    return path.with_name(f"later-{path.name}")


async def masked(kind: str, path: Path, side: int) -> dict[str, Any]:
    """`kind`: of KINDS."""
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(AccessPolicy([path.parent]), MarkingModel(), deadline_s=36_000, artifacts=folder)
        clock = Clock()
        found: SegmentResult | DetectChangeResult
        if kind in CLASSES:
            found = await tools.segment(path.name, [f"class {i}" for i in range(CLASSES[kind])], preview=True)
            share = sum(one.share for one in found.classes)
        else:
            found = await tools.detect_change(path.name, later(path).name, preview=True)
            share = found.changed_share
        grid = found.provenance.tile_grid
        return {
            "side": side,
            "tiles": grid.columns * grid.rows if grid else 0,
            **clock.read(),
            "share": share,
            "bytes": {one.kind: os.path.getsize(one.path) for one in found.artifacts},  # noqa: ASYNC240 - one caller
        }
