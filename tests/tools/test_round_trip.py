"""An object's polygon in the GeoJSON and its pixels in the mask COG are the same ground, as a GIS reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from pyproj import CRS
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from rs_tools.artifacts.features import Feature
from rs_tools.artifacts.store import ArtifactStore
from rs_tools.geometry.blending import Blender
from rs_tools.geometry.measures import Georeference, MaskTotals, TileFrame
from rs_tools.geometry.vectors import MaskOutliner, measured, placed, simplified
from rs_tools.imagery.tiling import tile_grid
from rs_tools.results import Provenance

WIDTH, HEIGHT = 700, 500
REGION = (90, 60, 650, 470)
CUSTOM = CRS.from_proj4("+proj=laea +lat_0=47.3 +lon_0=11.4 +x_0=5000 +y_0=3000 +ellps=GRS80 +units=m").to_wkt()
PLACES = {
    "north-up UTM": (CRS.from_epsg(32633).to_wkt(), Affine(10, 0, 400_000, 0, -10, 5_000_000)),
    "rotated": (CRS.from_epsg(32633).to_wkt(), Affine(8, 6, 400_000, 6, -8, 5_000_000)),
    "sheared": (CRS.from_epsg(32633).to_wkt(), Affine(9, 4, 400_000, 1, -8, 5_000_000)),
    "bottom-up": (CRS.from_epsg(32633).to_wkt(), Affine(10, 0, 400_000, 0, 10, 5_000_000)),
    "degrees": (CRS.from_epsg(4326).to_wkt(), Affine(0.0001, 0, 10.5, 0, -0.0001, 60.2)),
    "no EPSG code": (CUSTOM, Affine(5, 0, -2000, 0, -5, 4000)),
    "antimeridian": (CRS.from_epsg(32660).to_wkt(), Affine(200, 0, 660_000, 0, -200, 6_500_000)),
}


def scene() -> np.ndarray:
    """Probabilities of two classes, [2, H, W]: a slanted ship-like bar, a lake with an island, a field."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bar = (np.abs((x - 300) * 0.6 - (y - 200) * 0.8) < 9) & (np.abs((x - 300) * 0.8 + (y - 200) * 0.6) < 120)
    radius = np.hypot(x - 520, (y - 330) * 1.4)
    lake = (radius < 100) & (radius > 30)
    field = (np.abs(x - 200) < 50) & (np.abs(y - 380) < 40)
    return np.stack([bar | field, lake]).astype(np.float32) * 0.8


@pytest.mark.parametrize("place", PLACES)
def test_polygons_and_pixels_of_an_object_cover_the_same_ground(place: str, tmp_path: Path) -> None:
    wkt, transform = PLACES[place]
    georeference = Georeference.of(wkt, transform, WIDTH, HEIGHT)
    assert georeference is not None
    store, truth = ArtifactStore(tmp_path), scene()
    plan = tile_grid(REGION, 128, 32)
    x1, y1, x2, y2 = REGION
    blender = Blender([TileFrame(one, plan.size(one)) for one in plan.regions], REGION, 2)
    outliner, totals = MaskOutliner(x2 - x1, origin=(x1, y1), min_pixels=10), MaskTotals(REGION, georeference)
    shapes = []
    grid = transform * Affine.translation(x1, y1)
    with store.mask((x2 - x1, y2 - y1), {1: "built", 2: "water"}, wkt, grid) as writer:
        for i, (left, top, right, bottom) in enumerate(plan.regions):
            for band in blender.add(i, truth[:, top:bottom, left:right]):
                rows = band.mask()
                writer.write(rows)
                totals.add(band.top, rows)
                shapes += outliner.add(rows)
    shapes += outliner.finish()
    shapes = measured(shapes, georeference)
    polygons = placed([simplified(shape.polygon) for shape in shapes], georeference)
    features = [
        Feature(polygon, {"value": shape.value, "pixels": shape.pixels, "area_m2": shape.area_m2})
        for shape, polygon in zip(shapes, polygons, strict=True)
    ]
    vectors = store.vectors(features, Provenance(), gsd_m=georeference.gsd_m((0, 0, WIDTH, HEIGHT)))

    found = json.loads(Path(vectors.path).read_text())["features"]
    assert sorted(one["properties"]["value"] for one in found) == [1, 1, 2]
    with rasterio.open(writer.artifact.path) as mask:
        values = mask.read(1)
        for feature, shape in zip(found, shapes, strict=True):
            # Back from lon/lat with GDAL's own transformation, which knows nothing of this project's.
            geometry = transform_geom("EPSG:4326", mask.crs, feature["geometry"])
            drawn, own = np.zeros((2, *values.shape), np.uint8)
            rasterize([geometry], out=drawn, transform=mask.transform)
            rasterize([shape.polygon], out=own, transform=Affine.translation(x1, y1))
            assert (values[own == 1] == shape.value).all()
            iou = (drawn & own).sum() / (drawn | own).sum()
            assert iou > 0.9, (place, shape.value, iou)
    built = sum(shape.area_m2 or 0 for shape in shapes if shape.value == 1)
    assert built == pytest.approx(totals.area_m2(1), rel=1e-3)
    assert int(totals.pixels[2]) == sum(shape.pixels for shape in shapes if shape.value == 2)
