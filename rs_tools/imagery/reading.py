"""Windows of an open raster as band values: averaged where reduced, without missing pixels, in parts that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rasterio.enums import MaskFlags, Resampling
from rasterio.io import DatasetReader
from rasterio.windows import Window

from rs_tools.imagery.bands import BandChoice
from rs_tools.imagery.formats import CACHE_BYTES, pixel_bytes

_SUPERSAMPLING = 4
_AT_ONCE = 2**21  # bytes of one band
_UNDECLARED = 1e37  # nothing measures as much: the largest decimals stand for missing pixels
_FILLS = (-9999, -32768)  # what stands for missing pixels in signed numbers of many files that do not say so
_LARGEST_RULE = 1e9  # a scale or an offset beyond it is damage


def window_of(x: float, y: float, width: float, height: float) -> Window:
    """A window from its upper left corner and size; they may be fractions of pixels."""
    return Window(x, y, width, height)  # pyright: ignore[reportCallIssue]  # attrs without types, which hides them


Region = tuple[int, int, int, int]
Wanted = tuple[Region, tuple[int, int]]
"""A window, x1, y1, x2, y2, and the (width, height) that it is read in."""


def together(windows: Sequence[Wanted], most: int) -> dict[Wanted, Region]:
    """For windows at full resolution that follow each other, the larger window of at most `most` pixels around them.

    Neighbours along a row make up one, and so do whole rows of them, one below the other. Read at once, their blocks
    are looked up and the bands put side by side once, not for each window that shares them. Windows that stand alone
    are left out.
    """
    groups: list[tuple[Region, list[Wanted]]] = []
    for row in _rows(windows, most):
        (left, top, _, _), (_, _, right, bottom) = row[0][0], row[-1][0]
        if groups:
            (x1, y1, x2, y2), above = groups[-1]
            below = (left, right) == (x1, x2) and y1 < top <= y2 < bottom
            if below and (x2 - x1) * (bottom - y1) <= most:
                groups[-1] = (x1, y1, x2, bottom), above + row
                continue
        groups.append(((left, top, right, bottom), row))
    return {window: whole for whole, group in groups if len(group) > 1 for window in group}


def _rows(windows: Sequence[Wanted], most: int) -> Iterator[list[Wanted]]:
    """Windows at full resolution, each list of them neighbours along a row."""
    row: list[Wanted] = []
    for region, size in windows:
        x1, y1, x2, y2 = region
        if row:
            (start, *_), (left, top, right, bottom) = row[0][0], row[-1][0]
            along = (y1, y2) == (top, bottom) and left < x1 <= right < x2
            if not along or (x2 - start) * (y2 - y1) > most:
                yield row
                row = []
        if size == (x2 - x1, y2 - y1):
            row.append((region, size))
        elif row:
            yield row
            row = []
    if row:
        yield row


class BandReader:
    """Reads the chosen bands of an open raster. What the raster says of itself is asked once: GDAL takes its time.

    Args:
        dataset: stays open as long as this is used, in one thread.
        choice: which bands.

    Attributes:
        at_once: pixels that are worth reading at once, within bounds of memory.
        missing: float32 [C, 1, 1], what nodata of each band is read as; NaN where the file declares none.
    """

    def __init__(self, dataset: DatasetReader, choice: BandChoice) -> None:
        self._dataset = dataset
        self._bands = list(choice.indexes)
        first = self._bands[0] - 1
        kind = dataset.dtypes[first]
        palette = dataset.colorinterp[first].name == "palette"
        self._resampling = Resampling.nearest if palette else Resampling.average
        self._dtype = np.dtype(np.uint8 if eight_bit(dataset, choice) else np.float32)
        self.at_once = _AT_ONCE // self._dtype.itemsize
        flags = dataset.mask_flag_enums
        self._complete = all(MaskFlags.all_valid in flags[index - 1] for index in self._bands)
        missing = [dataset.nodatavals[index - 1] for index in self._bands]
        self._fills = _FILLS if all(value is None for value in missing) and not kind.startswith("uint") else ()
        # Fill values would be averaged with the rest by GDAL, which does not know of them.
        self._integers = "int" in kind and not kind.startswith("complex") and not self._fills
        self._rule = _rule(dataset, choice)
        with np.errstate(over="ignore"):  # of float64
            numbers = np.array([np.nan if value is None else value for value in missing], np.float32)
        self._nodata = numbers[:, None, None]
        self.missing = self._measured(self._nodata).astype(np.float32)
        self._overviews = dataset.overviews(1)
        self._block: tuple[int, int] = dataset.block_shapes[0]
        self._part_pixels = CACHE_BYTES / 3 / pixel_bytes(dataset)

    def read(self, window: Window, out_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Band values [C, H, W], uint8 as they are and others as float32, and validity bool [H, W] of a window.

        What the file declares as scale and offset of its numbers is applied. Integers are averaged by GDAL, which
        leaves out nodata; a palette keeps its exact values. GDAL does not leave out NaN and fill values that the file
        does not declare, nor can it take the magnitude of complex values, so all others are averaged here. Validity is
        not to be written to: without missing pixels it is one row in memory.
        """
        # Each pixel's bands side by side, as pictures are wanted and as most files have them.
        values = np.empty((out_size[1], out_size[0], len(self._bands)), self._dtype).transpose(2, 0, 1)
        valid = np.empty(values.shape[1:], bool)
        if self._integers and self._complete:
            valid = np.broadcast_to(np.ones(out_size[0], bool), valid.shape)
        read = self._read_integers if self._integers else self._read_decimals
        for rows, columns, part in self._parts(window, out_size):
            read(part, values[:, rows, columns], valid[rows, columns])
        if self._rule is not None:
            values[:] = self._measured(values)
        return values, valid

    def _measured(self, numbers: np.ndarray) -> np.ndarray:
        """What a file's numbers [C, ...] stand for."""
        if self._rule is None:
            return numbers
        scale, offset = self._rule
        return np.clip(numbers * scale + offset, -_UNDECLARED, _UNDECLARED)

    def _parts(self, window: Window, out_size: tuple[int, int]) -> Iterator[tuple[slice, slice, Window]]:
        """Rows and columns of the output with the part of the window that they show.

        A part fits GDAL's block cache, so that reading its bands and masks one after the other decodes each block once.
        """
        width, height = out_size
        scale_x, scale_y = window.width / width, window.height / height
        shrunk = max((factor for factor in self._overviews if 1 <= factor <= min(scale_x, scale_y)), default=1)
        block_height, block_width = (side * shrunk for side in self._block)
        pixels = self._part_pixels * shrunk**2
        part_width = min(window.width, max(block_width, pixels**0.5))
        part_height = max(block_height, pixels / part_width)
        columns, rows = max(1, int(part_width / scale_x)), max(1, int(part_height / scale_y))
        if columns >= width and rows >= height:
            yield slice(0, height), slice(0, width), window
            return
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            for left in range(0, width, columns):
                right = min(left + columns, width)
                x, y = window.col_off + left * scale_x, window.row_off + top * scale_y
                part = window_of(x, y, (right - left) * scale_x, (bottom - top) * scale_y)
                yield slice(top, bottom), slice(left, right), part

    def _read_integers(self, window: Window, values: np.ndarray, valid: np.ndarray) -> None:
        wanted: dict[str, Any] = {"window": window, "resampling": self._resampling}
        if self._dtype == np.uint8:
            self._dataset.read(self._bands, out=values, **wanted)
        else:
            values[:] = self._dataset.read(self._bands, out_shape=values.shape, **wanted)
        if not self._complete:
            valid[:] = self._valid(window, values.shape)

    def _read_decimals(self, window: Window, values: np.ndarray, valid: np.ndarray) -> None:
        bands, height, width = values.shape
        fine_x = max(1, min(_SUPERSAMPLING, int(window.width // width)))
        fine_y = max(1, min(_SUPERSAMPLING, int(window.height // height)))
        shape = (bands, height * fine_y, width * fine_x)
        fine = self._dataset.read(self._bands, window=window, out_shape=shape)
        if np.iscomplexobj(fine):
            fine = np.abs(fine)
        masks = self._masks(window, shape)
        # False for NaN as well
        known = masks.any(axis=0) & (np.abs(fine) < _UNDECLARED).all(axis=0)
        for fill in self._fills:
            known &= (fine != fill).all(axis=0)
        own = known & masks  # what is missing in a band alone takes no part in that band's mean
        cells = (height, fine_y, width, fine_x)
        count = own.reshape(-1, *cells).sum(axis=(2, 4))
        total = np.where(own, fine, 0).reshape(bands, *cells).sum(axis=(2, 4), dtype=np.float64)
        values[:] = total / np.maximum(count, 1)
        valid[:] = known.reshape(cells).any(axis=(1, 3))
        if not count.all():
            values[:] = np.where((count == 0) & valid, self._nodata, values)

    def _valid(self, window: Window, shape: tuple[int, ...]) -> np.ndarray:
        """A pixel is valid where any shown band is: with nodata 0, black in one band alone is a colour."""
        return np.logical_or.reduce(self._masks(window, shape), axis=0)

    def _masks(self, window: Window, shape: tuple[int, ...]) -> np.ndarray:
        """Where each band holds data, bool [C, H, W]; [1, H, W] where all do."""
        if self._complete:
            return np.ones((1, *shape[1:]), bool)
        return self._dataset.read_masks(self._bands, window=window, out_shape=shape) > 0


def eight_bit(dataset: DatasetReader, choice: BandChoice) -> bool:
    """Whether the chosen bands hold bytes that stand for themselves."""
    return _bytes(dataset, choice) and _rule(dataset, choice) is None


def scale_and_offset(dataset: DatasetReader, index: int) -> tuple[float, float]:
    """The rule by which a band's numbers stand for what was measured: number * scale + offset."""
    scale, offset = dataset.scales[index - 1], dataset.offsets[index - 1]
    sane = 0 < abs(scale) <= _LARGEST_RULE and abs(offset) <= _LARGEST_RULE  # NaN is not
    return (scale, offset) if sane else (1.0, 0.0)


def _rule(dataset: DatasetReader, choice: BandChoice) -> np.ndarray | None:
    """Scales and offsets of the chosen bands, float64 [2, C, 1, 1]; None where numbers stand for themselves.

    Colours of eight bits and indexes of a palette do, whatever the file says.
    """
    rules = [scale_and_offset(dataset, index) for index in choice.indexes]
    palette = dataset.colorinterp[choice.indexes[0] - 1].name == "palette"
    if palette or (choice.declared and _bytes(dataset, choice)) or all(rule == (1, 0) for rule in rules):
        return None
    return np.array(rules).T[:, :, None, None]


def _bytes(dataset: DatasetReader, choice: BandChoice) -> bool:
    return all(dataset.dtypes[index - 1] == "uint8" for index in choice.indexes)
