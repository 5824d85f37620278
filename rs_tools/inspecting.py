"""What images there are, and what the header and a little of the pixels say of one. No model is asked."""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path
from typing import Literal

from rs_tools.calls import elapsed, scene_provenance
from rs_tools.errors import PerceptionError
from rs_tools.imagery.access import AccessPolicy, in_unicode, stamp_of
from rs_tools.imagery.scene import Scene
from rs_tools.results import Band, InspectResult, ListedImage, ListResult, Provenance

MAX_LISTED = 200

_NOT_FINITE: dict[str, Literal["nan", "inf", "-inf"]] = {"nan": "nan", "inf": "inf", "-inf": "-inf"}


def inspection(scene: Scene, started: float) -> InspectResult:
    """Everything `inspect_image` tells of a scene."""
    georeference = scene.georeference
    whole = scene.region([])
    area_m2 = georeference.area_m2(whole) if georeference else None
    nodata = scene.nodata
    return InspectResult(
        width=scene.width,
        height=scene.height,
        band_count=len(scene.bands),
        bands=[Band(index=band.index, description=band.description, color=band.color) for band in scene.bands],
        dtype=scene.bands[0].dtype,
        nodata=nodata if nodata is None or math.isfinite(nodata) else _NOT_FINITE[str(nodata)],
        crs_wkt=scene.crs_wkt,
        epsg=georeference.epsg if georeference else None,
        bounds_wgs84=georeference.bounds(scene.width, scene.height) if georeference else None,
        gsd_m=georeference.gsd_m(whole) if georeference else None,
        area_km2=None if area_m2 is None else area_m2 / 1e6,
        modality=scene.modality,
        modality_reason=scene.modality_reason,
        georeferenced=georeference is not None,
        warnings=list(scene.warnings),
        provenance=scene_provenance(scene, started),
    )


def listing(policy: AccessPolicy, folder: str) -> ListResult:
    """The readable images below a folder (empty: below all allowed folders), at most `MAX_LISTED`."""
    started = time.perf_counter()
    paths = list(islice(policy.images(folder), MAX_LISTED + 1))
    images: list[ListedImage] = []
    unreadable: list[str] = []
    for path in paths[:MAX_LISTED]:
        if not in_unicode(path):
            unreadable.append(f"The name of {path.name!a} is not Unicode text, which no answer can hold: rename it.")
            continue
        try:
            images.append(_listed(policy, path))
        except PerceptionError as error:
            unreadable.append(str(error))
    warnings = unreadable[:5]
    if len(unreadable) > len(warnings):
        warnings.append(f"{len(unreadable) - len(warnings)} more files cannot be read.")
    return ListResult(
        images=images,
        roots=[str(root) for root in policy.roots],
        truncated=len(paths) > MAX_LISTED,
        warnings=warnings,
        provenance=Provenance(elapsed_s=elapsed(started)),
    )


def _listed(policy: AccessPolicy, path: Path) -> ListedImage:
    real = policy.resolve(str(path))
    with policy.open(real) as dataset:
        return ListedImage(
            image=str(path),
            width=dataset.width,
            height=dataset.height,
            band_count=dataset.count,
            dtype=dataset.dtypes[0],
            bytes=stamp_of(real).size,
        )
