"""Rasters as practitioners have them: bands, stretch, missing pixels, windows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
from affine import Affine
from PIL import Image
from pyproj import Transformer
from rasterio.control import GroundControlPoint
from rasterio.io import DatasetReader
from rasterio.rpc import RPC
from rasters import BUNDLED, DATA, UTM, noise, opened, whole, write

from rs_tools.errors import ImageError, InputError, RegionError
from rs_tools.imagery.access import AccessPolicy, Source
from rs_tools.imagery.scene import Scene

RGB = ["red", "green", "blue"]
NAN = float("nan")


def bands_of(path: Path) -> tuple[int, ...]:
    return opened(path).choice.indexes


# --- bands


def test_declared_eight_bit_colours_pass_unchanged(tmp_path: Path) -> None:
    values = noise(3, 30, 40, low=3, high=9)
    scene = opened(write(tmp_path / "a.tif", values, photometric="RGB"))
    np.testing.assert_array_equal(whole(scene).rgb, values.transpose(1, 2, 0))
    assert str(scene.stretch) == "none"
    assert scene.modality == "optical"


def test_colour_interpretation_orders_the_bands(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(4, 9, 9), colors=["blue", "green", "red", "undefined"])
    assert bands_of(path) == (3, 2, 1)


@pytest.mark.parametrize(
    ("descriptions", "chosen"),
    [
        (["Blue", "Green", "Red", "NIR"], (3, 2, 1)),
        (["coastal", "blue", "green", "red_edge", "red"], (5, 3, 2)),
        (["B02", "B03", "B04", "B08"], (3, 2, 1)),
        (["SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5"], (4, 3, 2)),
        (["VH", "VV"], (1,)),
    ],
)
def test_descriptions_choose_the_bands(tmp_path: Path, descriptions: list[str], chosen: tuple[int, ...]) -> None:
    path = write(
        tmp_path / "a.tif", noise(len(descriptions), 9, 9), photometric="MINISBLACK", descriptions=descriptions
    )
    assert bands_of(path) == chosen


def test_bands_without_names_get_a_default_and_a_warning(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(6, 9, 9), photometric="MINISBLACK"))
    assert scene.choice.indexes == (3, 2, 1)
    assert any("does not say which of its bands are colours" in warning for warning in scene.warnings)
    assert scene.modality == "multispectral"


def test_explicit_bands_overrule_the_file(tmp_path: Path) -> None:
    values = noise(4, 9, 9)
    scene = opened(write(tmp_path / "a.tif", values, photometric="RGB"), bands=(4, 2, 1))
    np.testing.assert_array_equal(whole(scene).rgb, values[[3, 1, 0]].transpose(1, 2, 0))


@pytest.mark.parametrize("bands", [(1, 2), (0, 1, 2), (1, 2, 5), (5,)])
def test_bands_that_do_not_exist_are_refused_with_the_range(tmp_path: Path, bands: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="from 1 to 4"):
        opened(write(tmp_path / "a.tif", noise(4, 9, 9)), bands=bands)


def test_a_palette_is_shown_in_its_colours_and_its_transparent_entries_are_missing(tmp_path: Path) -> None:
    values = np.array([[[0, 1], [2, 1]]], "uint8")
    colormap = {0: (0, 0, 0, 255), 1: (250, 10, 20, 255), 2: (1, 2, 3, 255)}
    scene = opened(write(tmp_path / "a.tif", values, colormap=colormap))
    assert whole(scene).rgb.tolist() == [[[0, 0, 0], [250, 10, 20]], [[1, 2, 3], [250, 10, 20]]]
    assert scene.modality == "classified"
    transparent = write(tmp_path / "b.png", values, driver="PNG", colormap=colormap | {1: (250, 10, 20, 0)})
    assert whole(opened(transparent)).valid.tolist() == [[True, False], [True, False]]


# --- stretch


def test_sixteen_bit_values_fill_the_range_and_every_window_is_stretched_alike(tmp_path: Path) -> None:
    values = noise(3, 64, 64, "uint16", 900, 2000)
    values[:, :, 32:] += 3000
    scene = opened(write(tmp_path / "a.tif", values, photometric="RGB"))
    full = whole(scene).rgb
    assert full.min() == 0
    assert full.max() == 255
    half = scene.read((32, 0, 64, 64), (32, 64)).rgb
    np.testing.assert_array_equal(half, full[:, 32:])


def test_nodata_does_not_bend_the_stretch(tmp_path: Path) -> None:
    values = noise(1, 64, 64, "uint16", 1000, 2000)
    values[:, :, 20:] = 65535
    scene = opened(write(tmp_path / "a.tif", values, nodata=65535))
    [(low, high)] = scene.stretch.limits
    assert 1000 <= low < high <= 2000
    assert whole(scene).valid[:, :20].all()
    assert not whole(scene).valid[:, 20:].any()


def test_dull_eight_bit_bands_without_names_are_stretched_and_lively_ones_are_not(tmp_path: Path) -> None:
    dull = opened(write(tmp_path / "a.tif", noise(3, 64, 64, low=40, high=90), photometric="MINISBLACK"))
    lively = opened(write(tmp_path / "b.tif", noise(3, 64, 64, low=0, high=255), photometric="MINISBLACK"))
    assert dull.stretch.kind == "linear"
    assert whole(dull).rgb.max() == 255
    assert lively.stretch.kind == "none"


def test_radar_amplitudes_go_through_decibels_so_that_a_few_bright_targets_do_not_blacken_the_sea(
    tmp_path: Path,
) -> None:
    speckle = np.random.default_rng(0).rayleigh(0.05, (1, 128, 128)).astype("float32")
    speckle[:, 60:70, 60:70] = 30.0
    scene = opened(write(tmp_path / "a.tif", speckle))
    assert scene.modality == "sar"
    assert scene.stretch.kind == "decibel"
    tile = whole(scene).rgb
    assert 60 < np.median(tile) < 240
    assert tile[65, 65, 0] == 255


def test_decibels_are_recognised_by_their_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(-14, 4, (1, 64, 64)).astype("float32")
    scene = opened(write(tmp_path / "a.tif", values))
    assert (scene.modality, scene.stretch.kind) == ("sar", "linear")
    assert "decibels" in scene.modality_reason


def test_complex_radar_values_are_shown_by_their_magnitude(tmp_path: Path) -> None:
    values = np.full((1, 8, 8), 3 + 4j, "complex64")
    values[:, :, 4:] = 6 + 8j
    scene = opened(write(tmp_path / "a.tif", values))
    assert scene.modality == "sar"
    assert scene.stretch.kind == "decibel"
    assert scene.stretch.limits == (pytest.approx((10 * np.log10(5), 10)),)
    assert whole(scene).rgb[0, :, 0].tolist() == [0] * 4 + [255] * 4


def test_an_image_of_one_value_is_mid_grey(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", np.full((3, 8, 8), 10_000, "uint16"), photometric="RGB"))
    assert set(whole(scene).rgb.ravel().tolist()) == {128}


# --- missing pixels


def test_alpha_zero_is_missing(tmp_path: Path) -> None:
    values = noise(4, 8, 8, low=100)
    values[3] = 255
    values[3, :, :3] = 0
    pixels = whole(opened(write(tmp_path / "a.tif", values, photometric="RGB", alpha="yes")))
    assert pixels.valid.sum(axis=1).tolist() == [5] * 8
    assert pixels.rgb[:, :3].max() == 0


def test_a_mask_band_is_obeyed(tmp_path: Path) -> None:
    mask = np.full((8, 8), 255, "uint8")
    mask[2:4] = 0
    pixels = whole(opened(write(tmp_path / "a.tif", noise(3, 8, 8), photometric="RGB", mask=mask)))
    np.testing.assert_array_equal(pixels.valid, mask > 0)


def test_black_in_one_band_alone_is_a_colour_even_where_nodata_is_zero(tmp_path: Path) -> None:
    values = noise(3, 8, 8, low=50)
    values[0, 0, 0] = 0
    values[:, 1, 1] = 0
    valid = whole(opened(write(tmp_path / "a.tif", values, photometric="RGB", nodata=0))).valid
    assert valid[0, 0]
    assert not valid[1, 1]


@pytest.mark.parametrize("nodata", [None, NAN, -9999.0])
def test_missing_decimal_values_leave_their_neighbours_alone_when_decimated(
    tmp_path: Path, nodata: float | None
) -> None:
    values = np.full((1, 64, 64), 0.5, "float32")
    values[:, :, 32:] = 0.7
    values[0, ::3, ::3] = NAN if nodata is None else nodata
    values[0, :16] = NAN if nodata is None else nodata
    scene = opened(write(tmp_path / "a.tif", values, nodata=nodata))
    pixels = whole(scene, (16, 16))
    assert not pixels.valid[:4].any()
    assert pixels.valid[4:].all()
    assert set(pixels.rgb[4:, :8].ravel().tolist()) == {0}
    assert set(pixels.rgb[4:, 8:].ravel().tolist()) == {255}


def test_missing_integers_leave_their_neighbours_alone_when_decimated(tmp_path: Path) -> None:
    values = np.full((3, 64, 64), 200, "uint8")
    values[:, :, ::4] = 0
    values[:, :16] = 0
    pixels = whole(opened(write(tmp_path / "a.tif", values, photometric="RGB", nodata=0)), (16, 16))
    assert not pixels.valid[:4].any()
    assert set(pixels.rgb[pixels.valid].ravel().tolist()) == {200}


# --- windows


def test_an_empty_region_is_the_whole_image_and_fractions_grow_to_pixel_edges(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(3, 30, 40)))
    assert scene.region([]) == (0, 0, 40, 30)
    assert scene.region([0, 0, 40, 30]) == (0, 0, 40, 30)
    assert scene.region([1.2, 2.9, 3.1, 4]) == (1, 2, 4, 4)


@pytest.mark.parametrize(
    "region",
    [[0, 0, 41, 30], [-1, 0, 5, 5], [50, 50, 60, 60], [5, 5, 5, 9], [9, 5, 5, 9], [1, 2, 3], [0, 0, NAN, 5]],
)
def test_a_region_outside_empty_or_reversed_is_an_error_with_the_size(tmp_path: Path, region: list[float]) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(3, 30, 40)))
    with pytest.raises(RegionError, match="40x30"):
        scene.region(region)


def test_a_window_of_a_decimated_image_shows_the_same_place(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(256, dtype="uint8")[None, None], (3, 128, 256))
    scene = opened(write(tmp_path / "a.tif", ramp, photometric="RGB"))
    tile = scene.read((128, 0, 256, 128), (32, 32)).rgb
    np.testing.assert_allclose(tile[0, :, 0], 129.5 + 4 * np.arange(32), atol=1)


@pytest.mark.parametrize("layout", [{"tiled": True, "blockxsize": 64, "blockysize": 64}, {"blockysize": 5}])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_reading_in_parts_gives_what_reading_at_once_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict, dtype: str
) -> None:
    values = noise(3, 333, 517, dtype, high=4000)
    values[:, 100:150, :77] = 0
    scene = opened(write(tmp_path / "a.tif", values, photometric="RGB", nodata=0, **layout))
    region, size = (3, 5, 517, 333), (171, 109)
    at_once = scene.read(region, size)
    monkeypatch.setattr("rs_tools.imagery.reading.CACHE_BYTES", 100_000)
    in_parts = scene.read(region, size)
    np.testing.assert_allclose(in_parts.rgb.astype(int), at_once.rgb.astype(int), atol=1)
    np.testing.assert_array_equal(in_parts.valid, at_once.valid)


def test_memory_stays_flat_however_large_the_file() -> None:
    program = """
import resource, sys, tempfile, rasterio
from pathlib import Path
from rs_tools.imagery.access import AccessPolicy, Source
from rs_tools.imagery.scene import Scene
folder = Path(tempfile.mkdtemp())
size = dict(width=8000, height=8000, count=3, dtype="uint16", tiled=True, photometric="RGB")
with rasterio.open(folder / "big.tif", "w", driver="GTiff", SPARSE_OK=True, **size):
    pass
with rasterio.open(folder / "small.tif", "w", driver="GTiff", **size | dict(width=64, height=64)):
    pass
def peak(name):
    scene = Scene.open(AccessPolicy([folder]), str(folder / name))
    scene.read(scene.region([]), (min(512, scene.width), min(512, scene.height)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small = peak("small.tif")
print(peak("big.tif") - small)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200  # MiB; the image itself has 366


# --- the shapes that rasters come in


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


# --- identity


def test_the_digest_follows_the_content_and_not_the_name(tmp_path: Path) -> None:
    values = noise(3, 30, 40)
    first = opened(write(tmp_path / "a.tif", values))
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes())
    assert opened(tmp_path / "b.tif").digest == first.digest
    values[0, 0, 0] ^= 1
    assert opened(write(tmp_path / "c.tif", values)).digest != first.digest


def test_the_digest_of_a_large_file_reads_pieces_of_it_up_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(3, 1500, 1500))
    first = opened(path).digest
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert opened(path).digest != first


def test_a_file_that_changed_since_it_was_opened_is_not_read(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(3, 30, 40)))
    write(tmp_path / "a.tif", noise(3, 31, 41))
    with pytest.raises(ImageError, match="changed while it was in use"):
        whole(scene)


def test_a_reader_opens_the_file_once_and_reads_windows_as_single_reads_do(tmp_path: Path) -> None:
    class Counting(AccessPolicy):
        opens = 0

        @contextmanager
        def open(self, source: Source) -> Iterator[DatasetReader]:
            self.opens += 1
            with super().open(source) as dataset:
                yield dataset

    policy = Counting([tmp_path])
    write(tmp_path / "a.tif", noise(3, 60, 80, "uint16", high=4000), photometric="RGB", nodata=7)
    scene = Scene.open(policy, str(tmp_path / "a.tif"))
    windows = [((0, 0, 80, 60), (40, 30)), ((8, 4, 40, 50), (32, 46)), ((79, 59, 80, 60), (1, 1))]
    singles = [scene.read(*window) for window in windows]
    policy.opens = 0
    with scene.reader() as read:
        together = [read(*window) for window in windows]
    assert policy.opens == 1
    for single, one in zip(singles, together, strict=True):
        np.testing.assert_array_equal(one.rgb, single.rgb)
        np.testing.assert_array_equal(one.valid, single.valid)


def test_a_reader_refuses_a_file_that_changes_between_two_windows(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(3, 30, 40)))
    with scene.reader() as read:
        assert read((0, 0, 8, 8), (8, 8)).valid.all()
        write(tmp_path / "a.tif", noise(3, 31, 41))
        with pytest.raises(ImageError, match="changed while it was in use"):
            read((0, 0, 8, 8), (8, 8))


# --- places


def test_a_rotated_transform_without_crs_gives_no_place_and_says_so(tmp_path: Path) -> None:
    rotated = Affine.translation(100, 200) * Affine.rotation(30) * Affine.scale(10)
    scene = opened(write(tmp_path / "a.tif", noise(1, 9, 9), transform=rotated))
    assert scene.georeference is None
    assert any("no coordinate reference system" in warning for warning in scene.warnings)


@pytest.mark.parametrize(
    "transform",
    [
        UTM,
        Affine(10, 0, 400_000, 0, 10, 4_999_000),
        Affine(-10, 0, 400_000, 0, -10, 5_000_000),
        Affine.translation(400_000, 5_000_000) * Affine.rotation(33) * Affine.scale(10, -10),
        Affine.translation(400_000, 5_000_000) * Affine.shear(20, 5) * Affine.scale(10, -7),
    ],
    ids=["north up", "bottom up", "mirrored", "rotated", "sheared"],
)
def test_every_transform_puts_pixels_where_the_projection_says(tmp_path: Path, transform: Affine) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), crs="EPSG:32633", transform=transform))
    assert scene.georeference is not None
    pixels = np.array([[0, 0], [80, 0], [17.5, 41.25]])
    east, north = np.array([transform @ tuple(pixel) for pixel in pixels]).T
    expected = np.stack(Transformer.from_crs(32633, 4326, always_xy=True).transform(east, north), axis=1)
    np.testing.assert_allclose(scene.georeference.lonlat(pixels), expected, atol=1e-9)


@pytest.mark.parametrize(
    "crs",
    [
        "+proj=laea +lat_0=45 +lon_0=15 +x_0=400000 +y_0=5000000 +datum=WGS84",
        "EPSG:32633+5773",
        "+proj=tmerc +lat_0=0 +lon_0=15 +k=0.9996 +x_0=500000 +y_0=0 +ellps=GRS80 +units=us-ft",
    ],
    ids=["without EPSG code", "with heights", "in feet"],
)
def test_unusual_reference_systems_give_places(tmp_path: Path, crs: str) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), crs=crs, transform=UTM))
    assert scene.georeference is not None
    [[lon, lat]] = scene.georeference.lonlat(np.array([[0.0, 0.0]]))
    expected = Transformer.from_crs(pyproj.CRS(crs).to_2d(), 4326, always_xy=True).transform(400_000, 5_000_000)
    assert (lon, lat) == pytest.approx(expected, abs=1e-6)


def test_ground_control_points_that_a_transform_fits_place_the_scene_and_the_misfit_is_told(tmp_path: Path) -> None:
    truth = Affine.translation(400_000, 5_000_000) * Affine.rotation(20) * Affine.scale(10, -10)
    chance = np.random.default_rng(0)
    points = []
    for row, col in [(0, 0), (0, 80), (60, 0), (60, 80), (30, 40)]:
        x, y = truth @ (col + chance.uniform(-0.3, 0.3), row + chance.uniform(-0.3, 0.3))
        points.append(GroundControlPoint(row=row, col=col, x=x, y=y))
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), gcps=points, crs="EPSG:32633"))
    assert scene.georeference is not None
    assert any("5 ground control points" in warning and "to within 0." in warning for warning in scene.warnings)
    there = np.array(scene.georeference.transform @ (40, 30)) - np.array(truth @ (40, 30))
    assert np.hypot(*there) < 5  # half a pixel


@pytest.mark.parametrize("points", [[(0, 0), (0, 80), (60, 0)], [(0, 0), (0, 20), (0, 40), (0, 80)]])
def test_ground_control_points_too_few_or_in_one_line_place_nothing(
    tmp_path: Path, points: list[tuple[int, int]]
) -> None:
    gcps = [GroundControlPoint(row=r, col=c, x=400_000 + 10 * c, y=5_000_000 - 10 * r) for r, c in points]
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), gcps=gcps, crs="EPSG:32633"))
    assert scene.georeference is None
    assert any("too few, or in one line" in warning for warning in scene.warnings)


@pytest.mark.parametrize("place", [{}, {"crs": "EPSG:32633", "transform": UTM}], ids=["alone", "beside a transform"])
def test_rational_polynomials_are_told_and_not_used(tmp_path: Path, place: dict) -> None:
    below, above = [1.0] + [0.0] * 19, [0.1] * 20
    rpcs = RPC(0, 100, 50, 1, below, above, 24, 24, 10, 1, below, above, 32, 32)  # type: ignore[reportCallIssue]
    scene = opened(write(tmp_path / "a.tif", noise(1, 60, 80), rpcs=rpcs, **place))
    assert (scene.georeference is not None) == bool(place)
    told = "are not used" if place else "gdalwarp -rpc"
    assert any("RPCs" in warning and told in warning for warning in scene.warnings)


def test_a_local_crs_gives_no_place_and_says_so(tmp_path: Path) -> None:
    local = 'LOCAL_CS["site grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    scene = opened(write(tmp_path / "a.tif", noise(1, 9, 9), crs=local, transform=UTM))
    assert scene.georeference is None
    assert any("no place on Earth" in warning for warning in scene.warnings)


def test_ground_control_points_that_no_transform_fits_are_named_with_the_remedy(tmp_path: Path) -> None:
    points = [GroundControlPoint(row=r, col=c, x=10 + c / 100, y=50 - r / 100) for r in (0, 8) for c in (0, 8)]
    points[0] = GroundControlPoint(row=0, col=0, x=10.1, y=50)
    scene = opened(write(tmp_path / "a.tif", noise(1, 9, 9), gcps=points, crs="EPSG:4326"))
    assert scene.georeference is None
    assert any("misses one by" in warning and "gdalwarp" in warning for warning in scene.warnings)


def test_a_crs_without_epsg_code_still_gives_places() -> None:
    scene = opened(BUNDLED / "raleigh_landsat7.tif")
    assert scene.georeference is not None
    bounds = scene.georeference.bounds(scene.width, scene.height)
    assert bounds == pytest.approx([-78.77, 35.69, -78.61, 35.81], abs=0.01)
    assert scene.choice.indexes == (3, 2, 1)
    assert not whole(scene).valid[0].any()


def labelled_scenes() -> list[dict]:
    records = DATA / "scenes" / "records.jsonl"
    return [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []


@pytest.mark.skipif(not labelled_scenes(), reason=f"no labelled scenes in {DATA}")
@pytest.mark.parametrize("record", labelled_scenes(), ids=lambda record: record["id"])
def test_scenes_found_in_the_wild_open_as_they_are_described(record: dict) -> None:
    scene = opened(DATA / "scenes" / record["images"][0])
    assert (scene.width, scene.height, len(scene.bands)) == (record["width"], record["height"], record["band_count"])
    assert (scene.georeference is not None) == record["crs"]
    if scene.georeference and record["gsd_m"]:
        assert scene.georeference.gsd_m(scene.width, scene.height) == pytest.approx(record["gsd_m"], rel=0.25)
    pixels = whole(scene)
    assert pixels.valid.any()
    assert pixels.rgb.shape == (scene.height, scene.width, 3)
