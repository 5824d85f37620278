"""What the engine and the HTTP face need of a loaded model, whichever it is.

The embedded model (`perceiver.Perceiver`) and published ones (`families.perceiver.PublishedPerceiver`) both are this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from model_server.protocol import ModelInfo, PerceiveRequest, Task, TileAnswer
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

    def answer(self, queries: Sequence[Query]) -> Sequence[TileAnswer]:
        """Answer a mixed batch, in order."""
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
