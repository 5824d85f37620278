"""Which files are opened, and what a refusal gives away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasters import noise, opened, whole, write

from rs_tools.errors import AccessError, ImageError
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.formats import MAX_BLOCK_BYTES


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    (folder / "sub").mkdir(parents=True)
    write(folder / "a.tif", noise(3, 40, 60))
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "hidden-away"
    folder.mkdir()
    return write(folder / "secret.tif", noise(3, 20, 30))


@pytest.mark.parametrize("name", ["a.tif", "./a.tif", "sub/../a.tif"])
def test_a_relative_name_is_looked_up_in_each_root(root: Path, secret: Path, name: str) -> None:
    assert AccessPolicy([secret.parent, root]).resolve(name) == root / "a.tif"


def test_a_link_that_stays_inside_the_roots_is_followed(root: Path) -> None:
    (root / "link.tif").symlink_to(root / "a.tif")
    assert AccessPolicy([root]).resolve("link.tif") == root / "a.tif"


def test_a_root_may_itself_be_reached_through_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "shortcut").symlink_to(root)
    assert AccessPolicy([tmp_path / "shortcut"]).resolve(str(tmp_path / "shortcut" / "a.tif")) == root / "a.tif"


@pytest.mark.parametrize("spelling", ["absolute", "dots", "link", "linked folder"])
def test_no_spelling_of_a_path_leads_out_of_the_roots(root: Path, secret: Path, spelling: str) -> None:
    (root / "link.tif").symlink_to(secret)
    (root / "folder").symlink_to(secret.parent)
    name = {
        "absolute": str(secret),
        "dots": "sub/../../hidden-away/secret.tif",
        "link": "link.tif",
        "linked folder": "folder/secret.tif",
    }[spelling]
    with pytest.raises(AccessError, match="outside the allowed folders") as refusal:
        AccessPolicy([root]).resolve(name)
    assert str(root) in str(refusal.value)
    assert "list_images" in str(refusal.value)
    if spelling in ("link", "linked folder"):
        assert "hidden-away" not in str(refusal.value)


def test_a_refusal_does_not_tell_whether_a_file_outside_exists(root: Path, secret: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(AccessError) as error:
            AccessPolicy([root]).resolve(str(path))
        return str(error.value).replace(path.name, "NAME")

    assert refusal(secret) == refusal(secret.with_name("absent.tif"))


def test_a_missing_file_is_told_apart_from_a_forbidden_one(root: Path) -> None:
    with pytest.raises(AccessError, match=r"no image file 'absent.tif'.*list_images"):
        AccessPolicy([root]).resolve("absent.tif")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("https://example.org/a.tif", "download"),
        ("file:///etc/passwd", "URLs"),
        ("/vsicurl/http://example.org/a.tif", "URLs"),
        ("/vsizip/a.zip/a.tif", "/vsi"),
        ("/VSIMEM/a.tif", "/vsi"),
        ("a.zip", "unpack"),
        ("", "empty"),
        ("a\0.tif", "null byte"),
        ("x" * 5000, "no image file"),
    ],
)
def test_a_name_that_is_not_a_plain_path_is_refused_with_advice(root: Path, name: str, advice: str) -> None:
    with pytest.raises(AccessError, match=advice) as refusal:
        AccessPolicy([root]).resolve(name)
    assert len(str(refusal.value)) < 1000


def test_links_that_form_a_loop_are_refused(root: Path) -> None:
    (root / "loop.tif").symlink_to(root / "pool.tif")
    (root / "pool.tif").symlink_to(root / "loop.tif")
    with pytest.raises(AccessError):
        AccessPolicy([root]).resolve("loop.tif")


def test_a_folder_is_not_an_image(root: Path) -> None:
    with pytest.raises(AccessError, match="no image file"):
        AccessPolicy([root]).resolve("sub")


def test_a_root_must_be_an_existing_folder(root: Path) -> None:
    with pytest.raises(AccessError, match="not a folder"):
        AccessPolicy([root / "a.tif"])


def test_no_roots_allow_nothing(root: Path) -> None:
    with pytest.raises(AccessError, match="Allowed folders: none"):
        AccessPolicy([]).resolve(str(root / "a.tif"))


def test_an_overview_that_is_a_link_out_of_the_roots_is_refused(root: Path, secret: Path) -> None:
    (root / "a.tif.ovr").symlink_to(secret)
    with pytest.raises(AccessError, match="outside the allowed folders") as refusal:
        opened(root / "a.tif")
    assert "hidden-away" not in str(refusal.value)


def test_an_overview_named_inside_the_image_is_refused(root: Path, secret: Path) -> None:
    with rasterio.open(root / "a.tif", "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(secret))
    with pytest.raises(AccessError, match="names another file as its overview"):
        opened(root / "a.tif")


def test_an_overview_named_in_a_sidecar_file_is_refused(root: Path, secret: Path) -> None:
    (root / "a.tif.aux.xml").write_text(
        f'<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{secret}</MDI></Metadata></PAMDataset>'
    )
    with pytest.raises(AccessError, match="names another file as its overview"):
        opened(root / "a.tif")


def test_an_overview_beside_the_image_is_used(root: Path) -> None:
    write(root / "big.tif", np.full((1, 2048, 2048), 9, "uint8"), tiled=True)
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(root / "big.tif", "r+") as file:
        file.build_overviews([4])
    # The overview says 77 where the image says 9, so the answer shows which was read.
    with rasterio.open(root / "big.tif.ovr", "r+") as file:
        file.write(np.full((1, 512, 512), 77, "uint8"))
    with AccessPolicy([root]).open(root / "big.tif") as file:
        assert file.read(1, out_shape=(512, 512)).max() == 77


def test_a_vrt_is_refused_whatever_its_name(root: Path, secret: Path) -> None:
    (root / "virtual.tif").write_text(
        '<VRTDataset rasterXSize="30" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(ImageError, match="VRT, which can point at other files"):
        opened(root / "virtual.tif")


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"Hello, I am a text.\n" * 9, "a text file"), (b"", "an empty file"), (b"PK\x03\x04" + b"\1" * 99, "a ZIP")],
)
def test_a_file_that_is_no_raster_is_named_for_what_it_is(root: Path, content: bytes, what: str) -> None:
    (root / "b.tif").write_bytes(content)
    with pytest.raises(ImageError, match=f"b.tif is {what}.*GTiff"):
        opened(root / "b.tif")


def test_the_content_decides_on_the_driver_and_not_the_extension(root: Path) -> None:
    values = noise(3, 20, 30)
    write(root / "c.png", values, driver="PNG").rename(root / "c.tif")
    np.testing.assert_array_equal(whole(opened(root / "c.tif")).rgb, values.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("name", "driver"),
    [("t.tif", "GTiff"), ("t.png", "PNG"), ("t.jpg", "JPEG"), ("t.webp", "WEBP"), ("t.jp2", "JP2OpenJPEG")],
)
def test_a_truncated_image_is_an_error_that_names_the_driver_and_no_folder(root: Path, name: str, driver: str) -> None:
    path = write(root / name, noise(3, 600, 600), driver=driver)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=f"{name} cannot be read by {driver}: .*truncated") as error:
        whole(opened(path), (100, 100))
    assert str(root) not in str(error.value)


def test_an_image_stored_as_one_giant_block_is_refused_before_it_is_decoded(root: Path) -> None:
    side = int(np.sqrt(MAX_BLOCK_BYTES)) // 16 * 16 + 16
    profile: dict[str, Any] = {"width": side, "height": side, "blockxsize": side, "blockysize": side, "tiled": True}
    with rasterio.open(root / "b.tif", "w", driver="GTiff", count=1, dtype="uint8", SPARSE_OK=True, **profile):
        pass
    with pytest.raises(ImageError, match="gdal_translate"):
        opened(root / "b.tif")


def test_the_images_of_a_folder_are_found_by_extension_and_inside_the_roots(root: Path, secret: Path) -> None:
    write(root / "sub" / "b.PNG", noise(1, 5, 5), driver="PNG")
    (root / "notes.txt").write_text("no image")
    (root / "out.tif").symlink_to(secret)
    assert list(AccessPolicy([root]).images()) == [root / "a.tif", root / "sub" / "b.PNG"]
    assert list(AccessPolicy([root]).images("sub")) == [root / "sub" / "b.PNG"]
    with pytest.raises(AccessError, match="not a folder inside"):
        list(AccessPolicy([root]).images(str(secret.parent)))
