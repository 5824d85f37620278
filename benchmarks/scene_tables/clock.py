"""Where the time of a scene goes: reading, the model, merging."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rs_tools.imagery.reading import Wanted
from rs_tools.imagery.scene import Pixels, ReadWindow, Region, Scene


class Clock:
    """Seconds since it was made, and CPU seconds of the threads that pass through named stages."""

    def __init__(self) -> None:
        self._stages: dict[str, float] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.thread_time()
        try:
            yield
        finally:
            self._stages[name] = self._stages.get(name, 0.0) + time.thread_time() - started

    def read(self) -> dict[str, float]:
        """Seconds so far, and the most memory that this process has held, in MiB.

        `work_cpu_s` are the CPU seconds without those of describing the scene.
        """
        cpu_s = time.process_time() - self._cpu
        return {
            "wall_s": time.perf_counter() - self._wall,
            "cpu_s": cpu_s,
            "work_cpu_s": cpu_s - self._stages.get("describing", 0.0),
            **{f"{name}_s": seconds for name, seconds in self._stages.items()},
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def timed_reader(scene: Scene, clock: Clock) -> Scene:
    """The scene, its reading put on the clock."""
    reader: Callable[..., Any] = scene.reader

    @contextmanager
    def timed(windows: Sequence[Wanted] = ()) -> Iterator[ReadWindow]:
        with clock.stage("reading"):
            opened = reader(windows)
            read = opened.__enter__()

        def one(region: Region, out_size: tuple[int, int]) -> Pixels:
            with clock.stage("reading"):
                return read(region, out_size)

        try:
            yield one
        finally:
            opened.__exit__(None, None, None)

    object.__setattr__(scene, "reader", timed)
    return scene
