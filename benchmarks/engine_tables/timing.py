"""What some work took, by the wall's clock and in CPU seconds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Run:
    """What some requests took."""

    tiles: int
    wall_s: float
    cpu_s: float
    waits: Sequence[float] = ()

    @property
    def cpu_ms(self) -> float:
        return 1000 * self.cpu_s / self.tiles

    def columns(self) -> list[str]:
        return [f"{self.tiles / self.wall_s:.1f}", f"{self.tiles / self.cpu_s:.1f}", f"{self.cpu_ms:.1f}"]


COLUMNS = ["tiles/s", "tiles per CPU s", "CPU ms/tile"]


def timed(work: Callable[[], int]) -> Run:
    """`work` gives the number of its tiles."""
    wall, cpu = time.perf_counter(), time.process_time()
    tiles = work()
    return Run(tiles, time.perf_counter() - wall, time.process_time() - cpu)


async def timed_async(work: Awaitable[list[float]]) -> Run:
    """`work` gives each caller's waits."""
    wall, cpu = time.perf_counter(), time.process_time()
    waits = await work
    return Run(len(waits), time.perf_counter() - wall, time.process_time() - cpu, waits)


def in_turn(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU milliseconds of each, the median of runs one after the other, so that what else the machine does hits all."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            cpu = time.process_time()
            work()
            if turn:
                spent[name].append(1000 * (time.process_time() - cpu))
    return {name: median(times) for name, times in spent.items()}
