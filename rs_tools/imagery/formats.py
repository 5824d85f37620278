"""How the bytes of an admitted file become a GDAL dataset.

GDAL never opens a path or an address here. It asks for names in a folder that exists only for this one opening, and
gets the image and the sidecar files that the access policy opened and checked; anything else is not there. The driver
is chosen by the first bytes from a short list, so that no virtual format (VRT, /vsi*, archives, web services) is ever
consulted, and what a file declares about itself is held against limits before a pixel is decoded.

Sidecar files that count: overviews (.ovr) and masks (.msk), which must be TIFF files, and .aux.xml, which is small.
GDAL never sees files of other names beside an image; `beside` says which of those are read without it.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError  # what escapes rasterio unwrapped; it has no public name
from rasterio.abc import FileContainer
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.session import DummySession

from rs_tools.errors import AccessError, ImageError, PerceptionError

# A scene without georeference is reported in every result; GDAL's own notice on stderr adds nothing.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    *((signature, "GTiff") for signature in _TIFF),
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
# The name that GDAL sees, in place of the file's own.
_NAMES = {
    "GTiff": "image.tif",
    "PNG": "image.png",
    "JPEG": "image.jpg",
    "JP2OpenJPEG": "image.jp2",
    "WEBP": "image.webp",
}

MAX_BANDS = 1024
MAX_PIXELS = 4 * 10**10  # a square of 200,000
MAX_BLOCK_BYTES = 256 * 2**20
# Drivers that decode an image from its beginning, whatever window is asked for.
_SEQUENTIAL = frozenset({"PNG", "JPEG", "WEBP"})
MAX_SEQUENTIAL_PIXELS = 2**28
# Even an empty block needs some bytes of index, so a tiny file cannot honestly hold an enormous image.
_HONEST_BYTES = 2**30
_HONEST_RATIO = 10**6
SIDECARS = (".ovr", ".msk", ".aux.xml")
MAX_TEXT_SIDECAR = 16 * 2**20

CACHE_BYTES = 128 * 2**20  # of decoded blocks; the only thing that could grow with the size of a file
_READ_BYTES = 2**30  # at most at once: the bridge between GDAL and Python counts in 32 bits
_GDAL_OPTIONS = {
    "GDAL_CACHEMAX": CACHE_BYTES,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # else a truncated JPEG reads as grey
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    "GDAL_DISABLE_READDIR_ON_OPEN": False,
}


class ByteSource(Protocol):
    """An opened and admitted file. Its content does not change while it is open, or `read_at` says that it did."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read_at(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from `offset`; fewer only at the end.

        Raises:
            PerceptionError, OSError: they cannot be had.
        """
        ...


@contextmanager
def opened(source: ByteSource, sidecars: Mapping[str, ByteSource]) -> Iterator[DatasetReader]:
    """A file as a raster. Failures to read inside the `with` block are reported as ImageError too.

    Args:
        source: the image.
        sidecars: files that belong to it, by what follows the image's name: one of `SIDECARS`.

    Raises:
        AccessError: it names another file as its overview.
        ImageError: not a readable raster, or beyond a limit; names the driver and the reason.
    """
    driver = _driver_of(source)
    folder = _Folder(_NAMES[driver], source, sidecars)
    for ending, sidecar in sidecars.items():
        _check_sidecar(ending, sidecar)
    with rasterio.Env(session=DummySession(), **_GDAL_OPTIONS):
        try:
            name = f"scene/{_NAMES[driver]}"
            with reported(source.name, driver), rasterio.open(name, driver=driver, opener=folder) as dataset:
                _check_declared(source, dataset, driver)
                yield dataset
        except ImageError:
            folder.raise_kept()
            raise
        folder.raise_kept()


@contextmanager
def reported(name: str, driver: str) -> Iterator[None]:
    """Failures of GDAL inside the `with` block as an ImageError about the image of this name.

    `opened` reports them too. Who reads several images at a time wraps each read, so that the right one is blamed.
    """
    try:
        yield
    except (RasterioError, CRSError, CPLE_BaseError, UnicodeDecodeError) as error:
        raise ImageError(f"{name} cannot be read by {driver}: {_reason(error)}") from error


class _Folder(FileContainer):
    """The one folder that GDAL sees: the image and its sidecar files."""

    def __init__(self, name: str, source: ByteSource, sidecars: Mapping[str, ByteSource]) -> None:
        self._files = {name: source} | {name + ending: sidecar for ending, sidecar in sidecars.items()}
        self._kept: list[Exception] = []

    def open(self, path: str, mode: str = "r", **_: object) -> _View:
        if mode.strip("b") != "r":
            raise PermissionError(path)
        return _View(self._file(path), self._kept)

    def isfile(self, path: str) -> bool:
        return PurePosixPath(path).name in self._files

    def isdir(self, path: str) -> bool:
        return not self.isfile(path)

    def ls(self, path: str) -> list[str]:
        return list(self._files)

    def mtime(self, path: str) -> int:
        return 0

    def size(self, path: str) -> int:
        return self._file(path).size

    def rm(self, path: str) -> None:
        raise PermissionError(path)

    def raise_kept(self) -> None:
        """What a file said while GDAL read it, in place of what GDAL makes of the missing bytes."""
        for error in self._kept:
            if isinstance(error, PerceptionError):
                raise error
            raise ImageError(f"The file cannot be read: {error}.") from error

    def _file(self, path: str) -> ByteSource:
        try:
            return self._files[PurePosixPath(path).name]
        except KeyError:
            raise FileNotFoundError(path) from None


class _View(io.RawIOBase):
    """One reading position in a file. It never raises, since its caller is C code: errors are kept for later."""

    def __init__(self, source: ByteSource, kept: list[Exception]) -> None:
        self._source, self._kept = source, kept
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._source.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._position)
        count = min(left if size < 0 else size, left, _READ_BYTES)
        if count == 0 or self._kept:
            return b""
        try:
            data = self._source.read_at(self._position, count)
        except (PerceptionError, OSError) as error:
            self._kept.append(error)
            return b""
        self._position += len(data)
        return data


def _driver_of(source: ByteSource) -> str:
    """The one driver that may open this file, from its first bytes."""
    head = _head(source)
    for signature, driver in _SIGNATURES:
        if head.startswith(signature):
            return driver
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    raise ImageError(f"{source.name} is {_looks_like(head)}. No allowed driver reads it; readable: {READABLE}.")


def _head(source: ByteSource) -> bytes:
    try:
        return source.read_at(0, 512)
    except OSError as error:
        raise ImageError(f"{source.name} cannot be read: {error.strerror}.") from error


def _looks_like(head: bytes) -> str:
    if not head:
        return "an empty file"
    for signature, what in _REFUSED:
        if head.lstrip().startswith(signature):
            return what
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return "a text file, not a raster" if printable == len(head) else "not a raster of a known format"


def _check_sidecar(ending: str, sidecar: ByteSource) -> None:
    if ending == ".aux.xml":
        if sidecar.size > MAX_TEXT_SIDECAR:
            limit = MAX_TEXT_SIDECAR // 2**20
            raise ImageError(f"{sidecar.name} beside the image is larger than {limit} MiB; move it away.")
        return
    # GDAL would open these with any of its drivers: a VRT there could lead anywhere.
    if not _head(sidecar).startswith(_TIFF):
        raise AccessError(f"{sidecar.name} beside the image is not a TIFF file, which is refused; move it away.")
    with opened(sidecar, {}):
        pass


def _check_declared(source: ByteSource, dataset: DatasetReader, driver: str) -> None:
    # An item of this name would make GDAL open whatever it names.
    if "OVERVIEW_FILE" in dataset.tags(ns="OVERVIEWS"):
        raise AccessError(f"{source.name} names another file as its overview, which is refused.")
    width, height = dataset.width, dataset.height
    size = f"{source.name} declares {width}x{height} pixels"
    if dataset.count > MAX_BANDS:
        raise ImageError(
            f"{source.name} has {dataset.count} bands; at most {MAX_BANDS} are read. Keep the ones you need: "
            "gdal_translate -b."
        )
    if width * height > MAX_PIXELS:
        raise ImageError(f"{size}, more than the {MAX_PIXELS:,} that are read. Cut it into parts: gdal_translate.")
    if width * height * pixel_bytes(dataset) > _HONEST_BYTES + _HONEST_RATIO * source.size:
        raise ImageError(f"{size} in a file of only {source.size} bytes. The file may be damaged.")
    if driver in _SEQUENTIAL and width * height > MAX_SEQUENTIAL_PIXELS:
        raise ImageError(
            f"{size}, and {driver} images of more than {MAX_SEQUENTIAL_PIXELS:,} pixels are not read, since they "
            "cannot be decoded in parts. Convert it: gdal_translate -of COG."
        )
    block_height, block_width = (height, width) if driver == "WEBP" else dataset.block_shapes[0]
    if block_height * block_width * pixel_bytes(dataset) > MAX_BLOCK_BYTES:
        raise ImageError(
            f"{source.name} is stored in blocks of {block_width}x{block_height} pixels, too large to decode in parts. "
            "Rewrite it in tiles: gdal_translate -of COG."
        )


def pixel_bytes(dataset: DatasetReader) -> int:
    """Bytes of one pixel with all its bands, which GDAL keeps together when it decodes a block."""
    return sum(4 if dtype == "complex_int16" else np.dtype(dtype).itemsize for dtype in dataset.dtypes)


def _reason(error: Exception) -> str:
    """The innermost reason, in printable characters: GDAL quotes what it finds in the file."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(getattr(cause, "errmsg", cause))
    text = "".join(character if character.isprintable() else " " for character in text)
    inner = {f"{name}:" for name in _NAMES.values()}
    words = [word for word in text.split() if "/vsi" not in word and word not in inner]
    return f"{' '.join(words)[:300].rstrip('.: ')}. The file may be truncated or damaged."
