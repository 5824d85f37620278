"""Where a raster says that it lies: a transform, a world file beside it, or ground control points that one fits.

Ground control points count as a georeference only where one affine transform fits all of them to within
`MAX_RESIDUAL` pixels, and the misfit is always told. Rational polynomial coefficients need the height of the ground, so
they are told and not used. A transform without a coordinate reference system gives a grid and no place on Earth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.io import DatasetReader

from rs_tools.geometry.measures import Georeference
from rs_tools.imagery.beside import Beside

MAX_RESIDUAL = 2.0  # pixels


@dataclass(frozen=True)
class Place:
    """What is known of a raster's place.

    Attributes:
        crs_wkt: coordinate reference system, also where it gives no place on Earth; None where there is none.
        georeference: None where pixels have no known place.
        warnings: what a user of places, or of their absence, should know.
        grid: from pixels to map units where no coordinate reference system says which; None where there is a place.
        origin: what place or grid come from; empty where there is neither.
    """

    crs_wkt: str | None
    georeference: Georeference | None
    warnings: tuple[str, ...]
    grid: Affine | None = None
    origin: str = ""


def placed(dataset: DatasetReader, beside: Beside) -> Place:
    """The place of a raster, from its transform, else from its ground control points or from what lies beside it."""
    rational = "rational polynomial coefficients (RPCs)"
    if dataset.rpcs is None:
        rational = f"RPCs in {beside.rational} beside it" if beside.rational else ""
    points, points_crs = dataset.gcps
    if dataset.crs is None and points:
        return _by_points(dataset, points, points_crs)
    transform, origin, refused = dataset.transform, "transform", ()
    if not points and transform == Affine.identity():
        transform, origin, refused = beside.world, f"world file {beside.name}", beside.refused
    if dataset.crs is None:
        return _without_crs(transform, origin, refused, rational, beside)
    wkt = dataset.crs.to_wkt()
    georeference = None
    if transform is not None:
        georeference = Georeference.of(wkt, transform, dataset.width, dataset.height)
    warnings = [*refused]
    if georeference is None:
        warnings.append("The coordinate reference system or transform gives no place on Earth: answers are in pixels.")
    elif transform == beside.world:
        warnings.append(f"The place of the pixels comes from {beside.name} beside the image.")
    if rational:
        warnings.append(f"The image also has {rational}, which are not used.")
    return Place(wkt, georeference, tuple(warnings), origin=origin if georeference else "")


def _without_crs(
    transform: Affine | None, origin: str, refused: tuple[str, ...], rational: str, beside: Beside
) -> Place:
    if transform is not None and transform.is_degenerate:
        transform = None
    if rational:
        told = (
            f"The image has {rational} only; orthorectify it first (gdalwarp -rpc) to get places on Earth. Answers are "
            "in pixels."
        )
    elif transform is None:
        told = "The image has no coordinate reference system: answers are in pixels, without places on Earth."
    else:
        told = (
            f"The image has no coordinate reference system, only a grid (from its {origin}): answers are in pixels, "
            "masks also on that grid, without places on Earth."
        )
    warnings = [told, *refused]
    if beside.projection:
        warnings.append(f"{beside.projection} beside it is not read; put it into the image (gdal_edit.py -a_srs).")
    return Place(None, None, tuple(warnings), transform, origin if transform else "")


def _by_points(dataset: DatasetReader, points: Sequence[GroundControlPoint], crs: CRS | None) -> Place:
    told = f"The image has {len(points)} ground control points and no transform"
    advice = "Answers are in pixels; warp it first (gdalwarp -tps) to get places on Earth."
    wkt = crs.to_wkt() if crs else None
    if wkt is None:
        return Place(None, None, (f"{told}, and the points have no coordinate reference system. {advice}",))
    fitted = fit_transform(points)
    if fitted is None:
        return Place(wkt, None, (f"{told}; they are too few, or in one line. {advice}",))
    transform, worst = fitted
    if worst > MAX_RESIDUAL:
        miss = f"the transform that fits them best misses one by {worst:.3g} pixels"
        return Place(wkt, None, (f"{told}; {miss}. {advice}",))
    georeference = Georeference.of(wkt, transform, dataset.width, dataset.height)
    if georeference is None:
        return Place(wkt, None, (f"{told}; they give no place on Earth. {advice}",))
    fit = f"{told}; places come from the one that fits them, to within {worst:.2g} pixels."
    return Place(wkt, georeference, (fit,), origin="ground control points")


def fit_transform(points: Sequence[GroundControlPoint]) -> tuple[Affine, float] | None:
    """The affine transform that fits ground control points best (least squares), and its largest miss in pixels.

    None for fewer than four points (three are fitted whatever they say) or points in one line.
    """
    pixels = np.array([[point.col, point.row] for point in points], float)
    places = np.array([[point.x, point.y] for point in points], float)
    if len(points) < 4 or not np.isfinite([pixels, places]).all():
        return None
    # Both centred and scaled to about one, so that neither large coordinates nor small steps cost precision.
    centre, origin = pixels.mean(axis=0), places.mean(axis=0)
    spread = max(float(np.abs(pixels - centre).max()), 1.0)
    system = np.column_stack([(pixels - centre) / spread, np.ones(len(points))])
    solution, _, rank, _ = np.linalg.lstsq(system, places - origin, rcond=1e-9)
    if rank < 3:
        return None
    (a, d), (b, e) = solution[:2] / spread
    shift = solution[2] + origin
    transform = Affine(a, b, shift[0] - a * centre[0] - b * centre[1], d, e, shift[1] - d * centre[0] - e * centre[1])
    if transform.is_degenerate:
        return None
    misses = np.linalg.solve(np.array([[a, b], [d, e]]), (system @ solution - (places - origin)).T)
    return transform, float(np.hypot(*misses).max())
