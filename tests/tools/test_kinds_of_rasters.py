"""Rasters as practitioners have them: number formats, layouts, palettes, alpha, radar, photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasters import noise, opened, whole, write

NAN = float("nan")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 10, 13, 40])
@pytest.mark.parametrize(
    "dtype", "uint8 uint16 int16 uint32 int32 float32 float64 int8 int64 uint64 complex64 complex_int16".split()
)
def test_every_number_format_and_count_of_bands_is_read(tmp_path: Path, dtype: str, count: int) -> None:
    numpy_type = "complex64" if dtype == "complex_int16" else dtype
    values = noise(count, 20, 30, low=1, high=90).astype(numpy_type)
    scene = opened(write(tmp_path / "a.tif", values, dtype=dtype, photometric="MINISBLACK"))
    pixels = whole(scene)
    assert pixels.valid.all()
    assert (pixels.rgb.min(), pixels.rgb.max()) == (0, 255)
    assert len(scene.bands) == count
    assert scene.bands[0].dtype == dtype
    assert whole(scene, (3, 2)).rgb.std() < pixels.rgb.std() / 2  # averaged, not picked


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize(
    "layout",
    [{"tiled": True, "blockxsize": 32, "blockysize": 16}, {"blockysize": 1}, {"blockysize": 50}],
    ids=["tiles", "lines", "one strip"],
)
@pytest.mark.parametrize("compress", ["none", "deflate", "lzw", "zstd", "packbits", "lerc_zstd"])
def test_every_layout_of_a_file_reads_alike(tmp_path: Path, interleave: str, layout: dict, compress: str) -> None:
    values = noise(4, 50, 70, "uint16", high=4000)
    scene = opened(
        write(tmp_path / "a.tif", values, photometric="RGB", interleave=interleave, compress=compress, **layout)
    )
    plain = opened(write(tmp_path / "b.tif", values, photometric="RGB"))
    for window, size in [((0, 0, 70, 50), (70, 50)), ((3, 5, 61, 44), (29, 13))]:
        np.testing.assert_array_equal(scene.read(window, size).rgb, plain.read(window, size).rgb)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (300, 1), (5000, 2)])
def test_images_of_extreme_shape_are_read(tmp_path: Path, width: int, height: int) -> None:
    pixels = whole(opened(write(tmp_path / "a.tif", noise(3, height, width))), (min(width, 64), min(height, 64)))
    assert pixels.valid.all()


def test_overviews_are_read_in_place_of_the_full_resolution(tmp_path: Path) -> None:
    """The overview says 200 where the image says 100, so the answer shows which was read."""
    path = write(tmp_path / "a.tif", np.full((3, 1024, 1024), 100, "uint8"), photometric="RGB", tiled=True)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([4])
    with rasterio.open(path, "r+", OVERVIEW_LEVEL=0) as file:
        file.write(np.full((3, 256, 256), 200, "uint8"))
    scene = opened(path)
    assert set(whole(scene, (256, 256)).rgb.ravel().tolist()) == {200}
    assert set(whole(scene, (100, 100)).rgb.ravel().tolist()) == {200}
    assert set(whole(scene, (512, 512)).rgb.ravel().tolist()) == {100}


def test_a_palette_of_sixteen_bits_and_one_with_nodata_are_looked_up(tmp_path: Path) -> None:
    values = np.array([[[0, 300], [299, 7]]], "uint16")
    path = write(tmp_path / "a.tif", values, nodata=7, colormap={0: (1, 2, 3, 255), 300: (9, 8, 7, 255)})
    pixels = whole(opened(path))
    assert pixels.rgb[0].tolist() == [[1, 2, 3], [9, 8, 7]]
    assert pixels.valid.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_alpha_is_obeyed_in_png_and_in_sixteen_bits(tmp_path: Path, dtype: str, color: str) -> None:
    values = noise(2 if color == "grey" else 4, 8, 8, dtype, low=100)
    values[-1] = np.iinfo(dtype).max
    values[-1, :, :3] = 0
    for name, driver in [("a.png", "PNG"), ("a.tif", "GTiff")]:
        photometric: dict[str, Any] = {"photometric": "MINISBLACK" if color == "grey" else "RGB", "alpha": "yes"}
        path = write(tmp_path / name, values, driver=driver, **(photometric if driver == "GTiff" else {}))
        assert whole(opened(path)).valid.sum(axis=1).tolist() == [5] * 8


def test_nodata_of_single_bands_is_obeyed_band_by_band(tmp_path: Path) -> None:
    values = noise(3, 8, 8, low=50)
    values[:, 0, 0] = 7, 8, 9  # each its own nodata
    values[:, 1, 1] = 7, 7, 7  # nodata in the first band alone
    path = write(tmp_path / "a.tif", values, photometric="RGB")
    bands = "".join(
        f'<PAMRasterBand band="{band}"><NoDataValue>{6 + band}</NoDataValue></PAMRasterBand>' for band in (1, 2, 3)
    )
    (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")
    scene = opened(path)
    assert scene.nodata == 7
    valid = whole(scene).valid
    assert not valid[0, 0]
    assert valid.sum() == 63


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_nodata_in_one_band_alone_spoils_neither_the_stretch_nor_its_neighbours(tmp_path: Path, dtype: str) -> None:
    """As in the gaps of Landsat 7, which lie elsewhere in each band."""
    values = noise(3, 64, 64, low=1000, high=4000, dtype=dtype)
    gaps = values.copy()
    gaps[0, :, ::8] = -9999
    place: dict[str, Any] = {"photometric": "MINISBLACK", "descriptions": ["red", "green", "blue"]}
    scene = opened(write(tmp_path / "gaps.tif", gaps, nodata=-9999, **place))
    assert all(900 < low < high < 4100 for low, high in scene.stretch.limits)
    full = whole(opened(write(tmp_path / "full.tif", values, **place)), (16, 16))
    reduced = whole(scene, (16, 16))
    assert reduced.valid.all()
    assert np.abs(reduced.rgb.astype(float) - full.rgb).max() < 60
    assert set(whole(scene).rgb[:, ::8, 0].ravel().tolist()) == {0}


@pytest.mark.parametrize("missing", [NAN, float("inf"), -float("inf"), -3.4028234663852886e38, 1e38])
def test_the_largest_decimals_are_missing_pixels_also_where_the_file_does_not_say_so(
    tmp_path: Path, missing: float
) -> None:
    values = np.random.default_rng(0).uniform(0.1, 0.4, (1, 32, 32)).astype("float32")
    values[:, :20] = missing
    scene = opened(write(tmp_path / "a.tif", values))
    pixels = whole(scene)
    assert pixels.valid.sum(axis=1).tolist() == [0] * 20 + [32] * 12
    [(low, high)] = scene.stretch.limits
    assert 0.1 <= low < high <= 0.4


@pytest.mark.parametrize("looks", ["amplitude", "intensity", "decibel"])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_radar_looks_the_same_whichever_way_it_is_stored(tmp_path: Path, looks: str, dtype: str) -> None:
    """Speckle of four looks, without bright targets, recognised by its band's name."""
    intensity = np.random.default_rng(0).gamma(4, 0.05, (1, 96, 96))
    values = {"amplitude": np.sqrt(intensity), "intensity": intensity, "decibel": 10 * np.log10(intensity)}[looks]
    if dtype == "uint16":
        if looks == "decibel":
            pytest.skip("decibels are negative")
        values = values * 4000
    scene = opened(write(tmp_path / "a.tif", values.astype(dtype), descriptions=["VV"]))
    assert (scene.modality, scene.stretch.kind) == ("sar", "linear" if looks == "decibel" else "decibel")
    decibels = 10 * np.log10(intensity[0])
    low, high = np.percentile(decibels, (2, 98))
    expected = np.clip((decibels - low) * (255 / (high - low)), 0, 255)
    assert np.abs(whole(scene).rgb[..., 0] - expected).mean() < 1


def test_backscatter_that_is_a_little_negative_here_and_there_goes_through_decibels(tmp_path: Path) -> None:
    """As thermal noise that was taken off leaves it."""
    values = np.random.default_rng(0).gamma(4, 0.05, (1, 96, 96)).astype("float32")
    plain = opened(write(tmp_path / "plain.tif", values, descriptions=["VV"]))
    values[0, ::10, ::10] = -0.001
    scene = opened(write(tmp_path / "a.tif", values, descriptions=["VV"]))
    assert scene.stretch.kind == "decibel"
    assert scene.stretch.limits[0] == pytest.approx(plain.stretch.limits[0], abs=0.3)
    grey = whole(scene).rgb[..., 0]
    assert set(grey[::10, ::10].ravel().tolist()) == {0}


def test_two_polarisations_shown_as_colours_go_through_decibels_each(tmp_path: Path) -> None:
    values = np.random.default_rng(0).gamma(4, 0.05, (2, 64, 64)).astype("float32")
    values[1] /= 100
    scene = opened(write(tmp_path / "a.tif", values, descriptions=["VV", "VH"]), bands=(1, 2, 1))
    assert scene.stretch.kind == "decibel"
    assert np.abs(whole(scene).rgb[..., 0].mean() - whole(scene).rgb[..., 1].mean()) < 15


def test_eight_bit_radar_stays_as_somebody_stretched_it(tmp_path: Path) -> None:
    values = noise(1, 64, 64, low=0, high=255)
    scene = opened(write(tmp_path / "s1a_vv.tif", values))
    assert (scene.modality, scene.stretch.kind) == ("sar", "none")


def test_a_photo_that_asks_to_be_turned_is_read_as_stored_and_says_so(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(3, 20, 30).transpose(1, 2, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=turned)
    picture.save(tmp_path / "plain.jpg")
    scene = opened(tmp_path / "turned.jpg")
    assert (scene.width, scene.height) == (30, 20)
    assert any("EXIF orientation 6" in warning for warning in scene.warnings)
    assert not any("EXIF" in warning for warning in opened(tmp_path / "plain.jpg").warnings)


def test_a_file_of_several_images_is_read_as_its_first_and_says_so(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (30, 20), color) for color in ("red", "blue"))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    scene = opened(tmp_path / "a.tif")
    assert whole(scene).rgb[0, 0].tolist() == [255, 0, 0]
    assert any("holds 2 images" in warning for warning in scene.warnings)


# --- what numbers stand for


def scaled(path: Path, scale: float, offset: float) -> Path:
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = [scale] * file.count, [offset] * file.count
    return path


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"), [("int16", 0.01, 0), ("uint16", 0.001, -50), ("uint8", 0.2, -40)]
)
@pytest.mark.parametrize("name", ["a.tif", "a_vv.tif"])
def test_decibels_kept_as_integers_with_a_scale_are_radar_in_decibels(
    tmp_path: Path, name: str, dtype: str, scale: float, offset: float
) -> None:
    decibels = 10 * np.log10(np.random.default_rng(0).gamma(4, 0.05, (1, 96, 96)))
    numbers = np.rint((decibels - offset) / scale).astype(dtype)
    scene = opened(scaled(write(tmp_path / name, numbers), scale, offset))
    assert (scene.modality, scene.stretch.kind) == ("sar", "linear")
    low, high = np.percentile(decibels, (2, 98))
    assert scene.stretch.limits[0] == pytest.approx((low, high), abs=scale)
    expected = np.clip((decibels[0] - low) * (255 / (high - low)), 0, 255)
    assert np.abs(whole(scene).rgb[..., 0] - expected).mean() < 1 + 255 * scale / (high - low)


def test_higher_values_are_brighter_also_where_the_scale_is_negative(tmp_path: Path) -> None:
    numbers = np.arange(64 * 64, dtype="int16").reshape(1, 64, 64)
    grey = whole(opened(scaled(write(tmp_path / "a.tif", numbers), -0.1, 900))).rgb[..., 0]
    assert (grey[0, 0], grey[-1, -1]) == (255, 0)


def test_nodata_is_told_by_the_numbers_and_not_by_what_they_stand_for(tmp_path: Path) -> None:
    numbers = noise(3, 32, 32, "int16", low=1000, high=4000)
    numbers[:, :8] = 0
    numbers[0, 20] = 0
    path = write(tmp_path / "a.tif", numbers, nodata=0, descriptions=["red", "green", "blue"], photometric="MINISBLACK")
    scene = opened(scaled(path, 0.0001, -0.1))
    assert whole(scene).valid.sum(axis=1).tolist() == [0] * 8 + [32] * 24
    assert all(0 < low < high < 0.3 for low, high in scene.stretch.limits)


@pytest.mark.parametrize(("scale", "offset"), [(0, 5), (NAN, 0), (1e300, 0), (1, float("inf"))])
def test_a_scale_that_means_nothing_is_left_out(tmp_path: Path, scale: float, offset: float) -> None:
    plain = opened(write(tmp_path / "a.tif", noise(1, 32, 32, "uint16", high=3000)))
    odd = opened(scaled(write(tmp_path / "b.tif", noise(1, 32, 32, "uint16", high=3000)), scale, offset))
    assert odd.stretch == plain.stretch
    np.testing.assert_array_equal(whole(odd).rgb, whole(plain).rgb)


def test_colours_of_eight_bits_stay_as_they_are_whatever_their_scale(tmp_path: Path) -> None:
    values = noise(3, 16, 16)
    scene = opened(scaled(write(tmp_path / "a.tif", values, photometric="RGB"), 0.5, 3))
    np.testing.assert_array_equal(whole(scene).rgb, values.transpose(1, 2, 0))


@pytest.mark.parametrize("fill", [-9999, -32768])
@pytest.mark.parametrize("dtype", ["float32", "int16", "float64"])
def test_the_usual_fill_values_are_missing_pixels_also_where_the_file_does_not_say_so(
    tmp_path: Path, dtype: str, fill: int
) -> None:
    values = np.random.default_rng(0).uniform(100, 900, (1, 64, 64)).astype(dtype)
    values[:, :20] = fill
    values[:, ::4] = fill
    scene = opened(write(tmp_path / "dem.tif", values))
    assert whole(scene).valid.sum(axis=1).tolist() == [0] * 20 + [0, 64, 64, 64] * 11
    assert 100 <= scene.stretch.limits[0][0] < scene.stretch.limits[0][1] <= 900
    reduced = whole(scene, (16, 16))
    assert reduced.valid.sum() == 11 * 16
    assert reduced.rgb[reduced.valid].min() > 40  # the mean of what is there


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_what_is_rare_shows_on_ground_of_one_value(tmp_path: Path, dtype: str) -> None:
    """As lights at night, or targets on a black sea: both percentiles are that one value."""
    values = np.zeros((1, 200, 200), dtype)
    values[0, 50:60, 50:60] = 200
    grey = whole(opened(write(tmp_path / "a.tif", values))).rgb[..., 0]
    assert set(grey[50:60, 50:60].ravel().tolist()) == {255}
    assert (grey == 0).sum() == 200 * 200 - 100


def test_a_narrow_strip_of_data_in_a_large_scene_gets_a_stretch(tmp_path: Path) -> None:
    """A corridor that lies between the windows which are looked at first."""
    values = np.zeros((1, 5000, 5000), "uint16")
    values[0, 300:600] = 1000 + np.arange(5000) % 2000
    place: dict[str, Any] = {"nodata": 0, "tiled": True, "compress": "deflate"}
    scene = opened(write(tmp_path / "a.tif", values, **place))
    assert scene.stretch.limits[0] == pytest.approx((1040, 2960), abs=30)
