"""Who goes next: waiting requests by priority, callers in turn, one item of each at a time.

A caller with a large scene and ten with one question each get every eleventh item. Nothing here knows the device, the
model or the event loop.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from model_server.protocol import PerceiveRequest, Priority, Task
from model_server.query import Query

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
BULK_SHARE = 0.2  # of the device's time, while interactive work never ends
FIRST_BULK_TURN_S = 0.1  # what a turn of bulk work is taken to cost before one was measured


@dataclass(eq=False)
class Job:
    """One request: its items, each a query on a tile or a pair; those before `taken` have gone to the device.

    `caller` empty: nobody else has a part in its turn.
    """

    request: PerceiveRequest
    queries: Sequence[Query]
    priority: Priority = "interactive"
    caller: str = ""
    taken: int = 0

    @property
    def turn(self) -> Hashable:
        return self.caller or self

    @property
    def waiting(self) -> int:
        """Tiles that have not gone to the device yet."""
        return sum(query.tiles for query in self.queries[self.taken :])


class Scheduler:
    """The waiting requests."""

    def __init__(self) -> None:
        self._turns: dict[Priority, OrderedDict[Hashable, deque[Job]]] = {p: OrderedDict() for p in PRIORITIES}

    def add(self, job: Job) -> None:
        self._turns[job.priority].setdefault(job.turn, deque()).append(job)

    def remove(self, job: Job) -> None:
        """Take out what is left of it; nothing happens where nothing is."""
        jobs = self._turns[job.priority].get(job.turn)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._turns[job.priority][job.turn]

    def waiting(self, priority: Priority, caller: str = "") -> int:
        """Tiles that wait; of one caller where one is named."""
        turns = self._turns[priority]
        some = [turns.get(caller, ())] if caller else turns.values()
        return sum(job.waiting for jobs in some for job in jobs)

    def has_work(self, priority: Priority, room: Mapping[Task, int]) -> bool:
        """Whether anything waits for which there is room."""
        return any(room[job.request.task] > 0 for jobs in self._turns[priority].values() for job in jobs)

    def take(self, priority: Priority, room: Mapping[Task, int], most: int) -> list[tuple[Job, int]]:
        """Up to `most` items, of each caller in turn, and of each task as many as there is room for."""
        turns, left = self._turns[priority], dict(room)
        taken: list[tuple[Job, int]] = []
        passed = 0  # callers in a row of whom nothing can be taken now
        while len(taken) < most and passed < len(turns):
            turn, jobs = next(iter(turns.items()))
            turns.move_to_end(turn)
            job = next((job for job in jobs if left[job.request.task] > 0), None)
            if job is None:
                passed += 1
                continue
            passed = 0
            left[job.request.task] -= 1
            taken.append((job, job.taken))
            job.taken += 1
            jobs.remove(job)
            if job.taken < len(job.queries):
                jobs.append(job)
            elif not jobs:
                del turns[turn]
        return taken

    def put_back(self, items: Sequence[tuple[Job, int]]) -> None:
        """The last items of what was taken go first again, in the order in which they were taken."""
        for job, index in reversed(items):
            turns = self._turns[job.priority]
            jobs = turns.setdefault(job.turn, deque())
            if job in jobs:
                jobs.remove(job)
            jobs.appendleft(job)
            turns.move_to_end(job.turn, last=False)
            job.taken = index


class Shares:
    """Interactive work goes first, but bulk work has its share of the device's time while both want it.

    Bulk gets its turn when its share of what interactive work has had pays for its last turn; so a short interactive
    request alone is never interrupted.
    """

    def __init__(self, bulk: float = BULK_SHARE) -> None:
        self._factor = bulk / (1 - bulk)
        self._spent: dict[Priority, float] = dict.fromkeys(PRIORITIES, 0.0)  # since both have wanted the device
        self._contended = False
        self._bulk_turn_s = FIRST_BULK_TURN_S

    def choose(self, wanting: Sequence[Priority]) -> Priority:
        """Whose turn it is, of those that have something to do (at least one)."""
        began, self._contended = not self._contended, len(wanting) > 1
        if not self._contended:
            return wanting[0]
        if began:
            self._spent = dict.fromkeys(PRIORITIES, 0.0)
        earned = self._spent["interactive"] * self._factor
        return "bulk" if earned > self._spent["bulk"] + self._bulk_turn_s else "interactive"

    def spend(self, priority: Priority, seconds: float) -> None:
        self._spent[priority] += seconds
        if priority == "bulk":
            self._bulk_turn_s = seconds
