"""Throughput and latency at several numbers of callers, beside the same model without the engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from measuring.asked import WORDS
from measuring.figures import percentile

from engine_tables.bench import STATIC, Bench
from engine_tables.serving import ask, serving
from engine_tables.timing import COLUMNS, timed, timed_async
from model_server.query import Query

CALLERS = (1, 4, 16, 64)


async def measure(bench: Bench) -> None:
    for kind, image in (("never seen", bench.fresh), ("seen before", bench.known)):
        rows, base = [], None
        async with serving(bench) as engine:
            if kind == "seen before":
                await ask(engine, 1, 2 * STATIC * len(WORDS), WORDS, image)
            for callers in CALLERS:
                run = await timed_async(ask(engine, callers, max(bench.requests, callers), WORDS, image))
                base = base or run
                ratio = [f"{base.wall_s / base.tiles * run.tiles / run.wall_s:.2f}", f"{base.cpu_ms / run.cpu_ms:.2f}"]
                waits = [f"{1000 * percentile(run.waits, share):.0f}" for share in (0.5, 0.95, 0.99)]
                rows.append([f"{callers} callers", *run.columns(), *ratio, *waits])
        for name, size in (("one query at a time, no engine", 1), (f"static batches of {STATIC}, no engine", STATIC)):
            run = timed(lambda size=size, image=image: answer_statically(bench, size, image))
            rows.append([name, *run.columns(), *["-"] * 5])
        header = ["images " + kind, *COLUMNS, "x (wall)", "x (CPU)", "p50 ms", "p95 ms", "p99 ms"]
        bench.table(f"callers, images {kind}", header, rows)


def answer_statically(bench: Bench, size: int, image: Callable[[], np.ndarray]) -> int:
    """Whole batches through the model, of the same questions."""
    count = max(bench.requests // size, 1)
    for batch in range(count):
        asked = [WORDS[(batch * size + i) % len(WORDS)] for i in range(size)]
        bench.perceiver.answer([Query(request.task, image(), text=request.text) for request in asked])
    return count * size
