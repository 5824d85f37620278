"""Which files are opened, and what a refusal gives away."""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasters import noise, opened, whole, write

from rs_tools.errors import AccessError, ImageError
from rs_tools.imagery import formats
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
        ("file:///etc/passwd", "path alone"),
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


# --- sidecar files


def test_georeference_and_nodata_of_single_bands_beside_an_image_are_used(root: Path) -> None:
    write(root / "b.png", noise(3, 20, 30), driver="PNG")
    (root / "b.png.aux.xml").write_text(
        "<PAMDataset><SRS>EPSG:32633</SRS><GeoTransform>400000, 10, 0, 5000000, 0, -10</GeoTransform>"
        '<PAMRasterBand band="2"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    with AccessPolicy([root]).open(root / "b.png") as file:
        assert file.nodatavals == (None, 7.0, None)
    scene = opened(root / "b.png")
    assert scene.georeference is not None
    assert scene.georeference.epsg == 32633


def test_a_mask_beside_an_image_is_obeyed(root: Path) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(root / "a.tif", "r+") as file:
        mask = np.full((40, 60), 255, "uint8")
        mask[:10] = 0
        file.write_mask(mask)
    assert (root / "a.tif.msk").exists()
    assert whole(opened(root / "a.tif")).valid.sum(axis=1).tolist() == [0] * 10 + [60] * 30


@pytest.mark.parametrize("ending", [".ovr", ".msk"])
@pytest.mark.parametrize("content", ["<VRTDataset rasterXSize='1' rasterYSize='1'/>", "<GDAL_WMS/>", "no raster"])
def test_an_overview_or_mask_that_is_not_a_tiff_file_is_refused(root: Path, ending: str, content: str) -> None:
    (root / f"a.tif{ending}").write_text(content)
    with pytest.raises(AccessError, match=f"a.tif{ending} beside the image is not a TIFF"):
        opened(root / "a.tif")


def test_an_overview_beside_the_image_that_names_another_file_is_refused(root: Path, secret: Path) -> None:
    write(root / "a.tif.ovr", noise(3, 20, 30))
    with rasterio.open(root / "a.tif.ovr", "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(secret))
    with pytest.raises(AccessError, match="names another file as its overview"):
        opened(root / "a.tif")


def test_other_files_beside_an_image_are_not_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.tab", "a.imd", "a.xml", "a.tif.ovr.ovr", "a.tif.vrt", "b.tfw", "b.ovr"):
        (root / name).write_text("")
    seen: list[str] = []
    real = os.open

    def watched(path: str, *args: int, **kwargs: int) -> int:
        seen.append(str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)
    opened(root / "a.tif")
    assert seen
    assert {Path(path).name for path in seen} == {root.name, "a.tif"}


# --- what was opened is what was checked


def test_a_file_that_becomes_a_link_after_it_was_checked_is_not_followed(root: Path, secret: Path) -> None:
    policy = AccessPolicy([root])
    checked = policy.resolve("a.tif")
    (root / "a.tif").unlink()
    (root / "a.tif").symlink_to(secret)
    with pytest.raises(ImageError, match="cannot be read"), policy.open(Path(str(checked))):
        pass


def test_a_folder_that_becomes_a_link_after_it_was_checked_is_not_followed(root: Path, secret: Path) -> None:
    write(root / "sub" / "secret.tif", noise(1, 5, 5))
    policy = AccessPolicy([root])
    checked = policy.resolve("sub/secret.tif")
    (root / "sub" / "secret.tif").unlink()
    (root / "sub").rmdir()
    (root / "sub").symlink_to(secret.parent)
    with pytest.raises(ImageError, match="cannot be read"), policy.open(Path(str(checked))):
        pass


def test_a_file_that_is_replaced_while_it_is_open_is_read_as_it_was(root: Path) -> None:
    policy = AccessPolicy([root])
    with policy.open(root / "a.tif") as file:
        write(root / "new.tif", noise(3, 4, 4)).replace(root / "a.tif")
        assert file.read().shape == (3, 40, 60)


def test_a_pipe_is_refused_and_does_not_stop_the_process(root: Path) -> None:
    os.mkfifo(root / "pipe.tif")
    policy = AccessPolicy([root])
    with pytest.raises(AccessError, match="no image file"):
        policy.resolve("pipe.tif")
    with pytest.raises(ImageError, match="not a plain file"), policy.open(root / "pipe.tif"):
        pass


def test_images_are_opened_from_any_thread_at_the_same_time(root: Path) -> None:
    for i in range(8):
        write(root / f"{i}.tif", np.full((1, 30, 30), 10 * i, "uint8"))
    policy = AccessPolicy([root])

    def read(i: int) -> int:
        with policy.open(root / f"{i}.tif") as file:
            return int(file.read(1).max())

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, [i % 8 for i in range(64)])) == [10 * (i % 8) for i in range(64)]


# --- limits


def sparse(path: Path, **profile: Any) -> Path:
    """A TIFF file that declares more than it holds."""
    profile = {"count": 1, "dtype": "uint8", "tiled": True, "blockxsize": 512, "blockysize": 512} | profile
    with rasterio.open(path, "w", driver="GTiff", SPARSE_OK=True, BIGTIFF="YES", **profile):
        pass
    return path


def test_too_many_bands_are_refused_with_the_limit(root: Path) -> None:
    path = sparse(root / "b.tif", width=16, height=16, count=formats.MAX_BANDS + 1, blockxsize=16, blockysize=16)
    with pytest.raises(ImageError, match=rf"bands; at most {formats.MAX_BANDS} are read.*gdal_translate"):
        opened(path)


def test_too_many_pixels_are_refused_with_the_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_PIXELS", 2000)
    with pytest.raises(ImageError, match=r"declares 60x40 pixels, more than the 2,000.*gdal_translate"):
        opened(root / "a.tif")


def test_a_tiny_file_that_declares_an_enormous_image_is_refused(root: Path) -> None:
    # The size of a sound little file is overwritten: tags 256 and 257 of its directory.
    data = bytearray((root / "a.tif").read_bytes())
    [at] = struct.unpack_from("<I", data, 4)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        tag = struct.unpack_from("<H", data, entry)[0]
        if tag in (256, 257):
            struct.pack_into("<HII", data, entry + 2, 4, 1, 100_000)
    (root / "b.tif").write_bytes(data)
    with pytest.raises(ImageError, match=r"b\.tif"):
        opened(root / "b.tif")


def test_an_image_far_larger_than_its_file_can_honestly_hold_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sparse(root / "b.tif", width=20_000, height=20_000)
    assert opened(path).width == 20_000  # with an index of all its blocks, it may be empty
    monkeypatch.setattr(formats, "_HONEST_BYTES", 0)
    monkeypatch.setattr(formats, "_HONEST_RATIO", 100)
    with pytest.raises(ImageError, match="declares 20000x20000 pixels in a file of only"):
        opened(path)


@pytest.mark.parametrize(("name", "driver"), [("b.png", "PNG"), ("b.jpg", "JPEG"), ("b.webp", "WEBP")])
def test_formats_that_decode_from_the_beginning_have_a_limit_of_their_own(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, driver: str
) -> None:
    path = write(root / name, noise(3, 100, 100), driver=driver)
    monkeypatch.setattr(formats, "MAX_SEQUENTIAL_PIXELS", 9999)
    with pytest.raises(ImageError, match=f"{driver} images of more than 9,999 pixels.*COG"):
        opened(path)


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
