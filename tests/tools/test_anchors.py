"""Anchors from annual embedding rasters: decoding, places, years, missing data."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning
from rasters import opened, write

from rs_tools.errors import ImageError, InputError, RegionError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.anchors import EmbeddingLayers, dequantise, year_of

# 45 x 35 pixels of 10 m in UTM zone 10N, and the same ground as a scene of 5 m.
LEFT, TOP = 550_000, 4_180_000
DOWN = Affine(10, 0, LEFT, 0, -10, TOP)
UP = Affine(10, 0, LEFT, 0, 10, TOP - 350)
SCENE = Affine(5, 0, LEFT, 0, -5, TOP)
NAMES = [f"A{axis:02d}" for axis in range(64)]


def ground() -> np.ndarray:
    """int8 [64, 35, 45], north up: axis 0 tells the row, axis 1 the column, the rest is noise."""
    values = np.random.default_rng(0).integers(-127, 128, (64, 35, 45)).astype(np.int8)
    values[0] = np.arange(35)[:, None]
    values[1] = np.arange(45)[None, :]
    return values


def scene(folder: Path, crs: str | None = "EPSG:32610") -> Path:
    profile: dict[str, Any] = {"crs": crs, "transform": SCENE} if crs else {}
    return write(folder / "scene.tif", np.full((3, 70, 90), 100, np.uint8), colors=["red", "green", "blue"], **profile)


def layer(path: Path, values: np.ndarray, transform: Affine = DOWN, **profile: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"descriptions": NAMES, "nodata": -128, "crs": "EPSG:32610", **profile}
    return write(path, values, transform=transform, **profile)


def layers(folder: Path) -> EmbeddingLayers:
    return EmbeddingLayers(AccessPolicy([folder]), "annual")


def test_stored_bytes_become_the_published_values_and_no_data_becomes_nan() -> None:
    raw = np.zeros((3, 64), np.int8)
    raw[0, :3] = 127, -127, 1
    raw[2, 5] = -128
    vectors = dequantise(raw)
    assert vectors.dtype == np.float32
    assert vectors[0, :3] == pytest.approx([(127 / 127.5) ** 2, -((127 / 127.5) ** 2), (1 / 127.5) ** 2])
    assert not vectors[1].any()
    assert np.isnan(vectors[2]).all()


def test_real_vectors_are_values_of_this_code_and_of_unit_length(labelled_data: Path) -> None:
    for path in sorted((labelled_data / "aef_points").glob("*.csv")):
        with path.open(newline="") as file:
            vectors = np.array([[row[f"a{axis:02d}"] for axis in range(64)] for row in csv.DictReader(file)], float)
        bytes_ = np.round(np.sign(vectors) * np.sqrt(np.abs(vectors)) * 127.5).astype(np.int8)
        assert np.abs(dequantise(bytes_) - vectors).max() < 1e-6
        assert np.abs(np.linalg.norm(dequantise(bytes_), axis=1) - 1).max() < 0.02


@pytest.mark.parametrize("transform", [DOWN, UP])
def test_anchors_stand_where_their_vectors_come_from_also_in_bottom_up_files(tmp_path: Path, transform: Affine) -> None:
    values = ground()
    stored = values if transform is DOWN else values[:, ::-1]
    layer(tmp_path / "annual/2024/10N/x-0000000000-0000000000.tiff", np.ascontiguousarray(stored), transform)
    found = layers(tmp_path).anchors(opened(scene(tmp_path)), 2024, nodes=5)
    assert found.vectors.shape == (25, 64)
    assert found.warnings == ()
    assert found.sources == ("x-0000000000-0000000000.tiff",)
    row, column = (found.positions * (35, 45)).astype(int).T
    assert np.array_equal(found.vectors, dequantise(values[:, row, column].T))
    assert found.positions[0] == pytest.approx([0.1, 0.1])
    assert found.positions[1] == pytest.approx([0.1, 0.3])


def test_a_region_has_anchors_of_its_own(tmp_path: Path) -> None:
    layer(tmp_path / "annual/2024/a.tif", ground())
    found = layers(tmp_path).anchors(opened(scene(tmp_path)), 2024, nodes=1, region=[41, 20, 61, 30])
    assert found.positions.tolist() == [[0.5, 0.5]]
    assert np.round(np.sqrt(found.vectors[0, :2]) * 127.5).tolist() == [12, 25]  # y 25 and x 51 of 5 m


def test_places_between_zones_and_files_are_taken_from_the_file_that_knows_them(tmp_path: Path) -> None:
    values = ground()
    layer(tmp_path / "annual/2024/west.tif", values[:, :, :16])
    hole = values.copy()
    hole[:, :, :16] = -128
    hole[:, 3] = -128
    layer(tmp_path / "annual/2024/whole.tif", hole)
    found = layers(tmp_path).anchors(opened(scene(tmp_path)), 2024, nodes=5)
    # The second file lacks row 3, where the first row of nodes lies; the first knows its two western ones.
    assert len(found.vectors) == 22
    assert found.sources == ("west.tif", "whole.tif")
    assert found.warnings == ("3 of 25 anchors have no embedding and were left out.",)


def test_a_scene_in_another_projection_finds_its_place(tmp_path: Path) -> None:
    values = ground()
    layer(tmp_path / "annual/2024/a.tif", values)
    utm = opened(scene(tmp_path))
    assert utm.georeference is not None
    (west, north), (east, south) = utm.georeference.lonlat(np.array([[20.0, 20.0], [60.0, 40.0]]))
    degrees = Affine((east - west) / 50, 0, west, 0, (south - north) / 50, north)
    path = write(tmp_path / "lonlat.tif", np.full((1, 50, 50), 9, np.uint8), crs="EPSG:4326", transform=degrees)
    found = layers(tmp_path).anchors(opened(path), 2024, nodes=3)
    cells = np.floor(utm.georeference.pixels(found.lonlat) / 2).astype(int)
    assert np.array_equal(found.vectors, dequantise(values[:, cells[:, 1], cells[:, 0]].T))


def test_each_year_has_its_layer_and_the_nearest_stands_in_with_a_warning(tmp_path: Path) -> None:
    for year in (2018, 2021):
        layer(tmp_path / f"annual/{year}/10N/a.tif", np.full((64, 35, 45), year - 2000, np.int8))
    found = layers(tmp_path)
    assert found.years == (2018, 2021)
    image = opened(scene(tmp_path))
    for asked, used in ((2018, 2018), (2021, 2021), (2026, 2021), (2010, 2018)):
        anchors = found.anchors(image, asked, nodes=2)
        assert anchors.year == used
        assert np.allclose(anchors.vectors, ((used - 2000) / 127.5) ** 2)
        assert bool(anchors.warnings) == (asked != used)


def test_a_place_without_embeddings_has_no_anchors(tmp_path: Path) -> None:
    layer(tmp_path / "annual/2024/a.tif", ground(), Affine(10, 0, LEFT + 10_000, 0, -10, TOP))
    found = layers(tmp_path).anchors(opened(scene(tmp_path)), 2024)
    assert found.vectors.shape == (0, 64)
    assert found.positions.shape == (0, 2)
    assert "25 of 25" in found.warnings[0]


def test_bands_are_found_by_name_and_decimal_exports_are_read_as_they_are(tmp_path: Path) -> None:
    values = dequantise(np.moveaxis(ground(), 0, -1))
    values[3] = np.nan
    backwards = np.ascontiguousarray(np.moveaxis(values, -1, 0)[::-1])
    layer(tmp_path / "annual/2024/a.tif", backwards, descriptions=NAMES[::-1], nodata=None)
    found = layers(tmp_path).anchors(opened(scene(tmp_path)), 2024, nodes=5)
    assert len(found.vectors) == 20
    row, column = (found.positions * (35, 45)).astype(int).T
    assert np.array_equal(found.vectors, values[row, column])


def test_anchors_are_saved_as_the_published_code_reads_them(tmp_path: Path) -> None:
    layer(tmp_path / "annual/2024/a.tif", ground())
    found = layers(tmp_path).anchors(opened(scene(tmp_path)), 2024, nodes=2)
    found.save(tmp_path / "anchors.npz")
    with np.load(tmp_path / "anchors.npz", allow_pickle=False) as saved:
        assert np.array_equal(saved["features"], found.vectors)
        assert np.array_equal(saved["positions"], found.positions)


def test_what_cannot_be_answered_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "annual").mkdir()
    with pytest.raises(ImageError, match="named by year"):
        layers(tmp_path)
    layer(tmp_path / "annual/2024/a.tif", ground())
    found = layers(tmp_path)
    with pytest.warns(NotGeoreferencedWarning):
        nowhere = opened(scene(tmp_path, crs=None))
    with pytest.raises(ImageError, match="no known place"):
        found.anchors(nowhere, 2024)
    image = opened(scene(tmp_path))
    with pytest.raises(InputError, match="1 to 64"):
        found.anchors(image, 2024, nodes=65)
    with pytest.raises(RegionError):
        found.anchors(image, 2024, region=[0, 0, 900, 900])
    write(tmp_path / "annual/2023.tif", np.ones((3, 4, 4), np.uint8), crs="EPSG:32610", transform=DOWN)
    with pytest.raises(ImageError, match="3 bands of uint8"):
        layers(tmp_path).anchors(image, 2023)


@pytest.mark.parametrize(
    ("path", "year"),
    [("v1/annual/2019/1S/xj20170101-0-8192.tiff", 2019), ("aef_2024_sf.tif", 2024), ("2020/aef_2024.tif", 2020),
     ("x120245.tif", None)],
)  # fmt: skip
def test_the_year_is_read_from_folders_then_from_the_name(path: str, year: int | None) -> None:
    assert year_of(Path(path)) == year


def test_reading_anchors_needs_no_torch() -> None:
    code = "import rs_tools.imagery.anchors, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
