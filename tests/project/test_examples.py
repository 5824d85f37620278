"""The analyses of examples/ as a reader runs them: real processes, the embedded weights, the files that they write."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
from pyproj import Geod
from shapely.geometry import shape

EXAMPLES = Path(__file__).parents[2] / "examples"
SCENES = EXAMPLES / "data"


def run(
    name: str, *arguments: str | Path, at: Path, state: Path, code: str = "", expected: int = 0
) -> subprocess.CompletedProcess[str]:
    """An example run in the folder `at`, after `code`."""
    program = f"{code}\nimport runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"RS_PERCEPTION_STATE": str(state)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=at, env=environment)
    assert done.returncode == expected, done.stderr
    assert "Traceback" not in done.stderr
    return done


def plain_tile(path: Path, value: int, nodata: int | None = None) -> Path:
    profile = {"driver": "GTiff", "width": 64, "height": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:32617"}
    transform = rasterio.Affine(0.1, 0, 404200, 0, -0.1, 3285100)
    with rasterio.open(path, "w", **profile, transform=transform, nodata=nodata) as file:
        file.write(np.full((3, 64, 64), value, "uint8"))
    return path


def test_the_inventory_counts_and_measures_the_trees_that_it_writes(tmp_path: Path, own_state: Path) -> None:
    done = run("tree_inventory.py", at=tmp_path, state=own_state)
    trees = json.loads((tmp_path / "out" / "ordway_swisher_neon_trees.geojson").read_text())["features"]
    assert trees
    assert f"{len(trees)} boxes on 0.16 ha" in done.stdout
    every = next(line.split() for line in done.stdout.splitlines() if line.startswith(" >= 0.0"))
    assert (int(every[2]), float(every[3])) == (len(trees), pytest.approx(len(trees) / 0.16, rel=0.01))
    with rasterio.open(SCENES / "ordway_swisher_neon.tif") as scene:
        west, south, east, north = rasterio.warp.transform_bounds(scene.crs, "EPSG:4326", *scene.bounds)
    for tree in trees:
        x1, y1, x2, y2 = tree["properties"]["bbox_px"]
        sides_m = np.sqrt((x2 - x1) * (y2 - y1)) * 0.1
        assert tree["properties"]["crown_m"] == pytest.approx(sides_m, abs=0.02)
        box = shape(tree["geometry"])
        assert abs(Geod(ellps="WGS84").geometry_area_perimeter(box)[0]) == pytest.approx(sides_m**2, rel=0.01)
        assert west - 1e-6 <= box.bounds[0] < box.bounds[2] <= east + 1e-6
        assert south - 1e-6 <= box.bounds[1] < box.bounds[3] <= north + 1e-6
    expected = sum(tree["properties"]["score"] for tree in trees)
    assert f"they promise {expected:.1f} of {len(trees)}" in done.stdout


def test_the_inventory_says_why_there_is_none(tmp_path: Path, own_state: Path) -> None:
    nowhere = run("tree_inventory.py", SCENES / "yellowstone_road.jpg", at=tmp_path, state=own_state, expected=1)
    assert "no hectares" in nowhere.stderr
    absent = run("tree_inventory.py", "absent.tif", at=tmp_path, state=own_state, expected=1)
    assert "absent.tif" in absent.stderr
    empty = run("tree_inventory.py", plain_tile(tmp_path / "empty.tif", 0, 0), at=tmp_path, state=own_state)
    assert "No tree was found" in empty.stdout
    without = {"code": "import sys; sys.modules['geopandas'] = None", "at": tmp_path, "state": own_state}
    assert "rs-perception[geo]" in run("tree_inventory.py", **without, expected=1).stderr
    assert not (tmp_path / "out").exists()


def test_the_triage_has_a_row_for_each_image_with_its_doubts(tmp_path: Path, own_state: Path) -> None:
    done = run("triage.py", at=tmp_path, state=own_state)
    with (tmp_path / "out" / "triage.csv").open(newline="", encoding="utf-8") as file:
        rows = {Path(row["image"]).name: row for row in csv.DictReader(file)}
    assert set(rows) == {path.name for path in SCENES.iterdir() if path.suffix != ".md"}
    assert float(rows["itaipu_landsat8.tif"]["gsd_m"]) == pytest.approx(30, rel=0.01)
    assert "it learned from" in rows["itaipu_landsat8.tif"]["doubts"]
    assert "no coordinate reference system" in rows["yellowstone_road.jpg"]["doubts"]
    assert "multispectral" in rows["raleigh_landsat7.tif"]["doubts"]
    counts = [len(row["doubts"].split(" | ")) if row["doubts"] else 0 for row in rows.values()]
    assert counts == sorted(counts, reverse=True)
    said = done.stdout.split("To look at closer")[1]
    assert all(doubt in said for row in rows.values() for doubt in row["doubts"].split(" | "))
    for row in rows.values():
        for thing in ("water", "forest"):
            assert bool(row[f"{thing}_share"]) == (row[thing] == "yes")
            assert bool(row[f"{thing}_m2"]) == (row[thing] == "yes" and row["gsd_m"] != "")


def test_the_triage_carries_refusals_and_abstentions_and_goes_on(tmp_path: Path, own_state: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    plain_tile(folder / "empty.tif", 0, 0)
    (folder / "broken.tif").write_bytes((SCENES / "itaipu_landsat8.tif").read_bytes()[:400_000])
    run("triage.py", folder, at=tmp_path, state=own_state)
    with (tmp_path / "out" / "triage.csv").open(newline="", encoding="utf-8") as file:
        broken, empty = csv.DictReader(file)
    assert broken["doubts"].startswith("refused: ")
    assert broken["class"] == ""
    assert empty["water"] == "unsure"
    assert "water_m2" not in empty  # of neither image
    assert "water: not certain enough to say" in empty["doubts"]
    absent = run("triage.py", tmp_path / "absent", at=tmp_path, state=own_state, expected=1)
    assert "absent" in absent.stderr
