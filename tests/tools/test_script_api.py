"""`rs_tools.open` as a script uses it, over HTTP, sync and async."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import BLUE, RED, painted
from planted_server import planted_server
from rasters import BUNDLED, UTM, noise, write

import rs_tools
from rs_tools.errors import AccessError, InputError

ROAD = BUNDLED / "yellowstone_road.jpg"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with planted_server() as url:
        yield url


def test_a_script_asks_without_an_event_loop(server: str) -> None:
    scene = rs_tools.open(ROAD, server=server)
    assert scene.inspect().width == 900
    assert scene.caption().caption == "A river."
    assert scene.vqa("Is there a road?", region=[0, 0, 300, 300]).answer == "yes"
    assert scene.classify(["road", "sea"]).label == "sea"


async def test_async_callers_share_the_same_client_as_sync_ones(server: str) -> None:
    scene = rs_tools.open(ROAD, server=server)
    inspected, caption, vqa, classes = await asyncio.gather(
        scene.ainspect(), scene.acaption(), scene.avqa("Is there a road?"), scene.aclassify(["road", "sea"])
    )
    assert (inspected.width, caption.caption, vqa.answer, classes.label) == (900, "A river.", "yes", "sea")
    assert (await asyncio.to_thread(scene.caption)).caption == "A river."


def test_errors_arrive_as_they_were_raised(tmp_path: Path, server: str) -> None:
    with pytest.raises(InputError, match="empty"):
        rs_tools.open(ROAD, server=server).vqa(" ")
    with pytest.raises(AccessError, match="no image file"):
        rs_tools.open(tmp_path / "absent.tif", server=server).caption()
    with pytest.raises(AccessError):
        rs_tools.open(tmp_path / "no folder" / "absent.tif", server=server)


def test_bands_are_chosen_once_for_all_questions(tmp_path: Path, server: str) -> None:
    scene = rs_tools.open(write(tmp_path / "a.tif", noise(4, 9, 9)), bands=[4, 3, 2], server=server)
    assert scene.caption().provenance.bands == [4, 3, 2]
    assert scene.inspect().provenance.bands == [4, 3, 2]


async def test_a_script_gets_boxes_masks_and_change_sync_and_async(tmp_path: Path, server: str) -> None:
    place: dict[str, Any] = {"photometric": "RGB", "crs": "EPSG:32633", "transform": UTM}
    (tmp_path / "later").mkdir()
    early = write(tmp_path / "early.tif", painted(80, 90, ((10, 10, 20, 15), RED)), **place)
    late = write(tmp_path / "later" / "late.tif", painted(80, 90, ((40, 40, 60, 60), BLUE)), **place)
    scene = rs_tools.open(early, server=server, artifacts=tmp_path / "files")
    ships, water = await asyncio.to_thread(scene.ground, "ship"), await asyncio.to_thread(scene.segment, ["water"])
    assert [one.bbox_px for one in ships.objects] == [[10, 10, 20, 15]]
    assert water.classes[0].pixels == 0
    assert (await scene.aground("ship")).objects == ships.objects
    change = await scene.adetect_change(late)
    assert [one.bbox_px for one in change.regions] == [[40, 40, 60, 60], [10, 10, 20, 15]]
    assert (await asyncio.to_thread(scene.detect_change, late)).changed
    assert (await scene.asegment(["water"])).classes == water.classes
    assert {path.parent for path in map(Path, (one.path for one in change.artifacts))} == {tmp_path / "files"}


def test_the_tools_never_import_torch() -> None:
    program = "import sys, rs_tools, rs_tools.tools, rs_tools.client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
