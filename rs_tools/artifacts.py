"""Files that answers refer to: masks (COG), vectors (GeoJSON, GeoParquet) and previews (PNG).

All lie in one folder that holds nothing else. A file appears whole or not at all: it is written in a folder of its own
and then renamed. Names cannot be guessed, and are lower-case hexadecimal because the host part of a URI, where some
clients put them, does not keep its case. Files go when their lifetime is over, or, oldest first, when the folder
is full; what is not named like an artifact is never touched.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import rasterio
import shapely
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.shutil import copy

from rs_tools.errors import ArtifactError
from rs_tools.geometry.blending import NODATA
from rs_tools.preview import class_color
from rs_tools.results import MIME_TYPES, SCHEME, Artifact, Provenance

LIFETIME_S = 24 * 3600.0
MAX_BYTES = 5 * 2**30
MAX_READ = 32 * 2**20  # of a file that is handed over as a whole; larger ones are opened where they lie
PIXEL_SPACE = "image pixels: x right, y down, from the top-left corner; not longitude and latitude"

_Kind = Literal["mask", "vectors", "preview"]
_NAME = re.compile(r"(mask|vectors|preview)-[0-9a-f]{32}(\.tif|\.geojson|\.pixels\.json|\.parquet|\.png)")
_SIDECAR = ".aux.xml"
_WRITING = ".writing-"
_BLOCK = 512
_WAITING_BYTES = 16 * 2**20  # of rows that do not yet make whole blocks
_GDAL_OPTIONS: dict[str, Any] = {"GDAL_CACHEMAX": 64 * 2**20}


@dataclass(frozen=True)
class Feature:
    """One object of a vector file. `geometry`: lon/lat, or pixels in the pixel-space variant; None: no known place."""

    geometry: shapely.Geometry | None
    properties: dict[str, Any]


class ArtifactStore:
    """The folder of artifacts. Safe to use from many threads; several processes may share a folder.

    Args:
        folder: made where it does not exist, for this user only.
        lifetime_s: seconds that a file is kept.
        max_bytes: of all files together.

    Raises:
        ArtifactError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, lifetime_s: float = LIFETIME_S, max_bytes: int = MAX_BYTES) -> None:
        try:
            Path(folder).expanduser().mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"The artifact folder cannot be made: {error.strerror}. Name another one.") from error
        self.folder = Path(folder).expanduser().resolve()
        self.lifetime_s = lifetime_s
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._active: set[str] = set()

    def mask(
        self,
        size: tuple[int, int],
        classes: Mapping[int, str],
        crs_wkt: str | None = None,
        transform: Affine | None = None,
    ) -> MaskWriter:
        """A class mask to be written row by row; used in a `with` block, after which it has an `artifact`.

        Args:
            size: (width, height).
            classes: mask value (1 to 254) -> class name.
            crs_wkt, transform: of the mask's own grid; None for an image without.
        """
        return MaskWriter(self, size, classes, crs_wkt, transform)

    def vectors(
        self,
        features: Iterable[Feature],
        provenance: Provenance,
        warnings: Sequence[str] = (),
        *,
        lonlat: bool = True,
        gsd_m: float | None = None,
    ) -> Artifact:
        """Features as GeoJSON (RFC 7946) with provenance and warnings as members of the collection.

        Args:
            features: placed by `geometry.vectors.placed`.
            provenance, warnings: of the answer.
            lonlat: False where the image has no place on Earth: geometries are in pixels, the file says so and is
                named and typed as plain JSON, so that no map shows it at the Gulf of Guinea.
            gsd_m: metres per pixel; coordinates are rounded to about a fiftieth of that.
        """
        digits = decimals(gsd_m) if lonlat else 2
        head: dict[str, Any] = {"type": "FeatureCollection"}
        if not lonlat:
            head["coordinate_space"] = PIXEL_SPACE
        head |= {"provenance": provenance.model_dump(), "warnings": list(warnings)}
        suffix = ".geojson" if lonlat else ".pixels.json"
        with self._writing("vectors", suffix) as (temporary, done), _reported("vectors"):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(head, allow_nan=False)[:-1] + ', "features": [')
                for i, feature in enumerate(features):
                    file.write(",\n" if i else "\n")
                    file.write(_feature_json(i, feature, digits))
                file.write("\n]}\n")
            return done()

    def geoparquet(self, features: Sequence[Feature], provenance: Provenance) -> Artifact:
        """Features in lon/lat as GeoParquet, provenance in each row; needs the extra `geo`.

        Raises:
            ArtifactError: geopandas or pyarrow is not installed.
        """
        try:
            import geopandas
            import pyarrow  # noqa: F401  (geopandas finds it missing only while it writes)
        except ImportError as error:
            raise ArtifactError(
                "GeoParquet needs geopandas and pyarrow: pip install 'rs-perception[geo]'. GeoJSON works without."
            ) from error
        rows = [feature.properties | {"provenance": provenance.model_dump_json()} for feature in features]
        geometries = np.array([feature.geometry for feature in features], object)
        with self._writing("vectors", ".parquet") as (temporary, done), _reported("vectors"):
            geopandas.GeoDataFrame(rows, geometry=geometries, crs="EPSG:4326").to_parquet(temporary)
            return done()

    def preview(self, png: bytes) -> Artifact:
        """A PNG of `rs_tools.preview`."""
        with self._writing("preview", ".png") as (temporary, done), _reported("preview"):
            temporary.write_bytes(png)
            return done()

    def resolve(self, uri: str) -> Path:
        """The path of an `rs-artifact://NAME` URI.

        Raises:
            ArtifactError: not such a URI, or no such file (any more).
        """
        name = uri.removeprefix(f"{SCHEME}://").removesuffix("/")
        if not uri.startswith(f"{SCHEME}://") or not _NAME.fullmatch(name):
            raise ArtifactError(f"{uri[:120]!r} is not an artifact; artifacts are named {SCHEME}://NAME in answers.")
        path = self.folder / name
        status = _status(path)
        if status is None or self._expired(status):
            hours = f"{self.lifetime_s / 3600:.3g}"
            raise ArtifactError(f"There is no artifact {name}: files are kept {hours} hours. Ask the tool again.")
        return path

    def read(self, uri: str) -> bytes:
        """The content of an `rs-artifact://NAME` URI.

        Raises:
            ArtifactError: as `resolve`, or the file has more than `MAX_READ` bytes.
        """
        path = self.resolve(uri)
        size = path.stat().st_size
        if size > MAX_READ:
            raise ArtifactError(
                f"{path.name} has {size / 1e6:.1f} MB; {MAX_READ / 1e6:.1f} MB are handed over. Open {path} itself."
            )
        return path.read_bytes()

    def sweep(self) -> None:
        """Remove what is past its lifetime: artifacts, and what a writer that died left behind."""
        with self._lock:
            for path, status in self._artifacts():
                if self._expired(status):
                    _remove(path)
            for entry in os.scandir(self.folder):
                if entry.name.startswith(_WRITING) and entry.name not in self._active:
                    newest = _newest(Path(entry.path))
                    if newest is not None and newest < time.time() - self.lifetime_s:
                        shutil.rmtree(entry.path, ignore_errors=True)

    @contextmanager
    def _writing(self, kind: _Kind, suffix: str) -> Iterator[tuple[Path, Callable[[], Artifact]]]:
        """A path to write to and the function that makes an artifact of it; afterwards nothing else remains."""
        with _reported(kind):
            self.sweep()
            folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=self.folder))
        self._active.add(folder.name)
        temporary = folder / f"file{suffix}"
        try:
            yield temporary, lambda: self._keep(temporary, kind, suffix)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._active.discard(folder.name)

    def _keep(self, temporary: Path, kind: _Kind, suffix: str) -> Artifact:
        name = f"{kind}-{secrets.token_hex(16)}{suffix}"
        path, sidecar = self.folder / name, Path(f"{temporary}{_SIDECAR}")
        size = temporary.stat().st_size + (sidecar.stat().st_size if sidecar.exists() else 0)
        if size > self.max_bytes:
            raise ArtifactError(
                f"The {kind} file has {size / 1e6:.1f} MB; at most {self.max_bytes / 1e6:.1f} MB are kept. "
                "Ask about a smaller region."
            )
        with self._lock:
            self._make_room(size)
            if sidecar.exists():
                os.replace(sidecar, f"{path}{_SIDECAR}")
            os.replace(temporary, path)
        return Artifact(name=name, kind=kind, uri=f"{SCHEME}://{name}", path=str(path), mime_type=MIME_TYPES[suffix])

    def _make_room(self, size: int) -> None:
        kept = sorted(self._artifacts(), key=lambda one: one[1].st_mtime_ns)
        total = sum(_bytes(path, status) for path, status in kept)
        for path, status in kept:
            if total + size <= self.max_bytes:
                return
            total -= _bytes(path, status)
            _remove(path)

    def _artifacts(self) -> list[tuple[Path, os.stat_result]]:
        named = [Path(entry.path) for entry in os.scandir(self.folder) if _NAME.fullmatch(entry.name)]
        return [(path, status) for path in named if (status := _status(path)) is not None]

    def _expired(self, status: os.stat_result) -> bool:
        return status.st_mtime < time.time() - self.lifetime_s


class MaskWriter:
    """Writes a mask from the top; made by `ArtifactStore.mask`.

    The file is a Cloud Optimized GeoTIFF: uint8, tiled, with overviews, nodata 255 and a colour table (TIFF has no
    transparency in it: 0, no class, is black). Class names are tags of the band (`CLASS_1` ...), and category names in
    the sidecar `NAME.aux.xml`, where QGIS and GDAL look.
    """

    def __init__(
        self,
        store: ArtifactStore,
        size: tuple[int, int],
        classes: Mapping[int, str],
        crs_wkt: str | None,
        transform: Affine | None,
    ) -> None:
        if not all(0 < value < NODATA for value in classes):
            raise ValueError(f"class values are 1 to {NODATA - 1}, not {sorted(classes)}")
        self._context = store._writing("mask", ".tif")
        self._width, self._height = size
        self._classes = classes
        self._place: dict[str, Any] = {"transform": transform} if transform is not None else {}
        if crs_wkt:
            self._place["crs"] = CRS.from_wkt(crs_wkt)
        # Whole blocks are written, so as many rows wait as a block has: fewer where they are very long.
        self._block_rows = min(_BLOCK, max(16, _WAITING_BYTES // self._width // 16 * 16))
        self._written = 0
        self._rows: list[np.ndarray] = []
        self._artifact: Artifact | None = None

    @property
    def artifact(self) -> Artifact:
        """The finished file.

        Raises:
            ValueError: the `with` block has not ended yet, or ended with an error.
        """
        if self._artifact is None:
            raise ValueError("the mask is not finished")
        return self._artifact

    def __enter__(self) -> MaskWriter:
        self._path, self._done = self._context.__enter__()
        self._raw = self._path.with_name("rows.tif")
        with rasterio.Env(**_GDAL_OPTIONS), _reported("mask"):
            self._file = rasterio.open(
                self._raw,
                "w",
                driver="GTiff",
                dtype="uint8",
                count=1,
                width=self._width,
                height=self._height,
                nodata=NODATA,
                tiled=True,
                blockxsize=_BLOCK,
                blockysize=self._block_rows,
                compress="deflate",
                zlevel=1,
                bigtiff="if_safer",
                **self._place,
            )
            self._file.write_colormap(1, {0: (0, 0, 0, 255)} | {v: (*class_color(v), 255) for v in self._classes})
            self._file.update_tags(1, **{f"CLASS_{value}": name for value, name in self._classes.items()})
        return self

    def write(self, rows: np.ndarray) -> None:
        """The next rows, uint8 [n, width].

        Raises:
            ValueError: wrong width or type, or more rows than the mask has.
        """
        waiting = sum(len(part) for part in self._rows) + len(rows)
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != self._width:
            raise ValueError(f"rows are uint8 [n, {self._width}], not {rows.dtype} {list(rows.shape)}")
        if self._written + waiting > self._height:
            raise ValueError(f"the mask has {self._height} rows, not {self._written + waiting}")
        self._rows.append(rows)
        # Whole rows of blocks only: a block written twice is compressed twice and leaves a hole in the file.
        whole = waiting // self._block_rows * self._block_rows
        if whole or self._written + waiting == self._height:
            stack = np.concatenate(self._rows)
            count = len(stack) if self._written + waiting == self._height else whole
            self._flush(stack[:count])
            self._rows = [stack[count:]] if count < len(stack) else []

    def _flush(self, rows: np.ndarray) -> None:
        with rasterio.Env(**_GDAL_OPTIONS), _reported("mask"):
            self._file.write(rows, 1, window=((self._written, self._written + len(rows)), (0, self._width)))
        self._written += len(rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self._file.close()
            return self._context.__exit__(kind, error, trace)
        try:
            self._finish()
        except BaseException as failure:
            self._context.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self._context.__exit__(None, None, None)

    def _finish(self) -> None:
        with rasterio.Env(**_GDAL_OPTIONS), _reported("mask"):
            self._file.close()
            if self._written != self._height:
                written = self._written + sum(len(part) for part in self._rows)
                raise ValueError(f"the mask has {self._height} rows, {written} were written")
            copy(
                self._raw,
                self._path,
                driver="COG",
                compress="deflate",
                blocksize=_BLOCK,
                overview_resampling="nearest",
                bigtiff="if_safer",
            )
            _name_categories(Path(f"{self._path}{_SIDECAR}"), self._classes)
            self._artifact = self._done()


@contextmanager
def _reported(kind: _Kind) -> Iterator[None]:
    """Failures to write as errors for the caller."""
    try:
        yield
    except (OSError, RasterioError) as error:
        reason = getattr(error, "strerror", None) or "the raster driver failed"
        raise ArtifactError(f"The {kind} file cannot be written: {reason}. Is there room on the disk?") from error


def _name_categories(sidecar: Path, classes: Mapping[int, str]) -> None:
    """Put the name of each value from 0 up into GDAL's sidecar, which holds what the TIFF itself could not."""
    root = ElementTree.parse(sidecar).getroot() if sidecar.exists() else ElementTree.Element("PAMDataset")
    band = root.find("PAMRasterBand")
    if band is None:
        band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    names = ElementTree.SubElement(band, "CategoryNames")
    for value in range(max(classes, default=0) + 1):
        ElementTree.SubElement(names, "Category").text = classes.get(value, "") if value else "none"
    ElementTree.ElementTree(root).write(sidecar, encoding="utf-8")


def _feature_json(number: int, feature: Feature, digits: int) -> str:
    if feature.geometry is None:
        geometry = "null"
    else:
        rounded = shapely.transform(feature.geometry, lambda points: np.round(points, digits))
        geometry = shapely.to_geojson(rounded)
    properties = json.dumps(feature.properties, allow_nan=False, ensure_ascii=False)
    return f'{{"type": "Feature", "id": {number}, "geometry": {geometry}, "properties": {properties}}}'


def decimals(gsd_m: float | None) -> int:
    """Decimals of a degree that keep a fiftieth of a pixel."""
    if not gsd_m:
        return 8
    return min(12, max(6, math.ceil(-math.log10(gsd_m / 111_320 / 50))))


def _status(path: Path) -> os.stat_result | None:
    """Of a plain file; None where there is none (another process may have removed it) or where it is a link."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _bytes(path: Path, status: os.stat_result) -> int:
    sidecar = _status(Path(f"{path}{_SIDECAR}"))
    return status.st_size + (sidecar.st_size if sidecar else 0)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    Path(f"{path}{_SIDECAR}").unlink(missing_ok=True)


def _newest(folder: Path) -> float | None:
    """When anything in a folder was last written; None where it is gone."""
    try:
        return max([folder.stat().st_mtime, *(entry.stat().st_mtime for entry in os.scandir(folder))])
    except OSError:
        return None
