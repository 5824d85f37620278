"""One owner of the device: requests of many callers become mixed batches over one resident model.

The event loop owns the queue, one worker thread owns the model; nothing is shared between them but the batch in
hand, so there are no locks. A batch starts the moment the previous one ends, with whatever waits by then: an idle
engine answers at once, a loaded one batches by itself. Tiles are taken from the waiting requests in turn, so a
large scene cannot make a short question wait for all of its tiles.

The engine knows nothing about rasters, HTTP or text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from model_server.protocol import (
    DENSE_TASKS,
    MAX_TILES,
    PerceiveRequest,
    PerceiveResponse,
    TaskNotServed,
    TileAnswer,
    TileCaption,
    TileChange,
    TileClasses,
    TileMasks,
    TileObjects,
    TileVqa,
)

if TYPE_CHECKING:  # the model brings torch, which takes seconds to import: only the worker thread pays for it
    from model_server.perceiver import Perceiver
    from model_server.query import Query

logger = logging.getLogger(__name__)

MAX_BATCH = 16
DENSE_COST = 4  # places in a batch of a tile whose pixels are answered: it takes about so many times as long
MAX_WAITING = 2 * MAX_TILES


class EngineError(Exception):
    """Base of what `Engine.perceive` raises."""


class EngineBusy(EngineError):
    """The queue is full; `retry_after_s` is about the time it takes to empty."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} tiles wait already; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineNotReady(EngineError):
    """The model is still loading, could not be loaded, or the engine is closing."""


class QueryFailed(EngineError):
    """The model failed on a tile of this very request."""


@dataclass
class Stats:
    """Counters since the start. A shared batch held tiles of more than one request."""

    requests: int = 0
    tiles: int = 0
    batches: int = 0
    shared_batches: int = 0
    largest_batch: int = 0


@dataclass(eq=False)
class _Job:
    """One request in the queue: its items, each a tile or a pair of tiles; those before `taken` have gone to the
    device."""

    request: PerceiveRequest
    items: Sequence[tuple[np.ndarray, ...]]
    done: asyncio.Future[None]
    answers: dict[int, TileAnswer] = field(default_factory=dict)
    taken: int = 0

    @property
    def waiting(self) -> int:
        """Tiles that have not gone to the device yet."""
        return sum(len(item) for item in self.items[self.taken :])

    @property
    def cost(self) -> int:
        """Places in a batch that an item of it takes."""
        return len(self.items[0]) * (DENSE_COST if self.request.task in DENSE_TASKS else 1)


class Engine:
    """Batches requests over one model.

    Args:
        load: makes the model, warmed up; runs in the worker thread.
        max_batch: places in one batch: tiles, where one that is answered pixel by pixel takes `DENSE_COST` of them.
        max_waiting: most tiles in the queue; a request beyond it is refused with `EngineBusy`.
    """

    def __init__(
        self, load: Callable[[], Perceiver], *, max_batch: int = MAX_BATCH, max_waiting: int = MAX_WAITING
    ) -> None:
        self.stats = Stats()
        self.perceiver: Perceiver | None = None
        self._load = load
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._queue: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._dispatcher: asyncio.Task[None] | None = None
        self._seconds_per_tile = 0.1

    async def start(self) -> None:
        """Load the model and begin to answer. Raises what `load` raises."""
        perceiver = await asyncio.get_running_loop().run_in_executor(self._device, self._load)
        self.perceiver = perceiver
        self._dispatcher = asyncio.create_task(self._dispatch(perceiver))

    async def close(self) -> None:
        """Refuse new requests, answer the waiting ones, release the worker thread."""
        self._closing = True
        self._arrived.set()
        if self._dispatcher is not None:
            await self._dispatcher
        self._device.shutdown(wait=False)

    @property
    def ready(self) -> bool:
        return self._dispatcher is not None and not self._closing

    @property
    def waiting(self) -> int:
        """Tiles that wait in the queue, those on the device not counted."""
        return sum(job.waiting for job in self._queue)

    def metrics(self) -> dict[str, int]:
        return {"waiting": self.waiting, **asdict(self.stats)}

    async def perceive(self, request: PerceiveRequest, tiles: Sequence[np.ndarray]) -> PerceiveResponse:
        """Answer every tile (each uint8 [H, W, 3]) of a request, or every two tiles of detect_change.

        Cancelling the call takes it out of the queue.

        Raises:
            TaskNotServed: the model has no part for this task.
            EngineNotReady: the model is not loaded (yet), or the engine is closing.
            EngineBusy: the queue is full.
            QueryFailed: the model failed on one of these tiles.
        """
        if self.perceiver is None or not self.ready:
            raise EngineNotReady("the model server is closing" if self._closing else "the model is still loading")
        if request.task not in self.perceiver.tasks:
            raise TaskNotServed(request.task, self.perceiver.info.model, self.perceiver.tasks)
        waiting = self.waiting
        if waiting + len(tiles) > self._max_waiting:
            raise EngineBusy(waiting, max(1.0, waiting * self._seconds_per_tile))
        started = time.perf_counter()
        job = _Job(request, _items(request, tiles), asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._arrived.set()
        self.stats.requests += 1
        try:
            await job.done
        finally:
            self._leave(job)
        return _response(self.perceiver, job, time.perf_counter() - started)

    def _leave(self, job: _Job) -> None:
        if job in self._queue:  # cancelled or failed with tiles still waiting
            self._queue.remove(job)

    async def _dispatch(self, perceiver: Perceiver) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                if self._closing:
                    return
                self._arrived.clear()
                continue
            started = time.perf_counter()
            outcomes = await loop.run_in_executor(self._device, _answer, perceiver, batch)
            self._count(batch, time.perf_counter() - started)
            for (job, index), outcome in zip(batch, outcomes, strict=True):
                self._deliver(job, index, outcome)

    def _next_batch(self) -> list[tuple[_Job, int]]:
        """Waiting items that take up to `max_batch` places, one of each request in turn; at least one."""
        batch: list[tuple[_Job, int]] = []
        room = self._max_batch
        while self._queue and (self._queue[0].cost <= room or not batch):
            job = self._queue.popleft()
            batch.append((job, job.taken))
            room -= job.cost
            job.taken += 1
            if job.taken < len(job.items):
                self._queue.append(job)
        return batch

    def _count(self, batch: list[tuple[_Job, int]], seconds: float) -> None:
        tiles = sum(len(job.items[index]) for job, index in batch)
        self.stats.tiles += tiles
        self.stats.batches += 1
        self.stats.shared_batches += len({id(job) for job, _ in batch}) > 1
        self.stats.largest_batch = max(self.stats.largest_batch, tiles)
        self._seconds_per_tile += 0.2 * (seconds / tiles - self._seconds_per_tile)

    def _deliver(self, job: _Job, index: int, outcome: TileAnswer | QueryFailed) -> None:
        if job.done.done():  # the caller has gone, or another tile of it failed
            return
        if isinstance(outcome, QueryFailed):
            self._leave(job)
            job.done.set_exception(outcome)
            return
        job.answers[index] = outcome
        if len(job.answers) == len(job.items):
            job.done.set_result(None)


def _answer(perceiver: Perceiver, batch: list[tuple[_Job, int]]) -> list[TileAnswer | QueryFailed]:
    """Runs in the worker thread. When the batch fails, each tile goes by itself, so only the guilty ones fail."""
    queries = [_query(job.request, job.items[index]) for job, index in batch]
    try:
        return list(_checked(perceiver, queries))
    except Exception:  # whatever the model raises must not end the device's thread
        logger.exception("batch failed, its %d queries are tried one by one", len(queries))
    return [_answer_alone(perceiver, query) for query in queries]


def _answer_alone(perceiver: Perceiver, query: Query) -> TileAnswer | QueryFailed:
    try:
        return _checked(perceiver, [query])[0]
    except Exception as error:  # as above: this caller is told, the others are not harmed
        logger.error("task=%s failed: %r", query.task, error)
        return QueryFailed(f"the model failed on this {query.task} request: {type(error).__name__}: {error}")


def _checked(perceiver: Perceiver, queries: list[Query]) -> Sequence[TileAnswer]:
    answers = perceiver.answer(queries)
    if len(answers) != len(queries):
        raise RuntimeError(f"{len(queries)} queries got {len(answers)} answers")
    return answers


def _items(request: PerceiveRequest, tiles: Sequence[np.ndarray]) -> list[tuple[np.ndarray, ...]]:
    """What is answered by itself: each tile, or each pair of before and after."""
    if request.task == "detect_change":
        return list(zip(tiles[::2], tiles[1::2], strict=True))
    return [(tile,) for tile in tiles]


def _query(request: PerceiveRequest, item: tuple[np.ndarray, ...]) -> Query:
    from model_server.query import Query

    image, *after = item
    return Query(
        task=request.task,
        image=image,
        text=request.text,
        labels=tuple(request.labels),
        detail=request.detail,
        after=after[0] if after else None,
        gsd_m=request.gsd_m,
        modality=request.modality,
    )


def _response(perceiver: Perceiver, job: _Job, elapsed_s: float) -> PerceiveResponse:
    answers = [job.answers[i] for i in range(len(job.items))]
    task_token, expert = perceiver.route(job.request.task)
    return PerceiveResponse(
        captions=[answer for answer in answers if isinstance(answer, TileCaption)],
        vqa=[answer for answer in answers if isinstance(answer, TileVqa)],
        classes=[answer for answer in answers if isinstance(answer, TileClasses)],
        objects=[answer for answer in answers if isinstance(answer, TileObjects)],
        masks=[answer for answer in answers if isinstance(answer, TileMasks)],
        changes=[answer for answer in answers if isinstance(answer, TileChange)],
        model=perceiver.info,
        task_token=task_token,
        expert=expert,
        warnings=perceiver.warnings(job.request),
        elapsed_s=elapsed_s,
    )
