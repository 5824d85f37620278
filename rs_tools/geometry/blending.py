"""One class mask from the probability maps of overlapping tiles, a band of rows at a time.

Near its edges a tile knows less of the surroundings, so each map counts with a weight that falls towards the edges but
never to nothing (a Hann window over the tile, from `_WEIGHTS` down to 1). Probabilities become 8 bits and weights are
whole numbers, so that sums are exact in float32: where tiles agree, the blend is what each of them says, to the last
bit, and no seam can show.

Rows leave as soon as no tile can add to them, and tiles leave with their last row: what is kept is that of the tiles
across the scene, whatever its height, and where these are many it is kept in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rs_tools.geometry.measures import TileFrame
from rs_tools.geometry.shelf import Shelf

NODATA = 255  # in a mask
MAX_CLASSES = 254
_WEIGHTS = 32  # per axis: 32 * 32 * 255 * 64 tiles over one pixel < 2**24, exact in float32
_LEVELS = 255
_BAND_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Band:
    """Rows of a blend.

    Attributes:
        top: the first row, counted from the region's first.
        probabilities: float32 [C, n, W].
        valid: bool [n, W]; where no tile has data it is False and the probabilities are 0.
    """

    top: int
    probabilities: np.ndarray
    valid: np.ndarray

    def mask(self, thresholds: float | Sequence[float] = 0.5) -> np.ndarray:
        """The class furthest above its threshold: uint8 [n, W], 1 + its index, 0 where none reaches it, 255 nodata.

        Args:
            thresholds: one for all classes, or one for each.
        """
        margins = self.probabilities - np.reshape(np.asarray(thresholds, np.float32), (-1, 1, 1))
        mask = np.where(margins.max(axis=0) >= 0, margins.argmax(axis=0) + 1, 0).astype(np.uint8)
        mask[~self.valid] = NODATA
        return mask


class Blender:
    """Blends the maps of tiles into bands of rows, from the top.

        for index, (probabilities, valid) in answers:  # in any order; row by row keeps the memory small
            for band in blender.add(index, probabilities, valid):
                ...

    Tiles that were read at a coarser scale are interpolated bilinearly to scene pixels.

    Args:
        frames: where each tile lies; all of them, beforehand.
        region: [x1, y1, x2, y2] to cover, in scene pixels.
        classes: number of maps per tile, at most 254.
        shelf: where maps wait; None: one that keeps its file in the system's folder.
    """

    def __init__(
        self, frames: Sequence[TileFrame], region: Sequence[int], classes: int, shelf: Shelf | None = None
    ) -> None:
        if not 1 <= classes <= MAX_CLASSES:
            raise ValueError(f"a mask has 1 to {MAX_CLASSES} classes, not {classes}")
        self._frames = list(frames)
        self._x1, self._y1, self._x2, self._y2 = region
        self._classes = classes
        self._waiting = set(range(len(self._frames)))
        self._shelf = shelf or Shelf()  # of each tile uint8 [h, C + 1, w]: its maps, then which pixels are valid
        self._done = self._y1  # rows above have left

    def add(self, index: int, probabilities: np.ndarray, valid: np.ndarray | None = None) -> Iterator[Band]:
        """Take the maps of one tile and give the rows that are then complete; after the last tile, all.

        Args:
            index: which of `frames`.
            probabilities: float [C, h, w] in 0..1, or uint8 in 0..255, at the tile's own size.
            valid: bool [h, w], False where the tile has no data; None: everywhere valid.

        Raises:
            ArtifactError: there is no room for the maps on the disk.
            ValueError: the tile was added before, or its maps have another shape.
        """
        width, height = self._frames[index].size
        if index not in self._waiting:
            raise ValueError(f"tile {index} was added before")
        if probabilities.shape != (self._classes, height, width):
            raise ValueError(
                f"tile {index} needs maps of shape {(self._classes, height, width)}, not {probabilities.shape}"
            )
        self._waiting.remove(index)
        planes = np.empty((height, self._classes + 1, width), np.uint8)
        for plane, one in enumerate(probabilities):
            planes[:, plane] = one if one.dtype == np.uint8 else np.rint(np.clip(one, 0, 1) * _LEVELS)
        planes[:, -1] = True if valid is None else valid.astype(bool)
        self._shelf.put(index, planes)
        return self._complete()

    def _complete(self) -> Iterator[Band]:
        ready = min((self._frames[i].region[1] for i in self._waiting), default=self._y2)
        rows = max(1, _BAND_BYTES // (8 * (self._classes + 1) * (self._x2 - self._x1)))
        while self._done < min(ready, self._y2):
            bottom = min(self._done + rows, ready, self._y2)
            band = self._blend(self._done, bottom)
            self._done = bottom
            for index in self._shelf:
                if self._frames[index].region[3] <= bottom:
                    self._shelf.drop(index)
            yield band

    def _blend(self, top: int, bottom: int) -> Band:
        total = np.zeros((self._classes, bottom - top, self._x2 - self._x1), np.float32)
        weight = np.zeros(total.shape[1:], np.float32)
        for index in self._shelf:
            x1, y1, x2, y2 = self._frames[index].region
            width, height = self._frames[index].size
            left, right = max(x1, self._x1), min(x2, self._x2)
            first, last = max(y1, top), min(y2, bottom)
            if left >= right or first >= last:
                continue
            rows = _Sampling(y1, y2, height, first, last)
            columns = _Sampling(x1, x2, width, left, right)
            planes = self._shelf.rows(index, rows.span)[:, :, columns.span]
            here = np.outer(rows.weights, columns.weights)
            here *= planes[:, -1][np.ix_(rows.nearest, columns.nearest)]
            place = np.s_[first - top : last - top, left - self._x1 : right - self._x1]
            weight[place] += here
            for plane, one in enumerate(total):
                one[place] += here * _interpolated(planes[:, plane], rows, columns)
        valid = weight > 0
        total /= np.maximum(weight, 1)
        total /= np.float32(_LEVELS)
        return Band(top - self._y1, total, valid)


class _Sampling:
    """How scene rows (or columns) start..stop lie in a tile that spans low..high with `size` pixels of its own.

    Attributes:
        span: the tile's own rows that take part; the numbers below count from its start.
        nearest, before, after: of each scene row the tile's row that it lies in, and those that it lies between.
        plain: the two have the same scale.
        share: of the way from the row before to the one after.
        weights: of each scene row.
    """

    def __init__(self, low: int, high: int, size: int, start: int, stop: int) -> None:
        at = np.arange(start, stop) + 0.5 - low
        own = at * size / (high - low)
        self.nearest = np.minimum(own.astype(int), size - 1)
        self.plain = size == high - low
        self.before = np.clip(np.floor(own - 0.5).astype(int), 0, size - 1)
        self.after = np.minimum(self.before + 1, size - 1)
        self.share = np.clip(own - 0.5 - self.before, 0, 1).astype(np.float32)
        hann = np.sin(np.pi * at / (high - low)) ** 2
        self.weights = (1 + np.rint((_WEIGHTS - 1) * hann)).astype(np.float32)
        self.span = slice(int(self.before[0]), int(self.after[-1]) + 1)
        for some in (self.nearest, self.before, self.after):
            some -= self.span.start


def _interpolated(level: np.ndarray, rows: _Sampling, columns: _Sampling) -> np.ndarray:
    """Values at scene pixels. Start + share * difference: equal neighbours give exactly their value."""
    if rows.plain and columns.plain:
        return level[rows.nearest[0] : rows.nearest[-1] + 1, columns.nearest[0] : columns.nearest[-1] + 1]
    upper, lower = level[rows.before].astype(np.float32), level[rows.after].astype(np.float32)
    lines = upper + rows.share[:, None] * (lower - upper)
    left, right = lines[:, columns.before], lines[:, columns.after]
    return left + columns.share * (right - left)
