"""What travels between the door and its replicas: whole HTTP calls and their answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from model_server.engine import EngineBusy, QueryFailed

RETRY_S = 2.0


@dataclass(frozen=True)
class Call:
    """A call that the door has let in; `id` is the one that logs and the caller know it by."""

    method: str
    path: str
    id: str = ""
    content_type: str = ""
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What a replica's application answered; `replica` is its name."""

    replica: str
    status: int
    headers: dict[str, str]
    body: bytes


class Replicas(Protocol):
    """Who answers behind the door."""

    async def answer(self, call: Call, image: str | None) -> Answer:
        """One replica's answer: calls about one image go to the same, while it is not overloaded. Cancelling the call
        ends the work.

        Raises:
            EngineNotReady: no replica runs (yet).
            AllBusy: no replica takes another call, and enough wait already.
            ReplicaLost: the one that worked on it has ended.
        """
        ...

    async def everyone(self, call: Call) -> list[Answer]:
        """What each replica answers; those that do not answer soon are left out, no replica is no answer."""
        ...


class AllBusy(EngineBusy):
    """Every replica has all the calls that it takes, and as many as may wait do."""

    def __init__(self) -> None:
        super().__init__(0, RETRY_S)
        self.args = (f"all replicas are busy and no more calls may wait; try again in {RETRY_S:.0f} s",)


class ReplicaLost(QueryFailed):
    """The replica ended in the middle of the call. Nobody asks another by himself: the call may be what ended it."""

    def __init__(self) -> None:
        super().__init__("the replica that worked on this call has ended, and another takes its place: call again")
