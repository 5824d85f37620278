"""How long an interactive question waits alone, and while a caller sends a large scene as bulk."""

from __future__ import annotations

import asyncio

from measuring.asked import WORDS
from measuring.figures import percentile

from engine_tables.bench import Bench
from engine_tables.serving import ask, serving
from engine_tables.timing import timed_async
from model_server.engine import Engine


async def measure(bench: Bench) -> None:
    async def interactive(engine: Engine, count: int) -> list[float]:
        return await ask(engine, 1, count, WORDS, bench.fresh)

    async def scene(engine: Engine) -> None:
        while True:
            tiles = [bench.fresh() for _ in range(32)]
            await engine.perceive(WORDS[0], tiles, priority="bulk", caller="scene")

    rows = []
    count = max(bench.requests // 2, 20)
    async with serving(bench) as engine:
        alone = await timed_async(interactive(engine, count))
        bulk = [asyncio.create_task(scene(engine)) for _ in range(3)]
        await asyncio.sleep(1)
        before = engine.stats.tiles
        loaded = await timed_async(interactive(engine, count))
        done = engine.stats.tiles - before - count
        for task in bulk:
            task.cancel()
        await asyncio.gather(*bulk, return_exceptions=True)
    p95 = [percentile(run.waits, 0.95) for run in (alone, loaded)]
    for name, run, beside, tail in (("alone", alone, 0, p95[0]), ("under bulk load", loaded, done, p95[1])):
        half = percentile(run.waits, 0.5)
        rows.append([name, f"{1000 * half:.0f}", f"{1000 * tail:.0f}", f"{tail / p95[0]:.2f}", str(beside)])
    bench.table("bulk", ["an interactive question", "p50 ms", "p95 ms", "p95 x", "bulk tiles meanwhile"], rows)
