"""A raster as the tools see it: described once, read by decimated windows as 8-bit RGB.

A `Scene` holds no open file, so it may be kept, shared between threads and read at the same time. Every read (or
reader of many windows) opens the file anew under the access policy and refuses one that has changed since.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple, Protocol

import numpy as np
from affine import Affine
from rasterio.io import DatasetReader
from rasterio.windows import Window

from rs_tools.errors import ImageError, RegionError
from rs_tools.geometry.extents import pixels_within
from rs_tools.geometry.measures import Georeference
from rs_tools.imagery.access import AccessPolicy, Source, Stamp, stamp_of
from rs_tools.imagery.bands import BandChoice, BandInfo, choose_bands, guess_modality
from rs_tools.imagery.beside import look_beside
from rs_tools.imagery.formats import ByteSource, reported
from rs_tools.imagery.placing import Place, placed
from rs_tools.imagery.reading import (
    BandReader,
    Region,
    Wanted,
    eight_bit,
    scale_and_offset,
    together,
    window_of,
)
from rs_tools.imagery.remote import RemoteFile
from rs_tools.imagery.stretch import Stretch, fit_stretch
from rs_tools.memory import give_back
from rs_tools.results import Modality

_SAMPLE_SIDE = 512
# Above this many pixels, in the smallest overview where there is one, a sample of small windows stands for the scene.
_SAMPLE_WHOLE = 4096 * 4096
_SAMPLE_WINDOWS, _MORE_WINDOWS = 8, 32  # per axis
_SAMPLE_WINDOW_SIDE = 64
_DIGEST_CHUNK = 64 * 1024
_DIGEST_CHUNKS = 64
_DESCRIPTION = 200  # characters of a band's description
_ROUNDING = 0.05  # pixels; coordinates in vector files are rounded to a fiftieth


class Pixels(NamedTuple):
    """A read window: `rgb` uint8 [H, W, 3], 0 where invalid; `valid` bool [H, W], not to be written to."""

    rgb: np.ndarray
    valid: np.ndarray

    def cut(self, rows: slice, columns: slice) -> Pixels:
        """A part of the window, with colours of its own, as a model takes them."""
        return Pixels(self.rgb[rows, columns].copy(), self.valid[rows, columns])


class ReadWindow(Protocol):
    """Reads a window of a scene whose file is held open; see `Scene.reader`."""

    def __call__(self, region: Region, out_size: tuple[int, int]) -> Pixels: ...


@dataclass(frozen=True)
class Scene:
    """One raster image, with the bands and the stretch that it is shown in.

    Attributes:
        source: the real path of the file, or the state of an https address; both have a `name`.
        width, height: pixels.
        bands: every band as the file declares it.
        nodata: value of missing pixels in the first shown band, or None.
        crs_wkt: coordinate reference system, also where it gives no place on Earth; None where there is none.
        georeference: None where pixels have no known place.
        grid: from pixels to map units of an unknown coordinate reference system; None where the place is known or
            nothing is.
        placement: what place or grid come from: transform, world file NAME, ground control points; empty for neither.
        choice: the bands that are shown.
        stretch: how their values become 8 bits; one for the whole scene.
        modality, modality_reason: best guess of the kind of measurement.
        digest: SHA-256 over the file's size and content; of a file above 4 MiB over 64 evenly spaced pieces of 64 KiB,
            first and last included; behind an address over its size, version and first 64 KiB. Sidecar files do not
            count.
        warnings: what a user of any answer about this scene should know.
    """

    source: Source
    width: int
    height: int
    bands: tuple[BandInfo, ...]
    nodata: float | None
    crs_wkt: str | None
    georeference: Georeference | None
    grid: Affine | None
    placement: str
    choice: BandChoice
    stretch: Stretch
    modality: Modality
    modality_reason: str
    digest: str
    warnings: tuple[str, ...]
    _policy: AccessPolicy
    _stamp: Stamp

    @classmethod
    def open(cls, policy: AccessPolicy, image: str, bands: Sequence[int] = ()) -> Scene:
        """Describe an image and fit its stretch.

        Args:
            policy: what may be read.
            image: path of the image.
            bands: one (grey) or three (red, green, blue) band numbers; empty lets the file decide.

        Raises:
            AccessError: the image may not be read.
            ImageError: it is not a raster, damaged, or too awkwardly stored.
            InputError: `bands` does not fit the image.
        """
        source = policy.resolve(image)
        stamp = stamp_of(source)
        with policy.file(source) as file, policy.dataset(source, file) as dataset:
            infos = _band_infos(dataset)
            choice = choose_bands(infos, bands)
            sample = _sample(dataset, choice)
            modality, reason = guess_modality(infos, choice, PurePath(source.name).stem, sample)
            stretch = _stretch(dataset, choice, sample, radar=modality == "sar")
            place = placed(dataset, look_beside(policy, source))
            return cls(
                source=source,
                width=dataset.width,
                height=dataset.height,
                bands=infos,
                nodata=dataset.nodatavals[choice.indexes[0] - 1],
                crs_wkt=place.crs_wkt,
                georeference=place.georeference,
                grid=place.grid,
                placement=place.origin,
                choice=choice,
                stretch=stretch,
                modality=modality,
                modality_reason=reason,
                digest=_digest(file, stamp),
                warnings=tuple(_warnings(dataset, choice, place)),
                _policy=policy,
                _stamp=stamp,
            )

    def region(self, region: Sequence[float]) -> Region:
        """The checked region in whole pixels, grown to pixel edges; empty means the whole image.

        What reaches beyond the image by no more than the rounding of an outline's coordinates ends at its edge.

        Raises:
            RegionError: not four finite numbers, empty, reversed, or not inside the image.
        """
        if len(region) == 0:
            return 0, 0, self.width, self.height
        size = f"The image is {self.width}x{self.height} pixels; give [x1, y1, x2, y2] with"
        rule = f"{size} 0 <= x1 < x2 <= {self.width} and 0 <= y1 < y2 <= {self.height}, or nothing for the whole."
        if len(region) != 4 or not np.isfinite(region).all():
            raise RegionError(f"The region {list(region)} is not four numbers. {rule}")
        x1, y1, x2, y2 = region
        if x1 >= x2 or y1 >= y2:
            raise RegionError(f"The region {list(region)} is empty or reversed. {rule}")
        left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
        right, bottom = min(self.width, math.ceil(x2)), min(self.height, math.ceil(y2))
        beyond = max(-x1, -y1, x2 - self.width, y2 - self.height)
        if beyond > _ROUNDING or left >= right or top >= bottom:
            raise RegionError(f"The region {list(region)} is not inside the image. {rule}{self.in_degrees(region)}")
        return left, top, right, bottom

    def in_degrees(self, region: Sequence[float]) -> str:
        """What a region is in pixels if degrees were meant, as a sentence; empty where they cannot have been."""
        if self.georeference is None:
            return ""
        try:
            found = pixels_within(self.georeference, self.width, self.height, region)
        except RegionError:
            return ""
        return f" Meant as [west, south, east, north] in degrees, it is [{', '.join(f'{side:.0f}' for side in found)}]."

    def read(self, region: Region, out_size: tuple[int, int]) -> Pixels:
        """Read one window, decimated while reading so that memory follows `out_size` and not the region.

        Args:
            region: x1, y1, x2, y2 in pixels, as `region` returns it.
            out_size: (width, height) of the result, not larger than the region.

        Raises:
            AccessError, ImageError: the file is gone, damaged in this window, or changed since it was opened.
        """
        with self.reader() as read:
            return read(region, out_size)

    @contextmanager
    def reader(self, windows: Sequence[Wanted] = ()) -> Iterator[ReadWindow]:
        """Read many windows with the file opened once: `with scene.reader() as read: pixels = read(region, size)`.

        What it yields reads as `Scene.read` does, with the same checks, and keeps nothing between calls but GDAL's
        bounded cache of decoded blocks and what was read together last. One thread at a time; several readers of one
        scene may be used side by side.

        Args:
            windows: what will be read, in order, as far as it is known: neighbours are read together.

        Raises:
            AccessError, ImageError: as `read`, on entering or from any call inside the `with` block.
        """
        self._check_unchanged()
        try:
            with self._policy.open(self.source) as dataset:
                yield _Reading(self, dataset, windows)
        finally:
            give_back()  # the decoded blocks are free now

    def _check_unchanged(self) -> None:
        if stamp_of(self.source) != self._stamp:
            raise ImageError(f"{self.source.name} changed while it was in use; ask again.")

    def _shown(self, values: np.ndarray, valid: np.ndarray) -> Pixels:
        rgb = self.stretch.apply(values)
        if self.stretch.palette is not None:
            index = np.clip(values[0], 0, len(self.stretch.palette) - 1).astype(np.intp)
            valid = valid & (self.stretch.palette[index, 3] > 0)
        if not valid.all():
            rgb[~valid] = 0
        return Pixels(rgb, valid)


class _Reading:
    """A scene whose file is open.

    Args:
        windows: as `Scene.reader` says.
    """

    def __init__(self, scene: Scene, dataset: DatasetReader, windows: Sequence[Wanted]) -> None:
        self._scene = scene
        self._driver = dataset.driver
        self._bands = BandReader(dataset, scene.choice)
        self._wholes = together(windows, self._bands.at_once)
        self._whole: Region | None = None
        self._pixels: Pixels | None = None  # of the whole

    def __call__(self, region: Region, out_size: tuple[int, int]) -> Pixels:
        whole = self._wholes.get((region, out_size))
        if whole is None:
            return self._read(region, out_size)
        left, top, right, bottom = whole
        if self._pixels is None or self._whole != whole:
            self._whole, self._pixels = whole, None  # the one before is free now
            self._pixels = self._read(whole, (right - left, bottom - top))
        x1, y1, x2, y2 = region
        return self._pixels.cut(slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))

    def _read(self, region: Region, out_size: tuple[int, int]) -> Pixels:
        self._scene._check_unchanged()
        x1, y1, x2, y2 = region
        with reported(self._scene.source.name, self._driver):
            return self._scene._shown(*self._bands.read(window_of(x1, y1, x2 - x1, y2 - y1), out_size))


def _band_infos(dataset: DatasetReader) -> tuple[BandInfo, ...]:
    return tuple(
        BandInfo(
            index,
            "".join(filter(str.isprintable, description or ""))[:_DESCRIPTION],
            color.name,
            dtype,
            scaled=scale_and_offset(dataset, index) != (1, 0),
        )
        for index, description, color, dtype in zip(
            dataset.indexes, dataset.descriptions, dataset.colorinterp, dataset.dtypes, strict=True
        )
    )


def _sample(dataset: DatasetReader, choice: BandChoice) -> np.ndarray | None:
    """Valid values [C, N] of the chosen bands from all over the scene; None where colours need no stretch.

    Pixels where one band alone is nodata count only where there are no others: a colour or not, that is no measurement.
    """
    if _is_palette(dataset, choice) or (eight_bit(dataset, choice) and choice.declared):
        return None
    bands = BandReader(dataset, choice)
    sample = _valid_values(bands, _sample_windows(dataset))
    if sample.shape[1] == 0:  # what there is may lie between the windows
        sample = _valid_values(bands, _spread(dataset, _MORE_WINDOWS))
    measured = (sample != bands.missing[..., 0]).all(axis=0)
    return sample[:, measured] if measured.any() else sample


def _valid_values(bands: BandReader, windows: Iterable[tuple[Window, tuple[int, int]]]) -> np.ndarray:
    parts = [bands.read(window, size) for window, size in windows]
    return np.concatenate([values[:, valid] for values, valid in parts], axis=1)


def _stretch(dataset: DatasetReader, choice: BandChoice, sample: np.ndarray | None, *, radar: bool) -> Stretch:
    if _is_palette(dataset, choice):
        try:
            colors = dataset.colormap(choice.indexes[0])
        except ValueError as error:
            raise ImageError("The image's colours are said to be in a palette, and it has none.") from error
        table = np.zeros((max(colors) + 1, 4), np.uint8)
        table[list(colors)] = list(colors.values())
        return Stretch("palette", palette=table)
    if sample is None:
        return Stretch("none")
    return fit_stretch(sample, eight_bit=eight_bit(dataset, choice), radar=radar)


def _is_palette(dataset: DatasetReader, choice: BandChoice) -> bool:
    return len(choice.indexes) == 1 and dataset.colorinterp[choice.indexes[0] - 1].name == "palette"


def _sample_windows(dataset: DatasetReader) -> Iterable[tuple[Window, tuple[int, int]]]:
    """Windows and output sizes that together show the scene: one overview, or a grid of small windows."""
    width, height = dataset.width, dataset.height
    shrunk = max([1, *dataset.overviews(1)])
    if width * height / shrunk**2 <= _SAMPLE_WHOLE:
        scale = max(1.0, max(width, height) / _SAMPLE_SIDE)
        return [(window_of(0, 0, width, height), (max(1, round(width / scale)), max(1, round(height / scale))))]
    return _spread(dataset, _SAMPLE_WINDOWS)


def _spread(dataset: DatasetReader, per_axis: int) -> Iterator[tuple[Window, tuple[int, int]]]:
    """Small windows from one corner to the other, each read as it is."""
    width, height = dataset.width, dataset.height
    side_x, side_y = min(_SAMPLE_WINDOW_SIDE, width), min(_SAMPLE_WINDOW_SIDE, height)
    for y in np.linspace(0, height - side_y, per_axis).astype(int).tolist():
        for x in np.linspace(0, width - side_x, per_axis).astype(int).tolist():
            yield window_of(x, y, side_x, side_y), (side_x, side_y)


def _warnings(dataset: DatasetReader, choice: BandChoice, place: Place) -> Iterator[str]:
    if choice.warning:
        yield choice.warning
    yield from place.warnings
    if (orientation := dataset.tags().get("EXIF_Orientation", "1").strip()) not in ("", "0", "1"):
        yield (
            f"The photo asks to be turned for display (EXIF orientation {orientation[:4]}); it is read, and its pixels "
            "are counted, as it is stored."
        )
    if len(dataset.subdatasets) > 1:
        yield f"The file holds {len(dataset.subdatasets)} images; the first one is read."
    if dataset.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
        yield "The file stores white as 0 (MINISWHITE), so that its picture is shown as a negative."


def _digest(file: ByteSource, stamp: Stamp) -> str:
    digest = hashlib.sha256(file.size.to_bytes(8, "little"))
    if isinstance(file, RemoteFile):
        digest.update(stamp.identity.encode() + file.read_at(0, _DIGEST_CHUNK))
    elif file.size <= _DIGEST_CHUNK * _DIGEST_CHUNKS:
        for offset in range(0, file.size, _DIGEST_CHUNK):
            digest.update(file.read_at(offset, _DIGEST_CHUNK))
    else:
        for i in range(_DIGEST_CHUNKS):
            digest.update(file.read_at((file.size - _DIGEST_CHUNK) * i // (_DIGEST_CHUNKS - 1), _DIGEST_CHUNK))
    return f"sha256:{digest.hexdigest()}"
