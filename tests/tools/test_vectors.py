"""From pixels of a mask to valid polygons on Earth."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS
from rasterio.features import rasterize

from rs_tools.geometry import vectors
from rs_tools.geometry.measures import Georeference, MaskTotals
from rs_tools.geometry.vectors import MaskOutliner, Shape, box_polygons, measured, placed, simplified


def georeference(epsg: int, transform: Affine, size: tuple[int, int] = (100, 100)) -> Georeference:
    found = Georeference.of(CRS.from_epsg(epsg).to_wkt(), transform, *size)
    assert found is not None
    return found


def holed(outer: tuple[float, float, float, float], inner: tuple[float, float, float, float]) -> shapely.Polygon:
    return shapely.Polygon(shapely.box(*outer).exterior, [shapely.box(*inner).exterior])


def outlined(mask: np.ndarray, rows: int = 1000, **options) -> list[Shape]:
    outliner = MaskOutliner(mask.shape[1], **options)
    found = [shape for top in range(0, len(mask), rows) for shape in outliner.add(mask[top : top + rows])]
    return found + list(outliner.finish())


def blobs(seed: int, shape: tuple[int, int] = (60, 50), share: float = 0.5) -> np.ndarray:
    """A mask of two classes in lumps of all shapes, with holes and nodata."""
    random = np.random.default_rng(seed)
    odds = [1 - share, share * 0.6, share * 0.35, share * 0.05]
    coarse = random.choice([0, 1, 2, 255], (shape[0] // 2, shape[1] // 2), p=odds)
    mask = np.repeat(np.repeat(coarse, 2, axis=0), 2, axis=1).astype(np.uint8)
    mask[random.random(mask.shape) < 0.03] = 0
    return mask


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), share=st.floats(0.2, 0.95), strip=st.integers(1, 70))
def test_outlines_are_valid_and_fill_back_to_the_same_mask_however_it_is_cut(seed, share, strip) -> None:
    mask = blobs(seed, share=share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_STRIP_ROWS", strip)
        found = outlined(mask, rows=max(1, strip // 2))
    assert all(shape.polygon.is_valid for shape in found)
    filled = rasterize([(shape.polygon, shape.value) for shape in found], mask.shape, dtype="uint8")
    np.testing.assert_array_equal(filled, np.where(mask == 255, 0, mask))
    whole = outlined(mask)
    assert sorted((shape.value, shape.pixels) for shape in found) == sorted((s.value, s.pixels) for s in whole)
    for shape in found:
        assert any(shape.polygon.equals(other.polygon) for other in whole if other.value == shape.value)


def test_a_ring_of_pixels_keeps_its_hole() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[4:16, 4:16] = 3
    mask[8:12, 8:12] = 0
    [shape] = outlined(mask, origin=(100, 200))
    assert (shape.value, shape.pixels) == (3, 144 - 16)
    assert shape.polygon.bounds == (104, 204, 116, 216)
    [hole] = simplified(shape.polygon).interiors
    assert shapely.Polygon(hole).area == pytest.approx(16)


def test_an_area_of_very_many_points_is_given_in_parts_that_cover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((200, 60), np.uint8)
    mask[:, ::2] = 1
    mask[::50] = 1  # a comb without end, and a square beside it
    mask[60:90, 5:35] = 0
    mask[65:85, 10:30] = 2
    assert [shape.value for shape in outlined(mask, rows=20)].count(1) == 1
    monkeypatch.setattr(vectors, "_MOST_POINTS", 500)
    monkeypatch.setattr(vectors, "_STRIP_ROWS", 20)
    outliner = MaskOutliner(60)
    found = [shape for top in range(0, 200, 20) for shape in outliner.add(mask[top : top + 20])]
    found += outliner.finish()
    assert outliner.cuts > 1
    assert [shape.pixels for shape in found if shape.value == 2] == [400]
    drawn = np.zeros(mask.shape, np.uint8)
    rasterize([(shape.polygon, shape.value) for shape in found], out=drawn)
    np.testing.assert_array_equal(drawn, mask)
    assert sum(shape.pixels for shape in found) == (mask > 0).sum()


def test_memory_does_not_follow_the_width_of_a_mask() -> None:
    """A strip of 1,024 rows of this mask takes over 300 MB with the scores and numbers of its pixels."""
    width = 20_000
    outliner = MaskOutliner(width)
    band, scores = np.zeros((32, width), np.uint8), np.full((32, width), 0.5, np.float32)
    band[:, 100:9000], band[8:24, 9500:19_000] = 1, 2
    tracemalloc.start()
    try:
        found = [shape for _ in range(48) for shape in outliner.add(band, scores)]
        found += outliner.finish()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(shape.pixels for shape in found) == [152_000] * 48 + [8900 * 32 * 48]
    assert {shape.score for shape in found} == {0.5}
    assert peak < 80 * 2**20


def test_specks_are_left_out_and_counted() -> None:
    mask = np.zeros((30, 30), np.uint8)
    mask[2:12, 2:12] = 1
    mask[20, 20] = mask[25, 5:8] = 1
    outliner = MaskOutliner(30, min_pixels=4)
    found = [*outliner.add(mask), *outliner.finish()]
    assert [shape.pixels for shape in found] == [100]
    assert outliner.specks == 2


def test_an_empty_mask_has_no_outline() -> None:
    assert outlined(np.zeros((10, 10), np.uint8)) == []
    assert outlined(np.full((10, 10), 255, np.uint8)) == []


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), tolerance=st.floats(0.5, 4))
def test_simplified_outlines_stay_valid_near_and_of_about_the_same_area(seed, tolerance) -> None:
    for shape in outlined(blobs(seed, share=0.7)):
        simple = simplified(shape.polygon, tolerance)
        assert simple.is_valid
        assert len(simple.exterior.coords) <= len(shape.polygon.exterior.coords)
        assert abs(simple.area - shape.polygon.area) <= 0.2 * shape.polygon.area
        assert shapely.hausdorff_distance(simple, shape.polygon) <= 1.5 * tolerance or simple.equals(shape.polygon)


def test_a_slanting_edge_loses_its_steps() -> None:
    x, y = np.meshgrid(np.arange(100), np.arange(100))
    [shape] = outlined((x + 2 * y < 150).astype(np.uint8))
    assert len(shape.polygon.exterior.coords) > 80
    assert len(simplified(shape.polygon).exterior.coords) < 8


def test_areas_of_objects_add_up_to_the_area_of_the_mask() -> None:
    for place in (
        georeference(32633, Affine(7, 3, 400_000, 2, -8, 5_000_000)),
        georeference(4326, Affine(0.05, 0, 10, 0, -0.05, 70)),
        georeference(2263, Affine(2, 0, 980_000, 0, -2, 200_000)),
    ):
        mask = blobs(3)
        totals = MaskTotals((0, 0, 50, 60), place)
        totals.add(0, mask)
        areas = [shape.area_m2 for shape in measured(outlined(mask), place) if shape.value == 1]
        assert sum(area for area in areas if area is not None) == pytest.approx(totals.area_m2(1), rel=1e-3)
    assert {shape.area_m2 for shape in measured(outlined(blobs(3)), None)} == {None}


def rings_wind_as_they_should(geometry: shapely.Geometry) -> bool:
    return all(
        part.exterior.is_ccw and not any(hole.is_ccw for hole in part.interiors)
        for part in shapely.get_parts(geometry)
        if isinstance(part, shapely.Polygon)
    )


@pytest.mark.parametrize("flip", [1, -1])
def test_exteriors_run_counterclockwise_and_holes_clockwise(flip: int) -> None:
    place = georeference(32633, Affine(10, 0, 400_000, 0, 10 * flip, 5_000_000))
    [found] = placed([holed((0, 0, 50, 50), (10, 10, 20, 20))], place)
    assert isinstance(found, shapely.Polygon)
    assert len(found.interiors) == 1
    assert rings_wind_as_they_should(found)


def test_a_polygon_across_the_antimeridian_is_split_there() -> None:
    place = georeference(32601, Affine(1000, 0, 200_000, 0, -1000, 7_000_000))
    square = shapely.box(0, 0, 200, 100)
    solid, with_hole = placed([square, holed((0, 0, 200, 100), (60, 40, 140, 60))], place)
    for found in (solid, with_hole):
        assert isinstance(found, shapely.MultiPolygon)
        assert found.is_valid
        assert rings_wind_as_they_should(found)
        bounds = sorted(part.bounds for part in found.geoms)
        assert bounds[0][0] == -180
        assert bounds[-1][2] == 180
        assert all(part.bounds[2] - part.bounds[0] < 10 for part in found.geoms)
    assert solid is not None
    assert with_hole is not None
    pixel = placed([shapely.box(60, 40, 140, 60)], place)[0]
    assert pixel is not None
    assert with_hole.area == pytest.approx(solid.area - pixel.area, rel=1e-3)


def test_longitudes_of_a_raster_from_0_to_360_come_home() -> None:
    place = georeference(4326, Affine(1, 0, 0, 0, -1, 50))
    east, across = placed(box_polygons(np.array([[200, 10, 210, 20], [170, 10, 190, 20]])), place)
    assert east is not None
    assert across is not None
    assert east.bounds == (-160, 30, -150, 40)
    assert isinstance(across, shapely.MultiPolygon)
    assert across.area == pytest.approx(200)


def test_a_polygon_around_the_pole_reaches_along_it_and_one_with_the_pole_in_its_hole_does_not() -> None:
    place = georeference(3413, Affine(10_000, 0, -1_000_000, 0, -10_000, 1_000_000))
    cap = shapely.box(50, 50, 150, 150)
    found, belt = placed([cap, holed((50, 50, 150, 150), (90, 90, 110, 110))], place)
    assert found is not None
    assert belt is not None
    for geometry in (found, belt):
        assert geometry.is_valid
        assert rings_wind_as_they_should(geometry)
        assert geometry.bounds[0] == -180
        assert geometry.bounds[2] == 180
    assert found.bounds[3] == 90
    assert 89 < belt.bounds[3] < 90
    inside = place.lonlat(np.array([[100.5, 95.2], [60, 140], [120, 60], [95, 52]]))
    assert all(found.contains(shapely.Point(*lonlat)) for lonlat in inside)
    assert [belt.contains(shapely.Point(*lonlat)) for lonlat in inside] == [False, True, True, True]


@pytest.mark.parametrize("corner", [(100, 100), (100, 60), (60, 100), (80, 80)])
def test_a_polygon_that_meets_the_pole_covers_what_its_pixels_cover(corner: tuple[int, int]) -> None:
    place = georeference(3413, Affine(10_000, 0, -1_000_000, 0, -10_000, 1_000_000))
    x, y = corner
    box = shapely.box(x, y, x + 40, y + 40)
    [found] = placed([box], place)
    assert found is not None
    random = np.random.default_rng(0)
    pixels = random.uniform(55, 145, (400, 2))
    pixels = pixels[[box.exterior.distance(shapely.Point(*one)) > 1 for one in pixels]]
    for pixel, lonlat in zip(pixels, place.lonlat(pixels), strict=True):
        assert found.contains(shapely.Point(*lonlat)) == box.contains(shapely.Point(*pixel)), pixel


def test_many_polygons_are_placed_in_batches_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = georeference(32633, Affine(7, 3, 400_000, 2, -8, 5_000_000))
    polygons = [shape.polygon for shape in outlined(blobs(5))]
    together = placed(polygons, place)
    monkeypatch.setattr(vectors, "_BATCH_POINTS", 20)
    assert placed(polygons, place) == together == [placed([polygon], place)[0] for polygon in polygons]


def test_what_reaches_off_the_projection_has_no_place() -> None:
    place = georeference(3035, Affine(100_000, 0, -20_000_000, 0, -100_000, 23_000_000), (480, 400))
    assert placed([shapely.box(0, 0, 10, 10)], place) == [None]
    assert placed([], place) == []
