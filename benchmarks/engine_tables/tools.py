"""What a tool costs alone and after others on the same image, against one encoding of an image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from measuring.asked import WORDS

from engine_tables.bench import GRANULARITIES, Bench
from engine_tables.serving import serving
from engine_tables.timing import timed
from model_server.engine import Engine
from model_server.model.seen import see
from model_server.protocol import PerceiveRequest


async def measure(bench: Bench) -> None:
    """CPU only. Each tool alone on an image of its own, and as the last of six on one image; then all of them."""
    tools = [
        *WORDS, GRANULARITIES["region"], PerceiveRequest(task="segment", labels=["building"], gsd_m=0.3),
        PerceiveRequest(task="detect_change", gsd_m=0.5),
    ]  # fmt: skip
    repeats = max(bench.requests // 12, 3)
    one_encoding = median(timed(lambda: see_one(bench)).cpu_ms for _ in range(max(bench.requests // 4, 5)))

    async def cost(engine: Engine, asked: Sequence[PerceiveRequest], same: bool = True) -> list[float]:
        """Of each question, on one image that nobody has seen or on one each."""
        image, spent = bench.fresh(), []
        for request in asked:
            tile = image if same else bench.fresh()
            cpu = time.process_time()
            await engine.perceive(request, [tile, bench.fresh()] if request.task == "detect_change" else [tile])
            spent.append(1000 * (time.process_time() - cpu))
        return spent

    def row(name: str, alone: float, on_one: float) -> list[str]:
        return [name, f"{alone:.0f}", f"{on_one:.0f}", f"{alone / one_encoding:.2f}", f"{on_one / one_encoding:.2f}"]

    rows = [["one encoding of an image, all views", f"{one_encoding:.0f}", "", "1.00", ""]]
    async with serving(bench) as engine:
        await cost(engine, tools)
        for tool in tools:
            others = [other for other in tools if other is not tool]
            alone = [(await cost(engine, [tool]))[0] for _ in range(repeats)]
            last = [(await cost(engine, [*others, tool]))[-1] for _ in range(repeats)]
            rows.append(row(tool.task, median(alone), median(last)))
        for name, asked in (("caption, vqa, classify", WORDS), ("all six tools", tuple(tools))):
            each = [sum(await cost(engine, asked, same=False)) for _ in range(repeats)]
            one = [sum(await cost(engine, asked)) for _ in range(repeats)]
            rows.append(row(name, median(each), median(one)))
    header = ["what", "CPU ms, an image each", "on one image, after the others", "x one encoding", "x on one image"]
    bench.table("tools", header, rows)


@torch.inference_mode()
def see_one(bench: Bench) -> int:
    perceiver = bench.perceiver
    return len(see(perceiver.model, perceiver.pixels([bench.fresh()])))
