"""A perceiver under a test's control: it waits at a gate, fails on command and records its batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from model_server.protocol import (
    ModelInfo,
    PerceiveRequest,
    Task,
    TileAnswer,
    TileCaption,
    TileChange,
    TileClasses,
    TileMasks,
    TileObjects,
    TileVqa,
)
from model_server.query import Query

GUILTY = 13  # a tile of this colour makes the whole batch fail
INFO = ModelInfo(model="scripted", weights_digest="0", attention_backend="none", precision="none", device="none")


def tile(colour: int) -> np.ndarray:
    return np.full((4, 4, 3), colour, np.uint8)


class ScriptedPerceiver:
    """Answers with the colour of the tile. `gate` cleared: the device is held until it is set."""

    info = INFO
    taxonomy = ("beach", "forest")
    tasks: tuple[Task, ...] = ("caption", "vqa", "classify", "ground", "segment", "detect_change")

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []
        self.memory = 1000  # tiles that fit into it together

    def route(self, task: str) -> tuple[str, str]:
        return f"[{task}]", "image"

    def warnings(self, request: PerceiveRequest) -> list[str]:
        return []

    def answer(self, queries: Sequence[Query]) -> list[TileAnswer]:
        colours = [int(query.image[0, 0, 0]) for query in queries]
        self.batches.append(colours)
        assert self.gate.wait(300), "the test forgot to open the gate"
        if len(colours) > self.memory:
            raise torch.OutOfMemoryError("no memory is left on this scripted device")
        if GUILTY in colours:
            raise ZeroDivisionError("an unlucky tile")
        return [_answer(query, colour) for query, colour in zip(queries, colours, strict=True)]


def _answer(query: Query, colour: int) -> TileAnswer:
    if query.task == "caption":
        return TileCaption(caption=f"colour {colour}", confidence=1)
    if query.task == "vqa":
        return TileVqa(answer=f"{query.text} {colour}", kind="text", confidence=1, abstained=False, alternatives=[])
    if query.task == "classify":
        return TileClasses(labels=list(query.labels), scores=[colour / 255] * len(query.labels))
    plane, scale = query.image[..., 0], query.gsd_m or 1
    if query.task == "ground":
        return TileObjects(boxes=[(0, 0, colour, colour)], scores=[0.5], threshold=0.5, known=True, scale=scale)
    if query.task == "segment":
        n = len(query.labels)
        return TileMasks(labels=list(query.labels), thresholds=[0.5] * n, known=[query.modality == "sar"] * n,
                         scale=scale, probabilities=np.stack([plane] * n))  # fmt: skip
    assert query.after is not None
    return TileChange(threshold=0.5, scale=scale, probabilities=query.after[..., 0] - plane)
