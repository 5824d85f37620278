"""One owner of the device: requests of many callers become mixed batches over one resident model.

The event loop owns the queue, one worker thread owns the model; they pass each other one piece of work at a time, so
there are no locks. Requests join and leave between tokens: a short answer does not wait for a long one, nor a question
for all the tiles of a large scene. An idle engine answers at once, a loaded one batches by itself. Interactive work
goes before bulk work, which has a share of the device all the same. Here is what callers see; `batching` holds who is
admitted, who goes next and what the device does.

The engine knows nothing about rasters, HTTP or text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TypeVar

import numpy as np

from model_server.batching.admission import Admission
from model_server.batching.counters import Counters, EngineMetrics, Now
from model_server.batching.dispatcher import Dispatcher
from model_server.batching.engine_errors import (
    DeadlinePassed,
    EngineBusy,
    EngineClosing,
    EngineError,
    EngineNotReady,
    QueryFailed,
)
from model_server.batching.requests import Pending, queries_of
from model_server.batching.scheduler import PRIORITIES, Scheduler
from model_server.device import Device
from model_server.protocol import MAX_TILES, PerceiveRequest, PerceiveResponse, Priority, TaskNotServed
from model_server.resident import Resident

__all__ = [
    "DeadlinePassed", "Engine", "EngineBusy", "EngineClosing", "EngineError", "EngineNotReady", "QueryFailed",
]  # fmt: skip

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_WAITING = 2 * MAX_TILES


class Engine:
    """Batches requests over one model.

    Args:
        load: makes the model, warmed up; runs in the worker thread.
        max_batch: places in one pass: new tiles, where one that is answered pixel by pixel takes a place for each
            `device.DENSE_PIXELS`; half as many of bulk work. None = what suits the model.
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._device: Device | None = None
        self._scheduler = Scheduler()
        self._admission = Admission(self._scheduler, max_waiting, self.stats)
        self._dispatcher: Dispatcher | None = None
        self._running: asyncio.Task[None] | None = None
        self._jobs: set[Pending] = set()  # whose callers wait
        self._closing = False
        self._failure = asyncio.Event()

    async def start(self) -> None:
        """Load the model and begin to answer. Raises what `load` raises."""
        loop = asyncio.get_running_loop()
        self.perceiver = model = await loop.run_in_executor(self._thread, self._load)
        self._device = device = Device(model, self._max_batch)
        if device.model.plan is not None:
            logger.info("memory %s", device.model.plan)
        self._dispatcher = Dispatcher(device, self._thread, self._scheduler, self._admission, self.stats)
        self._running = asyncio.create_task(self._dispatcher.run())
        self._running.add_done_callback(self._ended)

    async def close(self) -> None:
        """Refuse new requests, answer the waiting ones, release the worker thread."""
        self._closing = True
        if self._dispatcher is not None and self._running is not None:
            self._dispatcher.close()
            await asyncio.wait({self._running})  # what it fails with has been logged
        self._thread.shutdown(wait=False)

    async def failed(self) -> None:
        """Returns when a fault of its own keeps it from answering."""
        await self._failure.wait()

    @property
    def ready(self) -> bool:
        return self._running is not None and not self._closing

    @property
    def waiting(self) -> int:
        """Tiles that wait in the queue, those on the device not counted."""
        return self._admission.waiting

    def metrics(self) -> EngineMetrics:
        waiting: dict[Priority, int] = {priority: self._scheduler.waiting(priority) for priority in PRIORITIES}
        device, dispatcher = self._device, self._dispatcher
        if device is None or dispatcher is None:
            return self.stats.metrics(Now(waiting))
        plan = device.model.plan
        return self.stats.metrics(
            Now(
                waiting=waiting,
                on_device=dispatcher.on_device,
                decoding=len(dispatcher.writing),
                halvings=device.halvings,
                cache=device.model.cache.values(),
                memory={} if plan is None else asdict(plan),
            )
        )

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
        job = Pending(
            request, queries_of(request, tiles), priority or request.priority,
            request.caller if caller is None else caller, done=asyncio.get_running_loop().create_future(),
        )  # fmt: skip
        perceiver, dispatcher = self._loaded()
        if request.task not in perceiver.tasks:
            self.stats.reject("not_served")
            raise TaskNotServed(request.task, perceiver.info.model, perceiver.tasks)
        self._admission.check(job)
        deadline_s = request.deadline_s if deadline_s is None else deadline_s
        self._jobs.add(job)
        self._scheduler.add(job)
        dispatcher.wake()
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
            self._jobs.discard(job)
            dispatcher.leave(job)
        elapsed_s = time.perf_counter() - job.arrived
        self.stats.answer_s[job.priority].add(elapsed_s)
        return job.response(perceiver, elapsed_s)

    async def call(self, work: Callable[[Resident], _T]) -> _T:
        """What `work` makes of the model: in the worker thread, when it is next free. For short work that is no task
        on tiles, such as vectors.

        Raises:
            EngineNotReady: the model is not loaded (yet); `EngineClosing`: the engine is closing.
            EngineBusy: `admission.MAX_CALLS` wait already.
            QueryFailed: `work` failed.
        """
        perceiver, _ = self._loaded()
        with self._admission.calling():
            try:
                return await asyncio.get_running_loop().run_in_executor(self._thread, work, perceiver)
            except Exception as error:  # whatever the model raises: this caller is told
                logger.error("a call to the model failed: %s", type(error).__name__)
                raise QueryFailed(f"the model failed on this call: {type(error).__name__}: {error}") from error

    def _loaded(self) -> tuple[Resident, Dispatcher]:
        if self._closing:
            self.stats.reject("closing")
            raise EngineClosing("the model server is closing")
        if self.perceiver is None or self._dispatcher is None:
            self.stats.reject("not_ready")
            raise EngineNotReady("the model is still loading")
        return self.perceiver, self._dispatcher

    def _ended(self, running: asyncio.Task[None]) -> None:
        """Nothing may end it but `close`; where a fault of ours does, nobody is left waiting."""
        if running.cancelled() or running.exception() is None:
            return
        logger.critical("the engine has failed and takes nothing more", exc_info=running.exception())
        self._closing = True
        self._failure.set()
        for job in self._jobs:
            if not job.done.done():
                job.done.set_exception(EngineClosing("the engine has failed; its server ends: call again"))
