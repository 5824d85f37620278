"""What a caller waits for: the list of tools, the first answer, warm ones, boxes and masks; and many callers at once.

    python benchmarks/latency.py [--out latency.json] [--weights DIR] [--image scene.tif]

Prints a markdown table; --out writes the same figures, with where they were taken, as JSON. The cold figures go
through real processes: an MCP client over stdio that starts rs-mcp, and a model server of its own in a fresh state
folder, so a server that runs already does not flatter them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from measuring.asked import DENSE, DENSE_TILE, SCENE, WORDS, read_tiles
from measuring.figures import markdown, percentile

from model_server.protocol import PerceiveResponse
from rs_tools.client import ModelClient

CALLERS = (1, 4, 16)
DENSE_REPEATS = 7


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    unit: str
    target: str = ""


async def timed(work: Awaitable[Any]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


@contextlib.contextmanager
def fresh_state() -> Iterator[Path]:
    """A state folder without a server; what is started in it ends here."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RS_PERCEPTION_STATE"] = folder
        try:
            yield Path(folder)
        finally:
            for state in Path(folder).glob("server-*.json"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(json.loads(state.read_bytes())["pid"], signal.SIGTERM)
            del os.environ["RS_PERCEPTION_STATE"]


async def cold_figures(image: Path, weights: str | None, state: Path) -> list[Figure]:
    """Through the whole path, as an MCP client that was just opened sees it."""
    arguments = ["-m", "mcp_server", "--root", str(image.parent)]
    arguments += ["--weights", weights] if weights else []
    server = StdioServerParameters(
        command=sys.executable, args=arguments, env={"RS_PERCEPTION_STATE": str(state)}, cwd=Path(__file__).parents[1]
    )
    started = time.perf_counter()
    async with Client(server) as client:
        await client.list_tools()
        listed = time.perf_counter() - started
        answer = await client.call_tool("caption", {"image": str(image)})
        answered = time.perf_counter() - started
        if answer.is_error:
            raise SystemExit(f"the caption failed: {answer.content}")
        warm = [await timed(client.call_tool("caption", {"image": str(image)})) for _ in range(5)]
    return [
        Figure("tools/list, from process start", listed, "s", "<= 2"),
        Figure("first caption over MCP, cold: both servers start, model loads", answered, "s", "<= 15"),
        Figure("caption of the whole scene over MCP, warm, p50", percentile(warm, 0.5), "s", "<= 1"),
    ]


async def warm_figures(client: ModelClient, tiles: list[np.ndarray]) -> list[Figure]:
    """Captions of tiles never seen, then every task in words on these tiles."""
    figures = []
    for request, which in ((WORDS[0], "a new tile"), *((request, "a tile seen before") for request in WORDS)):
        seconds = [await timed(client.perceive(request, [tile])) for tile in tiles]
        for share in (0.5, 0.95):
            name = f"{request.task} of {which}, p{share * 100:.0f}"
            figures.append(Figure(name, percentile(seconds, share), "s", "<= 1"))
    return figures


async def dense_figures(client: ModelClient, image: Path) -> list[Figure]:
    """Boxes, masks and change of tiles that were never seen, one at a time."""
    tiles = iter(read_tiles(image, 2 * (DENSE_REPEATS + 1) * len(DENSE), DENSE_TILE))
    figures = []
    for name, request in DENSE.items():
        images = 2 if request.task == "detect_change" else 1
        seconds = [
            await timed(client.perceive(request, [next(tiles) for _ in range(images)]))
            for _ in range(DENSE_REPEATS + 1)
        ]
        for said, value in (("median", statistics.median(seconds[1:])), ("highest", max(seconds[1:]))):
            figures.append(Figure(f"{name}, a new tile of {DENSE_TILE} pixels, {said}", value, "s", "<= 1"))
    return figures


async def throughput_figures(client: ModelClient, tiles: list[np.ndarray], seconds: float) -> list[Figure]:
    """Tiles per second with each number of callers, on tiles seen before (engine.py measures new ones too).

    Every caller asks one tile at a time, the tasks mixed.
    """
    rates = {callers: await _rate(client, tiles, callers, seconds) for callers in CALLERS}
    what, alone = "throughput, tiles seen before", rates[CALLERS[0]]
    figures = [Figure(f"{what}, {callers} callers", rate, "tiles/s") for callers, rate in rates.items()]
    figures += [Figure(f"{what}, {n} callers against 1", rates[n] / alone, "ratio") for n in CALLERS[1:]]
    return figures


async def _rate(client: ModelClient, tiles: list[np.ndarray], callers: int, seconds: float) -> float:
    """The median over three runs: two cores that do other things too make single runs jump."""
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        done = await asyncio.gather(*(_caller(client, tiles, i, started + seconds) for i in range(callers)))
        rates.append(sum(done) / (time.perf_counter() - started))
    return statistics.median(rates)


async def _caller(client: ModelClient, tiles: list[np.ndarray], number: int, end: float) -> int:
    """Answers got until `end` (by time.perf_counter)."""
    done = 0
    while time.perf_counter() < end:
        turn = number + done
        await client.perceive(WORDS[turn % len(WORDS)], [tiles[turn % len(tiles)]])
        done += 1
    return done


def table(figures: list[Figure]) -> str:
    rows = [[f.name, f"{f.value:.3g} {'x' if f.unit == 'ratio' else f.unit}", f.target] for f in figures]
    return markdown(["what", "measured", "target"], rows)


def machine(answer: PerceiveResponse) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        **answer.model.model_dump(),
    }


async def measure(
    image: Path, weights: str | None, seconds: float, report: Callable[[str], None]
) -> tuple[list[Figure], dict[str, Any]]:
    with fresh_state() as state:
        report("cold start over MCP ...")
        figures = await cold_figures(image, weights, state)
        tiles = read_tiles(image, 32)
        async with ModelClient(weights=weights) as client:
            where = machine(await client.perceive(WORDS[0], tiles[:1]))
            report("warm latency ...")
            figures += await warm_figures(client, tiles)
            report("boxes, masks and change ...")
            figures += await dense_figures(client, image)
            report("throughput ...")
            figures += await throughput_figures(client, tiles, seconds)
            where["engine"] = (await client.health())["engine"]
    return figures, where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=SCENE, help="scene to ask about (default: a bundled one)")
    parser.add_argument("--weights", help="checkpoint folder (default: the embedded model)")
    parser.add_argument("--seconds", type=float, default=6, help="length of each throughput run")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    figures, where = asyncio.run(
        measure(options.image.resolve(), options.weights, options.seconds, lambda line: print(line, file=sys.stderr))
    )
    print(table(figures))
    print(
        f"\n{where['model']} on {where['device']} ({where['precision']}), {where['cores']} cores, {where['platform']}"
    )
    if options.out:
        options.out.write_text(json.dumps({"machine": where, "figures": [asdict(f) for f in figures]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
