"""What the engine and the HTTP face need of a loaded model, whichever it is.

The embedded model (`perceiver.Perceiver`) and published ones (`families.perceiver.PublishedPerceiver`) both are this.
The embedded one is a `Stepper` too: the engine then lets requests join and leave between any two tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from model_server.batching.engine_errors import QueryFailed
from model_server.batching.feature_cache import ByteCache
from model_server.batching.memory_plan import MemoryPlan
from model_server.protocol import ModelInfo, PerceiveRequest, Priority, Task, TileAnswer
from model_server.query import Query


class Resident(Protocol):
    """One loaded checkpoint. Not thread-safe: the engine is its only caller."""

    @property
    def info(self) -> ModelInfo:
        """What answers, enough to reproduce it."""
        ...

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it has parts for; for every other task it raises TaskNotServed."""
        ...

    @property
    def taxonomy(self) -> tuple[str, ...]:
        """The labels of a classification that names none."""
        ...

    def answer(self, queries: Sequence[Query]) -> Sequence[TileAnswer | QueryFailed]:
        """Answer a mixed batch, in order; in the place of an answer that failed alone, why."""
        ...

    def route(self, task: Task) -> tuple[str, str]:
        """Task token and expert that serve a task."""
        ...

    def warnings(self, request: PerceiveRequest) -> list[str]:
        """What a reader of the answers to a request should know."""
        ...

    def warm_up(self) -> None:
        """Answer once, so that the first caller does not pay for lazy initialisation."""
        ...


@runtime_checkable
class Stepper(Protocol):
    """A model that takes queries in, writes a token of all of them at each step, and gives answers as they end.

    What is being written is named by what `begin` returned for it.
    """

    @property
    def plan(self) -> MemoryPlan:
        """What fits, found out when it was loaded."""
        ...

    @property
    def cache(self) -> ByteCache:
        """What is kept of images."""
        ...

    @property
    def places(self) -> Mapping[Priority, int]:
        """New tiles that it does well to take in at a time: enough to be busy, and nobody waits long; of bulk work
        fewer, as who comes meanwhile waits for the end of it."""
        ...

    def room(self, task: Task, priority: Priority) -> int:
        """How many queries of a task may begin now."""
        ...

    def fresh(self, query: Query) -> bool:
        """Whether to take it in costs more than a step."""
        ...

    def begin(self, queries: Sequence[Query], priority: Priority) -> Sequence[TileAnswer | Hashable]:
        """Take queries in: of each its answer, or the name under which it is written. A failure leaves nothing."""
        ...

    def step(self, priority: Priority) -> Sequence[tuple[Hashable, TileAnswer]]:
        """One more token of all that is written at this priority; the answers that are complete with it."""
        ...

    def drop(self, writing: Hashable) -> None:
        """Its place is free at once; nothing happens where it has ended."""
        ...

    def free_memory(self) -> None:
        """Give back what is not needed."""
        ...
