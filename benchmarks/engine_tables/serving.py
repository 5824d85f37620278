"""An engine around the model, and callers who ask it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import torch

from engine_tables.bench import Bench
from model_server.engine import Engine
from model_server.perceiver import Perceiver
from model_server.protocol import PerceiveRequest


@contextlib.asynccontextmanager
async def serving(bench: Bench) -> AsyncIterator[Engine]:
    bench.perceiver.free_memory()
    threads = torch.get_num_threads()

    def load() -> Perceiver:
        torch.set_num_threads(threads)  # a thread's own setting: this is the one that works
        return bench.perceiver

    engine = Engine(load)
    await engine.start()
    yield engine
    await engine.close()


async def ask(engine: Engine, callers: int, requests: int, asked: Sequence[PerceiveRequest],
              image: Callable[[], np.ndarray]) -> list[float]:  # fmt: skip
    """So many callers, each of whom asks again when it has its answer; the waits of all."""
    turns = iter(range(requests))
    waits: list[float] = []

    async def caller() -> None:
        for turn in turns:
            started = time.perf_counter()
            await engine.perceive(asked[turn % len(asked)], [image()])
            waits.append(time.perf_counter() - started)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return waits
