"""What a large scene costs: throughput and memory at several sizes, and where the time goes.

    python benchmarks/scene.py [--sizes 1000 5000 10000 20000] [--masks 5000 20000] [--sahi DIR] [--model]
        [--out scene.json]

Every tile of each scene is read at full resolution, answered, and the answers' boxes merged. The model is a stand-in
that knows the boxes (--model adds a sweep of batch sizes with the real one). Each figure comes from a process of its
own that has done one small scene before, as the tools' process has (libraries are loaded and started). CPU seconds are
told beside wall time, because only they mean something on a machine that does other things too.

With `sahi` importable (--sahi: a folder to find it in, as made by `pip install --target DIR --no-deps sahi
opencv-python-headless`) its slicing and merging get the same file, tiles and boxes, in turn with ours. Small scenes
are also done many times in one process, ours and sahi in turn.

Masks (`segment` with one class and with sixteen, `detect_change`, with outlines and preview) are made by the tools as
they are, at up to `MAX_TILES` tiles a scene, with a stand-in that marks what is bright: thousands of areas.

The scenes are TIFFs whose blocks all point at the same compressed block of a real image: hundreds of megapixels that
have to be decoded, in a file of a megabyte.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine

from model_server.protocol import ModelInfo, PerceiveRequest, PerceiveResponse, TileCaption, TileChange, TileMasks
from rs_tools.geometry.measures import TileFrame
from rs_tools.geometry.merging import Detections, merge
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.reading import Wanted
from rs_tools.imagery.scene import Pixels, ReadWindow, Region, Scene
from rs_tools.imagery.tiling import MODEL_SIDE, OVERLAP, Looks, TilePlan, tile_grid
from rs_tools.looking import BATCH, stream
from rs_tools.results import DetectChangeResult, SegmentResult
from rs_tools.tools import Tools

IMAGE = Path(__file__).parents[1] / "examples" / "data" / "yellowstone_road.jpg"
SIZES = [1000, 5000, 10_000, 20_000]
MASKS = [5000, 20_000]
CLASSES = {"segment": 1, "segment, 16 classes": 16}
MARKED = 16  # tile pixels a side of a marking model's cells
SAHI_MOST = 20_000  # it holds the whole image and all slices: beyond this more memory than most machines have
SWEPT = 3000
WARM_UP, WARM_UP_SIDE = "warm_up.tif", 512
REPEATS = 7
REPEATS_LARGE, LARGE = 3, 10_000
TURNS, TURNS_SIDE = 40, 1000  # in one process, and scenes of at most so many pixels a side
OVERLAPS = [0, 16, 32, 64, 128]
BATCHES = [1, 4, 8, 16, 32, 64]
BLOCK = 512
OBJECT = 24  # pixels; one object in every cell of CELL x CELL
CELL = 128


def write_scene(path: Path, side: int) -> None:
    """A tiled deflate RGB TIFF of side x side pixels, its blocks all the same bytes."""
    with rasterio.open(IMAGE) as file:
        values = file.read([1, 2, 3])
    whole = np.tile(values, (1, -(-BLOCK // values.shape[1]), -(-BLOCK // values.shape[2])))[:, :BLOCK, :BLOCK]
    block = zlib.compress(np.ascontiguousarray(whole.transpose(1, 2, 0)).tobytes(), 6)
    count = (-(-side // BLOCK)) ** 2
    # (tag, type, values): 3 is uint16, 4 uint32. 256/257 size, 258 bits, 259 deflate, 262 RGB, 277 samples, 284
    # interleaved, 322/323 block size, 324 offsets, 325 byte counts.
    entries: list[tuple[int, int, list[int]]] = [
        (256, 4, [side]), (257, 4, [side]), (258, 3, [8, 8, 8]), (259, 3, [8]), (262, 3, [2]), (277, 3, [3]),
        (284, 3, [1]), (322, 4, [BLOCK]), (323, 4, [BLOCK]), (324, 4, [8] * count), (325, 4, [len(block)] * count),
    ]  # fmt: skip
    directory_at = 8 + len(block) + len(block) % 2
    free = directory_at + 2 + 12 * len(entries) + 4
    directory, beyond = struct.pack("<H", len(entries)), b""
    for tag, kind, numbers in entries:
        data = struct.pack(f"<{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(data) > 4:
            inline, beyond = struct.pack("<I", free + len(beyond)), beyond + data + b"\0" * (len(data) % 2)
        else:
            inline = data.ljust(4, b"\0")
        directory += struct.pack("<HHI", tag, kind, len(numbers)) + inline
    padding = b"\0" * (len(block) % 2)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, directory_at) + block + padding + directory + b"\0" * 4 + beyond)


def objects(side: int) -> np.ndarray:
    """Boxes float64 [N, 4], one in each cell at a random place."""
    cells = side // CELL
    corner = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), axis=-1).reshape(-1, 2) * CELL
    start = corner + np.random.default_rng(0).integers(0, CELL - OBJECT, corner.shape)
    return np.concatenate([start, start + OBJECT], axis=1).astype(float)


class KnowingModel:
    """Answers a tile with the objects in it, clipped to the tile, in tile pixels; a look-up by cell, so it is quick."""

    def __init__(self, side: int) -> None:
        self._cells = side // CELL
        self._boxes = objects(side).reshape(self._cells, self._cells, 4)

    def boxes(self, region: Region) -> np.ndarray:
        x1, y1, x2, y2 = region
        found = self._boxes[y1 // CELL : y2 // CELL + 1, x1 // CELL : x2 // CELL + 1].reshape(-1, 4)
        clipped = np.clip(found, [x1, y1, x1, y1], [x2, y2, x2, y2])
        seen = (clipped[:, 2] - clipped[:, 0] > 4) & (clipped[:, 3] - clipped[:, 1] > 4)
        return clipped[seen] - [x1, y1, x1, y1]


class MarkingModel:
    """Answers a tile (of a pair: the later one) with its red, in cells of `MARKED` pixels, as a probability.

    Each class is the one before, some cells to the right.
    """

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        model = ModelInfo(model="marking", weights_digest="", attention_backend="", precision="", device="cpu")
        answer = PerceiveResponse(model=model, task_token="", expert="", warnings=[], elapsed_s=0)
        if request.task == "segment":
            classes = len(request.labels)
            for tile in tiles:
                one = self._marked(tile)
                maps = np.stack([np.roll(one, 3 * MARKED * i, axis=1) for i in range(classes)])
                thresholds, known = [0.5] * classes, [True] * classes
                answer.masks.append(
                    TileMasks(
                        labels=request.labels, thresholds=thresholds, known=known, scale=1, probabilities=maps
                    )
                )
        elif request.task == "detect_change":
            answer.changes = [
                TileChange(threshold=0.5, scale=1, probabilities=self._marked(tile)) for tile in tiles[1::2]
            ]
        else:
            answer.captions = [TileCaption(caption="A road.", confidence=0.5) for _ in tiles]
        return answer

    def _marked(self, tile: np.ndarray) -> np.ndarray:
        cells = tile[::MARKED, ::MARKED, 0].repeat(MARKED, axis=0).repeat(MARKED, axis=1)
        return np.ascontiguousarray(cells[: tile.shape[0], : tile.shape[1]])


class Clock:
    """CPU seconds of the threads that pass through named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.thread_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - started


def timed_reader(scene: Scene, clock: Clock) -> Scene:
    """The scene, its reading put on the clock."""
    reader: Callable[..., Any] = scene.reader

    @contextmanager
    def timed(windows: Sequence[Wanted] = ()) -> Iterator[ReadWindow]:
        with clock.stage("reading"):
            opened = reader(windows)
            read = opened.__enter__()

        def one(region: Region, out_size: tuple[int, int]) -> Pixels:
            with clock.stage("reading"):
                return read(region, out_size)

        try:
            yield one
        finally:
            opened.__exit__(None, None, None)

    object.__setattr__(scene, "reader", timed)
    return scene


async def ours(path: Path, side: int, overlap: int, batch: int) -> dict[str, Any]:
    """Read, answer and merge everything, as the tools do it."""
    clock, model = Clock(), KnowingModel(side)
    wall, cpu = time.perf_counter(), time.process_time()
    with clock.stage("reading"):
        scene = Scene.open(AccessPolicy([path.parent]), str(path))
    scene = timed_reader(scene, clock)
    plan = tile_grid((0, 0, side, side), MODEL_SIDE, overlap)

    async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> list[np.ndarray]:
        with clock.stage("model"):
            return [model.boxes(region) for region in regions]

    seen = await stream(scene, Looks(None, plan), ask, seconds=36_000, batch=batch)
    with clock.stage("merging"):
        found = merge(detections(plan, [look.answer for look in seen.looks]))
    return figures(side, len(plan.regions), len(found), wall, cpu, clock)


def detections(plan: TilePlan, boxes: Sequence[np.ndarray]) -> Detections:
    whole = plan.regions[0][:2] + plan.regions[-1][2:]
    frames = [TileFrame(region, plan.size(region)) for region in plan.regions]
    scores = [np.full(len(some), 0.9) for some in boxes]
    return Detections.in_tiles(frames, boxes, scores, [["ship"] * len(some) for some in boxes], whole)


def with_sahi(path: Path, side: int, overlap: int) -> dict[str, Any]:
    """The same with sahi: its slices of the file, its predictions, its greedy merging."""
    from sahi.postprocess.combine import GreedyNMMPostprocess  # pyright: ignore[reportMissingImports]  # installed by those who compare
    from sahi.prediction import ObjectPrediction  # pyright: ignore[reportMissingImports]  # installed by those who compare
    from sahi.slicing import slice_image  # pyright: ignore[reportMissingImports]  # installed by those who compare

    clock, model = Clock(), KnowingModel(side)
    wall, cpu = time.perf_counter(), time.process_time()
    with clock.stage("reading"):
        ratio = overlap / MODEL_SIDE
        sliced = slice_image(
            str(path), slice_height=MODEL_SIDE, slice_width=MODEL_SIDE, overlap_height_ratio=ratio,
            overlap_width_ratio=ratio,
        )  # fmt: skip
        tiles = [np.ascontiguousarray(image) for image in sliced.images]  # as a model takes them, and ours are
    found = []
    for tile, (x, y) in zip(tiles, sliced.starting_pixels, strict=True):
        with clock.stage("model"):
            boxes = model.boxes((x, y, x + tile.shape[1], y + tile.shape[0]))
        with clock.stage("merging"):
            found += [
                ObjectPrediction(
                    bbox=box, category_id=0, category_name="ship", score=0.9, shift_amount=[x, y],
                    full_shape=[side, side],
                ).get_shifted_object_prediction()
                for box in boxes.tolist()
            ]  # fmt: skip
    with clock.stage("merging"):
        merged = GreedyNMMPostprocess(match_threshold=0.5, match_metric="IOS", class_agnostic=False)(found)
    return figures(side, len(tiles), len(merged), wall, cpu, clock)


def figures(side: int, tiles: int, found: int, wall: float, cpu: float, clock: Clock) -> dict[str, Any]:
    return {
        "side": side,
        "tiles": tiles,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        **{f"{name}_s": seconds for name, seconds in clock.seconds.items()},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "objects": len(objects(side)),
        "found": found,
    }


async def masked(kind: str, path: Path, side: int) -> dict[str, Any]:
    """A mask of the whole scene by the tools themselves, with outlines and preview."""
    with tempfile.TemporaryDirectory() as folder:
        later = path.with_name(f"later-{path.name}")
        tools = Tools(AccessPolicy([path.parent]), MarkingModel(), deadline_s=36_000, artifacts=folder)
        wall, cpu = time.perf_counter(), time.process_time()
        found: SegmentResult | DetectChangeResult
        if kind in CLASSES:
            found = await tools.segment(path.name, [f"class {i}" for i in range(CLASSES[kind])], preview=True)
            share = sum(one.share for one in found.classes)
        else:
            found = await tools.detect_change(path.name, later.name, preview=True)
            share = found.changed_share
        grid = found.provenance.tile_grid
        return {
            "side": side,
            "tiles": grid.columns * grid.rows if grid else 0,
            "wall_s": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "share": share,
            "bytes": {one.kind: os.path.getsize(one.path) for one in found.artifacts},  # noqa: ASYNC240 - one caller
        }


async def asked(path: Path, side: int, batch: int) -> dict[str, Any]:
    """Questions about every tile, put to the real model server."""
    from rs_tools.client import ModelClient

    scene = Scene.open(AccessPolicy([path.parent]), str(path))
    plan = tile_grid((0, 0, side, side), MODEL_SIDE, 0)
    async with ModelClient() as client:

        async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> list[Any]:
            # Noise in one corner: the scene's blocks are alike, and a cache of equal tiles must not help.
            for tile in tiles:
                tile[:8, :8] = np.frombuffer(os.urandom(192), np.uint8).reshape(8, 8, 3)
            return list((await client.perceive(PerceiveRequest(task="vqa", text="Is there a road?"), tiles)).vqa)

        await stream(scene, Looks(None, tile_grid((0, 0, 512, 512), MODEL_SIDE)), ask, seconds=600)  # warm
        wall = time.perf_counter()
        await stream(scene, Looks(None, plan), ask, seconds=3600, batch=batch)
    return {"tiles": len(plan.regions), "wall_s": time.perf_counter() - wall}


# --- the parent: one child process for each figure --------------------------------------------------------------------


def child(kind: str, path: Path, side: int, overlap: int = OVERLAP, batch: int = BATCH) -> dict[str, Any]:
    """The run with the median CPU time (the model's: wall time) of several."""
    once = kind in ("model", *CLASSES, "detect_change")
    return middle([_child(kind, path, side, overlap, batch) for _ in range(1 if once else REPEATS)])


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median CPU time, and what the lowest was."""
    ordered = sorted(runs, key=lambda run: run.get("cpu_s", run["wall_s"]))
    lowest = {f"lowest_{name}": min(run[name] for run in runs) for name in ("cpu_s", "wall_s") if name in ordered[0]}
    return ordered[len(runs) // 2] | lowest | {"runs": len(runs)}


def _child(kind: str, path: Path, side: int, overlap: int, batch: int) -> dict[str, Any]:
    arguments = ["--child", kind, str(path), str(side), str(overlap), str(batch)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} at {side}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_child(kind: str, path: str, side: str, overlap: str, batch: str) -> None:
    scene, pixels, shared, size = Path(path), int(side), int(overlap), int(batch)
    first = scene.with_name(WARM_UP)
    if kind == "sahi":
        with_sahi(first, WARM_UP_SIDE, shared)
        found = with_sahi(scene, pixels, shared)
    elif kind == "turns":
        found = {"ours": [], "sahi": []}
        for _ in range(TURNS):
            found["ours"].append(asyncio.run(ours(scene, pixels, shared, size)))
            found["sahi"].append(with_sahi(scene, pixels, shared))
    elif kind == "model":
        found = asyncio.run(asked(scene, pixels, size))
    elif kind in (*CLASSES, "detect_change"):
        found = asyncio.run(masked(kind, scene, pixels))
    else:
        asyncio.run(ours(first, WARM_UP_SIDE, shared, size))
        found = asyncio.run(ours(scene, pixels, shared, size))
    print(json.dumps(found))


def row(name: str, run: dict[str, Any]) -> str:
    pixels = run["side"] ** 2 / 1e6
    shares = " / ".join(f"{run[f'{stage}_s'] / run['cpu_s']:.0%}" for stage in ("reading", "model", "merging"))
    return (
        f"| {name} | {run['side']:,} | {run['tiles']:,} | {run['runs']} | {run['lowest_cpu_s'] / pixels * 1000:.1f} "
        f"/ {run['cpu_s'] / pixels * 1000:.1f} | {run['lowest_wall_s'] / pixels * 1000:.1f} / "
        f"{run['wall_s'] / pixels * 1000:.1f} | {pixels / run['cpu_s']:.1f} | {shares} | {run['peak_mib']:.0f} "
        f"| {run['found']:,} of {run['objects']:,} |"
    )


def whole_share(overlap: int, size: int = 32) -> float:
    """Share of objects of `size` pixels, anywhere in a large scene, that lie whole in at least one tile."""
    spans = tile_grid((0, 0, 20_000, MODEL_SIDE), MODEL_SIDE, overlap).regions
    starts = np.random.default_rng(0).integers(0, 20_000 - size, (2, 20_000))
    along = np.zeros(starts.shape, bool)
    for x1, _, x2, _ in spans:
        along |= (starts >= x1) & (starts + size <= x2)
    return float(along.all(axis=0).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of the scenes in pixels")
    parser.add_argument("--masks", type=int, nargs="*", default=MASKS, help="sides of the scenes that get masks")
    parser.add_argument("--sahi", type=Path, metavar="DIR", help="folder to find sahi in")
    parser.add_argument("--model", action="store_true", help="also sweep batch sizes with this user's model server")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(*options.child)
        return
    if options.sahi:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(options.sahi.resolve()), os.environ.get("PYTHONPATH", "")])
        sys.path.append(str(options.sahi.resolve()))
    results: dict[str, Any] = {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        write_scene(Path(folder) / WARM_UP, WARM_UP_SIDE)
        measured = {"sizes": sizes, "overlaps": overlaps, "batches": batches, "masks": masks}
        for name, measure in measured.items():
            print(f"\n### {name}\n", flush=True)
            results[name] = measure(Path(folder), options)
    print(f"\n{results['cores']} cores, load {results['load']:.1f} at the start, {results['platform']}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def sizes(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    columns = ["what", "side", "tiles", "runs", "CPU ms/MPix, lowest / median", "wall ms/MPix", "MPix per CPU s"]
    columns += ["reading / model / merging", "peak MiB", "objects"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    installed = importlib.util.find_spec("sahi") is not None
    for side in options.sizes:
        path = folder / f"{side}.tif"
        write_scene(path, side)
        kinds = ["ours", "sahi"] if installed and side <= SAHI_MOST else ["ours"]
        turns = [
            {kind: _child(kind, path, side, OVERLAP, BATCH) for kind in kinds}
            for _ in range(REPEATS_LARGE if side >= LARGE else REPEATS)
        ]
        told = {kind: middle([turn[kind] for turn in turns]) for kind in kinds}
        if installed and side <= TURNS_SIDE:
            many = _child("turns", path, side, OVERLAP, BATCH)
            told |= {f"{kind}, in one process": middle(many[kind]) for kind in kinds}
        for kind, run in told.items():
            runs.append({"kind": kind, **run})
            print(row(kind, runs[-1]), flush=True)
    if not installed:
        print("\nsahi is not compared: it is not installed (--sahi DIR names a folder that has it).")
    return runs


def overlaps(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    path = folder / "swept.tif"
    write_scene(path, SWEPT)
    print("| overlap | tiles | CPU s | objects of 32 pixels whole in a tile |\n| --- | --- | --- | --- |")
    runs = []
    for overlap in OVERLAPS:
        runs.append({"overlap": overlap, "whole": whole_share(overlap), **child("ours", path, SWEPT, overlap)})
        print(f"| {overlap} | {runs[-1]['tiles']} | {runs[-1]['cpu_s']:.2f} | {runs[-1]['whole']:.1%} |", flush=True)
    return runs


def batches(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    path = folder / "swept.tif"
    kind = "model" if options.model else "ours"
    side = 2048 if options.model else SWEPT
    print(f"| batch | tiles | wall s{'' if options.model else ' | CPU s | peak MiB'} |")
    print("| --- | --- | --- |" if options.model else "| --- | --- | --- | --- | --- |")
    runs = []
    for batch in BATCHES:
        one = child(kind, path, side, batch=batch)
        runs.append({"batch": batch, **one})
        rest = "" if options.model else f" | {one['cpu_s']:.2f} | {one['peak_mib']:.0f}"
        print(f"| {batch} | {one['tiles']} | {one['wall_s']:.2f}{rest} |", flush=True)
    return runs


def masks(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    runs = []
    print("| what | side | tiles | CPU s | CPU ms/MPix | peak MiB | marked | mask / vectors / preview kB |")
    print(f"{'| --- ' * 8}|")
    for side in options.masks:
        path = folder / f"mask-{side}.tif"
        for one in (path, path.with_name(f"later-{path.name}")):
            write_scene(one, side)
            with rasterio.open(one, "r+") as file:
                file.crs, file.transform = "EPSG:32633", Affine(10, 0, 300_000, 0, -10, 5_000_000)
        for kind in (*CLASSES, "detect_change"):
            run = {"kind": kind, **child(kind, path, side)}
            runs.append(run)
            sizes_kb = " / ".join(f"{run['bytes'][one] / 1000:,.0f}" for one in ("mask", "vectors", "preview"))
            print(
                f"| {kind} | {side:,} | {run['tiles']} | {run['cpu_s']:.1f} | {run['cpu_s'] / side**2 * 1e9:.0f} "
                f"| {run['peak_mib']:.0f} | {run['share']:.0%} | {sizes_kb} |",
                flush=True,
            )
    return runs


if __name__ == "__main__":
    main()
