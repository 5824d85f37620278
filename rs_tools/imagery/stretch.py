"""From band values to 8 bits: one stretch for a whole scene, so that every window of it looks alike.

The rule: a palette is looked up; 8-bit imagery that the file declares as red, green, blue stays as it is, and so does
other 8-bit data whose values already fill the range; everything else is stretched linearly between the 2nd and 98th
percentile of each band over the valid pixels (where these are one value, between the lowest and the highest). Values
are what the file's scale and offset make of its numbers. Radar amplitudes and intensities go through decibels first;
whether a value is an amplitude or an intensity only changes the decibels by a factor, which the limits absorb. Values
that are decibels already (more than a few are negative) are stretched as they are, and so is 8-bit radar, which
somebody stretched before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

_PERCENTILES = (2.0, 98.0)
_FULL_ENOUGH = 96  # grey levels between the percentiles, of 255
_BELOW_NOISE = 0.05  # of backscatter, share that taking the thermal noise off may leave negative


@dataclass(frozen=True)
class Stretch:
    """How values become 8-bit values.

    Attributes:
        kind: `none` (values pass unchanged), `palette`, `linear` or `decibel`.
        limits: (low, high) of each band, in decibels for `decibel`; empty for `none` and `palette`.
        palette: uint8 [K, 4] red, green, blue, alpha of each value; for `palette` only.
    """

    kind: Literal["none", "palette", "linear", "decibel"]
    limits: tuple[tuple[float, float], ...] = ()
    palette: np.ndarray | None = None

    def __str__(self) -> str:
        if not self.limits:
            return self.kind
        limits = ", ".join(f"{low:.6g} to {high:.6g}" for low, high in self.limits)
        return f"{self.kind}, percentiles {_PERCENTILES[0]:g} to {_PERCENTILES[1]:g} of the scene: {limits}"

    def apply(self, values: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] of band values [C, H, W], C = 1 or 3; it may be their memory.

        Values of invalid pixels come out arbitrary.
        """
        if self.palette is not None:
            index = np.clip(np.nan_to_num(values[0]), 0, len(self.palette) - 1).astype(np.intp)
            return self.palette[index, :3]
        if self.kind == "none" and values.dtype == np.uint8:
            tile = values
        else:
            tile = np.clip(np.rint(self._stretched(values)), 0, 255).astype(np.uint8)
        if len(tile) == 3 and (picture := tile.transpose(1, 2, 0)).flags.c_contiguous:
            return picture
        rgb = np.empty((*tile.shape[1:], 3), np.uint8)
        for channel, band in enumerate(np.broadcast_to(tile, (3, *tile.shape[1:]))):  # much faster than as a whole
            rgb[..., channel] = band
        return rgb

    def _stretched(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "none":
            return np.nan_to_num(values)
        return np.stack([self._scaled(band, *limits) for band, limits in zip(values, self.limits, strict=True)])

    def _scaled(self, band: np.ndarray, low: float, high: float) -> np.ndarray:
        band = np.nan_to_num(band)
        if self.kind == "decibel":
            band = _decibels(band, floor=10 ** (low / 10))
        if high <= low:  # one value everywhere: mid-grey
            return np.full(band.shape, 127.5)
        return (band.astype(np.float64) - low) * (255 / (high - low))


def fit_stretch(sample: np.ndarray, *, eight_bit: bool, radar: bool) -> Stretch:
    """The stretch of a scene.

    Args:
        sample: float [C, N] valid values of the chosen bands from all over the scene; N may be 0.
        eight_bit: the values are bytes that stand for themselves (and were not declared to be colours).
        radar: the values are radar backscatter.
    """
    if sample.shape[1] == 0:
        return Stretch("none")
    if eight_bit:
        low, high = np.percentile(sample, _PERCENTILES)
        if high - low >= _FULL_ENOUGH:
            return Stretch("none")
    elif radar and (sample < 0).mean() < _BELOW_NOISE and (sample > 0).any(axis=1).all():
        return Stretch("decibel", tuple(_limits(_decibels(band[band > 0], floor=0)[None])[0] for band in sample))
    return Stretch("linear", _limits(sample))


def _limits(sample: np.ndarray) -> tuple[tuple[float, float], ...]:
    low, high = np.percentile(sample, _PERCENTILES, axis=1)
    rare = high <= low  # nearly all is of one value, and what is not is what there is to see
    low, high = np.where(rare, sample.min(axis=1), low), np.where(rare, sample.max(axis=1), high)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def _decibels(values: np.ndarray, floor: float) -> np.ndarray:
    return 10 * np.log10(np.maximum(values.astype(np.float64), floor))
