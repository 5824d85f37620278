"""Objects and areas as files of vectors: GeoJSON (RFC 7946)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from rs_tools.results import Provenance

PIXEL_SPACE = "image pixels: x right, y down, from the top-left corner; not longitude and latitude"


@dataclass(frozen=True)
class Feature:
    """One object of a vector file. `geometry`: lon/lat, or pixels in the pixel-space variant; None: no known place."""

    geometry: shapely.Geometry | None
    properties: dict[str, Any]


def decimals(gsd_m: float | None) -> int:
    """Decimals of a degree that keep a fiftieth of a pixel."""
    if not gsd_m:
        return 8
    return min(12, max(6, math.ceil(-math.log10(gsd_m / 111_320 / 50))))


def write_geojson(
    path: Path,
    features: Iterable[Feature],
    provenance: Provenance,
    warnings: Sequence[str],
    *,
    lonlat: bool,
    gsd_m: float | None,
) -> None:
    """One feature a line, as they come; the arguments are those of `store.ArtifactStore.vectors`."""
    digits = decimals(gsd_m) if lonlat else 2
    head: dict[str, Any] = {"type": "FeatureCollection"}
    if not lonlat:
        head["coordinate_space"] = PIXEL_SPACE
    head |= {"provenance": provenance.model_dump(), "warnings": list(warnings)}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head, allow_nan=False)[:-1] + ', "features": [')
        for i, feature in enumerate(features):
            file.write(",\n" if i else "\n")
            file.write(_feature_json(i, feature, digits))
        file.write("\n]}\n")


def _feature_json(number: int, feature: Feature, digits: int) -> str:
    if feature.geometry is None:
        geometry = "null"
    else:
        rounded = shapely.transform(feature.geometry, lambda points: np.round(points, digits))
        geometry = shapely.to_geojson(rounded)
    properties = json.dumps(feature.properties, allow_nan=False, ensure_ascii=False)
    return f'{{"type": "Feature", "id": {number}, "geometry": {geometry}, "properties": {properties}}}'
