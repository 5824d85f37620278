"""A place on Earth as a region of a raster, for rasters and places that a linear guess gets wrong."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS

from rs_tools.errors import RegionError
from rs_tools.geometry.extents import pixels_within
from rs_tools.geometry.measures import Georeference

WIDTH, HEIGHT = 400, 300


def place(epsg: int, transform: Affine) -> Georeference:
    found = Georeference.of(CRS.from_epsg(epsg).to_wkt(), transform, WIDTH, HEIGHT)
    assert found is not None
    return found


UTM = place(32633, Affine(10, 0, 400_000, 0, -10, 5_000_000))
ROTATED = place(32633, Affine.translation(400_000, 5_000_000) @ Affine.rotation(30) @ Affine.scale(10, -10))
DEGREES = place(4326, Affine(0.01, 0, 10, 0, -0.01, 50))
PACIFIC = place(4326, Affine(0.01, 0, 178, 0, -0.01, -10))  # 178 to 182 degrees east
GREENWICH = place(4326, Affine(0.9, 0, 0, 0, -0.6, 90))  # the whole Earth from 0 to 360
ARCTIC = place(3413, Affine(10_000, 0, -2_000_000, 0, -10_000, 1_500_000))  # the pole lies inside


@pytest.mark.parametrize("raster", [UTM, ROTATED, DEGREES, PACIFIC])
@settings(deadline=None, max_examples=30)
@given(corner=st.tuples(st.floats(0, 0.8), st.floats(0, 0.8)), share=st.floats(0.02, 0.2))
def test_the_region_of_a_place_holds_all_of_it_and_little_more(
    raster: Georeference, corner: tuple[float, float], share: float
) -> None:
    x1, y1 = corner[0] * WIDTH, corner[1] * HEIGHT
    box = np.array([x1, y1, x1 + share * WIDTH, y1 + share * HEIGHT])
    lonlat = raster.lonlat(box[[[0, 1], [0, 3], [2, 3], [2, 1]]])
    west, south = lonlat.min(axis=0)
    east, north = lonlat.max(axis=0)
    wrapped = [(west + 180) % 360 - 180, south, (east + 180) % 360 - 180, north]
    region = np.array(pixels_within(raster, WIDTH, HEIGHT, wrapped))
    assert (region[:2] <= box[:2] + 0.01).all()
    assert (region[2:] >= box[2:] - 0.01).all()
    if raster is not ROTATED:  # whose boxes stand aslant in degrees
        assert np.abs(region - box).max() < 0.05 * WIDTH


def test_bounds_beyond_the_image_end_at_its_edge() -> None:
    assert pixels_within(DEGREES, WIDTH, HEIGHT, [-180, -90, 180, 90]) == [0, 0, WIDTH, HEIGHT]
    np.testing.assert_allclose(pixels_within(DEGREES, WIDTH, HEIGHT, [9, 49, 11, 60]), [0, 0, 100, 100], atol=1e-6)


def test_longitudes_beyond_180_degrees_are_found_by_their_common_name() -> None:
    np.testing.assert_allclose(pixels_within(PACIFIC, WIDTH, HEIGHT, [179, -12, -179, -11]), [100, 100, 300, 200])
    np.testing.assert_allclose(pixels_within(PACIFIC, WIDTH, HEIGHT, [-179, -12, -178.5, -11]), [300, 100, 350, 200])
    np.testing.assert_allclose(pixels_within(GREENWICH, WIDTH, HEIGHT, [-90, 0, -45, 30]), [300, 100, 350, 150])


def test_a_place_around_the_pole_is_the_region_around_it() -> None:
    x1, y1, x2, y2 = pixels_within(ARCTIC, WIDTH, HEIGHT, [-180, 85, 180, 90])
    pole_x, pole_y = 200, 150
    assert x1 < pole_x - 50 < pole_x + 50 < x2
    assert y1 < pole_y - 50 < pole_y + 50 < y2


@pytest.mark.parametrize("raster", [UTM, ROTATED, DEGREES, PACIFIC, ARCTIC])
def test_a_place_elsewhere_is_refused_with_what_the_image_shows(raster: Georeference) -> None:
    with pytest.raises(RegionError, match=r"shows nothing of .*; it shows \[.*west, south, east, north"):
        pixels_within(raster, WIDTH, HEIGHT, [-70, -40, -69, -39])


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ([10, 50, 11], "not four numbers"),
        ([10, float("nan"), 11, 50], "not four numbers"),
        ([10, 50, 11, 49], "empty or reversed"),
        ([10, 49, 10, 50], "empty or reversed"),
        ([400_000, 4_990_000, 401_000, 5_000_000], "not on Earth"),
    ],
)
def test_what_are_no_bounds_is_refused(bounds: list[float], reason: str) -> None:
    with pytest.raises(RegionError, match=reason):
        pixels_within(UTM, WIDTH, HEIGHT, bounds)
