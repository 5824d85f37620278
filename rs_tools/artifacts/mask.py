"""A mask written from the top, row by row, as a Cloud Optimized GeoTIFF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.shutil import copy

from rs_tools.artifacts.folder import SIDECAR, ArtifactFolder, reported
from rs_tools.geometry.blending import NODATA
from rs_tools.preview import class_color
from rs_tools.results import Artifact

_BLOCK = 512
_WAITING_BYTES = 16 * 2**20  # of rows that do not yet make whole blocks
_GDAL_OPTIONS: dict[str, Any] = {"GDAL_CACHEMAX": 64 * 2**20}


class MaskWriter:
    """Writes a mask from the top; made by `store.ArtifactStore.mask`.

    The file is a Cloud Optimized GeoTIFF: uint8, tiled, with overviews, nodata 255 and a colour table (TIFF has no
    transparency in it: 0, no class, is black). Class names are tags of the band (`CLASS_1` ...), and category names in
    the sidecar `NAME.aux.xml`, where QGIS and GDAL look.
    """

    def __init__(
        self,
        folder: ArtifactFolder,
        size: tuple[int, int],
        classes: Mapping[int, str],
        crs_wkt: str | None,
        transform: Affine | None,
    ) -> None:
        if not all(0 < value < NODATA for value in classes):
            raise ValueError(f"class values are 1 to {NODATA - 1}, not {sorted(classes)}")
        self._context = folder.writing("mask", ".tif")
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
        with rasterio.Env(**_GDAL_OPTIONS), reported("mask"):
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
        with rasterio.Env(**_GDAL_OPTIONS), reported("mask"):
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
        with rasterio.Env(**_GDAL_OPTIONS), reported("mask"):
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
            _name_categories(Path(f"{self._path}{SIDECAR}"), self._classes)
            self._artifact = self._done()


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


