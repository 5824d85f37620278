"""Pixels to places and back, for transforms and projections that a box of two corners gets wrong."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS

from rs_tools.geometry.measures import Georeference


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
positions = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 80)), min_size=1, max_size=5).map(np.array)


@settings(deadline=None, max_examples=40)
@given(transform=transforms, xy=positions)
def test_pixels_come_back_from_lonlat_for_rotated_and_bottom_up_rasters(transform: Affine, xy: np.ndarray) -> None:
    place = georeference(32633, transform)
    np.testing.assert_allclose(place.pixels(place.lonlat(xy)), xy, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(transform=transforms)
def test_a_ring_is_closed_counterclockwise_and_inside_the_bounds(transform: Affine) -> None:
    place = georeference(32633, transform)
    ring = place.ring([10, 20, 30, 60])
    assert ring[0] == ring[-1]
    assert len(ring) == 5
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
    assert place.gsd_m(100, 80) == pytest.approx(5.0, rel=0.01)


def test_degrees_become_metres() -> None:
    place = georeference(4326, Affine(0.001, 0, 10, 0, -0.001, 0.04))
    assert place.gsd_m(100, 80) == pytest.approx(111.0, rel=0.01)


def test_bounds_across_the_antimeridian_have_west_greater_than_east_and_the_ring_stays_in_one_piece() -> None:
    place = georeference(32601, Affine(1000, 0, 200_000, 0, -1000, 7_000_000), (200, 100))
    shifted = georeference(32660, Affine(1000, 0, 550_000, 0, -1000, 7_000_000), (200, 100))
    for raster in (place, shifted):
        bounds = raster.bounds(200, 100)
        assert bounds is not None
        west, _, east, _ = bounds
        assert west > 170
        assert east < -170
        longitudes = [lon for lon, _ in raster.ring([0, 0, 200, 100])]
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


@pytest.mark.parametrize("transform", [Affine.identity(), Affine(0, 0, 5, 0, 0, 5)])
def test_a_transform_that_places_nothing_is_no_georeference(transform: Affine) -> None:
    assert Georeference.of(CRS.from_epsg(32633).to_wkt(), transform, 10, 10) is None


def test_a_position_off_the_projection_is_no_georeference() -> None:
    wkt = CRS.from_epsg(32633).to_wkt()
    assert Georeference.of(wkt, Affine(1, 0, 1e30, 0, -1, 1e30), 10, 10) is None
