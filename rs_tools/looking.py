"""The looks at a scene or a pair, streamed through the model: read in a thread, asked in batches, pixels dropped.

One batch is read while the model answers the one before, so that no more than two are held however large the scene.
Answers are kept, but for those that a taker works up at once (maps of pixels, which are as large as what they show).
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from rs_tools.errors import ServerBusy
from rs_tools.imagery.alignment import Pair, PairPixels
from rs_tools.imagery.scene import Pixels, Region, Scene
from rs_tools.imagery.tiling import Looks
from rs_tools.memory import give_back
from rs_tools.reduction import Look

# As many as the engine considers for one pass; benchmarks/scene.py prints what other sizes cost.
BATCH = 16
_EMPTY_PER_BATCH = 64  # tiles without data are not asked about, but they take time to read: report them too

Progress = Callable[[int, int, str], Awaitable[None] | None]
"""Told how many looks are done, of how many, and that in words; plain or async. The first call is at 0."""

_A = TypeVar("_A")


@dataclass(frozen=True)
class Taken(Generic[_A]):
    """One look's answer for a taker.

    Attributes:
        index: number of the look.
        answer: None where the look holds no data.
        valid: bool [H, W], the pixels that hold data, of a pair in both.
    """

    index: int
    answer: _A | None
    valid: np.ndarray


@dataclass(frozen=True)
class _Tile:
    """A tile as it was read, or a pair of them.

    `pictures` are what the model is shown, none where the tile holds no data; `mask` says which pixels hold data;
    `color` is the tile's one colour, None: several.
    """

    region: Region
    overview: bool
    pictures: tuple[np.ndarray, ...]
    mask: np.ndarray | None
    valid: float
    color: tuple[int, ...] | None


@dataclass
class Seen(Generic[_A]):
    """What the looks showed, those without data left out.

    Attributes:
        total: looks planned.
        done: looks that were read and answered, or hold no data.
        valid: share of the pixels that hold data, in what was looked at.
        one_color: all these pixels are of one colour.
    """

    total: int
    done: int = 0
    _tiles: list[_Tile] = field(default_factory=list)
    _answers: list[_A | None] = field(default_factory=list)

    def add(self, tiles: Sequence[_Tile], answers: Sequence[_A | None]) -> None:
        """Take in a batch; `answers`: one to each tile, None where it holds no data or where it is not to be kept."""
        self._answers += answers
        self._tiles += [_Tile(tile.region, tile.overview, (), None, tile.valid, tile.color) for tile in tiles]
        self.done += len(tiles)

    @property
    def looks(self) -> list[Look[_A]]:
        weights = [0.0 if tile.overview else tile.valid * _area(tile.region) for tile in self._tiles]
        total = sum(weights)
        return [
            Look(tile.region, answer, 1.0 if tile.overview else weight / total, tile.overview)
            for tile, answer, weight in zip(self._tiles, self._answers, weights, strict=True)
            if answer is not None
        ]

    @property
    def valid(self) -> float:
        tiles = [tile for tile in self._tiles if not tile.overview] or self._tiles
        areas = [_area(tile.region) for tile in tiles]
        return float(np.average([tile.valid for tile in tiles], weights=areas)) if tiles else 0.0

    @property
    def one_color(self) -> bool:
        colors = {tile.color for tile in self._tiles if tile.valid}
        return len(colors) == 1 and None not in colors


class OutOfTime(Exception, Generic[_A]):
    """The time was over before all looks were done; `seen` is what was seen by then."""

    def __init__(self, seen: Seen[_A]) -> None:
        super().__init__(f"{seen.done} of {seen.total} looks")
        self.seen = seen


async def stream(
    scene: Scene | Pair,
    looks: Looks,
    ask: Callable[[list[np.ndarray], Sequence[Region]], Awaitable[Sequence[_A]]],
    *,
    seconds: float,
    progress: Progress | None = None,
    batch: int = BATCH,
    take: Callable[[Sequence[Taken[_A]]], Awaitable[None]] | None = None,
) -> Seen[_A]:
    """Have every look answered. Cancelling stops reading at the next tile, and asks nothing more.

    Args:
        scene: what to look at.
        looks: which windows of it.
        ask: answers a batch of tiles, each uint8 [H, W, 3], in order; of a pair, tiles come as before, after, before,
            ... and every two get one answer. With them come the regions, one to an answer. When the model server gets
            busy later than at the first batch, the batch is asked again until the time is over.
        seconds: the time there is.
        progress: told after each batch.
        batch: tiles (of a pair: pairs of tiles) that are asked about at a time.
        take: given the answers of each batch, in order; they are not kept then.

    Raises:
        OutOfTime: the time was over.
        AccessError, ImageError: as `Scene.reader`; and whatever `ask` raises.
    """
    seen: Seen[_A] = Seen(len(looks.windows))
    stopped = threading.Event()
    batches = _batches(scene, looks, batch, stopped)
    # A thread of its own: GDAL's options and open files belong to the thread that made them.
    thread = ThreadPoolExecutor(1, thread_name_prefix="rs_tools-reader")
    loop = asyncio.get_running_loop()
    ahead = loop.run_in_executor(thread, next, batches, None)
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            await _report(progress, seen)
            while seen.done < seen.total and (tiles := await ahead):
                if seen.done + len(tiles) < seen.total:
                    ahead = loop.run_in_executor(thread, next, batches, None)
                pictures = [picture for tile in tiles for picture in tile.pictures]
                regions = [tile.region for tile in tiles if tile.pictures]
                told = partial(ask, pictures, regions)
                given = iter(await asked(told, patient=seen.done > 0) if pictures else [])
                answers = [next(given) if tile.pictures else None for tile in tiles]
                if take is not None:
                    await take(_taken(tiles, answers, seen.done))
                    answers = [None] * len(tiles)
                seen.add(tiles, answers)
                await _report(progress, seen)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise OutOfTime(seen) from error
    finally:
        stopped.set()
        ahead.cancel()  # what it still brings is of no interest
        thread.submit(batches.close)
        thread.shutdown(wait=False)
    return seen


async def asked(ask: Callable[[], Awaitable[Sequence[_A]]], *, patient: bool) -> Sequence[_A]:
    """What `ask` answers; a patient caller asks again as often as the model server is busy."""
    while True:
        try:
            return await ask()
        except ServerBusy as busy:
            if not patient:
                raise
            await asyncio.sleep(busy.retry_after_s)


async def _report(progress: Progress | None, seen: Seen) -> None:
    if progress is None:
        return
    told = progress(seen.done, seen.total, f"{seen.done} of {seen.total} looks done")
    if inspect.isawaitable(told):
        await told


def _taken(tiles: Sequence[_Tile], answers: Sequence[_A | None], first: int) -> list[Taken[_A]]:
    return [
        Taken(index, answer, tile.mask)
        for index, (tile, answer) in enumerate(zip(tiles, answers, strict=True), first)
        if tile.mask is not None
    ]


def _batches(scene: Scene | Pair, looks: Looks, size: int, stopped: threading.Event) -> Generator[list[_Tile]]:
    """Tiles in order, `size` with data at a time, the last ones when the scene is closed.

    Everything happens in the thread that asks for the next.
    """
    batch: list[_Tile] = []
    windows = looks.windows
    with scene.reader(windows) as read:
        for index, (region, out_size) in enumerate(windows):
            if stopped.is_set():
                return
            overview = index == 0 and looks.overview is not None
            batch.append(_tile(region, overview, read(region, out_size)))
            with_data = sum(bool(tile.pictures) for tile in batch)
            full = with_data == size or len(batch) - with_data == _EMPTY_PER_BATCH
            if full and index + 1 < len(windows):
                give_back()
                yield batch
                batch = []
    yield batch


def _tile(region: Region, overview: bool, read: Pixels | PairPixels) -> _Tile:
    mask = read.valid
    valid = _share(mask)
    if valid == 0:
        return _Tile(region, overview, (), mask, 0.0, None)
    pictures = _colors(read)
    colors = [_one_color(rgb, mask, valid) for rgb in pictures]
    color = colors[0] if all(one is not None for one in colors) else None
    return _Tile(region, overview, tuple(_filled(rgb, mask, valid) for rgb in pictures), mask, valid, color)


def shown(read: Pixels | PairPixels) -> tuple[np.ndarray, ...]:
    """What the model is shown of a window with data: one picture, or of a pair two, uint8 [H, W, 3]."""
    mask = read.valid
    valid = _share(mask)
    return tuple(_filled(rgb, mask, valid) for rgb in _colors(read))


def _colors(read: Pixels | PairPixels) -> tuple[np.ndarray, ...]:
    return (read.rgb,) if isinstance(read, Pixels) else (read.before.rgb, read.after.rgb)


def _one_color(rgb: np.ndarray, mask: np.ndarray, valid: float) -> tuple[int, ...] | None:
    rows = rgb if valid == 1 else rgb[mask][None]
    first = rows[0, 0]
    # Nearly every tile shows a second colour in its first pixels, so the rest need not be compared.
    one = (rows[0, :256] == first).all() and (rows == first).all()
    return tuple(first.tolist()) if one else None


def _filled(rgb: np.ndarray, mask: np.ndarray, valid: float) -> np.ndarray:
    """The tile with the mean colour of its valid pixels in place of the others, which the model cannot know."""
    if valid == 1:
        return rgb
    tile = rgb.copy()
    tile[~mask] = np.rint(rgb[mask].mean(axis=0))
    return tile


def _share(mask: np.ndarray) -> float:
    rows = mask if mask.strides[0] else mask[:1]  # one row in memory stands for all
    return np.count_nonzero(rows) / rows.size  # a tenth of the time of mask.mean()


def _area(region: Region) -> int:
    x1, y1, x2, y2 = region
    return (x2 - x1) * (y2 - y1)
