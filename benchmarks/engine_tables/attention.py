"""The attention backends that need no GPU, at several lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine_tables.bench import STATIC, Bench
from engine_tables.timing import in_turn
from model_server.model.attention import attend
from model_server.model.backends import Backend
from model_server.model.config import nano

LENGTHS = (64, 256, 1024, 2048)


async def measure(bench: Bench) -> None:
    """With heads as in nano. Prompts are causal and alone; a step has 16 answers of 5 hypotheses and a mask."""
    c = nano().decoder
    width = c.width // c.heads
    rows = []
    for length in LENGTHS:
        shapes = {"prompt": (1, length, "causal"), "step": (STATIC, 5, torch.rand(STATIC, 1, 5, length) < 0.9)}
        row = [str(length)]
        for batch, queries, mask in shapes.values():
            q = torch.randn(batch, c.heads, queries, width)
            k, v = torch.randn(2, batch, c.heads, length, width)
            works: dict[str, Callable[[], object]] = {
                b: lambda b=b, q=q, k=k, v=v, mask=mask: attend(q, k, v, mask, b) for b in (Backend.SDPA, Backend.MATH)
            }
            row += [f"{ms:.2f}" for ms in in_turn(works, 20).values()]
        rows.append(row)
    bench.table("attention", ["places", "prompt, sdpa: CPU ms", "math", "step, sdpa: CPU ms", "math"], rows)
