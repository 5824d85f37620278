"""The worker thread's side of the engine: the model, what is being written, and what is done when something fails.

Every method runs in the one thread that owns the device. A failure is answered here and goes no further: queries of a
batch that failed go one by one, so that only the guilty ones fail; a batch too large for the memory goes in halves.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from model_server.batching.engine_errors import QueryFailed
from model_server.batching.feature_cache import ByteCache
from model_server.batching.scheduler import PRIORITIES
from model_server.protocol import DENSE_TASKS, Priority, Task, TileAnswer, Wire
from model_server.query import Query
from model_server.resident import Resident, Stepper

logger = logging.getLogger(__name__)

DENSE_PIXELS = 2**16  # of a tile whose pixels are answered; with so many it takes as long as to encode a new tile
CANDIDATES = 16  # queries looked at for one pass: those about known images cost little, so that many go together
ALL_AT_ONCE = 16  # queries of a model that answers batches as a whole
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # what a RuntimeError says of it


Outcome = TileAnswer | QueryFailed
Room = dict[Priority, dict[Task, int]]


@dataclass(frozen=True)
class Begun:
    """Of the first queries of those offered: the answer, the failure, or the name under which it is written."""

    outcomes: list[Outcome | Hashable]
    room: Room


@dataclass(frozen=True)
class Stepped:
    """What ended with a step, and how many sequences were written."""

    ended: list[tuple[Hashable, Outcome]]
    sequences: int
    room: Room


class _AtOnce:
    """A model that answers whole batches, as one of which nothing is ever being written."""

    plan = None
    places = MappingProxyType[Priority, int]({"interactive": ALL_AT_ONCE, "bulk": ALL_AT_ONCE // 2})

    def __init__(self, resident: Resident) -> None:
        self._resident = resident
        self.cache: ByteCache[None] = ByteCache(0)

    def room(self, task: Task, priority: Priority) -> int:
        return ALL_AT_ONCE

    def fresh(self, query: Query) -> bool:
        return True

    def begin(self, queries: Sequence[Query], priority: Priority) -> Sequence[Outcome]:
        return self._resident.answer(queries)

    def step(self, priority: Priority) -> Sequence[tuple[Hashable, TileAnswer]]:
        return []

    def drop(self, writing: Hashable) -> None:
        """Nothing is."""

    def free_memory(self) -> None:
        """Nothing is kept."""


class Device:
    """One model on one device.

    Args:
        places: new tiles in one pass, where one that is answered pixel by pixel takes a place for each `DENSE_PIXELS`;
            bulk passes have half, so that an interactive request does not wait long for them to end. None = what suits
            the model.
    """

    def __init__(self, resident: Resident, places: int | None = None) -> None:
        self.resident = resident
        self.model: Stepper | _AtOnce = resident if isinstance(resident, Stepper) else _AtOnce(resident)
        self.places: dict[Priority, int] = dict(self.model.places)
        if places is not None:
            self.places = {"interactive": places, "bulk": max(places // 2, 1)}
        self.halvings = 0
        self._written: dict[Priority, dict[Hashable, Query]] = {priority: {} for priority in PRIORITIES}

    def room(self) -> Room:
        return {p: {task: self.model.room(task, p) for task in self.resident.tasks} for p in PRIORITIES}

    def take(self, queries: Sequence[Query], priority: Priority) -> Begun:
        """Begin as many of the first queries as one pass takes, at least one."""
        chosen = queries[: self._fitting(queries, priority)]
        outcomes = self._begin(chosen, priority)
        for query, outcome in zip(chosen, outcomes, strict=True):
            if not isinstance(outcome, Wire | QueryFailed):
                self._written[priority][outcome] = query
        return Begun(outcomes, self.room())

    def step(self, priority: Priority) -> Stepped:
        """One more token of all that is written at this priority."""
        written = self._written[priority]
        sequences = len(written)
        try:
            ended: list[tuple[Hashable, Outcome]] = list(self.model.step(priority))
        except Exception:  # whatever the model raises must not end the device's thread
            logger.exception("a step of %d sequences failed, they are tried one by one", sequences)
            lost = dict(written)
            for writing in lost:
                self.model.drop(writing)
            ended = [(writing, self._alone(query, priority)) for writing, query in lost.items()]
        for writing, _ in ended:
            written.pop(writing, None)
        return Stepped(ended, sequences, self.room())

    def drop(self, writings: Sequence[Hashable]) -> Room:
        """Nobody waits for these any more."""
        for writing in writings:
            self.model.drop(writing)
            for written in self._written.values():
                written.pop(writing, None)
        return self.room()

    def _fitting(self, queries: Sequence[Query], priority: Priority) -> int:
        left = self.places[priority]
        for n, query in enumerate(queries):
            if self.model.fresh(query):
                left -= _places(query)
            if left < 0 and n:
                return n
        return len(queries)

    def _begin(self, queries: Sequence[Query], priority: Priority) -> list[Outcome | Hashable]:
        try:
            return self._whole(queries, priority)
        except Exception as error:  # whatever the model raises: the guilty query is told, the others are answered
            short = is_out_of_memory(error)
            if not short and len(queries) == 1:
                return [_failed(queries[0], error)]
            if not short:
                logger.exception("a batch failed, its %d queries are tried one by one", len(queries))
        if short:  # handled out here, as the error holds on to the tensors of the batch
            return self._in_halves(queries, priority)
        return [outcome for query in queries for outcome in self._begin([query], priority)]

    def _whole(self, queries: Sequence[Query], priority: Priority) -> list[Outcome | Hashable]:
        outcomes = self.model.begin(queries, priority)
        if len(outcomes) != len(queries):
            raise RuntimeError(f"{len(queries)} queries got {len(outcomes)} answers")
        return list(outcomes)

    def _in_halves(self, queries: Sequence[Query], priority: Priority) -> list[Outcome | Hashable]:
        """After a failure for want of memory; later passes are no larger than what was tried last."""
        self.model.free_memory()
        self.halvings += 1
        half = (len(queries) + 1) // 2
        for p in PRIORITIES:
            self.places[p] = max(min(self.places[p], half), 1)
        logger.warning("out of memory with %d queries; from now on %d new tiles go together", len(queries), half)
        if len(queries) > 1:
            return [*self._begin(queries[:half], priority), *self._begin(queries[half:], priority)]
        try:
            return self._whole(queries, priority)
        except Exception as error:  # whatever the model raises, memory or not: this query is told
            return [_failed(queries[0], error)]

    def _alone(self, query: Query, priority: Priority) -> Outcome:
        """The answer of one query, nothing else being written at this priority."""
        (outcome,) = self._begin([query], priority)
        if isinstance(outcome, Wire | QueryFailed):
            return outcome
        try:
            while True:
                for writing, answer in self.model.step(priority):
                    if writing == outcome:
                        return answer
        except Exception as error:  # whatever the model raises: this query is told
            self.model.drop(outcome)
            return _failed(query, error)


def _places(query: Query) -> int:
    """Places of a pass that it takes if its image is new."""
    height, width = query.image.shape[:2]
    return query.tiles * (max(round(height * width / DENSE_PIXELS), 1) if query.task in DENSE_TASKS else 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the machine."""
    torch = sys.modules.get("torch")  # not imported for this: a model that raises its errors has it loaded
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def _failed(query: Query, error: Exception) -> QueryFailed:
    logger.error("task=%s failed: %r", query.task, error)
    why = "does not fit in memory, even alone" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    return QueryFailed(f"the model failed on this {query.task} request: {why}")
