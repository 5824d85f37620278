"""Masks and boxes as polygons: outlined in pixels, simplified, placed on Earth and measured.

A mask is outlined while its rows pass by, strip by strip: pieces that meet at the edge of a strip are joined, so no
seam shows. Only an area whose outline grows beyond `_MOST_POINTS` is given in parts, cut at the edges of strips: the
memory taken stays bounded whatever the mask. Pixels that touch at a corner only are two objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import shapely
from affine import Affine
from rasterio.features import rasterize, shapes

from rs_tools.geometry.blending import NODATA
from rs_tools.geometry.measures import Georeference, geodesic_area_m2

_STRIP_ROWS = 1024
_STRIP_PIXELS = 2**21  # outlining takes about 20 bytes for each
_COUNTED_ROWS = 32
_MOST_POINTS = 100_000  # of an area that goes on
_MOST_OFF = 1.5  # tolerances
_CHECKED = 8192  # points at once: each is an object of its own
_AREA_TOLERANCE = 0.01  # pixels
_BATCH_POINTS = 100_000  # that are placed at once
_WORLDS = range(-2, 3)  # turns around the Earth that a ring may have run on


@dataclass(frozen=True)
class Shape:
    """One connected area of a class.

    Attributes:
        value: of its pixels in the mask.
        pixels: how many they are.
        polygon: its outline in scene pixels; of the pixels exactly, or simplified.
        score: mean over its pixels of what was given beside the mask; 0 where nothing was.
        area_m2: of the exact outline on Earth, or None where that has no place.
    """

    value: int
    pixels: int
    polygon: shapely.Polygon
    score: float = 0.0
    area_m2: float | None = None


@dataclass
class _Open:
    """Pieces of one area that reaches the last row so far."""

    value: int
    pieces: list[shapely.Polygon]
    total: float  # of the scores of its pixels
    points: int


@dataclass
class MaskOutliner:
    """Outlines the classes of a uint8 mask; values 0 and 255 are no class.

        shapes = [shape for rows in bands for shape in outliner.add(rows)] + list(outliner.finish())

    Args:
        width: pixels across.
        origin: (x, y) of the mask's first pixel in the scene.
        min_pixels: smaller areas are left out and counted.

    Attributes:
        specks: areas left out.
        cuts: how often an area was given so far and its rest as another, because of its many points.
    """

    width: int
    origin: tuple[int, int] = (0, 0)
    min_pixels: int = 1
    specks: int = 0
    cuts: int = 0
    _rows: list[np.ndarray] = field(default_factory=list)
    _scores: list[np.ndarray] = field(default_factory=list)
    _waiting: int = 0
    _top: int = 0
    _last: np.ndarray | None = None  # of the strip before: for each column the number of its open area, or -1
    _open: dict[int, _Open] = field(default_factory=dict)

    def add(self, rows: np.ndarray, scores: np.ndarray | None = None) -> Iterator[Shape]:
        """Take the next rows, uint8 [n, width], and give the areas that ended above them.

        `scores`, float [n, width], are averaged over each area; give them with all rows or with none.
        """
        self._rows.append(rows)
        if scores is not None:
            self._scores.append(scores)
        self._waiting += len(rows)
        if self._waiting >= min(_STRIP_ROWS, max(1, _STRIP_PIXELS // self.width)):
            yield from self._strip()

    def finish(self) -> Iterator[Shape]:
        """The areas that reach the last row."""
        if self._waiting:
            yield from self._strip()
        yield from self._closed(set())

    def _strip(self) -> Iterator[Shape]:
        strip = np.concatenate(self._rows)
        scores = np.concatenate(self._scores) if self._scores else None
        place = Affine.translation(self.origin[0], self.origin[1] + self._top)
        self._top += len(strip)
        self._rows, self._scores, self._waiting = [], [], 0
        kept = (strip != 0) & (strip != NODATA)
        drawn = [(one, int(value)) for one, value in shapes(strip, mask=kept, connectivity=4, transform=place)]
        values = [value for _, value in drawn]
        pieces = [_polygon(one) for one, _ in drawn]
        numbers = np.full(strip.shape, -1, np.int32)  # of the piece that each pixel belongs to
        if drawn:
            rasterize([(one, i) for i, (one, _) in enumerate(drawn)], out=numbers, transform=place)
        del drawn
        totals = [0.0] * len(pieces) if scores is None else _totals(numbers, scores, len(pieces))
        first, last = numbers[0], numbers[-1]
        owner = self._joined(pieces, values, totals, first)
        inside = set(range(len(pieces))) - set(owner)
        for i in sorted(inside - set(last.tolist())):
            yield from self._shape(values[i], [pieces[i]], totals[i])
        for i in sorted(inside & set(last.tolist())):
            owner[i] = max(self._open, default=-1) + 1
            self._open[owner[i]] = _Open(values[i], [pieces[i]], totals[i], _points(pieces[i]))
        self._last = np.array([owner[i] if i >= 0 else -1 for i in last.tolist()])
        yield from self._closed(set(self._last.tolist()))
        yield from self._cut()

    def _joined(
        self, pieces: list[shapely.Polygon], values: list[int], totals: list[float], first: np.ndarray
    ) -> dict[int, int]:
        """The open area that each piece of the strip continues; areas that a piece connects become one."""
        owner: dict[int, int] = {}
        if self._last is None:
            return owner
        into: dict[int, int] = {}

        def root(area: int) -> int:
            while area in into:
                area = into[area]
            return area

        meeting = np.unique(np.stack([self._last, first], axis=1), axis=0)
        for area, i in meeting[(meeting >= 0).all(axis=1)].tolist():
            if self._open[root(area)].value != values[i]:
                continue
            if i not in owner:
                owner[i] = root(area)
                self._open[owner[i]].pieces.append(pieces[i])
                self._open[owner[i]].total += totals[i]
                self._open[owner[i]].points += _points(pieces[i])
            elif root(area) != root(owner[i]):
                gone, stays = root(area), root(owner[i])
                self._open[stays].total += self._open[gone].total
                self._open[stays].points += self._open[gone].points
                self._open[stays].pieces += self._open.pop(gone).pieces
                into[gone] = stays
        return {i: root(area) for i, area in owner.items()}

    def _closed(self, going_on: set[int]) -> Iterator[Shape]:
        for number in sorted(set(self._open) - going_on):
            area = self._open.pop(number)
            yield from self._shape(area.value, area.pieces, area.total)

    def _cut(self) -> Iterator[Shape]:
        """Areas of too many points, given as far as they are known; what they go on with becomes another area."""
        assert self._last is not None
        for number in [number for number, area in self._open.items() if area.points > _MOST_POINTS]:
            area = self._open.pop(number)
            self._last[self._last == number] = -1
            self.cuts += 1
            yield from self._shape(area.value, area.pieces, area.total)

    def _shape(self, value: int, pieces: list[shapely.Polygon], total: float) -> Iterator[Shape]:
        pixels = round(sum(piece.area for piece in pieces))
        if pixels < self.min_pixels:
            self.specks += 1
            return
        whole = pieces[0] if len(pieces) == 1 else shapely.simplify(shapely.union_all(pieces), 0)
        for polygon in _polygons(whole):
            yield Shape(value, round(polygon.area), polygon, total / pixels)


def _polygon(drawn: dict[str, Any]) -> shapely.Polygon:
    """A polygon as rasterio draws it."""
    exterior, *holes = [shapely.LinearRing(np.array(ring)) for ring in drawn["coordinates"]]
    return shapely.Polygon(exterior, holes)


def _points(polygon: shapely.Polygon) -> int:
    return int(shapely.get_num_coordinates(polygon))


def _totals(numbers: np.ndarray, scores: np.ndarray, pieces: int) -> list[float]:
    """The sum of the scores of each piece; `numbers` int32 [n, W] says which piece a pixel belongs to, -1 none."""
    totals = np.zeros(pieces + 1)
    for top in range(0, len(numbers), _COUNTED_ROWS):  # in small parts: numpy counts in copies of twice the size
        rows = slice(top, top + _COUNTED_ROWS)
        totals += np.bincount((numbers[rows] + 1).ravel(), scores[rows].ravel(), pieces + 1)
    return totals[1:].tolist()


def simplified(polygon: shapely.Polygon, tolerance: float = 1.0) -> shapely.Polygon:
    """The outline without its steps: fewer points, no old point more than 1.5 times `tolerance` off; valid, holes kept.

    An outline that cannot be simplified so, such as that of a polygon too small to survive, stays exact.
    """
    simple = shapely.simplify(polygon, tolerance, preserve_topology=True)
    fits = simple.is_valid and isinstance(simple, shapely.Polygon) and not simple.is_empty
    if not fits or abs(simple.area - polygon.area) > 0.2 * polygon.area:
        return polygon
    # To stay valid shapely may move an outline further than it was told; its new points are all old ones.
    outline = simple.boundary
    shapely.prepare(outline)
    old = shapely.get_coordinates(polygon)
    parts = (shapely.points(old[first : first + _CHECKED]) for first in range(0, len(old), _CHECKED))
    near = all(shapely.dwithin(outline, part, _MOST_OFF * tolerance).all() for part in parts)
    return simple if near else polygon


def measured(found: Sequence[Shape], georeference: Georeference | None) -> list[Shape]:
    """The shapes with the geodesic areas of their outlines; call it before simplifying."""
    if georeference is None:
        return list(found)
    curves = _curves([shape.polygon for shape in found], georeference, _AREA_TOLERANCE)
    return [
        replace(shape, area_m2=geodesic_area_m2(known) if len(known) == len(rings) else None)
        for shape, rings in zip(found, curves, strict=True)
        for known in [[ring for ring in rings if ring is not None]]
    ]


def placed(
    polygons: Sequence[shapely.Polygon], georeference: Georeference, tolerance: float = 0.25
) -> list[shapely.Polygon | shapely.MultiPolygon | None]:
    """Polygons of scene pixels in WGS84 lon/lat as RFC 7946 wants them.

    Exterior rings run counterclockwise, holes clockwise. What crosses the antimeridian is split there; what holds a
    pole reaches along it. Edges that are curves in lon/lat get points.

    Args:
        polygons: in scene pixels.
        georeference: of the scene.
        tolerance: pixels that an edge may be off.

    Returns:
        for each polygon its place, or None where it reaches beyond what the projection shows.
    """
    curves = _curves(polygons, georeference, tolerance)
    return [_placed(polygon, rings, georeference) for polygon, rings in zip(polygons, curves, strict=True)]


def box_polygons(boxes: np.ndarray) -> list[shapely.Polygon]:
    """Boxes, float [N, 4] x1, y1, x2, y2, as polygons."""
    x1, y1, x2, y2 = np.asarray(boxes, float).reshape(-1, 4).T
    return list(shapely.box(x1, y1, x2, y2))


def _curves(
    polygons: Sequence[shapely.Polygon], georeference: Georeference, tolerance: float
) -> Iterator[list[np.ndarray | None]]:
    """The lon/lat curve of each ring of each polygon, exterior first; a batch of polygons at a time."""
    counts = shapely.get_num_coordinates(polygons) if len(polygons) else np.zeros(0, int)
    batches = np.cumsum(counts) // _BATCH_POINTS
    for batch in np.unique(batches):
        low, high = np.searchsorted(batches, [batch, batch + 1])
        rings = [[np.asarray(ring.coords)[:, :2] for ring in _rings(one)] for one in polygons[low:high]]
        curves = iter(georeference.curves([ring for some in rings for ring in some], tolerance))
        for some in rings:
            yield [next(curves) for _ in some]


def _rings(polygon: shapely.Polygon) -> list[shapely.LinearRing]:
    return [polygon.exterior, *polygon.interiors]


def _placed(
    polygon: shapely.Polygon, curves: Sequence[np.ndarray | None], georeference: Georeference
) -> shapely.Polygon | shapely.MultiPolygon | None:
    outlines = []
    for curve, ring in zip(curves, _rings(polygon), strict=True):
        outline = None if curve is None else georeference.outline(curve, np.asarray(ring.coords)[:, :2])
        if outline is None:
            return None
        outlines.append(outline)
    lon = outlines[0][:, 0]
    if lon.min() >= -180 and lon.max() <= 180 and np.ptp(lon) < 360:
        whole = shapely.make_valid(shapely.Polygon(outlines[0], outlines[1:]))
    else:
        exterior, *holes = (_in_one_world(outline) for outline in outlines)
        whole = shapely.difference(exterior, shapely.union_all(holes))
    parts = _polygons(whole)
    if not parts:
        return None
    oriented = [shapely.orient_polygons(part) for part in parts]
    return oriented[0] if len(oriented) == 1 else shapely.MultiPolygon(oriented)


def _in_one_world(outline: np.ndarray) -> shapely.Geometry:
    """A ring whose longitudes run beyond 180 degrees as the area that it covers between -180 and 180."""
    area = shapely.make_valid(shapely.Polygon(outline))
    parts = []
    for turn in _WORLDS:
        here = shapely.intersection(area, shapely.box(360 * turn - 180, -90, 360 * turn + 180, 90))
        parts += [_moved(polygon, -360 * turn) for polygon in _polygons(here)]
    return shapely.union_all(parts)


def _moved(polygon: shapely.Polygon, degrees: float) -> shapely.Polygon:
    return shapely.transform(polygon, lambda lonlat: lonlat + np.array([degrees, 0.0])) if degrees else polygon


def _polygons(geometry: shapely.Geometry) -> list[shapely.Polygon]:
    """The polygons that a geometry holds; lines and points that an operation left are no area."""
    parts: Iterable[shapely.Geometry] = shapely.get_parts(geometry)
    found: list[shapely.Polygon] = []
    for part in parts:
        if isinstance(part, shapely.Polygon) and not part.is_empty:
            found.append(part)
        elif isinstance(part, shapely.MultiPolygon):
            found += _polygons(part)
    return found
