"""What `Engine.perceive` raises, apart from `protocol.TaskNotServed`."""

from __future__ import annotations


class EngineError(Exception):
    """Base of them."""


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
