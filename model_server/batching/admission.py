"""Who may join the queue, and how long who may not is told to wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from model_server.batching.counters import Counters
from model_server.batching.engine_errors import EngineBusy
from model_server.batching.scheduler import PRIORITIES, Job, Scheduler

MAX_CALLS = 32  # of `Admission.calling` at a time
FIRST_TILE_S = 0.1  # what a tile is taken to cost before one was measured


class Admission:
    """Bounds on what waits.

    Args:
        scheduler: where it waits.
        max_waiting: most tiles of each priority; a named caller may have half of them.
        stats: where refusals are counted.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int, stats: Counters) -> None:
        self._scheduler, self._max_waiting, self._stats = scheduler, max_waiting, stats
        self._seconds_per_tile = FIRST_TILE_S
        self._busy_s = 0.0  # of the device, since a tile was last answered
        self._calls = 0

    @property
    def waiting(self) -> int:
        """Tiles of all priorities."""
        return sum(self._scheduler.waiting(priority) for priority in PRIORITIES)

    def check(self, job: Job) -> None:
        """Raises EngineBusy where there is no room for it."""
        waiting = self._scheduler.waiting(job.priority)
        full = waiting + job.waiting > self._max_waiting
        if job.caller:
            own = self._scheduler.waiting(job.priority, job.caller)
            full = full or own + job.waiting > self._max_waiting // 2
        if full:
            self._stats.reject("busy")
            raise EngineBusy(waiting, max(1.0, waiting * self._seconds_per_tile))

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Around work that is no task on tiles. Raises EngineBusy where `MAX_CALLS` do it already."""
        if self._calls >= MAX_CALLS:
            self._stats.reject("busy")
            raise EngineBusy(self.waiting, 1.0)
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    def spend(self, seconds: float) -> None:
        """The device was busy for so long."""
        self._busy_s += seconds

    def answered(self, tiles: int) -> None:
        """With what it was busy."""
        self._seconds_per_tile += 0.1 * (self._busy_s / tiles - self._seconds_per_tile)
        self._busy_s = 0.0
