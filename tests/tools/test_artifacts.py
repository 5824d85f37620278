"""Files of answers: readable by GIS software, whole or absent, unguessable, and gone in time."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import CRS

from rs_tools.artifacts.features import PIXEL_SPACE, Feature
from rs_tools.artifacts.store import ArtifactStore
from rs_tools.errors import ArtifactError
from rs_tools.preview import class_color
from rs_tools.results import Artifact, Provenance

UTM33 = CRS.from_epsg(32633).to_wkt()
GRID = Affine(10, 0, 400_000, 0, -10, 5_000_000)
CLASSES = {1: "water", 3: "road & rail"}
PROVENANCE = Provenance(model="nano", image_digest="sha256:1")
SHIP = Feature(shapely.box(12.123456789, 45.1, 12.2, 45.2), {"label": "ship", "score": 0.9})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def mask_of(store: ArtifactStore, values: np.ndarray, rows: int = 100, **place) -> Artifact:
    with store.mask((values.shape[1], values.shape[0]), CLASSES, **place) as writer:
        for top in range(0, len(values), rows):
            writer.write(values[top : top + rows])
    return writer.artifact


def random_mask(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array([0, 1, 3, 255], np.uint8), (height, width))


@pytest.mark.parametrize(("rows", "waiting"), [(1, 2**24), (100, 2**24), (5000, 2**24), (7, 700 * 50), (100, 1)])
def test_a_mask_is_a_valid_cog_with_crs_colours_and_class_names(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, rows: int, waiting: int
) -> None:
    monkeypatch.setattr("rs_tools.artifacts.mask._WAITING_BYTES", waiting)
    values = random_mask(1300, 700)
    artifact = mask_of(store, values, rows, crs_wkt=UTM33, transform=GRID)
    assert artifact.mime_type == "application/x-geotiff"
    with rasterio.open(artifact.path) as file:
        np.testing.assert_array_equal(file.read(1), values)
        assert (file.crs.to_epsg(), file.transform, file.nodata) == (32633, GRID, 255)
        assert file.dtypes == ("uint8",)
        assert file.colormap(1)[3] == (*class_color(3), 255)
        assert file.tags(1)["CLASS_3"] == "road & rail"
        # What makes a TIFF cloud optimized: tiles, overviews, and all directories before the first pixels.
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.block_shapes == [(512, 512)]
        assert file.overviews(1) == [2, 4]
        assert sorted(Path(name).name for name in file.files) == [artifact.name, f"{artifact.name}.aux.xml"]
    names = ElementTree.parse(f"{artifact.path}.aux.xml").findall("PAMRasterBand[@band='1']/CategoryNames/Category")
    assert [name.text or "" for name in names] == ["none", "water", "", "road & rail"]


def test_a_crs_that_tiff_cannot_hold_is_kept_beside_it(store: ArtifactStore) -> None:
    wkt = CRS.from_proj4("+proj=ob_tran +o_proj=longlat +o_lat_p=39.25 +o_lon_p=0 +lon_0=18 +ellps=WGS84").to_wkt()
    artifact = mask_of(store, random_mask(20, 30), crs_wkt=wkt, transform=Affine(0.1, 0, -5, 0, -0.1, 5))
    with rasterio.open(artifact.path) as file:
        assert CRS.from_wkt(file.crs.to_wkt()).to_dict() == CRS.from_wkt(wkt).to_dict()
    assert "road &amp; rail" in Path(f"{artifact.path}.aux.xml").read_text()


def test_a_mask_without_a_place_has_no_crs(store: ArtifactStore) -> None:
    with rasterio.open(mask_of(store, random_mask(20, 30)).path) as file:
        assert file.crs is None
        assert file.transform == Affine.identity()


def test_a_mask_of_wrong_rows_is_refused_and_leaves_nothing(store: ArtifactStore) -> None:
    for rows in (np.zeros((4, 6), np.uint8), np.zeros((4, 5)), np.zeros((9, 5), np.uint8)):
        with pytest.raises(ValueError, match="rows"), store.mask((5, 8), CLASSES) as writer:
            writer.write(rows)
    with pytest.raises(ValueError, match="8 rows, 4 were"), store.mask((5, 8), CLASSES) as writer:
        writer.write(np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match="class values"):
        store.mask((5, 8), {255: "x"})
    assert list(store.folder.iterdir()) == []


def test_rows_that_did_not_all_reach_a_full_disk_are_an_error_for_the_caller(store: ArtifactStore) -> None:
    """GDAL tells of them only when it reads them again."""
    noise = np.random.default_rng(0).integers(0, 4, (1100, 600)).astype(np.uint8)

    def written() -> None:
        with store.mask((600, 1100), CLASSES) as writer:
            writer.write(noise[:1024])
            [rows] = store.folder.glob(".writing-*/rows.tif")
            os.truncate(rows, rows.stat().st_size // 2)
            writer.write(noise[1024:])

    with pytest.raises(ArtifactError, match="room on the disk"):
        written()
    assert os.listdir(store.folder) == []


def test_an_error_while_the_rows_are_made_comes_through_as_it_is(store: ArtifactStore) -> None:
    with pytest.raises(TimeoutError), store.mask((5, 8), CLASSES):
        raise TimeoutError
    assert list(store.folder.iterdir()) == []


def test_vectors_are_geojson_in_lonlat_with_score_and_provenance(store: ArtifactStore) -> None:
    lost = Feature(None, {"label": "ship", "score": 0.4})
    artifact = store.vectors([SHIP, lost], PROVENANCE, ["clouds"], gsd_m=10)
    assert artifact.name.endswith(".geojson")
    assert artifact.mime_type == "application/geo+json"
    found = json.loads(Path(artifact.path).read_text())
    assert (found["type"], found["warnings"], "crs" in found) == ("FeatureCollection", ["clouds"], False)
    assert found["provenance"]["model"] == "nano"
    first, second = found["features"]
    assert first["properties"] == {"label": "ship", "score": 0.9}
    assert shapely.geometry.shape(first["geometry"]).bounds == (12.123457, 45.1, 12.2, 45.2)
    assert (second["geometry"], second["id"]) == (None, 1)


def test_vectors_in_pixels_say_so_and_do_not_pass_for_geojson(store: ArtifactStore) -> None:
    artifact = store.vectors([Feature(shapely.box(1, 2, 30.5, 40), {"label": "ship"})], PROVENANCE, lonlat=False)
    assert artifact.name.endswith(".pixels.json")
    assert artifact.mime_type == "application/json"
    found = json.loads(Path(artifact.path).read_text())
    assert found["coordinate_space"] == PIXEL_SPACE
    assert shapely.geometry.shape(found["features"][0]["geometry"]).bounds == (1, 2, 30.5, 40)


def test_no_object_is_an_empty_collection(store: ArtifactStore) -> None:
    assert json.loads(Path(store.vectors([], PROVENANCE).path).read_text())["features"] == []


def test_not_a_number_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.vectors([Feature(None, {"score": float("nan")})], PROVENANCE)
    assert list(store.folder.iterdir()) == []


def test_names_cannot_be_guessed_and_uris_lead_back(store: ArtifactStore) -> None:
    artifacts = [store.preview(b"png") for _ in range(20)]
    assert len({artifact.name for artifact in artifacts}) == 20
    for artifact in artifacts:
        assert re.fullmatch(r"preview-[0-9a-f]{32}\.png", artifact.name)
        assert artifact.uri == f"rs-artifact://{artifact.name}"
        assert store.resolve(artifact.uri) == Path(artifact.path)
        assert Path(artifact.path).parent == store.folder


@pytest.mark.parametrize(
    "uri",
    [
        "rs-artifact://../secret",
        "rs-artifact:///etc/passwd",
        "rs-artifact://preview-0.png",
        "rs-artifact://" + "preview-" + "0" * 32 + ".png",
        "rs-artifact://x/../preview-" + "0" * 32 + ".png",
        "preview-" + "0" * 32 + ".png",
        "file:///etc/passwd",
        "",
        "rs-artifact://preview-" + "0" * 32 + ".png\0",
        "rs-artifact://preview-" + "0" * 32 + ".png\n",
    ],
)
def test_nothing_else_resolves(store: ArtifactStore, uri: str) -> None:
    with pytest.raises(ArtifactError):
        store.resolve(uri)


def test_a_link_in_the_folder_leads_nowhere(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    name = "preview-" + "0" * 32 + ".png"
    (store.folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError):
        store.resolve(f"rs-artifact://{name}")


def aged(artifact: Artifact, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(artifact.path, (then, then))


def test_files_past_their_lifetime_are_gone_at_once_and_removed_later(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path, lifetime_s=3600)
    (tmp_path / "notes.txt").write_text("not an artifact")
    os.utime(tmp_path / "notes.txt", (0, 0))
    old, young = mask_of(store, random_mask(5, 5)), store.preview(b"png")
    aged(old, 4000)
    with pytest.raises(ArtifactError, match="kept 1 hours"):
        store.resolve(old.uri)
    assert store.resolve(young.uri)
    store.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", young.name]


def test_a_full_folder_loses_the_oldest_first_and_never_what_is_being_written(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path, max_bytes=10_000)
    artifacts = [store.preview(bytes(3000)) for _ in range(3)]
    for age, artifact in zip((30, 10, 20), artifacts, strict=True):
        aged(artifact, age)
    with store.mask((5, 8), CLASSES) as writer:
        store.preview(bytes(3000))
        writer.write(np.zeros((8, 5), np.uint8))
        assert [Path(artifact.path).exists() for artifact in artifacts] == [False, True, True]
    assert Path(writer.artifact.path).exists()
    with pytest.raises(ArtifactError, match="smaller region"):
        store.preview(bytes(10_001))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000


def test_what_a_dead_writer_left_is_swept_but_not_what_another_still_writes(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path, lifetime_s=3600)
    for name, age in ((".writing-dead", 4000), (".writing-alive", 10)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file.tif").write_bytes(b"half")
        for path in (folder / "file.tif", folder):
            os.utime(path, (time.time() - age, time.time() - age))
    store.sweep()
    assert [path.name for path in tmp_path.iterdir()] == [".writing-alive"]


def test_a_folder_that_cannot_be_made_is_an_error_for_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="Name another"):
        ArtifactStore(tmp_path / "file" / "below")
