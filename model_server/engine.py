"""One owner of the device: requests of many callers become mixed batches over one resident model.

The event loop owns the queue, one worker thread owns the model; they pass each other one piece of work at a time, so
there are no locks. A piece is a pass, which takes new tiles in, or a step, which writes one more token of every answer
in words that is under way. Where a pass can be filled, passes and steps alternate; where it cannot, those who wait for
it wait a few steps for more to come. So requests join and leave between tokens: a short answer does not wait for a long
one, nor a question for all the tiles of a large scene. An idle engine answers at once, a loaded one batches by itself.
Interactive work goes before bulk work, which has a share of the device all the same.

The engine knows nothing about rasters, HTTP or text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar

import numpy as np

from model_server.batching.counters import CacheValues, Counters, EngineMetrics
from model_server.batching.engine_errors import (
    DeadlinePassed,
    EngineBusy,
    EngineClosing,
    EngineError,
    EngineNotReady,
    QueryFailed,
)
from model_server.batching.scheduler import PRIORITIES, Job, Scheduler, Shares
from model_server.device import CANDIDATES, Begun, Device, Outcome, Room, Stepped
from model_server.protocol import (
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
    Wire,
)
from model_server.query import Query
from model_server.resident import Resident

__all__ = [
    "DeadlinePassed", "Engine", "EngineBusy", "EngineClosing", "EngineError", "EngineNotReady", "QueryFailed",
]  # fmt: skip

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_WAITING = 2 * MAX_TILES
MAX_CALLS = 32  # of `Engine.call` at a time
WORDS = ("caption", "vqa")  # written token by token
PATIENCE = 4  # steps of others' answers that a pass which is not full waits for more tiles
NO_CACHE: CacheValues = {"hits": 0, "misses": 0, "evictions": 0, "entries": 0, "bytes": 0, "limit_bytes": 0}


@dataclass(eq=False)
class _Job(Job):
    """A request with the future that its caller waits for, which is not done before all items are answered."""

    done: asyncio.Future[None] = field(kw_only=True)
    arrived: float = field(default_factory=time.perf_counter)
    answers: dict[int, TileAnswer] = field(default_factory=dict)


class Engine:
    """Batches requests over one model.

    Args:
        load: makes the model, warmed up; runs in the worker thread.
        max_batch: places in one pass: new tiles, where one that is answered pixel by pixel takes `device.DENSE_COST` of
            them; half as many of bulk work. None = what suits the model.
        max_waiting: most tiles in the queue, of each priority; a request beyond it is refused with `EngineBusy`. A
            named caller may have half of them.
    """

    def __init__(
        self, load: Callable[[], Resident], *, max_batch: int | None = None, max_waiting: int = MAX_WAITING
    ) -> None:
        self.stats = Counters()
        self.perceiver: Resident | None = None
        self._load = load
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._owner: Device | None = None
        self._scheduler = Scheduler()
        self._shares = Shares()
        self._jobs: set[_Job] = set()  # whose callers wait
        self._room: Room = {}
        self._taking: list[tuple[_Job, int]] = []  # the pass under way
        self._writing: dict[Priority, dict[Hashable, tuple[_Job, int]]] = {priority: {} for priority in PRIORITIES}
        self._unwanted: list[Hashable] = []  # written for callers that have left
        self._steps_since: dict[Priority, int] = dict.fromkeys(PRIORITIES, 0)  # the last pass
        self._arrived = asyncio.Event()
        self._closing = False
        self._dispatcher: asyncio.Task[None] | None = None
        self._seconds_per_tile = 0.1
        self._busy_s = 0.0
        self._calls = 0

    async def start(self) -> None:
        """Load the model and begin to answer. Raises what `load` raises."""
        loop = asyncio.get_running_loop()
        self.perceiver = model = await loop.run_in_executor(self._device, self._load)
        self._owner = owner = Device(model, self._max_batch)
        self._room = owner.room()
        if owner.model.plan is not None:
            logger.info("memory %s", owner.model.plan)
        self._dispatcher = asyncio.create_task(self._dispatch(owner))
        self._dispatcher.add_done_callback(self._dispatch_ended)

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
        return sum(self._scheduler.waiting(priority) for priority in PRIORITIES)

    def metrics(self) -> EngineMetrics:
        c, owner = self.stats, self._owner
        plan = None if owner is None else owner.model.plan
        writing = [item for written in self._writing.values() for item in written.values()]
        return {
            "waiting": self.waiting,
            "waiting_by_priority": {priority: self._scheduler.waiting(priority) for priority in PRIORITIES},
            "on_device": sum(job.queries[index].tiles for job, index in (*self._taking, *writing)),
            "decoding": len(writing),
            "requests": dict(c.requests),
            "rejections": dict(c.rejections),
            "cancellations": c.cancellations,
            "deadlines_passed": c.deadlines_passed,
            "failures": c.failures,
            "tiles": c.tiles,
            "batches": c.batches,
            "shared_batches": c.shared_batches,
            "largest_batch": c.largest_batch,
            "halvings": 0 if owner is None else owner.halvings,
            "tokens": c.tokens,
            "steps": c.steps,
            "batch_tiles": c.batch_tiles.values(),
            "step_sequences": c.step_sequences.values(),
            "queued_s": {priority: h.values() for priority, h in c.queued_s.items()},
            "first_token_s": c.first_token_s.values(),
            "answer_s": {priority: h.values() for priority, h in c.answer_s.items()},
            "cache": NO_CACHE if owner is None else owner.model.cache.values(),
            "memory": {} if plan is None else asdict(plan),
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
        job = _Job(
            request, _queries(request, tiles), priority or request.priority,
            request.caller if caller is None else caller, done=asyncio.get_running_loop().create_future(),
        )  # fmt: skip
        perceiver = self._admit(job)
        deadline_s = request.deadline_s if deadline_s is None else deadline_s
        self._jobs.add(job)
        self._scheduler.add(job)
        self._arrived.set()
        self.stats.accept(request.task)
        try:
            async with asyncio.timeout(deadline_s):
                await job.done
        except TimeoutError:
            self.stats.deadlines_passed += 1
            raise DeadlinePassed(deadline_s or 0.0, len(job.answers), len(job.queries)) from None
        except asyncio.CancelledError:
            self.stats.cancellations += 1
            raise
        finally:
            self._leave(job)
        elapsed_s = time.perf_counter() - job.arrived
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

    def _admit(self, job: _Job) -> Resident:
        """The model, where there is room for the job in the queue; raises as `perceive` says."""
        model, request = self._ready_model(), job.request
        if request.task not in model.tasks:
            self.stats.reject("not_served")
            raise TaskNotServed(request.task, model.info.model, model.tasks)
        waiting = self._scheduler.waiting(job.priority)
        full = waiting + job.waiting > self._max_waiting
        if job.caller:
            own = self._scheduler.waiting(job.priority, job.caller)
            full = full or own + job.waiting > self._max_waiting // 2
        if full:
            self.stats.reject("busy")
            raise EngineBusy(waiting, max(1.0, waiting * self._seconds_per_tile))
        return model

    def _ready_model(self) -> Resident:
        if self._closing:
            self.stats.reject("closing")
            raise EngineClosing("the model server is closing")
        if self.perceiver is None or not self.ready:
            self.stats.reject("not_ready")
            raise EngineNotReady("the model is still loading")
        return self.perceiver

    def _leave(self, job: _Job) -> None:
        """Nobody waits for what is left of a job that was cancelled, failed or ran out of time."""
        self._jobs.discard(job)
        self._scheduler.remove(job)
        written = self._writing[job.priority]
        unwanted = [name for name, (of, _) in written.items() if of is job]
        for name in unwanted:
            del written[name]
        self._unwanted += unwanted
        self._arrived.set()

    async def _dispatch(self, device: Device) -> None:
        """Everything that the device does, one piece of work after the other."""
        run = asyncio.get_running_loop().run_in_executor
        while True:
            if self._unwanted:
                unwanted, self._unwanted = self._unwanted, []
                self._room = await run(self._device, device.drop, unwanted)
                continue
            wanting: list[Priority] = [p for p in PRIORITIES if self._next(p) is not None]
            if not wanting:
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
                continue
            priority = self._shares.choose(wanting)
            started = time.perf_counter()
            if self._next(priority) == "take":
                self._steps_since[priority] = 0
                offered = self._offer(priority)
                begun = await run(self._device, device.take, [job.queries[i] for job, i in offered], priority)
                self._begin(offered, begun, priority)
            else:
                self._steps_since[priority] += 1
                stepped = await run(self._device, device.step, priority)
                self._end(stepped, priority)
            self._spend(priority, time.perf_counter() - started)

    def _dispatch_ended(self, dispatcher: asyncio.Task[None]) -> None:
        """Nothing may end it but `close`; where a fault of ours does, nobody is left waiting."""
        if dispatcher.cancelled() or dispatcher.exception() is None:
            return
        logger.critical("the engine has failed and takes nothing more", exc_info=dispatcher.exception())
        self._closing = True
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(EngineClosing("the engine has failed; start the model server again"))

    def _next(self, priority: Priority) -> Literal["take", "step"] | None:
        """What is to be done at a priority: where there is work for both, a step after each pass, and as many more as
        `PATIENCE` says while a pass would not be full."""
        takes = self._scheduler.has_work(priority, self._room[priority])
        if self._writing[priority] and not (takes and self._steps_since[priority] >= self._patience(priority)):
            return "step"
        return "take" if takes else None

    def _patience(self, priority: Priority) -> int:
        full = self._owner is not None and self._scheduler.waiting(priority) >= self._owner.places[priority]
        return 1 if full else PATIENCE

    def _offer(self, priority: Priority) -> list[tuple[_Job, int]]:
        offered = [(job, index) for job, index in self._scheduler.take(priority, self._room[priority], CANDIDATES)
                   if isinstance(job, _Job)]  # fmt: skip
        self._taking = offered
        return offered

    def _begin(self, offered: list[tuple[_Job, int]], begun: Begun, priority: Priority) -> None:
        """What a pass has brought: those it had no place for go back into the queue."""
        taken, back = offered[: len(begun.outcomes)], offered[len(begun.outcomes) :]
        self._taking = []
        self._scheduler.put_back([(job, index) for job, index in back if not job.done.done()])
        self._room = begun.room
        now = time.perf_counter()
        tiles = sum(job.queries[index].tiles for job, index in taken)
        self.stats.batches += 1
        self.stats.shared_batches += len({job for job, _ in taken}) > 1
        self.stats.batch_tiles.add(tiles)
        self.stats.largest_batch = max(self.stats.largest_batch, tiles)
        for (job, index), outcome in zip(taken, begun.outcomes, strict=True):
            if index == 0:
                self.stats.queued_s[priority].add(now - job.arrived)
                if job.request.task in WORDS:
                    self.stats.first_token_s.add(now - job.arrived)
            self.stats.tokens += job.request.task in WORDS
            if isinstance(outcome, Wire | QueryFailed):
                self._deliver(job, index, outcome)
            elif job.done.done():  # the caller left during the pass
                self._unwanted.append(outcome)
            else:
                self._writing[priority][outcome] = job, index

    def _end(self, stepped: Stepped, priority: Priority) -> None:
        self._room = stepped.room
        self.stats.steps += 1
        self.stats.tokens += stepped.sequences
        self.stats.step_sequences.add(stepped.sequences)
        for name, outcome in stepped.ended:
            item = self._writing[priority].pop(name, None)
            if item is not None:
                self._deliver(*item, outcome)

    def _spend(self, priority: Priority, seconds: float) -> None:
        self._shares.spend(priority, seconds)
        self._busy_s += seconds

    def _deliver(self, job: _Job, index: int, outcome: Outcome) -> None:
        if job.done.done():  # the caller has gone, or another tile of it failed
            return
        if isinstance(outcome, QueryFailed):
            self.stats.failures += 1
            job.done.set_exception(outcome)
            self._leave(job)
            return
        job.answers[index] = outcome
        tiles = job.queries[index].tiles
        self.stats.tiles += tiles
        self._seconds_per_tile += 0.1 * (self._busy_s / tiles - self._seconds_per_tile)
        self._busy_s = 0.0
        if len(job.answers) == len(job.queries):
            job.done.set_result(None)


def _queries(request: PerceiveRequest, tiles: Sequence[np.ndarray]) -> list[Query]:
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


def _response(perceiver: Resident, job: _Job, elapsed_s: float) -> PerceiveResponse:
    answers = [job.answers[i] for i in range(len(job.queries))]
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
