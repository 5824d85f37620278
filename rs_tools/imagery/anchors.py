"""World knowledge for a scene: AlphaEarth embeddings of its year, sampled at anchors over its extent.

The AlphaEarth Foundations annual embeddings (Google and Google DeepMind, CC BY 4.0) come as GeoTIFFs of 64 signed
bytes a pixel, one file per year and piece of a UTM zone, stored bottom-up: the transform says so, and every place goes
through it. A byte v stands for sign(v) (v / 127.5)^2, -128 for no data; a decoded vector has unit length up to the
rounding. Exports that hold decimal numbers are read as they are.

Attribution that their licence asks for: "The AlphaEarth Foundations Satellite Embedding dataset is produced by Google
and Google DeepMind."
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from rasterio.io import DatasetReader
from rasterio.windows import Window

from rs_tools.errors import AccessError, ImageError, InputError
from rs_tools.geometry.measures import Georeference
from rs_tools.imagery.access import AccessPolicy
from rs_tools.imagery.scene import Scene

WIDTH = 64
NODATA = -128
MAX_NODES = 64  # per axis
_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)(?:-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01]))?(?!\d)")  # a year or a day
_BAND = re.compile(r"A(\d\d)")


@dataclass(frozen=True, eq=False)
class SceneAnchors:
    """Anchors of one region of one scene.

    Attributes:
        vectors: float32 [S, 64], about unit length; S is 0 where nothing is known of the place.
        positions: float32 [S, 2], (y, x) as shares of the region's height and width, from edge to edge.
        lonlat: float64 [S, 2], WGS84 degrees.
        year: the year that the vectors describe; 0 where it is not known.
        sources: names of the files that they come from.
        warnings: what a user of them should know.
    """

    vectors: np.ndarray
    positions: np.ndarray
    lonlat: np.ndarray
    year: int
    sources: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write `features` and `positions` as FUSAR-GPT's .npz takes them."""
        np.savez(path, features=self.vectors, positions=self.positions)


class EmbeddingLayers:
    """Annual embedding rasters below a folder.

    A file's year is the innermost folder with a year's name, as in the published layout `annual/2024/10N/...tiff`, or
    else a year in the file's own name. Files without one are left out.

    Args:
        policy: what may be read.
        folder: where the rasters are, inside the policy's roots; empty takes the roots. One raster is taken too, also
            where nothing tells its year.

    Raises:
        AccessError: the folder may not be read.
        ImageError: there is no raster with a year in it.
    """

    def __init__(self, policy: AccessPolicy, folder: str = "") -> None:
        self._policy = policy
        self._files: dict[int, list[Path]] = {}
        single = _single(policy, folder)
        for path in policy.images(folder) if single is None else ():
            if (year := year_of(path)) is not None:
                self._files.setdefault(year, []).append(path)
        if single is not None:
            self._files[year_of(single) or 0] = [single]
        if not self._files:
            raise ImageError(
                f"There are no embedding rasters of a known year in {folder or 'the allowed folders'}; "
                "keep them in folders named by year, such as 2024/10N/."
            )

    @property
    def years(self) -> tuple[int, ...]:
        return tuple(sorted(self._files))

    def anchors(self, scene: Scene, year: int, nodes: int = 5, region: Sequence[float] = ()) -> SceneAnchors:
        """Sample the embeddings of a year at the middles of `nodes` x `nodes` equal parts of a region.

        A year that is not there is replaced by the nearest, with a warning. Nodes without data are left out.

        Raises:
            ImageError: the scene has no known place, or a file of that year is no embedding raster.
            InputError: `nodes` is not within 1 to 64.
            RegionError: the region is not inside the scene.
        """
        if not 1 <= nodes <= MAX_NODES:
            raise InputError(f"nodes must be from 1 to {MAX_NODES} per axis; got {nodes}.")
        if scene.georeference is None:
            raise ImageError(f"{scene.source.name} has no known place on Earth, so no embedding belongs to it.")
        x1, y1, x2, y2 = scene.region(region)
        share = (np.arange(nodes) + 0.5) / nodes
        positions = np.stack(np.meshgrid(share, share, indexing="ij"), -1).reshape(-1, 2)  # (y, x), row by row
        pixels = np.stack([x1 + positions[:, 1] * (x2 - x1), y1 + positions[:, 0] * (y2 - y1)], 1)
        lonlat = scene.georeference.lonlat(pixels)
        used = min(self._files, key=lambda known: (abs(known - year), known))
        vectors, sources = self._sample(self._files[used], lonlat)
        found = np.flatnonzero(np.isfinite(vectors).all(1))
        return SceneAnchors(
            vectors[found],
            positions[found].astype(np.float32),
            lonlat[found],
            used,
            sources,
            tuple(_warnings(year, used, len(found), len(positions))),
        )

    def _sample(self, files: Iterable[Path], lonlat: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """float32 [N, 64] vectors at places, NaN where no file has one, and the names of the files that had some."""
        vectors = np.full((len(lonlat), WIDTH), np.nan, np.float32)
        sources = []
        for path in files:
            missing = np.flatnonzero(np.isnan(vectors[:, 0]) & np.isfinite(lonlat).all(1))
            if not missing.size:
                break
            with self._policy.open(path) as dataset:
                read = _vectors_at(dataset, path, lonlat[missing])
            if np.isfinite(read).any():
                vectors[missing] = read
                sources.append(path.name)
        return vectors, tuple(sources)


class Knowledge:
    """The embeddings of one year, for the looks at one scene.

    Attributes:
        described: names and year of the rasters that were used so far.
        warnings: what a reader of the answers should know.

    Args:
        policy: what may be read.
        given: a raster of embeddings, or a folder of those of one year.
        scene: what is looked at.
        region: the part of it that all looks are in.

    Raises:
        AccessError: it may not be read.
        InputError: it holds several years.
        ImageError: it holds no embeddings, or none of this place; or the scene has no known place.
    """

    NODES = 5  # per axis of a look

    def __init__(self, policy: AccessPolicy, given: str, scene: Scene, region: Sequence[float]) -> None:
        self._layers, self._scene = EmbeddingLayers(policy, given), scene
        years = self._layers.years
        if len(years) > 1:
            known = ", ".join(map(str, years))
            raise InputError(
                f"{given} holds embeddings of several years ({known}): name the folder of the year in which the image "
                f"was taken, such as {given.rstrip('/')}/{years[-1]}, or one raster."
            )
        self._year = max(years)
        self._sources: set[str] = set()
        self._nodes = self._found = 0
        whole = self._layers.anchors(scene, self._year, self.NODES, region)
        if not len(whole.vectors):
            x1, y1, x2, y2 = scene.region(region)
            assert scene.georeference is not None
            ((lon, lat),) = scene.georeference.lonlat(np.array([[(x1 + x2) / 2, (y1 + y2) / 2]]))
            raise ImageError(
                f"{given} holds no embedding at the region's place (its middle is {lon:.4f} E, {lat:.4f} N): give the "
                "raster of this place, or leave `embeddings` empty."
            )

    def at(self, region: Sequence[float]) -> np.ndarray:
        """float32 [S, 66] anchors of one look, as they go to the model server; S is 0 where none are known."""
        found = self._layers.anchors(self._scene, self._year, self.NODES, region)
        self._sources |= set(found.sources)
        self._nodes += self.NODES**2
        self._found += len(found.vectors)
        return np.concatenate([found.vectors, found.positions], 1)

    @property
    def described(self) -> str:
        return f"{', '.join(sorted(self._sources))} ({self._year or 'year unknown'})"

    @property
    def warnings(self) -> list[str]:
        told = list(_warnings(self._year, self._year, self._found, self._nodes))
        taken = _DATE.search(PurePath(self._scene.source.name).stem)
        if taken and self._year and int(taken[1]) != self._year:
            told.append(f"The image's name says {taken[1]}; the embeddings are of {self._year}.")
        return told


def _single(policy: AccessPolicy, given: str) -> Path | None:
    """The raster that is named; None where it is a folder. What may not be read is refused when the folder is."""
    if not given:
        return None
    try:
        source = policy.resolve(given)
    except AccessError:  # no file: a folder, or neither, which `AccessPolicy.images` says
        return None
    return source if isinstance(source, Path) else None


def dequantise(raw: np.ndarray) -> np.ndarray:
    """int8 [..., 64] as stored -> float32 [..., 64] in -1..1; NaN where any channel holds no data."""
    value = raw.astype(np.float32) / 127.5
    vectors = np.sign(value) * value**2
    vectors[(raw == NODATA).any(-1)] = np.nan
    return vectors


def year_of(path: Path) -> int | None:
    """The year a raster describes, by the innermost folder named by one, else by its own name."""
    for part in reversed(path.parts[:-1]):
        if _YEAR.fullmatch(part):
            return int(part)
    found = _YEAR.search(path.stem)
    return int(found[0]) if found else None


def _vectors_at(dataset: DatasetReader, path: Path, lonlat: np.ndarray) -> np.ndarray:
    """float32 [N, 64] at places in one file; NaN outside it and where it has no data."""
    bands = _bands(dataset, path)
    found = dataset.crs and Georeference.of(dataset.crs.to_wkt(), dataset.transform, dataset.width, dataset.height)
    if not found:
        raise ImageError(f"{path.name} has no known place on Earth; embedding rasters need a CRS.")
    vectors = np.full((len(lonlat), WIDTH), np.nan, np.float32)
    xy = found.pixels(lonlat)
    size = dataset.width, dataset.height
    inside = np.flatnonzero(np.isfinite(xy).all(1) & (xy >= 0).all(1) & (xy < size).all(1))
    cells = np.floor(xy[inside]).astype(int)
    for members in _by_block(dataset, cells):
        (left, top), (right, bottom) = cells[members].min(0), cells[members].max(0) + 1
        window = Window.from_slices((top, bottom), (left, right))
        raw = dataset.read(bands, window=window)[:, cells[members, 1] - top, cells[members, 0] - left].T  # [n, 64]
        vectors[inside[members]] = dequantise(raw) if raw.dtype == np.int8 else _decimal(raw, dataset.nodata)
    return vectors


def _decimal(raw: np.ndarray, nodata: float | None) -> np.ndarray:
    vectors = raw.astype(np.float32)
    gone = ~np.isfinite(raw) if nodata is None else ~np.isfinite(raw) | (raw == nodata)
    vectors[gone.any(-1)] = np.nan
    return vectors


def _by_block(dataset: DatasetReader, cells: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the cells [n, 2] (x, y) of each stored block: a block is decoded once."""
    height, width = dataset.block_shapes[0]
    blocks = cells // (width, height)
    _, block = np.unique(blocks, axis=0, return_inverse=True)
    for number in range(block.max(initial=-1) + 1):
        yield np.flatnonzero(block.ravel() == number)


def _bands(dataset: DatasetReader, path: Path) -> list[int]:
    """Band numbers of the axes A00 to A63 in order, by their names where the file has them."""
    names = [_BAND.fullmatch(name or "") for name in dataset.descriptions]
    axes = {int(name[1]): index for name, index in zip(names, dataset.indexes, strict=True) if name}
    if not axes and dataset.count == WIDTH:
        axes = dict(enumerate(dataset.indexes))
    kinds = set(dataset.dtypes)
    if sorted(axes) != list(range(WIDTH)) or not (kinds == {"int8"} or kinds <= {"float32", "float64"}):
        raise ImageError(
            f"{path.name} is no embedding raster: it has {dataset.count} bands of {', '.join(sorted(kinds))}; "
            f"{WIDTH} bands A00 to A{WIDTH - 1} of int8, float32 or float64 are needed."
        )
    return [axes[axis] for axis in range(WIDTH)]


def _warnings(asked: int, used: int, found: int, nodes: int) -> Iterator[str]:
    if used != asked:
        yield f"There are no embeddings of {asked}; those of {used} were taken."
    if found < nodes:
        yield f"{nodes - found} of {nodes} anchors have no embedding and were left out."
