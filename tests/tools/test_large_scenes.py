"""Scenes beyond one look: streamed in batches, reduced by meaning, stoppable, with flat memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import REPOSITORY, ScriptedClient, noise, opened, scripted_answer, write

from model_server.protocol import PerceiveRequest, PerceiveResponse, TileCaption, TileClasses, TileVqa
from rs_tools.errors import DeadlinePassed, ImageError, ServerBusy, ServerError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.reading import Wanted
from rs_tools.imagery.scene import ReadWindow, Region, Scene
from rs_tools.imagery.tiling import MAX_TILES, look_closely
from rs_tools.looking import BATCH, stream
from rs_tools.tools import Tools

SIDE = 2000
WHOLE = [0, 0, SIDE, SIDE]


class SeeingClient(ScriptedClient):
    """Sees ships (pure red pixels), one for each, and whether a tile is mostly sea (blue) or land."""

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        response = await super().perceive(request, tiles)
        ships = [int((tile == [255, 0, 0]).all(axis=2).sum()) for tile in tiles]
        sea = [bool(tile[:, :, 2].mean() > 100) for tile in tiles]
        response.vqa = [self._said(request.text, *one) for one in zip(ships, sea, strict=True)] if response.vqa else []
        if response.captions:
            sentences = ["Blue water." if wet else "Green fields." for wet in sea]
            response.captions = [TileCaption(caption=sentence, confidence=0.8) for sentence in sentences]
        if response.classes:
            scores = [[0.9, 0.1] if wet else [0.2, 0.8] for wet in sea]
            response.classes = [TileClasses(labels=["sea", "land"], scores=one) for one in scores]
        return response

    def _said(self, question: str, ships: int, sea: bool) -> TileVqa:
        if question.startswith("How many"):
            return TileVqa(answer=str(ships), kind="count", confidence=0.7, abstained=False, alternatives=[])
        if "ship" in question:
            said = "yes" if ships else "no"
            return TileVqa(answer=said, kind="yes_no", confidence=0.9, abstained=False, alternatives=[])
        said = "sea" if sea else "land"
        return TileVqa(answer=said, kind="category", confidence=0.9, abstained=False, alternatives=[])


@pytest.fixture
def client() -> SeeingClient:
    return SeeingClient()


@pytest.fixture
def tools(tmp_path: Path, client: SeeingClient) -> Tools:
    """Tools over `sea.tif`: the left three quarters sea, the rest land, three ships of one pixel."""
    values = np.zeros((3, SIDE, SIDE), "uint8")
    values[2, :, :1500], values[1, :, 1500:] = 200, 180
    values[:, [300, 1000, 1900], [300, 256, 5]] = [[255], [0], [0]]
    write(tmp_path / "sea.tif", values, photometric="RGB", tiled=True, compress="deflate")
    return Tools(AccessPolicy([tmp_path]), client)


# --- what the answers say


async def test_a_thing_of_one_pixel_is_found_and_shown_where_it_is(tools: Tools, client: SeeingClient) -> None:
    answer = await tools.vqa("sea.tif", "Is there a ship?")
    assert (answer.answer, answer.kind, answer.confidence) == ("yes", "yes_no", 0.9)
    assert {part.answer for part in answer.evidence} == {"yes"}
    ships = [(300, 300), (256, 1000), (5, 1900)]
    for x1, y1, x2, y2 in (part.region for part in answer.evidence):
        assert any(x1 <= x < x2 and y1 <= y < y2 for x, y in ships)
    assert all(
        any(part.region[0] <= x < part.region[2] and part.region[1] <= y < part.region[3] for part in answer.evidence)
        for x, y in ships
    )
    grid = answer.provenance.tile_grid
    assert grid is not None
    assert (grid.decimation, grid.overlap, grid.overview) == (1, 32, True)
    assert len(client.tiles) == grid.columns * grid.rows + 1
    assert answer.warnings.count("the model has something to say") == 1


async def test_ships_are_counted_once_each(tools: Tools, client: SeeingClient) -> None:
    answer = await tools.vqa("sea.tif", "How many ships are there?")
    assert (answer.answer, answer.kind) == ("3", "count")
    assert sum(tile.shape[0] * tile.shape[1] for tile in client.tiles) == SIDE * SIDE
    assert any("poorly" in warning for warning in answer.warnings)


async def test_what_kind_of_scene_it_is_follows_the_majority_and_names_the_other(tools: Tools) -> None:
    answer = await tools.vqa("sea.tif", "What kind of scene is this?")
    assert answer.answer == "sea"
    assert [other.answer for other in answer.alternatives] == ["land"]
    assert answer.evidence[0].region == WHOLE


async def test_a_caption_says_the_whole_and_what_a_part_adds_with_the_parts_beside_it(tools: Tools) -> None:
    answer = await tools.caption("sea.tif")
    assert answer.caption.startswith("Blue water. In the ")
    assert answer.caption.endswith("right: green fields.")
    assert {part.caption for part in answer.parts} == {"Blue water.", "Green fields."}
    covered = np.zeros((SIDE, SIDE), int)
    for x1, y1, x2, y2 in (part.region for part in answer.parts):
        covered[y1:y2, x1:x2] += 1
    assert covered.min() == covered.max() == 1


async def test_classes_are_weighed_over_the_whole_and_its_parts(tools: Tools) -> None:
    answer = await tools.classify("sea.tif", ["sea", "land"])
    assert answer.label == "sea"
    assert sum(one.score for one in answer.top) == pytest.approx(1)
    assert 0.6 < answer.score < 0.9
    assert answer.parts[0].region == WHOLE
    assert {part.label for part in answer.parts} == {"sea", "land"}


async def test_parts_without_data_are_not_asked_about(tools: Tools, client: SeeingClient, tmp_path: Path) -> None:
    values = np.zeros((3, SIDE, SIDE), "uint8")
    values[:, :700, :300] = noise(3, 700, 300)
    write(tmp_path / "part.tif", values, photometric="RGB", nodata=0)
    answer = await tools.vqa("part.tif", "How many ships are there?")
    assert 4 <= len(client.tiles) <= 6
    assert any("of the region holds data" in warning for warning in answer.warnings)
    empty = await tools.vqa("part.tif", "How many ships are there?", [800, 0, 2000, 2000])
    assert "no data" in empty.answer
    assert 4 <= len(client.tiles) <= 6


# --- how they are made


async def test_batches_are_bounded_in_order_and_the_next_is_read_while_the_model_answers(tmp_path: Path) -> None:
    values = np.arange(64, dtype="uint8").reshape(1, 8, 8).repeat(250, 1).repeat(250, 2).repeat(3, 0) + 1
    path = write(tmp_path / "grid.tif", values, photometric="RGB")
    looks = look_closely((0, 0, 2000, 2000), None, overview=False, overlap=0)
    scene, reads = watched(opened(path))
    sizes: list[int] = []
    overlapped = asyncio.Event()

    async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> list[int]:
        sizes.append(len(tiles))
        before = len(reads)
        for _ in range(2000):
            if len(reads) > before or before == 64:
                overlapped.set()
                break
            await asyncio.sleep(0.005)
        return [int(tile.max()) for tile in tiles]

    seen = await stream(scene, looks, ask, seconds=60)
    assert sizes == [BATCH] * (64 // BATCH)
    assert [look.answer for look in seen.looks] == list(range(1, 65))
    assert overlapped.is_set()
    assert seen.done == seen.total == 64


async def test_progress_is_told_in_looks_plainly_or_async(tools: Tools) -> None:
    told: list[tuple[int, int, str]] = []

    async def heard(done: int, total: int, message: str) -> None:
        told.append((done, total, message))

    await tools.vqa("sea.tif", "How many ships are there?", progress=heard)
    assert [done for done, _, _ in told] == [0, 16, 32, 48, 64]
    assert {total for _, total, _ in told} == {64}
    assert told[2][2] == "32 of 64 looks done"
    plain: list[int] = []
    await tools.caption("sea.tif", [0, 0, 9, 9], progress=lambda done, total, message: plain.append(done))
    assert plain == [0, 1]


async def test_a_cancelled_call_reads_and_asks_no_more(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(3, SIDE, SIDE), photometric="RGB", tiled=True)
    scene, reads = watched(opened(path))
    looks = look_closely((0, 0, SIDE, SIDE), None, overview=False, overlap=0)
    second, asked = asyncio.Event(), 0

    async def ask(tiles: list[np.ndarray], regions: Sequence[Region]) -> list[int]:
        nonlocal asked
        asked += 1
        if asked == 2:
            second.set()
            await asyncio.Event().wait()
        return [0] * len(tiles)

    call = asyncio.create_task(stream(scene, looks, ask, seconds=60))
    await asyncio.wait_for(second.wait(), 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await ended("rs_tools-reader")
    assert asked == 2
    assert len(reads) <= 3 * BATCH  # the two batches asked about, and the one read ahead
    count = len(reads)
    await asyncio.sleep(0.05)
    assert len(reads) == count


async def test_a_call_beyond_its_time_ends_with_what_was_found(tmp_path: Path, client: SeeingClient) -> None:
    class Slow(SeeingClient):
        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            if len(self.tiles) >= 2 * BATCH:
                await asyncio.Event().wait()
            return await super().perceive(request, tiles)

    values = np.zeros((3, SIDE, SIDE), "uint8") + 9
    values[:, 300, 300] = [255, 0, 0]
    write(tmp_path / "a.tif", values, photometric="RGB")
    await Tools(AccessPolicy([tmp_path]), client).inspect_image("a.tif")
    slow = Slow()
    tools = Tools(AccessPolicy([tmp_path]), slow, deadline_s=5)
    with pytest.raises(DeadlinePassed, match=r"The 5 s for one call are over") as late:
        await tools.vqa("a.tif", "How many ships are there?")
    await ended("rs_tools-reader")
    assert f"after {len(slow.tiles)} of 64 looks" in str(late.value)
    if slow.tiles:  # a very slow machine may not come this far
        assert "So far: 1 (confidence 0.70)" in str(late.value)
        assert f"begins at row {250 * (len(slow.tiles) // 8)} and ends at row {SIDE}" in str(late.value)


async def test_a_server_that_gets_busy_on_the_way_is_asked_again(tmp_path: Path) -> None:
    class Busy(SeeingClient):
        refused = 0

        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            if self.tiles and self.refused < 2:
                self.refused += 1
                raise ServerBusy("try later", 0.01)
            return await super().perceive(request, tiles)

    write(tmp_path / "a.tif", noise(3, SIDE, SIDE), photometric="RGB")
    busy = Busy()
    answer = await Tools(AccessPolicy([tmp_path]), busy).vqa("a.tif", "How many ships are there?")
    assert (answer.answer, busy.refused) == ("0", 2)


async def test_errors_in_mid_stream_reach_the_caller_and_end_the_reading(tmp_path: Path) -> None:
    class Failing(SeeingClient):
        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            if self.tiles:
                return scripted_answer(request, 0)
            return await super().perceive(request, tiles)

    path = write(tmp_path / "a.tif", noise(3, SIDE, SIDE), photometric="RGB", tiled=True)
    with pytest.raises(ServerError, match="did not answer each"):
        await Tools(AccessPolicy([tmp_path]), Failing()).vqa("a.tif", "How many ships are there?")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError):
        await Tools(AccessPolicy([tmp_path]), SeeingClient()).vqa("a.tif", "How many ships are there?")
    await ended("rs_tools-reader")


def test_a_scene_of_many_tiles_is_looked_at_coarser_and_with_little_memory(tmp_path: Path) -> None:
    """8,000 x 8,000 pixels are 200 MB as they are and 800 MB as the numbers that a read computes with."""
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": 8000, "height": 8000, "photometric": "RGB"}
    with rasterio.open(tmp_path / "large.tif", "w", tiled=True, sparse_ok=True, compress="deflate", **profile) as file:
        file.write(noise(3, 512, 512), window=((0, 512), (0, 512)))  # blocks never written take no room in the file
    program = """
import asyncio, json, resource, sys
from pathlib import Path
sys.path.insert(0, "tests/tools")
from rasters import ScriptedClient
from rs_tools.imagery.access import AccessPolicy
from rs_tools.tools import Tools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
answer = asyncio.run(Tools(AccessPolicy([Path(sys.argv[1])]), ScriptedClient()).vqa("large.tif", "Is there a ship?"))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([grown // 1024, answer.provenance.tile_grid.model_dump(), answer.warnings]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    grown_mib, grid, warnings = json.loads(done.stdout)
    assert grown_mib < 300  # of which 128 are GDAL's cache of blocks
    assert grid["columns"] * grid["rows"] <= MAX_TILES
    assert grid["decimation"] > 1
    assert any("would take 1296 looks" in warning for warning in warnings)


def watched(scene: Scene) -> tuple[Scene, list[Region]]:
    """The scene, and the regions that are read of it from now on."""
    reads: list[Region] = []
    reader: Callable = scene.reader

    @contextmanager
    def counting(windows: Sequence[Wanted] = ()) -> Iterator[ReadWindow]:
        with reader(windows) as read:

            def counted(region: Region, out_size: tuple[int, int]):
                reads.append(region)
                return read(region, out_size)

            yield counted

    object.__setattr__(scene, "reader", counting)
    return scene, reads


async def ended(prefix: str) -> None:
    """Wait until no thread of this name is left: none goes on reading, none is leaked."""
    async with asyncio.timeout(60):
        while any(thread.name.startswith(prefix) for thread in threading.enumerate()):  # noqa: ASYNC110 - a thread
            await asyncio.sleep(0.01)
