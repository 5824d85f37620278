"""`detect_change` on real pairs with planted change: on one grid, what does not overlap reported, nothing guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from planted import BLUE, BROWN, PLACED, PlantedModel, over, painted
from rasterio.transform import array_bounds
from rasterio.warp import calculate_default_transform, reproject, transform
from rasters import UTM, features, noise, write

from rs_tools.changing import MAX_REGIONS
from rs_tools.errors import ImageError, PairError, RegionError
from rs_tools.results import DetectChangeResult
from rs_tools.tools import Tools

HEIGHT, WIDTH = 400, 600
LAKE, SOIL = (100, 60, 220, 160), (400, 300, 440, 330)


@pytest.fixture
def tools(tmp_path: Path, model: PlantedModel) -> Tools:
    """Tools over `before.tif`, all green, and `after.tif` with a new lake and new soil; 10 m pixels."""
    images = tmp_path / "images"
    images.mkdir()
    write(images / "before.tif", painted(HEIGHT, WIDTH), **PLACED)
    write(images / "after.tif", painted(HEIGHT, WIDTH, (LAKE, BLUE), (SOIL, BROWN)), **PLACED)
    return over(tmp_path, model)


def values(result: DetectChangeResult) -> np.ndarray:
    with rasterio.open(result.artifacts[0].path) as file:
        return file.read(1)


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for x1, y1, x2, y2 in (LAKE, SOIL):
        mask[y1:y2, x1:x2] = 1
    return mask


async def test_what_changed_is_told_in_regions_figures_words_and_a_mask(tools: Tools, model: PlantedModel) -> None:
    found = await tools.detect_change("before.tif", "after.tif", "new water")
    assert found.changed
    assert [one.bbox_px for one in found.regions] == [list(LAKE), list(SOIL)]
    np.testing.assert_array_equal(values(found), truth())
    assert found.changed_share == pytest.approx(truth().mean())
    assert found.changed_area_m2 == pytest.approx(truth().sum() * 100, rel=0.01)
    assert sum(one.area_m2 or 0 for one in found.regions) == pytest.approx(found.changed_area_m2, rel=1e-3)
    assert found.regions[0].score == pytest.approx(230 / 255, abs=1e-3)
    assert found.overlap_share == 1
    assert found.caption.startswith("2 regions changed: 5.50% of what both images show")
    assert "The largest, 91% of the change, lies in the upper left." in found.caption
    assert '"Green fields" and the later one as "A lake"' in found.caption
    assert any("whether or not it is 'new water'" in warning for warning in found.warnings)
    request = model.requests[0]
    assert (request.task, request.text, request.modality) == ("detect_change", "new water", "optical")
    assert request.gsd_m == pytest.approx(10, rel=1e-3)
    assert found.provenance.task_token == "[CCD]"
    assert len(found.provenance.image_digest.split()) == 2
    [mask, vectors] = found.artifacts
    outlines = features(vectors)
    assert [one["properties"]["pixels"] for one in outlines] == [12_000, 1200]
    with rasterio.open(mask.path) as file:
        assert (file.transform, file.crs.to_epsg()) == (UTM, 32633)


async def test_outlines_of_regions_are_closed_rings_on_earth(tools: Tools) -> None:
    found = await tools.detect_change("before.tif", "after.tif")
    ring = np.array(found.regions[0].polygon_lonlat)
    assert (ring[0] == ring[-1]).all()
    x1, y1, x2, y2 = LAKE
    corners = [UTM * corner for corner in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]
    lon, lat, *_ = transform("EPSG:32633", "EPSG:4326", *zip(*corners, strict=True))
    assert ring.min(axis=0) == pytest.approx((min(lon), min(lat)), abs=2e-6)
    assert ring.max(axis=0) == pytest.approx((max(lon), max(lat)), abs=2e-6)


async def test_the_same_image_twice_has_not_changed_and_nobody_describes_it(tools: Tools, model: PlantedModel) -> None:
    found = await tools.detect_change("before.tif", "before.tif")
    assert (found.changed, found.changed_share, found.regions) == (False, 0, [])
    assert found.caption == "No change was found."
    assert {request.task for request in model.requests} == {"detect_change"}


async def test_a_later_image_in_another_projection_is_laid_on_the_earlier_grid(tools: Tools, tmp_path: Path) -> None:
    after = painted(HEIGHT, WIDTH, (LAKE, BLUE))
    bounds = array_bounds(HEIGHT, WIDTH, UTM)
    grid, width, height = calculate_default_transform("EPSG:32633", "EPSG:3857", WIDTH, HEIGHT, *bounds)
    assert width is not None
    assert height is not None
    moved = np.zeros((3, height, width), np.uint8)
    reproject(after, moved, src_transform=UTM, src_crs="EPSG:32633", dst_transform=grid, dst_crs="EPSG:3857")
    place: dict[str, Any] = PLACED | {"crs": "EPSG:3857", "transform": grid}
    write(tmp_path / "images" / "web.tif", moved, nodata=0, **place)
    found = await tools.detect_change("before.tif", "web.tif")
    assert found.overlap_share > 0.95
    [region] = found.regions
    assert region.bbox_px == pytest.approx(LAKE, abs=2)


async def test_what_the_later_image_does_not_show_is_left_out(tools: Tools, tmp_path: Path) -> None:
    part = painted(HEIGHT, WIDTH, (LAKE, BLUE))[:, :, :300]
    write(tmp_path / "images" / "part.tif", part, **PLACED)
    found = await tools.detect_change("before.tif", "part.tif")
    assert found.overlap_share == pytest.approx(0.5, abs=0.01)
    assert any("50.0% of the earlier image is covered" in warning for warning in found.warnings)
    mask = values(found)
    assert (mask[:, 301:] == 255).all()
    assert (mask[:, :299] != 255).all()
    assert found.changed_share == pytest.approx(truth()[:, :300].mean(), rel=0.01)


async def test_a_region_without_overlap_is_no_answer_about_change(
    tools: Tools, model: PlantedModel, tmp_path: Path
) -> None:
    write(tmp_path / "images" / "part.tif", painted(HEIGHT, 300), **PLACED)
    found = await tools.detect_change("before.tif", "part.tif", region=[400, 0, 600, 400])
    assert (found.changed, found.regions, found.artifacts, model.requests) == (False, [], [], [])
    assert "Nothing in the region can be compared" in found.caption


async def test_a_region_is_in_pixels_of_the_earlier_image_and_so_is_the_answer(tools: Tools) -> None:
    found = await tools.detect_change("before.tif", "after.tif", region=[350, 250, 600, 400])
    assert [one.bbox_px for one in found.regions] == [list(SOIL)]
    assert values(found).shape == (150, 250)
    with pytest.raises(RegionError, match="600x400"):
        await tools.detect_change("before.tif", "after.tif", region=[0, 0, 601, 400])


async def test_a_shift_between_the_two_is_told(tools: Tools, tmp_path: Path) -> None:
    ground = np.kron(noise(3, 100, 150), np.ones((1, 4, 4), np.uint8))
    write(tmp_path / "images" / "a.tif", ground, **PLACED)
    write(tmp_path / "images" / "b.tif", np.roll(ground, (3, 5), axis=(1, 2)), **PLACED)
    found = await tools.detect_change("a.tif", "b.tif")
    [told] = [warning for warning in found.warnings if "seems to lie" in warning]
    assert "+5.0 pixels to the right and +3.0 down" in told


async def test_many_regions_are_listed_largest_first_and_the_file_holds_all(tools: Tools, tmp_path: Path) -> None:
    spots = [((x, y, x + 4 + x // 100, y + 4), BLUE) for x in range(20, 580, 40) for y in range(20, 380, 40)]
    write(tmp_path / "images" / "spots.tif", painted(HEIGHT, WIDTH, *spots), **PLACED)
    found = await tools.detect_change("before.tif", "spots.tif")
    assert len(found.regions) == MAX_REGIONS
    areas = [one.area_m2 or 0 for one in found.regions]
    assert areas == pytest.approx(sorted(areas, reverse=True), rel=1e-3)
    assert len(features(found.artifacts[1])) == len(spots)
    assert any("the 30 largest are listed" in warning for warning in found.warnings)


async def test_pairs_that_cannot_be_compared_are_refused_with_both_extents(
    tools: Tools, model: PlantedModel, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    far: dict[str, Any] = PLACED | {"transform": Affine(10, 0, 600_000, 0, -10, 5_000_000)}
    write(images / "far.tif", painted(50, 50), **far)
    write(images / "plain.png", painted(50, 50), driver="PNG")
    write(images / "radar.tif", painted(HEIGHT, WIDTH)[:2], descriptions=["VV", "VH"], crs="EPSG:32633", transform=UTM)
    for other, said in (
        ("far.tif", r"do not overlap: before\.tif spans west 13\..*; far\.tif spans west 16\."),
        ("plain.png", r"before\.tif has a place on Earth and plain\.png has none"),
        ("radar.tif", r"before\.tif looks optical .* radar\.tif looks sar"),
    ):
        with pytest.raises(PairError, match=said):
            await tools.detect_change("before.tif", other)
    assert model.requests == []


async def test_without_a_place_two_images_of_one_size_are_compared_pixel_by_pixel(tools: Tools, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write(images / "a.png", painted(90, 120), driver="PNG")
    write(images / "b.png", painted(90, 120, ((10, 20, 30, 40), BLUE)), driver="PNG")
    found = await tools.detect_change("a.png", "b.png", preview=True)
    [region] = found.regions
    assert (region.bbox_px, region.polygon_lonlat, region.area_m2) == ([10, 20, 30, 40], None, None)
    assert (found.changed_area_m2, found.georeferenced) == (None, False)
    assert any("as if they lay on each other" in warning for warning in found.warnings)
    assert [one.kind for one in found.artifacts] == ["mask", "vectors", "preview"]


@pytest.mark.parametrize("damaged", ["before.tif", "after.tif"])
@pytest.mark.parametrize("cut", [False, True], ids=["overwritten", "cut short"])
async def test_the_damaged_one_of_two_images_is_named(tools: Tools, tmp_path: Path, damaged: str, cut: bool) -> None:
    blocks = PLACED | {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
    for name in ("before.tif", "after.tif"):
        write(tmp_path / "images" / name, noise(3, HEIGHT, WIDTH), **blocks)
    path = tmp_path / "images" / damaged
    content = path.read_bytes()
    rest = b"" if cut else bytes(len(content) - len(content) // 2)
    path.write_bytes(content[: len(content) // 2] + rest)
    other = "after.tif" if damaged == "before.tif" else "before.tif"
    with pytest.raises(ImageError, match=rf"^{damaged} cannot be read by GTiff: (?!.*{other})"):
        await tools.detect_change("before.tif", "after.tif")
