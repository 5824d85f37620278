"""`rs_tools.open` as a script uses it, over HTTP, sync and async."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
from affine import Affine
from planted import BLUE, RED, painted
from planted_server import planted_server
from rasters import BUNDLED, UTM, noise, write

import rs_tools
from rs_tools.errors import AccessError, ArtifactError, InputError, RegionError

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
    with pytest.raises(AccessError, match="download it"):
        rs_tools.open("https://example.org/a.tif", server=server)
    with pytest.raises(AccessError, match="download it"):
        rs_tools.open(ROAD, server=server).detect_change("https://example.org/a.tif")


def test_bands_are_chosen_once_for_all_questions(tmp_path: Path, server: str) -> None:
    scene = rs_tools.open(write(tmp_path / "a.tif", noise(4, 9, 9)), bands=[4, 3, 2], server=server)
    assert scene.caption().provenance.bands == [4, 3, 2]
    assert scene.inspect().provenance.bands == [4, 3, 2]


def test_a_place_found_in_one_image_is_asked_about_in_another_of_other_pixels(tmp_path: Path, server: str) -> None:
    place: dict[str, Any] = {"photometric": "RGB", "crs": "EPSG:32633"}
    early = write(tmp_path / "early.tif", painted(80, 90, ((10, 10, 20, 15), RED)), **place, transform=UTM)
    finer = UTM @ Affine.translation(-5, -8) @ Affine.scale(0.5)
    late = write(tmp_path / "late.tif", painted(200, 200, ((30, 36, 50, 46), BLUE)), **place, transform=finer)
    (found,) = rs_tools.open(early, server=server).ground("ship").objects
    assert found.polygon_lonlat is not None
    lon, lat = zip(*found.polygon_lonlat, strict=True)
    later = rs_tools.open(late, server=server)
    region = later.region_of([min(lon), min(lat), max(lon), max(lat)])
    np.testing.assert_allclose(region, [30, 36, 50, 46], atol=0.5)
    assert later.inspect().georeferenced
    with pytest.raises(RegionError, match="no known place"):
        rs_tools.open(ROAD, server=server).region_of([0, 0, 1, 1])


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


@pytest.fixture
def bay(tmp_path: Path) -> Path:
    """A ship and water, at a place on Earth."""
    image = painted(80, 90, ((10, 10, 20, 15), RED), ((40, 40, 60, 60), BLUE))
    return write(tmp_path / "bay.tif", image, photometric="RGB", crs="EPSG:32633", transform=UTM)


FORKING = """
import os, sys
import rs_tools
path, server = sys.argv[1:]
scene = rs_tools.open(path, server=server)
assert scene.caption().caption == "A river."
child = os.fork()
if child == 0:
    words = [scene.caption().caption, rs_tools.open(path, server=server).caption().caption]
    os._exit(0 if words == ["A river."] * 2 else 1)
assert os.waitpid(child, 0)[1] == 0
assert scene.caption().caption == "A river."
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
def test_a_process_that_a_script_forks_asks_on_as_a_pool_of_workers_does(server: str) -> None:
    subprocess.run([sys.executable, "-c", FORKING, str(ROAD), server], check=True, timeout=300)


def test_answers_become_dictionaries_geojson_and_geodataframes(bay: Path, server: str) -> None:
    scene = rs_tools.open(bay, server=server, artifacts=bay.parent / "files")
    ships = scene.ground("ship")
    assert json.loads(json.dumps(rs_tools.to_dict(ships)))["objects"][0]["bbox_px"] == [10, 10, 20, 15]
    [feature] = rs_tools.to_geojson(ships)["features"]
    assert feature["geometry"]["type"] == "Polygon"
    assert feature["properties"]["label"] == "ship"
    table = rs_tools.to_geodataframe(ships)
    assert table.crs == "EPSG:4326"
    # 10 x 5 pixels of 10 m, measured where they lie
    assert table.to_crs("EPSG:32633").area.iloc[0] == pytest.approx(5_000, rel=1e-3)
    assert set(rs_tools.to_geodataframe(scene.segment(["water"]))["label"]) == {"water"}
    same = rs_tools.to_geodataframe(scene.detect_change(bay))
    assert len(same) == 0
    assert same.area_m2.sum() == 0  # what a script asks of a frame with rows it may ask of one without


def test_a_frame_has_the_columns_of_its_answer_and_its_warnings_with_rows_or_without(bay: Path, server: str) -> None:
    scene = rs_tools.open(bay, server=server, artifacts=bay.parent / "files")
    for some, none in (
        (scene.ground("ship"), scene.ground("ship", min_score=1.0)),
        (scene.segment(["water"]), scene.detect_change(bay)),
    ):
        full, empty = rs_tools.to_geodataframe(some), rs_tools.to_geodataframe(none)
        assert len(full) > len(empty) == 0
        assert list(empty.columns) == list(full[empty.columns].columns)
        assert set(full.columns) == set(empty.columns)
        assert empty.attrs["warnings"] == none.warnings
        assert full.attrs["provenance"]["weights_digest"] == some.provenance.weights_digest


def test_a_frame_becomes_geoparquet_with_its_provenance(bay: Path, server: str) -> None:
    ships = rs_tools.open(bay, server=server, artifacts=bay.parent / "files").ground("ship")
    table = rs_tools.to_geodataframe(ships)
    table.to_parquet(bay.parent / "ships.parquet")
    back = geopandas.read_parquet(bay.parent / "ships.parquet")
    assert back.crs == "EPSG:4326"
    assert back.geometry.geom_equals_exact(table.geometry, 1e-9).all()
    assert list(back["label"]) == ["ship"]
    assert back.attrs["provenance"]["image_digest"] == ships.provenance.image_digest


def test_every_object_is_in_the_geojson_also_those_that_the_answer_does_not_list(tmp_path: Path, server: str) -> None:
    two = painted(80, 90, ((10, 10, 20, 15), RED), ((40, 40, 60, 60), RED))
    fleet = write(tmp_path / "two.tif", two, photometric="RGB", crs="EPSG:32633", transform=UTM)
    ships = rs_tools.open(fleet, server=server, artifacts=tmp_path / "files").ground("ship", max_objects=1)
    assert len(ships.objects) == 1
    assert len(rs_tools.to_geojson(ships)["features"]) == 2


def test_an_image_without_a_place_gives_pixels_without_a_crs(tmp_path: Path, server: str) -> None:
    image = write(tmp_path / "a.tif", painted(80, 90, ((10, 10, 20, 15), RED)), photometric="RGB")
    ships = rs_tools.open(image, server=server, artifacts=tmp_path / "files").ground("ship")
    assert "pixels" in rs_tools.to_geojson(ships)["coordinate_space"]
    table = rs_tools.to_geodataframe(ships)
    assert table.crs is None
    assert table.total_bounds.tolist() == [10, 10, 20, 15]


def test_without_geopandas_the_error_says_how_to_get_it(
    bay: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ships = rs_tools.open(bay, server=server, artifacts=bay.parent / "files").ground("ship")
    monkeypatch.setitem(sys.modules, "geopandas", None)  # as Python marks a module that cannot be imported
    with pytest.raises(ModuleNotFoundError, match=r"rs-perception\[geo\]"):
        rs_tools.to_geodataframe(ships)


def test_vectors_that_are_gone_are_asked_for_again(bay: Path, server: str) -> None:
    ships = rs_tools.open(bay, server=server, artifacts=bay.parent / "files").ground("ship")
    Path(ships.artifacts[0].path).unlink()
    with pytest.raises(ArtifactError, match="ask again"):
        rs_tools.to_geojson(ships)


def test_each_verb_has_an_async_twin_of_the_same_parameters_and_words() -> None:
    for verb in ("inspect", "caption", "vqa", "classify", "ground", "segment", "detect_change"):
        sync, twin = getattr(rs_tools.Image, verb), getattr(rs_tools.Image, f"a{verb}")
        assert inspect.signature(sync) == inspect.signature(twin)
        assert sync.__doc__ == twin.__doc__
        assert sync.__name__ == verb


def test_importing_the_scripts_module_loads_neither_rasters_nor_the_client() -> None:
    program = "import sys, rs_tools; assert not {'rasterio', 'httpx', 'numpy', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_tools_never_import_torch() -> None:
    program = "import sys, rs_tools, rs_tools.tools, rs_tools.client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
