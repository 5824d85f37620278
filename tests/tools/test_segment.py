"""`segment` on real rasters with planted ground: exact to the pixel across tiles, measured on Earth, flat in memory."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
from planted import BLUE, BROWN, COLORS, NOT_KNOWN, PLACED, PlantedModel, over, painted
from pyproj import Geod
from rasterio import Affine
from rasterio.features import rasterize
from rasterio.warp import transform_geom
from rasters import REPOSITORY, UTM, features, size, write

from model_server.protocol import PerceiveRequest, PerceiveResponse
from rs_tools.errors import DeadlinePassed, InputError, ServerBusy, ServerError
from rs_tools.results import SegmentResult
from rs_tools.summary import headline
from rs_tools.tools import Tools

HEIGHT, WIDTH = 1100, 1300
LAKES = [((200, 300, 900, 800), BLUE), ((1290, 0, 1300, 1100), BLUE), ((500, 500, 560, 540), BROWN)]


@pytest.fixture
def tools(tmp_path: Path, model: PlantedModel) -> Tools:
    """Tools over `lake.tif`: a lake over many tiles with an island of soil, a canal at the rim; 10 m pixels."""
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "lake.tif", painted(HEIGHT, WIDTH, *LAKES), **PLACED)
    return over(tmp_path, model)


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for (x1, y1, x2, y2), color in LAKES:
        mask[y1:y2, x1:x2] = 1 if color == BLUE else 2
    return mask


def values(result: SegmentResult) -> np.ndarray:
    with rasterio.open(result.artifacts[0].path) as file:
        return file.read(1)


async def test_a_mask_over_many_tiles_is_exact_to_the_pixel_and_so_are_its_figures(
    tools: Tools, model: PlantedModel
) -> None:
    found = await tools.segment("lake.tif", ["water", " soil ", "water"])
    np.testing.assert_array_equal(values(found), truth())
    assert len(model.tiles) > 4
    assert [(one.label, one.value) for one in found.classes] == [("water", 1), ("soil", 2)]
    for one in found.classes:
        assert one.pixels == (truth() == one.value).sum()
        assert one.share == pytest.approx(one.pixels / truth().size)
    assert model.requests[0].labels == ["water", "soil"]
    assert [one.kind for one in found.artifacts] == ["mask", "vectors"]
    assert found.artifacts[0].mime_type == "application/x-geotiff"


@pytest.mark.parametrize("ponds", [0, 1, 3])
async def test_areas_too_small_for_an_outline_are_told_of(tools: Tools, tmp_path: Path, ponds: int) -> None:
    spots = [((20 + 30 * i, 60, 21 + 30 * i, 62), BLUE) for i in range(ponds)]
    write(tmp_path / "images" / "ponds.tif", painted(100, 200, ((100, 10, 150, 50), BLUE), *spots), **PLACED)
    found = await tools.segment("ponds.tif", ["water"])
    outlined = sum(one["properties"]["pixels"] for one in features(found.artifacts[1]))
    assert (found.classes[0].pixels, outlined) == (2000 + 2 * ponds, 2000)
    told = [warning for warning in found.warnings if "fewer than 4 pixels" in warning]
    assert [warning.split(" of ")[0] for warning in told] == {0: [], 1: ["1 area"], 3: ["3 areas"]}[ponds]


async def test_areas_are_geodesic_and_outlines_cover_what_the_mask_covers(tools: Tools) -> None:
    found = await tools.segment("lake.tif", ["water", "soil"])
    mask, vectors = found.artifacts
    outlines = features(vectors)
    assert sorted((one["properties"]["label"], one["properties"]["pixels"]) for one in outlines) == [
        ("soil", 2400), ("water", 11_000), ("water", 347_600)
    ]  # fmt: skip
    assert {one["properties"]["score"] for one in outlines} == {round(230 / 255, 4)}
    with rasterio.open(mask.path) as file:
        assert (file.crs.to_epsg(), file.transform, file.nodata) == (32633, UTM, 255)
        for feature in outlines:
            back = transform_geom("EPSG:4326", file.crs, feature["geometry"])
            drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
            rasterize([back], out=drawn, transform=file.transform)
            assert np.array_equal(drawn == 1, (truth() == feature["properties"]["value"]) & (drawn == 1))
            assert drawn.sum() == feature["properties"]["pixels"]
    soil = next(one for one in outlines if one["properties"]["label"] == "soil")
    lon, lat = np.array(soil["geometry"]["coordinates"][0]).T
    area = abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0])
    assert soil["properties"]["area_m2"] == pytest.approx(area, rel=1e-4)
    assert found.classes[1].area_m2 == pytest.approx(area, rel=1e-3)
    assert area == pytest.approx(2400 * 100, rel=0.01)


async def test_a_regions_mask_lies_where_the_region_lies(tools: Tools) -> None:
    found = await tools.segment("lake.tif", ["water"], [150, 250, 450, 400])
    np.testing.assert_array_equal(values(found), truth()[250:400, 150:450])
    with rasterio.open(found.artifacts[0].path) as file:
        assert file.transform * (0, 0) == UTM * (150, 250)
    [feature] = features(found.artifacts[1])
    assert feature["properties"]["pixels"] == 250 * 100


async def test_missing_pixels_are_nodata_in_the_mask_and_count_in_no_share(tmp_path: Path, model: PlantedModel) -> None:
    (tmp_path / "images").mkdir()
    image = painted(900, 1000, ((0, 0, 1000, 450), BLUE))
    image[:, :, 300:] = 0  # so that whole tiles hold nothing
    write(tmp_path / "images" / "a.tif", image, nodata=0, **PLACED)
    found = await over(tmp_path, model).segment("a.tif", ["water"])
    mask = values(found)
    assert (mask[:, 300:] == 255).all()
    assert (mask[:450, :300] == 1).all()
    assert (mask[450:, :300] == 0).all()
    assert found.classes[0].share == pytest.approx(0.5)
    assert any("of the region holds data" in warning for warning in found.warnings)


async def test_of_two_classes_the_one_further_above_its_threshold_wins(
    tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COLORS, "lake", BLUE)
    both = over(tmp_path, PlantedModel(thresholds={"water": 0.8, "lake": 0.3}))
    found = await both.segment("lake.tif", ["water", "lake"], [300, 300, 400, 400])
    assert [one.pixels for one in found.classes] == [0, 10_000]
    neither = over(tmp_path, PlantedModel(thresholds={"water": 0.95}))
    assert (await neither.segment("lake.tif", ["water"], [300, 300, 400, 400])).classes[0].pixels == 0


async def test_nothing_found_and_classes_not_known_are_said(tools: Tools) -> None:
    none = await tools.segment("lake.tif", ["water", "soil"], [0, 0, 100, 100])
    assert headline(none) == "None of the classes was found."
    assert "No pixel reaches the threshold of 'water' or 'soil'." in none.warnings
    assert features(none.artifacts[1]) == []
    unknown = await tools.segment("lake.tif", ["water", NOT_KNOWN])
    assert any(f"does not know '{NOT_KNOWN}'" in warning for warning in unknown.warnings)


async def test_a_region_without_data_has_no_mask_and_nobody_is_asked(tmp_path: Path, model: PlantedModel) -> None:
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "a.tif", np.zeros((3, 50, 50), np.uint8), nodata=0, **PLACED)
    found = await over(tmp_path, model).segment("a.tif", ["water"])
    assert (found.classes[0].pixels, found.artifacts, model.requests) == (0, [], [])
    assert any("no data" in warning for warning in found.warnings)
    await emptied(tmp_path / "artifacts")


async def test_without_a_place_there_are_pixels_and_no_areas(tmp_path: Path, model: PlantedModel) -> None:
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "a.png", painted(90, 120, ((10, 20, 30, 40), BLUE)), driver="PNG")
    found = await over(tmp_path, model).segment("a.png", ["water"], preview=True)
    assert (found.classes[0].pixels, found.classes[0].area_m2, found.georeferenced) == (400, None, False)
    assert [one.mime_type for one in found.artifacts] == ["application/x-geotiff", "application/json", "image/png"]
    assert size(found.artifacts[2]) <= 100_000
    with rasterio.open(found.artifacts[0].path) as file:
        assert file.crs is None


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "1 to 16"),
        ([f"class {i}" for i in range(17)], "1 to 16"),
        (["water", " "], "1 to 80 characters"),
        (["x" * 81], "1 to 80 characters"),
        ("water", "'water'; give a list"),
        (["wat\ud800er"], "lone surrogate"),
    ],
)
async def test_classes_that_cannot_be_asked_for_are_refused_with_the_limit(
    tools: Tools, model: PlantedModel, classes: Sequence[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        await tools.segment("lake.tif", classes)
    assert model.requests == []


async def test_how_much_ground_is_measured_on_a_mask_with_it_as_evidence(tools: Tools) -> None:
    answer = await tools.vqa("lake.tif", "What is the area covered by water?")
    mask = await tools.segment("lake.tif", ["water"])
    assert (answer.answer, answer.kind) == (f"{mask.classes[0].area_m2:.0f}m2", "area")
    assert answer.confidence == pytest.approx(230 / 255, abs=1e-3)
    assert [one.kind for one in answer.artifacts] == ["mask", "vectors"]
    assert answer.evidence[0].artifact == answer.artifacts[0].uri


@pytest.mark.parametrize(
    "question",
    [
        "What area is water, in hectares?",
        "What is the area of water in square kilometres?",
        "How many hectares of water are there?",
        "How many acres does water cover?",
        "How many km2 are covered by water in this image?",
        "How much land is covered by water in ha?",
    ],
)
async def test_an_area_is_measured_whatever_its_unit_and_given_in_square_metres(tools: Tools, question: str) -> None:
    answer = await tools.vqa("lake.tif", question, [0, 0, 300, 400])
    assert answer.kind == "area"
    assert float(answer.answer.removesuffix("m2")) == pytest.approx(100 * 100 * 100, rel=0.002)


async def test_an_area_that_reaches_off_the_map_is_unknown_and_not_zero(tmp_path: Path, model: PlantedModel) -> None:
    (tmp_path / "images").mkdir()
    disk = {"crs": "+proj=ortho +lat_0=40 +lon_0=10", "transform": Affine(50_000, 0, -7.5e6, 0, -50_000, 5e6)}
    write(tmp_path / "images" / "disk.tif", painted(200, 300, ((0, 0, 200, 200), BLUE)), photometric="RGB", **disk)
    answer = await over(tmp_path, model).vqa("disk.tif", "What is the area covered by water?")
    assert (answer.abstained, answer.answer) == (True, "unknown: a part of it has no place on Earth")


async def test_single_pixels_of_a_cover_are_as_sure_as_they_look(tmp_path: Path, model: PlantedModel) -> None:
    """Too few for an outline, as in a very small image."""
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "pond.tif", painted(5, 5, ((1, 1, 3, 2), BLUE)), **PLACED)
    answer = await over(tmp_path, model).vqa("pond.tif", "What is the area covered by water?")
    assert (answer.answer, answer.abstained) == ("200m2", False)
    assert answer.confidence == pytest.approx(230 / 255, abs=1e-3)


async def test_control_characters_in_a_class_are_spaces_and_its_files_can_be_opened(tools: Tools) -> None:
    found = await tools.segment("lake.tif", ["wa\x01ter", "water\x00"], [0, 0, 40, 40])
    assert [one.label for one in found.classes] == ["wa ter", "water"]
    names = ElementTree.parse(f"{found.artifacts[0].path}.aux.xml").iter("Category")
    assert [one.text for one in names] == ["none", "wa ter", "water"]


async def test_areas_beyond_what_a_file_of_outlines_holds_and_areas_in_parts_are_told(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rs_tools.painting.MAX_POINTS", 12)
    found = await tools.segment("lake.tif", ["water", "soil"])
    assert "The vectors file holds the 1 largest areas; the mask holds all." in found.warnings
    assert [one["properties"]["pixels"] for one in features(found.artifacts[1])] == [347_600]
    monkeypatch.undo()
    monkeypatch.setattr("rs_tools.geometry.vectors._MOST_POINTS", 8)
    monkeypatch.setattr("rs_tools.geometry.vectors._STRIP_ROWS", 100)
    found = await tools.segment("lake.tif", ["water", "soil"])
    assert any("is told as two, one above the other" in warning for warning in found.warnings)
    lake = [one["properties"]["pixels"] for one in features(found.artifacts[1])]
    assert len(lake) > 3
    assert sum(lake) == (truth() > 0).sum()
    np.testing.assert_array_equal(values(found), truth())


# --- how it is made


async def test_progress_is_told_in_looks(tools: Tools, model: PlantedModel) -> None:
    told: list[tuple[int, int]] = []

    def hear(done: int, total: int, message: str) -> None:
        told.append((done, total))

    await tools.segment("lake.tif", ["water"], progress=hear)
    tiles = len(model.tiles)
    assert told[0] == (0, tiles)
    assert told[-1] == (tiles, tiles)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


class Stuck(PlantedModel):
    """Answers the first batch and then nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = asyncio.Event()

    async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
        if self.tiles:
            self.waiting.set()
            await asyncio.Event().wait()
        return await super().perceive(request, tiles)


async def test_a_call_beyond_its_time_ends_with_what_was_found_and_leaves_no_file(tmp_path: Path, tools: Tools) -> None:
    await tools.inspect_image("lake.tif")
    with pytest.raises(DeadlinePassed, match=r"The 4 s for one call are over after \d+ of \d+ looks") as late:
        await over(tmp_path, Stuck(), deadline_s=4).segment("lake.tif", ["water"])
    assert "smaller region" in str(late.value)
    await emptied(tmp_path / "artifacts")


async def test_a_cancelled_call_leaves_no_file(tmp_path: Path, tools: Tools) -> None:
    stuck = Stuck()
    call = asyncio.create_task(over(tmp_path, stuck).segment("lake.tif", ["water"]))
    await asyncio.wait_for(stuck.waiting.wait(), 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await emptied(tmp_path / "artifacts")


async def test_a_server_that_gets_busy_on_the_way_is_asked_again(tmp_path: Path, tools: Tools) -> None:
    class Busy(PlantedModel):
        refused = False

        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            if self.tiles and not self.refused:
                self.refused = True
                raise ServerBusy("try later", 0.01)
            return await super().perceive(request, tiles)

    busy = Busy()
    found = await over(tmp_path, busy).segment("lake.tif", ["water", "soil"])
    assert busy.refused
    np.testing.assert_array_equal(values(found), truth())


async def test_maps_of_a_wrong_size_are_an_error_and_leave_no_file(tmp_path: Path, tools: Tools) -> None:
    class Wrong(PlantedModel):
        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            response = await super().perceive(request, tiles)
            for one in response.masks:
                one.probabilities = one.probabilities[:, 1:]
            return response

    with pytest.raises(ServerError, match="do not fit"):
        await over(tmp_path, Wrong()).segment("lake.tif", ["water"])
    await emptied(tmp_path / "artifacts")


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_a_tall_or_wide_scene_is_painted_with_little_memory(tmp_path: Path, wide: bool) -> None:
    """9 million pixels of twelve classes are 430 MB as the numbers that a blend in one piece would hold."""
    (tmp_path / "images").mkdir()
    long, short = 12_000, 750
    width, height = (long, short) if wide else (short, long)
    profile = PLACED | {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": width, "height": height}
    with rasterio.open(tmp_path / "images" / "long.tif", "w", tiled=True, compress="deflate", **profile) as file:
        for start in range(0, long, 1000):
            part = painted(1000, short, ((150, 100, 600, 900), BLUE))
            window = ((start, start + 1000), (0, short))
            file.write(part.transpose(0, 2, 1) if wide else part, window=window[::-1] if wide else window)
    program = """
import asyncio, json, resource, sys
from pathlib import Path
sys.path.insert(0, "tests/tools")
from planted import PlantedModel
from rs_tools.imagery.access import AccessPolicy
from rs_tools.tools import Tools
class Forgetful(PlantedModel):
    async def perceive(self, request, tiles):
        response = await super().perceive(request, tiles)
        self.tiles.clear()
        return response
folder = Path(sys.argv[1])
tools = Tools(AccessPolicy([folder / "images"]), Forgetful(), artifacts=folder / "artifacts")
classes = ["water", "soil", *map(str, range(10))]
asyncio.run(tools.segment("long.tif", classes, [0, 0, 750, 750]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = asyncio.run(tools.segment("long.tif", classes))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([grown // 1024, found.classes[0].pixels]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    grown_mib, pixels = json.loads(done.stdout)
    assert pixels == 12 * 450 * 800
    assert grown_mib < 200


async def emptied(folder: Path) -> None:
    """Wait until the painter's thread has taken away what it had begun."""
    async with asyncio.timeout(60):
        while os.listdir(folder):  # noqa: ASYNC110 - a thread
            await asyncio.sleep(0.01)
