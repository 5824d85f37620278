"""Tiny sets with boxes, masks and change, and a model that sees them by their colours, with faults that are known.

Ships are red, each in a red of its own; a ship with some green in it is overlooked. Water is blue. On every image that
is not of a single colour the model also sees one ship that is not there, at a score below its threshold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from toy import ScriptedModel

from model_server.perceiver import Query
from model_server.protocol import TileAnswer, TileChange, TileMasks, TileObjects

WIDTH, HEIGHT = 90, 60
GROUND, WATER = (90, 80, 70), (10, 20, 220)
Box = tuple[int, int, int, int]


def write_records(folder: Path, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / name / "records.jsonl").open("a") as file:
        file.writelines(json.dumps({"width": WIDTH, "height": HEIGHT, **row}) + "\n" for row in rows)


def paint(path: Path, ships: Sequence[Box] = (), overlooked: Sequence[Box] = (), water: Box | None = None) -> None:
    """Write the picture of a scene."""
    image = np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)
    if water:
        image[water[1] : water[3], water[0] : water[2]] = WATER
    for i, (x1, y1, x2, y2) in enumerate([*ships, *overlooked]):
        image[y1:y2, x1:x2] = (200 + i, 60 if i >= len(ships) else 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def paint_mask(path: Path, box: Box | None, value: int) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    if box:
        mask[box[1] : box[3], box[0] : box[2]] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_ships(folder: Path, split: str, scenes: Sequence[tuple[Sequence[Box], Sequence[Box]]]) -> None:
    """Set `inshore_ships`, whose labels are complete: for each scene the ships that can be seen and the others."""
    rows = []
    for i, (ships, overlooked) in enumerate(scenes):
        path = f"images/{split}_{i}.png"
        paint(folder / "inshore_ships" / path, ships, overlooked)
        objects = [{"label": "ship", "bbox": list(box)} for box in (*ships, *overlooked)]
        rows.append({"id": f"ships_{split}_{i}", "split": split, "images": [path], "gsd_m": 0.5, "objects": objects})
    write_records(folder, "inshore_ships", rows)


def write_water(folder: Path, split: str, scenes: Sequence[tuple[Box, Box | None]]) -> None:
    """Set `flood`: for each scene the water as painted and as labelled."""
    rows = []
    for i, (painted, labelled) in enumerate(scenes):
        path, mask = f"images/{split}_{i}.png", f"masks/{split}_{i}.png"
        paint(folder / "flood" / path, water=painted)
        paint_mask(folder / "flood" / mask, labelled, 1)
        rows.append(
            {"id": f"water_{split}_{i}", "split": split, "images": [path], "mask": mask,
             "mask_classes": {"0": "background", "1": "water"}}
        )  # fmt: skip
    write_records(folder, "flood", rows)


def write_pairs(folder: Path, split: str, scenes: Sequence[tuple[Box | None, Box | None]]) -> None:
    """Set `oscd`: for each pair the water that has come and the change as labelled."""
    rows = []
    for i, (come, labelled) in enumerate(scenes):
        paths = [f"images/{split}_{i}_{when}.png" for when in ("before", "after")]
        paint(folder / "oscd" / paths[0])
        paint(folder / "oscd" / paths[1], water=come)
        mask = f"masks/{split}_{i}.png"
        paint_mask(folder / "oscd" / mask, labelled, 255)
        rows.append({"id": f"pair_{split}_{i}", "split": split, "images": paths, "gsd_m": 10, "change_mask": mask})
    write_records(folder, "oscd", rows)


class ScriptedDense(ScriptedModel):
    """Answers phrases in `names` (phrase -> what it takes it for), and says that it does not know others."""

    names: Mapping[str, str] = {"ship": "ship", "ships": "ship", "vessels": "ship", "water": "water", "flood": "water"}

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Query] = []

    def answer(self, queries: Sequence[Query]) -> list[TileAnswer]:
        self.asked += queries
        return [self._dense(query) if query.task in ("ground", "segment", "detect_change") else self._one(query)
                for query in queries]  # fmt: skip

    def _dense(self, query: Query) -> TileAnswer:
        if query.task == "ground":
            return self._objects(query)
        if query.task == "segment":
            planes = [_blue(query.image) if self.names.get(label) == "water" else np.zeros(query.image.shape[:2], bool)
                      for label in query.labels]  # fmt: skip
            return TileMasks(
                labels=list(query.labels), thresholds=[0.5] * len(planes), known=[True] * len(planes), scale=1,
                probabilities=np.stack(planes).astype(np.uint8) * 200,
            )  # fmt: skip
        assert query.after is not None
        differs = np.abs(query.image.astype(int) - query.after).max(axis=2) > 100
        return TileChange(threshold=0.4, scale=1, probabilities=differs.astype(np.uint8) * 128)

    def _objects(self, query: Query) -> TileObjects:
        image, text = query.image, query.text
        known = any(name in text for name in self.names)
        boxes: list[tuple[float, float, float, float]] = []
        if any(self.names[name] == "ship" for name in self.names if name in text):
            red = np.where((image[..., 0] >= 200) & (image[..., 1] < 30), image[..., 0], 0)
            for value in np.unique(red[red > 0]):
                rows, columns = np.nonzero(red == value)
                boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        scores = [0.9 - 0.01 * i for i in range(len(boxes))]
        if known and image.std() > 0 and (image != image[0, 0]).any():
            boxes, scores = [*boxes, (0, 50, 5, 60)], [*scores, 0.3]
        return TileObjects(boxes=boxes, scores=scores, threshold=0.5, known=known, scale=1)


def _blue(image: np.ndarray) -> np.ndarray:
    return (image == WATER).all(axis=2)
