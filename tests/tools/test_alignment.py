"""Two scenes on one grid."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject
from rasters import BUNDLED, UTM, noise, opened, write

from rs_tools.errors import PairError
from rs_tools.imagery.alignment import Pair, Shift, phase_shift

PLACED = {"photometric": "RGB", "crs": "EPSG:32633"}


def landscape(height: int, width: int, seed: int = 0, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """A smooth random surface, float [H, W] from 20 to 235, of sine waves; its content lies (x, y) pixels further."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    surface = np.zeros((height, width))
    for _ in range(40):
        fy, fx = random.normal(0, 0.08, 2)
        surface += np.sin(2 * np.pi * (fx * (columns - x) + fy * (rows - y)) + random.uniform(0, 2 * np.pi))
    return np.clip(127 + surface * 12, 20, 235)


def rgb(surface: np.ndarray) -> np.ndarray:
    return np.rint(surface).astype("uint8")[None].repeat(3, axis=0)


def placed(path: Path, values: np.ndarray, transform: Affine = UTM, **options) -> Path:
    return write(path, values, **{**PLACED, "transform": transform, **options})


def read(pair: Pair, region=None, size=None):
    region = region or (0, 0, pair.before.width, pair.before.height)
    with pair.reader() as reading:
        return reading(region, size or (region[2] - region[0], region[3] - region[1]))


# --- one grid


def test_equal_grids_are_read_exactly(tmp_path: Path) -> None:
    values = [noise(3, 60, 80), noise(3, 60, 80)[:, ::-1]]
    pair = Pair.of(*(opened(placed(tmp_path / f"{i}.tif", one)) for i, one in enumerate(values)))
    assert (pair.overlap_share, pair.warnings) == (1, ())
    pixels = read(pair)
    np.testing.assert_array_equal(pixels.before.rgb, values[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(pixels.after.rgb, values[1].transpose(1, 2, 0))
    assert pixels.valid.all()


@pytest.mark.parametrize(("x", "y"), [(1003, 7), (2996, 2996), (1500, 1500)])
def test_a_small_later_image_is_found_wherever_it_lies_in_a_large_earlier_one(tmp_path: Path, x: int, y: int) -> None:
    before = opened(placed(tmp_path / "before.tif", np.full((3, 3000, 3000), 90, "uint8"), compress="deflate"))
    after = opened(placed(tmp_path / "after.tif", noise(3, 8, 8), UTM * Affine.translation(x, y)))
    pair = Pair.of(before, after)
    covered = min(8, 3000 - x) * min(8, 3000 - y)
    assert pair.overlap_share == pytest.approx(covered / 3000**2, rel=0.02)
    assert any("0.0007%" in warning or "0.0002%" in warning for warning in pair.warnings)
    assert read(pair, (x, y, min(x + 8, 3000), min(y + 8, 3000))).valid.all()
    assert Pair.of(after, before).overlap_share == pytest.approx(covered / 64, abs=0.01)


def test_a_pair_in_different_number_formats_is_compared_with_a_warning(tmp_path: Path) -> None:
    bytes_, words = noise(3, 60, 80), noise(3, 60, 80).astype("uint16") * 10
    before, after = opened(placed(tmp_path / "8.tif", bytes_)), opened(placed(tmp_path / "16.tif", words))
    [told] = Pair.of(before, after).warnings
    assert "none and linear" in told
    assert Pair.of(after, after).warnings == ()


def test_images_that_share_an_edge_and_nothing_more_do_not_overlap(tmp_path: Path) -> None:
    before = opened(placed(tmp_path / "before.tif", noise(3, 60, 80)))
    for x, y in ((80, 0), (0, 60), (-80, 0), (80, 60), (0, -60)):
        after = opened(placed(tmp_path / f"after{x}{y}.tif", noise(3, 60, 80), UTM * Affine.translation(x, y)))
        with pytest.raises(PairError, match="do not overlap"):
            Pair.of(before, after)


def test_a_shifted_image_comes_to_lie_on_the_earlier_ones_grid_and_the_rest_is_invalid(tmp_path: Path) -> None:
    values = noise(3, 60, 80)
    before = opened(placed(tmp_path / "a.tif", values))
    after = opened(placed(tmp_path / "b.tif", values[:, 10:, 20:], UTM @ Affine.translation(20, 10)))
    pair = Pair.of(before, after)
    assert pair.overlap_share == pytest.approx(60 * 50 / (80 * 60), abs=0.01)
    assert any("covered by the later one" in warning for warning in pair.warnings)
    pixels = read(pair)
    np.testing.assert_array_equal(pixels.after.rgb[10:, 20:], values[:, 10:, 20:].transpose(1, 2, 0))
    assert pixels.valid[10:, 20:].all()
    assert not pixels.valid[:10].any()
    assert not pixels.after.rgb[:, :20].any()
    part = read(pair, (15, 5, 45, 35))
    np.testing.assert_array_equal(part.after.rgb, pixels.after.rgb[5:35, 15:45])


@pytest.mark.parametrize("finer", [2, 5])
def test_a_finer_image_is_averaged_and_a_coarser_one_interpolated(tmp_path: Path, finer: int) -> None:
    rows, columns = np.mgrid[0 : 60 * finer, 0 : 60 * finer]
    fine = 20 + (2 * columns + rows) / finer  # a plane: averaging and interpolating leave it as it is
    coarse = fine.reshape(60, finer, 60, finer).mean(axis=(1, 3))
    one = opened(placed(tmp_path / "coarse.tif", rgb(coarse)))
    other = opened(placed(tmp_path / "fine.tif", rgb(fine), UTM @ Affine.scale(1 / finer)))
    for pair in (Pair.of(one, other), Pair.of(other, one)):
        pixels = read(pair)
        rim = max(finer, 2)
        inner = slice(rim, -rim)
        difference = pixels.after.rgb[inner, inner].astype(float) - pixels.before.rgb[inner, inner]
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32632"])
def test_another_projection_or_a_rotated_grid_is_warped_as_gdal_warps_it(tmp_path: Path, crs: str) -> None:
    x, y = Transformer.from_crs("EPSG:32633", crs, always_xy=True).transform(UTM.c, UTM.f)
    step = 1.5e-4 if crs == "EPSG:4326" else 12.0  # coarser: of a finer image GDAL would average more than we do
    transform = Affine(step, 0.2 * step, x - 20 * step, 0.2 * step, -step, y + 20 * step)
    surface = landscape(300, 300).astype("uint8")
    before = placed(tmp_path / "a.tif", rgb(landscape(200, 200)))
    after = placed(tmp_path / "b.tif", rgb(surface), transform, crs=crs)
    pair = Pair.of(opened(before), opened(after))
    pixels = read(pair)
    wanted = np.zeros((200, 200), "uint8")
    reproject(
        surface, wanted, src_transform=transform, src_crs=crs, dst_transform=UTM, dst_crs="EPSG:32633",
        resampling=Resampling.bilinear, tolerance=0,
    )  # fmt: skip
    inner = pixels.after.valid & (wanted > 0)
    assert inner.mean() > 0.3
    assert inner.mean() == pytest.approx(pair.overlap_share, abs=0.03)
    difference = np.abs(pixels.after.rgb[..., 0][inner].astype(float) - wanted[inner])
    assert difference.max() <= 2


def test_positions_between_the_nodes_are_right_to_a_twentieth_of_a_pixel(tmp_path: Path) -> None:
    before = opened(placed(tmp_path / "a.tif", noise(3, 600, 600)))
    place = Affine(1e-4, 0, 13.7, 0, -1e-4, 45.16)
    after = opened(placed(tmp_path / "b.tif", noise(3, 600, 600), place, crs="EPSG:4326"))
    assert before.georeference is not None
    assert after.georeference is not None
    found = Pair.of(before, after).positions((0, 0, 600, 600), (600, 600))
    centres = np.stack(np.meshgrid(np.arange(600) + 0.5, np.arange(600) + 0.5), axis=-1).reshape(-1, 2)
    exact = after.georeference.pixels(before.georeference.lonlat(centres)).reshape(600, 600, 2)
    assert np.abs(found - exact).max() < 0.05


@pytest.mark.parametrize("other", [-360, 360])
def test_longitudes_counted_on_beyond_the_antimeridian_or_from_its_other_side_are_the_same_place(
    tmp_path: Path, other: int
) -> None:
    values = noise(3, 40, 60)
    west = 179.97 if other < 0 else -180.03
    before = opened(placed(tmp_path / "a.tif", values, Affine(1e-3, 0, west, 0, -1e-3, -16), crs="EPSG:4326"))
    after = opened(placed(tmp_path / "b.tif", values, Affine(1e-3, 0, west + other, 0, -1e-3, -16), crs="EPSG:4326"))
    pair = Pair.of(before, after)
    assert (pair.overlap_share, pair.warnings) == (1, ())
    pixels = read(pair)
    assert pixels.valid.all()
    np.testing.assert_array_equal(pixels.after.rgb, pixels.before.rgb)


def test_a_scene_around_the_world_is_read_at_both_its_ends(tmp_path: Path) -> None:
    values = noise(3, 180, 360)
    degrees = {"crs": "EPSG:4326"}
    before = opened(placed(tmp_path / "a.tif", values, Affine(1, 0, -180, 0, -1, 90), **degrees))
    later = np.roll(values, 180, axis=2)
    after = opened(placed(tmp_path / "b.tif", later, Affine(1, 0, 0, 0, -1, 90), **degrees))
    pair = Pair.of(before, after)
    assert pair.overlap_share == 1
    np.testing.assert_array_equal(read(pair).after.rgb, values.transpose(1, 2, 0))
    np.testing.assert_array_equal(read(pair, (179, 0, 181, 180)).after.rgb, values[:, :, 179:181].transpose(1, 2, 0))


def test_a_projected_scene_across_the_antimeridian_lies_on_both_ends_of_a_map_of_the_world(tmp_path: Path) -> None:
    place = Affine(500, 0, 150_000, 0, -500, 8_225_000)
    before = opened(placed(tmp_path / "a.tif", noise(3, 60, 200), place, crs="EPSG:32701"))
    world = Affine(0.1, 0, -180, 0, -0.1, 90)
    columns = np.broadcast_to((np.arange(3600) // 1800 * 100 + 50).astype("uint8"), (3, 1800, 3600))
    after = opened(placed(tmp_path / "b.tif", columns, world, crs="EPSG:4326"))
    assert before.georeference is not None
    pair = Pair.of(before, after)
    assert pair.overlap_share == 1
    shown = read(pair).after.rgb[30, :, 0]
    longitude = before.georeference.lonlat(np.column_stack([np.arange(200) + 0.5, np.full(200, 30.5)]))[:, 0]
    assert (longitude > 0).any()
    assert (longitude < 0).any()
    np.testing.assert_array_equal(shown, np.where(longitude > 0, 150, 50))


def test_pixels_without_data_in_either_are_invalid_and_do_not_bleed(tmp_path: Path) -> None:
    first, second = np.full((3, 40, 40), 100, "uint8"), np.full((3, 40, 40), 200, "uint8")
    first[:, :5], second[:, :, :8] = 0, 0
    before = opened(placed(tmp_path / "a.tif", first, nodata=0))
    after = opened(placed(tmp_path / "b.tif", second, UTM @ Affine.translation(0.3, 0.3), nodata=0))
    pixels = read(Pair.of(before, after))
    assert not pixels.valid[:5].any()
    assert not pixels.valid[:, :8].any()
    assert set(np.unique(pixels.after.rgb[pixels.after.valid])) == {200}


def test_a_reduced_window_shows_the_same_as_the_full_one_averaged(tmp_path: Path) -> None:
    surface = landscape(400, 400)
    before = opened(placed(tmp_path / "a.tif", rgb(surface)))
    after = opened(placed(tmp_path / "b.tif", rgb(surface)))
    pixels = read(Pair.of(before, after), size=(50, 50))
    difference = pixels.before.rgb[2:-2, 2:-2].astype(float) - pixels.after.rgb[2:-2, 2:-2]
    assert np.abs(difference).max() <= 1


def test_memory_follows_the_window_and_not_the_images(tmp_path: Path) -> None:
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "width": 8000, "height": 8000, **PLACED}
    for name in "ab":
        with rasterio.open(tmp_path / f"{name}.tif", "w", tiled=True, sparse_ok=True, transform=UTM, **profile):
            pass
    pair = Pair.of(opened(tmp_path / "a.tif"), opened(tmp_path / "b.tif"))
    tracemalloc.start()
    try:
        with pair.reader() as reading:
            for x in range(0, 8000, 2000):
                reading((x, x, x + 256, x + 256), (256, 256))
        assert tracemalloc.get_traced_memory()[1] < 30e6  # one image is 192 MB
    finally:
        tracemalloc.stop()


# --- shift


@pytest.mark.parametrize(("x", "y"), [(0, 0), (0.3, -0.7), (2.45, 1.05), (-6.2, 9.5), (0.5, 0.5)])
@pytest.mark.parametrize("shape", [(256, 256), (180, 251)])
def test_a_shift_is_measured_to_a_tenth_of_a_pixel(x: float, y: float, shape: tuple[int, int]) -> None:
    noisy = np.random.default_rng(1).normal(0, 3, (2, *shape))
    found = phase_shift(landscape(*shape) + noisy[0], landscape(*shape, x=x, y=y) * 0.8 + 10 + noisy[1])
    assert found == (pytest.approx(x, abs=0.1), pytest.approx(y, abs=0.1))


def test_flat_images_tell_no_shift() -> None:
    assert phase_shift(np.full((64, 64), 3.0), landscape(64, 64)) is None


def test_a_shift_of_scenes_is_reported_with_how_many_windows_agree_and_not_applied(tmp_path: Path) -> None:
    before = opened(placed(tmp_path / "a.tif", rgb(landscape(500, 600))))
    moved = rgb(landscape(500, 600, x=1.6, y=-2.3))
    after = opened(placed(tmp_path / "b.tif", moved))
    pair = Pair.of(before, after)
    found = pair.shift()
    assert found is not None
    assert (found.x, found.y) == (pytest.approx(1.6, abs=0.1), pytest.approx(-2.3, abs=0.1))
    assert (found.windows, found.tried) == (16, 16)
    np.testing.assert_array_equal(read(pair).after.rgb, moved.transpose(1, 2, 0))


def test_windows_without_overlap_or_structure_tell_nothing(tmp_path: Path) -> None:
    before = opened(placed(tmp_path / "a.tif", np.full((3, 300, 300), 9, "uint8")))
    assert Pair.of(before, before).shift() is None


@pytest.mark.parametrize(("x", "y"), [(1, 0), (3, 2)])
def test_a_real_scene_moved_by_a_part_of_a_pixel_is_measured(x: int, y: int) -> None:
    """Averaging 4 x 4 pixels from another corner moves the content by exact quarters of a pixel."""
    with rasterio.open(BUNDLED / "yellowstone_road.jpg") as file:
        values = file.read().mean(axis=0)
    rows, columns = ((side - 4) // 4 for side in values.shape)
    corners = values[: 4 * rows, : 4 * columns], values[y : 4 * rows + y, x : 4 * columns + x]
    small = [corner.reshape(rows, 4, columns, 4).mean(axis=(1, 3)) for corner in corners]
    assert phase_shift(*small) == (pytest.approx(-x / 4, abs=0.1), pytest.approx(-y / 4, abs=0.1))


def test_real_dates_of_one_place_lie_within_a_few_pixels(labelled_data: Path) -> None:
    dates = sorted((labelled_data / "scenes" / "images").glob("*naip*"))
    if len(dates) < 2:
        pytest.skip("no two NAIP dates among the labelled data")
    pair = Pair.of(opened(dates[0]), opened(dates[-1]))
    found = pair.shift()
    assert pair.overlap_share > 0.95
    assert isinstance(found, Shift)
    assert max(abs(found.x), abs(found.y)) < 5
    assert found.windows > found.tried / 2


# --- what cannot be compared


def test_without_georeference_equal_sizes_are_compared_pixel_by_pixel_with_a_warning(tmp_path: Path) -> None:
    values = noise(3, 20, 30)
    for name in "ab":
        write(tmp_path / f"{name}.png", values, driver="PNG")
    pair = Pair.of(opened(tmp_path / "a.png"), opened(tmp_path / "b.png"))
    assert pair.overlap_share == 1
    assert ["pixel by pixel" in warning for warning in pair.warnings] == [True]
    np.testing.assert_array_equal(read(pair).after.rgb, values.transpose(1, 2, 0))


def test_without_georeference_different_sizes_are_refused_with_both(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(3, 20, 30), driver="PNG")
    write(tmp_path / "b.png", noise(3, 20, 31), driver="PNG")
    with pytest.raises(PairError, match=r"a\.png is 30 x 20 pixels; b\.png is 31 x 20"):
        Pair.of(opened(tmp_path / "a.png"), opened(tmp_path / "b.png"))


@pytest.mark.parametrize("swapped", [False, True])
def test_one_without_georeference_is_refused_by_name(tmp_path: Path, swapped: bool) -> None:
    scenes = [opened(placed(tmp_path / "a.tif", noise(3, 9, 9))), opened(write(tmp_path / "b.tif", noise(3, 9, 9)))]
    with pytest.raises(PairError, match=r"a\.tif has a place on Earth and b\.tif has none"):
        Pair.of(*(reversed(scenes) if swapped else scenes))


def test_images_apart_are_refused_with_both_extents(tmp_path: Path) -> None:
    before = opened(placed(tmp_path / "a.tif", noise(3, 60, 80)))
    after = opened(placed(tmp_path / "b.tif", noise(3, 60, 80), UTM @ Affine.translation(500, 0)))
    with pytest.raises(PairError, match=r"do not overlap: a\.tif spans west 13\.7.* b\.tif spans west 13\.7"):
        Pair.of(before, after)


def test_different_kinds_are_refused_with_the_reason_and_unsure_ones_warn(tmp_path: Path) -> None:
    optical = opened(placed(tmp_path / "a.tif", noise(3, 9, 9)))
    radar = opened(write(tmp_path / "s1_vv.tif", noise(1, 9, 9, "float32"), crs="EPSG:32633", transform=UTM))
    grey = opened(write(tmp_path / "b.tif", noise(1, 9, 9), crs="EPSG:32633", transform=UTM))
    with pytest.raises(PairError, match=r"optical \(three bands.* sar \(.*vv"):
        Pair.of(optical, radar)
    assert any("may be of different kinds" in warning for warning in Pair.of(optical, grey).warnings)
