"""A caller's request within the engine: the queries it is made of, and their answers as its response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from model_server.batching.scheduler import Job
from model_server.protocol import (
    PerceiveRequest,
    PerceiveResponse,
    TileAnswer,
    TileCaption,
    TileChange,
    TileClasses,
    TileMasks,
    TileObjects,
    TileVqa,
)
from model_server.query import Query
from model_server.resident import Resident


@dataclass(eq=False)
class Pending(Job):
    """A request with the future that its caller waits for, which is not done before all items are answered."""

    done: asyncio.Future[None] = field(kw_only=True)
    arrived: float = field(default_factory=time.perf_counter)
    answers: dict[int, TileAnswer] = field(default_factory=dict)

    def response(self, resident: Resident, elapsed_s: float) -> PerceiveResponse:
        """What the caller gets; all items have been answered."""
        answers = [self.answers[i] for i in range(len(self.queries))]
        task_token, expert = resident.route(self.request.task)
        return PerceiveResponse(
            captions=[answer for answer in answers if isinstance(answer, TileCaption)],
            vqa=[answer for answer in answers if isinstance(answer, TileVqa)],
            classes=[answer for answer in answers if isinstance(answer, TileClasses)],
            objects=[answer for answer in answers if isinstance(answer, TileObjects)],
            masks=[answer for answer in answers if isinstance(answer, TileMasks)],
            changes=[answer for answer in answers if isinstance(answer, TileChange)],
            model=resident.info,
            task_token=task_token,
            expert=expert,
            warnings=resident.warnings(self.request),
            elapsed_s=elapsed_s,
        )


Item = tuple[Pending, int]  # one of its queries


def queries_of(request: PerceiveRequest, tiles: Sequence[np.ndarray]) -> list[Query]:
    """What is answered by itself: each tile, or each pair of before and after."""
    pairs = request.task == "detect_change"
    afters: Sequence[np.ndarray | None] = tiles[1::2] if pairs else [None] * len(tiles)
    return [
        Query(
            task=request.task,
            image=image,
            text=request.text,
            labels=tuple(request.labels),
            detail=request.detail,
            after=after,
            gsd_m=request.gsd_m,
            modality=request.modality,
            anchors=anchors,
        )
        for image, after, anchors in zip(
            tiles[::2] if pairs else tiles, afters, request.anchors or [None] * len(afters), strict=True
        )
    ]
