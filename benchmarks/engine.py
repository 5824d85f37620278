"""The engine in one process: how many tiles it answers, how long callers wait, and what each part of it is worth.

    python benchmarks/engine.py                               # all tables, some minutes
    python benchmarks/engine.py callers bulk --requests 96    # two of them, longer runs
    python benchmarks/engine.py --threads 2 --out engine.json

Tables:
  machine   what the processor can do: matrix products and memory bandwidth, per thread count used here
  callers   throughput and latency at 1, 4, 16 and 64 callers, captions, answers and classes in turn, on images never
            seen and on images seen before; beside it one query at a time, and static batches of 16, without the engine
  bulk      an interactive question alone, and while a caller sends a large scene as bulk
  mixed     captions (image), boxes (region) and masks (pixel) alone and in turn
  tools     each tool alone and after the other five on one image; six on one image against the same on six images
  parts     the cache, routing (experts mixed in one step against one for all), injection and MDA switched off; a step
            of fixed shapes, as a GPU does it
  compile   a step's decoder through `torch.compile`, which needs a C++ compiler
  attention the backends that need no GPU, at several lengths
  precision float32, bfloat16 and weights in eight bits
  generate  captions of one view, greedy, against `transformers.generate` with the decoder exported as a Llama

Wall times mean little where other work shares the cores. CPU seconds count the work itself: with one thread a tile per
CPU second is a tile per second of a core of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the server does, before torch is loaded

import torch
from engine_tables import attention, bulk, callers, compiled, generate, machine, mixed, parts, precision, tools
from engine_tables.bench import Bench

from model_server.app import keep_freed_memory
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver

TABLES: dict[str, Callable[[Bench], Coroutine[Any, Any, None]]] = {
    "callers": callers.measure, "bulk": bulk.measure, "mixed": mixed.measure, "tools": tools.measure,
    "parts": parts.measure, "compile": compiled.measure, "attention": attention.measure,
    "precision": precision.measure, "generate": generate.measure,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; none = all of them")
    parser.add_argument("--requests", type=int, default=48, help="requests of each measurement (default 48)")
    parser.add_argument("--threads", type=int, default=1, help="of the model (default 1, so that CPU seconds add up)")
    parser.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint (default: the embedded one)")
    parser.add_argument("--out", type=Path, help="write the tables as JSON")
    options = parser.parse_args()
    unknown = [name for name in options.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {unknown[0]!r}; the tables are {', '.join(TABLES)}")
    keep_freed_memory()  # as the server does
    torch.set_num_threads(options.threads)
    perceiver = Perceiver.load(options.weights)
    perceiver.warm_up()
    bench = Bench(perceiver, options.requests, options.weights)
    print(f"{perceiver.info.model} {perceiver.info.precision}, {datetime.now(UTC):%d %B %Y %H:%M} UTC, "
          f"{platform.platform()}, plan {perceiver.plan}")  # fmt: skip
    machine.measure(bench)
    for name in options.tables or TABLES:
        asyncio.run(TABLES[name](bench))
    machine.measure(bench)
    if options.out:
        options.out.write_text(json.dumps(bench.tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
