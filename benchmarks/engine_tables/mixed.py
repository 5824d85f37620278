"""Captions (image), boxes (region) and masks (pixel), alone and in turn."""

from __future__ import annotations

from engine_tables.bench import GRANULARITIES, STATIC, Bench
from engine_tables.serving import ask, serving
from engine_tables.timing import COLUMNS, timed_async


async def measure(bench: Bench) -> None:
    rows, costs = [], []
    async with serving(bench) as engine:
        for name, request in GRANULARITIES.items():
            run = await timed_async(ask(engine, STATIC, bench.requests, (request,), bench.fresh))
            costs.append((run.wall_s / run.tiles, run.cpu_ms))
            rows.append([f"{name} alone ({request.task})", *run.columns(), "-", "-"])
        run = await timed_async(ask(engine, STATIC, bench.requests, tuple(GRANULARITIES.values()), bench.fresh))
    wall, cpu = (sum(cost[i] for cost in costs) / len(costs) for i in (0, 1))
    rows.append(["all three in turn", *run.columns(), f"{wall / (run.wall_s / run.tiles):.2f}",
                 f"{cpu / run.cpu_ms:.2f}"])  # fmt: skip
    header = ["16 callers", *COLUMNS, "of the mean of the three alone (wall)", "(CPU)"]
    bench.table("mixed", header, rows)
