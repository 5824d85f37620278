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
import contextlib
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the server does, before torch is loaded

import numpy as np
import torch

from model_server.app import _keep_freed_memory
from model_server.checkpoints.store import load_checkpoint
from model_server.engine import Engine
from model_server.model.attention import attend
from model_server.model.backends import Backend
from model_server.model.config import EXPERTS, StacksConfig, nano
from model_server.model.int8 import Int8Linear
from model_server.model.packed import PackedLinear, can_pack, pack_decoder
from model_server.model.rsvlm import RSVLM
from model_server.model.seen import prefixes, see
from model_server.model.slots import Lane, prefill
from model_server.perceiver import CAPTION_TOKENS, DEFAULT_WEIGHTS, TASK_TOKEN, Perceiver, Query
from model_server.protocol import PerceiveRequest

sys.path.insert(0, str(Path(__file__).parent))
import static_generate
from latency import SCENE, percentile, read_tiles

WORDS = (
    PerceiveRequest(task="caption"),
    PerceiveRequest(task="vqa", text="Is there a road in the image?"),
    PerceiveRequest(task="classify"),
)
GRANULARITIES = {
    "image": PerceiveRequest(task="caption"),
    "region": PerceiveRequest(task="ground", text="building", gsd_m=0.3),
    "pixel": PerceiveRequest(task="segment", labels=["road"], gsd_m=0.5),
}
CALLERS = (1, 4, 16, 64)
STATIC = 16
LENGTHS = (64, 256, 1024, 2048)

Row = list[str]


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

    def columns(self) -> Row:
        return [f"{self.tiles / self.wall_s:.1f}", f"{self.tiles / self.cpu_s:.1f}", f"{self.cpu_ms:.1f}"]


COLUMNS = ["tiles/s", "tiles per CPU s", "CPU ms/tile"]


class Bench:
    """The model, tiles, and the tables measured so far."""

    def __init__(self, perceiver: Perceiver, requests: int, weights: Path = DEFAULT_WEIGHTS) -> None:
        self.perceiver, self.requests, self.weights = perceiver, requests, weights
        self._tiles = read_tiles(SCENE, 16)
        self._made = itertools.count()
        self.tables: dict[str, list[Row]] = {}

    def fresh(self) -> np.ndarray:
        """A tile that nobody has seen."""
        n = next(self._made)
        tile = self._tiles[n % len(self._tiles)].copy()
        tile[0, :8, 0] = [n >> 4 * i & 15 for i in range(8)]
        return tile

    def known(self) -> np.ndarray:
        return self._tiles[next(self._made) % len(self._tiles)]

    def table(self, name: str, header: Row, rows: list[Row]) -> None:
        self.tables[name] = [header, *rows]
        print(f"\n{name}\n", flush=True)
        for row in (header, ["---"] * len(header), *rows):
            print(f"| {' | '.join(row)} |", flush=True)


def timed(work: Callable[[], int]) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    tiles = work()
    return Run(tiles, time.perf_counter() - wall, time.process_time() - cpu)


async def timed_async(work: Awaitable[list[float]]) -> Run:
    """`work` gives each caller's waits."""
    wall, cpu = time.perf_counter(), time.process_time()
    waits = await work
    return Run(len(waits), time.perf_counter() - wall, time.process_time() - cpu, waits)


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


def measure_machine(bench: Bench) -> None:
    """The best of some matrix products, and of some copies of an array larger than the caches, by CPU time."""
    n = 1024
    a, big = torch.randn(n, n), torch.zeros(32 * 2**20)
    packed = PackedLinear(a) if can_pack(a.device) else torch.nn.Linear(n, n, bias=False)
    products = {
        "matrix products, float32, PyTorch's BLAS": lambda: int((a @ a).shape[0]),
        "the same, packed as the projections are": lambda: int(packed(a).shape[0]),
    }
    copy = min(timed(lambda: big.clone().shape[0]).cpu_s for _ in range(5))
    rows = [
        *(
            [name, f"{2 * n**3 / min(timed(product).cpu_s for _ in range(20)) / 1e9:.0f} GFLOP per CPU s"]
            for name, product in products.items()
        ),
        ["copying memory", f"{2 * big.nbytes / copy / 1e9:.1f} GB per CPU s"],
        ["load average", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"],
    ]
    bench.table(f"machine, {torch.get_num_threads()} threads", ["what", "measured"], rows)


async def measure_callers(bench: Bench) -> None:
    for kind, image in (("never seen", bench.fresh), ("seen before", bench.known)):
        rows, base = [], None
        async with serving(bench) as engine:
            if kind == "seen before":
                await ask(engine, 1, 2 * STATIC * len(WORDS), WORDS, image)
            for callers in CALLERS:
                run = await timed_async(ask(engine, callers, max(bench.requests, callers), WORDS, image))
                base = base or run
                ratio = [f"{base.wall_s / base.tiles * run.tiles / run.wall_s:.2f}", f"{base.cpu_ms / run.cpu_ms:.2f}"]
                waits = [f"{1000 * percentile(list(run.waits), share):.0f}" for share in (0.5, 0.95, 0.99)]
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


async def measure_bulk(bench: Bench) -> None:
    async def interactive(engine: Engine, count: int) -> list[float]:
        return await ask(engine, 1, count, WORDS, bench.fresh)

    async def scene(engine: Engine) -> None:
        while True:
            tiles = [bench.fresh() for _ in range(32)]
            await engine.perceive(WORDS[0], tiles, priority="bulk", caller="scene")
            answered.append(len(tiles))

    rows, answered = [], []
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
    p95 = [percentile(list(run.waits), 0.95) for run in (alone, loaded)]
    for name, run, beside, tail in (("alone", alone, 0, p95[0]), ("under bulk load", loaded, done, p95[1])):
        half = percentile(list(run.waits), 0.5)
        rows.append([name, f"{1000 * half:.0f}", f"{1000 * tail:.0f}", f"{tail / p95[0]:.2f}", str(beside)])
    bench.table("bulk", ["an interactive question", "p50 ms", "p95 ms", "p95 x", "bulk tiles meanwhile"], rows)


async def measure_mixed(bench: Bench) -> None:
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


async def measure_tools(bench: Bench) -> None:
    """CPU only. Each tool alone on an image of its own, and as the last of six on one image; then all of them."""
    tools = [
        *WORDS, GRANULARITIES["region"], PerceiveRequest(task="segment", labels=["building"], gsd_m=0.3),
        PerceiveRequest(task="detect_change", gsd_m=0.5),
    ]  # fmt: skip
    repeats = max(bench.requests // 12, 3)
    one_encoding = median(timed(lambda: len(see_one(bench))).cpu_ms for _ in range(max(bench.requests // 4, 5)))

    async def cost(engine: Engine, asked: Sequence[PerceiveRequest], same: bool = True) -> list[float]:
        """Of each question, on one image that nobody has seen or on one each."""
        image, spent = bench.fresh(), []
        for request in asked:
            tile = image if same else bench.fresh()
            cpu = time.process_time()
            await engine.perceive(request, [tile, bench.fresh()] if request.task == "detect_change" else [tile])
            spent.append(1000 * (time.process_time() - cpu))
        return spent

    def row(name: str, alone: float, on_one: float) -> Row:
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
def see_one(bench: Bench) -> list[object]:
    perceiver = bench.perceiver
    return list(see(perceiver.model, perceiver._pixels([bench.fresh()])))


async def measure_parts(bench: Bench) -> None:
    rows = []
    limit = bench.perceiver.cache.limit
    for name, kept in (("with the cache", limit), ("without", 0)):
        bench.perceiver.cache.limit = kept
        async with serving(bench) as engine:
            await ask(engine, 1, STATIC * len(WORDS), WORDS, bench.known)
            run = await timed_async(ask(engine, STATIC, bench.requests, WORDS, bench.known))
        rows.append([f"16 callers on 16 images, {name}", *run.columns()])
    bench.perceiver.cache.limit = limit
    bench.table("parts: cache", ["what", *COLUMNS], rows)
    steps, prompts = part_costs(max(bench.requests // 4, 12))
    rows = [[name, f"{ms:.1f}"] for name, ms in steps.items()]
    bench.table("parts: steps", ["a step of 16 answers, random weights of nano", "CPU ms"], rows)
    rows = [[name, f"{ms:.1f}"] for name, ms in prompts.items()]
    bench.table("parts: images", ["the decoder's part of 4 images, random weights of nano", "CPU ms"], rows)


def variants() -> dict[str, RSVLM]:
    """nano with random weights and more or fewer mechanisms."""
    c = nano()
    plain = replace(c, fusion=replace(c.fusion, mda_layers=()))
    injected = replace(plain, stacks=StacksConfig(factor=1), inject_layers=c.fusion.mda_layers, inject_steps=True)
    configs = {
        "as shipped: one expert, MDA": c,
        "without MDA": plain,
        "injection at every step, in MDA's place": injected,
        "three experts": replace(c, decoder=replace(c.decoder, experts=EXPERTS)),
    }
    return {name: RSVLM(config).eval() for name, config in configs.items()}


@torch.inference_mode()
def part_costs(repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """CPU milliseconds, the median of runs taken in turn: of a step of 16 answers, and of the decoder's visual part."""
    models, image = variants(), None
    lanes: dict[str, Lane] = {}
    making: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        model.backbone.fold_norms()
        if image is None:
            image = torch.randint(0, 256, (1, 3, *[model.config.image_size] * 2), dtype=torch.uint8)
        (seen,) = see(model, image)
        making[name] = lambda model=model, seen=seen: prefixes(
            model, [replace(seen, prefixes={}) for _ in range(4)], 1, 0
        )
        kinds = {name: ([0], False)}
        if len(model.config.decoder.experts) > 1:
            kinds = {f"{name}, a third of the answers by each": (range(3), False)}
        elif name.startswith("as shipped"):
            kinds["as shipped, of fixed shapes"] = [0], True
        for kind, (experts, static) in kinds.items():
            lanes[kind] = lane = lane_of(model, repeats, static)
            for i in range(STATIC):
                (prefix,) = prefixes(model, [seen], 1, experts[i % len(experts)])
                lane.join([i], prefill(model, prefix, 1, None))
    del making["three experts"]  # all of an image goes through one
    return in_turn({name: lane.step for name, lane in lanes.items()}, repeats), in_turn(making, repeats)


def lane_of(model: RSVLM, steps: int, static: bool) -> Lane:
    banned = torch.zeros(model.config.decoder.vocab_size, dtype=torch.bool)
    return Lane(model, sequences=STATIC, views=1, prompt=model.visual_tokens + 1, beams=5, steps=steps + 4, end=0,
                banned=banned, length_power=0.0, static=static)  # fmt: skip


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


async def measure_compile(bench: Bench) -> None:
    with torch.no_grad():
        compare_compiled(bench)


def compare_compiled(bench: Bench) -> None:
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


async def measure_attention(bench: Bench) -> None:
    """Those that need no GPU, with heads as in nano. Prompts are causal and alone; a step has 16 answers of 5
    hypotheses and a mask."""
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


async def measure_precision(bench: Bench) -> None:
    """The same captions and answers, of new images and again of the same ones, in turn."""
    models = {p: Perceiver.load(bench.weights, precision=p) for p in ("float32", "bfloat16", "int8")}
    spent: dict[str, tuple[list[float], list[float]]] = {p: ([], []) for p in models}
    for turn in range(max(bench.requests // 12, 3) + 1):
        asked = [Query(r.task, image, text=r.text) for image in (bench.fresh() for _ in range(8)) for r in WORDS[:2]]
        for name, model in models.items():
            for times in spent[name]:
                run = timed(lambda model=model, asked=asked: len(model.answer(asked)))
                if turn:
                    times.append(run.cpu_ms)
    rows = []
    for name, (fresh, known) in spent.items():
        plan = models[name].plan
        held = [f"{size / 2**20:.0f}" for size in (plan.weights, plan.slots)]
        rows.append([name, *held, f"{median(fresh):.1f}", f"{median(known):.1f}"])
    header = ["precision", "weights MiB", "slots MiB", "captions and answers, new images: CPU ms each", "known images"]
    bench.table("precision", header, rows)
    measure_layer(bench)


@torch.inference_mode()
def measure_layer(bench: Bench, width: int = 4096) -> None:
    """One layer as wide as those of a model of 7 to 8 billion parameters, whose weights leave the caches."""
    weight = torch.randn(width, width).bfloat16() / width**0.5
    layers = {
        "bfloat16": lambda x: torch.nn.functional.linear(x, weight), "packed": PackedLinear(weight),
        "eight bits": Int8Linear(weight),
    }  # fmt: skip
    rows = []
    for count in (1, 4, 16, 48, 192):
        x = torch.randn(count, width).bfloat16()
        works = {name: lambda layer=layer, x=x: layer(x) for name, layer in layers.items()}
        rows.append([str(count), *(f"{ms:.2f}" for ms in in_turn(works, 12).values())])
    header = [f"rows of {width}, bfloat16", *(f"{name}: CPU ms" for name in layers)]
    bench.table("precision: a layer", header, rows)


async def measure_generate(bench: Bench) -> None:
    """Both sides read the same embeddings and must write the same tokens; see static_generate for what is left out."""
    perceiver, plain = bench.perceiver, load_checkpoint(bench.weights, "cpu").model
    with torch.inference_mode():
        images = [bench.fresh() for _ in range(max(bench.requests, STATIC))]
        visual = torch.cat([perceiver.model.encode(perceiver._pixels([image])).visual for image in images])
    tokenizer = perceiver.tokenizer
    how = static_generate.Writing(
        tokenizer.tasks[TASK_TOKEN["caption"]], tokenizer.end, tokenizer.pad, perceiver._banned, CAPTION_TOKENS
    )
    llama = static_generate.as_llama(plain.decoder)
    sides = {
        "transformers.generate, one at a time": lambda: static_generate.static(llama, visual, how, 1),
        f"transformers.generate, batches of {STATIC}": lambda: static_generate.static(llama, visual, how, STATIC),
        f"a lane of {STATIC} places, projections not packed": lambda: static_generate.continuous(
            plain, visual, how, STATIC
        ),
        f"a lane of {STATIC} places": lambda: static_generate.continuous(perceiver.model, visual, how, STATIC),
    }
    rows, first = [], None
    for name, write in sides.items():
        written = write()
        first = first or written
        differ = sum(a != b for a, b in zip(written.ids, first.ids, strict=True))
        n, tokens = len(written.ids), sum(len(ids) + 1 for ids in written.ids)
        rows.append([name, f"{n / written.wall_s:.1f}", f"{1000 * written.cpu_s / n:.1f}", f"{tokens}", f"{differ}",
                     f"{first.wall_s / written.wall_s:.2f}", f"{first.cpu_s / written.cpu_s:.2f}"])  # fmt: skip
    header = ["captions of one view, greedy", "answers/s", "CPU ms/answer", "tokens", "answers that differ", "x (wall)",
              "x (CPU)"]  # fmt: skip
    bench.table("generate", header, rows)


TABLES: dict[str, Callable[[Bench], Coroutine[Any, Any, None]]] = {
    "callers": measure_callers, "bulk": measure_bulk, "mixed": measure_mixed, "tools": measure_tools,
    "parts": measure_parts, "compile": measure_compile, "attention": measure_attention, "precision": measure_precision,
    "generate": measure_generate,
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
    _keep_freed_memory()  # as the server does
    torch.set_num_threads(options.threads)
    perceiver = Perceiver.load(options.weights)
    perceiver.warm_up()
    bench = Bench(perceiver, options.requests, options.weights)
    print(f"{perceiver.info.model} {perceiver.info.precision}, {datetime.now(UTC):%d %B %Y %H:%M} UTC, "
          f"{platform.platform()}, plan {perceiver.plan}")  # fmt: skip
    measure_machine(bench)
    for name in options.tables or TABLES:
        asyncio.run(TABLES[name](bench))
    measure_machine(bench)
    if options.out:
        options.out.write_text(json.dumps(bench.tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
