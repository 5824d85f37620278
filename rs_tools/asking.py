"""How a call's looks are put to the model: batch by batch, until the time for the call is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from model_server.protocol import PerceiveRequest, PerceiveResponse, TileCaption
from rs_tools.calls import Call
from rs_tools.errors import DeadlinePassed, NotServed, ServerError
from rs_tools.imagery.scene import Region
from rs_tools.imagery.tiling import Looks, single_tile
from rs_tools.looking import BATCH, OutOfTime, Progress, Seen, Taken, asked, shown, stream
from rs_tools.results import Result
from rs_tools.summary import headline

if TYPE_CHECKING:  # masks are imported when one is asked for: the tools must start fast
    from rs_tools.painting import Maps, Painted, Painter

DENSE_BATCH = 4  # tiles, each four times as large as those for words, so that progress comes as often
_BLANK = 64  # pixels a side

_A = TypeVar("_A")
_R = TypeVar("_R", bound=Result)


class Perceiving(Protocol):
    """What the tools need of a `ModelClient`."""

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse: ...


class Asker:
    """Asks the model about calls. What the client raises comes through, and what reading the scene raises.

    Args:
        client: the way to the model server.
        deadline_s: the time for one call, in seconds.
    """

    def __init__(self, client: Perceiving, deadline_s: float) -> None:
        self._client = client
        self._deadline_s = deadline_s

    async def answer(
        self,
        call: Call,
        request: PerceiveRequest,
        pick: Callable[[PerceiveResponse], Sequence[_A]],
        reduce: Callable[[Seen[_A]], _R],
        progress: Progress | None,
    ) -> _R:
        """The answers that `pick` finds in the responses to all looks, reduced to one result; raises as `seen`."""
        return reduce(await self.seen(call, request, pick, reduce, progress))

    async def seen(
        self,
        call: Call,
        request: PerceiveRequest,
        pick: Callable[[PerceiveResponse], Sequence[_A]],
        reduce: Callable[[Seen[_A]], Result],
        progress: Progress | None,
        take: Callable[[Sequence[Taken[_A]]], Awaitable[None]] | None = None,
    ) -> Seen[_A]:
        """The answers to all looks. `reduce` says what was found until the deadline; `take` as in `stream`.

        Raises:
            DeadlinePassed: the time was over; says what was found until then.
        """

        known = call.known

        async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> Sequence[_A]:
            told = request
            if known is not None:
                anchors = await asyncio.to_thread(lambda at: [at(region) for region in regions], known.at)
                told = request.model_copy(update={"anchors": anchors})
            response = await self._client.perceive(told, tiles)
            answers = pick(response)
            wanted = len(tiles) // 2 if call.pair is not None else len(tiles)
            if len(answers) != wanted:
                raise ServerError(f"The model server did not answer each of the {wanted} tiles; try again.")
            call.heard(response)
            return answers

        try:
            return await stream(
                call.pair or call.scene, call.looks, ask, seconds=self._left(call), progress=progress,
                batch=DENSE_BATCH if call.dense else BATCH, take=take,
            )  # fmt: skip
        except OutOfTime as late:
            raise DeadlinePassed(_too_late(self._deadline_s, call.looks, late.seen, reduce)) from late

    async def painted(
        self,
        call: Call,
        request: PerceiveRequest,
        pick: Callable[[PerceiveResponse], Sequence[_A]],
        maps: Callable[[_A], Maps],
        painter: Painter,
        reduce: Callable[[Seen[_A]], Result],
        progress: Progress | None,
    ) -> tuple[Seen[_A], Painted | None]:
        """All looks painted; None for the mask of a region without data."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="rs_tools-painter")
        loop = asyncio.get_running_loop()

        def paint(tiles: Sequence[Taken[_A]]) -> None:
            for tile in tiles:
                painter.add(tile.index, None if tile.answer is None else maps(tile.answer), tile.valid)

        async def take(tiles: Sequence[Taken[_A]]) -> None:
            try:
                await loop.run_in_executor(thread, paint, tiles)
            except ValueError as error:
                raise ServerError(f"The model server's maps do not fit the tiles it was sent: {error}.") from error

        try:
            seen = await self.seen(call, request, pick, reduce, progress, take)
            return seen, await loop.run_in_executor(thread, painter.finish) if seen.valid else None
        finally:
            thread.submit(painter.close)  # after what it is doing
            thread.shutdown(wait=False)

    async def scene_captions(self, call: Call) -> Sequence[TileCaption]:
        """Of the earlier and the later scene of a pair, each from one look; none where no time is left for them."""

        def read() -> list[np.ndarray]:
            assert call.pair is not None
            plan = single_tile(call.region)
            with call.pair.reader() as reading:
                return list(shown(reading(call.region, plan.size(call.region))))

        async def ask(tiles: list[np.ndarray]) -> Sequence[TileCaption]:
            return (await self._client.perceive(PerceiveRequest(task="caption"), tiles)).captions

        try:
            async with asyncio.timeout(self._left(call)):
                return await asked(partial(ask, await asyncio.to_thread(read)), patient=True)
        except TimeoutError:  # the change itself is known, and worth more than words about the scenes
            return []

    async def knows(self, request: PerceiveRequest) -> bool:
        """Whether the model knows what a request names, asked with a tile that shows nothing."""
        blank = np.full((_BLANK, _BLANK, 3), 127, np.uint8)
        try:
            response = await self._client.perceive(request, [blank])
        except NotServed:
            return False
        answers = [*(one.known for one in response.objects), *(known for one in response.masks for known in one.known)]
        return bool(answers) and all(answers)

    def _left(self, call: Call) -> float:
        return self._deadline_s - (time.perf_counter() - call.started)


def _too_late(deadline_s: float, looks: Looks, seen: Seen[_A], reduce: Callable[[Seen[_A]], Result]) -> str:
    """What was done until the deadline, and how to get the rest."""
    text = f"The {deadline_s:g} s for one call are over after {seen.done} of {seen.total} looks; the rest is cancelled."
    if seen.valid:
        text += f" So far: {headline(reduce(seen))}."
    if seen.total > 1:
        rest, _ = looks.windows[seen.done]
        end = looks.finest.regions[-1]
        text += f" Ask about a smaller region; what was not looked at begins at row {rest[1]} and ends at row {end[3]}."
    return text
