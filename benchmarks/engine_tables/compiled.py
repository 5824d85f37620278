"""A step's decoder plain, packed and through `torch.compile`, which needs a C++ compiler."""

from __future__ import annotations

import time

import torch

from engine_tables.bench import STATIC, Bench
from engine_tables.timing import in_turn
from model_server.model.config import nano
from model_server.model.packed import pack_decoder
from model_server.model.rsvlm import RSVLM


async def measure(bench: Bench) -> None:
    with torch.no_grad():
        compare(bench)


def compare(bench: Bench) -> None:
    """80 rows through the decoder, as a step of 16 answers has them, without keys and values of before."""
    plain, packed = RSVLM(nano()).eval().decoder, RSVLM(nano()).eval().decoder
    pack_decoder(packed)
    compiled = torch.compile(plain.forward)
    x, at = torch.randn(STATIC, 5, plain.config.width), torch.full((STATIC, 5), 80)
    expert = torch.zeros(STATIC, dtype=torch.long)
    started = time.perf_counter()
    compiled(x, at, None, expert)
    seconds = time.perf_counter() - started
    kinds = {"plain": plain.forward, "packed, as served": packed.forward, "torch.compile": compiled}
    found = in_turn({name: lambda run=run: run(x, at, None, expert) for name, run in kinds.items()}, 30)
    rows = [[name, f"{ms:.1f}", f"{seconds:.0f}" if name == "torch.compile" else ""] for name, ms in found.items()]
    bench.table("compile", ["80 rows through the decoder of nano", "CPU ms", "s to compile"], rows)
