"""Which bands of a raster are shown, and how their values become pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rasters import noise, opened, whole, write

from rs_tools.errors import InputError


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


def test_a_file_of_nothing_but_alpha_is_shown_as_grey(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(1, 9, 9), colors=["alpha"]))
    assert (scene.choice.indexes, scene.modality) == ((1,), "grayscale")


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


@pytest.mark.parametrize(("dtype", "chosen"), [("uint8", (1, 2, 3)), ("uint16", (3, 2, 1)), ("float32", (3, 2, 1))])
def test_four_bands_without_names_are_an_aerial_cameras_in_eight_bits_and_a_satellites_in_more(
    tmp_path: Path, dtype: str, chosen: tuple[int, ...]
) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(4, 9, 9).astype(dtype), photometric="MINISBLACK"))
    assert scene.choice.indexes == chosen
    assert any("does not say which of its bands are colours" in warning for warning in scene.warnings)


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
