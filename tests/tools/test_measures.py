"""Pixels to places and back, for transforms and projections that a box of two corners gets wrong."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Geod, Transformer

from rs_tools.geometry.measures import Georeference, MaskTotals, TileFrame, geodesic_area_m2
from rs_tools.geometry.vectors import Shape, measured, placed


def georeference(epsg: int, transform: Affine, size: tuple[int, int] = (100, 80)) -> Georeference:
    found = Georeference.of(CRS.from_epsg(epsg).to_wkt(), transform, *size)
    assert found is not None
    return found


transforms = st.builds(
    lambda angle, across, down, east, north: (
        Affine.translation(east, north) * Affine.rotation(angle) * Affine.scale(across, down)
    ),
    angle=st.floats(-180, 180),
    across=st.floats(0.1, 60),
    down=st.floats(0.1, 60).map(lambda step: -step) | st.floats(0.1, 60),
    east=st.floats(300_000, 700_000),
    north=st.floats(500_000, 8_000_000),
)
sheared = st.builds(
    lambda a, b, d, e, c, f: Affine(a, b, c, d, e, f),
    *[st.floats(-1, 1)] * 4,
    c=st.floats(300_000, 700_000),
    f=st.floats(500_000, 8_000_000),
).filter(lambda transform: abs(transform.determinant) > 0.05)
pixel_sides = st.sampled_from([0.001, 0.05, 1, 30, 1000])  # metres
positions = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 80)), min_size=1, max_size=5).map(np.array)


@settings(deadline=None, max_examples=40)
@given(transform=transforms, xy=positions)
def test_pixels_come_back_from_lonlat_for_rotated_and_bottom_up_rasters(transform: Affine, xy: np.ndarray) -> None:
    place = georeference(32633, transform)
    np.testing.assert_allclose(place.pixels(place.lonlat(xy)), xy, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(transform=sheared, side=pixel_sides, xy=positions)
def test_pixels_come_back_under_any_affine_and_pixel_size(transform: Affine, side: float, xy: np.ndarray) -> None:
    a, b, c, d, e, f = transform[:6]
    place = georeference(32633, Affine(a * side, b * side, c, d * side, e * side, f))
    np.testing.assert_allclose(place.pixels(place.lonlat(xy)), xy, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    x1=st.integers(0, 30_000),
    y1=st.integers(0, 30_000),
    width=st.integers(1, 4096),
    height=st.integers(1, 4096),
    decimation=st.floats(1, 16),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_tile_positions_come_back_from_the_scene_and_corners_meet(
    x1: int, y1: int, width: int, height: int, decimation: float, share: tuple[float, float]
) -> None:
    size = max(1, round(width / decimation)), max(1, round(height / decimation))
    frame = TileFrame((x1, y1, x1 + width, y1 + height), size)
    xy = np.array([[share[0] * size[0], share[1] * size[1]], [0, 0], size])
    scene = frame.to_scene(xy)
    np.testing.assert_allclose(frame.to_tile(scene), xy, atol=1e-6)
    np.testing.assert_allclose(scene[1:], [frame.region[:2], frame.region[2:]])


@settings(deadline=None, max_examples=40)
@given(transform=transforms)
def test_a_ring_is_closed_counterclockwise_and_inside_the_bounds(transform: Affine) -> None:
    place = georeference(32633, transform)
    ring = place.ring([10, 20, 30, 60])
    assert ring is not None
    assert ring[0] == ring[-1]
    assert len(ring) >= 5
    lon, lat = np.array(ring).T - np.array([ring[0]]).T
    assert np.sum(lon[:-1] * lat[1:] - lon[1:] * lat[:-1]) > 0
    bounds = place.bounds(100, 80)
    assert bounds is not None
    west, south, east, north = bounds
    for lon, lat in ring:
        assert west <= lon <= east
        assert south <= lat <= north


def test_all_four_corners_of_a_rotated_raster_count() -> None:
    turned = Affine.translation(500_000, 5_000_000) * Affine.rotation(45) * Affine.scale(10, -10)
    place = georeference(32633, turned)
    bounds = place.bounds(100, 80)
    assert bounds is not None
    two_corners = place.lonlat(np.array([[0, 0], [100, 80]]))
    assert bounds[3] - bounds[1] > 1.5 * np.ptp(two_corners[:, 1])


def test_a_curved_edge_reaches_further_than_its_corners() -> None:
    place = georeference(5070, Affine(10_000, 0, -2_000_000, 0, -10_000, 3_000_000), (400, 200))
    corners = place.lonlat(np.array([[0, 0], [400, 0], [0, 200], [400, 200]]))
    bounds = place.bounds(400, 200)
    assert bounds is not None
    assert bounds[3] > corners[:, 1].max() + 0.5


def test_pixels_of_web_mercator_shrink_towards_the_poles() -> None:
    at_60_north = 8_399_737.89
    place = georeference(3857, Affine(10, 0, 0, 0, -10, at_60_north + 400))
    assert place.gsd_m((0, 0, 100, 80)) == pytest.approx(5.0, rel=0.01)


def test_a_pixel_is_as_wide_and_as_high_as_where_it_lies() -> None:
    """A tenth of a degree at 65 and at 10 degrees north, against steps along the ellipsoid."""
    place = georeference(4326, Affine(0.1, 0, -180, 0, -0.1, 90))
    for lat in (65, 10):
        row = (90 - lat) * 10
        across = Geod(ellps="WGS84").inv(0, lat, 0.1, lat)[2]
        down = Geod(ellps="WGS84").inv(0, lat - 0.05, 0, lat + 0.05)[2]
        region = (100, row - 50, 201, row + 50)
        assert place.pixel_m(region) == pytest.approx((across, down), rel=1e-6)
        assert place.gsd_m(region) == pytest.approx((across * down) ** 0.5, rel=1e-6)


def test_degrees_become_metres() -> None:
    place = georeference(4326, Affine(0.001, 0, 10, 0, -0.001, 0.04))
    assert place.gsd_m((0, 0, 100, 80)) == pytest.approx(111.0, rel=0.01)


def test_bounds_across_the_antimeridian_have_west_greater_than_east_and_the_ring_stays_in_one_piece() -> None:
    place = georeference(32601, Affine(1000, 0, 200_000, 0, -1000, 7_000_000), (200, 100))
    shifted = georeference(32660, Affine(1000, 0, 550_000, 0, -1000, 7_000_000), (200, 100))
    for raster in (place, shifted):
        bounds = raster.bounds(200, 100)
        assert bounds is not None
        west, _, east, _ = bounds
        assert west > 170
        assert east < -170
        ring = raster.ring([0, 0, 200, 100])
        assert ring is not None
        longitudes = [lon for lon, _ in ring]
        assert np.ptp(longitudes) < 10


def test_a_raster_around_the_pole_spans_all_longitudes_up_to_it() -> None:
    place = georeference(3413, Affine(10_000, 0, -1_000_000, 0, -10_000, 1_000_000), (200, 200))
    bounds = place.bounds(200, 200)
    assert bounds is not None
    assert bounds[:1] + bounds[2:] == [-180.0, 180.0, 90.0]
    assert bounds[1] == pytest.approx(77, abs=1)


def test_a_raster_of_the_whole_world_spans_it() -> None:
    place = georeference(4326, Affine(0.5, 0, -180, 0, -0.5, 90), (720, 360))
    assert place.bounds(720, 360) == [-180.0, -90.0, 180.0, 90.0]


FEET = 0.3048006096012192  # US survey
LOCAL = """LOCAL_CS["site grid",UNIT["metre",1],AXIS["X",EAST],AXIS["Y",NORTH]]"""
ROTATED_POLE = "+proj=ob_tran +o_proj=longlat +o_lat_p=39.25 +o_lon_p=0 +lon_0=18 +to_meter=0.0174532925199433"


def test_feet_become_metres() -> None:
    place = georeference(2263, Affine(2, 0, 980_000, 0, -2, 200_000))  # New York, US survey feet
    assert place.gsd_m((0, 0, 100, 80)) == pytest.approx(2 * FEET, rel=1e-3)


def test_a_projection_without_a_code_places_and_measures() -> None:
    wkt = CRS.from_proj4(ROTATED_POLE).to_wkt()
    place = Georeference.of(wkt, Affine(0.02, 0, -5, 0, -0.02, 5), 100, 80)
    assert place is not None
    assert place.epsg is None
    assert place.gsd_m((0, 0, 100, 80)) == pytest.approx(0.02 * 111_200, rel=0.01)


def test_a_local_grid_has_no_place_on_earth() -> None:
    assert Georeference.of(LOCAL, Affine(1, 0, 100, 0, -1, 100), 10, 10) is None


def test_a_straight_edge_keeps_four_corners_and_a_curved_one_gets_points_until_it_fits() -> None:
    near = georeference(32633, Affine(0.5, 0, 400_000, 0, -0.5, 5_000_000))
    ring = near.ring([0, 0, 100, 80])
    assert ring is not None
    assert len(ring) == 5
    wide = georeference(5070, Affine(10_000, 0, -2_000_000, 0, -10_000, 3_000_000), (400, 200))
    ring = wide.ring([0, 0, 400, 200])
    assert ring is not None
    assert 8 < len(ring) < 50
    ends = np.array(ring)
    between = wide.pixels((ends[:-1] + ends[1:]) / 2)
    gaps = [shapely.box(0, 0, 400, 200).exterior.distance(shapely.Point(*one)) for one in between]
    assert max(gaps) < 0.006 * np.hypot(400, 200)


@pytest.mark.parametrize(("epsg", "pole"), [(3413, 90.0), (3031, -90.0)])
def test_a_ring_around_a_pole_is_closed_along_it(epsg: int, pole: float) -> None:
    place = georeference(epsg, Affine(10_000, 0, -1_000_000, 0, -10_000, 1_000_000), (200, 200))
    ring = place.ring([50, 60, 150, 140])
    assert ring is not None
    assert ring[0] == ring[-1]
    lon, lat = np.array(ring).T
    assert np.ptp(lon) == pytest.approx(360)
    assert pole in lat
    assert np.abs(lat).min() > 80


def test_a_ring_off_the_projection_is_none() -> None:
    place = georeference(3035, Affine(100_000, 0, -20_000_000, 0, -100_000, 23_000_000), (480, 400))
    assert place.ring([0, 0, 10, 10]) is None
    assert place.ring([240, 190, 250, 200]) is not None


def test_rings_of_many_boxes_equal_the_rings_of_each() -> None:
    place = georeference(32633, Affine(7, 3, 400_000, 2, -8, 5_000_000))
    boxes = np.array([[0, 0, 10, 10], [20, 5, 90, 70], [3.5, 2.25, 4, 3]])
    assert place.rings(boxes) == [place.ring(box.tolist()) for box in boxes]
    assert place.rings(np.empty((0, 4))) == []


def zone_area(west: float, south: float, east: float, north: float) -> float:
    """Square metres between two meridians and two parallels, in closed form (Snyder 1987, equation 3-12)."""
    a, e = 6378137.0, 0.0818191908426215

    def q(lat: float) -> float:
        s = np.sin(np.radians(lat))
        return (1 - e**2) * (s / (1 - (e * s) ** 2) - np.log((1 - e * s) / (1 + e * s)) / (2 * e))

    return a**2 / 2 * np.radians(east - west) * (q(north) - q(south))


@settings(deadline=None, max_examples=40)
@given(
    west=st.floats(-180, 140),
    south=st.floats(-85, 60),
    width=st.floats(1e-4, 40),
    height=st.floats(1e-4, 25),
)
def test_the_area_between_meridians_and_parallels_is_the_closed_form(
    west: float, south: float, width: float, height: float
) -> None:
    place = georeference(4326, Affine(width / 100, 0, west, 0, -height / 80, south + height))
    ring = np.array([[0, 0], [100, 0], [100, 80], [0, 80], [0, 0]], float)
    [curve] = place.curves([ring], 0.01)
    assert curve is not None
    exact = zone_area(west, south, west + width, south + height)
    assert geodesic_area_m2([curve]) == pytest.approx(exact, rel=1e-3)
    totals = MaskTotals((0, 0, 100, 80), place)
    totals.add(0, np.ones((80, 100), np.uint8))
    assert totals.area_m2(1) == pytest.approx(exact, rel=1e-3)
    assert place.area_m2((0, 0, 100, 80)) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("epsg", [32633, 3857, 3413, 5070, 2263])
def test_areas_agree_with_an_equal_area_projection(epsg: int) -> None:
    centre = {32633: (400_000, 5_900_000), 3857: (1_000_000, 8_400_000), 3413: (300_000, -500_000)}
    east, north = {**centre, 5070: (100_000, 1_900_000), 2263: (980_000, 200_000)}[epsg]
    place = georeference(epsg, Affine(90, 40, east, 30, -100, north))
    triangle = np.array([[10, 5], [95, 40], [30, 75], [10, 5]], float)
    [curve] = place.curves([triangle], 0.01)
    assert curve is not None
    lon, lat = curve[:, 0].mean(), curve[:, 1].mean()
    equal_area = Transformer.from_crs("EPSG:4326", f"+proj=laea +lon_0={lon} +lat_0={lat}", always_xy=True)
    fine = np.concatenate([np.linspace(a, b, 50) for a, b in pairwise(triangle)])
    x, y = equal_area.transform(*place.lonlat(fine).T)
    shoelace = abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
    assert geodesic_area_m2([curve]) == pytest.approx(shoelace, rel=1e-3)


def test_a_mask_of_degrees_is_measured_row_by_row() -> None:
    place = georeference(4326, Affine(0.5, 0, -180, 0, -0.5, 90), (720, 360))
    mask = np.ones((360, 720), np.uint8)
    mask[:60] = 2  # north of 60 degrees
    mask[350:] = 255
    totals = MaskTotals((0, 0, 720, 360), place)
    for top in range(0, 360, 50):
        totals.add(top, mask[top : top + 50])
    assert totals.pixels[[1, 2, 255]].tolist() == [290 * 720, 60 * 720, 10 * 720]
    assert totals.area_m2(1) == pytest.approx(zone_area(-180, -85, 180, 60), rel=1e-3)
    assert totals.area_m2(2) == pytest.approx(zone_area(-180, 60, 180, 90), rel=1e-3)
    assert totals.area_m2(3) == 0
    assert place.area_m2((0, 0, 720, 360)) == pytest.approx(zone_area(-180, -90, 180, 90), rel=1e-3)
    assert place.area_m2((0, 0, 720, 60)) == pytest.approx(zone_area(-180, 60, 180, 90), rel=1e-3)


def test_a_mask_around_the_pole_is_measured_without_a_hole_in_it() -> None:
    place = georeference(3413, Affine(5_000, 0, -500_000, 0, -5_000, 500_000), (200, 200))
    totals = MaskTotals((0, 0, 200, 200), place)
    totals.add(0, np.ones((200, 200), np.uint8))
    ring = np.array([[0, 0], [200, 0], [200, 200], [0, 200], [0, 0]], float)
    [curve] = place.curves([ring], 0.01)
    assert curve is not None
    assert totals.area_m2(1) == pytest.approx(geodesic_area_m2([curve]), rel=1e-3)
    assert place.area_m2((0, 0, 200, 200)) == pytest.approx(geodesic_area_m2([curve]), rel=1e-3)


def test_a_class_that_reaches_off_the_map_or_has_no_map_has_no_area() -> None:
    place = georeference(3035, Affine(100_000, 0, -20_000_000, 0, -100_000, 23_000_000), (480, 400))
    totals = MaskTotals((0, 0, 480, 400), place)
    mask = np.zeros((400, 480), np.uint8)
    mask[:10, :10] = 1
    mask[190:200, 240:250] = 2
    totals.add(0, mask)
    assert totals.area_m2(1) is None
    assert totals.area_m2(2) is not None
    nowhere = MaskTotals((0, 0, 480, 400), None)
    nowhere.add(0, mask)
    assert nowhere.pixels[2] == 100
    assert nowhere.area_m2(2) is None
    assert place.area_m2((0, 0, 480, 400)) is None
    assert place.area_m2((240, 190, 250, 200)) == pytest.approx(totals.area_m2(2), rel=1e-3)


@pytest.mark.parametrize("transform", [Affine.identity(), Affine(0, 0, 5, 0, 0, 5)])
def test_a_transform_that_places_nothing_is_no_georeference(transform: Affine) -> None:
    assert Georeference.of(CRS.from_epsg(32633).to_wkt(), transform, 10, 10) is None


@pytest.mark.parametrize("west", [-0.125, -180.125])
def test_a_grid_whose_outermost_pixels_are_centred_on_the_poles_ends_at_them(west: float) -> None:
    """As global models of the atmosphere are stored."""
    place = Georeference.of(CRS.from_epsg(4326).to_wkt(), Affine(0.25, 0, west, 0, -0.25, 90.125), 1440, 721)
    assert place is not None
    assert place.area_m2((0, 0, 1440, 721)) == pytest.approx(5.1007e14, rel=1e-3)
    ring = np.array(place.ring([100, 0, 160, 3]))
    assert ring[:, 1].max() == 90
    assert len(ring) < 60
    cap = shapely.box(0, 0, 60, 3)
    [shape] = measured([Shape(1, 180, cap)], place)
    metres_a_degree = 111_694  # of latitude at the pole
    assert shape.area_m2 == pytest.approx((0.625 * metres_a_degree) ** 2 / 2 * math.radians(15), rel=0.001)
    [polygon] = placed([cap], place)
    assert polygon is not None
    assert polygon.is_valid
    assert polygon.bounds[3] == 90


@pytest.mark.parametrize("epsg", [4326, 4978])
def test_metres_that_are_said_to_be_degrees_and_a_plane_through_the_earth_are_no_georeference(epsg: int) -> None:
    assert Georeference.of(CRS.from_epsg(epsg).to_wkt(), Affine(10, 0, 400_000, 0, -10, 5e6), 10, 10) is None


def test_a_position_off_the_projection_is_no_georeference() -> None:
    wkt = CRS.from_epsg(32633).to_wkt()
    assert Georeference.of(wkt, Affine(1, 0, 1e30, 0, -1, 1e30), 10, 10) is None
