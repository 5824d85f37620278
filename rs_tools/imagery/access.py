"""Which files may be read, and how they are opened.

An image name is resolved through symbolic links and `..` before it is compared with the allowed folders, and what
GDAL opened is compared again, sidecar files included: overviews and masks beside an image may be links, and a
metadata item inside an image can name any other file as its overview. The driver is chosen by the file's first
bytes from a short list, so that no virtual format (VRT, /vsi*, archives, web services) is ever consulted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.session import DummySession

from rs_tools.errors import AccessError, ImageError

# A scene without georeference is reported in every result; GDAL's own notice on stderr adds nothing.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"II*\0", "GTiff"),
    (b"MM\0*", "GTiff"),
    (b"II+\0", "GTiff"),
    (b"MM\0+", "GTiff"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\0\0\0\x0cjP  ", "JP2OpenJPEG"),
    (b"\xffO\xffQ", "JP2OpenJPEG"),
)
# What people do hand in, so that the refusal can name it.
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"<VRTDataset", "a VRT, which can point at other files"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 or netCDF-4 file"),
    (b"CDF", "a netCDF file"),
    (b"NITF", "a NITF file"),
    (b"GRIB", "a GRIB file"),
    (b"%PDF", "a PDF"),
)
READABLE = "GeoTIFF or COG (GTiff), PNG, JPEG, JPEG 2000 (JP2OpenJPEG) and WebP (WEBP)"
EXTENSIONS = frozenset({".tif", ".tiff", ".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".webp"})
MAX_BLOCK_BYTES = 512 * 2**20
CACHE_BYTES = 128 * 2**20  # of decoded blocks; the only thing that could grow with the size of a file
_GDAL_OPTIONS = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # else a truncated JPEG reads as grey
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
}


class AccessPolicy:
    """The folders that images may be read from.

    Args:
        roots: existing folders. Everything below them may be read; links out of them are refused.

    Raises:
        AccessError: a root is not an existing folder.
    """

    def __init__(self, roots: Iterable[str | Path]) -> None:
        self.roots = tuple(_folder(root) for root in roots)

    def resolve(self, image: str) -> Path:
        """The real path of an image that may be read; a relative name is looked up in each root.

        Raises:
            AccessError: not a plain path, outside the roots, or no such file. The message names the roots only.
        """
        _refuse_special(image)
        for candidate in self._candidates(image):
            if self._allows(candidate) and _is_file(candidate):
                return candidate
        if any(self._allows(candidate) for candidate in self._candidates(image)):
            raise AccessError(f"There is no image file {_shown(image)}. {self._hint()}")
        raise AccessError(f"{_shown(image)} is outside the allowed folders. {self._hint()}")

    def images(self, folder: str = "") -> Iterator[Path]:
        """Files with an image's extension below `folder` (empty: below every root), sorted within each folder.

        Links to folders are not followed; links to files count where their target lies inside the roots.

        Raises:
            AccessError: no such folder inside the roots.
        """
        for top in self._folders(folder):
            for where, folders, names in os.walk(top):
                folders.sort()
                for name in sorted(names):
                    path = Path(where, name)
                    if path.suffix.lower() in EXTENSIONS and self._allows(_real(path)) and _is_file(path):
                        yield path

    @contextmanager
    def open(self, path: Path) -> Iterator[DatasetReader]:
        """Open a resolved path as a raster. Failures to read inside the `with` block are reported as ImageError too.

        Raises:
            AccessError: the file, or a file that it draws on, lies outside the roots.
            ImageError: not a readable raster; names the driver and the reason.
        """
        driver = _driver_of(path)
        with rasterio.Env(session=DummySession(), **_GDAL_OPTIONS):
            try:
                with rasterio.open(path, driver=driver) as dataset:
                    self._check_opened(path, dataset)
                    _check_blocks(path, dataset)
                    yield dataset
            except (RasterioError, CRSError) as error:
                raise ImageError(f"{path.name} cannot be read by {driver}: {_reason(error, path)}") from error

    def _candidates(self, image: str) -> Iterator[Path]:
        for root in self.roots:
            yield _real(root / image)  # an absolute name replaces the root

    def _allows(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self.roots)

    def _folders(self, folder: str) -> list[Path]:
        if not folder:
            return list(self.roots)
        _refuse_special(folder)
        for candidate in self._candidates(folder):
            if self._allows(candidate) and candidate.is_dir():
                return [candidate]
        raise AccessError(f"{_shown(folder)} is not a folder inside the allowed folders. {self._hint()}")

    def _check_opened(self, path: Path, dataset: DatasetReader) -> None:
        # Asked first: listing the files would open the overview that this item names.
        if "OVERVIEW_FILE" in dataset.tags(ns="OVERVIEWS"):
            raise AccessError(f"{path.name} names another file as its overview, which is refused. {self._hint()}")
        for name in dataset.files:
            if not self._allows(_real(Path(name))):
                raise AccessError(f"{path.name} draws on a file outside the allowed folders. {self._hint()}")

    def _hint(self) -> str:
        allowed = ", ".join(str(root) for root in self.roots) or "none"
        return f"Allowed folders: {allowed}. Use list_images to see what they hold."


def _folder(root: str | Path) -> Path:
    path = Path(root).expanduser().resolve()
    if not path.is_dir():
        raise AccessError(f"The allowed folder {_shown(str(root))} does not exist or is not a folder.")
    return path


def _refuse_special(name: str) -> None:
    if not name.strip() or "\0" in name:
        raise AccessError("An image is named by a path; this one is empty or holds a null byte.")
    if "://" in name:
        raise AccessError("URLs are not read; download the image into an allowed folder and give its path.")
    if name.lower().startswith("/vsi"):
        raise AccessError("GDAL's virtual paths (/vsi...) are refused; give the path of a plain file.")
    suffix = Path(name).suffix.lower()
    if suffix in {".zip", ".gz", ".tgz", ".tar", ".7z", ".rar", ".kmz"}:
        raise AccessError(f"Archives ({suffix}) are not read; unpack it and give the path of an image in it.")


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise AccessError(f"{_shown(path.name)} cannot be followed: its links form a loop.") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system allows is not the name of a file
        return False


def _driver_of(path: Path) -> str:
    """The one driver that may open this file, from its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ImageError(f"{path.name} cannot be read: {error.strerror}.") from error
    for signature, driver in _SIGNATURES:
        if head.startswith(signature):
            return driver
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    raise ImageError(f"{path.name} is {_looks_like(head)}. No allowed driver reads it; readable: {READABLE}.")


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    for signature, what in _REFUSED:
        if head.lstrip().startswith(signature):
            return what
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return "a text file, not a raster" if printable == len(head) else "not a raster of a known format"


def _check_blocks(path: Path, dataset: DatasetReader) -> None:
    """A block is decoded whole, so one giant block would take the memory that windows are to save."""
    height, width = dataset.block_shapes[0]
    if height * width * pixel_bytes(dataset) > MAX_BLOCK_BYTES:
        raise ImageError(
            f"{path.name} is stored in blocks of {width}x{height} pixels, too large to decode in parts. "
            "Rewrite it in tiles: gdal_translate -of COG."
        )


def pixel_bytes(dataset: DatasetReader) -> int:
    """Bytes of one pixel with all its bands, which GDAL keeps together when it decodes a block."""
    return sum(4 if dtype == "complex_int16" else np.dtype(dtype).itemsize for dtype in dataset.dtypes)


def _reason(error: Exception, path: Path) -> str:
    """The innermost reason, without the folders that GDAL puts before file names."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(getattr(cause, "errmsg", cause)).replace(f"{path.parent}{os.sep}", "").strip().rstrip(".")
    return f"{text}. The file may be truncated or damaged."


def _shown(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")
