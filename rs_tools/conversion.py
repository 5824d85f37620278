"""Answers in the forms that scripts go on with: dictionaries, GeoJSON, GeoDataFrames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rs_tools.errors import ArtifactError

if TYPE_CHECKING:  # as `rs_tools` itself: cheap to import
    import geopandas

    from rs_tools.results import DetectChangeResult, GroundResult, Result, SegmentResult

    Placed = GroundResult | SegmentResult | DetectChangeResult


OBJECT_COLUMNS = ("label", "score", "bbox_px")  # of a frame of boxes
AREA_COLUMNS = ("label", "value", "pixels", "area_m2", "score")  # of outlines of classes or of change


def to_dict(result: Result) -> dict[str, Any]:
    """An answer as plain dictionaries, lists, strings and numbers, fit for JSON."""
    return result.model_dump(mode="json")


def to_geojson(result: Placed) -> dict[str, Any]:
    """The boxes, outlines or changed regions of an answer as a FeatureCollection, also those that it does not list.

    Coordinates are lon/lat (RFC 7946). Where the image has no place on Earth they are pixels, and the collection says
    so in its member `coordinate_space`.

    Raises:
        ArtifactError: the answer's file of vectors is gone: it is kept for a day.
    """
    path = next((Path(file.path) for file in result.artifacts if file.kind == "vectors"), None)
    if path is None:  # nothing was looked at
        return {"type": "FeatureCollection", "features": []}
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is gone, for files of answers are kept for a day: ask again.") from error


def to_geodataframe(result: Placed) -> geopandas.GeoDataFrame:
    """The same as a GeoDataFrame with a row for each feature; in EPSG:4326, or without CRS where it is in pixels.

    Its columns are there without rows, too. `attrs` holds the answer's `warnings` and `provenance`.

    Raises:
        ModuleNotFoundError: geopandas is not installed.
        ArtifactError: as of `to_geojson`.
    """
    try:
        import geopandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a GeoDataFrame needs geopandas: pip install 'rs-perception[geo]'; to_geojson works without it",
            name=error.name,
        ) from error
    from rs_tools.results import GroundResult

    collection = to_geojson(result)
    crs = None if "coordinate_space" in collection or not result.georeferenced else "EPSG:4326"
    if collection["features"]:
        frame = geopandas.GeoDataFrame.from_features(collection["features"], crs=crs)
    else:
        columns = OBJECT_COLUMNS if isinstance(result, GroundResult) else AREA_COLUMNS
        frame = geopandas.GeoDataFrame({name: [] for name in columns}, geometry=[], crs=crs)
    frame.attrs |= {"warnings": result.warnings, "provenance": result.provenance.model_dump(mode="json")}
    return frame
