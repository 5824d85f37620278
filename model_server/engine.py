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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from model_server.counters import Counters, EngineMetrics
from model_server.protocol import (
    DENSE_TASKS,
    MAX_TILES,
    PerceiveRequest,
    PerceiveResponse,
    Priority,
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
    from model_server.query import Query
    from model_server.resident import Resident

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_BATCH = 16
DENSE_COST = 4  # places in a batch of a tile whose pixels are answered: it takes about so many times as long
MAX_WAITING = 2 * MAX_TILES
MAX_CALLS = 32  # of `Engine.call` at a time


class EngineError(Exception):
    """Base of what `Engine.perceive` raises."""


class EngineBusy(EngineError):
    """The queue is full; `retry_after_s` is about the time it takes to empty."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} tiles wait already; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineNotReady(EngineError):
    """The model is still loading, or could not be loaded."""


class EngineClosing(EngineNotReady):
    """The engine answers what it has and takes nothing more."""


class DeadlinePassed(EngineError):
    """The answer was not there in time; what was left of the work is dropped. Items are tiles, or pairs of them."""

    def __init__(self, deadline_s: float, done: int, items: int) -> None:
        super().__init__(
            f"the deadline of {deadline_s:g} s passed with {done} of {items} tiles answered: give more time, or ask "
            "for a smaller region"
        )
        self.done, self.items = done, items


class QueryFailed(EngineError):
    """The model failed on a tile of this very request."""


@dataclass(eq=False)
class _Job:
    """One request in the queue: its items, each a tile or a pair of tiles; those before `taken` have gone to the
    device."""

    request: PerceiveRequest
    items: Sequence[tuple[np.ndarray, ...]]
    done: asyncio.Future[None]
    priority: Priority
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
        self, load: Callable[[], Resident], *, max_batch: int = MAX_BATCH, max_waiting: int = MAX_WAITING
    ) -> None:
        self.stats = Counters()
        self.perceiver: Resident | None = None
        self._load = load
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._queue: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._dispatcher: asyncio.Task[None] | None = None
        self._seconds_per_tile = 0.1
        self._calls = 0

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

    def metrics(self) -> EngineMetrics:
        c = self.stats
        waiting: dict[Priority, int] = {"interactive": 0, "bulk": 0}
        for job in self._queue:
            waiting[job.priority] += job.waiting
        return {
            "waiting": self.waiting,
            "waiting_by_priority": waiting,
            "on_device": 0,
            "decoding": 0,
            "requests": dict(c.requests),
            "rejections": dict(c.rejections),
            "cancellations": c.cancellations,
            "deadlines_passed": c.deadlines_passed,
            "failures": c.failures,
            "tiles": c.tiles,
            "batches": c.batches,
            "shared_batches": c.shared_batches,
            "largest_batch": c.largest_batch,
            "halvings": c.halvings,
            "tokens": c.tokens,
            "steps": c.steps,
            "batch_tiles": c.batch_tiles.values(),
            "step_sequences": c.step_sequences.values(),
            "queued_s": {priority: h.values() for priority, h in c.queued_s.items()},
            "first_token_s": c.first_token_s.values(),
            "answer_s": {priority: h.values() for priority, h in c.answer_s.items()},
            "cache": {"hits": 0, "misses": 0, "evictions": 0, "entries": 0, "bytes": 0, "limit_bytes": 0},
            "memory": {},
        }

    async def perceive(
        self,
        request: PerceiveRequest,
        tiles: Sequence[np.ndarray],
        *,
        priority: Priority | None = None,
        deadline_s: float | None = None,
        caller: str | None = None,
    ) -> PerceiveResponse:
        """Answer every tile (each uint8 [H, W, 3]) of a request, or every two tiles of detect_change.

        Cancelling the call takes it out of the queue and off the device.

        Args:
            priority, deadline_s, caller: in place of the request's own fields of these names; None = as the request
                says. A server that knows who calls passes it, so that one caller cannot pose as many.

        Raises:
            TaskNotServed: the model has no part for this task.
            EngineNotReady: the model is not loaded (yet); `EngineClosing`: the engine is closing.
            EngineBusy: the queue is full.
            DeadlinePassed: `deadline_s` seconds have passed since the call.
            QueryFailed: the model failed on one of these tiles.
        """
        perceiver = self._admitting(request, len(tiles))
        started = time.perf_counter()
        deadline_s = request.deadline_s if deadline_s is None else deadline_s
        job = _Job(
            request, _items(request, tiles), asyncio.get_running_loop().create_future(), priority or request.priority
        )
        self._queue.append(job)
        self._arrived.set()
        self.stats.accept(request.task)
        try:
            async with asyncio.timeout(deadline_s):
                await job.done
        except TimeoutError:
            self.stats.deadlines_passed += 1
            raise DeadlinePassed(deadline_s or 0.0, len(job.answers), len(job.items)) from None
        except asyncio.CancelledError:
            self.stats.cancellations += 1
            raise
        finally:
            self._leave(job)
        elapsed_s = time.perf_counter() - started
        self.stats.answer_s[job.priority].add(elapsed_s)
        return _response(perceiver, job, elapsed_s)

    async def call(self, work: Callable[[Resident], _T]) -> _T:
        """What `work` makes of the model: in the worker thread, when it is next free. For short work that is no task
        on tiles, such as vectors.

        Raises:
            EngineNotReady: the model is not loaded (yet); `EngineClosing`: the engine is closing.
            EngineBusy: `MAX_CALLS` wait already.
            QueryFailed: `work` failed.
        """
        perceiver = self._ready_model()
        if self._calls >= MAX_CALLS:
            self.stats.reject("busy")
            raise EngineBusy(self.waiting, 1.0)
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._device, work, perceiver)
        except Exception as error:  # whatever the model raises: this caller is told
            logger.error("a call to the model failed: %s", type(error).__name__)
            raise QueryFailed(f"the model failed on this call: {type(error).__name__}: {error}") from error
        finally:
            self._calls -= 1

    def _admitting(self, request: PerceiveRequest, tiles: int) -> Resident:
        """The perceiver, where it can take these tiles; raises as `perceive` says."""
        perceiver = self._ready_model()
        if request.task not in perceiver.tasks:
            self.stats.reject("not_served")
            raise TaskNotServed(request.task, perceiver.info.model, perceiver.tasks)
        waiting = self.waiting
        if waiting + tiles > self._max_waiting:
            self.stats.reject("busy")
            raise EngineBusy(waiting, max(1.0, waiting * self._seconds_per_tile))
        return perceiver

    def _ready_model(self) -> Resident:
        if self._closing:
            self.stats.reject("closing")
            raise EngineClosing("the model server is closing")
        if self.perceiver is None or not self.ready:
            self.stats.reject("not_ready")
            raise EngineNotReady("the model is still loading")
        return self.perceiver

    def _leave(self, job: _Job) -> None:
        if job in self._queue:  # cancelled or failed with tiles still waiting
            self._queue.remove(job)

    async def _dispatch(self, perceiver: Resident) -> None:
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
        self.stats.batch_tiles.add(tiles)
        self.stats.largest_batch = max(self.stats.largest_batch, tiles)
        self._seconds_per_tile += 0.2 * (seconds / tiles - self._seconds_per_tile)

    def _deliver(self, job: _Job, index: int, outcome: TileAnswer | QueryFailed) -> None:
        if job.done.done():  # the caller has gone, or another tile of it failed
            return
        if isinstance(outcome, QueryFailed):
            self.stats.failures += 1
            self._leave(job)
            job.done.set_exception(outcome)
            return
        job.answers[index] = outcome
        if len(job.answers) == len(job.items):
            job.done.set_result(None)


def _answer(perceiver: Resident, batch: list[tuple[_Job, int]]) -> list[TileAnswer | QueryFailed]:
    """Runs in the worker thread. When the batch fails, each tile goes by itself, so only the guilty ones fail."""
    queries = [_query(job.request, job.items[index]) for job, index in batch]
    try:
        return list(_checked(perceiver, queries))
    except Exception:  # whatever the model raises must not end the device's thread
        logger.exception("batch failed, its %d queries are tried one by one", len(queries))
    return [_answer_alone(perceiver, query) for query in queries]


def _answer_alone(perceiver: Resident, query: Query) -> TileAnswer | QueryFailed:
    try:
        return _checked(perceiver, [query])[0]
    except Exception as error:  # as above: this caller is told, the others are not harmed
        logger.error("task=%s failed: %r", query.task, error)
        return QueryFailed(f"the model failed on this {query.task} request: {type(error).__name__}: {error}")


def _checked(perceiver: Resident, queries: list[Query]) -> Sequence[TileAnswer]:
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


def _response(perceiver: Resident, job: _Job, elapsed_s: float) -> PerceiveResponse:
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
