"""Scenes: missing pixels, windows, and whether a file is still the one that was described."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rasterio.io import DatasetReader
from rasters import noise, opened, whole, write

from rs_tools.errors import ImageError, RegionError
from rs_tools.imagery.access import AccessPolicy, Source
from rs_tools.imagery.reading import Region, Wanted, together
from rs_tools.imagery.scene import Scene
from rs_tools.imagery.tiling import tile_grid

NAN = float("nan")


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


def test_a_region_beyond_the_edge_by_the_rounding_of_an_outlines_coordinates_ends_there(tmp_path: Path) -> None:
    """An outline from a vectors file, laid back on the pixels by its user, is off by a hundredth of one."""
    scene = opened(write(tmp_path / "a.tif", noise(3, 30, 40)))
    assert scene.region([-0.01, -1e-9, 40.02, 30.01]) == (0, 0, 40, 30)
    for outside in ([39, 0, 40.1, 30], [40.01, 0, 40.04, 30], [0, -0.04, 9, -0.01]):
        with pytest.raises(RegionError, match="not inside"):
            scene.region(outside)


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
from rs_tools.imagery.access import AccessPolicy
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


@pytest.mark.parametrize("kind", ["colours", "sixteen bits with nodata", "decimals with gaps", "palette"])
@pytest.mark.parametrize("most", [2**21, 24_000, 2500])
@pytest.mark.parametrize("overlap", [0, 9])
def test_windows_told_beforehand_are_read_as_single_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int, overlap: int
) -> None:
    monkeypatch.setattr("rs_tools.imagery.reading._AT_ONCE", most)
    if kind == "colours":
        path = write(tmp_path / "a.tif", noise(3, 90, 170), photometric="RGB")
    elif kind == "palette":
        colors = {i: (i, 255 - i, 7, 255 * (i % 5 > 0)) for i in range(256)}
        path = write(tmp_path / "a.tif", noise(1, 90, 170), photometric="palette", colormap=colors)
    elif kind == "decimals with gaps":
        values = noise(3, 90, 170, "float32", high=4000)
        values[:, 20:40, 30:100] = NAN
        path = write(tmp_path / "a.tif", values, photometric="RGB")
    else:
        path = write(tmp_path / "a.tif", noise(3, 90, 170, "uint16", high=40), photometric="RGB", nodata=7)
    scene = opened(path)
    plan = tile_grid((3, 2, 165, 88), 40, overlap)
    windows = [(region, plan.size(region)) for region in plan.regions]
    windows += [((0, 0, 170, 90), (17, 9)), windows[0]]  # a reduced one, and one that comes again
    with scene.reader(windows) as read:
        found = [read(*window) for window in windows]
        found.append(read((1, 1, 9, 9), (8, 8)))  # nobody told of this one
    found[1].rgb[:] = 0  # no window shares another's colours
    windows.append(((1, 1, 9, 9), (8, 8)))
    for window, one in zip(windows, found, strict=True):
        single = scene.read(*window)
        np.testing.assert_array_equal(one.valid, single.valid)
        if one is not found[1]:
            np.testing.assert_array_equal(one.rgb, single.rgb)


def test_neighbours_are_read_together_within_bounds() -> None:
    def planned(width: int, height: int) -> tuple[list[Wanted], dict[Wanted, Region]]:
        plan = tile_grid((0, 0, width, height), 256, 32)
        windows = [(region, plan.size(region)) for region in plan.regions]
        return windows, together(windows, 2**21)

    for width, height in ((20_000, 500), (3000, 3000), (256, 20_000)):
        windows, wholes = planned(width, height)
        assert list(wholes) == windows
        for (region, _), (x1, y1, x2, y2) in wholes.items():
            assert x1 <= region[0] < region[2] <= x2
            assert y1 <= region[1] < region[3] <= y2
            assert (x2 - x1) * (y2 - y1) <= 2**21
        assert len(set(wholes.values())) < len(windows) / 20
    assert set(planned(1000, 1000)[1].values()) == {(0, 0, 1000, 1000)}
    assert together([((0, 0, 20, 20), (10, 10)), ((10, 0, 30, 20), (10, 10))], 2**21) == {}
    assert together([((0, 0, 20, 20), (20, 20)), ((40, 0, 60, 20), (20, 20))], 2**21) == {}


def test_a_reader_refuses_a_file_that_changes_between_two_windows(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(3, 30, 40)))
    with scene.reader() as read:
        assert read((0, 0, 8, 8), (8, 8)).valid.all()
        write(tmp_path / "a.tif", noise(3, 31, 41))
        with pytest.raises(ImageError, match="changed while it was in use"):
            read((0, 0, 8, 8), (8, 8))
