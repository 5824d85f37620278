"""`ground` on real rasters with planted things: each once, where it is, on Earth too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from planted import BOX_THRESHOLD, NOT_KNOWN, PLACED, RED, PlantedModel, over, painted
from pyproj import Geod
from rasterio.warp import transform
from rasters import UTM, ScriptedClient, size, write

from model_server.protocol import PerceiveRequest, PerceiveResponse
from rs_tools.artifacts.features import PIXEL_SPACE
from rs_tools.errors import InputError, ServerError
from rs_tools.results import GroundResult
from rs_tools.summary import headline
from rs_tools.tools import MAX_OBJECTS, Tools

# Away from seams, on one, on a corner of four tiles, at the scene's rim, and two that nearly touch.
SHIPS = [(30, 40, 70, 52), (400, 700, 520, 730), (428, 430, 470, 460), (0, 900, 25, 940), (900, 100, 930, 112)]
SHIPS += [(900, 115, 930, 127), (1470, 1170, 1500, 1200)]


@pytest.fixture
def tools(tmp_path: Path, model: PlantedModel) -> Tools:
    """Tools over `sea.tif`, 1500 x 1200 pixels of 10 m, with `SHIPS`."""
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "sea.tif", painted(1200, 1500, *((box, RED) for box in SHIPS)), **PLACED)
    return over(tmp_path, model)


def collection(result: GroundResult) -> dict[str, Any]:
    [vectors] = [one for one in result.artifacts if one.kind == "vectors"]
    return json.loads(Path(vectors.path).read_text())


def boxes(result: GroundResult) -> list[tuple[float, ...]]:
    return sorted(tuple(one.bbox_px) for one in result.objects)


async def test_the_scale_bar_of_a_picture_goes_by_the_width_of_pixels(
    tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 60 degrees north a pixel of equal degrees is half as wide as high."""
    drawn: list[float] = []
    monkeypatch.setattr("rs_tools.preview._scale_bar", lambda width, metres: drawn.append(metres))
    north = {**PLACED, "crs": "EPSG:4326", "transform": Affine(0.001, 0, 10, 0, -0.001, 60.05)}
    write(tmp_path / "images" / "north.tif", painted(100, 200), **north)
    await tools.ground("north.tif", "ship", preview=True)
    enlarged = 256 / 200
    assert drawn[0] == pytest.approx(Geod(ellps="WGS84").inv(10, 60, 10.001, 60)[2] / enlarged, rel=1e-3)


@pytest.mark.parametrize(
    ("phrase", "ship"), [("the largest ship", SHIPS[1]), ("the ship in the lower left", SHIPS[3])]
)
async def test_one_thing_among_its_like_is_singled_out_in_the_scene_not_in_each_tile(
    tools: Tools, phrase: str, ship: tuple[int, ...]
) -> None:
    found = await tools.ground("sea.tif", phrase)
    assert boxes(found) == [ship]
    assert (found.count, found.objects[0].label) == (1, phrase)


async def test_each_thing_is_found_once_also_across_seams_and_at_the_rim(tools: Tools, model: PlantedModel) -> None:
    found = await tools.ground("sea.tif", " ship ")
    assert boxes(found) == sorted(SHIPS)
    assert found.count == len(SHIPS)
    assert {(one.label, one.score) for one in found.objects} == {("ship", 0.9)}
    assert len(model.tiles) > 4
    request = model.requests[0]
    assert (request.task, request.text, request.modality) == ("ground", "ship", "optical")
    assert request.gsd_m == pytest.approx(10, rel=1e-3)
    assert found.provenance.task_token == "[VG]"
    assert found.provenance.tile_grid is not None
    assert found.provenance.tile_grid.overlap == 64


@pytest.mark.parametrize(
    "grid",
    [UTM, UTM * Affine.rotation(30), Affine(10, 0, 400_000, 0, 10, 5_000_000)],
    ids=["north up", "rotated", "bottom up"],
)
async def test_polygons_are_the_boxes_on_earth_whatever_the_grid(
    tmp_path: Path, model: PlantedModel, grid: Affine
) -> None:
    (tmp_path / "images").mkdir()
    image = painted(300, 400, ((100, 50, 160, 90), RED))
    place: dict[str, Any] = PLACED | {"transform": grid}
    write(tmp_path / "images" / "a.tif", image, **place)
    found = await over(tmp_path, model).ground("a.tif", "ship")
    corners = [grid * corner for corner in ((100, 50), (160, 50), (160, 90), (100, 90))]
    lon, lat, *_ = transform("EPSG:32633", "EPSG:4326", *zip(*corners, strict=True))  # GDAL's, not this project's
    [one] = found.objects
    assert one.polygon_lonlat is not None
    assert one.polygon_lonlat[0] == one.polygon_lonlat[-1]
    for corner in zip(lon, lat, strict=True):
        assert np.abs(np.array(one.polygon_lonlat) - corner).max(axis=1).min() < 2e-6
    [feature] = collection(found)["features"]
    assert feature["geometry"]["type"] == "Polygon"
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert ring.min(axis=0) == pytest.approx((min(lon), min(lat)), abs=2e-6)
    assert feature["properties"] == {"label": "ship", "score": 0.9, "bbox_px": [100, 50, 160, 90]}


async def test_pixels_finer_than_the_model_knows_are_sent_coarser_and_come_back_in_image_pixels(
    tmp_path: Path, model: PlantedModel
) -> None:
    (tmp_path / "images").mkdir()
    image = painted(400, 600, ((100, 40, 140, 80), RED))
    fine: dict[str, Any] = PLACED | {"transform": Affine(0.05, 0, 400_000, 0, -0.05, 5_000_000)}
    write(tmp_path / "images" / "a.tif", image, **fine)
    found = await over(tmp_path, model).ground("a.tif", "ship")
    assert model.tiles[0].shape == (200, 300, 3)
    assert model.requests[0].gsd_m == pytest.approx(0.1, rel=1e-3)
    assert boxes(found) == [(100, 40, 140, 80)]


async def test_a_region_is_searched_alone_and_answered_in_pixels_of_the_image(tools: Tools) -> None:
    found = await tools.ground("sea.tif", "ship", [380, 650, 560, 800])
    assert boxes(found) == [(400, 700, 520, 730)]


async def test_nothing_found_is_said_in_words_and_is_a_file_without_features(tools: Tools) -> None:
    found = await tools.ground("sea.tif", "ship", [100, 100, 300, 300])
    assert (found.objects, found.count) == ([], 0)
    assert headline(found) == "Nothing was found."
    assert f"No 'ship' was found with a score of {BOX_THRESHOLD:.2f} or more." in found.warnings
    assert collection(found)["features"] == []


async def test_a_phrase_that_the_model_does_not_know_warns(tools: Tools) -> None:
    found = await tools.ground("sea.tif", NOT_KNOWN)
    assert any(f"does not know '{NOT_KNOWN}'" in warning for warning in found.warnings)


async def test_the_models_threshold_holds_unless_a_score_is_given(tmp_path: Path, tools: Tools) -> None:
    unsure = over(tmp_path, PlantedModel(score=0.3))
    none = await unsure.ground("sea.tif", "ship")
    assert none.count == 0
    assert any("best candidate has 0.30" in warning for warning in none.warnings)
    assert boxes(await unsure.ground("sea.tif", "ship", min_score=0.2)) == sorted(SHIPS)
    assert (await tools.ground("sea.tif", "ship", min_score=0.95)).count == 0


async def test_the_best_are_listed_and_the_file_holds_all(tools: Tools) -> None:
    found = await tools.ground("sea.tif", "ship", max_objects=2)
    assert (len(found.objects), found.count) == (2, len(SHIPS))
    assert len(collection(found)["features"]) == len(SHIPS)
    assert any("the 2 best are listed" in warning for warning in found.warnings)


async def test_without_a_place_boxes_are_in_pixels_and_the_file_says_so(tmp_path: Path, model: PlantedModel) -> None:
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "a.png", painted(90, 120, ((10, 20, 30, 40), RED)), driver="PNG")
    found = await over(tmp_path, model).ground("a.png", "ship")
    assert not found.georeferenced
    assert [one.polygon_lonlat for one in found.objects] == [None]
    assert model.requests[0].gsd_m is None
    assert collection(found)["coordinate_space"] == PIXEL_SPACE
    assert found.artifacts[0].mime_type == "application/json"


async def test_a_region_without_data_holds_no_object_and_nobody_is_asked(tmp_path: Path, model: PlantedModel) -> None:
    (tmp_path / "images").mkdir()
    image = painted(100, 100, ((10, 10, 20, 20), RED))
    image[:, :, 50:] = 0
    write(tmp_path / "images" / "a.tif", image, nodata=0, **PLACED)
    found = await over(tmp_path, model).ground("a.tif", "ship", [50, 0, 100, 100])
    assert (found.count, found.artifacts, model.requests) == (0, [], [])
    assert any("no data" in warning for warning in found.warnings)


async def test_radar_is_told_to_the_model_and_what_it_learned_of_it_to_the_caller(
    tmp_path: Path, model: PlantedModel
) -> None:
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "s.tif", painted(60, 60)[:2], descriptions=["VV", "VH"], photometric="MINISBLACK")
    found = await over(tmp_path, model).ground("s.tif", "ship")
    assert model.requests[0].modality == "sar"
    assert any("has learned ships" in warning for warning in found.warnings)


async def test_a_picture_is_made_when_asked_for(tools: Tools) -> None:
    [_, preview] = (await tools.ground("sea.tif", "ship", preview=True)).artifacts
    assert preview.kind == "preview"
    assert 1000 < size(preview) <= 100_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": " "}, "query is empty"),
        ({"query": "x" * 501}, "at most 500"),
        ({"max_objects": 0}, f"1 to {MAX_OBJECTS}"),
        ({"min_score": 1.5}, "0 .* to 1"),
        ({"min_score": float("nan")}, "0 .* to 1"),
    ],
)
async def test_what_cannot_be_asked_is_refused_with_the_limit(
    tools: Tools, model: PlantedModel, wrong: dict[str, Any], message: str
) -> None:
    asked: dict[str, Any] = {"query": "ship", **wrong}
    with pytest.raises(InputError, match=message):
        await tools.ground("sea.tif", **asked)
    assert model.requests == []


async def test_a_model_without_boxes_says_what_it_can_do(tmp_path: Path, tools: Tools) -> None:
    with pytest.raises(ServerError, match="no part for ground"):
        await over(tmp_path, ScriptedClient()).ground("sea.tif", "ship")


# --- questions that boxes answer


async def test_how_many_is_counted_from_boxes_with_them_as_evidence(tools: Tools) -> None:
    answer = await tools.vqa("sea.tif", "How many ships are there?")
    assert (answer.answer, answer.kind, answer.abstained) == (str(len(SHIPS)), "count", False)
    assert answer.confidence == pytest.approx(0.9)
    assert answer.evidence[0].answer == f"{len(SHIPS)} boxes of 'ships'"
    assert {tuple(one.region) for one in answer.evidence[1:]} == set(SHIPS)
    assert {one.artifact for one in answer.evidence} == {answer.artifacts[0].uri}
    assert any("Counted from the boxes" in warning for warning in answer.warnings)


async def test_none_of_a_thing_is_the_answer_zero(tools: Tools) -> None:
    answer = await tools.vqa("sea.tif", "How many ships are there?", [100, 100, 300, 300])
    assert (answer.answer, answer.kind) == ("0", "count")


async def test_a_server_that_fails_on_boxes_is_not_taken_for_a_model_without_them(tmp_path: Path) -> None:
    class Failing(ScriptedClient):
        async def perceive(self, request: PerceiveRequest, tiles: list[np.ndarray]) -> PerceiveResponse:
            if request.task == "ground":
                raise ServerError("the model failed on this ground request")
            return await super().perceive(request, tiles)

    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "sea.tif", painted(90, 90), **PLACED)
    with pytest.raises(ServerError, match="failed on this ground request"):
        await over(tmp_path, Failing()).vqa("sea.tif", "How many ships are there?")
    answer = await over(tmp_path, ScriptedClient()).vqa("sea.tif", "How many ships are there?")
    assert answer.answer == "yes"  # a model without boxes answers in words


@pytest.mark.parametrize("question", ["How many people are there?", "How many ships are next to the pier?"])
async def test_what_boxes_cannot_answer_is_left_to_the_words_of_the_model(
    tools: Tools, model: PlantedModel, question: str
) -> None:
    assert (await tools.vqa("sea.tif", question, [0, 0, 90, 90])).answer == "yes"
    assert {request.task for request in model.requests} == {"vqa"}


async def test_a_count_without_a_model_of_boxes_or_of_the_thing_is_the_models_word(
    tmp_path: Path, tools: Tools
) -> None:
    class Ignorant(PlantedModel):
        def _boxes(self, phrase: str, tile: np.ndarray):
            return super()._boxes(NOT_KNOWN, tile)

    for model in (ScriptedClient(), Ignorant()):
        answer = await over(tmp_path, model).vqa("sea.tif", "How many ships are there?", [0, 0, 90, 90])
        assert (answer.answer, answer.artifacts) == ("yes", [])
