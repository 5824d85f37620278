"""Progress reports of a call over MCP: every few seconds, in looks done of looks planned, each larger than the last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mcp.server.mcpserver import Context

EVERY_S = 2.0


class Progress:
    """How far a call is, in looks; of a call that looks a second time, in the looks of both.

    MCP wants every report to be larger than the one before, also between looks, and none beyond the total.
    """

    def __init__(self) -> None:
        self._earlier = 0  # looks before the present planning
        self._done = 0
        self._planned: int | None = None
        self._message = "opening the image"
        self._reached, self._base, self._steps = 0.0, 0.0, 0

    def __call__(self, done: int, total: int, message: str) -> None:
        """As `rs_tools.looking.Progress`."""
        if done < self._done:
            self._earlier += self._planned or self._done
        if done != self._done:
            self._base, self._steps = max(self._reached, self._earlier + min(done, total - 1)), 0
        self._done, self._planned = done, total
        self._message = message if done < total else f"all {total} looks done, making the answer"

    def report(self) -> tuple[float, int | None, str]:
        """Progress, total and message of the next report.

        It comes ever nearer to the next look, by 1/2, 2/3, 3/4, ... of what is left, and after the last to the total.
        """
        self._steps += 1
        total = None if self._planned is None else self._earlier + self._planned
        ahead = self._earlier + self._done + 1
        ceiling = ahead if total is None else min(ahead, total)
        self._reached = ceiling - (ceiling - self._base) / (self._steps + 1)
        return self._reached, total, self._message


@asynccontextmanager
async def reported(ctx: Context[Any, Any]) -> AsyncIterator[Progress]:
    """What to tell of the progress of a call; the client hears of it until the block ends."""
    progress = Progress()
    ticker = asyncio.create_task(_report(ctx, progress))
    try:
        yield progress
    finally:
        ticker.cancel()


async def _report(ctx: Context[Any, Any], progress: Progress) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(EVERY_S)
        reached, total, message = progress.report()
        await ctx.report_progress(reached, total, f"{message}, {time.monotonic() - started:.0f} s")
