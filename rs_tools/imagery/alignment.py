"""Two scenes on one grid: what a comparison pixel by pixel needs.

The grid is the earlier scene's, whole: a caller's region and every answer are in pixels of an image that exists. The
later scene is read where it lies under each window, averaged by whole factors if it is finer, and sampled there:
bilinear for colours, nearest for validity. What the later scene does not cover is invalid.

A shift that remains between the two (georeferences are off by a pixel or two) is measured and reported, never applied:
whether it is an error of place or a change on the ground is not for this module to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from affine import Affine
from pyproj import CRS, Transformer

from rs_tools.errors import PairError
from rs_tools.imagery.reading import Wanted
from rs_tools.imagery.scene import Pixels, ReadWindow, Region, Scene

_NODES = 17  # per axis of a window; between them positions are interpolated (a test holds this to 0.05 pixels)
_OVERLAP_SIDE = 256  # samples per axis that tell how much the scenes overlap
_SHIFT_SIDE = 256
_SHIFT_WINDOWS = 4  # per axis
_SHIFT_VALID = 0.9
_UPSAMPLING = 50  # steps per pixel of the sub-pixel search
_OPTICAL = frozenset({"optical", "multispectral"})
_UNSURE = frozenset({"grayscale", "unknown"})  # kinds that are a lack of knowledge: compared, with a warning


class PairPixels(NamedTuple):
    """The same window of both scenes: each rgb uint8 [H, W, 3] and valid bool [H, W]."""

    before: Pixels
    after: Pixels

    @property
    def valid(self) -> np.ndarray:
        """Where both hold data, bool [H, W]."""
        return self.before.valid & self.after.valid


class ReadPair(Protocol):
    """Reads a window of the pair whose files are held open; see `Pair.reader`."""

    def __call__(self, region: Region, out_size: tuple[int, int]) -> PairPixels: ...


@dataclass(frozen=True)
class Shift:
    """How far the later scene's content lies from the earlier's.

    Attributes:
        x, y: in pixels of the grid, to the right and down: what is at p in `before` is at p + (x, y) in `after`.
        windows: how many windows agree on it, to within a pixel.
        tried: how many had data and structure enough to tell.
    """

    x: float
    y: float
    windows: int
    tried: int


@dataclass(frozen=True)
class Pair:
    """Two scenes that may be compared.

    Attributes:
        before, after: the scenes; the grid is that of `before`.
        overlap_share: share of the grid that `after` covers.
        warnings: what to keep in mind of any comparison of these two.
    """

    before: Scene
    after: Scene
    overlap_share: float
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, before: Scene, after: Scene) -> Pair:
        """Check that two scenes can be compared.

        Raises:
            PairError: they show different kinds of measurement, only one has a place on Earth, neither has and their
                sizes differ, or they do not overlap.
        """
        warnings = [*_modality_warnings(before, after), *_place_warnings(before, after)]
        if (before.stretch.kind == "none") != (after.stretch.kind == "none"):
            warnings.append(
                f"One image is shown as it is, the other stretched ({before.stretch.kind} and {after.stretch.kind}), "
                "so that ground that has not changed may look as if it had. Give both in one number format."
            )
        share = _overlap_share(before, after)
        if share == 0:
            raise PairError(
                f"The images do not overlap: {_extent(before)}; {_extent(after)}. Give two images of the same place."
            )
        if share < 1:
            told = f"{share:.1%}" if share >= 0.001 else f"{100 * share:.1g}%"
            warnings.append(f"Only {told} of the earlier image is covered by the later one; the rest is left out.")
        return cls(before, after, share, tuple(warnings))

    @contextmanager
    def reader(self, windows: Sequence[Wanted] = ()) -> Iterator[ReadPair]:
        """Read many windows with both files opened once; memory follows the windows, as with `Scene.reader`.

        Raises:
            AccessError, ImageError: as `Scene.reader`, on entering or from any call inside the `with` block.
        """
        with self.before.reader(windows) as read_before, self.after.reader() as read_after:

            def read(region: Region, out_size: tuple[int, int]) -> PairPixels:
                positions = self.positions(region, out_size)
                factor = self._factor(region, out_size)
                return PairPixels(read_before(region, out_size), _sampled(self.after, read_after, positions, factor))

            yield read

    def positions(self, region: Region, out_size: tuple[int, int]) -> np.ndarray:
        """Where the centres of a window's pixels lie in `after`.

        Args:
            region: x1, y1, x2, y2 in pixels of the grid.
            out_size: (width, height) that the window is read in.

        Returns:
            float64 [H, W, 2] x, y in pixels of `after`; not finite where that projection has no such place.
        """
        x1, y1, x2, y2 = region
        width, height = out_size
        x = x1 + (np.arange(width) + 0.5) * ((x2 - x1) / width)
        y = y1 + (np.arange(height) + 0.5) * ((y2 - y1) / height)
        node_x, node_y = np.linspace(x[0], x[-1], _NODES), np.linspace(y[0], y[-1], _NODES)
        nodes = np.stack(np.meshgrid(node_x, node_y), axis=-1)  # [N, N, 2]
        found = _to_after(self.before, self.after, nodes.reshape(-1, 2)).reshape(nodes.shape)
        if _torn(self.after, found):
            centres = np.stack(np.meshgrid(x, y), axis=-1)
            return _to_after(self.before, self.after, centres.reshape(-1, 2)).reshape(centres.shape)
        return _between(found, np.linspace(0, _NODES - 1, height), np.linspace(0, _NODES - 1, width))

    def _factor(self, region: Region, out_size: tuple[int, int]) -> int:
        """Whole pixels of `after` per pixel of a window at its middle, at least 1."""
        x, y = (region[0] + region[2]) / 2, (region[1] + region[3]) / 2
        across, down = (region[2] - region[0]) / out_size[0] / 2, (region[3] - region[1]) / out_size[1] / 2
        ends = np.array([[x - across, y], [x + across, y], [x, y - down], [x, y + down]])
        left, right, top, bottom = _to_after(self.before, self.after, ends)
        steps = [float(np.hypot(*step)) for step in (right - left, bottom - top)]
        most = _around(self.after) / 2  # beyond it a step goes from one end of the world to the other
        return max([1, *(math.floor(step + 1e-6) for step in steps if math.isfinite(step) and step <= most)])

    def shift(self) -> Shift | None:
        """The shift between the two, or None where nothing in them tells.

        Median over up to 16 windows spread over the grid. Each window's shift is the peak of the phase correlation
        (Kuglin & Hines 1975), refined by an upsampled Fourier transform around it (Guizar-Sicairos et al. 2008).
        """
        found = []
        with self.reader() as read:
            for region in _shift_windows(self.before.width, self.before.height):
                x1, y1, x2, y2 = region
                pixels = read(region, (x2 - x1, y2 - y1))
                if pixels.valid.mean() < _SHIFT_VALID:
                    continue
                if (one := phase_shift(*(_grey(side, pixels.valid) for side in pixels))) is not None:
                    found.append(one)
        if not found:
            return None
        middle = np.median(found, axis=0)
        near = np.abs(np.array(found) - middle).max(axis=1) <= 1
        if not near.any():
            return None
        x, y = np.mean(np.array(found)[near], axis=0)
        return Shift(float(x), float(y), int(near.sum()), len(found))


# --- shift ------------------------------------------------------------------------------------------------------------


def phase_shift(before: np.ndarray, after: np.ndarray) -> tuple[float, float] | None:
    """How far the content of `after` lies to the right and down of that of `before`, in pixels, to about 0.05.

    Args:
        before, after: float [H, W] of one size.

    Returns:
        (x, y), or None where one of them is flat.
    """
    height, width = before.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    spectra = [np.fft.fft2((image - image.mean()) * window) for image in (before, after)]
    cross = spectra[1] * spectra[0].conj()
    size = np.abs(cross)
    if size.max() <= 1e-9:
        return None
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    # Frequencies without power hold noise only, and the highest ones aliases of a shift between pixels.
    phase = np.where(size > 1e-6 * size.max(), cross / np.maximum(size, 1e-300), 0)
    cross = phase * np.exp(-16 * (fx**2 + fy**2))
    coarse = np.fft.ifft2(cross).real
    y, x = np.unravel_index(np.argmax(coarse), coarse.shape)
    peak = np.array([(y + height // 2) % height - height // 2, (x + width // 2) % width - width // 2], float)
    steps = np.arange(-_UPSAMPLING, _UPSAMPLING + 1) / _UPSAMPLING
    rows = np.exp(2j * np.pi * (peak[0] + steps)[:, None] * fy.T)  # [S, H]
    columns = np.exp(2j * np.pi * (peak[1] + steps)[None, :] * fx.T)  # [W, S]
    fine = (rows @ cross @ columns).real
    dy, dx = np.unravel_index(np.argmax(fine), fine.shape)
    return float(peak[1] + steps[dx]), float(peak[0] + steps[dy])


def _grey(pixels: Pixels, valid: np.ndarray) -> np.ndarray:
    """float64 [H, W], with the mean of the valid pixels in place of the others."""
    grey = pixels.rgb.mean(axis=2)
    return np.where(valid, grey, grey[valid].mean())


def _shift_windows(width: int, height: int) -> Iterator[Region]:
    side_x, side_y = min(_SHIFT_SIDE, width), min(_SHIFT_SIDE, height)
    for y in sorted(set(np.linspace(0, height - side_y, _SHIFT_WINDOWS).astype(int).tolist())):
        for x in sorted(set(np.linspace(0, width - side_x, _SHIFT_WINDOWS).astype(int).tolist())):
            yield x, y, x + side_x, y + side_y


# --- warping ----------------------------------------------------------------------------------------------------------


def _sampled(scene: Scene, read: ReadWindow, positions: np.ndarray, factor: int) -> Pixels:
    """The scene's pixels, averaged over `factor` x `factor`, at positions [H, W, 2] of it.

    Invalid outside the scene and where it holds no data.
    """
    if not _torn(scene, positions):
        return _sampled_at(scene, read, positions, factor)
    # Both ends of a scene around the world: each is read for itself, and nothing between them.
    west = positions[..., :1] < scene.width / 2
    ends = [_sampled_at(scene, read, np.where(end, positions, np.nan), factor) for end in (west, ~west)]
    return Pixels(ends[0].rgb + ends[1].rgb, ends[0].valid | ends[1].valid)


def _sampled_at(scene: Scene, read: ReadWindow, positions: np.ndarray, factor: int) -> Pixels:
    inside = _inside(scene, positions)
    height, width = inside.shape
    if not inside.any():
        return Pixels(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool))
    margin = factor + 1
    low = np.floor(positions[inside].min(axis=0)).astype(int) - margin
    high = np.ceil(positions[inside].max(axis=0)).astype(int) + margin
    x1, y1 = max(0, int(low[0])), max(0, int(low[1]))
    x2, y2 = min(scene.width, int(high[0])), min(scene.height, int(high[1]))
    size = max(1, round((x2 - x1) / factor)), max(1, round((y2 - y1) / factor))
    window = read((x1, y1, x2, y2), size)
    # Positions among the centres of the pixels that were read.
    x = (positions[..., 0] - x1) * (size[0] / (x2 - x1)) - 0.5
    y = (positions[..., 1] - y1) * (size[1] / (y2 - y1)) - 0.5
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    nearest = _picked(window.valid, np.rint(y), np.rint(x))
    valid = inside & nearest
    rgb = _bilinear(window, x, y)
    rgb[~valid] = 0
    return Pixels(rgb, valid)


def _bilinear(window: Pixels, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] at positions among pixel centres; invalid pixels take no part."""
    left, top = np.floor(x), np.floor(y)
    right_share, low_share = (x - left).astype(np.float32), (y - top).astype(np.float32)
    total = np.zeros((*x.shape, 3), np.float32)
    weight = np.zeros(x.shape, np.float32)
    for row, row_share in ((top, 1 - low_share), (top + 1, low_share)):
        for column, column_share in ((left, 1 - right_share), (left + 1, right_share)):
            share = row_share * column_share * _picked(window.valid, row, column)
            total += share[..., None] * _picked(window.rgb, row, column)
            weight += share
    return np.rint(total / np.maximum(weight, 1e-6)[..., None]).astype(np.uint8)


def _picked(values: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The values at whole rows and columns, the rim's beyond the rim."""
    height, width = values.shape[:2]
    return values[np.clip(row, 0, height - 1).astype(np.intp), np.clip(column, 0, width - 1).astype(np.intp)]


def _between(nodes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of nodes [N, N, 2] at fractional rows [H] and columns [W]: [H, W, 2]."""
    top = np.minimum(rows.astype(int), len(nodes) - 2)
    left = np.minimum(columns.astype(int), nodes.shape[1] - 2)
    down, right = (rows - top)[:, None, None], (columns - left)[:, None]
    with np.errstate(invalid="ignore"):  # beyond a projection's places
        along = nodes[:, left] * (1 - right) + nodes[:, left + 1] * right  # [N, W, 2]
        return along[top] * (1 - down) + along[top + 1] * down


def _to_after(before: Scene, after: Scene, xy: np.ndarray) -> np.ndarray:
    """Pixel positions [N, 2] of `before` as positions of `after`."""
    first, second = before.georeference, after.georeference
    if first is None or second is None:  # neither has a place: same size, pixel by pixel
        return xy
    x, y = _applied(first.transform, xy)
    if not _same_crs(first.crs_wkt, second.crs_wkt):
        between = Transformer.from_crs(CRS.from_wkt(first.crs_wkt), CRS.from_wkt(second.crs_wkt), always_xy=True)
        x, y = between.transform(x, y)
    with np.errstate(invalid="ignore"):
        if turn := _turn(second.crs_wkt):  # as this scene counts longitudes: 181 degrees may be its -179
            middle, _ = second.transform @ (after.width / 2, after.height / 2)
            x = x + turn * np.round((middle - x) / turn)
        return np.stack(_applied(~second.transform, np.stack([x, y], axis=1)), axis=1)


@lru_cache(maxsize=64)
def _turn(crs_wkt: str) -> float:
    """Once around the Earth in units of a geographic coordinate reference system; 0 of any other."""
    crs = CRS.from_wkt(crs_wkt)
    return round(math.tau / crs.axis_info[0].unit_conversion_factor, 6) if crs.is_geographic else 0.0


def _around(scene: Scene) -> float:
    """Pixels of a scene once around the Earth; infinite where its coordinates do not repeat."""
    place = scene.georeference
    turn = 0.0 if place is None else _turn(place.crs_wkt)
    return turn / math.hypot(place.transform.a, place.transform.d) if place and turn else math.inf


def _torn(scene: Scene, positions: np.ndarray) -> bool:
    """Whether neighbours among positions [H, W, 2] lie at either end of a scene around the world."""
    most = _around(scene) / 2
    if math.isinf(most):
        return False
    with np.errstate(invalid="ignore"):  # where there is no such place
        return any(bool((np.abs(np.diff(positions, axis=axis)) > most).any()) for axis in (0, 1))


def _same_crs(first: str, second: str) -> bool:
    return first == second or CRS.from_wkt(first) == CRS.from_wkt(second)


def _applied(transform: Affine, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = xy.T
    return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f


def _inside(scene: Scene, positions: np.ndarray) -> np.ndarray:
    """Which positions [..., 2] lie in the scene; not finite ones do not."""
    x, y = positions[..., 0], positions[..., 1]
    return (x >= 0) & (y >= 0) & (x <= scene.width) & (y <= scene.height)


def _overlap_share(before: Scene, after: Scene) -> float:
    """The share of `before` that `after` covers, by samples from where it may lie."""
    low, high = np.zeros(2), np.array([before.width, before.height], float)
    outer = np.linspace(0, 1, _OVERLAP_SIDE)
    reach = _to_after(after, before, _grid(outer, outer) * [after.width, after.height])
    if np.isfinite(reach).all():  # else some of it may lie anywhere
        # A pixel more, so that rounding leaves nothing out.
        low, high = (np.clip(corner, low, high) for corner in (reach.min(axis=0) - 1, reach.max(axis=0) + 1))
    inner = (np.arange(_OVERLAP_SIDE) + 0.5) / _OVERLAP_SIDE
    samples = low + _grid(inner, inner) * (high - low)
    part = float(np.prod(high - low)) / (before.width * before.height)
    return part * float(_inside(after, _to_after(before, after, samples)).mean())


def _grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All pairs of an x and a y, [N, 2]."""
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


# --- what may be compared ---------------------------------------------------------------------------------------------


def _modality_warnings(before: Scene, after: Scene) -> list[str]:
    first, second = before.modality, after.modality
    if first == second or {first, second} <= _OPTICAL:
        return []
    names = (f"{one.source.name} looks {one.modality} ({one.modality_reason})" for one in (before, after))
    told = " and ".join(names)
    if {first, second} & _UNSURE:
        return [f"The images may be of different kinds: {told}. Differences may come from that."]
    raise PairError(
        f"The images measure different things: {told}. Compare two of one kind, or choose bands that match (`bands`)."
    )


def _place_warnings(before: Scene, after: Scene) -> list[str]:
    placed = [scene for scene in (before, after) if scene.georeference is not None]
    if len(placed) == 2:
        return []
    if len(placed) == 1:
        lost = after if placed[0] is before else before
        raise PairError(
            f"{placed[0].source.name} has a place on Earth and {lost.source.name} has none, so they cannot be laid on "
            "each other. Give two georeferenced images, or two of one size without georeference."
        )
    if (before.width, before.height) != (after.width, after.height):
        raise PairError(
            f"Neither image has a place on Earth, and their sizes differ: {_extent(before)}; {_extent(after)}. Give "
            "two georeferenced images, or two of one size that show the same place."
        )
    return ["Neither image has a place on Earth: they are compared pixel by pixel, as if they lay on each other."]


def _extent(scene: Scene) -> str:
    """The scene's name with its place, or its size where it has none."""
    bounds = scene.georeference.bounds(scene.width, scene.height) if scene.georeference else None
    if bounds is None:
        return f"{scene.source.name} is {scene.width} x {scene.height} pixels"
    west, south, east, north = bounds
    return f"{scene.source.name} spans west {west:.5f}, south {south:.5f}, east {east:.5f}, north {north:.5f}"
