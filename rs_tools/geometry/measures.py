"""Where pixels lie on Earth: lon/lat of pixel corners, bounds, closed rings and ground sampling distance.

Everything goes pixel -> affine -> CRS -> WGS84 point by point, so that rotated and bottom-up rasters and curved
projections come out right. Longitude comes first (RFC 7946).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from affine import Affine
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import CRSError, ProjError

_GEOD = Geod(ellps="WGS84")
_POINTS_PER_EDGE = 33


@dataclass(frozen=True)
class Georeference:
    """The affine transform and coordinate reference system of a raster.

    Attributes:
        transform: pixel (x, y) from the top-left corner to CRS coordinates.
        crs_wkt: the coordinate reference system.
        epsg: its code, or None where it has none.
    """

    transform: Affine
    crs_wkt: str
    epsg: int | None

    @classmethod
    def of(cls, crs_wkt: str, transform: Affine, width: int, height: int) -> Georeference | None:
        """The georeference of a raster, or None where this CRS and transform give no place on Earth."""
        if transform.is_degenerate or transform.almost_equals(Affine.identity()):
            return None
        try:
            found = cls(transform, crs_wkt, CRS.from_wkt(crs_wkt).to_epsg())
            centre = found.lonlat(np.array([[width / 2, height / 2]]))
        except (CRSError, ProjError):  # a local or engineering CRS has no tie to Earth
            return None
        return found if np.isfinite(centre).all() else None

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        """Lon/lat in degrees of pixel positions.

        Args:
            xy: float [N, 2] pixel positions.

        Returns:
            float64 [N, 2]; infinite where the projection has no such place.
        """
        transformer = Transformer.from_crs(CRS.from_wkt(self.crs_wkt), "EPSG:4326", always_xy=True)
        return np.stack(transformer.transform(*_applied(self.transform, xy)), axis=1)

    def pixels(self, lonlat: np.ndarray) -> np.ndarray:
        """The inverse of `lonlat`: float64 [N, 2] pixel positions of float [N, 2] degrees."""
        transformer = Transformer.from_crs("EPSG:4326", CRS.from_wkt(self.crs_wkt), always_xy=True)
        east, north = transformer.transform(lonlat[:, 0], lonlat[:, 1])
        return np.stack(_applied(~self.transform, np.stack([east, north], axis=1)), axis=1)

    def gsd_m(self, width: int, height: int) -> float | None:
        """Metres per pixel at the raster's centre: geometric mean of the geodesic steps along columns and rows.

        None where a pixel there reaches beyond what the projection shows.
        """
        x, y = width / 2, height / 2
        steps = self.lonlat(np.array([[x - 0.5, y], [x + 0.5, y], [x, y - 0.5], [x, y + 0.5]]))
        if not np.isfinite(steps).all():
            return None
        across = _GEOD.inv(*steps[0], *steps[1])[2]
        down = _GEOD.inv(*steps[2], *steps[3])[2]
        return float(np.sqrt(across * down))

    def ring(self, region: Sequence[float]) -> list[list[float]]:
        """The four corners of [x1, y1, x2, y2] as a closed, counterclockwise ring of [lon, lat].

        Across the antimeridian longitudes run on beyond 180 degrees, so that the ring stays in one piece.
        """
        x1, y1, x2, y2 = region
        corners = self.lonlat(np.array([[x1, y1], [x1, y2], [x2, y2], [x2, y1], [x1, y1]], float))
        corners[:, 0] = np.unwrap(corners[:, 0], period=360)
        lon, lat = (corners - corners[0]).T  # small numbers: the products below would cancel far from the origin
        if np.sum(lon[:-1] * lat[1:] - lon[1:] * lat[:-1]) < 0:
            corners = corners[::-1]
        return corners.tolist()

    def bounds(self, width: int, height: int) -> list[float] | None:
        """[west, south, east, north] of the whole raster, from points along all four edges.

        West is greater than east where the raster crosses the antimeridian (RFC 7946). A raster around a pole spans
        all longitudes up to it. None where no edge point has a place.
        """
        points = self.lonlat(_outline(width, height))
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) == 0:
            return None
        lon, lat = np.unwrap(points[:, 0], period=360), points[:, 1]
        south, north = max(float(lat.min()), -90.0), min(float(lat.max()), 90.0)
        if abs(lon[-1] - lon[0]) > 180:  # the outline goes once around a pole
            return [-180.0, south, 180.0, 90.0] if lat.mean() > 0 else [-180.0, -90.0, 180.0, north]
        if lon.max() - lon.min() >= 360:
            return [-180.0, south, 180.0, north]
        return [_wrapped(lon.min()), south, _wrapped(lon.max()), north]


def _applied(transform: Affine, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = points.T
    return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f


def _outline(width: int, height: int) -> np.ndarray:
    """Pixel positions once around the raster, [4 * points, 2], the first one repeated at the end."""
    step = np.linspace(0, 1, _POINTS_PER_EDGE)
    x = np.concatenate([step, np.ones_like(step), 1 - step, np.zeros_like(step)]) * width
    y = np.concatenate([np.zeros_like(step), step, np.ones_like(step), 1 - step]) * height
    return np.stack([x, y], axis=1)


def _wrapped(lon: float) -> float:
    """Longitude within [-180, 180]; the edge at 180 keeps its sign."""
    return float(lon) if -180 <= lon <= 180 else float((lon + 180) % 360 - 180)
