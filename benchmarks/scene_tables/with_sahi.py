"""The same with sahi: its slices of the file, its predictions, its greedy merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rs_tools.imagery.tiling import MODEL_SIDE
from scene_tables.clock import Clock
from scene_tables.stand_ins import KnowingModel


def with_sahi(path: Path, side: int, overlap: int) -> dict[str, Any]:
    from sahi.postprocess.combine import GreedyNMMPostprocess  # pyright: ignore[reportMissingImports]  # installed by those who compare
    from sahi.prediction import ObjectPrediction  # pyright: ignore[reportMissingImports]  # installed by those who compare
    from sahi.slicing import slice_image  # pyright: ignore[reportMissingImports]  # installed by those who compare

    model, clock = KnowingModel(side), Clock()
    with clock.stage("reading"):
        ratio = overlap / MODEL_SIDE
        sliced = slice_image(
            str(path), slice_height=MODEL_SIDE, slice_width=MODEL_SIDE, overlap_height_ratio=ratio,
            overlap_width_ratio=ratio,
        )  # fmt: skip
        tiles = [np.ascontiguousarray(image) for image in sliced.images]  # as a model takes them, and ours are
    found = []
    for tile, (x, y) in zip(tiles, sliced.starting_pixels, strict=True):
        with clock.stage("model"):
            boxes = model.boxes((x, y, x + tile.shape[1], y + tile.shape[0]))
        with clock.stage("merging"):
            found += [
                ObjectPrediction(
                    bbox=box, category_id=0, category_name="ship", score=0.9, shift_amount=[x, y],
                    full_shape=[side, side],
                ).get_shifted_object_prediction()
                for box in boxes.tolist()
            ]  # fmt: skip
    with clock.stage("merging"):
        merged = GreedyNMMPostprocess(match_threshold=0.5, match_metric="IOS", class_agnostic=False)(found)
    return {"side": side, "tiles": len(tiles), **clock.read(), "objects": model.objects, "found": len(merged)}
