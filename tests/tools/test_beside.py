"""World files give a grid and, with a CRS, a place; what else lies beside an image is told and not used."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from planted import BLUE, PlantedModel, painted
from rasters import UTM, noise, opened, write

from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.beside import MAX_WORLD_BYTES, look_beside, parse_world
from rs_tools.tools import Tools

WORLD = "10\n0\n0\n-10\n400005\n4999995\n"  # of UTM: the middle of the first pixel


def told(image: Path) -> list[str]:
    """The warnings of an image that must have got no grid."""
    scene = opened(image)
    assert (scene.georeference, scene.grid, scene.placement) == (None, None, "")
    return list(scene.warnings)


# --- what is used


@pytest.mark.parametrize(
    ("image", "driver", "world"),
    [
        ("a.tif", "GTiff", "a.tfw"),
        ("a.tif", "GTiff", "a.TFW"),
        ("a.tiff", "GTiff", "a.tiffw"),
        ("a.jpg", "JPEG", "a.jgw"),
        ("a.jpeg", "JPEG", "a.jgw"),
        ("a.png", "PNG", "a.pgw"),
        ("a.png", "PNG", "a.wld"),
    ],
)
def test_a_world_file_gives_a_grid_without_a_place_and_says_so(
    tmp_path: Path, image: str, driver: str, world: str
) -> None:
    write(tmp_path / image, noise(3, 20, 30), driver=driver)
    (tmp_path / world).write_text(WORLD)
    scene = opened(tmp_path / image)
    assert (scene.georeference, scene.grid, scene.placement) == (None, UTM, f"world file {world}")
    assert any(f"only a grid (from its world file {world})" in warning for warning in scene.warnings)


async def test_the_mask_lies_on_the_grid_of_the_world_file_and_the_answer_claims_no_place(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write(images / "a.png", painted(90, 120, ((10, 20, 30, 40), BLUE)), driver="PNG")
    (images / "a.pgw").write_text(WORLD)
    tools = Tools(AccessPolicy([images]), PlantedModel(), artifacts=tmp_path / "artifacts")
    found = await tools.segment("a.png", ["water"], [5, 10, 120, 90])
    assert (found.georeferenced, found.classes[0].area_m2) == (False, None)
    assert found.provenance.placement == "world file a.pgw"
    with rasterio.open(found.artifacts[0].path) as mask:
        assert (mask.crs, mask.transform) == (None, UTM @ Affine.translation(5, 10))
    assert found.artifacts[1].mime_type == "application/json"


def test_with_a_crs_in_the_image_a_world_file_gives_the_place(tmp_path: Path) -> None:
    turned = Affine.translation(400_000, 5_000_000) @ Affine.rotation(30) @ Affine.scale(10, -10)
    write(tmp_path / "a.tif", noise(1, 20, 30), crs="EPSG:32633")
    x, y = turned @ (0.5, 0.5)
    numbers = (turned.a, turned.d, turned.b, turned.e, x, y)
    (tmp_path / "a.tfw").write_text("\r\n".join(map(repr, numbers)))
    scene = opened(tmp_path / "a.tif")
    assert scene.georeference is not None
    assert scene.georeference.transform.almost_equals(turned, 1e-6)
    assert any("comes from a.tfw beside the image" in warning for warning in scene.warnings)


def test_what_an_image_says_itself_goes_before_a_world_file(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", noise(1, 20, 30), crs="EPSG:32633", transform=UTM)
    (tmp_path / "a.tfw").write_text("1\n0\n0\n-1\n0\n0\n")
    scene = opened(tmp_path / "a.tif")
    assert scene.georeference is not None
    assert (scene.georeference.transform, scene.placement, scene.warnings) == (UTM, "transform", ())


def test_a_transform_without_crs_is_a_grid_too(tmp_path: Path) -> None:
    scene = opened(write(tmp_path / "a.tif", noise(1, 20, 30), transform=UTM))
    assert (scene.georeference, scene.grid, scene.placement) == (None, UTM, "transform")


numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.tuples(*[numbers] * 6))
def test_world_files_are_read_as_gdal_reads_them(six: tuple[float, ...]) -> None:
    a, d, b, e, c, f = six
    longest = max(abs(a), abs(b), abs(d), abs(e))
    if longest < 1e-6 or abs(a * e - b * d) < 1e-6 * longest**2:
        return
    read = parse_world("\n".join(map(repr, six)).encode())
    assert read @ (0.5, 0.5) == pytest.approx((c, f), abs=1e-3)
    assert (read.a, read.b, read.d, read.e) == (a, b, d, e)


# --- what is refused


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "does not hold six numbers"),
        ("1 0 0 -1 0", "does not hold six numbers"),
        ("1 0 0 -1 0 0 7", "does not hold six numbers"),
        ("nan 0 0 -1 0 0", "does not hold six numbers"),
        ("inf 0 0 -1 0 0", "does not hold six numbers"),
        ("1_0 0 0 -1 0 0", "does not hold six numbers"),
        ("0x10 0 0 -1 0 0", "does not hold six numbers"),
        ("root:x:0:0:root:/root:/bin/bash", "does not hold six numbers"),
        ("1e999 0 0 -1 0 0", "not finite or beyond all maps"),
        ("1 0 0 -1 1e300 0", "not finite or beyond all maps"),
        ("0 0 0 0 5 5", "in one line or point"),
        ("1 2 2 4 0 0", "in one line or point"),
        ("1 1 1 1.0000000000001 0 0", "in one line or point"),
        ("1e-320 0 0 0 0 0", "in one line or point"),
        ("1 0 0 -1 0 0" + " " * MAX_WORLD_BYTES, "larger than the 1,024 bytes"),
    ],
)
def test_a_world_file_that_is_none_is_told_with_the_reason_and_nothing_of_its_content(
    tmp_path: Path, text: str, reason: str
) -> None:
    path = write(tmp_path / "a.png", noise(3, 20, 30), driver="PNG")
    (tmp_path / "a.pgw").write_text(text)
    [warning] = [one for one in told(path) if "a.pgw" in one]
    assert reason in warning
    assert "root" not in warning
    assert str(tmp_path) not in warning


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_world_file_that_is_a_link_is_not_followed(tmp_path: Path, where: str) -> None:
    (tmp_path / "allowed").mkdir()
    path = write(tmp_path / "allowed" / "a.png", noise(3, 20, 30), driver="PNG")
    target = tmp_path / ("allowed" if where == "inside" else "") / "elsewhere.txt"
    target.write_text(WORLD)
    (tmp_path / "allowed" / "a.pgw").symlink_to(target)
    assert any("a.pgw beside the image is not used: it is no plain file" in one for one in told(path))


def test_a_pipe_or_a_folder_in_the_place_of_a_world_file_stops_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", noise(3, 20, 30), driver="PNG")
    os.mkfifo(tmp_path / "a.pgw")
    (tmp_path / "a.wld").mkdir()
    refused = [one for one in told(path) if "no plain file" in one]
    assert [one.split()[0] for one in refused] == ["a.pgw", "a.wld"]


def test_a_sound_world_file_is_used_though_another_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", noise(3, 20, 30), driver="PNG")
    (tmp_path / "a.pgw").write_text("no numbers")
    (tmp_path / "a.wld").write_text(WORLD)
    assert opened(path).placement == "world file a.wld"


def test_only_a_file_of_the_images_own_name_in_its_own_folder_counts(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = write(tmp_path / "images" / "a.png", noise(3, 20, 30), driver="PNG")
    for other in (tmp_path / "a.pgw", tmp_path / "images" / "b.pgw", tmp_path / "images" / "a.jgw"):
        other.write_text(WORLD)
    assert look_beside(AccessPolicy([tmp_path]), path).world is None
    told(path)


@pytest.mark.parametrize("name", ["a_rpc.txt", "a_RPC.TXT", "a_RPB.TXT", "a.RPB", "a.rpc"])
def test_rational_polynomials_beside_an_image_are_told_and_not_used(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.tif", noise(1, 20, 30))
    (tmp_path / name).write_text("LINE_OFF: 10\nSAMP_OFF: 10\n")
    assert any(f"RPCs in {name} beside it only" in one and "gdalwarp -rpc" in one for one in told(path))
    (tmp_path / name.replace("a", "b", 1)).write_text("LINE_OFF: 10\n")
    placed = write(tmp_path / "b.tif", noise(1, 20, 30), crs="EPSG:32633", transform=UTM)
    assert any(f"RPCs in b{name[1:]} beside it, which are not used" in one for one in opened(placed).warnings)


def test_a_projection_beside_an_image_is_told_with_the_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", noise(1, 20, 30), driver="PNG")
    (tmp_path / "a.prj").write_text('PROJCS["WGS_1984_UTM_Zone_33N"]')
    assert any("a.prj beside it is not read" in one and "gdal_edit.py -a_srs" in one for one in told(path))


def test_a_world_file_is_opened_once_and_never_by_gdal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tif", noise(1, 20, 30))
    (tmp_path / "a.tfw").write_text(WORLD)
    seen: list[str] = []
    real = os.open

    def watched(name: str, *args: int, **kwargs: int) -> int:
        seen.append(Path(name).name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)
    scene = opened(path)
    assert seen.count("a.tfw") == 1
    seen.clear()
    np.testing.assert_array_equal(scene.read((0, 0, 30, 20), (30, 20)).valid, True)
    assert "a.tfw" not in seen
