"""Where pixels lie: transforms, reference systems, ground control points, scenes found in the wild."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyproj
import pytest
from affine import Affine
from pyproj import Transformer
from rasterio.control import GroundControlPoint
from rasters import BUNDLED, DATA, UTM, noise, opened, rational, whole, write


def test_a_rotated_transform_without_crs_gives_no_place_and_says_so(tmp_path: Path) -> None:
    rotated = Affine.translation(100, 200) * Affine.rotation(30) * Affine.scale(10)
    scene = opened(write(tmp_path / "a.tif", noise(1, 9, 9), transform=rotated))
    assert scene.georeference is None
    assert any("no coordinate reference system" in warning for warning in scene.warnings)


@pytest.mark.parametrize(
    "transform",
    [
        UTM,
        Affine(10, 0, 400_000, 0, 10, 4_999_000),
        Affine(-10, 0, 400_000, 0, -10, 5_000_000),
        Affine.translation(400_000, 5_000_000) * Affine.rotation(33) * Affine.scale(10, -10),
        Affine.translation(400_000, 5_000_000) * Affine.shear(20, 5) * Affine.scale(10, -7),
    ],
    ids=["north up", "bottom up", "mirrored", "rotated", "sheared"],
)
def test_every_transform_puts_pixels_where_the_projection_says(tmp_path: Path, transform: Affine) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), crs="EPSG:32633", transform=transform))
    assert scene.georeference is not None
    pixels = np.array([[0, 0], [80, 0], [17.5, 41.25]])
    east, north = np.array([transform @ tuple(pixel) for pixel in pixels]).T
    expected = np.stack(Transformer.from_crs(32633, 4326, always_xy=True).transform(east, north), axis=1)
    np.testing.assert_allclose(scene.georeference.lonlat(pixels), expected, atol=1e-9)


@pytest.mark.parametrize(
    "crs",
    [
        "+proj=laea +lat_0=45 +lon_0=15 +x_0=400000 +y_0=5000000 +datum=WGS84",
        "EPSG:32633+5773",
        "+proj=tmerc +lat_0=0 +lon_0=15 +k=0.9996 +x_0=500000 +y_0=0 +ellps=GRS80 +units=us-ft",
    ],
    ids=["without EPSG code", "with heights", "in feet"],
)
def test_unusual_reference_systems_give_places(tmp_path: Path, crs: str) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), crs=crs, transform=UTM))
    assert scene.georeference is not None
    [[lon, lat]] = scene.georeference.lonlat(np.array([[0.0, 0.0]]))
    expected = Transformer.from_crs(pyproj.CRS(crs).to_2d(), 4326, always_xy=True).transform(400_000, 5_000_000)
    assert (lon, lat) == pytest.approx(expected, abs=1e-6)


def test_ground_control_points_that_a_transform_fits_place_the_scene_and_the_misfit_is_told(tmp_path: Path) -> None:
    truth = Affine.translation(400_000, 5_000_000) * Affine.rotation(20) * Affine.scale(10, -10)
    chance = np.random.default_rng(0)
    points = []
    for row, col in [(0, 0), (0, 80), (60, 0), (60, 80), (30, 40)]:
        x, y = truth @ (col + chance.uniform(-0.3, 0.3), row + chance.uniform(-0.3, 0.3))
        points.append(GroundControlPoint(row=row, col=col, x=x, y=y))
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), gcps=points, crs="EPSG:32633"))
    assert scene.georeference is not None
    assert any("5 ground control points" in warning and "to within 0." in warning for warning in scene.warnings)
    there = np.array(scene.georeference.transform @ (40, 30)) - np.array(truth @ (40, 30))
    assert np.hypot(*there) < 5  # half a pixel


@pytest.mark.parametrize("points", [[(0, 0), (0, 80), (60, 0)], [(0, 0), (0, 20), (0, 40), (0, 80)]])
def test_ground_control_points_too_few_or_in_one_line_place_nothing(
    tmp_path: Path, points: list[tuple[int, int]]
) -> None:
    gcps = [GroundControlPoint(row=r, col=c, x=400_000 + 10 * c, y=5_000_000 - 10 * r) for r, c in points]
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), gcps=gcps, crs="EPSG:32633"))
    assert scene.georeference is None
    assert any("too few, or in one line" in warning for warning in scene.warnings)


@pytest.mark.parametrize("place", [{}, {"crs": "EPSG:32633", "transform": UTM}], ids=["alone", "beside a transform"])
def test_rational_polynomials_are_told_and_not_used(tmp_path: Path, place: dict) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), rpcs=rational(), **place))
    assert (scene.georeference is not None) == bool(place)
    told = "are not used" if place else "gdalwarp -rpc"
    assert any("RPCs" in warning and told in warning for warning in scene.warnings)


def test_a_local_crs_gives_no_place_and_says_so(tmp_path: Path) -> None:
    local = 'LOCAL_CS["site grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    scene = opened(write(tmp_path / "a.tif", noise(1, 9, 9), crs=local, transform=UTM))
    assert scene.georeference is None
    assert any("no place on Earth" in warning for warning in scene.warnings)


def test_ground_control_points_that_no_transform_fits_are_named_with_the_remedy(tmp_path: Path) -> None:
    points = [GroundControlPoint(row=r, col=c, x=10 + c / 100, y=50 - r / 100) for r in (0, 8) for c in (0, 8)]
    points[0] = GroundControlPoint(row=0, col=0, x=10.1, y=50)
    scene = opened(write(tmp_path / "a.tif", noise(1, 9, 9), gcps=points, crs="EPSG:4326"))
    assert scene.georeference is None
    assert any("misses one by" in warning and "gdalwarp" in warning for warning in scene.warnings)


def test_a_crs_without_epsg_code_still_gives_places() -> None:
    scene = opened(BUNDLED / "raleigh_landsat7.tif")
    assert scene.georeference is not None
    bounds = scene.georeference.bounds(scene.width, scene.height)
    assert bounds == pytest.approx([-78.77, 35.69, -78.61, 35.81], abs=0.01)
    assert scene.choice.indexes == (3, 2, 1)
    assert not whole(scene).valid[0].any()


def labelled_scenes() -> list[dict]:
    records = DATA / "scenes" / "records.jsonl"
    return [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []


@pytest.mark.skipif(not labelled_scenes(), reason=f"no labelled scenes in {DATA}")
@pytest.mark.parametrize("record", labelled_scenes(), ids=lambda record: record["id"])
def test_scenes_found_in_the_wild_open_as_they_are_described(record: dict) -> None:
    scene = opened(DATA / "scenes" / record["images"][0])
    assert (scene.width, scene.height, len(scene.bands)) == (record["width"], record["height"], record["band_count"])
    assert (scene.georeference is not None) == record["crs"]
    if scene.georeference and record["gsd_m"]:
        assert scene.georeference.gsd_m(scene.region([])) == pytest.approx(record["gsd_m"], rel=0.25)
    pixels = whole(scene)
    assert pixels.valid.any()
    assert pixels.rgb.shape == (scene.height, scene.width, 3)
