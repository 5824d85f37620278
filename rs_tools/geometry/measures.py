"""Where pixels lie: a tile in its scene, the scene on Earth, and how much ground that is.

Each conversion exists once. Tile to scene: `TileFrame`. Scene to Earth: `Georeference`, pixel -> affine -> CRS -> WGS84
point by point, so that rotated and bottom-up rasters and curved projections come out right. Longitude comes first
(RFC 7946).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from affine import Affine
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import CRSError, ProjError

_GEOD = Geod(ellps="WGS84")
_POINTS_PER_EDGE = 33
_CURVE_ROUNDS = 14  # halvings of an edge: enough to follow one that meets a pole
_GEODESIC_STEP = 0.02  # degrees; between points this close a geodesic is the straight line of the map
_AREA_NODES = 129  # per axis; between them the area of a pixel is interpolated
_COUNTED_PIXELS = 2**18  # at once: counting takes some 40 bytes for each
_MOST_TURNS = 2  # around the Earth that longitudes run on
_POLES = np.array([[0.0, 90.0], [0.0, -90.0]])


@dataclass(frozen=True)
class TileFrame:
    """Where a tile lies in its scene.

    Attributes:
        region: [x1, y1, x2, y2] of the tile in scene pixels.
        size: (width, height) of the tile in its own pixels, as the model saw it.
    """

    region: tuple[int, int, int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> np.ndarray:
        """Scene pixels per tile pixel, float64 [2] (x, y)."""
        return scales([self])[0]

    def to_scene(self, xy: np.ndarray) -> np.ndarray:
        """Scene positions of tile positions; float [..., 2]."""
        xy = np.asarray(xy, float)
        return to_scene([self], np.zeros(1, int), xy.reshape(1, -1, 2)).reshape(xy.shape)

    def to_tile(self, xy: np.ndarray) -> np.ndarray:
        """The inverse of `to_scene`."""
        return (np.asarray(xy, float) - self.region[:2]) / self.scale


def scales(frames: Sequence[TileFrame]) -> np.ndarray:
    """`TileFrame.scale` of each, float64 [T, 2]."""
    regions = np.array([frame.region for frame in frames])
    return (regions[:, 2:] - regions[:, :2]) / np.array([frame.size for frame in frames])


def to_scene(frames: Sequence[TileFrame], owner: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Scene positions of tile positions, float64 [N, K, 2]; `xy[i]` are positions in tile `frames[owner[i]]`."""
    corners = np.array([frame.region[:2] for frame in frames])
    return xy * scales(frames)[owner][:, None] + corners[owner][:, None]


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
            crs = CRS.from_wkt(crs_wkt)
            found = cls(transform, crs_wkt, crs.to_epsg())
            lon, lat = _to_wgs84(crs_wkt).transform(*(transform @ (width / 2, height / 2)))
        except (CRSError, ProjError):  # a local or engineering CRS has no tie to Earth
            return None
        # Metres that are said to be degrees come out as they are, and a plane through the Earth is no map.
        on_earth = abs(lat) <= 90 and abs(lon) <= _MOST_TURNS * 360 and not crs.is_geocentric
        return found if on_earth else None

    def lonlat(self, xy: np.ndarray) -> np.ndarray:
        """Lon/lat in degrees of pixel positions.

        Args:
            xy: float [N, 2] pixel positions.

        Returns:
            float64 [N, 2]; infinite where the projection has no such place. Of a grid whose outermost pixels are
            centred on the poles, the half that lies beyond them is at the pole.
        """
        lon, lat = _to_wgs84(self.crs_wkt).transform(*_applied(self.transform, xy))
        return np.stack([lon, np.where(np.isinf(lat), lat, np.clip(lat, -90, 90))], axis=1)

    def pixels(self, lonlat: np.ndarray) -> np.ndarray:
        """The inverse of `lonlat`: float64 [N, 2] pixel positions of float [N, 2] degrees."""
        east, north = _to_wgs84(self.crs_wkt).transform(lonlat[:, 0], lonlat[:, 1], direction="INVERSE")
        return _solved(self.transform, np.stack([east, north], axis=1))

    def gsd_m(self, region: Sequence[int]) -> float | None:
        """Metres per pixel in the middle of [x1, y1, x2, y2]: geometric mean of the two of `pixel_m`."""
        sides = self.pixel_m(region)
        return None if sides is None else float(np.sqrt(sides[0] * sides[1]))

    def pixel_m(self, region: Sequence[int]) -> tuple[float, float] | None:
        """Metres across and down the pixel in the middle of [x1, y1, x2, y2], along geodesics.

        None where it reaches beyond what the projection shows.
        """
        x1, y1, x2, y2 = region
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        steps = self.lonlat(np.array([[x - 0.5, y], [x + 0.5, y], [x, y - 0.5], [x, y + 0.5]]))
        if not np.isfinite(steps).all():
            return None
        return _GEOD.inv(*steps[0], *steps[1])[2], _GEOD.inv(*steps[2], *steps[3])[2]

    def ring(self, region: Sequence[float]) -> list[list[float]] | None:
        """The outline of [x1, y1, x2, y2] as one closed, counterclockwise ring of [lon, lat]; see `rings`."""
        return self.rings(np.array([region], float))[0]

    def rings(self, boxes: np.ndarray) -> list[list[list[float]] | None]:
        """The outlines of boxes as closed, counterclockwise rings of [lon, lat].

        A ring holds the four corners, and points between them only where an edge of the box is a curve in lon/lat.
        It stays in one piece: across the antimeridian longitudes run on beyond 180 degrees, and a box around a pole
        is closed along the pole. `vectors.placed` gives the split form that RFC 7946 asks for.

        Args:
            boxes: float [N, 4] x1, y1, x2, y2 in pixels.

        Returns:
            for each box its ring, or None where it reaches beyond what the projection shows.
        """
        boxes = np.asarray(boxes, float).reshape(-1, 4)
        corners = boxes[:, [[0, 1], [0, 3], [2, 3], [2, 1], [0, 1]]]  # [N, 5, 2]
        return self.outlines(list(corners))

    def outlines(self, rings: Sequence[np.ndarray]) -> list[list[list[float]] | None]:
        """As `rings`, of closed rings of pixel positions: each float [n, 2], the first position repeated at the end."""
        diagonals = [float(np.hypot(*np.ptp(ring, axis=0))) for ring in rings]
        curves = self.curves(rings, np.maximum(0.5, 0.005 * np.array(diagonals)))
        outlines = [
            None if curve is None else self.outline(curve, ring) for curve, ring in zip(curves, rings, strict=True)
        ]
        return [None if outline is None else _counterclockwise(outline).tolist() for outline in outlines]

    def curves(self, rings: Sequence[np.ndarray], tolerance: float | np.ndarray) -> list[np.ndarray | None]:
        """Lon/lat along closed rings of pixel positions, with points added where a straight edge becomes a curve.

        Args:
            rings: each float [n, 2] in pixels, the first position repeated at the end.
            tolerance: how far, in pixels, straight lines between the answer's points may leave the ring's edges; one
                number, or one per ring.

        Returns:
            for each ring float64 [m, 2] of lon/lat degrees without a jump of longitude, so that one around a pole ends
            360 degrees from its start; None where a ring reaches beyond what the projection shows.
        """
        if not rings:
            return []
        xy = np.concatenate(rings)
        owner = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
        limit = np.broadcast_to(np.asarray(tolerance, float), len(rings))
        lonlat = self.lonlat(xy)
        unchecked = owner[:-1] == owner[1:]  # the edge from a point to the next
        for _ in range(_CURVE_ROUNDS):
            (edges,) = np.nonzero(unchecked)
            split = edges[self._bent(xy, lonlat, edges, limit[owner[edges]])]
            if len(split) == 0:
                break
            middle = (xy[split] + xy[split + 1]) / 2
            xy = np.insert(xy, split + 1, middle, axis=0)
            lonlat = np.insert(lonlat, split + 1, self.lonlat(middle), axis=0)
            owner = np.insert(owner, split + 1, owner[split])
            halves = split + np.arange(len(split))
            unchecked = np.zeros(len(xy) - 1, bool)
            unchecked[halves] = unchecked[halves + 1] = True
        ends = np.flatnonzero(np.diff(owner)) + 1
        return [_unwrapped(curve) if np.isfinite(curve).all() else None for curve in np.split(lonlat, ends)]

    def outline(self, curve: np.ndarray, ring: np.ndarray) -> np.ndarray | None:
        """A curve of `curves` as a closed ring of lon/lat, its middle within 180 degrees of Greenwich.

        A curve around a pole is closed along the pole. None where it goes around both poles, which no ring can show.
        """
        turns = round((curve[-1, 0] - curve[0, 0]) / 360)
        if turns:
            pole = self._pole_within(ring)
            if pole is None:
                return None
            over = [[curve[-1, 0], pole], [curve[0, 0], pole], [curve[0, 0], curve[0, 1]]]
            curve = np.concatenate([curve, over])
        else:
            curve = np.concatenate([curve[:-1], curve[:1]])
        middle = (curve[:, 0].min() + curve[:, 0].max()) / 2
        return curve - [360.0 * round(middle / 360), 0.0]

    def pixel_areas(self, region: Sequence[int]) -> PixelAreas:
        """How much ground each pixel of a region covers."""
        x1, y1, x2, y2 = region
        x = np.linspace(x1 + 0.5, x2 - 0.5, min(_AREA_NODES, x2 - x1))
        y = np.linspace(y1 + 0.5, y2 - 0.5, min(_AREA_NODES, y2 - y1))
        centres = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        east, west, south, north = (
            _geocentric(self.lonlat(centres + step)) for step in ([0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5])
        )
        area = np.linalg.norm(np.cross(east - west, south - north), axis=1)
        return PixelAreas(x, y, area.reshape(len(y), len(x)), (x1, y1, x2, y2))

    def area_m2(self, region: Sequence[int]) -> float | None:
        """Square metres of ground in [x1, y1, x2, y2]; None where a part of it has no place on Earth."""
        area = self.pixel_areas(region).total()
        return area if np.isfinite(area) else None

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

    def _bent(self, xy: np.ndarray, lonlat: np.ndarray, edges: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """Whether the middle of the straight lon/lat line of each edge lies off the edge; bool [len(edges)]."""
        start, along = xy[edges], xy[edges + 1] - xy[edges]
        with np.errstate(invalid="ignore", divide="ignore"):  # where a position has no place
            step = lonlat[edges + 1] - lonlat[edges]
            step[:, 0] = (step[:, 0] + 180) % 360 - 180
            offset = self.pixels(lonlat[edges] + step / 2) - start
            length = np.hypot(*along.T)
            aside = np.abs(along[:, 0] * offset[:, 1] - along[:, 1] * offset[:, 0]) / length
            part = (along * offset).sum(axis=1) / length**2
            # A line around the world the other way also ends where the edge ends, but its middle is far along.
            straight = (aside <= limit) & (np.abs(part - 0.5) <= 0.25)
            straight |= (np.abs(lonlat[[edges, edges + 1], 1]) == 90).all(axis=0)  # a pole has no length
        return ~straight & (length > limit) & np.isfinite(step).all(axis=1)

    def _pole_within(self, ring: np.ndarray) -> float | None:
        """The latitude of the pole inside a ring of pixel positions; None where both or none are there."""
        import shapely  # here, as few scenes lie at a pole and the MCP server is to start fast

        area = shapely.Polygon(ring).buffer(0)
        poles = [shapely.Point(pole) for pole in self.pixels(_POLES)]
        gaps = [area.distance(pole) if np.isfinite([pole.x, pole.y]).all() else np.inf for pole in poles]
        return None if gaps[0] == gaps[1] else float(_POLES[np.argmin(gaps), 1])


@dataclass(frozen=True)
class PixelAreas:
    """Square metres that each pixel of a region covers, on the WGS84 ellipsoid.

    Computed at nodes and interpolated bilinearly between them. The error is below 0.1 % for pixels of up to 8 degrees,
    but some percent for the rows next to a pole where pixels are centred on it.

    Attributes:
        x, y: pixel positions of the columns and rows of nodes.
        nodes: float64 [len(y), len(x)]; not finite where the projection shows no place.
        region: [x1, y1, x2, y2] in pixels.
    """

    x: np.ndarray
    y: np.ndarray
    nodes: np.ndarray
    region: tuple[int, int, int, int]

    def rows(self, top: int, count: int) -> np.ndarray:
        """Areas of the pixels of rows top .. top + count, counted from the region's first; float64 [count, W]."""
        x1, y1, x2, _ = self.region
        upper, down = _between(self.y, y1 + top + 0.5 + np.arange(count))
        left, across = _between(self.x, x1 + 0.5 + np.arange(x2 - x1))
        lower, right = np.minimum(upper + 1, len(self.y) - 1), np.minimum(left + 1, len(self.x) - 1)
        with np.errstate(invalid="ignore"):
            lines = self.nodes[upper] + down[:, None] * (self.nodes[lower] - self.nodes[upper])
            return lines[:, left] + across * (lines[:, right] - lines[:, left])

    def total(self) -> float:
        """Of all pixels of the region together; not finite where `nodes` are not."""
        x1, y1, x2, y2 = self.region
        down, across = _weights(self.y, y1 + 0.5 + np.arange(y2 - y1)), _weights(self.x, x1 + 0.5 + np.arange(x2 - x1))
        return float(np.einsum("i,ij,j", down, self.nodes, across))


class MaskTotals:
    """Pixels and square metres of each value of a uint8 mask, added up while its rows pass by.

    Args:
        region: [x1, y1, x2, y2] of the mask in scene pixels.
        georeference: of the scene; None leaves areas unknown.

    Attributes:
        pixels: int64 [256], by mask value.
    """

    def __init__(self, region: Sequence[int], georeference: Georeference | None) -> None:
        self.pixels = np.zeros(256, np.int64)
        self._areas = None if georeference is None else georeference.pixel_areas(region)
        self._square_metres = np.zeros(256)

    def add(self, top: int, rows: np.ndarray) -> None:
        """Count rows of the mask: uint8 [n, W], the first of them `top` rows below the mask's first."""
        some = max(1, _COUNTED_PIXELS // rows.shape[1])
        for start in range(0, len(rows), some):
            part = rows[start : start + some]
            counts = np.bincount(part.ravel(), minlength=256)
            self.pixels += counts
            if self._areas is not None and counts[1:255].any():  # most of most masks is no class
                areas = self._areas.rows(top + start, len(part))
                self._square_metres += np.bincount(part.ravel(), weights=areas.ravel(), minlength=256)

    def area_m2(self, value: int) -> float | None:
        """Square metres of a class value (1 to 254); None without georeference or where the map shows no place."""
        area = float(self._square_metres[value])
        return None if self._areas is None or not np.isfinite(area) else area


def geodesic_area_m2(curves: Sequence[np.ndarray]) -> float:
    """Square metres inside the first curve of lon/lat, less those inside the others (its holes).

    `pyproj.Geod` takes lines between points as geodesics; long ones get points between, to follow the straight lines
    of the map.

    Args:
        curves: each float [n, 2] as `Georeference.curves` gives them.
    """
    areas = [abs(_GEOD.polygon_area_perimeter(*_dense(curve).T)[0]) for curve in curves]
    return areas[0] - sum(areas[1:])


def _dense(curve: np.ndarray) -> np.ndarray:
    """The curve with points added on lines longer than `_GEODESIC_STEP`; [n, 2] -> [m, 2]."""
    pieces = np.maximum(1, np.ceil(np.abs(np.diff(curve, axis=0)).max(axis=1) / _GEODESIC_STEP)).astype(int)
    if pieces.max(initial=1) == 1:
        return curve
    at = np.concatenate([[0], np.cumsum(pieces)])
    steps = np.arange(at[-1] + 1)
    return np.stack([np.interp(steps, at, curve[:, 0]), np.interp(steps, at, curve[:, 1])], axis=1)


def _between(nodes: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The node before each position and the share of the way to the next."""
    before = np.clip(np.searchsorted(nodes, at, side="right") - 1, 0, max(0, len(nodes) - 2))
    if len(nodes) == 1:
        return before, np.zeros(len(at))
    return before, (at - nodes[before]) / (nodes[before + 1] - nodes[before])


def _weights(nodes: np.ndarray, at: np.ndarray) -> np.ndarray:
    """How often each node counts in the sum of what is interpolated at the positions; float64 [len(nodes)]."""
    before, share = _between(nodes, at)
    after = np.minimum(before + 1, len(nodes) - 1)
    return np.bincount(before, 1 - share, len(nodes)) + np.bincount(after, share, len(nodes))


def _geocentric(lonlat: np.ndarray) -> np.ndarray:
    """Cartesian metres from the Earth's centre of points on the ellipsoid, float64 [N, 3]."""
    with np.errstate(invalid="ignore"):  # infinite where there is no place
        lon, lat = np.radians(lonlat.T)
        normal = _GEOD.a / np.sqrt(1 - _GEOD.es * np.sin(lat) ** 2)
        out = normal * np.cos(lat)
        return np.stack([out * np.cos(lon), out * np.sin(lon), normal * (1 - _GEOD.es) * np.sin(lat)], axis=1)


@lru_cache(maxsize=64)
def _to_wgs84(crs_wkt: str) -> Transformer:
    """Its inverse undoes it exactly, which a second transformer, free to choose another datum shift, need not."""
    return Transformer.from_crs(CRS.from_wkt(crs_wkt), "EPSG:4326", always_xy=True)


def _unwrapped(curve: np.ndarray) -> np.ndarray:
    return np.stack([np.unwrap(curve[:, 0], period=360), curve[:, 1]], axis=1)


def _counterclockwise(ring: np.ndarray) -> np.ndarray:
    lon, lat = (ring - ring[0]).T  # small numbers: the products below would cancel far from the origin
    return ring[::-1] if np.sum(lon[:-1] * lat[1:] - lon[1:] * lat[:-1]) < 0 else ring


def _applied(transform: Affine, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = points.T
    return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f


def _solved(transform: Affine, places: np.ndarray) -> np.ndarray:
    """The inverse of `_applied`, [N, 2]. The offset goes first: it dwarfs what pixels differ by."""
    east, north = (places - [transform.c, transform.f]).T
    a, b, d, e = transform.a, transform.b, transform.d, transform.e
    x, y = e * east - b * north, a * north - d * east
    return np.stack([x, y], axis=1) / transform.determinant


def _outline(width: int, height: int) -> np.ndarray:
    """Pixel positions once around the raster, [4 * points, 2], the first one repeated at the end."""
    step = np.linspace(0, 1, _POINTS_PER_EDGE)
    x = np.concatenate([step, np.ones_like(step), 1 - step, np.zeros_like(step)]) * width
    y = np.concatenate([np.zeros_like(step), step, np.ones_like(step), 1 - step]) * height
    return np.stack([x, y], axis=1)


def _wrapped(lon: float) -> float:
    """Longitude within [-180, 180]; the edge at 180 keeps its sign."""
    return float(lon) if -180 <= lon <= 180 else float((lon + 180) % 360 - 180)
