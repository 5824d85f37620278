"""The pixels of a place: lon/lat bounds as a region of a raster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rs_tools.errors import RegionError
from rs_tools.geometry.measures import Georeference

_NODES = 33  # along each side of the bounds: their edges are curves in most projections, and a pole may lie inside

_SAME = 1e-4  # degrees


def pixels_within(place: Georeference, width: int, height: int, bounds: Sequence[float]) -> list[float]:
    """The smallest region of a raster that holds what it shows of a place on Earth.

    Args:
        place: of the raster.
        width, height: its pixels.
        bounds: [west, south, east, north] in WGS84 degrees, as `Georeference.bounds` gives them: west is greater than
            east across the antimeridian.

    Returns:
        x1, y1, x2, y2 in pixels, within the raster.

    Raises:
        RegionError: these are no bounds, or the raster shows nothing of the place.
    """
    west, south, east, north = _checked(bounds)
    lon, lat = np.meshgrid(np.linspace(west, east, _NODES), np.linspace(south, north, _NODES))
    nodes = np.stack([lon, lat], axis=-1).reshape(-1, 2)
    # Where pixels are counted in degrees, those of a raster may run on beyond 180, or from 0 to 360.
    found = [_clipped(_shown(place, nodes + np.array([turn, 0.0])), width, height) for turn in (-360.0, 0.0, 360.0)]
    x1, y1, x2, y2 = max(found, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    if x1 >= x2 or y1 >= y2:
        shown = place.bounds(width, height)
        lies = "" if shown is None else f"; it shows [{', '.join(f'{side:.5f}' for side in shown)}]"
        raise RegionError(f"The image shows nothing of {list(bounds)}{lies} ([west, south, east, north] in degrees).")
    return [x1, y1, x2, y2]


def _checked(bounds: Sequence[float]) -> tuple[float, float, float, float]:
    """West, south, east beyond west, north."""
    rule = "give [west, south, east, north] in WGS84 degrees, longitudes within 180 and latitudes within 90"
    if len(bounds) != 4 or not np.isfinite(bounds).all():
        raise RegionError(f"The bounds {list(bounds)} are not four numbers; {rule}.")
    west, south, east, north = map(float, bounds)
    if max(abs(west), abs(east)) > 180 or max(abs(south), abs(north)) > 90:
        raise RegionError(f"The bounds {list(bounds)} are not on Earth; {rule}.")
    if south >= north or west == east:
        raise RegionError(f"The bounds {list(bounds)} are empty or reversed; {rule}.")
    return west, south, east if east > west else east + 360.0, north


def _shown(place: Georeference, lonlat: np.ndarray) -> np.ndarray:
    """Pixel positions of those of the places that the projection shows: far outside, some give another's position."""
    positions = place.pixels(lonlat)
    positions = np.where(np.isfinite(positions), positions, 0.0)
    aside = place.lonlat(positions) - lonlat
    aside[:, 0] = (aside[:, 0] + 180) % 360 - 180
    return positions[(np.abs(aside) < _SAME).all(axis=1)]


def _clipped(positions: np.ndarray, width: int, height: int) -> tuple[float, float, float, float]:
    """The box around pixel positions [N, 2] within the raster; without extent where there is none."""
    if len(positions) == 0:
        return 0.0, 0.0, 0.0, 0.0
    (x1, y1), (x2, y2) = positions.min(axis=0), positions.max(axis=0)
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
