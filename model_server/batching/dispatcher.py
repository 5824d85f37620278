"""What the device does next, and what becomes of what it did.

A piece of work is a pass, which takes new tiles in, or a step, which writes one more token of every answer in words
that is under way. Where a pass can be filled, passes and steps alternate; where it cannot, those who wait for it wait a
few steps for more to come. Runs on the event loop; the device's own thread does one piece at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from concurrent.futures import Executor
from typing import Literal

from model_server.batching.admission import Admission
from model_server.batching.counters import Counters
from model_server.batching.engine_errors import QueryFailed
from model_server.batching.requests import Item, Pending
from model_server.batching.scheduler import PRIORITIES, Scheduler, Shares
from model_server.device import CANDIDATES, Begun, Device, Outcome, Stepped
from model_server.protocol import Priority, Wire

WORDS = ("caption", "vqa")  # written token by token
PATIENCE = 4  # steps of others' answers that a pass which is not full waits for more tiles


class Dispatcher:
    """Hands the device its work.

    Args:
        device: and `thread`, which owns it.
        scheduler: where requests wait.
        admission, stats: are told what was done.
    """

    def __init__(
        self, device: Device, thread: Executor, scheduler: Scheduler, admission: Admission, stats: Counters
    ) -> None:
        self._device, self._thread = device, thread
        self._scheduler, self._admission, self._stats = scheduler, admission, stats
        self._shares = Shares()
        self._room = device.room()
        self._taking: list[Item] = []  # the pass under way
        self._writing: dict[Priority, dict[Hashable, Item]] = {priority: {} for priority in PRIORITIES}
        self._unwanted: list[Hashable] = []  # written for callers that have left
        self._steps_since: dict[Priority, int] = dict.fromkeys(PRIORITIES, 0)  # the last pass
        self._arrived = asyncio.Event()
        self._closing = False

    @property
    def writing(self) -> list[Item]:
        """What is being written."""
        return [item for written in self._writing.values() for item in written.values()]

    @property
    def on_device(self) -> int:
        """Tiles taken from the queue and not answered yet."""
        return sum(job.queries[index].tiles for job, index in (*self._taking, *self.writing))

    def wake(self) -> None:
        """Something has come into the queue."""
        self._arrived.set()

    def close(self) -> None:
        """`run` ends when all is answered."""
        self._closing = True
        self._arrived.set()

    def leave(self, job: Pending) -> None:
        """Nobody waits for what is left of a job that was cancelled, failed or ran out of time."""
        self._scheduler.remove(job)
        written = self._writing[job.priority]
        unwanted = [name for name, (of, _) in written.items() if of is job]
        for name in unwanted:
            del written[name]
        self._unwanted += unwanted
        self._arrived.set()

    async def run(self) -> None:
        """Everything that the device does, one piece of work after the other."""
        device, run = self._device, asyncio.get_running_loop().run_in_executor
        while True:
            if self._unwanted:
                unwanted, self._unwanted = self._unwanted, []
                self._room = await run(self._thread, device.drop, unwanted)
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
                begun = await run(self._thread, device.take, [job.queries[i] for job, i in offered], priority)
                self._begin(offered, begun, priority)
            else:
                self._steps_since[priority] += 1
                stepped = await run(self._thread, device.step, priority)
                self._end(stepped, priority)
            seconds = time.perf_counter() - started
            self._shares.spend(priority, seconds)
            self._admission.spend(seconds)

    def _next(self, priority: Priority) -> Literal["take", "step"] | None:
        """What is to be done at a priority: where there is work for both, a step after each pass, and as many more as
        `PATIENCE` says while a pass would not be full."""
        takes = self._scheduler.has_work(priority, self._room[priority])
        if self._writing[priority] and not (takes and self._steps_since[priority] >= self._patience(priority)):
            return "step"
        return "take" if takes else None

    def _patience(self, priority: Priority) -> int:
        return 1 if self._scheduler.waiting(priority) >= self._device.places[priority] else PATIENCE

    def _offer(self, priority: Priority) -> list[Item]:
        offered = [(job, index) for job, index in self._scheduler.take(priority, self._room[priority], CANDIDATES)
                   if isinstance(job, Pending)]  # fmt: skip
        self._taking = offered
        return offered

    def _begin(self, offered: list[Item], begun: Begun, priority: Priority) -> None:
        """What a pass has brought: those it had no place for go back into the queue."""
        taken, back = offered[: len(begun.outcomes)], offered[len(begun.outcomes) :]
        self._taking = []
        self._scheduler.put_back([(job, index) for job, index in back if not job.done.done()])
        self._room = begun.room
        now = time.perf_counter()
        self._stats.passed(sum(job.queries[index].tiles for job, index in taken), len({job for job, _ in taken}))
        for (job, index), outcome in zip(taken, begun.outcomes, strict=True):
            words = job.request.task in WORDS
            if index == 0:
                self._stats.queued_s[priority].add(now - job.arrived)
                if words:
                    self._stats.first_token_s.add(now - job.arrived)
            self._stats.tokens += words
            if isinstance(outcome, Wire | QueryFailed):
                self._deliver(job, index, outcome)
            elif job.done.done():  # the caller left during the pass
                self._unwanted.append(outcome)
            else:
                self._writing[priority][outcome] = job, index

    def _end(self, stepped: Stepped, priority: Priority) -> None:
        self._room = stepped.room
        self._stats.stepped(stepped.sequences)
        for name, outcome in stepped.ended:
            item = self._writing[priority].pop(name, None)
            if item is not None:
                self._deliver(*item, outcome)

    def _deliver(self, job: Pending, index: int, outcome: Outcome) -> None:
        if job.done.done():  # the caller has gone, or another tile of it failed
            return
        if isinstance(outcome, QueryFailed):
            self._stats.failures += 1
            job.done.set_exception(outcome)
            self.leave(job)
            return
        job.answers[index] = outcome
        tiles = job.queries[index].tiles
        self._stats.tiles += tiles
        self._admission.answered(tiles)
        if len(job.answers) == len(job.queries):
            job.done.set_result(None)
