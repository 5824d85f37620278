"""A mask of a scene, painted tile by tile: blended, cut at thresholds, counted, outlined and written row by row.

Rows leave as soon as no tile can add to them, and the tiles across a wide scene wait in a file, so the memory taken is
that of some rows and of the outlines kept, whatever the scene. A painter belongs to one thread: GDAL's open files do.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import rasterio
import shapely
from affine import Affine

from rs_tools.artifacts.features import Feature
from rs_tools.artifacts.mask import MaskWriter
from rs_tools.artifacts.store import ArtifactStore
from rs_tools.calls import Call, Output
from rs_tools.geometry.blending import NODATA, Band, Blender
from rs_tools.geometry.measures import Georeference, MaskTotals, TileFrame
from rs_tools.geometry.shelf import Shelf
from rs_tools.geometry.vectors import MaskOutliner, Shape, measured, placed, simplified
from rs_tools.grounding import picture_size
from rs_tools.memory import give_back
from rs_tools.preview import render
from rs_tools.results import Artifact, Provenance

MIN_PIXELS = 4  # of an area with an outline; the model's own cells are no smaller
MAX_AREAS = 20_000  # outlines kept, the largest
MAX_POINTS = 500_000  # of them together
_LEVELS = 255
_BATCH = 512  # areas measured and simplified at once
_BATCH_POINTS = 100_000
_GROWN = 32 * 2**20  # bytes


@dataclass(frozen=True)
class Maps:
    """What the model says of one tile: uint8 [K, h, w] probabilities of 0..255, and a threshold in 0..1 for each."""

    probabilities: np.ndarray
    thresholds: Sequence[float]


@dataclass(frozen=True)
class Area:
    """One connected area of a class.

    Attributes:
        value: of its pixels in the mask.
        pixels: how many they are.
        score: their mean probability.
        bbox: x1, y1, x2, y2 in scene pixels, exactly.
        outline: simplified, in scene pixels.
        area_m2: of the exact outline on Earth, or None where that has no place.
    """

    value: int
    pixels: int
    score: float
    bbox: tuple[int, int, int, int]
    outline: shapely.Polygon
    area_m2: float | None


@dataclass(frozen=True)
class Painted:
    """A finished mask.

    Attributes:
        mask: its file.
        areas: its connected areas of `MIN_PIXELS` and more, largest first.
        specks: smaller areas, without an outline.
        left_out: areas beyond `MAX_AREAS` and `MAX_POINTS`.
        cuts: how often an area of very many points is told as two, one above the other.
        highest: the highest probability of each class.
    """

    mask: Artifact
    areas: list[Area]
    specks: int
    left_out: int
    cuts: int
    highest: list[float]

    @property
    def warnings(self) -> list[str]:
        """What to know of the areas."""
        told = []
        if self.specks:
            areas = "1 area" if self.specks == 1 else f"{self.specks} areas"
            told.append(
                f"{areas} of fewer than {MIN_PIXELS} pixels: in the mask and its figures, but without an outline or a "
                "box."
            )
        if self.cuts:
            cuts = "once" if self.cuts == 1 else f"{self.cuts} times"
            told.append(
                f"An area with a very long outline is told as two, one above the other ({cuts}): there are fewer areas "
                "than are told, and the mask shows them whole."
            )
        return told


class Painter:
    """Paints one mask; call `close` whatever happens.

    Args:
        store: where the mask goes.
        call: whose looks are painted.
        classes: names of the classes; the first has value 1 in the mask.

    Attributes:
        totals: pixels and square metres by value, of the rows painted so far.
        highest: float [K], the highest probability of each class so far.
    """

    def __init__(self, store: ArtifactStore, call: Call, classes: Sequence[str]) -> None:
        plan, self._region = call.looks.finest, call.region
        x1, y1, x2, y2 = self._region
        self._georeference = call.scene.georeference
        self._grid = call.scene.grid if self._georeference is None else self._georeference.transform
        self._frames = [TileFrame(region, plan.size(region)) for region in plan.regions]
        self._classes = dict(enumerate(classes, 1))
        self._stack = ExitStack()
        shelf = self._stack.enter_context(Shelf(store.folder))
        self._blender = Blender(self._frames, self._region, len(classes), shelf)
        self._outliner = MaskOutliner(x2 - x1, origin=(x1, y1), min_pixels=MIN_PIXELS)
        self._store = store
        self._writer: MaskWriter | None = None
        self._thresholds: Sequence[float] | None = None
        self._fresh: list[Shape] = []
        self._fresh_points = 0
        self._points = 0  # of the areas kept
        self._areas: list[tuple[int, int, Area]] = []  # a heap, smallest first; the number keeps areas from comparing
        self._number = 0
        self._height = y2 - y1
        self.totals = MaskTotals(self._region, self._georeference)
        self.highest = np.zeros(len(classes))

    def add(self, index: int, maps: Maps | None, valid: np.ndarray) -> None:
        """Paint one tile. `maps` is None where it holds no data; `valid`: bool [h, w], its pixels that do.

        Raises:
            ArtifactError: the mask cannot be written.
            ValueError: the maps do not fit the tile.
        """
        if maps is None:
            width, height = self._frames[index].size
            probabilities = np.zeros((len(self._classes), height, width), np.uint8)
        else:
            probabilities = maps.probabilities
            if self._thresholds is None:
                self._thresholds = list(maps.thresholds)
            seen = np.where(valid, maps.probabilities, 0).max(axis=(1, 2)) / _LEVELS
            self.highest = np.maximum(self.highest, seen)
        for band in self._blender.add(index, probabilities, valid):
            self._paint(band)

    def finish(self) -> Painted:
        """The mask, once all tiles are painted; raises ArtifactError as `add`."""
        writer = self._opened()
        self._collect(self._outliner.finish())
        self._measure()
        self._stack.close()
        give_back(_GROWN)  # before the whole scene is read again, for words and a picture
        areas = [area for _, _, area in sorted(self._areas, key=lambda one: (-one[0], one[1]))]
        outliner, left_out = self._outliner, self._number - len(areas)
        return Painted(writer.artifact, areas, outliner.specks, left_out, outliner.cuts, self.highest.tolist())

    def close(self) -> None:
        """Remove what is half made; after `finish` there is nothing to do."""
        stop = _Unfinished()
        self._stack.__exit__(_Unfinished, stop, None)

    def _paint(self, band: Band) -> None:
        # Without a threshold no tile has had data yet, so all of these rows are nodata.
        mask = band.mask(1.0 if self._thresholds is None else self._thresholds)
        self._opened().write(mask)
        self.totals.add(band.top, mask)
        chosen = np.clip(mask, 1, len(self._classes))[None].astype(np.intp) - 1
        scores = np.take_along_axis(band.probabilities, chosen, axis=0)[0]
        self._collect(self._outliner.add(mask, scores))

    def _opened(self) -> MaskWriter:
        if self._writer is None:
            x1, y1, x2, _ = self._region
            place = self._georeference
            grid = None if self._grid is None else self._grid * Affine.translation(x1, y1)
            wkt = None if place is None else place.crs_wkt
            mask = self._store.mask((x2 - x1, self._height), self._classes, wkt, grid)
            self._writer = self._stack.enter_context(mask)
        return self._writer

    def _collect(self, shapes: Iterable[Shape]) -> None:
        for shape in shapes:
            self._fresh.append(shape)
            self._fresh_points += _points(shape.polygon)
            if len(self._fresh) == _BATCH or self._fresh_points > _BATCH_POINTS:
                self._measure()

    def _measure(self) -> None:
        for shape in measured(self._fresh, self._georeference):
            x1, y1, x2, y2 = (round(side) for side in shape.polygon.bounds)
            outline, score = simplified(shape.polygon), min(1.0, shape.score)
            area = Area(shape.value, shape.pixels, score, (x1, y1, x2, y2), outline, shape.area_m2)
            self._number += 1
            self._points += _points(outline)
            heapq.heappush(self._areas, (shape.pixels, self._number, area))
            while len(self._areas) > MAX_AREAS or (self._points > MAX_POINTS and len(self._areas) > 1):
                _, _, smallest = heapq.heappop(self._areas)
                self._points -= _points(smallest.outline)
        self._fresh, self._fresh_points = [], 0


def _points(polygon: shapely.Polygon) -> int:
    return int(shapely.get_num_coordinates(polygon))


class _Unfinished(Exception):
    """Tells the mask's writer that no more rows come."""


def vectors(
    store: ArtifactStore,
    call: Call,
    areas: Sequence[Area],
    classes: Sequence[str],
    provenance: Provenance,
    warnings: Sequence[str],
) -> Artifact:
    """The outlines as a file of vectors, each with its class, pixels, area and mean probability."""
    georeference = call.scene.georeference
    features = _features(areas, classes, georeference)
    return store.vectors(features, provenance, warnings, lonlat=georeference is not None, gsd_m=call.gsd_m)


def _features(
    areas: Sequence[Area], classes: Sequence[str], georeference: Georeference | None
) -> Iterator[Feature]:
    """The areas as features, placed a few at a time, as the file takes them."""
    for first in range(0, len(areas), _BATCH):
        some = areas[first : first + _BATCH]
        polygons = [area.outline for area in some]
        for area, geometry in zip(some, _geometries(polygons, georeference), strict=True):
            yield Feature(
                geometry,
                {
                    "label": classes[area.value - 1],
                    "value": area.value,
                    "pixels": area.pixels,
                    "area_m2": area.area_m2,
                    "score": round(area.score, 4),
                },
            )


def picture(call: Call, output: Output, mask: Artifact, classes: Sequence[str]) -> Artifact:
    """The region (of a pair as it is later) with the mask over it."""
    size = picture_size(call)
    with rasterio.open(mask.path) as file:
        small = file.read(1, out_shape=(size[1], size[0]))
    if call.pair is None:
        rgb = call.scene.read(call.region, size).rgb
    else:
        with call.pair.reader() as read:
            rgb = read(call.region, size).after.rgb
    names = dict(enumerate(classes, 1))
    return output.store.preview(render(rgb, call.region, mask=small, classes=names, across_m=call.across_m))


def figures(painter: Painter, value: int) -> tuple[int, float, float | None]:
    """Pixels of a class so far, their share of the pixels with data, and square metres or None."""
    pixels = int(painter.totals.pixels[value])
    data = int(painter.totals.pixels[:NODATA].sum())
    return pixels, pixels / data if data else 0.0, painter.totals.area_m2(value)


def _geometries(
    polygons: Sequence[shapely.Polygon], georeference: Georeference | None
) -> Sequence[shapely.Geometry | None]:
    return polygons if georeference is None else placed(polygons, georeference)
